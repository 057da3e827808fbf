"The committed notebooks and the committed library agree, and the notebooks are clean."

import filecmp
import json
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from conftest import ROOT

NOTEBOOKS = sorted((ROOT / "nbs").glob("*.ipynb"))


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    "The repository as nbdev_clean and nbdev_export leave it, in another folder."
    copy = tmp_path_factory.mktemp("repository")
    for name in "settings.ini", "setup.py", "README.md":
        shutil.copy(ROOT / name, copy)
    shutil.copytree(ROOT / "nbs", copy / "nbs", ignore=shutil.ignore_patterns(".*"))
    (copy / "po_book").mkdir()
    shutil.copy(ROOT / "po_book" / "__init__.py", copy / "po_book")
    run = "from nbdev.{0} import {1}; {1}()"
    for module, command in ("clean", "nbdev_clean"), ("doclinks", "nbdev_export"):
        code = run.format(module, command)
        subprocess.run([sys.executable, "-c", code], cwd=copy, check=True)
    return copy


def test_the_library_is_what_the_notebooks_export(exported):
    here = {p.name for p in (ROOT / "po_book").glob("*.py")}
    there = {p.name for p in (exported / "po_book").glob("*.py")}
    assert here == there
    different = filecmp.cmpfiles(ROOT / "po_book", exported / "po_book", here, False)[1]
    assert not different, "run nbdev_export"


def test_the_notebooks_are_clean(exported):
    names = [path.name for path in NOTEBOOKS]
    different = filecmp.cmpfiles(ROOT / "nbs", exported / "nbs", names, False)[1]
    assert not different, "run nbdev_clean"


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_a_notebook_carries_no_output_and_no_macro(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        assert not cell.get("outputs"), source
        if cell["cell_type"] == "markdown":
            assert not re.search(r"\\(re)?newcommand|\\def\\", source), source


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.name)
def test_code_fits_the_page(path):
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        if cell["cell_type"] == "code":
            for line in "".join(cell["source"]).splitlines():
                assert len(line) <= 88, line


def test_a_module_imports_only_from_lower_numbers():
    by_module = {}
    for path in NOTEBOOKS:
        text = path.read_text(encoding="utf-8")
        if name := re.search(r"#\| default_exp (\w+)", text):
            by_module[name[1]] = path.stem
    for module, stem in by_module.items():
        source = (ROOT / "po_book" / f"{module}.py").read_text(encoding="utf-8")
        for used in re.findall(r"^from po_book\.(\w+) import|^from \.(\w+) import", source, re.M):
            name = "".join(used)
            assert by_module[name] < stem, f"{module} imports {name}"


def test_the_owner_is_named_in_one_place():
    files = subprocess.run(["git", "ls-files"], cwd=ROOT, capture_output=True, text=True)
    pattern = re.compile(r"github\.com/po-book|po-book\.github\.io")
    for name in files.stdout.split():
        path = ROOT / name
        # nbdev_export derives _modidx.py from settings.ini; three others are compared with it.
        compared = "CITATION.cff", "README.md", "index.ipynb"
        said = "settings.ini", "_modidx.py", *compared, Path(__file__).name
        if path.is_file() and path.name not in said:
            assert not pattern.search(path.read_text(errors="ignore")), name
