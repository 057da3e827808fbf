"""Language models on a GPU: a GRPO step, what a T4 would hold, sampling, learning.

Run: python benchmarks/lm_gpu.py [--device cpu] [--small] [--record]

Four tables, kept after every line. A step of a Qwen2.5-0.5B with random weights, GRPO
without a reference: seconds of whole steps after the first, the most memory held, and what
`reckoning.py` says it should be. The same with a card limited to what a T4 has, beside what
a T4 should take. 64 completions by `sample` and by transformers' `generate`, which take
turns. And 25 million weights from scratch, on chains of six to twelve terms: fine-tuned
until half of the held-out problems are solved, then GRPO. `--device cpu` takes a model of
the same kind and a fiftieth of the weights, and so says how far off the reckoning is; its
tensors are counted one by one, which takes time. `--small` is to see that the script works.
"""

import gc
import random
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from statistics import median
from time import perf_counter

import torch
from cartpole_gpu import Plan, keep, put
from provenance import ROOT, Tensors
from reckoning import GIB, Card, Job, Shape, build, memory, seconds
from transformers import __version__ as transformers_version

from po_book.language_model import char_tokenizer, tiny_lm
from po_book.lm_learner import LMConfig, tiny_config
from po_book.sampling import sample
from po_book.tasks import ChainAddition, Task, sft, success_rate
from po_book.train_lm import train_lm

MIDDLE = Shape(hidden=256, layers=4, heads=8, kv_heads=2, intermediate=1408, vocabulary=16_384)
TINY = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocabulary=512)
VERSION = {"transformers": f"transformers {transformers_version}"}


class Words(Task):
    "Prompts of so many digits; what is answered does not matter."

    def __init__(self, length: int):
        self.length = length

    def draw(self, rng: random.Random) -> str:
        return "".join(rng.choices("123456789", k=self.length))

    def solution(self, prompt: str) -> str:
        return ""

    def verify(self, prompt: str, completion: str) -> bool:
        return False


def checksum(prompts: list, completions: list[str], **columns) -> list[float]:
    "A reward that differs within a group."
    return [sum(map(ord, text)) % 17 / 17 for text in completions]


def tokenizer_of(size: int):
    "A character a token, so many of them with `<pad>` and `<eos>`."
    letters = (chr(i) for i in range(0x21, 0x110000) if not 0xD800 <= i < 0xE000)
    return char_tokenizer("".join(next(letters) for _ in range(size - 2)))


def job_of(plan: Plan) -> Job:
    "What a step is asked: of a card, of a CPU, or next to nothing."
    if plan.small:
        return Job(TINY, prompts=2, group=2, prompt=8, new=4, micro_tokens=24)
    if plan.device == "cpu":
        return Job(MIDDLE, prompts=4, group=8, prompt=48, new=16, micro_tokens=1024)
    return Job()


def half_of(plan: Plan) -> str:
    "Float16 is what a T4 has, and what no CPU has."
    return "bf16" if plan.device == "cpu" else "fp16"


def held(device: str, act: Callable) -> tuple[object, list[str]]:
    "What `act` gives; the most GiB that its tensors took, and that a card had set aside."
    gc.collect()
    if device == "cpu":
        with Tensors() as tensors:
            given = act()
        return given, [f"{tensors.peak / GIB:.4f}", ""]
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    given = act()
    sizes = torch.cuda.max_memory_allocated() - before, torch.cuda.max_memory_reserved()
    return given, [f"{size / GIB:.3f}" for size in sizes]


def steps(job: Job, device: str, count: int) -> list[dict[str, float]]:
    "The log of a few steps, without the first."
    model = build(job.shape, job.precision, job.lora, device)
    config = LMConfig(
        steps=count + 1, prompts=job.prompts, group_size=job.group, max_new_tokens=job.new,
        micro_tokens=job.micro_tokens, precision=job.precision, recompute=job.recompute,
        minibatches=1, warmup=0,
    )  # fmt: skip
    asked = tokenizer_of(job.shape.vocabulary), Words(job.prompt), checksum
    log = train_lm(model, *asked, "dr-grpo", config, device=device, progress=False).log
    times = [b["seconds"] - a["seconds"] for a, b in zip(log, log[1:])]
    return [row | {"seconds": x} for row, x in zip(log[1:], times)]


def spread(times: list[float]) -> list[str]:
    "Median, lowest and highest."
    return [f"{x:.3g}" for x in (median(times), min(times), max(times))]


def line(name: str, columns: int, measure: Callable[[], list[str]]) -> list[str]:
    "A line of a table, also where a card says no."
    try:
        return [name, *measure()]
    except torch.cuda.OutOfMemoryError:
        said = "out of memory"
    except Exception as error:  # whatever a card, a driver or a library has to say
        said = f"failed: {type(error).__name__}: {error}".splitlines()[0]
    return [name, said, *[""] * (columns - 2)]


