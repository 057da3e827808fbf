import csv
import json
import re
import signal
import subprocess
import sys
import time
from dataclasses import fields
from inspect import getsource
from functools import partial
from pathlib import Path

import gymnasium as gym
import pytest
import torch
from PIL import Image

import po_book.train
from po_book.cli import main, record_episode
from po_book.rollout import evaluate, make_policy, make_q_policy
from po_book.train import ALGORITHMS, PPOConfig, default_config, load_run, train

TINY = "--device cpu --n-envs 4 --n-steps 32 --minibatch 64 --epochs 2"
TRAIN = f"train ppo --env CartPole-v1 {TINY} --total-steps 600 --eval-episodes 5"
ENTRY = "import sys; from po_book.cli import main; sys.exit(main())"
PROCESS = [sys.executable, "-c", ENTRY]


def run(line: str) -> int:
    return main(line.split())


@pytest.fixture
def here(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "trained"
    assert run(f"{TRAIN} --eval-every 200 --out {out}") == 0
    return out


def words(text: str) -> str:
    "Help without its frame and line breaks."
    return re.sub(r"[\s│─╭╮╰╯]+", " ", text)


def comment_of(config: type, name: str) -> str:
    "What stands beside the field in the nearest class that says something."
    for base in config.__mro__:
        for line in getsource(base).splitlines() if base is not object else []:
            if line.startswith(f"    {name}: ") and "#" in line:
                return line.split("#")[1].strip()
    raise AssertionError(f"{config.__name__}.{name} has no comment")


# Help


def test_help_lists_the_commands_and_train_lists_the_algorithms(capsys):
    assert run("--help") == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in ("train", "evaluate", "plot", "resume"))
    assert run("train --help") == 0
    listed = capsys.readouterr().out
    assert all(name in listed for name in ALGORITHMS)


@pytest.mark.parametrize("algorithm", ALGORITHMS)
def test_every_field_is_a_flag_with_its_comment_and_default(algorithm, capsys):
    assert run(f"train {algorithm} --help") == 0
    text = words(capsys.readouterr().out) + "--"
    config = default_config(algorithm, "CartPole-v1")
    for f in fields(config):
        flag = re.escape(f.name.replace("_", "-"))
        entry = re.search(rf" --{flag}[, ].*?\(default: (.*?)\) (?=--)", text)
        assert entry, f"--{f.name} is not in the help"
        assert comment_of(type(config), f.name) in entry[0]
        value = getattr(config, f.name)
        said = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert entry[1] == said


def test_an_option_of_train_is_explained_too(capsys):
    run("train ppo --help")
    text = words(capsys.readouterr().out)
    assert "--env STR id of an environment (required)" in text
    assert "--seed INT of weights, environments and actions (default: 0)" in text


def test_defaults_are_those_of_the_environment(monkeypatch, capsys):
    monkeypatch.setitem(po_book.train.PRESETS, ("ppo", "CartPole-v1"), {"lr": 0.0625})
    run("train ppo --env CartPole-v1 --help")
    assert "(default: 0.0625)" in capsys.readouterr().out
    run("train ppo --env=Acrobot-v1 --help")
    assert "(default: 0.0625)" not in capsys.readouterr().out


def test_the_command_line_imports_neither_tensorboard_nor_matplotlib():
    code = "import sys, po_book.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    assert "po_book.cli" in loaded and not {"tensorboard", "matplotlib"} & loaded


# Train


def test_the_command_trains_what_the_function_trains(here, capsys):
    assert run(f"{TRAIN} --seed 3 --hidden 8 9 --no-anneal") == 0
    config = PPOConfig(
        total_steps=600, n_envs=4, n_steps=32, minibatch=64, epochs=2, eval_episodes=5,
        hidden=(8, 9), anneal=False,
    )  # fmt: skip
    want = train("ppo", "CartPole-v1", seed=3, config=config, progress=False)
    got = load_run("runs/ppo-CartPole-v1-3")
    assert got.config == config and got.seed == 3
    for x, y in zip(got.policy.parameters(), want.policy.parameters(), strict=True):
        assert torch.equal(x, y)
    out = capsys.readouterr().out
    assert "folder: runs/ppo-CartPole-v1-3" in out
    assert f"{want.steps} transitions" in out
    assert f"mean {want.evaluate(5).mean():.4g}," in out


