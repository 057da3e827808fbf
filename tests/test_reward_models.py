"Reward models, classifiers from the hub, best of n, steps, judges."
import asyncio
import itertools
import math

import pytest
import torch
from tokenizers import Tokenizer, models, processors
from transformers import (
    BertConfig,
    BertForSequenceClassification,
    GPT2Config,
    GPT2ForSequenceClassification,
    GPT2LMHeadModel,
    LlamaConfig,
    LlamaForSequenceClassification,
    PreTrainedTokenizerFast,
)

from po_book import language_model, reward_models
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.reward_models import (
    QUESTION,
    RewardModel,
    best_of_n,
    bradley_terry_loss,
    classifier_reward,
    fit_reward_model,
    judge,
    pair_accuracy,
    potential_rewards,
    prefixes,
    step_scores,
)
from po_book.rewards import compute_rewards, weighted_sum


def noise(seed, *shape):
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


@pytest.fixture
def model():
    tokenizer = char_tokenizer()
    return RewardModel(tiny_lm(tokenizer, width=16, layers=1, heads=2), tokenizer)


def test_a_score_is_the_head_at_the_end_of_the_text(model):
    "Rows of other lengths beside it change nothing."
    with torch.no_grad():
        model.head.weight.copy_(noise(0, *model.head.weight.shape))
        scores = model(["1+", "12"], ["2", "345"])
        for text, score in zip(["1+2", "12345"], scores):
            ids = torch.tensor([model.tokenizer(text).input_ids + [model.tokenizer.eos_token_id]])
            state = model.trunk(input_ids=ids).last_hidden_state[0, -1]
            assert score.item() == pytest.approx(model.head(state).item(), rel=1e-4)


# Preferences


def test_the_loss_of_a_known_difference():
    got = bradley_terry_loss(torch.tensor([3.0]).log(), torch.zeros(1))
    assert got.item() == pytest.approx(math.log(4 / 3), abs=1e-6)


def test_the_loss_is_finite_at_large_differences():
    assert bradley_terry_loss(torch.tensor([-1e4]), torch.zeros(1)).item() == 1e4


def test_the_loss_ignores_a_constant_per_pair():
    better, worse, shift = noise(0, 3, 9).double()
    shifted = bradley_terry_loss(better + shift, worse + shift)
    torch.testing.assert_close(shifted, bradley_terry_loss(better, worse))


def test_accuracy_counts_ties_half():
    assert pair_accuracy(torch.tensor([2.0, 0.0, 1.0]), torch.tensor([1.0, 1.0, 1.0])) == 0.5
    assert pair_accuracy(torch.ones(2, 1), torch.zeros(3)) == 1.0


def test_a_fresh_model_is_indifferent(model):
    assert compute_rewards(model.reward, ["1+1=", "2+2="], ["2", ""]) == [0.0, 0.0]


def test_scores_do_not_depend_on_padding_or_order(model):
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    prompts, completions = ["1+1=", "1+2+3+4=", "9+9="], ["2", "3,6,10", ""]
    together = torch.tensor(model.reward(prompts, completions))
    alone = torch.tensor([model.reward([q], [o])[0] for q, o in zip(prompts, completions)])
    assert together.unique().numel() == 3
    torch.testing.assert_close(together, alone, rtol=0, atol=1e-5)
    backwards = torch.tensor(model.reward(prompts[::-1], completions[::-1]))
    torch.testing.assert_close(backwards.flip(0), together, rtol=0, atol=1e-5)


def test_more_rows_than_a_part_keep_their_order(model):
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    completions = [str(i) for i in range(300)]
    got = model.reward(["1+1="] * 300, completions)
    assert got[299] == pytest.approx(model.reward(["1+1="], ["299"])[0], abs=1e-5)


def test_preferences_for_a_digit_are_learnt_and_generalise(model):
    prompts = [f"{a}+{b}=" for a in range(1, 9) for b in range(1, 9)]
    generator = torch.Generator().manual_seed(0)
    losses = fit_reward_model(
        model, prompts, ["7"] * 64, ["3"] * 64, 30, 16, lr=1e-2, generator=generator
    )
    assert losses[0] == pytest.approx(math.log(2), abs=1e-6) and losses[-1] < 0.1
    seven, three = model.reward(["9+9="] * 2, ["7", "3"])
    assert seven > three


