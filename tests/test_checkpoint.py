import errno
import io
import math
import multiprocessing
import os
import pickle
import random
import stat
import subprocess
import sys
import threading
from collections import OrderedDict, deque
from enum import Enum
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium import wrappers
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch import nn

from po_book import checkpoint
from po_book.checkpoint import (
    NotCapturable, capture, load_checkpoint, lock_folder, replace_file, restore,
    check_asked, save_checkpoint, write_asked, write_table,
)  # fmt: skip
from po_book.rollout import collect, make_stepper
from po_book.learner import flatten_parameters
from po_book.spaces import make_q_policy
from po_book.value_based import Replay


@pytest.fixture
def through_file(tmp_path):
    "A captured state on its way through a file."

    def way(x):
        save_checkpoint(tmp_path / "a.ckpt", capture(x))
        return load_checkpoint(tmp_path / "a.ckpt")

    return way


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def bits(x):
    "A value in which two things differ if any bit of them does."
    if isinstance(x, np.ndarray | np.generic):
        return type(x), x.dtype, x.shape, x.strides, x.tobytes()
    if isinstance(x, torch.Tensor):
        return x.dtype, x.shape, bytes(x.contiguous().flatten().view(torch.uint8))
    if isinstance(x, list | tuple | deque):
        return type(x), *map(bits, x)
    if isinstance(x, dict):
        return type(x), *((key, bits(y)) for key, y in x.items())
    return type(x), x.hex() if isinstance(x, float) else x


# Plain data, tensors and arrays


def values(n: float) -> dict:
    "Every kind of value, different for different numbers."
    return {
        "plain": [None, n > 1, int(n) << 200, -0.0 * n, math.inf, "é\n", b"\0c", n],
        "nested": {1: (n, [n, {"a": ()}]), (2, "b"): deque([n], maxlen=3), None: {n, "s"}},
        "ordered": OrderedDict(b=n, a=[n]),
        "scalars": [np.float32(n / 3), np.int64(n), np.bool_(n > 1), np.complex64(n * 1j)],
        "arrays": [np.full((0, 3), n), np.array(n), np.arange(int(24 * n), dtype="u1")],
        "strided": [np.random.rand(2, 3, 4).transpose(2, 0, 1), np.ones((3, 4), order="F")],
        "tensors": [torch.full((2,), n).bfloat16(), torch.tensor(int(n)), torch.ones(0)],
    }


def test_data_come_back_bit_for_bit_into_others_and_out_of_nothing(through_file):
    value, other = values(1.7), values(3.1)
    state, want = through_file(value), bits(value)
    assert bits(other) != want == bits(restore(other, state))
    del value["nested"][2, "b"]  # how long a deque may be is not known without one
    assert bits(restore(None, through_file(value))) == bits(value)


def test_containers_and_tensors_are_changed_in_place_and_arrays_are_not():
    start = np.zeros(2)  # may be a constant of an environment
    live = {"a": [0], "t": torch.zeros(2), "d": deque([1], maxlen=2), "s": {1}, "n": start}
    kept = dict(live)
    new = {"a": [1], "t": torch.ones(2), "d": deque([3], 2), "s": {5}, "n": start + 1}
    assert restore(live, capture(new)) is live and bits(live) == bits(new)
    assert all(live[name] is kept[name] for name in "atds") and start.tolist() == [0, 0]


def test_what_was_one_thing_stays_one_and_circles_end(through_file):
    row, table, tensor = [1.5], np.ones(2), torch.ones(2)
    value = {"b": (row, table), "a": row, "c": table, "t": [tensor, tensor]}
    row.append(value["b"])
    back = restore(None, through_file(value))
    assert back["a"] is back["b"][0] and back["c"] is back["b"][1]
    assert back["t"][0] is back["t"][1] and back["a"][1][0] is back["a"]


