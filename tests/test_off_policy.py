"Off-policy: enumeration, the oracle, gradients by autograd, supports that are missing."
import re

import pytest
import torch

from po_book.mdp import (
    TabularMDP,
    chain_occupancy,
    chain_stationary,
    corridor,
    enumerate_trajectories,
    random_mdp,
)
from po_book.off_policy import (
    deterministic_policy_loss,
    effective_sample_size,
    excursion_objective,
    explore,
    importance_ratios,
    off_policy_gradient,
    ordinary_importance_sampling,
    per_decision_importance_sampling,
    weight_second_moment,
    weighted_importance_sampling,
)
from po_book.policy_gradient import policy_gradient

ESTIMATORS = [
    ordinary_importance_sampling,
    per_decision_importance_sampling,
    weighted_importance_sampling,
]
SEEDS = range(10)


def close(a, b, atol=1e-10):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


def problem(seed, S=3, A=2):
    "An MDP, the logits of a target and a behaviour policy."
    generator = torch.Generator().manual_seed(seed)
    tables = torch.randn(2, S, A, dtype=torch.float64, generator=generator)
    return random_mdp(S, A, 0.9, seed), tables[0], tables[1].softmax(-1)


def enumerated(mdp, pi, pi_b, horizon):
    "Trajectories of the behaviour, and their ratios."
    batch = enumerate_trajectories(mdp, pi_b, horizon)
    return batch, importance_ratios(pi, pi_b, batch.states[:, :-1], batch.actions)


def value(mdp, pi, horizon):
    "Expected return of the first `horizon` steps."
    batch = enumerate_trajectories(mdp, pi, horizon)
    return batch.weights @ (batch.rewards @ mdp.gamma ** torch.arange(horizon).double())


# Estimators


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("estimator", ESTIMATORS[:2])
def test_unbiased_in_value_and_gradient(seed, estimator):
    mdp, logits, pi_b = problem(seed)
    logits.requires_grad_()
    batch, rho = enumerated(mdp, logits.softmax(-1), pi_b, 3)
    estimate = batch.weights @ estimator(rho, batch.rewards, mdp.gamma)
    truth = value(mdp, logits.softmax(-1), 3)
    close(estimate, truth)
    close(*(torch.autograd.grad(x, logits)[0] for x in (estimate, truth)))


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_on_policy_data_need_no_correction(estimator):
    mdp, _, pi_b = problem(0)
    batch, rho = enumerated(mdp, pi_b, pi_b, 3)
    close(rho, torch.ones_like(rho))
    plain = batch.rewards @ mdp.gamma ** torch.arange(3).double()
    got = estimator(rho, batch.rewards, mdp.gamma)
    close(got, plain.mean() if got.ndim == 0 else plain)


def test_one_step_is_the_same_for_both_unbiased_estimators():
    mdp, logits, pi_b = problem(1)
    batch, rho = enumerated(mdp, logits.softmax(-1), pi_b, 1)
    close(*(f(rho, batch.rewards, mdp.gamma) for f in ESTIMATORS[:2]))


def test_weighted_estimate_stays_in_the_range_of_the_returns():
    rho = torch.tensor([[1e-8, 1.0], [1e3, 1e3], [0.5, 2.0]])
    rewards = torch.tensor([[1.0, 2.0], [3.0, 4.0], [-1.0, 0.0]])
    returns = rewards.sum(-1)
    got = weighted_importance_sampling(rho, rewards, 1.0)
    assert returns.min() <= got <= returns.max()
    close(got, torch.tensor(7.0), 1e-4)


def test_weighted_estimate_ignores_the_scale_of_the_weights_and_shifts_with_rewards():
    generator = torch.Generator().manual_seed(0)
    rho, rewards = torch.rand(2, 20, 1, generator=generator, dtype=torch.float64)
    base = weighted_importance_sampling(rho, rewards, 0.9)
    close(weighted_importance_sampling(7 * rho, rewards, 0.9), base)
    close(weighted_importance_sampling(rho, rewards + 5, 0.9), base + 5)


def test_a_reward_needs_only_the_ratios_before_it():
    rho, rewards = torch.tensor([[2.0, 3.0, 5.0]]), torch.tensor([[1.0, 10.0, 100.0]])
    got = per_decision_importance_sampling(rho, rewards, 0.5)
    close(got, torch.tensor([2 * 1 + 6 * 10 * 0.5 + 30 * 100 * 0.25]))
    close(ordinary_importance_sampling(rho, rewards, 0.5),
          torch.tensor([30 * (1 + 10 * 0.5 + 100 * 0.25)]))


# Support


