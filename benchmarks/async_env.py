"""Environments in one process beside environments in processes of their own.

Run: python benchmarks/async_env.py [turns] [--record]

Eight environments that compute for a given time at every step. The two vectors take
turns, so that a busy moment of the machine hits both; a number is the median of them.
"""

import sys
from functools import partial
from os import cpu_count
from statistics import median
from time import perf_counter, process_time

import gymnasium as gym
import numpy as np
from gymnasium.vector import AsyncVectorEnv, SyncVectorEnv, VectorEnv
from provenance import record

N, STEPS = 8, 40
TIMES = 0, 100, 300, 1000, 3000  # µs


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


def main(turns: int, recording: bool) -> None:
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
    for row in columns, *rows:
        print("".join(f"{x:>22}" for x in row))
    if recording:
        record("async_env", columns, rows, environments=N, turns=turns, cores=cpu_count())


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    main(int(words[0]) if words else 9, "--record" in sys.argv)
