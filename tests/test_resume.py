"A run that is stopped, in any way, at any moment, ends as if it had not been."

import json
import random
import signal
import subprocess
import sys
import threading
import time
from dataclasses import dataclass, replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_runner import Trunk, TrunkConfig
from test_train import SMALL, Bandit

from po_book import runner, runs
from po_book.algorithm import Config
from po_book.batch import RewardScale
from po_book.checkpoint import load_checkpoint, restore
from po_book.rollout import spawn_seed
from po_book.runner import Diverged
from po_book.train import PPOConfig, load_run, resume, train

EVERY = dict(checkpoint_every=300, eval_every=500, eval_episodes=5)
CONFIGS = {name: replace(config, **EVERY) for name, config in SMALL.items()}


def env_of(algorithm: str) -> str:
    return "Pendulum-v1" if algorithm == "ddpg" else "CartPole-v1"


class Stop(Exception):
    pass


def stop_after(steps: int):
    "A report that stops the run, and lets everything else be."
    def report(row):
        if row["steps"] >= steps:
            raise Stop
    return report


def same(run, other) -> None:
    "Equal in weights, buffers and log, but for the clock."
    a, b = run.policy.state_dict(), other.policy.state_dict()
    assert a.keys() == b.keys() and all(torch.equal(a[key], b[key]) for key in a)
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in r.log] for r in (run, other)]
    assert logs[0] == logs[1]


def interrupted(algorithm, env, out, config, at=800):
    with pytest.raises(Stop):
        train(algorithm, env, config=config, out=out, progress=False, report=stop_after(at))
    kept = load_checkpoint(out / "checkpoint.pt")["log"][-1]["steps"]
    assert 300 <= kept <= at + 600


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_a_resumed_run_ends_bit_for_bit_like_an_uninterrupted_one(algorithm, tmp_path):
    env, config = env_of(algorithm), CONFIGS[algorithm]
    whole = train(algorithm, env, config=config, progress=False)
    interrupted(algorithm, env, tmp_path, config)
    same(resume(tmp_path, progress=False), whole)


@pytest.mark.parametrize("env", ["Acrobot-v1", "Pendulum-v1", "MountainCar-v0", "po_book/CartPole-v1"])
def test_any_environment_is_resumed_with_its_normaliser(env, tmp_path):
    config = replace(CONFIGS["ppo"], normalize_obs=True)
    whole = train("ppo", env, config=config, progress=False)
    interrupted("ppo", env, tmp_path, config)
    resumed = resume(tmp_path, progress=False)
    same(resumed, whole)
    assert resumed.policy.normalizer.count == resumed.steps


@pytest.mark.parametrize("algorithm", ["a2c", "trpo", "ppo"])
def test_a_run_is_resumed_with_its_scale_of_rewards(algorithm, tmp_path):
    config = replace(CONFIGS[algorithm], normalize_rewards=True)
    whole = train(algorithm, "Pendulum-v1", config=config, progress=False)
    interrupted(algorithm, "Pendulum-v1", tmp_path, config)
    same(resume(tmp_path, progress=False), whole)
    extra = {"reward_scale": RewardScale(config.n_envs, 0.5)}
    restore(extra, load_checkpoint(tmp_path / "checkpoint.pt")["learner"]["extra"])
    assert extra["reward_scale"].count == whole.steps and extra["reward_scale"].gamma == config.gamma


def test_environments_of_ones_own_are_resumed(tmp_path):
    "They have no id, so they are given again."
    def wrapped():
        return gym.wrappers.RecordEpisodeStatistics(gym.wrappers.TimeLimit(Bandit(), 7))

    config = CONFIGS["ppo"]
    whole = train("ppo", wrapped, config=config, progress=False)
    interrupted("ppo", wrapped, tmp_path, config)
    with pytest.raises(ValueError, match="without an id: give env"):
        resume(tmp_path)
    same(resume(tmp_path, env=wrapped, progress=False), whole)


