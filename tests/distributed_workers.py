"What the processes of test_distributed.py do: a new process must find it by its name."

import os
import signal
from collections import Counter
from dataclasses import replace

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from po_book.algorithm import new_learner  # noqa: F401
from po_book.batch import minibatches
from po_book.distributed import Group, RowsOfAll, train_together
from po_book.policies import CategoricalPolicy
from po_book.train import A2CConfig, DQNConfig, PPOConfig, TRPOConfig

GENERAL = dict(n_envs=4, n_steps=32, hidden=(16,), total_steps=500)
CONFIGS = {
    "ppo": PPOConfig(**GENERAL, epochs=2, minibatch=24),
    "trpo": TRPOConfig(**GENERAL, epochs=2, minibatch=24),
    "a2c": A2CConfig(**GENERAL),
}


def cartpole():
    return gym.make("CartPole-v1")


class Bright(gym.Env):
    "Pictures; the reward is 1 where the action names the brighter half."

    observation_space = gym.spaces.Box(0, 255, (3, 12, 12), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = 5
        return self.look(), {}

    def look(self):
        self.side = int(self.np_random.integers(2))
        seen = np.zeros(self.observation_space.shape, np.uint8)
        seen[:, 6 * self.side : 6 * self.side + 6] = 200
        return seen

    def step(self, action):
        reward, self.left = float(action == self.side), self.left - 1
        return self.look(), reward, self.left == 0, False, {}


class Fatal(gym.Env):
    "Ends its process at the fifth step."

    observation_space, action_space = gym.spaces.Box(0, 1, (2,)), gym.spaces.Discrete(2)
    steps = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(2, np.float32), {}

    def step(self, action):
        self.steps += 1
        if self.steps == 5:
            os._exit(3)
        return np.zeros(2, np.float32), 0.0, False, False, {}


class Mortal(gym.Wrapper):
    "In the life that is asked for, process 1 dies at step 120 of its first environment."

    made = 0

    def __init__(self, env):
        super().__init__(env)
        self.number, self.steps = Mortal.made, 0
        Mortal.made += 1

    def step(self, action):
        self.steps += 1
        dies = os.environ.get("RANK") == "1" and (self.number, self.steps) == (0, 120)
        if dies and os.environ["TORCHELASTIC_RESTART_COUNT"] == os.environ.get("DIES_IN"):
            os.kill(os.getpid(), signal.SIGKILL)
        return self.env.step(action)


gym.register("Mortal-v0", lambda: Mortal(gym.make("CartPole-v1")))


class ToDouble(nn.Module):
    def forward(self, x):
        return x.double()


def double_policy(env):
    "An actor and a critic that compute in float64."
    policy = CategoricalPolicy(4, 2, (16,), torch.Generator().manual_seed(0))
    policy.normalizer = policy.actor[0] = policy.critic[0] = ToDouble()
    return policy.double()


def label(env):
    return env if isinstance(env, str) else env.__name__


def learned(start, *what, **how):
    "Parameters, buffers and the log of a run."
    run = start(*what, progress=False, **how)
    state = {name: x.double().numpy() for name, x in run.policy.state_dict().items()}
    return state, [{k: x for k, x in row.items() if k != "seconds"} for row in run.log]


def double(name, start):
    config = replace(CONFIGS[name], normalize_obs=False)
    return learned(start, name, cartpole, config=config, policy=double_policy)


def refusal(function, *args, **how):
    try:
        function(*args, **how)
    except ValueError as error:
        return str(error)


LOST = torch.ones(8, 4, dtype=torch.bool)  # false where a row is no transition
LOST[2, 1] = LOST[5] = LOST[6, 3] = False


def parts_alone(valid):
    "Numbers of the rows in minibatches of three, and in one of all."
    order, rows = torch.Generator().manual_seed(0), torch.arange(32)[valid.flatten()]
    return [
        part["logp"].tolist() for size in (3, 32) for part in minibatches({"logp": rows}, size, order)
    ]


def own_parts(group, valid):
    "The same in one of two processes."
    order, group.valid, parts = torch.Generator().manual_seed(0), valid, []
    rows = group.mine(torch.arange(32).view(8, 4))[group.mine(valid)]
    for size in 3, 32:
        for part in group.minibatches({"obs": rows, "logp": rows}, size, order):
            kept = part.get("mask", torch.ones(len(part["obs"]), dtype=torch.bool))
            parts.append(part["logp"][kept].tolist())
    return parts


def numbers():
    "Of a group with two environments in each process."
    group, rank = Group(2), dist.get_rank()
    found = {"average": group.average(torch.tensor([1.0, 5.0][rank]), (1, 3)[rank])}
    found["of nothing"] = group.average(torch.tensor([2.0, 9.0][rank]), (1, 0)[rank])
    found = {name: [x.item()] for name, x in found.items()}
    x = torch.tensor([[1.0, 9.0, 9.0, 9.0], [4.0, 5.0, 6.0, 9.0]][rank])
    mask = torch.arange(4) < (1, 3)[rank]
    normalized = group.normalize(x, mask)
    assert not normalized[~mask].any()
    found["normalized"] = normalized[mask].tolist()
    found["parts"] = own_parts(group, torch.ones(8, 4, dtype=torch.bool))
    found["fewer parts"] = own_parts(group, LOST)
    return found


def refused():
    config, rank = CONFIGS["ppo"], dist.get_rank()
    start = dict(progress=False)
    vector = gym.make_vec("CartPole-v1", 4)
    said = {
        "n_envs": refusal(train_together, "ppo", cartpole, config=replace(config, n_envs=5), **start),
        "dqn": refusal(train_together, "dqn", cartpole, config=DQNConfig(), **start),
        "vector": refusal(train_together, "ppo", vector, config=config, **start),
        "config": refusal(
            train_together, "ppo", cartpole, config=replace(config, lr=(1e-3, 2e-3)[rank]), **start
        ),
    }
    with RowsOfAll(0, 2):
        weights, generator = torch.ones(2, 3), torch.Generator()
        said["draw"] = refusal(torch.multinomial, weights, 1, generator=generator)
    return said


def volume(name, env):
    "Bytes that one iteration gives to each kind of exchange, and the number of weights."
    counts, call = Counter(), Group.call

    def count(self, collective, *args, **how):
        sizes = [x.numel() * x.element_size() for x in args if torch.is_tensor(x)]
        counts[collective.__name__] += sum(sizes)
        call(self, collective, *args, **how)

    Group.call = count
    kept = []
    config = replace(CONFIGS[name], total_steps=100)
    look = dict(report=lambda row, run, learner: kept.append(len(learner.weights)))
    train_together(name, env, config=config, progress=False, **look)
    Group.call = call
    return dict(counts), kept


def everything():
    "All that two processes are asked."
    seen = {"numbers": numbers(), "refused": refused()}
    seen["volume"], seen["volume of images"] = volume("ppo", cartpole), volume("a2c", Bright)
    for env in cartpole, "po_book/CartPole-v1":
        for name, config in CONFIGS.items():
            seen[label(env), name] = learned(train_together, name, env, config=config)
    seen["double"] = double("trpo", train_together)
    seen["images"] = learned(train_together, "a2c", Bright, config=CONFIGS["a2c"])
    more = dict(config=CONFIGS["a2c"], progress=False, report=lambda row: row["steps"] < 200)
    seen["stopped"] = len(train_together("a2c", cartpole, **more).log)
    graded = dict(config=replace(CONFIGS["a2c"], eval_every=200, eval_episodes=3, solved_at=1.0))
    log = train_together("a2c", cartpole, progress=False, **graded).log
    seen["solved"] = [row.get("mean_return") for row in log]
    return seen