def noisy_lm():
    "A model with dropout, in training mode but for a part of it, and with gradients."
    torch.manual_seed(0)
    sizes = dict(n_embd=16, n_layer=2, n_head=2, n_positions=32, resid_pdrop=0.5)
    lm = GPT2LMHeadModel(GPT2Config(vocab_size=18, eos_token_id=1, bos_token_id=1, **sizes))
    lm.train()
    lm.transformer.h[0].eval()
    for p in lm.parameters():
        p.data += 0.2 * torch.randn_like(p)
        p.grad = torch.ones_like(p)
    return lm


def state_of(lm):
    "What nobody should change in a model."
    modes = [part.training for part in lm.modules()]
    weights = [(p.clone(), p.grad.clone(), p.requires_grad, p.dtype) for p in lm.parameters()]
    return modes, weights


def assert_same(lm, before):
    modes, weights = state_of(lm)
    assert modes == before[0]
    for now, then in zip(weights, before[1], strict=True):
        assert torch.equal(now[0], then[0]) and torch.equal(now[1], then[1])
        assert now[2:] == then[2:]


@pytest.mark.parametrize("shared", [False, True])
def test_neither_scores_nor_a_fit_change_the_language_model(shared):
    lm = noisy_lm()
    before = state_of(lm)
    model = RewardModel(lm, char_tokenizer(), share_trunk=shared)
    losses = fit_reward_model(model, ["1+1="] * 4, ["2"] * 4, ["3"] * 4, 30, lr=0.02)
    assert losses[-1] < losses[0] - 0.2
    first, again = (model.reward(["1+1="] * 2, ["2", "3"]) for _ in range(2))
    assert first == again and first[0] > first[1]
    model(["1+1="], ["2"]).sum().backward()
    assert_same(lm, before)


def test_a_shared_trunk_is_no_part_of_the_reward_model():
    lm = noisy_lm()
    before = state_of(lm)
    model = RewardModel(lm, char_tokenizer(), share_trunk=True).requires_grad_(False)
    assert [name for name, _ in model.named_parameters()] == ["head.weight"]
    assert [*model.state_dict()] == ["head.weight"]
    model.double().eval()
    assert_same(lm, before)


def test_scores_of_a_shared_trunk_follow_the_model_and_those_of_a_copy_do_not():
    lm, tokenizer = noisy_lm(), char_tokenizer()
    shared, copied = (RewardModel(lm, tokenizer, share_trunk=x) for x in (True, False))
    with torch.no_grad():
        for model in shared, copied:
            model.head.weight.fill_(1.0)
        data = ["1+1="], ["2"]
        first = shared.reward(*data)
        assert copied.reward(*data) == pytest.approx(first, abs=1e-5)
        lm.transformer.ln_f.bias.add_(1.0)
    assert shared.reward(*data) == pytest.approx([first[0] + 16], abs=1e-4)
    assert copied.reward(*data) == pytest.approx(first, abs=1e-5)


def test_a_fit_leaves_no_gradients(model):
    model.head.weight.grad = torch.ones_like(model.head.weight)
    fit_reward_model(model, ["1+1="], ["2"], ["3"], 2)
    assert all(p.grad is None for p in model.parameters())
    with pytest.raises(ValueError, match="lr"):
        model.head.weight.grad = torch.ones_like(model.head.weight)
        fit_reward_model(model, ["1+1="], ["2"], ["3"], 2, lr=-1.0)
    assert model.head.weight.grad is None


def test_weights_that_cannot_learn_are_refused(model):
    data = ["1+1="], ["2"], ["3"]
    rule = r"weights must be float32 \(see float32_masters\), got "
    model.trunk.bfloat16()
    with pytest.raises(ValueError, match=rule + ".*torch.bfloat16"):
        fit_reward_model(model, *data, steps=1)
    with pytest.raises(ValueError, match=rule + "none that learn"):
        fit_reward_model(model.requires_grad_(False), *data, steps=1)


# What is read


def by_hand(model, rows):
    "The head at the last token of each row of tokens."
    states = (model.trunk(input_ids=torch.tensor([row])).last_hidden_state for row in rows)
    return [model.head(state[0, -1].float()).item() for state in states]


@torch.no_grad()
def test_a_text_that_was_cut_off_has_no_end_token(model):
    model.head.weight.copy_(noise(0, *model.head.weight.shape))
    ids = model.tokenizer(["1+2=3", "1+2=3", "9="]).input_ids
    want = by_hand(model, [ids[0] + [1], ids[1], ids[2]])
    data = ["1+2=", "1+2=", "9="], ["3", "3", ""]
    got = compute_rewards(model.reward, *data, finished=[True, False, False])
    assert got == pytest.approx(want, abs=1e-5) and abs(want[0] - want[1]) > 0.1
    assert model(*data, torch.tensor([True, False, False])).tolist() == pytest.approx(want, abs=1e-5)
    complete = compute_rewards(model.reward, *data)
    assert complete == pytest.approx(by_hand(model, [row + [1] for row in ids]), abs=1e-5)


