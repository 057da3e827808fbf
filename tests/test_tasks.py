import math
import zlib
from collections import Counter
from itertools import chain, combinations, product

import numpy as np
import pytest
import torch
from tiny_models import PROMPTS, SMALL, generator
from tokenizers import processors

from po_book import tasks
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.sampling import sample
from po_book.tasks import (
    ChainAddition,
    Countdown,
    Task,
    is_held_out,
    minimise,
    pass_at_k,
    sft,
    spawn,
    success_rate,
    verdicts,
)


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


@pytest.mark.parametrize("pairs", [[("12+3=", "15")], [("1+1=", "2"), ("12+30+4=", "42,46")]])
def test_the_loss_of_fine_tuning_is_the_mean_over_tokens_of_answers_and_their_ends(pairs, tokenizer):
    model, by_hand = tiny_lm(tokenizer, **SMALL), []
    for prompt, answer in pairs:
        first = len(tokenizer(prompt).input_ids)
        ids = torch.tensor(tokenizer(prompt + answer).input_ids + [tokenizer.eos_token_id])
        logp = model(input_ids=ids[None]).logits[0].detach().double().log_softmax(-1)
        by_hand += [-logp[t - 1, ids[t]].item() for t in range(first, len(ids))]
    prompts, answers = map(list, zip(*pairs))
    losses = sft(model, tokenizer, prompts, answers, 1, len(pairs), generator=generator())
    assert len(by_hand) == sum(len(answer) + 1 for answer in answers)
    assert losses == [pytest.approx(sum(by_hand) / len(by_hand), rel=1e-5)]


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


class Few(ChainAddition):
    def draw(self, rng):
        return "1+1="


def test_impossible_tasks_are_refused():
    with pytest.raises(ValueError, match="fewest and most must be in order .* got 5 and 3"):
        ChainAddition(5, 3)
    with pytest.raises(ValueError, match="too few"):
        Few().prompts(1, held_out=not is_held_out("1+1="))


@pytest.mark.parametrize("task", [ChainAddition, Countdown])
@pytest.mark.parametrize("name", ["fewest", "most"])
@pytest.mark.parametrize("x", [2.5, 3.0, math.nan, math.inf, True, None, "3"])
def test_numbers_of_terms_are_whole(task, name, x):
    with pytest.raises(ValueError, match=f"^{name} must be a whole number, got {x}$"):
        task(**{name: x})


@pytest.mark.parametrize(
    "make, bounds", [(lambda *x: ChainAddition(*x), "2 and 100"), (lambda *x: Countdown(*x), "2 and 5")]
)
def test_numbers_of_terms_are_bounded(make, bounds):
    low, high = map(int, bounds.split(" and "))
    assert make(low, low).most == low and make(high, high).fewest == high
    for bad in (low - 1, low), (low, high + 1), (high, low):
        with pytest.raises(ValueError, match=f"between {bounds}, got {bad[0]} and {bad[1]}"):
            make(*bad)


@pytest.mark.parametrize("n, rule", [(2.5, "a whole number"), (-1, "at least 0"), (math.nan, "a whole number")])
def test_a_number_of_problems_is_whole(n, rule):
    with pytest.raises(ValueError, match=f"^n must be {rule}, got {n}$"):
        ChainAddition().prompts(n)
    assert ChainAddition().prompts(0) == []


def test_a_made_up_task_need_be_made_harder():
    part = {True: "training", False: "held-out"}[is_held_out("1+1=")]
    with pytest.raises(ValueError, match="too few .* problems: make it harder$"):
        Few().prompts(1, held_out=part == "held-out")


LONG = ChainAddition(12, 12)  # so many problems that none comes twice


def test_a_stream_goes_on_from_its_place():
    whole = LONG.take(40, 0, seed=3)
    assert LONG.take(15, 0, seed=3) + LONG.take(25, 15, seed=3) == whole
    assert ChainAddition(12, 12).take(1, 39, seed=3) == whole[39:] and LONG.take(0, 7) == []
    assert len({*whole}) == 40 and not any(map(is_held_out, whole))


