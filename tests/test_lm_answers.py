"A batch of answers: what is noted of it, paid for it, drawn for it and left out, by hand."
from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from po_book.credit import AllGroups, Informative
from po_book.dapo import NoSignal
from po_book.language_model import char_tokenizer
from po_book.lm_batch import Answers, BatchConfig, collect, grade
from po_book.lm_step import live_rows
from po_book.objective import PRESETS
from po_book.rewards import RewardLog
from po_book.sampling import Samples

TOKENIZER = char_tokenizer()
CONFIG = BatchConfig(prompts=2, group_size=2, max_new_tokens=4)


def samples(lengths, finished):
    "Completions of 1 that follow one token of a prompt, every token at probability 1/e."
    mask = torch.arange(-1, 4) < torch.tensor(lengths)[:, None]
    mask[:, 0] = False
    (one,) = TOKENIZER("1").input_ids[:1]
    ids = torch.where(mask, one, TOKENIZER.pad_token_id)
    ids[:, 0] = one
    real = mask | (torch.arange(5) == 0)
    return Samples(ids, real, mask, -mask.float(), torch.tensor(finished))


def answers(verdicts, rewards=None, name="q"):
    "A group a row of verdicts, of completions of two tokens."
    verdicts = torch.tensor(verdicts)
    rewards = verdicts if rewards is None else torch.tensor(rewards)
    prompts = [f"{name}{i}" for i in range(len(verdicts))]
    n = verdicts.numel()
    return Answers(prompts, samples([2] * n, [True] * n), verdicts, rewards, RewardLog(n))


def test_what_is_noted_of_a_batch():
    verdicts = torch.tensor([[1.0, 0.0], [1.0, 1.0]])
    data = samples([1, 2, 3, 4], [True, True, True, False])
    facts = Answers(["a", "b"], data, verdicts, verdicts - 0.5, RewardLog(4)).facts(seconds=2.0)
    assert facts == {
        "reward": 0.25, "length": 2.5, "truncated": 0.25, "entropy": 1.0,
        "tokens_per_second": 5.0,
    }


def test_every_completion_is_graded_with_the_columns_of_its_prompt():
    seen = {}

    def reward(prompts, completions, **columns):
        seen.update(prompts=prompts, completions=completions, **columns)
        return [0.0, 1.0, 2.0, 3.0]

    task = SimpleNamespace(columns=lambda prompts: {"answer": [x.upper() for x in prompts]})
    data = samples([1, 2, 3, 4], [True, True, True, False])
    found = grade(data, ["a", "b"], TOKENIZER, task, reward, CONFIG)
    assert seen["prompts"] == ["a", "a", "b", "b"] and seen["answer"] == ["A", "A", "B", "B"]
    assert seen["completions"] == ["1", "11", "111", "1111"]
    assert found.verdicts.tolist() == found.rewards.tolist() == [[0, 1], [2, 3]]
    softly = replace(CONFIG, overlong_cache=2)  # from two tokens on, half a point each
    found = grade(data, ["a", "b"], TOKENIZER, task, reward, softly)
    assert found.verdicts.tolist() == [[0, 1], [2, 3]]
    assert found.rewards.tolist() == [[0, 1], [1.5, 2]]


def test_dynamic_sampling_goes_by_the_verdicts_and_counts_what_was_drawn():
    drawn = iter([
        answers([[1.0, 1.0], [0.0, 1.0]], [[1.0, 0.5], [0.0, 1.0]], "first "),
        answers([[0.0, 0.0], [1.0, 0.0], [1.0, 1.0], [1.0, 1.0]], name="second "),
    ])
    found, facts = collect(lambda n: next(drawn), CONFIG, Informative(), TOKENIZER.pad_token_id)
    assert found.prompts == ["first 1", "second 1"]
    assert found.verdicts.tolist() == [[0, 1], [1, 0]]
    counts = {"dead_groups": pytest.approx(4 / 6), "drawn_groups": 6, "draws": 2}
    assert facts == counts | {"drawn_entropy": 1}