def merging_tokenizer():
    "It has a token for `=3`, which spans a prompt and its completion."
    vocab = {x: i for i, x in enumerate(["<pad>", "<eos>", *"0123456789+=", "=3"])}
    backend = Tokenizer(models.BPE(vocab, merges=[("=", "3")]))
    return PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="<eos>")


@torch.no_grad()
def test_no_token_spans_prompt_and_completion():
    tokenizer = merging_tokenizer()
    model = RewardModel(tiny_lm(tokenizer, width=16, layers=1, heads=2), tokenizer)
    model.head.weight.copy_(noise(0, *model.head.weight.shape))
    apart = tokenizer("1+2=").input_ids + tokenizer("3").input_ids + [1]
    assert len(tokenizer("1+2=3").input_ids) + 2 == len(apart)
    assert model(["1+2="], ["3"]).tolist() == pytest.approx(by_hand(model, [apart]), abs=1e-5)


def bos_tokenizer():
    "It begins every text with `<bos>`."
    tokenizer = char_tokenizer()
    tokenizer.add_special_tokens({"bos_token": "<bos>"})
    single = processors.TemplateProcessing(
        single="<bos> $A", special_tokens=[("<bos>", tokenizer.bos_token_id)]
    )
    tokenizer.backend_tokenizer.post_processor = single
    return tokenizer