def test_options_may_stand_before_the_algorithm(here):
    assert run(f"train --env CartPole-v1 --out x ppo {TINY} --total-steps 600") == 0
    assert load_run("x").algorithm == "ppo"


def test_a_slash_in_an_id_makes_no_folder(here):
    assert run(TRAIN.replace("CartPole-v1", "po_book/CartPole-v1")) == 0
    assert [p.name for p in Path("runs").iterdir()] == ["ppo-po_book-CartPole-v1-0"]


def test_a_folder_with_a_run_is_left_alone(trained, capsys):
    before = {p: p.read_bytes() for p in trained.iterdir()}
    assert run(f"{TRAIN} --out {trained}") == 1
    assert "holds a run already: resume it" in capsys.readouterr().err
    assert {p: p.read_bytes() for p in trained.iterdir()} == before


# Events


def events(folder: Path) -> dict[str, list[tuple[int, float]]]:
    "What TensorBoard shows."
    module = "tensorboard.backend.event_processing.event_accumulator"
    accumulator = pytest.importorskip(module).EventAccumulator(str(folder))
    accumulator.Reload()
    tags = accumulator.Tags()["scalars"]
    return {tag: [(e.step, e.value) for e in accumulator.Scalars(tag)] for tag in tags}


def logged(folder: Path) -> dict[str, list[tuple[int, float]]]:
    "The columns of log.csv."
    columns = {}
    with open(folder / "log.csv", newline="") as file:
        for row in csv.DictReader(file):
            step = int(row.pop("steps"))
            for name, value in row.items():
                if value:
                    columns.setdefault(name, []).append((step, float(value)))
    return columns


def assert_same_curves(got: dict, want: dict) -> None:
    assert got.keys() == want.keys()
    for name in want:
        (steps, values), (want_steps, want_values) = zip(*got[name]), zip(*want[name])
        assert steps == want_steps
        assert values == pytest.approx(want_values, 1e-6)


def test_tensorboard_shows_the_log(trained):
    shown = events(trained)
    assert len(shown["score"]) >= 2
    assert_same_curves(shown, logged(trained))


