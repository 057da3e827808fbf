"The oracle: exact values against other routes, invariances, gradients, bad input."
from itertools import product

import pytest
import torch

from po_book.mdp import (
    TabularMDP,
    action_values,
    chain_occupancy,
    chain_stationary,
    chain_values,
    chain_visits,
    cliff_walk,
    corridor,
    draw,
    enumerate_trajectories,
    policy_chain,
    policy_iteration,
    random_mdp,
    sample_trajectories,
)

EXACT = {"rtol": 0, "atol": 1e-10}


def rows(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.rand(shape, generator=generator, dtype=torch.float64).softmax(-1)


def logits(*shape, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(shape, generator=generator, dtype=torch.float64)
    return x.requires_grad_()


@pytest.mark.parametrize("gamma", [0.0, 0.5, 0.9, 0.97])
@pytest.mark.parametrize("seed", range(3))
def test_values_are_long_sums(seed, gamma):
    mdp, pi = random_mdp(5, 3, gamma, seed), rows(5, 3, seed=seed)
    P, r = torch.einsum("sa,sax->sx", pi, mdp.P), (pi * mdp.R).sum(-1)
    total, expected = torch.zeros(5).double(), r
    for t in range(900):
        total, expected = total + gamma**t * expected, P @ expected
    torch.testing.assert_close(mdp.values(pi), total, **EXACT)


def test_two_states_by_hand():
    b, c, gamma = 0.2, 0.5, 0.9
    mdp = TabularMDP([[[1 - b, b]], [[c, 1 - c]]], [[1.0], [0.0]], gamma, [1.0, 0.0])
    pi = torch.ones(2, 1)
    gap = 1 / (1 - gamma * (1 - b - c))
    low = gamma * c * gap / (1 - gamma)
    hand = torch.tensor([low + gap, low], dtype=torch.float64)
    torch.testing.assert_close(mdp.values(pi), hand, **EXACT)
    torch.testing.assert_close(mdp.q_values(pi)[:, 0], hand, **EXACT)
    assert mdp.objective(pi).item() == pytest.approx(low + gap, abs=1e-12)
    assert chain_stationary(mdp.under(pi)[0])[0].item() == pytest.approx(c / (b + c))


@pytest.mark.parametrize("length", [1, 2, 5, 9])
def test_corridor_by_hand(length):
    mdp = corridor(length, gamma=0.9)
    powers = [0.9 ** (length - 1 - s) for s in range(length)] + [0.0]
    hand = torch.tensor(powers, dtype=torch.float64)
    torch.testing.assert_close(mdp.optimal_values(), hand, **EXACT)
    # A symmetric walk that is held at its left end needs n (n + 1) steps for n cells.
    uniform = torch.full((length + 1, 2), 0.5)
    end = torch.arange(length + 1) == length
    visits = chain_visits(mdp.under(uniform)[0], mdp.p0, end)
    assert visits.sum().item() == pytest.approx(length * (length + 1), rel=1e-12)
    assert visits[-1] == 0


def test_relabelling_states_and_actions_relabels_results():
    mdp, pi = random_mdp(5, 3, 0.9, seed=4), rows(5, 3)
    s, a = torch.tensor([3, 0, 4, 1, 2]), torch.tensor([2, 0, 1])
    other = TabularMDP(mdp.P[s][:, a][:, :, s], mdp.R[s][:, a], 0.9, mdp.p0[s])
    torch.testing.assert_close(other.q_values(pi[s][:, a]), mdp.q_values(pi)[s][:, a], **EXACT)
    torch.testing.assert_close(other.occupancy(pi[s][:, a]), mdp.occupancy(pi)[s], **EXACT)
    torch.testing.assert_close(other.objective(pi[s][:, a]), mdp.objective(pi), **EXACT)


def test_scaling_rewards_scales_values():
    mdp, pi = random_mdp(4, 2, 0.95, seed=1), rows(4, 2)
    scaled = TabularMDP(mdp.P, 1e6 * mdp.R, mdp.gamma, mdp.p0)
    for f in (lambda m: m.values(pi)), TabularMDP.optimal_values:
        torch.testing.assert_close(f(scaled), 1e6 * f(mdp), rtol=1e-12, atol=0)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 0.95])
