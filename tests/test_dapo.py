"DAPO: exact values, the sampler and its bound, the gradient it leaves, bad input."
import ast
import inspect
import itertools
import json
import math
from pathlib import Path

import pytest
import torch

from po_book.dapo import (
    CLIP_HIGH,
    NoSignal,
    drop_truncated,
    fill_groups,
    informative,
    soft_overlong_penalty,
    upweight,
)
from po_book.grpo import aggregate, group_advantages, grpo_loss
from po_book.ppo import clipped_surrogate

NOTEBOOKS = Path(__file__).parent.parent / "nbs"


def close(got, want, atol=1e-12):
    want = torch.as_tensor(want, dtype=got.dtype)
    torch.testing.assert_close(got, want, rtol=0, atol=atol)


def patterns(size):
    "All ways to be right or wrong."
    grid = torch.cartesian_prod(*[torch.tensor([0.0, 1.0])] * size)
    return grid.double()


def chances(rewards, p):
    return (rewards * p + (1 - rewards) * (1 - p)).prod(-1)


class Stream:
    "Draws consecutive rows of a fixed table, numbered, and notes what it was asked for."

    def __init__(self, rewards):
        self.rewards, self.at, self.asked = rewards, 0, []

    def __call__(self, n):
        rows = slice(self.at, self.at + n)
        self.asked.append(n)
        self.at += n
        return list(range(*rows.indices(len(self.rewards)))), self.rewards[rows]


def random_rewards(groups, size, p, seed=0):
    generator = torch.Generator().manual_seed(seed)
    return torch.bernoulli(torch.full((groups, size), p), generator=generator)


# Informative groups


def test_a_group_is_informative_if_one_reward_differs():
    rewards = torch.tensor([[0.0, 0, 0], [1, 1, 1], [0, 0, 1], [1, 0, 1], [-0.5, -0.5, -0.5]])
    assert informative(rewards).tolist() == [False, False, True, True, False]


@pytest.mark.parametrize("value", [0.1, 1 / 3, 1e-30, 1e30])
@pytest.mark.parametrize("size", [2, 7, 8])
def test_rounding_of_the_mean_makes_no_equal_group_informative(value, size):
    assert not informative(torch.full((1, size), value)).any()


def test_the_smallest_difference_is_one():
    a = torch.tensor(1.0)
    pair = torch.stack([a, torch.nextafter(a, a + 1)])[None]
    assert informative(pair).all()


@pytest.mark.parametrize("size, share", [(4, 0.81), (8, 0.66), (16, 0.44)])
def test_shares_of_dead_groups_by_enumeration(size, share):
    rewards = patterns(size)
    dead = chances(rewards, 0.05)[~informative(rewards)].sum()
    close(dead, 0.05**size + 0.95**size)
    assert round(dead.item(), 2) == share


@pytest.mark.parametrize("rewards", [torch.zeros(4), torch.zeros(4, 1), torch.zeros(1, 2, 3)])
def test_rewards_that_are_no_groups_are_refused(rewards):
    with pytest.raises(ValueError, match=r"rewards must be \[P, G\]"):
        informative(rewards)


@pytest.mark.parametrize("bad", [math.nan, math.inf])
def test_rewards_that_are_no_numbers_are_refused(bad):
    rewards = torch.tensor([[0.0, bad]])
    for call in (informative, lambda r: fill_groups(lambda n: ([0], r), 1)):
        with pytest.raises(ValueError, match="rewards must be finite"):
            call(rewards)


# Filling a batch


@pytest.mark.parametrize("p", [0.1, 0.5, 0.9])
@pytest.mark.parametrize("size", [1, 5, 16])
def test_a_batch_is_the_first_informative_groups_in_their_order(p, size):
    rewards = random_rewards(1000, 4, p)
    filled = fill_groups(Stream(rewards), size, max_draws=100)
    first = informative(rewards).nonzero().flatten()[:size]
    assert filled.groups == first.tolist()
    assert torch.equal(filled.rewards, rewards[first])


def test_the_counts_are_those_of_the_calls():
    stream = Stream(random_rewards(1000, 4, 0.1))
    filled = fill_groups(stream, 16)
    assert filled.draws == len(stream.asked) > 1
    assert filled.drawn == sum(stream.asked) == stream.at


def test_full_batches_take_one_call():
    filled = fill_groups(Stream(torch.tensor([[0.0, 1.0]] * 9)), 4, max_draws=1)
    assert (filled.drawn, filled.draws, filled.groups) == (4, 1, [0, 1, 2, 3])