@pytest.mark.parametrize("world", [2, 3])
def test_processes_share_one_stream_and_no_problem(world):
    parts = [LONG.take(12, 4, seed=1, rank=rank, world=world) for rank in range(world)]
    turns = [prompt for turn in zip(*parts) for prompt in turn]
    assert turns == LONG.take(12 * world, 4 * world, seed=1) and len({*turns}) == 12 * world


@pytest.mark.parametrize("seed", [0, 1, -1, 2**40])
def test_neighbouring_seeds_share_no_problem(seed):
    assert not {*LONG.take(200, 0, seed)} & {*LONG.take(200, 0, seed + 1)}


def test_every_place_of_every_seed_is_spawned_apart():
    words = {tuple(spawn(seed, place).generate_state(2)) for seed in range(-20, 20) for place in range(50)}
    assert len(words) == 40 * 50


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(n=-1), "n must be at least 0, got -1"), (dict(n=1.5), "n must be a whole number, got 1.5"),
        (dict(start=-1), "start must be at least 0, got -1"), (dict(start=True), "start must be a whole number, got True"),
        (dict(seed=0.5), "seed must be a whole number, got 0.5"), (dict(rank=2, world=2), r"rank must be in \[0, 2\), got 2"),
        (dict(rank=-1), r"rank must be in \[0, 1\), got -1"), (dict(world=0), r"rank must be in \[0, 0\), got 0"),
    ],
)  # fmt: skip
def test_a_place_that_is_none_is_refused(settings, told):
    with pytest.raises(ValueError, match=f"^{told}$"):
        LONG.take(**(dict(n=1, start=0) | settings))


class Chat(ChainAddition):
    "Messages for prompts."

    def draw(self, rng):
        return [{"role": "user", "content": super().draw(rng)}]


def test_messages_are_held_out_by_their_text():
    chat = Chat()
    both = [chat.prompts(50, held_out=part) for part in (False, True)]
    assert [is_held_out(x) for x in both[1]] == [True] * 50
    assert not [x for x in both[0] if x in both[1]] and chat.take(2, 0)[0][0]["role"] == "user"


def test_a_task_that_is_not_drawn_from_need_not_say_how():
    class One(Task):
        def solution(self, prompt):
            return "2"

        def verify(self, prompt, completion):
            return completion == "2"

        def at(self, place, seed):
            return f"{seed}+{place}="

    assert One().take(3, 1, seed=7) == ["7+1=", "7+2=", "7+3="]
    with pytest.raises(NotImplementedError):
        One().prompts(1)


@pytest.mark.parametrize(
    "settings, told",
    [
        (dict(examples=0), "examples must be at least 1, got 0"),
        (dict(steps=-1), "steps must be at least 0, got -1"),
        (dict(steps=2.5), "steps must be a whole number, got 2.5"),
        (dict(batch_size=0), "batch_size must be at least 1, got 0"),
        (dict(batch_size=1.5), "batch_size must be a whole number, got 1.5"),
        (dict(lr=0), r"lr must be in \(0, inf\), got 0"),
        (dict(lr=math.nan), r"lr must be in \(0, inf\), got nan"),
        (dict(lr=math.inf), r"lr must be in \(0, inf\), got inf"),
        (dict(max_grad_norm=0), r"max_grad_norm must be in \(0, inf\], got 0"),
        (dict(max_grad_norm=math.nan), r"max_grad_norm must be in \(0, inf\], got nan"),
    ],
)
def test_settings_of_the_loop_are_refused_by_name(settings, told):
    weights = torch.nn.Parameter(torch.ones(3))
    usual = dict(examples=2, steps=1, batch_size=2, lr=0.1)
    with pytest.raises(ValueError, match=f"^{told}$"):
        minimise(lambda rows: weights.sum(), [weights], **(usual | settings))
    assert torch.equal(weights, torch.ones(3))
    assert minimise(lambda rows: weights.sum(), [weights], **(usual | dict(steps=0))) == []


