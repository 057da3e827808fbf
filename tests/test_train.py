import subprocess
import sys
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch

import po_book.batch
import po_book.learner
import po_book.ppo
import po_book.train
from po_book.batch import critic_batch
from po_book.memory import ddpg_loss, dqn_loss
from po_book.algorithm import Algorithm, Config, new_learner
from po_book.runner import start_run
from po_book.spaces import make_deterministic_policy, make_q_policy
from po_book.train import (
    ALGORITHMS,
    PRESETS,
    A2CConfig,
    CriticConfig,
    DDPGConfig,
    DQNConfig,
    PPOConfig,
    ReinforceConfig,
    TRPOConfig,
    default_config,
    train,
    trpo_iteration,
)


def cartpole(algorithm: str, **settings) -> Config:
    "The settings of CartPole, some of them changed."
    return replace(default_config(algorithm, "CartPole-v1"), **settings)


MEMORY = dict(learning_starts=200, n_envs=4, n_steps=16, updates=8)
SMALL = {
    "ppo": cartpole("ppo", total_steps=1500, n_envs=4, n_steps=32, minibatch=64, epochs=2),
    "a2c": cartpole("a2c", total_steps=1500, n_envs=4, n_steps=32),
    "trpo": cartpole("trpo", total_steps=1500, n_envs=4, n_steps=32, minibatch=64, epochs=2),
    "reinforce": ReinforceConfig(total_steps=1500, n_envs=4),
    "dqn": DQNConfig(total_steps=1500, memory=500, **MEMORY),
    "ddpg": DDPGConfig(total_steps=1500, memory=500, **MEMORY),
}


def quick(algorithm: str, **kwargs):
    env = "Pendulum-v1" if algorithm == "ddpg" else "CartPole-v1"
    kwargs = {"env": env, "config": SMALL[algorithm], "progress": False} | kwargs
    return train(algorithm, **kwargs)


def test_every_algorithm_is_tested_here():
    teams = {"ippo", "mappo", "happo"}  # there if chapter 38 has been imported
    assert SMALL.keys() == ALGORITHMS.keys() - teams
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
    config = cartpole("ppo", total_steps=40_000, eval_every=2_000, solved_at=250)
    assert quick("ppo", config=config).log[-1]["mean_return"] >= 250


def test_a2c_learns_cartpole():
    config = cartpole("a2c", total_steps=60_000, eval_every=4_000, solved_at=200)
    assert quick("a2c", config=config).log[-1]["mean_return"] >= 200


def test_training_on_tensors_learns_too():
    config = cartpole("ppo", total_steps=40_000, eval_every=2_000, solved_at=200)
    run = quick("ppo", env="po_book/CartPole-v1", config=config)
    assert run.log[-1]["mean_return"] >= 200


def test_a2c_is_the_first_step_of_ppo():
    "One epoch of one minibatch: every ratio is one, and nothing is clipped."
    shared = dict(total_steps=1, n_envs=4, n_steps=32, lr=1e-3, gamma=0.98, lam=0.9, entropy_coef=30.0)
    runs = [quick("a2c", config=cartpole("a2c", **shared)), quick("ppo", config=cartpole("ppo", **shared, epochs=1, minibatch=10_000))]
    for a, b in zip(*(run.policy.parameters() for run in runs)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)


def test_trpo_learns_cartpole():
    config = cartpole("trpo", total_steps=40_000, eval_every=2_000, solved_at=250)
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
        "ppo": cartpole("ppo", total_steps=20_000, hidden=(32,), lr=3e-3, epochs=8),
        "trpo": cartpole("trpo", total_steps=20_000, hidden=(32,), max_kl=0.05),
        "ddpg": DDPGConfig(total_steps=3_000),
        "a2c": cartpole("a2c", total_steps=160_000, hidden=(32,)),
        "reinforce": ReinforceConfig(total_steps=60_000, n_envs=64, hidden=(32,)),
    }[algorithm]
    run = quick(algorithm, env=target, config=config)
    # Untrained, three steps cost 3 (4 E[min(z^2, 1)] + 1/3) = 7.2: a deviation is the
    # half-width, and actions are cut at the bounds.
    assert run.log[0]["return"] < -3 and run.evaluate().mean() > -1.2


