"""Policy gradients against the oracle: exact means, variances, bad input."""

import numpy as np
import pytest
import torch

from po_book import policy_gradient as module
from po_book.mdp import (
    corridor,
    enumerate_trajectories,
    random_mdp,
    sample_trajectories,
)
from po_book.policy_gradient import (
    backward_sum,
    discounted_returns,
    gradient_samples,
    mean_and_variance,
    optimal_baseline,
    policy_gradient,
    reinforce,
    reinforce_loss,
    score,
)

F64 = torch.float64
GAMMA, T = 0.9, 3
DISCOUNT = GAMMA ** torch.arange(T, dtype=F64)
SEEDS = range(4)


def normal(*shape, seed):
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


def small(seed):
    """A horizon-3 problem: policy, all trajectories, exact gradient by autograd."""
    mdp = random_mdp(2, 2, GAMMA, seed)
    theta = normal(2, 2, seed=seed).requires_grad_()
    batch = enumerate_trajectories(mdp, theta.softmax(-1), T)
    objective = batch.weights @ (batch.rewards @ DISCOUNT)
    (exact,) = torch.autograd.grad(objective, theta, retain_graph=True)
    return mdp, theta, theta.detach().softmax(-1), batch, exact


def moments(pi, batch, psi):
    return mean_and_variance(gradient_samples(pi, batch, psi), batch.weights.detach())


def to_go(rewards, gamma):
    "Trajectories are rows, steps are time-major."
    return discounted_returns(rewards.T, gamma=gamma).T


# the score


def test_score_is_the_derivative_of_log_softmax():
    theta = normal(3, 4, seed=0).requires_grad_()
    states, actions = torch.tensor([[0, 2], [1, 1]]), torch.tensor([[3, 0], [2, 1]])
    found = score(theta.detach().softmax(-1), states, actions)
    wanted = torch.autograd.functional.jacobian(
        lambda x: x.log_softmax(-1)[states, actions], theta
    )
    assert found.shape == (2, 2, 3, 4)
    torch.testing.assert_close(found, wanted, atol=1e-14, rtol=0)


def test_score_survives_a_deterministic_policy():
    pi = torch.tensor([[1.0, 0.0]], dtype=F64)
    found = score(pi, torch.tensor([0, 0]), torch.tensor([0, 1]))[:, 0]
    wanted = torch.tensor([[0.0, 0.0], [-1.0, 1.0]], dtype=F64)
    torch.testing.assert_close(found, wanted)


# every estimator has the exact mean


@pytest.mark.parametrize("seed", SEEDS)
def test_means_are_the_gradient_of_the_enumerated_objective(seed):
    _, _, pi, batch, exact = small(seed)
    G, b = to_go(batch.rewards, GAMMA), 10 * normal(2, seed=seed + 100)
    baseline = b[batch.states[:, :-1]]
    for psi in (
        G[:, :1].expand_as(G),
        DISCOUNT * G,
        DISCOUNT * (G - baseline),
        G[:, :1] - baseline,
    ):
        mean, _ = moments(pi, batch, psi)
        torch.testing.assert_close(mean, exact, atol=1e-8, rtol=0)


@pytest.mark.parametrize("seed", SEEDS)
def test_baseline_may_depend_on_time_and_state_but_not_on_the_action(seed):
    _, _, pi, batch, exact = small(seed)
    s, a, steps = batch.states[:, :-1], batch.actions, torch.arange(T)
    G = to_go(batch.rewards, GAMMA)
    of_time = normal(T, 2, seed=seed)[steps, s]
    of_action = normal(T, 2, 2, seed=seed)[steps, s, a]
    mean, _ = moments(pi, batch, DISCOUNT * G - of_time)
    torch.testing.assert_close(mean, exact, atol=1e-8, rtol=0)
    mean, _ = moments(pi, batch, DISCOUNT * G - of_action)
    assert (mean - exact).abs().max() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_dropping_the_discount_of_the_step_biases(seed):
    _, _, pi, batch, exact = small(seed)
    mean, _ = moments(pi, batch, to_go(batch.rewards, GAMMA))
    assert (mean - exact).abs().max() > 1e-3


@pytest.mark.parametrize("seed", SEEDS)
def test_return_to_go_reduces_the_variance(seed):
    _, _, pi, batch, _ = small(seed)
    G = to_go(batch.rewards, GAMMA)
    _, full = moments(pi, batch, G[:, :1].expand_as(G))
    _, causal = moments(pi, batch, DISCOUNT * G)
    assert causal < full


