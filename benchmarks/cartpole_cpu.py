"""PPO and TRPO on CartPole-v1 beside stable-baselines3, both tuned, on one CPU core.

Run: python benchmarks/cartpole_cpu.py ppo|trpo [seeds] [--record]

Seconds of collecting and learning until sampled actions earn 475 on average over 100
fresh episodes, asked every 1024 transitions; evaluations and imports are not counted. The
candidates take turns, seed by seed, so that a busy moment of the machine hits all. The
peer's settings are those of rl-zoo3. For PPO there is a third: this library with the
settings of CleanRL, which shows how much is settings and how much is speed.
"""

import sys
from functools import partial
from statistics import median
from time import perf_counter

import torch
import torch._dynamo  # imported by the first optimiser; not a part of either loop
from provenance import record
from sb3_contrib import TRPO
from stable_baselines3 import PPO
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from po_book.train import PPOConfig, TRPOConfig, train

EVERY, BUDGET, BAR = 1024, 100_000, 475
SCORED = dict(eval_every=EVERY, solved_at=BAR)
OURS = {
    "ppo": {
        "po_book": PPOConfig(**SCORED),
        "po_book, CleanRL's settings": PPOConfig(
            total_steps=500_000, n_envs=4, n_steps=128, minibatch=128, epochs=4, lr=2.5e-4,
            gamma=0.99, lam=0.95, entropy_coef=0.01, **SCORED,
        ),
    },
    "trpo": {"po_book": TRPOConfig(**SCORED)},
}
PEER = {"ppo": "stable-baselines3, tuned", "trpo": "sb3-contrib, tuned"}


def ours(algorithm: str, name: str, seed: int) -> tuple[int, float] | None:
    "Transitions and seconds to the bar; None if it is not reached."
    config = OURS[algorithm][name]
    last = train(algorithm, "CartPole-v1", seed=seed, config=config, progress=False).log[-1]
    return (last["steps"], last["seconds"]) if last.get("mean_return", 0) >= BAR else None


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


class Bar(BaseCallback):
    "Stops the peer at the bar, and its clock while it is evaluated."

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
        mean_return, _ = evaluate_policy(self.model, self.fresh, 100, deterministic=False, warn=False)
        if mean_return >= BAR:
            self.hit = self.num_timesteps, pause - self.start - self.paused
        self.paused += perf_counter() - pause

    def _on_step(self) -> bool:
        return self.hit is None


def theirs(algorithm: str, seed: int) -> tuple[int, float] | None:
    "The same of the peer."
    bar = Bar(seed)
    peer(algorithm, seed).learn(BUDGET, callback=bar)
    return bar.hit


def main(algorithm: str, seeds: int, recording: bool) -> None:
    torch.set_num_threads(1)
    candidates = {name: partial(ours, algorithm, name) for name in OURS[algorithm]}
    candidates[PEER[algorithm]] = partial(theirs, algorithm)
    results = {name: [] for name in candidates}
    for seed in range(seeds):
        for name, candidate in candidates.items():
            results[name].append(candidate(seed))
    solved = {name: [run for run in runs if run] for name, runs in results.items()}
    medians = {name: [median(x) for x in zip(*runs)] for name, runs in solved.items()}
    rows = []
    for name, runs in solved.items():
        seconds = [seconds for _, seconds in runs]
        spread = f"{medians[name][1]:.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
        ratio = medians[name][1] / medians["po_book"][1]
        rows.append([name, f"{len(runs)} of {seeds}", spread, f"{medians[name][0]:.0f}", f"{ratio:.1f}"])
    columns = [f"{algorithm.upper()}", "seeds", "seconds to 475", "transitions", "over po_book's"]
    for row in columns, *rows:
        print(f"{row[0]:30}{row[1]:>10}{row[2]:>24}{row[3]:>14}{row[4]:>16}")
    if recording:
        record(f"cartpole_cpu_{algorithm}", columns, rows)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    if len(words) not in (1, 2) or words[0] not in OURS:
        sys.exit(__doc__)
    main(words[0], int(words[1]) if len(words) > 1 else 5, "--record" in sys.argv)
