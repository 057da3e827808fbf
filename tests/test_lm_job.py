"What a run of a language model is asked in words: found, trained, read back, graded."

import json
import os
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from transformers import Qwen2Config

from po_book import lm_job
from po_book.checkpoint import check_asked
from po_book.cli import main
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.lm_job import (
    Language,
    RowOptions,
    add_adapters,
    grade_language,
    load_reward,
    load_task,
    outline,
    read_language,
)
from po_book.lm_learner import default_lm_config, tiny_config
from po_book.objective import PRESETS
from po_book.pretrained import is_peft, load_lm, save_lm
from po_book.sampling import sample
from po_book.tasks import ChainAddition, pass_at_k

SMALL = dict(steps=2, prompts=2, group_size=2, minibatches=1, max_new_tokens=4, eval_prompts=6)
REWARDS = """
def ones(prompts, completions, **columns):
    return [float(text.count("1")) for text in completions]

def longer(prompts, completions, **columns):
    return [float(len(text)) for text in completions]
"""
TASKS = """
from po_book.tasks import ChainAddition
rows = [{"q": f"{i}+1=", "a": f"so #### {i + 1}"} for i in range(1, 41)]
def plain(): return rows
def splits(): return {"train": rows[:30], "test": rows[30:]}
def fixed(): return ChainAddition(2, 2)
def nothing(): return None
class Short(ChainAddition): pass
"""
TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}="


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    Path("rewards.py").write_text(REWARDS)
    Path("tasks.py").write_text(TASKS)
    return tmp_path


def save_tiny(folder: str, template: str | None = None) -> None:
    tokenizer = char_tokenizer()
    tokenizer.chat_template = template
    save_lm(Path(folder), tiny_lm(tokenizer, width=16, layers=1, heads=2, context=32), tokenizer)


def write(path: str, rows: list[dict]) -> None:
    Path(path).write_text("\n".join(map(json.dumps, rows)))


def job(task: str = "chain-addition", **changes) -> Language:
    known = {"model": "tiny", "device": "cpu", "config": tiny_config(**SMALL)}
    words = {"objective": PRESETS["grpo"], "task": task} | known | changes
    return Language("grpo", **words)


def values(model) -> torch.Tensor:
    learning = [p for n, p in model.named_parameters() if p.requires_grad]
    return torch.cat([p.detach().ravel() for p in learning])


# Tasks

GSM = [{"question": f"{i}+1=", "solution": f"1 more than {i} #### {i + 1}"} for i in range(1, 41)]
BOXED = [{"prompt": f"{i}+1=", "answer": rf"3 \boxed{{\frac{{{i}}}{{2}}}}"} for i in range(1, 41)]
WORDS = [{"prompt": f"{i}+1=", "answer": f"Yes {i}."} for i in range(1, 41)]


@pytest.mark.parametrize(
    "rows, options, right, wrong",
    [
        (GSM, RowOptions("question", "solution", extract="hashes"), "#### 5.0", "5"),
        (GSM, RowOptions("question", "solution"), "it is 5", "#### 6"),
        (BOXED, RowOptions(compare="math", extract="boxed"), r"\boxed{2}", "2"),
        (WORDS, RowOptions(compare="text"), " yes  4", "no 4"),
    ],
)
def test_rows_are_read_as_the_options_say(rows, options, right, wrong, here):
    write("x.jsonl", rows)
    task = load_task("x.jsonl", options)
    assert sorted(task.training + task.held_out) == sorted(f"{i}+1=" for i in range(1, 41))
    assert task.verify("4+1=", right) and not task.verify("4+1=", wrong)


def test_a_second_file_is_held_out(here):
    write("x.jsonl", GSM[:30])
    write("y.jsonl", GSM[30:])
    task = load_task("x.jsonl", RowOptions("question", "solution", held_out="y.jsonl"))
    assert [len(task.training), len(task.held_out)] == [30, 10]
    assert {*task.held_out} == {row["question"] for row in GSM[30:]}


