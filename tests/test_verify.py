import math

import numpy as np
import pytest
import torch

from po_book.verify import at_most, beware, exceeds, holds, refuted


@pytest.mark.parametrize("check", [holds, refuted, beware, exceeds, at_most])
@pytest.mark.parametrize(
    "a, b",
    [
        ([[1.0, 2.0]], [1.0, 2.0]),
        ([1.0], 1.0),
        (torch.zeros(2, 1), torch.zeros(1, 2)),
        ([], []),
        (math.nan, math.nan),
        ([1.0, math.nan], [1.0, 2.0]),
        (math.inf, math.inf),
    ],
)
def test_what_cannot_be_compared_never_passes(check, a, b):
    with pytest.raises(ValueError, match="lhs|rhs|wrong|right|value|bound"):
        check("claim", a, b)


@pytest.mark.parametrize(
    "value", [1.5, 2, [1.5, 2.0], np.float32([1.5]), torch.tensor([[1.5]]).bfloat16()]
)
def test_kinds_of_values(value):
    copy = torch.as_tensor(value).double().numpy()
    holds("equal to its float64 copy", value, copy, atol=0)
    refuted("one more", value, copy + 1)


def test_gradients_are_not_in_the_way():
    holds("a leaf", torch.ones(2, requires_grad=True), [1.0, 1.0])


def test_the_tolerance_decides():
    holds("within", 1.0, 1.0 + 5e-11)
    with pytest.raises(AssertionError, match="within.*error 5e-11"):
        holds("within", 1.0, 1.0 + 5e-11, atol=1e-12)
    with pytest.raises(AssertionError, match="agree"):
        refuted("within", 1.0, 1.0 + 5e-11)


def test_the_largest_error_is_shown(capsys):
    holds("sum", [1.0, 2.0], [1.0, 2.25], atol=0.5, source="S1.1")
    assert capsys.readouterr().out == "holds: sum · largest error 2.5e-01 · S1.1\n"


def test_both_numbers_are_shown(capsys):
    refuted("sum", 1.0, 2.0, source="S1.1")
    assert capsys.readouterr().out == "refuted: sum · gives `1.`, right is `2.` · S1.1\n"


def test_of_many_numbers_the_worst_pair_is_shown(capsys):
    wrong = np.zeros(100)
    right = np.zeros(100)
    right[7] = 3.0
    refuted("vector", wrong, right)
    assert "gives `0.`, right is `3.`" in capsys.readouterr().out


@pytest.fixture
def displayed(monkeypatch):
    "What a notebook is given to display."
    from IPython.core.interactiveshell import InteractiveShell

    outputs = []
    monkeypatch.setattr("IPython.get_ipython", InteractiveShell)
    monkeypatch.setattr("IPython.display.display", lambda data, **how: outputs.append((data, how)))
    return outputs


def test_a_page_does_not_show_where_a_claim_stands(displayed):
    holds("sum", 1.0, 1.0, source="S1.1")
    refuted("sum", 1.0, 2.0, source="S1.2")
    assert all("S1" not in text for data, _ in displayed for text in data.values())
    assert 'class="po-verdict po-holds"' in displayed[0][0]["text/markdown"]
    kept = [how["metadata"]["po_book"] for _, how in displayed]
    assert [one["source"] for one in kept] == ["S1.1", "S1.2"]
    assert kept[0] == {
        "verdict": "holds", "claim": "sum", "evidence": "largest error 0.0e+00", "source": "S1.1"
    }


def test_the_source_is_kept_in_the_notebook():
    from nbclient import NotebookClient
    from nbformat.v4 import new_code_cell, new_notebook

    code = "from po_book.verify import holds\nholds('sum', 1.0, 1.0, source='S1.1')"
    notebook = NotebookClient(new_notebook(cells=[new_code_cell(code)])).execute()
    (output,) = notebook.cells[0].outputs
    assert output.metadata["po_book"]["source"] == "S1.1" and "S1.1" not in str(output.data)


@pytest.mark.parametrize("right, atol", [(1.0, 0.0), (1.25, 0.25)])
def test_a_difference_as_large_as_the_tolerance_holds_and_is_not_refuted(right, atol):
    holds("edge", 1.0, right, atol=atol)
    with pytest.raises(AssertionError, match="not refuted: edge"):
        refuted("edge", 1.0, right, atol=atol)


def test_what_exceeds_is_shown_where_it_is_closest(capsys):
    exceeds("larger", [5.0, 2.5, 9.0], [1.0, 2.0, 3.0], source="S1.1")
    assert capsys.readouterr().out == "holds: larger · `2.5` is above `2` · S1.1\n"


@pytest.mark.parametrize("value", [[5.0, 2.0], [5.0, 1.9]])
def test_what_is_equal_or_below_does_not_exceed(value):
    with pytest.raises(AssertionError, match="does not exceed: larger · `.*` is not above `2`"):
        exceeds("larger", value, [1.0, 2.0])


def test_what_keeps_to_a_bound_is_shown_where_it_is_closest(capsys):
    at_most("smaller", [1.0, 2.0, 3.0], [5.0, 2.5, 9.0], source="S1.1")
    assert capsys.readouterr().out == "holds: smaller · `2` is at most `2.5` · S1.1\n"
    at_most("reached", [1.0, 2.0], [5.0, 2.0])


@pytest.mark.parametrize("value", [[1.0, 2.1], [3.0, 3.0]])
def test_what_is_above_is_not_at_most_its_bound(value):
    with pytest.raises(AssertionError, match="not at most the bound: small · `.*` is above `2`"):
        at_most("small", value, [5.0, 2.0])


def test_a_mistake_is_shown_and_nobody_is_blamed(capsys, displayed):
    beware("sum", 1.0, 2.0)
    (data, how), = displayed
    assert data["text/plain"] == "beware: sum · gives `1.`, right is `2.`"
    assert 'class="po-verdict po-beware"' in data["text/markdown"]
    assert how["metadata"]["po_book"]["source"] is None
    with pytest.raises(AssertionError, match="agree"):
        beware("sum", 1.0, 1.0)
    with pytest.raises(TypeError):
        beware("sum", 1.0, 2.0, source="S1.1")


@pytest.mark.parametrize("truth", [True, np.bool_(True), np.array(True), torch.tensor(True)])
def test_a_single_truth_value_is_refused(truth):
    for sides in (truth, 1), (1, truth):
        with pytest.raises(ValueError, match=r"[lr]hs is the truth value True.*exceeds or at_most"):
            holds("claim", *sides)


def test_masks_are_compared():
    holds("claim", torch.tensor([True, False]), [1, 0])
    with pytest.raises(AssertionError):
        holds("claim", np.array([True, False]), [True, True])