def test_what_was_two_things_becomes_two_even_where_one_thing_stood():
    shared = [torch.zeros(1), [0], np.zeros(1)]
    ours = [[torch.full((1,), n), [n], np.full(1, n)] for n in (1.0, 2.0)]
    assert bits(restore([shared, shared], capture(ours))) == bits(ours)


# Generators and objects


def test_generators_draw_on_in_place_or_where_there_was_none(through_file):
    def make(seed):
        return [np.random.default_rng(seed), generator(seed), random.Random(seed)]

    def draw(rngs):
        numbers = [rngs[0].random(9), torch.randn(5, generator=rngs[1]), rngs[2].gauss()]
        return bits([*numbers, rngs[0].integers(9, dtype=np.uint32)])

    ours, live = make(5), make(6)
    draw(ours)
    state, want = through_file(ours), draw(ours)
    restore(list(live), state)
    assert draw(live) == want
    assert draw(restore([None, None, live[2]], state)) == want


class Color(Enum):
    RED = 1
    BLUE = 2


class Thing:
    def __init__(self, value):
        self.value, self.method, self.function = value, self.get, partial(max, 1)

    def get(self):
        return self.value


def test_attributes_come_back_and_new_ones_go():
    pair = (max, 1)
    a, b = Thing([Color.BLUE, Color.RED, pair, pair]), Thing([Color.RED] * 2 + [pair] * 2)
    b.made_later = 1
    kept = b.function
    restore(b, capture(a))
    assert b.get() == b.method() == a.value and b.function is kept
    assert not hasattr(b, "made_later")


