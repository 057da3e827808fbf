import pytest
import torch
from tiny_models import PROMPTS, SMALL, generator, scored

from po_book.language_model import (
    char_tokenizer,
    enumerate_completions,
    pack,
    tiny_lm,
)
from po_book.pretrained import load_lm
from po_book.sampling import branch_out, join, sample


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6}, {"top_k": 3, "top_p": 0.9}], ids=str
)
def test_sampler_and_learner_agree_for_every_kind_of_model(saved, settings):
    model, tokenizer = load_lm(saved)
    drawn = sample(model, tokenizer, PROMPTS, 5, 12, generator=generator(), **settings)
    logp = scored(model, drawn, **settings)
    assert drawn.mask.any(1).all()
    assert drawn.logps[drawn.mask].std() > 0.01
    torch.testing.assert_close(logp, drawn.logps, atol=1e-5, rtol=0)


def test_a_most_likely_completion_is_the_one_generate_finds(saved):
    model, tokenizer = load_lm(saved)
    drawn = sample(model, tokenizer, PROMPTS, 2, 8, top_k=1)
    for i, prompt in enumerate(PROMPTS):
        ids = torch.tensor([tokenizer(prompt).input_ids])
        attend = torch.ones_like(ids)
        found = model.generate(
            ids, attention_mask=attend, do_sample=False, max_new_tokens=8, pad_token_id=1
        )[0, ids.shape[1] :].tolist()
        for row in (2 * i, 2 * i + 1):
            assert drawn.ids[row][drawn.mask[row]].tolist() == found[: drawn.mask[row].sum()]
            assert drawn.mask[row].sum() == len(found)


def test_bfloat16_weights_give_float32_scores_close_to_the_samplers(saved):
    model, tokenizer = load_lm(saved, dtype=torch.bfloat16)
    drawn = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    logp = scored(model, drawn)
    assert logp.dtype == drawn.logps.dtype == torch.float32
    torch.testing.assert_close(logp, drawn.logps, atol=0.25, rtol=0)


def test_samples_of_several_calls_are_put_together(llama, tokenizer):
    calls = [(["3+8+5=", "9="], 3), (["1="], 9), (["1+1+1+1=", "2="], 5)]
    parts = [sample(llama, tokenizer, p, 2, n, generator=generator()) for p, n in calls]
    whole = join(parts, tokenizer.pad_token_id)
    assert whole.texts(tokenizer) == [text for x in parts for text in x.texts(tokenizer)]
    assert whole.finished.tolist() == [x for part in parts for x in part.finished.tolist()]
    assert whole.ids.shape == (10, 8 + 9)
    torch.testing.assert_close(scored(llama, whole), whole.logps, atol=1e-5, rtol=0)
    torch.testing.assert_close(
        scored(llama, whole, group_size=2), whole.logps, atol=1e-5, rtol=0
    )
    some = whole.rows(torch.tensor([7, 0]))
    texts = whole.texts(tokenizer)
    assert some.texts(tokenizer) == [texts[7], texts[0]]
    assert torch.equal(some.logps.sum(1), whole.logps.sum(1)[[7, 0]])
    with pytest.raises(ValueError, match="parts must be samples, got none"):
        join([], 0)


def test_equal_prefixes_are_computed_once(llama, tokenizer):
    rows = []
    hook = llama.lm_head.register_forward_hook(lambda *x: rows.append(x[2].shape[0]))
    sample(llama, tokenizer, PROMPTS, 8, 6, top_k=1)
    hook.remove()
    assert set(rows) == {3}


