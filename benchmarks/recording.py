"What a record of training runs is, and how it is made: variants, seeds, rows."

import csv
import json
import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from itertools import product
from multiprocessing import get_context
from pathlib import Path
from typing import Generic, TypeVar

from provenance import ROOT, provenance, record

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Record(Generic[Settings]):
    "What is trained on, how many seeds, and the settings of each variant."

    place: object  # an environment, or a task
    seeds: int
    variants: dict[str, Settings]

    def only(self, variant: str) -> "Record[Settings]":
        "One of the variants."
        return replace(self, variants={variant: self.variants[variant]})

    def settings(self) -> dict[str, dict]:
        "What the runs were made with, to be compared with what the code would do now."
        return {variant: asdict(settings) for variant, settings in self.variants.items()}

    def runs(self, one: Callable[..., list[dict]], processes: int) -> Iterator[list[dict]]:
        "`one(variant, seed)` for every variant and seed, each in a process of its own."
        wanted = list(product(self.variants, range(self.seeds)))
        # A fresh process for each: then the memory that it holds is the run's.
        context = get_context("spawn")
        with ProcessPoolExecutor(processes, context, max_tasks_per_child=1) as pool:
            jobs = [pool.submit(one, *x) for x in wanted]
            for job, words in zip(jobs, wanted):
                rows = job.result()
                print(*words, rows[-1], flush=True)
                yield rows

    def write(
        self, name: str, rows: list[dict], folder: Path = ROOT / "results", **more: object
    ) -> None:
        "results/NAME.csv with these rows, and results/NAME.json."
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = [[written(row.get(key, "")) for key in columns] for row in rows]
        more = dict(seeds=f"seeds 0 to {self.seeds - 1}", settings=self.settings()) | more
        record(name, columns, table, folder, **more)

    def add(
        self, name: str, rows: list[dict], folder: Path = ROOT / "results", **more: object
    ) -> None:
        "Write `rows` too, and what was recorded of other variants if there is a record."
        if not (folder / f"{name}.csv").exists():
            return self.write(name, rows, folder, **more)
        with open(folder / f"{name}.csv", newline="", encoding="utf-8") as file:
            others = [x for x in csv.DictReader(file) if x["variant"] not in self.variants]
        note = json.loads((folder / f"{name}.json").read_text(encoding="utf-8"))
        mine, now = " and ".join(self.variants), provenance()
        origin = {k: f"{note[k]} ({mine}: {x})" for k, x in now.items() if x != note[k]}
        settings = note["settings"] | self.settings()
        self.write(name, others + rows, folder, **more, **origin, settings=settings)


def written(x: object) -> str | int:
    "A number as it stands in a table."
    return x if isinstance(x, str | int) else f"{x:.4g}"


def asked(doc: str, records: dict[str, Record]) -> tuple:
    "Name, number of processes and variant, as far as given; leaves if they are wrong."
    name, *rest = sys.argv[1:] or [""]
    known = name in records and records[name].variants.keys() >= set(rest[1:])
    if len(rest) > 2 or not known:
        sys.exit(f"{doc}\nNAME is one of: {', '.join(records)}")
    return name, int(rest[0]) if rest else 1, *rest[1:]
