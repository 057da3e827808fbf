"""What processes cost: environments in their own, and an exchange between two.

Run: python benchmarks/distributed.py [turns] [--record]

First eight environments that compute for a given time at every step, in a loop and in
processes; the two take turns, so that a busy moment of the machine hits both. Then
all-reduce between two processes on this machine (gloo), of vectors of several lengths.
Environments are given by the median, exchanges by the fastest of twenty a turn.
"""

import sys
from functools import partial
from os import cpu_count, getloadavg
from statistics import median
from time import perf_counter, process_time

import gymnasium as gym
import numpy as np
import torch
import torch.distributed as dist
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from provenance import record

from po_book.processes import launch

N, STEPS = 8, 40
TIMES = 0, 100, 300, 1000, 3000  # µs
LENGTHS = 1, 1000, 10_000, 100_000, 1_000_000, 4_000_000


class Busy(gym.Env):
    "Computes for some seconds of processor time at every step."

    observation_space, action_space = gym.spaces.Box(0, 1, (4,)), gym.spaces.Discrete(2)

    def __init__(self, seconds: float):
        self.seconds, self.seen = seconds, np.zeros(4, np.float32)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return self.seen, {}

    def step(self, action):
        end = process_time() + self.seconds
        while process_time() < end:
            pass
        return self.seen, 0.0, False, False, {}


def step_time(env: VectorEnv) -> float:
    "Milliseconds of a step of all environments."
    actions, start = np.zeros(N, int), perf_counter()
    for _ in range(STEPS):
        env.step(actions)
    return 1e3 * (perf_counter() - start) / STEPS


def environments(turns: int) -> tuple[list[str], list[list]]:
    "A table of both vectors, a row for each time that a step computes."
    columns, rows = ["step, µs", "loop, ms", "processes, ms", "loop over processes"], []
    for micros in TIMES:
        makers = [partial(Busy, 1e-6 * micros)] * N
        vectors = SyncVectorEnv(makers), AsyncVectorEnv(makers)
        for env in vectors:
            env.reset(seed=0)
            step_time(env)
        times = [[step_time(env) for env in vectors] for _ in range(turns)]
        loop, processes = map(median, zip(*times))
        ratio = median(a / b for a, b in times)
        rows.append([micros, *(f"{x:.2f}" for x in (loop, processes, ratio))])
        for env in vectors:
            env.close()
    return columns, rows


def exchange(turns: int) -> list[float]:
    "Seconds of an all-reduce of each length, in this process."
    found = []
    for length in LENGTHS:
        x, times = torch.ones(length), []
        for _ in range(20 * turns + 1):
            start = perf_counter()
            dist.all_reduce(x)
            times.append(perf_counter() - start)
        found.append(min(times[1:]))  # the first makes connections
    return found


def exchanges(turns: int) -> tuple[list[str], list[list]]:
    "A table of what an exchange between two processes takes."
    seconds, _ = launch(exchange, 2, turns)
    columns = ["numbers", "ms", "GB/s"]
    pairs = zip(LENGTHS, seconds)
    return columns, [[n, f"{1e3 * s:.3f}", f"{4e-9 * n / s:.3f}"] for n, s in pairs]


def main(turns: int, recording: bool) -> None:
    for name, make in ("async_env", environments), ("all_reduce", exchanges):
        columns, rows = make(turns)
        for row in columns, *rows:
            print("".join(f"{x:>22}" for x in row))
        if recording:
            load = f"load average {getloadavg()[0]:.1f} of {cpu_count()} cores"
            record(name, columns, rows, turns=f"{turns} turns", load=load)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    main(int(words[0]) if words else 9, "--record" in sys.argv)
