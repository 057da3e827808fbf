"Samplers with weights of their own, in the place of a real engine."

from copy import deepcopy

import torch
from torch import nn

from po_book.samplers import Completion
from po_book.sampling import sample


class Stale:
    "It keeps the weights that it began with."

    def __init__(self, model: nn.Module, tokenizer):
        self.model, self.tokenizer = deepcopy(model), tokenizer

    def load(self, model: nn.Module) -> None:
        pass

    def __call__(self, prompts, request) -> list[Completion]:
        draws = torch.Generator().manual_seed(request.seed)
        size = request.group_size, request.max_new_tokens, request.temperature
        drawn = sample(self.model, self.tokenizer, prompts, *size, generator=draws)
        columns = drawn.ids, drawn.logps, drawn.mask, drawn.finished.tolist()
        return [Completion(x[m].tolist(), p[m].tolist(), f) for x, p, m, f in zip(*columns)]


class EightBits(Stale):
    "It rounds the learner's weights to numbers of eight bits, before every batch."

    @torch.no_grad()
    def load(self, model: nn.Module) -> None:
        for mine, learnt in zip(self.model.parameters(), model.parameters()):
            mine.copy_(learnt.to(torch.float8_e4m3fn))