def test_trpo_stays_in_its_region():
    config = cartpole("trpo", total_steps=8_000, max_kl=0.02)
    for row in quick("trpo", config=config).log:
        assert row["kl"] <= 0.02 and (row["fraction"] > 0) == (row["gain"] > 0)


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_trpo_moves_the_actor_by_the_natural_step_alone(env_id, monkeypatch):
    "Without that step an iteration changes the critic, and the actor not by one bit."
    none = {"gain": 0.0, "kl": 0.0, "fraction": 0.0}
    monkeypatch.setattr(po_book.train, "trpo_step", lambda *args, **how: none)
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


def test_ddpg_learns_from_rewards_of_eight_bytes():
    env = vector("Pendulum-v1")
    policy, target = (make_deterministic_policy(env, (8,), torch.Generator().manual_seed(i)) for i in (0, 1))
    batch = remembered(torch.linspace(-2, 2, 6)[:, None])
    loss, _ = ddpg_loss(policy, target, batch | {"rewards": batch["rewards"].double()}, 0.9)
    assert loss.dtype == torch.float32
    loss.backward()
    assert all(p.grad.isfinite().all() for p in policy.critic.parameters())


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
        seen.append(learner.policy.epsilon.item())
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


# Settings under which CartPole was solved, and what else was recorded, before there were general ones.
KNOWN = {
    "reinforce": dict(total_steps=100_000, lr=5e-3, gamma=0.99),
    "a2c": dict(total_steps=100_000, lr=7e-3, gamma=0.99, n_steps=32, lam=0.95, anneal=True),
    "trpo": dict(total_steps=50_000, lr=3e-3, gamma=0.98, n_steps=64, lam=0.9, anneal=False, epochs=8, minibatch=256, max_kl=0.01),
    "ppo": dict(total_steps=50_000, lr=3.5e-3, gamma=0.98, n_steps=64, lam=0.9, anneal=True, epochs=6, minibatch=256, clip=0.2),
    "dqn": dict(total_steps=40_000, lr=2e-3, gamma=0.99, n_steps=16, updates=128, minibatch=64, epsilon=0.05, exploration=0.2),
}
BASE = KNOWN["ppo"] | dict(lr=3e-3, epochs=8)
OTHERS = {
    ("ppo", "Acrobot-v1"): BASE | dict(total_steps=100_000),
    ("ppo", "Pendulum-v1"): BASE | dict(total_steps=150_000, n_steps=200, minibatch=64, gamma=0.95),
    ("trpo", "Pendulum-v1"): KNOWN["trpo"] | dict(
        total_steps=200_000, n_envs=32, n_steps=200, epochs=10, gamma=0.95, lam=0.95, max_grad_norm=100.0, max_kl=0.02
    ),
    ("ppo", "LunarLander-v3"): BASE | dict(
        total_steps=600_000, n_steps=256, lr=2e-3, gamma=0.995, lam=0.98, max_grad_norm=10.0
    ),
}
PLAIN = dict(n_envs=16, hidden=(64, 64), max_grad_norm=0.5, normalize_obs=False, normalize_rewards=False)


@pytest.mark.parametrize("method, env", [*((m, e) for m in KNOWN for e in ("CartPole-v1", "po_book/CartPole-v1")), *OTHERS])
def test_a_preset_has_the_settings_that_are_known_to_work(method, env):
    config, known = default_config(method, env), OTHERS.get((method, env), KNOWN[method])
    plain = PLAIN if isinstance(config, CriticConfig) else {"n_envs": 16}
    got = {name: getattr(config, name) for name in plain | known}
    assert got == plain | known


