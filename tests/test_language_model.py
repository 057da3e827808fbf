import math

import pytest
import torch
from tiny_models import PROMPTS, SMALL, generator, scored
from transformers import LlamaForCausalLM

from po_book.language_model import (
    ValueModel,
    char_tokenizer,
    encode,
    log_distribution,
    pack,
    pad_token_id,
    prefix_states,
    tiny_lm,
    token_logprobs,
)
from po_book.pretrained import load_lm
from po_book.sampling import sample


def test_scores_are_those_of_the_model_itself(saved):
    model, tokenizer = load_lm(saved)
    ids = torch.tensor(tokenizer("3+8=11").input_ids)
    rows = pack([ids[:4].tolist()], [ids[4:].tolist()], pad_token_id(tokenizer))
    with torch.no_grad():
        plain = model(ids[None]).logits[0].log_softmax(-1)
        logp = scored(model, rows)[0, 4:]
    torch.testing.assert_close(logp, plain[[3, 4], ids[4:]], atol=1e-5, rtol=0)


def test_padding_side_row_order_and_chunks_change_no_score(saved):
    model, tokenizer = load_lm(saved)
    prompts = encode(tokenizer, PROMPTS)
    answers = encode(tokenizer, ["11,16", "9", "2,3,4"])
    rows = pack(prompts, answers, 1)
    logp = scored(model, rows)
    sums = logp.sum(1)
    other = pack([prompts[i] for i in (2, 0, 1)], [answers[i] for i in (2, 0, 1)], 1)
    torch.testing.assert_close(scored(model, other).sum(1), sums[[2, 0, 1]], atol=1e-5, rtol=0)
    torch.testing.assert_close(scored(model, rows, max_logits=40), logp, atol=1e-5, rtol=0)
    right = torch.ones(3, rows.ids.shape[1], dtype=torch.long)
    real, mask = torch.zeros(2, *right.shape, dtype=torch.bool)
    for i, (prompt, answer) in enumerate(zip(prompts, answers)):
        n, m = len(prompt), len(answer)
        right[i, : n + m] = torch.tensor(prompt + answer)
        real[i, : n + m], mask[i, n : n + m] = True, True
    on_the_right = token_logprobs(model, right, mask, attention_mask=real)
    torch.testing.assert_close(on_the_right.sum(1), sums, atol=1e-5, rtol=0)


def test_chunks_change_no_gradient(llama, tokenizer):
    drawn = sample(llama, tokenizer, PROMPTS, 2, 6, generator=generator())
    grads = []
    for limit in (2**26, 40):
        loss = scored(llama, drawn, max_logits=limit).sum()
        grads.append(torch.autograd.grad(loss, list(llama.parameters())))
    for whole, chunked in zip(*grads):
        torch.testing.assert_close(whole, chunked, atol=1e-4, rtol=1e-4)


def test_reading_a_prompt_once_for_its_group_changes_nothing(saved):
    model, tokenizer = load_lm(saved)
    drawn = sample(model, tokenizer, PROMPTS, 4, 10, generator=generator())
    weights = torch.randn(drawn.ids.shape, generator=generator())
    logps, grads = [], []
    for size in (1, 4):
        logp = scored(model, drawn, group_size=size)
        logps.append(logp)
        grads.append(torch.autograd.grad((weights * logp).sum(), list(model.parameters())))
    torch.testing.assert_close(logps[1], logps[0], atol=1e-5, rtol=0)
    for alone, together in zip(*grads):
        torch.testing.assert_close(together, alone, atol=1e-4, rtol=1e-4)


def test_a_shared_prompt_is_read_once(llama, tokenizer, monkeypatch):
    drawn = sample(llama, tokenizer, PROMPTS, 8, 6, generator=generator())
    read = []
    embed = llama.get_input_embeddings()
    embed.register_forward_hook(lambda *x: read.append(x[1][0].numel()))
    try:
        scored(llama, drawn, group_size=8)
        columns = int(drawn.mask.any(0).int().argmax())
        # the state after the last token predicts nothing, so that is not read
        assert sum(read) == 3 * columns + 24 * (drawn.ids.shape[1] - columns - 1)
        read.clear()
        one = sample(llama, tokenizer, PROMPTS, 8, 1, generator=generator())
        scored(llama, one, group_size=8)
        assert sum(read) == 2 * 3 * columns
    finally:
        embed._forward_hooks.clear()


def test_rows_of_a_group_must_share_their_prompt(llama, tokenizer):
    drawn = sample(llama, tokenizer, PROMPTS, 2, 4, generator=generator())
    with pytest.raises(ValueError, match="rows of a group of 3 must share their prompt"):
        scored(llama, drawn, group_size=3)
    with pytest.raises(ValueError, match="divide the 6 rows, got 4"):
        scored(llama, drawn, group_size=4)


def test_logits_are_never_held_beyond_the_limit(llama, tokenizer):
    drawn = sample(llama, tokenizer, PROMPTS, 4, 10, generator=generator())
    rows = []
    hook = llama.lm_head.register_forward_hook(lambda *x: rows.append(x[2].shape[0]))
    scored(llama, drawn, max_logits=18 * 7)
    hook.remove()
    assert max(rows) == 7 and sum(rows) == 64 * math.ceil(drawn.mask.sum() / 64)


def test_few_shapes_of_logits(llama, tokenizer):
    "oneDNN keeps kernels for each: with any number of rows a run took twice the memory."
    rows = set()
    hook = llama.lm_head.register_forward_hook(lambda *x: rows.add(x[2].shape[0]))
    for n in range(1, 9):
        drawn = sample(llama, tokenizer, PROMPTS, n, 10, generator=generator())
        rows.clear()
        scored(llama, drawn)
        assert len(rows) == 1 and rows.pop() % 64 == 0
    hook.remove()


