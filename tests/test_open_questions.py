"Moments of a group, baselines that are shrunk, and gradients on a tree of tokens."

import itertools
from math import inf, nan, sqrt

import pytest
import torch

from po_book.grpo import group_advantages, leave_one_out
from po_book.open_questions import (
    GroupMoments,
    group_moments,
    prefix_values,
    prior_strength,
    shrunk_advantages,
    token_moments,
)

RATES = torch.tensor([0.1, 0.5, 0.8], dtype=torch.float64)


def centred(R):
    return R - R.mean(1, keepdim=True)


@pytest.fixture(autouse=True)
def double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


# Moments of a group


def outcomes(rates, size):
    "All 2^G outcomes of a group, and their probabilities at each rate, [P, 2^G]."
    groups = torch.cartesian_prod(*[torch.arange(2.0)] * size).view(-1, size)
    p = rates[:, None, None]
    return groups, torch.where(groups > 0, p, 1 - p).prod(-1)


def off_centre(R):
    return R - 0.3


@pytest.mark.parametrize("advantages", [centred, leave_one_out, group_advantages, off_centre])
@pytest.mark.parametrize("size", [2, 3, 5])
def test_the_sum_over_counts_is_the_sum_over_all_outcomes(advantages, size):
    groups, chance = outcomes(RATES, size)
    A, p = advantages(groups), RATES[:, None, None]
    pull = (A * (groups - p) / (p * (1 - p))).mean(-1)
    found = group_moments(RATES, size, advantages)
    want = (chance * pull).sum(1), (chance * pull**2).sum(1), chance @ A.square().sum(1) / size**2
    for x, y in zip((found.gain, found.along, found.scatter), want, strict=True):
        torch.testing.assert_close(x, y)


def test_moments_are_those_of_real_scores():
    "A softmax over five answers with any law: the scatter of right and wrong ones differs."
    law = torch.tensor([0.1, 0.2, 0.3, 0.15, 0.25])
    right = torch.tensor([1.0, 0.0, 1.0, 0.0, 0.0])
    p = law @ right
    gradient = law * (right - p)
    groups = torch.cartesian_prod(*[torch.arange(5)] * 3)
    scores = torch.eye(5)[groups] - law
    estimates = (leave_one_out(right[groups])[..., None] * scores).mean(1)
    chance = law[groups].prod(1)
    m = group_moments(p[None], 3, leave_one_out)
    torch.testing.assert_close(chance @ estimates, m.gain * gradient)
    # A baseline that has not seen the answer: E A² is the same sum for each kind of answer.
    along = (right - p) / (p * (1 - p)) * gradient.norm()
    square = (torch.eye(5) - law).square().sum(1) - along**2
    kinds = [(law * square)[right == kind].sum() / law[right == kind].sum() for kind in (1, 0)]
    squares = leave_one_out(right[groups]).square() * chance[:, None] / 9
    scatter = sum(squares[right[groups] == kind].sum() * v for kind, v in zip((1, 0), kinds))
    power = chance @ estimates.square().sum(1)
    torch.testing.assert_close(power, m.along[0] * gradient.square().sum() + scatter)


@pytest.mark.parametrize("size", [2, 4, 9])
def test_a_group_is_worth_one_less(size):
    for f in centred, leave_one_out:
        m = group_moments(RATES, size, f)
        torch.testing.assert_close(m.responses, torch.full_like(RATES, size - 1))
    for p in RATES:
        exact = group_moments(p[None], size, lambda R, p=p: R - p)
        torch.testing.assert_close(exact.responses, torch.tensor([float(size)]))


def test_gain_of_the_mean_of_the_group():
    torch.testing.assert_close(group_moments(RATES, 4, centred).gain, torch.full((3,), 0.75))
    assert torch.allclose(group_moments(RATES, 4, leave_one_out).gain, torch.ones(3))


def test_progress_sees_no_scale_and_ends_at_the_responses():
    m, scaled = (group_moments(RATES, 4, lambda R, f=f: f * centred(R)) for f in (1, sqrt(4)))
    for noise in 0.0, 3.0:
        torch.testing.assert_close(m.progress(noise), scaled.progress(noise))
    torch.testing.assert_close(1e9 * m.progress(1e9), m.responses, rtol=1e-6, atol=0)
    # By hand: two answers, p = 1/2, minus the mean: a = c = 1/2, one effective response.
    pair = group_moments(RATES[1:2], 2, centred)
    torch.testing.assert_close(pair.progress(3.0), torch.tensor([1 / (2 + 3)]))


def test_progress_is_between_zero_and_one():
    for f in centred, group_advantages:
        x = group_moments(RATES, 3, f).progress(0.0)
        assert ((x > 0) & (x <= 1)).all()