def test_a_terminal_reward_leaves_nothing_to_remove():
    _, _, pi, batch, _ = small(0)
    last = batch.rewards * torch.tensor([0.0, 0.0, 1.0], dtype=F64)
    G = to_go(last, GAMMA)
    torch.testing.assert_close(DISCOUNT * G, G[:, :1].expand_as(G))


def test_sampled_mean_is_within_its_standard_error():
    mdp, _, pi, batch, exact = small(2)
    n = 20_000
    sampled = sample_trajectories(mdp, pi, n, T, torch.Generator().manual_seed(0))
    found, exactly = (
        moments(pi, x, DISCOUNT * to_go(x.rewards, GAMMA))
        for x in (sampled, batch)
    )
    (mean, measured), (_, variance) = found, exactly
    assert (mean - exact).norm() < 4 * (variance / n).sqrt()
    assert abs(measured / variance - 1) < 0.05


# the state form


@pytest.mark.parametrize("seed", SEEDS)
def test_state_form_against_finite_differences(seed):
    mdp, theta, step = random_mdp(4, 3, GAMMA, seed), normal(4, 3, seed=seed), 1e-5
    wanted = torch.zeros(4, 3, dtype=F64)
    for s in range(4):
        for a in range(3):
            up, down = theta.clone(), theta.clone()
            up[s, a] += step
            down[s, a] -= step
            J = [mdp.objective(x.softmax(-1)) for x in (up, down)]
            wanted[s, a] = (J[0] - J[1]) / (2 * step)
    found = policy_gradient(mdp, theta.softmax(-1))
    torch.testing.assert_close(found, wanted, atol=1e-7, rtol=0)


def test_long_horizons_approach_the_state_form():
    mdp, pi = random_mdp(2, 2, 0.3, seed=1), normal(2, 2, seed=1).softmax(-1)
    batch = enumerate_trajectories(mdp, pi, 6)
    psi = 0.3 ** torch.arange(6, dtype=F64) * to_go(batch.rewards, 0.3)
    mean, _ = moments(pi, batch, psi)
    torch.testing.assert_close(mean, policy_gradient(mdp, pi), atol=1e-2, rtol=0)


# baselines and variance


@pytest.mark.parametrize("seed", SEEDS)
def test_variance_is_a_parabola_around_the_optimal_baseline(seed):
    mdp, pi = random_mdp(4, 3, GAMMA, seed), normal(4, 3, seed=seed).softmax(-1)
    q, d = mdp.q_values(pi), mdp.occupancy(pi)
    s, a = torch.cartesian_prod(torch.arange(4), torch.arange(3)).T
    scores, joint = score(pi, s, a), (d[:, None] * pi).flatten()

    def variance(b):
        weight = (q - b[:, None]).flatten()
        return mean_and_variance(weight[:, None, None] * scores, joint)

    best, b = optimal_baseline(pi, q), normal(4, seed=seed + 50)
    length = (pi * scores.square().sum((1, 2)).view(4, 3)).sum(-1)
    excess = (d * length * (b - best) ** 2).sum()
    torch.testing.assert_close(variance(b)[1] - variance(best)[1], excess)
    torch.testing.assert_close(variance(b)[0], variance(best)[0], atol=1e-12, rtol=0)
    x = best.clone().requires_grad_()
    (slope,) = torch.autograd.grad(variance(x)[1], x)
    assert slope.abs().max() < 1e-10


def test_optimal_baseline_of_two_actions_belongs_to_the_opposite_policy():
    pi, q = normal(5, 2, seed=0).softmax(-1), normal(5, 2, seed=1)
    torch.testing.assert_close(optimal_baseline(pi, q), (pi.flip(-1) * q).sum(-1))


def test_value_baseline_can_raise_the_variance():
    pi, q = torch.tensor([[0.9, 0.1]], dtype=F64), torch.tensor([1.0, 0.0], dtype=F64)
    first = score(pi, torch.tensor([0, 0]), torch.tensor([0, 1]))[:, 0, 0]
    found = [
        mean_and_variance(((q - b) * first)[:, None], pi[0])[1].item()
        for b in (0.0, 0.1, 0.9, -100.0)
    ]
    np.testing.assert_allclose(found, [0.0009, 0.0, 0.0576, 901.8009], atol=1e-9)


# return-to-go


