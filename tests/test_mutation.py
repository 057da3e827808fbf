"Each fault of `mutation.py` can still be made: its text stands once in the library."
import pytest
from mutation import FAULTS

from conftest import ROOT


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_can_be_made(fault):
    text = (ROOT / "po_book" / fault.file).read_text(encoding="utf-8")
    assert text.count(fault.old) == 1 and fault.new not in (fault.old, None)


def test_names_are_not_used_twice():
    assert len({fault.name for fault in FAULTS}) == len(FAULTS)
