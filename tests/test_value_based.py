"Value-based control: exact fixed points, invariances, gradients, the memory, bad input."
import copy

import pytest
import torch
from torch import nn

from po_book.advantage import td_target
from po_book.mdp import TabularMDP, cliff_walk, corridor, random_mdp
from po_book.value_based import (
    Control,
    Replay,
    bellman_backup,
    epsilon_greedy,
    next_values,
    q_loss,
    soft_update,
    td_control,
)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, torch.as_tensor(b, dtype=a.dtype), rtol=0, atol=atol)


def normal(*shape, seed=0, dtype=torch.float64):
    return torch.randn(shape, dtype=dtype, generator=torch.Generator().manual_seed(seed))


def seeded(seed=0):
    return torch.Generator().manual_seed(seed)


# Acting


@pytest.mark.parametrize("epsilon", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_epsilon_greedy_is_a_distribution_with_its_floor(epsilon, dtype):
    q = normal(7, 3, 4, dtype=dtype)
    pi = epsilon_greedy(q, epsilon)
    assert pi.dtype == dtype and pi.shape == q.shape
    close(pi.sum(-1), torch.ones(7, 3), 1e-6)
    best = q.argmax(-1, keepdim=True)
    close(pi.gather(-1, best), torch.full((7, 3, 1), 1 - epsilon + epsilon / 4), 1e-6)
    close(pi.sort(-1).values[..., :3], torch.full((7, 3, 3), epsilon / 4), 1e-6)


def test_epsilon_greedy_gives_a_tie_to_the_first_and_passes_no_gradient():
    q = torch.zeros(2, 3, requires_grad=True)
    pi = epsilon_greedy(q, 0.3)
    close(pi[0], [0.8, 0.1, 0.1], 1e-6)
    assert not pi.requires_grad


@pytest.mark.parametrize("epsilon", [-0.1, 1.1, float("nan")])
def test_epsilon_outside_the_unit_interval_is_refused(epsilon):
    with pytest.raises(ValueError, match="epsilon"):
        epsilon_greedy(torch.zeros(3), epsilon)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_epsilon_may_be_a_tensor_which_is_not_looked_at(dtype):
    q, epsilon = normal(7, 3, 4, dtype=dtype), torch.tensor(0.25, dtype=torch.float32)
    pi = epsilon_greedy(q, epsilon)
    assert pi.dtype == dtype and torch.equal(pi, epsilon_greedy(q, 0.25))
    assert torch.equal(epsilon_greedy(q, epsilon.fill_(0.0)), epsilon_greedy(q, 0.0))
    # A tensor without data cannot be looked at.
    assert epsilon_greedy(q.to("meta"), epsilon.to("meta")).shape == q.shape


# The three rules


def test_three_rules_and_how_they_are_related():
    q, actions = normal(50, 4), torch.randint(4, (50,), generator=seeded())
    pi = normal(50, 4, seed=1).softmax(-1)
    taken = [next_values("sarsa", q, pi, torch.full((50,), a)) for a in range(4)]
    close(next_values("sarsa", q, pi, actions), q[torch.arange(50), actions])
    close(next_values("expected_sarsa", q, pi, actions), (pi * torch.stack(taken, -1)).sum(-1))
    close(next_values("q_learning", q, pi, actions), torch.stack(taken, -1).amax(-1))
    greedy = epsilon_greedy(q, 0.0)
    close(next_values("expected_sarsa", q, greedy, actions), q.amax(-1))


def test_bad_rules_are_refused():
    q, a = torch.zeros(3, 2), torch.zeros(3, dtype=torch.int64)
    with pytest.raises(ValueError, match="^rule must be one of sarsa, .*, got 'dqn'"):
        next_values("dqn", q, q, a)
    with pytest.raises(ValueError, match="pi"):
        next_values("sarsa", q, q[0], a)
    with pytest.raises(ValueError, match="actions"):
        next_values("sarsa", q, q, a[:2])


# Fixed points


@pytest.mark.parametrize("seed", range(5))
def test_backups_contract_to_the_oracle(seed):
    mdp = random_mdp(6, 3, 0.9, seed)
    pi = normal(6, 3, seed=seed).softmax(-1)
    for policy, limit in (lambda q: pi, mdp.q_values(pi)), (
        lambda q: epsilon_greedy(q, 0.0),
        mdp.q_values(mdp.optimal_policy()),
    ):
        q, other = normal(6, 3, seed=seed + 10), normal(6, 3, seed=seed + 20)
        step = bellman_backup(mdp, q, policy(q)) - bellman_backup(mdp, other, policy(other))
        assert step.abs().max() <= 0.9 * (q - other).abs().max() + 1e-12
        for _ in range(400):
            q = bellman_backup(mdp, q, policy(q))
        close(q, limit, 1e-10)


def test_backup_of_the_wrong_shape_is_refused():
    mdp = corridor(3)
    for q, pi in (torch.zeros(3, 2), mdp.R), (mdp.R, torch.zeros(4, 3)):
        with pytest.raises(ValueError, match="q must|pi must"):
            bellman_backup(mdp, q, pi)


@pytest.mark.parametrize("rule", ["sarsa", "expected_sarsa", "q_learning"])
def test_a_long_run_ends_at_its_own_fixed_point(rule):
    mdp = random_mdp(3, 2, 0.8, seed=0)
    uniform = torch.full_like(mdp.R, 0.5)
    own, best = mdp.q_values(uniform), mdp.q_values(mdp.optimal_policy())
    run = td_control(
        mdp, rule, 6000, 32, alpha=lambda n: n**-0.6, epsilon=1.0, generator=seeded()
    )
    right, wrong = (best, own) if rule == "q_learning" else (own, best)
    mean = run.q[-1].mean(0)
    assert (mean - right).abs().max() < 0.1
    assert (mean - wrong).abs().max() > 1
    assert not run.ended.any()


# Learning a table


@pytest.mark.parametrize("rule", ["sarsa", "expected_sarsa", "q_learning"])
def test_every_update_is_the_written_one(rule):
    "Deterministic, and every reward names its pair: the run can be replayed by hand."
    arrive = torch.randint(5, (5, 3), generator=seeded())
    R = torch.arange(1.0, 16).view(5, 3).double()
    mdp = TabularMDP(torch.eye(5)[arrive], R, 0.9, torch.eye(5)[2])
    run = td_control(mdp, rule, 200, 1, 0.5, 1.0, every=1, generator=seeded())
    pairs = [divmod(int(r) - 1, 3) for r in run.rewards[:, 0]]
    assert pairs[0][0] == 2 and len(set(pairs)) > 5
    q = torch.zeros(5, 3).double()
    for (s, a), (next_s, next_a), table in zip(pairs, pairs[1:], run.q[:, 0]):
        assert next_s == arrive[s, a]
        row = q[next_s]
        v = {"sarsa": row[next_a], "expected_sarsa": row.mean(), "q_learning": row.max()}
        q[s, a] += 0.5 * (R[s, a] + 0.9 * v[rule] - q[s, a])
        close(table, q)


def test_an_episode_ends_and_starts_anew():
    "One cell: stepping left stays, stepping right earns 1 and ends."
    run = td_control(corridor(1), "q_learning", 50, 1, 0.5, 1.0, generator=seeded())
    tried = run.ended.sum().item()
    assert 10 < tried < 40 and torch.equal(run.ended.double(), run.rewards)
    close(run.q[-1, 0, 0, 1], 1 - 0.5**tried)
    assert run.q[-1, 0, 1].abs().max() == 0  # nobody acts in the end


def test_runs_are_independent():
    "The mean over runs of a one-step value: half of them step right and earn 1."
    run = td_control(corridor(1), "sarsa", 1, 4000, 1.0, 1.0, generator=seeded())
    close(run.q[0].mean(0)[0, 1], 0.5, 0.03)
    assert run.rewards.shape == (1, 4000) and run.q.shape == (1, 4000, 2, 2)


def test_a_seed_repeats_a_run_and_another_does_not():
    a, b, c = (
        td_control(cliff_walk(), "sarsa", 300, 3, generator=seeded(k)).q for k in (1, 1, 2)
    )
    assert torch.equal(a, b) and not torch.equal(a, c)


def test_tables_are_recorded_when_asked():
    run = td_control(corridor(2), "sarsa", 100, 2, every=30, generator=seeded())
    assert run.q.shape == (3, 2, 3, 2) and len(run.rewards) == len(run.ended) == 100


def test_visits_set_the_rate():
    "With alpha = 1/n every entry is the mean of its targets; at gamma 0 the reward."
    mdp = random_mdp(3, 2, 0.0, seed=1)
    run = td_control(mdp, "sarsa", 300, 2, lambda n: 1 / n, 1.0, generator=seeded())
    close(run.q[-1], mdp.R.expand(2, -1, -1))


def test_epsilon_may_depend_on_the_step():
    seen = []

    def fade(t):
        seen.append(t)
        return 1 / (1 + t)

    td_control(corridor(2), "sarsa", 5, 1, epsilon=fade, generator=seeded())
    assert seen == [0, 1, 2, 3, 4, 5]


def test_a_state_that_stays_and_pays_is_no_end():
    stay = TabularMDP(torch.ones(1, 1, 1), torch.ones(1, 1), 0.5, torch.ones(1))
    run = td_control(stay, "q_learning", 60, 1, generator=seeded())
    assert not run.ended.any()
    close(run.q[-1], [[[2.0]]], 1e-4)


def test_returns_of_episodes_by_hand():
    rewards = torch.tensor([[1.0, 5.0], [2.0, 6.0], [3.0, 7.0], [4.0, 8.0]])
    ended = torch.tensor([[False, True], [True, False], [False, True], [True, True]])
    run = Control(torch.zeros(1, 2, 1, 1), rewards, ended)
    close(run.returns(2), [[3.0, 7.0], [5.0, 13.0]])
    with pytest.raises(ValueError, match="at most 2"):
        run.returns(3)


def test_cliff_walk_q_learning_finds_the_path_and_sarsa_earns_more():
    cliff = cliff_walk()
    runs = {
        rule: td_control(cliff, rule, steps, 10, generator=seeded(3))
        for rule, steps in (("sarsa", 13_000), ("q_learning", 8000))
    }
    for q in runs["q_learning"].q[-1]:
        s, total = 36, 0.0
        for _ in range(13):
            a = q[s].argmax()
            total, s = total + cliff.R[s, a].item(), cliff.P[s, a].argmax().item()
        assert s == 47 and total == -13
    late = {rule: run.returns(300)[:, -150:].mean() for rule, run in runs.items()}
    assert late["sarsa"] > late["q_learning"]


@pytest.mark.parametrize(
    "change, name",
    [
        ({"rule": "dqn"}, "rule"),
        ({"steps": 0}, "steps must be at least 1, got 0"),
        ({"runs": 0}, "runs must be at least 1, got 0"),
        ({"every": 0}, "every must be at least 1, got 0"),
        ({"alpha": 1.5}, "alpha"),
        ({"epsilon": -1}, "epsilon"),
        ({"epsilon": lambda t: 2.0}, "epsilon"),
    ],
)
def test_bad_control_is_refused(change, name):
    with pytest.raises(ValueError, match=name):
        td_control(**dict(mdp=corridor(2), rule="sarsa", steps=5) | change)


# The loss


def test_values_of_four_bytes_learn_from_targets_of_eight():
    q = torch.zeros(2, 3, requires_grad=True)
    loss = q_loss(q, torch.tensor([0, 1]), torch.ones(2, dtype=torch.float64))
    (slope,) = torch.autograd.grad(loss, q)
    assert loss.dtype == slope.dtype == torch.float32
    close(slope.sum(-1), -torch.ones(2) / 2)


def test_loss_and_gradient_by_hand():
    q = torch.tensor([[1.5, 7.0], [2.0, 4.0]], requires_grad=True)
    loss = q_loss(q, torch.tensor([0, 1]), torch.tensor([1.0, 1.0]))
    close(loss.detach(), (0.125 + 4.5) / 2, 1e-6)
    (slope,) = torch.autograd.grad(loss, q)
    close(slope, [[0.25, 0.0], [0.0, 1.5]], 1e-6)


def test_loss_takes_any_leading_shape():
    q, y = normal(5, 6, 3), normal(5, 6, seed=1)
    a = torch.randint(3, (5, 6), generator=seeded())
    close(q_loss(q, a, y), q_loss(q.flatten(0, 1), a.flatten(), y.flatten()))


@pytest.mark.parametrize(
    "q, actions, targets, name",
    [
        ((4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(4, 1), "targets"),
        ((3, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(4), "q must"),
        ((4,), torch.zeros(4, dtype=torch.int64), torch.zeros(4), "q must"),
        ((4, 2), torch.zeros(4), torch.zeros(4), "int64"),
        ((4, 2), torch.zeros(4, dtype=torch.int64), torch.zeros(4).requires_grad_(), "detached"),
    ],
)
def test_bad_losses_are_refused(q, actions, targets, name):
    with pytest.raises(ValueError, match=name):
        q_loss(torch.zeros(q), actions, targets)


def test_frozen_target_and_full_batch_are_value_iteration():
    mdp = corridor(4)
    states, actions = torch.cartesian_prod(torch.arange(5), torch.arange(2)).T
    arrive = mdp.P.argmax(-1)[states, actions]
    table = torch.zeros(5, 2).double().requires_grad_()
    exact = torch.zeros(5, 2).double()
    for _ in range(6):
        y = td_target(mdp.R[states, actions], table.detach()[arrive].amax(-1), arrive == 4, 0.9)
        (slope,) = torch.autograd.grad(q_loss(table[states], actions, y), table)
        table = (table - 10 * slope).detach().requires_grad_()
        exact = bellman_backup(mdp, exact, epsilon_greedy(exact, 0.0))
        close(table.detach(), exact)


# The memory


def rows(*values):
    x = torch.tensor(values)
    return {"s": x, "r": x.double() / 10, "end": x % 2 == 0}


def test_memory_keeps_the_newest_rows():
    memory = Replay(5)
    kept = []
    for n in 2, 3, 1, 12, 4, 5, 0:
        new = list(range(100 * n, 100 * n + n))
        memory.add(**{k: v.to(d) for (k, v), d in zip(
            rows(*new).items(), (torch.int64, torch.float64, torch.bool))})
        kept = (kept + new)[-5:]
        assert len(memory) == len(kept)
        drawn = memory.sample(300, seeded())
        assert set(drawn["s"].tolist()) == set(kept)
        close(drawn["r"], drawn["s"].double() / 10)  # rows stay together
        assert torch.equal(drawn["end"], drawn["s"] % 2 == 0)


def test_memory_draws_uniformly_and_by_seed():
    memory = Replay(10)
    memory.add(s=torch.arange(4))
    drawn = memory.sample(8000, seeded())["s"]
    close(torch.bincount(drawn).double() / 8000, [0.25] * 4, 0.02)
    assert torch.equal(drawn, memory.sample(8000, seeded())["s"])


def test_memory_tells_a_recorded_draw_how_much_is_filled():
    "A recording reads a tensor where it stands; a number of Python it would remember."
    memory = Replay(10)
    memory.add(s=torch.arange(4))
    filled = memory.filled
    memory.add(s=torch.arange(4, 7))
    assert memory.filled is filled and filled == 7
    filled.fill_(2)
    assert set(memory.sample(200, seeded())["s"].tolist()) == {0, 1}


def test_memory_is_a_copy_without_gradient():
    memory, x = Replay(4), torch.ones(2, 3, requires_grad=True)
    y = x * 2
    memory.add(obs=y)
    with torch.no_grad():
        y.zero_()
    drawn = memory.sample(2, seeded())["obs"]
    assert not drawn.requires_grad and (drawn == 2).all() and drawn.shape == (2, 3)
    drawn.zero_()
    assert (memory.sample(2, seeded())["obs"] == 2).all()


@pytest.mark.parametrize(
    "columns, message",
    [
        ({}, "columns must be"),
        ({"s": torch.zeros(2)}, "columns must be"),
        ({"s": torch.zeros(2), "r": torch.zeros(2), "x": torch.zeros(2)}, "columns must be"),
        ({"s": torch.zeros(2), "r": torch.zeros(3)}, r"r must be .*\[2\], got .*\[3\]"),
        ({"s": torch.zeros(2), "r": torch.zeros(2, 1)}, "r must be"),
        ({"s": torch.zeros(2).double(), "r": torch.zeros(2)}, "s must be torch.float32"),
        ({"s": torch.tensor(1.0), "r": torch.tensor(1.0)}, "s must be"),
    ],
)
def test_bad_rows_are_refused_and_nothing_is_stored(columns, message):
    memory = Replay(5)
    memory.add(s=torch.ones(1), r=torch.ones(1))
    with pytest.raises(ValueError, match=message):
        memory.add(**columns)
    assert len(memory) == 1 and memory.sample(3, seeded())["s"].tolist() == [1, 1, 1]


@pytest.mark.parametrize("columns", [{}, {"s": torch.tensor(1.0)}])
def test_the_first_rows_are_checked_too(columns):
    with pytest.raises(ValueError, match="must be"):
        Replay(5).add(**columns)


def test_bad_memories_and_draws_are_refused():
    with pytest.raises(ValueError, match="capacity"):
        Replay(0)
    with pytest.raises(ValueError, match="^memory must be filled .*0 rows"):
        Replay(3).sample(1)
    memory = Replay(3)
    memory.add(s=torch.ones(1))
    with pytest.raises(ValueError, match="^n must be at least 1, got 0"):
        memory.sample(0)


# The target network


def network(seed, hidden=4):
    torch.manual_seed(seed)
    return nn.Sequential(nn.Linear(3, hidden), nn.BatchNorm1d(hidden), nn.Linear(hidden, 2))


@pytest.mark.parametrize("tau", [0.1, 0.5, 1.0])
def test_soft_update_moves_a_share_and_leaves_the_online_network(tau):
    target, online = network(0), network(1)
    before, fixed = copy.deepcopy(target), copy.deepcopy(online)
    soft_update(target, online, tau)
    for old, moved, new, same in zip(
        before.parameters(), target.parameters(), online.parameters(), fixed.parameters()
    ):
        close(moved.detach(), ((1 - tau) * old + tau * new).detach(), 1e-6)
        assert torch.equal(new, same) and moved.grad_fn is None
    if tau == 1:
        assert all(torch.equal(a, b) for a, b in zip(target.parameters(), online.parameters()))


def test_bad_soft_updates_are_refused():
    for tau in 0.0, -0.1, 1.1, float("nan"):
        with pytest.raises(ValueError, match="tau"):
            soft_update(network(0), network(1), tau)
    with pytest.raises(ValueError, match="target"):
        soft_update(network(0), network(1, hidden=5), 0.5)
    with pytest.raises(ValueError, match="target"):
        soft_update(nn.Sequential(), network(1), 0.5)
