"""Training runs that take longer than a reader waits, recorded for the chapters.

Run: python benchmarks/record.py NAME [processes [VARIANT]]

Writes results/NAME.csv, a row an evaluation, and results/NAME.json, which says where, when
and with what it was made. Every row is what `po_book.train.train` logged. With a variant,
only that one is run, and the rows of the others stay.
"""

from dataclasses import replace
from functools import partial

import torch
from recording import Record, asked

from po_book.algorithm import Config
from po_book.train import (
    ALGORITHMS,
    DDPGConfig,
    DQNConfig,
    PPOConfig,
    default_config,
    train,
)


def preset(algorithm: str, env: str, **more) -> Record:
    "The default settings of `env`, ten seeds."
    config = replace(default_config(algorithm, env), **more)
    return Record(env, 10, {algorithm.upper(): config})


def cartpole(algorithm: str, **more) -> Config:
    "The default settings of CartPole, some of them changed."
    return replace(default_config(algorithm, "CartPole-v1"), **more)


METHODS = dict(total_steps=100_000, eval_every=4_000)
DETAILS = dict(total_steps=50_000, eval_every=2_048)
DQN = dict(eval_every=2_500)
DDPG = dict(eval_every=1_000)
MEETING = dict(total_steps=15_000, eval_every=1_500)
RECORDS = {
    "cartpole_methods": Record("CartPole-v1", 10, {
        "REINFORCE": cartpole("reinforce", **METHODS),
        "A2C": cartpole("a2c", **METHODS),
        "TRPO": cartpole("trpo", **METHODS),
        "PPO": cartpole("ppo", **METHODS),
    }),
    "ppo_details": Record("CartPole-v1", 10, {
        "as it is": cartpole("ppo", **DETAILS),
        "rate and clip range constant": cartpole("ppo", anneal=False, **DETAILS),
        "advantages not normalised": cartpole("ppo", normalize_advantages=False, **DETAILS),
        "gradient not bounded": cartpole("ppo", max_grad_norm=1e9, **DETAILS),
        "ratio not clipped": cartpole("ppo", clip=None, **DETAILS),
        "one epoch": cartpole("ppo", epochs=1, **DETAILS),
        "lambda 0": cartpole("ppo", lam=0.0, **DETAILS),
        "lambda 1": cartpole("ppo", lam=1.0, **DETAILS),
        "observations normalised": cartpole("ppo", normalize_obs=True, **DETAILS),
        "entropy bonus 0.01": cartpole("ppo", entropy_coef=0.01, **DETAILS),
        "one environment": cartpole("ppo", n_envs=1, n_steps=1024, **DETAILS),
        "epochs end at 0.01 nats": cartpole("ppo", target_kl=0.01, **DETAILS),
        "rewards normalised": cartpole("ppo", normalize_rewards=True, **DETAILS),
        "general defaults": PPOConfig(**DETAILS),
    }),
    "ppo_acrobot": preset("ppo", "Acrobot-v1", eval_every=5_000),
    "ppo_pendulum": preset("ppo", "Pendulum-v1", eval_every=10_000),
    "ppo_lunarlander": preset("ppo", "LunarLander-v3", eval_every=50_000),
    "dqn_cartpole": Record("CartPole-v1", 10, {
        "replay and target network": DQNConfig(**DQN),
        "without target network": DQNConfig(tau=1.0, **DQN),
        "without replay": DQNConfig(memory=256, learning_starts=256, **DQN),
        "with neither": DQNConfig(tau=1.0, memory=256, learning_starts=256, **DQN),
    }),
    "ddpg_pendulum": Record("Pendulum-v1", 10, {
        "noise 0.2": DDPGConfig(**DDPG),
        "noise 0.01": DDPGConfig(sigma=0.01, **DDPG),
    }),
    "trpo_pendulum": Record("Pendulum-v1", 10, {
        f"rollouts of {n} steps": replace(
            default_config("trpo", "Pendulum-v1"), n_steps=n, eval_every=1
        )
        for n in (200, 128)
    }),
    "team_meeting": Record("po_book/Meeting-v0", 8, {
        variant: replace(default_config(name, "po_book/Meeting-v0"), **MEETING, **more)
        for variant, name, more in (
            ("IPPO, shared", "ippo", {}),
            ("IPPO, one each", "ippo", dict(share=False)),
            ("MAPPO, shared", "mappo", {}),
            ("MAPPO, one each", "mappo", dict(share=False)),
            ("HAPPO, one each", "happo", {}),
        )
    }),
    "team_spread": Record("mpe2/simple_spread-v3", 8, {
        name.upper(): replace(
            default_config(name, "mpe2/simple_spread-v3"), eval_every=20_000
        )
        for name in ("ippo", "mappo", "happo")
    }),
}


def evaluations(name: str, variant: str, seed: int) -> list[dict]:
    "One run: the rows of its log that have a mean return."
    torch.set_num_threads(1)
    env, config = RECORDS[name].place, RECORDS[name].variants[variant]
    algorithm = next(key for key, x in ALGORITHMS.items() if x.config is type(config))
    run = train(algorithm, env, seed=seed, config=config, progress=False)
    rows = [row for row in run.log if "mean_return" in row]
    return [
        {"variant": variant, "seed": seed, "steps": row["steps"],
         "seconds": f"{row['seconds']:.2f}", "mean_return": f"{row['mean_return']:.2f}"}
        for row in rows
    ]


def main(name: str, processes: int, variant: str | None = None) -> None:
    wanted = RECORDS[name].only(variant) if variant else RECORDS[name]
    runs = wanted.runs(partial(evaluations, name), processes)
    write = wanted.add if variant else wanted.write
    write(name, [row for run in runs for row in run])


if __name__ == "__main__":
    main(*asked(__doc__, RECORDS))
