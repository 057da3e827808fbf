"PPO: the six cases, the oracle, stable-baselines3's own update, masks, bad input."
import math
import re

import pytest
import torch
from stable_baselines3 import PPO
from stable_baselines3.common.utils import explained_variance as sb3_explained_variance

from po_book.mdp import random_mdp
from po_book.ppo import (
    AdaptiveKL,
    MAX_LOG_RATIO,
    approx_kl,
    clipped_surrogate,
    entropy,
    explained_variance,
    kl_penalty,
    masked_mean,
    outside_band,
    ppo_loss,
    ppo_metrics,
    ratio,
    value_loss,
)

COEFFICIENTS = {"value_coef": 0.7, "entropy_coef": 0.03}
COLUMNS = ["logp", "logp_old", "advantages", "entropy", "values", "returns"]


def batch(*shape, seed=0, dtype=torch.float64):
    "Random columns of a batch, ratios well inside and outside the band."
    generator = torch.Generator().manual_seed(seed)
    columns = torch.randn(len(COLUMNS), *shape, dtype=dtype, generator=generator)
    return dict(zip(COLUMNS, columns.unbind()))


def loss_and_gradients(columns, **options):
    "Loss, metrics, and the gradients with respect to the network's three outputs."
    watched = {k: x for k, x in columns.items() if k not in ("advantages", "values_old")}
    kept = ("clip_low", "clip_high", "mask")
    metrics = ppo_metrics(**watched, **{k: x for k, x in options.items() if k in kept})
    columns = {name: x.clone() for name, x in columns.items()}
    live = [columns[name].requires_grad_() for name in ("logp", "entropy", "values")]
    loss = ppo_loss(**columns, **COEFFICIENTS, **options)
    return loss.detach(), metrics, torch.autograd.grad(loss, live)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def gradient(y, x):
    "Gradient of the sum of `y` with respect to `x`."
    return torch.autograd.grad(y.sum(), x, retain_graph=True)[0]


# The objective

SIX = [  # ratio, advantage, value, slope in the ratio; bounds 0.8 and 1.3
    (1.25, 2.0, 2.5, 2.0),
    (1.25, -2.0, -2.5, -2.0),
    (0.5, 2.0, 1.0, 2.0),
    (0.5, -2.0, -1.6, 0.0),
    (1.5, 2.0, 2.6, 0.0),
    (1.5, -2.0, -3.0, -2.0),
]


@pytest.mark.parametrize("rho, A, value, slope", SIX)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_six_cases(rho, A, value, slope, dtype):
    rho = torch.tensor([rho], dtype=dtype, requires_grad=True)
    one, A = torch.ones(1, dtype=dtype), torch.tensor([A], dtype=dtype)
    got = clipped_surrogate(rho.log(), one.log(), A, 0.2, 0.3)
    close(got.detach(), torch.tensor([value], dtype=dtype), 1e-6)
    close(gradient(got, rho), torch.tensor([slope], dtype=dtype), 1e-6)


@pytest.mark.parametrize("seed", range(20))
def test_sign_identity_in_value_and_gradient(seed):
    generator = torch.Generator().manual_seed(seed)
    low, high = (0.9 * torch.rand(2, generator=generator)).tolist()
    x = batch(500, seed=seed)
    logp = x["logp"].requires_grad_()
    A = x["advantages"]
    rho = (logp - x["logp_old"]).exp()
    c = torch.where(A >= 0, torch.full_like(A, 1 + high), torch.full_like(A, 1 - low))
    one_line = torch.minimum(rho * A, c * A)
    got = clipped_surrogate(logp, x["logp_old"], A, low, high)
    close(got, one_line)
    close(gradient(got, logp), gradient(one_line, logp))


def test_zero_advantage_has_no_value_and_no_gradient():
    logp = torch.linspace(-3, 3, 7, requires_grad=True)
    got = clipped_surrogate(logp, torch.zeros(7), torch.zeros(7))
    assert got.eq(0).all() and gradient(got, logp).eq(0).all()