def test_entropy_is_known_of_all_that_was_drawn_and_of_what_was_kept():
    dead, live = [1.0, 1.0], [0.0, 1.0]
    calls = {2: answers([dead, live]), 4: answers([live, dead, dead, dead])}
    for drawn in calls.values():
        unsure = (drawn.verdicts[:, 0] != drawn.verdicts[:, 1]).repeat_interleave(2)
        drawn.samples.logps[unsure] *= 0.7  # nats a token
        drawn.samples.logps[~unsure] *= 0.1
    found, facts = collect(calls.get, CONFIG, Informative(), TOKENIZER.pad_token_id)
    assert found.facts(1.0)["entropy"] == pytest.approx(0.7)
    assert facts["drawn_entropy"] == pytest.approx((2 * 0.7 + 4 * 0.1) / 6)


def test_informative_groups_that_were_too_many_are_not_dead():
    config = replace(CONFIG, prompts=3)
    live, dead = [0.0, 1.0], [1.0, 1.0]

    def draw(n):
        return answers([live, live, dead] if n == 3 else [live] * n)

    found, facts = collect(draw, config, Informative(), TOKENIZER.pad_token_id)
    # One is missing and a third was dead: 3·2/3 - √(3·2/9) > 1 > 2·2/3 - √(2·2/9)
    assert len(found.prompts) == 3 and facts["drawn_groups"] == 3 + 3
    assert facts["dead_groups"] == pytest.approx(2 / 6)  # one in each call


def test_what_was_dead_before_is_drawn_at_once():
    asked = []

    def draw(n):
        asked.append(n)
        return answers([[0.0, 1.0]] * n)

    config = replace(CONFIG, prompts=4)
    for dead, oversample in ((0.0, 3.0), (0.5, 3.0), (0.5, 1.5)):
        how = replace(config, oversample=oversample), Informative(), TOKENIZER.pad_token_id
        found, facts = collect(draw, *how, dead)
        assert len(found.prompts) == 4 and facts["draws"] == 1
    assert asked == [4, 12, 6]


def test_too_few_draws_are_said():
    dead = lambda n: answers([[1.0, 1.0]] * n)  # noqa: E731
    with pytest.raises(NoSignal, match="every reward is 1"):
        collect(dead, replace(CONFIG, max_draws=2), Informative(), TOKENIZER.pad_token_id)


def test_without_dynamic_sampling_dead_groups_are_counted_and_kept():
    given = answers([[1.0, 1.0], [0.0, 1.0]])
    found, facts = collect(lambda n: given, CONFIG, AllGroups(), TOKENIZER.pad_token_id)
    assert found is given and facts == {"dead_groups": 0.5}


GROUPS = torch.tensor([[[0.0, 0], [0, 0]], [[0, 0], [0, 1]], [[2, 0], [3, 0]]])


@pytest.mark.parametrize(
    "name, more, kept",
    [
        ("dr-grpo", {}, [0, 1, 2, 3, 4, 5]),  # the first is kept, dead as it is
        ("grpo", {}, [0, 1, 2, 3, 4, 5]),
        ("rlhf-ppo", {"targets": torch.zeros(6, 2)}, [0, 1, 2, 3, 4, 5]),
    ],
)
def test_rows_that_add_a_gradient_are_kept(name, more, kept):
    batch = {"advantages": GROUPS.flatten(0, 1), "row": torch.arange(6)} | more
    assert live_rows(PRESETS[name], batch, 2)["row"].tolist() == kept


def test_groups_that_add_none_are_left_out():
    late = GROUPS[[1, 0, 2, 0]].flatten(0, 1)
    batch = {"advantages": late, "row": torch.arange(8)}
    assert live_rows(PRESETS["dr-grpo"], batch, 2)["row"].tolist() == [0, 1, 4, 5]
    assert live_rows(PRESETS["grpo"], batch, 2)["row"].tolist() == list(range(8))
    dead = batch | {"advantages": 0 * late}
    assert live_rows(PRESETS["dr-grpo"], dead, 2)["row"].tolist() == [0, 1]
    valued = batch | {"targets": torch.zeros(8, 2)}
    assert live_rows(PRESETS["dr-grpo"], valued, 2)["row"].tolist() == list(range(8))