def test_a_folder_has_what_was_asked_the_log_and_the_checkpoint(tmp_path):
    out = tmp_path / "runs" / "x"
    run = train("ppo", "CartPole-v1", seed=3, config=CONFIGS["ppo"], out=out, progress=False)
    assert {path.name for path in out.iterdir()} == {"run.json", "checkpoint.pt", "log.csv"}
    asked = json.loads((out / "run.json").read_text())
    assert (asked["algorithm"], asked["env"], asked["seed"]) == ("ppo", "CartPole-v1", 3)
    assert PPOConfig(**asked["config"] | {"hidden": (64, 64)}) == run.config
    lines = (out / "log.csv").read_text().splitlines()
    assert len(lines) == len(run.log) + 1 and lines[0].startswith("steps,seconds,return")
    loaded = load_run(out)
    same(loaded, run)
    assert loaded.finished and torch.equal(loaded.evaluate(5), run.evaluate(5))
    same(resume(out, progress=False), run)


def test_a_run_without_a_folder_is_the_same_run(tmp_path):
    with_folder = train("ppo", "CartPole-v1", config=CONFIGS["ppo"], out=tmp_path, progress=False)
    same(with_folder, train("ppo", "CartPole-v1", config=CONFIGS["ppo"], progress=False))


def test_a_folder_that_holds_another_run_is_refused_and_untouched(tmp_path):
    train("ppo", "CartPole-v1", config=CONFIGS["ppo"], out=tmp_path, progress=False)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    with pytest.raises(ValueError, match="holds a run already: resume it, or choose another"):
        train("a2c", "CartPole-v1", out=tmp_path, progress=False)
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir()}


def test_a_run_stopped_before_its_first_checkpoint_starts_again(tmp_path):
    config = CONFIGS["ppo"]
    with pytest.raises(Stop):
        train("ppo", "CartPole-v1", config=config, out=tmp_path, progress=False, report=stop_after(1))
    assert not (tmp_path / "checkpoint.pt").exists()
    with pytest.raises(ValueError, match="no checkpoint yet"):
        load_run(tmp_path)
    same(resume(tmp_path, progress=False), train("ppo", "CartPole-v1", config=config, progress=False))


@pytest.fixture
def finished(tmp_path):
    train("ppo", "CartPole-v1", config=CONFIGS["ppo"], out=tmp_path, progress=False)
    return tmp_path


@pytest.mark.parametrize(
    "text, message",
    [
        (None, "holds no run: there is no run.json"),
        ("{", "run.json is not of a run"),
        ("{}", "run.json is not of a run"),
        ('{"algorithm": "pqo"}', "run.json is not of a run: KeyError"),
    ],
)
@pytest.mark.parametrize("use", [resume, load_run])
def test_a_folder_that_holds_no_run(use, text, message, finished):
    path = finished / "run.json"
    path.unlink() if text is None else path.write_text(text)
    with pytest.raises(ValueError, match=message):
        use(finished)


@pytest.mark.parametrize("use", [resume, load_run])
def test_a_damaged_checkpoint_is_refused(use, finished):
    path = finished / "checkpoint.pt"
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)
    with pytest.raises(ValueError, match="checkpoint.pt is damaged"):
        use(finished)


def test_a_checkpoint_of_other_networks_is_refused(finished):
    path = finished / "run.json"
    asked = json.loads(path.read_text())
    asked["config"]["hidden"] = [8]
    path.write_text(json.dumps(asked))
    with pytest.raises(ValueError):
        load_run(finished)


def test_a_run_that_diverges_keeps_its_last_good_checkpoint(tmp_path):
    "Weights turn to NaN by hand after two checkpoints."
    def poison(row):
        if row["steps"] > 800:
            policy = sys._getframe(1).f_locals["run"].policy
            with torch.no_grad():
                policy.actor[-1].bias.fill_(torch.nan)

    with pytest.raises(Diverged, match="not finite") as caught:
        train("ppo", "CartPole-v1", config=CONFIGS["ppo"], out=tmp_path, progress=False, report=poison)
    assert "its last checkpoint is in" in caught.value.__notes__[-1]
    run = load_run(tmp_path)
    assert run.steps > 300 and all(p.isfinite().all() for p in run.policy.parameters())


