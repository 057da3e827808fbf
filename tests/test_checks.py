"Refusals speak with one voice: the argument, what it must be, what came."
import inspect
import math
import re
from functools import partial

import pytest
import torch

from po_book import checks
from po_book.checks import (
    check_at_least,
    check_bool,
    check_detached,
    check_finite,
    check_in,
    check_known,
    check_like,
    check_positive,
    check_result,
    check_shape,
    check_steps,
    check_whole,
    describe,
    distribution,
    keep,
    readable,
    require,
    table,
)

NAN, INF = math.nan, math.inf
X, FLAGS = torch.zeros(2, 3), torch.zeros(2, 3, dtype=torch.bool)
KIND = "tensor [T, N], not empty and of the shape of rewards, got"


def refusal(function, *args, **kwargs):
    with pytest.raises(ValueError) as caught:
        function(*args, **kwargs)
    return str(caught.value)


REFUSED = [
    (lambda: require(False, "lr", "positive", -1), "lr must be positive, got -1"),
    (lambda: check_shape((2, 2), x=X), "x must have shape (2, 2), got (2, 3)"),
    (lambda: check_shape((6,), x=X), "x must have shape (6,), got (2, 3)"),
    (lambda: check_shape((), x=X), "x must have shape (), got (2, 3)"),
    (lambda: check_shape(("P", 2), x=X), "x must have shape (P, 2), got (2, 3)"),
    (lambda: check_shape(("P", "G", 3), x=X), "x must have shape (P, G, 3), got (2, 3)"),
    (lambda: check_shape((2, 3), x=X, y=X[:1]), "y must have shape (2, 3), got (1, 3)"),
    (lambda: check_like("logp", X, mask=X.T), "mask must have logp's shape (2, 3), got (3, 2)"),
    (lambda: check_like("logp", X, a=None, b=X[0]), "b must have logp's shape (2, 3), got (3,)"),
    (
        lambda: check_steps(rewards=X[0]),
        f"rewards must be a floating point {KIND} torch.float32 [3]",
    ),
    (
        lambda: check_steps(rewards=X[:0]),
        f"rewards must be a floating point {KIND} torch.float32 [0, 3]",
    ),
    (
        lambda: check_steps(rewards=X.long()),
        f"rewards must be a floating point {KIND} torch.int64 [2, 3]",
    ),
    (lambda: check_steps(rewards=[[0.0]]), f"rewards must be a floating point {KIND} list"),
    (
        lambda: check_steps(rewards=X, values=X.T),
        f"values must be a floating point {KIND} torch.float32 [3, 2]",
    ),
    (
        lambda: check_steps(rewards=X, done=X),
        f"done must be a bool {KIND} torch.float32 [2, 3]",
    ),
    (
        lambda: check_steps(rewards=X, terminated=FLAGS[:1]),
        f"terminated must be a bool {KIND} torch.bool [1, 3]",
    ),
    (lambda: check_in("[0, 1]", gamma=1.5), "gamma must be in [0, 1], got 1.5"),
    (lambda: check_in("[0, 1)", gamma=1), "gamma must be in [0, 1), got 1"),
    (lambda: check_in("(0, 1]", tau=0.0), "tau must be in (0, 1], got 0.0"),
    (lambda: check_in("[0, 1]", lam=0.5, gamma=-0.1), "gamma must be in [0, 1], got -0.1"),
    (lambda: check_in("[0, 1]", gamma=NAN), "gamma must be in [0, 1], got nan"),
    (lambda: check_in("[0, inf)", beta=INF), "beta must be in [0, inf), got inf"),
    (lambda: check_at_least(1, n=0), "n must be at least 1, got 0"),
    (lambda: check_at_least(1, n=2, horizon=0), "horizon must be at least 1, got 0"),
    (lambda: check_at_least(0, eps=NAN), "eps must be at least 0, got nan"),
    (lambda: check_positive(lr=0.0), "lr must be positive, got 0.0"),
    (lambda: check_positive(lr=NAN), "lr must be positive, got nan"),
    (lambda: check_whole(n=3, epochs=2.0), "epochs must be a whole number, got 2.0"),
    (lambda: check_whole(n=True), "n must be a whole number, got True"),
    (lambda: check_known(["a", "b"], how="c"), "how must be one of a, b, got 'c'"),
    (lambda: check_known({"a": 0}, how=""), "how must be one of a, got ''"),
    (lambda: check_finite(r=torch.tensor([1.0, NAN])), "r must be finite, got nan"),
    (lambda: check_finite(a=X, r=torch.tensor([[-INF]])), "r must be finite, got -inf"),
    (lambda: check_result(X + NAN, a=X, r=X + NAN), "r must be finite, got nan"),
    (
        lambda: check_detached(a=X, b=None, old=X.clone().requires_grad_()),
        "old must be detached (it is data), got a gradient",
    ),
    (lambda: check_bool(a=None, mask=X), "mask must be a bool tensor, got torch.float32"),
    (lambda: keep(X, X), "mask must be a bool tensor, got torch.float32"),
    (lambda: table("R", X, (3, 2)), "R must have shape (3, 2), got (2, 3)"),
    (lambda: table("R", X[:0]), "R must have entries, got shape (0, 3)"),
    (lambda: table("R", [1.0, INF]), "R must be finite, got inf"),
    (lambda: distribution("pi", [1.5, -0.5]), "pi must be non-negative, got -0.5"),
    (
        lambda: distribution("pi", [[0.5, 0.5], [0.7, 0.2]]),
        "rows of pi must sum to one, one is off by 0.1",
    ),
    (lambda: distribution("pi", [0.5, 0.5], (3,)), "pi must have shape (3,), got (2,)"),
]


