"Trust regions after the clip: plain loops, finite differences, invariances, bad input."
import inspect
import itertools
import math

import pytest
import torch

from po_book import surrogates
from po_book.grpo import aggregate
from po_book.ppo import MAX_LOG_RATIO, clipped_surrogate
from po_book.surrogates import (
    cispo_surrogate,
    dppo_surrogate,
    gmpo_surrogate,
    gspo_surrogate,
    sapo_surrogate,
    sequence_ratio,
)

# Every surrogate with one signature, and bounds that many of the tokens below leave.
BOUNDS = dict(clip_low=0.15, clip_high=0.2)
ROWS = {
    "gspo": lambda logp, old, A, mask: gspo_surrogate(logp, old, A, mask, **BOUNDS),
    "gmpo": lambda logp, old, A, mask: gmpo_surrogate(logp, old, A, mask, **BOUNDS),
}
TOKENS = {
    "cispo": lambda logp, old, A, mask: cispo_surrogate(logp, old, A, 0.3),
    "cispo-low": lambda logp, old, A, mask: cispo_surrogate(logp, old, A, 0.3, 0.2),
    "sapo": lambda logp, old, A, mask: sapo_surrogate(logp, old, A, 1.5, 3.0),
    "dppo": lambda logp, old, A, mask: dppo_surrogate(logp, old, A, 0.08, 0.1),
    "dppo-kl": lambda logp, old, A, mask: dppo_surrogate(
        logp, old, A, 0.02, 0.03, "kl", max_ratio=1.4
    ),
}
ALL = ROWS | TOKENS
LENGTHS = [6, 1, 3, 0, 5, 2]


