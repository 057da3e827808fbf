"""Let Jupyter Book read nbdev notebooks.

Before MyST-NB parses a notebook, lines such as `#| export` are taken out of its code
cells and what they mean for a page is said in cell tags. A hash of everything that a
notebook imports or plots goes into its metadata, because the execution cache compares
code cells only: without it, a change in the library would leave old numbers on a page.
"""

import hashlib
import json
import re
from pathlib import Path

from sphinx.application import Sphinx

ROOT = Path(__file__).parent.parent

TAGS = {
    "hide": "remove-cell",
    "echo: false": "remove-input",
    "code-fold: true": "hide-input",
    "eval: false": "skip-execution",
    "slow": "skip-execution",
    "cuda": "skip-execution",
}
SILENT = {"default_exp", "export", "exporti", "exports"}

DIRECTIVE = re.compile(r"^#\s*\|\s*(.*?)\s*$\n?", re.MULTILINE)


def bridge_cell(cell: dict) -> dict | None:
    "The cell as a page shows it; None if it held nothing but directives."
    if cell["cell_type"] != "code":
        return cell
    source = "".join(cell["source"])
    directives = DIRECTIVE.findall(source)
    unknown = [d for d in directives if d not in TAGS and d.split()[0] not in SILENT]
    if unknown:
        raise ValueError(f"nbdev directives that the book does not know: {unknown}")
    source = DIRECTIVE.sub("", source).strip("\n")
    if not source:
        return None
    tags = cell["metadata"].get("tags", []) + [TAGS[d] for d in directives if d in TAGS]
    return {**cell, "source": source, "metadata": {**cell["metadata"], "tags": tags}}


def bridge_notebook(text: str, inputs: str) -> str:
    "The notebook as MyST-NB should see it; `inputs` is what its outputs depend on."
    notebook = json.loads(text)
    cells = map(bridge_cell, notebook["cells"])
    notebook["cells"] = [cell for cell in cells if cell is not None]
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
    if app.env.doc2path(docname).endswith(".ipynb"):
        source[0] = bridge_notebook(source[0], app.config.notebook_inputs)


def setup(app: Sphinx) -> dict:
    # A changed value of an "env" setting makes Sphinx read every page again, one of an
    # "html" setting makes it write every page again.
    inputs = hash_files(ROOT, "po_book/*.py", "results/**/*", "requirements-dev.txt")
    app.add_config_value("notebook_inputs", inputs, "env")
    look = hash_files(ROOT, "_static/**/*", "_ext/*.py", "settings.ini")
    app.add_config_value("site_inputs", look, "html")
    app.connect("source-read", read_source)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
