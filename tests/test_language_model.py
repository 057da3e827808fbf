import math
from collections import UserList
from types import SimpleNamespace

import pytest
import torch
from tiny_models import PROMPTS, SMALL, generator, scored
from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, processors
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    LlamaForCausalLM,
    MinPLogitsWarper,
    PreTrainedTokenizerFast,
    TopKLogitsWarper,
    TopPLogitsWarper,
)

from po_book.language_model import (
    ValueModel,
    char_tokenizer,
    check_sampling,
    encode,
    enumerate_completions,
    log_distribution,
    next_logits,
    pack,
    prefix_states,
    tiny_lm,
    token_logprobs,
    toy_lm,
)
from po_book.pretrained import load_lm, pad_token_id
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
        (1.0, None, 1e-9): [1.0, 0.0, 0.0],
        (1.0, None, None, 0.0): [0.5, 0.3, 0.2],
        (1.0, None, None, 0.5): [0.625, 0.375, 0],
        (1.0, None, None, 0.61): [1.0, 0.0, 0.0],
        (1.0, None, None, 1.0): [1.0, 0.0, 0.0],
        (0.5, None, None, 0.3): [25 / 34, 9 / 34, 0],
    }
    for settings, expected in cases.items():
        torch.testing.assert_close(
            log_distribution(logits, *settings).exp(), torch.tensor(expected)
        )


LARGE = 151_936  # tokens of a common vocabulary


def large_logits(rows: int) -> torch.Tensor:
    return 2 * torch.randn(rows, LARGE, generator=generator())


def test_top_p_of_one_cuts_nothing():
    logits = large_logits(2)
    logp = log_distribution(logits, top_p=1.0)
    assert torch.equal(logp, logits.log_softmax(-1)) and logp.isfinite().all()


@pytest.mark.parametrize("top_p", [0.5, 0.9, 0.999, 1 - 1e-6, 1 - 1e-9])
def test_top_p_keeps_the_fewest_tokens_that_reach_it(top_p):
    "Counted in float64; float32 may be wrong about tokens on the very edge only."
    logits = large_logits(2)
    p = logits.double().softmax(-1).sort(descending=True).values
    needed = ((p.cumsum(-1) - p) < top_p).sum(-1)
    kept = log_distribution(logits, top_p=top_p).isfinite().sum(-1)
    assert (kept - needed).abs().max() <= 1e-4 * needed.max()


def test_kept_tokens_are_those_that_transformers_keeps():
    logits = 3 * torch.randn(64, 300, generator=generator())
    warpers = {
        "top_k": (TopKLogitsWarper, 7),
        "top_p": (TopPLogitsWarper, 0.8),
        "min_p": (MinPLogitsWarper, 0.05),
    }
    for name, (warper, x) in warpers.items():
        theirs = warper(x)(None, logits).log_softmax(-1)
        ours = log_distribution(logits, **{name: x})
        torch.testing.assert_close(ours, theirs)
        assert 1 < ours.isfinite().sum(-1).double().mean() < 100
    every = logits / 0.7
    for warper, x in warpers.values():
        every = warper(x)(None, every)
    ours = log_distribution(logits, 0.7, 7, 0.8, 0.05)
    torch.testing.assert_close(ours, every.log_softmax(-1))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32, torch.float64])
def test_a_distribution_has_the_dtype_of_its_logits(dtype):
    logits = torch.randn(3, 50, generator=generator()).to(dtype)
    for settings in {}, dict(temperature=0.7, top_k=9, top_p=0.9, min_p=0.01):
        logp = log_distribution(logits, **settings)
        assert logp.dtype == dtype
        total = logp.double().exp().sum(-1)
        torch.testing.assert_close(total, total.new_ones(3), atol=0.02, rtol=0)


