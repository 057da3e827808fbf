"Batches of answers in parts, and what several processes tell each other."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from tiny_models import SMALL, generator

from po_book.credit import AllGroups, Informative
from po_book.language_model import char_tokenizer, tiny_lm, token_logprobs
from po_book.lm_batch import Answers, BatchConfig, all_or_none, collect, grade
from po_book.lm_step import (
    ActorCritic, gradient_step, in_parts, learnable, row_entropies, row_logps, row_states,
    split_rows,
)
from po_book.objective import PRESETS
from po_book.rewards import RewardLog, weighted_sum
from po_book.sampling import sample
from po_book.tasks import ChainAddition
from po_book.terms import Banded, NoReference
from po_book.tokens import Clip

TASK, ALONE = ChainAddition(2, 5), SimpleNamespace(num_processes=1)
PARTS = [
    {"micro_batch": 1}, {"micro_batch": 3}, {"micro_tokens": 1}, {"micro_tokens": 30},
    {"micro_tokens": 75}, {"micro_tokens": 10_000}, {"micro_batch": 2, "micro_tokens": 60},
]


def batch_config(**changes) -> BatchConfig:
    return BatchConfig(prompts=5, group_size=4, max_new_tokens=12, **changes)


@pytest.fixture
def answers() -> Answers:
    tokenizer = char_tokenizer()
    model = tiny_lm(tokenizer, **SMALL)
    prompts = TASK.prompts(5)
    samples = sample(model, tokenizer, prompts, 4, 12, generator=generator())
    worth = torch.rand(5, 4, generator=generator(1))
    return Answers(prompts, samples, worth, worth, RewardLog(20))


def rows_of(answers: Answers) -> dict[str, torch.Tensor]:
    samples = answers.samples
    return {"ids": samples.ids, "mask": samples.mask, "attention_mask": samples.attention_mask}


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_parts_hold_every_row_once_and_as_many_tokens_as_they_may(parts, answers):
    config, rows = batch_config(**parts), rows_of(answers)
    found = split_rows(rows, config)
    assert sorted(torch.cat([x.index for x in found]).tolist()) == list(range(20))
    for part in found:
        n, width = part.rows["ids"].shape
        own = rows["ids"][part.index][:, part.columns]
        assert torch.equal(part.rows["ids"], own) and part.group_size in (1, 2, 4)
        assert n % part.group_size == 0
        groups = (part.index // 4).view(-1, part.group_size)
        assert (groups == groups[:, :1]).all()  # those that share a prompt stand together
        assert part.rows["attention_mask"].any(0)[[0, -1]].all()  # no column of padding
        if "micro_tokens" in parts:
            assert n * width <= parts["micro_tokens"] or n == 1
        if "micro_batch" in parts:
            assert n <= 4 * parts["micro_batch"]
    left_out = rows["attention_mask"].sum() - sum(x.rows["attention_mask"].sum() for x in found)
    assert left_out == 0


def test_parts_are_as_large_as_they_may_be():
    real = torch.ones(8, 5, dtype=torch.bool)
    real[4:, 3:] = False  # two groups are narrower
    rows = {"ids": torch.arange(40).view(8, 5), "attention_mask": real}
    config = BatchConfig(prompts=4, group_size=2, micro_tokens=12)
    found = split_rows(rows, config)
    assert [x.index.tolist() for x in found] == [[4, 5, 6, 7], [0, 1], [2, 3]]
    assert [x.rows["ids"].shape[1] for x in found] == [3, 5, 5]
    exact = split_rows(rows, replace(config, micro_tokens=10))
    assert [x.index.tolist() for x in exact] == [[4, 5], [6, 7], [0, 1], [2, 3]]
    one = split_rows(rows, replace(config, micro_tokens=9))
    assert [x.index.tolist() for x in one] == [[4, 5], [6, 7], [0], [1], [2], [3]]
    assert [x.group_size for x in one] == [2, 2, 1, 1, 1, 1]


@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_asked_in_parts_a_model_says_the_same(parts, answers):
    model, rows, scoring = tiny_lm(char_tokenizer(), **SMALL), rows_of(answers), batch_config().scoring
    with torch.no_grad():
        whole = row_logps(model, rows, scoring, 4)
        got = in_parts(lambda x, n: row_logps(model, x, scoring, n), rows, batch_config(**parts))
    torch.testing.assert_close(got, whole, rtol=0, atol=1e-6)
    assert got[rows["mask"]].std() > 0.01


def one_step(objective, config: BatchConfig, answers: Answers) -> tuple[torch.Tensor, dict]:
    "Gradient and metrics of a step, where the old policy is another one than the sampler."
    old, model = (tiny_lm(char_tokenizer(), **SMALL, seed=seed) for seed in (5, 0))
    accelerator, reference = Accelerator(cpu=True), tiny_lm(char_tokenizer(), **SMALL, seed=3)
    batch = learnable(objective, config, answers, accelerator, reference, policy=old)
    networks, kept = ActorCritic(model), []
    optimizer = torch.optim.SGD(networks.parameters(), 0.0)
    optimizer.register_step_pre_hook(
        lambda *_: kept.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
    )
    metrics = gradient_step(objective, config, batch, networks, optimizer, accelerator, torch.inf)
    return kept[0], metrics


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "dapo", "gspo", "gmpo", "grpo-tis"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_gradient_in_parts_is_that_of_the_batch(name, parts, answers):
    objective = replace(PRESETS[name], entropy_coef=0.1).for_length(12)
    whole, metrics = one_step(objective, batch_config(), answers)
    part, others = one_step(objective, batch_config(**parts), answers)
    torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-6)
    assert metrics.keys() == others.keys()
    for key in metrics:
        torch.testing.assert_close(others[key], metrics[key], rtol=1e-4, atol=1e-5)


