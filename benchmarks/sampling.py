"""What 64 completions of 16 tokens cost: `sample`, transformers' `generate`, a bare loop.

Run: OMP_NUM_THREADS=1 python benchmarks/sampling.py [--record]

8 prompts x 8 completions, the model of 0.8 million parameters, one CPU thread. Twice:
with the model of the chapter, fine-tuned for a while, whose completions end where it
ends them; and with random weights and no end, where all completions soon differ and all
have 16 tokens, which is the least favourable case. `generate` and the bare loop read
every prompt once for each of its completions; the loop does nothing that is not needed.
`sample` is there twice, the second time as it reads a model that is not built like a
Llama. All are given tokens. The candidates take turns, so that a busy moment of the
machine hits all of them. Memory is measured in processes of their own: the most that is
held, beyond what was held when a first completion was written.
"""

import sys
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from time import perf_counter
from unittest.mock import patch

import torch
import transformers
from lm_start import fine_tuned
from provenance import peak_mb, record
from transformers import DynamicCache
from transformers.utils.logging import disable_progress_bar

from po_book.language_model import tiny_lm
from po_book.pretrained import load_lm
from po_book.sampling import sample
from po_book.tasks import ChainAddition

PROMPTS, GROUP, NEW = 8, 8, 16


def candidates(model, tokenizer, prompts: list[str], ends: bool) -> dict[str, Callable]:
    "Ways to the same completions."
    eos = tokenizer.eos_token_id if ends else None
    if not ends:
        model.lm_head.bias = torch.nn.Parameter(torch.zeros(len(tokenizer)))
        with torch.no_grad():
            model.lm_head.bias[tokenizer.eos_token_id] = -torch.inf
    repeated = [prompt for prompt in prompts for _ in range(GROUP)]
    inputs = tokenizer(repeated, return_tensors="pt", padding=True)
    ids, real = inputs.input_ids, inputs.attention_mask
    asked = tokenizer(prompts).input_ids
    options = dict(do_sample=True, top_k=0, max_new_tokens=NEW, eos_token_id=eos, pad_token_id=0)

    @torch.no_grad()
    def loop() -> None:
        cache, tokens, attend = DynamicCache(config=model.config), ids, real
        running = torch.ones(len(ids), dtype=torch.bool)
        for step in range(NEW):
            positions = (attend.cumsum(1) - 1).clamp(min=0)[:, -tokens.shape[1] :]
            hidden = model.model(
                input_ids=tokens,
                attention_mask=attend,
                position_ids=positions,
                past_key_values=cache,
            ).last_hidden_state[:, -1]
            p = model.lm_head(hidden).softmax(-1)
            tokens = torch.multinomial(p, 1)
            attend = torch.nn.functional.pad(attend, (0, 1), value=1)
            running &= tokens[:, 0] != eos if ends else True
            if not running.any():
                break

    def ours() -> None:
        sample(model, tokenizer, asked, GROUP, NEW)

    def as_any() -> None:
        with patch("po_book.sampling._is_llama", lambda model: False):
            ours()

    return {
        "generate": lambda: model.generate(ids, attention_mask=real, **options),
        "bare loop": loop,
        "po_book sample": ours,
        "as any model": as_any,
    }


def memory(folder: Path, ends: bool, name: str) -> float:
    "The most memory that one way holds, in MB; call it in a fresh process."
    torch.set_num_threads(1)
    disable_progress_bar()
    what, prompts = load_lm(folder), held_out()
    candidates(*what, prompts[:1], ends)[name]()
    before = peak_mb()
    candidates(*what, prompts, ends)[name]()
    return peak_mb() - before


def held_out() -> list[str]:
    return ChainAddition().prompts(PROMPTS, seed=1, held_out=True)


def measure(ways: dict[str, Callable], turns: int = 40) -> dict[str, list[float]]:
    "Milliseconds a call, one number a turn."
    times = {name: [] for name in ways}
    for name, way in ways.items():
        way()
    for _ in range(turns):
        for name, way in ways.items():
            start = perf_counter()
            way()
            times[name].append(1e3 * (perf_counter() - start))
    return times


def models() -> dict[str, tuple]:
    "A fine-tuned model, whose completions end; a random one, whose do not."
    torch.manual_seed(0)
    order = torch.Generator().manual_seed(0)
    tuned, tokenizer = fine_tuned(ChainAddition(), 260, 1e-3, order)
    return {"fine-tuned": (tuned, tokenizer, True),
            "random, no end": (tiny_lm(tokenizer), tokenizer, False)}


def main(recording: bool) -> None:
    torch.set_num_threads(1)
    rows = []
    alone = ProcessPoolExecutor(1, get_context("spawn"), max_tasks_per_child=1)
    with TemporaryDirectory() as folder, alone:
        for case, (model, tokenizer, ends) in models().items():
            for x in model, tokenizer:
                x.save_pretrained(Path(folder, case))
            times = measure(candidates(model, tokenizer, held_out(), ends))
            ours = median(times["po_book sample"])
            for name, ms in times.items():
                peak = alone.submit(memory, Path(folder, case), ends, name).result()
                rows.append([case, name, f"{min(ms):.1f}", f"{median(ms):.1f}",
                             f"{median(ms) / ours:.2f}", f"{peak:.0f}"])
    columns = ["model", "sampler", "ms, min", "ms, median", "over po_book's", "peak MB"]
    for row in [columns, *rows]:
        print("{:16}{:16}{:>9}{:>12}{:>16}{:>9}".format(*row))
    if recording:
        version = f"transformers {transformers.__version__}"
        record("sampling", columns, rows, transformers=version)


if __name__ == "__main__":
    main("--record" in sys.argv[1:])
