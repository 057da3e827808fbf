import gymnasium as gym
import numpy as np
import pytest
import torch

import po_book.train
from po_book.memory import ddpg_loss, dqn_loss
from po_book.policies import make_deterministic_policy, make_q_policy
from po_book.runner import Config, new_learner
from po_book.train import (
    ALGORITHMS,
    A2CConfig,
    DDPGConfig,
    DQNConfig,
    PPOConfig,
    ReinforceConfig,
    TRPOConfig,
    train,
    trpo_iteration,
)

MEMORY = dict(learning_starts=200, n_envs=4, n_steps=16, updates=8)
SMALL = {
    "ppo": PPOConfig(total_steps=1500, n_envs=4, n_steps=32, minibatch=64, epochs=2),
    "a2c": A2CConfig(total_steps=1500, n_envs=4, n_steps=32),
    "trpo": TRPOConfig(total_steps=1500, n_envs=4, n_steps=32, minibatch=64, epochs=2),
    "reinforce": ReinforceConfig(total_steps=1500, n_envs=4),
    "dqn": DQNConfig(total_steps=1500, memory=500, **MEMORY),
    "ddpg": DDPGConfig(total_steps=1500, memory=500, **MEMORY),
}


def quick(algorithm: str, **kwargs):
    env = "Pendulum-v1" if algorithm == "ddpg" else "CartPole-v1"
    kwargs = {"env": env, "config": SMALL[algorithm], "progress": False} | kwargs
    return train(algorithm, **kwargs)


def test_every_algorithm_is_tested_here():
    assert SMALL.keys() == ALGORITHMS.keys()
    assert all(type(SMALL[name]) is ALGORITHMS[name].config for name in SMALL)


@pytest.mark.parametrize("algorithm", SMALL)
def test_same_seed_same_run(algorithm):
    a, b, c = quick(algorithm), quick(algorithm), quick(algorithm, seed=1)
    for x, y in zip(a.policy.parameters(), b.policy.parameters()):
        assert torch.equal(x, y)
    timeless = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.log] for r in (a, b, c)]
    assert timeless[0] == timeless[1] != timeless[2]


def test_ppo_learns_cartpole():
    "Half solved within ten seconds even on a slow machine; the chapter solves it."
    config = PPOConfig(total_steps=40_000, eval_every=2_000, solved_at=250)
    assert quick("ppo", config=config).log[-1]["mean_return"] >= 250


def test_a2c_learns_cartpole():
    config = A2CConfig(total_steps=60_000, eval_every=4_000, solved_at=200)
    assert quick("a2c", config=config).log[-1]["mean_return"] >= 200


def test_training_on_tensors_learns_too():
    config = PPOConfig(total_steps=40_000, eval_every=2_000, solved_at=200)
    run = quick("ppo", env="po_book/CartPole-v1", config=config)
    assert run.log[-1]["mean_return"] >= 200


