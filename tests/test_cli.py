import csv
import io
import json
import re
import resource
import signal
import subprocess
import sys
import time
from contextlib import suppress
from dataclasses import asdict, fields, is_dataclass, replace
from inspect import getsource
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from PIL import Image

import po_book.train
from po_book import cli, lm_job
from po_book.checkpoint import lock_folder
from po_book.cli import LANGUAGE, main
from po_book.credit import Group
from po_book.diagnose import diagnose
from po_book.language_model import char_tokenizer, tiny_lm
from po_book.lm_job import RowOptions, load_reward, load_task, read_language
from po_book.lm_learner import default_lm_config, tiny_config
from po_book.objective import PRESETS
from po_book.rollout import evaluate
from po_book.runs import log_to, record_episode, wandb_logger, write_events
from po_book.sampling import sample
from po_book.spaces import make_policy, make_q_policy
from po_book.terms import InLoss, Truncated
from po_book.tokens import Clip
from po_book.train import ALGORITHMS, default_config, load_run, train
from po_book.pretrained import load_lm
from po_book.train_lm import train_lm

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
                return re.sub(r"[$\\{}]", "", line.split("#")[1].strip())
    raise AssertionError(f"{config.__name__}.{name} has no comment")


# Help


def test_help_lists_the_commands_and_train_lists_the_algorithms(capsys):
    assert run("--help") == 0
    overview = capsys.readouterr().out
    assert all(name in overview for name in ("train", "evaluate", "plot", "diagnose", "resume"))
    assert run("train --help") == 0
    listed = capsys.readouterr().out
    for what, names in {"--env": ALGORITHMS, "--task": LANGUAGE}.items():
        assert all(f"• {name} Takes {what}" in words(listed) for name in names)


def test_presets_of_two_kinds_have_different_names():
    assert not set(ALGORITHMS) & set(LANGUAGE)
    assert set(PRESETS) - set(ALGORITHMS) - set(LANGUAGE) == {"ppo-kl"}


def settings(algorithm: str) -> list:
    "Everything that has fields which are flags."
    if algorithm in ALGORITHMS:
        return [default_config(algorithm, "")]
    preset = PRESETS[algorithm]
    parts = [x for x in vars(preset).values() if is_dataclass(x)]
    return [default_lm_config(algorithm), *parts, RowOptions()]


@pytest.mark.parametrize("algorithm", [*ALGORITHMS, *LANGUAGE])
def test_every_field_is_a_flag_with_its_comment_and_default(algorithm, capsys):
    assert run(f"train {algorithm} --help") == 0
    text = words(capsys.readouterr().out) + "--"
    for config, f in ((c, f) for c in settings(algorithm) for f in fields(c)):
        flag = re.escape(f.name.replace("_", "-"))
        entry = re.search(rf" --{flag}[, ].*?\(default: (.*?)\) (?=\S* ?options|--)", text)
        assert entry, f"--{f.name} is not in the help"
        if f.name not in ("kind", "how"):  # whose choices say it all
            assert comment_of(type(config), f.name) in entry[0]
        value = getattr(config, f.name)
        said = " ".join(map(str, value)) if isinstance(value, tuple) else str(value)
        assert entry[1] == said


@pytest.mark.parametrize("env, rate", [("CartPole-v1", "0.0035"), ("MountainCar-v0", "0.001")])
def test_help_shows_the_settings_of_the_environment(env, rate, capsys):
    assert run(f"train ppo --env {env} --help") == 0
    text = words(capsys.readouterr().out)
    assert re.search(rf"--lr [^-]*\(default: {rate}\)", text)
    assert default_config("ppo", env).lr == float(rate)


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


def test_the_command_line_imports_nothing_that_only_one_command_needs():
    code = "import sys, po_book.cli; print(*sys.modules)"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    loaded = set(done.stdout.split())
    heavy = {"tensorboard", "matplotlib", "transformers", "datasets"}
    assert "po_book.cli" in loaded and not heavy & loaded


# Train


