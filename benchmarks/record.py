"""Training runs that take longer than a reader waits, recorded for the chapters.

Run: python benchmarks/record.py NAME [processes]

Writes results/NAME.csv, a row a score, and results/NAME.json, which says where, when
and with what it was made. Every row is what `po_book.train.train` logged.
"""

import csv
import json
import os
import platform
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from datetime import date
from itertools import product
from pathlib import Path

import gymnasium
import torch

from po_book.train import Config, DDPGConfig, DQNConfig, TRPOConfig, train

ROOT = Path(__file__).parent.parent
SEEDS = range(5)

DQN = dict(eval_every=2_500)
DDPG = dict(eval_every=1_000)
TRPO = TRPOConfig(
    total_steps=200_000, n_envs=32, n_steps=128, gamma=0.9, lam=0.95, epochs=10,
    max_kl=0.02, max_grad_norm=100.0, eval_every=10_000,
)

# name: algorithm, environment, and the settings of each variant
RECORDS: dict[str, tuple[str, str, dict[str, Config]]] = {
    "dqn_cartpole": ("dqn", "CartPole-v1", {
        "replay and target network": DQNConfig(**DQN),
        "without target network": DQNConfig(tau=1.0, **DQN),
        "without replay": DQNConfig(memory=256, learning_starts=256, **DQN),
        "with neither": DQNConfig(tau=1.0, memory=256, learning_starts=256, **DQN),
    }),
    "ddpg_pendulum": ("ddpg", "Pendulum-v1", {
        "noise 0.2": DDPGConfig(**DDPG),
        "noise 0.01": DDPGConfig(sigma=0.01, **DDPG),
    }),
    "trpo_pendulum": ("trpo", "Pendulum-v1", {
        "TRPO": TRPO,
    }),
}


def scores(name: str, variant: str, seed: int) -> list[list]:
    "One run: the rows of its log that have a score."
    torch.set_num_threads(1)
    algorithm, env_id, variants = RECORDS[name]
    run = train(algorithm, env_id, seed=seed, config=variants[variant], progress=False)
    columns = "steps", "seconds", "score"
    rows = [[row[column] for column in columns] for row in run.log if "score" in row]
    return [[variant, seed, *row] for row in rows]


def provenance() -> dict[str, str]:
    "Where, when and with what."
    git = ["git", "-C", str(ROOT), "rev-parse", "--short", "HEAD"]
    commit = subprocess.run(git, capture_output=True, text=True, check=True).stdout
    return {
        "device": f"CPU ({platform.machine()}, {os.cpu_count()} cores)",
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
        "gymnasium": f"gymnasium {gymnasium.__version__}",
        "seeds": f"seeds {SEEDS[0]} to {SEEDS[-1]}",
        "date": date.today().isoformat(),
        "commit": f"commit {commit.strip()}",
    }


def runs(name: str, processes: int) -> Iterator[list[list]]:
    "The scores of every variant and seed."
    variants, seeds = zip(*product(RECORDS[name][2], SEEDS))
    with ProcessPoolExecutor(processes) as pool:
        yield from pool.map(scores, [name] * len(seeds), variants, seeds)


def main(name: str, processes: str = "1") -> None:
    (ROOT / "results").mkdir(exist_ok=True)
    rows = [row for run in runs(name, int(processes)) for row in run]
    with open(ROOT / "results" / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["variant", "seed", "steps", "seconds", "score"])
        writer.writerows([*row[:3], *(f"{x:.2f}" for x in row[3:])] for row in rows)
    note = json.dumps(provenance(), indent=2)
    (ROOT / "results" / f"{name}.json").write_text(note + "\n", encoding="utf-8")


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in RECORDS:
        sys.exit(f"{__doc__}\nNAME is one of: {', '.join(RECORDS)}")
    main(*sys.argv[1:])
