"""Generalised advantage estimation beside its peers, all in one process.

Run: python benchmarks/gae.py [turns] [--record]

Each row is the whole computation, TD errors included, from the same rewards, values and
flags. The candidates take turns of five calls, so that a busy moment of the machine
hits all of them. The minimum is the time without disturbance, the median the time to
expect.
"""

import sys
from collections.abc import Callable
from statistics import median
from time import perf_counter

import gymnasium
import torch
from provenance import record
from stable_baselines3.common.buffers import RolloutBuffer

from po_book.advantage import gae, td_error

SHAPES = [(2048, 64), (128, 4096)]
GAMMA, LAM = 0.99, 0.95


def textbook(rewards, values, next_values, terminated, done):
    "The recursion as it is usually written, everything inside the loop."
    advantages, last = torch.zeros_like(rewards), torch.zeros_like(rewards[0])
    for t in reversed(range(len(rewards))):
        follows = GAMMA * next_values[t] * ~terminated[t]
        delta = rewards[t] + follows - values[t]
        advantages[t] = last = delta + GAMMA * LAM * ~done[t] * last
    return advantages


def lean_loop(rewards, values, next_values, terminated, done):
    "The chapter's recurrence step by step, all that needs no loop taken out of it."
    delta = td_error(rewards, values, next_values, terminated, GAMMA)
    decay = GAMMA * LAM * (~done).to(delta.dtype)
    advantages = [delta[-1]]
    for t in reversed(range(len(delta) - 1)):
        advantages.append(delta[t] + decay[t] * advantages[-1])
    return torch.stack(advantages[::-1])


def sb3(rewards, values, next_values, terminated, done) -> Callable:
    "The numpy loop of stable-baselines3, its buffer filled beforehand."
    T, N = rewards.shape
    box, two = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Discrete(2)
    buffer = RolloutBuffer(T, box, two, "cpu", LAM, GAMMA, N)
    # it has no next values: a truncation is paid for in the reward instead
    truncated = done & ~terminated
    truncated[-1] = False
    buffer.rewards[:] = rewards + GAMMA * next_values * truncated
    buffer.values[:] = values
    buffer.episode_starts[1:] = done[:-1]
    last_values, last_done = next_values[-1], terminated[-1].numpy()

    def compute():
        buffer.compute_returns_and_advantage(last_values, last_done)
        return torch.from_numpy(buffer.advantages)

    return compute


def rollout(T: int, N: int) -> tuple[torch.Tensor, ...]:
    "Random rewards and values, about one step in fifty the last of its episode."
    rewards, values, last = torch.randn(3, T, N)
    terminated, truncated = torch.rand(2, T, N) < 0.01
    done = terminated | truncated
    next_values = torch.where(done, last, torch.cat([values[1:], last[-1:]]))
    return rewards, values, next_values, terminated, done


def measure(candidates: dict[str, Callable], turns: int) -> dict[str, list[float]]:
    "Milliseconds of single calls, five a turn after one that finds the caches cold."
    times = {name: [] for name in candidates}
    for _ in range(turns):
        for name, compute in candidates.items():
            compute()
            for _ in range(5):
                start = perf_counter()
                compute()
                times[name].append(1e3 * (perf_counter() - start))
    return times


def main(turns: int, recording: bool) -> None:
    torch.manual_seed(0)
    threads = f"{torch.get_num_threads()} threads"
    print(f"torch {torch.__version__}, {threads}, float32, {5 * turns} calls each\n")
    columns = ["[T, N]", "GAE", "ms, min", "ms, median", "min over po_book's", "error"]
    rows = []
    for T, N in SHAPES:
        steps = rollout(T, N)
        candidates = {
            "torch loop, textbook": lambda: textbook(*steps),
            "torch loop, lean": lambda: lean_loop(*steps),
            "stable-baselines3, numpy": sb3(*steps),
            "po_book.advantage.gae": lambda: gae(*steps, GAMMA, LAM),
        }
        exact = textbook(*(x.double() if x.is_floating_point() else x for x in steps))
        times = measure(candidates, turns)
        ours = min(times["po_book.advantage.gae"])
        for name, ms in times.items():
            error = (candidates[name]() - exact).abs().max() / exact.abs().max()
            numbers = f"{min(ms):.2f}", f"{median(ms):.2f}", f"{min(ms) / ours:.1f}"
            rows.append([f"[{T}, {N}]", name, *numbers, f"{error:.0e}"])
    for row in columns, *rows:
        print(f"{row[0]:>12}  {row[1]:26}" + "".join(f"{x:>20}" for x in row[2:]))
    if recording:
        record("gae", columns, rows, threads=threads)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    main(int(words[0]) if words else 20, "--record" in sys.argv)