def test_what_nobody_knows_gets_the_general_settings():
    for method, algorithm in ALGORITHMS.items():
        for env in "Nobody/Knows-v0", Bandit, vector("CartPole-v1"):
            assert default_config(method, env) == algorithm.config()
    general = PPOConfig()
    assert general.normalize_obs and general.normalize_rewards and general.gamma == 0.99
    assert all(method in ALGORITHMS for method, _ in PRESETS)
    with pytest.raises(ValueError, match="algorithm must be one of"):
        default_config("pqo", "CartPole-v1")


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
        ({"hidden": (64, 0)}, r"hidden\[1\] must be positive, got 0"),
        ({"hidden": (64, 2.5)}, r"hidden\[1\] must be a whole number, got 2.5"),
        ({"n_envs": 2.5}, "n_envs must be a whole number, got 2.5"),
        ({"n_steps": 2.5}, "n_steps must be a whole number, got 2.5"),
        ({"epochs": True}, "epochs must be a whole number, got True"),
        ({"minibatch": 1e3}, "minibatch must be a whole number, got 1000.0"),
        ({"total_steps": float("inf")}, "total_steps must be a whole number, got inf"),
        ({"checkpoint_every": 0.5}, "checkpoint_every must be a whole number, got 0.5"),
        ({"eval_every": -1}, "eval_every must be at least 0, got -1"),
        ({"eval_every": 0.5}, "eval_every must be a whole number, got 0.5"),
        ({"eval_episodes": 1.5}, "eval_episodes must be a whole number, got 1.5"),
        ({"lr": float("inf")}, r"lr must be in \(0, inf\), got inf"),
        ({"lr": float("nan")}, "lr must be positive, got nan"),
        ({"value_coef": -0.5}, r"value_coef must be in \[0, inf\), got -0.5"),
        ({"entropy_coef": float("nan")}, r"entropy_coef must be in \[0, inf\), got nan"),
        ({"kl_coef": float("inf")}, "kl_coef must be in"),
        ({"minibatch": 1}, "one transition has no deviation: with minibatch=1 set normalize_advantages=False"),
        ({"minibatch": 2}, "one transition has no deviation: with minibatch=2 set normalize_advantages=False"),
        ({"clip": None, "clip_high": 0.2}, "clip_high needs a clip"),
        ({"clip_high": 0.0}, "clip_high must be positive"),
        ({"dual_clip": 1.2}, r"dual_clip must be in \(1.2, inf\), got 1.2"),
        ({"clip": None, "dual_clip": 3.0}, "dual_clip must be in"),
        ({"clip_value": 0.0}, "clip_value must be positive"),
        ({"target_kl": -0.1}, "target_kl must be positive"),
        ({"kl_target": 0.01}, "kl_coef must be positive, to be adapted, got 0"),
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
        (DDPGConfig, {"sigma": 0.0}, r"sigma must be in \(0, inf\), got 0"),
        (DDPGConfig, {"updates": 0}, "updates must be positive"),
        (DDPGConfig, {"updates": 2.5}, "updates must be a whole number, got 2.5"),
        (DDPGConfig, {"sigma": float("inf")}, "sigma must be in"),
        (DQNConfig, {"learning_starts": -1}, "learning_starts must be at least 0, got -1"),
        (DQNConfig, {"memory": 2000.5}, "memory must be a whole number, got 2000.5"),
        (DQNConfig, {"exploration": float("nan")}, "exploration must be in"),
        (TRPOConfig, {"cg_iterations": 2.5}, "cg_iterations must be a whole number, got 2.5"),
        (A2CConfig, {"value_coef": float("inf")}, "value_coef must be in"),
        (ReinforceConfig, {"n_envs": 2.5}, "n_envs must be a whole number, got 2.5"),
    ],
)
def test_bad_settings_of_other_methods(kind, settings, message):
    with pytest.raises(ValueError, match=message):
        kind(**settings)


def test_settings_at_their_edges():
    PPOConfig(minibatch=1, normalize_advantages=False, value_coef=0, kl_coef=0, eval_every=0, hidden=())
    PPOConfig(clip=None, kl_coef=1.0, kl_target=0.01)
    DQNConfig(learning_starts=0)


FAST = dict(total_steps=1200, n_envs=4, n_steps=32, minibatch=64, lr=3e-2, anneal=False)


def test_without_a_clip_nothing_is_clipped():
    clipped = [quick("ppo", config=cartpole("ppo", **FAST, clip=clip)) for clip in (0.2, None)]
    fractions = [[row["clip_fraction"] for row in run.log] for run in clipped]
    assert np.mean(fractions[0]) > 0.05 and set(fractions[1]) == {0.0}
    largest = [max(row["approx_kl"] for row in run.log) for run in clipped]
    assert largest[1] > 2 * largest[0]


def flat(policy) -> torch.Tensor:
    return torch.cat([p.detach().flatten() for p in policy.parameters()])