def test_nothing_to_learn_from_or_to_ask_is_refused(tokenizer):
    model = tiny_lm(tokenizer, **SMALL)
    with pytest.raises(ValueError, match="^prompts must be at least one, got none$"):
        sft(model, tokenizer, [], [], 1)
    with pytest.raises(ValueError, match="^prompts must be at least one, got none$"):
        success_rate(model, tokenizer, ChainAddition(), [])
    for name, x, rule in (("at_once", -1, "at least 0"), ("at_once", 1.5, "a whole number"), ("samples", 0, "at least 1"), ("samples", 1.5, "a whole number"),
                          ("max_new_tokens", 0, "at least 1"), ("max_new_tokens", 2.5, "a whole number")):
        with pytest.raises(ValueError, match=f"^{name} must be {rule}, got {x}$"):
            success_rate(model, tokenizer, ChainAddition(), PROMPTS, **{name: x})


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_pass_at_k_is_the_mean_over_all_sets_of_k(k):
    right = torch.rand(6, 5, generator=generator()) < 0.3
    sets = [right[:, list(some)].any(1).double() for some in combinations(range(5), k)]
    solved = torch.stack(sets).mean(0)
    mean, error = pass_at_k(right, k)
    assert mean == pytest.approx(solved.mean().item(), abs=1e-12)
    assert error == pytest.approx((solved.var() / 6).sqrt().item(), abs=1e-12)


def test_avg_at_k_and_its_error_are_those_of_the_means_of_problems():
    right = torch.tensor([[1, 1, 1, 1], [1, 0, 1, 0], [0, 0, 0, 0]]).bool()
    assert pass_at_k(right) == (0.5, pytest.approx(math.sqrt(0.25 / 3)))
    assert pass_at_k(right[:2]) == (0.75, 0.25)
    assert pass_at_k(right[:1]).mean == 1 and math.isnan(pass_at_k(right[:1]).error)
    assert pass_at_k(right[:1].expand(5, 4)) == (1, 0)
    assert pass_at_k(torch.tensor([[True, True, False, False, False]] * 3)) == (0.4, 0)


@pytest.mark.parametrize("k", [1, 2])
@pytest.mark.parametrize("kinds", [(0.2, 0.9), (0.0, 1.0), (0.5, 0.5)])
def test_the_squared_error_is_without_bias(kinds, k):
    "Over all that can happen to two problems of two kinds, with three responses each."
    total = torch.zeros(3, dtype=torch.float64)
    for ps in product(kinds, repeat=2):
        for row in product((False, True), repeat=6):
            table = torch.tensor(row).view(2, 3)
            p = torch.tensor(ps, dtype=torch.float64)[:, None]
            mean, error = pass_at_k(table, k)
            chance = 0.25 * torch.where(table, p, 1 - p).prod()
            total += chance * torch.tensor([mean, mean**2, error**2], dtype=torch.float64)
    mean, square, error2 = total.tolist()
    assert error2 == pytest.approx(square - mean**2, abs=1e-12)
    if k == 1:
        draws = sum(p * (1 - p) for p in kinds) / 2
        problems = (kinds[0] - kinds[1]) ** 2 / 4
        assert error2 == pytest.approx((draws / 3 + problems) / 2, abs=1e-12)


@pytest.mark.parametrize("k", [1, 4])
def test_two_standard_errors_hold_the_truth_nineteen_times_in_twenty(k):
    "Sixty problems of very different difficulty, eight responses; 2000 times."
    order, p = generator(1), torch.rand(2000, 60, 1, generator=generator(2)) ** 3
    tables = torch.rand(2000, 60, 8, generator=order) < p
    truth = {1: 1 / 4, 4: 1 - sum(math.comb(4, i) * (-1) ** i / (3 * i + 1) for i in range(5))}[k]
    found = [pass_at_k(table, k) for table in tables]
    inside = sum(abs(mean - truth) < 1.96 * error for mean, error in found) / 2000
    assert inside == pytest.approx(0.95, abs=0.015)
    spread = torch.tensor([mean for mean, _ in found]).std().item()
    assert sum(error for _, error in found) / 2000 == pytest.approx(spread, rel=0.05)