def test_a_function_gives_rows_splits_or_a_task(here, monkeypatch):
    options = RowOptions("q", "a", extract="hashes")
    plain, splits = (load_task(f"tasks.py:{x}", options) for x in ("plain", "splits"))
    assert len(plain.training + plain.held_out) == 40 and len(splits.held_out) == 10
    assert splits.verify("4+1=", "#### 5")
    assert load_task("tasks.py:fixed") == ChainAddition(2, 2)
    assert type(load_task("tasks.py:Short")).__name__ == "Short"
    monkeypatch.syspath_prepend(here)
    assert load_task("tasks:fixed") == ChainAddition(2, 2)
    assert load_task("po_book.tasks:Countdown") == load_task("countdown")


def test_a_data_set_of_the_library_is_rows(here):
    pytest.importorskip("datasets")
    Path("set.py").write_text(
        "from datasets import Dataset\n"
        "def sums(): return Dataset.from_list([{'q': f'{i}+1=', 'a': i} for i in range(40)])\n"
    )
    task = load_task("set.py:sums", RowOptions("q", "a"))
    assert len(task.training + task.held_out) == 40


@pytest.mark.parametrize(
    "name, options, said",
    [
        ("chess", {}, "task must be chain-addition, countdown, a .jsonl file, FILE.py:function"),
        ("no.jsonl", {}, "data must be a file, or rows, got the name 'no.jsonl'"),
        ("empty.jsonl", {}, "data must be at least one row, got none"),
        ("one.jsonl", {}, "has too few"),
        ("x.jsonl", {}, "x.jsonl, line 1 must be a row with a column 'prompt'"),
        ("x.jsonl", {"prompt_column": "question"}, "a row with a column 'answer'"),
        ("tasks.py:gone", {}, "task tasks.py:gone: gone is not there"),
        ("tasks.py:rows", {}, "task tasks.py:rows: rows is no function"),
        ("away.py:f", {}, "task away.py:f: there is no file away.py"),
        ("tasks.py:nothing", {}, "data must be a file or rows, got NoneType"),
        ("tasks.py:fixed", {"compare": "text", "held_out": "x"}, "to have compare, held_out, got"),
        ("countdown", {"extract": "boxed"}, "task countdown must be rows of data, to have extract"),
    ],
)
def test_what_is_no_task_is_said_before_a_model_is_there(name, options, said, here, monkeypatch):
    Path("empty.jsonl").touch()
    write("one.jsonl", [{"prompt": "1+1=", "answer": 2}])
    write("x.jsonl", GSM)
    monkeypatch.setattr(lm_job, "load_lm", None)  # whoever calls it fails
    monkeypatch.setattr(lm_job, "_teach", None)
    for model in "tiny", None:
        asked = job(name, rows=RowOptions(**options), model=model)
        with pytest.raises(ValueError) as refused:
            asked.start(Path("out"), progress=False)
        assert said in str(refused.value)
    assert not Path("out").exists()


@pytest.mark.parametrize(
    "task, place",
    [("countdown", "countdown"), ("a/sums.jsonl", "sums"), ("a/b.py:gsm", "gsm"), ("m:gsm", "gsm")],
)
def test_a_folder_is_named_after_what_is_learned(task, place):
    assert job(task).place == place


# Rewards


def test_rewards_are_added_with_their_weights(here):
    _, reward = job(reward=("rewards.py:ones", "rewards.py:longer", "task"), reward_weights=(1, 0.5, 4)).graded_by()
    texts = ["1,11", "3,8", "2"]
    assert reward(["3+8=", "3+5=", "1+1="], texts) == [3 + 2 + 4, 0 + 1.5 + 4, 0 + 0.5 + 4]


def test_one_reward_is_itself_and_none_is_refused(here):
    _, reward = job(reward=("rewards.py:ones",)).graded_by()
    assert reward.__name__ == "ones"
    for words in {"reward": ()}, {"reward_weights": (1.0, 2.0)}:
        with pytest.raises(ValueError, match="weights must be finite numbers, one a reward"):
            job(**words).start(Path("out"))


