"The package is a line of rooms: who imports whom, how large they are, what stays private."

import ast
import json
import re
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))
MODULES = {
    name[1]: path.stem
    for path in NOTEBOOKS
    if (name := re.search(r"#\| default_exp (\w+)", path.read_text(encoding="utf-8")))
}


def tree(module: str) -> ast.Module:
    return ast.parse((ROOT / "po_book" / f"{module}.py").read_text(encoding="utf-8"))


def imported(module: str) -> list[tuple[str, str]]:
    "(module, name) of everything that comes from another module, wherever it is imported."
    found = []
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.ImportFrom) and (node.level or "po_book" in (node.module or "")):
            source = (node.module or "").removeprefix("po_book").lstrip(".")
            # `from po_book import ppo` and `from . import ppo` name modules.
            found += [(source or a.name, a.name if source else "") for a in node.names]
        if isinstance(node, ast.Import):
            found += [(a.name.split(".")[1], "") for a in node.names if a.name.startswith("po_book.")]
    return found


def test_the_picture_of_imports():
    "pytest tests/test_architecture.py -k picture -s shows it."
    lines = []
    for module, stem in sorted(MODULES.items(), key=lambda item: item[1]):
        used = sorted({source for source, _ in imported(module)}, key=lambda m: MODULES[m])
        lines.append(f"{stem.split('_')[0]:>3} {module:16} <- {', '.join(used)}".rstrip(" <-"))
    print("\n" + "\n".join(lines))
    assert len(lines) == len(MODULES)


@pytest.mark.parametrize("module", MODULES)
def test_a_module_imports_only_from_lower_numbers(module):
    "Which also means that there are no circles."
    for source, _ in imported(module):
        assert MODULES[source] < MODULES[module], f"{module} imports {source}"


@pytest.mark.parametrize("module", MODULES)
def test_a_module_takes_no_private_name_of_another(module):
    taken = [f"{source}.{name}" for source, name in imported(module) if name.startswith("_")]
    aliases = {source for source, name in imported(module) if not name}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.value.id in aliases and node.attr.startswith("_"):
                taken.append(f"{node.value.id}.{node.attr}")
    assert not taken


def test_no_page_takes_a_private_name_of_another_module():
    for path in NOTEBOOKS:
        for source, names in page_imports(path):
            own = MODULES.get(source) == path.stem
            assert own or not [n for n in names if n.startswith("_")], f"{path.name}: {names}"


def page_imports(path: Path) -> list[tuple[str, list[str]]]:
    found = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        if cell["cell_type"] == "code":
            for node in ast.walk(ast.parse(source)):
                if isinstance(node, ast.ImportFrom) and (node.module or "").startswith("po_book."):
                    found.append((node.module.split(".")[1], [a.name for a in node.names]))
    return found


@pytest.mark.parametrize("module", MODULES)
def test_no_module_asks_what_is_in_the_registry_of_another(module):
    "`isinstance` against a table or a configuration of another module would tie the two."
    foreign = {name for _, name in imported(module)}
    for node in ast.walk(tree(module)):
        if isinstance(node, ast.Call) and getattr(node.func, "id", "") in ("isinstance", "issubclass"):
            asked = {n.id for n in ast.walk(node.args[1]) if isinstance(n, ast.Name)} & foreign
            registries = {n for n in asked if n.isupper() or n.endswith("Config")}
            assert not registries, f"{module} asks for {registries}"


def test_the_runner_knows_no_method():
    methods = [n for n in dir(__import__("po_book.train").train) if n.endswith(("_iteration", "_loss"))]
    assert len(methods) >= 6
    text = (ROOT / "po_book/runner.py").read_text(encoding="utf-8")
    words = {"reinforce", "a2c", "trpo", "ppo", "dqn", "ddpg", "Replay"}
    assert not words & set(re.findall(r"\w+", text.split('"""', 2)[2]))


def test_the_language_model_does_not_need_the_sampler():
    assert "sampling" not in {source for source, _ in imported("language_model")}


@pytest.mark.parametrize("module", MODULES)
def test_no_module_is_too_long(module):
    lines = (ROOT / "po_book" / f"{module}.py").read_text(encoding="utf-8").splitlines()
    assert len(lines) <= 500


def test_every_file_named_for_a_change_exists():
    "The table of CONTRIBUTING.md that says where to change what."
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    table = text[text.index("## Where would I change") :].split("\n## ")[0]
    files = re.findall(r"`([\w/.]+\.\w+)`", table)
    assert len(files) >= 10
    assert not [f for f in files if not (ROOT / f).exists()]
