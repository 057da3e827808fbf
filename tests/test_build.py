"What must fail the build fails it; each case is a book of two pages."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

INDEX = "# Index\n\nA page.\n"


def notebook(source: str) -> str:
    title = {"cell_type": "markdown", "id": "a", "metadata": {}, "source": "# Title"}
    code = {"cell_type": "code", "id": "b", "metadata": {}, "source": source}
    kernel = {"name": "python3", "display_name": "python3"}
    return json.dumps(
        {
            "cells": [title, {**code, "outputs": [], "execution_count": None}],
            "metadata": {"kernelspec": kernel},
            "nbformat": 4,
            "nbformat_minor": 5,
        }
    )


def build(folder, pages: dict[str, str]) -> subprocess.CompletedProcess:
    "Build `pages` as `make book` does; the table of contents lists index and chapter."
    for name in "_ext", "_static":
        shutil.copytree(ROOT / name, folder / name)
    for name in "_config.yml", "settings.ini", "references.bib", "requirements-dev.txt":
        shutil.copy(ROOT / name, folder)
    (folder / "nbs").mkdir()
    for name, text in pages.items():
        (folder / "nbs" / name).write_text(text, encoding="utf-8")
    toc = "format: jb-book\nroot: index\nchapters:\n  - file: chapter\n"
    (folder / "_toc.yml").write_text(toc)
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    options = ["-W", "-n", "--keep-going", "-q"]
    assert " ".join(options) in makefile
    jupyter_book = [Path(sys.executable).parent / "jupyter-book", "build", "nbs"]
    where = ["--config", "_config.yml", "--toc", str(folder / "_toc.yml"), "--path-output", "."]
    command = jupyter_book + where + options
    return subprocess.run(command, cwd=folder, capture_output=True, text=True)


def test_a_sound_book_builds(tmp_path):
    result = build(tmp_path, {"index.md": INDEX, "chapter.ipynb": notebook("#| export\n1 + 1")})
    assert result.returncode == 0, result.stderr
    page = (tmp_path / "_build/html/chapter.html").read_text(encoding="utf-8")
    assert ">2\n<" in page and "#|" not in page


@pytest.mark.parametrize(
    "pages, complaint",
    [
        ({"index.md": INDEX, "chapter.ipynb": notebook("1 / 0")}, "ZeroDivisionError"),
        ({"index.md": INDEX}, "nonexisting document 'chapter'|chapter"),
        ({"index.md": INDEX, "chapter.md": "# A\n\n{eq}`nowhere`\n"}, "nowhere"),
        ({"index.md": INDEX, "chapter.md": "# A\n\n[](nowhere.md)\n"}, "nowhere"),
        ({"index.md": INDEX, "chapter.ipynb": notebook("#| exprot\n1")}, "exprot"),
    ],
    ids=["failing cell", "missing page", "broken equation", "broken link", "unknown directive"],
)
def test_the_build_fails(tmp_path, pages, complaint):
    result = build(tmp_path, pages)
    assert result.returncode != 0
    assert any(part in result.stdout + result.stderr for part in complaint.split("|"))