def test_a2c_is_the_first_step_of_ppo():
    "One epoch of one minibatch: every ratio is one, and nothing is clipped."
    shared = dict(total_steps=1, n_envs=4, n_steps=32, lr=1e-3, gamma=0.98, lam=0.9, entropy_coef=0.01)
    runs = [quick("a2c", config=A2CConfig(**shared)), quick("ppo", config=PPOConfig(**shared, epochs=1, minibatch=10_000))]
    for a, b in zip(*(run.policy.parameters() for run in runs)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_trpo_learns_cartpole():
    config = TRPOConfig(total_steps=40_000, eval_every=2_000, solved_at=250)
    assert quick("trpo", config=config).log[-1]["mean_return"] >= 250


def test_dqn_learns_cartpole():
    "The chapter solves it; here it gets to a hundred within seconds."
    config = DQNConfig(total_steps=10_000, eval_every=1_000, solved_at=100)
    assert quick("dqn", config=config).log[-1]["mean_return"] >= 100


def test_reinforce_learns_cartpole():
    config = ReinforceConfig(total_steps=40_000, eval_every=2_000, solved_at=150)
    assert quick("reinforce", config=config).log[-1]["mean_return"] >= 150


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


@pytest.mark.parametrize("algorithm", ["ppo", "trpo", "a2c", "reinforce", "ddpg"])
def test_continuous_actions(algorithm, target):
    config = {
        "ppo": PPOConfig(total_steps=20_000, hidden=(32,)),
        "trpo": TRPOConfig(total_steps=20_000, hidden=(32,), max_kl=0.05),
        "ddpg": DDPGConfig(total_steps=3_000),
        "a2c": A2CConfig(total_steps=80_000, hidden=(32,)),
        "reinforce": ReinforceConfig(total_steps=30_000, n_envs=64, hidden=(32,)),
    }[algorithm]
    run = quick(algorithm, env=target, config=config)
    # Untrained, three steps cost about 3 (1 + 1/3) = 4.
    assert run.log[0]["return"] < -3 and run.evaluate().mean() > -1.2


def test_trpo_stays_in_its_region():
    config = TRPOConfig(total_steps=8_000, max_kl=0.02)
    for row in quick("trpo", config=config).log:
        assert row["kl"] <= 0.02 and (row["fraction"] > 0) == (row["gain"] > 0)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_trpo_moves_the_actor_by_the_natural_step_alone(env_id, monkeypatch):
    "Without that step an iteration changes the critic, and the actor not by one bit."
    none = {"gain": 0.0, "kl": 0.0, "fraction": 0.0}
    monkeypatch.setattr(po_book.train, "trpo_step", lambda *args: none)
    learner = new_learner(env_id, 0, SMALL["trpo"])
    policy = learner.policy
    actor, critic = policy.actor_parameters(), list(policy.critic.parameters())
    before = [[x.detach().clone() for x in group] for group in (actor, critic)]
    trpo_iteration(learner, SMALL["trpo"], 1.0)
    assert all(map(torch.equal, actor, before[0]))
    assert not any(map(torch.equal, critic, before[1]))


def remembered(actions: torch.Tensor) -> dict[str, torch.Tensor]:
    "Six transitions; the last two ended by themselves."
    draw = torch.Generator().manual_seed(0)
    end = torch.arange(6) >= 4
    obs, next_obs = torch.randn(2, 6, 3, generator=draw)
    return dict(obs=obs, next_obs=next_obs, actions=actions, rewards=torch.arange(6.0), terminated=end)


def vector(env_id: str):
    return gym.make_vec(env_id, num_envs=1)


def test_dqn_loss_by_hand():
    env = vector("Acrobot-v1")
    env.single_observation_space = gym.spaces.Box(-1, 1, (3,))
    policy, target = (make_q_policy(env, (8,), torch.Generator().manual_seed(i)) for i in (0, 1))
    batch = remembered(torch.tensor([0, 1, 2, 0, 1, 2]))
    loss, _ = dqn_loss(policy, target, batch, 0.9)
    by_hand = 0.0
    for i in range(6):
        best = 0.0 if i >= 4 else target.q(batch["next_obs"][i]).max()
        error = policy.q(batch["obs"][i])[batch["actions"][i]] - (float(i) + 0.9 * best)
        by_hand += error**2 / 12
    torch.testing.assert_close(loss, by_hand)
    loss.backward()
    assert all(p.grad is None for p in target.parameters())


def test_ddpg_loss_trains_each_network_for_its_own_end():
    env = vector("Pendulum-v1")
    policy, target = (make_deterministic_policy(env, (8,), torch.Generator().manual_seed(i)) for i in (0, 1))
    batch = remembered(torch.linspace(-2, 2, 6)[:, None])
    loss, _ = ddpg_loss(policy, target, batch, 0.9)
    loss.backward()
    with torch.no_grad():
        follows = target.q(batch["next_obs"], target.mean(batch["next_obs"]))
        y = batch["rewards"] + 0.9 * follows * ~batch["terminated"]
    error = (policy.q(batch["obs"], batch["actions"]) - y).square().mean()
    worth = policy.q(batch["obs"], policy.mean(batch["obs"])).mean()
    for network, goal in (policy.critic, error), (policy.actor, -worth):
        grads = torch.autograd.grad(goal, list(network.parameters()), retain_graph=True)
        for parameter, grad in zip(network.parameters(), grads):
            torch.testing.assert_close(parameter.grad, grad)
    assert all(p.grad is None for p in target.parameters())
    assert all(p.requires_grad for p in policy.critic.parameters())


def test_the_copy_follows_and_the_memory_holds_transitions_only():
    config = SMALL["dqn"]
    learner = new_learner("CartPole-v1", 0, config)
    start = [x.clone() for x in learner.extra["target"].parameters()]
    seen = 0
    for _ in range(6):
        rollout, metrics = ALGORITHMS["dqn"].iteration(learner, config, 0.5)
        seen += int(rollout.valid.sum())
        assert len(learner.extra["replay"]) == seen and bool(metrics) == (seen >= 200)
    rows = learner.extra["replay"].columns
    assert not (rows["obs"][:seen] == rows["next_obs"][:seen]).all(-1).any()
    for old, copy, online in zip(start, learner.extra["target"].parameters(), learner.policy.parameters()):
        assert not torch.equal(old, copy) and not torch.equal(copy, online)


def test_exploration_falls_to_its_floor():
    config = DQNConfig(exploration=0.5, epsilon=0.1, memory=10_000, learning_starts=10_000)
    learner = new_learner("CartPole-v1", 0, config)
    seen = []
    for remaining in 1.0, 0.75, 0.5, 0.0:
        ALGORITHMS["dqn"].iteration(learner, config, remaining)
        seen.append(learner.policy.epsilon)
    assert seen == pytest.approx([1.0, 0.55, 0.1, 0.1])


@pytest.mark.parametrize(
    "kwargs, message",
    [
        ({"algorithm": "dqn", "env": "Pendulum-v1"}, "action space must be Discrete"),
        ({"algorithm": "ddpg", "env": "CartPole-v1"}, "action space must be a Box"),
        ({"algorithm": "pqo"}, "algorithm must be one of .*ppo.*, got 'pqo'"),
        ({"algorithm": "ppo", "config": ReinforceConfig()}, "must be a PPOConfig, got ReinforceConfig"),
        ({"algorithm": "ppo", "config": Config()}, "must be a PPOConfig, got Config"),
    ],
)
def test_bad_calls(kwargs, message):
    with pytest.raises(ValueError, match=message):
        train(**{"env": "CartPole-v1", "progress": False} | kwargs)


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


@pytest.mark.parametrize(
    "kind, settings, message",
    [
        (TRPOConfig, {"max_kl": 0.0}, "max_kl must be positive, got 0"),
        (TRPOConfig, {"damping": -1.0}, "damping must be at least 0, got -1"),
        (TRPOConfig, {"lam": 2.0}, "lam must be in"),
        (DQNConfig, {"tau": 0.0}, r"tau must be in \(0, 1\], got 0"),
        (DQNConfig, {"epsilon": 1.1}, "epsilon must be in"),
        (DQNConfig, {"memory": 100}, "learning_starts must not exceed memory, got 1000 > 100"),
        (DDPGConfig, {"sigma": 0.0}, "sigma must be positive"),
        (DDPGConfig, {"updates": 0}, "updates must be positive"),
    ],
)
def test_bad_settings_of_other_methods(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


class Bandit(gym.Env):
    "Ten steps; action 1 is right. From the thirtieth step on things may go wrong."

    action_space = gym.spaces.Discrete(2)
    observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, scale=1.0, observation=None, reward=None, raises_at=None):
        self.scale, self.observation, self.reward, self.raises_at = scale, observation, reward, raises_at
        self.total = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        self.total += 1
        if self.total == self.raises_at:
            raise ConnectionError("the simulator is gone")
        late = self.total >= 30
        observed = self.observation if late and self.observation else self.np_random.normal()
        reward = self.reward if late and self.reward else float(action)
        obs = np.array([self.scale * observed, self.steps], np.float32)
        return obs, reward, self.steps == 10, False, {}


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("algorithm", SMALL)
def test_training_on_a_gpu(algorithm):
    run = quick(algorithm, device="cuda")
    assert next(run.policy.parameters()).is_cuda and run.evaluate(5).shape == (5,)