def test_the_command_trains_what_the_function_trains(here, capsys):
    assert run(f"{TRAIN} --seed 3 --hidden 8 9 --no-anneal") == 0
    config = replace(
        default_config("ppo", "CartPole-v1"), total_steps=600, n_envs=4, n_steps=32, minibatch=64, epochs=2, eval_episodes=5,
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
    assert run(f"train --out x ppo --env CartPole-v1 {TINY} --total-steps 600") == 0
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
            step = int(row.pop("steps" if "steps" in row else "step"))
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
    assert len(shown["mean_return"]) >= 2
    assert_same_curves(shown, logged(trained))


def test_events_that_a_killed_process_left_behind_its_checkpoint_are_void(tmp_path):
    for first, last, value in (1, 5, 0.0), (3, 4, 1.0):
        report = write_events(tmp_path)
        for step in range(first, last + 1):
            report({"step": step, "reward": value})
    assert events(tmp_path)["reward"] == [(1, 0.0), (2, 0.0), (3, 1.0), (4, 1.0)]


def test_tensorboard_is_optional(here, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard", None)
    assert run(f"{TRAIN} --out x") == 0
    names = sorted(p.name for p in Path("x").iterdir())
    assert names == ["checkpoint.pt", "log.csv", "run.json"]


class Wandb:
    "A stand-in for the package, which keeps what it is told."

    def __init__(self):
        self.runs = []

    def init(self, **how):
        run = type("Run", (), {"how": how, "rows": []})()
        run.log = lambda numbers, step: run.rows.append((step, numbers))
        self.runs.append(run)
        return run


@pytest.fixture
def wandb(monkeypatch) -> Wandb:
    monkeypatch.setitem(sys.modules, "wandb", Wandb())
    return sys.modules["wandb"]


def test_weights_and_biases_gets_the_log_and_what_was_asked(here, wandb):
    assert run(f"{TRAIN} --out x --wandb sticks") == 0
    (started,) = wandb.runs
    config = started.how.pop("config")
    assert config["algorithm"] == "ppo" and config["n_envs"] == "4" and "seed" not in config
    assert started.how == {
        "project": "sticks", "name": "x", "dir": "x", "reinit": "finish_previous",
    }  # fmt: skip
    columns = {}
    for step, numbers in started.rows:
        for name, value in numbers.items():
            columns.setdefault(name, []).append((step, value))
    assert columns == logged(Path("x"))


def test_weights_and_biases_is_told_more_and_nothing_before_the_first_row(trained, wandb):
    logger = wandb_logger("sticks", trained, id="7", name="mine", resume="allow")
    assert not wandb.runs
    for step in 3, 5:
        logger({"step": step, "reward": step / 2})
    (started,) = wandb.runs
    assert started.rows == [(3, {"reward": 1.5}), (5, {"reward": 2.5})]
    more = {"id": "7", "name": "mine", "resume": "allow", "project": "sticks"}
    assert more.items() <= started.how.items()


def test_without_the_package_a_line_says_what_to_install_and_nothing_is_begun(
    here, monkeypatch, capsys
):
    monkeypatch.setitem(sys.modules, "wandb", None)
    assert run(f"{TRAIN} --out x --wandb sticks") == 1
    said = "po-book: Weights & Biases is not installed: pip install 'po-book[wandb]'\n"
    assert capsys.readouterr().err == said and not Path("x").exists()


def test_every_logger_gets_every_row():
    first, second = [], []
    log = log_to(first.append, None, second.append)
    log({"step": 1})
    log({"step": 2})
    assert first == second == [{"step": 1}, {"step": 2}]


# Stop and resume

LONG = f"train ppo --env CartPole-v1 {TINY} --total-steps 20000 --checkpoint-every 500"


def checkpoints() -> set[tuple[str, int]]:
    "What is whole, and when it was written."
    paths = [p for p in Path("a run").glob("checkpoint*") if p.suffix != ".part"]
    with suppress(FileNotFoundError):  # an old one goes when a new one is whole
        return {(p.name, p.stat().st_mtime_ns) for p in paths}
    return set()


def stopped(line: list[str], by: signal.Signals) -> tuple[int, str]:
    "Exit code and complaint of a command that is stopped after its next checkpoint."
    # A shell's background jobs ignore Ctrl-C, and so does all that they start.
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    process = subprocess.Popen([*PROCESS, *line], stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    before, patience = checkpoints(), time.monotonic() + 300
    while time.monotonic() < patience and checkpoints() <= before:
        time.sleep(0.005)
    process.send_signal(by)
    _, complaint = process.communicate(timeout=300)
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


def test_so_is_the_run_of_a_language_model(tiny, here):
    line = f"{LM} --model {tiny} {SMALL} --steps 60 --checkpoint-every 10"
    assert run(f"{line} --out whole") == 0
    code, _ = stopped([*line.split(), "--out", "a run"], signal.SIGKILL)
    assert code == -signal.SIGKILL and not Path("a run/model").exists()
    assert main(["resume", "a run"]) == 0
    assert torch.equal(weights(Path("a run/model")), weights(Path("whole/model")))
    for column in "reward", "kl", "grad_norm":
        assert logged(Path("a run"))[column] == logged(Path("whole"))[column]


def wait_for_checkpoint(process: subprocess.Popen, before: set) -> set[tuple[str, int]]:
    "The checkpoints, once there is a new one; the process must go on until then."
    patience = time.monotonic() + 300
    while time.monotonic() < patience and checkpoints() <= before:
        assert process.poll() is None
        time.sleep(0.01)
    return checkpoints()


@pytest.mark.parametrize("kind", ["policy", "language model"])
def test_a_run_that_another_process_trains_is_left_to_it(kind, tiny, here, capsys):
    "It has no end of its own, so however slow the machine is, it is still there."
    line = LONG.replace("20000", "1000000000")
    if kind == "language model":
        line = f"{LM} --model {tiny} {SMALL} --steps 1000000 --checkpoint-every 5"
    heed = partial(signal.signal, signal.SIGINT, signal.SIG_DFL)
    command = [*PROCESS, *line.split(), "--out", "a run"]
    first = subprocess.Popen(command, stderr=subprocess.PIPE, text=True, preexec_fn=heed)
    try:
        wait_for_checkpoint(first, set())
        owned = f"a run: another process is training in this folder (pid {first.pid})"
        owned += "; wait for its end, or stop it"
        held = "a run holds a run already: resume it, or choose another folder"
        said = {"policy": owned, "language model": held}[kind]
        seconds = {("resume", "a run"): owned, (*line.split(), "--out", "a run"): said}
        for second, said in seconds.items():
            assert main([*second]) == 1
            assert capsys.readouterr().err == f"po-book: {said}\n"
        wait_for_checkpoint(first, checkpoints())  # unharmed
        first.send_signal(signal.SIGINT)
        _, complaint = first.communicate(timeout=300)
    finally:
        first.kill()
    assert first.returncode == 130
    assert complaint == "po-book: interrupted; go on with: po-book resume 'a run'\n"
    assert not Path("a run/run.lock").exists()


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
        f"{load_run(trained).steps} transitions; fresh episodes: mean {returns.mean():.4g}, standard error {error:.2g}, "
        f"min {returns.min():.4g}, max {returns.max():.4g}, n=7\n"
    )


def test_evaluate_takes_the_most_likely_actions_if_asked(trained, capsys):
    assert run(f"evaluate {trained} --episodes 7 --seed 2 --deterministic") == 0
    policy = load_run(trained).policy
    likely, drawn = (evaluate(policy, "CartPole-v1", 7, 2, x).double() for x in (True, False))
    assert likely.mean() != drawn.mean()
    said = f"min {likely.min():.4g}, max {likely.max():.4g}, n=7\n"
    out = capsys.readouterr().out
    assert f"fresh episodes: mean {likely.mean():.4g}, standard" in out and out.endswith(said)


def test_an_episode_may_be_as_long_as_is_asked_and_no_longer(trained, here, capsys):
    longest = int(load_run(trained).evaluate(7, 2).max())  # a step pays one
    line = f"evaluate {trained} --episodes 7 --seed 2 --max-steps"
    assert run(f"{line} {longest}") == 0
    assert f"max {longest}," in capsys.readouterr().out
    assert run(f"{line} {longest - 1}") == 1
    do = "give the environment a time limit, or raise max_steps"
    said = f"po-book: an episode has not ended after {longest - 1} steps; {do}\n"
    assert capsys.readouterr().err == said


class Endless(gym.Env):
    "Time in seconds, which float32 cannot tell apart. It has no end."

    metadata = {"render_modes": ["rgb_array"], "render_fps": 50}
    observation_space = gym.spaces.Box(0, np.inf, (1,), np.float64)
    action_space = gym.spaces.Discrete(2)
    ends = np.inf

    def __init__(self, render_mode=None):
        self.render_mode = render_mode

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.t = 0
        return np.array([1.7e9]), {}

    def step(self, action):
        self.t += 1
        return np.array([1.7e9 + self.t]), float(action), self.t >= self.ends, False, {}

    def render(self):
        return np.full((4, 4, 3), self.t, dtype=np.uint8)


class Ending(Endless):
    "So has this."
    ends = 6


@pytest.fixture
def clocks():
    "Ids of an environment without an end, and of one with an end."
    ids = {"Endless-v0": Endless, "Ending-v0": Ending}
    for name, kind in ids.items():
        gym.register(name, kind)
    yield list(ids)
    for name in ids:
        gym.envs.registration.registry.pop(name)


def test_an_environment_without_an_end_is_refused(clocks, here, capsys):
    config = replace(default_config("ppo", "CartPole-v1"), total_steps=64, n_envs=2, n_steps=32, minibatch=64, epochs=1)
    train("ppo", "Endless-v0", config=config, out="x", progress=False)
    for more in "", " --video a.gif":
        assert run(f"evaluate x --episodes 2 --max-steps 50{more}") == 1
        assert "episode has not ended after 50 steps; give the" in capsys.readouterr().err
    assert not Path("a.gif").exists()


@pytest.mark.parametrize("deterministic", [False, True])
@pytest.mark.parametrize("normalizes", [False, True])
def test_the_film_shows_the_policy_what_the_evaluation_does(deterministic, normalizes, clocks, here):
    "Observations in the precision of training, and the actions that follow."
    env, made = gym.make_vec("Ending-v0"), torch.Generator().manual_seed(0)
    policy, seen = make_policy(env, (8,), made, normalize_obs=normalizes), []
    name = "distribution" if deterministic else "act"
    look = getattr(policy, name)

    def spy(obs, *rest):
        seen.append((obs.clone(), policy.training))
        return look(obs, *rest)

    setattr(policy, name, spy)
    record_episode(policy, "Ending-v0", Path("a.gif"), 3, deterministic)
    filmed, seen[:] = list(seen), []
    evaluate(policy, "Ending-v0", 1, 3, deterministic)
    dtype = torch.float64 if normalizes else torch.float32
    want = [torch.tensor([[1.7e9 + t]], dtype=torch.float64).to(dtype) for t in range(6)]
    for rows in filmed, seen:
        assert [(x.dtype, x.item(), mode) for x, mode in rows] == [
            (dtype, x.item(), False) for x in want
        ]
    with Image.open("a.gif") as video:
        assert [round(np.array(frame.convert("RGB")).mean()) for frame in frames(video)] == [*range(7)]


def frames(video):
    for i in range(video.n_frames):
        video.seek(i)
        yield video


def test_the_film_takes_the_most_likely_actions_if_asked(trained, here, monkeypatch):
    asked = []
    monkeypatch.setattr(cli, "record_episode", lambda *what, **how: asked.append((what[1:], how)))
    assert run(f"evaluate {trained} --episodes 1 --seed 4 --video a.gif --deterministic --max-steps 600") == 0
    assert asked == [(("CartPole-v1", Path("a.gif"), 4), {"deterministic": True, "max_steps": 600})]


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
    err = capsys.readouterr().err
    assert 'pip install "gymnasium[classic-control]"' in err
    assert "for videos: pip install 'po-book[video]'" in err and err.count("\n") == 1


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


def fake_lm_run(folder: str, rows: list[dict], beta: float = 0.04, **changes) -> None:
    fake_run(folder, rows, **changes)
    path = Path(folder, "run.json")
    asked = json.loads(path.read_text()) | {"algorithm": "grpo", "task": "countdown"}
    asked["objective"] = {"kl": {"is": "InLoss", "beta": beta}}
    path.write_text(json.dumps(asked))


ROWS = [{"steps": s, "return": s / 10, "mean_return": s / 5} for s in (100, 200, 300)]
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
    assert capsys.readouterr().out == "mean_return of 4 runs in x.svg\n"


def test_environments_are_told_if_there_are_several(here):
    fake_run("a", ROWS)
    fake_run("b", ROWS, env="F-v0")
    assert run("plot a b") == 0
    labels = [text for text in texts("curves.svg") if "(n=" in text]
    assert labels == ["ppo on E-v0 (n=1)", "ppo on F-v0 (n=1)"]


@pytest.mark.parametrize(
    "folders, key",
    [
        ("a", "mean_return"), ("a b", "return"), ("a --key return", "return"), ("c", "return"),
        ("d", "success"), ("d e", "reward"), ("e --key kl", "kl"),
    ],
)
def test_a_grade_is_drawn_where_every_run_has_it(folders, key, here):
    fake_run("a", ROWS)
    fake_run("b", UNSCORED, seed=1)
    fake_run("c", [{**row, "mean_return": None} for row in ROWS])
    rows = [{"step": s, "reward": s / 2, "kl": s, "success": s / 9} for s in (1, 2, 3)]
    fake_lm_run("d", rows)
    fake_lm_run("e", [{**row, "success": None} for row in rows], seed=1)
    assert run(f"plot {folders}") == 0
    over = "steps" if folders[0] in "de" else "transitions"
    assert {key, over} <= {*texts("curves.svg")}


def test_a_legend_tells_choices_of_an_objective_apart(here):
    rows = [{"step": s, "reward": s / 2} for s in (1, 2, 3)]
    fake_lm_run("a", rows)
    fake_lm_run("b", rows, beta=0.5)
    assert run("plot a b") == 0
    labels = [text for text in texts("curves.svg") if "(n=" in text]
    assert labels == ["grpo, beta=0.04 (n=1)", "grpo, beta=0.5 (n=1)"]


def test_a_picture_is_drawn_whole_or_stays_as_it_was(here, capsys):
    fake_run("a", ROWS)
    for name in "x.svg", "x.png", "x":
        assert run(f"plot a --out {name}") == 0
        before = Path(name).read_bytes()
        room = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (100, room[1]))
        try:
            assert run(f"plot a --out {name}") == 1
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, room)
        said = f"File too large; the file is as it was: '{name}'"
        assert capsys.readouterr().err == f"po-book: [Errno 27] {said}\n"
        assert Path(name).read_bytes() == before and not Path(f"{name}.part").exists()
    with Image.open("x") as picture:
        assert picture.format == "PNG"


