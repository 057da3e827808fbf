"Rewards: one signature and its errors, preferences, best of n, steps, judges."
import itertools
import math

import pytest
import torch

from po_book.language_model import char_tokenizer, tiny_lm
from po_book.rewards import (
    RewardModel,
    best_of_n,
    bradley_terry_loss,
    compute_rewards,
    fit_reward_model,
    judge,
    pair_accuracy,
    potential_rewards,
    prefixes,
    step_scores,
    verifier,
    weighted_sum,
)


def lengths(prompts, completions, **columns):
    return [len(o) for o in completions]


def returning(values):
    def reward(prompts, completions, **columns):
        return values

    return reward


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


# One signature


def test_columns_reach_the_function_and_numbers_come_back_as_floats():
    def exact(completions, answers, **columns):
        return torch.tensor([o == a for o, a in zip(completions, answers)])

    got = compute_rewards(exact, ["p", "q"], ["1", "2"], answers=["1", "3"])
    assert got == [1.0, 0.0] and all(type(x) is float for x in got)


def test_none_passes_as_no_opinion():
    assert compute_rewards(returning([None, 2]), ["p", "q"], ["a", "b"]) == [None, 2.0]


def test_no_rows_are_no_rewards():
    assert compute_rewards(lengths, [], []) == []


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0], "reward must return 2 rewards, one a row, got 1"),
        ([1.0, math.nan], r"finite rewards, got nan for row 1 \(prompt 'q'"),
        ([math.inf, 0.0], r"finite rewards, got inf for row 0 \(prompt 'p'"),
        (["good", "bad"], "a list of numbers, got"),
        (0.5, "a list of numbers, got 0.5"),
        (None, "a list of numbers, got None"),
    ],
)
def test_bad_rewards_are_refused_by_name(values, message):
    with pytest.raises(ValueError, match=message):
        compute_rewards(returning(values), ["p", "q"], ["a", "b"])


def test_lengths_must_agree():
    with pytest.raises(ValueError, match="completions must have 2 entries.*got 1"):
        compute_rewards(lengths, ["p", "q"], ["a"])
    with pytest.raises(ValueError, match="answers must have 1 entries.*got 2"):
        compute_rewards(lengths, ["p"], ["a"], answers=["1", "2"])


def test_a_missing_column_is_named():
    def exact(prompts, completions, answers, **columns):
        return [0.0]

    with pytest.raises(ValueError, match=r"exact needs \['answers'\].*'solutions'"):
        compute_rewards(exact, ["p"], ["a"], solutions=["1"])


def test_a_column_the_function_does_not_take_is_named():
    def closed(prompts, completions):
        return [0.0]

    assert compute_rewards(closed, ["p"], ["a"]) == [0.0]
    with pytest.raises(ValueError, match=r"closed does not take \['answers'\]: add \*\*columns"):
        compute_rewards(closed, ["p"], ["a"], answers=["1"])


def test_an_exception_keeps_its_type_and_notes_function_and_row():
    def as_int(prompts, completions, **columns):
        return [int(o) for o in completions]

    with pytest.raises(ValueError, match="invalid literal") as caught:
        compute_rewards(as_int, ["p", "q", "s"], ["1", "x", "y"])
    assert caught.value.__notes__ == [
        "reward function as_int failed on row 1 (prompt 'q', completion 'x')"
    ]


def test_an_exception_that_no_row_causes_alone_says_so():
    def fussy(prompts, completions, **columns):
        if len(prompts) > 1:
            raise RuntimeError("one at a time")
        return [0.0]

    with pytest.raises(RuntimeError) as caught:
        compute_rewards(fussy, ["p", "q"], ["a", "b"])
    assert "fussy failed on the batch, on no row alone" in caught.value.__notes__[0]


# Sums and rules


def test_a_sum_is_weighted_and_leaves_out_what_is_none():
    half = returning([None, 4.0])
    got = compute_rewards(weighted_sum([lengths, half], [2.0, 0.5]), ["p", "q"], ["a", "bcd"])
    assert got == [2.0, 8.0]
    # A weight belongs to its reward, also where an earlier one is silent.
    got = compute_rewards(weighted_sum([half, lengths], [2.0, 0.5]), ["p", "q"], ["a", "bcd"])
    assert got == [0.5, 9.5]


def test_a_sum_names_its_parts_and_the_part_that_fails():
    def broken(prompts, completions, **columns):
        raise KeyError("x")

    both = weighted_sum([lengths, broken], [1, 0.2])
    assert both.__name__ == "1 lengths + 0.2 broken"
    with pytest.raises(KeyError) as caught:
        both(["p"], ["a"])
    assert "broken failed on row 0 (prompt 'p'" in caught.value.__notes__[0]


def test_a_row_without_any_reward_is_refused():
    with pytest.raises(ValueError, match="anything to say about row 1"):
        weighted_sum([returning([1.0, None])])(["p", "q"], ["a", "b"])


@pytest.mark.parametrize("weights", [[1.0], [1.0, math.nan], [1.0, 2.0, 3.0]])
def test_weights_must_pair_with_rewards(weights):
    with pytest.raises(ValueError, match="weights must be finite numbers, one a reward"):
        weighted_sum([lengths, lengths], weights)


def test_an_empty_sum_is_refused():
    with pytest.raises(ValueError, match="got 0 rewards"):
        weighted_sum([])


def test_a_verifier_pays_one_where_the_rule_is_met():
    assert compute_rewards(verifier(lambda q, o: q == o), ["1", "2"], ["1", "3"]) == [1.0, 0.0]


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


def test_a_fit_leaves_the_language_model_alone_unless_its_trunk_is_shared():
    tokenizer = char_tokenizer()
    for shared in (False, True):
        lm = tiny_lm(tokenizer, width=16, layers=1, heads=2)
        before = [p.clone() for p in lm.base_model.parameters()]
        model = RewardModel(lm, tokenizer, share_trunk=shared)
        fit_reward_model(model, ["1+1="] * 4, ["2"] * 4, ["3"] * 4, 2)
        same = [torch.equal(p, q) for p, q in zip(lm.base_model.parameters(), before)]
        assert not all(same) if shared else all(same)


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
    [("7", 0.7), ("2 of 3 are right: 6.5", 0.65), ("none", None), ("11", None), ("-3", None)],
)
def test_the_last_number_is_the_mark(answer, want):
    assert compute_rewards(judge(lambda question: answer), ["p"], ["o"]) == [want]


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
