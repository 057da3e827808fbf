"""How soon a small model learns to add: `train_lm` against TRL's `GRPOTrainer`, in one run.

Run: python benchmarks/lm_end_to_end.py [seeds] [threads] [--record]

Samples and seconds until a share of 500 held-out problems is solved. Both trainers start
from one fine-tuned model, ask the same prompts in the same order, and take the same steps:
AdamW, its rate, the bound of the gradient, and the objective of Dr. GRPO, whose advantages
and loss are the same numbers in both. GRPO's are not: TRL divides by the deviation of a
sample. Two things differ: each trainer draws its own samples, and TRL mixes completions
before it cuts a batch into minibatches, where `train_lm` mixes prompts. Both are looked at
after the same batches, by the same function, on the same problems; looks, imports, the
making of TRL's trainer and a first short run of each are not counted. The trainers take
turns, seed by seed, and who begins alternates.
"""

import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from datasets import Dataset
from grpo_step import QUIET, quiet
from lm_start import fine_tuned
from provenance import record
from torch.optim.lr_scheduler import LambdaLR
from transformers import PreTrainedModel, PreTrainedTokenizerBase, TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from trl import __version__ as trl_version

from po_book.lm_learner import LMConfig, tiny_config
from po_book.pretrained import load_lm, save_lm
from po_book.rewards import verifier
from po_book.tasks import ChainAddition, success_rate
from po_book.train_lm import train_lm

TASK, OBJECTIVE = ChainAddition(3, 5), "dr-grpo"
REWARD = verifier(TASK.verify)


@dataclass(frozen=True)
class Race:
    "What both trainers are asked."

    config: LMConfig
    lines: tuple[float, ...] = (0.6, 0.7, 0.8)  # success to be reached
    every: int = 10      # batches between looks
    problems: int = 500  # held-out ones of a look
    taught: int = 460    # steps of fine-tuning before
    rate: float = 5e-4   # learning rate of those


RACE = Race(tiny_config(steps=600, max_new_tokens=24, epochs=1, lr=1.5e-4))


@dataclass
class Run:
    "A trainer's way to the lines; its clock stands still during a look."

    race: Race
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    seed: int
    batches: int = 0
    seconds: float = 0.0
    reached: dict[float, tuple[int, float]] = field(default_factory=dict)

    def start(self) -> None:
        self.since = perf_counter()

    def batch_done(self) -> bool:
        "Whether a line is left to reach."
        self.seconds += perf_counter() - self.since
        self.batches += 1
        if self.batches % self.race.every == 0:
            self.look()
        self.start()
        return len(self.reached) < len(self.race.lines)

    def look(self) -> None:
        "Samples and seconds so far, for every line that is reached for the first time."
        config, draws = self.race.config, torch.Generator().manual_seed(self.batches)
        asked = TASK, TASK.prompts(self.race.problems, held_out=True), config.max_new_tokens
        success = success_rate(self.model, self.tokenizer, *asked, draws)
        samples = self.batches * config.prompts * config.group_size
        for line in self.race.lines:
            if success >= line:
                self.reached.setdefault(line, (samples, self.seconds))


def ours(run: Run) -> None:
    run.start()
    train_lm(
        run.model, run.tokenizer, TASK, REWARD, OBJECTIVE, run.race.config, seed=run.seed,
        device="cpu", progress=False, report=lambda row: run.batch_done(),
    )


def trl(run: Run) -> None:
    config, each = run.race.config, gradient_steps(run.race.config)

    class Looks(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            whole = state.global_step % each == 0
            control.should_training_stop |= whole and not run.batch_done()

    prompts = TASK.take(config.prompts * config.steps, 0, run.seed)
    with TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            run.model, REWARD, settings(config, run.seed, folder),
            Dataset.from_dict({"prompt": prompts}), processing_class=run.tokenizer,
            callbacks=[Looks()], optimizers=optimizer(run.model, config),
        )
        run.start()
        trainer.train()


def gradient_steps(config: LMConfig) -> int:
    "Of a batch of samples."
    return config.epochs * config.minibatches


def settings(config: LMConfig, seed: int, folder: str) -> GRPOConfig:
    "The same in TRL's words."
    return GRPOConfig(
        folder, seed=seed, max_steps=config.steps * gradient_steps(config),
        per_device_train_batch_size=config.prompts * config.group_size // config.minibatches,
        steps_per_generation=config.minibatches, num_iterations=config.epochs,
        num_generations=config.group_size,
        max_completion_length=config.max_new_tokens, shuffle_dataset=False,
        loss_type="dr_grpo", scale_rewards="none", beta=0.0, epsilon=0.2,
        temperature=config.temperature, top_k=0, top_p=1.0,
        max_grad_norm=config.max_grad_norm, use_cpu=True, bf16=False,
        gradient_checkpointing=False, **QUIET,
    )


