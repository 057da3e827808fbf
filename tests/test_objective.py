"One objective: every preset is its chapter's own loss, in value and in gradient."
import itertools
import math
from dataclasses import fields, replace

import pytest
import torch
from torch.distributions import Categorical

from po_book.advantage import normalize
from po_book.credit import (
    Advantage,
    AllGroups,
    Critic,
    Group,
    Informative,
    LeaveOneOut,
    Paid,
    Returns,
    Selection,
)
from po_book.dapo import CLIP_HIGH
from po_book.grpo import group_advantages, grpo_loss, leave_one_out
from po_book.objective import PRESETS, Objective, difference, objective_loss
from po_book.policy_gradient import reinforce_loss
from po_book.ppo import kl_penalty, ppo_loss, ratio
from po_book.rlhf import kl_rewards, token_gae
from po_book.terms import (
    Aggregation,
    Banded,
    Correction,
    InLoss,
    InReward,
    NoCorrection,
    NoReference,
    Reference,
    Truncated,
)
from po_book.tokens import (
    Clip,
    ClippedWeight,
    GeometricClip,
    OneStep,
    Penalty,
    ProbabilityMask,
    Radius,
    SequenceClip,
    SoftGate,
    Tokens,
    TrustRegion,
)

N, L, G = 8, 6, 4


def random(seed, *shape):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, dtype=torch.float64, generator=generator)


def columns(seed):
    "Log-probabilities of four policies, entropies, advantages, a mask of ragged rows."
    x = random(seed, 6, N, L)
    lengths = torch.randint(1, L + 1, (N,), generator=torch.Generator().manual_seed(7))
    return {
        "logp": (x[0] - 2).requires_grad_(),
        "logp_old": x[0] - 2 + 0.5 * x[1],
        "logp_ref": x[0] - 2 + 0.3 * x[2],
        "logp_sampler": x[0] - 2 + 0.5 * x[1] + 0.6 * x[4],
        "entropy": x[5].abs(),
        "advantages": x[3],
        "mask": torch.arange(L) < lengths[:, None],
    }


@pytest.fixture(params=range(3))
def data(request):
    return columns(request.param)


def rows(data):
    return data["logp"], data["logp_old"], data["advantages"], data["mask"]


def tokens(data, **others):
    "The batch, without a reference and a sampler unless they are asked for."
    own = dict(zip(("logp", "logp_old", "advantages", "mask"), rows(data)))
    return Tokens(**own | others)


def everything(data, objective):
    "With all columns, and one advantage a response where that is wanted."
    advantages = data["advantages"]
    if objective.advantage.whole:
        advantages = advantages[:, :1].expand(N, L)
    return Tokens(**data | {"advantages": advantages})


def check(ours, theirs, logp):
    "Equal losses and equal gradients, and not for want of any."
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-12)
    got, want = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-12)
    assert want.abs().max() > 1e-3


def test_reinforce_is_the_loss_of_its_chapter(data):
    full = torch.ones(N, L, dtype=torch.bool)
    ours, _ = objective_loss(PRESETS["reinforce"], tokens(data, mask=full))
    check(ours, reinforce_loss(data["logp"], data["advantages"]), data["logp"])


def test_a2c_is_minus_the_mean_score_times_the_advantage(data):
    logp, _, advantages, mask = rows(data)
    ours, _ = objective_loss(PRESETS["a2c"], tokens(data))
    check(ours, -(logp * advantages)[mask].mean(), logp)


def test_trpo_is_the_mean_of_the_surrogate(data):
    logp, old, advantages, mask = rows(data)
    ours, _ = objective_loss(PRESETS["trpo"], tokens(data))
    check(ours, -(ratio(logp, old) * advantages)[mask].mean(), logp)


def test_ppo_kl_is_the_mean_of_the_penalised_surrogate(data):
    logp, old, advantages, mask = rows(data)
    ours, _ = objective_loss(PRESETS["ppo-kl"], tokens(data))
    check(ours, -kl_penalty(logp, old, advantages, 1.0)[mask].mean(), logp)


@pytest.mark.parametrize("name", ["ppo", "rlhf-ppo"])
def test_ppo_is_the_policy_part_of_its_chapters_loss(data, name):
    logp, old, advantages, mask = rows(data)
    zeros = torch.zeros_like(advantages)
    theirs = ppo_loss(logp, old, advantages, zeros, zeros, zeros, mask=mask)
    ours, metrics = objective_loss(PRESETS[name], tokens(data))
    check(ours, theirs, logp)
    assert 0 < metrics["clip_fraction"] < 1


def test_rloo_is_reinforce_of_whole_responses(data):
    logp, _, _, mask = rows(data)
    advantages = random(9, N)
    ours, _ = objective_loss(PRESETS["rloo"], tokens(data, advantages=advantages))
    check(ours, -(advantages * (logp * mask).sum(1)).mean(), logp)


