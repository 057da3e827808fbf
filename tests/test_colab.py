"What a reader opens in Colab: the page as plain Markdown, and all of its code, which runs."

import json
import os
import re
import shutil
import subprocess
import sys
from functools import cache

import nbformat
import pytest
import yaml
from colab_notebooks import EXTRAS, needs, requirement
from conftest import ROOT, SITE, toc_pages
from docutils import nodes
from nbdev_bridge import read_directives
from plain_markdown import PlainMarkdown, fenced, table_cell
from project_links import COLAB, read_settings

FOLDER = ROOT / "_build" / "colab"
NAMES = [name for name in toc_pages() if (ROOT / "nbs" / f"{name}.ipynb").exists()]
SETTINGS = read_settings()
HERE = COLAB.format(**SETTINGS)
each = pytest.mark.parametrize("name", NAMES)


@cache
def notebook(name: str) -> nbformat.NotebookNode:
    return nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)


@cache
def page(name: str) -> str:
    return (SITE / f"{name}.html").read_text(encoding="utf-8")


def cells(name: str, kind: str) -> list[nbformat.NotebookNode]:
    return [cell for cell in notebook(name).cells if cell.cell_type == kind]


def prose(name: str) -> str:
    "All text, without the code that stands in it."
    text = "\n\n".join(cell.source for cell in cells(name, "markdown"))
    return re.sub(r"^[> ]*(`{3,}).*?^[> ]*\1", "", text, flags=re.M | re.S)


def links(text: str) -> list[str]:
    return re.findall(r"(?<!!)\[[^\]]*\]\(([^)\s]+)\)", re.sub(r"\$[^$]+\$|`[^`]+`", "x", text))


@each
def test_it_is_a_notebook_for_python_3(name):
    nbformat.validate(notebook(name))
    assert notebook(name).metadata.kernelspec.display_name == "Python 3"
    ids = [cell.id for cell in notebook(name).cells]
    assert len({*ids}) == len(ids) and ids == [cell.metadata.id for cell in notebook(name).cells]


@each
def test_no_directive_is_left(name):
    for cell in notebook(name).cells:
        assert not re.search(r":::|\{(eq|ref|cite|numref|prf)\b[^}]*\}`|^#\s*\|", cell.source, re.M)
    assert not re.search(r"\?\?\?|\[\]\(|\(\)|<!--|^\([\w-]+\)=", re.sub("`[^`]+`", "x", prose(name)), re.M)


@each
def test_the_first_code_installs_what_the_chapter_needs(name):
    "Where it is missing: the library with extras that it has, and nothing else."
    assert notebook(name).cells[0].source.startswith("# ")
    first = cells(name, "code")[0].source
    (asked,) = re.findall(r"^    %pip install -q \"po-book(.*?) @ git\+https://(.*)\"$", first, re.M)
    assert 'if find_spec("po_book") is None:\n    %pip' in first
    assert asked[1] == f"github.com/{SETTINGS['user']}/{SETTINGS['repo']}@{SETTINGS['branch']}"
    extras = re.findall(r"\w+", asked[0])
    assert all(f"{extra}_requirements" in SETTINGS for extra in extras)
    code = "\n".join(cell.source for cell in cells(name, "code"))
    assert ("demos" in extras) == ("altair" in code or "demos import" in code)
    assert ("agents" in extras) == (name[:3] in ("37b", "38_"))
    assert re.search(r'print\("On two CPU cores this chapter took \d+ s', first)


@pytest.mark.parametrize("version", ["0.1.0.dev0", "0.1.0"])
def test_a_version_is_installed_from_the_index_once_it_is_there(version):
    settings = {**SETTINGS, "version": version, "user": "us", "repo": "book", "branch": "main"}
    asked = requirement(settings, ["peft", "math"])
    there = "po-book[peft,math]==0.1.0"
    here = "po-book[peft,math] @ git+https://github.com/us/book@main"
    assert asked == (here if "dev" in version else there)