def test_a_file_is_run_once_unless_it_changes(here):
    Path("slow.py").write_text(REWARDS)
    done = [load_reward(f"slow.py:{name}") for name in ("ones", "longer", "ones")]
    assert done[0] is done[2] and done[0].__globals__ is done[1].__globals__
    Path("slow.py").write_text("def ones(prompts, completions): return [7.0] * len(prompts)")
    os.utime("slow.py", ns=(0, 0))
    assert load_reward("slow.py:ones")(["1="], ["1"]) == [7.0]


# Models


@pytest.fixture
def large(here) -> Path:
    "The configuration of a model with more than ten million weights, without any."
    size = dict(hidden_size=256, intermediate_size=512, num_hidden_layers=2)
    Qwen2Config(vocab_size=50_000, num_attention_heads=4, **size).save_pretrained("large")
    return here / "large"


def test_an_outline_has_the_weights_of_the_model(here):
    save_tiny("tiny")
    model, hollow = load_lm("tiny")[0], outline("tiny")
    shapes = [{n: p.shape for n, p in m.named_parameters()} for m in (model, hollow)]
    assert shapes[0] == shapes[1] and all(p.is_meta for p in hollow.parameters())
    assert outline(None) is None and outline("no/such/model") is None


def test_the_outline_of_adapters_is_that_of_their_model(here):
    save_tiny("tiny")
    model, tokenizer = load_lm("tiny")
    save_lm(Path("both"), add_adapters(model, 2), tokenizer)
    assert is_peft(outline("both")) and is_peft(outline("tiny", 2)) and not is_peft(outline("tiny"))


@pytest.mark.parametrize("name", ["grpo", "rloo"])
@pytest.mark.parametrize("lora, lr", [(0, "1e-06"), (4, "1e-05")])
def test_help_shows_the_settings_of_the_model(name, lora, lr, large, capsys):
    assert main(f"train {name} --model {large} --lora {lora} --help".split()) == 0
    text = " ".join(capsys.readouterr().out.replace("│", " ").split())
    want = default_lm_config(name, outline(str(large), lora))
    shown = {"lr": lr, "steps": "500", "max-new-tokens": "256", "micro-tokens": "8192"}
    shown |= {"minibatches": str(want.minibatches), "prompts": "16"}
    for flag, value in shown.items():
        assert f"(default: {value})" in text.split(f" --{flag} ")[1].split(" --")[0]
    assert want.lr == float(lr) and want.steps == 500


def test_a_run_gets_the_settings_of_its_model(large, monkeypatch):
    seen = []
    monkeypatch.setattr(Language, "start", lambda self, *rest, **how: seen.append(self.config))
    monkeypatch.setattr("po_book.cli._grade", lambda out: "")
    line = "train dapo --task countdown --device cpu"
    for more in "", f" --model {large}", f" --model={large} --lora=4 --lr 3e-5":
        assert main((line + more).split()) == 0
    pretrained = default_lm_config("dapo", outline(str(large)))
    assert seen == [default_lm_config("dapo"), pretrained, replace(pretrained, lr=3e-5)]


def linear_layers(model) -> set[str]:
    return {
        name.removeprefix("base_model.model.").removesuffix(".lora_A.default")
        for name, x in model.named_modules() if name.endswith("lora_A.default")
    }  # fmt: skip


