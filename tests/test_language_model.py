import math
from itertools import chain

import pytest
import torch
from transformers import (
    CohereConfig,
    CohereForCausalLM,
    Gemma2Config,
    Gemma2ForCausalLM,
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    LlamaForCausalLM,
    Qwen2Config,
    Qwen2ForCausalLM,
)

from po_book.language_model import (
    ChainAddition,
    Countdown,
    ValueModel,
    char_tokenizer,
    encode,
    enumerate_completions,
    is_held_out,
    join,
    load_lm,
    log_distribution,
    pack,
    pad_token_id,
    prefix_states,
    sample,
    sft,
    success_rate,
    tiny_lm,
    token_logprobs,
)

SMALL = dict(width=32, layers=2, heads=2, context=32)
PROMPTS = ["3+8+5=", "9=", "1+1+1+1="]
COMMON = dict(vocab_size=18, eos_token_id=1, bos_token_id=None, pad_token_id=None)
SIZES = dict(
    hidden_size=32,
    intermediate_size=64,
    num_hidden_layers=2,
    num_attention_heads=2,
    num_key_value_heads=1,
    max_position_embeddings=32,
)
MODELS = {
    "qwen2": lambda: Qwen2ForCausalLM(Qwen2Config(**COMMON, **SIZES, tie_word_embeddings=True)),
    "gpt2": lambda: GPT2LMHeadModel(
        GPT2Config(**COMMON, n_embd=32, n_layer=2, n_head=2, n_positions=32)
    ),
    "gemma2": lambda: Gemma2ForCausalLM(
        Gemma2Config(**COMMON, **SIZES, head_dim=16, sliding_window=4, final_logit_softcapping=8.0)
    ),
    "cohere": lambda: CohereForCausalLM(CohereConfig(**COMMON, **SIZES, logit_scale=3.0)),
    "granite": lambda: GraniteForCausalLM(GraniteConfig(**COMMON, **SIZES, logits_scaling=0.3)),
}


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.fixture(scope="module")
def tokenizer():
    return char_tokenizer()


@pytest.fixture(scope="module")
def llama(tokenizer):
    return tiny_lm(tokenizer, **SMALL)


@pytest.fixture(scope="module", params=["llama", *MODELS])
def saved(request, tmp_path_factory):
    "A folder with a tiny model whose weights are large enough to have opinions."
    folder, tokenizer = tmp_path_factory.mktemp(request.param), char_tokenizer()
    torch.manual_seed(0)
    make = MODELS.get(request.param, lambda: tiny_lm(tokenizer, **SMALL))
    model = make()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    model.save_pretrained(folder)
    tokenizer.pad_token = None
    tokenizer.save_pretrained(folder)
    return folder


def scored(model, rows, **settings):
    return token_logprobs(
        model, rows.ids, rows.mask, attention_mask=rows.attention_mask, **settings
    )


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


def test_scores_are_those_of_the_model_itself(saved):
    model, tokenizer = load_lm(saved)
    ids = torch.tensor(tokenizer("3+8=11").input_ids)
    rows = pack([ids[:4].tolist()], [ids[4:].tolist()], pad_token_id(tokenizer))
    with torch.no_grad():
        plain = model(ids[None]).logits[0].log_softmax(-1)
        logp = scored(model, rows)[0, 4:]
    torch.testing.assert_close(logp, plain[[3, 4], ids[4:]], atol=1e-5, rtol=0)


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


def test_success_is_a_share_of_all_completions(tokenizer):
    class Odd(ChainAddition):
        def verify(self, prompt, completion):
            seen.append(prompt)
            return len(seen) % 4 == 1

    seen = []
    rate = success_rate(
        tiny_lm(tokenizer, **SMALL), tokenizer, Odd(), PROMPTS, 4, generator(), samples=4
    )
    assert rate == 0.25
    assert seen == [prompt for prompt in PROMPTS for _ in range(4)]


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


def test_sampling_leaves_the_model_and_the_global_random_state_alone(tokenizer):
    state = torch.random.get_rng_state()
    model = tiny_lm(tokenizer, **SMALL).train()
    sample(model, tokenizer, PROMPTS, 2, 4, generator=generator())
    assert model.training
    assert torch.equal(state, torch.random.get_rng_state())


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


@pytest.mark.parametrize("task", [ChainAddition(), Countdown(), ChainAddition(6, 8)], ids=str)
def test_solutions_are_right_and_parts_are_disjoint(task):
    train, test = task.prompts(400), task.prompts(400, held_out=True)
    assert task.prompts(400) == train and task.prompts(400, seed=1) != train
    assert not {"".join(sorted(x)) for x in train} & {"".join(sorted(x)) for x in test}
    assert all(task.verify(x, task.solution(x)) for x in chain(train, test))
    assert not any(map(is_held_out, train)) and all(map(is_held_out, test))


@pytest.mark.parametrize(
    "completion, right",
    [("11,16", True), ("16", True), ("0,16", True), ("11,15", False), ("", False), ("11,16,", False), ("11,016", False)],
)
def test_chain_addition_looks_at_the_last_total(completion, right):
    assert ChainAddition().verify("3+8+5=", completion) == right


@pytest.mark.parametrize(
    "completion, right",
    [
        ("2*3=6,6+7=13", True),
        ("3*2=6,7+6=13", True),
        ("2*3=6", False),
        ("2+3=5,5+7=13", False),
        ("7+6=13", False),
        ("2*3=6,6+7=13,", False),
        ("", False),
        ("13", False),
        ("2-3=-1,-1+7=6", False),
    ],
)
def test_countdown_follows_the_steps(completion, right):
    assert Countdown().verify("2,3,7=13:", completion) == right


def test_fine_tuning_learns_and_repeats(tokenizer):
    task = ChainAddition(2, 2)
    prompts = task.prompts(200)
    solutions = list(map(task.solution, prompts))
    runs = []
    for _ in range(2):
        model = tiny_lm(tokenizer, **SMALL)
        runs.append(sft(model, tokenizer, prompts, solutions, 60, 32, 1e-2, generator()))
    assert runs[0] == runs[1]
    assert runs[0][-1] < 0.5 * runs[0][0]
    rate = success_rate(model, tokenizer, task, prompts[:100], 8, generator())
    assert rate > success_rate(tiny_lm(tokenizer, **SMALL), tokenizer, task, prompts[:100], 8, generator())


def test_texts_end_where_the_completion_does(tokenizer):
    rows = pack([[5], [6, 7]], [[8, 9, 1], [4]], 0)
    assert rows.texts(tokenizer) == ["67", "2"]


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
        ({"prompts": [[5, 99]]}, r"prompts\[0\] has tokens outside the vocabulary of 18"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"temperature": 0}, "temperature must be positive, got 0; .*top_k=1"),
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
    with pytest.raises(ValueError, match="fewest and most must be in order .* got 5 and 3"):
        ChainAddition(5, 3)
    with pytest.raises(ValueError, match="too few"):
        Few().prompts(1, held_out=not is_held_out("1+1="))


class Few(ChainAddition):
    def draw(self, rng):
        return "1+1="


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