def test_finished_completions_leave_the_batch(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    model.lm_head.bias = torch.nn.Parameter(torch.zeros(18))
    with torch.no_grad():
        model.lm_head.bias[1] = 2.0
    rows = []
    hook = model.lm_head.register_forward_hook(lambda *x: rows.append(x[2].shape[0]))
    drawn = sample(model, tokenizer, PROMPTS, 30, 20, generator=generator())
    hook.remove()
    running = drawn.mask.sum(0)[-len(rows) :]
    assert rows[0] == 3 and rows[-1] < 30
    assert all(n <= m for n, m in zip(rows, running.tolist()))


def test_same_seed_same_completions(llama, tokenizer):
    first, again, other = (
        sample(llama, tokenizer, PROMPTS, 3, 8, generator=generator(s)).ids for s in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert first.shape != other.shape or not torch.equal(first, other)


def test_frequencies_are_the_enumerated_probabilities():
    letters = char_tokenizer("ab")
    model = tiny_lm(letters, width=16, layers=1, heads=2, seed=3)
    every = enumerate_completions([0, 2, 3], 1, 2)
    rows = pack([[2]] * len(every), every, 0)
    p = scored(model, rows, temperature=0.5, top_k=3).sum(1).exp()
    assert len(every) == 1 + 3 + 9
    assert p.sum().item() == pytest.approx(1, abs=1e-5)
    drawn = sample(model, letters, [[2]], 20_000, 2, 0.5, 3, generator=generator())
    found = [tuple(row[keep].tolist()) for row, keep in zip(drawn.ids, drawn.mask)]
    for o, probability in zip(every, p):
        assert found.count(tuple(o)) / 20_000 == pytest.approx(probability.item(), abs=0.015)


def test_sampling_leaves_the_model_and_the_global_random_state_alone(tokenizer):
    state = torch.random.get_rng_state()
    model = tiny_lm(tokenizer, **SMALL).train()
    sample(model, tokenizer, PROMPTS, 2, 4, generator=generator())
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())


def test_a_cut_off_completion_is_not_finished(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    model.lm_head.bias = torch.nn.Parameter(torch.full((18,), -1e4), requires_grad=False)
    model.lm_head.bias[1] = 1e4
    ended = sample(model, tokenizer, PROMPTS, 1, 5)
    assert ended.finished.all() and ended.mask.sum() == 3
    model.lm_head.bias[:2] = torch.tensor([0, -1e4])
    model.lm_head.bias[5] = 1e4
    cut = sample(model, tokenizer, PROMPTS, 1, 5)
    assert not cut.finished.any() and (cut.mask.sum(1) == 5).all()


@pytest.mark.parametrize(
    "change, message",
    [
        ({"prompts": ["3+8=", ""]}, r"prompts\[1\] is empty"),
        ({"prompts": []}, "pair up, got 0 prompts"),
        ({"prompts": ["1" * 30]}, r"prompts\[0\] has 30 tokens, and 4 may follow.* 32"),
        ({"prompts": ["x="]}, "prompts cannot be tokenized"),
        ({"prompts": ["3+8=", [5, 6]]}, "all tokens or all messages, got texts and tokens"),
        ({"prompts": [[5, 99]]}, r"prompts\[0\] has tokens outside the vocabulary of 18"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"temperature": 0}, r"temperature must be positive .*top_k=1.*, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
    ],
)
def test_bad_requests_say_what_is_wrong(llama, tokenizer, change, message):
    request = dict(prompts=PROMPTS, max_new_tokens=4) | change
    with pytest.raises(ValueError, match=message):
        sample(llama, tokenizer, **request)


def test_weights_with_nan_are_noticed(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    with torch.no_grad():
        model.lm_head.weight[3] = torch.nan
    with pytest.raises(ValueError, match="logits that are not finite"):
        sample(model, tokenizer, PROMPTS, 1, 4)


def test_equal_branches_with_equal_tokens_are_one_branch():
    branch, tokens = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 3, 3, 2, 3])
    parents, firsts, new = branch_out(branch, tokens, 5)
    assert parents.tolist() == [0, 1, 1] and firsts.tolist() == [3, 2, 3]
    assert torch.equal(parents[new], branch) and torch.equal(firsts[new], tokens)