def plain_entropies(model, rows, temperature=1.0, vocabulary=None):
    "From one pass over whole rows."
    ids, real = rows["ids"], rows["attention_mask"]
    positions = (real.cumsum(1) - 1).clamp(min=0)
    logits = model(ids, attention_mask=real.long(), position_ids=positions).logits
    logp = (logits[:, :-1, :vocabulary] / temperature).log_softmax(-1)
    H = -(logp.exp() * logp).sum(-1)
    return torch.nn.functional.pad(H, (1, 0)) * rows["mask"]


@pytest.mark.parametrize("how", [{}, {"temperature": 0.7}, {"vocabulary": 15}, {"max_logits": 50}], ids=str)
def test_entropies_are_those_of_the_whole_distribution(how, answers):
    model, rows = tiny_lm(char_tokenizer(), **SMALL).double(), rows_of(answers)
    with torch.no_grad():  # or all tokens would be nearly as likely
        model.get_output_embeddings().weight *= 20
    got = row_entropies(model, rows, row_states(model, rows, 4), **how)
    want = plain_entropies(model, rows, how.get("temperature", 1.0), how.get("vocabulary"))
    torch.testing.assert_close(got, want, rtol=0, atol=1e-6)
    assert got[rows["mask"]].std() > 0.01
    for mine, theirs in zip(*(torch.autograd.grad(x.sum(), model.parameters()) for x in (got, want))):
        torch.testing.assert_close(mine, theirs, rtol=1e-5, atol=1e-6)


def test_an_entropy_bonus_adds_the_gradient_of_the_entropy(answers):
    "With the weights of the aggregation; at another temperature than one."
    config, objective = batch_config(temperature=0.7), PRESETS["dr-grpo"].for_length(12)
    plain, _ = one_step(objective, config, answers)
    ours, metrics = one_step(replace(objective, entropy_coef=0.3), config, answers)
    model, rows = tiny_lm(char_tokenizer(), **SMALL), rows_of(answers)
    H = plain_entropies(model, rows, 0.7)
    grads = torch.autograd.grad(-0.3 * H.sum() / (20 * 12), model.parameters())
    want = torch.cat([g.flatten() for g in grads])
    torch.testing.assert_close(ours - plain, want, rtol=1e-3, atol=1e-6)
    assert want.abs().max() > 1e-3
    torch.testing.assert_close(metrics["policy_entropy"], H.detach()[rows["mask"]].mean())


def test_who_has_sampled_is_kept_where_a_correction_wants_it(answers):
    old = tiny_lm(char_tokenizer(), **SMALL, seed=5)
    for name in "grpo-tis", "grpo-icepop", "dppo":
        objective = replace(PRESETS[name], kl=NoReference())
        batch = learnable(objective, batch_config(), answers, ALONE, policy=old)
        assert torch.equal(batch["logp_sampler"], answers.samples.logps)
        assert (batch["logp_old"] - batch["logp_sampler"])[batch["mask"]].abs().mean() > 0.01
    assert "logp_sampler" not in learnable(PRESETS["dapo"], batch_config(), answers, ALONE)


def test_a_correction_weighs_the_step(answers):
    base = replace(PRESETS["dr-grpo"], trust=Clip(0.9, 9.0)).for_length(12)
    plain, _ = one_step(base, batch_config(), answers)
    same, _ = one_step(replace(base, correction=Banded(0.0, torch.inf)), batch_config(), answers)
    nothing, _ = one_step(replace(base, correction=Banded(1.0, 1.0)), batch_config(), answers)
    assert (plain - same).abs().max() > 1e-3 and nothing.abs().max() < 1e-6


