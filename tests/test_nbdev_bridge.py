import json
from pathlib import Path

import pytest
from chapter_numbers import link_chapters
from nbdev_bridge import bridge_cell, bridge_notebook, hash_files, page_cell, read_directives


def code(source: str, **metadata) -> dict:
    return {"cell_type": "code", "source": source, "metadata": metadata}


@pytest.mark.parametrize(
    "directive, tag",
    [
        ("hide", "remove-cell"),
        ("echo: false", "remove-input"),
        ("eval: false", "skip-execution"),
        ("slow", "skip-execution"),
        ("cuda", "skip-execution"),
    ],
)
def test_a_directive_becomes_a_tag(directive, tag):
    cell = bridge_cell(code(f"#| {directive}\nx = 1"))
    assert cell["source"] == "x = 1"
    assert cell["metadata"]["tags"] == [tag]


def test_directives_that_do_not_concern_a_page_are_removed():
    cell = bridge_cell(code("#| export\n#|exporti\n\ndef f():\n    return '#| export'"))
    assert cell["source"] == "def f():\n    return '#| export'"
    assert cell["metadata"]["tags"] == []


def test_a_source_given_as_lines_reads_the_same():
    assert bridge_cell(code(["#| hide\n", "x = 1"])) == bridge_cell(code("#| hide\nx = 1"))


def test_several_directives_in_one_cell():
    cell = bridge_cell(code("#| slow\n#| echo: false\nx = 1"))
    assert cell["metadata"]["tags"] == ["skip-execution", "remove-input"]


def test_tags_that_were_there_stay():
    cell = bridge_cell(code("#| hide\nx = 1", tags=["mine"]))
    assert cell["metadata"]["tags"] == ["mine", "remove-cell"]


def test_a_cell_of_directives_alone_disappears():
    assert bridge_cell(code("#| default_exp ppo")) is None


def test_an_unknown_directive_is_an_error():
    with pytest.raises(ValueError, match="colapse"):
        bridge_cell(code("#| colapse: true\nx = 1"))


TEXT = 'text = """\n#| export\n"""'


@pytest.mark.parametrize(
    "source, left, tags",
    [
        (TEXT, TEXT, []),
        ("x = 1\n# | a | b |", "x = 1\n# | a | b |", []),
        ("#|\nx = 1", "x = 1", []),
        ("#|eval:false\nx", "x", ["skip-execution"]),
        ("#| eval: true\nx", "x", []),
        ("# | hide:\nx", "x", ["remove-cell"]),
        ("#| hide\r\nx = 1", "x = 1", ["remove-cell"]),
        ("#| export other.module\nx", "x", []),
        ("\n#| export\n\n  #| slow\nx", "x", ["skip-execution"]),
        ("%%time\n#| slow\nx", "%%time\nx", ["skip-execution"]),
    ],
    ids=[
        "string", "table", "empty", "tight", "switched on", "colon", "windows", "argument",
        "spread", "magic",
    ],
)
def test_directives_stand_where_nbdev_reads_them(source, left, tags):
    cell = bridge_cell(code(source))
    assert (cell["source"], cell["metadata"]["tags"]) == (left, tags)


@pytest.mark.parametrize("line", ["hide", "export a.b", "eval: false", "slow:", "exporti"])
def test_nbdev_reads_the_same(line):
    from execnb.nbio import mk_cell
    from nbdev.process import extract_directives

    source = f"\n#| {line}\n# | cuda\nx = 1\n#| hide"
    theirs = extract_directives(mk_cell(source, "code"))
    ours, _ = read_directives(source)
    assert {name: " ".join(args) for name, args in theirs.items()} == ours


@pytest.mark.parametrize("directive", ["Hide", "echo: perhaps", "colapse: true", "1 | 2 |"])
def test_what_is_unknown_is_named(directive):
    with pytest.raises(ValueError, match="that the book does not know") as error:
        bridge_cell(code(f"#| export\n#| {directive}\nx = 1"))
    assert repr([directive]) in str(error.value)


def page(source: str) -> dict | None:
    "What the page of a cell is told."
    cell = page_cell(code(source), 7)
    return cell and json.loads(cell["source"].splitlines()[1])


def test_a_page_is_told_which_cell_it_shows():
    assert page("#| export\n\ndef f():\n    return 1") == {"cell": 7, "line": "def f():"}
    assert page("#| hide\nx") is None and page("#| default_exp ppo") is None


def test_the_options_of_a_figure():
    source = "#| label: fig-a\n#| fig-cap: Two: $x$\n#|   and `y`.\n#| fig-alt:\n#|   One\n#|   line\nx"
    shown = page(source)
    assert (shown["label"], shown["caption"], shown["alt"]) == ("fig-a", "Two: $x$ and `y`.", "One line")
    assert shown["fold"] == "the code of the figure"
    assert bridge_cell(code(source))["source"] == "x"


def test_a_continued_caption_is_no_directive():
    with pytest.raises(ValueError, match="'hide'"):
        page("#| fig-cap: These lines\n#|   hide the cell in nbdev.\nx")


@pytest.mark.parametrize(
    "directives, why",
    [
        ("#| slow", "takes minutes"),
        ("#| cuda", "needs a GPU"),
        ("#| cuda\n#| slow", "takes minutes and needs a GPU"),
        ("#| eval: false", ""),
    ],
)
def test_a_cell_that_is_not_run_says_why(directives, why):
    shown = page(f"{directives}\nplt.plot(holds(1))")
    assert shown["skipped"] == why and "fold" not in shown