@pytest.mark.parametrize(
    "name, settings",
    [
        ("grpo", dict(beta=0.04)),
        ("dr-grpo", dict(aggregate="constant", max_len=L)),
        ("dapo", dict(clip_high=0.28, aggregate="token")),
        ("magistral", dict(clip_high=0.28, aggregate="token")),
        ("prorl", dict(clip_high=0.4, aggregate="token", beta=1e-4)),
    ],
)
def test_the_family_of_grpo_is_grpo_loss_with_its_settings(data, name, settings):
    objective, reference = PRESETS[name].for_length(L), {"logp_ref": data["logp_ref"]}
    theirs, _ = grpo_loss(*rows(data), **reference, **settings)
    ours, metrics = objective_loss(objective, tokens(data, **reference))
    check(ours, theirs, data["logp"])
    assert metrics["kl"] > 0


# From rewards to the gradient, every preset written out

REWARDS = torch.tensor([1.0, 0, 0, 0.5, 3, 3, 2, 2.25]).double()  # two groups of four


def gae_by_hand(rewards, values, mask, gamma, lam):
    "One row after another, one token after another."
    out = torch.zeros_like(rewards)
    for i, n in enumerate(mask.sum(1).tolist()):
        carried = 0.0
        for t in reversed(range(n)):
            after = values[i, t + 1] if t + 1 < n else 0.0
            carried = rewards[i, t] + gamma * after - values[i, t] + gamma * lam * carried
            out[i, t] = carried
    return out


def at_the_end(mask):
    "The reward of a response, at its last token."
    rewards = torch.zeros(N, L).double()
    for i, n in enumerate(mask.sum(1).tolist()):
        rewards[i, n - 1] = REWARDS[i]
    return rewards


def critic_by_hand(rewards, values, mask, gamma):
    raw = gae_by_hand(rewards, values, mask, gamma, 0.95)
    return (raw - raw[mask].mean()) / raw[mask].std(correction=0)


def group_by_hand(divide):
    groups = REWARDS.view(2, 4)
    centred = groups - groups.mean(1, keepdim=True)
    by = {"group": groups.std(1, correction=0, keepdim=True),
          "advantage": centred.square().mean().sqrt(),
          "mean": groups.mean(1, keepdim=True), "none": 1}[divide]
    return (centred / by).reshape(N, 1)


def whitened(x, mask):
    "To mean 0 and deviation 1 over the tokens."
    x = x.expand(N, L)
    return (x - x[mask].mean()) / x[mask].std(correction=0)


def sequences_by_hand(name, logp, old, mask):
    "GSPO and GMPO, one response after another."
    A, gains = group_by_hand("group")[:, 0], []
    for i, n in enumerate(mask.sum(1).tolist()):
        away = (logp[i] - old[i])[:n]
        if name == "gspo":
            s = away.mean().exp()
            gains.append(torch.minimum(s * A[i], s.clamp(1 - 3e-4, 1 + 4e-4) * A[i]))
        else:
            bounded = away.clamp(max=0.4) if A[i] > 0 else away.clamp(min=-0.4)
            gains.append(bounded.mean().exp() * A[i])
    return torch.stack(gains)[:, None].expand(N, L)


def loss_by_hand(name, logp, old, ref, sampler, values, mask):
    "Minus the objective, from the formulas of the chapters."
    rho, price = (logp - old).exp(), old - ref
    k3 = (ref - logp).exp() - 1 - (ref - logp)
    lengths, count = mask.sum(1, keepdim=True), mask.sum()
    grpo, weight = group_by_hand("group"), (old - sampler).exp()

    def clipped(A, high):
        return torch.minimum(rho * A, rho.clamp(0.8, 1 + high) * A)

    def critic(gamma, beta=0.0):
        return critic_by_hand(at_the_end(mask) - beta * price, values, mask, gamma)

    def to_come(beta):
        paid = (at_the_end(mask) - beta * price) * mask
        return whitened(paid.flip(1).cumsum(1).flip(1), mask)

    def gated(A):
        tau = torch.where(A > 0, 1.0, 1.05)
        return 4 / tau * torch.sigmoid(tau * (rho - 1)) * A

    def by_probability(A):
        p, q = logp.exp().detach(), sampler.exp()
        out = ((A > 0) & (p - q > 0.15)) | ((A < 0) & (q - p > 0.15))
        return torch.where(out, 0, (p / q).clamp(max=20) * A * logp)

    paid = REWARDS - 0.05 * (price * mask).sum(1)
    others = torch.stack([(paid.view(2, 4)[:, [j for j in range(4) if j != i]]).mean(1)
                          for i in range(4)], 1).flatten()
    by_response, by_token = 1 / (N * lengths), 1 / count
    inside = (weight >= 0.5) & (weight <= 5)
    gain, weights = {
        "reinforce": lambda: (logp * REWARDS[:, None], 1 / N),
        "a2c": lambda: (logp * critic(0.99), by_token),
        "trpo": lambda: (rho * critic(0.99), by_token),
        "ppo-kl": lambda: (rho * critic(0.99) - (rho - 1 - rho.log()), by_token),
        "ppo": lambda: (clipped(critic(0.99), 0.2), by_token),
        "rlhf-ppo": lambda: (clipped(critic(1.0, 0.05), 0.2), by_token),
        "reinforce++": lambda: (clipped(to_come(1e-4), 0.2), by_token),
        "reinforce++-baseline": lambda: (
            clipped(whitened(group_by_hand("none"), mask), 0.2) - 1e-5 * (ref - logp) ** 2 / 2,
            by_token,
        ),
        "rloo": lambda: (logp * (paid - others)[:, None], 1 / N),
        "maxrl": lambda: (logp * group_by_hand("mean"), 1 / N),
        "grpo": lambda: (clipped(grpo, 0.2) - 0.04 * k3, by_response),
        "grpo-tis": lambda: (
            weight.clamp(max=2) * clipped(grpo, 0.2) - 0.04 * k3, by_response
        ),
        "grpo-icepop": lambda: (
            weight * inside * clipped(grpo, 0.2) - 0.04 * k3, by_response
        ),
        "dr-grpo": lambda: (clipped(group_by_hand("none"), 0.2), 1 / (N * L)),
        "gspo": lambda: (sequences_by_hand("gspo", logp, old, mask), by_response),
        "gmpo": lambda: (sequences_by_hand("gmpo", logp, old, mask), by_response),
        "sapo": lambda: (gated(grpo), by_response),
        "cispo": lambda: (rho.detach().clamp(max=5) * grpo * logp, by_token),
        "dppo": lambda: (by_probability(grpo), by_token),
        "dapo": lambda: (clipped(grpo, 0.28), by_token),
        "magistral": lambda: (clipped(group_by_hand("advantage"), 0.28), by_token),
        "prorl": lambda: (clipped(grpo, 0.4) - 1e-4 * k3, by_token),
    }[name]()
    return -torch.where(mask, gain * weights, 0).sum()