@pytest.mark.parametrize("seed", range(3))
def test_optimal_values_are_those_of_value_iteration(seed, gamma):
    mdp = random_mdp(6, 4, gamma, seed)
    V = torch.zeros(6).double()
    for _ in range(600):
        V = (mdp.R + gamma * mdp.P @ V).max(-1).values
    torch.testing.assert_close(mdp.optimal_values(), V, **EXACT)
    pi = mdp.optimal_policy()
    assert ((pi == 0) | (pi == 1)).all() and (pi.sum(-1) == 1).all()
    assert mdp.advantages(pi).max() < 1e-10


def test_policy_iteration_ends_when_everything_is_tied():
    mdp = random_mdp(6, 4, 0.99, seed=0)
    tied = policy_iteration(mdp.P, torch.full((6, 4), 0.1), 0.99)
    torch.testing.assert_close(tied.sum(-1), torch.ones(6).double())
    copies = mdp.P[:, :1].expand(6, 4, 6)  # all actions equal up to rounding
    assert policy_iteration(copies, 1e9 * mdp.R[:, :1].expand(6, 4), 0.999).shape == (6, 4)


def test_cliff_walk_has_the_known_optimum():
    mdp = cliff_walk()
    pi, s, steps = mdp.optimal_policy(), 36, [36]
    while s != 47 and len(steps) < 50:
        s = mdp.P[s, pi[s].argmax()].argmax().item()
        steps.append(s)
    assert steps == [36, *range(24, 36), 47]
    end = torch.arange(48) == 47
    assert chain_visits(mdp.under(torch.full((48, 4), 0.25))[0], mdp.p0, end).sum() > 1000


def test_cliff_walk_is_gymnasiums():
    peer = pytest.importorskip("gymnasium.envs.toy_text.cliffwalking").CliffWalkingEnv()
    mdp = cliff_walk()
    for s, a in product(range(37), range(4)):  # the cells that can be occupied
        ((probability, s_next, reward, done),) = peer.P[s][a]
        assert probability == 1 and mdp.P[s, a, s_next] == 1
        assert mdp.R[s, a] == reward and done == (s_next == 47)


@pytest.mark.parametrize("seed", range(2))
def test_occupancy_is_where_simulations_are(seed):
    mdp, pi = random_mdp(4, 2, 0.8, seed), rows(4, 2, seed=seed)
    generator = torch.Generator().manual_seed(seed)
    states = sample_trajectories(mdp, pi, 5_000, 40, generator).states
    discount = 0.2 * 0.8 ** torch.arange(41).double()
    seen = torch.nn.functional.one_hot(states, 4).double().mean(0)
    gap = discount @ seen / discount.sum() - mdp.occupancy(pi)
    assert gap.abs().sum() / 2 < 0.02
    assert mdp.occupancy(pi).sum().item() == pytest.approx(1, abs=1e-12)


def test_visits_are_counted_in_simulations():
    mdp = corridor(3)
    pi = torch.tensor([[0.3, 0.7]]).repeat(4, 1)
    generator = torch.Generator().manual_seed(0)
    states = sample_trajectories(mdp, pi, 3_000, 100, generator).states
    counted = torch.stack([(states == s).sum(1).double().mean() for s in range(3)])
    visits = chain_visits(mdp.under(pi)[0], mdp.p0, torch.arange(4) == 3)
    torch.testing.assert_close(visits[:3], counted, rtol=0.05, atol=0)


def test_stationary_distribution_of_a_chain_that_never_settles():
    swap = torch.tensor([[0.0, 1.0], [1.0, 0.0]])
    torch.testing.assert_close(chain_stationary(swap), torch.full((2,), 0.5).double())