def test_what_a_chapter_took_is_read_from_its_last_cell():
    output = nbformat.v4.new_output("execute_result", {"text/plain": "['VmHWM:\\t  943718 kB\\n']"})
    last = nbformat.v4.new_code_cell(id="show-memory", outputs=[output])
    ran = nbformat.v4.new_notebook(cells=[last])
    assert needs(ran, 47.2, False) == "On two CPU cores this chapter took 47 s and 0.9 GiB. It needs no GPU."
    last.outputs = []  # as on a Mac
    assert needs(ran, 1.9, True) == "On two CPU cores this chapter took 2 s. Some of its cells need a GPU."


@each
def test_all_code_is_there_in_order(name):
    "That which the page hides too."
    source = json.loads((ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8"))
    written = {c["id"]: c for c in source["cells"] if c["cell_type"] == "code"}
    read = {id: read_directives("".join(c["source"])) for id, c in written.items()}
    shown = {cell.id: cell.source for cell in cells(name, "code")}
    assert [id for id in shown if id in read] == [id for id, (_, code) in read.items() if code]
    for id, (_, code) in read.items():
        last = re.sub(r"\{eq\}`[^`]*`.*", "", code.splitlines()[-1]) if code else ""
        assert last in shown.get(id, "")


@each
def test_outputs_are_those_of_the_page(name):
    outputs = [output for cell in cells(name, "code") for output in cell.outputs]
    shown = [output.get("data", {}) for output in outputs]
    badges = re.compile(r'class="po-verdict po-(\w+)')
    here = badges.findall(prose(name) + "".join(data.get("text/markdown", "") for data in shown))
    assert sorted(here) == sorted(badges.findall(page(name)))
    pictures = [data for data in shown if any(kind.startswith("image/") for kind in data)]
    drawn = re.findall(r'<img [^>]*src="_images/|<div class="po-demo"', page(name))
    assert len(pictures) + prose(name).count("![") == len(drawn)
    assert not any(output.get("name") == "stderr" for output in outputs)


@each
def test_headings_begin_at_one_and_skip_no_level(name):
    levels = [len(marks) for marks in re.findall(r"^(#+) ", prose(name), re.M)]
    assert levels[0] == 1 and levels.count(1) == 1
    assert all(low + 1 >= high for low, high in zip(levels, levels[1:], strict=False))


@each
def test_numbers_are_those_of_the_page(name):
    "Of equations, figures, theorems, algorithms and exercises."
    text = prose(name)
    shown = re.findall(r'class="eqno">\(([\w.]+)\)', page(name))
    assert re.findall(r"\\tag\{(.*?)\}", text) == shown
    titles = re.findall(r'class="caption-number">(\w+\.? [\w.]+) <', page(name))
    assert re.findall(r"^(?:> )?\*\*(\w+\.? \d+\w?\.\d+|Fig\. \d+)", text, re.M) == titles


@each
def test_every_formula_ends(name):
    "In one line, so that a quotation or a list does not break it."
    for line in prose(name).splitlines():
        assert len(re.findall(r"(?<!\\)\$", re.sub("`[^`]+`", "", line))) % 2 == 0, line


@each
def test_links_and_pictures_lead_somewhere(name):
    text = prose(name)
    site = f"https://{SETTINGS['user']}.github.io/{SETTINGS['repo']}/"
    for link in links(text):
        if link.startswith((HERE, "#")):
            file, _, cell = link.removeprefix(HERE).partition("#scrollTo=")
            there = notebook(file.removesuffix(".ipynb") or name)
            assert not cell and "#" not in link or cell in [c.id for c in there.cells], link
        elif link.startswith(site):
            file, _, anchor = link.removeprefix(site).partition("#")
            assert not anchor or f'id="{anchor}"' in page(file.removesuffix(".html")), link
        else:
            assert re.match(r"https?://", link), link
    for picture in re.findall(r"!\[[^\]]+\]\((.*?)\)", text):
        assert (SITE / picture.removeprefix(site)).exists(), picture


@each
def test_a_chapter_with_cells_for_a_gpu_asks_for_one(name):
    source = (ROOT / "nbs" / f"{name}.ipynb").read_text(encoding="utf-8")
    wants, code = "#| cuda" in source, "\n".join(cell.source for cell in cells(name, "code"))
    assert (notebook(name).metadata.get("accelerator") == "GPU") == wants
    assert ("\nif torch.cuda.is_available():\n    " in code) == wants


@each
def test_a_solution_is_folded_with_its_code(name):
    assert prose(name).count("<summary>Solution to") == page(name).count('class="solution')
    titled = [cell for cell in cells(name, "code") if cell.source.startswith("# @title Solution to")]
    folded = [cell for cell in cells(name, "code") if cell.metadata.get("cellView") == "form"]
    assert titled == folded and all(cell.metadata.jupyter.outputs_hidden for cell in folded)


@pytest.mark.parametrize("name", toc_pages())
def test_the_button_leads_to_a_notebook_that_is_published(name):
    "On the branch, and under the path; a page that is no notebook has no button."
    buttons = re.findall(r'href="(https://colab\.research\.google\.com/[^"]*)"', page(name))
    assert {*buttons} == ({f"{HERE}{name}.ipynb"} if name in NAMES else set())
    assert all((FOLDER / url.removeprefix(HERE)).exists() for url in buttons)


def test_that_folder_is_published_on_that_branch_and_run_every_week(tmp_path):
    "The script that workflows call, with a repository of this machine in GitHub's place."
    ours = f"{SETTINGS['user']}/{SETTINGS['repo']}"
    subprocess.run(["git", "init", "-q", "--bare", tmp_path / "github.git"], check=True)
    shutil.copytree(FOLDER, tmp_path / "_build" / "colab")
    shutil.copy(ROOT / "settings.ini", tmp_path)
    known = {
        "GITHUB_ACTOR": "somebody", "GITHUB_SHA": "abc", "GH_TOKEN": "key", "GITHUB_REPOSITORY": ours,
        "GIT_CONFIG_COUNT": "1", "GIT_CONFIG_KEY_0": f"url.file://{tmp_path}/github.git.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://x-access-token:key@github.com/{ours}",
    }  # fmt: skip
    script = ROOT / ".github" / "publish_colab.sh"
    subprocess.run(["bash", script], cwd=tmp_path, env=os.environ | known, check=True)
    branch = HERE.rstrip("/").split("/")[-1]
    command = ["git", "ls-tree", "--name-only", branch]
    found = subprocess.run(command, cwd=tmp_path / "github.git", capture_output=True, text=True)
    assert {*found.stdout.split()} == {f"{name}.ipynb" for name in NAMES}
    weekly = (ROOT / ".github" / "workflows" / "latest.yml").read_text(encoding="utf-8")
    (source,) = [s["with"] for s in yaml.safe_load(weekly)["jobs"]["colab"]["steps"] if "with" in s]
    assert source == {"ref": "colab", "path": "_build/colab"}


def test_notebooks_run_elsewhere_in_a_new_process():
    "One that draws, and one that reads records; no package is another one afterwards."
    paths = [FOLDER / f"{name}.ipynb" for name in ("12_mdp", "benchmarks")]
    command = [sys.executable, ROOT / "benchmarks" / "colab.py", *paths]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "2 of 2 notebooks ran; replaced: nothing" in result.stdout


def test_markdown_of_what_would_break_it():
    writer = PlainMarkdown({}, str)
    assert writer.write(nodes.Text("a * b_c costs $5 < `x`")) == r"a \* b\_c costs \$5 \< \`x\`"
    assert writer.write(nodes.literal("", "a`b")) == "`` a`b ``"
    assert fenced("```\nx\n```") == "````\n```\nx\n```\n````"
    assert table_cell(r"$|a| \| b$ or `x | y`") == r"$\vert a\vert  \Vert  b$ or `x \| y`"
    assert {*EXTRAS} < {key.removesuffix("_requirements") for key in SETTINGS}