@pytest.mark.parametrize("name", PRESETS)
def test_from_rewards_to_the_gradient_a_preset_is_its_formula(data, name):
    logp, mask, values = data["logp"], data["mask"], random(5, N, L)
    others = data["logp_old"], data["logp_ref"], data["logp_sampler"]
    objective = PRESETS[name].for_length(L)
    paid = objective.rewards(REWARDS, data["logp_old"], mask, data["logp_ref"])
    advantages, _ = objective.advantage(Paid(paid, mask, G, values))
    ours, _ = objective_loss(objective, Tokens(**data | {"advantages": advantages}))
    theirs = loss_by_hand(name, logp, *others, values, mask)
    torch.testing.assert_close(ours, theirs, rtol=0, atol=1e-5)  # eps is 1e-6
    got, want = (torch.autograd.grad(x, logp, retain_graph=True)[0] for x in (ours, theirs))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-5)
    assert want.abs().max() > 1e-2


def gradient_by_hand(name, seed):
    data, names = columns(seed), ("logp", "logp_old", "logp_ref", "logp_sampler")
    args = *(data[key] for key in names), random(5, N, L), data["mask"]
    return torch.autograd.grad(loss_by_hand(name, *args), data["logp"])[0]


def test_no_preset_has_the_gradient_of_another():
    "Or one could stand in for another, and no test would see it."
    gradients = {name: torch.stack([gradient_by_hand(name, seed) for seed in range(3)])
                 for name in PRESETS}
    for a, b in itertools.combinations(PRESETS, 2):
        assert (gradients[a] - gradients[b]).abs().max() > 1e-3, (a, b)


def test_the_upper_bounds_are_those_of_the_table():
    for name, high in CLIP_HIGH.items():
        trust = PRESETS[name].trust
        assert (trust.low, trust.low if trust.high is None else trust.high) == (0.2, high)


def test_without_tokens_loss_and_gradient_are_zero_and_metrics_are_no_numbers(data):
    nothing = torch.zeros_like(data["mask"])
    edges = Clip, SequenceClip, ClippedWeight, GeometricClip, ProbabilityMask
    for name, preset in PRESETS.items():
        batch = everything(data | {"mask": nothing}, preset)
        loss, metrics = objective_loss(preset.for_length(L), batch)
        assert loss == 0 and torch.autograd.grad(loss, data["logp"])[0].eq(0).all()
        clips = {"clip_fraction"} if isinstance(preset.trust, edges) else set()
        assert set(metrics) == {"approx_kl", "kl", "policy_entropy"} | clips
        assert all(x.isnan() for x in metrics.values())


@pytest.mark.parametrize("kind", ["k1", "k2", "k3"])
def test_the_price_in_the_loss_is_corrected_for_stale_samples(data, kind):
    base = replace(PRESETS["grpo"], kl=InLoss(0.3, kind))
    change = replace(base, kl=InLoss(0.3, kind, corrected=True))
    logp, ref = data["logp"], {"logp_ref": data["logp_ref"]}
    plain, before = objective_loss(base, tokens(data, **ref))
    ours, after = objective_loss(change, tokens(data, **ref))
    rho, log_u = (logp - data["logp_old"]).exp(), data["logp_ref"] - logp
    k = {"k1": -log_u, "k2": log_u**2 / 2, "k3": log_u.exp() - 1 - log_u}
    weight = rho.detach() if kind == "k2" else rho
    weights, mask = Aggregation("sample")(data["mask"], torch.float64), data["mask"]
    check(ours, plain + 0.3 * (weights * (weight * k[kind] - k[kind])).sum(), logp)
    torch.testing.assert_close(before["kl"], k["k3"].detach()[mask].mean())
    torch.testing.assert_close(after["kl"], (rho * k["k3"]).detach()[mask].mean())