@pytest.mark.parametrize("call, message", REFUSED, ids=[message for _, message in REFUSED])
def test_a_refusal_says_what_and_why(call, message):
    assert refusal(call) == message


def test_what_is_right_passes_in_silence(capsys):
    require(True, "x", "anything", None)
    check_shape((2, 3), x=X, y=FLAGS)
    check_shape(("T", "N"), x=X)
    check_shape((), x=torch.tensor(1.0))
    check_like("x", X, y=FLAGS, z=None)
    check_steps(rewards=X, values=X.double(), done=FLAGS, terminated=FLAGS)
    check_in("[0, 1]", a=0, b=1, c=0.5)
    check_in("(0, inf)", a=1e300)
    check_at_least(1, n=1)
    check_positive(lr=1e-300)
    check_whole(n=-3, zero=0)
    check_known(["a", "b"], how="b")
    check_finite(x=X, y=torch.zeros(0), z=torch.arange(3))
    check_result(X, x=X)
    check_detached(x=X, y=None)
    check_bool(mask=FLAGS, other=None)
    assert capsys.readouterr().out == ""


def test_every_public_check_is_tested_here():
    tested = set(globals())
    assert {name for name in checks.__all__} <= tested | {"require", "describe"}


def test_every_refusal_is_a_value_error_and_says_so():
    for name in set(checks.__all__) - {"describe", "readable"}:
        assert "Raises: `ValueError`" in inspect.getdoc(getattr(checks, name)), name


def test_numbers_on_a_device_are_not_waited_for():
    check_in("[0, 1]", beta=torch.tensor(2.0))  # a tensor is not looked at


def test_description_of_anything():
    assert describe(X) == "torch.float32 [2, 3]"
    assert describe([1]) == "list" and describe(None) == "NoneType"


def test_the_result_is_looked_at_before_the_inputs():
    check_result(X, x=X + NAN)  # a value that reaches nothing is nobody's fault
    check_result(X + NAN, x=X)  # and without a culprit there is nobody to name


def test_the_result_may_carry_a_gradient():
    check_result(X.clone().requires_grad_(), x=X)


def test_keep_lets_nothing_through_that_does_not_count():
    x = torch.tensor([1.0, NAN, 3.0], requires_grad=True)
    mask = torch.tensor([True, False, True])
    kept, none, flags = keep(mask, x, None, torch.tensor([True, True, False]))
    assert kept.tolist() == [1.0, 0.0, 3.0] and none is None
    assert flags.tolist() == [True, False, False]
    kept.square().sum().backward()
    assert x.grad.tolist() == [2.0, 0.0, 6.0]


def test_keep_without_a_mask_keeps_everything():
    assert keep(None, X, None) == (X, None)


def test_tables_become_float64_without_a_detour():
    assert table("R", [0.1]).item() == 0.1
    assert table("end", torch.tensor([True, False])).tolist() == [1.0, 0.0]
    x = torch.tensor([0.5, 0.5], dtype=torch.float64, requires_grad=True)
    assert distribution("p", x) is x
    p = distribution("p", torch.tensor([0.1, 0.9]))  # sums to one in float32 only
    assert p.dtype == torch.float64


@pytest.mark.parametrize("check", [partial(check_in, "[0, 1]"), partial(check_at_least, 0), check_positive])
@pytest.mark.parametrize("x", ["1", None, [1], 1j])
def test_what_is_no_number_is_named(check, x):
    with pytest.raises(ValueError, match=rf"^gamma must be .*got {re.escape(repr(x))}$"):
        check(gamma=x)


def test_only_what_is_on_a_cpu_is_looked_at():
    assert readable(torch.zeros(1)) and not readable(torch.zeros(1, device="meta"))
    nan = torch.full((2,), float("nan"), device="meta")
    check_result(nan, x=nan)
