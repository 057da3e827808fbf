"What must fail the build fails it; each case is a book of two pages."

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from bs4 import BeautifulSoup
from conftest import ROOT

INDEX = "# Index\n\nA page.\n"


def notebook(*sources: str) -> str:
    "A chapter of code cells; a source that starts with a line `%%markdown` is prose."
    cells = []
    for number, source in enumerate(["%%markdown\n# Title", *sources]):
        cell = {"id": str(number), "metadata": {}, "source": source.removeprefix("%%markdown\n")}
        if cell["source"] != source:
            cells.append({"cell_type": "markdown", **cell})
        else:
            cells.append({"cell_type": "code", **cell, "outputs": [], "execution_count": None})
    kernel = {"name": "python3", "display_name": "python3"}
    metadata = {"metadata": {"kernelspec": kernel}, "nbformat": 4, "nbformat_minor": 5}
    return json.dumps({"cells": cells, **metadata})


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


CELLS = """\
#| export
import math
---
#| exporti
def holds(*sides):
    print("the sides are", *sides)
---
holds(1, 1)
---
%%markdown
{numref}`fig-line` shows it.
---
#| label: fig-line
#| fig-cap: The line $y=x$,
#|   on white.
#| fig-alt: It rises.
import matplotlib.pyplot as plt
from IPython.display import display
display({"text/markdown": "**badge**"}, raw=True)
plt.plot([0, 1])
plt.show()
---
#| slow
1 / 0
---
#| cuda
1 / 0
---
#| eval: false
1 / 0
---
%%markdown
:::{exercise}
:label: ex-one
Question.
:::

:::{solution} ex-one
:class: dropdown
Answer.
:::
<!-- S1.1 -->
---
#| code-fold: true
print("inside", 1)
---
#| hide
print("nowhere")
---
holds("inside", 2)
---
%%markdown
After it.
---
print("outside")
"""


@pytest.fixture(scope="module")
def shown(tmp_path_factory):
    "The article that the cells above make, and what the build printed."
    folder = tmp_path_factory.mktemp("book")
    cells = CELLS.removesuffix("\n").split("\n---\n")
    result = build(folder, {"index.md": INDEX, "chapter.ipynb": notebook(*cells)})
    assert result.returncode == 0, result.stderr
    html = (folder / "_build/html/chapter.html").read_text(encoding="utf-8")
    return BeautifulSoup(html, "html.parser").find("article"), result.stdout


def holding(article, text: str):
    "The innermost element whose text holds `text`."
    return [element for element in article.find_all() if text in element.text][-1]


@pytest.mark.parametrize(
    "code, what",
    [
        ("import math", "the imports"),
        ("def holds", "the helper"),
        ("holds(1, 1)", "the check"),
        ("display(", "the code of the figure"),
    ],
)
def test_code_is_folded_under_its_own_words(shown, code, what):
    (details,) = [d for d in shown[0].find_all("details") if code in d.find("pre").text]
    titles = [p.text for p in details.find("summary").find_all("p")]
    assert titles == [f"show {what}", f"hide {what}"] and not details.has_attr("open")


def test_what_a_check_prints_is_not_folded(shown):
    assert not holding(shown[0], "the sides are 1 1").find_parent("details")


def test_a_picture_becomes_a_figure(shown):
    article, _ = shown
    figure = article.find("figure", id="fig-line")
    assert [image["alt"] for image in article.find_all("img")] == ["It rises."]
    assert len(figure.find_all("img")) == 1
    caption = figure.find("figcaption").text
    assert "Fig. 1" in caption and "The line \\(y=x\\), on white." in caption
    assert not holding(article, "badge").find_parent("figure")
    assert article.find("a", href="#fig-line").text == "Fig. 1"


def test_a_cell_that_was_not_run_says_so(shown):
    notes = [p.text for p in shown[0].find_all("p", class_="po-not-run")]
    whys = [": takes minutes.", ": needs a GPU.", "."]
    assert notes == [f"Not run here{why}" for why in whys]
    assert "Cells that were not run: 3, on chapter (3)." in shown[1]


def test_the_cells_of_a_solution_fold_with_it(shown):
    article, _ = shown
    solution = article.find("div", class_="solution")
    # The toggle hides what follows the title inside an admonition of the class `dropdown`.
    assert {"admonition", "dropdown"} <= set(solution["class"])
    title, *rest = solution.find_all(recursive=False)
    assert "admonition-title" in title["class"]
    for text in "inside 1", "the sides are inside 2":
        assert any(text in part.text for part in rest)
    assert article.text.count("inside 1") == 1
    assert not solution.find("details")
    for text in "After it.", "outside":
        assert not holding(article, text).find_parent("div", class_="solution")


def test_a_hidden_cell_is_not_there(shown):
    assert "nowhere" not in shown[0].text


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
