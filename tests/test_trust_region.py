"Trust regions: distances of distributions, hand values, bounds against the oracle, bad input."
import math

import pytest
import torch

from po_book.mdp import TabularMDP, corridor, random_mdp
from po_book.trust_region import (
    conservative_step,
    discounted_weights,
    kl_divergence,
    performance_difference,
    policy_advantage,
    surrogate,
    total_variation,
    trpo_bound,
)

pytestmark = pytest.mark.usefixtures("double")


def close(a, b, atol=1e-12):
    torch.testing.assert_close(
        torch.as_tensor(a, dtype=torch.float64), torch.as_tensor(b, dtype=torch.float64),
        rtol=0, atol=atol,
    )


PAIRWISE = [policy_advantage, performance_difference, surrogate, trpo_bound]
ALL = [*PAIRWISE, lambda mdp, pi, _: conservative_step(mdp, pi)]


def case(seed, gamma=0.9, step=1.0, n_states=4, n_actions=3):
    "A random process, a policy, and another at some distance in the logits."
    generator = torch.Generator().manual_seed(seed)
    shape = (2, n_states, n_actions)
    logits, noise = torch.randn(shape, dtype=torch.float64, generator=generator)
    mdp = random_mdp(n_states, n_actions, gamma, seed)
    return mdp, logits.softmax(-1), (logits + step * noise).softmax(-1)


@pytest.fixture
def house():
    "Outside pays nothing, action 1 goes in; inside pays 1 for ever. Half is discounted."
    P = torch.tensor([[[1.0, 0.0], [0.0, 1.0]], [[0.0, 1.0], [0.0, 1.0]]])
    R = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    return TabularMDP(P, R, 0.5, torch.tensor([1.0, 0.0]))


FLIP = torch.full((2, 2), 0.5, dtype=torch.float64)
GO_IN = torch.tensor([[0.0, 1.0], [0.5, 0.5]], dtype=torch.float64)


# Distances of distributions

def rows(*shape, seed):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator).softmax(-1)


def test_divergences_agree_with_torch():
    p, q = rows(2, 5, 3, seed=1), rows(2, 5, 3, seed=2)
    P, Q = torch.distributions.Categorical(p), torch.distributions.Categorical(q)
    close(kl_divergence(p, q), torch.distributions.kl_divergence(P, Q), 1e-10)
    assert kl_divergence(p, p).abs().max() == 0 and total_variation(p, p).max() == 0
    assert kl_divergence([1.0, 0.0], [0.5, 0.5]).item() == pytest.approx(math.log(2))
    assert kl_divergence([0.5, 0.5], [1.0, 0.0]) == math.inf


@pytest.mark.parametrize("p, q, distance", [
    ([1.0, 0.0], [0.0, 1.0], 1.0), ([0.7, 0.3], [0.5, 0.5], 0.2), ([0.2, 0.3, 0.5], [0.5, 0.3, 0.2], 0.3),
])  # fmt: skip
def test_total_variation_by_hand(p, q, distance):
    assert total_variation(p, q).item() == pytest.approx(distance, abs=1e-15)


def test_the_divergence_is_differentiable_in_its_first_argument():
    theta = torch.randn(4, 3).requires_grad_()
    assert torch.autograd.gradcheck(
        lambda th: kl_divergence(th.softmax(-1), rows(4, 3, seed=0)), theta
    )


@pytest.mark.parametrize("call, message", [
    (lambda: kl_divergence([0.5, 0.5], [0.5, 0.3, 0.2]), r"q must have shape \(2,\)"),
    (lambda: kl_divergence([0.5, 0.6], [0.5, 0.5]), "rows of p must sum to one"),
    (lambda: total_variation([0.5, 0.5], [1.5, -0.5]), "q must be non-negative"),
])
def test_what_is_no_distribution_is_refused(call, message):
    with pytest.raises(ValueError, match=message):
        call()


# By hand

def test_house(house):
    close(policy_advantage(house, FLIP, GO_IN), [1 / 3, 0])
    close(performance_difference(house, FLIP, GO_IN), 1 / 3)
    close(surrogate(house, FLIP, GO_IN), 10 / 9)
    new, alpha = conservative_step(house, FLIP)
    close(alpha, 1 / 6)
    close(new[0], [5 / 12, 7 / 12])


def test_bound_of_the_house(house):
    loaded = torch.tensor([[0.4, 0.6], [0.5, 0.5]], dtype=torch.float64)
    kl = 0.5 * math.log(0.5 / 0.4) + 0.5 * math.log(0.5 / 0.6)
    # the largest advantage is 1/3 and 4 * 0.5 / 0.25 is 8
    close(trpo_bound(house, FLIP, loaded), 2 / 3 + 4 / 3 * (0.6 - 0.4) / 3 - 8 / 3 * kl)