def test_a_part_without_tokens_leaves_the_means_of_the_others(answers):
    steps = []
    for parts in ({}, {"micro_batch": 1}):
        config, accelerator = batch_config(**parts), Accelerator(cpu=True)
        networks = ActorCritic(tiny_lm(char_tokenizer(), **SMALL))
        batch = learnable(PRESETS["grpo"], config, answers, accelerator, tiny_lm(char_tokenizer(), **SMALL, seed=3))
        batch["mask"] = batch["mask"].clone()
        batch["mask"][4:8] = False
        optimizer = torch.optim.SGD(networks.parameters(), 0.0)
        steps.append(gradient_step(PRESETS["grpo"], config, batch, networks, optimizer, accelerator, 1.0))
    assert steps[0].keys() == steps[1].keys() and steps[0]["kl"] > 0
    for key, x in steps[0].items():
        torch.testing.assert_close(steps[1][key], x, rtol=1e-4, atol=1e-6)


def test_where_samples_leave_tokens_out_the_learner_is_asked_again(answers):
    config, model = batch_config(top_k=2), tiny_lm(char_tokenizer(), **SMALL, seed=7)
    batch = learnable(PRESETS["dr-grpo"].for_length(12), config, answers, ALONE, policy=model)
    rows = rows_of(answers)
    with torch.no_grad():
        want = token_logprobs(model, rows["ids"], rows["mask"], attention_mask=rows["attention_mask"])
    torch.testing.assert_close(batch["logp_old"], want, rtol=0, atol=1e-5)
    assert all(batch_config(**x).cuts for x in ({"top_k": 9}, {"top_p": 0.9}, {"min_p": 0.1}))
    assert not batch_config(temperature=0.5).cuts
    assert batch_config(temperature=0.5).scoring == {"temperature": 0.5, "vocabulary": None}


@pytest.mark.parametrize("name, wrong, say", [
    ("top_k", 0, "top_k"), ("top_p", 0.0, "top_p"), ("min_p", 2.0, "min_p"),
    ("micro_tokens", -1, "micro_tokens"), ("micro_tokens", 2.5, "micro_tokens"),
    ("sample_batch", -1, "sample_batch"), ("vocabulary", 0, "vocabulary"),
])
def test_settings_of_a_batch_that_make_no_sense_are_named(name, wrong, say):
    with pytest.raises(ValueError, match=say):
        batch_config(**{name: wrong})


def test_a_list_of_stops_is_a_tuple_so_that_settings_from_a_file_are_equal():
    assert batch_config(stop=["\n"]) == batch_config(stop=("\n",))



def in_float16(scale: float) -> Accelerator:
    "float16 with a scaled loss on a CPU: slow there, but the same code as on a GPU."
    AcceleratorState._reset_state(reset_partial_state=True)
    accelerator = Accelerator(cpu=True, mixed_precision="fp16")
    accelerator.native_amp = True
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator


@pytest.fixture
def step(answers):
    "A function that takes some steps, and what is needed to look at them."
    objective, config = PRESETS["dr-grpo"].for_length(12), batch_config()

    def take(accelerator: Accelerator, optimizer: type, steps: int = 1, **how):
        model = tiny_lm(char_tokenizer(), **SMALL)
        networks, optimizer = accelerator.prepare(ActorCritic(model), optimizer(model.parameters(), **how))
        batch = learnable(objective, config, answers, accelerator)
        trained = networks, optimizer, accelerator, 0.05
        return model, [gradient_step(objective, config, batch, *trained) for _ in range(steps)]

    yield take
    AcceleratorState._reset_state(reset_partial_state=True)


def test_a_step_whose_gradient_overflows_is_left_out_and_said(step):
    accelerator = in_float16(2.0**126)
    model, steps = step(accelerator, torch.optim.AdamW, 2, lr=1e-3)
    assert [float(x["skipped"]) for x in steps] == [1.0, 1.0]
    assert all("grad_norm" not in x and x["approx_kl"].isfinite() for x in steps)
    before = tiny_lm(char_tokenizer(), **SMALL)
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), before.parameters()))
    assert accelerator.scaler.get_scale() == 2.0**124


def test_a_scaled_loss_gives_the_step_of_a_plain_one(step):
    AcceleratorState._reset_state(reset_partial_state=True)
    plain, (one,) = step(Accelerator(cpu=True), torch.optim.SGD, lr=1.0)
    scaled, (other,) = step(in_float16(1024.0), torch.optim.SGD, lr=1.0)
    start = tiny_lm(char_tokenizer(), **SMALL)
    moves = [torch.cat([(p - x).detach().flatten() for p, x in zip(m.parameters(), start.parameters())])
             for m in (plain, scaled)]
    assert other["skipped"] == 0 and "skipped" not in one
    torch.testing.assert_close(other["grad_norm"], one["grad_norm"], rtol=1e-2, atol=0)
    torch.testing.assert_close(moves[1].norm(), torch.tensor(0.05), rtol=1e-3, atol=0)
    assert torch.cosine_similarity(*moves, dim=0) > 0.999