def step(job: Job, device: str, count: int) -> list[str]:
    "Seconds and memory of a step, and what was reckoned; of tensors alone."
    log, sizes = held(device, lambda: steps(job, device, count))
    sampling = median(row["seconds"] * row["sampling"] for row in log)
    times, reckoned = spread([row["seconds"] for row in log]), memory(job, context=0)["all"]
    return [*times, f"{sampling:.3g}", *sizes, f"{reckoned:.3f}"]


STEP = ["run", "s a step", "lowest", "highest", "s sampling", "GiB of tensors", "GiB reserved",
        "GiB reckoned"]


def ways(job: Job, half: str) -> list[Job]:
    "The same step in several ways."
    return [
        replace(job, precision=precision, lora=lora, recompute=recompute)
        for precision, lora, recompute in (
            ("float32", False, False), (half, False, False), (half, False, True),
            (half, True, False), (half, True, True),
        )
    ]  # fmt: skip


def step_lines(plan: Plan) -> Iterator[list[str]]:
    "A line for every way to make a step."
    for job in ways(job_of(plan), "bf16"):
        count = 3 if plan.device == "cuda" else 1
        yield line(job.name, len(STEP), lambda: step(job, plan.device, count))


T4 = ["run on a T4", "GiB of tensors", "GiB reserved", "GiB reckoned", "minutes of 100 steps reckoned"]


def limited(job: Job, device: str, card: Card) -> list[str]:
    "Whether two steps pass where a card has no more than a T4, and what they hold."
    whole = card.memory
    if device != "cpu":
        whole = torch.cuda.get_device_properties(0).total_memory / GIB
    reckoned = memory(job)
    share = min(1.0, (card.memory - reckoned["context"]) / whole)
    try:
        if device != "cpu":
            torch.cuda.set_per_process_memory_fraction(share)
        _, sizes = held(device, lambda: steps(job, device, 1))
    finally:
        if device != "cpu":
            torch.cuda.set_per_process_memory_fraction(1.0)
    minutes = 100 * sum(seconds(job, card)) / 60
    return [*sizes, f"{reckoned['all']:.3f}", f"{minutes:.3g}"]


def t4_lines(plan: Plan) -> Iterator[list[str]]:
    "A line for every way that may fit a T4."
    for job in ways(job_of(plan), half_of(plan))[2:]:
        yield line(job.name, len(T4), lambda: limited(job, plan.device, Card()))


SAMPLING = ["weights", "sampler", "s", "lowest", "highest", "over po_book's", "GiB of tensors"]


def samplers(job: Job, device: str) -> dict[str, Callable[[], object]]:
    "Two ways to the same number of tokens, which do not end before."
    model, tokenizer = build(job.shape, job.precision, job.lora, device), tokenizer_of(job.shape.vocabulary)
    if job.precision != "float32":
        model = model.bfloat16()
    asked = Words(job.prompt).prompts(job.prompts)
    repeated = [prompt for prompt in asked for _ in range(job.group)]
    inputs = tokenizer(repeated, return_tensors="pt").input_ids.to(device)
    options = dict(do_sample=True, top_k=0, max_new_tokens=job.new, min_new_tokens=job.new)
    real = torch.ones_like(inputs)
    return {
        "generate": lambda: model.generate(inputs, attention_mask=real, pad_token_id=0, **options),
        "po_book sample": lambda: sample(model, tokenizer, asked, job.group, job.new),
    }


def clocked(act: Callable[[], object], device: str) -> float:
    start = perf_counter()
    act()
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter() - start