class Opaque(Bandit):
    "Holds what cannot be captured, as a physics engine does."

    def __init__(self):
        super().__init__()
        self.engine = threading.Lock()


def test_environments_that_cannot_be_captured_start_new_episodes_and_say_so(tmp_path):
    with pytest.warns(UserWarning, match="engine is a lock, which cannot be captured: .*new episodes"):
        with pytest.raises(Stop):
            train("ppo", Opaque, config=CONFIGS["ppo"], out=tmp_path, progress=False, report=stop_after(800))
    run = resume(tmp_path, env=Opaque, progress=False)
    assert run.finished


class Noting(Opaque):
    "Pays 1 at each of its ten steps, and notes what it is seeded with."

    seeds: list

    def reset(self, *, seed=None, options=None):
        if seed is not None:
            self.seeds.append(seed)
        return super().reset(seed=seed, options=options)

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, 1.0, *rest


@pytest.mark.filterwarnings("ignore:.*cannot be captured")
def test_episodes_that_are_not_captured_start_anew_with_a_seed_of_their_own(tmp_path, monkeypatch):
    "And what was earned in those that are lost is forgotten: a return is ten, always."
    monkeypatch.setattr(Noting, "seeds", [], raising=False)
    asked = dict(config=CONFIGS["ppo"], out=tmp_path, progress=False)
    stopped = train("ppo", Noting, **asked, report=lambda row: row["steps"] < 800)
    Noting.seeds.clear()
    run = resume(tmp_path, env=Noting, progress=False)
    trained = [seed for seed in Noting.seeds]
    first, again = spawn_seed(0, "starts"), spawn_seed(0, "starts", stopped.steps)
    assert trained[:8] == [*range(first, first + 4), *range(again, again + 4)]
    assert {row["return"] for row in run.log if "return" in row} == {10.0}


KILLED = """
import sys, torch
torch.set_num_threads(1)
from po_book.train import PPOConfig, train
config = PPOConfig(total_steps=12_000, n_envs=4, n_steps=32, minibatch=64, epochs=2, checkpoint_every=256)
train("ppo", "CartPole-v1", seed=5, config=config, out=sys.argv[1], progress=False)
"""


def test_a_run_that_is_killed_again_and_again_ends_with_the_same_weights(tmp_path):
    "SIGKILL at random moments, resumed each time, here and in other processes."
    out, draw = tmp_path / "run", random.Random(0)
    first = [sys.executable, "-c", KILLED, str(out)]
    again = [sys.executable, "-c", "import sys; from po_book.train import resume; resume(sys.argv[1], progress=False)", str(out)]
    stops = []
    for command in first, again, again:
        process = subprocess.Popen(command)
        before = (out / "checkpoint.pt").stat().st_mtime_ns if stops else 0
        while not (out / "checkpoint.pt").exists() or (out / "checkpoint.pt").stat().st_mtime_ns == before:
            time.sleep(0.01)
            assert process.poll() is None
        time.sleep(draw.uniform(0, 0.3))
        process.send_signal(signal.SIGKILL)
        process.wait()
        stops.append(load_run(out).steps)
    assert stops == sorted(stops) and stops[-1] < 12_000
    config = PPOConfig(total_steps=12_000, n_envs=4, n_steps=32, minibatch=64, epochs=2, checkpoint_every=256)
    same(resume(out, progress=False), train("ppo", "CartPole-v1", seed=5, config=config, progress=False))
    assert np.all(np.diff([row["steps"] for row in load_run(out).log]) > 0)


