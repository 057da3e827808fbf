"""What general settings earn on environments that nobody has tuned them for.

Run: python benchmarks/defaults.py [seeds] [--record]

Every environment is treated as unknown: PPO trains with its general settings and, for
comparison, with those of CartPole. A number is the mean return of 50 fresh episodes after
the last of the transitions, one number a seed; "untrained" is the first seed's policy
before it has learned anything. HalfCheetah asks for `pip install mujoco imageio`.
"""

import sys
from dataclasses import replace

import torch
from provenance import record

from po_book.rollout import evaluate
from po_book.runner import new_learner
from po_book.train import PPOConfig, default_config, train

STEPS = 100_000
ENVS = ["Acrobot-v1", "Pendulum-v1", "LunarLander-v3", "HalfCheetah-v5"]
SETTINGS = {
    "general": PPOConfig(total_steps=STEPS),
    "CartPole's": replace(default_config("ppo", "CartPole-v1"), total_steps=STEPS),
}


def untrained(env: str) -> str:
    "Mean return before the first gradient step."
    policy = new_learner(env, 0, SETTINGS["general"]).policy
    return f"{evaluate(policy, env, 50).mean():.0f}"


def earned(env: str, config: PPOConfig, seeds: int) -> str:
    "Mean return of each seed's last policy."
    runs = (train("ppo", env, seed=s, config=config, progress=False) for s in range(seeds))
    return ", ".join(f"{run.evaluate(50).mean():.0f}" for run in runs)


def main(seeds: int, recording: bool) -> None:
    torch.set_num_threads(1)
    more = dict(steps=f"{STEPS:,} transitions", seeds=f"seeds 0 to {seeds - 1}")
    columns, rows = ["environment", "untrained", *SETTINGS], []
    for env in ENVS:
        rows.append([env, untrained(env)])
        rows[-1] += [earned(env, config, seeds) for config in SETTINGS.values()]
        print(*(f"{x:>24}" for x in rows[-1]), flush=True)
        if recording:  # after every row, so that an interrupted run keeps what it has
            record("defaults", columns, rows, **more)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    if len(words) > 1 or not all(word.isdigit() for word in words):
        sys.exit(__doc__)
    main(int(words[0]) if words else 2, "--record" in sys.argv)