def test_a_refill_asks_for_one_deviation_more_than_is_missing():
    useful, dead = [0.0, 1.0], [0.0, 0.0]
    rows = [useful] * 6 + [dead] * 2 + [useful] * 8
    stream = Stream(torch.tensor(rows))
    fill_groups(stream, 8)
    # Two are missing and a quarter is dead: the least n with n·3/4 - √(n·3/16) >= 2.
    n = 4
    assert n * 3 / 4 - (n * 3 / 16) ** 0.5 >= 2 > (n - 1) * 3 / 4 - ((n - 1) * 3 / 16) ** 0.5
    assert stream.asked == [8, n]


def test_a_share_that_is_known_to_be_dead_is_drawn_with_the_first_call():
    stream = Stream(random_rewards(1000, 4, 0.3))
    fill_groups(stream, 8, dead=0.5)
    assert stream.asked[0] == 21  # 21/2 - √21/2 = 8.2, and 20/2 - √20/2 = 7.8
    for dead, most in ((0.9, 24), (1.0, 24), (0.0, 8)):
        stream = Stream(random_rewards(1000, 4, 0.3))
        fill_groups(stream, 8, dead=dead)
        assert stream.asked[0] == most


def test_expecting_what_was_seen_takes_fewer_calls_and_few_more_groups():
    share = 0.3**4 + 0.7**4
    for expected, calls in ((0.0, 2.06), (share, 1.07)):
        runs = [fill_groups(Stream(random_rewards(200, 4, 0.3, seed)), 16, dead=expected)
                for seed in range(200)]
        assert abs(sum(run.draws for run in runs) / 200 - calls) < 0.02
        assert sum(run.drawn for run in runs) / 200 < 1.3 * 16 / (1 - share)


@pytest.mark.parametrize("oversample", [1.0, 1.5, 3.0])
def test_no_call_asks_for_more_than_its_bound_and_none_for_nothing(oversample):
    for seed in range(50):
        stream = Stream(random_rewards(1000, 4, 0.03, seed))
        try:
            fill_groups(stream, 8, oversample=oversample)
        except NoSignal:
            assert len(stream.asked) == 10
        assert 0 < min(stream.asked) and max(stream.asked) <= 8 * oversample


def test_another_rule_may_say_which_groups_are_kept():
    rewards = random_rewards(1000, 4, 0.5)

    def half(x):
        return x.sum(1) == 2

    filled = fill_groups(Stream(rewards), 16, keep=half)
    assert filled.groups == half(rewards).nonzero().flatten()[:16].tolist()
    never = lambda x: torch.zeros(len(x), dtype=torch.bool)  # noqa: E731
    with pytest.raises(NoSignal, match="0 of 32 groups .* 1 have the lowest reward 0 .* 2 the"):
        rows = [[0.0, 0]] + [[1.0, 1]] * 2 + [[0.0, 1]] * 99
        fill_groups(Stream(torch.tensor(rows)), 8, 2, keep=never)


def test_shares_and_bounds_that_make_no_sense_are_refused():
    for change, message in ((dict(dead=1.1), "dead must be in"), (dict(dead=math.nan), "dead"),
                            (dict(oversample=0.5), "oversample must be at least 1, got 0.5")):
        with pytest.raises(ValueError, match=message):
            fill_groups(Stream(torch.zeros(9, 2)), 2, **change)


@pytest.mark.parametrize("draws", [1, 3, 10])
def test_sampling_ends_after_max_draws(draws):
    stream = Stream(torch.zeros(1000, 4))
    with pytest.raises(NoSignal, match=f"0 of {8 + 24 * (draws - 1)} groups .* after {draws} draws"):
        fill_groups(stream, 8, draws)
    assert stream.asked == [8] + [24] * (draws - 1)


def test_the_last_draw_still_counts():
    rows = [[0.0, 0.0]] * 16 + [[0.0, 1.0]] * 12
    assert fill_groups(Stream(torch.tensor(rows)), 4, max_draws=3).groups == [16, 17, 18, 19]


def test_no_signal_says_what_was_seen_and_what_to_do():
    rows = [[0.0, 0.0]] * 5 + [[1.0, 1.0]] * 2 + [[0.0, 1.0]]
    with pytest.raises(NoSignal) as caught:
        fill_groups(Stream(torch.tensor(rows)), 8, max_draws=1)
    message = str(caught.value)
    for part in ("1 of 8 groups", "8 are needed", "5 have the lowest reward 0",
                 "2 the highest 1", "easier prompts", "harder prompts"):
        assert part in message


