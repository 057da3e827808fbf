"""CartPole on a GPU, from 64 to 65,536 environments: eager, compiled, recorded.

Run: python benchmarks/cartpole_gpu.py [--record] [--device cpu]

Two tables. Steps a second: transitions over seconds of whole iterations of PPO (rollout,
advantages, gradient steps), best of a few, after the first ones in which a backend
prepares itself. Seconds to 475: preparation included, sampled actions, 100 fresh
episodes, asked after every iteration; evaluations are not counted. `--device cpu` runs the
eager path alone, on small N, to see that the script works.
"""

import sys
from dataclasses import replace
from time import perf_counter

import torch
from provenance import record

from po_book.train import PPOConfig, train

ENV = "po_book/CartPole-v1"


def config(n: int) -> PPOConfig:
    "Thirty-two steps of everyone an iteration, four epochs of eight minibatches."
    return PPOConfig(n_envs=n, n_steps=32, epochs=4, minibatch=4 * n, total_steps=32 * n * 12)


def rate(n: int, device: str, backend: str) -> float:
    "Million transitions a second, the best of the last iterations."
    times = []

    def clock(row: dict[str, float]) -> None:
        times.append(perf_counter())

    train("ppo", ENV, device=device, backend=backend, config=config(n), progress=False, report=clock)
    spans = [b - a for a, b in zip(times, times[1:])]
    return 32 * n / min(spans[4:]) / 1e6


def seconds_to_475(n: int, device: str, backend: str, seeds: int = 3) -> str:
    "Median and range over seeds, and how many got there."
    wanted = replace(config(n), total_steps=32 * n * 200, eval_every=1, solved_at=475.0)
    asked = dict(device=device, backend=backend, config=wanted, progress=False)
    rows = [train("ppo", ENV, seed=seed, **asked).log[-1] for seed in range(seeds)]
    times = sorted(row["seconds"] for row in rows if row["mean_return"] >= 475)
    if not times:
        return f"0 of {seeds}"
    middle = times[len(times) // 2]
    return f"{middle:.2f} ({times[0]:.2f} to {times[-1]:.2f}), {len(times)} of {seeds}"


def main(device: str, recording: bool) -> None:
    gpu = device != "cpu"
    backends = ["eager", "compiled", "recorded"] if gpu else ["eager"]
    sizes = [64, 256, 1024, 4096, 16_384, 65_536] if gpu else [64, 256]
    rows = []
    for n in sizes:
        for backend in backends:
            row = [str(n), backend, f"{rate(n, device, backend):.2f}", seconds_to_475(n, device, backend)]
            print(*row, sep=" | ", flush=True)
            rows.append(row)
            torch.cuda.empty_cache()
    if recording:
        columns = ["environments", "backend", "million steps/s", "seconds to 475"]
        record("cartpole_gpu", columns, rows)


if __name__ == "__main__":
    main("cpu" if "cpu" in sys.argv[1:] else "cuda", "--record" in sys.argv[1:])