@torch.no_grad()
def test_a_row_begins_with_one_bos_token():
    tokenizer = bos_tokenizer()
    model = RewardModel(tiny_lm(tokenizer, width=16, layers=1, heads=2), tokenizer)
    model.head.weight.copy_(noise(0, *model.head.weight.shape))
    row = tokenizer("1+2=3").input_ids + [1]
    assert row.count(tokenizer.bos_token_id) == 1 and row[0] == tokenizer.bos_token_id
    assert model(["1+2="], ["3"]).tolist() == pytest.approx(by_hand(model, [row]), abs=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@torch.no_grad()
def test_head_and_scores_are_float32_whatever_the_trunk_is(dtype):
    lm = tiny_lm(char_tokenizer(), width=16, layers=1, heads=2).to(dtype)
    model = RewardModel(lm, char_tokenizer())
    model.head.weight.copy_(noise(0, *model.head.weight.shape))
    row = model.tokenizer("1+2=3").input_ids + [1]
    score = model(["1+2="], ["3"])
    assert model.head.weight.dtype == score.dtype == torch.float32
    assert model.trunk.dtype == dtype
    assert score.tolist() == pytest.approx(by_hand(model, [row]), abs=1e-6)


@torch.no_grad()
def test_scores_are_not_rounded_under_autocast(model):
    model.head.weight.copy_(noise(0, *model.head.weight.shape))
    with torch.autocast("cpu", torch.bfloat16):
        score = model(["1+2="], ["3"])
        row = torch.tensor([model.tokenizer("1+2=3").input_ids + [1]])
        state = model.trunk(input_ids=row).last_hidden_state[0, -1].float()
    assert score.item() == pytest.approx(state.dot(model.head.weight[0]).item(), abs=1e-6)


def test_rows_that_cannot_be_scored_are_refused(model):
    with pytest.raises(ValueError, match="prompts and completions must be texts with tokens, got none"):
        model([""], [""], finished=[False])
    with pytest.raises(ValueError, match=r"prompts\[0\] has 203 tokens.*context is 128"):
        model(["1="], ["1" * 200])


@pytest.mark.skipif(not hasattr(language_model, "Prompt"), reason="prompts are texts or tokens")
def test_messages_are_read_as_the_policy_read_them(model):
    torch.nn.init.normal_(model.head.weight, generator=torch.Generator().manual_seed(0))
    model.tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
    prompts = [[{"role": "user", "content": q}] for q in ("1+2=", "9=")]
    answers = [[{"role": "assistant", "content": o}] for o in ("3", "9")]
    got = compute_rewards(model.reward, prompts, answers, finished=[True, False])
    assert got == model.reward(["1+2=:", "9=:"], ["3", "9"], [True, False])


# A classifier from the hub


COMMON = dict(vocab_size=18, num_labels=1, initializer_range=0.5)
SIZES = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
CLASSIFIERS = {
    "llama": lambda: LlamaForSequenceClassification(
        LlamaConfig(**COMMON, **SIZES, max_position_embeddings=32)
    ),
    "gpt2": lambda: GPT2ForSequenceClassification(
        GPT2Config(**COMMON, n_embd=16, n_layer=2, n_head=2, n_positions=32)
    ),
    "bert": lambda: BertForSequenceClassification(
        BertConfig(**COMMON, **SIZES, max_position_embeddings=32)
    ),
}
PROMPTS, ANSWERS = ["3+8=", "1=", "1+1+1=", "9+9="], ["11", "", "2,3", "18"]


@pytest.fixture(params=CLASSIFIERS)
def classifier(request):
    torch.manual_seed(0)
    return CLASSIFIERS[request.param]()


def alone(model, tokenizer, texts):
    "The model's logit of each text by itself."
    rows = [tokenizer(text, return_tensors="pt").input_ids for text in texts]
    with torch.no_grad():
        return [model.eval()(input_ids=ids).logits.item() for ids in rows]


@pytest.mark.parametrize("size", [1, 3, 16])
@pytest.mark.parametrize("side", ["left", "right"])
def test_a_classifiers_rewards_are_its_logits(classifier, size, side):
    tokenizer = char_tokenizer()
    tokenizer.padding_side = side
    want = alone(classifier, tokenizer, map(str.__add__, PROMPTS, ANSWERS))
    got = compute_rewards(classifier_reward(classifier, tokenizer, size), PROMPTS, ANSWERS)
    assert got == pytest.approx(want, abs=1e-5) and max(want) - min(want) > 0.1


def test_a_classifier_reads_the_text_without_further_special_tokens():
    torch.manual_seed(0)
    model = LlamaForSequenceClassification(LlamaConfig(**COMMON | {"vocab_size": 19}, **SIZES))
    want = alone(model, char_tokenizer(), ["3+8=11"])
    got = compute_rewards(classifier_reward(model, bos_tokenizer()), ["3+8="], ["11"])
    assert got == pytest.approx(want, abs=1e-5)


@pytest.mark.parametrize("pad", [None, 5])
def test_a_classifier_is_left_as_it_was(classifier, pad):
    "In its own mode, with its own token of padding, which may also stand in a text."
    tokenizer, config = char_tokenizer(), classifier.config
    want = alone(classifier, tokenizer, map(str.__add__, PROMPTS, ANSWERS))
    config.pad_token_id = pad
    classifier.train()
    next(classifier.children()).eval()
    modes = [part.training for part in classifier.modules()]
    got = compute_rewards(classifier_reward(classifier, tokenizer), PROMPTS, ANSWERS)
    assert got == pytest.approx(want, abs=1e-5)
    assert config.pad_token_id == pad
    assert [part.training for part in classifier.modules()] == modes
    assert all(p.grad is None for p in classifier.parameters())


def test_a_classifier_in_half_precision_gives_float_rewards():
    torch.manual_seed(0)
    model, tokenizer = CLASSIFIERS["llama"]().bfloat16(), char_tokenizer()
    want = alone(model, tokenizer, ["3+8=11"])
    assert compute_rewards(classifier_reward(model, tokenizer), ["3+8="], ["11"]) == want


def test_messages_go_through_the_chat_template(classifier):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m['content'] }}:{% endfor %}"
    prompts = [[{"role": "user", "content": q}] for q in PROMPTS]
    answers = [[{"role": "assistant", "content": o}] for o in ANSWERS]
    want = alone(classifier, tokenizer, [f"{q}:{o}:" for q, o in zip(PROMPTS, ANSWERS)])
    reward = classifier_reward(classifier, tokenizer)
    assert compute_rewards(reward, prompts, answers) == pytest.approx(want, abs=1e-5)
    with pytest.raises(ValueError, match="two texts, or messages, got list and str"):
        reward(prompts, ANSWERS)
    tokenizer.chat_template = None
    with pytest.raises(ValueError, match="chat_template"):
        reward(prompts, answers)


def test_a_tokenizer_without_padding_pads_with_its_end_token(classifier):
    tokenizer = char_tokenizer()
    want = alone(classifier, tokenizer, map(str.__add__, PROMPTS, ANSWERS))
    tokenizer.pad_token = None
    got = compute_rewards(classifier_reward(classifier, tokenizer), PROMPTS, ANSWERS)
    assert got == pytest.approx(want, abs=1e-5)


def test_a_token_to_pad_with_is_needed(classifier):
    tokenizer = char_tokenizer()
    tokenizer.eos_token = None  # a token for padding is enough
    assert len(classifier_reward(classifier, tokenizer)(PROMPTS, ANSWERS)) == 4
    tokenizer.pad_token = None
    with pytest.raises(ValueError, match="tokenizer must have an eos_token, got None"):
        classifier_reward(classifier, tokenizer)