# The lemma

@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.99])
@pytest.mark.parametrize("seed", range(5))
def test_performance_difference_is_the_difference(gamma, seed):
    mdp, pi, new = case(seed, gamma)
    true = mdp.objective(new) - mdp.objective(pi)
    close(performance_difference(mdp, pi, new), true, 1e-10)


def test_policy_advantage_is_the_mean_advantage():
    mdp, pi, new = case(0)
    close(policy_advantage(mdp, pi, new), (new * mdp.advantages(pi)).sum(-1))
    close(policy_advantage(mdp, pi, pi), torch.zeros(4))


def test_performance_difference_adds_along_a_chain_of_policies():
    mdp, a, b = case(1)
    c = torch.full_like(a, 1 / 3)
    parts = performance_difference(mdp, a, b) + performance_difference(mdp, b, c)
    close(parts, performance_difference(mdp, a, c))


def test_absorbing_end():
    mdp = corridor(3, 0.9)
    half, right = torch.full((4, 2), 0.5), torch.tensor([[0.0, 1.0]] * 4)
    true = mdp.objective(right) - mdp.objective(half)
    close(performance_difference(mdp, half, right), true)
    assert surrogate(mdp, half, right).isfinite()


# The surrogate

def test_surrogate_has_value_and_gradient_of_the_objective_at_the_old_policy():
    mdp, pi, _ = case(2)
    logits = pi.log().requires_grad_()
    prediction = surrogate(mdp, pi, logits.softmax(-1))
    true = mdp.objective(logits.softmax(-1))
    close(prediction.detach(), true.detach())
    gradients = [torch.autograd.grad(x, logits)[0] for x in (prediction, true)]
    close(*gradients)
    assert gradients[1].abs().max() > 1e-3


def test_surrogate_is_linear_in_the_new_policy():
    mdp, pi, new = case(3)
    mixed = surrogate(mdp, pi, 0.3 * new + 0.7 * pi)
    close(mixed, 0.3 * surrogate(mdp, pi, new) + 0.7 * mdp.objective(pi))


def test_surrogate_is_exact_if_actions_do_not_move_the_state():
    mdp, pi, new = case(4)
    still = TabularMDP(mdp.P.mean(1, keepdim=True).expand_as(mdp.P), mdp.R, 0.9, mdp.p0)
    close(surrogate(still, pi, new), still.objective(new))


def test_adding_a_constant_reward_shifts_the_surrogate_only():
    mdp, pi, new = case(5)
    shifted = TabularMDP(mdp.P, mdp.R + 2.0, mdp.gamma, mdp.p0)
    close(surrogate(shifted, pi, new), surrogate(mdp, pi, new) + 20, 1e-10)
    close(policy_advantage(shifted, pi, new), policy_advantage(mdp, pi, new), 1e-10)


# The bounds

@pytest.mark.parametrize("step", [0.001, 0.1, 3.0])
@pytest.mark.parametrize("gamma", [0.3, 0.9])
def test_bound_never_exceeds_the_objective(step, gamma):
    for seed in range(20):
        mdp, pi, new = case(seed, gamma, step)
        assert trpo_bound(mdp, pi, new) <= mdp.objective(new) + 1e-12


def test_bound_touches_at_the_old_policy_with_the_right_slope():
    mdp, pi, _ = case(6)
    logits = pi.log().requires_grad_()
    bound, true = trpo_bound(mdp, pi, logits.softmax(-1)), mdp.objective(logits.softmax(-1))
    close(bound.detach(), true.detach())
    close(*(torch.autograd.grad(x, logits)[0] for x in (bound, true)), 1e-10)


def test_bound_is_the_published_formula():
    mdp, pi, new = case(7, 0.8)
    weight = 4 * 0.8 / 0.2**2 * mdp.advantages(pi).abs().max()
    loss = weight * kl_divergence(pi, new).max()
    close(trpo_bound(mdp, pi, new), surrogate(mdp, pi, new) - loss)


def test_bound_is_minus_infinity_for_an_excluded_action_unless_nothing_is_at_stake(house):
    assert trpo_bound(house, FLIP, GO_IN) == -math.inf
    myopic = TabularMDP(house.P, house.R, 0.0, house.p0)
    close(trpo_bound(myopic, FLIP, GO_IN), myopic.objective(GO_IN))
    equal = TabularMDP(house.P, torch.ones(2, 2), 0.5, house.p0)
    close(trpo_bound(equal, FLIP, GO_IN), equal.objective(GO_IN))


