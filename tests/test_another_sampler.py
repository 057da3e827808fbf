"The slot for another sampler: its request, what it may give back, and how it is packed."
import copy
from dataclasses import FrozenInstanceError, replace

import pytest
import torch
from tiny_models import PROMPTS, generator, scored

from po_book.sampling import Completion, Request, ask_sampler, pack_completions, sample

GOOD = [Completion([5, 6, 1], [-1.0, -0.5, -2.0], True), Completion([7, 7], [-0.1, -3.0], False)]
REQUEST = Request(group_size=2, max_new_tokens=3)


def pack_two(model, tokenizer, completions=GOOD, request=REQUEST, prompts=((3, 4),)):
    return pack_completions(model, tokenizer, [list(p) for p in prompts], completions, request)


def test_completions_are_packed_behind_their_prompts(llama, tokenizer):
    rows = pack_two(llama, tokenizer, GOOD * 2, prompts=[(3, 4), (8,)])
    pad = tokenizer.pad_token_id
    assert rows.ids.tolist() == [
        [3, 4, 5, 6, 1], [3, 4, 7, 7, pad], [pad, 8, 5, 6, 1], [pad, 8, 7, 7, pad]
    ]
    assert rows.mask.sum(1).tolist() == [3, 2, 3, 2]
    assert rows.attention_mask.sum(1).tolist() == [5, 4, 4, 3]
    want = torch.tensor([[0, 0, -1.0, -0.5, -2.0], [0, 0, -0.1, -3.0, 0]] * 2)
    torch.testing.assert_close(rows.logps, want, rtol=0, atol=0)
    assert rows.finished.tolist() == [True, False] * 2


def test_packing_what_sample_wrote_gives_the_same_samples(llama, tokenizer):
    drawn = sample(llama, tokenizer, PROMPTS, 4, 8, generator=generator())
    rows = [tokenizer(p).input_ids for p in PROMPTS]
    completions = [
        Completion(ids[mask].tolist(), logps[mask].tolist(), finished)
        for ids, mask, logps, finished in zip(
            drawn.ids, drawn.mask, drawn.logps, drawn.finished.tolist()
        )
    ]
    packed = pack_completions(llama, tokenizer, rows, completions, Request(4, 8))
    for name, x in vars(drawn).items():
        assert torch.equal(getattr(packed, name), x), name
        assert getattr(packed, name).dtype == x.dtype


class Echo:
    "Gives what `sample` writes with the weights that it was given, and notes what it was asked."

    def __init__(self, tokenizer):
        self.tokenizer, self.asked = tokenizer, []

    def load(self, model):
        self.model = copy.deepcopy(model)

    def __call__(self, prompts, request):
        self.asked.append((prompts, request))
        size = request.group_size, request.max_new_tokens
        law = request.temperature, request.top_k, request.top_p, request.min_p
        draws = generator(request.seed)
        rows = sample(self.model, self.tokenizer, prompts, *size, *law, draws, stop=request.stop)
        return [
            Completion(ids[mask].tolist(), logps[mask].tolist(), bool(finished))
            for ids, mask, logps, finished in zip(rows.ids, rows.mask, rows.logps, rows.finished)
        ]


@pytest.mark.parametrize("law", [{}, {"temperature": 0.5, "top_k": 4}, {"stop": ("1",)}])
def test_a_sampler_is_asked_in_tokens_and_gives_samples(llama, tokenizer, law):
    echo = Echo(tokenizer)
    echo.load(llama)
    request = Request(3, 8, **law, seed=5)
    drawn = ask_sampler(echo, llama, tokenizer, PROMPTS, request)
    assert echo.asked == [([tokenizer(p).input_ids for p in PROMPTS], request)]
    law = {name: x for name, x in law.items() if name != "stop"}
    with torch.no_grad():
        torch.testing.assert_close(drawn.logps, scored(llama, drawn, **law), rtol=0, atol=1e-5)