def test_settings_that_change_nothing_cost_nothing():
    "One softmax, and no copy of the logits besides."

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    names, logits = [], torch.randn(3, 50)
    with Seen():
        log_distribution(logits, 1.0, 50, 1.0, 0.0)
    assert names == ["aten::_log_softmax"]


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"temperature": math.inf}, "temperature must be positive and finite .* got inf"),
        ({"temperature": math.nan}, "temperature must be positive and finite .* got nan"),
        ({"temperature": "hot"}, "temperature must be positive and finite .* got hot"),
        ({"temperature": True}, "temperature must be a number, got True"),
        ({"top_k": 2.5}, "top_k must be a whole number, got 2.5"),
        ({"top_k": True}, "top_k must be a whole number, got True"),
        ({"top_k": -1}, "top_k must be at least 1, got -1"),
        ({"top_p": True}, "top_p must be a number, got True"),
        ({"top_p": 1.01}, r"top_p must be in \(0, 1\], got 1.01"),
        ({"top_p": math.nan}, r"top_p must be in \(0, 1\], got nan"),
        ({"min_p": -0.1}, r"min_p must be in \[0, 1\], got -0.1"),
        ({"min_p": 1.01}, r"min_p must be in \[0, 1\], got 1.01"),
        ({"min_p": "0.1"}, r"min_p must be a number in \[0, 1\], got '0.1'"),
        ({"min_p": False}, "min_p must be a number, got False"),
    ],
)
def test_settings_that_leave_no_distribution_are_refused(settings, message):
    for refuses in check_sampling, lambda **x: log_distribution(torch.zeros(3), **x):
        with pytest.raises(ValueError, match=message):
            refuses(**settings)


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


TEMPLATE = (
    "{{ bos_token }}{% for m in messages %}<user>{{ m.content }}{% endfor %}"
    "{% if add_generation_prompt %}<bot>{% endif %}"
)
CHAT = [{"role": "user", "content": "1+2="}]


@pytest.fixture
def chatty() -> PreTrainedTokenizerFast:
    "A tokenizer that puts a bos token in front, with a chat template that does so too."
    marks = ["<pad>", "<eos>", "<bos>", "<user>", "<bot>"]
    vocab = {x: i for i, x in enumerate([*marks, *"012+="])}
    backend = Tokenizer(models.WordLevel(vocab))
    backend.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    backend.decoder = decoders.Fuse()
    backend.post_processor = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", 2)]
    )
    return PreTrainedTokenizerFast(
        tokenizer_object=backend,
        pad_token="<pad>",
        eos_token="<eos>",
        bos_token="<bos>",
        additional_special_tokens=marks[3:],
        chat_template=TEMPLATE,
    )


def test_a_text_that_begins_with_bos_gets_no_second_one(chatty):
    rendered = chatty.apply_chat_template(CHAT, tokenize=False, add_generation_prompt=True)
    assert rendered == "<bos><user>1+2=<bot>"
    rows = encode(chatty, [rendered, "1+2=", "<bos>", "<bos><bos>1", ""])
    assert rows == [[2, 3, 6, 8, 7, 9, 4], [2, 6, 8, 7, 9], [2], [2, 2, 6], [2]]
    assert encode(chatty, [[2, 6], [6]]) == [[2, 6], [6]]


def test_a_bos_that_the_tokenizer_does_not_add_stays_as_it_is_written(chatty):
    chatty.backend_tokenizer.post_processor = processors.TemplateProcessing(single="$A")
    assert encode(chatty, ["<bos>1", "<bos><bos>1", "1"]) == [[2, 6], [2, 2, 6], [6]]


def test_messages_go_through_the_template_once_and_ask_for_an_answer(chatty):
    longer = [*CHAT, {"role": "assistant", "content": "2"}, {"role": "user", "content": "0"}]
    rows = encode(chatty, [CHAT, longer])
    assert rows[0] == [2, 3, 6, 8, 7, 9, 4]
    assert rows[1] == [2, 3, 6, 8, 7, 9, 3, 7, 3, 5, 4]
    theirs = chatty.apply_chat_template([CHAT, longer], add_generation_prompt=True)
    assert rows == theirs["input_ids"]


