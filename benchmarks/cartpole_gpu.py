"""CartPole on a GPU, from 64 to 65,536 environments: eager, compiled, recorded.

Run: python benchmarks/cartpole_gpu.py [--device cpu] [--small] [--record]

Two tables, kept after every line. Steps a second: transitions over seconds of whole
iterations of PPO (rollout, advantages, gradient steps), best of a few, after the first
ones in which a backend prepares itself. Seconds to 475: preparation included, sampled
actions, 100 fresh episodes, asked after every iteration; evaluations are not counted.
`--device cpu` has the eager path alone, and `--small` few environments and seeds: to see
that the script works.
"""

import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from statistics import median
from time import perf_counter

import torch
from provenance import ROOT, record

from po_book.train import PPOConfig, default_config, train

ENV = "po_book/CartPole-v1"


@dataclass(frozen=True)
class Plan:
    "What is measured, and where it is kept."

    device: str
    small: bool = False
    folder: Path | None = None  # none: the tables are only printed
    deadline: float = inf       # of `perf_counter`; no line is begun after it

    @property
    def place(self) -> str:
        "How tables call the device."
        return "gpu" if self.device == "cuda" else self.device

    def share(self, part: float) -> "Plan":
        "The same with this share of the time that is left."
        now = perf_counter()
        return replace(self, deadline=now + part * (self.deadline - now))

    @property
    def backends(self) -> list[str]:
        return ["eager"] if self.device == "cpu" else ["recorded", "compiled", "eager"]

    @property
    def sizes(self) -> list[int]:
        return [64] if self.small else [64, 256, 1024, 4096, 16_384, 65_536]

    @property
    def seeds(self) -> int:
        return 1 if self.small else 10


def config(n: int) -> PPOConfig:
    "Thirty-two steps of everyone an iteration, four epochs of eight minibatches."
    more = dict(n_envs=n, n_steps=32, epochs=4, minibatch=4 * n, total_steps=32 * n * 12)
    return replace(default_config("ppo", ENV), **more)


def rate(n: int, device: str, backend: str) -> float:
    "Million transitions a second, the best of the last iterations."
    times = []

    def clock(row: dict[str, float]) -> None:
        times.append(perf_counter())

    train("ppo", ENV, device=device, backend=backend, config=config(n), progress=False, report=clock)
    spans = [b - a for a, b in zip(times, times[1:])]
    return 32 * n / min(spans[4:]) / 1e6


def solve(n: int, device: str, backend: str, seed: int) -> float | None:
    "Seconds to 475; None if it is not reached in two hundred iterations."
    wanted = replace(config(n), total_steps=32 * n * 200, eval_every=1, solved_at=475.0)
    asked = dict(device=device, backend=backend, config=wanted, progress=False)
    last = train("ppo", ENV, seed=seed, **asked).log[-1]
    return last["seconds"] if last["mean_return"] >= 475 else None


def tried(measure: Callable[..., float | None], *args: object) -> str:
    "The number as it stands in a table; an error is a line too, and the next is measured."
    try:
        value = measure(*args)
    except Exception as error:  # whatever a card, a driver or a compiler has to say
        return f"failed: {type(error).__name__}: {error}".splitlines()[0]
    return "" if value is None else f"{value:.2f}"


def rates(plan: Plan) -> Iterator[list[str]]:
    "A line for every number of environments and backend."
    for n in plan.sizes:
        for backend in plan.backends:
            yield [str(n), backend, tried(rate, n, plan.device, backend)]


def solutions(plan: Plan) -> Iterator[list[str]]:
    "A line for every run to 475; numbers of environments and seeds take turns."
    for backend in plan.backends:
        for seed in range(plan.seeds):
            for n in plan.sizes[1:3] or plan.sizes:
                yield [str(n), backend, str(seed), tried(solve, n, plan.device, backend, seed)]


def put(
    plan: Plan, name: str, columns: list[str], rows: list[list[str]], row: list[str], **more: str
) -> None:
    "Print a line, and record it below those before it."
    print(*row, sep=" | ", flush=True)
    rows.append(row)
    if plan.folder:
        record(name, columns, rows, plan.folder, **more)


def keep(
    plan: Plan, name: str, columns: list[str], lines: Iterator[list[str]], **more: str
) -> list[list[str]]:
    "Print and record line by line, until the lines or the time are used up."
    rows = []
    while perf_counter() < plan.deadline and (row := next(lines, None)):
        put(plan, name, columns, rows, row, **more)
        torch.cuda.empty_cache()
    if perf_counter() >= plan.deadline:
        print(f"{name}: the time for it was up after {len(rows)} lines")
    return rows


def main(plan: Plan) -> None:
    keep(plan, "cartpole_gpu", ["environments", "backend", "million steps/s"], rates(plan))
    columns = ["environments", "backend", "seed", "seconds to 475"]
    times = keep(plan, "cartpole_gpu_solved", columns, solutions(plan))
    for n, backend in dict.fromkeys((n, backend) for n, backend, *_ in times):
        runs = [x for *which, _, x in times if which == [n, backend]]
        solved = sorted(float(x) for x in runs if x[:1].isdigit())
        spread = f"{median(solved):.2f} ({solved[0]:.2f} to {solved[-1]:.2f}) s" if solved else ""
        print(f"{n} {backend}: {len(solved)} of {len(runs)} solved, {spread}")


if __name__ == "__main__":
    words = sys.argv[1:]
    folder = ROOT / "results" if "--record" in words else None
    main(Plan("cpu" if "cpu" in words else "cuda", "--small" in words, folder))