def close(got, want, atol=1e-12):
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def randn(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(*shape, generator=generator, dtype=torch.float64)


@pytest.fixture
def batch():
    "Log-probabilities, advantages and mask of six responses, one of them empty."
    old = -randn(6, 6, seed=1).abs() - 0.05
    logp = torch.minimum(old + 0.5 * randn(6, 6, seed=2), torch.tensor(-1e-3))
    advantages = randn(6, 1, seed=3).expand(6, 6).clone()
    return logp, old, advantages, torch.arange(6) < torch.tensor(LENGTHS)[:, None]


def pulled(surrogate, logp, old, advantages, mask, weights=None):
    "Gain, and the gradient of its weighted sum over the tokens."
    logp = logp.clone().requires_grad_()
    gain = surrogate(logp, old, advantages, mask)
    kept = torch.where(mask, gain, 0)
    (gradient,) = torch.autograd.grad((kept if weights is None else kept * weights).sum(), logp)
    return kept.detach(), gradient


# The same in loops over plain numbers: gains of a row, and how the sum of the gains changes
# with the log-probability of each of its tokens.


def loop_gspo(logp, old, A):
    n, log_s = len(logp), sum(x - y for x, y in zip(logp, old)) / len(logp)
    s = math.exp(log_s)
    edge = 1.2 if A > 0 else 0.85
    out = s > edge if A > 0 else s < edge
    return [(edge if out else s) * A] * n, [0.0 if out else s * A] * n


def loop_gmpo(logp, old, A):
    cut, inside = [], []
    for x, y in zip(logp, old):
        out = x - y > 0.2 if A > 0 else x - y < -0.15
        cut.append((0.2 if A > 0 else -0.15) if out else x - y)
        inside.append(not out)
    s = math.exp(sum(cut) / len(cut))
    return [s * A] * len(cut), [s * A * i for i in inside]


def loop_weights(weigh):
    def rows(logp, old, A):
        weights = [weigh(math.exp(x), math.exp(y), A) for x, y in zip(logp, old)]
        return [w * A * x for w, x in zip(weights, logp)], [w * A for w in weights]

    return rows


def loop_sapo(logp, old, A):
    tau = 1.5 if A > 0 else 3.0
    gains, slopes = [], []
    for x, y in zip(logp, old):
        rho = math.exp(x - y)
        gate = 1 / (1 + math.exp(-tau * (rho - 1)))
        gains.append(4 / tau * gate * A)
        slopes.append(rho * A / math.cosh(tau * (rho - 1) / 2) ** 2)
    return gains, slopes


def kept_tv(p, q, A):
    return 0.0 if (p - q > 0.1 if A > 0 else p - q < -0.08) else min(p / q, 20)


def kept_kl(p, q, A):
    d = q * math.log(q / p) + (1 - q) * math.log((1 - q) / (1 - p))
    return 0.0 if (d > 0.03 and p > q if A > 0 else d > 0.02 and p < q) else min(p / q, 1.4)


LOOPS = {
    "gspo": loop_gspo,
    "gmpo": loop_gmpo,
    "cispo": loop_weights(lambda p, q, A: min(p / q, 1.3)),
    "cispo-low": loop_weights(lambda p, q, A: min(max(p / q, 0.8), 1.3)),
    "sapo": loop_sapo,
    "dppo": loop_weights(kept_tv),
    "dppo-kl": loop_weights(kept_kl),
}


@pytest.mark.parametrize("name", ALL)
def test_gain_and_gradient_are_those_of_a_loop(batch, name):
    logp, old, A, mask = batch
    gain, gradient = pulled(ALL[name], *batch)
    ended = 0
    for i, n in enumerate(LENGTHS):
        if n:
            gains, slopes = LOOPS[name](logp[i, :n].tolist(), old[i, :n].tolist(), A[i, 0].item())
            close(gain[i, :n], torch.tensor(gains, dtype=torch.float64))
            close(gradient[i, :n], torch.tensor(slopes, dtype=torch.float64))
            inside = [math.exp(x - y) * A[i, 0].item() for x, y in zip(logp[i, :n], old[i, :n])]
            ended += any(abs(x - y) > 1e-3 for x, y in zip(slopes, inside))
        assert gain[i, n:].eq(0).all() and gradient[i, n:].eq(0).all()
    assert ended >= 2  # the bounds do something


@pytest.mark.parametrize("name", ["gspo", "gmpo", "sapo"])
def test_gradients_are_finite_differences(batch, name):
    logp, old, A, mask = batch
    weights = randn(6, 6, seed=7)

    def f(x):
        return (weights * torch.where(mask, ALL[name](x, old, A, mask), 0)).sum()

    _, gradient = pulled(ALL[name], *batch, weights)
    for i, t in itertools.product(range(6), range(6)):
        step = torch.zeros_like(logp)
        step[i, t] = 1e-6
        close((f(logp + step) - f(logp - step)) / 2e-6, gradient[i, t], atol=1e-8)


@pytest.mark.parametrize("name", ALL)
def test_where_nothing_moved_it_is_the_policy_gradient(batch, name):
    "The sum over a response pulls at each of its tokens with the advantage."
    _, old, A, mask = batch
    _, gradient = pulled(ALL[name], old, old, A, mask)
    close(gradient, A * mask)


def test_the_mean_over_responses_is_gspos_objective(batch):
    logp, old, A, mask = batch
    logp = logp.clone().requires_grad_()
    ours = aggregate(gspo_surrogate(logp, old, A, mask, **BOUNDS), mask)
    (gradient,) = torch.autograd.grad(ours, logp)
    total = 0.0
    for i, n in enumerate(LENGTHS):
        if n:
            s = math.exp(sum((logp - old)[i, :n].tolist()) / n)
            a = A[i, 0].item()
            total += min(s * a, min(max(s, 0.85), 1.2) * a) / 6
            inside = s < 1.2 if a > 0 else s > 0.85
            close(gradient[i, :n], torch.full((n,), s * a / n / 6 * inside, dtype=torch.float64))
    assert ours.item() == pytest.approx(total, abs=1e-12)


def test_the_ratio_of_a_response_is_a_geometric_mean():
    rho = torch.tensor([[2.0, 0.5, 1.0], [4.0, 1.0, 99.0], [8.0, 99.0, 99.0], [9.0, 9.0, 9.0]])
    mask = torch.arange(3) < torch.tensor([[3], [2], [1], [0]])
    close(sequence_ratio(rho.log(), rho * 0, mask), torch.tensor([1.0, 2.0, 8.0, 1.0]), 1e-6)


def test_responses_of_one_token_have_the_clip():
    x, mask = torch.linspace(-1, 1, 41)[:, None], torch.ones(41, 1, dtype=torch.bool)
    for sign in 1.0, -1.0:
        A = torch.full_like(x, sign)
        close(gspo_surrogate(x, x * 0, A, mask, 0.2, 0.3), clipped_surrogate(x, x * 0, A, 0.2, 0.3))


def test_the_numbers_of_the_papers():
    def defaults(f):
        given = inspect.signature(f).parameters.items()
        return {name: p.default for name, p in given if p.default is not p.empty}

    assert defaults(gspo_surrogate) == {"clip_low": 3e-4, "clip_high": 4e-4}
    assert defaults(cispo_surrogate) == {"clip_low": None}
    assert defaults(sapo_surrogate) == {"tau_pos": 1.0, "tau_neg": 1.05}
    assert defaults(gmpo_surrogate) == {"clip_low": 0.4, "clip_high": 0.4}
    bounds = {"delta_low": 0.15, "delta_high": 0.15}
    assert defaults(dppo_surrogate) == {**bounds, "divergence": "tv", "max_ratio": 20.0}


# What must not matter


@pytest.mark.parametrize("garbage", [math.nan, math.inf, -math.inf, 5.0])
@pytest.mark.parametrize("name", ROWS)
def test_what_stands_beyond_the_end_reaches_nothing(batch, name, garbage):
    logp, old, A, mask = batch
    want = pulled(ROWS[name], *batch)
    spoiled = [torch.where(mask, x, garbage) for x in (logp, old, A)]
    for got, right in zip(pulled(ROWS[name], *spoiled, mask), want):
        close(got, right, atol=0)


@pytest.mark.parametrize("name", ALL)
def test_more_padding_changes_nothing(batch, name):
    gain, gradient = pulled(ALL[name], *batch)
    wider = [torch.nn.functional.pad(x, (0, 3)) for x in batch]
    wide_gain, wide_gradient = pulled(ALL[name], *wider)
    close(wide_gain[:, :6], gain, atol=1e-15)
    close(wide_gradient[:, :6], gradient, atol=1e-15)
    assert wide_gain[:, 6:].eq(0).all() and wide_gradient[:, 6:].eq(0).all()


@pytest.mark.parametrize("name", ALL)
def test_rows_know_nothing_of_each_other(batch, name):
    order = torch.tensor([3, 5, 0, 4, 2, 1])
    shuffled = pulled(ALL[name], *(x[order] for x in batch))
    for got, want in zip(shuffled, pulled(ALL[name], *batch)):
        close(got, want[order], atol=0)


@pytest.mark.parametrize("name", ROWS)
def test_the_order_of_the_tokens_of_a_response_does_not_matter(batch, name):
    order = torch.tensor([4, 1, 5, 0, 3, 2])
    shuffled = pulled(ROWS[name], *(x[:, order] for x in batch))
    for got, want in zip(shuffled, pulled(ROWS[name], *batch)):
        close(got, want[:, order])


@pytest.mark.parametrize("name", ALL)
def test_single_precision_says_the_same(batch, name):
    logp, old, A, mask = batch
    single = pulled(ALL[name], logp.float(), old.float(), A.float(), mask)
    for got, want in zip(single, pulled(ALL[name], *batch)):
        assert got.dtype == torch.float32
        close(got.double(), want, atol=2e-6)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ALL)
