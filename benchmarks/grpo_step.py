"""What a step of GRPO costs: `train_lm` against TRL's `GRPOTrainer`, in one process.

Run: python benchmarks/grpo_step.py [threads] [--record]

8 prompts x 8 completions of at most 16 tokens, the model of 0.8 million parameters, in
float32 on the CPU; with and without a reference. Twice: with the model of the chapter,
fine-tuned for a while, and with random weights and no end, where all completions have 16
tokens. Both trainers sample, reward, and take one step of AdamW; the reward is a cheap
function of the text that differs within every group, so that no group is dead. The
trainers take turns, a few steps each. Memory is measured in processes of their own: the
most that is held, beyond what was held when imports and a first step were done.
"""

import logging
import sys
import warnings
from concurrent.futures import ProcessPoolExecutor
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from lm_start import fine_tuned
from provenance import peak_mb, record
from trl import __version__ as trl_version

from po_book.credit import Group
from po_book.language_model import tiny_lm
from po_book.lm_learner import tiny_config
from po_book.objective import Objective
from po_book.pretrained import load_lm
from po_book.tasks import ChainAddition
from po_book.terms import Aggregation, InLoss, NoReference
from po_book.tokens import Clip
from po_book.train_lm import train_lm

PROMPTS, GROUP, NEW, STEPS, TURNS = 8, 8, 16, 12, 5
QUIET = dict(disable_tqdm=True, report_to=[], logging_strategy="no", save_strategy="no")


def reward(prompts, completions, **columns) -> list[float]:
    "Differs within a group: a checksum of the text."
    return [sum(map(ord, text)) % 17 / 17 for text in completions]


def ours(
    model, tokenizer, beta: float, steps: int = STEPS, prompts: int = PROMPTS
) -> list[float]:
    "Milliseconds of each step but the first two."
    kl = InLoss(beta) if beta else NoReference()
    objective = Objective(Group(), Clip(), kl, Aggregation("token"))
    config = tiny_config(
        steps=steps, prompts=prompts, group_size=GROUP, max_new_tokens=NEW, lr=1e-6, epochs=1,
        minibatches=1,
    )
    times = [perf_counter()]
    train_lm(
        model, tokenizer, ChainAddition(3, 5), reward, objective, config,
        device="cpu", progress=False, report=lambda row: times.append(perf_counter()),
    )
    return [1e3 * (b - a) for a, b in zip(times[2:], times[3:])]


def trl(
    model, tokenizer, beta: float, steps: int = STEPS, prompts: int = PROMPTS
) -> list[float]:
    "The same of TRL's trainer."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(perf_counter())

    asked = ChainAddition(3, 5).prompts(prompts * steps)
    with TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, max_steps=steps, per_device_train_batch_size=prompts * GROUP,
            num_generations=GROUP, max_completion_length=NEW, beta=beta, learning_rate=1e-6,
            loss_type="dapo", use_cpu=True, bf16=False, gradient_checkpointing=False,
            temperature=1.0, top_k=0, top_p=1.0, **QUIET,
        )
        trainer = GRPOTrainer(
            model, reward, config, Dataset.from_dict({"prompt": asked}),
            processing_class=tokenizer, callbacks=[Clock()],
        )
        times.append(perf_counter())
        trainer.train()
    return [1e3 * (b - a) for a, b in zip(times[2:], times[3:])]


TRAINERS = {"TRL": trl, "po_book": ours}


def memory(trainer: str, path: Path, beta: float, threads: int) -> float:
    "The most memory that the steps of a trainer hold, in MB; call it in a fresh process."
    quiet(threads)
    TRAINERS[trainer](*load_lm(path), beta, steps=1, prompts=1)
    before = peak_mb()
    TRAINERS[trainer](*load_lm(path), beta)
    return peak_mb() - before


def quiet(threads: int) -> None:
    "This many threads, and no word from the libraries."
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")


def save_models(folder: Path) -> dict[str, Path]:
    "A fine-tuned model, and one whose end token is no output of it."
    order = torch.Generator().manual_seed(0)
    tuned, tokenizer = fine_tuned(ChainAddition(3, 5), 150, 1e-3, order, problems=5000)
    endless = tiny_lm(tokenizer)
    tuned.save_pretrained(folder / "tuned")
    tokenizer.save_pretrained(folder / "tuned")
    tokenizer.add_special_tokens({"eos_token": "<end>"})
    endless.config.eos_token_id = endless.generation_config.eos_token_id = len(tokenizer) - 1
    endless.save_pretrained(folder / "endless")
    tokenizer.save_pretrained(folder / "endless")
    return {"fine-tuned": folder / "tuned", "random, no end": folder / "endless"}


def main(threads: int, recording: bool) -> None:
    quiet(threads)
    rows = []
    alone = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with TemporaryDirectory() as folder, alone:
        for (name, path), beta in product(save_models(Path(folder)).items(), (0.0, 0.04)):
            times = {trainer: [] for trainer in TRAINERS}
            for _ in range(TURNS):
                for trainer, steps in times.items():
                    steps += TRAINERS[trainer](*load_lm(path), beta)
            peaks = {
                trainer: alone.submit(memory, trainer, path, beta, threads).result()
                for trainer in TRAINERS
            }
            rows += [
                [name, beta, trainer, f"{min(ms):.0f}", f"{median(ms):.0f}",
                 f"{median(ms) / median(times['po_book']):.2f}", f"{peaks[trainer]:.0f}"]
                for trainer, ms in times.items()
            ]
    columns = ["model", "beta", "trainer", "ms, min", "ms, median", "over po_book's", "peak MB"]
    for row in [columns, *rows]:
        print("{:16}{:>6}  {:12}{:>9}{:>12}{:>16}{:>9}".format(*row))
    if recording:
        versions = {"trl": f"trl {trl_version}", "threads": f"{threads} threads"}
        record("grpo_step", columns, rows, **versions)


if __name__ == "__main__":
    rest = [x for x in sys.argv[1:] if x != "--record"]
    main(int(rest[0]) if rest else 2, "--record" in sys.argv)