def gradient(monkeypatch, ratio: float, **settings) -> tuple:
    "Gradient of a step on a rollout whose old log-probabilities are moved by -log(ratio)."
    config = cartpole("ppo", **dict(n_envs=4, n_steps=32, minibatch=10_000, epochs=1, anneal=False) | settings)
    learner = new_learner("CartPole-v1", 0, config)
    made = po_book.train.critic_batch

    def moved(*args):
        batch = made(*args)
        return batch | {"logp": batch["logp"] - np.log(ratio), "returns": batch["returns"] + 3}

    monkeypatch.setattr(po_book.train, "critic_batch", moved)
    monkeypatch.setattr(learner.optimizer, "step", lambda: None)
    _, metrics = ALGORITHMS["ppo"].iteration(learner, config, 1.0)
    monkeypatch.setattr(po_book.train, "critic_batch", made)
    actor, critic = (torch.cat([p.grad.flatten() for p in net.parameters()]) for net in (learner.policy.actor, learner.policy.critic))
    return actor.clone(), critic.clone(), metrics


def test_the_range_above_one_is_its_own(monkeypatch):
    "At a ratio of 1.25 everything with a positive advantage is outside 0.2, and inside 0.3."
    for settings, outside in [({}, 1.0), ({"clip_high": 0.3}, 0.0), ({"clip": 0.3, "clip_high": 0.2}, 1.0)]:
        assert gradient(monkeypatch, 1.25, **settings)[2]["clip_fraction"] == outside
    for settings, outside in [({}, 1.0), ({"clip_high": 0.3}, 1.0), ({"clip": 0.3, "clip_high": 0.1}, 0.0)]:
        assert gradient(monkeypatch, 0.75, **settings)[2]["clip_fraction"] == outside
    wide, none = gradient(monkeypatch, 1.25, clip_high=0.3), gradient(monkeypatch, 1.25, clip=None)
    torch.testing.assert_close(wide[0], none[0])


def test_the_dual_clip_ends_the_push_of_large_ratios(monkeypatch):
    "At a ratio of 5 positive advantages are clipped; with the dual clip negative ones are, too."
    large = dict(max_grad_norm=1e9)
    assert gradient(monkeypatch, 5.0, **large)[0].norm() > 0.1
    assert gradient(monkeypatch, 5.0, dual_clip=3.0, **large)[0].norm() == 0
    torch.testing.assert_close(gradient(monkeypatch, 5.0, dual_clip=6.0, **large)[0], gradient(monkeypatch, 5.0, **large)[0])


def test_the_value_clip_is_around_the_values_of_the_rollout(monkeypatch):
    seen = []
    def spy(*args, **kwargs):
        seen.append((args[4].detach(), kwargs["values_old"], kwargs["value_clip"]))
        return po_book.ppo.ppo_loss(*args, **kwargs)

    monkeypatch.setattr(po_book.train, "ppo_loss", spy)
    config = cartpole("ppo", clip_value=0.01, **FAST)
    learner = new_learner("CartPole-v1", 0, config)
    ALGORITHMS["ppo"].iteration(learner, config, 1.0)
    first, old, clip = seen[0]
    assert clip == 0.01
    torch.testing.assert_close(first, old, atol=1e-5, rtol=0)
    assert (seen[-1][0] - seen[-1][1]).abs().max() > 0.1
    seen.clear()
    plain = cartpole("ppo", **FAST)
    ALGORITHMS["ppo"].iteration(new_learner("CartPole-v1", 0, plain), plain, 1.0)
    assert seen[0][1:] == (None, None)


def test_epochs_end_where_the_divergence_is_above_its_target(monkeypatch):
    epochs = []
    made = po_book.learner.minibatches
    monkeypatch.setattr(po_book.learner, "minibatches", lambda *args: epochs.append(1) or made(*args))
    used = {}
    for target in None, 1e-9, 1e9:
        epochs.clear()
        config = cartpole("ppo", **FAST, target_kl=target)
        _, metrics = ALGORITHMS["ppo"].iteration(new_learner("CartPole-v1", 0, config), config, 1.0)
        used[target] = len(epochs)
    assert used == {None: 6, 1e-9: 1, 1e9: 6}


def test_epochs_end_after_the_first_whose_divergence_is_above_the_target(monkeypatch):
    measured, epochs = iter([0.125, 0.25, 0.3125, 9.0]), []
    made = po_book.learner.minibatches
    noted = lambda *data, **options: {"approx_kl": torch.tensor(next(measured))}  # noqa: E731
    monkeypatch.setattr(po_book.train, "ppo_metrics", noted)
    monkeypatch.setattr(po_book.learner, "minibatches", lambda *args: epochs.append(1) or made(*args))
    config = cartpole("ppo", **FAST, target_kl=0.25)
    _, metrics = ALGORITHMS["ppo"].iteration(new_learner("CartPole-v1", 0, config), config, 1.0)
    assert len(epochs) == 3 and metrics["approx_kl"] == 9