def test_prompts_that_cannot_be_asked_are_not(llama, tokenizer):
    echo = Echo(tokenizer)
    for prompts, message in (
        ([], "prompts must be one or more, got none"),
        (["1+" * 20], "model's context is 32"),
        ([[]], "tokens, or messages"),
    ):
        with pytest.raises(ValueError, match=message):
            ask_sampler(echo, llama, tokenizer, prompts, Request(1, 8))
    assert not echo.asked


# Refusals

BAD = {
    r"completions\[1\].ids must be tokens of the tokenizer, 0 to 17, got 18": {"ids": [7, 18]},
    r"completions\[1\].ids must be tokens of the tokenizer, 0 to 17, got -1": {"ids": [7, -1]},
    r"completions\[1\].ids must be tokens of the tokenizer, 0 to 17, got 7.0": {"ids": [7, 7.0]},
    r"completions\[1\].logps must be as many as its 2 tokens, got 3": {"logps": [-1.0] * 3},
    r"completions\[1\].logps must be as many as its 2 tokens, got 1": {"logps": [-1.0]},
    r"completions\[1\].logps must be finite and not positive, got 0.01": {"logps": [-1.0, 0.01]},
    r"completions\[1\].logps must be finite and not positive, got nan": {"logps": [float("nan"), -1.0]},
    r"completions\[1\].logps must be finite and not positive, got -inf": {"logps": [float("-inf"), -1.0]},
    r"completions\[1\].logps must be finite and not positive, got None": {"logps": [None, -1.0]},
    r"completions\[1\] must be of 1 to 3 tokens, got 0": {"ids": [], "logps": []},
    r"completions\[1\] must be of 1 to 3 tokens, got 4": {"ids": [7] * 4, "logps": [-1.0] * 4},
    r"completions\[1\], which is finished, must be with one of the end tokens \[1\] at its end, got 7": {"finished": True},
}


@pytest.mark.parametrize("message", BAD)
def test_bad_completions_are_refused_in_words(llama, tokenizer, message):
    with pytest.raises(ValueError, match=message):
        pack_two(llama, tokenizer, [GOOD[0], replace(GOOD[1], **BAD[message])])


def test_rounding_above_zero_is_no_positive_log_probability(llama, tokenizer):
    rows = pack_two(llama, tokenizer, [GOOD[0], replace(GOOD[1], logps=[1e-7, -0.0])])
    assert rows.logps.max() < 1e-6


@pytest.mark.parametrize("completions", [[], GOOD[:1], GOOD * 2])
def test_a_wrong_number_of_completions_is_refused(llama, tokenizer, completions):
    with pytest.raises(ValueError, match=f"completions must be 2, got {len(completions)}"):
        pack_two(llama, tokenizer, completions)


def test_other_end_tokens_of_the_model_and_stop_texts_may_end_a_completion(llama, tokenizer):
    ended = [GOOD[0], replace(GOOD[1], finished=True)]
    with pytest.raises(ValueError, match="end tokens"):
        pack_two(llama, tokenizer, ended)
    assert pack_two(llama, tokenizer, ended, replace(REQUEST, stop=("7",))).finished.all()
    more = copy.deepcopy(llama)
    more.generation_config.eos_token_id = [1, 7]
    assert pack_two(more, tokenizer, ended).finished.all()


@pytest.mark.parametrize("setting, message", [
    ({"group_size": 0}, "group_size must be at least 1, got 0"),
    ({"max_new_tokens": 1.5}, "max_new_tokens must be a whole number, got 1.5"),
    ({"temperature": 0.0}, "temperature must be positive"),
    ({"top_p": 1.1}, "top_p must be in"),
    ({"stop": ("",)}, "stop must be a list of texts that are not empty"),
    ({"seed": -1}, "seed must be at least 0, got -1"),
    ({"seed": 0.5}, "seed must be a whole number, got 0.5"),
])
def test_a_request_that_makes_no_sense_is_refused(setting, message):
    with pytest.raises(ValueError, match=message):
        Request(**setting)


def test_a_request_cannot_be_changed():
    with pytest.raises(FrozenInstanceError):
        REQUEST.seed = 3