@pytest.mark.parametrize("pi, pi_b", [
    ([[0.5, 0.5]], [[1.0, 0.0]]),
    ([[0.0, 1.0]], [[1.0, 0.0]]),
    ([[0.999, 0.001]], [[1.0, 0.0]]),
])
def test_missing_support_is_named(pi, pi_b):
    pi, pi_b = torch.tensor(pi), torch.tensor(pi_b)
    zero = torch.tensor([0, 0])
    with pytest.raises(ValueError, match="^pi_b must be positive.*action 1 in state 0"):
        importance_ratios(pi, pi_b, zero, zero)
    mdp = TabularMDP(torch.ones(1, 2, 1), torch.ones(1, 2), 0.9, torch.ones(1))
    for call in (off_policy_gradient, lambda *x: weight_second_moment(*x, 3)):
        with pytest.raises(ValueError, match="^pi_b must be positive.*action 1"):
            call(mdp, pi, pi_b)


def test_support_matters_only_in_states_that_were_seen():
    pi, pi_b = torch.full((2, 2), 0.5), torch.tensor([[0.5, 0.5], [1.0, 0.0]])
    seen = torch.tensor([0, 0])
    close(importance_ratios(pi, pi_b, seen, seen), torch.ones(2).double())
    with pytest.raises(ValueError, match="state 1"):
        importance_ratios(pi, pi_b, torch.tensor([0, 1]), seen)


def test_an_action_neither_policy_takes_is_no_lack_of_support():
    pi = pi_b = torch.tensor([[1.0, 0.0]])
    zero = torch.tensor([0])
    close(importance_ratios(pi, pi_b, zero, zero), torch.ones(1).double())
    with pytest.raises(ValueError, match="^actions must be possible under pi_b, got 1"):
        importance_ratios(pi, pi_b, zero, zero + 1)
    mdp = TabularMDP(torch.ones(1, 2, 1), torch.ones(1, 2), 0.9, torch.ones(1))
    close(weight_second_moment(mdp, pi, pi_b, 5), torch.tensor(1.0).double())


def test_ratios_keep_the_shape_of_the_data():
    mdp, logits, pi_b = problem(0)
    states = torch.randint(3, (2, 5, 4), generator=torch.Generator().manual_seed(0))
    rho = importance_ratios(logits.softmax(-1), pi_b, states, states % 2)
    close(rho, (logits.softmax(-1) / pi_b)[states, states % 2])


# Variance


@pytest.mark.parametrize("seed", SEEDS)
def test_second_moment_is_the_enumerated_one(seed):
    mdp, logits, pi_b = problem(seed)
    pi = logits.softmax(-1)
    for horizon in (1, 2, 4):
        batch, rho = enumerated(mdp, pi, pi_b, horizon)
        exact = batch.weights @ rho.prod(-1).square()
        got = weight_second_moment(mdp, pi, pi_b, horizon)
        close(got / exact, torch.ones(()).double())
    chi = (pi**2 / pi_b).sum(-1)
    assert chi.min() ** 4 <= got <= chi.max() ** 4
    close(weight_second_moment(mdp, pi, pi_b, 0), torch.ones(()).double())
    close(weight_second_moment(mdp, pi_b, pi_b, 30), torch.ones(()).double())


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_effective_sample_size(dtype):
    w = torch.tensor([[1.0, 1, 1, 1], [4, 0, 0, 0], [3, 1, 0, 0]], dtype=dtype)
    want = torch.tensor([4.0, 1.0, 1.6], dtype=dtype)
    close(effective_sample_size(w), want, 1e-6)
    close(effective_sample_size(1e30 * w), want, 1e-6)
    close(effective_sample_size(1e-30 * w), want, 1e-6)


def test_effective_share_is_one_over_the_second_moment():
    mdp, logits, pi_b = problem(3)
    pi, states = logits.softmax(-1), torch.zeros(400_000, dtype=torch.long)
    generator = torch.Generator().manual_seed(0)
    actions = torch.multinomial(pi_b[0], len(states), True, generator=generator)
    share = effective_sample_size(importance_ratios(pi, pi_b, states, actions)) / 400_000
    close(share, 1 / (pi[0] ** 2 / pi_b[0]).sum(), 0.01)


# The gradient of the excursion objective