def test_what_is_no_classifier_with_one_label_is_refused():
    tokenizer = char_tokenizer()
    two = LlamaForSequenceClassification(LlamaConfig(vocab_size=18, num_labels=3, **SIZES))
    with pytest.raises(ValueError, match="model must be a classifier with one label, got 3 labels"):
        classifier_reward(two, tokenizer)
    lm = tiny_lm(tokenizer, width=16, layers=1, heads=2)
    with pytest.raises(ValueError, match="model must be a classifier with one label, got 2"):
        classifier_reward(lm, tokenizer)
    lm.config.num_labels, lm.config.pad_token_id = 1, 5
    lm.train()
    with pytest.raises(ValueError, match=r"logits must have shape \(1, 1\), got \(1, 6, 18\)"):
        classifier_reward(lm, tokenizer)(["3+8="], ["11"])
    assert lm.training and lm.config.pad_token_id == 5


def test_texts_that_a_classifier_cannot_read_are_refused(classifier):
    tokenizer = char_tokenizer()
    reward = classifier_reward(classifier, tokenizer)
    with pytest.raises(ValueError, match="texts with tokens, got none"):
        reward(["1=", ""], ["1", ""])
    with pytest.raises(ValueError, match=r"prompts\[1\] has 42 tokens.*context is 32"):
        reward(["1=", "1="], ["1", "1" * 40])
    for size in 0, 1.5:
        with pytest.raises(ValueError, match="batch_size must be"):
            classifier_reward(classifier, tokenizer, size)
    assert compute_rewards(reward, [], []) == []


def test_a_classifier_has_the_name_of_its_folder(tmp_path):
    model, folder = CLASSIFIERS["llama"](), tmp_path / "my-reward"
    assert classifier_reward(model, char_tokenizer()).__name__ == "LlamaForSequenceClassification"
    model.save_pretrained(folder)
    loaded = LlamaForSequenceClassification.from_pretrained(folder)
    assert classifier_reward(loaded, char_tokenizer()).__name__ == "my-reward"


# Fits


def test_a_seed_repeats_a_fit():
    def fit():
        tokenizer = char_tokenizer()
        model = RewardModel(tiny_lm(tokenizer, width=16, layers=1, heads=2), tokenizer)
        data = ["1+1=", "1+2="], ["2", "3"], ["3", "2"]
        return fit_reward_model(model, *data, 3, generator=torch.Generator().manual_seed(1))

    assert fit() == fit()


@pytest.mark.parametrize("data", [([], [], []), (["1="], ["1"], []), (["1="], ["1", "2"], ["3"])])
def test_pairs_must_pair_up(model, data):
    with pytest.raises(ValueError, match="prompts, chosen and rejected must be lists that pair up, got"):
        fit_reward_model(model, *data, steps=1)


# Best of n


@pytest.mark.parametrize("n", [1, 2, 3, 5])
def test_best_of_n_is_the_mean_over_all_subsets(n):
    proxy, truth = noise(0, 2, 3, 5).double()
    wanted = []
    for x, y in zip(proxy, truth):
        for subset in itertools.combinations(range(5), n):
            j = max(subset, key=lambda i: x[i])
            wanted.append([x[j], y[j]])
    wanted = torch.tensor(wanted).mean(0).tolist()
    assert best_of_n(proxy, truth, n) == pytest.approx(wanted, abs=1e-12)


@pytest.mark.parametrize("n", [0, 6])
def test_n_must_be_within_the_responses(n):
    with pytest.raises(ValueError, match=rf"n must be in \[1, 5\], got {n}"):
        best_of_n(noise(0, 1, 5), noise(1, 1, 5), n)


def test_the_best_is_one_of_finite_numbers():
    good, bad = noise(0, 2, 5), noise(0, 2, 5).index_fill(1, torch.tensor(3), math.nan)
    with pytest.raises(ValueError, match="proxy must be finite, got nan"):
        best_of_n(bad, good, 2)
    with pytest.raises(ValueError, match="truth must be finite, got nan"):
        best_of_n(good, bad, 2)
    with pytest.raises(ValueError, match="n must be a whole number, got 1.5"):
        best_of_n(good, good, 1.5)
    with pytest.raises(ValueError, match="rows of proxy must be at least 1, got 0"):
        best_of_n(good[:0], good[:0], 2)


