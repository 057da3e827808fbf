"A pretrained model that learns: its numbers, its modes, its memory, its adapters."
import copy
import sys

import pytest
import torch
from peft import PromptTuningConfig, get_peft_model
from tiny_models import MODELS, PROMPTS, SMALL, adapted, dropping, generator, save_tiny, scored
from torch import nn
from transformers import AutoModelForCausalLM

from po_book.language_model import char_tokenizer, encode, pack, tiny_lm, token_logprobs, trunk
from po_book.pretrained import (
    as_reference, check_adapters, float32_masters, is_peft, learning, load_lm, reference_of,
    save_lm,
)
from po_book.sampling import sample

KINDS = ["llama", *MODELS]


@pytest.fixture
def tokenizer():
    return char_tokenizer()


def rows_of(tokenizer, groups: int = 1):
    answers = ["11,16", "11,15", "16", "11,6"]
    ended = [[*x, tokenizer.eos_token_id] for x in encode(tokenizer, answers)] * groups
    prompts = [x for q in ("3+8+5=", "9=")[:groups] for x in encode(tokenizer, [q] * 4)]
    return pack(prompts, ended, tokenizer.pad_token_id)


def graded(model, rows, group_size: int) -> tuple[torch.Tensor, torch.Tensor]:
    "Log-probabilities, and the gradient of their sum."
    logp = token_logprobs(
        model, rows.ids, rows.mask, attention_mask=rows.attention_mask, group_size=group_size
    )
    learn = [p for p in model.parameters() if p.requires_grad]
    slopes = torch.autograd.grad(logp.sum(), learn, allow_unused=True)
    return logp.detach(), torch.cat([g.flatten() for g in slopes if g is not None])


# Loading


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_a_file_of_two_bytes_is_loaded_as_four_and_otherwise_on_request(half, tmp_path, tokenizer):
    start = tiny_lm(tokenizer, **SMALL)
    save_lm(tmp_path / "lm", copy.deepcopy(start).to(half), tokenizer)
    model, _ = load_lm(tmp_path / "lm")
    assert {p.dtype for p in model.parameters()} == {torch.float32}
    for a, b in zip(model.parameters(), start.parameters(), strict=True):
        assert torch.equal(a, b.to(half).float())
    assert load_lm(tmp_path / "lm", dtype="auto")[0].dtype == half


def test_a_loaded_model_drops_nothing_out_and_pads_on_the_left(tmp_path, tokenizer):
    tokenizer.padding_side = "right"
    save_lm(tmp_path / "base", tiny_lm(tokenizer, **SMALL), tokenizer)
    save_lm(tmp_path / "adapters", adapted(base=load_lm(tmp_path / "base")[0]), tokenizer)
    for folder in ("base", "adapters"):
        model, its = load_lm(tmp_path / folder)
        assert its.padding_side == "left" and not any(x.training for x in model.modules())


def test_what_cannot_be_loaded_is_said_with_the_reason(tmp_path):
    with pytest.raises(ValueError, match="name_or_path must be a folder with a causal model.*nothing"):
        load_lm(tmp_path / "nothing")


def test_adapters_alone_are_loaded_with_the_model_they_belong_to(tmp_path, tokenizer):
    save_lm(tmp_path / "base", tiny_lm(tokenizer, **SMALL), tokenizer)
    base, _ = load_lm(tmp_path / "base")
    model = adapted(base=base)
    save_lm(tmp_path / "adapters", model, tokenizer)
    assert not (tmp_path / "adapters" / "model.safetensors").exists()
    again, its = load_lm(tmp_path / "adapters")
    rows = rows_of(tokenizer)
    assert is_peft(again) and len(its) == len(tokenizer)
    with torch.no_grad():
        assert torch.equal(scored(again, rows), scored(model.eval(), rows))
    names = [name for name, p in again.named_parameters() if p.requires_grad]
    assert names and all("lora" in name for name in names)


def test_without_peft_adapters_say_what_to_install(tmp_path, tokenizer, monkeypatch):
    save_lm(tmp_path / "base", tiny_lm(tokenizer, **SMALL), tokenizer)
    save_lm(tmp_path / "adapters", adapted(base=load_lm(tmp_path / "base")[0]), tokenizer)
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(ImportError, match=r"adapters: pip install 'po-book\[peft\]'"):
        load_lm(tmp_path / "adapters")


# Numbers


def test_masters_are_float32_or_better():
    half, double = tiny_lm(char_tokenizer(), **SMALL), tiny_lm(char_tokenizer(), **SMALL).double()
    assert float32_masters(half.bfloat16()).dtype == torch.float32
    assert float32_masters(double).dtype == torch.float64


def test_of_a_model_with_adapters_only_they_become_masters():
    base = tiny_lm(char_tokenizer(), **SMALL).bfloat16()
    model = float32_masters(adapted(base=base, autocast_adapter_dtype=False))
    kinds = {(p.requires_grad, p.dtype) for p in model.parameters()}
    assert kinds == {(True, torch.float32), (False, torch.bfloat16)}


def test_a_model_in_which_nothing_learns_is_refused():
    frozen = tiny_lm(char_tokenizer(), **SMALL).requires_grad_(False)
    with pytest.raises(ValueError, match="model must be one with parameters that require"):
        float32_masters(frozen)


# Modes


