"""At the foot of each chapter: when and with what it last ran, and which records it shows."""

import json
import platform
import re
from collections import defaultdict
from datetime import datetime, timezone
from importlib.metadata import version
from os import cpu_count
from pathlib import Path
from shutil import which

from docutils import nodes
from myst_nb.sphinx_ import NbMetadataCollector
from sphinx.application import Sphinx


def device() -> str:
    "What the chapters compute on; torch takes seconds to say it, so a driver comes first."
    if which("nvidia-smi"):
        import torch

        if torch.cuda.is_available():
            return torch.cuda.get_device_name()
    return f"CPU ({platform.machine()}, {cpu_count()} cores)"


def ran(config, facts: dict) -> str:
    day = datetime.fromtimestamp(facts["mtime"], timezone.utc).date()
    seconds, python = f"{facts['runtime']:.1f} s", platform.python_version()
    versions = f"po_book {config.release}, torch {version('torch')}, Python {python}"
    return f"Last verified {day}: ran in {seconds} with {versions} on {device()}."


def records(notebook: Path, results: Path) -> dict[str, list[tuple[str, str]]]:
    """The records that a notebook shows, each with its date, by the device that made them.

    They are read by `recorded(...)` or by a helper around it: the name opens a bracket.
    """
    cells = json.loads(notebook.read_text(encoding="utf-8"))["cells"]
    code = "\n".join("".join(c["source"]) for c in cells if c["cell_type"] == "code")
    found = defaultdict(list)
    if "recorded" in code:
        for name in dict.fromkeys(re.findall(r'\(\s*"(\w+)"', code)):
            if (note := results / f"{name}.json").exists():
                about = json.loads(note.read_text(encoding="utf-8"))
                found[about["device"]].append((name, about["date"]))
    return found


def add_line(app: Sphinx, doctree: nodes.document) -> None:
    facts = NbMetadataCollector.get_exec_data(app.env, app.env.docname)
    if not facts or not facts["succeeded"]:
        return
    notebook = Path(app.env.doc2path(app.env.docname))
    line = nodes.paragraph("", ran(app.config, facts), classes=["po-verified"])
    where = f"{app.config.html_theme_options['repository_url']}/blob/main/results"
    for machine, found in records(notebook, notebook.parent.parent / "results").items():
        line += nodes.Text(f" Recorded on {machine}: ")
        for i, (name, day) in enumerate(found):
            link = nodes.reference("", name, refuri=f"{where}/{name}.csv")
            line += [nodes.Text(", " if i else ""), link, nodes.Text(f" ({day})")]
        line += nodes.Text(".")
    doctree[-1] += line


def setup(app: Sphinx) -> dict:
    app.connect("doctree-read", add_line)
    return {"parallel_read_safe": True, "parallel_write_safe": True}