def test_a_real_run_is_diagnosed(trained, capsys):
    assert run(f"diagnose {trained}") == 0
    said = capsys.readouterr().out
    assert said == f"{diagnose(trained)}\n" and "not looked for: dead groups (needs" in said
    assert run(f"diagnose {trained / 'log.csv'}") == 0
    assert capsys.readouterr().out == said


def test_a_real_run_is_plotted(trained, here):
    assert run(f"plot {trained} --key approx_kl --out curve.png") == 0
    with Image.open("curve.png") as picture:
        assert picture.format == "PNG"


# Language models

LM = "train grpo --task chain-addition"
SMALL = "--device cpu --prompts 2 --group-size 2 --max-new-tokens 4 --eval-prompts 8"
ONES = """
def ones(prompts, completions, **columns):
    return [text.count("1") + 0.1 * len(text) for text in completions]
"""


@pytest.fixture(scope="module")
def tiny(tmp_path_factory) -> Path:
    "A folder with a model of random weights, which is what `--model` takes."
    out = tmp_path_factory.mktemp("tiny")
    tokenizer = char_tokenizer()
    tiny_lm(tokenizer, width=16, layers=1, heads=2, context=32).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


@pytest.fixture(scope="module")
def spoke(tiny, tmp_path_factory) -> Path:
    "A finished run with a reward of the user's."
    folder = tmp_path_factory.mktemp("spoke")
    (folder / "mine.py").write_text(ONES)
    more = f"--reward {folder / 'mine.py'}:ones --beta 0.02 --seed 3 --warmup 0"
    line = f"{LM} --model {tiny} {SMALL} --steps 2 --eval-every 1 {more}"
    assert run(f"{line} --out {folder / 'run'}") == 0
    return folder / "run"


