"The book grades: right answers pass, and every mistake gets its own sentence and a true example."

import math
import os
import subprocess
import sys
from collections import Counter
from pathlib import Path

import pytest
import torch
from bs4 import BeautifulSoup
from conftest import ROOT

import po_book
from po_book import dapo, grpo, kl, mismatch, open_questions, ppo, surrogates
from po_book.advantage import gae, n_step_advantage, normalize, td_error
from po_book.exercise import Exercise, Mistake, _as_tensor, _try, _values, arguments, judge
from po_book.exercise import Column, choice
from po_book.grade import EXERCISES, describe, grade, tasks
from po_book.natural_gradient import conjugate_gradient
from po_book.off_policy import effective_sample_size, per_decision_importance_sampling
from po_book.policy_gradient import discounted_returns, reinforce_loss
from po_book.rlhf import kl_rewards, token_gae
from po_book.tasks import pass_at_k
from po_book.trust_region import kl_divergence
from po_book.value_based import epsilon_greedy

MISTAKES = [(x.name, i) for x in EXERCISES.values() for i in range(len(x.mistakes))]

# The library's own functions, called as a reader's would be.
OWN = {
    "discounted_returns": discounted_returns,
    "reinforce_loss": reinforce_loss,
    "td_error": td_error,
    "gae": gae,
    "n_step_advantage": n_step_advantage,
    "normalize": normalize,
    "epsilon_greedy": epsilon_greedy,
    "per_decision_importance_sampling": per_decision_importance_sampling,
    "effective_sample_size": effective_sample_size,
    "kl_divergence": kl_divergence,
    "conjugate_gradient": conjugate_gradient,
    "clipped_surrogate": ppo.clipped_surrogate,
    "ppo_loss": lambda x, old, A, h, v, G, clip, c_v, c_ent: ppo.ppo_loss(
        x, old, A, h, v, G, clip_low=clip, value_coef=c_v, entropy_coef=c_ent
    ),
    "kl_penalty": ppo.kl_penalty,
    "pass_at_k": lambda right, k: pass_at_k(right, k).mean,
    "k1": lambda x, ref: kl.kl_estimate(x, ref, "k1"),
    "k2": lambda x, ref: kl.kl_estimate(x, ref, "k2"),
    "k3": lambda x, ref: kl.kl_estimate(x, ref, "k3"),
    "kl_rewards": kl_rewards,
    "token_gae": token_gae,
    "truncated_weights": mismatch.truncated_weights,
    "group_advantages": grpo.group_advantages,
    "sample_mean": lambda x, mask: grpo.aggregate(x, mask, "sample"),
    "token_mean": lambda x, mask: grpo.aggregate(x, mask, "token"),
    "constant_mean": lambda x, mask, n: grpo.aggregate(x, mask, "constant", n),
    "grpo_loss": lambda x, old, A, mask, ref, beta, clip: grpo.grpo_loss(
        x, old, A, mask, logp_ref=ref, beta=beta, clip_low=clip
    )[0],
    "leave_one_out": grpo.leave_one_out,
    "informative": dapo.informative,
    "soft_overlong_penalty": dapo.soft_overlong_penalty,
    "sequence_ratio": surrogates.sequence_ratio,
    "cispo_surrogate": surrogates.cispo_surrogate,
    "shrunk_advantages": open_questions.shrunk_advantages,
}


@pytest.mark.parametrize("name", EXERCISES)
def test_the_right_answer_passes(name):
    "And the library's own function does, where there is one of that name."
    for answer in EXERCISES[name].right, OWN.get(name, EXERCISES[name].right):
        found = grade(name, answer)
        assert found.passed and found.example is None, found
        assert str(found) == f"passed: {name} is right in all 60 cases"


def test_the_exercises_that_were_promised():
    assert len(OWN) == 32 and OWN.keys() <= EXERCISES.keys() and len(EXERCISES) >= 66
    assert all(3 <= len(x.mistakes) for x in EXERCISES.values())
    said = f"{len(EXERCISES)} exercises with {len(MISTAKES)} typical mistakes"
    assert said in (ROOT / "CHANGELOG.md").read_text(encoding="utf-8")


@pytest.mark.parametrize("name, i", MISTAKES, ids=[f"{name}-{i}" for name, i in MISTAKES])
def test_a_typical_mistake_gets_its_own_sentence_and_a_true_example(name, i):
    exercise = EXERCISES[name]
    mistake = exercise.mistakes[i]
    found = grade(name, mistake.answer)
    assert not found.passed
    assert found.says.startswith(f"{mistake.says}. With ")
    right, wrong = (_try(f, exercise, found.example) for f in (exercise.right, mistake.answer))
    fault = _values(exercise, wrong, right)
    assert fault
    assert found.says.endswith(f"{fault.numbers[0]}, yours is {fault.numbers[1]}.")
    if fault.kind != "slope":  # recomputed without what the grader compares with
        mine, theirs = _as_tensor(wrong.result), _as_tensor(right.result)
        assert not torch.allclose(mine.double(), theirs.double(), atol=1e-4, equal_nan=True)