def test_enumeration_is_complete_and_without_repeats():
    mdp, pi = random_mdp(3, 2, 0.9, seed=3), rows(3, 2)
    t = enumerate_trajectories(mdp, pi, horizon=2)
    columns = t.states.tolist(), t.actions.tolist(), t.weights.tolist()
    found = {(*s, *a): w for s, a, w in zip(*columns)}
    assert len(found) == len(t.weights) == 3**3 * 2**2
    for s0, a0, s1, a1, s2 in product(range(3), range(2), range(3), range(2), range(3)):
        weight = mdp.p0[s0] * pi[s0, a0] * mdp.P[s0, a0, s1] * pi[s1, a1] * mdp.P[s1, a1, s2]
        assert found[s0, s1, s2, a0, a1] == pytest.approx(weight.item(), abs=1e-15)
    torch.testing.assert_close(t.rewards, mdp.R[t.states[:, :-1], t.actions])


def test_enumeration_leaves_out_what_dynamics_forbid_only():
    t = enumerate_trajectories(corridor(5), torch.tensor([[0.0, 1.0]]).repeat(6, 1), 8)
    assert len(t.weights) == 2**8  # deterministic moves: one trajectory for each plan
    assert t.weights.sum() == 1 and (t.weights > 0).sum() == 1
    assert t.rewards[t.weights > 0].tolist() == [[0, 0, 0, 0, 1, 0, 0, 0]]


def test_samples_have_the_statistics_of_the_enumeration():
    mdp, pi = random_mdp(3, 2, 0.9, seed=5), rows(3, 2)
    listed = enumerate_trajectories(mdp, pi, 3)
    drawn = sample_trajectories(mdp, pi, 20_000, 3, torch.Generator().manual_seed(1))

    def statistics(t):
        pairs = torch.nn.functional.one_hot(t.states[:, :-1] * 2 + t.actions, 6).double()
        joint = torch.einsum("m,mti,muj->tiuj", t.weights, pairs, pairs)
        return joint, t.weights @ t.rewards

    for exact, sampled in zip(statistics(listed), statistics(drawn)):
        torch.testing.assert_close(sampled, exact, rtol=0, atol=0.02)
    assert drawn.weights.sum().item() == pytest.approx(1, abs=1e-12)


def test_sampling_is_reproducible_and_keeps_to_its_generator():
    mdp, pi = random_mdp(3, 2, 0.9, seed=0), rows(3, 2)
    state = torch.get_rng_state()
    first, second = (
        sample_trajectories(mdp, pi, 7, 5, torch.Generator().manual_seed(3)) for _ in range(2)
    )
    assert torch.equal(first.states, second.states)
    assert torch.equal(first.actions, second.actions)
    assert torch.equal(state, torch.get_rng_state())
    assert torch.equal(random_mdp(3, 2, 0.9, seed=1).P, random_mdp(3, 2, 0.9, seed=1).P)
    assert first.weights.tolist() == [1 / 7] * 7


def test_draws_have_their_probabilities_and_miss_what_has_none():
    p = torch.tensor([[0.0, 0.2, 0.0, 0.5, 0.3, 0.0], [1.0, 0.0, 0.0, 0.0, 0.0, 0.0]])
    drawn = draw(p.double().expand(20_000, 2, 6), torch.Generator().manual_seed(0))
    assert drawn.shape == (20_000, 2)
    share = torch.nn.functional.one_hot(drawn, 6).double().mean(0)
    assert (share - p).abs().max() < 4 * (0.25 / 20_000) ** 0.5
    assert share[p == 0].eq(0).all()
    state = torch.get_rng_state()
    again = [draw(p, torch.Generator().manual_seed(1)) for _ in range(2)]
    assert torch.equal(*again) and torch.equal(state, torch.get_rng_state())


def test_a_draw_of_exactly_zero_misses_what_has_no_probability(monkeypatch):
    "It happens once in 2**24 draws of float32."
    monkeypatch.setattr(torch, "rand", lambda shape, generator, dtype: torch.zeros(shape, dtype=dtype))
    p = torch.tensor([[0.0, 0.0, 0.4, 0.6], [0.3, 0.0, 0.7, 0.0]])
    assert draw(p).tolist() == [2, 0]