def test_how_a_cell_looks_does_not_make_it_run_again():
    def runs(source: str) -> list[dict]:
        cells = [{**code(source), "outputs": [], "execution_count": None, "id": "a"}]
        text = {"cells": cells, "metadata": {"kernelspec": {}}}
        shown = json.loads(bridge_notebook(json.dumps(text), ""))["cells"]
        return [cell for cell in shown if cell["cell_type"] == "code"]

    assert runs("#| code-fold: true\n#| fig-cap: A\nx") == runs("#| fig-alt: B\nx") == runs("x")


def test_prose_is_left_alone():
    cell = {"cell_type": "markdown", "source": "#| a table?", "metadata": {}}
    assert bridge_cell(cell) is cell


def test_the_inputs_reach_the_cache_key():
    from jupyter_cache import get_cache
    from nbformat import reads

    cells = [{**code("x = 1"), "outputs": [], "execution_count": None, "id": "a"}]
    metadata = {"kernelspec": {"name": "python3", "display_name": "python3"}}
    text = {"cells": cells, "metadata": metadata, "nbformat": 4, "nbformat_minor": 5}

    def key(inputs: str) -> str:
        notebook = reads(bridge_notebook(json.dumps(text), inputs), 4)
        return get_cache("unused").create_hashed_notebook(notebook)[1]

    assert key("a") == key("a") != key("b")


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="Linux keeps count")
def test_the_last_cell_says_what_the_kernel_held_and_does_not_show():
    text = json.dumps({"cells": [], "metadata": {"kernelspec": {}}})
    *_, last = json.loads(bridge_notebook(text, ""))["cells"]
    assert last["id"] == "show-memory" and last["metadata"]["tags"] == ["remove-cell"]
    assert "VmHWM" in str(eval(last["source"].splitlines()[-1], {"Path": Path}))  # of this process


def test_the_hash_follows_names_and_contents(tmp_path):
    def current() -> str:
        return hash_files(tmp_path, "po_book/*.py", "results/**/*")

    (tmp_path / "po_book").mkdir()
    module = tmp_path / "po_book" / "a.py"
    module.write_text("x = 1")
    seen = [current()]
    module.write_text("x = 2")
    seen.append(current())
    (tmp_path / "results" / "run").mkdir(parents=True)
    (tmp_path / "results" / "run" / "log.csv").write_text("1")
    seen.append(current())
    module.rename(tmp_path / "po_book" / "b.py")
    seen.append(current())
    (tmp_path / "README.md").write_text("not matched")
    assert len(set(seen)) == 4 and current() == seen[-1]


CHAPTERS = {"13": "13_policy_gradient.ipynb", "46": "46_grpo.ipynb"}


@pytest.mark.parametrize(
    "text, linked",
    [
        ("as chapter 46 shows", "as [chapter 46](46_grpo.ipynb) shows"),
        ("(Chapter 13)", "([Chapter 13](13_policy_gradient.ipynb))"),
        (
            "chapters 13, 46 and 99",
            "chapters [13](13_policy_gradient.ipynb), [46](46_grpo.ipynb) and 99",
        ),
        ("{cite:t}`a` differs. See chapter 46.", "{cite:t}`a` differs. See [chapter 46](46_grpo.ipynb)."),
    ],
)
def test_a_chapter_in_prose_becomes_a_link(text, linked):
    assert link_chapters(text, CHAPTERS) == linked


@pytest.mark.parametrize(
    "text",
    [
        "chapter 99, chapter 1, chapter 461, chapter 13.2",
        "{cite:t}`sutton2018`, chapters 46 and 13",
        "(see {cite:p}`sutton2018`, section 3 of chapter 13)",
        "Sutton and Barto, 2018, chapter 13",
        "chapter 13 of {cite:t}`sutton2018`",
        "[chapter 13](13_policy_gradient.ipynb) and [our chapter 46](46_grpo.ipynb#a)",
        "`chapter 13`, $chapter 13$ and\n$$\nchapter 13\n$$",
        "# Chapter 13",
        ":::{prf:theorem} chapter 13\n:label: chapter 13",
        "```python\nchapter 13\n```",
        "<!-- chapter 13 -->",
    ],
)
def test_what_is_no_chapter_of_ours_stays(text):
    assert link_chapters(text, CHAPTERS) == text


def test_prose_of_a_notebook_is_linked():
    cells = [{"cell_type": "markdown", "source": ["See\n", "chapter 46."], "metadata": {}}]
    text = json.dumps({"cells": cells, "metadata": {"kernelspec": {}}})
    cell, _ = json.loads(bridge_notebook(text, "", CHAPTERS))["cells"]
    assert cell["source"] == "See\n[chapter 46](46_grpo.ipynb)."


@pytest.mark.parametrize(
    "source, shows",
    [
        ("from po_book.demos import clip_demo", True),
        ("#| default_exp charts", True),
        ("from po_book.ppo import ratio", False),
    ],
)
def test_a_notebook_with_demos_is_told_how_the_book_shows_them(source, shows):
    title = {"cell_type": "markdown", "source": "# Title", "metadata": {}}
    text = json.dumps({"cells": [title, code(source)], "metadata": {"kernelspec": {}}})
    _, *cells = json.loads(bridge_notebook(text, ""))["cells"]
    hidden = [c["source"] for c in cells if c["metadata"].get("tags") == ["remove-cell"]]
    assert any("altair.renderers" in one for one in hidden) == shows
