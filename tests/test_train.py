import gymnasium as gym
import numpy as np
import pytest
import torch

from po_book.rollout import collect
from po_book.train import (
    Config,
    PPOConfig,
    ReinforceConfig,
    _learner,
    ppo_batch,
    train,
)

SMALL = {
    "ppo": PPOConfig(total_steps=1500, n_envs=4, n_steps=32, minibatch=64, epochs=2),
    "reinforce": ReinforceConfig(total_steps=1500, n_envs=4),
}


def quick(algorithm: str, **kwargs):
    kwargs = {"env_id": "CartPole-v1", "config": SMALL[algorithm], "progress": False} | kwargs
    return train(algorithm, **kwargs)


@pytest.mark.parametrize("algorithm", SMALL)
def test_same_seed_same_run(algorithm):
    a, b, c = quick(algorithm), quick(algorithm), quick(algorithm, seed=1)
    for x, y in zip(a.policy.parameters(), b.policy.parameters()):
        assert torch.equal(x, y)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.log] for r in (a, b, c)]
    assert timeless[0] == timeless[1] != timeless[2]


@pytest.mark.parametrize("algorithm", SMALL)
def test_a_score_does_not_change_the_run(algorithm):
    "Evaluation has random numbers and environments of its own."
    from dataclasses import replace

    plain = quick(algorithm)
    scored = quick(algorithm, config=replace(SMALL[algorithm], eval_every=500, eval_episodes=5))
    assert len(scored.curve("score")[0]) >= 2 and not plain.curve("score")[0]
    for x, y in zip(plain.policy.parameters(), scored.policy.parameters()):
        assert torch.equal(x, y)


@pytest.mark.parametrize("algorithm", SMALL)
def test_the_log_counts_transitions_and_time(algorithm):
    run = quick(algorithm)
    steps = [row["steps"] for row in run.log]
    seconds = [row["seconds"] for row in run.log]
    assert steps == sorted(steps) and steps[-2] < 1500 <= steps[-1]
    assert all(np.diff(seconds) > 0)
    assert all(np.isfinite(list(row.values())).all() for row in run.log)


def test_learning_stops_at_the_first_score_that_is_good_enough():
    config = PPOConfig(total_steps=50_000, eval_every=1, eval_episodes=5, solved_at=1.0)
    run = quick("ppo", config=config)
    assert len(run.log) == 1 and run.log[0]["score"] >= 1.0


def test_ppo_learns_cartpole():
    "Half solved within ten seconds even on a slow machine; the chapter solves it."
    config = PPOConfig(total_steps=40_000, eval_every=2_000, solved_at=250)
    assert quick("ppo", config=config).log[-1]["score"] >= 250


def test_reinforce_learns_cartpole():
    config = ReinforceConfig(total_steps=40_000, eval_every=2_000, solved_at=150)
    assert quick("reinforce", config=config).log[-1]["score"] >= 150


class Target(gym.Env):
    "Three steps; the reward is highest where the action equals the observation."

    observation_space = gym.spaces.Box(-1, 1, (1,))
    action_space = gym.spaces.Box(-2, 2, (1,))

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self._observe(), {}

    def step(self, action):
        reward = -float((action[0] - self.goal[0]) ** 2)
        self.steps += 1
        return self._observe(), reward, self.steps == 3, False, {}

    def _observe(self):
        self.goal = self.np_random.uniform(-1, 1, 1).astype(np.float32)
        return self.goal


@pytest.fixture
def target():
    gym.register("Target-v0", Target)
    yield "Target-v0"
    del gym.registry["Target-v0"]


@pytest.mark.parametrize("algorithm", ["ppo", "reinforce"])
def test_continuous_actions(algorithm, target):
    config = {
        "ppo": PPOConfig(total_steps=20_000, hidden=(32,)),
        "reinforce": ReinforceConfig(total_steps=30_000, n_envs=64, hidden=(32,)),
    }[algorithm]
    run = quick(algorithm, env_id=target, config=config)
    # Untrained, three steps cost about 3 (1 + 1/3) = 4.
    assert run.log[0]["return"] < -3 and run.evaluate().mean() > -1.2


def test_the_batch_is_the_valid_rows_of_the_table():
    learner = _learner("CartPole-v1", 0, torch.device("cpu"), PPOConfig(n_envs=4))
    rollout = collect(learner.policy, learner.stepper, 60, learner.generator)
    batch = ppo_batch(learner.policy, rollout, 0.9, 0.8)
    assert not rollout.valid.all()
    assert len(batch["logp"]) == rollout.valid.sum()
    values = learner.policy.value(batch["obs"]).detach()
    torch.testing.assert_close(batch["returns"], batch["advantages"] + values)
    # By hand, for the last transition of an episode that ended by itself.
    t, n = rollout.terminated.nonzero()[0].tolist()
    index = int(rollout.valid[:t].sum() + rollout.valid[t, :n].sum())
    value = learner.policy.value(rollout.obs[t, n]).detach()
    torch.testing.assert_close(batch["advantages"][index], 1.0 - value)


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"algorithm": "pqo"}, "algorithm must be one of .*'ppo'.* got 'pqo'"),
        ({"algorithm": "ppo", "config": ReinforceConfig()}, "must be a PPOConfig, got ReinforceConfig"),
        ({"algorithm": "ppo", "config": Config()}, "must be a PPOConfig, got Config"),
    ],
)
def test_bad_calls(kwargs, message):
    with pytest.raises(ValueError, match=message):
        train(**{"env_id": "CartPole-v1", "progress": False} | kwargs)


def test_an_unknown_environment():
    with pytest.raises(gym.error.Error, match="Kartpole"):
        train("ppo", "Kartpole-v1", progress=False)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"total_steps": 0}, "total_steps must be positive, got 0"),
        ({"n_envs": -1}, "n_envs must be positive"),
        ({"gamma": 1.5}, r"gamma must be in \[0, 1\], got 1.5"),
        ({"solved_at": 475.0}, "set eval_every"),
        ({"minibatch": 0}, "minibatch must be positive"),
        ({"lam": -0.1}, "lam must be in"),
        ({"clip": 1.0}, "clip must be in"),
    ],
)
def test_bad_settings(settings, message):
    with pytest.raises(ValueError, match=message):
        PPOConfig(**settings)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("algorithm", SMALL)
def test_training_on_a_gpu(algorithm):
    run = quick(algorithm, device="cuda")
    assert next(run.policy.parameters()).is_cuda and run.evaluate(5).shape == (5,)
