"Rewards: one signature and its errors, what waits, what is logged, sums and rules."
import asyncio
import math
import os
import signal
import threading
from fractions import Fraction
from functools import partial

import numpy as np
import pytest
import torch
from torch import nn

from po_book.rewards import (
    OFFERED,
    RewardLog,
    completion_text,
    compute_rewards,
    is_async,
    mean_metrics,
    verifier,
    weighted_sum,
)


def lengths(prompts, completions, **columns):
    return [len(o) for o in completions]


def returning(values):
    def reward(prompts, completions, **columns):
        return values

    return reward


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


# What the trainer offers


def offered(rows):
    log = RewardLog(rows)
    given = {
        "completion_ids": [[5, 1]] * rows,
        "finished": [True] * rows,
        "trainer_state": "state",
        "log_metric": log.log_metric,
        "log_extra": log.log_extra,
    }
    assert tuple(given) == OFFERED
    return log, given


def test_what_the_trainer_offers_goes_to_those_who_take_it():
    seen = []

    def none_of_it(prompts, completions):
        return [0.0] * 2

    def by_name(completions, finished, trainer_state="missing"):
        seen.append((finished, trainer_state))
        return [1.0] * 2

    def everything(**columns):
        seen.append(columns)
        return [2.0] * 2

    _, given = offered(2)
    data = {"prompts": ["p", "q"], "completions": ["a", "b"]}
    for i, reward in enumerate((none_of_it, by_name, everything)):
        assert compute_rewards(reward, **data, **given) == [i, i]
    assert seen == [([True, True], "state"), data | given]


def test_an_argument_that_nobody_offers_is_named():
    def needs(prompts, completions, completion_ids, log_metric, **columns):
        return [0.0]

    with pytest.raises(ValueError, match=r"needs needs \['completion_ids', 'log_metric'\]"):
        compute_rewards(needs, ["p"], ["a"], finished=[True])


@pytest.mark.parametrize("name", ["completion_ids", "finished", "reward", "rewards"])
def test_columns_of_any_name_have_one_entry_a_row(name):
    given = {name: [[1], [2]]}
    with pytest.raises(ValueError, match=f"{name} must have 1 entries, one a prompt, got 2"):
        compute_rewards(lengths, ["p"], ["a"], **given)
    got = compute_rewards(lambda **columns: [columns[name][0][0]], ["p"], ["a"], **{name: [[7]]})
    assert got == [7.0]


@pytest.mark.parametrize("values", ["ab", 3, None])
def test_a_column_is_no_text_and_no_number(values):
    with pytest.raises(ValueError, match=f"answers must have 2 entries, one a prompt, got {values!r}"):
        compute_rewards(lengths, ["p", "q"], ["a", "b"], answers=values)


@pytest.mark.parametrize("reward", [nn.Linear(1, 1), "a/name", None])
def test_what_is_no_function_is_refused(reward):
    kind = type(reward).__name__
    with pytest.raises(ValueError, match=rf"reward must be a function .*classifier_reward\), got {kind}"):
        compute_rewards(reward, ["p"], ["a"])


def test_a_row_is_blamed_without_logging_it_again():
    def as_int(completions, log_metric, log_extra, trainer_state, answers, **columns):
        assert trainer_state == "state"
        log_extra("seen", completions)
        log_metric("rows", len(completions))
        return [int(o) - int(a) for o, a in zip(completions, answers)]

    log, given = offered(3)
    with pytest.raises(ValueError, match="invalid literal") as caught:
        compute_rewards(as_int, ["p", "q", "s"], ["1", "x", "y"], answers=[1, 2, 3], **given)
    assert caught.value.__notes__ == [
        "reward function as_int failed on row 1 (prompt 'q', completion 'x')"
    ]
    assert log.extras == {"seen": ["1", "x", "y"]} and log.told == {"rows": [3.0]}


# Numbers of every kind


@pytest.mark.parametrize(
    "values",
    [
        torch.tensor([1.0, 0.5]),
        torch.tensor([1.0, 0.5], dtype=torch.float16, requires_grad=True),
        torch.tensor([1.0, 0.5], dtype=torch.bfloat16),
        torch.tensor([[1.0], [0.5]]),
        [torch.tensor(1), torch.tensor([0.5])],
        np.array([1.0, 0.5], dtype=np.float32),
        [np.float16(1), np.array(0.5)],
        [np.bool_(True), Fraction(1, 2)],
        (True, 0.5),
        iter([1, 0.5]),
    ],
    ids=lambda x: type(x).__name__,
)
def test_numbers_of_every_kind_come_back_as_floats(values):
    got = compute_rewards(returning(values), ["p", "q"], ["a", "b"])
    assert got == [1.0, 0.5] and all(type(x) is float for x in got)