def test_prompts_of_any_sequence_are_taken(chatty):
    "A column of a data set is one."
    assert encode(chatty, UserList(["1", "2"])) == encode(chatty, ("1", "2")) == [[2, 6], [2, 7]]
    assert encode(chatty, UserList([CHAT, CHAT])) == 2 * [[2, 3, 6, 8, 7, 9, 4]]
    assert encode(chatty, []) == []


NO_PROMPT = r"prompts\[1\] must be a text, tokens, or messages with a role and a text"


@pytest.mark.parametrize(
    "prompt, got",
    [
        ([], r"\[\]"),
        (["1", "+"], r"\['1', '\+'\]"),
        ([1.0], r"\[1.0\]"),
        ([True], r"\[True\]"),
        ([1, "1"], r"\[1, '1'\]"),
        ([*CHAT, 1], r"\[\{'content': '1\+2=', 'role': 'user'\}, 1\]"),
        ([{"role": "user"}], r"\[\{'role': 'user'\}\]"),
        ([{"content": "1"}], r"\[\{'content': '1'\}\]"),
        ([{"role": "user", "content": None}], "None"),
        (CHAT[0], r"\{'content': '1\+2=', 'role': 'user'\}"),
        (torch.tensor([1, 2]), r"tensor\(\[1, 2\]\)"),
        (5, "5"),
        (None, "None"),
    ],
)
def test_what_is_no_prompt_is_refused(chatty, prompt, got):
    with pytest.raises(ValueError, match=f"{NO_PROMPT} as content, got .*{got}"):
        encode(chatty, ["1", prompt])


def test_what_a_tokenizer_gives_is_no_prompt(chatty):
    one, two = chatty("1+2="), chatty(["1+2=", "1"])
    with pytest.raises(ValueError, match=r"prompts\[0\] must be a text, tokens, .* got"):
        encode(chatty, [one])
    for several in one, two, "1+2=", 5, torch.tensor([[1, 2]]):
        with pytest.raises(ValueError, match="prompts must be a list of prompts, got"):
            encode(chatty, several)


def test_prompts_are_of_one_kind(chatty):
    rule = "all texts, all tokens or all messages"
    for prompts, got in [
        (["1", [6]], "texts and tokens"),
        ([CHAT, "1"], "messages and texts"),
        ([[6], CHAT, "1"], "messages and texts and tokens"),
    ]:
        with pytest.raises(ValueError, match=f"prompts must be {rule}, got {got}"):
            encode(chatty, prompts)


def test_messages_need_a_template_that_takes_them(chatty):
    chatty.chat_template = "{{ raise_exception('roles must alternate') }}"
    with pytest.raises(ValueError, match="cannot be tokenized: roles must alternate"):
        encode(chatty, [CHAT])
    chatty.chat_template = None
    with pytest.raises(ValueError, match="tokenizer.chat_template must be set .* got None"):
        encode(chatty, [CHAT])


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


# What it is made of


def test_a_tiny_model_is_as_large_as_was_asked_and_ready_to_be_used(tokenizer):
    model = tiny_lm(tokenizer, width=48, layers=2, heads=3, context=20)
    sizes = "hidden_size", "num_hidden_layers", "num_attention_heads", "max_position_embeddings"
    assert [getattr(model.config, name) for name in sizes] == [48, 2, 3, 20]
    assert (model.config.pad_token_id, model.config.eos_token_id) == (0, 1)
    assert not model.training and model.dtype == torch.float32
    assert tiny_lm(tokenizer).config.num_attention_heads == 4


def test_the_toy_model_writes_two_letters_and_an_end():
    model, letters = toy_lm(seed=3)
    plain = tiny_lm(letters, width=16, layers=1, heads=2, seed=3)
    ids = torch.tensor([letters("qab").input_ids])
    with torch.no_grad():
        logits, without = model(ids).logits, plain(ids).logits
    assert letters.convert_tokens_to_ids(["<pad>", "<eos>", "a", "b", "q"]) == [0, 1, 2, 3, 4]
    assert logits[0, -1].isfinite().tolist() == [False, True, True, True, False]
    assert torch.equal(logits[..., 1:4], without[..., 1:4])