def test_proxy_and_truth_must_have_one_shape():
    with pytest.raises(ValueError, match=r"truth must have proxy's shape \(1, 5\), got \(1, 4\)"):
        best_of_n(noise(0, 1, 5), noise(1, 1, 4), 2)


# Steps


def test_prefixes_end_where_steps_end():
    assert prefixes("11,16,18") == ["11", "11,16", "11,16,18"]
    assert prefixes("") == [""]
    with pytest.raises(ValueError, match="separator must be a text that is not empty, got ''"):
        prefixes("1,2", "")


def test_step_scores_are_those_of_prefixes_with_their_columns():
    def at_least(prompts, completions, bound, **columns):
        return [float(len(o) >= b) for o, b in zip(completions, bound)]

    got = step_scores(at_least, ["p", "q"], ["1,2", "3"], bound=[3, 1])
    assert got == [[0.0, 1.0], [1.0]]


def test_potential_rewards_of_a_response_by_hand():
    got = potential_rewards(torch.tensor([0.5, 1.0, 0.25]), outcome=2.0)
    assert got.tolist() == [0.5, -0.75, 1.75]


@pytest.mark.parametrize("seed", range(5))
def test_potentials_never_change_the_best_continuation(seed):
    texts = ["".join(x) for k in range(4) for x in itertools.product("abc", repeat=k)]
    outcome, phi = (dict(zip(texts, row.tolist())) for row in noise(seed, 2, len(texts)).double())

    def togo(o, t):
        path = torch.tensor([phi[o[:i]] for i in range(len(o) + 1)], dtype=torch.float64)
        return potential_rewards(path, outcome[o])[t:].sum().item()

    for prefix in texts:
        possible = [o for o in texts if o.startswith(prefix)]
        best = max(possible, key=lambda o: togo(o, len(prefix)))
        assert best == max(possible, key=outcome.get)
        assert togo(best, len(prefix)) == pytest.approx(outcome[best] - phi[prefix])


@pytest.mark.parametrize("potentials", [torch.zeros(0), torch.zeros(2, 2), torch.tensor(1.0)])
def test_potentials_must_be_a_row(potentials):
    with pytest.raises(ValueError, match=r"potentials must (have shape \(T,\)|be one an action)"):
        potential_rewards(potentials, 1.0)


@pytest.mark.parametrize("x", [math.nan, math.inf])
def test_potentials_and_outcome_are_numbers(x):
    with pytest.raises(ValueError, match=f"potentials must be finite, got {x}"):
        potential_rewards(torch.tensor([0.0, x]), 1.0)
    with pytest.raises(ValueError, match=f"outcome must be finite, got {x}"):
        potential_rewards(torch.zeros(2), x)


# A judge


@pytest.mark.parametrize(
    "answer, want",
    [
        ("7", 0.7),
        ("7.", 0.7),
        ("7.5", 0.75),
        ("7,5", 0.75),
        (".5", 0.05),
        ("10", 1.0),
        ("0", 0.0),
        ("**7**", 0.7),
        ("_7_", 0.7),
        ("2 of 3 are right: 6.5", 0.65),
        ("6.5, since 2 of 3 are right", 0.65),
        ("7/10", 0.7),
        ("7 / 10.", 0.7),
        ("**7**/10", 0.7),
        ("7.5/10.0", 0.75),
        ("10/10", 1.0),
        ("8 out of 10", 0.8),
        ("8 OUT OF 10", 0.8),
        ("7 of 10 (scale 0-10)", 0.7),
        ("7 (0 to 10)", 0.7),
        ("7 on a scale of 10", 0.7),
        ("On a scale of 10: 7", 0.7),
        ("8/10, as 2 of the 3 sums are right", 0.8),
        ("I first thought 3 of 10. Now 7", 0.7),
        ("Score: 7", 0.7),
        ("score = 7", 0.7),
        ("**Score:** 7/10", 0.7),
        ("Score (0-10): 7", 0.7),
        ("The grade is 7, the answer 16", 0.7),
        ("Score: 3. Final score: 7. 8 words", 0.7),
        ("Score: 7 (90% sure)", 0.7),
        ("7, and I am 90 % sure", 0.7),
        ("<score>7</score> by 3 rules", 0.7),
        ("<answer> 7/10 </answer>", 0.7),
        ("[[7]], Score: 3", 0.7),
        (r"\boxed{7} 3", 0.7),
        ("<think>Score: 3\n3/10</think>7", 0.7),
        ("it has 3 errors</think> 7", 0.7),
        ("<score>7</score><confidence>9</confidence>", 0.7),
        ("<final_score>7.0</final_score> 3", 0.7),
        ("Confidence: 9/10. Score: 7", 0.7),
        ("GPT4 and o3 say 7", 0.7),
        ("<think>Score: 3", None),
        ("none", None),
        ("", None),
        ("11", None),
        ("-3", None),
        ("Score: -3", None),
        ("11/10", None),
        ("4/5", None),
        ("7/100", None),
        ("3-5", None),
        ("70%", None),
        ("GPT4", None),
    ],
)
def test_the_mark_is_read_as_it_was_meant(answer, want):
    got = compute_rewards(judge(lambda question: answer), ["p"], ["o"])
    assert got == [want if want is None else pytest.approx(want)]