def test_every_module_comes_back_in_its_own_mode_also_after_an_error(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    model.model.layers[1].train()
    before = [m.training for m in model.modules()]
    layer = vars(model.model.layers[0]).copy()
    with pytest.raises(KeyError), learning(model, recompute=True):
        inside = {m for m in model.modules() if m.training}
        assert inside == set(model.model.layers)
        raise KeyError
    assert [m.training for m in model.modules()] == before
    assert vars(model.model.layers[0]) == layer
    assert not any(x.gradient_checkpointing for x in model.model.layers)


@pytest.mark.parametrize("kind", ["opt", "gpt2"])
@pytest.mark.parametrize("group_size", [1, 4])
def test_computed_anew_a_model_with_dropout_says_the_same(kind, group_size, tokenizer):
    model, rows = dropping(kind), rows_of(tokenizer, 2)
    plain, slope = graded(copy.deepcopy(model).eval(), rows, 1)
    for recompute in (False, True):
        with learning(model, recompute):
            again, slope_again = graded(model, rows, group_size)
        torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)
        torch.testing.assert_close(slope_again, slope, rtol=1e-4, atol=1e-5)
    assert all(m.training for m in model.modules())


@pytest.mark.parametrize("kind", KINDS)
def test_computed_anew_every_kind_of_model_says_the_same(kind, tmp_path, tokenizer):
    save_tiny(kind, tmp_path)
    model, rows = load_lm(tmp_path)[0], rows_of(tokenizer, 2)
    plain, slope = graded(model, rows, 4)
    with learning(model, recompute=True):
        again, slope_again = graded(model, rows, 4)
    torch.testing.assert_close(again, plain, rtol=0, atol=1e-5)
    torch.testing.assert_close(slope_again, slope, rtol=1e-4, atol=1e-5)


def test_what_the_caller_has_switched_on_is_computed_anew_and_layers_run_twice(tokenizer):
    model, rows, calls = tiny_lm(tokenizer, **SMALL), rows_of(tokenizer), []
    model.model.layers[0].mlp.register_forward_pre_hook(lambda *_: calls.append(1))
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    with learning(model):
        graded(model, rows, 1)
    assert len(calls) == 2  # forward, and once more in the backward pass
    calls.clear()
    for layer in model.model.layers:
        layer.gradient_checkpointing = False
    with learning(model):
        graded(model, rows, 1)
    assert len(calls) == 1


def test_layers_that_could_be_computed_anew_but_are_not_read_a_prompt_once(tokenizer):
    model, rows, read = tiny_lm(tokenizer, **SMALL), rows_of(tokenizer), []
    for layer in model.model.layers:
        layer.gradient_checkpointing = True
    model.get_input_embeddings().register_forward_hook(lambda _, x, y: read.append(x[0].numel()))
    with torch.no_grad():
        scored(model, rows, group_size=4)
    assert read == [6, 4 * (rows.ids.shape[1] - 7)]


def test_sampling_inside_keeps_its_cache(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    want = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    with learning(model, recompute=True):
        got = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    assert torch.equal(got.ids, want.ids)
    torch.testing.assert_close(got.logps, want.logps, rtol=0, atol=1e-6)


def test_a_model_without_layers_that_can_be_computed_anew_is_refused():
    with pytest.raises(ValueError, match="recompute must be False for this model"), learning(nn.Linear(2, 2), True):
        pass


# Adapters


def learn_something(model):
    "As if adapters had learnt."
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora_B" in name:
                p.normal_(generator=generator())


def test_with_new_adapters_off_a_model_is_the_one_it_was(tokenizer):
    base, rows = tiny_lm(tokenizer, **SMALL), rows_of(tokenizer)
    model = adapted(base=copy.deepcopy(base), zero=True).train()
    reference = reference_of(model)
    assert reference is model and model.training
    learn_something(model)
    model.eval()
    with torch.no_grad():
        want, with_adapters = scored(base, rows), scored(model, rows)
        with as_reference(reference):
            off = scored(reference, rows)
        again = scored(model, rows)
    assert torch.equal(off, want) and torch.equal(again, with_adapters)
    assert (with_adapters - want).abs().max() > 1e-3


def test_adapters_that_have_learnt_are_part_of_the_reference(tokenizer):
    model, rows = adapted(zero=False).eval(), rows_of(tokenizer)
    reference = reference_of(model)
    with torch.no_grad():
        start = scored(model, rows)
        learn_something(model)
        with as_reference(reference):
            kept = scored(reference, rows)
        assert torch.equal(kept, start) and not torch.equal(scored(model, rows), start)
    assert reference is not model and not any(p.requires_grad for p in reference.parameters())
    with as_reference(None):
        pass


def test_a_reference_of_a_whole_model_is_a_frozen_copy(tokenizer):
    model = tiny_lm(tokenizer, **SMALL).train()
    reference = reference_of(model)
    assert reference is not model and not any(p.requires_grad for p in reference.parameters())
    assert not any(m.training for m in reference.modules()) and model.training
    with as_reference(reference):
        assert torch.equal(reference.lm_head.weight, model.lm_head.weight)


def test_the_trunk_has_the_adapters(tokenizer):
    model = adapted()
    names = [name for name, _ in trunk(model).named_parameters() if "lora" in name]
    assert type(trunk(model)).__name__ == "LlamaModel" and len(names) == 8


def test_learnt_prompts_and_injected_adapters_are_refused(tmp_path, tokenizer):
    base = tiny_lm(tokenizer, **SMALL)
    soft = get_peft_model(base, PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2))
    with pytest.raises(ValueError, match="adapters must be in the layers.*PROMPT_TUNING"):
        check_adapters(soft)
    save_lm(tmp_path / "base", tiny_lm(tokenizer, **SMALL), tokenizer)
    save_lm(tmp_path / "adapters", adapted(base=load_lm(tmp_path / "base")[0]), tokenizer)
    injected = AutoModelForCausalLM.from_pretrained(tmp_path / "adapters")
    with pytest.raises(ValueError, match="adapters must be loaded by peft"):
        check_adapters(injected)