def test_gradients_are_finite_differences():
    mdp, theta = random_mdp(4, 3, 0.9, seed=2), logits(4, 3)
    small, phi = random_mdp(2, 2, 0.9, seed=2), logits(2, 2)
    for f in mdp.objective, mdp.values, mdp.q_values, mdp.advantages, mdp.occupancy:
        assert torch.autograd.gradcheck(lambda th, f=f: f(th.softmax(-1)), theta)
    assert torch.autograd.gradcheck(
        lambda th: enumerate_trajectories(small, th.softmax(-1), 3).weights, phi
    )
    hall, end = corridor(3), torch.arange(4) == 3
    for f in (lambda P: chain_visits(P, hall.p0, end), chain_stationary):
        assert torch.autograd.gradcheck(
            lambda th, f=f: f(hall.under(th.softmax(-1))[0]), logits(4, 2)
        )


def test_a_trap_that_no_episode_meets_leaves_the_visits():
    "State 2 keeps for ever; it is met from nowhere, or only after the end."
    P = torch.tensor([[0.5, 0.5, 0.0], [0.0, 1.0, 0.0], [0.0, 0.0, 1.0]])
    start, end = torch.tensor([1.0, 0.0, 0.0]), torch.tensor([False, True, False])
    P[1] = torch.tensor([0.0, 0.0, 1.0])  # rows of ends are not used
    assert chain_visits(P, start, end).tolist() == [2.0, 0.0, 0.0]
    P[0] = torch.tensor([0.5, 0.4, 0.1])
    with pytest.raises(ValueError, match="end is never reached from state 2"):
        chain_visits(P, start, end)


def test_the_chain_that_restarts_has_the_visits_as_its_stationary_distribution():
    inner = random_mdp(3, 2, 0.9, seed=3)
    generator = torch.Generator().manual_seed(0)
    stop = 0.1 + 0.3 * torch.rand(3, 2, 1, generator=generator, dtype=torch.float64)
    theta = torch.randn(3, 2, generator=generator, dtype=torch.float64)
    P = torch.einsum("sa,sax->sx", theta.softmax(-1), (1 - stop) * inner.P)
    leave = 1 - P.sum(-1, keepdim=True)
    whole = torch.cat([torch.cat([P, leave], 1), torch.eye(4).double()[3:]])
    eta = chain_visits(whole, torch.cat([inner.p0, inner.p0.new_zeros(1)]), torch.arange(4) == 3)
    share = eta[:3] / eta.sum()
    again = chain_stationary(P + leave * inner.p0)
    torch.testing.assert_close(share, again, atol=1e-12, rtol=0)
    expected = torch.tensor([0.4906, 0.1100, 0.3994]).double()
    torch.testing.assert_close(share, expected, atol=5e-5, rtol=0)


def test_gradient_survives_probabilities_of_zero():
    pi = torch.tensor([[1.0, 0.0], [1.0, 0.0]], dtype=torch.float64, requires_grad=True)
    mdp = corridor(1)
    t = enumerate_trajectories(mdp, pi, 2)
    (gradient,) = torch.autograd.grad(t.weights @ t.rewards.sum(-1), pi)
    # Leaving in the first step or, after waiting with probability one, in the second.
    assert gradient.isfinite().all() and gradient[0, 1].item() == pytest.approx(2)


def test_lists_and_float32_are_computed_in_float64():
    mdp = TabularMDP([[[0.1, 0.9]], [[0.3, 0.7]]], [[1.0], [0.1]], 0.9, [0.2, 0.8])
    assert mdp.P[0, 0, 0].item() == 0.1 and mdp.p0[1].item() == 0.8 and mdp.R[1, 0].item() == 0.1
    assert mdp.values(torch.ones(2, 1, dtype=torch.float32)).dtype == torch.float64


P2, R2, START = torch.full((2, 2, 2), 0.5), torch.zeros(2, 2), torch.tensor([1.0, 0.0])
NAN = torch.tensor([torch.nan, 1.0])