@pytest.mark.parametrize("value", [0.0, 1.0])
def test_no_signal_of_one_single_reward_points_at_the_reward(value):
    with pytest.raises(NoSignal, match=f"every reward is {value:g}: check the reward"):
        fill_groups(Stream(torch.full((999, 4), value)), 8)


def test_no_signal_is_no_value_error():
    assert issubclass(NoSignal, RuntimeError) and not issubclass(NoSignal, ValueError)


@pytest.mark.parametrize("name", ["size", "max_draws"])
def test_counts_must_be_positive(name):
    with pytest.raises(ValueError, match=f"{name} must be at least 1, got 0"):
        fill_groups(**{"draw": Stream(torch.zeros(9, 2)), "size": 2, name: 0})
    for x in 2.5, math.nan, math.inf, None:
        with pytest.raises(ValueError, match=f"{name} must be a whole number, got {x}"):
            fill_groups(**{"draw": Stream(torch.zeros(9, 2)), "size": 2, name: x})


@pytest.mark.parametrize("groups, rows", [(3, 2), (2, 3), (0, 0)])
def test_a_draw_must_give_what_it_was_asked_for(groups, rows):
    with pytest.raises(ValueError, match=rf"draw\(2\) must return 2 groups .* got {groups} "):
        fill_groups(lambda n: ([None] * groups, torch.zeros(rows, 4)), 2)


def test_kept_groups_have_the_law_of_informative_groups():
    rewards, kept = patterns(3), torch.zeros(8)
    table = random_rewards(60_000, 3, 0.3)
    stream = Stream(table)
    for _ in range(500):
        batch = fill_groups(stream, 8).rewards
        kept += (batch @ torch.tensor([4.0, 2.0, 1.0])).long().bincount(minlength=8)
    law = chances(rewards, 0.3) * informative(rewards)
    close((kept / kept.sum()).double(), law / law.sum(), 0.03)  # four standard errors


# What selection does to the gradient


def test_selection_rescales_the_gradient_of_all_prompts_alike():
    size, success = 4, torch.tensor([0.05, 0.3, 0.9], dtype=torch.float64)
    rewards = patterns(size)
    estimate = group_advantages(rewards)
    mean, kept, share = [], [], []
    for p in success:
        law, keep = chances(rewards, p), informative(rewards)
        per_group = (estimate * (rewards - p)).mean(-1)
        mean.append(law @ per_group)
        share.append(law[keep].sum())
        kept.append((law * per_group)[keep].sum() / share[-1])
    mean, kept, share = map(torch.stack, (mean, kept, share))
    close(kept, mean / share)                       # one prompt, again until it is alive
    close(share / share.sum() * kept, mean / share.sum())  # fresh prompts: one factor


# Upweighting


def test_a_quarter_dead_is_four_thirds():
    rewards = torch.tensor([[0.0, 1], [1, 1], [1, 0], [0, 1]])
    advantages = group_advantages(rewards)
    got = upweight(advantages, rewards)
    close(got[[0, 2, 3]], advantages[[0, 2, 3]] * 4 / 3, 1e-6)
    assert got[1].eq(0).all()


def test_nothing_dead_changes_nothing_and_all_dead_is_zero():
    rewards = torch.tensor([[0.0, 1], [1, 0]])
    advantages = group_advantages(rewards)
    assert torch.equal(upweight(advantages, rewards), advantages)
    assert upweight(torch.ones(2, 2), torch.ones(2, 2)).eq(0).all()


def test_upweighting_is_the_mean_over_informative_groups():
    rewards = random_rewards(40, 4, 0.2).double()
    advantages = torch.randn(40, 4, generator=torch.Generator().manual_seed(0)).double()
    keep = informative(rewards)
    assert 0 < keep.sum() < 40
    close(upweight(advantages, rewards).mean(), advantages[keep].mean())


def test_upweighting_has_the_mean_of_a_full_batch_and_more_variance():
    rewards, p = patterns(4), 0.2
    law, keep = chances(rewards, p), informative(rewards)
    single = (group_advantages(rewards) * (rewards - p)).mean(-1)
    kept_law = torch.where(keep, law, 0) / law[keep].sum()
    mean = kept_law @ single
    variance = kept_law @ (single - mean) ** 2
    total = first = second = 0.0
    for i, j in itertools.product(range(16), repeat=2):
        if keep[i] or keep[j]:
            batch = rewards[[i, j]]
            A = upweight(group_advantages(batch), batch)
            estimate, chance = (A * (batch - p)).mean(), law[i] * law[j]
            total, first = total + chance, first + chance * estimate
            second = second + chance * (estimate - mean) ** 2
    close(first / total, mean)
    assert second / total > 1.2 * variance / 2