def test_none_stays_none_among_numbers_of_every_kind():
    values = [None, np.float32(0.5), torch.tensor(2)]
    assert compute_rewards(returning(values), ["p"] * 3, ["a"] * 3) == [None, 0.5, 2.0]


@pytest.mark.parametrize(
    "values, message",
    [
        ([1.0, "2"], r"reward must return a list of numbers, got '2' for row 1 \(prompt 'q', completion 'b'\)"),
        ([1.0, np.str_("2")], "got .*'2'.* for row 1"),
        ([[1.0, 2.0], 1.0], r"got \[1.0, 2.0\] for row 0"),
        (torch.ones(2, 3), r"got tensor\(\[1., 1., 1.\]\) for row 0"),
        (np.ones((2, 3)), r"got array\(\[1., 1., 1.\]\) for row 0"),
        ([1.0, 1j], "got 1j for row 1"),
        ([1.0, 10**400], "got 10+ for row 1"),
        ([1.0, object], "got <class 'object'> for row 1"),
        (torch.tensor([1.0, torch.nan], dtype=torch.float16), "must return finite rewards, got nan for row 1"),
        ([1.0, np.float32("inf")], "must return finite rewards, got inf for row 1"),
        ("12", "a list of numbers, got '12'"),
        ({0: 1.0, 1: 2.0}, r"a list of numbers, got \{0: 1.0, 1: 2.0\}"),
        ({1.0, 2.0}, r"a list of numbers, got \{1.0, 2.0\}"),
        (torch.tensor(1.0), r"a list of numbers, got tensor\(1.\)"),
        (np.float32(1.0), "a list of numbers, got"),
        ([1.0, 2.0, 3.0], "must return 2 rewards, one a row, got 3"),
        (torch.ones(1, 2), "must return 2 rewards, one a row, got 1"),
    ],
)
def test_what_is_not_one_number_a_row_is_refused_with_the_row(values, message):
    with pytest.raises(ValueError, match=message):
        compute_rewards(returning(values), ["p", "q"], ["a", "b"])


# Functions that wait


async def waits(prompts, completions, **columns):
    await asyncio.sleep(0)
    return [float(len(o)) for o in completions]


class Waits:
    async def __call__(self, prompts, completions, **columns):
        return await waits(prompts, completions)


@pytest.mark.parametrize("reward", [waits, Waits(), partial(waits, bonus=1), partial(Waits(), bonus=1), Waits().__call__])
def test_coroutine_functions_are_awaited(reward):
    assert is_async(reward)
    assert compute_rewards(reward, ["p", "q"], ["a", "bcd"]) == [1.0, 3.0]


@pytest.mark.parametrize("function", [lengths, partial(lengths), len, Waits])
def test_other_functions_are_not(function):
    assert not is_async(function)


def test_coroutine_functions_are_awaited_inside_a_running_loop():
    async def cell():
        return compute_rewards(waits, ["p"], ["ab"])

    assert asyncio.run(cell()) == [2.0]


def test_a_coroutine_function_may_itself_call_rewards_that_wait():
    async def outer(prompts, completions, **columns):
        await asyncio.sleep(0)
        return compute_rewards(weighted_sum([waits, waits]), prompts, completions)

    assert compute_rewards(outer, ["p"], ["ab"]) == [4.0]


def test_calls_share_an_event_loop_and_threads_do_not():
    loops = []

    async def note(prompts, completions, **columns):
        loops.append(asyncio.get_running_loop())
        return [0.0]

    for _ in range(2):
        compute_rewards(note, ["p"], ["a"])
    other = threading.Thread(target=compute_rewards, args=(note, ["p"], ["a"]))
    other.start()
    other.join()
    assert loops[0] is loops[1] and loops[2] is not loops[0]


def test_a_process_that_was_forked_waits_in_a_loop_of_its_own():
    compute_rewards(waits, ["p"], ["a"])
    child = os.fork()
    if child == 0:
        signal.alarm(30)  # ends a child that waits for ever
        os._exit(0 if compute_rewards(waits, ["p"], ["ab"]) == [2.0] else 1)
    assert os.waitpid(child, 0)[1] == 0


def test_an_interrupt_ends_what_is_waited_for():
    cancelled = threading.Event()

    async def forever(prompts, completions, **columns):
        try:
            await asyncio.sleep(1000)
        except asyncio.CancelledError:
            cancelled.set()
            raise

    def interrupt(*_):
        raise KeyboardInterrupt

    before = signal.signal(signal.SIGALRM, interrupt)
    signal.setitimer(signal.ITIMER_REAL, 0.2)
    try:
        with pytest.raises(KeyboardInterrupt):
            compute_rewards(forever, ["p"], ["a"])
    finally:
        signal.signal(signal.SIGALRM, before)
    assert cancelled.wait(30)


