import gymnasium as gym
import numpy as np
import pytest
import torch

import po_book.batch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers.vector import NormalizeReward

from po_book.batch import RewardScale, critic_batch, minibatches
from po_book.spaces import make_policy
from po_book.rollout import Stepper, collect, make_stepper


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def test_the_batch_is_the_valid_rows_of_the_table():
    stepper = make_stepper("CartPole-v1", 4, seed=0)
    policy = make_policy(stepper.env, generator=generator())
    rollout = collect(policy, stepper, 60, generator())
    batch = critic_batch(policy, rollout, 0.9, 0.8)
    assert not rollout.valid.all()
    assert len(batch["logp"]) == rollout.valid.sum() and "mask" not in batch
    logp, _ = policy.evaluate(batch["obs"], batch["actions"])
    torch.testing.assert_close(batch["logp"], logp.detach())
    values = policy.value(batch["obs"]).detach()
    torch.testing.assert_close(batch["returns"], batch["advantages"] + values)
    # By hand, for the last transition of an episode that ended by itself.
    t, n = rollout.terminated.nonzero()[0].tolist()
    index = int(rollout.valid[:t].sum() + rollout.valid[t, :n].sum())
    value = policy.value(rollout.obs[t, n]).detach()
    torch.testing.assert_close(batch["advantages"][index], 1.0 - value)


def test_minibatches_are_the_batch_in_another_order():
    batch = {"a": torch.arange(10), "b": torch.arange(10) + 0.5}
    parts = minibatches(batch, 4, generator())
    assert [len(part["a"]) for part in parts] == [4, 3, 3]
    rows = torch.cat([part["a"] for part in parts])
    assert sorted(rows.tolist()) == list(range(10)) and rows.tolist() != list(range(10))
    assert all(torch.equal(part["b"], part["a"] + 0.5) for part in parts)


def table(steps: int, n: int, seed: int = 0) -> tuple:
    "Rewards, ends, and rows that are no transitions after some of the ends, as *next step* has them."
    g = generator(seed)
    rewards = 3 + 5 * torch.randn(steps, n, generator=g)
    done, valid = torch.rand(steps, n, generator=g) < 0.2, torch.ones(steps, n).bool()
    for t in range(1, steps):
        valid[t] = ~(done[t - 1] & (torch.rand(n, generator=g) < 0.6))
        done[t] &= valid[t]
    return rewards, done, valid


class StepByStep:
    "One row after another, one environment after another; all returns are kept."

    def __init__(self, n: int, gamma: float):
        self.running, self.gamma, self.seen = [0.0] * n, gamma, []

    def __call__(self, rewards, done, valid) -> np.ndarray:
        for row in zip(rewards.tolist(), done.tolist(), valid.tolist()):
            for i, (reward, ends, counts) in enumerate(zip(*row)):
                if counts:
                    self.running[i] = reward + self.gamma * self.running[i]
                    self.seen.append(self.running[i])
                if ends or not counts:
                    self.running[i] = 0.0
        return rewards.numpy() / np.sqrt(np.var(self.seen) + 1e-8)


@pytest.mark.parametrize("gamma", [0.0, 0.9, 1.0])
def test_rewards_are_scaled_as_step_by_step(gamma):
    "Rollouts of many lengths, one row among them; ends and lost rows at every place."
    scale, loop, at = RewardScale(3, gamma), StepByStep(3, gamma), 0
    rows = table(120, 3)
    for steps in 17, 1, 1, 8, 64, 29:
        part = [x[at : at + steps] for x in rows]
        at += steps
        np.testing.assert_allclose(scale(*part), loop(*part), rtol=1e-6)
        np.testing.assert_allclose(scale.so_far, loop.running, rtol=1e-12)
        assert scale.count == len(loop.seen)
        np.testing.assert_allclose(scale.mean, np.mean(loop.seen), rtol=1e-12)
        np.testing.assert_allclose(scale.variance, np.var(loop.seen), rtol=1e-12)
    assert at == 120 and not rows[2].all()


def test_rows_that_are_no_transitions_count_for_nothing():
    "Whatever is paid there, NaN too; in the middle, at the end, and in a rollout without others."
    rewards, done, valid = table(40, 2)
    valid[-1] = False
    plain, odd = RewardScale(2, 0.9), RewardScale(2, 0.9)
    expected = plain(rewards, done, valid)
    found = odd(torch.where(valid, rewards, torch.nan), done, valid)
    assert torch.equal(found[valid], expected[valid])
    before = {name: x.clone() for name, x in odd.state_dict().items()}
    odd(rewards, done, valid & False)
    assert all(torch.equal(x, before[name]) for name, x in odd.state_dict().items())
    first = RewardScale(2, 0.9)
    assert torch.equal(first(rewards, done, valid & False), rewards / (1 + 1e-8) ** 0.5)
    assert first.count == 0 and first.variance == 1


class Payer(gym.Env):
    "Pays seeded numbers for a seeded number of steps, then is truncated; shows 1."

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 9))
        return np.ones(1, np.float32), {}

    def step(self, action):
        self.left -= 1
        reward = 7 * float(self.np_random.normal()) - 2
        return np.ones(1, np.float32), reward, False, self.left == 0, {}


def test_what_follows_a_truncation_has_a_value():
    stepper = Stepper(SyncVectorEnv([Payer] * 3), seed=0)
    policy = make_policy(stepper.env, generator=generator())
    rollout = collect(policy, stepper, 30, generator())
    batch, valid = critic_batch(policy, rollout, 0.9, 0.0), rollout.valid
    assert rollout.truncated.sum() > 5
    value, following = (policy.value(x).detach() for x in (rollout.obs, rollout.next_obs))
    torch.testing.assert_close(batch["advantages"], (rollout.rewards + 0.9 * following - value)[valid])