def test_on_the_edges_of_the_band_the_slope_lies_between_those_beside():
    logp = torch.tensor([1.25, 0.75], dtype=torch.float64).log().requires_grad_()
    A = torch.tensor([1.0, -1.0], dtype=torch.float64)
    got = clipped_surrogate(logp, torch.zeros_like(A), A, 0.25)
    slope = gradient(got, logp) / logp.detach().exp() / A
    assert ((slope >= 0) & (slope <= 1)).all()


@pytest.mark.parametrize("cap", [1.5, 3.0, 100.0])
def test_dual_clip_is_the_formula(cap):
    x = batch(1000, seed=3)
    logp, old, A = 3 * x["logp"], x["logp_old"], x["advantages"]
    single = clipped_surrogate(logp, old, A)
    formula = torch.where(A < 0, torch.maximum(single, cap * A), single)
    close(clipped_surrogate(logp, old, A, dual_clip=cap), formula)


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("objective", [
    clipped_surrogate,
    lambda *columns: clipped_surrogate(*columns, 0.1, 0.4, 3.0),
    lambda *columns: kl_penalty(*columns, beta=3.0),
])
def test_first_gradient_is_the_policy_gradient(objective, seed):
    mdp = random_mdp(6, 3, 0.9, seed)
    generator = torch.Generator().manual_seed(seed)
    logits = torch.randn(6, 3, dtype=torch.float64, generator=generator)
    logits.requires_grad_()
    exact = gradient(mdp.objective(logits.softmax(-1)), logits)
    pi = logits.detach().softmax(-1)
    weight = mdp.occupancy(pi)[:, None] * pi / (1 - mdp.gamma)
    gain = objective(logits.log_softmax(-1), pi.log(), mdp.advantages(pi))
    close(gradient(weight * gain, logits), exact)


# The divergence

def test_approx_kl_is_unbiased_in_value_and_gradient():
    old = torch.randn(50, 4, dtype=torch.float64).log_softmax(-1)
    logits = torch.randn(50, 4, dtype=torch.float64, requires_grad=True)
    new = logits.log_softmax(-1)
    exact = (old.exp() * (old - new)).sum()
    estimate = (old.exp() * approx_kl(new, old)).sum()
    close(estimate, exact)
    close(gradient(estimate, logits), gradient(exact, logits))


def test_approx_kl_keeps_its_digits_in_float32():
    step = torch.tensor([1e-4, -1e-4])
    torch.testing.assert_close(
        approx_kl(step, torch.zeros(2)), step**2 / 2, rtol=1e-3, atol=0
    )
    assert (approx_kl(torch.randn(10_000), torch.zeros(10_000)) >= 0).all()


def test_kl_penalty_takes_an_exact_divergence():
    x = batch(20)
    columns, kl = (x["logp"], x["logp_old"], x["advantages"]), x["returns"].abs()
    close(kl_penalty(*columns, 2.0, kl), ratio(*columns[:2]) * columns[2] - 2 * kl)
    close(kl_penalty(*columns, 0.0), ratio(*columns[:2]) * columns[2])


def test_adaptive_kl_follows_the_rule():
    controller = AdaptiveKL(target=0.02, beta=1.0)
    assert controller.update(0.031) == 2.0          # above 1.5 times the target
    assert controller.update(0.02 * 1.5) == 2.0     # the edge is still inside
    assert controller.update(0.02 / 1.5) == 2.0
    assert controller.update(0.013) == 1.0
    assert controller.update(torch.tensor(-0.001)) == 0.5  # an estimate may be negative
    assert controller.update(math.inf) == 1.0


def test_adaptive_kl_recovers_from_a_long_silence():
    controller = AdaptiveKL(target=0.01, bounds=(0.125, 8.0))
    for _ in range(2000):
        controller.update(0.0)
    assert controller.beta == 0.125
    assert controller.update(1.0) == 0.25
    for _ in range(2000):
        controller.update(1.0)
    assert controller.beta == 8.0


@pytest.mark.parametrize("name, options", [
    ("target", {"target": 0.0}),
    ("target", {"target": math.nan}),
    ("target", {"target": math.inf}),
    ("beta", {"target": 0.01, "beta": 0.0}),
    ("beta", {"target": 0.01, "beta": 1e9}),
    ("factor", {"target": 0.01, "factor": 1.0}),
    ("band", {"target": 0.01, "band": 0.5}),
    ("bounds", {"target": 0.01, "bounds": (2.0, 1.0)}),
    ("bounds", {"target": 0.01, "bounds": (0.0, 1.0)}),
])
def test_adaptive_kl_refuses(name, options):
    with pytest.raises(ValueError, match=f"^{name} "):
        AdaptiveKL(**options)