def test_tensorboard_is_optional(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(f"{TRAIN} --out x") == 0
    names = sorted(p.name for p in Path("x").iterdir())
    assert names == ["checkpoint.pt", "log.csv", "run.json"]


# Stop and resume

LONG = f"train ppo --env CartPole-v1 {TINY} --total-steps 20000 --checkpoint-every 500"


def stopped(line: list[str], by: signal.Signals) -> tuple[int, str]:
    "Exit code and complaint of a command that is stopped after its next checkpoint."
    # A shell's background jobs ignore Ctrl-C, and so does all that they start.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*PROCESS, *line], stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    checkpoint, patience = Path("a run", "checkpoint.pt"), time.monotonic() + 60
    written = checkpoint.stat().st_mtime_ns if checkpoint.exists() else 0
    while time.monotonic() < patience:
        if checkpoint.exists() and checkpoint.stat().st_mtime_ns > written:
            break
        time.sleep(0.005)
    process.send_signal(by)
    _, complaint = process.communicate(timeout=60)
    return process.returncode, complaint


def test_a_run_that_is_interrupted_and_killed_and_resumed_is_the_run(here):
    assert main([*LONG.split(), "--out", "whole"]) == 0
    interrupted = stopped([*LONG.split(), "--out", "a run"], signal.SIGINT)
    hint = "po-book: interrupted; go on with: po-book resume 'a run'\n"
    assert interrupted == (130, hint)
    killed = stopped(["resume", "a run"], signal.SIGKILL)
    assert killed == (-signal.SIGKILL, "")
    assert not load_run("a run").finished
    # A new process, as in life: event files of one second are not in order.
    subprocess.run([*PROCESS, "resume", "a run"], check=True)

    got, want = load_run("a run").policy, load_run("whole").policy
    for x, y in zip(got.parameters(), want.parameters(), strict=True):
        assert torch.equal(x, y)
    assert_same_curves(events(Path("a run")), logged(Path("a run")))


def test_a_finished_run_is_resumed_without_a_change(trained, capsys):
    before = {p: p.read_bytes() for p in trained.iterdir()}
    assert run(f"resume {trained}") == 0
    assert {p: p.read_bytes() for p in trained.iterdir()} == before
    assert f"{load_run(trained).steps} transitions" in capsys.readouterr().out


# Evaluate


def test_evaluate_says_what_the_returns_are(trained, capsys):
    assert run(f"evaluate {trained} --episodes 7 --seed 2") == 0
    returns = load_run(trained).evaluate(7, 2).double()
    error = returns.std() / 7**0.5
    assert capsys.readouterr().out == (
        f"mean {returns.mean():.4g}, standard error {error:.2g}, "
        f"min {returns.min():.4g}, max {returns.max():.4g}, n=7\n"
    )


def test_one_episode_has_no_standard_error(trained, capsys):
    assert run(f"evaluate {trained} --episodes 1") == 0
    assert "standard error nan" in capsys.readouterr().out


def test_the_video_of_a_run_is_an_animated_gif(trained, here):
    assert run(f"evaluate {trained} --episodes 1 --video episode.gif") == 0
    with Image.open("episode.gif") as video:
        assert video.format == "GIF" and video.n_frames > 1


@pytest.mark.parametrize("make", [make_policy, make_q_policy])
def test_the_video_has_a_frame_for_every_state_of_the_evaluated_policy(make, here):
    "Equal neighbours are one frame shown longer, so the durations are counted."
    policy = make(gym.make_vec("CartPole-v1"), (8,), torch.Generator().manual_seed(0))
    record_episode(policy, "CartPole-v1", Path("episode.gif"), seed=1)
    assert policy.training
    steps = evaluate(policy, lambda: gym.make("CartPole-v1"), 1, seed=1).item()
    with Image.open("episode.gif") as video:
        shown = 0
        for i in range(video.n_frames):
            video.seek(i)
            shown += video.info["duration"]
    assert shown == 20 * (steps + 1)


def test_a_video_of_tensors_is_refused(here):
    policy = make_policy(gym.make_vec("CartPole-v1"), (8,))
    with pytest.raises(ValueError, match="po_book/CartPole-v1 draws no pictures"):
        record_episode(policy, "po_book/CartPole-v1", Path("episode.gif"))


def test_a_missing_pygame_is_named(trained, here, monkeypatch, capsys):
    monkeypatch.setitem(sys.modules, "pygame", None)
    assert run(f"evaluate {trained} --video episode.gif") == 1
    assert 'pip install "gymnasium[classic-control]"' in capsys.readouterr().err


# Plot


def fake_run(folder: str, rows: list[dict], seed: int = 0, **changes) -> None:
    asked = {"algorithm": "ppo", "seed": seed, "device": "cpu", "env": "E-v0"}
    config = {"lr": 0.003, "hidden": [8]}
    for name, value in changes.items():
        (asked if name in asked else config)[name] = value
    Path(folder).mkdir()
    Path(folder, "run.json").write_text(json.dumps(asked | {"config": config}))
    with open(Path(folder, "log.csv"), "w", newline="") as file:
        table = csv.DictWriter(file, dict.fromkeys(k for row in rows for k in row))
        table.writeheader()
        table.writerows(rows)


ROWS = [{"steps": s, "return": s / 10, "score": s / 5} for s in (100, 200, 300)]
UNSCORED = [{"steps": s, "return": s / 10} for s in (100, 200, 300)]


def texts(svg: str) -> list[str]:
    "matplotlib draws letters as shapes and leaves each text in a comment."
    return re.findall(r"<!-- (.*?) -->", Path(svg).read_text())


def test_runs_that_differ_only_in_their_seed_are_one_line(here, capsys):
    fake_run("a", ROWS, seed=0)
    fake_run("b", ROWS, seed=1)
    fake_run("c", ROWS, lr=0.01)
    fake_run("d", ROWS, algorithm="dqn", lr=0.5)
    assert run("plot a b c d --out x.svg") == 0
    labels = [text for text in texts("x.svg") if "(n=" in text]
    assert labels == ["ppo, lr=0.003 (n=2)", "ppo, lr=0.01 (n=1)", "dqn (n=1)"]
    assert "E-v0" in texts("x.svg")
    assert capsys.readouterr().out == "score of 4 runs in x.svg\n"


def test_environments_are_told_if_there_are_several(here):
    fake_run("a", ROWS)
    fake_run("b", ROWS, env="F-v0")
    assert run("plot a b") == 0
    labels = [text for text in texts("curves.svg") if "(n=" in text]
    assert labels == ["ppo on E-v0 (n=1)", "ppo on F-v0 (n=1)"]


@pytest.mark.parametrize(
    "folders, key",
    [("a", "score"), ("a b", "return"), ("a --key return", "return"), ("c", "return")],
)
def test_the_score_is_drawn_where_every_run_has_it(folders, key, here):
    fake_run("a", ROWS)
    fake_run("b", UNSCORED, seed=1)
    fake_run("c", [{**row, "score": None} for row in ROWS])
    assert run(f"plot {folders}") == 0
    assert key in texts("curves.svg")


def test_a_real_run_is_plotted(trained, here):
    assert run(f"plot {trained} --key approx_kl --out curve.png") == 0
    with Image.open("curve.png") as picture:
        assert picture.format == "PNG"


# Mistakes


@pytest.mark.parametrize(
    "line, code, complaint",
    [
        ("", 2, "Expected one of {train, evaluate, plot, resume}"),
        ("fly", 2, "Available subcommands: train, evaluate, plot, resume"),
        ("train ppa --env CartPole-v1", 2, "Available subcommands: reinforce, a2c"),
        ("train ppo", 2, "--env STR"),
        ("train ppo --env", 2, "--env"),
        ("train ppo --env E --lr high", 2, "Error parsing --lr"),
        ("train ppo --env E --gamma 1.5", 2, "gamma must be in [0, 1], got 1.5"),
        ("train ppo --env E --learning-rate 1", 2, "--learning-rate"),
        ("evaluate", 2, "folder of the run"),
        ("plot", 2, "give the folder of a run"),
        ("train ppo --env CartPol-v1", 1, "Did you mean: `CartPole`?"),
        ("train ppo --env nowhere:E-v0", 1, "No module named 'nowhere'"),
        ("train ppo --env CartPole-v1 --device abacus", 1, "use cpu or auto"),
        ("train ppo --env CartPole-v1 --out file", 1, "file"),
        ("train dqn --env Pendulum-v1", 1, "action space must be Discrete"),
        ("evaluate nowhere", 1, "nowhere holds no run"),
        ("resume nowhere", 1, "nowhere holds no run"),
        ("plot nowhere", 1, "nowhere has nothing to plot: no run.json"),
        ("plot unlogged", 1, "unlogged has nothing to plot: no log.csv"),
        ("plot strange", 1, "run.json is not of a run"),
        ("plot short", 1, "a curve needs two values; short has 1 of score"),
        ("plot short --key loss", 1, "0 of loss; its log has ['steps', 'return',"),
        ("plot empty", 1, "empty has 0 of return; its log has nothing"),
        ("plot good --out x.abc", 1, "abc"),
        ("plot good --out no/x.svg", 1, "no/x.svg"),
    ],
)
def test_a_mistake_is_answered_without_a_traceback(line, code, complaint, here, capsys):
    Path("file").touch()
    fake_run("good", ROWS)
    fake_run("short", ROWS[:1])
    fake_run("empty", [])
    fake_run("unlogged", ROWS)
    Path("unlogged", "log.csv").unlink()
    fake_run("strange", ROWS)
    Path("strange", "run.json").write_text("[]")
    assert run(line) == code
    err = capsys.readouterr().err
    assert complaint in words(err)
    if code == 1:
        assert err.startswith("po-book: ") and err.count("\n") == 1


@pytest.mark.parametrize("line", ["--video episode.mp4", "--episodes 0"])
def test_a_wrong_value_of_evaluate_is_named(line, trained, here, capsys):
    assert run(f"evaluate {trained} {line}") == 1
    assert line.split()[0].strip("-") in capsys.readouterr().err


def test_a_run_that_diverges_says_how_far_it_came(here, capsys):
    assert run(f"{TRAIN} --lr 1e30 --out x") == 1
    err = capsys.readouterr().err
    assert "a smaller learning rate may help; ppo stopped after 0 transitions" in err
    assert err.count("\n") == 1