def test_half_precision_stays_what_it_is(batch, name, dtype):
    logp, old, A, mask = batch
    for x in pulled(ALL[name], logp.to(dtype), old.to(dtype), A.to(dtype), mask):
        assert x.dtype == dtype and x.isfinite().all()


# Ends of the range


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("L", [0, 3])
def test_without_tokens_there_are_zeros(name, L):
    x, mask = torch.full((2, L), -1.0), torch.zeros(2, L, dtype=torch.bool)
    gain, gradient = pulled(ALL[name], x, x - 0.1, x.sign(), mask)
    assert gain.shape == gradient.shape == (2, L)
    assert gain.eq(0).all() and gradient.eq(0).all()


@pytest.mark.parametrize("name", ALL)
@pytest.mark.parametrize("sign", [1.0, -1.0])
@pytest.mark.parametrize("far", [300.0, -300.0])
def test_ratios_that_would_overflow_are_finite(name, sign, far):
    "And a token beyond the cut counts as one at it."
    old = torch.tensor([[-301.0, -1.0]]) if far > 0 else torch.tensor([[-0.5, -1.0]])
    logp, mask = old + torch.tensor([[far, 0.0]]), torch.ones(1, 2, dtype=torch.bool)
    A = torch.full((1, 2), sign)
    gain, gradient = pulled(ALL[name], logp, old, A, mask)
    assert gain.isfinite().all() and gradient.isfinite().all()
    if name in ("gspo", "gmpo", "sapo"):
        at = old + torch.tensor([[math.copysign(MAX_LOG_RATIO, far), 0.0]])
        close(gain, ALL[name](at, old, A, mask), atol=1e-4 * gain.abs().max().item())
        assert gradient[0, 0] == 0