def test_both_ends_of_rows_are_filled_with_the_token_that_is_given():
    rows = pack([[5], [6, 7]], [[8, 9], []], pad_id=3)
    assert rows.ids.tolist() == [[3, 5, 8, 9], [6, 7, 3, 3]]
    assert rows.attention_mask.int().tolist() == [[0, 1, 1, 1], [1, 1, 0, 0]]
    assert rows.mask.int().tolist() == [[0, 0, 1, 1], [0, 0, 0, 0]]


def test_tokens_that_are_given_are_copied(chatty):
    given = [[2, 6], [7]]
    encode(chatty, given)[0].append(1)
    assert given == [[2, 6], [7]]
    assert encode(chatty, [(2, 6)]) == [[2, 6]]


def test_equals_of_the_last_token_that_is_kept_are_kept():
    logp = log_distribution(torch.tensor([0.0, 1.0, 1.0, 1.0]), top_k=2)
    torch.testing.assert_close(logp.exp(), torch.tensor([0, 1 / 3, 1 / 3, 1 / 3]))


def test_logits_are_scaled_and_capped_as_the_text_part_of_a_model_says():
    "A model of texts and images has a configuration for each."
    text = SimpleNamespace(logits_scaling=0.5, final_logit_softcapping=4.0)
    config = SimpleNamespace(get_text_config=lambda: text)
    model = SimpleNamespace(config=config, get_output_embeddings=torch.nn.Identity)
    logits = next_logits(model, torch.tensor([[2.0, 0.0, -1.0]]))
    expected = 4 * torch.tensor([[1.0, 0.0, -0.5]]).tanh()
    torch.testing.assert_close(logits, expected)


def test_values_are_float32_whatever_the_model_is(tokenizer):
    model = tiny_lm(tokenizer, **SMALL).bfloat16()
    critic, rows = ValueModel(model), pack([[5, 6]], [[8]], 0)
    torch.nn.init.ones_(critic.head.weight)
    values = critic(rows.ids, rows.attention_mask)
    assert critic.head.weight.dtype == values.dtype == torch.float32
    states = prefix_states(model, rows.ids, rows.attention_mask)
    torch.testing.assert_close(values, states.float().sum(-1))


# What a score costs


def test_no_keys_and_values_are_held_where_nothing_reads_them_again(llama, tokenizer):
    rows, held = pack([[5, 6]] * 2, [[8], [9]], 0), []
    hook = llama.model.register_forward_hook(lambda *x: held.append(x[2].past_key_values))
    for size in 1, 2:
        scored(llama, rows, group_size=size)
    hook.remove()
    assert held[0] is None and len(held) == 2 and held[1] is not None


def test_a_row_of_logits_fits_whatever_the_limit(llama):
    rows = pack([[5, 6]], [[8, 9]], 0)
    torch.testing.assert_close(scored(llama, rows, max_logits=1), scored(llama, rows))


def test_logits_of_parts_are_not_held_until_the_backward_pass(llama):
    "They are made anew there; where they fit at once, they are made once."
    rows, calls = pack([[5, 6]] * 16, [[8, 9, 7, 6]] * 16, 0), []
    hook = llama.lm_head.register_forward_hook(lambda *x: calls.append(len(x[2])))
    counts = []
    for limit in 18 * 64, 18 * 16:
        calls.clear()
        loss = scored(llama, rows, max_logits=limit).sum()
        forward = len(calls)
        loss.backward()
        counts.append((forward, len(calls)))
    hook.remove()
    llama.zero_grad()
    assert counts == [(1, 1), (4, 8)]


def test_where_all_tokens_are_kept_no_table_of_log_probabilities_is_made(llama):
    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            names.append(function._schema.name)
            return function(*args, **(kwargs or {}))

    rows, made = pack([[5, 6]], [[8, 9]], 0), []
    for settings in {}, {"temperature": 0.5}, {"top_k": 3}:
        names = []
        with torch.no_grad(), Seen():
            scored(llama, rows, **settings)
        made.append("aten::_log_softmax" in names)
    assert made == [False, False, True]