def test_no_two_mistakes_of_an_exercise_say_the_same():
    for exercise in EXERCISES.values():
        assert len({m.says for m in exercise.mistakes}) == len(exercise.mistakes)


def returns(rewards, done, gamma):
    return discounted_returns(rewards, done, gamma)


def changed(rewards, done, gamma):
    rewards += 1
    return returns(rewards, done, gamma)


def broken(rewards, done, gamma):
    raise RuntimeError("out of\nluck")


def unwritten(rewards, done, gamma):
    raise NotImplementedError


@pytest.mark.parametrize(
    "answer, says",
    [
        (lambda *x: None, "nothing returned yet: end the function with `return`."),
        (lambda *x: ..., "nothing returned yet: end the function with `return`."),
        (unwritten, "nothing returned yet: the body is still to be written."),
        (broken, "it raised `RuntimeError: out of`. Seen with rewards `[0]`"),
        (lambda a, b: a, "it raised `TypeError: "),
        (lambda *x: returns(*x).tolist(), "a tensor was asked for, and `list` came back."),
        (lambda *x: 1.0, "a tensor was asked for, and `float` came back."),
        (lambda *x: returns(*x)[0], "the result must have the shape [1, 1], not [1]."),
        (lambda *x: returns(*x).float(), "`torch.float64`, not `torch.float32`."),
        (changed, "it writes into its input `rewards`: copy it."),
        (lambda *x: returns(*x) / (x[0] != 0), "the result has an entry that is not finite."),
        (lambda *x: returns(*x) + torch.rand(1), "it answers the same question differently"),
        (lambda *x: 2 * returns(*x), "the numbers are not right. With rewards `[1]`"),
    ],
)
def test_what_is_wrong_in_form_has_a_sentence_of_its_own(answer, says):
    found = grade("discounted_returns", answer)
    assert not found.passed and says in found.says, found.says
    assert set(found.example) == {"rewards", "done", "gamma"}


def test_a_number_that_is_asked_for_may_be_of_any_kind():
    for kind in float, torch.tensor, lambda x: torch.tensor(x).double().numpy():
        assert grade("pass_at_k", lambda right, k: kind(pass_at_k(right, k).mean)).passed
    found = grade("pass_at_k", lambda right, k: [pass_at_k(right, k).mean])
    assert "a number was asked for, and `list` came back" in found.says


def test_a_gradient_that_is_missing_and_one_too_many():
    found = grade("reinforce_loss", lambda logp, psi: reinforce_loss(logp.detach(), psi))
    assert "no gradient reaches `logp`: nothing is learnt. Seen with logp" in found.says
    found = grade("reinforce_loss", lambda logp, psi: -(psi * logp).sum(1).mean())
    assert "a gradient flows into `psi`, which is data here: detach it" in found.says
    found = grade("baseline_advantages", lambda returns, values: returns - values)
    assert "a gradient flows into `values`" in found.says
    found = grade("q_learning_target", lambda r, q, d, g: r + g * torch.where(d, 0, q.amax(-1)))
    assert "a gradient flows into `q_next`" in found.says


def test_an_input_that_asks_for_a_gradient_is_guarded_too():
    found = grade("reinforce_loss", lambda logp, psi: reinforce_loss(logp.mul_(2), psi))
    assert "it writes into one of its inputs: copy it first" in found.says


def test_a_gradient_that_is_wrong_is_told_by_its_numbers():
    "The value is right."
    found = grade("k2", lambda x, ref: kl.kl_estimate(x.detach(), ref, "k2") + 0 * x)
    assert "the numbers are not right" in found.says
    assert "the gradient in `logp` should be 0.5, yours is 0." in found.says


def test_a_gradient_that_goes_to_the_wrong_sample_is_seen():
    "Values and the sum of gradients are right."
    found = grade("k1", lambda x, ref: (x - ref).detach() + (x - x.detach()).mean())
    assert "the gradient in `logp`, sample" in found.says


def test_the_example_is_as_small_as_can_be():
    found = grade("gae", lambda r, v, n, d, k, g, lam: gae(r, v, n, k, k, g, lam))
    assert str(found) == (
        "not yet: a time limit was treated as an end. With rewards [0], values [0], "
        "next_values [1], terminated [False], done [True], gamma 0.5, lam 0.5, "
        "the result should be 0.5, yours is 0."
    )


