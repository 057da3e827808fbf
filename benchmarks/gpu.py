"""All that needs a card, in one command: cells, tests, CartPole, language models.

Run: python benchmarks/gpu.py [--device cpu] [--small] [--minutes 9] [--out results]

No network is needed. First every chapter with a `#| cuda` cell, with these cells, and
every test that needs a card; then the tables of `cartpole_gpu.py` and those of `lm_gpu.py`.
Each has a share of the time, and says where that was too little. Each line is written when
it is there, so what was measured before an interruption is kept. `--device cpu --small`
runs the same script where there is no card, in a minute: there, tests that need one are
skipped, and the cells are those of a chapter without.
"""

import argparse
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from time import perf_counter

import torch
from cartpole_gpu import Plan, keep
from cartpole_gpu import main as cartpole
from lm_gpu import main as language_models
from provenance import ROOT


def chapters(plan: Plan) -> list[Path]:
    "Notebooks with cells for a card; without one a short chapter stands for them."
    if plan.device == "cpu":
        return [ROOT / "nbs" / "11_checks.ipynb"]
    pages = sorted((ROOT / "nbs").glob("*.ipynb"))
    return [page for page in pages if "#| cuda" in page.read_text(encoding="utf-8")]


def commands(plan: Plan) -> Iterator[tuple[str, list[str]]]:
    "What is checked, and how."
    tool = Path(sys.executable).parent / "nbdev_test"
    for page in chapters(plan):
        yield page.name, [str(tool), "--path", str(page), "--flags", "cuda"]
    files = [str(x) for x in (ROOT / "tests").glob("test_*.py") if "mark.cuda" in x.read_text()]
    yield "tests that need a card", [sys.executable, "-m", "pytest", "-m", "cuda", *files]


def checks(plan: Plan) -> Iterator[list[str]]:
    "A line for every command: what, seconds, how it ended."
    for what, command in commands(plan):
        start = perf_counter()
        left = max(1.0, min(600.0, plan.deadline - start))
        try:
            done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=left)
            said = done.stdout + done.stderr
            counts = re.findall(r"\d+ (?:passed|failed|skipped|error)", said)
            result = ", ".join(counts) or ("passed" if done.returncode == 0 else "failed")
            if done.returncode:
                print(said[-4000:], file=sys.stderr)
        except subprocess.TimeoutExpired:
            result = "not finished in time"
        yield [what, f"{perf_counter() - start:.0f}", result]


def main(plan: Plan) -> bool:
    "Whether all checks passed."
    part = plan.share(0.4)
    rows = keep(part, "gpu_checks", ["what", "seconds", "result"], checks(part))
    cartpole(plan.share(0.35))
    language_models(plan)
    return not any(re.search("failed|error|not finished", result) for *_, result in rows)


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--small", action="store_true", help="few environments and seeds")
    parser.add_argument("--minutes", type=float, default=9.0, help="no line is begun later")
    parser.add_argument("--out", type=Path, default=ROOT / "results")
    asked = parser.parse_args()
    if asked.device == "cuda" and not torch.cuda.is_available():
        sys.exit("no CUDA device here; --device cpu --small shows what would be done")
    until = perf_counter() + 60 * asked.minutes
    sys.exit(not main(Plan(asked.device, asked.small, asked.out, until)))