def weights(folder: Path) -> torch.Tensor:
    return torch.cat([p.detach().ravel() for p in load_lm(folder)[0].parameters()])


def test_the_command_trains_the_language_model_that_the_function_trains(spoke, tiny):
    config = tiny_config(
        steps=2, prompts=2, group_size=2, max_new_tokens=4, eval_prompts=8, eval_every=1,
        warmup=0,
    )  # fmt: skip
    objective = replace(PRESETS["grpo"], kl=InLoss(0.02))
    reward = load_reward(f"{spoke.parent / 'mine.py'}:ones")
    want = train_lm(
        *load_lm(tiny), load_task("chain-addition"), reward, objective, config, seed=3,
        device="cpu", progress=False,
    )  # fmt: skip
    same = torch.cat([p.detach().ravel() for p in want.model.parameters()])
    assert torch.equal(weights(spoke / "model"), same)
    assert not torch.equal(same, weights(tiny))
    assert [row["reward"] for row in want.log] == [v for _, v in logged(spoke)["reward"]]


def test_the_run_of_a_language_model_says_all_that_was_asked(spoke, tiny):
    asked = json.loads((spoke / "run.json").read_text())
    facts = {
        "algorithm": "grpo", "task": "chain-addition", "model": str(tiny), "seed": 3,
        "sft_steps": 400, "reward": [f"{spoke.parent / 'mine.py'}:ones"], "device": "cpu",
        "reward_weights": [], "lora": 0, "prompt_column": "prompt", "answer_column": "answer",
        "compare": "number", "extract": None, "held_out": None,
    }  # fmt: skip
    assert facts.items() <= asked.items()
    assert asked["objective"]["kl"] == {
        "is": "InLoss", "beta": 0.02, "kind": "k3", "corrected": False, "reset_every": 0,
    }  # fmt: skip
    assert asked["config"]["max_new_tokens"] == 4


