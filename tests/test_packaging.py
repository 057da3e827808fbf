"The wheel, alone in a new environment, as a user installs it."

import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import venv
from email import message_from_bytes
from zipfile import ZipFile

import pytest
from conftest import ROOT

MODULES = """
import importlib, pkgutil, sys, po_book
graded = set()
for module in pkgutil.iter_modules(po_book.__path__):
    try:
        importlib.import_module(f"po_book.{module.name}")
    except ImportError as error:
        assert "pip install 'po-book[grade]'" in str(error), error
        graded.add(module.name)
kinds = "foundation", "control", "lm", "group", "training", "practice"
assert graded == {"exercise", "grade", *(f"{x}_exercises" for x in kinds)}, graded
unwanted = {"nbdev", "fastcore", "execnb", "pytest", "jupyter_book"} & set(sys.modules)
assert not unwanted, unwanted
"""


README = (ROOT / "README.md").read_text(encoding="utf-8")
(INSTALLED,) = re.findall(r"^pip install \"\.(.*)\"$", README, re.M)


def run(*command, **kwargs):
    environment = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}
    result = subprocess.run(
        list(map(str, command)), capture_output=True, text=True, env=environment, **kwargs
    )
    assert result.returncode == 0, result.stdout + result.stderr
    return result


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    folder = tmp_path_factory.mktemp("wheel")
    # From a copy: a build/ left over in the checkout would end up in the wheel.
    for name in "pyproject.toml", "settings.ini", "setup.py", "README.md", "LICENSE":
        shutil.copy(ROOT / name, folder)
    shutil.copytree(ROOT / "po_book", folder / "po_book")
    run(sys.executable, "-m", "build", "--wheel", "--no-isolation", "-o", folder, folder)
    (wheel,) = folder.glob("*.whl")
    return wheel


@pytest.fixture(scope="module")
def python(wheel, tmp_path_factory):
    "Python of an environment with the wheel, what it asks for, and the README's extra."
    folder = tmp_path_factory.mktemp("installed")
    venv.create(folder / "venv", with_pip=True)
    python = folder / "venv" / "bin" / "python"
    locked = ROOT / "requirements-dev.txt"
    run(python, "-m", "pip", "install", "-q", "--no-compile", "-c", locked, f"{wheel}{INSTALLED}")
    return python


def read_metadata(wheel):
    with ZipFile(wheel) as files:
        (name,) = (n for n in files.namelist() if n.endswith(".dist-info/METADATA"))
        return message_from_bytes(files.read(name))


def test_the_extras_are_those_that_the_readme_names(wheel):
    metadata = read_metadata(wheel)
    line = next(x for x in README.splitlines() if x.startswith("Extras"))
    extras = set(metadata.get_all("Provides-Extra"))
    assert extras == {
        "video", "box2d", "peft", "data", "math", "tensorboard", "wandb", "agents", "demos",
        "grade", "dev",
    }  # fmt: skip
    assert extras - {"dev"} == set(re.findall("`(.*?)`", line))
    asked = [x for x in metadata.get_all("Requires-Dist") if "extra == " in x]
    packages = {
        extra: [re.split(r"[;>\s]", x)[0] for x in asked if re.search(f"extra == .{extra}.", x)]
        for extra in extras - {"dev"}
    }
    assert packages == {
        "video": ["pygame-ce"], "box2d": ["gymnasium[box2d]"], "peft": ["peft"],
        "data": ["datasets"], "math": ["math-verify"],
        "tensorboard": ["tensorboard"], "wandb": ["wandb"], "agents": ["pettingzoo", "mpe2"],
        "demos": ["altair"], "grade": ["hypothesis"],
    }  # fmt: skip


def test_what_a_message_tells_to_install_is_an_extra(wheel):
    told = set()
    for path in (ROOT / "po_book").glob("*.py"):
        told |= set(re.findall(r"pip install 'po-book\[(\w+)\]'", path.read_text("utf-8")))
    extras = read_metadata(wheel).get_all("Provides-Extra")
    assert {"video", "wandb", "math"} <= told <= set(extras)


def test_every_module_imports_without_development_dependencies(python, tmp_path):
    run(python, "-c", MODULES, cwd=tmp_path)


def test_the_example_of_the_readme_solves_cartpole(python, tmp_path):
    example, _ = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    printed = run(python, "-c", example, cwd=tmp_path).stdout
    assert float(re.search(r"tensor\((.*)\)", printed)[1]) >= 475


def test_the_other_example_teaches_a_language_model(python, tmp_path):
    "With fewer steps."
    _, example = re.findall(r"```python\n(.*?)```", README, re.DOTALL)
    short = example.replace("steps=400", "steps=2").replace(
        'objective="grpo")', 'objective="grpo", config=tiny_config(steps=1, prompts=4))'
    )
    assert short.count("steps=2") == short.count("tiny_config") == 1
    code = "from po_book.lm_learner import tiny_config\nrun = " + short[short.rindex("train_lm(") :]
    code = short[: short.rindex("train_lm(")] + code + "\nprint(run.log)"
    assert "'reward'" in run(python, "-c", code, cwd=tmp_path).stdout


def test_importing_the_package_is_free(python, tmp_path):
    code = "import po_book, sys; assert po_book.__version__; assert 'torch' not in sys.modules"
    run(python, "-c", code, cwd=tmp_path)


def test_the_commands_of_the_readme_work(python, tmp_path):
    "With a shorter training."
    commands = [shlex.split(line, comments=True) for line in re.findall(r"^po-book .*", README, re.M)]
    names = ["train", "resume", "evaluate", "plot", "train", "train"]
    assert [words[1] for words in commands] == names
    commands[0] += ["--total-steps", "3000"]
    commands[4] += ["--sft-steps", "2", "--steps", "1", "--prompts", "4"]
    own = " ".join(commands[5]).replace("NAME", "runs/grpo-chain-addition-0/model")
    assert own.count(" --lora 16") == 1  # for which peft would have to be installed
    commands[5] = shlex.split(own.replace(" --lora 16", ""))
    commands[5] += ["--steps", "1", "--prompts", "2", "--max-new-tokens", "8"]
    sums = [{"prompt": f"{a}+{b}=", "answer": a + b} for a in range(1, 10) for b in range(1, 10)]
    (tmp_path / "sums.jsonl").write_text("\n".join(map(json.dumps, sums)))
    (tmp_path / "mine.py").write_text(
        "def f(prompts, completions, **columns): return [float(len(x)) for x in completions]"
    )
    said = [run(python.parent / words[0], *words[1:], cwd=tmp_path).stdout for words in commands]
    assert "transitions; fresh episodes: mean" in said[0] and said[0] == said[1]
    assert "fresh episodes: mean" in said[2] and (tmp_path / "episode.gif").exists()
    assert (tmp_path / "curves.svg").exists()
    assert "held-out" in said[4] and "1 steps; held-out" in said[5]