parent = np.random.default_rng(0)
parent.spawn(1)
UNKNOWN = {
    "lock": threading.Lock(),
    "Slots": type("Slots", (), {"__slots__": ("a", "__dict__")})(),
    "Deletes": type("Deletes", (), {"__del__": lambda self: None})(),
    "MyList": type("MyList", (list,), {})(),
    "MyTuple": type("MyTuple", (tuple,), {})(),
    "frozenset": frozenset(),
    "MaskedArray": np.ma.zeros(2),
    "generator": (i for i in range(3)),
    "object": object(),
    r"ndarray \(can't convert": np.array([None]),
    r"Tensor \(it needs a gradient": torch.ones(1, requires_grad=True) * 2,
    r"Generator \(it has spawned": parent,
    r"builtin_function_or_method \(it belongs to an": np.zeros(2).sum,
    r"set \(its keys or members": {Thing(0)},
    r"dict \(its keys or members": {Color.RED: 0},
    "TextIOWrapper": open(os.devnull),
    "Connection": multiprocessing.Pipe()[0],
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_unknown_is_refused_with_its_path(name):
    run = Thing([{"world": UNKNOWN[name]}])
    match = rf"^x\.value\.0\.world is a {name}.*, which cannot be captured$"
    with pytest.raises(NotCapturable, match=match):
        capture(run)
    assert issubclass(NotCapturable, ValueError)


@pytest.mark.parametrize(
    "make, what",
    [
        (lambda: gym.vector.AsyncVectorEnv([lambda: gym.make("CartPole-v1")]), r"parent_pipes\.0"),
        (lambda: gym.make_vec("LunarLander-v3", num_envs=2), r"envs\.0\.\S+\.world\.\S+"),
    ],
)
def test_other_processes_and_physics_engines_are_refused_by_name(make, what):
    try:
        env = make()
    except gym.error.DependencyNotInstalled:
        pytest.skip("needs Box2D")
    env.reset(seed=0)
    with pytest.raises(NotCapturable, match=rf"^x\.env\.{what} is a \w+, which"):
        capture({"env": env})
    env.close()


def test_arrays_that_share_memory_are_refused():
    x = np.zeros((4, 3))
    for views in [x, x[1]], [x[::2], x[1::2]], [x.T, x], [x[::-1], x[:1]]:
        with pytest.raises(NotCapturable, match="shares memory"):
            capture(views)
    assert bits(restore(None, capture([x[1], x + 1]))) == bits([x[1], x + 1])


LINEAR = nn.Linear(2, 3)


@pytest.mark.parametrize(
    "ours, live, match",
    [
        (LINEAR, nn.Linear(2, 4), r"x\._parameters\.weight is a parameter \[4, 2\] of .* here"),
        (LINEAR, nn.Linear(2, 3, dtype=torch.float64), "of torch.float64 here"),
        (LINEAR, nn.Linear(2, 3, bias=False), r"x\._parameters\.bias is builtins.NoneType here"),
        (LINEAR, nn.Tanh(), "x is torch.*Tanh here, but torch.*Linear in the checkpoint"),
        ([math.sin], [math.cos], "x.0 is math.cos here, but math.sin in the checkpoint"),
        ([Thing(0), Thing(1)], [Thing(0)] * 2, r"x\.1 is test_checkpoint.Thing here"),
    ],
)
def test_what_stands_in_the_wrong_place_is_refused_by_name(ours, live, match):
    with pytest.raises(ValueError, match=match):
        restore(live, capture(ours))


# Learning


def learner(seed: int) -> list:
    stepper = make_stepper("CartPole-v1", 3, seed=seed)
    policy = make_q_policy(stepper.env, (8,), generator(seed))
    adam = torch.optim.Adam([flatten_parameters(policy)], 0.01 * (seed + 1), fused=True)
    return [policy, stepper, generator(seed), adam, Replay(50)]


def learn(policy, stepper, rng, adam, replay, steps: int = 60) -> list:
    for _ in range(steps):
        rollout = collect(policy, stepper, 1, rng)
        replay.add(obs=rollout.obs[0], returns=rollout.rewards[0])
        batch = replay.sample(16, rng)
        adam.zero_grad(set_to_none=False)
        (policy.q(batch["obs"])[:, 0] - batch["returns"]).square().mean().backward()
        adam.step()
        policy.epsilon *= 0.99
    return [p.tolist() for p in policy.parameters()] + [policy.epsilon, stepper.obs.tolist()]


@pytest.mark.parametrize("step", [0, 1, 70])
def test_learning_goes_on_with_the_same_numbers_again_and_again(through_file, step):
    ours = learner(0)
    learn(*ours, steps=step)
    ours[0].train(step < 70)
    state = through_file(ours)
    want = learn(*ours)
    for seed in 1, 2:
        other = learner(seed)
        parameters = list(other[0].parameters())
        restore(other, state)
        assert other[0].training == (step < 70)
        assert all(map(lambda p, q: p is q, parameters, other[0].parameters()))
        assert learn(*other) == want


@torch.no_grad()
def test_an_lstm_is_restored(through_file):
    ours, theirs = nn.LSTM(2, 3), nn.LSTM(2, 3)
    restore(theirs, through_file(ours.eval()))
    assert not theirs.training and bits(theirs(torch.ones(4, 2))) == bits(ours(torch.ones(4, 2)))


def test_temporary_objects_are_not_taken_for_each_other():
    # An optimiser's state_dict makes new dictionaries at every call.
    def make(*rates: float) -> list:
        return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr) for lr in rates]

    live = restore(make(9, 9, 9), capture(make(1, 2, 3)))
    assert [optimizer.param_groups[0]["lr"] for optimizer in live] == [1, 2, 3]


# Environments


def wrapped(env_id):
    env = wrappers.NormalizeObservation(wrappers.TimeLimit(gym.make(env_id), 40))
    return wrappers.RecordEpisodeStatistics(wrappers.FrameStackObservation(env, 3))


def vector_wrapped(env_id):
    env = wrappers.vector.RecordEpisodeStatistics(gym.make_vec(env_id, num_envs=3))
    return wrappers.vector.NormalizeObservation(env)


MAKERS = {
    "make": gym.make,
    "make_vec": vector_wrapped,
    "sync": lambda env_id: SyncVectorEnv([partial(wrapped, env_id)] * 3),
    "same step": lambda env_id: SyncVectorEnv(
        [partial(wrapped, env_id)] * 3, autoreset_mode=AutoresetMode.SAME_STEP
    ),
    # As gymnasium's own `make_vec` did it before 1.4; the environment keeps the generator.
    "generator": lambda env_id: SyncVectorEnv(partial(wrapped, env_id) for _ in range(3)),
}


