import copy

import pytest
import torch
from tiny_models import COMMON, MODELS, PROMPTS, SIZES, SMALL, generator, scored
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import (
    GPT2Config,
    GPT2LMHeadModel,
    GraniteConfig,
    GraniteForCausalLM,
    MistralConfig,
    MistralForCausalLM,
    PreTrainedTokenizerFast,
    Qwen3Config,
    Qwen3ForCausalLM,
)
from transformers.models.llama.modeling_llama import LlamaMLP

from po_book import sampling
from po_book.language_model import (
    char_tokenizer,
    encode,
    enumerate_completions,
    pack,
    tiny_lm,
)
from po_book.pretrained import load_lm
from po_book.sampling import branch_out, join, sample


@pytest.mark.parametrize(
    "settings", [{}, {"temperature": 0.6, "min_p": 0.1}, {"top_k": 3, "top_p": 0.9}], ids=str
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
        ({"prompts": []}, "prompts must be one or more, got none"),
        ({"prompts": [[{"role": "user", "content": "1"}]]}, "chat_template must be set"),
        ({"prompts": ["1" * 30]}, r"prompts\[0\] has 30 tokens, and 4 may follow.* 32"),
        ({"prompts": ["x="]}, "prompts cannot be tokenized"),
        ({"prompts": ["3+8=", [5, 6]]}, "all tokens or all messages, got texts and tokens"),
        ({"prompts": [[5, 99]]}, r"prompts\[0\] has tokens outside the vocabulary of 18"),
        ({"max_new_tokens": 0}, "max_new_tokens must be at least 1, got 0"),
        ({"max_new_tokens": 2.0}, "max_new_tokens must be a whole number, got 2.0"),
        ({"max_new_tokens": True}, "max_new_tokens must be a whole number, got True"),
        ({"group_size": 0}, "group_size must be at least 1, got 0"),
        ({"group_size": 1.5}, "group_size must be a whole number, got 1.5"),
        ({"at_once": -1}, "at_once must be at least 0, got -1"),
        ({"at_once": False}, "at_once must be a whole number, got False"),
        ({"stop": "1,"}, "stop must be a list of texts that are not empty, got '1,'"),
        ({"stop": ["1", ""]}, r"stop must be a list of texts .* got \['1', ''\]"),
        ({"stop": [5]}, r"stop must be a list of texts .* got \[5\]"),
        ({"stop": None}, "stop must be a list of texts .* got None"),
        ({"generator": 0}, "generator must be a torch.Generator, got int"),
        ({"temperature": 0}, r"temperature must be positive .*top_k=1.*, got 0"),
        ({"top_k": 0}, "top_k must be at least 1, got 0"),
        ({"top_p": 0.0}, r"top_p must be in \(0, 1\], got 0.0"),
        ({"min_p": 2.0}, r"min_p must be in \[0, 1\], got 2.0"),
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


def only(model, tokens: list[int]):
    "The model with no other tokens to write."
    bias = torch.full((model.lm_head.weight.shape[0],), -torch.inf)
    bias[tokens] = 0.0
    model.lm_head.bias = torch.nn.Parameter(bias, requires_grad=False)
    return model


def completions(drawn) -> list[list[int]]:
    return [row[keep].tolist() for row, keep in zip(drawn.ids, drawn.mask)]


def check_stops(model, tokenizer, prompts, stop: list[str]) -> None:
    "Completions end with the first token after which a stop text stands in them."
    drawn = sample(model, tokenizer, prompts, 200, 12, generator=generator(), stop=stop)
    rows, end = completions(drawn), tokenizer.eos_token_id
    for row, finished in zip(rows, drawn.finished.tolist()):
        texts = [tokenizer.decode(row[: t + 1]) for t in range(len(row))]
        stopped = [any(x in text for x in stop) for text in texts]
        assert not any(stopped[:-1]) and end not in row[:-1]
        assert finished == (stopped[-1] or row[-1] == end)
        assert finished or len(row) == 12
    kinds = {(row[-1] == end, done) for row, done in zip(rows, drawn.finished.tolist())}
    assert kinds == {(True, True), (False, True), (False, False)}


@pytest.mark.parametrize("stop", [["1,2"], ["12", "2,"], [",", ",", "11"], ["11,2", "22"]])
def test_a_stop_text_over_several_tokens_ends_a_completion(tokenizer, stop):
    model = only(tiny_lm(tokenizer, **SMALL), [1, *tokenizer("12,").input_ids])
    with torch.no_grad():
        model.lm_head.bias[1] = -3.0
    check_stops(model, tokenizer, ["9=", "1="], stop)


def test_a_token_may_hold_more_than_the_end_of_a_stop_text():
    words = ["<pad>", "<eos>", "EN", "D! ", "E", "ND", "x"]
    backend = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}))
    backend.decoder = decoders.Fuse()
    special = dict(pad_token="<pad>", eos_token="<eos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    model = tiny_lm(tokenizer, **SMALL)
    with torch.no_grad():
        only(model, [1, 2, 3, 4, 5, 6]).lm_head.bias[1] = -3.0
    check_stops(model, tokenizer, [[6]], ["END"])
    drawn = sample(model, tokenizer, [[6]], 200, 12, generator=generator(), stop=["END"])
    ends = {tuple(row[-2:]) for row in completions(drawn) if row[-1] in (3, 5)}
    assert {(2, 3), (4, 5)} <= ends


def test_a_stop_text_may_be_parts_of_letters():
    "Of a byte-level tokenizer a letter beyond ASCII is several tokens."
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    vocab = {x: i for i, x in enumerate(["<pad>", "<eos>", *alphabet])}
    backend = Tokenizer(models.BPE(vocab, []))
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    special = dict(pad_token="<pad>", eos_token="<eos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    (letter,) = encode(tokenizer, ["é"])
    assert len(letter) == 2
    model = tiny_lm(tokenizer, **SMALL)
    with torch.no_grad():
        only(model, [1, *letter, *tokenizer("a ").input_ids]).lm_head.bias[1] = -3.0
    for stop in "é a", "éé":
        check_stops(model, tokenizer, ["a"], [stop])


def test_a_stop_text_may_begin_with_a_space():
    "Some tokenizers drop the space that a row begins with; here every byte is a token."
    vocab = {x: i for i, x in enumerate(["<pad>", "<eos>", "▁", "a", "x"])}
    backend = Tokenizer(models.WordLevel(vocab))
    backend.decoder = decoders.Metaspace()
    special = dict(pad_token="<pad>", eos_token="<eos>")
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=backend, **special)
    assert tokenizer.decode([2, 3]) == "a" and tokenizer.decode([4, 2, 3]) == "x a"
    model = tiny_lm(tokenizer, **SMALL)
    with torch.no_grad():
        only(model, [1, 2, 3, 4]).lm_head.bias[1] = -3.0
    check_stops(model, tokenizer, [[4]], [" a"])


def test_a_special_token_may_be_a_stop_text(tokenizer):
    model = only(tiny_lm(tokenizer, **SMALL), [0, 5, 6])
    drawn = sample(model, tokenizer, PROMPTS, 20, 24, generator=generator(), stop=["<pad>"])
    assert drawn.finished.all()
    assert all(row.count(0) == 1 and row[-1] == 0 for row in completions(drawn))


def test_without_its_stop_text_a_completion_goes_on_as_it_was(tokenizer):
    model, (comma,) = tiny_lm(tokenizer, **SMALL), tokenizer(",").input_ids
    cut = 0
    for seed in range(20):
        free, stopped = (
            completions(sample(model, tokenizer, ["9="], 1, 24, generator=generator(seed), **x))
            for x in ({}, {"stop": [","]})
        )
        end = free[0].index(comma) + 1 if comma in free[0] else len(free[0])
        assert stopped[0] == free[0][:end]
        cut += comma in free[0]
    assert 5 < cut < 20


def test_a_stop_that_is_named_twice_is_one_stop(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    once = sample(model, tokenizer, PROMPTS, 8, 16, generator=generator(), stop=["1,"])
    model.generation_config.eos_token_id = [1, 1]
    twice = sample(model, tokenizer, PROMPTS, 8, 16, generator=generator(), stop=["1,", "1,"])
    assert torch.equal(once.ids, twice.ids) and torch.equal(once.finished, twice.finished)


def test_stop_tokens_that_the_model_came_with_end_a_completion(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    model.generation_config.eos_token_id = [7, 9]
    drawn = sample(model, tokenizer, PROMPTS, 50, 12, generator=generator())
    rows = completions(drawn)
    assert all(not {1, 7, 9} & set(row[:-1]) for row in rows)
    assert {row[-1] for row, done in zip(rows, drawn.finished) if done} == {1, 7, 9}
    assert all(done == (row[-1] in (1, 7, 9)) for row, done in zip(rows, drawn.finished.tolist()))


@pytest.mark.parametrize("settings", [{}, {"top_k": 3, "min_p": 0.2}], ids=str)
def test_some_prompts_at_a_time_are_calls_one_after_the_other(llama, tokenizer, settings):
    prompts, order = [*PROMPTS, "2=", "1+2="], generator()
    parts = [
        sample(llama, tokenizer, part, 3, 9, generator=order, stop=["1"], **settings)
        for part in (prompts[:2], prompts[2:4], prompts[4:])
    ]
    apart, (before, after) = join(parts, 0), (generator(), generator(5))
    drawn = sample(
        llama, tokenizer, prompts, 3, 9, generator=before, stop=["1"], at_once=2, **settings
    )
    for name, x in vars(apart).items():
        assert torch.equal(x, getattr(drawn, name)), name
    assert torch.equal(before.get_state(), order.get_state())
    whole, all_at_once = (
        sample(llama, tokenizer, prompts, 3, 9, generator=generator(5), at_once=n).ids
        for n in (0, 7)
    )
    assert torch.equal(whole, all_at_once)


def test_no_more_prompts_are_held_than_asked_for(tokenizer):
    model, read = only(tiny_lm(tokenizer, **SMALL), list(range(2, 18))), []
    sample(model, tokenizer, PROMPTS, 4, 5)  # the first time a model is tried out
    model.get_input_embeddings().register_forward_hook(lambda *x: read.append(x[1][0].shape))
    sample(model, tokenizer, PROMPTS * 2, 4, 5, generator=generator(), at_once=2)
    assert max(rows for rows, _ in read) <= 8
    assert [shape for shape in read if shape[1] > 1] == [(2, 6), (2, 8), (2, 8)]
    assert len(read) == 3 * 5  # the last token predicts nothing, so it is not read


def test_tokens_that_the_tokenizer_does_not_have_are_never_drawn(tokenizer):
    torch.manual_seed(0)
    wide = GPT2Config(
        vocab_size=64, n_embd=32, n_layer=2, n_head=2, n_positions=32,
        bos_token_id=None, eos_token_id=1, pad_token_id=0,
    )
    model = GPT2LMHeadModel(wide).eval()
    drawn = sample(model, tokenizer, PROMPTS, 50, 12, generator=generator())
    ids = drawn.ids[drawn.mask]
    assert set(ids.tolist()) == set(range(18))
    logp = scored(model, drawn, vocabulary=18)
    torch.testing.assert_close(logp, drawn.logps, atol=1e-5, rtol=0)
    letters = [sum(token > 1 for token in row) for row in completions(drawn)]
    assert list(map(len, drawn.texts(tokenizer))) == letters
    first = int(drawn.mask.any(0).int().argmax())
    prompt = drawn.ids[:1, :first][drawn.attention_mask[:1, :first]][None]
    with torch.no_grad():
        logp = model(prompt).logits[0, -1, :18].log_softmax(-1)
    torch.testing.assert_close(drawn.logps[0, first], logp[drawn.ids[0, first]])


def test_generation_settings_play_no_part_and_stay_as_they_are(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    plain = sample(model, tokenizer, PROMPTS, 8, 12, generator=generator())
    odd = dict(do_sample=False, temperature=0.3, top_p=0.5, repetition_penalty=3.0)
    model.generation_config.update(**odd, max_new_tokens=2, num_beams=4, use_cache=False)
    model.config.use_cache = False
    before = model.generation_config.to_dict(), model.config.to_dict()
    before = copy.deepcopy(before)
    drawn = sample(model, tokenizer, PROMPTS, 8, 12, generator=generator(), stop=["zz"])
    assert torch.equal(plain.ids, drawn.ids) and torch.equal(plain.logps, drawn.logps)
    assert (model.generation_config.to_dict(), model.config.to_dict()) == before


def test_every_part_of_a_model_keeps_its_mode_and_its_gradients(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    model.lm_head.weight.requires_grad_(False)
    for i, part in enumerate(model.modules()):
        part.training = i % 3 == 1
    for p in model.parameters():
        p.grad = torch.ones_like(p) if p.requires_grad else None
    seen = []
    hook = model.model.layers[1].register_forward_hook(
        lambda *x: seen.append(any(part.training for part in model.modules()))
    )
    sample(model, tokenizer, PROMPTS, 2, 4, generator=generator())
    with pytest.raises(RuntimeError, match="in the middle"):
        model.lm_head.register_forward_hook(interrupt)
        sample(model, tokenizer, PROMPTS, 2, 4, generator=generator())
    hook.remove()
    assert [part.training for part in model.modules()] == [
        i % 3 == 1 for i, _ in enumerate(model.modules())
    ]
    assert seen and not any(seen)
    assert not model.lm_head.weight.requires_grad and model.lm_head.weight.grad is None
    assert all((p.grad == 1).all() for p in model.parameters() if p.requires_grad)


def interrupt(*_):
    raise RuntimeError("in the middle")


@pytest.mark.parametrize("kind", ["llama", "qwen2", "gpt2"])
def test_gradient_checkpointing_and_dropout_leave_samples_alone(kind, tokenizer):
    "In training mode a layer with checkpointing would forget the cache."
    model = MODELS.get(kind, lambda: tiny_lm(tokenizer, **SMALL))().eval()
    plain = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    model.gradient_checkpointing_enable()
    layers = getattr(model.base_model, "layers", None) or model.base_model.h
    whole, some = (lambda: model.train()), (lambda: [x.train() for x in layers])
    for train in whole, some:
        model.eval()
        train()
        drawn = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
        assert torch.equal(plain.ids, drawn.ids)
        torch.testing.assert_close(plain.logps, drawn.logps)


def test_dropout_of_an_adapter_is_off_while_it_is_sampled(tokenizer):
    peft = pytest.importorskip("peft")
    torch.manual_seed(0)
    lora = peft.LoraConfig(lora_dropout=0.5, init_lora_weights=False, target_modules=["q_proj"])
    model = peft.get_peft_model(tiny_lm(tokenizer, **SMALL), lora).eval()
    plain = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    with model.disable_adapter():
        without = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    assert not torch.equal(plain.logps, without.logps)
    modes = [part.training for part in model.train().modules()]
    drawn = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    assert torch.equal(plain.ids, drawn.ids) and torch.equal(plain.logps, drawn.logps)
    assert [part.training for part in model.modules()] == modes


def test_messages_are_asked_as_their_template_says(llama):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}={% endfor %}"
    chats = [[{"role": "user", "content": text}] for text in ("1+2", "3", "4+5")]
    asked = sample(llama, tokenizer, chats, 2, 8, generator=generator())
    texts = sample(llama, tokenizer, ["1+2=", "3=", "4+5="], 2, 8, generator=generator())
    assert torch.equal(asked.ids, texts.ids) and torch.equal(asked.logps, texts.logps)


def test_log_probabilities_have_the_dtype_of_the_logits(tokenizer):
    model = tiny_lm(tokenizer, **SMALL).double()
    drawn = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    logp = scored(model, drawn)
    assert drawn.logps.dtype == logp.dtype == torch.float64
    torch.testing.assert_close(logp, drawn.logps, atol=1e-12, rtol=0)


def test_min_p_leaves_out_what_is_unlikely(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    bias = torch.randn(18, generator=generator())
    model.lm_head.bias = torch.nn.Parameter(bias)
    drawn = sample(model, tokenizer, [[5]], 400, 1, min_p=0.3, generator=generator())
    with torch.no_grad():
        p = model(torch.tensor([[5]])).logits[0, -1].softmax(-1)
    kept = p >= 0.3 * p.max()
    assert 1 < kept.sum() < 18
    assert set(drawn.ids[:, 1].tolist()) == set(kept.nonzero().squeeze(1).tolist())
    expected = (p / p[kept].sum()).log()[drawn.ids[:, 1]]
    torch.testing.assert_close(drawn.logps[:, 1], expected)


@pytest.mark.parametrize("wait", [1, 5])
def test_waits_for_an_answer(tokenizer, monkeypatch, wait):
    "Sizes and truths that Python asks for: on a GPU each is a wait."
    waits = {"aten::nonzero", "aten::_unique2", "aten::equal", "aten::_local_scalar_dense"}

    class Seen(TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            name, index = function._schema.name, args[1] if len(args) > 1 else ()
            masks = name == "aten::index" and any(x.dtype == torch.bool for x in index)
            counts.append(name in waits or masks)
            return function(*args, **(kwargs or {}))

    monkeypatch.setattr(sampling, "_patience", lambda device: wait)
    model = only(tiny_lm(tokenizer, **SMALL), list(range(2, 18)))
    sample(model, tokenizer, PROMPTS, 3, 10)  # the first time a model is tried out
    totals = []
    for room in 10, 20:
        counts = []
        with Seen():
            sample(model, tokenizer, PROMPTS, 3, room, generator=generator())
        totals.append(sum(counts))
    assert totals[1] - totals[0] == 10 / wait


def test_equal_branches_with_equal_tokens_are_one_branch():
    branch, tokens = torch.tensor([0, 0, 1, 1, 1]), torch.tensor([3, 3, 3, 2, 3])
    parents, firsts, new = branch_out(branch, tokens, 5)
    assert parents.tolist() == [0, 1, 1] and firsts.tolist() == [3, 2, 3]
    assert torch.equal(parents[new], branch) and torch.equal(firsts[new], tokens)


@pytest.mark.parametrize("more", [7, [7]])
def test_one_stop_token_that_a_model_came_with_may_be_a_number_or_a_list(tokenizer, more):
    model = tiny_lm(tokenizer, **SMALL)
    model.generation_config.eos_token_id = more
    drawn = sample(model, tokenizer, PROMPTS, 50, 12, generator=generator())
    ends = {row[-1] for row, done in zip(completions(drawn), drawn.finished) if done}
    assert ends == {1, 7} and all(not {1, 7} & set(row[:-1]) for row in completions(drawn))


@pytest.mark.parametrize("at_once", [0, 1])
def test_rows_are_filled_with_the_padding_of_the_tokenizer(at_once):
    tokenizer = char_tokenizer()
    tokenizer.pad_token = ":"
    model = only(tiny_lm(tokenizer, **SMALL), [1, 5])
    drawn = sample(model, tokenizer, PROMPTS, 4, 9, generator=generator(), at_once=at_once)
    filled = drawn.ids[~drawn.attention_mask]
    assert len(filled) > 20 and set(filled.tolist()) == {tokenizer.pad_token_id} == {17}
    assert (~drawn.attention_mask[:, :8]).any() and (~drawn.attention_mask[:, 8:]).any()


def test_a_completion_has_room_for_64_tokens_unless_another_number_is_given(tokenizer):
    model = only(tiny_lm(tokenizer, width=16, layers=1, heads=2), [5, 6])
    drawn = sample(model, tokenizer, PROMPTS, generator=generator())
    assert drawn.mask.sum(1).tolist() == [64] * 3 and not drawn.finished.any()


def test_a_generator_of_another_device_is_refused(tokenizer):
    model = tiny_lm(tokenizer, **SMALL).to("meta")
    with pytest.raises(ValueError, match="^generator must be on meta, got cpu$"):
        sample(model, tokenizer, PROMPTS, generator=generator())


KINDS = {
    **MODELS,
    "llama": lambda: tiny_lm(char_tokenizer(), **SMALL),
    "window": lambda: MistralForCausalLM(MistralConfig(**COMMON, **SIZES, sliding_window=4)),
    "no window": lambda: MistralForCausalLM(
        MistralConfig(**COMMON, **SIZES, sliding_window=None)
    ),
    "scaled": lambda: GraniteForCausalLM(
        GraniteConfig(**COMMON, **SIZES, embedding_multiplier=12.0)
    ),
    "normal keys": lambda: Qwen3ForCausalLM(Qwen3Config(**COMMON, **SIZES, head_dim=16)),
}


def loud(kind: str):
    "A model of this kind whose weights are large enough to have opinions."
    torch.manual_seed(0)
    model = KINDS[kind]().eval()
    with torch.no_grad():
        for p in model.parameters():
            p.add_(0.1 * torch.randn_like(p))
    return model


def as_others(model, *args, **settings):
    "What `sample` gives if the model is read as any model is."
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sampling, "_is_llama", lambda model: False)
        return sample(model, *args, **settings)


@pytest.mark.parametrize("kind", KINDS)
def test_a_step_is_written_out_for_models_that_are_built_so(kind):
    model = loud(kind)
    plain = {"qwen2", "granite", "llama", "no window"}
    assert sampling._is_llama(model) == (kind in plain)


@pytest.mark.parametrize("kind", ["qwen2", "granite", "llama", "no window", "scaled"])
@pytest.mark.parametrize("group", [1, 7])
def test_written_out_or_not_a_step_is_the_same(kind, group, tokenizer):
    model = loud(kind)
    how = dict(group_size=group, max_new_tokens=20, stop=["11"])
    theirs = as_others(model, tokenizer, PROMPTS, **how, generator=generator())
    ours = sample(model, tokenizer, PROMPTS, **how, generator=generator())
    assert 0 < ours.finished.sum() < 3 * group or group == 1
    assert torch.equal(ours.ids, theirs.ids) and torch.equal(ours.mask, theirs.mask)
    torch.testing.assert_close(ours.logps, theirs.logps, atol=1e-5, rtol=0)


def test_a_text_may_outgrow_the_room_there_was(tokenizer):
    model = only(tiny_lm(tokenizer, width=32, layers=2, heads=2, context=256), list(range(2, 18)))
    args = model, tokenizer, PROMPTS, 3, 150
    ours, theirs = sample(*args, generator=generator()), as_others(*args, generator=generator())
    assert ours.mask.sum() == 9 * 150 and torch.equal(ours.ids, theirs.ids)
    torch.testing.assert_close(ours.logps, theirs.logps, atol=1e-5, rtol=0)


def test_who_listens_to_a_layer_hears_every_token(tokenizer):
    model, heard = only(tiny_lm(tokenizer, **SMALL), list(range(2, 18))), []
    sample(model, tokenizer, PROMPTS, 2, 8)
    hook = model.model.layers[1].mlp.up_proj.register_forward_hook(lambda *x: heard.append(1))
    sample(model, tokenizer, PROMPTS, 2, 8)
    hook.remove()
    assert len(heard) == 8


def test_adapters_that_came_after_the_first_samples_take_part(tokenizer):
    peft, model = pytest.importorskip("peft"), tiny_lm(tokenizer, **SMALL)
    sample(model, tokenizer, PROMPTS, 2, 8)
    model = peft.get_peft_model(model, peft.LoraConfig(target_modules=["q_proj"])).eval()
    sample(model, tokenizer, PROMPTS, 2, 8)  # as before, since they begin at zero
    with torch.no_grad():
        for name, p in model.named_parameters():
            if "lora" in name:
                p.add_(torch.randn_like(p))
    drawn = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    torch.testing.assert_close(scored(model, drawn), drawn.logps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("kind", ["llama", "gpt2", "gemma2"])
@pytest.mark.parametrize("wait", [3, 8, 100])
def test_who_has_ended_may_be_asked_less_often(kind, wait, tokenizer, monkeypatch):
    model, letters = loud(kind), list(range(2, 18))
    args = model, tokenizer, PROMPTS, 5, 20
    monkeypatch.setattr(sampling, "_patience", lambda device: wait)
    drawn = sample(*args, generator=generator(), stop=["11", "2"])
    torch.testing.assert_close(scored(model, drawn), drawn.logps, atol=1e-5, rtol=0)
    assert drawn.mask.sum(1).max() == drawn.mask.shape[1] - 8  # no column of padding
    for row, done in zip(completions(drawn), drawn.finished.tolist()):
        text = tokenizer.decode(row)
        assert 1 not in row[:-1] and "11" not in text[:-1] and "2" not in text[:-1]
        assert done == (row[-1] == 1 or "11" in text or "2" in text)
        assert done or len(row) == 20
    if kind == "gpt2":
        return
    slow = sample(only(model, letters), *args[1:], generator=generator())
    monkeypatch.undo()
    often = sample(*args, generator=generator())
    assert torch.equal(slow.ids, often.ids), "where none ends the draws are the same"
    torch.testing.assert_close(slow.logps, often.logps, atol=1e-5, rtol=0)


def test_a_part_that_does_nothing_yet_may_do_something_later(tokenizer):
    class Adapted(LlamaMLP):
        def forward(self, x):
            return super().forward(x) + self.beside(x)

    model = tiny_lm(tokenizer, **SMALL)
    mlp = model.model.layers[0].mlp
    mlp.__class__, mlp.beside = Adapted, torch.nn.Linear(32, 32, bias=False)
    torch.nn.init.zeros_(mlp.beside.weight)
    sample(model, tokenizer, PROMPTS, 2, 8)
    torch.nn.init.normal_(mlp.beside.weight)
    drawn = sample(model, tokenizer, PROMPTS, 4, 8, generator=generator())
    torch.testing.assert_close(scored(model, drawn), drawn.logps, atol=1e-5, rtol=0)
