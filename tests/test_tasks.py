import math
from itertools import chain, combinations

import pytest
import torch
from tiny_models import PROMPTS, SMALL, generator

from po_book.language_model import tiny_lm
from po_book.tasks import (
    ChainAddition,
    Countdown,
    WordProblems,
    is_held_out,
    minimise,
    pass_at_k,
    sft,
    success_rate,
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


@pytest.mark.parametrize(
    "prompt, answer, told",
    [('"a"', '"twelve"', "twelve"), ('"a"', "NaN", "answer must be finite, got nan"), ('"a"', "true", "True"),
     ('"a"', "[3]", "3"), ('"a"', "null", "None"), ("7", "3", "prompt must be a text, got 7"),
     ("[1]", "3", r"prompt must be a text, got \[1\]"), ('""', "3", "prompt must be a text, got ''")],
)
def test_a_problem_is_a_text_and_a_number(tmp_path, prompt, answer, told):
    path = tmp_path / "x.jsonl"
    path.write_text(f'{{"prompt": "b", "answer": "1,200."}}\n{{"prompt": {prompt}, "answer": {answer}}}\n')
    want = 'line 2 must be a JSON object with a text "prompt", a number "answer": '
    with pytest.raises(ValueError, match=want + f".*{told}"):
        WordProblems(path)


def test_a_file_of_problems_need_not_be_made_harder(tmp_path):
    path = tmp_path / "x.jsonl"
    path.write_text('{"prompt": "1+1=", "answer": 2}\n')
    part = {True: "training", False: "held-out"}[is_held_out("1+1=")]
    with pytest.raises(ValueError, match=f"too few {part} problems: add some to the file$"):
        WordProblems(path).prompts(1, held_out=part == "held-out")
    with pytest.raises(ValueError, match="too few .* problems: make it harder$"):
        Few().prompts(1, held_out=part == "held-out")
    assert not WordProblems(path).verify("1+1=", "9" * 400)


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
    for name, x, rule in (("samples", 0, "at least 1"), ("samples", 1.5, "a whole number"),
                          ("max_new_tokens", 0, "at least 1"), ("max_new_tokens", 2.5, "a whole number")):
        with pytest.raises(ValueError, match=f"^{name} must be {rule}, got {x}$"):
            success_rate(model, tokenizer, ChainAddition(), PROMPTS, **{name: x})


@pytest.mark.parametrize("k", [1, 2, 4, 5])
def test_pass_at_k_is_the_mean_over_all_sets_of_k(k):
    right = torch.rand(6, 5, generator=generator()) < 0.3
    solved = [right[:, list(some)].any(1).double().mean() for some in combinations(range(5), k)]
    assert pass_at_k(right, k) == pytest.approx(torch.stack(solved).mean().item(), abs=1e-12)


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


def test_gradients_are_cut_to_the_longest_allowed():
    norms = []
    for longest in (math.inf, 0.5):
        weights = torch.nn.Parameter(torch.full((3,), 10.0))
        minimise(lambda rows: weights.square().sum(), [weights], 1, 1, 1, 0.1, max_grad_norm=longest)
        norms.append(weights.grad.norm().item())
    assert norms[0] > 30 and norms[1] == pytest.approx(0.5, abs=1e-5)