@pytest.mark.parametrize(
    "rates, size, f, message",
    [
        ([0.0], 2, centred, "rates must be in"),
        ([1.0], 2, centred, "rates must be in"),
        ([nan], 2, centred, "rates must be in"),
        ([[0.5]], 2, centred, "rates must have shape"),
        ([0.5], 0, centred, "size must be at least 1"),
        ([0.5], 2.0, centred, "size must be a whole number"),
        ([0.5], 2, lambda R: R[:, :1], "advantages must have groups's shape"),
        ([0.5], 2, lambda R: R / 0, "advantages must be finite"),
    ],
)
def test_what_moments_refuse(rates, size, f, message):
    with pytest.raises(ValueError, match=message):
        group_moments(torch.tensor(rates), size, f)


def test_progress_refuses_negative_noise():
    with pytest.raises(ValueError, match="noise must be at least 0"):
        GroupMoments(*[torch.ones(1)] * 4).progress(-1.0)


# Baselines that are shrunk


def test_a_shrunk_baseline_is_a_weighted_mean_of_others():
    R = torch.randn(3, 4, generator=torch.Generator().manual_seed(0))
    A = shrunk_advantages(R, 2.0)
    for q, i in itertools.product(range(3), range(4)):
        others = torch.cat([R[q, :i], R[q, i + 1 :]])
        elsewhere = torch.cat([R[:q], R[q + 1 :]]).mean()
        baseline = (others.sum() + 2 * elsewhere) / (3 + 2)
        torch.testing.assert_close(A[q, i], R[q, i] - baseline)


def test_the_ends_of_shrinkage():
    R = torch.randn(3, 4, generator=torch.Generator().manual_seed(1))
    torch.testing.assert_close(shrunk_advantages(R, 0.0), leave_one_out(R))
    elsewhere = (R.sum() - R.sum(1, keepdim=True)) / 8
    torch.testing.assert_close(shrunk_advantages(R, inf), R - elsewhere)
    torch.testing.assert_close(shrunk_advantages(R, torch.tensor(inf)), R - elsewhere)


def test_shrinkage_moves_with_the_rewards():
    "A number added to all rewards changes nothing, a factor comes out."
    R = torch.randn(3, 4, generator=torch.Generator().manual_seed(2))
    torch.testing.assert_close(shrunk_advantages(3 * R + 5, 2.0), 3 * shrunk_advantages(R, 2.0))
    torch.testing.assert_close(prior_strength(3 * R + 5), prior_strength(R))


def test_the_strength_is_variance_within_over_between():
    R = torch.tensor([[0.0, 0, 0, 0], [1, 1, 0, 0], [1, 1, 1, 1]])
    assert prior_strength(R).item() == pytest.approx((1 / 9) / (1 / 4 - 1 / 36))
    assert prior_strength(torch.tensor([[1.0, 0], [0, 1]])) == inf
    assert prior_strength(torch.ones(2, 2)) == inf  # nothing differs
    assert prior_strength(torch.tensor([[1.0, 1], [0, 0]])) == 0  # answers of one prompt agree


@pytest.mark.parametrize("a, b", [(1.0, 1.0), (0.5, 0.5), (2.0, 6.0)])
def test_the_strength_of_a_beta_law_is_the_sum_of_its_parameters(a, b):
    torch.manual_seed(0)
    p = torch.distributions.Beta(a, b).sample((40_000, 1))
    R = (torch.rand(40_000, 4) < p).double()
    assert prior_strength(R).item() == pytest.approx(a + b, rel=0.05)


@pytest.mark.parametrize(
    "rewards, strength, message",
    [
        ([[1.0, 0.0]], 1.0, "rewards must be of two prompts or more"),
        ([[1.0], [0.0]], 1.0, "rewards must be"),
        ([[1.0, nan], [0.0, 0.0]], 1.0, "rewards must be finite"),
        ([[1.0, 0.0], [0.0, 0.0]], -1.0, "strength must be at least 0"),
        ([[1.0, 0.0], [0.0, 0.0]], nan, "strength must be at least 0"),
    ],
)
def test_what_shrinkage_refuses(rewards, strength, message):
    with pytest.raises(ValueError, match=message):
        shrunk_advantages(torch.tensor(rewards), strength)
    if "strength" not in message:
        with pytest.raises(ValueError, match=message):
            prior_strength(torch.tensor(rewards))


# A tree of tokens


def tree(*symbols, seed=0):
    "A random policy whose token t is one of symbols[t], and rewards."
    generator = torch.Generator().manual_seed(seed)
    policy = [
        torch.randn(symbols[: t + 1], generator=generator).softmax(-1)
        for t in range(len(symbols))
    ]
    return policy, torch.randn(symbols, generator=generator)