def test_ppo_notes_the_policy_it_made_and_the_critic_it_had(monkeypatch):
    "By hand, over the rows that are transitions."
    seen, made = [], po_book.train.critic_batch
    monkeypatch.setattr(po_book.train, "critic_batch", lambda *args: seen.append(made(*args)) or seen[-1])
    config = cartpole("ppo", **FAST | dict(lr=1e-2, epochs=8))
    learner = new_learner("CartPole-v1", 0, config)
    _, metrics = ALGORITHMS["ppo"].iteration(learner, config, 1.0)
    rows = seen[0]
    logp, entropy = learner.policy.evaluate(rows["obs"], rows["actions"])
    log_ratio, error = (logp - rows["logp"]).detach().double(), rows["advantages"].double()
    by_hand = {
        "value_loss": error.square().mean() / 2,
        "entropy": entropy.mean(),
        "approx_kl": (log_ratio.exp() - 1 - log_ratio).mean(),
        "clip_fraction": ((log_ratio.exp() - 1).abs() > 0.2).double().mean(),
        "explained_variance": 1 - error.var(correction=0) / rows["returns"].double().var(correction=0),
    }
    assert metrics.keys() == by_hand.keys() and by_hand["clip_fraction"] > 0
    for name, wanted in by_hand.items():
        assert metrics[name].item() == pytest.approx(wanted.item(), rel=1e-4, abs=1e-6), name


def spoiled(x: torch.Tensor, valid: torch.Tensor, junk: float) -> torch.Tensor:
    "Something else where a row is no transition."
    lost = ~valid.reshape(*valid.shape, *[1] * (x.ndim - valid.ndim))
    return x + junk * lost if x.is_floating_point() else x


@pytest.mark.parametrize("algorithm, settings", [
    ("ppo", dict(kl_coef=1.0, entropy_coef=0.01, clip_value=0.5)), ("a2c", dict(entropy_coef=0.01)), ("trpo", {}), ("reinforce", {}),
])  # fmt: skip
def test_rows_that_are_no_transitions_teach_nothing(algorithm, settings, monkeypatch):
    "Masked, as on a GPU: whatever is seen or paid there, weights and metrics are the same."
    monkeypatch.setattr(po_book.batch, "readable", lambda x: False)
    made, episodes = po_book.train.critic_batch, po_book.train.collect_episodes
    config = replace(SMALL[algorithm], **settings)
    results = []
    for junk in 0.0, 30.0:
        def batch(*args, junk=junk):
            table = made(*args)
            assert not table["mask"].all()
            return {name: spoiled(x, table["mask"], junk) for name, x in table.items()}

        def whole(*args, junk=junk):
            table = episodes(*args)
            assert not table.valid.all()
            columns = {name: spoiled(getattr(table, name), table.valid, junk) for name in ("obs", "rewards")}
            return replace(table, **columns)

        monkeypatch.setattr(po_book.train, "critic_batch", batch)
        monkeypatch.setattr(po_book.train, "collect_episodes", whole)
        learner = new_learner("CartPole-v1", 0, config)
        with torch.no_grad():
            learner.policy.actor[-1].weight.mul_(100)  # so that what is seen makes a difference
        _, metrics = ALGORITHMS[algorithm].iteration(learner, config, 1.0)
        results.append({name: torch.as_tensor(x) for name, x in metrics.items()} | {"weights": flat(learner.policy)})
    assert results[0].keys() == results[1].keys()
    for name, clean in results[0].items():
        torch.testing.assert_close(results[1][name], clean, atol=1e-6, rtol=1e-5, msg=name)


def small(algorithm: str, **settings) -> tuple:
    "A learner that learns from its first iteration on, and its settings."
    more = {"learning_starts": 0} if algorithm in ("dqn", "ddpg") else {}
    config = replace(SMALL[algorithm], **more, **settings)
    return new_learner("Pendulum-v1" if algorithm == "ddpg" else "CartPole-v1", 0, config), config