@pytest.mark.parametrize("seed", SEEDS)
def test_the_approximation_and_what_it_drops(seed):
    mdp, logits, pi_b = problem(seed, 5, 3)
    logits.requires_grad_()
    pi = logits.softmax(-1)
    d = chain_stationary(mdp.under(pi_b)[0])
    (true,) = torch.autograd.grad(excursion_objective(mdp, pi, pi_b), logits)
    Q = mdp.q_values(logits.softmax(-1))
    parts = (d[:, None] * logits.softmax(-1) * Q.detach(), d[:, None] * pi.detach() * Q)
    kept, dropped = (torch.autograd.grad(x.sum(), logits)[0] for x in parts)
    close(off_policy_gradient(mdp, pi.detach(), pi_b), kept)
    close(kept + dropped, true)
    m = chain_occupancy(mdp.under(pi.detach())[0], d, mdp.gamma) / (1 - mdp.gamma)
    close(m[:, None] * pi.detach() * mdp.advantages(pi.detach()), true)


@pytest.mark.parametrize("seed", SEEDS)
def test_on_policy_it_is_the_gradient_times_one_minus_gamma(seed):
    mdp, _, pi_b = problem(seed)
    d = chain_stationary(mdp.under(pi_b)[0])
    from_there = TabularMDP(mdp.P, mdp.R, mdp.gamma, d)
    close(off_policy_gradient(mdp, pi_b, pi_b),
          (1 - mdp.gamma) * policy_gradient(from_there, pi_b))


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("alpha", [1e-2, 1.0, 1e3])
def test_any_step_improves_every_state(seed, alpha):
    mdp, logits, pi_b = problem(seed, 5, 3)
    step = alpha * off_policy_gradient(mdp, logits.softmax(-1), pi_b)
    after = mdp.values((logits + step).softmax(-1))
    assert (after - mdp.values(logits.softmax(-1)) > -1e-10).all()


def test_the_optimal_policy_is_a_fixed_point():
    mdp, _, pi_b = problem(0, 5, 3)
    close(off_policy_gradient(mdp, mdp.optimal_policy(), pi_b),
          torch.zeros(5, 3).double())


def test_the_excursion_objective_starts_where_the_behaviour_is():
    mdp = corridor(3)
    half = torch.full_like(mdp.R, 0.5)
    # The behaviour ends in the absorbing state, where nothing is earned.
    close(excursion_objective(mdp, half, half), torch.zeros(()).double())
    start_decides = TabularMDP(torch.eye(2)[:, None].expand(2, 2, 2),
                               torch.ones(2, 2), 0.9, torch.ones(2) / 2)
    with pytest.raises(ValueError, match="^P must have a state that is reached"):
        excursion_objective(start_decides, half[:2], half[:2])


# Deterministic policies


def test_the_loss_is_minus_the_mean_value_and_its_gradient_the_chain_rule():
    generator = torch.Generator().manual_seed(0)
    obs = torch.randn(7, 3, dtype=torch.float64, generator=generator)
    weight = torch.randn(3, 2, dtype=torch.float64, generator=generator).requires_grad_()
    goal = torch.tensor([0.3, -0.2], dtype=torch.float64)

    def critic(s, a):
        return -((a - goal) ** 2).sum(-1) + s.sum(-1)

    loss = deterministic_policy_loss(critic, lambda s: s @ weight, obs)
    close(loss, -critic(obs, obs @ weight).mean())
    slope = -2 * (obs @ weight - goal)
    close(torch.autograd.grad(loss, weight)[0], -obs.T @ slope / 7)


@pytest.mark.parametrize("critic", [
    lambda s, a: a, lambda s, a: a.sum(), lambda s, a: a.sum(-1)[:2],
])
def test_the_loss_refuses_values_that_are_not_one_a_row(critic):
    with pytest.raises(ValueError, match=r"^critic must return \[4\] values"):
        deterministic_policy_loss(critic, lambda s: s, torch.zeros(4, 1))


def test_the_loss_refuses_an_empty_batch():
    with pytest.raises(ValueError, match="^critic .*not empty"):
        deterministic_policy_loss(lambda s, a: a.sum(-1), lambda s: s, torch.zeros(0, 1))


def test_exploration_noise():
    generator = torch.Generator().manual_seed(0)
    mean = torch.full((100_000, 2), 0.5, requires_grad=True)
    a = explore(mean, 0.2, generator=generator)
    assert not a.requires_grad and a.shape == mean.shape and a.dtype == mean.dtype
    close(a.mean(), torch.tensor(0.5), 0.002)
    close(a.std(), torch.tensor(0.2), 0.002)
    close(explore(mean, 0.0), mean.detach(), 0)
    a = explore(mean, 5.0, -1.0, 2.0, generator)
    assert a.min() == -1 and a.max() == 2
    again = [explore(mean, 1.0, generator=torch.Generator().manual_seed(3)) for _ in "ab"]
    close(*again, 0)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_sigma_may_be_a_tensor_which_is_not_looked_at(dtype):
    mean, sigma = torch.zeros(50, 2, dtype=dtype), torch.tensor(0.25, dtype=torch.float32)
    seeded = lambda: torch.Generator().manual_seed(3)
    a = explore(mean, sigma, -0.5, 0.5, seeded())
    assert a.dtype == dtype and torch.equal(a, explore(mean, 0.25, -0.5, 0.5, seeded()))
    assert torch.equal(explore(mean, sigma.fill_(0.0)), mean)
    # A tensor without data cannot be looked at.
    assert explore(mean.to("meta"), sigma.to("meta")).shape == mean.shape