def test_parts_of_a_sum_wait_at_the_same_time():
    "Each goes on when all have come, which never happens one after the other."
    meeting = asyncio.Barrier(3)

    def meets(value):
        async def reward(prompts, completions, **columns):
            await asyncio.wait_for(meeting.wait(), 60)
            return [value]

        return reward

    total = weighted_sum([meets(1.0), lengths, meets(2.0), meets(4.0)], [1, 10, 100, 1000])
    assert compute_rewards(total, ["p"], ["ab"]) == [1 + 20 + 200 + 4000]


def test_plain_functions_run_in_the_thread_that_calls():
    def here(prompts, completions, **columns):
        assert threading.current_thread() is caller
        return [1.0]

    caller = threading.current_thread()
    assert compute_rewards(weighted_sum([waits, here]), ["p"], ["a"]) == [2.0]


def test_what_a_coroutine_function_raises_passes_with_its_name_and_without_a_second_try():
    tries, ended = [], []

    async def broken(prompts, completions, **columns):
        tries.append(completions)
        raise KeyError("x")

    async def other(prompts, completions, **columns):
        await asyncio.sleep(0.01)
        ended.append(1)
        return [0.0] * 2

    with pytest.raises(KeyError) as caught:
        compute_rewards(weighted_sum([broken, other]), ["p", "q"], ["a", "b"])
    assert caught.value.__notes__ == ["reward function broken failed on the batch"]
    assert tries == [["a", "b"]] and ended == [1]


def test_a_sum_asks_nobody_again_for_a_row_that_it_refuses():
    asked = []

    async def service(prompts, completions, **columns):
        asked.append(completions)
        return [1.0, None]

    with pytest.raises(ValueError, match="no reward has anything to say about row 1") as caught:
        compute_rewards(weighted_sum([service]), ["p", "q"], ["a", "b"])
    assert asked == [["a", "b"]] and not hasattr(caught.value, "__notes__")


def test_what_a_coroutine_function_returns_is_checked():
    async def short(prompts, completions, **columns):
        return [1.0]

    with pytest.raises(ValueError, match="short must return 2 rewards, one a row, got 1"):
        compute_rewards(short, ["p", "q"], ["a", "b"])


# What is logged


def test_metrics_are_means_over_calls_and_extras_are_columns():
    first, second = RewardLog(2), RewardLog(1)
    for log, value in (first, 1), (first, torch.tensor(2.0)), (second, np.float32(6)):
        log.log_metric("a", value)
    second.log_metric("b", True)
    second.log_metric("b", math.nan)
    second.log_metric("c", math.nan)
    assert mean_metrics([first, second]) == {"a": 3.0, "b": 1.0}
    assert mean_metrics([first]) == {"a": 1.5} and mean_metrics([]) == {}
    first.log_extra("seen", ("x", None))
    first.log_extra("seen", np.array([1, 2]))
    first.log_extra("seen", ["y", "z"])
    assert first.extras == {"seen": ["x", None], "seen_2": [1, 2], "seen_3": ["y", "z"]}
    assert second.extras == {}


def test_a_log_refuses_what_it_cannot_keep():
    log = RewardLog(2)
    with pytest.raises(ValueError, match="column seen must have 2 entries, one a completion, got 1"):
        log.log_extra("seen", ["x"])
    for value in "1", None, [1.0, 2.0], torch.ones(2):
        with pytest.raises(ValueError, match="a must be a number, got"):
            log.log_metric("a", value)
    assert log.extras == {} and mean_metrics([log]) == {}
    for rows in 1.5, True:
        with pytest.raises(ValueError, match="rows must be a whole number"):
            RewardLog(rows)
    with pytest.raises(ValueError, match="rows must be at least 0, got -1"):
        RewardLog(-1)


def test_a_function_that_logs_too_few_values_is_named():
    def short(prompts, completions, log_extra, **columns):
        log_extra("seen", ["x"])
        return [0.0] * 2

    _, given = offered(2)
    with pytest.raises(ValueError, match="column seen must have 2 entries") as caught:
        compute_rewards(short, ["p", "q"], ["a", "b"], **given)
    assert "reward function short failed on the batch" in caught.value.__notes__[0]


def test_a_sum_tells_the_mean_of_each_part_where_it_speaks_and_its_weight():
    half, silent = returning([None, 4.0]), returning([None, None])
    parts = weighted_sum([lengths, half, silent, returning([1, 1])], [2.0, 0.5, 3.0, -1.0])
    log, given = offered(2)
    assert compute_rewards(parts, ["p", "q"], ["a", "bcd"], **given) == [1.0, 7.0]
    assert mean_metrics([log]) == {
        "rewards/lengths/mean": 2.0,
        "rewards/lengths/weight": 2.0,
        "rewards/reward/mean": 4.0,
        "rewards/reward/weight": 0.5,
        "rewards/reward_2/weight": 3.0,
        "rewards/reward_3/mean": 1.0,
        "rewards/reward_3/weight": -1.0,
    }