@pytest.mark.parametrize("algorithm", ["a2c", "ppo", "trpo", "dqn", "ddpg"])
def test_the_longest_gradient_is_as_asked(algorithm):
    learner, config = small(algorithm, max_grad_norm=1e-3)
    ALGORITHMS[algorithm].iteration(learner, config, 1.0)
    assert learner.weights.grad.norm().item() == pytest.approx(1e-3, rel=0.02)


@pytest.mark.parametrize("algorithm", ["ppo", "trpo", "dqn", "ddpg"])
def test_the_order_of_minibatches_is_drawn_apart_from_the_actions(algorithm):
    (alone, config), (learner, _) = small(algorithm), small(algorithm)
    alone.collect(config.n_steps)
    ALGORITHMS[algorithm].iteration(learner, config, 1.0)
    assert torch.equal(alone.generator.get_state(), learner.generator.get_state())
    assert not torch.equal(alone.order.get_state(), learner.order.get_state())


def test_the_penalty_holds_the_policy_back():
    runs = [quick("ppo", config=cartpole("ppo", **FAST, clip=None, kl_coef=beta)) for beta in (0.0, 30.0)]
    moved = [np.mean([row["approx_kl"] for row in run.log]) for run in runs]
    assert moved[1] < moved[0] / 5


def test_the_weight_of_the_penalty_is_adapted_once_an_iteration(tmp_path):
    def weights(target):
        run = quick("ppo", config=cartpole("ppo", **FAST, clip=None, kl_coef=1.0, kl_target=target))
        return [row["kl_coef"] for row in run.log]

    assert weights(1e-9)[:4] == [1.0, 2.0, 4.0, 8.0] and weights(1e9)[:4] == [1.0, 0.5, 0.25, 0.125]
    assert "kl_coef" not in quick("ppo", config=cartpole("ppo", **FAST, kl_coef=1.0)).log[0]
    config = cartpole("ppo", **FAST, clip=None, kl_coef=1.0, kl_target=1e-9)
    quick("ppo", config=config, out=tmp_path, report=lambda row: row["steps"] < 500)
    assert [row["kl_coef"] for row in po_book.train.resume(tmp_path, progress=False).log] == weights(1e-9)


def test_the_adapted_weight_is_the_one_in_the_loss():
    "Eight by adaptation is eight by settings."
    adapted, eight, one = (
        cartpole("ppo", **FAST, clip=None, kl_coef=beta, kl_target=target)
        for beta, target in ((1.0, 0.01), (8.0, None), (1.0, None))
    )
    weights = []
    for config in adapted, eight, one:
        learner = new_learner("CartPole-v1", 0, config)
        if config is adapted:
            learner.extra["kl"].beta = 8.0
        ALGORITHMS["ppo"].iteration(learner, config, 1.0)
        weights.append(flat(learner.policy))
    assert torch.equal(weights[0], weights[1]) and not torch.equal(weights[1], weights[2])


def test_trpo_logs_the_mean_value_loss(monkeypatch):
    losses = []
    made = po_book.train.value_loss

    def spy(*args):
        losses.append(made(*args).mean().item())
        return made(*args)

    monkeypatch.setattr(po_book.train, "value_loss", spy)
    learner = new_learner("po_book/CartPole-v1", 0, SMALL["trpo"])  # loses no row
    _, metrics = trpo_iteration(learner, SMALL["trpo"], 1.0)
    assert len(losses) > 3 and metrics["value_loss"].item() == pytest.approx(np.mean(losses), rel=1e-6)


def spied(monkeypatch, algorithm: str, **settings) -> list[dict]:
    "What each iteration of a run got and used: fraction left, rate and clip of every step."
    rows = []
    inner = ALGORITHMS[algorithm]

    def iteration(learner, config, remaining):
        row = {"remaining": remaining, "rates": [], "clips": []}
        rows.append(row)
        step, real = learner.optimizer.step, po_book.ppo.ppo_loss

        def stepping():
            row["rates"].append(float(learner.optimizer.param_groups[0]["lr"]))
            return step()

        def losing(*args, **kwargs):
            row["clips"].append((kwargs["clip_low"], kwargs["clip_high"]))
            return real(*args, **kwargs)

        with monkeypatch.context() as patch:
            patch.setattr(learner.optimizer, "step", stepping)
            patch.setattr(po_book.train, "ppo_loss", losing)
            rollout, metrics = inner.iteration(learner, config, remaining)
        row["epsilon"] = float(getattr(learner.policy, "epsilon", 0))
        row["sigma"] = float(getattr(learner.policy, "sigma", 0))
        return rollout, metrics

    env = "Pendulum-v1" if algorithm == "ddpg" else "po_book/CartPole-v1"
    config = replace(SMALL[algorithm], **settings)
    algorithm_spied = Algorithm(inner.config, iteration)
    run = start_run(algorithm, algorithm_spied, env, config, progress=False)
    before = [0, *(row["steps"] for row in run.log)]
    for row, steps in zip(rows, before):
        row["left"] = 1 - steps / config.total_steps
    return rows