def test_settings_change_the_distribution_as_they_should():
    logits = torch.tensor([0.5, 0.3, 0.2]).log() + 7
    cases = {
        (1.0, None, None): [0.5, 0.3, 0.2],
        (0.5, None, None): [25 / 38, 9 / 38, 4 / 38],
        (1.0, 2, None): [0.625, 0.375, 0],
        (1.0, 9, None): [0.5, 0.3, 0.2],
        (1.0, None, 0.5): [1.0, 0.0, 0.0],
        (1.0, None, 0.51): [0.625, 0.375, 0],
        (1.0, None, 1.0): [0.5, 0.3, 0.2],
    }
    for settings, expected in cases.items():
        torch.testing.assert_close(
            log_distribution(logits, *settings).exp(), torch.tensor(expected)
        )


def test_models_made_from_one_seed_are_equal(tokenizer):
    a, b, c = (tiny_lm(tokenizer, **SMALL, seed=s) for s in (0, 0, 1))
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    assert not torch.equal(a.lm_head.weight, c.lm_head.weight)
    assert tiny_lm(tokenizer).num_parameters() == 806_272


def test_a_completion_of_length_zero_scores_zero(llama):
    rows = pack([[5, 6], [7]], [[], [8, 9]], 0)
    logp = scored(llama, rows)
    assert logp[0].tolist() == [0, 0, 0, 0] and (logp[1, 2:] < 0).all()
    none = pack([[5, 6]], [[]], 0)
    empty = scored(llama, none)
    empty.sum().backward()
    assert empty.tolist() == [[0, 0]]
    llama.zero_grad()


def test_every_character_survives_the_tokenizer(tokenizer, tmp_path):
    text = "0123456789+-*=,:"
    assert tokenizer.decode(tokenizer(text).input_ids) == text
    assert len(tokenizer) == 18 and tokenizer.padding_side == "left"
    spaced = char_tokenizer("a \n")
    assert spaced.decode(spaced(" a\na ").input_ids) == " a\na "


def test_values_stand_where_log_probabilities_do(llama, tokenizer):
    rows = pack(encode(tokenizer, PROMPTS), encode(tokenizer, ["11", "9", "2"]), 0)
    own, shared = ValueModel(llama), ValueModel(llama, share_trunk=True)
    for critic in own, shared:
        assert not critic(rows.ids, rows.attention_mask).any()
        torch.nn.init.ones_(critic.head.weight)
    states = prefix_states(llama, rows.ids, rows.attention_mask)
    values = own(rows.ids, rows.attention_mask)
    torch.testing.assert_close(values, shared(rows.ids, rows.attention_mask, states))
    changed = rows.ids.clone()
    changed[:, -1] = 7
    torch.testing.assert_close(own(changed, rows.attention_mask), values)
    policy = {id(p) for p in llama.parameters()}
    assert not policy & {id(p) for p in own.parameters()}
    assert {id(p) for p in shared.parameters()} - policy == {id(p) for p in shared.head.parameters()}


def test_texts_end_where_the_completion_does(tokenizer):
    rows = pack([[5], [6, 7]], [[8, 9, 1], [4]], 0)
    assert rows.texts(tokenizer) == ["67", "2"]


def test_a_tokenizer_needs_an_end_and_may_lack_padding():
    tokenizer = char_tokenizer()
    tokenizer.pad_token = None
    assert pad_token_id(tokenizer) == 1
    tokenizer.eos_token = None
    with pytest.raises(ValueError, match="eos_token, got None"):
        pad_token_id(tokenizer)


def test_bad_rows_say_what_is_wrong(llama):
    rows = pack([[5, 6], [7]], [[8], [9, 1]], 0)
    with pytest.raises(ValueError, match=r"mask must have the shape .* \(2, 3\), ids \(2, 4\)"):
        token_logprobs(llama, rows.ids, rows.mask[:, 1:], attention_mask=rows.attention_mask)
    with pytest.raises(ValueError, match="attention_mask is on meta, the model on cpu"):
        token_logprobs(llama, rows.ids, rows.mask, attention_mask=rows.attention_mask.to("meta"))
    with pytest.raises(ValueError, match="with a real token before them"):
        token_logprobs(llama, rows.ids, rows.attention_mask, attention_mask=rows.attention_mask)
    with pytest.raises(ValueError, match="mask must be on real tokens"):
        token_logprobs(llama, rows.ids, ~rows.attention_mask, attention_mask=rows.attention_mask)
    with pytest.raises(ValueError, match="got 1 prompts and 2 completions"):
        pack([[5]], [[6], [7]], 0)


def test_other_bad_input_says_what_is_wrong(tmp_path, tokenizer):
    with pytest.raises(ValueError, match="name_or_path must be a folder .* got .*nothing"):
        load_lm(tmp_path / "nothing")
    with pytest.raises(ValueError, match="distinct characters, got 'aa'"):
        char_tokenizer("aa")


def test_a_model_with_unknown_logits_is_refused(tmp_path, tokenizer, monkeypatch):
    model = tiny_lm(tokenizer, **SMALL)
    model.save_pretrained(tmp_path)
    tokenizer.save_pretrained(tmp_path)
    forward = LlamaForCausalLM.forward

    def doubled(self, *args, **kwargs):
        out = forward(self, *args, **kwargs)
        out.logits = 2 * out.logits + 1
        return out

    monkeypatch.setattr(LlamaForCausalLM, "forward", doubled)
    with pytest.raises(ValueError, match="LlamaForCausalLM makes its logits"):
        load_lm(tmp_path)