def test_tensorboard_shows_the_log_of_a_language_model(spoke):
    shown = events(spoke)
    assert {step for step, _ in shown["success"]} == {1, 2}
    assert_same_curves(shown, logged(spoke))


def test_evaluate_grades_held_out_problems_and_shows_three(spoke, capsys):
    assert run(f"evaluate {spoke} --episodes 40 --seed 2") == 0
    first, *rows = capsys.readouterr().out.splitlines()
    model, tokenizer = load_lm(spoke / "model")
    task, order = load_task("chain-addition"), torch.Generator().manual_seed(2)
    prompts = task.prompts(40, 2, held_out=True)
    texts = sample(model, tokenizer, prompts, 1, 4, generator=order).texts(tokenizer)
    p = sum(map(task.verify, prompts, texts)) / 40
    error = (p * (1 - p) / 39) ** 0.5
    said = f"mean {p:.4g}, standard error {error:.2g}, n=40"
    assert first == f"2 steps; held-out problems: {said}"
    rewards = load_reward(f"{spoke.parent / 'mine.py'}:ones")(prompts, texts)
    assert rows == [
        f"{q!r} → {o!r}, reward {r:.4g}" for q, o, r in list(zip(prompts, texts, rewards))[:3]
    ]


def test_a_finished_run_of_a_language_model_is_resumed_without_a_change(spoke, capsys):
    before = (spoke / "log.csv").read_text(), weights(spoke / "model")
    assert run(f"resume {spoke}") == 0
    assert (spoke / "log.csv").read_text() == before[0]
    assert torch.equal(weights(spoke / "model"), before[1])
    assert "2 steps; held-out problems: mean" in capsys.readouterr().out


def test_without_a_model_a_tiny_one_is_taught_and_kept(here, capsys):
    line = f"{LM} {SMALL} --steps 1 --sft-steps 1 --seed 5"
    assert run(line) == 0
    out = Path("runs/grpo-chain-addition-5")
    start = weights(out / "start")
    tiny = torch.cat([p.detach().ravel() for p in tiny_lm(char_tokenizer(), seed=5).parameters()])
    assert start.shape == tiny.shape and not torch.equal(start, tiny)
    assert "a tiny one is taught, 1 steps" in capsys.readouterr().out
    assert run(f"resume {out}") == 0
    assert torch.equal(weights(out / "start"), start)


def test_problems_of_a_file_are_learned(tiny, here, capsys):
    problems = ({"prompt": f"{i}+1=", "answer": i + 1} for i in range(1, 60))
    Path("sums.jsonl").write_text("\n".join(map(json.dumps, problems)))
    assert run(f"train dr-grpo --task sums.jsonl --model {tiny} {SMALL} --steps 1") == 0
    assert "folder: runs/dr-grpo-sums-0" in capsys.readouterr().out
    assert run("resume runs/dr-grpo-sums-0") == 0