@pytest.mark.parametrize("algorithm", SMALL)
def test_an_iteration_knows_how_much_of_the_run_is_left(algorithm, monkeypatch):
    rows = spied(monkeypatch, algorithm)
    assert rows[0]["remaining"] == 1.0 and len(rows) > 2
    assert [row["remaining"] for row in rows] == pytest.approx([row["left"] for row in rows], abs=1e-12)


@pytest.mark.parametrize(
    "algorithm, settings, falls",
    [("ppo", {}, True), ("a2c", {}, True), ("dqn", {}, True), ("trpo", {}, False), ("reinforce", {}, False),
     ("ddpg", {}, False), ("ppo", {"anneal": False}, False), ("a2c", {"anneal": False}, False), ("trpo", {"anneal": True}, True)],
)
def test_which_rate_each_step_used(algorithm, settings, falls, monkeypatch):
    lr = SMALL[algorithm].lr
    steps = 0
    for row in spied(monkeypatch, algorithm, **settings):
        steps += len(row["rates"])
        assert row["rates"] == pytest.approx([lr * (row["left"] if falls else 1.0)] * len(row["rates"]))
    assert steps > 2


@pytest.mark.parametrize(
    "algorithm, steps", [("ppo", 4), ("trpo", 4), ("a2c", 1), ("reinforce", 1), ("dqn", 8), ("ddpg", 8)]
)
def test_how_many_gradient_steps_an_iteration_takes(algorithm, steps, monkeypatch):
    "Two epochs of two parts; one step; as many as asked, once there is something to learn from."
    taken = [len(row["rates"]) for row in spied(monkeypatch, algorithm)]
    waiting = [0] * 3 if algorithm in ("dqn", "ddpg") else []  # 64, 128 and 192 are below 200
    assert taken == waiting + [steps] * (len(taken) - len(waiting)) and len(taken) > len(waiting)


@pytest.mark.parametrize("settings, low, high", [({}, 0.2, 0.2), ({"clip": 0.1, "clip_high": 0.3}, 0.1, 0.3)])
@pytest.mark.parametrize("anneal", [True, False])
def test_which_clip_range_each_step_used(settings, low, high, anneal, monkeypatch):
    for row in spied(monkeypatch, "ppo", anneal=anneal, **settings):
        pace = row["left"] if anneal else 1.0
        assert len(row["clips"]) == 4
        for clip in row["clips"]:
            assert clip == pytest.approx((low * pace, high * pace))


def test_the_clip_range_at_a_quarter():
    assert PPOConfig().band(0.25) == (0.05, 0.05) and PPOConfig(clip=None).band(0.25) == (1.0, np.inf)
    assert PPOConfig(clip_high=0.4).band(0.5) == (0.1, 0.2)


def test_exploration_of_dqn_and_ddpg_in_a_run(monkeypatch):
    rows = spied(monkeypatch, "dqn", exploration=0.5, epsilon=0.1)
    by_hand = [max(0.1, 1 - 0.9 * (1 - row["left"]) / 0.5) for row in rows]
    assert [row["epsilon"] for row in rows] == pytest.approx(by_hand)
    assert rows[0]["epsilon"] == 1.0 and rows[-1]["epsilon"] == pytest.approx(0.1)
    rows = spied(monkeypatch, "ddpg", sigma=0.25)
    remembered = [64 * i for i in range(len(rows))]  # four environments, sixteen steps
    assert [row["sigma"] for row in rows[:6]] == [1.0 if n < 200 else 0.25 for n in remembered[:6]]


class Line(gym.Env):
    "Walks on and never ends by itself; the reward is always 1."

    observation_space = gym.spaces.Box(0, 100, (1,))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.at = 0
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.at += 1
        return np.array([self.at], np.float32), 1.0, False, False, {}


