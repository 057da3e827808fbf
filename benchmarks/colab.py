"""Run reader notebooks as Colab does: each from its first cell to its last, in a new kernel.

    python benchmarks/colab.py _build/colab/46_grpo.ipynb ...
    python benchmarks/colab.py --wheel dist/po_book-0.1.0-py3-none-any.whl ...

The kernels are those of this Python, in a folder with nothing else. Their first cell then
installs the last commit of this checkout, in place of GitHub's, and every notebook does so
anew. With `--wheel` the library is there before. Exits with 1 if a cell fails, or if a package that was there is another
one afterwards. Records are looked for beside the folder, so that none is downloaded.
"""

import os
import shutil
import subprocess
import sys
import time
from argparse import ArgumentParser
from configparser import ConfigParser
from pathlib import Path
from tempfile import TemporaryDirectory

import nbformat
from nbclient import NotebookClient
from nbclient.exceptions import CellExecutionError

ROOT = Path(__file__).parent.parent.resolve()


def pip(*words: str) -> str:
    command = [sys.executable, "-m", "pip", "--disable-pip-version-check", *words]
    return subprocess.run(command, check=True, capture_output=True, text=True).stdout


def installed() -> dict[str, str]:
    "Every package of this Python and its version."
    return dict(line.split("==") for line in pip("list", "--format=freeze").split())


def stand_in_for_github(folder: Path) -> None:
    "Have git find the last commit of this checkout where the notebooks look for it."
    parser = ConfigParser(delimiters=["="])
    parser.read(ROOT / "settings.ini", encoding="utf-8")
    settings = parser["DEFAULT"]
    clone = folder / "repository.git"
    subprocess.run(["git", "clone", "-q", "--bare", ROOT, clone], check=True)
    # Not `branch -f`: it refuses the branch that HEAD is on.
    update = ["update-ref", f"refs/heads/{settings['branch']}", "HEAD"]
    subprocess.run(["git", "-C", clone, *update], check=True)
    os.environ |= {
        "GIT_CONFIG_COUNT": "1",
        "GIT_CONFIG_KEY_0": f"url.file://{clone}.insteadOf",
        "GIT_CONFIG_VALUE_0": f"https://github.com/{settings['user']}/{settings['repo']}",
    }


def run(path: Path, folder: Path) -> bool:
    "Whether every cell of a notebook runs, in a folder of its own."
    (folder / path.stem).mkdir()
    notebook = nbformat.read(path, as_version=4)
    resources = {"metadata": {"path": str(folder / path.stem)}}
    client = NotebookClient(notebook, timeout=1800, kernel_name="python3", resources=resources)
    start, failed = time.perf_counter(), None
    try:
        client.execute()
    except CellExecutionError as error:
        failed = str(error)
    print(f"{path.stem:20s} {time.perf_counter() - start:6.0f} s  {failed or 'ok'}", flush=True)
    return failed is None


def main() -> None:
    parser = ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("notebooks", nargs="+", type=Path)
    parser.add_argument("--wheel", help="installed first, with any extras in brackets")
    asked = parser.parse_args()
    before = installed()
    if asked.wheel:
        pip("install", "-q", asked.wheel)
    with TemporaryDirectory() as name:
        folder = Path(name)
        stand_in_for_github(folder)
        shutil.copytree(ROOT / "results", folder / "results")
        passed = []
        for path in asked.notebooks:
            passed.append(run(path, folder))
            if not asked.wheel and "po-book" not in before:
                # Colab has a new machine for every notebook.
                pip("uninstall", "-q", "-y", "po-book")
    after = installed()
    replaced = {x: (old, after.get(x)) for x, old in before.items() if after.get(x) != old}
    added = [f"{x}=={after[x]}" for x in after.keys() - before.keys()]
    print(f"{sum(passed)} of {len(passed)} notebooks ran; replaced: {replaced or 'nothing'};")
    print("added:", *(sorted(added) or ["nothing"]))
    sys.exit(not all(passed) or bool(replaced))


if __name__ == "__main__":
    main()