def test_adaptive_kl_refuses_nan():
    controller = AdaptiveKL(0.01)
    with pytest.raises(ValueError, match="^kl "):
        controller.update(math.nan)
    assert controller.beta == 1.0


# The loss

@pytest.mark.parametrize("seed, normalize", [(0, True), (1, False)])
def test_equals_the_update_of_stable_baselines3(seed, normalize):
    "Its own train() takes one plain gradient step of size 1; ours must predict it."
    model = PPO(
        "MlpPolicy", "CartPole-v1", n_steps=64, batch_size=64, n_epochs=1, seed=seed,
        learning_rate=1.0, max_grad_norm=1e9, ent_coef=0.02, vf_coef=0.3,
        clip_range=0.15, normalize_advantage=normalize, device="cpu",
        policy_kwargs={"optimizer_class": torch.optim.SGD, "net_arch": [16]},
    )
    _, callback = model._setup_learn(64)
    model.collect_rollouts(model.env, callback, model.rollout_buffer, 64)
    parameters = list(model.policy.parameters())
    with torch.no_grad():  # so that ratios differ from one
        for p in parameters:
            p += 0.3 * torch.randn_like(p)
    before = [p.detach().clone() for p in parameters]

    data = next(model.rollout_buffer.get())
    actions = data.actions.long().flatten()
    values, logp, H = model.policy.evaluate_actions(data.observations, actions)
    A = data.advantages
    if normalize:
        A = (A - A.mean()) / (A.std() + 1e-8)
    columns = logp, data.old_log_prob, A, H, values.flatten(), data.returns
    # 0.6: SB3 has no factor 1/2
    loss = ppo_loss(*columns, clip_low=0.15, value_coef=0.6, entropy_coef=0.02)
    policy_loss = ppo_loss(*columns, clip_low=0.15, value_coef=0.0)
    metrics = ppo_metrics(*columns[:2], *columns[3:], clip_low=0.15)
    wanted = torch.autograd.grad(loss, parameters)
    model.train()
    for was, now, step in zip(before, parameters, wanted):
        close(was - now.detach(), step, 2e-6)  # a difference of float32 parameters

    ours = {name: x.item() for name, x in metrics.items()}
    for name, value in [
        ("loss", loss.item()), ("policy_gradient_loss", policy_loss.item()),
        ("value_loss", 2 * ours["value_loss"]), ("entropy_loss", -ours["entropy"]),
        ("approx_kl", ours["approx_kl"]), ("clip_fraction", ours["clip_fraction"]),
    ]:
        logged = model.logger.name_to_value[f"train/{name}"]
        assert logged == pytest.approx(value, rel=1e-6, abs=1e-6), name
    assert ours["clip_fraction"] > 0


def test_gradient_of_the_loss_by_finite_differences():
    x = batch(40)
    live = [x[name].requires_grad_() for name in ("logp", "entropy", "values")]

    def loss(logp, H, V):
        return ppo_loss(
            logp, x["logp_old"], x["advantages"], H, V, x["returns"], **COEFFICIENTS,
            values_old=x["returns"] + 0.3, value_clip=0.2, clip_high=0.3,
        )

    assert torch.autograd.gradcheck(loss, live)


@pytest.mark.parametrize("shape", [(60,), (12, 5)])
@pytest.mark.parametrize("clipped_values", [False, True])
@pytest.mark.parametrize("junk", [0.0, 1e30, torch.inf, -torch.inf, torch.nan])
def test_a_mask_drops_rows(shape, clipped_values, junk):
    x = batch(*shape)
    mask = torch.rand(shape, generator=torch.Generator().manual_seed(1)) < 0.6
    options = {"clip_high": 0.3}
    dirty = {name: torch.where(mask, column, junk) for name, column in x.items()}
    clean = {name: column[mask] for name, column in x.items()}
    if clipped_values:
        old = x["values"] + 0.5 * x["returns"]
        options["value_clip"] = 0.2
        dirty["values_old"] = torch.where(mask, old, junk)
        clean["values_old"] = old[mask]
    loss, metrics, gradients = loss_and_gradients(dirty, mask=mask, **options)
    wanted_loss, wanted_metrics, wanted_gradients = loss_and_gradients(clean, **options)
    close(loss, wanted_loss)
    for name, wanted in wanted_metrics.items():
        close(metrics[name], wanted)
    for got, wanted in zip(gradients, wanted_gradients):
        close(got[mask], wanted)
        assert got[~mask].eq(0).all()


