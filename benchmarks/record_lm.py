"""Training runs of the small language model, recorded for the chapters.

Run: python benchmarks/record_lm.py NAME [processes]

Writes results/NAME.csv, a row a score, and results/NAME.json, which says where, when
and with what it was made. Every run starts from the same fine-tuned model and is what
`po_book.train_lm.train_lm` logs; between two scores the other
columns are means. `peak_mb` is the most memory that the process held beyond its start.
"""

import sys
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from tempfile import TemporaryDirectory

import torch
from provenance import peak_mb, record

from po_book.language_model import char_tokenizer, load_lm, tiny_lm
from po_book.objective import (
    PRESETS,
    Aggregation,
    Clip,
    Group,
    InReward,
    NoReference,
    Objective,
)
from po_book.tasks import ChainAddition, sft, success_rate
from po_book.train_lm import LMConfig, train_lm

ADDITION = ChainAddition(3, 5)


@dataclass(frozen=True)
class Variant:
    "An objective and the settings beside it."

    objective: Objective
    config: LMConfig


@dataclass(frozen=True)
class Record:
    "A task, how many seeds, and the variants."

    task: ChainAddition
    seeds: int
    variants: dict[str, Variant]
    threads: int = 1    # of each run
    taught: ChainAddition = ADDITION  # what the model has seen solved before
    steps: int = 420    # of fine-tuning on it
    lr: float = 1e-3    # and its learning rate

    @property
    def start(self) -> str:
        return f"start: {self.steps} steps of sft on {self.taught}, rate {self.lr:g}"


def preset(name: str, **choices) -> Objective:
    return replace(PRESETS[name], **choices)


METHODS = LMConfig(steps=250, max_new_tokens=16, eval_every=10, eval_prompts=500)
HARD = replace(METHODS, steps=60, eval_samples=4, eval_prompts=200)
NAIVE = Objective(Group(), Clip(), NoReference(), Aggregation("sample"))
FILTER = replace(HARD, drop_truncated=True)
SOFT = replace(HARD, overlong_cache=4)
HIGHER = replace(NAIVE, trust=Clip(0.2, 0.28))
TOKEN = replace(HIGHER, aggregation=Aggregation("token"))
RECORDS = {
    "lm_methods": Record(ADDITION, 3, {
        "PPO": Variant(preset("rlhf-ppo"), METHODS),
        "RLOO": Variant(preset("rloo", trust=Clip()), METHODS),
        "GRPO": Variant(preset("grpo"), METHODS),
        "Dr. GRPO": Variant(preset("dr-grpo"), METHODS),
        "DAPO": Variant(preset("dapo"), METHODS),
    }),
    "grpo_long": Record(ADDITION, 3, {
        "GRPO": Variant(
            preset("grpo", kl=NoReference()), replace(METHODS, steps=700, eval_every=25)
        ),
    }, threads=2, steps=460, lr=5e-4),
    "lm_ablation": Record(ChainAddition(3, 7), 3, {
        "naive GRPO": Variant(NAIVE, HARD),
        "+ overlong filtering": Variant(NAIVE, FILTER),
        "+ clip-higher": Variant(HIGHER, FILTER),
        "+ soft penalty": Variant(HIGHER, SOFT),
        "+ token-level loss": Variant(TOKEN, SOFT),
        "+ dynamic sampling": Variant(
            replace(TOKEN, advantage=Group(informative_only=True)), SOFT
        ),
    }),
    "rlhf_beta": Record(ADDITION, 3, {
        f"β = {beta}": Variant(
            preset("rlhf-ppo", kl=InReward(beta)), replace(METHODS, steps=40)
        )
        for beta in (0.0, 0.1, 1.0)
    }),
}
NOT_MEANS = {"step", "seconds", "success"}


def teach(asked: Record, folder: str) -> float:
    "Save the model that every run starts from; its success on held-out problems."
    tokenizer, prompts = char_tokenizer(), asked.taught.prompts(20_000)
    model, order = tiny_lm(tokenizer), torch.Generator().manual_seed(0)
    solutions = [asked.taught.solution(prompt) for prompt in prompts]
    sft(model, tokenizer, prompts, solutions, asked.steps, lr=asked.lr, generator=order)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    problems = asked.task.prompts(500, held_out=True)
    return success_rate(model, tokenizer, asked.task, problems, 16, order, samples=4)


def scores(name: str, variant: str, seed: int, folder: str) -> list[dict]:
    "One run: a row a score."
    torch.set_num_threads(RECORDS[name].threads)
    wanted, task = RECORDS[name].variants[variant], RECORDS[name].task
    model, tokenizer = load_lm(folder)
    before = peak_mb()
    objective, config = wanted.objective, wanted.config
    run = train_lm(
        model, tokenizer, task, None, objective, config, seed=seed, device="cpu", progress=False
    )
    rows, window = [], []
    for row in run.log:
        window.append(row)
        if "success" not in row:
            continue
        means = {
            key: sum(r[key] for r in window) / len(window) for key in row if key not in NOT_MEANS
        }
        facts = {"variant": variant, "seed": seed, "steps": row["step"],
                 "seconds": row["seconds"], "success": row["success"]}
        rows.append(facts | means | {"peak_mb": peak_mb() - before})
        window = []
    return rows


def runs(name: str, processes: int, folder: str) -> Iterator[list[dict]]:
    "The scores of every variant and seed; each in a process of its own, for its memory."
    wanted = list(product(RECORDS[name].variants, range(RECORDS[name].seeds)))
    context = get_context("spawn")
    with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
        jobs = [pool.submit(scores, name, *x, folder) for x in wanted]
        for job, (variant, seed) in zip(jobs, wanted):
            rows = job.result()
            print(variant, seed, f"{rows[-1]['success']:.3f}", flush=True)
            yield rows


def settings(name: str) -> dict[str, dict]:
    "What the runs were made with, to be compared with what the code would do now."
    return {variant: asdict(x) for variant, x in RECORDS[name].variants.items()}


def main(name: str, processes: str = "1") -> None:
    torch.set_num_threads(1)
    with TemporaryDirectory() as folder:
        start = f"{RECORDS[name].start}, success {teach(RECORDS[name], folder):.3f}"
        rows = [row for run in runs(name, int(processes), folder) for row in run]
    columns = list(dict.fromkeys(key for row in rows for key in row))
    table = [
        [x if isinstance(x, str | int) else f"{x:.4g}" for x in map(row.get, columns, [""] * 99)]
        for row in rows
    ]
    seeds = f"seeds 0 to {RECORDS[name].seeds - 1}"
    record(name, columns, table, seeds=seeds, start=start, settings=settings(name))


if __name__ == "__main__":
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in RECORDS:
        sys.exit(f"{__doc__}\nNAME is one of: {', '.join(RECORDS)}")
    main(*sys.argv[1:])
