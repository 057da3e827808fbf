"""PPO and TRPO on CartPole-v1 beside stable-baselines3, both tuned, on one CPU core.

Run: python benchmarks/cartpole_cpu.py ppo|trpo [seeds]

Seconds of collecting and learning until sampled actions earn 475 on average over 100
fresh episodes, asked every 1024 transitions; scores and imports are not counted. The
two take turns, seed by seed, so that a busy moment of the machine hits both. The
peer's settings are those of rl-zoo3.
"""

import sys
from statistics import median
from time import perf_counter

import torch
import torch._dynamo  # imported by the first optimiser; not a part of either loop
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from po_book.train import PPOConfig, TRPOConfig, train

EVERY, BUDGET, BAR = 1024, 100_000, 475
CONFIGS = {"ppo": PPOConfig, "trpo": TRPOConfig}


def ours(algorithm: str, seed: int) -> tuple[int, float] | None:
    "Transitions and seconds to the bar; None if it is not reached."
    config = CONFIGS[algorithm](eval_every=EVERY, solved_at=BAR)
    last = train(algorithm, "CartPole-v1", seed=seed, config=config, progress=False).log[-1]
    return (last["steps"], last["seconds"]) if last["score"] >= BAR else None


def peer(algorithm: str, seed: int) -> PPO | TRPO:
    "The tuned peer, which collects 256 (PPO) or 1024 (TRPO) transitions an iteration."
    n_envs = {"ppo": 8, "trpo": 2}[algorithm]
    env = make_vec_env("CartPole-v1", n_envs=n_envs, seed=seed)
    shared = dict(seed=seed, device="cpu")
    if algorithm == "trpo":
        return TRPO("MlpPolicy", env, n_steps=512, batch_size=512, cg_damping=1e-3,
                    gae_lambda=0.98, gamma=0.99, learning_rate=1e-3, n_critic_updates=20,
                    **shared)
    return PPO("MlpPolicy", env, n_steps=32, batch_size=256, n_epochs=20, gae_lambda=0.8,
               gamma=0.98, learning_rate=lambda left: 1e-3 * left,
               clip_range=lambda left: 0.2 * left, ent_coef=0.0, **shared)


class Score(BaseCallback):
    "Stops the peer at the bar, and its clock while it is asked for a score."

    def __init__(self, seed: int):
        super().__init__()
        self.fresh = make_vec_env("CartPole-v1", n_envs=100, seed=1_000_000 + seed)
        self.hit, self.next, self.paused = None, EVERY, 0.0

    def _on_training_start(self) -> None:
        self.start = perf_counter()

    def _on_rollout_start(self) -> None:
        "Called after every update."
        if self.num_timesteps < self.next:
            return
        self.next, pause = self.num_timesteps + EVERY, perf_counter()
        score, _ = evaluate_policy(self.model, self.fresh, 100, deterministic=False, warn=False)
        if score >= BAR:
            self.hit = self.num_timesteps, pause - self.start - self.paused
        self.paused += perf_counter() - pause

    def _on_step(self) -> bool:
        return self.hit is None


def theirs(algorithm: str, seed: int) -> tuple[int, float] | None:
    "The same of the peer."
    score = Score(seed)
    peer(algorithm, seed).learn(BUDGET, callback=score)
    return score.hit


def main(algorithm: str, seeds: int = 5) -> None:
    torch.set_num_threads(1)
    results = {"po_book": [], "peer": []}
    for seed in range(seeds):
        results["po_book"].append(ours(algorithm, seed))
        results["peer"].append(theirs(algorithm, seed))
    medians = {}
    for name, runs in results.items():
        solved = [run for run in runs if run]
        medians[name] = median(seconds for _, seconds in solved) if solved else float("nan")
        print(f"{name:8} {len(solved)} of {seeds} seeds, median {medians[name]:5.2f} s:",
              ", ".join(f"{s:.2f} s ({n})" for n, s in solved))
    print(f"ratio of the medians: {medians['peer'] / medians['po_book']:.1f}")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in CONFIGS:
        sys.exit(__doc__)
    main(sys.argv[1], *map(int, sys.argv[2:]))