def test_a_full_mask_changes_nothing_and_an_empty_one_gives_zero():
    x = batch(30)
    plain = loss_and_gradients(x)
    full = loss_and_gradients(x, mask=torch.ones(30, dtype=torch.bool))
    close(full[0], plain[0])
    for a, b in zip(full[2], plain[2]):
        close(a, b)
    nothing = torch.zeros(30, dtype=torch.bool)
    loss, metrics, gradients = loss_and_gradients(x, mask=nothing)
    assert loss == 0 and all(g.eq(0).all() for g in gradients)
    assert len(metrics) == 5 and all(m.isnan() for m in metrics.values())


def test_order_and_shape_of_the_batch_do_not_matter():
    x = batch(6, 8)
    loss, metrics, gradients = loss_and_gradients(x)
    order = torch.randperm(48, generator=torch.Generator().manual_seed(0))
    shuffled = {name: column.flatten()[order] for name, column in x.items()}
    other_loss, other_metrics, other_gradients = loss_and_gradients(shuffled)
    close(loss, other_loss)
    for name in metrics:
        close(metrics[name], other_metrics[name])
    for a, b in zip(gradients, other_gradients):
        close(a.flatten()[order], b)


def test_minibatch_losses_average_to_the_batch_loss():
    x = batch(64)
    parts = [{name: column[i::4] for name, column in x.items()} for i in range(4)]
    losses = torch.stack([loss_and_gradients(part)[0] for part in parts])
    close(losses.mean(), loss_and_gradients(x)[0])


def test_metrics_are_detached_scalars():
    loss, metrics, _ = loss_and_gradients(batch(16))
    assert set(metrics) == {"value_loss", "entropy", "approx_kl", "clip_fraction",
                            "explained_variance"}
    assert all(m.shape == () and not m.requires_grad for m in metrics.values())
    x = batch(16)
    rho = ratio(x["logp"], x["logp_old"])
    close(metrics["clip_fraction"], ((rho - 1).abs() > 0.2).double().mean())


@pytest.mark.parametrize("masked", [False, True])
def test_never_waits_for_a_value(masked):
    "The meta device has shapes and no values: whatever inspects one fails."
    x = {name: column.to("meta") for name, column in batch(32).items()}
    mask = torch.ones(32, dtype=torch.bool, device="meta") if masked else None
    loss, metrics, gradients = loss_and_gradients(
        x | {"values_old": x["values"]}, mask=mask, value_clip=0.2, dual_clip=3.0
    )
    assert loss.shape == () and len(metrics) == 5 and len(gradients) == 3
    kl_penalty(x["logp"], x["logp_old"], x["advantages"], 1.0)
    entropy(torch.empty(4, 3, device="meta"))


# Extremes

EXTREME = [88.0, 89.0, 1e4, -1e4, torch.inf, -torch.inf]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("log_ratio", EXTREME)
@pytest.mark.parametrize("A", [1.0, -1.0, 0.0])
def test_one_extreme_ratio_does_not_touch_the_others(dtype, log_ratio, A):
    normal = torch.tensor([0.1, -0.1], dtype=dtype)
    odd = torch.tensor([log_ratio], dtype=dtype)
    A_all = torch.tensor([1.0, -2.0, A], dtype=dtype)

    def run(log_ratios, advantages, objective):
        logp = log_ratios.clone().requires_grad_()
        gain = objective(logp, torch.zeros_like(logp), advantages)
        return gain.detach(), gradient(gain, logp)

    for objective in (clipped_surrogate, lambda *columns: kl_penalty(*columns, 0.5)):
        gain, slope = run(torch.cat([normal, odd]), A_all, objective)
        alone, alone_slope = run(normal, A_all[:2], objective)
        assert gain.isfinite().all() and slope.isfinite().all()
        assert gain[:2].equal(alone) and slope[:2].equal(alone_slope)
        assert slope[2] == 0