def test_where_a_time_limit_cuts_the_next_state_still_has_a_value():
    "A limit of 5, and a discount of .9: no step is worth less for being the last."
    config = cartpole("ppo", n_envs=1, n_steps=11, gamma=0.9, lam=0.0)
    learner = new_learner(lambda: gym.wrappers.TimeLimit(Line(), 5), 0, config)
    rollout = learner.collect(11)
    batch = critic_batch(learner.policy, rollout, 0.9, 0.0)
    with torch.no_grad():
        value, following = (learner.policy.value(x[rollout.valid]) for x in (rollout.obs, rollout.next_obs))
    assert rollout.truncated.sum() >= 1 and not rollout.terminated.any()
    torch.testing.assert_close(batch["advantages"], 1 + 0.9 * following - value)


@pytest.mark.parametrize("algorithm", ["a2c", "trpo", "ppo"])
def test_rewards_are_learned_from_in_units_of_the_returns_and_logged_as_they_came(algorithm, monkeypatch):
    "Nothing that the policy does changes what Line pays: the log must not see the scale."
    made, seen = po_book.train.critic_batch, []
    monkeypatch.setattr(po_book.train, "critic_batch", lambda *args: seen.append(args[1].rewards) or made(*args))
    logged, learned = [], []
    for on in False, True:
        config = replace(SMALL[algorithm], normalize_rewards=on, gamma=0.9)
        run = quick(algorithm, env=lambda: gym.wrappers.TimeLimit(Line(), 7), config=config)
        logged.append([row.get("return") for row in run.log])
        learned.append(torch.cat(seen))
        seen.clear()
    assert logged[0] == logged[1] and logged[0][-1] == 7
    kinds = [x.unique() for x in learned]
    assert kinds[0].tolist() == [0, 1]
    # Seven steps of 1 with a discount of .9, over and over.
    deviation = np.std([sum(0.9**k for k in range(n)) for n in range(1, 8)])
    torch.testing.assert_close(kinds[1][-1].item(), 1 / deviation, rtol=0.01, atol=0)
    assert learned[1][(learned[0] == 1)].min() > 0.5


def test_the_scale_of_rewards_is_kept_beside_the_weight_of_the_penalty():
    config = cartpole("ppo", **FAST, kl_coef=1.0, kl_target=0.01, normalize_rewards=True)
    extra = config.prepare(new_learner("CartPole-v1", 0, config).policy)
    assert extra.keys() == {"kl", "reward_scale"}
    assert extra["reward_scale"].gamma == config.gamma != config.lam
    assert not cartpole("ppo", **FAST).prepare(None) and not cartpole("a2c").prepare(None)


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


@pytest.mark.cuda
@pytest.mark.parametrize("algorithm", SMALL)
def test_training_on_a_gpu(algorithm):
    run = quick(algorithm, device="cuda")
    assert next(run.policy.parameters()).is_cuda and run.evaluate(5).shape == (5,)


@pytest.mark.parametrize("algorithm", ["a2c", "trpo", "ppo"])
def test_rows_that_are_masked_move_the_weights_as_rows_that_are_dropped(algorithm, monkeypatch):
    "One step on a rollout in which some rows are no transitions."
    settings = dict(n_envs=4, n_steps=60, lr=1e-3)
    if algorithm != "a2c":
        settings |= dict(epochs=1, minibatch=10_000)
    config = ALGORITHMS[algorithm].config(**settings)
    weights, metrics = [], []
    for looked_at in True, False:
        monkeypatch.setattr(po_book.batch, "readable", lambda x: looked_at)
        learner = new_learner("CartPole-v1", 0, config)
        rollout, noted = ALGORITHMS[algorithm].iteration(learner, config, 1.0)
        assert not rollout.valid.all()
        weights.append(flat(learner.policy))
        metrics.append(noted)
    torch.testing.assert_close(*weights, atol=1e-5, rtol=0)
    for name in metrics[0]:
        assert float(metrics[0][name]) == pytest.approx(float(metrics[1][name]), abs=1e-4), name


def test_a_method_of_a_later_chapter_is_found_by_its_name():
    "In a process that has imported nothing else."
    code = (
        "from po_book.train import ALGORITHMS, default_config\n"
        "print('mappo' in ALGORITHMS, type(default_config('mappo', 'Nothing-v0')).__name__)"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout == "False MAPPOConfig\n", done.stderr
