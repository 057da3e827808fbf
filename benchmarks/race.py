"How soon two libraries reach a mean return, in one run, and what a gradient step costs them."

from collections.abc import Callable
from dataclasses import dataclass
from math import ceil
from statistics import median
from time import perf_counter
from typing import NamedTuple

import torch
import torch._dynamo  # imported by the first optimiser; not a part of either loop
from provenance import record
from stable_baselines3.common.base_class import BaseAlgorithm
from stable_baselines3.common.callbacks import BaseCallback
from stable_baselines3.common.env_util import make_vec_env
from stable_baselines3.common.evaluation import evaluate_policy

from po_book.algorithm import Config
from po_book.train import train


class Finish(NamedTuple):
    "What a run took until it reached the mean return that was asked, or ended without."

    seconds: float  # of collecting and learning; evaluations are not counted
    transitions: int
    steps: int  # gradient steps
    won: bool   # whether it got there


@dataclass(frozen=True)
class Race:
    "Where it is run, and when it is won."

    env: str
    bar: float           # mean return of 100 fresh episodes, actions sampled
    every: int           # transitions between evaluations
    budget: int          # transitions of the peer at most, if that is sooner than the seconds
    seconds: float = 600  # of the peer's collecting and learning at most

    def scored(self) -> dict[str, float]:
        "The settings that make this library stop at the bar."
        return dict(eval_every=self.every, solved_at=self.bar)


def gradient_steps(iterations: int, epochs: int, rows: int, minibatch: int, natural: bool) -> int:
    "Of so many iterations, each with so many rows; `natural` adds TRPO's own step."
    return iterations * (epochs * ceil(rows / minibatch) + natural)


def ours(race: Race, algorithm: str, config: Config, seed: int) -> Finish:
    "Of this library."
    run = train(algorithm, race.env, seed=seed, config=config, progress=False)
    rows = config.n_envs * config.n_steps
    each = config.epochs, rows, config.minibatch, algorithm == "trpo"
    won = run.log[-1].get("mean_return", -float("inf")) >= race.bar
    return Finish(run.log[-1]["seconds"], run.steps, gradient_steps(len(run.log), *each), won)


class Bar(BaseCallback):
    "Stops the peer at the bar or out of time, and its clock while it is evaluated."

    def __init__(self, race: Race, seed: int):
        super().__init__()
        self.race = race
        self.fresh = make_vec_env(race.env, n_envs=100, seed=1_000_000 + seed)
        self.next, self.paused, self.won, self.late = race.every, 0.0, False, False
        self.seconds, self.transitions = 0.0, 0  # at the latest look

    def _on_training_start(self) -> None:
        self.start = perf_counter()

    def _on_rollout_start(self) -> None:
        "Called after every update."
        if self.num_timesteps < self.next:
            return
        self.next, pause = self.num_timesteps + self.race.every, perf_counter()
        self.seconds, self.transitions = pause - self.start - self.paused, self.num_timesteps
        self.late = self.seconds > self.race.seconds
        mean_return, _ = evaluate_policy(self.model, self.fresh, 100, deterministic=False, warn=False)
        self.won = mean_return >= self.race.bar
        self.paused += perf_counter() - pause

    def _on_step(self) -> bool:
        return not (self.won or self.late)


def theirs(race: Race, make: Callable[[int], BaseAlgorithm], seed: int) -> Finish:
    "The same of the peer that `make` returns."
    bar, model = Bar(race, seed), make(seed)
    model.learn(race.budget, callback=bar)
    natural = hasattr(model, "n_critic_updates")
    epochs = model.n_critic_updates if natural else model.n_epochs
    rows = model.n_envs * model.n_steps
    steps = gradient_steps(bar.transitions // rows, epochs, rows, model.batch_size, natural)
    return Finish(bar.seconds, bar.transitions, steps, bar.won)


def line(name: str, runs: list[Finish], first: float) -> list[str]:
    "Medians of those that got there, the range of their seconds, and the ratio to `first`."
    won = [finish for finish in runs if finish.won]
    if not won:  # until the first of them gave up
        least = min(finish.seconds for finish in runs)
        late = f"over {least:.0f}", "", "", "", f"over {least / first:.1f}"
        return [name, f"0 of {len(runs)}", *late]
    seconds, transitions, steps, _ = zip(*won)
    spread = f"{median(seconds):.2f} ({min(seconds):.2f} to {max(seconds):.2f})"
    each = median(1000 * s / n for s, n in zip(seconds, steps))
    numbers = f"{median(transitions):.0f}", f"{median(steps):.0f}", f"{each:.2f}"
    return [name, f"{len(won)} of {len(runs)}", spread, *numbers, f"{median(seconds) / first:.1f}"]


def run(
    title: str,
    race: Race,
    candidates: dict[str, Callable[[int], Finish]],  # of a seed; the first is ours
    seeds: int,
    name: str | None,  # of the record; None: print only
) -> None:
    "Let the candidates take turns, seed by seed, and print the table."
    torch.set_num_threads(1)
    results = {who: [] for who in candidates}
    for seed in range(seeds):
        for who, candidate in candidates.items():
            results[who].append(candidate(seed))
            print(who, seed, results[who][-1], flush=True)
    first = median(x.seconds for x in next(iter(results.values())) if x.won)
    columns = [title, "seeds", f"seconds to {race.bar:g}", "transitions", "gradient steps",
               "ms a gradient step", "over po_book's"]
    rows = [line(who, runs, first) for who, runs in results.items()]
    for row in columns, *rows:
        print("{:40}{:>10}{:>24}{:>14}{:>16}{:>20}{:>16}".format(*row))
    if name:
        record(name, columns, rows)