def test_upweighting_needs_the_rewards_of_these_advantages():
    with pytest.raises(ValueError, match="advantages must have rewards's shape"):
        upweight(torch.zeros(2, 3), torch.zeros(2, 4))


# Overlong responses


def test_penalty_at_the_sizes_of_the_paper():
    lengths = torch.tensor([0, 16384, 16385, 18432, 20480, 30000])
    want = [0, 0, -1 / 4096, -0.5, -1, -1]
    close(soft_overlong_penalty(lengths, 20480, 4096).double(), want)


def test_penalty_falls_with_length_and_stays_within_its_bounds():
    penalty = soft_overlong_penalty(torch.arange(200), 100, 37)
    assert penalty.diff().le(0).all()
    assert penalty.min() == -1 and penalty.max() == 0
    assert (penalty == 0).sum() == 64 and (penalty > -1).sum() == 100  # 0 to 63, 0 to 99


def test_penalty_keeps_the_shape_of_the_lengths():
    assert soft_overlong_penalty(torch.ones(3, 5, dtype=torch.long), 8, 4).shape == (3, 5)


@pytest.mark.parametrize("cache", [0, -1, 8, 9])
def test_a_cache_must_fit_below_the_limit(cache):
    match = f"cache must be positive and max_len above it, got cache {cache} and max_len 8"
    with pytest.raises(ValueError, match=match):
        soft_overlong_penalty(torch.tensor([1]), 8, cache)
    for name in "cache", "max_len":
        with pytest.raises(ValueError, match=f"{name} must be a whole number, got 4.5"):
            soft_overlong_penalty(torch.tensor([1]), **{"max_len": 8, "cache": 4, name: 4.5})
    with pytest.raises(ValueError, match="cache must be positive .*, got cache 4 and max_len nan"):
        soft_overlong_penalty(torch.tensor([1]), math.nan, 4)


def test_penalty_is_that_of_trl():
    rewards = pytest.importorskip("trl.rewards")
    theirs = rewards.get_soft_overlong_punishment(max_completion_len=20, soft_punish_cache=6)
    lengths = torch.arange(1, 30)
    want = theirs(completion_ids=[[0] * n for n in lengths.tolist()])
    close(soft_overlong_penalty(lengths, 20, 6).double(), want, 1e-6)


def test_truncated_rows_leave_the_mask_and_others_stay():
    mask = torch.tensor([[True, False], [True, True], [False, False], [True, True]])
    finished = torch.tensor([True, False, True, True])
    got = drop_truncated(mask, finished)
    assert torch.equal(got, torch.tensor([[1, 0], [0, 0], [0, 0], [1, 1]]).bool())
    assert torch.equal(mask[1], torch.tensor([True, True]))


def test_filter_and_penalty_together_leave_a_truncated_row_without_gradient():
    mask = torch.arange(4) < torch.tensor([[1], [2], [4], [4]])
    finished = torch.tensor([True, True, True, False])
    rewards = torch.tensor([1.0, 0.2, 1, 0]) + soft_overlong_penalty(mask.sum(1), 4, 2)
    gradients = []
    for m in mask, drop_truncated(mask, finished):
        logp = torch.zeros(4, 4, requires_grad=True)
        advantages = group_advantages(rewards[None])[0]
        loss, _ = grpo_loss(logp, logp.detach(), advantages, m, aggregate="token")
        gradients.append(torch.autograd.grad(loss, logp)[0])
    assert gradients[0][3].gt(0).all()   # descent makes the cut response less likely
    assert gradients[1][3].eq(0).all()
    assert gradients[1][:3][mask[:3]].ne(0).all()


@pytest.mark.parametrize("mask, finished, match", [
    (torch.ones(2, 3), torch.ones(2).bool(), "mask must be a bool"),
    (torch.ones(2, 3).bool(), torch.ones(2), "finished must be a bool"),
    (torch.ones(2, 3).bool(), torch.ones(3).bool(), r"finished must have shape \(2,\)"),
    (torch.ones(2, 3).bool(), torch.ones(2, 1).bool(), r"finished must have .*\(2, 1\)"),
    (torch.ones(2).bool(), torch.ones(2).bool(), r"mask must have shape \(N, L\)"),
])
def test_masks_that_do_not_fit_are_refused(mask, finished, match):
    with pytest.raises(ValueError, match=match):
        drop_truncated(mask, finished)