def test_what_fails_alone_fails_as_it_is_and_what_it_gives_is_given():
    assert all_or_none(ALONE, lambda: 3) == 3
    with pytest.raises(KeyError):
        all_or_none(ALONE, lambda: {}["nothing"])


# What a reward is told, and tells


def graded(prompts, reward, tokenizer, state=None, **changes):
    config = BatchConfig(prompts=len(prompts), group_size=3, max_new_tokens=6, **changes)
    model = tiny_lm(tokenizer, **SMALL)
    samples = sample(model, tokenizer, prompts, 3, 6, generator=generator())
    return samples, grade(samples, prompts, tokenizer, TASK, reward, config, state)


def test_a_reward_is_told_tokens_ends_and_how_far_the_run_is():
    tokenizer, seen = char_tokenizer(), {}

    def reward(prompts, completions, completion_ids, finished, trainer_state, **columns):
        seen.update(ids=completion_ids, finished=finished, state=trainer_state, texts=completions)
        return [float(len(x)) for x in completion_ids]

    state = SimpleNamespace(global_step=4, max_steps=9)
    samples, answers = graded(["1+2=", "3+4="], reward, tokenizer, state)
    assert seen["state"] is state and seen["finished"] == samples.finished.tolist()
    assert [len(x) for x in seen["ids"]] == samples.mask.sum(1).tolist()
    assert seen["texts"] == [tokenizer.decode(x, skip_special_tokens=True) for x in seen["ids"]]
    assert answers.verdicts.flatten().tolist() == samples.mask.sum(1).tolist()


def test_messages_are_answered_by_messages_and_texts_by_texts():
    tokenizer = char_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content }}{% endfor %}"
    chats = [[{"role": "user", "content": q}] for q in ("1+2=", "3+4=")]
    seen = []

    def reward(prompts, completions, **columns):
        seen.append((prompts, completions))
        return [0.0] * len(prompts)

    one, _ = graded(chats, reward, tokenizer)
    two, _ = graded(["1+2=", "3+4="], reward, tokenizer)
    (asked, said), (texts, plain) = seen
    assert torch.equal(one.ids, two.ids)
    assert asked == [chats[0]] * 3 + [chats[1]] * 3 and texts == ["1+2="] * 3 + ["3+4="] * 3
    assert said == [[{"role": "assistant", "content": x}] for x in plain]
    assert plain == two.texts(tokenizer)


def test_what_a_reward_tells_is_in_the_log_and_beside_the_examples():
    tokenizer = char_tokenizer()

    def reward(prompts, completions, log_metric, log_extra, **columns):
        log_metric("share of ones", 0.25)
        log_extra("first", [x[:1] for x in completions])
        return [float(i % 2) for i in range(len(completions))]

    samples, answers = graded(["1+2=", "3+4="], reward, tokenizer)
    shown = answers.first_group(tokenizer)
    assert [row["first"] for row in shown] == [x[:1] for x in samples.texts(tokenizer)[:3]]
    second = answers.groups()[1].first_group(tokenizer)
    assert [row["first"] for row in second] == [x[:1] for x in samples.texts(tokenizer)[3:]]
    for selection in (AllGroups(), Informative()):
        config = BatchConfig(prompts=2, group_size=3, max_new_tokens=6)
        _, facts = collect(lambda n: answers, config, selection, 0)
        assert facts["rewards/share of ones"] == 0.25 and facts["dead_groups"] == 0


def test_a_sum_of_rewards_logs_its_parts_by_name():
    def long(prompts, completions, **columns):
        return [2.0] * len(completions)

    def short(prompts, completions, **columns):
        return [1.0, None, None] * 2

    _, answers = graded(["1+2=", "3+4="], weighted_sum([long, short], [1.0, 0.5]), char_tokenizer())
    _, facts = collect(lambda n: answers, BatchConfig(prompts=2, group_size=3), AllGroups(), 0)
    got = {name: x for name, x in facts.items() if name.startswith("rewards/")}
    assert got == {"rewards/long/mean": 2, "rewards/long/weight": 1, "rewards/short/mean": 1,
                   "rewards/short/weight": 0.5}
    assert answers.verdicts.tolist() == [[2.5, 2.0, 2.0]] * 2


def test_a_row_without_a_reward_is_named():
    with pytest.raises(ValueError, match="says nothing about row 2, '1\\+2='"):
        graded(["1+2="], lambda prompts, completions, **columns: [1.0, 0.0, None], char_tokenizer())