def sampling_lines(plan: Plan) -> Iterator[list[str]]:
    "Two lines for every kind of weights."
    turns, whole = (1 if plan.small else 3), job_of(plan)
    whole = replace(whole, new=whole.new // 2)  # three kinds, two ways and four turns
    for precision, lora in (("float32", False), ("bf16", False), ("bf16", True)):
        job = replace(whole, precision=precision, lora=lora)
        ready, times, peaks = samplers(job, plan.device), {}, {}
        for name, act in ready.items():  # the first call prepares kernels
            _, (peaks[name], _) = held(plan.device, act)
        for _ in range(turns):
            for name, act in ready.items():
                times.setdefault(name, []).append(clocked(act, plan.device))
        ours = median(times["po_book sample"])
        for name, x in times.items():
            yield [job.name, name, *spread(x), f"{median(x) / ours:.2f}", peaks[name]]


CURVE = ["variant", "seed", "steps", "seconds", "success", "reward", "GiB"]


class Curve:
    "Success on held-out problems while a model learns, a row whenever it is looked at."

    def __init__(self, plan: Plan):
        self.plan, self.rows, self.start = plan, [], perf_counter()
        self.tokenizer = char_tokenizer()
        sizes = dict(width=32, layers=2, heads=2) if plan.small else dict(width=512, layers=8, heads=8)
        self.task = ChainAddition(2, 3) if plan.small else ChainAddition(6, 12)
        self.new = 12 if plan.small else 40
        self.model = tiny_lm(self.tokenizer, **sizes).to(plan.device)
        if plan.device == "cuda":
            torch.cuda.reset_peak_memory_stats()

    def add(self, variant: str, steps: int, success: float, reward: str = "") -> None:
        spent = perf_counter() - self.start
        most = f"{torch.cuda.max_memory_allocated() / GIB:.2f}" if self.plan.device == "cuda" else ""
        row = [variant, "0", str(steps), f"{spent:.1f}", f"{success:.3f}", reward, most]
        put(self.plan, f"lm_from_scratch_{self.plan.place}", CURVE, self.rows, row, **VERSION)

    def teach(self, most: int, look: int, until: float) -> None:
        "Fine-tune until half is solved, or the time is up."
        problems = self.task.prompts(50 if self.plan.small else 50_000)
        solutions = [self.task.solution(problem) for problem in problems]
        held_out = self.task.prompts(16 if self.plan.small else 256, seed=1, held_out=True)
        order, draws = torch.Generator().manual_seed(0), torch.Generator(self.plan.device).manual_seed(0)
        for done in range(look, most + 1, look):
            how = dict(steps=look, batch_size=128, lr=3e-4, generator=order)
            sft(self.model, self.tokenizer, problems, solutions, **how)
            success = success_rate(self.model, self.tokenizer, self.task, held_out, self.new, draws)
            self.add("fine-tuning", done, success)
            if success >= 0.5 or perf_counter() > until:
                return

    def reinforce(self, config: LMConfig) -> None:
        "GRPO as long as there is time."

        def report(row: dict[str, float]) -> bool:
            if "success" in row:
                self.add("GRPO", int(row["step"]), row["success"], f"{row['reward']:.3f}")
            return perf_counter() < self.plan.deadline

        asked = self.model, self.tokenizer, self.task, None, "grpo", config
        train_lm(*asked, device=self.plan.device, progress=False, report=report)


def from_scratch(plan: Plan) -> None:
    "Imitation first, then reward."
    if perf_counter() > plan.deadline:
        print("lm_from_scratch: no time was left for it")
        return
    curve = Curve(plan)
    half = (curve.start + plan.deadline) / 2
    curve.teach(*((4, 2) if plan.small else (3000, 250)), half)
    small = dict(steps=2, prompts=4, group_size=4, eval_every=1, eval_prompts=16)
    whole = dict(steps=100, prompts=64, eval_every=10, eval_prompts=256)
    curve.reinforce(tiny_config(**(small if plan.small else whole), max_new_tokens=curve.new))


def reckoned(plan: Plan) -> Iterator[list[str]]:
    "What a T4 should hold, by what holds it; nothing of it is measured."
    whole = job_of(replace(plan, device="cuda"))
    longer = replace(whole, new=2 * whole.new, precision="fp16", lora=True)
    for job in [*ways(whole, "fp16"), longer, replace(longer, prompts=1)]:
        parts, (drawn, learnt) = memory(job), seconds(job)
        name = f"{job.name}: {job.rows} of {job.new} tokens"
        yield [name, *(f"{parts[name]:.3g}" for name in PARTS), f"{drawn:.3g}", f"{learnt:.3g}"]


PARTS = ["weights", "moments", "gradients", "second gradient of the table", "weights in two bytes",
         "activations", "logits", "cache", "context", "all"]


def tried(what: str, act: Callable[[], object]) -> None:
    "An error ends one table, and the next is begun."
    try:
        act()
    except Exception as error:  # whatever a card, a driver or a library has to say
        print(f"{what}: failed: {type(error).__name__}: {error}")


def main(plan: Plan) -> None:
    "Every table, in the time there is; the first ones are worth most."
    columns = ["run on a T4", *PARTS, "s sampling", "s learning"]
    keep(plan, "lm_t4_reckoned", columns, reckoned(plan))
    keep(plan.share(0.35), f"lm_step_{plan.place}", STEP, step_lines(plan), **VERSION)
    if plan.place == "cpu" and not plan.small:  # no card to limit, and the rest would take a day
        return
    keep(plan.share(0.3), f"lm_t4_{plan.place}", T4, t4_lines(plan), **VERSION)
    part, name = plan.share(0.5), f"lm_sampling_{plan.place}"
    tried("lm_sampling", lambda: keep(part, name, SAMPLING, sampling_lines(plan), **VERSION))
    tried("lm_from_scratch", lambda: from_scratch(plan))


if __name__ == "__main__":
    words = sys.argv[1:]
    folder = ROOT / "results" if "--record" in words else None
    main(Plan("cpu" if "cpu" in words else "cuda", "--small" in words, folder))