# The step of the page is GRPO's, line by line


def cells(name, kind):
    notebook = json.loads((NOTEBOOKS / name).read_text())
    return ["".join(c["source"]) for c in notebook["cells"] if c["cell_type"] == kind]


def lines_of(name, function):
    "Lines of a function that a notebook defines, without comments, as `ast` prints them."
    source = next(c for c in cells(name, "code") if f"def {function}(" in c)
    found = {x.name: x for x in ast.parse(source).body if isinstance(x, ast.FunctionDef)}
    return ast.unparse(found[function]).splitlines()


def test_dapos_step_differs_from_grpos_in_the_lines_that_the_page_names():
    grpo = lines_of("46_grpo.ipynb", "grpo_step")
    dapo = lines_of("47_dapo.ipynb", "dapo_step")
    fence = next(c for c in cells("47_dapo.ipynb", "markdown") if "```diff" in c)
    fence = fence.split("```diff\n")[1].split("```")[0].splitlines()
    named = {sign: {ast.unparse(ast.parse(x[1:].strip())) for x in fence if x[0] == sign}
             for sign in "+-"}
    gone = {x.strip() for x in grpo} - {x.strip() for x in dapo}
    new = {x.strip() for x in dapo} - {x.strip() for x in grpo}
    reference = [  # what only the divergence needed
        "def grpo_step(model, reference, optimizer, prompts, G=16, beta=0.04):",
        "old, ref = (logps(model, ids), logps(reference, ids))",
        "rho, u = ((logp - old).exp(), (ref - logp).exp())",
        "def dapo_step(model, optimizer, prompts, G=16):",
        "old = logps(model, ids)",
        "rho = (logp - old).exp()",
    ]
    assert gone - set(reference) == named["-"] and len(named["-"]) == 5
    assert new - set(reference) == named["+"] and len(named["+"]) == 4
    assert set(reference) <= gone | new


@pytest.mark.parametrize("name", ["ask", "logps", "verify", "real_tokens"])
def test_both_pages_have_one_task(name):
    assert lines_of("46_grpo.ipynb", name) == lines_of("47_dapo.ipynb", name)


# GRPO's call with DAPO's settings


@pytest.mark.parametrize("A, rho, want", [
    (1, 1.25, 1), (1, 1.3, 0), (-1, 0.7, 0), (-1, 0.9, -1), (-1, 1.5, -1), (1, 0.5, 1),
])
def test_slope_of_the_decoupled_clip(A, rho, want):
    x = torch.tensor(rho, dtype=torch.float64, requires_grad=True)
    zero, A = torch.zeros((), dtype=torch.float64), torch.tensor(float(A)).double()
    value = clipped_surrogate(x.log(), zero, A, 0.2, CLIP_HIGH["dapo"])
    close(torch.autograd.grad(value, x)[0], want)


def test_only_the_upper_bound_is_raised():
    assert CLIP_HIGH["grpo"] == 0.2 and CLIP_HIGH["dapo"] == 0.28
    default = inspect.signature(grpo_loss).parameters["clip_low"].default
    assert all(high >= default for high in CLIP_HIGH.values())


def test_token_level_loss_of_a_short_good_and_a_long_bad_response():
    mask = torch.arange(8) < torch.tensor([[2], [8]])
    x = torch.tensor([[1.0], [-1.0]], dtype=torch.float64).expand(2, 8)
    close(aggregate(x, mask, "sample"), 0.0)
    close(aggregate(x, mask, "token"), -0.6)


def test_gradients_of_the_loss_are_token_weights_times_advantages():
    mask = torch.arange(8) < torch.tensor([[2], [8]])
    logp = torch.full((2, 8), -1.0, dtype=torch.float64, requires_grad=True)
    advantages = group_advantages(torch.tensor([[1.0, 0.0]], dtype=torch.float64), eps=0.0)
    loss, _ = grpo_loss(logp, logp.detach(), advantages[0], mask,
                        clip_high=CLIP_HIGH["dapo"], aggregate="token")
    want = torch.where(mask, torch.tensor([[-0.1], [0.1]], dtype=torch.float64), 0)
    close(torch.autograd.grad(loss, logp)[0], want)