def test_adapters_are_on_all_linear_layers_and_drawn_from_the_seed(here):
    save_tiny("tiny")
    state = torch.get_rng_state()
    plain = load_lm("tiny")[0]
    made = [add_adapters(load_lm("tiny")[0], 2, seed) for seed in (3, 3, 4)]
    assert torch.equal(torch.get_rng_state(), state)
    inside = {n for n, x in plain.named_modules() if isinstance(x, torch.nn.Linear)} - {"lm_head"}
    assert linear_layers(made[0]) == inside and len(inside) == 7
    assert torch.equal(values(made[0]), values(made[1]))
    assert not torch.equal(values(made[0]), values(made[2]))
    config = made[0].active_peft_config
    assert (config.r, config.lora_alpha) == (2, 4)
    ids = torch.tensor([[3, 4, 5]])
    assert torch.equal(made[0](input_ids=ids).logits, plain(input_ids=ids).logits)
    with pytest.raises(ValueError, match="lora must be 0 for a model that has adapters, got 2"):
        add_adapters(made[0], 2)


@pytest.mark.parametrize(
    "changes, said",
    [
        ({"device": "cuda:9"}, "device cuda:9 is not there, use cpu or auto"),
        ({"config": tiny_config(precision="fp16", **SMALL)}, "precision must be bf16 or float32"),
        ({"config": tiny_config(**SMALL | {"group_size": 1})}, "group_size must be at least 2"),
        ({"reward": ("rewards.py:gone",)}, "reward rewards.py:gone: gone is not there"),
        ({"lora": 2}, "lora needs peft, which is not installed: pip install 'po-book[peft]'"),
    ],
)
@pytest.mark.parametrize("model", ["tiny", None])
def test_what_cannot_be_is_said_before_a_model_is_there(changes, said, model, here, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    monkeypatch.setattr(lm_job, "load_lm", None)
    monkeypatch.setattr(lm_job, "_teach", None)
    with pytest.raises((ValueError, ImportError)) as refused:
        job(model=model, **changes).start(Path("out"), progress=False)
    assert said in str(refused.value) and not Path("out").exists()


def test_adapters_learn_are_saved_and_go_on_where_they_stopped(here):
    save_tiny("tiny")
    asked = job(lora=2, config=tiny_config(**SMALL | {"steps": 3}), reward=("rewards.py:longer",))
    whole = asked.start(Path("whole"), progress=False)
    assert is_peft(whole.model)
    asked.start(Path("out"), progress=False, report=lambda row: False)
    read_language(Path("out")).proceed(Path("out"), progress=False)
    saved = [load_lm(x)[0] for x in ("whole/model", "out/model")]
    assert torch.equal(values(saved[0]), values(whole.model))
    assert torch.equal(values(saved[0]), values(saved[1]))
    first = add_adapters(load_lm("tiny")[0], 2, 0)
    assert not torch.equal(values(first), values(saved[0]))
    sizes = [sum(p.numel() for p in m.parameters() if p.requires_grad) for m in (first, saved[0])]
    assert sizes[0] == sizes[1] < sum(p.numel() for p in load_lm("tiny")[0].parameters())
    assert "3 steps; held-out problems: mean" in grade_language(asked, Path("out"))


def test_adapters_of_the_tiny_model_are_found_from_another_folder(here, monkeypatch):
    asked = job(lora=2, model=None, sft_steps=1)
    asked.start(Path("out"), progress=False)
    Path("elsewhere").mkdir()
    monkeypatch.chdir("elsewhere")
    assert "2 steps" in grade_language(asked, here / "out")


# Messages


def spoken(path: str) -> None:
    write(path, [{"prompt": [{"role": "user", "content": f"{i}+1"}], "answer": i + 1} for i in range(40)])


def test_messages_are_asked_in_the_words_of_the_template(here):
    spoken("x.jsonl")
    save_tiny("tiny", TEMPLATE)
    asked = job("x.jsonl", reward=("task",))
    run = asked.start(Path("out"), progress=False)
    assert [row["step"] for row in run.log] == [1, 2]
    said = grade_language(asked, Path("out"))
    assert said.count("[{'role': 'user', 'content': '") == 3 and "n=" in said


@pytest.mark.parametrize(
    "model, said", [("tiny", "chat_template must be set for messages"), (None, "prompts must be texts: give model, got a list")]
)  # fmt: skip
def test_messages_without_a_template_are_refused_before_training(model, said, here, monkeypatch):
    spoken("x.jsonl")
    save_tiny("tiny")
    monkeypatch.setattr(lm_job, "train_lm", None)
    with pytest.raises(ValueError, match=said):
        job("x.jsonl", model=model).start(Path("out"), progress=False)
    assert not Path("out/run.json").exists()


# What the run is told, and reads back


def test_everything_that_is_asked_reaches_the_run_and_comes_back(here, monkeypatch):
    save_tiny("tiny")
    write("x.jsonl", GSM[:30])
    write("y.jsonl", GSM[30:])
    seen, precisions = [], []

    def drawn(*what, **how):
        seen.append(how)
        return sample(*what, **how)

    def learn(*what, **how):
        precisions.append(what[5].precision)
        return train(*what, **how)

    train = lm_job.train_lm
    monkeypatch.setattr("po_book.train_lm.sample", drawn)
    monkeypatch.setattr("po_book.lm_job.sample", drawn)
    monkeypatch.setattr(lm_job, "train_lm", learn)
    law = "--temperature 0.7 --top-k 5 --top-p 0.9 --min-p 0.01 --stop 7 ,9 --sample-batch 1"
    rows = "--prompt-column question --answer-column solution --extract hashes --held-out y.jsonl"
    more = "--precision bf16 --recompute --micro-tokens 40 --lora 2 --reward task rewards.py:ones"
    size = "--steps 2 --prompts 2 --group-size 2 --minibatches 1 --max-new-tokens 4 --eval-prompts 6"
    line = f"train grpo --task x.jsonl --model tiny --device cpu {law} {rows} {more} {size}"
    assert main([*line.split(), "--reward-weights", "1", "-0.5", "--out", "out"]) == 0
    asked = read_language(Path("out"))
    config = tiny_config(
        **SMALL, temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, stop=("7", ",9"), sample_batch=1,
        precision="bf16", recompute=True, micro_tokens=40, vocabulary=18, overlong_cache=0,
    )  # fmt: skip
    assert asked == job(
        "x.jsonl", config=config, lora=2, reward=("task", "rewards.py:ones"), reward_weights=(1.0, -0.5),
        rows=RowOptions("question", "solution", extract="hashes", held_out="y.jsonl"),
    )  # fmt: skip
    want = dict(temperature=0.7, top_k=5, top_p=0.9, min_p=0.01, stop=("7", ",9"), at_once=1)
    assert len(seen) == 3 and all(want.items() <= how.items() for how in seen)
    assert main(["resume", "out"]) == 0 and precisions == ["bf16", "bf16"]


@pytest.mark.parametrize(
    "changes, name",
    [({"lora": 4}, "lora"), ({"model": "b"}, "model"), ({"reward_weights": (2.0,)}, "reward_weights"),
     ({"rows": RowOptions(compare="text")}, "compare"), ({"reward": ("x:y",)}, "reward")],
)  # fmt: skip
def test_a_run_of_which_something_else_is_asked_is_not_gone_on_with(changes, name, here):
    save_tiny("tiny")
    job(lora=2).start(Path("out"), progress=False)
    check_asked(Path("out"), job(lora=2).asked)
    with pytest.raises(ValueError, match=f"^{name} must be"):
        check_asked(Path("out"), job(**{"lora": 2} | changes).asked)


# Grades


def test_a_grade_follows_the_law_of_the_run_and_its_error_is_over_problems(here):
    save_tiny("tiny")
    law = dict(temperature=0.5, top_k=6, top_p=0.95)
    config = tiny_config(**SMALL | {"steps": 1, "max_new_tokens": 6}, stop=("+",), **law)
    Path("odd.py").write_text(
        "from po_book.tasks import ChainAddition\n"
        "class Odd(ChainAddition):\n"
        "    def verify(self, prompt, completion): return completion.count('1') % 2 == 1\n"
    )
    asked = job("odd.py:Odd", config=config, reward=("rewards.py:longer",))
    asked.start(Path("out"), progress=False)
    first, *rows = grade_language(asked, Path("out"), 40, 5, seed=2).splitlines()
    (model, tokenizer), task = load_lm("out/model"), load_task("odd.py:Odd")
    prompts = task.prompts(40, 2, held_out=True)
    order = torch.Generator().manual_seed(2)
    drawn = sample(model, tokenizer, prompts, 5, 6, **law, stop=("+",), generator=order)
    texts = drawn.texts(tokenizer)
    right = torch.tensor([text.count("1") % 2 == 1 for text in texts]).view(40, 5)
    share = right.double().mean(1)
    error = (share.var() / 40).sqrt()
    some = right.any(1).double()
    assert 0 < share.mean() < 1 and error > 0
    assert first == (
        f"1 steps; held-out problems: mean {share.mean():.4g}, standard error {error:.2g}, "
        f"pass@5 {some.mean():.4g}, standard error {(some.var() / 40).sqrt():.2g}, n=40"
    )
    assert pass_at_k(right, 5).mean == pytest.approx(some.mean().item(), abs=1e-12)
    shown = list(zip(prompts, texts[::5]))[:3]
    assert rows == [f"{q!r} → {o!r}, reward {len(o)}" for q, o in shown]


def test_no_problem_of_data_is_asked_twice(here):
    save_tiny("tiny")
    write("x.jsonl", [{"prompt": f"{i}+1=", "answer": i + 1} for i in range(1, 41)])
    asked = job("x.jsonl")
    asked.start(Path("out"), progress=False)
    held = len(load_task("x.jsonl").held_out)
    assert 1 < held < 20 and grade_language(asked, Path("out"), 100).splitlines()[0].endswith(f"n={held}")


# Several processes


def launched(*line: str) -> subprocess.CompletedProcess:
    "The command in two processes."
    start = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    command = [sys.executable, *start, "-m", "po_book.cli", *line]
    quick = os.environ | {"OMP_NUM_THREADS": "1"}
    return subprocess.run(command, capture_output=True, text=True, timeout=300, env=quick)


LINE = (
    "train grpo --task chain-addition --device cpu --prompts 2 --group-size 2 --minibatches 1 "
    "--max-new-tokens 4 --eval-prompts 6 --steps 2 --sft-steps 1 --lora 2 --out out"
).split()  # fmt: skip


def test_two_processes_are_one_run_and_one_of_them_speaks(here):
    done = launched(*LINE)
    assert done.returncode == 0, done.stderr[-3000:]
    said = done.stdout.splitlines()
    assert said[:2] == ["folder: out", "no model given: a tiny one is taught, 1 steps"]
    assert said[2].startswith("2 steps; held-out problems: mean ") and len(said) == 6
    assert {p.name for p in Path("out").iterdir() if "events" not in p.name} == {
        "checkpoint-00000002", "log.csv", "model", "run.json", "start",
    }  # fmt: skip
    assert {p.name for p in Path("out/checkpoint-00000002").glob("process-*")} == {
        "process-0.pt", "process-1.pt",
    }  # fmt: skip
    before = Path("out/log.csv").read_text()
    assert len(before.splitlines()) == 3
    again = launched(*LINE)
    held = "po-book: out holds a run already: resume it, or choose another folder"
    assert again.returncode == 1 and held in again.stderr and "taught" not in again.stdout
    assert Path("out/log.csv").read_text() == before


def test_an_error_in_one_process_ends_both(here):
    save_tiny("tiny")
    Path("bad.py").write_text(
        "import os\n"
        "def bad(prompts, completions, **columns):\n"
        "    if os.environ['RANK'] == '1': raise ValueError('the second has none')\n"
        "    return [float(len(text)) for text in completions]\n"
    )
    done = launched(*LINE, "--model", "tiny", "--reward", "bad.py:bad")
    assert done.returncode == 1
    assert "po-book: the second has none; reward function bad failed on row 0" in done.stderr
    assert not Path("out/model").exists() and not Path("out/run.lock").exists()