@pytest.mark.parametrize("gamma", [0.0, 0.7, 1.0])
def test_returns_are_the_double_loop(gamma):
    rewards = normal(7, 3, seed=3)
    wanted = torch.stack([
        sum(gamma**k * rewards[t + k] for k in range(7 - t)) for t in range(7)
    ])
    torch.testing.assert_close(discounted_returns(rewards, gamma=gamma), wanted)
    torch.testing.assert_close(to_go(rewards.T, gamma), wanted.T)


def test_returns_keep_dtype_and_leave_their_input():
    rewards, done = torch.ones(20, 2), torch.zeros(20, 2).bool()
    for more in {}, {"done": done}, {"done": done, "bootstrap": torch.ones(20, 2)}:
        assert discounted_returns(rewards, gamma=0.5, **more).dtype == torch.float32
    assert rewards.equal(torch.ones(20, 2)) and not done.any()


def test_without_done_only_the_data_end():
    rewards, follows = normal(30, 2, seed=0), normal(30, 2, seed=1)
    none = torch.zeros(30, 2).bool()
    for bootstrap in None, follows:
        found = discounted_returns(rewards, None, 0.9, bootstrap)
        assert found.equal(discounted_returns(rewards, none, 0.9, bootstrap))
    torch.testing.assert_close(found[-1], rewards[-1] + 0.9 * follows[-1])


@pytest.mark.parametrize("T", [1, 2, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 72, 513])
@pytest.mark.parametrize("dtype, atol", [(F64, 1e-12), (torch.float32, 1e-6)])
def test_backward_sum_is_the_loop(T, dtype, atol):
    generator = torch.Generator().manual_seed(T)
    x = normal(T, 3, seed=T).to(dtype)
    done = torch.rand(T, 3, generator=generator) < 0.1
    y, wanted = torch.zeros(3, dtype=dtype), []
    for t in reversed(range(T)):
        y = x[t] + 0.97 * (~done[t]).to(dtype) * y
        wanted.insert(0, y)
    wanted, before = torch.stack(wanted), x.clone()
    atol *= max(1, wanted.abs().max().item())
    found = backward_sum(x, done, 0.97)
    torch.testing.assert_close(found, wanted, rtol=0, atol=atol)
    assert x.equal(before)
    with_gradient = backward_sum(x.clone().requires_grad_(), done, 0.97)
    torch.testing.assert_close(with_gradient.detach(), wanted, rtol=0, atol=atol)
    in_place = backward_sum(x, done, 0.97, overwrite=True)
    assert in_place.equal(found) and in_place.data_ptr() == x.data_ptr()


@pytest.mark.parametrize("size", [2, 3, 8, 16])
def test_chunks_of_any_size(size):
    x, c = normal(101, 2, seed=0), normal(101, 2, seed=1).sigmoid()
    found = module._in_chunks(x.clone(), c.clone(), size)
    torch.testing.assert_close(found, module._one_by_one(x, c), rtol=0, atol=1e-12)


def test_backward_sum_has_the_gradient_of_the_loop():
    x = normal(20, 2, seed=0).requires_grad_()
    done = torch.arange(20)[:, None].eq(7).expand(20, 2)
    assert torch.autograd.gradcheck(lambda x: backward_sum(x, done, 0.9), x)
    assert torch.autograd.gradcheck(lambda x: backward_sum(x, None, 0.9), x)


# the loss


def test_loss_descends_along_the_gradient():
    _, theta, _, batch, exact = small(1)
    logp = theta.log_softmax(-1)[batch.states[:, :-1], batch.actions]
    G = to_go(batch.rewards, GAMMA)
    loss = reinforce_loss(logp, DISCOUNT * G, batch.weights)
    (slope,) = torch.autograd.grad(loss, theta)
    torch.testing.assert_close(-slope, exact, atol=1e-8, rtol=0)


def test_loss_stops_the_gradient_of_its_weights():
    logp = normal(2, 3, seed=0).requires_grad_()
    psi, weights = normal(2, 3, seed=1), torch.tensor([0.3, 0.7], dtype=F64)
    psi.requires_grad_(), weights.requires_grad_()
    reinforce_loss(logp, psi, weights).backward()
    assert psi.grad is None and weights.grad is None
    torch.testing.assert_close(logp.grad, -weights.detach()[:, None] * psi.detach())