@pytest.mark.parametrize("gamma", [0.6, 0.9, 0.99])
def test_bounds_with_the_average_divergence(gamma):
    constant = 2 * math.sqrt(gamma * (4 - 3 * gamma)) / (1 - gamma) ** 2
    assert constant <= 4 * gamma / (1 - gamma) ** 2
    for seed in range(20):
        mdp, pi, new = case(seed, gamma, 0.1 * (seed + 1))
        error = (mdp.objective(new) - surrogate(mdp, pi, new)).abs()
        kl, largest = kl_divergence(pi, new), mdp.advantages(pi).abs().max()
        mean = mdp.occupancy(pi) @ kl
        assert error <= constant * largest * mean
        root = (mean * kl.max()).sqrt()
        assert error <= 2 * math.sqrt(2 * gamma) / (1 - gamma) ** 1.5 * largest * root


# Conservative policy iteration

@pytest.mark.parametrize("gamma", [0.5, 0.95])
def test_conservative_step_improves_by_what_it_guarantees(gamma):
    for seed in range(20):
        mdp, pi, _ = case(seed, gamma)
        for _ in range(3):
            new, alpha = conservative_step(mdp, pi)
            rise = surrogate(mdp, pi, new) - mdp.objective(pi)  # the share times G
            assert 0 < alpha <= 1
            assert mdp.objective(new) - mdp.objective(pi) >= rise / 2 > 0
            pi = new


def test_conservative_step_mixes_with_the_greedy_policy():
    mdp, pi, _ = case(8)
    new, alpha = conservative_step(mdp, pi)
    star = (new - (1 - alpha) * pi) / alpha
    close(star.max(-1).values, torch.ones(4), 1e-9)
    assert torch.equal(star.argmax(-1), mdp.advantages(pi).argmax(-1))


def test_conservative_step_ignores_the_scale_of_rewards():
    mdp, pi, _ = case(9)
    scaled = TabularMDP(mdp.P, 100 * mdp.R, mdp.gamma, mdp.p0)
    close(conservative_step(scaled, pi)[0], conservative_step(mdp, pi)[0])


def test_conservative_step_is_complete_without_a_future():
    mdp, pi, _ = case(10, gamma=0.0)
    new, alpha = conservative_step(mdp, pi)
    assert alpha == 1.0
    close(mdp.objective(new), mdp.objective(mdp.optimal_policy()))


def test_conservative_step_keeps_an_optimal_policy_optimal():
    mdp, _, _ = case(11)
    best = mdp.optimal_policy()
    close(mdp.objective(conservative_step(mdp, best)[0]), mdp.objective(best))
    equal = TabularMDP(mdp.P, torch.ones(4, 3), 0.9, mdp.p0)  # every policy is optimal
    close(equal.objective(conservative_step(equal, best)[0]), 10, 1e-10)


# Weights

def test_discounted_weights():
    close(discounted_weights(3, 0.5), [4 / 7, 2 / 7, 1 / 7])
    close(discounted_weights(4, 1.0), torch.full((4,), 0.25))
    close(discounted_weights(3, 0.0), [1, 0, 0])
    assert discounted_weights(1, 0.9).tolist() == [1.0]
    close(discounted_weights(5000, 0.99).sum(), 1.0)


def test_discounted_weights_average_over_the_occupancy():
    mdp, pi, _ = case(12)
    P, law, share = mdp.under(pi)[0], mdp.p0, torch.zeros(4, dtype=torch.float64)
    for w in discounted_weights(400, mdp.gamma):
        share, law = share + w * law, law @ P
    close(share, mdp.occupancy(pi))


@pytest.mark.parametrize("horizon", [0, -1])
def test_no_step_is_refused(horizon):
    with pytest.raises(ValueError, match=f"horizon.*{horizon}"):
        discounted_weights(horizon, 0.9)


@pytest.mark.parametrize("gamma", [-0.1, 1.1, float("nan")])
def test_a_wrong_discount_is_refused(gamma):
    with pytest.raises(ValueError, match=f"gamma.*{gamma}"):
        discounted_weights(3, gamma)


# Bad policies

BAD = {
    "shape": torch.full((3, 4), 0.25),
    "one row": torch.full((1, 3), 1 / 3),
    "sum": torch.full((4, 3), 0.5),
    "negative": torch.tensor([[1.5, -0.5, 0.0]] * 4),
    "NaN": torch.full((4, 3), float("nan")),
}


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("function", ALL, ids=lambda f: f.__name__)
def test_bad_old_policy_is_refused(function, bad):
    mdp, pi, _ = case(0)
    with pytest.raises(ValueError, match="pi"):
        function(mdp, bad, pi)


@pytest.mark.parametrize("bad", BAD.values(), ids=BAD)
@pytest.mark.parametrize("function", PAIRWISE, ids=lambda f: f.__name__)
def test_bad_new_policy_is_refused(function, bad):
    mdp, pi, _ = case(0)
    with pytest.raises(ValueError, match="pi"):
        function(mdp, pi, bad)
