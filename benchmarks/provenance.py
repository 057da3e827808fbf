"Tables of results; where, when and with what they were made; the memory it took."

import csv
import json
import os
import platform
import subprocess
import weakref
from collections.abc import Iterable
from datetime import date
from pathlib import Path

import gymnasium
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

ROOT = Path(__file__).parent.parent


def provenance() -> dict[str, str]:
    "Where, when and with what; `dirty` marks a commit whose code was changed since."

    def git(*words: str) -> str:
        command = ["git", "-C", str(ROOT), *words]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout

    changed = git("status", "--porcelain", "--", "po_book", "benchmarks")
    commit = git("rev-parse", "--short", "HEAD").strip() + ("-dirty" if changed else "")
    cpu = f"CPU ({platform.machine()}, {os.cpu_count()} cores)"
    gpu = torch.cuda.is_available()
    return {
        "device": torch.cuda.get_device_name() if gpu else cpu,
        "python": f"Python {platform.python_version()}",
        "torch": f"torch {torch.__version__}",
        "gymnasium": f"gymnasium {gymnasium.__version__}",
        "date": date.today().isoformat(),
        "commit": f"commit {commit}",
    }


def record(
    name: str,
    columns: list[str],
    rows: Iterable[list],
    folder: Path = ROOT / "results",
    **more: object,
) -> None:
    "Write NAME.csv, and NAME.json with the provenance and `more`."
    folder.mkdir(exist_ok=True)
    with open(folder / f"{name}.csv", "w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(columns)
        writer.writerows(rows)
    note = json.dumps(provenance() | more, indent=2)
    (folder / f"{name}.json").write_text(note + "\n", encoding="utf-8")


def peak_mb() -> float:
    "The most memory that this process has held, in MB (Linux)."
    # ru_maxrss would not do: a process starts with that of the one that made it.
    status = Path("/proc/self/status").read_text(encoding="utf-8")
    line = next(x for x in status.splitlines() if x.startswith("VmHWM"))
    return int(line.split()[1]) / 1024


class Tensors(TorchDispatchMode):
    "Bytes of the tensors made since it was entered that are alive, and their peak."

    def __init__(self):
        super().__init__()
        self.alive, self.now, self.peak = set(), 0, 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        given = func(*args, **(kwargs or {}))
        for x in tree_leaves(given):
            if isinstance(x, torch.Tensor):
                self._watch(x.untyped_storage())
        self.peak = max(self.peak, self.now)
        return given

    def _watch(self, storage: torch.UntypedStorage) -> None:
        key, size = storage._cdata, storage.nbytes()
        if key not in self.alive:
            self.alive.add(key)
            self.now += size
            weakref.finalize(storage, self._free, key, size)

    def _free(self, key: int, size: int) -> None:
        self.alive.remove(key)
        self.now -= size
