"""Training runs of the small language model, recorded for the chapters.

Run: python benchmarks/record_lm.py NAME [processes [VARIANT]]

Writes results/NAME.csv, a row for every look at the held-out problems, and
results/NAME.json, which says where, when and with what it was made. Every run starts
from the same fine-tuned model, whose success is the row of step 0, and is what
`po_book.train_lm.train_lm` logs; between two looks the other columns are means.
`peak_mb` is the most memory that the process held beyond its start. With a variant, only
that one is run, and the rows of the others stay.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from engine import EightBits
from lm_start import fine_tuned
from provenance import peak_mb
from recording import Record, asked

from po_book.credit import Group, Informative
from po_book.lm_learner import LMConfig, tiny_config
from po_book.objective import PRESETS, Objective
from po_book.pretrained import load_lm, save_lm
from po_book.reward_models import RewardModel, fit_reward_model, pair_accuracy
from po_book.rollout import spawn_seed
from po_book.sampling import sample
from po_book.tasks import ChainAddition, pass_at_k, verdicts
from po_book.terms import Aggregation, Banded, InReward, NoReference, Truncated
from po_book.tokens import Clip
from po_book.train_lm import train_lm

ADDITION = ChainAddition(3, 5)


@dataclass(frozen=True)
class Variant:
    "An objective and the settings beside it."

    objective: Objective
    config: LMConfig
    sampler: Callable | None = None  # of the model and the tokenizer; None: the learner


@dataclass(frozen=True)
class LMRecord(Record[Variant]):
    "Runs on a task that start from one model."

    threads: int = 1    # of each run
    taught: ChainAddition = ADDITION  # what the model has seen solved before
    steps: int = 460    # of fine-tuning on it
    lr: float = 5e-4    # and its learning rate
    compared: int = 0   # problems whose answers a reward model saw compared; 0: a rule pays

    @property
    def start(self) -> str:
        return f"start: {self.steps} steps of sft on {self.taught}, rate {self.lr:g}"


def preset(name: str, **choices) -> Objective:
    return replace(PRESETS[name], **choices)


METHODS = tiny_config(steps=60, max_new_tokens=24, eval_every=10, eval_prompts=500)
LONG = tiny_config(
    steps=700, max_new_tokens=16, eval_every=25, eval_prompts=500, overlong_cache=0
)
SHORT = replace(METHODS, steps=40)
HALF = replace(METHODS, prompts=16, steps=40, eval_every=20)
HARD = replace(METHODS, steps=50, eval_samples=4, eval_prompts=200)
GRPO = preset("grpo", kl=NoReference())
NAIVE = Objective(Group(), Clip(), NoReference(), Aggregation("sample"))
FILTER = replace(HARD, drop_truncated=True)
SOFT = replace(FILTER, overlong_cache=4)
HIGHER = replace(NAIVE, trust=Clip(0.2, 0.28))
TOKEN = replace(HIGHER, aggregation=Aggregation("token"))
RECORDS = {
    "lm_methods": LMRecord(ADDITION, 8, {
        "PPO": Variant(preset("rlhf-ppo"), METHODS),
        "RLOO": Variant(preset("rloo", trust=Clip()), METHODS),
        "GRPO": Variant(preset("grpo"), METHODS),
        "Dr. GRPO": Variant(preset("dr-grpo"), METHODS),
        # Fewer steps, for as many samples: it draws groups again.
        "DAPO": Variant(preset("dapo"), replace(METHODS, steps=51)),
    }),
    "grpo_long": LMRecord(ADDITION, 3, {
        "GRPO": Variant(GRPO, LONG),
    }, threads=2),
    "lm_ablation": LMRecord(ChainAddition(3, 7), 8, {
        "naive GRPO": Variant(NAIVE, HARD),
        "+ overlong filtering": Variant(NAIVE, FILTER),
        "+ clip-higher": Variant(HIGHER, FILTER),
        "+ soft penalty": Variant(HIGHER, SOFT),
        "+ token-level loss": Variant(TOKEN, SOFT),
        "+ dynamic sampling": Variant(
            replace(TOKEN, selection=Informative()), SOFT
        ),
    }),
    "lm_after_dapo": LMRecord(ADDITION, 8, {
        # Fewer steps, for as many samples: it draws groups again.
        "DAPO": Variant(preset("dapo"), replace(HALF, steps=30, eval_every=15)),
        "GRPO": Variant(GRPO, HALF),
        "REINFORCE++": Variant(preset("reinforce++", kl=NoReference()), HALF),
        "MaxRL": Variant(preset("maxrl", trust=Clip()), HALF),
        "GSPO": Variant(preset("gspo"), HALF),
        "CISPO": Variant(preset("cispo"), HALF),
        "SAPO": Variant(preset("sapo"), HALF),
        "DPPO": Variant(preset("dppo"), HALF),
        "GRPO, 8 bits": Variant(GRPO, HALF, EightBits),
        "GRPO, 8 bits, truncated": Variant(replace(GRPO, correction=Truncated()), HALF, EightBits),
        "GRPO, 8 bits, band": Variant(replace(GRPO, correction=Banded()), HALF, EightBits),
    }),
    "rlhf_beta": LMRecord(ADDITION, 8, {
        f"β = {beta}": Variant(preset("rlhf-ppo", kl=InReward(beta)), SHORT)
        for beta in (0.0, 0.1, 1.0)
    }),
    "rlhf_learnt": LMRecord(ADDITION, 8, {
        f"β = {beta}": Variant(preset("rlhf-ppo", kl=InReward(beta)), SHORT)
        for beta in (0.0, 0.1, 1.0)
    }, compared=1000),
}
LATEST = {"step", "seconds"}


def teach(wanted: LMRecord, folder: Path) -> str:
    "Save the model that every run starts from, and a reward model; how good they are."
    order = torch.Generator().manual_seed(0)
    model, tokenizer = fine_tuned(wanted.taught, wanted.steps, wanted.lr, order)
    save_lm(folder, model, tokenizer)
    if not wanted.compared:
        return wanted.start
    judge, held_out = RewardModel(model, tokenizer), wanted.place.prompts(300, held_out=True)
    pairs = compared(model, tokenizer, wanted.place, wanted.place.prompts(wanted.compared), order)
    fit_reward_model(judge, *pairs, steps=300, lr=3e-4, generator=order)
    scores = torch.tensor([judge.reward(pairs[0], x) for x in pairs[1:]])
    judge.head.weight.data /= scores.std()  # now their deviation is one
    torch.save(judge.state_dict(), folder / "judge.pt")
    prompts, *answers = compared(model, tokenizer, wanted.place, held_out, order)
    right = pair_accuracy(*(torch.tensor(judge.reward(prompts, x)) for x in answers))
    return f"{wanted.start}; {len(pairs[0])} pairs for the reward model, accuracy {right:.2f}"


def compared(
    model, tokenizer, task: ChainAddition, prompts: list[str], order: torch.Generator
) -> tuple[list[str], list[str], list[str]]:
    "Prompts with pairs of the model's own answers, a right one and then a wrong one."
    texts, pairs = sample(model, tokenizer, prompts, 8, 24, generator=order).texts(tokenizer), []
    for i, prompt in enumerate(prompts):
        answers = texts[8 * i : 8 * i + 8]
        right = [x for x in answers if task.verify(prompt, x)]
        wrong = [x for x in answers if x not in right]
        pairs += [(prompt, *pair) for pair in zip(right, wrong)]
    return tuple(map(list, zip(*pairs)))


def first(variant: Variant, task: ChainAddition, model, tokenizer, seed: int) -> float:
    "Success before the first step, on the problems that the run is scored on."
    config, draws = variant.config, torch.Generator()
    draws.manual_seed(spawn_seed(seed, "evaluation", 0))
    prompts = list(dict.fromkeys(task.prompts(config.eval_prompts, seed=seed, held_out=True)))
    how = config.eval_samples, config.max_new_tokens, draws
    return pass_at_k(verdicts(model, tokenizer, task, prompts, *how)).mean


def looks(name: str, folder: Path, variant: str, seed: int) -> list[dict]:
    "One run: a row for every time that success was looked at."
    torch.set_num_threads(RECORDS[name].threads)
    wanted, task = RECORDS[name].variants[variant], RECORDS[name].place
    model, tokenizer = load_lm(folder)
    reward, who = None, {"variant": variant, "seed": seed}
    if RECORDS[name].compared:
        judge = RewardModel(model, tokenizer)
        judge.load_state_dict(torch.load(folder / "judge.pt", weights_only=True))
        reward = judge.reward
    rows = [who | {"steps": 0, "success": first(wanted, task, model, tokenizer, seed)}]
    before, window = peak_mb(), []
    objective, config = wanted.objective, wanted.config
    run = train_lm(
        model, tokenizer, task, reward, objective, config, seed=seed, device="cpu",
        progress=False, sampler=wanted.sampler and wanted.sampler(model, tokenizer),
    )
    for row in run.log:
        window.append(row)
        if "success" not in row:
            continue
        every = {key: [r[key] for r in window if key in r] for key in row if key not in LATEST}
        means = {key: sum(xs) / len(xs) for key, xs in every.items()}
        facts = {"steps": row["step"], "seconds": row["seconds"]}
        rows.append(who | facts | means | {"peak_mb": peak_mb() - before})
        window = []
    return rows


def main(name: str, processes: int, variant: str | None = None) -> None:
    torch.set_num_threads(1)
    wanted = RECORDS[name].only(variant) if variant else RECORDS[name]
    with TemporaryDirectory() as folder:
        start = teach(wanted, Path(folder))
        runs = wanted.runs(partial(looks, name, Path(folder)), processes)
        write = wanted.add if variant else wanted.write
        write(name, [row for run in runs for row in run], start=start)


if __name__ == "__main__":
    main(*asked(__doc__, RECORDS))