def test_pass_at_k_refuses_what_it_cannot_answer():
    right = torch.ones(2, 3, dtype=torch.bool)
    with pytest.raises(ValueError, match=r"k must be in \[1, 3\], got 4"):
        pass_at_k(right, 4)
    with pytest.raises(ValueError, match="right must be a bool tensor"):
        pass_at_k(right.float(), 1)
    with pytest.raises(ValueError, match=r"right must have shape \(P, N\)"):
        pass_at_k(right[0], 1)
    with pytest.raises(ValueError, match="k must be a whole number, got 1.5"):
        pass_at_k(right, 1.5)
    with pytest.raises(ValueError, match="rows of right must be at least 1, got 0"):
        pass_at_k(right[:0], 1)


def test_one_loop_takes_the_steps_of_adamw():
    data, asked = torch.randn(7, 3, generator=generator()), []
    weights = torch.nn.Parameter(torch.ones(3))

    def loss(rows):
        asked.append(rows)
        return (data[rows] @ weights).square().mean()

    losses = minimise(loss, [weights], 7, 4, 5, 0.1, anneal=True, generator=generator(1))
    other = torch.nn.Parameter(torch.ones(3))
    optimizer = torch.optim.AdamW([other], 0.1)
    for step, (rows, value) in enumerate(zip(asked, losses, strict=True)):
        optimizer.param_groups[0]["lr"] = 0.1 * (1 - step / 4)
        expected = (data[rows] @ other).square().mean()
        assert value == pytest.approx(expected.item())
        optimizer.zero_grad()
        expected.backward()
        optimizer.step()
    assert torch.equal(weights, other) and len({tuple(x.tolist()) for x in asked}) > 1