def test_loss_ignores_padding_and_the_order_of_rows():
    logp, psi = normal(4, 3, seed=0), normal(4, 3, seed=1)
    loss, order = reinforce_loss(logp, psi), torch.tensor([2, 0, 3, 1])
    more = torch.zeros(4, 5, dtype=F64)
    padded = reinforce_loss(torch.cat([logp, more - 3], 1), torch.cat([psi, more], 1))
    torch.testing.assert_close(padded, loss)
    torch.testing.assert_close(reinforce_loss(logp[order], psi[order]), loss)
    even = torch.full((4,), 0.25, dtype=F64)
    torch.testing.assert_close(reinforce_loss(logp, psi, even), loss)


def test_loss_is_the_usual_mean_times_the_length():
    logp, psi = normal(4, 3, seed=0), normal(4, 3, seed=1)
    torch.testing.assert_close(reinforce_loss(logp, psi), -3 * (psi * logp).mean())


# the algorithm


def run(seed, iterations=40):
    mdp = corridor()
    settings = dict(episodes=8, horizon=30, learning_rate=4.0, seed=seed)

    def weight(batch):
        return to_go(batch.rewards, mdp.gamma)

    return reinforce(mdp, weight, iterations=iterations, **settings)


@pytest.mark.parametrize("seed", range(5))
def test_reinforce_learns_the_corridor(seed):
    policies = run(seed)
    assert policies.shape == (41, 6, 2)
    assert policies[0].eq(0.5).all()
    assert policies[:, :5, 1].amin(-1).max() > 0.95


def test_reinforce_repeats_itself():
    assert run(0, 3).equal(run(0, 3))
    assert not run(0, 3).equal(run(1, 3))


# bad input


def example():
    mdp = random_mdp(2, 2, GAMMA, 0)
    pi = torch.full((2, 2), 0.5, dtype=F64)
    return pi, sample_trajectories(mdp, pi, 5, T, torch.Generator().manual_seed(0))


NAN = torch.full((5, T), float("nan"), dtype=F64)
ROWS = torch.zeros(5, T, dtype=F64)


@pytest.mark.parametrize(
    "message, call",
    [
        ("actions must have shape", lambda pi, b: score(pi, b.states, b.actions)),
        ("psi must have shape", lambda pi, b: gradient_samples(pi, b, ROWS[:, :2])),
        ("psi must be finite", lambda pi, b: gradient_samples(pi, b, NAN)),
        ("weights must have", lambda pi, b: mean_and_variance(ROWS, b.weights[:4])),
        ("weights must sum", lambda pi, b: mean_and_variance(ROWS, 2 * b.weights)),
        ("weights must be finite", lambda pi, b: mean_and_variance(ROWS, NAN[:, 0])),
        ("rewards must be a float", lambda pi, b: discounted_returns(ROWS[0])),
        ("rewards must be a float", lambda pi, b: discounted_returns(b.actions)),
        ("rewards must be a .* not empty", lambda pi, b: discounted_returns(ROWS[:0])),
        ("done must be a bool", lambda pi, b: discounted_returns(ROWS, ROWS)),
        ("bootstrap must", lambda p, b: discounted_returns(ROWS, bootstrap=ROWS[:, :1])),
        ("rewards must be finite", lambda pi, b: discounted_returns(NAN)),
        ("bootstrap must be finite", lambda p, b: discounted_returns(ROWS, bootstrap=NAN)),
        ("gamma must be in", lambda pi, b: discounted_returns(ROWS, gamma=1.1)),
        ("gamma must be in", lambda pi, b: discounted_returns(ROWS, gamma=float("nan"))),
        ("logp must be", lambda pi, b: reinforce_loss(ROWS[0], ROWS[0])),
        ("logp must be", lambda pi, b: reinforce_loss(ROWS[:0], ROWS[:0])),
        ("logp must be finite", lambda pi, b: reinforce_loss(NAN, ROWS)),
        ("psi must have shape", lambda pi, b: reinforce_loss(ROWS, ROWS[:, :1])),
        ("psi must be finite", lambda pi, b: reinforce_loss(ROWS, NAN)),
        ("weights must have", lambda pi, b: reinforce_loss(ROWS, ROWS, b.weights[:2])),
        ("pi must", lambda pi, b: policy_gradient(corridor(), pi)),
        ("q must have shape", lambda pi, b: optimal_baseline(pi, pi[0])),
        ("pi must give two", lambda pi, b: optimal_baseline(torch.eye(2).double(), pi)),
    ],
)
def test_bad_input_is_named(message, call):
    with pytest.raises(ValueError, match=message):
        call(*example())
