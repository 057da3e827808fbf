"""TRPO on CartPole-v1 beside sb3-contrib with the settings tuned in rl-zoo3.

Run: python benchmarks/trpo.py [seeds]

Seconds of collecting and learning until sampled actions earn 475 on average over 100
fresh episodes, asked every 1024 transitions; scores and imports are not counted. The
two take turns, seed by seed, so that a busy moment of the machine hits both.
"""

import sys
from statistics import median
from time import perf_counter

import gymnasium as gym
import torch
import torch._dynamo  # imported by the first optimiser; not a part of either loop
from sb3_contrib import TRPO
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from po_book.train import TRPOConfig, train

EVERY, BUDGET, BAR = 1024, 100_000, 475


def ours(seed: int) -> tuple[int, float] | None:
    "Transitions and seconds to the bar; None if it is not reached."
    config = TRPOConfig(total_steps=BUDGET, eval_every=EVERY, solved_at=BAR)
    last = train("trpo", "CartPole-v1", seed=seed, config=config, progress=False).log[-1]
    return (last["steps"], last["seconds"]) if last["score"] >= BAR else None


def theirs(seed: int) -> tuple[int, float] | None:
    "The same of sb3-contrib; a call of `learn` is one rollout of 1024 transitions."
    env = make_vec_env("CartPole-v1", n_envs=2, seed=seed)
    fresh = make_vec_env("CartPole-v1", n_envs=100, seed=1_000_000 + seed)
    model = TRPO("MlpPolicy", env, n_steps=512, batch_size=512, cg_damping=1e-3,
                 gae_lambda=0.98, gamma=0.99, learning_rate=1e-3, n_critic_updates=20,
                 seed=seed, device="cpu")
    seconds = 0.0
    while model.num_timesteps < BUDGET:
        start = perf_counter()
        model.learn(EVERY, reset_num_timesteps=False)
        seconds += perf_counter() - start
        score, _ = evaluate_policy(model, fresh, 100, deterministic=False, warn=False)
        if score >= BAR:
            return model.num_timesteps, seconds
    return None


def main(seeds: int = 5) -> None:
    torch.set_num_threads(1)
    gym.logger.min_level = gym.logger.ERROR
    results = {"po_book": [], "sb3-contrib": []}
    for seed in range(seeds):
        results["po_book"].append(ours(seed))
        results["sb3-contrib"].append(theirs(seed))
    medians = {}
    for name, runs in results.items():
        solved = [run for run in runs if run]
        medians[name] = median(seconds for _, seconds in solved) if solved else float("nan")
        print(f"{name:12} {len(solved)} of {seeds} seeds, median {medians[name]:5.2f} s:",
              ", ".join(f"{s:.2f} s ({n})" for n, s in solved))
    print(f"ratio of the medians: {medians['sb3-contrib'] / medians['po_book']:.1f}")


if __name__ == "__main__":
    main(*map(int, sys.argv[1:]))
