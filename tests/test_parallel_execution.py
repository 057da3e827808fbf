"Every notebook of a build is executed once, and those of one build side by side."

import os

import pytest
from test_build import INDEX, build, notebook

NOTE = """
import time
from pathlib import Path
with Path("ran.txt").open("a") as file:
    file.write(f"{time.monotonic()} ")
time.sleep(3)
with Path("ran.txt").open("a") as file:
    file.write(f"{time.monotonic()}\\n")
"""


@pytest.fixture(scope="module")
def built(tmp_path_factory):
    folder = tmp_path_factory.mktemp("book")
    pages = {"index.ipynb": notebook(NOTE), "chapter.ipynb": notebook("1\n" + NOTE)}
    return folder, build(folder, pages)


def test_a_notebook_is_executed_once(built):
    folder, result = built
    assert result.returncode == 0, result.stderr
    assert len((folder / "nbs/ran.txt").read_text().split()) == 4


@pytest.mark.skipif(os.cpu_count() < 2, reason="one core executes one at a time")
def test_notebooks_run_side_by_side(built):
    times = [float(x) for x in (built[0] / "nbs/ran.txt").read_text().split()]
    assert max(times) - min(times) < 2 * 3  # each alone sleeps three seconds


def test_a_failing_notebook_is_reported_as_ever(tmp_path):
    pages = {"index.md": INDEX, "chapter.ipynb": notebook("1 / 0")}
    result = build(tmp_path, pages)
    assert result.returncode != 0 and "ZeroDivisionError" in result.stdout + result.stderr