def paths(policy):
    "Every response and its probability."
    for o in itertools.product(*[range(n) for n in policy[-1].shape]):
        yield o, torch.stack([pi[o[: t + 1]] for t, pi in enumerate(policy)]).prod()


def test_a_value_is_the_mean_reward_after_a_prefix():
    policy, R = tree(2, 3, 2)
    values = prefix_values(policy, R)
    assert [tuple(v.shape) for v in values] == [(), (2,), (2, 3), (2, 3, 2)]
    for t, v in enumerate(values):
        for prefix in itertools.product(*[range(n) for n in (2, 3, 2)[:t]]):
            after = [(chance, R[o]) for o, chance in paths(policy) if o[:t] == prefix]
            chance, reward = map(torch.stack, zip(*after))
            torch.testing.assert_close(v[prefix], chance @ reward / chance.sum())


def by_autograd(policy, weights):
    "Mean and total variance of one response's gradient, response by response."
    logits = [pi.log().requires_grad_() for pi in policy]
    estimates, chances = [], []
    for o, chance in paths(policy):
        logp = sum(
            psi[o] * x.log_softmax(-1)[o[: t + 1]]
            for t, (x, psi) in enumerate(zip(logits, weights))
        )
        slopes = torch.autograd.grad(logp, logits)
        estimates.append(torch.cat([x.flatten() for x in slopes]))
        chances.append(chance)
    estimates, chances = torch.stack(estimates), torch.stack(chances)
    mean = chances @ estimates
    return mean, chances @ (estimates - mean).square().sum(1)


@pytest.mark.parametrize("symbols", [(2,), (3, 2), (2, 3, 2)])
def test_moments_of_tokens_are_those_of_every_response(symbols):
    policy, _ = tree(*symbols)
    generator = torch.Generator().manual_seed(1)
    weights = [torch.randn(symbols, generator=generator) for _ in symbols]
    means, variance = token_moments(policy, weights)
    want_mean, want_variance = by_autograd(policy, weights)
    torch.testing.assert_close(torch.cat([x.flatten() for x in means]), want_mean)
    torch.testing.assert_close(variance, want_variance)


def test_the_mean_is_the_gradient_of_the_expected_reward():
    policy, R = tree(3, 2, 2)
    logits = [pi.log().requires_grad_() for pi in policy]
    value = prefix_values([x.softmax(-1) for x in logits], R)[0]
    for x, y in zip(token_moments(policy, [R] * 3)[0], torch.autograd.grad(value, logits)):
        torch.testing.assert_close(x, y)


def test_exact_values_do_not_change_the_mean():
    policy, R = tree(2, 3, 2)
    V = [v.view(v.shape + (1,) * (3 - v.ndim)).expand_as(R) for v in prefix_values(policy, R)]
    plain, _ = token_moments(policy, [R] * 3)
    for weights in [R - V[t] for t in range(3)], [V[t + 1] - V[t] for t in range(3)]:
        for x, y in zip(plain, token_moments(policy, weights)[0]):
            torch.testing.assert_close(x, y)


def test_a_certain_policy_has_no_variance():
    policy = [torch.tensor([1.0, 0.0]), torch.tensor([[0.0, 1.0], [0.5, 0.5]])]
    means, variance = token_moments(policy, [torch.ones(2, 2)] * 2)
    assert variance == 0 and all((x == 0).all() for x in means)


def test_gradients_flow_through_values_and_moments():
    policy, R = tree(2, 2)
    logits = [pi.log().requires_grad_() for pi in policy]

    def variance(*logits):
        return token_moments([x.softmax(-1) for x in logits], [R, R])[1]

    assert torch.autograd.gradcheck(variance, logits)


@pytest.mark.parametrize(
    "shapes, rewards, message",
    [
        ([], (2, 2), "rewards must be with an axis a token, 0"),
        ([(2,)], (2, 2), "rewards must be with an axis a token, 1"),
        ([(2,), (2, 3)], (2, 2), "must have shape"),
        ([(3,), (2, 2)], (2, 2), "must have shape"),
    ],
)
def test_what_a_tree_refuses(shapes, rewards, message):
    policy = [torch.ones(shape) / shape[-1] for shape in shapes]
    with pytest.raises(ValueError, match=message):
        prefix_values(policy, torch.zeros(rewards))
    if policy:
        with pytest.raises(ValueError, match=message):
            token_moments(policy, [torch.zeros(rewards)] * len(policy))


def test_weights_are_one_a_token():
    policy, R = tree(2, 2)
    with pytest.raises(ValueError, match="weights must be one a token, got 1"):
        token_moments(policy, [R])