def test_one_wild_token_does_not_carry_a_response_away():
    "Cut at 20 nats, it moves the mean of four by 5, not by 75."
    logp = torch.tensor([[299.0, 0.0, 0.0, 0.0]]) - 300
    old = torch.tensor([[-301.0, -300.0, -300.0, -300.0]])
    ratio = sequence_ratio(logp, old, torch.ones(1, 4, dtype=torch.bool))
    assert ratio.item() == pytest.approx(math.exp(MAX_LOG_RATIO / 4), rel=1e-6)


# The clip as the special case, the edges of DPPO


def coefficients(surrogate, p_old, p, A, **options):
    logp = torch.tensor(p, dtype=torch.float64).log().requires_grad_()
    old = torch.tensor(p_old, dtype=torch.float64).log()
    gain = surrogate(logp, old, torch.full_like(old, A), **options)
    return torch.autograd.grad(gain.sum(), logp)[0].tolist()


def test_dppo_masks_only_what_moves_further_away():
    p_old, p = [0.4, 0.4, 0.4, 0.4], [0.3, 0.2, 0.5, 0.6]
    good = coefficients(dppo_surrogate, p_old, p, 1.0)
    bad = coefficients(dppo_surrogate, p_old, p, -1.0)
    assert good == pytest.approx([0.75, 0.5, 1.25, 0.0])
    assert bad == pytest.approx([-0.75, 0.0, -1.25, -1.5])


def test_dppo_has_two_bounds_and_a_cap():
    p_old, p = [0.4, 0.4, 0.01, 0.01], [0.55, 0.25, 0.09, 0.11]
    rise = coefficients(dppo_surrogate, p_old, p, 1.0, delta_high=0.12, max_ratio=5.0)
    fall = coefficients(dppo_surrogate, p_old, p, -1.0, delta_low=0.12, max_ratio=5.0)
    assert rise == pytest.approx([0.0, 0.625, 5.0, 5.0])
    assert fall == pytest.approx([-1.375, 0.0, -5.0, -5.0])


@pytest.mark.parametrize("A", [1.0, -1.0])
def test_the_binary_kl_is_that_of_two_coins(A):
    grid = torch.linspace(0.02, 0.98, 25, dtype=torch.float64)
    q, p = (x.flatten() for x in torch.meshgrid(grid, grid, indexing="ij"))
    coins = (torch.distributions.Bernoulli(probs=x) for x in (q, p))
    far = torch.distributions.kl_divergence(*coins)
    out = (far > 0.05) & (A * (p - q) > 0)
    got = coefficients(
        dppo_surrogate, q.tolist(), p.tolist(), A, divergence="kl",
        delta_low=0.05, delta_high=0.05, max_ratio=100.0,
    )
    close(torch.tensor(got, dtype=torch.float64), torch.where(out, 0, p / q * A), 1e-9)
    assert 0.1 < out.double().mean() < 0.9


def test_certain_tokens_have_a_divergence():
    "From 1 to 1/2, from 1/2 to 1, and from 1 to 1."
    p_old, p = [1.0, 0.5, 1.0], [0.5, 1.0, 1.0]
    bounds = dict(divergence="kl", delta_low=0.05, delta_high=0.05)
    assert coefficients(dppo_surrogate, p_old, p, -1.0, **bounds) == [0.0, -2.0, -1.0]
    assert coefficients(dppo_surrogate, p_old, p, 1.0, **bounds) == [0.5, 0.0, 1.0]
    loose = dict(bounds, delta_low=0.7)  # log 2 is 0.693
    assert coefficients(dppo_surrogate, p_old, p, -1.0, **loose)[0] == -0.5


