"""Training runs of the small language model, recorded for the chapters.

Run: python benchmarks/record_lm.py NAME [processes]

Writes results/NAME.csv, a row for every look at the held-out problems, and
results/NAME.json, which says where, when and with what it was made. Every run starts
from the same fine-tuned model and is what `po_book.train_lm.train_lm` logs; between two
looks the other columns are means. `peak_mb` is the most memory that the process held
beyond its start.
"""

from dataclasses import dataclass, replace
from functools import partial
from tempfile import TemporaryDirectory

import torch
from provenance import peak_mb
from recording import Record, asked

from po_book.credit import Group, Informative
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.lm_learner import LMConfig, tiny_config
from po_book.objective import PRESETS, Objective
from po_book.pretrained import load_lm
from po_book.tasks import ChainAddition, sft, success_rate
from po_book.terms import Aggregation, InReward, NoReference
from po_book.tokens import Clip
from po_book.train_lm import train_lm

ADDITION = ChainAddition(3, 5)


@dataclass(frozen=True)
class Variant:
    "An objective and the settings beside it."

    objective: Objective
    config: LMConfig


@dataclass(frozen=True)
class LMRecord(Record[Variant]):
    "Runs on a task that start from one model."

    threads: int = 1    # of each run
    taught: ChainAddition = ADDITION  # what the model has seen solved before
    steps: int = 420    # of fine-tuning on it
    lr: float = 1e-3    # and its learning rate

    @property
    def start(self) -> str:
        return f"start: {self.steps} steps of sft on {self.taught}, rate {self.lr:g}"


def preset(name: str, **choices) -> Objective:
    return replace(PRESETS[name], **choices)


METHODS = tiny_config(
    steps=250, max_new_tokens=16, eval_every=10, eval_prompts=500, overlong_cache=0
)
HARD = replace(METHODS, steps=60, eval_samples=4, eval_prompts=200)
NAIVE = Objective(Group(), Clip(), NoReference(), Aggregation("sample"))
FILTER = replace(HARD, drop_truncated=True)
SOFT = replace(HARD, overlong_cache=4)
HIGHER = replace(NAIVE, trust=Clip(0.2, 0.28))
TOKEN = replace(HIGHER, aggregation=Aggregation("token"))
RECORDS = {
    "lm_methods": LMRecord(ADDITION, 3, {
        "PPO": Variant(preset("rlhf-ppo"), METHODS),
        "RLOO": Variant(preset("rloo", trust=Clip()), METHODS),
        "GRPO": Variant(preset("grpo"), METHODS),
        "Dr. GRPO": Variant(preset("dr-grpo"), METHODS),
        "DAPO": Variant(preset("dapo", overlong=0.0), METHODS),
    }),
    "grpo_long": LMRecord(ADDITION, 3, {
        "GRPO": Variant(
            preset("grpo", kl=NoReference()), replace(METHODS, steps=700, eval_every=25)
        ),
    }, threads=2, steps=460, lr=5e-4),
    "lm_ablation": LMRecord(ChainAddition(3, 7), 3, {
        "naive GRPO": Variant(NAIVE, HARD),
        "+ overlong filtering": Variant(NAIVE, FILTER),
        "+ clip-higher": Variant(HIGHER, FILTER),
        "+ soft penalty": Variant(HIGHER, SOFT),
        "+ token-level loss": Variant(TOKEN, SOFT),
        "+ dynamic sampling": Variant(
            replace(TOKEN, selection=Informative()), SOFT
        ),
    }),
    "rlhf_beta": LMRecord(ADDITION, 3, {
        f"β = {beta}": Variant(
            preset("rlhf-ppo", kl=InReward(beta)), replace(METHODS, steps=40)
        )
        for beta in (0.0, 0.1, 1.0)
    }),
}
NOT_MEANS = {"step", "seconds", "success"}


def teach(wanted: LMRecord, folder: str) -> float:
    "Save the model that every run starts from; its success on held-out problems."
    tokenizer, prompts = char_tokenizer(), wanted.taught.prompts(20_000)
    model, order = tiny_lm(tokenizer), torch.Generator().manual_seed(0)
    solutions = [wanted.taught.solution(prompt) for prompt in prompts]
    sft(model, tokenizer, prompts, solutions, wanted.steps, lr=wanted.lr, generator=order)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    problems = wanted.place.prompts(500, held_out=True)
    return success_rate(model, tokenizer, wanted.place, problems, 16, order, samples=4)


def looks(name: str, folder: str, variant: str, seed: int) -> list[dict]:
    "One run: a row for every time that success was looked at."
    torch.set_num_threads(RECORDS[name].threads)
    wanted, task = RECORDS[name].variants[variant], RECORDS[name].place
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


def main(name: str, processes: int) -> None:
    torch.set_num_threads(1)
    wanted = RECORDS[name]
    with TemporaryDirectory() as folder:
        start = f"{wanted.start}, success {teach(wanted, folder):.3f}"
        runs = wanted.runs(partial(looks, name, folder), processes)
        wanted.write(name, [row for run in runs for row in run], start=start)


if __name__ == "__main__":
    main(*asked(__doc__, RECORDS))
