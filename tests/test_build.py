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
SVG = '<svg xmlns="http://www.w3.org/2000/svg" width="9" height="9"/>'
DRAW = "import matplotlib.pyplot as plt\nplt.plot([0, 1]);"


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
    "Build `pages` as `make book` does; the table of contents lists them, or a chapter."
    for name in "_ext", "_static":
        shutil.copytree(ROOT / name, folder / name)
    for name in "_config.yml", "settings.ini", "references.bib", "requirements-dev.txt":
        shutil.copy(ROOT / name, folder)
    (folder / "nbs").mkdir()
    for name, text in pages.items():
        (folder / "nbs" / name).write_text(text, encoding="utf-8")
    names = [Path(name) for name in pages if Path(name).stem != "index"]
    chapters = [name.stem for name in names if name.suffix != ".svg"] or ["chapter"]
    files = "".join(f"  - file: {name}\n" for name in chapters)
    (folder / "_toc.yml").write_text(f"format: jb-book\nroot: index\nchapters:\n{files}")
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
{numref}`fig-line` shows it. It is **.5**<!-- = min(last("some", "a"), last("b", "c")) --> high.
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


def test_what_a_number_is_quoted_from_does_not_show(shown):
    paragraph = holding(shown[0], "shows it.")
    assert paragraph.text == "Fig. 1 shows it. It is .5 high."
    assert paragraph.find("strong").text == ".5"


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


NUMBERED = """\
# {title}

## First

$$
x = y
$$ (eq-{name}-first)

## Second

$$
x = z
$$ (eq-{name}-second)

:::{{prf:theorem}} One
:label: thm-{name}

It holds.
:::

:::{{exercise}}
:label: ex-{name}
Why?
:::

```python
"Equation {{eq}}`eq-large-second`, not {{eq}}`eq-nowhere`."
```

{refer}
"""
REFER = """\
By {eq}`eq-large-second` and {prf:ref}`thm-large`, {ref}`ex-large` follows, as in chapter 46
and in chapter 13 of nobody. {eq}`eq-end-first`"""


@pytest.fixture(scope="module")
def numbered(tmp_path_factory):
    "Articles of two chapters and an appendix."
    folder = tmp_path_factory.mktemp("numbers")
    titles = {"07_small": "Small", "46_large": "Large", "end": "End"}
    pages = {
        f"{file}.md": NUMBERED.format(title=title, name=title.lower(), refer=REFER)
        for file, title in titles.items()
    }
    result = build(folder, {"index.md": INDEX, **pages})
    assert result.returncode == 0, result.stderr
    html = {name: (folder / f"_build/html/{name}.html").read_text() for name in titles}
    return {name: BeautifulSoup(text, "html.parser") for name, text in html.items()}


def test_a_chapter_shows_its_number(numbered):
    for page in numbered.values():
        sidebar = page.find("div", class_="bd-toc-item").text
        assert "07\u2002Small" in sidebar and "46\u2002Large" in sidebar
        assert [line.strip() for line in sidebar.splitlines() if "End" in line] == ["End"]
    titles = [page.find("article").find("h1").text.rstrip("#") for page in numbered.values()]
    assert titles == ["07\u2002Small", "46\u2002Large", "End"]
    assert numbered["46_large"].find("article").find("h2").text == "First#"
    assert "07\u2002Small" in numbered["46_large"].find("a", class_="left-prev").text


def test_equations_theorems_and_exercises_count_within_a_chapter(numbered):
    for name, number in ("07_small", "07."), ("46_large", "46."), ("end", ""):
        article = numbered[name].find("article")
        assert [e.text for e in article.find_all("span", class_="eqno")] == [
            f"({number}{n})#" for n in (1, 2)
        ]
        assert f"Theorem {number}1" in article.find("div", class_="theorem").text
        assert f"Exercise {number}1" in article.find("div", class_="exercise").text
        refer = article.find_all("p")[-1].text
        assert "By (46.2) and Theorem 46.1, Exercise 46.1 follows" in refer
        assert refer.endswith("(1)")


def test_a_docstring_shows_the_number_of_an_equation(numbered):
    for page in numbered.values():
        assert page.find("pre").text.strip() == '"Equation (46.2), not {eq}`eq-nowhere`."'


def test_a_chapter_that_is_named_is_linked(numbered):
    links = numbered["end"].find("article").find_all("a", string="chapter 46")
    assert [link["href"] for link in links] == ["46_large.html"]
    assert not numbered["end"].find("a", string="chapter 13")


def test_a_hidden_cell_is_not_there(shown):
    assert "nowhere" not in shown[0].text


CASES = {
    "failing cell": ({"chapter.ipynb": notebook("1 / 0")}, "ZeroDivisionError"),
    "missing page": ({}, "nonexisting document 'chapter'|chapter"),
    "broken equation": ({"chapter.md": "# A\n\n{eq}`nowhere`\n"}, "nowhere"),
    "broken link": ({"chapter.md": "# A\n\n[](nowhere.md)\n"}, "nowhere"),
    "unknown directive": ({"chapter.ipynb": notebook("#| exprot\n1")}, "exprot"),
    "picture without text": (
        {"chapter.md": "# A\n\n![](a.svg)\n", "a.svg": SVG}, "no alternative text"
    ),
    "figure without text": (
        {"chapter.ipynb": notebook(f"x = 1\n{DRAW}")},
        "cell 1 (`x = 1`): its picture has no alternative text",
    ),
    "figure without caption": (
        {"chapter.ipynb": notebook(f"#| label: fig-a\n#| fig-alt: B\n{DRAW}")}, "no caption"
    ),
    "caption without figure": (
        {"chapter.ipynb": notebook("#| fig-alt: B\n#| fig-cap: A\nx = 1")}, "draws no picture"
    ),
}


@pytest.mark.parametrize("pages, complaint", CASES.values(), ids=CASES)
def test_the_build_fails(tmp_path, pages, complaint):
    result = build(tmp_path, {"index.md": INDEX, **pages})
    assert result.returncode != 0
    assert any(part in result.stdout + result.stderr for part in complaint.split("|"))