# Advantages


def test_advantages_are_those_of_the_chapters(data):
    mask, values = data["mask"], random(3, N, L) * data["mask"]
    R = random(4, N)
    paid = kl_rewards(R, data["logp_old"], data["logp_ref"], mask, 0.05)
    groups = R.view(-1, G)
    plain = PRESETS["grpo"].rewards(R, data["logp_old"], mask)
    for scale in "group", "batch", "advantage", "none":
        got, targets = Group(scale)(Paid(plain, mask, G))
        want = group_advantages(groups, scale).view(-1, 1) * mask
        torch.testing.assert_close(got, want)
        assert targets is None
    totals = paid.sum(1).view(-1, G)
    objective = PRESETS["rloo"]
    charged = objective.rewards(R, data["logp_old"], mask, data["logp_ref"])
    got, _ = objective.advantage(Paid(charged, mask, G))
    want = leave_one_out(totals).view(-1, 1) * mask
    torch.testing.assert_close(got, want)
    got, targets = Critic(lam=0.9)(Paid(paid, mask, G, values))
    raw = token_gae(paid, values, mask, 1.0, 0.9)
    torch.testing.assert_close(targets, raw + values)
    torch.testing.assert_close(got, normalize(raw, mask))
    to_come, _ = Returns()(Paid(plain, mask))
    torch.testing.assert_close(to_come, R[:, None] * mask)


def test_discount_normalisation_and_padding_by_hand():
    mask = torch.tensor([[True, True, True], [True, False, False]])
    rewards = torch.tensor([[0.0, 1, 4], [2, 0, 0]]).double()
    values = torch.tensor([[1.0, 2, 1], [1, 7, 7]]).double()  # what is padded is not read
    to_come, _ = Returns(0.5)(Paid(rewards, mask))
    assert to_come.tolist() == [[1.5, 3, 4], [2, 0, 0]]
    advantages, targets = Critic(0.5, 0.5, normalize=False)(Paid(rewards, mask, 1, values))
    # Errors 0 + .5·2 - 1, 1 + .5·1 - 2, 4 - 1 and 2 - 1, summed with weights .25
    assert advantages.tolist() == [[0.0625, 0.25, 3], [1, 0, 0]]
    assert targets.tolist() == [[1.0625, 2.25, 4], [2, 0, 0]]
    scaled, same = Critic(0.5, 0.5)(Paid(rewards, mask, 1, values))
    assert same.equal(targets) and scaled[~mask].eq(0).all()
    raw = torch.tensor([0.0625, 0.25, 3, 1]).double()
    torch.testing.assert_close(scaled[mask], (raw - raw.mean()) / raw.std(correction=0))


# Properties


