import json

import pytest
from nbdev_bridge import bridge_cell, bridge_notebook, hash_files


def code(source: str, **metadata) -> dict:
    return {"cell_type": "code", "source": source, "metadata": metadata}


@pytest.mark.parametrize(
    "directive, tag",
    [
        ("hide", "remove-cell"),
        ("echo: false", "remove-input"),
        ("code-fold: true", "hide-input"),
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
    cell = bridge_cell(code("#| slow\n#| code-fold: true\nx = 1"))
    assert cell["metadata"]["tags"] == ["skip-execution", "hide-input"]


def test_tags_that_were_there_stay():
    cell = bridge_cell(code("#| hide\nx = 1", tags=["mine"]))
    assert cell["metadata"]["tags"] == ["mine", "remove-cell"]


def test_a_cell_of_directives_alone_disappears():
    assert bridge_cell(code("#| default_exp ppo")) is None


def test_an_unknown_directive_is_an_error():
    with pytest.raises(ValueError, match="colapse"):
        bridge_cell(code("#| colapse: true\nx = 1"))


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