def follow(env, steps: int) -> list:
    "Observations, rewards and flags of `steps` actions that the space samples."
    rows = []
    for _ in range(steps):
        *row, _ = env.step(env.action_space.sample())
        rows.append([np.array(x).tobytes() for x in row])
        if not isinstance(env, gym.vector.VectorEnv) and (row[2] or row[3]):
            rows.append(np.array(env.reset()[0]).tobytes())
    return rows


@pytest.mark.parametrize("maker", MAKERS)
@pytest.mark.parametrize("env_id", ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0"])
def test_an_environment_goes_on_with_the_same_numbers(through_file, maker, env_id):
    env, new, used = (MAKERS[maker](env_id) for _ in range(3))
    for seed, old in enumerate([env, used]):
        old.reset(seed=seed)
        old.action_space.seed(seed)
        follow(old, 67 - 40 * seed)
    assert env.spec is None or env.spec.id == env_id  # wrappers keep what was asked
    state, want = through_file(env), follow(env, 200)
    for other in new, used:
        assert follow(restore(other, state), 200) == want


def test_an_environment_of_another_size_or_kind_is_refused():
    state = capture(make_stepper("CartPole-v1", 4, seed=0))
    with pytest.raises(ValueError, match=r"x\.env\.\w*space is .* here, but .* in the"):
        restore(make_stepper("CartPole-v1", 8, seed=0), state)
    with pytest.raises(ValueError, match=r"x\.env is .*Sync.* here, but .*CartPoleVectorEnv"):
        restore(make_stepper("Acrobot-v1", 4, seed=0), state)


# Files


def test_saving_keeps_the_latest_state_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "run.ckpt"
    (tmp_path / "run.ckpt.part").write_bytes(b"left by a killed save")
    for step in 1, 2:
        save_checkpoint(str(path), {"step": step, "x": torch.full((3,), float(step))})
        got = load_checkpoint(path, device="meta")  # not for tensors of the CPU
        assert got["step"] == step and got["x"].tolist() == [step] * 3
        assert list(tmp_path.iterdir()) == [path]
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "a", 1)


@pytest.mark.parametrize("bad", [Thing(0), [lambda: 0], threading.Lock(), 2**2100])
def test_what_could_not_be_read_again_never_replaces_a_good_file(tmp_path, bad):
    save_checkpoint(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="plain data"):
        save_checkpoint(tmp_path / "a", bad)
    assert load_checkpoint(tmp_path / "a") == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_every_wrong_byte_and_every_cut_is_refused(tmp_path):
    path = tmp_path / "a"
    save_checkpoint(path, {"a": torch.arange(5.0), "b": [1, 2.5, "x"]})
    whole, rng = path.read_bytes(), random.Random(0)
    wrong = [whole[:length] for length in range(0, len(whole), 23)] + [whole + b"\0"]
    for place, byte in enumerate(whole):
        new = bytes([byte ^ rng.randrange(1, 256)])
        wrong.append(whole[:place] + new + whole[place + 1 :])
    for data in wrong:
        path.write_bytes(data)
        with pytest.raises(ValueError, match="is damaged or cut|is not a|format version"):
            load_checkpoint(path)


class Hostile:
    def __reduce__(self):
        return open, ("created", "w")


