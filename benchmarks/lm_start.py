"The small model that the runs of a benchmark start from."

import torch
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from po_book.language_model import char_tokenizer, tiny_lm
from po_book.tasks import ChainAddition, sft


def fine_tuned(
    task: ChainAddition, steps: int, lr: float, order: torch.Generator, problems: int = 20_000
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    "It has imitated solutions of `problems`, in this order, for so many steps at this rate."
    tokenizer, prompts = char_tokenizer(), task.prompts(problems)
    model = tiny_lm(tokenizer)
    solutions = [task.solution(prompt) for prompt in prompts]
    sft(model, tokenizer, prompts, solutions, steps, lr=lr, generator=order)
    return model, tokenizer
