"What a record of training runs is, and how it is made: variants, seeds, rows."

import sys
from collections.abc import Callable, Iterator
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass
from itertools import product
from multiprocessing import get_context
from typing import Generic, TypeVar

from provenance import record

Settings = TypeVar("Settings")


@dataclass(frozen=True)
class Record(Generic[Settings]):
    "What is trained on, how many seeds, and the settings of each variant."

    place: object  # an environment, or a task
    seeds: int
    variants: dict[str, Settings]

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

    def write(self, name: str, rows: list[dict], **more: str) -> None:
        "results/NAME.csv with these rows, and results/NAME.json."
        columns = list(dict.fromkeys(key for row in rows for key in row))
        table = [[written(row.get(key, "")) for key in columns] for row in rows]
        seeds = f"seeds 0 to {self.seeds - 1}"
        record(name, columns, table, seeds=seeds, **more, settings=self.settings())


def written(x: object) -> str | int:
    "A number as it stands in a table."
    return x if isinstance(x, str | int) else f"{x:.4g}"


def asked(doc: str, records: dict[str, Record]) -> tuple[str, int]:
    "The name and the number of processes on the command line; leaves if they are wrong."
    if len(sys.argv) not in (2, 3) or sys.argv[1] not in records:
        sys.exit(f"{doc}\nNAME is one of: {', '.join(records)}")
    return sys.argv[1], int(sys.argv[2]) if len(sys.argv) == 3 else 1