@pytest.mark.parametrize(
    "answer, top, want",
    [("4/5", 5, 0.8), ("4/10", 5, None), ("0.8/1", 1, 0.8), ("50 out of 100", 100, 0.5), ("1/.5", 0.5, None), ("0.25", 0.5, 0.5)],
)
def test_the_best_mark_may_be_another_one(answer, top, want):
    assert compute_rewards(judge(lambda question: answer, top=top), ["p"], ["o"]) == [want]


def test_questions_are_asked_one_by_one_or_at_once_and_marked_in_order():
    question, rows = "{prompt} {completion}", (["p", "q", "s"], ["1", "2", "3"])
    meeting, seen = asyncio.Barrier(3), []

    def one(text):
        seen.append(text)
        return text[-1]

    def many(texts):
        seen.append(texts)
        return [text[-1] for text in texts]

    async def one_async(text):
        await asyncio.wait_for(meeting.wait(), 60)  # all three are asked before one answers
        return text[-1]

    async def many_async(texts):
        return many(texts)

    texts = ["p 1", "q 2", "s 3"]
    for ask, batched in (one, False), (many, True), (one_async, False), (many_async, True):
        reward = judge(ask, question, batched=batched)
        assert compute_rewards(reward, *rows) == [0.1, 0.2, 0.3]
    assert seen == [*texts, texts, texts]


@pytest.mark.parametrize("answers", [["1"], ["1", None], [], ["1", 2]])
def test_there_is_one_text_a_question(answers):
    with pytest.raises(ValueError, match="ask must return one text for each of 2 questions, got "):
        compute_rewards(judge(lambda texts: answers, batched=True), ["p", "q"], ["a", "b"])


def test_a_judge_is_shown_what_messages_say():
    asked = []

    def ask(question):
        asked.append(question)
        return "1"

    answer = [{"role": "assistant", "content": "3"}]
    user = {"role": "user", "content": "1+2="}
    system = {"role": "system", "content": "add"}
    judge(ask, "{prompt}|{completion}")([[user], [system, user]], [answer, answer])
    assert asked == ["1+2=|3", "system: add\nuser: 1+2=|3"]


def test_the_question_is_filled_once():
    asked = []

    def ask(question):
        asked.append(question)
        return "1"

    judge(ask, "{prompt}|{completion}|{other}")(["say {completion}"], ["{prompt}"])
    assert asked == ["say {completion}|{prompt}|{other}"]


def test_a_question_needs_both_fields():
    with pytest.raises(ValueError, match="question must be a text with {prompt} and {completion}"):
        judge(str, "{prompt}?")


@pytest.mark.parametrize("top", [0.0, -1.0, math.nan, math.inf])
def test_the_best_mark_is_positive(top):
    with pytest.raises(ValueError, match=rf"top must be in \(0, inf\), got {top}"):
        judge(str, top=top)


# What is handed on


def test_the_rate_of_a_fit_falls_from_a_hundred_thousandth_to_zero(model, monkeypatch):
    rates, step = [], torch.optim.AdamW.step

    def watched(self):
        rates.append(self.param_groups[0]["lr"])
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    data = ["1+1="], ["2"], ["3"]
    fit_reward_model(model, *data, 4)
    fit_reward_model(model, *data, 2, lr=0.5)
    assert rates == pytest.approx([1e-5, 7.5e-6, 5e-6, 2.5e-6, 0.5, 0.25])


def test_a_fit_draws_64_pairs_a_step_and_learns_all_that_may(model, monkeypatch):
    asked = []

    def watched(loss, weights, *how, **settings):
        asked.append(([id(w) for w in weights], how, settings))
        return [1.0]

    monkeypatch.setattr(reward_models, "minimise", watched)
    model.trunk.embed_tokens.weight.requires_grad_(False)
    order = torch.Generator()
    assert fit_reward_model(model, ["1="] * 3, ["1"] * 3, ["2"] * 3, 7, generator=order) == [1.0]
    every = [id(p) for p in model.parameters()]  # `minimise` leaves out what may not learn
    settings = dict(anneal=True, generator=order)
    assert asked == [(every, (3, 7, 64, 1e-5), settings)] and len(every) > 5