def test_an_action_that_was_impossible_for_the_old_policy():
    logp, old = torch.zeros(1), torch.full((1,), -torch.inf)
    close(ratio(logp, old), torch.full((1,), math.e**MAX_LOG_RATIO), 1e2)


HALVES = {torch.float16: math.log(65504) / 2, torch.bfloat16: MAX_LOG_RATIO}


@pytest.mark.parametrize("dtype", HALVES, ids=str)
@pytest.mark.parametrize("A", [-250.0, -1.0, 0.0, 1.0, 250.0])
def test_in_half_precision_value_and_gradient_are_finite(dtype, A):
    far = [0.0, 0.1, 3.0, 5.0, 6.0, 12.0, 21.0, 100.0, 6e4, math.inf]
    log_ratios = torch.tensor(far, dtype=dtype)
    for x in log_ratios, -log_ratios[:-1]:
        zero, advantages = torch.zeros_like(x), torch.full_like(x, A)
        for function in (
            ratio, approx_kl, lambda *pair: clipped_surrogate(*pair, advantages),
            lambda *pair: clipped_surrogate(*pair, advantages, dual_clip=3.0),
            lambda *pair: kl_penalty(*pair, advantages, 0.5),
        ):
            for old in zero, -x:  # the difference may be twice as far
                logp = (zero if old is not zero else x).clone().requires_grad_()
                value = function(logp, old)
                assert value.dtype == dtype and value.isfinite().all()
                assert gradient(value, logp).isfinite().all()


@pytest.mark.parametrize("dtype", HALVES, ids=str)
def test_in_half_precision_the_cut_is_where_the_type_says(dtype):
    cut = torch.tensor(HALVES[dtype], dtype=dtype)
    logp = torch.tensor([-20.0, -4.0, 0.5, 4.0, 30.0], dtype=dtype, requires_grad=True)
    want = logp.detach().clamp(-cut, cut).exp()
    got = ratio(logp, torch.zeros_like(logp))
    torch.testing.assert_close(got, want, rtol=4e-3, atol=0)
    assert gradient(got, logp).ne(0).tolist() == [dtype == torch.bfloat16, True, True, True, False]
    assert (got.max() * 255).isfinite()


def test_ratio_is_exact_up_to_its_bound():
    x = torch.linspace(-19.9, 19.9, 101, dtype=torch.float64)
    got = ratio(x, torch.zeros_like(x))
    torch.testing.assert_close(got, x.exp(), rtol=1e-15, atol=0)


@pytest.mark.parametrize("log_ratio", EXTREME)
def test_the_whole_loss_stays_finite(log_ratio):
    x = batch(16, dtype=torch.float32)
    x["logp"][0] = x["logp_old"][0] + log_ratio
    x["advantages"][0] = -1.0
    loss, metrics, gradients = loss_and_gradients(x)
    assert loss.isfinite() and all(m.isfinite() for m in metrics.values())
    assert all(g.isfinite().all() for g in gradients)