def test_where_rows_cannot_be_counted_they_are_masked(monkeypatch):
    "As on a GPU: the shape is that of the table, and what counts is what would be kept."
    stepper = make_stepper("CartPole-v1", 4, seed=0)
    policy = make_policy(stepper.env, generator=generator())
    rollout = collect(policy, stepper, 60, generator())
    kept = critic_batch(policy, rollout, 0.9, 0.8)
    monkeypatch.setattr(po_book.batch, "readable", lambda x: False)
    masked = critic_batch(policy, rollout, 0.9, 0.8)
    mask = masked.pop("mask")
    assert torch.equal(mask, rollout.valid.flatten()) and not mask.all()
    assert kept.keys() == masked.keys()
    assert all(torch.equal(masked[name][mask], kept[name]) for name in kept)


def test_where_every_row_is_a_transition_there_is_no_mask():
    stepper = make_stepper("po_book/CartPole-v1", 3, seed=0)
    policy = make_policy(stepper.env, generator=generator())
    rollout = collect(policy, stepper, 50, generator())
    assert rollout.complete and rollout.mask is None and rollout.done.any()
    assert "mask" not in critic_batch(policy, rollout, 0.9, 0.8)
    assert torch.equal(rollout.transitions("obs"), rollout.obs.flatten(0, 1))


def test_the_same_numbers_as_gymnasium():
    "It updates step by step, so rollouts have a row; a first guess counts 1e-4, ours nothing."
    def vector():
        return SyncVectorEnv([Payer] * 4, autoreset_mode=AutoresetMode.SAME_STEP)

    wrapped, scale = NormalizeReward(vector(), gamma=0.95), RewardScale(4, 0.95)
    wrapped.return_rms.count = 0
    wrapped.reset(seed=0)
    stepper, actions, ends = Stepper(vector(), seed=0), torch.zeros(4, dtype=torch.int64), 0
    for _ in range(60):
        _, theirs, *_ = wrapped.step(actions.numpy())
        _, rewards, terminated, truncated, valid = stepper.step(actions)
        ends += truncated.sum()
        row = torch.tensor(rewards), torch.tensor(terminated | truncated), torch.tensor(valid)
        ours = scale(*(x[None] for x in row))[0]
        np.testing.assert_allclose(ours, theirs, rtol=1e-5)
    assert ends > 20


def test_a_million_rows_later_the_mean_still_moves():
    scale = RewardScale(1000, 0.0)
    rest = torch.zeros(1000, 1000).bool(), torch.ones(1000, 1000).bool()
    for reward in 0.0, 1.0:
        scale(torch.full((1000, 1000), 1e6 + reward), *rest)
    torch.testing.assert_close(scale.mean.item(), 1e6 + 0.5, rtol=0, atol=1e-6)
    torch.testing.assert_close(scale.variance.item(), 0.25, rtol=1e-6, atol=0)


@pytest.mark.parametrize("default", [torch.float32, torch.float64])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
def test_rewards_keep_their_type(dtype, default):
    torch.set_default_dtype(default)
    try:
        rewards, *flags = table(20, 2)
        scale = RewardScale(2, 0.9)
        assert scale(rewards.to(dtype), *flags).dtype == dtype
        assert {x.dtype for x in scale.state_dict().values()} == {torch.float64}
    finally:
        torch.set_default_dtype(torch.float32)


def test_scaling_does_not_look_at_what_it_computes():
    "On the meta device there is nothing to look at: a wait for a number would be an error."
    scale = RewardScale(3, 0.9).to("meta")
    assert scale(*(x.to("meta") for x in table(20, 3))).shape == (20, 3)


def test_the_state_is_saved_and_the_input_kept():
    rewards, done, valid = table(30, 2)
    kept = rewards.clone()
    first, second = RewardScale(2, 0.9), RewardScale(2, 0.9)
    first(rewards, done, valid)
    assert torch.equal(rewards, kept)
    second.load_state_dict(first.state_dict())
    assert torch.equal(first(rewards, done, valid), second(rewards, done, valid))


@pytest.mark.parametrize(
    "call, message",
    [
        (lambda x: RewardScale(0, 0.9), "n_envs must be positive, got 0"),
        (lambda x: RewardScale(1.5, 0.9), "n_envs must be a whole number, got 1.5"),
        (lambda x: RewardScale(2, 1.1), r"gamma must be in \[0, 1\], got 1.1"),
        (lambda x: RewardScale(3, 0.9)(*x), r"rewards must have shape \(20, 3\)"),
        (lambda x: RewardScale(2, 0.9)(x[0].long(), *x[1:]), "rewards must be a floating point tensor"),
        (lambda x: RewardScale(2, 0.9)(x[0], x[1].float(), x[2]), "done must be a bool tensor"),
        (lambda x: RewardScale(2, 0.9)(*x[:2], x[2].float()), "valid must be a bool tensor"),
        (lambda x: RewardScale(2, 0.9)(*x[:2], x[2][1:]), "valid must have rewards's shape"),
    ],
)
def test_bad_calls(call, message):
    with pytest.raises(ValueError, match=message):
        call(table(20, 2))


def test_one_part_is_the_batch_as_it_is():
    batch = {"a": torch.arange(10)}
    (part,) = minibatches(batch, 10, generator())
    assert part["a"] is batch["a"]
