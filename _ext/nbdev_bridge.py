"""Let Jupyter Book read nbdev notebooks.

Before MyST-NB parses a notebook, lines such as `#| export` are taken out of its code
cells. What decides whether a cell runs becomes a cell tag; how a page shows the cell goes
into a `{cell}` directive before it (`cell_pages.py`), because the execution cache
compares metadata of code cells too: a changed caption would run the chapter again. A hash of
everything that a notebook imports or plots goes into its metadata for the opposite
reason: without it, a change in the library would leave old numbers on a page.
"""

import hashlib
import json
import re
from pathlib import Path

from cell_rules import folded
from chapter_numbers import chapter_files, link_chapters
from demo_pages import SHOW
from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent

TAGS = {
    "hide": "remove-cell",
    "echo: false": "remove-input",
    "eval: false": "skip-execution",
    "slow": "skip-execution",
    "cuda": "skip-execution",
}
SWITCHES = {"echo:", "eval:", "code-fold:"}
FIGURE = {"label:", "fig-cap:", "fig-alt:"}
FLAGS = {"default_exp", "export", "exporti", "exports", "hide", "slow", "cuda"}
REASONS = {"slow": "takes minutes", "cuda": "needs a GPU"}

# What the kernel of a notebook held at its fullest moment; Linux keeps count of it.
MEMORY = """\
from pathlib import Path

[line for path in Path("/proc/self").glob("status") for line in path.open() if "HWM" in line]"""
# For the site alone.
OWN_CELLS = {"show-demos": SHOW, "show-memory": MEMORY}

LEADING = re.compile(r"\s*#\s*\|(.*)")
MAGIC = re.compile(r"\s*%%\w+")


def read_directives(source: str) -> tuple[dict[str, str], str]:
    """Directives of a cell with their values, and its code without them.

    As in nbdev, only lines before the code count: what looks like a directive in a string
    or in a table in a comment is none. A line with two spaces after `#|` continues the
    option of a figure before it.

    Raises: `ValueError` for a directive that the book does not know; nbdev would pass
    over it in silence.
    """
    lines, directives, kept, unknown = source.splitlines(keepends=True), {}, [], []
    last = None
    while lines and (not lines[0].strip() or LEADING.match(lines[0]) or MAGIC.match(lines[0])):
        line = lines.pop(0)
        if MAGIC.match(line):
            kept.append(line)
        if not (found := LEADING.match(line)) or not (text := found[1].strip()):
            continue
        if text not in FIGURE:
            text = text.removesuffix(":")
        name, *rest = text.replace(":", ": ", 1).split(maxsplit=1)
        if last in FIGURE and found[1].startswith("  "):
            # nbdev takes this line for a directive of its own.
            if name in FLAGS or name in SWITCHES:
                raise ValueError(f"a line of {last} must not begin with the directive {name!r}")
            directives[last] = f"{directives[last]} {text}".strip()
            continue
        last, value = name, "".join(rest).strip()
        if name in SWITCHES:
            value = value.lower()
        if name not in FLAGS | FIGURE | SWITCHES or (
            name in SWITCHES and value not in ("true", "false")
        ):
            unknown.append(text)
        directives[name] = value
    if unknown:
        raise ValueError(f"nbdev directives that the book does not know: {unknown}")
    return directives, "".join(kept + lines).strip("\r\n")


def bridge_cell(cell: dict) -> dict | None:
    "The cell as MyST-NB runs it; None if it held nothing but directives."
    if cell["cell_type"] != "code":
        return cell
    directives, source = read_directives("".join(cell["source"]))
    if not source:
        return None
    names = [f"{name} {value}" if name in SWITCHES else name for name, value in directives.items()]
    tags = cell["metadata"].get("tags", []) + [TAGS[name] for name in names if name in TAGS]
    return {**cell, "source": source, "metadata": {**cell["metadata"], "tags": tags}}


def page_cell(cell: dict, number: int) -> dict | None:
    "The directive that says how a page shows a code cell, in a cell of its own before it."
    directives, source = read_directives("".join(cell["source"]))
    if not source or "hide" in directives:
        return None
    skipped = bool(REASONS.keys() & directives) or directives.get("eval:") == "false"
    options = {
        "cell": number,
        "line": source.splitlines()[0],
        "fold": folded(directives, source),
        "skipped": " and ".join(REASONS[d] for d in REASONS if d in directives) if skipped else None,
        "label": directives.get("label:"),
        "caption": directives.get("fig-cap:"),
        "alt": directives.get("fig-alt:"),
        "defines": cell.get("id") if "export" in directives else None,
    }
    text = json.dumps({k: v for k, v in options.items() if v is not None}, ensure_ascii=False)
    fence = "`" * 9
    source = f"{fence}{{cell}}\n{text}\n{fence}"
    return {"cell_type": "markdown", "id": f"page-{number}", "metadata": {}, "source": source}


def own_cell(name: str) -> dict:
    "A cell that runs with a chapter and that its page does not show."
    cell = {"cell_type": "code", "id": name, "metadata": {"tags": ["remove-cell"]}}
    return cell | {"source": OWN_CELLS[name], "outputs": [], "execution_count": None}


def bridge_notebook(text: str, inputs: str, chapters: dict[str, str] | None = None) -> str:
    """The notebook as MyST-NB should see it; `inputs` is what its outputs depend on.

    Prose that names a chapter by its number in `chapters` links to it.
    """
    notebook = json.loads(text)
    cells = []
    for number, cell in enumerate(notebook["cells"]):
        if cell["cell_type"] == "code" and (shown := page_cell(cell, number)):
            cells.append(shown)
        if cell["cell_type"] == "markdown" and chapters:
            cell |= {"source": link_chapters("".join(cell["source"]), chapters)}
        if bridged := bridge_cell(cell):
            cells.append(bridged)
    if re.search(r"po_book\.(charts|demos|lm_demos) |default_exp charts", text):
        cells.insert(1, own_cell("show-demos"))
    notebook["cells"] = [*cells, own_cell("show-memory")]
    # Of a notebook's metadata, the execution cache hashes the kernelspec alone.
    notebook["metadata"]["kernelspec"]["inputs"] = inputs
    return json.dumps(notebook)


def hash_files(root: Path, *patterns: str) -> str:
    "Hash of the names and contents of all files below `root` that match a pattern."
    paths = {path for pattern in patterns for path in root.glob(pattern)}
    digest = hashlib.sha256()
    for path in sorted(path for path in paths if path.is_file()):
        digest.update(f"{path.relative_to(root)}\0".encode() + path.read_bytes())
    return digest.hexdigest()


def read_source(app: Sphinx, docname: str, source: list[str]) -> None:
    chapters = chapter_files(app.env)
    if app.env.doc2path(docname).endswith(".ipynb"):
        source[0] = bridge_notebook(source[0], app.config.notebook_inputs, chapters)
    else:
        source[0] = link_chapters(source[0], chapters)


def setup(app: Sphinx) -> dict:
    # A changed value of an "env" setting makes Sphinx read every page again, one of an
    # "html" setting makes it write every page again.
    inputs = hash_files(ROOT, "po_book/*.py", "results/**/*", "requirements-dev.txt")
    app.add_config_value("notebook_inputs", inputs, "env")
    look = hash_files(ROOT, "_static/**/*", "_ext/*.py", "_ext/*.js", "settings.ini")
    app.add_config_value("site_inputs", look, "html")
    app.connect("source-read", read_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