def optimizer(
    model: PreTrainedModel, config: LMConfig
) -> tuple[torch.optim.AdamW, LambdaLR]:
    "The optimiser of `train_lm`, and its rate after every gradient step."
    adam = torch.optim.AdamW(model.parameters(), config.lr, weight_decay=0.0, fused=True)

    def pace(step: int) -> float:
        batch = step // gradient_steps(config)
        rise = min(1, (batch + 1) / (config.warmup + 1))
        return rise * (1 - batch / config.steps if config.anneal else 1)

    return adam, LambdaLR(adam, pace)


TRAINERS: dict[str, Callable[[Run], None]] = {"po_book": ours, "TRL": trl}


def teach(race: Race, folder: Path) -> float:
    "Save the model that every run starts from; its success on held-out problems."
    draws = torch.Generator().manual_seed(0)
    model, tokenizer = fine_tuned(TASK, race.taught, race.rate, draws)
    save_lm(folder, model, tokenizer)
    asked = TASK, TASK.prompts(race.problems, held_out=True), race.config.max_new_tokens
    return success_rate(model, tokenizer, *asked, draws)


def compete(race: Race, seeds: int, folder: Path) -> dict[str, list[Run]]:
    "A run a trainer and seed."
    for trainer in TRAINERS.values():  # what is made once is made now
        trainer(Run(replace(race, config=replace(race.config, steps=3)), *load_lm(folder), 0))
    runs = {name: [] for name in TRAINERS}
    for seed in range(seeds):
        for name in list(TRAINERS)[:: 1 if seed % 2 == 0 else -1]:
            runs[name].append(Run(race, *load_lm(folder), seed))
            TRAINERS[name](runs[name][-1])
            print(name, seed, runs[name][-1].reached, flush=True)
    return runs


def table(race: Race, runs: dict[str, list[Run]]) -> tuple[list[str], list[list]]:
    "Its columns, and a row a trainer and seed; empty where a line was not reached."
    names = [f"{what} to {line:g}" for line in race.lines for what in ("samples", "seconds")]
    rows = []
    for name, one in ((name, run) for name, those in runs.items() for run in those):
        row = [name, one.seed, one.batches, f"{1e3 * one.seconds / one.batches:.0f}"]
        for line in race.lines:
            samples, seconds = one.reached.get(line, ("", None))
            row += [samples, "" if seconds is None else f"{seconds:.1f}"]
        rows.append(row)
    return ["trainer", "seed", "batches", "ms a batch", *names], rows


def ratios(race: Race, runs: dict[str, list[Run]]) -> dict[str, str]:
    "TRL's over po_book's, seed by seed, where both have reached a line."
    pairs = list(zip(runs["TRL"], runs["po_book"]))
    found = {"ms a batch": [a.seconds / a.batches / (b.seconds / b.batches) for a, b in pairs]}
    for line in race.lines:
        both = [(a.reached[line], b.reached[line]) for a, b in pairs
                if line in a.reached and line in b.reached]
        for i, what in enumerate(("samples", "seconds")):
            found[f"{what} to {line:g}"] = [a[i] / b[i] for a, b in both]
    return {what: spread(xs) for what, xs in found.items()}


def spread(xs: list[float]) -> str:
    "Median, range and number."
    if not xs:
        return "no seed"
    return f"{median(xs):.2f} ({min(xs):.2f} to {max(xs):.2f}), seeds: {len(xs)}"


def main(seeds: int, threads: int, recording: bool) -> None:
    quiet(threads)
    with TemporaryDirectory() as folder:
        success = teach(RACE, Path(folder))
        runs = compete(RACE, seeds, Path(folder))
    columns, rows = table(RACE, runs)
    for row in columns, *rows:
        print("".join(f"{x:>16}" for x in row))
    over = ratios(RACE, runs)
    print(f"start {success:.3f}", *(f"{k}: {v}" for k, v in over.items()), sep="\n")
    if recording:
        start = f"{RACE.taught} steps of sft at rate {RACE.rate:g}, success {success:.3f}"
        versions = {"trl": f"trl {trl_version}", "threads": f"{threads} threads"}
        record("lm_end_to_end", columns, rows, **versions, start=start,
               objective=OBJECTIVE, settings=asdict(RACE), ratios=over)


if __name__ == "__main__":
    words = [word for word in sys.argv[1:] if word != "--record"]
    if len(words) > 2 or not all(word.isdigit() for word in words):
        sys.exit(__doc__)
    numbers = [int(word) for word in words]
    main(*numbers, *(3, 2)[len(numbers):], "--record" in sys.argv)