def test_choices_of_a_preset_are_read_back(tiny, here):
    more = "--low 0.1 --normalize --scale batch --entropy-coef 0.1 --gamma 1"
    line = f"train grpo-tis --cap 3 --task countdown --model {tiny} {SMALL} --steps 1 --out x"
    assert run(f"{line} {more}") == 2  # no discount in GRPO
    assert run(f"{line} {more.removesuffix(' --gamma 1')}") == 0
    objective = read_language(Path("x")).objective
    assert objective.trust == Clip(0.1) and objective.correction == Truncated(3)
    assert objective.advantage == Group("batch", normalize=True)
    assert objective.entropy_coef == 0.1 and objective.overlong == 0


def test_a_batch_without_a_signal_ends_in_a_line(tiny, here, capsys):
    Path("flat.py").write_text("def flat(prompts, completions): return [0] * len(prompts)")
    line = f"train dapo --task countdown --model {tiny} {SMALL} --max-draws 2"
    assert run(f"{line} --reward flat.py:flat") == 1
    err = capsys.readouterr().err
    assert "stopped after 0 steps" in err and err.count("\n") == 1


# Mistakes


def spoken_facts() -> dict[str, dict]:
    "What runs of a language model were asked: of this version, torn, and of others."
    task = cli.Language("grpo", PRESETS["grpo"], tiny_config(), "countdown", device="cpu")
    choices = vars(task.objective).items()
    objective = {k: asdict(x) if is_dataclass(x) else x for k, x in choices}
    asked = task.asked | {"config": asdict(task.config), "objective": objective}
    torn = {k: x for k, x in asked.items() if k != "model"}
    older = {k: x for k, x in asked["config"].items() if k != "recompute"}
    newer, other = asked["config"] | {"speed": 3}, {**objective["kl"], "rate": 0.1}
    del other["beta"]
    return {
        "spoken": asked, "torn": torn, "older": asked | {"config": older},
        "newer": asked | {"config": newer},
        "other": asked | {"objective": objective | {"kl": other}},
    }  # fmt: skip


