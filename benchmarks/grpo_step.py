"""What a step of GRPO costs: `train_lm` against TRL's `GRPOTrainer`, in one process.

Run: python benchmarks/grpo_step.py [threads] [--record]

8 prompts x 8 completions of at most 16 tokens, the model of 0.8 million parameters, in
float32 on the CPU; with and without a reference. Twice: with the model of the chapter,
fine-tuned for a while, and with random weights and no end, where all completions have 16
tokens. Both trainers sample, reward, and take one step of AdamW; the reward is a cheap
function of the text that differs within every group, so that no group is dead. The
trainers take turns, a few steps each.
"""

import copy
import logging
import sys
import warnings
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter

import torch
from provenance import record

from po_book.language_model import ChainAddition, char_tokenizer, sft, tiny_lm
from po_book.objective import Aggregation, Clip, Group, InLoss, NoReference, Objective
from po_book.train_lm import LMConfig, train_lm

PROMPTS, GROUP, NEW, STEPS, TURNS = 8, 8, 16, 12, 2


def reward(prompts, completions, **columns) -> list[float]:
    "Differs within a group: a checksum of the text."
    return [sum(map(ord, text)) % 17 / 17 for text in completions]


def ours(model, tokenizer, beta: float) -> list[float]:
    "Milliseconds of each step but the first two."
    kl = InLoss(beta) if beta else NoReference()
    objective = Objective(Group(), Clip(), kl, Aggregation("token"))
    config = LMConfig(
        steps=STEPS, prompts=PROMPTS, group_size=GROUP, max_new_tokens=NEW, lr=1e-6, epochs=1,
        minibatches=1,
    )
    times = [perf_counter()]
    train_lm(
        model, tokenizer, ChainAddition(3, 5), reward, objective, config,
        device="cpu", progress=False, report=lambda row: times.append(perf_counter()),
    )
    return [1e3 * (b - a) for a, b in zip(times[2:], times[3:])]


def trl(model, tokenizer, beta: float) -> list[float]:
    "The same of TRL's trainer."
    from datasets import Dataset
    from transformers import TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    times = []

    class Clock(TrainerCallback):
        def on_step_end(self, *args, **kwargs):
            times.append(perf_counter())

    prompts = ChainAddition(3, 5).prompts(PROMPTS * STEPS)
    with TemporaryDirectory() as folder:
        config = GRPOConfig(
            folder, max_steps=STEPS, per_device_train_batch_size=PROMPTS * GROUP,
            num_generations=GROUP, max_completion_length=NEW, beta=beta, learning_rate=1e-6,
            loss_type="dapo", use_cpu=True, bf16=False, gradient_checkpointing=False,
            report_to=[], logging_strategy="no", save_strategy="no", disable_tqdm=True,
            temperature=1.0, top_k=0, top_p=1.0,
        )
        trainer = GRPOTrainer(
            model, reward, config, Dataset.from_dict({"prompt": prompts}),
            processing_class=tokenizer, callbacks=[Clock()],
        )
        times.append(perf_counter())
        trainer.train()
    return [1e3 * (b - a) for a, b in zip(times[2:], times[3:])]


def models(tokenizer):
    "A fine-tuned model, and one that never ends."
    task, tuned, endless = ChainAddition(3, 5), tiny_lm(tokenizer), tiny_lm(tokenizer)
    prompts = task.prompts(5000)
    solutions = [task.solution(prompt) for prompt in prompts]
    sft(tuned, tokenizer, prompts, solutions, 150, generator=torch.Generator().manual_seed(0))
    endless.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
    with torch.no_grad():
        endless.lm_head.bias[tokenizer.eos_token_id] = -1e4
    return {"fine-tuned": tuned, "random, no end": endless}


def main(threads: int, recording: bool) -> None:
    torch.set_num_threads(threads)
    logging.disable(logging.WARNING)
    warnings.simplefilter("ignore")
    tokenizer, rows = char_tokenizer(), []
    for name, model in models(tokenizer).items():
        for beta in (0.0, 0.04):
            times = {"TRL": [], "po_book": []}
            for _ in range(TURNS):
                times["TRL"] += trl(copy.deepcopy(model), tokenizer, beta)
                times["po_book"] += ours(copy.deepcopy(model), tokenizer, beta)
            mid = {trainer: median(x) for trainer, x in times.items()}
            rows.append({
                "model": name, "beta": beta, "threads": threads,
                "TRL (ms)": round(mid["TRL"], 1), "po_book (ms)": round(mid["po_book"], 1),
                "ratio": round(mid["TRL"] / mid["po_book"], 2),
                "fastest, TRL (ms)": round(min(times["TRL"]), 1),
                "fastest, po_book (ms)": round(min(times["po_book"]), 1),
            })
            print(rows[-1], flush=True)


if __name__ == "__main__":
    rest = [x for x in sys.argv[1:] if x != "--record"]
    main(int(rest[0]) if rest else 2, "--record" in sys.argv)
