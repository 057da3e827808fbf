"What the processes of test_distributed.py do: new processes must find it by its name."

import gymnasium as gym
import torch

from po_book.distributed import train_together
from po_book.train import A2CConfig, PPOConfig, TRPOConfig, train

GENERAL = dict(n_envs=4, n_steps=32, hidden=(16,), total_steps=500)
CONFIGS = {
    "ppo": PPOConfig(**GENERAL, epochs=2, minibatch=24),
    "trpo": TRPOConfig(**GENERAL, epochs=2, minibatch=24),
    "a2c": A2CConfig(**GENERAL),
}


def cartpole():
    return gym.make("CartPole-v1")


def learned(start, *what, **how):
    "Parameters, buffers and the log of a run."
    run = start(*what, progress=False, **how)
    state = {name: x.double().numpy() for name, x in run.policy.state_dict().items()}
    return state, [{k: x for k, x in row.items() if k != "seconds"} for row in run.log]


def alone(env):
    return {name: learned(train, name, env, config=c) for name, c in CONFIGS.items()}


def together(env):
    return {name: learned(train_together, name, env, config=c) for name, c in CONFIGS.items()}