def test_a_fit_reads_both_responses_in_one_pass(model):
    "So both are padded to one length."
    shapes = []
    model.trunk.embed_tokens.register_forward_hook(lambda *x: shapes.append(tuple(x[1][0].shape)))
    fit_reward_model(model, ["1+1="], ["2"], ["12345"], 3, 2)
    assert shapes == [(4, 10)] * 3


def test_a_classifier_reads_some_rows_at_a_time_and_keeps_no_graph(classifier):
    seen = []
    classifier.register_forward_hook(
        lambda *x: seen.append((len(x[2].logits), x[2].logits.requires_grad))
    )
    reward = classifier_reward(classifier, char_tokenizer(), 3)
    reward(["1="] * 7, ["1"] * 7)
    assert seen == [(3, False), (3, False), (1, False)]
    seen.clear()
    classifier_reward(classifier, char_tokenizer())(["1="] * 20, ["1"] * 20)
    assert seen == [(16, False), (4, False)]


def test_a_conversation_ends_with_its_answer(classifier):
    tokenizer = char_tokenizer()
    tokenizer.chat_template = (
        "{% for m in messages %}{{ m['content'] }}{% endfor %}"
        "{% if add_generation_prompt %}:{% endif %}"
    )
    prompt, answer = [{"role": "user", "content": "1+2="}], [{"role": "assistant", "content": "3"}]
    want = alone(classifier, tokenizer, ["1+2=3"])
    got = compute_rewards(classifier_reward(classifier, tokenizer), [prompt], [answer])
    assert got == pytest.approx(want, abs=1e-5)


def test_the_name_of_a_folder_may_end_with_a_slash():
    model = CLASSIFIERS["llama"]()
    model.config._name_or_path = "models/my-reward/"
    assert classifier_reward(model, char_tokenizer()).__name__ == "my-reward"


def test_of_equal_proxies_the_later_response_wins():
    proxy, truth = torch.tensor([[1.0, 1.0, 0.0]]), torch.tensor([[3.0, 6.0, 9.0]])
    assert best_of_n(proxy, truth, 3) == (1.0, 6.0)
    assert best_of_n(proxy, truth, 2) == pytest.approx((1.0, (6 + 3 + 6) / 3))


def test_steps_may_be_apart_by_another_separator():
    def long(prompts, completions, **columns):
        return [float(len(o)) for o in completions]

    assert step_scores(long, ["p", "q"], ["1; 2,3", "4"], "; ") == [[1.0, 6.0], [1.0]]


def test_a_score_of_a_step_is_one_finite_number():
    for said, told in ([[1.0], "2 rewards, one a row, got 1"], [[1.0, math.nan], "finite rewards"]):
        with pytest.raises(ValueError, match=f"reward must return {told}"):
            step_scores(returning(said), ["p"], ["1,2"])
    with pytest.raises(ValueError, match="no reward has anything to say about row 1"):
        step_scores(returning([1.0, None]), ["p"], ["1,2"])


def returning(values):
    def reward(prompts, completions, **columns):
        return values

    return reward


def test_a_judge_is_asked_for_a_mark_up_to_ten():
    asked = []
    reward = judge(lambda question: asked.append(question) or "10")
    assert compute_rewards(reward, ["1+2="], ["3"]) == [1.0]
    assert asked == [
        "Problem: 1+2=\nResponse: 3\nHow good is the response, from 0 (useless) to 10 (perfect)? "
        "End with the number."
    ]
    assert asked == [QUESTION.format(prompt="1+2=", completion="3")]


@pytest.mark.parametrize(
    "answer, want",
    [
        ("Mark: 7. It has 3 errors", 0.7),
        ("The rating is 7, for 3 reasons", 0.7),
        ("Grade = 7; 2 sums are right", 0.7),
        ("7, of 1–5 sums", 0.7),
        ("7, of 1—5 sums", 0.7),
        ("7, since 2 OF 3 are right", 0.7),
        ("7, from 0 TO 10", 0.7),
        ("2 sums of 3: 7/10. 4 stars", 0.7),
        ("<think>3</think>no<think>Score: 4</think>7", 0.7),
    ],
)
def test_the_mark_is_told_from_other_numbers(answer, want):
    assert compute_rewards(judge(lambda question: answer), ["p"], ["o"]) == [pytest.approx(want)]