@pytest.mark.parametrize("options, name", [
    ({"sigma": -0.1}, "sigma"),
    ({"sigma": float("nan")}, "sigma"),
    ({"sigma": float("inf")}, "sigma"),
    ({"sigma": 1.0, "low": 1.0, "high": 1.0}, "low"),
    ({"sigma": 1.0, "low": float("nan")}, "low"),
])
def test_exploration_refuses(options, name):
    with pytest.raises(ValueError, match=f"^{name} must be"):
        explore(torch.zeros(2, 1), **options)


# Other bad input


@pytest.mark.parametrize("estimator", ESTIMATORS)
@pytest.mark.parametrize("change, message", [
    ({"ratios": torch.ones(4, 2)}, "ratios must have shape (4, 3), got (4, 2)"),
    ({"ratios": torch.ones(4, 1)}, "ratios must have shape (4, 3), got (4, 1)"),
    ({"ratios": -torch.ones(4, 3)}, "ratios must be at least 0, got -1"),
    ({"ratios": torch.full((4, 3), torch.nan)}, "ratios must be finite"),
    ({"rewards": torch.full((4, 3), torch.inf)}, "rewards must be finite"),
    ({"rewards": torch.ones(3)}, "rewards must be [M, T], not empty, got [3]"),
    ({"rewards": torch.ones(0, 3)}, "rewards must be [M, T], not empty, got [0, 3]"),
    ({"gamma": 1.1}, "gamma must be in [0, 1], got 1.1"),
    ({"gamma": float("nan")}, "gamma must be in [0, 1], got nan"),
])
def test_estimators_refuse(estimator, change, message):
    steps = {"ratios": torch.ones(4, 3), "rewards": torch.ones(4, 3), "gamma": 0.9}
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        estimator(**(steps | change))


def test_the_weighted_estimate_needs_a_weight():
    with pytest.raises(ValueError, match="^ratios must be positive in one trajectory"):
        weighted_importance_sampling(torch.zeros(3, 2), torch.ones(3, 2), 0.9)


@pytest.mark.parametrize("weights", [
    torch.tensor([]), torch.tensor(1.0), torch.tensor([1.0, -1.0]), torch.zeros(3),
    torch.tensor([1.0, torch.nan]), torch.tensor([1.0, torch.inf]),
    torch.tensor([[1.0, 2.0], [0.0, 0.0]]),
])
def test_effective_sample_size_refuses(weights):
    with pytest.raises(ValueError, match="^weights must be"):
        effective_sample_size(weights)


@pytest.mark.parametrize("call, message", [
    (lambda m, p: importance_ratios(p, p[:1], torch.tensor([0]), torch.tensor([0])),
     "pi_b must have shape (2, 2), got (1, 2)"),
    (lambda m, p: importance_ratios(p, p, torch.tensor([0, 1]), torch.tensor([0])),
     "actions must have shape (2,), got (1,)"),
    (lambda m, p: importance_ratios(p, p, torch.tensor([0, -1]), torch.tensor([0, 0])),
     "states must be between 0 and 1, got -1 to 0"),
    (lambda m, p: importance_ratios(p, p, torch.tensor([0]), torch.tensor([2])),
     "actions must be between 0 and 1, got 2 to 2"),
    (lambda m, p: excursion_objective(m, p[:1], p), "pi must have shape (2, 2)"),
    (lambda m, p: importance_ratios(p + 1, p, torch.tensor([0]), torch.tensor([0])),
     "rows of pi must sum to one"),
    (lambda m, p: importance_ratios(p, p - 1, torch.tensor([0]), torch.tensor([0])),
     "pi_b must be non-negative"),
    (lambda m, p: off_policy_gradient(m, p[:1], p), "pi must have shape (2, 2)"),
    (lambda m, p: off_policy_gradient(m, p, p[:1]), "pi_b must have shape (2, 2)"),
    (lambda m, p: weight_second_moment(m, p, p[:1], 3), "pi_b must have shape (2, 2)"),
    (lambda m, p: weight_second_moment(m, p, p, -1), "horizon must be at least 0, got -1"),
])
def test_tables_that_do_not_fit_are_refused(call, message):
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        call(random_mdp(2, 2, 0.9, 0), torch.full((2, 2), 0.5))