def test_foreign_files_other_versions_and_code_are_refused(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save({"a": 1}, "a")
    with pytest.raises(ValueError, match="a is not a checkpoint of po_book"):
        load_checkpoint("a")
    with open("a", "w+b") as file:
        checkpoint._write(file, Hostile())
    with pytest.raises(ValueError, match="holds more than plain data"):
        load_checkpoint("a")
    assert not Path("created").exists()
    pickle.loads(pickle.dumps(Hostile())).close()
    assert Path("created").exists()  # it would have been made
    with monkeypatch.context() as later:
        later.setattr(checkpoint, "VERSION", 2)
        save_checkpoint("a", 1)
    with pytest.raises(ValueError, match="has format version 2, this po_book reads 1"):
        load_checkpoint("a")


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from po_book.checkpoint import load_checkpoint, save_checkpoint

path, rng = Path(sys.argv[1]), random.Random(0)
for _ in range(15):
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        for step in range(1, 10_000):
            save_checkpoint(path, {"step": step, "x": torch.full((300_000,), step)})
            os.write(tell, step.to_bytes(4, "big"))
    first = os.read(told, 4)
    time.sleep(rng.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(tell)
    last = int.from_bytes((first + os.read(told, 100_000))[-4:], "big")
    os.close(told)
    state = load_checkpoint(path)
    assert state["step"] in (last, last + 1) and (state["x"] == state["step"]).all()
    print(path.with_name(path.name + ".part").exists())
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_save_that_is_killed_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-c", KILLS, tmp_path / "run.ckpt"]
    # Only a process with one thread may fork.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    rows = out.stdout.split()
    assert len(rows) == 15 and "True" in rows, "no kill came while a file was written"


def test_the_data_are_on_the_disk_before_the_name_is_and_then_the_name(tmp_path, monkeypatch):
    calls, sync, replace = [], os.fsync, os.replace

    def fsync(fd):
        calls.append("folder" if stat.S_ISDIR(os.fstat(fd).st_mode) else "file")
        sync(fd)

    def rename(old, new):
        calls.append((Path(old).name, Path(new).name))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", rename)
    save_checkpoint(tmp_path / "a", 1)
    assert calls == ["file", ("a.part", "a"), "folder"]


def test_a_file_that_cannot_be_read_back_does_not_replace_a_good_one(tmp_path, monkeypatch):
    save_checkpoint(tmp_path / "a", 1)
    write = checkpoint._write

    def damage(file, state):
        write(file, state)
        file.seek(90)
        file.write(b"x")

    monkeypatch.setattr(checkpoint, "_write", damage)
    with pytest.raises(ValueError, match="a.part is"):
        save_checkpoint(tmp_path / "a", 2)
    assert load_checkpoint(tmp_path / "a") == 1 and len(list(tmp_path.iterdir())) == 1


def test_a_table_has_every_column_in_the_order_of_its_first_row(tmp_path):
    write_table(tmp_path / "a.csv", [{"b": 1}, {"a": "é,", "b": 2.5}])
    assert (tmp_path / "a.csv").read_bytes() == 'b,a\n1,\n2.5,"é,"\n'.encode()


# Disks and folders that refuse


@pytest.fixture
def disk(monkeypatch):
    "Files that take only so many bytes: `disk(100)`."

    class Small(io.FileIO):
        def write(self, data):
            if self.tell() + len(data) > self.room:
                raise OSError(errno.ENOSPC, "No space left on device")
            return super().write(data)

    def limit(room):
        Small.room = room

        def opened(path, mode="r", **how):
            if "w" not in mode:
                return open(path, mode, **how)
            if "b" in mode:
                return Small(path, mode)
            return io.TextIOWrapper(Small(path, mode), write_through=True, **how)

        monkeypatch.setattr(checkpoint, "open", opened, raising=False)

    return limit


WRITERS = {
    "checkpoint": lambda path, n: save_checkpoint(path, {"x": torch.full((n,), n)}),
    "table": lambda path, n: write_table(path, [{"x": n}] * n),
}


@pytest.mark.parametrize("room", [10, 100, 800])
@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_full_disk_is_said_and_the_last_good_file_stays(tmp_path, disk, write, room):
    with pytest.raises(OSError, match="the disk is full, make room") as first:
        disk(room)
        write(tmp_path / "a", 2000)
    assert "as it was" not in str(first.value) and not list(tmp_path.iterdir())
    disk(1e9)
    write(tmp_path / "a", 2000)
    old = (tmp_path / "a").read_bytes()
    disk(room)
    said = r"No space left on device: the disk is full, make room; the file is as it was: '.*a'$"
    with pytest.raises(OSError, match=said) as error:
        write(tmp_path / "a", 3000)
    assert error.value.errno == errno.ENOSPC
    assert (tmp_path / "a").read_bytes() == old and len(list(tmp_path.iterdir())) == 1


@pytest.mark.parametrize("write", WRITERS.values(), ids=WRITERS)
def test_a_path_through_a_file_or_on_a_folder_is_refused_with_its_kind(tmp_path, write):
    (tmp_path / "file").write_text("mine")
    (tmp_path / "folder").mkdir()
    with pytest.raises(NotADirectoryError, match="file/a'"):
        write(tmp_path / "file" / "a", 1)
    with pytest.raises(IsADirectoryError, match="folder'"):
        write(tmp_path / "folder", 1)
    assert (tmp_path / "file").read_text() == "mine"
    assert {p.name for p in tmp_path.iterdir()} == {"file", "folder"}


def test_a_folder_that_may_not_be_written_is_named(tmp_path):
    def forbidden(part):
        raise PermissionError(errno.EACCES, "Permission denied", str(part))

    with pytest.raises(PermissionError, match="Permission denied: '.*a'"):
        replace_file(tmp_path / "a", forbidden)


def test_an_error_that_is_not_of_the_disk_stays_as_it_is_and_the_old_file_too(tmp_path):
    def broken(part):
        part.write_text("half")
        raise ZeroDivisionError("mine")

    (tmp_path / "a").write_text("old")
    with pytest.raises(ZeroDivisionError, match="mine"):
        replace_file(tmp_path / "a", broken)
    assert (tmp_path / "a").read_text() == "old" and len(list(tmp_path.iterdir())) == 1


def test_a_folder_is_replaced_by_a_whole_one_or_stays(tmp_path):
    def fill(text, then=lambda: None):
        def write(part):
            part.mkdir()
            (part / text).write_text(text)
            then()

        return write

    def fail():
        raise OSError(errno.ENOSPC, "No space left on device")

    replace_file(tmp_path / "a", fill("old"))
    with pytest.raises(OSError, match="the disk is full, make room: '.*a'"):
        replace_file(tmp_path / "a", fill("new", fail))
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "old"]
    replace_file(tmp_path / "a", fill("new"))
    assert [p.name for p in tmp_path.rglob("*")] == ["a", "new"]


def test_what_was_asked_is_written_once_and_compared(tmp_path):
    asked = {"seed": 0, "config": {"hidden": (8, 9), "lr": 0.1}}
    write_asked(tmp_path, asked)
    before = (tmp_path / "run.json").read_bytes()
    with pytest.raises(ValueError, match="holds a run already: resume it, or choose another"):
        write_asked(tmp_path, {"seed": 1})
    assert (tmp_path / "run.json").read_bytes() == before
    check_asked(tmp_path, asked)
    check_asked(tmp_path, {"new": 3, "config": {"lr": 0.1}})
    other = {"seed": 0, "config": {"hidden": (8, 9), "lr": 0.2}}
    with pytest.raises(ValueError, match="config.lr must be 0.1 as .*run.json says, got 0.2"):
        check_asked(tmp_path, other)
    check_asked(tmp_path, other, free=["config.lr"])
    with pytest.raises(ValueError, match=r"config.hidden must be \[8, 9\] as .*, got \[8\]"):
        check_asked(tmp_path, {"config": {"hidden": (8,)}}, free=["config.lr"])
    for text in "[]", "{", "5":
        (tmp_path / "run.json").write_text(text)
        with pytest.raises(ValueError, match="run.json is not of a run"):
            check_asked(tmp_path, asked)


# One process a folder

HOLD = """
import sys, time
from po_book.checkpoint import lock_folder
with lock_folder(sys.argv[1]):
    print("held", flush=True)
    time.sleep(float(sys.argv[2]))
"""


@pytest.fixture
def holder():
    "Starts a process that holds the lock on a folder for so many seconds."
    started = []

    def start(folder: Path, seconds: float) -> subprocess.Popen:
        command = [sys.executable, "-c", HOLD, folder, str(seconds)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout.readline() == "held\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.wait()
        process.stdout.close()


def test_a_folder_belongs_to_one_process_until_it_is_killed(holder, tmp_path):
    owner = holder(tmp_path / "run", 300)
    said = rf"run: another process is training in this folder \(pid {owner.pid}\)"
    for _ in range(2):  # being refused does not free it
        with pytest.raises(ValueError, match=said):
            with lock_folder(tmp_path / "run"):
                raise AssertionError("two owners")
    owner.kill()
    owner.wait()
    assert (tmp_path / "run" / "run.lock").read_text() == str(owner.pid)
    with lock_folder(tmp_path / "run"):
        assert (tmp_path / "run" / "run.lock").read_text() == str(os.getpid())
    assert not list((tmp_path / "run").iterdir())


def test_a_folder_is_free_after_an_end_or_an_error_and_other_folders_always_are(holder, tmp_path):
    holder(tmp_path / "a", 0).wait()
    with pytest.raises(KeyboardInterrupt):
        with lock_folder(tmp_path / "a"), lock_folder(tmp_path / "b"):
            raise KeyboardInterrupt
    with lock_folder(str(tmp_path / "a")), pytest.raises(ValueError, match=str(os.getpid())):
        with lock_folder(tmp_path / "a"):
            raise AssertionError("two owners")
    with lock_folder(None), lock_folder(None):
        pass


def test_a_folder_that_cannot_be_written_is_said_with_what_to_do(tmp_path, monkeypatch):
    said = "a run needs a folder that it can write to; choose another: '.*r'"
    (tmp_path / "file").touch()
    with pytest.raises(NotADirectoryError, match=f"Not a directory: {said}"):
        with lock_folder(tmp_path / "file" / "r"):
            raise AssertionError("locked")

    def closed(path, mode):
        raise PermissionError(errno.EACCES, "Permission denied", str(path))

    monkeypatch.setattr(checkpoint, "open", closed, raising=False)
    with pytest.raises(PermissionError, match=f"Permission denied: {said}"):
        with lock_folder(tmp_path / "r"):
            raise AssertionError("locked")


def test_an_error_in_the_block_is_not_one_of_the_folder(tmp_path):
    with pytest.raises(FileNotFoundError, match="^mine$"):
        with lock_folder(tmp_path / "r"):
            raise FileNotFoundError("mine")


def test_a_lock_on_a_file_that_its_owner_removed_is_none(tmp_path, monkeypatch):
    "As if the owner had ended between opening and locking."
    lock, files = checkpoint._lock, []

    def late(file):
        files.append(file)
        if len(files) == 1:
            (tmp_path / "run.lock").unlink()
        return lock(file)

    monkeypatch.setattr(checkpoint, "_lock", late)
    with lock_folder(tmp_path):
        assert len(files) == 2 and files[0].closed
        assert (tmp_path / "run.lock").read_text() == str(os.getpid())


def test_where_there_are_no_locks_nobody_is_refused(tmp_path, monkeypatch):
    fcntl = pytest.importorskip("fcntl")

    def flock(file, how):
        raise OSError(errno.ENOLCK, "No locks available")

    monkeypatch.setattr(fcntl, "flock", flock)
    with lock_folder(tmp_path), lock_folder(tmp_path):
        pass


def test_a_lock_is_not_kept_by_a_child_that_was_forked_under_it(tmp_path):
    "As the workers of an `AsyncVectorEnv` are."
    with lock_folder(tmp_path):
        child = multiprocessing.get_context("fork").Process(target=threading.Event().wait)
        child.start()
    with lock_folder(tmp_path):
        pass
    child.kill()
    child.join()