def test_the_part_of_a_sum_that_fails_is_blamed_once():
    def as_int(prompts, completions, **columns):
        tries.append(completions)
        return [int(o) for o in completions]

    tries = []
    with pytest.raises(ValueError, match="invalid literal") as caught:
        compute_rewards(weighted_sum([lengths, as_int]), ["p", "q"], ["1", "x"])
    assert caught.value.__notes__ == [
        "reward function as_int failed on row 1 (prompt 'q', completion 'x')"
    ]
    assert tries == [["1", "x"], ["1"], ["x"]]


def test_parts_of_a_sum_get_what_the_trainer_offers():
    def cut(prompts, completions, finished, log_metric):
        log_metric("cut", finished.count(False))
        return [-float(not x) for x in finished]

    log, given = offered(2)
    total = weighted_sum([lengths, cut], [1.0, 0.5])
    got = compute_rewards(total, ["p", "q"], ["a", "bcd"], **given | {"finished": [True, False]})
    assert got == [1.0, 2.5] and log.told["cut"] == [1.0]


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
    objects = weighted_sum([partial(partial(lengths), bonus=1), Waits()])
    assert objects.__name__ == "1 lengths + 1 Waits"
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


def test_a_verifier_reads_the_text_of_a_message():
    asked = []

    def verify(prompt, text):
        asked.append((prompt, text))
        return text == "3"

    prompt = [{"role": "user", "content": "1+2="}]
    answers = [[{"role": "assistant", "content": x}] for x in ("3", "4")]
    assert compute_rewards(verifier(verify), [prompt] * 2, answers) == [1.0, 0.0]
    assert asked == [(prompt, "3"), (prompt, "4")]


def test_the_text_of_a_completion_is_what_the_last_message_says():
    tool = [{"role": "assistant", "content": "1"}, {"role": "tool", "content": "2"}]
    assert completion_text(tool) == "2" and completion_text("") == ""


@pytest.mark.parametrize("odd", [[], [3, 4], None, [{"role": "assistant"}], [{"content": ["x"]}]])
def test_a_completion_that_says_nothing_is_refused(odd):
    with pytest.raises(ValueError, match="completion must be a text, got"):
        completion_text(odd)


# What is looked at


def test_the_row_that_is_blamed_fails_as_the_batch_did():
    "A row that fails for another reason when it is alone is not the one."

    def odd(prompts, completions, **columns):
        if "x" in completions:
            raise KeyError("x")
        if len(completions) == 1:
            raise ZeroDivisionError
        return [0.0] * len(completions)

    with pytest.raises(KeyError) as caught:
        compute_rewards(odd, ["p", "q"], ["a", "x"])
    assert caught.value.__notes__ == [
        "reward function odd failed on row 1 (prompt 'q', completion 'x')"
    ]


@pytest.mark.parametrize("values", [b"12", [b"1", b"2"], [1.0, -math.inf]])
def test_bytes_and_minus_infinity_are_no_rewards(values):
    with pytest.raises(ValueError, match="reward must return (a list of numbers|finite rewards), got"):
        compute_rewards(returning(values), ["p", "q"], ["a", "b"])


def test_the_log_of_some_completions_has_their_columns_and_no_metrics():
    log = RewardLog(5)
    log.log_extra("seen", "abcde")
    log.log_extra("marks", [1, 2, 3, 4, 5])
    log.log_metric("a", 2.0)
    part = log.rows_from(3, 2)
    assert part.rows == 2 and part.told == {}
    assert part.extras == {"seen": ["d", "e"], "marks": [4, 5]}
    assert log.rows_from(1, 3).extras == {"seen": ["b", "c", "d"], "marks": [2, 3, 4]}
    part.log_extra("more", ["x", "y"])
    assert [*log.extras] == ["seen", "marks"] and log.told == {"a": [2.0]}


def test_a_sum_keeps_the_parts_that_it_was_made_of():
    parts, weights = [lengths], [2.0]
    total = weighted_sum(parts, weights)
    parts.append(returning([100]))
    weights[0] = 7.0
    assert compute_rewards(total, ["p"], ["abc"]) == [6.0]
    assert compute_rewards(weighted_sum(x for x in (lengths, lengths)), ["p"], ["abc"]) == [6.0]


def test_what_nobody_offers_keeps_its_default():
    def patient(completions, bonus=2.0, trainer_state=None):
        return [bonus + (trainer_state is None)]

    assert compute_rewards(patient, ["p"], ["a"]) == [3.0]
    assert compute_rewards(patient, ["p"], ["a"], trainer_state=7) == [2.0]
