"Batches of answers in parts, and what several processes tell each other."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch
from accelerate import Accelerator
from tiny_models import SMALL, generator

from po_book.language_model import char_tokenizer, tiny_lm, token_logprobs
from po_book.lm_batch import Answers, BatchConfig, all_or_none
from po_book.lm_step import ActorCritic, gradient_step, in_parts, learnable, row_logps, split_rows
from po_book.objective import PRESETS
from po_book.sampling import sample
from po_book.tasks import ChainAddition

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
    return Answers(prompts, samples, worth, worth)


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


@pytest.mark.parametrize("name", ["grpo", "dr-grpo", "dapo"])
@pytest.mark.parametrize("parts", PARTS, ids=str)
def test_a_gradient_in_parts_is_that_of_the_batch(name, parts, answers):
    def step(config: BatchConfig) -> tuple[torch.Tensor, dict]:
        model = tiny_lm(char_tokenizer(), **SMALL)
        accelerator = Accelerator(cpu=True)
        objective = PRESETS[name].for_length(12)
        batch = learnable(objective, config, answers, accelerator, tiny_lm(char_tokenizer(), **SMALL, seed=3))
        networks, kept = ActorCritic(model), []
        optimizer = torch.optim.SGD(networks.parameters(), 0.0)
        optimizer.register_step_pre_hook(
            lambda *_: kept.append(torch.cat([p.grad.flatten() for p in model.parameters()]))
        )
        metrics = gradient_step(objective, config, batch, networks, optimizer, accelerator, torch.inf)
        return kept[0], metrics

    whole, metrics = step(batch_config())
    part, others = step(batch_config(**parts))
    torch.testing.assert_close(part, whole, rtol=1e-4, atol=1e-6)
    assert metrics.keys() == others.keys()
    for key in metrics:
        torch.testing.assert_close(others[key], metrics[key], rtol=1e-4, atol=1e-5)


def test_where_samples_leave_tokens_out_the_learner_is_asked_again(answers):
    config, model = batch_config(top_k=2), tiny_lm(char_tokenizer(), **SMALL)
    batch = learnable(PRESETS["dr-grpo"].for_length(12), config, answers, ALONE, policy=model)
    rows = rows_of(answers)
    with torch.no_grad():
        want = token_logprobs(model, rows["ids"], rows["mask"], attention_mask=rows["attention_mask"])
    torch.testing.assert_close(batch["logp_old"], want, rtol=0, atol=1e-5)
    assert config.cuts and not batch_config(temperature=0.5).cuts
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



def scaled(scale: float) -> tuple[Accelerator, torch.amp.GradScaler]:
    "An accelerator that scales the loss, as with float16 on a GPU."
    accelerator = Accelerator(cpu=True)
    accelerator.scaler = torch.amp.GradScaler("cpu", init_scale=scale)
    return accelerator, accelerator.scaler


def test_a_step_whose_gradient_overflows_is_left_out_and_said(answers):
    model, config = tiny_lm(char_tokenizer(), **SMALL), batch_config()
    start = [p.detach().clone() for p in model.parameters()]
    accelerator, scaler = scaled(2.0**127)
    networks, optimizer = accelerator.prepare(
        ActorCritic(model), torch.optim.AdamW(model.parameters(), 1e-3)
    )
    objective = PRESETS["dr-grpo"].for_length(12)
    batch = learnable(objective, config, answers, accelerator)
    steps = [
        gradient_step(objective, config, batch, networks, optimizer, accelerator, 1.0) for _ in range(2)
    ]
    assert [float(x["skipped"]) for x in steps] == [1.0, 1.0]
    assert all("grad_norm" not in x and x["approx_kl"].isfinite() for x in steps)
    assert all(torch.equal(p, x) for p, x in zip(model.parameters(), start))
    assert scaler.get_scale() == 2.0**125
    scaler.update(2.0**10)
    step = gradient_step(objective, config, batch, networks, optimizer, accelerator, 1.0)
    assert step["skipped"] == 0 and step["grad_norm"] > 0
    assert not torch.equal(model.lm_head.weight, start[0])


def test_a_scaled_loss_gives_the_step_of_a_plain_one(answers):
    objective, config, ends = PRESETS["dr-grpo"].for_length(12), batch_config(), []
    for scale in (None, 1024.0):
        model = tiny_lm(char_tokenizer(), **SMALL)
        accelerator = Accelerator(cpu=True) if scale is None else scaled(scale)[0]
        networks, optimizer = accelerator.prepare(ActorCritic(model), torch.optim.SGD(model.parameters(), 1.0))
        batch = learnable(objective, config, answers, accelerator)
        metrics = gradient_step(objective, config, batch, networks, optimizer, accelerator, 0.5)
        ends.append((torch.cat([p.detach().flatten() for p in model.parameters()]), metrics["grad_norm"]))
    torch.testing.assert_close(ends[0][0], ends[1][0], rtol=0, atol=1e-6)
    torch.testing.assert_close(ends[0][1], ends[1][1], rtol=1e-5, atol=0)


def test_what_fails_alone_fails_as_it_is_and_what_it_gives_is_given():
    assert all_or_none(ALONE, lambda: 3) == 3
    with pytest.raises(KeyError):
        all_or_none(ALONE, lambda: {}["nothing"])