def test_what_was_not_foreseen_gets_a_general_sentence():
    "Two mistakes at once, and one on rare inputs only."

    def twice(r, v, n, d, k, g, lam):
        return gae(r, v, n, k, k, g, 1.0)

    def rarely(r, v, n, d, k, g, lam):
        return gae(r, v, n, d, k, g, lam) + (len(r) == 3)

    for answer in twice, rarely:
        assert grade("gae", answer).says.startswith("the numbers are not right. With rewards")
    assert len(grade("gae", rarely).example["rewards"]) == 3


def test_one_coincidence_names_no_mistake():
    "An answer that is a known mistake in some cases, and right in the others."

    def sometimes(rewards, done, gamma):
        return discounted_returns(rewards, done, 1.0 if rewards[0, 0] == 2 else gamma)

    assert grade("discounted_returns", sometimes).says.startswith("the numbers are not right")


def test_a_mistake_that_shows_twice_is_not_named():
    given = arguments({"N": (1, 1)}, {"x": Column("N", choice(*range(64)))})

    def asked(*mistakes):
        return Exercise("same", "62", 1, "x", lambda x: x + 0, given, mistakes)

    drawn = Counter(case["x"].item() for case in asked().cases)
    for times, named in (2, False), (3, True):
        rare = next(x for x, count in drawn.items() if count == times)
        mistake = Mistake("one more", lambda x: x + (x == rare))
        found = judge(asked(mistake), mistake.answer)
        assert found.says.startswith("one more" if named else "the numbers are not right")


def test_two_gradings_say_the_same():
    answers = {
        "ppo_loss": EXERCISES["ppo_loss"].mistakes[3].answer,
        "gae": lambda r, v, n, d, k, g, lam: gae(r, v, n, d, k, g, lam).round(),
    }
    for name, answer in answers.items():
        assert str(grade(name, answer)) == str(grade(name, answer))


SAYS = """
import random, numpy, torch
{before}
from po_book.grade import grade
print(grade("discounted_returns", lambda rewards, done, gamma: rewards.cumsum(0)))
"""


def test_nothing_is_random_and_nothing_is_written(tmp_path):
    "In two processes, one of which has other seeds and a module of constants of its own."
    (tmp_path / "constants.py").write_text("A, B, C = 17, 3, 0.125\n")
    paths = tmp_path, Path(po_book.__file__).parents[1]
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, paths))}
    before = "import constants; random.seed(1); numpy.random.seed(2); torch.manual_seed(3)"
    said = [
        subprocess.run(
            [sys.executable, "-B", "-c", SAYS.format(before=line)], cwd=tmp_path, env=environment,
            capture_output=True, text=True, check=True,
        ).stdout
        for line in ("", before)
    ]  # fmt: skip
    assert said[0] == said[1] and said[0].startswith("not yet: the numbers are not right")
    assert [path.name for path in tmp_path.iterdir()] == ["constants.py"]


def test_grading_leaves_the_random_numbers_of_the_reader_alone():
    torch.manual_seed(0)
    before = torch.get_rng_state()
    grade("informative", lambda rewards: rewards.any(1))
    assert torch.equal(before, torch.get_rng_state())


def test_an_unknown_name_names_those_there_are():
    for door in lambda name: grade(name, gae), describe:
        with pytest.raises(ValueError, match=r"name must be one of .*gae, .*got 'gea'"):
            door("gea")
    with pytest.raises(ValueError, match="answer must be a function, got str"):
        grade("gae", "gae")


def test_the_list_of_exercises():
    rows = tasks().rows
    assert [row["difficulty"] for row in rows] == ["★" * x.stars for x in EXERCISES.values()]
    assert {len(row["difficulty"]) for row in rows} == {1, 2, 3}
    line = "★ informative(rewards): true for groups [P] whose rewards [P, G] are not all equal"
    assert describe("informative") == f"{line} (chapter 47)"


def test_a_grade_shows_a_badge():
    shown = grade("k1", lambda x, ref: ref - x)._repr_markdown_()
    badge = BeautifulSoup(shown, "html.parser").span
    assert badge["class"] == ["po-verdict", "po-beware"] and badge.text == "not yet"
    assert "`[-0.5]`" in shown and "`" not in str(grade("k1", lambda x, ref: ref - x))
    badge = BeautifulSoup(grade("k1", lambda x, ref: x - ref)._repr_markdown_(), "html.parser")
    assert badge.span["class"] == ["po-verdict", "po-holds"] and badge.span.text == "passed"


def test_values_of_cases_are_round_enough_to_be_checked_by_hand():
    "Or NaN, which one exercise asks to be left alone."
    for case in EXERCISES["td_error"].cases:
        for x in case["rewards"].flatten().tolist() + case["next_values"].flatten().tolist():
            assert math.isnan(x) or x in (-1, 0, 1, 2)


def test_without_hypothesis_the_message_says_what_to_install():
    code = "import sys; sys.modules['hypothesis'] = None\nimport po_book.grade"
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert run.returncode == 1
    assert "pip install 'po-book[grade]'" in run.stderr.strip().splitlines()[-1]