@pytest.mark.parametrize(
    "line, code, complaint",
    [
        ("", 2, "Expected one of {train, evaluate, plot, diagnose, resume}"),
        ("fly", 2, "Available subcommands: train, evaluate, plot, diagnose, resume"),
        ("train ppa --env CartPole-v1", 2, "Available subcommands: reinforce, a2c"),
        ("train ppo", 2, "--env STR"),
        ("train ppo --env", 2, "--env"),
        ("train ppo --env E --lr high", 2, "Error parsing --lr"),
        ("train ppo --env E --gamma 1.5", 2, "gamma must be in [0, 1], got 1.5"),
        ("train ppo --env E --seed -1", 2, "seed must be in [0, 4294967296), got -1"),
        ("train ppo --env E --seed 4294967296", 2, "seed must be in [0, 4294967296)"),
        (f"{LM} --seed -1", 2, "seed must be in [0, 4294967296), got -1"),
        ("evaluate good --seed -1", 2, "seed must be in [0, 4294967296), got -1"),
        ("train ppo --env E --learning-rate 1", 2, "--learning-rate"),
        ("evaluate", 2, "folder of the run"),
        ("plot", 2, "give the folder of a run"),
        ("train ppo --env CartPol-v1", 1, "Did you mean: `CartPole`?"),
        ("train ppo --env nowhere:E-v0", 1, "No module named 'nowhere'"),
        ("train ppo --env CartPole-v1 --device abacus", 1, "use cpu or auto"),
        ("train ppo --env CartPole-v1 --out file", 1, "file"),
        ("train dqn --env Pendulum-v1", 1, "action space must be Discrete"),
        ("evaluate good --episodes 0", 2, "episodes must be at least 1, got 0"),
        ("evaluate nowhere", 1, "nowhere holds no run"),
        ("resume nowhere", 1, "nowhere holds no run"),
        ("resume strange", 1, "run.json is not of a run"),
        ("resume torn", 1, "torn/run.json must be of this version, got one whose Language differs in model"),
        ("evaluate torn", 1, "whose Language differs in model"),
        ("resume older", 1, "got one whose LMConfig differs in recompute"),
        ("resume newer", 1, "got one whose LMConfig differs in speed"),
        ("resume other", 1, "got one whose InLoss differs in beta, rate"),
        ("evaluate spoken", 1, "spoken holds no model yet: resume it"),
        ("evaluate spoken --video a.gif", 1, "video needs an environment, and spoken"),
        ("evaluate spoken --deterministic", 1, "deterministic needs an environment, and"),
        ("evaluate good --max-steps 0", 2, "max_steps must be at least 1, got 0"),
        ("train ppo --env CartPole-v1 --out file/r", 1, "Not a directory: a run needs"),
        (f"{LM} --out file/r", 1, "Not a directory: a run needs a folder"),
        (f"{LM} --steps 2.5", 2, "Error parsing --steps"),
        (f"{LM} --lr inf", 2, "lr must be in (0, inf), got inf"),
        (f"{LM} --temperature nan", 2, "temperature must be in (0, inf), got nan"),
        (f"{LM} --minibatches 3", 2, "minibatches must be a divisor of prompts 32, got 3"),
        ("train grpo", 2, "--task STR"),
        ("train grpo --env CartPole-v1", 2, "Unrecognized options: --env CartPole-v1"),
        ("train ppo --task countdown", 2, "Unrecognized options: --task countdown"),
        ("train dapo --task countdown --beta 1", 2, "--beta"),
        (f"{LM} --prompts 0", 2, "prompts must be positive, got 0"),
        (f"{LM} --device cuda:9", 1, "device cuda:9 is not there, use cpu or auto"),
        (f"{LM} --device abacus", 1, "use cpu or auto"),
        (f"{LM} --device cpu --precision fp16", 1, "precision must be bf16 or float32 on a CPU"),
        (f"{LM} --precision half", 2, "--precision"),
        (f"{LM} --top-p 2", 2, "top_p must be in (0, 1], got 2"),
        (f"{LM} --lora -1", 2, "lora must be at least 0, got -1"),
        (f"{LM} --reward r.py:f --reward r.py:g", 1, "--reward must be given once, with all its"),
        (f"{LM} --reward task --reward-weights 1 2", 1, "weights must be finite numbers, one a"),
        (f"{LM} --held-out one.jsonl", 1, "task chain-addition must be rows of data, to have held_out"),
        ("evaluate good --samples 2", 1, "samples needs a language model, and good has none"),
        ("evaluate good --samples 0", 2, "samples must be at least 1, got 0"),
        (f"{LM} --group-size 1", 1, "group_size must be at least 2, got 1"),
        (f"{LM} --out good", 1, "good holds a run already: resume it"),
        (f"{LM} --sft-steps 0", 1, "sft_steps must be at least 1, got 0"),
        (f"{LM} --model no/such/model", 1, "a name on the hub, got 'no/such/model'"),
        ("train grpo --task chess", 1, "a .jsonl file, FILE.py:function or module:function, got 'chess'"),
        ("train grpo --task no.jsonl", 1, "no.jsonl"),
        ("train grpo --task bad.jsonl", 1, "bad.jsonl, line 1 must be a JSON object"),
        ("train grpo --task one.jsonl", 1, "has too few"),
        ("train grpo --task words.jsonl", 1, "the tiny model does not know 'aot'"),
        (f"{LM} --reward file", 1, "reward must be FILE.py:function or module:"),
        (f"{LM} --reward no.py:f", 1, "reward no.py:f: there is no file no.py"),
        (f"{LM} --reward r.py:f", 1, "reward r.py:f: f is not there"),
        (f"{LM} --reward r.py:three", 1, "reward r.py:three: three is no function"),
        (f"{LM} --reward nowhere:f", 1, "No module named 'nowhere'"),
        ("plot nowhere", 1, "nowhere holds no run: there is no run.json"),
        ("plot unlogged", 1, "unlogged holds no log yet: there is no log.csv"),
        ("plot strange", 1, "run.json is not of a run"),
        ("plot short", 1, "a curve needs two values; short has 1 of mean_return"),
        ("plot short --key loss", 1, "0 of loss; its log has ['steps', 'return',"),
        ("plot empty", 1, "empty has 0 of return; its log has nothing"),
        ("plot uncounted", 1, "uncounted/log.csv must be a log with steps, got none"),
        ("plot good --out x.abc", 1, "abc"),
        ("diagnose", 2, "folder of a run, or a file with its log"),
        ("diagnose nowhere", 1, "nowhere holds no log yet: there is none of log.csv"),
        ("diagnose unlogged", 1, "unlogged holds no log yet: there is none of log.csv"),
        ("diagnose empty", 1, "source must be a log with some of approx_kl"),
        ("plot good --out no/x.svg", 1, "no/x.svg"),
    ],
)
def test_a_mistake_is_answered_without_a_traceback(line, code, complaint, here, capsys):
    Path("file").touch()
    Path("r.py").write_text("three = 3")
    Path("bad.jsonl").write_text("3")
    Path("one.jsonl").write_text('{"prompt": "1+1=", "answer": 2}')
    problems = ({"prompt": f"a{i}to", "answer": i} for i in range(99))
    Path("words.jsonl").write_text("\n".join(map(json.dumps, problems)))
    for name, facts in spoken_facts().items():
        Path(name).mkdir()
        Path(name, "run.json").write_text(json.dumps(facts))
    fake_run("good", ROWS)
    fake_run("short", ROWS[:1])
    fake_run("empty", [])
    fake_run("unlogged", ROWS)
    Path("unlogged", "log.csv").unlink()
    fake_run("uncounted", [{"return": 1}] * 2)
    fake_run("strange", ROWS)
    Path("strange", "run.json").write_text("[]")
    assert run(line) == code
    err = capsys.readouterr().err
    assert complaint in words(err)
    if code == 1:
        assert err.startswith("po-book: ") and err.count("\n") == 1