def test_a_token_of_no_advantage_pulls_at_nothing():
    old = torch.tensor([[-1.0, -2.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    for surrogate in ALL.values():
        gain, gradient = pulled(surrogate, old + 0.9, old, torch.zeros(1, 2), mask)
        assert gain.eq(0).all() and gradient.eq(0).all()


def test_the_weight_of_cispo_is_a_constant():
    "So its gradient has no gradient of its own."
    logp = torch.tensor([-1.0], requires_grad=True)
    old, one = torch.tensor([-1.1]), torch.ones(1)
    (first,) = torch.autograd.grad(cispo_surrogate(logp, old, one, 4.0), logp, create_graph=True)
    assert not first.requires_grad and first.item() == pytest.approx(math.exp(0.1))


# Bad input


def good():
    x, mask = torch.full((2, 3), -1.0), torch.ones(2, 3, dtype=torch.bool)
    return {"logp": x, "logp_old": x, "advantages": torch.ones(2, 3), "mask": mask}


BOUNDED = {
    "gspo": (gspo_surrogate, {"clip_low": [-0.1, 1.0, math.nan], "clip_high": [-0.1, math.nan]}),
    "gmpo": (gmpo_surrogate, {"clip_low": [-0.1, math.nan], "clip_high": [-0.1, math.nan]}),
    "cispo": (cispo_surrogate, {"clip_low": [-0.1, 1.1, math.nan], "clip_high": [-0.1, math.nan]}),
    "sapo": (sapo_surrogate, {"tau_pos": [0.0, -1.0, math.inf], "tau_neg": [0.0, math.nan]}),
    "dppo": (dppo_surrogate, {"delta_low": [-0.1, math.nan], "delta_high": [-0.1, math.nan],
                              "max_ratio": [0.9, math.nan], "divergence": ["chi", "TV"]}),
}
NEEDED = {"cispo": {"clip_high": 4.0}}


def call(name, **changes):
    surrogate, _ = BOUNDED[name]
    given = good() | NEEDED.get(name, {}) | changes
    known = inspect.signature(surrogate).parameters
    return surrogate(**{k: x for k, x in given.items() if k in known})


@pytest.mark.parametrize(
    "name, argument, value",
    [(n, a, x) for n, (_, bad) in BOUNDED.items() for a, values in bad.items() for x in values],
)
def test_bounds_that_make_no_sense(name, argument, value):
    with pytest.raises(ValueError, match=argument):
        call(name, **{argument: value})


@pytest.mark.parametrize("name", BOUNDED)
@pytest.mark.parametrize("argument", ["logp_old", "advantages"])
def test_data_of_another_shape_or_with_a_gradient(name, argument):
    call(name)
    with pytest.raises(ValueError, match=rf"{argument} must have \w+'s shape"):
        call(name, **{argument: torch.ones(2, 1)})
    with pytest.raises(ValueError, match=f"{argument} must be detached"):
        call(name, **{argument: torch.full((2, 3), -1.0, requires_grad=True)})


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_rows_need_a_mask_of_their_shape(name):
    with pytest.raises(ValueError, match="mask must have logp's shape"):
        call(name, mask=torch.ones(2, 4, dtype=torch.bool))
    with pytest.raises(ValueError, match="mask must be a bool tensor"):
        call(name, mask=torch.ones(2, 3))
    flat = {k: x[0] for k, x in good().items()}
    with pytest.raises(ValueError, match="logp must have shape"):
        call(name, **flat)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_a_ratio_of_a_response_wants_one_advantage(name):
    uneven = torch.tensor([[1.0, 1.0, 1.0], [1.0, 1.0, 1.5]])
    with pytest.raises(ValueError, match=r"one number a response.*rows \[1\]"):
        call(name, advantages=uneven)
    short = torch.arange(3) < torch.tensor([[3], [2]])
    close(call(name, advantages=uneven, mask=short)[1], torch.tensor([1.0, 1.0, 0.0]))
    rows = torch.tensor([[1.0] * 3, [-2.0] * 3])
    close(call(name, advantages=rows), rows)


@pytest.mark.parametrize("name", ["gspo", "gmpo"])
def test_advantages_elsewhere_are_not_looked_at(name):
    "On a GPU to look would be to wait; the meta device cannot be looked at at all."
    data = {k: x.to("meta") for k, x in good().items()}
    assert call(name, **data).shape == (2, 3)


def test_nothing_else_is_exported():
    assert set(surrogates.__all__) == {
        "sequence_ratio", "gspo_surrogate", "cispo_surrogate", "sapo_surrogate",
        "gmpo_surrogate", "dppo_surrogate",
    }
