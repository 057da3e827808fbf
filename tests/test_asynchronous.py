"Stale gradients: how late they are, and how much of that a step can bear."

from collections import Counter
from math import pi, sin

import distributed_workers as workers
import pytest
import torch

from po_book.asynchronous import (
    SharedWeights,
    a3c,
    delay_bound,
    delayed_descent,
    largest_root,
)
from po_book.train import A2CConfig

PLAIN = A2CConfig(
    total_steps=2400, n_envs=2, n_steps=8, hidden=(8,), normalize_obs=False, normalize_rewards=False
)


def test_delayed_descent_by_hand():
    assert delayed_descent(0.5, 0, 3).tolist() == [1, 0.5, 0.25, 0.125]
    # 1, 1 - 1 = 0, 0 - 1 = -1, -1 - 0 = -1, -1 + 1 = 0, ...
    assert delayed_descent(1.0, 1, 6).tolist() == [1, 0, -1, -1, 0, 1, 1]
    assert delayed_descent(0.25, 0, 1, curvature=2.0).tolist() == [1, 0.5]


@pytest.mark.parametrize(("delay", "bound"), [(0, 2.0), (1, 1.0), (2, 0.618034), (3, 0.445042)])
def test_the_bound_is_where_the_largest_root_leaves_the_circle(delay, bound):
    assert delay_bound(delay) == pytest.approx(bound, abs=1e-6)
    assert delay_bound(delay, curvature=4.0) == pytest.approx(bound / 4, abs=1e-6)
    assert delay_bound(delay) == pytest.approx(2 * sin(pi / (4 * delay + 2)), abs=1e-12)
    assert largest_root(delay_bound(delay), delay) == pytest.approx(1, abs=1e-10)
    assert largest_root(0.99 * bound, delay) < 1 < largest_root(1.01 * bound, delay)


def test_roots_that_have_left_do_not_come_back():
    for delay in range(1, 5):
        rates = [delay_bound(delay) * (1 + 0.05 * k) for k in range(1, 60)]
        assert min(largest_root(rate, delay) for rate in rates) > 1


@pytest.mark.parametrize("delay", [-1, -0.5])
def test_a_gradient_is_not_from_the_future(delay):
    with pytest.raises(ValueError, match="delay must be at least 0"):
        delay_bound(delay)


def test_what_is_pushed_is_one_step_of_rmsprop_and_counted():
    zeros = torch.zeros(2)
    lock = torch.multiprocessing.get_context("spawn").Lock()
    memory = SharedWeights(zeros.clone(), zeros + 1, torch.zeros(1, dtype=torch.int64), lock)
    mine = zeros + 7
    assert memory.pull(mine) == 0 and mine.tolist() == [0, 0]
    assert memory.push(torch.tensor([3.0, 0.0]), 0.1, seen=0) == 0
    # 0.99 + 0.01 * 9 = 1.08 and 0.99
    assert memory.squares.tolist() == pytest.approx([1.08, 0.99])
    assert memory.weights.tolist() == pytest.approx([-0.3 / 1.08001**0.5, 0])
    assert memory.push(zeros, 0.1, seen=0) == 1
    assert memory.pull(mine) == 2 and mine.tolist() == memory.weights.tolist()


def test_three_workers_are_two_updates_late_and_all_work():
    policy, log = a3c(workers.cartpole, 3, PLAIN)
    updates, counts = len(log), Counter(row["worker"] for row in log)
    assert 150 <= updates <= 152 and set(counts) == {0, 1, 2}  # 2400 / 16
    late = sum(row["staleness"] for row in log)
    assert late / updates == pytest.approx(2, abs=18 / updates)
    assert max(row["staleness"] for row in log) >= 2
    # All begin with the same weights, so it is what they saw that differs.
    first = [next(row["value_loss"] for row in log if row["worker"] == i) for i in range(3)]
    assert len(set(first)) == 3
    start = workers.new_learner(workers.cartpole, 0, PLAIN)
    moved = [not torch.equal(a, b) for a, b in zip(policy.parameters(), start.policy.parameters())]
    assert all(moved)


def test_a_worker_that_dies_is_named():
    with pytest.raises(ChildProcessError, match="worker [01] ended with code 3"):
        a3c(workers.Fatal, 2, PLAIN)


@pytest.mark.parametrize("name", ["normalize_obs", "normalize_rewards"])
def test_running_means_are_refused(name):
    with pytest.raises(ValueError, match=f"{name} must be False: workers share no"):
        a3c("CartPole-v1", 2, workers.replace(PLAIN, **{name: True}))