def test_gradients_are_cut_to_the_longest_allowed(monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watched(self):
        norms.append(self.param_groups[0]["params"][0].grad.norm().item())
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    for longest in (math.inf, 0.5):
        weights = torch.nn.Parameter(torch.full((3,), 10.0))
        minimise(lambda rows: weights.square().sum(), [weights], 1, 1, 1, 0.1, max_grad_norm=longest)
    assert norms[0] > 30 and norms[1] == pytest.approx(0.5, abs=1e-5)


def test_gradients_of_the_caller_enter_no_step_and_none_are_left():
    found = []
    for left in (None, torch.full((3,), 7.0)):
        weights = torch.nn.Parameter(torch.ones(3))
        weights.grad = left
        minimise(lambda rows: weights.square().sum(), [weights], 1, 2, 1, 0.1)
        assert weights.grad is None
        found.append(weights.detach())
    assert torch.equal(*found) and not torch.equal(found[0], torch.ones(3))
    weights.grad = torch.ones(3)
    minimise(lambda rows: weights.sum(), [weights], 1, 0, 1, 0.1)
    assert weights.grad is None


class Noisy(torch.nn.Module):
    "Drops half of what goes through a layer, where that is allowed."

    def forward(self, x):
        return torch.nn.functional.dropout(x, 0.5, self.training)


def test_fine_tuning_is_without_dropout_and_leaves_the_model_in_its_mode(tokenizer):
    losses = []
    for training in (False, True):
        model = tiny_lm(tokenizer, **SMALL)
        model.model.norm = torch.nn.Sequential(model.model.norm, Noisy())
        model.train(training)
        model.model.layers[0].eval()  # a part may have a mode of its own
        modes = [part.training for part in model.modules()]
        losses.append(sft(model, tokenizer, ["1+1="], ["2"], 3, 1, generator=generator()))
        assert [part.training for part in model.modules()] == modes
        assert all(p.grad is None for p in model.parameters())
    assert losses[0] == losses[1]


def test_the_mode_comes_back_after_an_error(tokenizer):
    model = tiny_lm(tokenizer, **SMALL).train()
    with pytest.raises(ValueError, match="steps must be at least 0"):
        sft(model, tokenizer, ["1+1="], ["2"], -1)
    assert model.training


def test_gradients_left_on_a_model_do_not_change_its_fine_tuning(tokenizer):
    runs = []
    for left in (False, True):
        model = tiny_lm(tokenizer, **SMALL)
        for p in model.parameters():
            p.grad = torch.ones_like(p) if left else None
        runs.append(sft(model, tokenizer, PROMPTS, ["16", "9", "4"], 3, 2, generator=generator()))
    assert runs[0] == runs[1]


def test_verdicts_are_a_row_a_problem(tokenizer):
    class Starts(ChainAddition):
        def verify(self, prompt, completion):
            return int(completion[:1] in "0123")  # no bool, as rules of one's own may be

    model = tiny_lm(tokenizer, **SMALL)
    table = verdicts(model, tokenizer, Starts(), PROMPTS, 5, 4, generator())
    texts = sample(model, tokenizer, PROMPTS, 5, 4, generator=generator()).texts(tokenizer)
    assert table.dtype == torch.bool and table.shape == (3, 5) and 0 < table.sum() < 15
    assert table.flatten().tolist() == [text[:1] in "0123" for text in texts]
    rate = success_rate(model, tokenizer, Starts(), PROMPTS, 4, generator(), 5)
    assert rate == pass_at_k(table).mean


def test_sampling_is_as_in_the_run(tokenizer, monkeypatch):
    "Settings reach the sampler; in parts, the most likely tokens are the same."
    asked = []

    def watched(*what, **more):
        asked.append((what[2:], {k: x for k, x in more.items() if k != "generator"}))
        return sample(*what, **more)

    monkeypatch.setattr(tasks, "sample", watched)
    how = dict(temperature=0.5, top_k=1, top_p=0.9, min_p=0.1, stop=["+"])
    model, again = tiny_lm(tokenizer, **SMALL), dict(samples=2, **how)
    rates = [success_rate(model, tokenizer, ChainAddition(), PROMPTS, 6, at_once=n, **again) for n in (0, 2)]
    assert rates[0] == rates[1]
    assert asked == [((PROMPTS, 2, 6), how | {"at_once": n}) for n in (0, 2)]


def test_messages_are_asked_and_taught_as_their_template_writes_them(tokenizer):
    speaks = char_tokenizer()
    speaks.chat_template = "{% for message in messages %}{{ message.content }}{% endfor %}"
    chats = [[{"role": "user", "content": prompt}] for prompt in PROMPTS]

    class Same(Chat):
        def verify(self, prompt, completion):
            return completion[:1] in "0123" and prompt in (*chats, *PROMPTS)

    found = []
    for prompts in PROMPTS, chats:
        model = tiny_lm(tokenizer, **SMALL)
        losses = sft(model, speaks, prompts, ["16", "9", "4"], 3, 2, generator=generator())
        right = verdicts(model, speaks, Same(), prompts, 4, 3, generator(), at_once=2)
        found.append((losses, right.tolist()))
    assert found[0] == found[1]


# What is drawn


def test_the_part_that_is_held_out_is_the_same_for_ever():
    "A model that was trained with one version is graded with another."
    texts = [f"{a}+{b}=" for a in range(100) for b in range(100)]
    for text in texts[:300]:
        assert is_held_out(text) == (zlib.crc32("".join(sorted(text)).encode()) % 8 == 0)
    share = sum(map(is_held_out, texts)) / len(texts)
    assert share == pytest.approx(1 / 8, abs=0.02)


@pytest.mark.parametrize("seed", [3, -1])
def test_a_problem_is_drawn_from_the_seed_of_its_place(seed):
    "So it is the same in every version, and a run goes on where it was left."
    for place in (0, 1, 2**32 + 1):
        spawned = np.random.SeedSequence(seed % 2**64, spawn_key=(place,))
        word = int(spawned.generate_state(1, np.uint64)[0])
        assert word >= 2**32
        assert LONG.at(place, seed) == LONG.prompts(1, word)[0]
        assert LONG.take(1, place, seed) == [LONG.at(place, seed)]


@pytest.mark.parametrize("apart", [2**32, 2**48, 2**63])
def test_seeds_far_apart_share_no_problem(apart):
    assert not {*LONG.take(50, 0, 5)} & {*LONG.take(50, 0, 5 + apart)}


def test_all_numbers_of_terms_and_all_digits_are_drawn_equally_often():
    terms = [prompt[:-1].split("+") for prompt in ChainAddition().prompts(3000)]
    sizes, digits = Counter(map(len, terms)), Counter(chain(*terms))
    assert sizes.keys() == {3, 4, 5} and digits.keys() == {*"123456789"}
    assert all(800 < n < 1200 for n in sizes.values())
    assert all(1200 < n < 1500 for n in digits.values())
    pools = [prompt.split("=")[0].split(",") for prompt in Countdown().prompts(3000)]
    sizes, digits = Counter(map(len, pools)), Counter(chain(*pools))
    assert sizes.keys() == {2, 3} and digits.keys() == {*"123456789"}
    assert all(1300 < n < 1700 for n in sizes.values())


def test_zero_is_a_number_on_the_way():
    assert Countdown().verify("5,5,3=3:", "5-5=0,0+3=3")
    assert Countdown().solution("2,2=0:") == "2-2=0"
    assert not Countdown().verify("5,6,3=2:", "5-6=-1,-1+3=2")


# What fine-tuning reads and does


def test_fine_tuning_cuts_its_gradients_to_length_one(tokenizer, monkeypatch):
    norms, step = [], torch.optim.AdamW.step

    def watched(self):
        grads = [p.grad for p in self.param_groups[0]["params"]]
        norms.append(torch.nn.utils.get_total_norm(grads).item())
        return step(self)

    monkeypatch.setattr(torch.optim.AdamW, "step", watched)
    model = tiny_lm(tokenizer, **SMALL)
    with torch.no_grad():
        model.lm_head.weight.mul_(20)
    sft(model, tokenizer, PROMPTS, ["16", "9", "4"], 2, 3)
    assert norms == pytest.approx([1.0, 1.0], abs=1e-4)


def test_fine_tuning_refuses_what_does_not_fit(tokenizer):
    "Prompt, answer and its end; the context is 32 tokens."
    model = tiny_lm(tokenizer, **SMALL)
    sft(model, tokenizer, ["1="], ["1" * 29], 1, 1)
    with pytest.raises(ValueError, match=r"^prompts\[1\] has 33 tokens.* context is 32$"):
        sft(model, tokenizer, ["1=", "1="], ["1", "1" * 30], 1, 1)


def test_fine_tuning_puts_no_special_tokens_into_the_middle():
    "The tokenizer begins every text with one; the answer only goes on."
    plain, special = char_tokenizer(), char_tokenizer()
    special.backend_tokenizer.post_processor = processors.TemplateProcessing(
        single="<pad> $A", special_tokens=[("<pad>", 0)]
    )
    losses = []
    for tokenizer, prompts in (
        (special, ["1+1=", "9="]),
        (plain, [[0, *plain(text).input_ids] for text in ("1+1=", "9=")]),
    ):
        model = tiny_lm(tokenizer, **SMALL)
        losses.append(sft(model, tokenizer, prompts, ["2", "9"], 3, 2, generator=generator()))
    assert losses[0] == losses[1]


def test_fine_tuning_reads_no_columns_of_padding(tokenizer):
    model, read = tiny_lm(tokenizer, **SMALL), set()
    model.get_input_embeddings().register_forward_hook(lambda *x: read.add(x[1][0].shape))
    prompts, answers = ["1+2+3+4=", "1=", "2+2="], ["3,6,10", "11,11,11,11", "4"]
    sft(model, tokenizer, prompts, answers, 12, 1, generator=generator())
    assert read == {(1, len(q) + len(o) + 1) for q, o in zip(prompts, answers)}


@pytest.mark.parametrize("half", [torch.bfloat16, torch.float16])
def test_fine_tuning_refuses_weights_that_could_not_move(half):
    tokenizer = char_tokenizer()
    model = tiny_lm(tokenizer, width=16, layers=1, heads=2).to(half)
    with pytest.raises(ValueError, match=rf"weights must be float32 \(see float32_masters\), got {half}"):
        sft(model, tokenizer, ["1+1="], ["2"], 1)
    model.float().requires_grad_(False)
    with pytest.raises(ValueError, match="weights must be float32.*none that learn"):
        sft(model, tokenizer, ["1+1="], ["2"], 1)


def test_frozen_weights_may_be_of_two_bytes():
    learns = torch.nn.Parameter(torch.ones(3))
    frozen = torch.nn.Parameter(torch.ones(3).bfloat16(), requires_grad=False)
    losses = minimise(lambda rows: (learns * frozen).sum(), [frozen, learns], 1, 2, 1, 0.1)
    assert losses[1] < losses[0] and torch.equal(frozen, torch.ones(3).bfloat16())
