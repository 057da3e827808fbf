"""What general settings earn on environments that nobody has tuned them for.

Run: python benchmarks/defaults.py [seeds] [--record]

Every environment is treated as unknown: three methods train with their general settings
and, for comparison, PPO with those of CartPole. A number is the mean return of 50 fresh
episodes after the last of the transitions, one number a seed; "untrained" is the first
seed's policy before it has learned anything. HalfCheetah asks for
`pip install "mujoco<4" imageio`.
"""

import sys
from dataclasses import replace

import torch
from provenance import record

from po_book.algorithm import Config, new_learner
from po_book.rollout import evaluate
from po_book.train import A2CConfig, PPOConfig, TRPOConfig, default_config, train

STEPS = 100_000
ENVS = ["Acrobot-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5"]
SETTINGS = {
    "PPO": ("ppo", PPOConfig(total_steps=STEPS)),
    "TRPO": ("trpo", TRPOConfig(total_steps=STEPS)),
    "A2C": ("a2c", A2CConfig(total_steps=STEPS)),
    "PPO, CartPole's": ("ppo", replace(default_config("ppo", "CartPole-v1"), total_steps=STEPS)),
}


def untrained(env: str) -> str:
    "Mean return before the first gradient step."
    policy = new_learner(env, 0, SETTINGS["PPO"][1]).policy
    return f"{evaluate(policy, env, 50).mean():.0f}"


def earned(env: str, algorithm: str, config: Config, seeds: int) -> str:
    "Mean return of each seed's last policy."
    runs = (train(algorithm, env, seed=s, config=config, progress=False) for s in range(seeds))
    return ", ".join(f"{run.evaluate(50).mean():.0f}" for run in runs)


def main(seeds: int, recording: bool) -> None:
    torch.set_num_threads(1)
    more = dict(steps=f"{STEPS:,} transitions", seeds=f"seeds 0 to {seeds - 1}")
    columns, rows = ["environment", "untrained", *SETTINGS], []
    for env in ENVS:
        rows.append([env, untrained(env)])
        rows[-1] += [earned(env, *how, seeds) for how in SETTINGS.values()]
        print(*(f"{x:>24}" for x in rows[-1]), flush=True)
        if recording:  # after every row, so that an interrupted run keeps what it has
            record("defaults", columns, rows, **more)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    if len(words) > 1 or not all(word.isdigit() for word in words):
        sys.exit(__doc__)
    main(int(words[0]) if words else 2, "--record" in sys.argv)