def parts(batch, size):
    "So many rows at a time."
    split = [None if x is None else x.split(size) for x in vars(batch).values()]
    for i in range(N // size + (N % size > 0)):
        yield Tokens(*(x if x is None else x[i] for x in split))


@pytest.mark.parametrize("name", PRESETS)
def test_parts_of_a_batch_with_its_weights_add_up_to_the_whole(data, name):
    objective = replace(PRESETS[name], entropy_coef=0.1).for_length(L)
    batch = everything(data, objective)
    whole, _ = objective_loss(objective, batch)
    weights = objective.aggregation(data["mask"], data["logp"].dtype).split(3)
    total = sum(objective_loss(objective, *x)[0] for x in zip(parts(batch, 3), weights))
    check(total, whole, data["logp"])


def test_a_mean_over_tokens_needs_the_weights_of_the_whole(data):
    batch = tokens(data)
    alone = sum(objective_loss(PRESETS["dapo"], x)[0] for x in parts(batch, 4))
    assert abs(alone / 2 - objective_loss(PRESETS["dapo"], batch)[0]) > 1e-4


@pytest.mark.parametrize("name", PRESETS)
def test_padding_and_the_order_of_rows_change_nothing(data, name):
    objective = replace(PRESETS[name], entropy_coef=0.1).for_length(L)
    batch = everything(data, objective)
    whole, _ = objective_loss(objective, batch)
    order = torch.randperm(N, generator=torch.Generator().manual_seed(1))
    wide = {key: torch.nn.functional.pad(x[order], (2, 3)) for key, x in vars(batch).items()}
    for key in wide.keys() - {"mask"}:
        wide[key] = wide[key].masked_fill(~wide["mask"], torch.nan)
    got, metrics = objective_loss(objective, Tokens(**wide))
    check(got, whole, data["logp"])
    assert all(x.isfinite() for x in metrics.values())


def test_the_entropy_is_part_of_the_objective(data):
    "Its weight, its place in the sum, and its gradient."
    names = "grpo", "grpo-icepop"  # a correction does not touch it
    for name in names:
        H = data["entropy"].clone().requires_grad_()
        batch = everything(data | {"entropy": H}, PRESETS[name])
        plain, _ = objective_loss(PRESETS[name], batch)
        ours, metrics = objective_loss(replace(PRESETS[name], entropy_coef=0.3), batch)
        weights = Aggregation("sample")(data["mask"], torch.float64)
        torch.testing.assert_close(plain - ours, 0.3 * (weights * H).sum().detach())
        torch.testing.assert_close(-torch.autograd.grad(ours, H)[0], 0.3 * weights)
        torch.testing.assert_close(metrics["policy_entropy"], H.detach()[data["mask"]].mean())


def test_only_where_nothing_else_pulls_a_token_without_advantage_is_quiet(data):
    "`quiet` says so, and gradients of a batch without advantages show it."
    quiet = {}
    for name, preset in PRESETS.items():
        objective = preset.for_length(L)
        batch = Tokens(**data | {"advantages": torch.zeros(N, L)})
        loss, _ = objective_loss(objective, batch)
        still = torch.autograd.grad(loss, data["logp"])[0].abs().max() < 1e-12
        quiet[name] = objective.quiet
        assert objective.quiet == still.item()
    assert not quiet["grpo"] and not quiet["ppo-kl"] and quiet["dapo"] and quiet["gspo"]
    assert not replace(PRESETS["dapo"], entropy_coef=0.1).quiet


def test_every_choice_has_a_loss_of_its_own(data):
    "A choice that is not read would leave the loss as it is."
    base = PRESETS["dr-grpo"].for_length(L)
    for part, choices in {
        "trust": [Clip(0.2), Clip(0.1), Clip(0.2, 0.4), Penalty(1.0), Penalty(2.0),
                  OneStep(), Radius(), SequenceClip(0.1, 0.1), SequenceClip(0.1, 0.2),
                  SequenceClip(0.2, 0.1), ClippedWeight(0.1), ClippedWeight(0.2),
                  ClippedWeight(0.2, 0.1), SoftGate(), SoftGate(2.0), SoftGate(1.0, 2.0),
                  GeometricClip(), GeometricClip(0.1), GeometricClip(0.4, 0.1),
                  ProbabilityMask(), ProbabilityMask(0.01)],
        "correction": [NoCorrection(), Truncated(1.5), Truncated(1.2), Truncated(1.2, True),
                       Banded(0.7, 1.2), Banded(0.8, 1.2), Banded(0.8, 1.5),
                       Banded(0.8, 1.5, True)],
        "kl": [NoReference(), InLoss(0.1), InLoss(0.2), InLoss(0.1, "k2")],
        "aggregation": [Aggregation("token"), Aggregation("sample"),
                        Aggregation("constant", 5), Aggregation("constant", 7)],
    }.items():
        others = {key: data[key] for key in ("logp_ref", "logp_sampler")}
        others["advantages"] = data["advantages"][:, 0]  # one a response, for all
        losses = [
            objective_loss(replace(base, **{part: choice}), tokens(data, **others))[0].item()
            for choice in choices
        ]
        assert len({round(x, 9) for x in losses}) == len(choices)


def test_the_gradient_at_the_old_policy_is_that_of_every_trust_region():
    "Before the first step all of them are the policy gradient."
    logits = random(5, 3, 4).requires_grad_()
    actions, advantages = torch.tensor([[1], [0], [3]]), random(6, 3, 1)
    mask = torch.ones(3, 1, dtype=torch.bool)
    logp = Categorical(logits=logits[:, None]).log_prob(actions)
    gradients = []
    for trust in (Clip(), Penalty(3.0), OneStep(), Radius(), SequenceClip(), ClippedWeight(),
                  SoftGate(), GeometricClip(), ProbabilityMask()):
        objective = replace(PRESETS["dapo"], trust=trust)
        loss, _ = objective_loss(objective, Tokens(logp, logp.detach(), advantages, mask))
        gradients += torch.autograd.grad(loss, logits, retain_graph=True)
    for gradient in gradients[1:]:
        torch.testing.assert_close(gradient, gradients[0])


def test_a_difference_is_a_sentence():
    assert difference(PRESETS["grpo"], PRESETS["grpo"]) == "nothing"
    text = difference(PRESETS["grpo"], PRESETS["dr-grpo"])
    assert text == (
        "advantage: reward minus the group's mean over its deviation → reward minus the "
        "group's mean; kl: 0.04 times k3 in the loss → none; aggregation: mean over "
        "responses of token means → sum over tokens over the longest length"
    )
    for a in PRESETS.values():
        for b in PRESETS.values():
            assert (difference(a, b) == "nothing") == (a == b)


def test_bad_input(data):
    with pytest.raises(ValueError, match="logp_ref must be given for InLoss"):
        objective_loss(PRESETS["grpo"], tokens(data))
    with pytest.raises(ValueError, match="max_len must be positive"):
        objective_loss(PRESETS["dr-grpo"], tokens(data))
    with pytest.raises(ValueError, match="advantages must be"):
        tokens(data, advantages=data["advantages"][:, :2])
    with pytest.raises(ValueError, match="logp_ref must have logp's shape"):
        tokens(data, logp_ref=data["logp_ref"][:2])
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        tokens(data, mask=data["mask"].double())
    for name in "logp_old", "advantages", "logp_ref", "logp_sampler":
        with pytest.raises(ValueError, match=f"{name} must be detached"):
            tokens(data, **{name: data["logp"]})
    with pytest.raises(ValueError, match="finite"):
        nan = torch.full((N,), torch.nan)
        PRESETS["rloo"].rewards(nan, data["logp_old"], data["mask"], data["logp_old"])
    with pytest.raises(ValueError, match="G at least 2"):
        Group()(Paid(torch.zeros(N, L), data["mask"], 1))
    with pytest.raises(ValueError, match="weights must have logp's shape"):
        objective_loss(PRESETS["dapo"], tokens(data), torch.ones(N, 1))


def test_a_correction_without_the_samplers_log_probabilities_is_refused(data):
    for name, kind in ("grpo-tis", "Truncated"), ("grpo-icepop", "Banded"):
        with pytest.raises(ValueError, match=f"logp_sampler must be given for {kind}"):
            objective_loss(PRESETS[name], tokens(data, logp_ref=data["logp_ref"]))
    with pytest.raises(ValueError, match="entropy must be given for entropy_coef"):
        objective_loss(replace(PRESETS["dapo"], entropy_coef=1.0), tokens(data))


@pytest.mark.parametrize("trust", [SequenceClip(), GeometricClip()], ids=str)
def test_a_ratio_of_a_response_and_advantages_of_tokens_are_refused(data, trust):
    rule = f"advantage must be one number a response with {type(trust).__name__}"
    for advantage in Critic(), Returns():
        with pytest.raises(ValueError, match=rule):
            replace(PRESETS["ppo"], trust=trust, advantage=advantage)
    with pytest.raises(ValueError, match="advantage"):
        objective_loss(replace(PRESETS["gspo"], trust=trust), tokens(data))


@pytest.mark.parametrize("name", PRESETS)
def test_ratios_that_would_overflow_are_bounded(name):
    "Log-ratios of a hundred nats, in the precision that training has."
    objective, mask = PRESETS[name].for_length(4), torch.ones(2, 4, dtype=torch.bool)
    for away in 100.0, -100.0:
        logp = torch.full((2, 4), -1.0, requires_grad=True)
        old = logp.detach() - away
        A = torch.tensor([[1.0] * 4, [-1.0] * 4])
        batch = Tokens(logp, old, A, mask, old, old - away, torch.zeros(2, 4))
        loss, metrics = objective_loss(objective, batch)
        (slope,) = torch.autograd.grad(loss, logp)
        assert loss.isfinite() and slope.isfinite().all()
        assert all(x.isfinite() for x in metrics.values())


def test_the_ratio_of_dppo_is_to_the_sampler(data):
    objective = PRESETS["dppo"]
    assert objective.sampler and not PRESETS["dapo"].sampler
    whole = data | {"advantages": data["advantages"][:, 0]}
    with_sampler, _ = objective_loss(objective, Tokens(**whole))
    same = whole | {"logp_old": data["logp_sampler"], "logp_sampler": None}
    alone, _ = objective_loss(objective, Tokens(**same))
    check(with_sampler, alone, data["logp"])


def test_dapo_charges_a_fifth_of_the_longest_completion():
    assert {name: p.overlong for name, p in PRESETS.items() if p.overlong} == {"dapo": 0.2}


def test_prorl_renews_its_reference_and_no_other_preset_does():
    resets = {name: p.kl.reset_every for name, p in PRESETS.items() if p.kl.reset_every}
    assert resets == {"prorl": 200}


# Words, and what is refused

CHOICES = (Returns, Critic, Group, LeaveOneOut, OneStep, Radius, Penalty, Clip, SequenceClip,
           ClippedWeight, SoftGate, GeometricClip, ProbabilityMask, NoReference, InReward,
           InLoss, Aggregation, AllGroups, Informative, NoCorrection, Truncated, Banded)
FLAG, MORE = ("no", 1), (-1, math.inf)
BAD = {
    Returns: {"gamma": (-0.1, 1.1), "normalize": FLAG},
    Critic: {"gamma": (-0.1, 2), "lam": (-0.1, 1.1), "value_coef": MORE, "normalize": FLAG},
    Group: {"scale": ("x", None), "normalize": FLAG},
    Radius: {"max_kl": (0, -1, math.inf)},
    Penalty: {"beta": MORE},
    Clip: {"low": (-1, 1), "high": (-0.1,)},
    SequenceClip: {"low": (-1, 1, None), "high": (-0.1, None)},
    ClippedWeight: {"high": (-0.1, None), "low": (-0.1, 1)},
    SoftGate: {"tau_pos": (0, -1, math.inf), "tau_neg": (0, -1, math.inf)},
    GeometricClip: {"low": (-0.1, None), "high": (-0.1, None)},
    ProbabilityMask: {"delta": (-0.1, 1.1)},
    InReward: {"beta": MORE, "reset_every": MORE},
    InLoss: {"beta": MORE, "kind": ("k9", None), "corrected": FLAG, "reset_every": MORE},
    Truncated: {"cap": (0.9, -1), "whole": FLAG},
    Banded: {"floor": (-0.1, 1.1), "cap": (0.9, -1), "whole": FLAG},
    Aggregation: {"how": ("x", None), "max_len": (0, -3, 2.5, math.inf)},
}
IMPOSSIBLE = [
    (choice, f.name, x)
    for choice in CHOICES
    for f in fields(choice)
    for x in (*BAD[choice][f.name], math.nan)
]


@pytest.mark.parametrize("choice, field, x", IMPOSSIBLE, ids=str)
def test_a_choice_refuses_by_name_a_field_that_makes_no_sense(choice, field, x):
    with pytest.raises(ValueError, match=f"^{field} must be .*, got '?{x}'?$"):
        choice(**{field: x})
    with pytest.raises(ValueError, match=f"^{field} must be"):
        replace(choice(), **{field: x})


@pytest.mark.parametrize(
    "choice",
    [Returns(0), Critic(0, 1, 0), Radius(9.0), Penalty(0), Clip(0, 0), Clip(0.9, math.inf), InReward(0),
     InLoss(0, "k1"), Aggregation("sample", 1), SequenceClip(0, 0), ClippedWeight(math.inf),
     GeometricClip(0, math.inf), ProbabilityMask(0), ProbabilityMask(1), Truncated(1),
     Truncated(math.inf), Banded(0, math.inf), Banded(1, 1)],
    ids=str,
)
def test_a_choice_may_be_at_the_end_of_an_interval(choice):
    assert replace(choice) == choice and "{" not in choice.words


@pytest.mark.parametrize("name", PRESETS)
def test_a_preset_can_be_made_again(name):
    parts = {f.name: getattr(PRESETS[name], f.name) for f in fields(Objective)}
    again = {key: type(part)(**vars(part)) if hasattr(part, "words") else part
             for key, part in parts.items()}
    assert Objective(**again) == PRESETS[name]


KINDS = {"advantage": Advantage, "trust": TrustRegion, "kl": Reference, "aggregation": Aggregation,
         "selection": Selection, "correction": Correction}


@pytest.mark.parametrize("name", KINDS)
def test_an_objective_refuses_what_is_no_such_choice(name):
    grpo = PRESETS["grpo"]
    other = grpo.trust if name == "advantage" else grpo.advantage
    for part in other, type(getattr(grpo, name)), name, None:
        with pytest.raises(ValueError, match=f"^{name} must be an? {KINDS[name].__name__}, got"):
            replace(grpo, **{name: part})
    assert {f.name for f in fields(Objective)} == {*KINDS, "entropy_coef", "overlong"}


def test_an_objective_refuses_numbers_that_make_no_sense():
    for name, numbers in {"entropy_coef": (math.inf, math.nan, None, "1"),
                          "overlong": (-0.1, 1, math.nan, None)}.items():
        for x in numbers:
            with pytest.raises(ValueError, match=f"^{name} must be"):
                replace(PRESETS["dapo"], **{name: x})


def test_the_words_of_every_choice():
    assert {x.words for x in (Critic(0.5, 0), Radius(0.02), Penalty(3), InReward(0.1), InLoss(2, "k1"))} == {
        "GAE of a critic, γ = 0.5, λ = 0",
        "mean KL from the old policy at most 0.02",
        "3 times the KL from the old policy subtracted",
        "0.1 times the log-ratio off the reward of every token",
        "2 times k1 in the loss",
    }
    assert [Group(scale).words for scale in ("group", "batch", "advantage", "none")] == [
        "reward minus the group's mean over its deviation",
        "reward minus the group's mean over the batch's deviation",
        "reward minus the group's mean, over the deviation of all of these",
        "reward minus the group's mean",
    ]
    assert Group("mean").words == "reward minus the group's mean over that"
    tail = ", over all tokens less their mean, over their deviation"
    assert Group("none", True).words == "reward minus the group's mean" + tail
    assert Returns(normalize=True).words == "the return to come" + tail
    assert {x.words for x in (SequenceClip(0.1, 0.2), ClippedWeight(3), ClippedWeight(3, 0.5), SoftGate(2, 3),
                              GeometricClip(1, 2), ProbabilityMask(0.2), Truncated(3), Banded(0.1, 7, True),
                              InReward(1, 5), InLoss(1, "k3", True, 7))} == {
        "mean ratio of the response clipped to 0.9 to 1.2",
        "ratio as a constant weight, at most 4",
        "ratio as a constant weight, at least 0.5 and at most 4",
        "slope fading with the ratio, τ = 2 and 3",
        "geometric mean of the response's ratios, logs within -1 to 2",
        "none where the probability has moved by more than 0.2",
        "ratio of the token, old policy over sampler, at most 3",
        "ratio of the response, old policy over sampler, masked outside 0.1 to 7",
        "1 times the log-ratio off the reward of every token, reset every 5 steps",
        "1 times k3 and the ratio in the loss, reset every 7 steps",
    }
    assert [x.words for x in (Returns(), LeaveOneOut(), OneStep(), NoReference())] == [
        "the return to come", "reward minus the mean of the others", "none, one step", "none"
    ]
    assert [Aggregation("constant", n).words for n in (None, 1, 7)] == [
        "sum over tokens over the longest length", "sum over tokens", "sum over tokens over 7"
    ]


def test_equal_words_for_different_choices_are_spelled_out():
    changed = replace(PRESETS["ppo"], advantage=Critic(0.99, normalize=False))
    text = difference(PRESETS["ppo"], changed)
    assert "normalize=True" in text and "normalize=False" in text
    changed = replace(PRESETS["grpo"], kl=InLoss(corrected=True))
    assert difference(PRESETS["grpo"], changed) == (
        "kl: 0.04 times k3 in the loss → 0.04 times k3 and the ratio in the loss"
    )
    assert difference(PRESETS["grpo"], PRESETS["grpo-icepop"]) == (
        "correction: none → ratio of the token, old policy over sampler, masked outside 0.5 to 5"
    )
    assert difference(PRESETS["magistral"], PRESETS["dapo"]).endswith("; overlong: 0 → 0.2")
    between = difference(PRESETS["ppo"], PRESETS["rlhf-ppo"])
    assert between.startswith("advantage: GAE of a critic, γ = 0.99, λ = 0.95 → GAE")
    for a in PRESETS.values():
        for b in PRESETS.values():
            for change in difference(a, b).split("; "):
                before, _, after = change.partition(": ")[2].partition(" → ")
                assert before != after or change == "nothing"


@pytest.mark.parametrize(
    "name, right, wrong",
    [
        ("reinforce", 1 / 2, 0),
        ("rloo", 1 / 2, -1 / 2),
        ("grpo", 1 / 2, -1 / 6),
        ("dapo", 1 / 4, -1 / 4),
        ("dr-grpo", 1 / 12, -1 / 12),
    ],
)
def test_the_weight_of_a_score_is_the_one_computed_by_hand(name, right, wrong):
    "A right response of one token and a wrong one of three, before the first step."
    objective = PRESETS[name].for_length(3)
    mask = torch.tensor([[True, False, False], [True, True, True]])
    logp = torch.full((2, 3), -1.0, dtype=torch.float64, requires_grad=True)
    old = logp.detach()
    paid = objective.rewards(torch.tensor([1.0, 0.0]).double(), old, mask, old)
    advantages, _ = objective.advantage(Paid(paid, mask, 2))
    loss, _ = objective_loss(objective, Tokens(logp, old, advantages, mask, old))
    (slope,) = torch.autograd.grad(loss, logp)
    want = torch.tensor([[right, 0, 0], [wrong] * 3]).double()
    torch.testing.assert_close(-slope, want, rtol=0, atol=1e-5)


def test_advantages_say_what_they_miss(data):
    mask, old = data["mask"], data["logp_old"]
    for choice in Group(), LeaveOneOut():
        with pytest.raises(ValueError, match="a divisor of the 8 rows, got 3"):
            choice(Paid(torch.zeros(N, L), mask, 3))
        with pytest.raises(ValueError, match="group_size must be positive, got 0"):
            choice(Paid(torch.zeros(N, L), mask, 0))
        with pytest.raises(ValueError, match="group_size must be a whole number, got 4.0"):
            choice(Paid(torch.zeros(N, L), mask, 4.0))
    with pytest.raises(ValueError, match="values must be given with a critic, got None"):
        Critic()(Paid(torch.zeros(N, L), mask, G))
    with pytest.raises(ValueError, match="logp_ref must be given for InReward"):
        PRESETS["rloo"].rewards(torch.ones(N), old, mask)


def test_a_length_is_filled_in_where_an_objective_divides_by_one():
    for name, objective in PRESETS.items():
        filled = objective.for_length(7)
        if name == "dr-grpo":
            assert filled.aggregation == Aggregation("constant", 7)
            assert filled.for_length(9) == filled
        else:
            assert filled == objective


def test_the_clip_fraction_is_that_of_the_bounds_that_were_chosen(data):
    narrow = replace(PRESETS["ppo"], trust=Clip(0.1, 0.5))
    rho = (data["logp"] - data["logp_old"]).detach().exp()[data["mask"]]
    _, metrics = objective_loss(narrow, tokens(data))
    outside = ((rho < 0.9) | (rho > 1.5)).double().mean()
    torch.testing.assert_close(metrics["clip_fraction"], outside)
    assert ((rho > 1.1) & (rho < 1.5)).any()


def test_the_price_in_the_reward_is_the_one_that_was_chosen(data):
    old, ref, mask = data["logp_old"], data["logp_ref"], data["mask"]
    dear = replace(PRESETS["rloo"], kl=InReward(0.3))
    want = REWARDS - 0.3 * ((old - ref) * mask).sum(1)
    torch.testing.assert_close(dear.rewards(REWARDS, old, mask, ref).sum(1), want)


def test_a_price_of_nothing_needs_no_reference(data):
    free = replace(PRESETS["rloo"], kl=InReward(0.0))
    paid = free.rewards(torch.ones(N), data["logp_old"], data["mask"])
    torch.testing.assert_close(paid.sum(1), torch.ones(N).to(paid))