def test_no_checkpoint_is_without_its_log(tmp_path, monkeypatch):
    "Whoever is killed between the two has the rows of both."
    seen = []

    def save(path, state):
        seen.append((len(runs.read_log(path.parent)), len(state["log"])))

    monkeypatch.setattr(runner, "save_checkpoint", save)
    train("ppo", "CartPole-v1", config=CONFIGS["ppo"], out=tmp_path, progress=False)
    assert len(seen) > 1 and all(rows == kept for rows, kept in seen)


def test_a_run_with_its_own_policy_is_resumed_with_it(tmp_path):
    config = CONFIGS["ppo"]
    with pytest.raises(Stop):
        train("ppo", "CartPole-v1", config=config, policy=Trunk, out=tmp_path, progress=False, report=stop_after(800))
    assert json.loads((tmp_path / "run.json").read_text())["own"] == ["policy"]
    for use in resume, load_run:
        with pytest.raises(ValueError, match="was trained with its own policy: give policy"):
            use(tmp_path)
    whole = train("ppo", "CartPole-v1", config=config, policy=Trunk, progress=False)
    same(resume(tmp_path, policy=Trunk(), progress=False), whole)
    same(load_run(tmp_path, policy=Trunk), whole)


@dataclass(frozen=True)
class OddConfig(TrunkConfig):
    "A subclass with fields of its own."

    pairs: tuple[tuple[int, float], ...] = ((1, 0.5), (2, 0.25))


def test_a_run_with_settings_of_a_subclass_is_resumed_with_them(tmp_path):
    config = OddConfig(**vars(CONFIGS["ppo"]) | {"hidden": (8, 8)})
    whole = train("ppo", "CartPole-v1", config=config, progress=False)
    stopped = train("ppo", "CartPole-v1", config=config, out=tmp_path, progress=False, report=lambda row: row["steps"] < 800)
    assert not stopped.finished
    for use in resume, load_run:
        with pytest.raises(ValueError, match="was trained with its own config: give config"):
            use(tmp_path)
    loaded = load_run(tmp_path, config=OddConfig)
    assert loaded.config == config and loaded.config.pairs == ((1, 0.5), (2, 0.25)) and loaded.config.hidden == (8, 8)
    same(resume(tmp_path, config=OddConfig, progress=False), whole)
    with pytest.raises(ValueError, match="config of ppo must be a PPOConfig, got Other"):
        load_run(tmp_path, config=dataclass(frozen=True)(type("Other", (Config,), {"__init__": lambda self, **kw: None})))


@pytest.mark.parametrize("algorithm", CONFIGS)
def test_a_run_that_its_report_stops_is_saved_and_goes_on(algorithm, tmp_path):
    env, config = env_of(algorithm), replace(CONFIGS[algorithm], checkpoint_every=10**6)
    stopped = train(algorithm, env, config=config, out=tmp_path, progress=False, report=lambda row, run, learner: run.steps < 700)
    assert 700 <= stopped.steps < 1500 and not stopped.finished
    same(load_run(tmp_path), stopped)
    same(resume(tmp_path, progress=False), train(algorithm, env, config=config, progress=False))


def test_a_run_on_a_vector_is_resumed_with_its_eval_env(tmp_path):
    def vector():
        return gym.make_vec("CartPole-v1", num_envs=4)

    config = CONFIGS["ppo"]
    train("ppo", vector(), eval_env="CartPole-v1", config=config, out=tmp_path / "a", progress=False, report=lambda row: False)
    assert resume(tmp_path / "a", env=vector(), progress=False).curve("mean_return")[0]
    train("ppo", vector(), eval_env=Bandit, config=replace(config, eval_every=0), out=tmp_path / "b", progress=False)
    with pytest.raises(ValueError, match="its own eval_env: give eval_env"):
        load_run(tmp_path / "b", env=vector())
    assert load_run(tmp_path / "b", env="CartPole-v1", eval_env="CartPole-v1").eval_env == "CartPole-v1"