# Scores and their settings


@pytest.mark.parametrize("settings", [{}, {"top_k": 18}], ids=str)
@pytest.mark.parametrize("temperature", [0.5, 1.0, 3.0])
def test_a_score_is_of_the_temperature(llama, temperature, settings):
    rows = pack([[5, 6]], [[8, 9]], 0)
    with torch.no_grad():
        logp = (llama(rows.ids).logits[0] / temperature).log_softmax(-1)
        found = scored(llama, rows, temperature=temperature, **settings)
    torch.testing.assert_close(found[0, 2:], logp[[1, 2], [8, 9]], atol=1e-5, rtol=0)


@pytest.mark.parametrize(
    "settings", [{"temperature": 0}, {"temperature": -1.0}, {"top_k": 0}, {"top_p": 0}, {"min_p": 2}], ids=str
)
def test_a_score_of_no_distribution_is_refused(llama, settings):
    with pytest.raises(ValueError, match=f"^{next(iter(settings))} must be "):
        scored(llama, pack([[5, 6]], [[8]], 0), **settings)


@pytest.mark.parametrize("size", [0, -1, -2, 4])
def test_groups_have_a_whole_number_of_rows_above_zero(llama, size):
    rows = pack([[5, 6]] * 6, [[8]] * 6, 0)
    with pytest.raises(ValueError, match=f"must be positive and divide the 6 rows, got {size}$"):
        scored(llama, rows, group_size=size)


def test_prompts_that_differ_in_their_padding_are_not_shared(llama):
    "One begins with the token that fills the other up."
    rows = pack([[5, 6], [6]], [[8], [9]], pad_id=5)
    assert torch.equal(rows.ids[0, :2], rows.ids[1, :2])
    with pytest.raises(ValueError, match="rows of a group of 2 must share their prompt"):
        scored(llama, rows, group_size=2)


def test_padding_behind_real_tokens_has_no_score(llama):
    rows = pack([[5, 6]] * 2, [[8, 9], [9]], 0)
    mask = rows.mask.clone()
    mask[1, 3] = True
    with pytest.raises(ValueError, match="mask must be on real tokens"):
        token_logprobs(llama, rows.ids, mask, attention_mask=rows.attention_mask)


def test_values_are_float32_where_products_are_bfloat16():
    model = tiny_lm(char_tokenizer(), **SMALL)
    critic = ValueModel(model)
    torch.nn.init.normal_(critic.head.weight, generator=generator())
    ids = torch.arange(2, 10)[None]
    with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
        states = prefix_states(model, ids, ids > 0)
        values = critic(ids, ids > 0, states)
    want = states.float() @ critic.head.weight[0]
    assert values.dtype == torch.float32
    torch.testing.assert_close(values, want, rtol=1e-6, atol=1e-6)


def test_no_prompt_is_shared_where_one_layer_forgets_its_cache(tokenizer):
    "A layer that is computed anew in the backward pass keeps no keys and values."
    model = tiny_lm(tokenizer, **SMALL)
    rows = pack([[5, 6, 7]] * 2 + [[9]] * 2, [[8, 9], [9], [4, 1], [5, 5]], 0)
    plain = scored(model, rows).detach()
    model.gradient_checkpointing_enable()
    for i, layer in enumerate(model.model.layers):
        layer.train(i == 1)
    torch.testing.assert_close(scored(model, rows, group_size=2), plain, atol=1e-5, rtol=0)


def test_every_completion_ends_with_a_stop_or_is_cut_off():
    every = [[1], [5, 1], [6, 1], [5, 5], [5, 6], [6, 5], [6, 6]]
    assert enumerate_completions([5, 6], 1, 2) == every
    assert enumerate_completions([5, 6], 1, 0) == [[]]