def test_a_critic_of_four_bytes_learns_from_targets_of_eight():
    "For such a pair `mse_loss` of torch 2.11 has no gradient."
    V = torch.zeros(3, requires_grad=True)
    loss = value_loss(V, torch.ones(3, dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss.sum(), V)
    assert loss.dtype == slope.dtype == torch.float32
    close(slope, -torch.ones(3))


# Value loss, entropy, explained variance

def test_value_loss_without_a_clip_is_half_the_squared_error():
    x = batch(20)
    close(value_loss(x["values"], x["returns"]), (x["values"] - x["returns"]) ** 2 / 2)


@pytest.mark.parametrize("V, loss, slope", [
    (0.1, 0.405, -0.9),   # inside: plain
    (0.5, 0.320, 0.0),    # moved beyond the bound towards the target: stopped
    (-0.5, 1.125, -1.5),  # moved away from the target: plain
    (1.5, 0.320, 0.0),    # overshot, and still nearer than the bound
    (2.5, 1.125, 1.5),    # overshot far: plain
])
def test_value_clipping(V, loss, slope):
    V = torch.tensor([V], dtype=torch.float64, requires_grad=True)
    target, old = torch.ones_like(V), torch.zeros_like(V)
    got = value_loss(V, target.detach(), old.detach(), 0.2)
    close(got.detach(), torch.tensor([loss], dtype=torch.float64))
    close(gradient(got, V), torch.tensor([slope], dtype=torch.float64))


def test_value_clipping_far_inside_changes_nothing():
    x = batch(50)
    old = x["values"].clone()
    wide = value_loss(x["values"], x["returns"], old, 1e6)
    close(wide, value_loss(x["values"], x["returns"]))


def test_entropy_is_torchs():
    logits = 3 * torch.randn(4, 5, 6, dtype=torch.float64)
    close(entropy(logits), torch.distributions.Categorical(logits=logits).entropy())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_entropy_of_impossible_and_certain_actions(dtype):
    never = -torch.inf
    rows = [[0, never, 0], [0, never, never], [500, 0, -500]]
    logits = torch.tensor(rows, dtype=dtype)
    logits.requires_grad_()
    H = entropy(logits)
    close(H.detach(), torch.tensor([math.log(2), 0, 0], dtype=dtype), 1e-6)
    slope = gradient(H, logits)
    assert slope.isfinite().all() and slope.abs().max() < 1e-6


def test_explained_variance_is_that_of_stable_baselines3():
    x = batch(100)
    V, G = x["values"] + x["returns"], x["returns"]
    assert explained_variance(V, G).item() == pytest.approx(
        sb3_explained_variance(V.numpy(), G.numpy())
    )


def test_explained_variance_far_from_zero_in_float32():
    G = 1e4 + torch.randn(1000, generator=torch.Generator().manual_seed(0))
    V = G + 0.5 * torch.randn(1000, generator=torch.Generator().manual_seed(1))
    assert explained_variance(V, G).item() == pytest.approx(0.75, abs=0.05)


@pytest.mark.parametrize("V", [0.0, 5.0])
def test_explained_variance_of_equal_returns_is_finite(V):
    assert explained_variance(torch.full((4,), V), torch.ones(4)) == 1
    assert explained_variance(torch.tensor([V]), torch.ones(1)) == 1
    values = torch.tensor([V, V + 2])  # of variance 1, which counts as 1e8 times too much
    assert explained_variance(values, torch.ones(2)).item() == pytest.approx(1 - 1e8)


def test_masked_mean():
    x = torch.tensor([1.0, torch.nan, 3.0])
    assert masked_mean(x, torch.tensor([True, False, True])) == 2
    nothing = torch.zeros(3, dtype=torch.bool)
    assert masked_mean(x, nothing) == 0 and masked_mean(x, nothing, math.nan).isnan()
    assert masked_mean(x, ~x.isnan(), math.nan) == 2
    assert masked_mean(x).isnan()


def test_the_mean_of_nothing_has_no_gradient():
    x = torch.tensor([1.0, torch.nan], requires_grad=True)
    for empty in 0.0, math.nan:
        mean = masked_mean(x, torch.zeros(2, dtype=torch.bool), empty)
        assert gradient(mean, x).eq(0).all()


# Bad input

@pytest.mark.parametrize("name, options", [
    ("clip_low", {"clip_low": -0.1}),
    ("clip_low", {"clip_low": 1.0}),
    ("clip_low", {"clip_low": math.nan}),
    ("clip_high", {"clip_high": -0.1}),
    ("clip_high", {"clip_high": math.nan}),
    ("dual_clip", {"dual_clip": 1.1}),
    ("clip", {"value_clip": 0.0, "values_old": torch.zeros(4)}),
    ("values_old", {"value_clip": 0.2}),
    ("values_old", {"value_clip": 0.2, "values_old": torch.zeros(5)}),
    ("mask", {"mask": torch.ones(4)}),
    ("mask", {"mask": torch.ones(4, 1, dtype=torch.bool)}),
    ("mask", {"mask": torch.ones(3, dtype=torch.bool)}),
])
def test_the_loss_refuses_options(name, options):
    with pytest.raises(ValueError, match=f"^{name} "):
        loss_and_gradients(batch(4), **options)


@pytest.mark.parametrize("mask", [None, torch.ones(4, dtype=torch.bool)])
@pytest.mark.parametrize("name", COLUMNS[1:])
@pytest.mark.parametrize("shape", [(4, 1), (1,), (3,), ()])
def test_the_loss_refuses_other_shapes(name, shape, mask):
    with pytest.raises(ValueError, match=f"^{name} .*{re.escape(str(shape))}"):
        ppo_loss(**(batch(4) | {name: torch.zeros(shape).double()}), mask=mask)


@pytest.mark.parametrize("mask", [None, torch.ones(4, dtype=torch.bool)])
@pytest.mark.parametrize("name", ["logp_old", "advantages", "returns", "values_old"])
def test_the_loss_refuses_data_with_a_gradient(name, mask):
    live = torch.zeros(4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(ValueError, match=f"^{name} must be detached"):
        ppo_loss(**(batch(4) | {name: live}), mask=mask)


def test_the_loss_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="^logp .*0"):
        ppo_loss(**batch(0))


@pytest.mark.parametrize("call, name", [
    (lambda x, y: ratio(x, y), "logp_old"),
    (lambda x, y: approx_kl(x, y), "logp_old"),
    (lambda x, y: outside_band(x, y), "logp_old"),
    (lambda x, y: clipped_surrogate(x, x, y), "advantages"),
    (lambda x, y: kl_penalty(x, x, y, 1.0), "advantages"),
    (lambda x, y: kl_penalty(x, x, x, 1.0, y), "kl"),
    (lambda x, y: value_loss(x, y), "returns"),
    (lambda x, y: value_loss(x, x, y, 0.2), "values_old"),
    (lambda x, y: explained_variance(x, y), "returns"),
    (lambda x, y: explained_variance(x, x, y.bool()), "mask"),
    (lambda x, y: masked_mean(x, y.bool()), "mask"),
])
def test_shapes_never_broadcast(call, name):
    with pytest.raises(ValueError, match=rf"^{name} .*\(4,\).*\(4, 1\)"):
        call(torch.zeros(4), torch.zeros(4, 1))


@pytest.mark.parametrize("beta", [-1.0, math.nan])
def test_kl_penalty_refuses_beta(beta):
    with pytest.raises(ValueError, match="^beta "):
        kl_penalty(torch.zeros(2), torch.zeros(2), torch.zeros(2), beta)


def test_bounds_may_be_tensors():
    "Values and gradients are those of numbers; 0.25 and 0.5 are exact in float32."
    draw = torch.Generator().manual_seed(0)
    old, noise, advantages = torch.randn(3, 50, generator=draw)
    results = []
    for bounds in (0.25, 0.5), torch.tensor([0.25, 0.5]).unbind():
        logp = (old + noise).requires_grad_()
        clip = dict(clip_low=bounds[0], clip_high=bounds[1])
        loss = ppo_loss(logp, old, advantages, advantages, logp, advantages, **clip)
        metrics = ppo_metrics(logp, old, advantages, logp, advantages, **clip)
        loss.backward()
        results.append(torch.stack([loss, *metrics.values(), *logp.grad]).detach())
    assert torch.equal(*results)


def test_without_a_clip_the_loss_is_that_of_the_plain_ratio():
    draw = torch.Generator().manual_seed(0)
    logp, old, advantages, values, returns = torch.randn(5, 64, generator=draw)
    loss = ppo_loss(logp, old, advantages, torch.zeros(64), values, returns, clip_low=None, value_coef=0.0)
    metrics = ppo_metrics(logp, old, torch.zeros(64), values, returns, clip_low=None)
    torch.testing.assert_close(loss, -((logp - old).exp() * advantages).mean())
    assert metrics["clip_fraction"] == 0
    for more in {"clip_high": 0.2}, {"dual_clip": 3.0}:
        with pytest.raises(ValueError, match="clip_low must be given with clip_high or dual_clip, got None"):
            ppo_loss(logp, old, advantages, torch.zeros(64), values, returns, clip_low=None, **more)