def test_a_video_that_is_no_gif_is_refused(trained, here, capsys):
    assert run(f"evaluate {trained} --video episode.mp4") == 1
    assert "video must be a path that ends in .gif, got episode.mp4" in capsys.readouterr().err


def test_a_run_that_diverges_says_how_far_it_came(here, capsys):
    assert run(f"{TRAIN} --lr 1e30 --out x") == 1
    err = capsys.readouterr().err
    assert "a smaller learning rate may help; ppo stopped after 0 transitions" in err
    assert err.count("\n") == 1


FACTS = {
    "seed": ["0", 1.5, None], "algorithm": [3, ["ppo"]], "device": [0], "config": [[], "x"],
}  # fmt: skip


@pytest.mark.parametrize("command", ["resume", "evaluate", "plot"])
@pytest.mark.parametrize("name, value", [(k, x) for k, xs in FACTS.items() for x in xs])
def test_a_fact_of_another_kind_is_named(name, value, command, here, capsys):
    fake_run("x", ROWS)
    path = Path("x", "run.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {name: value}))
    assert run(f"{command} x") == 1
    said = f"{name} in x/run.json must be of type {type(VALID[name]).__name__}, got {value!r}"
    assert capsys.readouterr().err == f"po-book: {said}\n"


VALID = {"seed": 0, "algorithm": "ppo", "device": "cpu", "config": {}}


@pytest.mark.parametrize("command", ["resume", "evaluate", "plot"])
@pytest.mark.parametrize("lost", [*VALID, "env"])
def test_a_fact_that_is_missing_is_named(lost, command, here, capsys):
    fake_run("x", ROWS)
    path = Path("x", "run.json")
    asked = json.loads(path.read_text())
    del asked[lost]
    path.write_text(json.dumps(asked))
    assert run(f"{command} x") == 1
    said = f"po-book: x/run.json is not of a run: KeyError('{lost}')\n"
    assert capsys.readouterr().err == said


@pytest.mark.parametrize("command", ["resume", "evaluate", "plot"])
@pytest.mark.parametrize("data", [b"", b'{"algorithm": "p', b"\xff\xfe\0", b"5"])
def test_a_damaged_record_of_what_was_asked_is_said(data, command, here, capsys):
    fake_run("x", ROWS)
    Path("x", "run.json").write_bytes(data)
    assert run(f"{command} x") == 1
    err = capsys.readouterr().err
    assert err.startswith("po-book: x/run.json is not of a run: ") and err.count("\n") == 1


def test_choices_of_an_unknown_form_are_drawn_all_the_same(here):
    fake_run("x", ROWS)
    path = Path("x", "run.json")
    path.write_text(json.dumps(json.loads(path.read_text()) | {"objective": "grpo"}))
    assert run("plot x") == 0


@pytest.mark.parametrize("encoding", ["utf-8", "cp1252", "ascii"])
def test_what_a_stream_cannot_show_is_replaced(encoding, spoke, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stdout", io.TextIOWrapper(raw, encoding, write_through=True))
    assert run(f"evaluate {spoke} --episodes 3") == 0
    arrow = "→" if encoding == "utf-8" else "?"
    assert raw.getvalue().decode(encoding).count(f"=' {arrow} '") == 3


def test_a_complaint_may_hold_any_letter(here, monkeypatch):
    raw = io.BytesIO()
    monkeypatch.setattr(sys, "stderr", io.TextIOWrapper(raw, "ascii", write_through=True))
    assert run("plot λ") == 1
    assert raw.getvalue() == b"po-book: ? holds no run: there is no run.json\n"


def test_a_model_is_not_taught_in_a_folder_where_another_process_trains(here, capsys):
    with lock_folder("x"):
        assert run(f"{LM} {SMALL} --steps 1 --sft-steps 1 --out x") == 1
        assert [p.name for p in Path("x").iterdir()] == ["run.lock"]
    assert "x: another process is training in this folder (pid" in capsys.readouterr().err


def test_a_model_that_was_taught_is_kept_whole_or_not_at_all(here, capsys):
    line = f"{LM} {SMALL} --steps 1 --sft-steps 1 --out x"
    room = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, room[1]))
    try:
        assert run(line) == 1
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, room)
    assert capsys.readouterr().err == "po-book: [Errno 27] File too large: 'x/start'\n"
    assert not list(Path("x").iterdir())


def test_the_tiny_model_is_that_of_the_seed_and_its_problems_come_in_its_order(here, monkeypatch):
    orders = []
    monkeypatch.setattr(lm_job, "sft", lambda *args, generator: orders.append((args, generator)))
    task = load_task("chain-addition")
    lm_job._teach(task, 7, 5, torch.device("cpu"), Path("start"))
    ((model, _, prompts, answers, steps), order), = orders
    want = tiny_lm(char_tokenizer(), seed=5)
    for x, y in zip(load_lm("start")[0].parameters(), want.parameters(), strict=True):
        assert torch.equal(x, y)
    assert steps == 7 and prompts == task.prompts(20_000, 5)
    assert answers == [task.solution(prompt) for prompt in prompts]
    same = torch.Generator().manual_seed(5)
    assert torch.equal(order.get_state(), same.get_state())