@pytest.mark.parametrize(
    "change, message",
    [
        ({"P": torch.full((2, 2, 2), 0.4)}, "rows of P must sum to one"),
        ({"P": torch.tensor([1.5, -0.5]).expand(2, 2, 2)}, "P must be non-negative"),
        ({"P": NAN.expand(2, 2, 2)}, "P must be finite"),
        ({"P": torch.full((2, 3, 2), 0.5)}, r"P must have shape \(2, 2, 2\), got \(2, 3, 2\)"),
        ({"R": torch.tensor([[0.0, torch.inf], [0.0, 0.0]])}, "R must be finite, got inf"),
        ({"R": torch.zeros(2)}, r"R must have shape \(S, A\)"),
        ({"R": torch.zeros(0, 2)}, "R must have entries"),
        ({"gamma": 1.0}, r"gamma must be in \[0, 1\), got 1.0"),
        ({"gamma": -0.1}, "gamma"),
        ({"gamma": float("nan")}, "gamma"),
        ({"p0": torch.tensor([0.5, 0.4])}, "rows of p0 must sum to one"),
        ({"p0": torch.ones(3) / 3}, "p0 must have shape"),
        ({"p0": NAN}, "p0 must be finite"),
    ],
)
def test_a_wrong_process_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        TabularMDP(**{"P": P2, "R": R2, "gamma": 0.9, "p0": START, **change})


@pytest.mark.parametrize(
    "pi, message",
    [
        (torch.full((2, 3), 1 / 3), r"pi must have shape \(2, 2\), got \(2, 3\)"),
        (torch.tensor([0.5, 0.5]), "pi must have shape"),
        (torch.tensor([[0.5, 0.6], [0.5, 0.5]]), "rows of pi must sum to one"),
        (torch.tensor([[1.5, -0.5], [0.5, 0.5]]), "pi must be non-negative"),
        (NAN.expand(2, 2), "pi must be finite, got nan"),
    ],
)
def test_a_wrong_policy_is_refused_by_name(pi, message):
    mdp = TabularMDP(P2, R2, 0.9, START)
    for f in (
        mdp.under, mdp.values, mdp.q_values, mdp.advantages, mdp.occupancy, mdp.objective,
        lambda pi: enumerate_trajectories(mdp, pi, 1),
        lambda pi: sample_trajectories(mdp, pi, 1, 1),
    ):
        with pytest.raises(ValueError, match=message):
            f(pi)


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda: corridor(0), "length must be at least 1, got 0"),
        (lambda: random_mdp(0, 2, 0.9, 0), "R must have entries"),
        (lambda: random_mdp(2, 2, 1.5, 0), "gamma"),
        (lambda: cliff_walk(1.0), "gamma"),
        (lambda: enumerate_trajectories(corridor(1), torch.full((2, 2), 0.5), 0), "horizon"),
        (lambda: sample_trajectories(corridor(1), torch.full((2, 2), 0.5), 0, 1), "n must"),
        (lambda: sample_trajectories(corridor(1), torch.full((2, 2), 0.5), 1, 0), "horizon"),
        (lambda: policy_chain(P2, R2, torch.ones(2, 1)), "pi"),
        (lambda: action_values(P2, R2, 0.9, torch.zeros(3)), "V must have shape"),
        (lambda: chain_values(torch.eye(2), torch.zeros(3), 0.9), "P must have shape"),
        (lambda: chain_values(torch.eye(2), torch.zeros(2), 1.0), "gamma"),
        (lambda: chain_occupancy(torch.eye(2), torch.tensor([0.5, 0.6]), 0.9), "p0"),
        (lambda: chain_visits(torch.eye(2), START, torch.tensor([False, True])), "end is never"),
        (lambda: chain_visits(torch.eye(2), START, torch.tensor([False])), "end must have shape"),
        (lambda: chain_stationary(torch.eye(2)), "P must have a state"),
    ],
)
def test_bad_input_is_refused_by_name(call, message):
    with pytest.raises(ValueError, match=message):
        call()
