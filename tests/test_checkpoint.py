import math
import multiprocessing
import os
import pickle
import random
import subprocess
import sys
import threading
import weakref
from collections import Counter, OrderedDict, defaultdict, deque
from copy import deepcopy
from dataclasses import dataclass
from enum import Enum, Flag, IntEnum
from functools import partial
from pathlib import Path

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from gymnasium.wrappers import (
    FrameStackObservation,
    NormalizeObservation,
    NormalizeReward,
    RecordEpisodeStatistics,
    TimeLimit,
)
from gymnasium.wrappers import vector as vector_wrappers
from torch import nn

from po_book import checkpoint
from po_book.checkpoint import (
    NotCapturable,
    capture,
    load_checkpoint,
    restore,
    save_checkpoint,
)
from po_book.rollout import make_policy, make_q_policy, make_stepper
from po_book.value_based import Replay

CLASSIC = ["CartPole-v1", "Acrobot-v1", "Pendulum-v1", "MountainCar-v0"]


@pytest.fixture
def through_file(tmp_path):
    "A captured state on its way through a file."

    def way(state):
        save_checkpoint(tmp_path / "a.ckpt", state)
        return load_checkpoint(tmp_path / "a.ckpt")

    return way


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def same(a, b) -> bool:
    "Equal in type, in contents and in every bit."
    if type(a) is not type(b):
        return False
    if isinstance(a, torch.Tensor):
        if (a.dtype, a.shape) != (b.dtype, b.shape):
            return False
        a, b = (torch.stack([x.detach().flatten()]) for x in (a, b))
        a, b = (x.view(torch.uint8).numpy() for x in (a, b))
    if isinstance(a, np.ndarray | np.generic):
        return (a.dtype, a.shape, a.tobytes()) == (b.dtype, b.shape, b.tobytes())
    if isinstance(a, float):
        return a.hex() == b.hex() and math.copysign(1, a) == math.copysign(1, b)
    if isinstance(a, dict):
        return list(a) == list(b) and all(same(a[k], b[k]) for k in a)
    if isinstance(a, list | tuple | deque):
        pairs = len(a) == len(b) and all(map(same, a, b))
        return pairs and getattr(a, "maxlen", 0) == getattr(b, "maxlen", 0)
    return a == b


# Plain data


def leaf(rng: random.Random):
    shape = tuple(rng.randrange(4) for _ in range(rng.randrange(4)))
    dtypes = "f4", "f8", "i8", "u1", "?", "c16", "<U3", "M8[s]", ">f4", "f2"
    array = np.frombuffer(rng.randbytes(16 * math.prod(shape)), np.uint8)
    array = (array % 100).astype("i4")[: math.prod(shape)].reshape(shape)
    leaves = [
        None,
        rng.random() < 0.5,
        rng.getrandbits(130) - 2**129,
        rng.choice([rng.gauss(0, 1), -0.0, math.inf, math.nan, 5e-324]),
        rng.choice(["", "é\n", "\ud800"]),
        rng.randbytes(5),
        array.astype(rng.choice(dtypes)),
        np.float32(rng.random()),
        np.int64(rng.getrandbits(60)),
        np.bool_(True),
        np.str_("ab"),
        torch.from_numpy(array.copy()).to(rng.choice([torch.bfloat16, torch.int64])),
    ]
    return rng.choice(leaves)


def nested(rng: random.Random, depth: int):
    if depth == 0 or rng.random() < 0.2:
        return leaf(rng)
    items = [nested(rng, depth - 1) for _ in range(rng.randrange(4))]
    keys = ["a", 1, None, (2, "b"), 0.5, b"c", np.int64(7)][: len(items)]
    number = rng.randrange(100)
    values = [
        items,
        tuple(items),
        deque(items, maxlen=rng.choice([None, 3])),
        dict(zip(keys, items)),
        OrderedDict(zip(keys, items)),
        Counter({"x": number}),
        {number, "s", (1, None)},
        frozenset({number}),
    ]
    return rng.choice(values)


def test_nested_plain_data_come_back_bit_for_bit(through_file):
    rng = random.Random(0)
    value = [nested(rng, 4) for _ in range(300)]
    assert same(restore(None, through_file(capture(value))), value)
    other = [nested(rng, 4) for _ in range(300)]
    assert not same(other, value)
    assert same(restore(other, capture(value)), value)


def test_a_captured_state_is_a_copy_and_restoring_leaves_it_alone():
    value = {"a": [1.0], "t": torch.zeros(2), "n": np.zeros(2)}
    state = capture(value)
    for x in value, restore(None, state):
        x["a"].append(2.0)
        x["t"] += 1
        x["n"] += 1
    want = {"a": [1.0], "t": torch.zeros(2), "n": np.zeros(2)}
    assert same(restore(None, state), want)


def test_containers_and_tensors_are_changed_in_place():
    live = {"a": [0], "t": torch.zeros(2), "d": deque([1], maxlen=2)}
    kept = dict(live)
    state = capture({"a": [1, 2], "t": torch.ones(2), "d": deque([3, 4], maxlen=2)})
    assert restore(live, state) is live
    assert all(live[name] is kept[name] for name in kept)
    assert kept["a"] == [1, 2] and kept["t"].tolist() == [1, 1]
    assert kept["d"] == deque([3, 4])


def test_an_array_is_not_written_into_because_it_may_be_a_constant():
    start = np.zeros(2)
    live = restore([start], capture([np.ones(2)]))
    assert live[0].tolist() == [1, 1] and start.tolist() == [0, 0]


@pytest.mark.parametrize("order", [(0, 1, 2), (2, 0, 1), (1, 2, 0)])
def test_an_array_keeps_the_layout_of_its_axes(order):
    x = np.arange(24.0).reshape(2, 3, 4).transpose(order)
    y = restore(None, capture(x))
    assert same(x, y) and x.strides == y.strides
    assert y.flags.owndata and y.flags.writeable


def test_what_was_one_thing_stays_one_thing(through_file):
    row, table, tensor = [1.5], np.ones(2), torch.ones(2)
    value = {"a": row, "b": (row, table), "c": table, "t": [tensor, tensor]}
    back = restore(None, through_file(capture(value)))
    assert back["a"] is back["b"][0] and back["c"] is back["b"][1]
    assert back["t"][0] is back["t"][1]


def test_what_was_two_things_becomes_two_even_where_one_thing_stood():
    shared = [torch.zeros(1), [0], np.zeros(1)]
    ours = [[torch.full((1,), n), [n], np.full(1, n)] for n in (1.0, 2.0)]
    back = restore([shared, shared], capture(ours))
    assert [x[0].item() for x in back] == [1, 2]
    assert [x[1] for x in back] == [[1], [2]] and [x[2][0] for x in back] == [1, 2]


def test_circles_end():
    ring = [1]
    ring.append({"up": (ring,)})
    back = restore(None, capture(ring))
    assert back[1]["up"][0] is back


def test_temporary_objects_are_not_taken_for_each_other():
    # An optimiser's state_dict makes new dictionaries at every call.
    def make(*rates: int) -> list:
        return [torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr) for lr in rates]

    live = restore(make(9, 9, 9), capture(make(1, 2, 3)))
    rates = [optimizer.param_groups[0]["lr"] for optimizer in live]
    assert rates == [1, 2, 3]


# Random generators


@pytest.mark.parametrize("bits", ["PCG64", "PCG64DXSM", "MT19937", "Philox", "SFC64"])
@pytest.mark.parametrize("live", [None, "same seed", "other"])
def test_a_numpy_generator_draws_and_spawns_on(through_file, bits, live):
    kind = getattr(np.random, bits)
    rng = np.random.Generator(kind(5))
    rng.integers(10, size=3, dtype=np.uint32)
    rng.spawn(2)
    state = through_file(capture(rng))
    same_seed, other = np.random.Generator(kind(5)), np.random.default_rng(1)
    back = restore({"same seed": same_seed, "other": other}.get(live), state)
    assert same(back.random(9), rng.random(9))
    assert same(back.spawn(1)[0].random(9), rng.spawn(1)[0].random(9))


def test_torch_and_python_generators_draw_on_in_place(through_file):
    ours = [generator(1), random.Random(1)]
    torch.randn(5, generator=ours[0])
    ours[1].gauss(0, 1)
    state = through_file(capture(ours))
    live = [generator(2), random.Random(2)]
    kept = list(live)
    for back in restore(live, state), restore(None, state):
        draws = [torch.randn(5, generator=back[0]).tolist(), back[1].gauss(0, 1)]
        want = deepcopy(ours[1]).gauss(0, 1)
        clone = generator()
        clone.set_state(ours[0].get_state())
        assert draws == [torch.randn(5, generator=clone).tolist(), want]
    assert live[0] is kept[0] and live[1] is kept[1]


def test_the_global_generator_can_be_captured():
    torch.manual_seed(3)
    state = capture(torch.default_generator)
    want = torch.rand(4)
    restore(torch.default_generator, state)
    assert same(torch.rand(4), want)


# Objects


class Color(Enum):
    RED = 1
    BLUE = 2


class Level(IntEnum):
    LOW = 1


class Bits(Flag):
    A = 1
    B = 2


@dataclass(frozen=True)
class Point:
    x: float
    where: Color = Color.RED


class Thing:
    def __init__(self, value):
        self.value = value
        self.method = self.get
        self.back = weakref.ref(self)

    def get(self):
        return self.value


def test_attributes_come_back_new_ones_go_and_frozen_ones_too():
    a, b = Thing([Point(1.5, Color.BLUE), Bits.A | Bits.B, Level.LOW]), Thing(None)
    b.value = [Point(0.0), Bits.A, Level.LOW]
    b.made_later = 1
    restore(b, capture(a))
    assert b.value == a.value and type(b.value[2]) is Level
    assert not hasattr(b, "made_later")
    assert b.get() == b.method() == a.value and b.back() is b


def test_members_of_an_enumeration_may_trade_places():
    x = [Point(0.0, Color.RED), Point(0.0, Color.BLUE)]
    y = [Point(0.0, Color.BLUE), Point(0.0, Color.RED)]
    assert restore(y, capture(x)) == x


def test_functions_stay_and_are_told_apart_by_name():
    x = {"f": math.sin, "g": same, "h": partial(same, 1), "i": np.exp, "j": Thing}
    live = dict(x)
    assert restore(live, capture(x)) == x
    for name, other in ("f", math.cos), ("g", leaf), ("i", np.log), ("j", Point):
        with pytest.raises(ValueError, match=rf"\['{name}'\] is .* in the checkpoint"):
            restore(x | {name: other}, capture(x))


class Slots:
    __slots__ = ("a", "__dict__")


class Deletes:
    def __del__(self):
        pass


class MyList(list):
    pass


class MyTensor(torch.Tensor):
    pass


UNKNOWN = {
    "lock": threading.Lock(),
    "Slots": Slots(),
    "Deletes": Deletes(),
    "MyList": MyList(),
    "MyTensor": torch.zeros(1).as_subclass(MyTensor),
    "MaskedArray": np.ma.zeros(2),
    "generator": (i for i in range(3)),
    "range_iterator": iter(range(3)),
    "object": object(),
    "ndarray of object": np.array([None]),
    "ndarray of": np.zeros(1, [("a", int)]),
    "Tensor inside a graph": torch.ones(1, requires_grad=True) * 2,
    "ValueError": ValueError(),
    "SystemRandom": random.SystemRandom(),
    "RandomState": np.random.RandomState(0),
    "Popen": subprocess.Popen.__new__(subprocess.Popen),
    "Generator used as a key": {np.random.default_rng(0): 1},
}


@pytest.mark.parametrize("name", UNKNOWN)
def test_the_unknown_is_refused_with_its_path(name):
    run = Thing(1)
    run.envs = [{"world": UNKNOWN[name]}]
    match = rf"^envs\[0\]\['world'\].* an? {name}.*captured"
    with pytest.raises(NotCapturable, match=match):
        capture(run)
    assert issubclass(NotCapturable, ValueError)


def test_an_open_file_and_a_pipe_are_refused(tmp_path):
    with open(tmp_path / "x", "w") as file:
        with pytest.raises(NotCapturable, match="this is a TextIOWrapper"):
            capture(file)
    with pytest.raises(NotCapturable, match=r"\[0\] is a Connection"):
        capture(multiprocessing.Pipe())


def test_arrays_that_share_memory_are_refused():
    x = np.zeros((4, 3))
    for views in [x, x[1]], [x[::2], x[1::2]], [x.T, x], [x[::-1], x[:1]]:
        with pytest.raises(NotCapturable, match="shares memory"):
            capture(views)
    with pytest.raises(NotCapturable, match="is a ndarray that shares memory with"):
        capture({"t": torch.from_numpy(x), "a": x})
    assert same(restore(None, capture([x[:2], x[2:]])), [x[:2], x[2:]])


def test_views_of_one_tensor_stay_views():
    def make(value: float):
        flat = torch.full((6,), value)
        return {"first": flat[:4], "flat": flat, "last": flat[4:]}

    live = restore(make(0.0), capture(make(1.0)))
    live["flat"][0] = 7
    assert live["first"].tolist() == [7, 1, 1, 1]
    with pytest.raises(ValueError, match=r"\['first'\] is NoneType here"):
        restore({}, capture(make(1.0)))


def test_an_expanded_tensor_is_replaced():
    live = [torch.zeros(1).expand(3)]
    assert restore(live, capture([torch.ones(1).expand(3)]))[0].tolist() == [1, 1, 1]


@pytest.mark.parametrize(
    "live, match",
    [
        (nn.Linear(2, 4), r"_parameters\['weight'\] is a tensor \[4, 2\]"),
        (nn.Tanh(), "this is Tanh here, but torch.nn.modules.linear.Linear in the"),
        (None, "this is NoneType here, but torch.*Linear in the checkpoint"),
        (nn.Linear(2, 3, bias=False), r"_parameters\['bias'\] is NoneType here"),
        (nn.Linear(2, 3, dtype=torch.float64), "of torch.float64 here"),
    ],
)
def test_a_foreign_object_is_refused_by_name(live, match):
    with pytest.raises(ValueError, match=match):
        restore(live, capture(nn.Linear(2, 3)))


def test_a_missing_object_is_refused_where_it_is_missing():
    with pytest.raises(ValueError, match=r"\['a'\]\[1\] is NoneType here, but .*Point"):
        restore({"a": [Point(0.0)]}, capture({"a": [Point(0.0), Point(1.0)]}))
    one = Point(0.0)
    with pytest.raises(ValueError, match=r"\[1\] is NoneType"):
        restore([one, one], capture([Point(0.0), Point(1.0)]))


# Learning


def learner(seed: int):
    env = gym.make_vec("CartPole-v1", num_envs=2)
    env.reset(seed=seed)
    policy = make_q_policy(env, (8,), generator(seed))
    env.close()
    optimizer = torch.optim.Adam(policy.parameters(), 1e-2 * (seed + 1), fused=True)
    return {
        "optimizer": optimizer,
        "policy": policy,
        "target": deepcopy(policy).requires_grad_(False),
        "replay": Replay(50),
        "stepper": make_stepper("CartPole-v1", 3, seed=seed),
        "generator": generator(seed),
    }


def learn(x, steps: int) -> tuple:
    numbers, stepper, policy = [], x["stepper"], x["policy"]
    for _ in range(steps):
        obs = stepper.obs
        with torch.no_grad():
            actions = policy.act(obs, x["generator"])
        _, rewards, terminated, *_ = stepper.step(actions)
        x["replay"].add(obs=obs, a=actions, r=torch.tensor(rewards + terminated))
        batch = x["replay"].sample(16, x["generator"])
        q = policy.q(batch["obs"]).gather(-1, batch["a"][:, None])[:, 0]
        loss = (q - batch["r"] - x["target"].q(batch["obs"]).amax(-1)).square().mean()
        x["optimizer"].zero_grad()
        loss.backward()
        x["optimizer"].step()
        policy.epsilon *= 0.99
        numbers.append(loss.item())
    return numbers, [p.tolist() for p in policy.parameters()]


@pytest.mark.parametrize("step", [0, 1, 70])
def test_learning_goes_on_with_the_same_numbers(through_file, step):
    ours, other = learner(0), learner(1)
    learn(ours, step)
    ours["policy"].eval() if step == 70 else None
    state = through_file(capture(ours))
    parameters = list(other["policy"].parameters())
    restore(other, state)
    assert all(map(lambda p, q: p is q, parameters, other["policy"].parameters()))
    assert other["policy"].epsilon == ours["policy"].epsilon
    assert other["policy"].training == ours["policy"].training
    assert learn(other, 60) == learn(ours, 60)


def test_a_file_restores_twice_the_same(through_file):
    ours = learner(0)
    learn(ours, 5)
    state = through_file(capture(ours))
    first = learn(restore(learner(1), state), 20)
    assert learn(restore(learner(2), state), 20) == first


def test_an_lstm_a_schedule_and_buffers_are_restored():
    def make(seed: int):
        torch.manual_seed(seed)
        net = nn.ModuleDict({"rnn": nn.LSTM(2, 3), "norm": nn.BatchNorm1d(3)})
        net.norm.register_buffer("extra", torch.zeros(()), persistent=False)
        optimizer = torch.optim.SGD(net.parameters(), 0.01, momentum=0.9)
        return net, optimizer, torch.optim.lr_scheduler.StepLR(optimizer, 2, 0.5)

    def go(net, optimizer, schedule) -> list:
        out = []
        for i in range(5):
            loss = net.norm(net.rnn(torch.full((4, 2), i + 1.0))[0]).pow(3).sum()
            net.norm.extra += loss.item()
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()
            out += [loss.item(), schedule.get_last_lr(), net.norm.extra.item()]
        return out

    ours, theirs = make(0), make(1)
    go(*ours)
    restore(theirs, capture(ours))
    assert go(*theirs) == go(*ours)


# Environments


def frames(env_id):
    env = FrameStackObservation(NormalizeObservation(gym.make(env_id)), 3)
    return RecordEpisodeStatistics(NormalizeReward(TimeLimit(env, 40)))


def sync(env_id, mode=AutoresetMode.NEXT_STEP):
    return SyncVectorEnv([lambda: frames(env_id)] * 3, autoreset_mode=mode)


def wrapped(env):
    counted = vector_wrappers.RecordEpisodeStatistics(env, stats_key="whole")
    return vector_wrappers.NormalizeObservation(counted)


MAKERS = {
    "make": gym.make,
    "wrapped": frames,
    "sync": lambda env_id: SyncVectorEnv([lambda: gym.make(env_id)] * 3),
    "sync of wrapped": sync,
    "same step": partial(sync, mode=AutoresetMode.SAME_STEP),
    "vector wrappers": lambda env_id: wrapped(sync(env_id)),
    "make_vec": lambda env_id: wrapped(gym.make_vec(env_id, num_envs=3)),
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
@pytest.mark.parametrize("env_id", CLASSIC)
def test_an_environment_goes_on_with_the_same_numbers(through_file, maker, env_id):
    env, new, used = (MAKERS[maker](env_id) for _ in range(3))
    for seed, old in enumerate([env, used]):
        old.reset(seed=seed)
        old.action_space.seed(seed)
        follow(old, 67 - 40 * seed)
    assert env.spec is None or env.spec.id == env_id  # wrappers keep what was asked
    state = through_file(capture(env))
    want = follow(env, 200)
    for other in new, used:
        assert follow(restore(other, state), 200) == want


@pytest.mark.parametrize("env_id", ["po_book/CartPole-v1", *CLASSIC])
def test_a_stepper_goes_on_with_the_same_numbers(through_file, env_id):
    def go(stepper, policy, rng):
        rows = []
        for _ in range(210):
            with torch.no_grad():
                actions = policy.act(stepper.obs, rng)
            rows.append([torch.as_tensor(x).tolist() for x in stepper.step(actions)])
        return rows

    stepper = make_stepper(env_id, 4, seed=1)
    policy = make_policy(stepper.env, generator=generator())
    ours = stepper, policy, generator(1)
    go(*ours)
    theirs = make_stepper(env_id, 4, seed=2), deepcopy(policy), generator(2)
    restore(theirs, through_file(capture(ours)))
    assert go(*theirs) == go(*ours)


class Shared(gym.Env):
    "Spaces that belong to the class, and a constant that a reset binds."

    observation_space = gym.spaces.Box(-9, 9, (2,))
    action_space = gym.spaces.Dict(a=gym.spaces.Discrete(9), b=gym.spaces.Box(0, 1))
    start = np.zeros(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.position = self.start
        return self.position, {}


def test_samples_of_a_space_go_on_even_if_it_belongs_to_the_class():
    env = Shared()
    env.reset(seed=0)
    env.action_space.seed(3)
    state = capture(env)
    want = [env.action_space.sample() for _ in range(5)]
    restore(env, state)
    got = [env.action_space.sample() for _ in range(5)]
    assert [x["a"] for x in got] == [x["a"] for x in want]
    assert [x["b"][0] for x in got] == [x["b"][0] for x in want]
    assert "action_space" not in vars(env)


def test_a_constant_of_an_environment_survives_restoring():
    env = Shared()
    env.reset(seed=0)
    env.position = env.position + 1
    state = capture(env)
    env.reset()
    restore(env, state)
    assert env.position.tolist() == [1, 1] and env.reset()[0].tolist() == [0, 0]


def test_an_environment_of_another_size_or_kind_is_refused():
    def make(n: int, env_id: str = "CartPole-v1"):
        return make_stepper(env_id, n, seed=0)

    state = capture(make(4))
    with pytest.raises(ValueError, match=r"env\.\w*space is .* here, but .* in the"):
        restore(make(8), state)
    with pytest.raises(ValueError, match="env is Sync.* here, but .*CartPoleVectorEnv"):
        restore(make(4, "Acrobot-v1"), state)
    with pytest.raises(ValueError, match="this is TensorStepper here"):
        restore(make(4, "po_book/CartPole-v1"), state)


def test_environments_in_other_processes_are_refused_with_their_path():
    env = gym.vector.AsyncVectorEnv([lambda: gym.make("CartPole-v1")])
    try:
        with pytest.raises(NotCapturable, match=r"\['env'\]\.\S+ is a \w+, which"):
            capture({"env": env})
    finally:
        env.close()


# Files


def test_saving_returns_the_latest_state_and_leaves_nothing_beside_it(tmp_path):
    path = tmp_path / "run.ckpt"
    (tmp_path / "run.ckpt.part").write_bytes(b"left by a killed save")
    for step in 1, 2:
        save_checkpoint(str(path), {"step": step, "x": torch.full((3,), float(step))})
        got = load_checkpoint(path)
        assert got["step"] == step and got["x"].tolist() == [step] * 3
        assert list(tmp_path.iterdir()) == [path]


NOT_PLAIN = Point(0.0), [lambda: 0], {"a": threading.Lock()}, 2**2100


@pytest.mark.parametrize("bad", NOT_PLAIN)
def test_what_could_not_be_read_again_never_replaces_a_good_file(tmp_path, bad):
    save_checkpoint(tmp_path / "a", 1)
    with pytest.raises(ValueError, match="plain data"):
        save_checkpoint(tmp_path / "a", bad)
    assert load_checkpoint(tmp_path / "a") == 1
    assert len(list(tmp_path.iterdir())) == 1


def test_no_file_and_no_folder_are_named(tmp_path):
    with pytest.raises(FileNotFoundError, match="nothing"):
        load_checkpoint(tmp_path / "nothing")
    with pytest.raises(FileNotFoundError, match="nowhere"):
        save_checkpoint(tmp_path / "nowhere" / "a", 1)


def test_every_wrong_byte_and_every_cut_is_refused(tmp_path):
    path = tmp_path / "a"
    save_checkpoint(path, {"a": torch.arange(5.0), "b": [1, 2.5, "x"]})
    whole, rng = path.read_bytes(), random.Random(0)
    with open(path, "r+b", buffering=0) as file:
        for place, byte in enumerate(whole):
            for new in byte ^ rng.randrange(1, 256), byte:
                os.pwrite(file.fileno(), bytes([new]), place)
                if new == byte:
                    continue
                with pytest.raises(ValueError, match="damaged|not a|version"):
                    load_checkpoint(path)
    assert path.read_bytes() == whole
    for length in range(0, len(whole), 23):
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="damaged|not a checkpoint"):
            load_checkpoint(path)
    path.write_bytes(whole + b"\0")
    with pytest.raises(ValueError, match="damaged or cut short"):
        load_checkpoint(path)


def test_foreign_files_and_other_versions_are_refused(tmp_path, monkeypatch):
    path = tmp_path / "a"
    torch.save({"a": 1}, path)
    with pytest.raises(ValueError, match="is not a checkpoint of po_book"):
        load_checkpoint(path)
    monkeypatch.setattr(checkpoint, "VERSION", 2)
    with open(path, "w+b") as file:
        checkpoint._write(file, 1)
    monkeypatch.undo()
    with pytest.raises(ValueError, match="has format version 2, this po_book reads 1"):
        load_checkpoint(path)


class Hostile:
    def __init__(self, target: Path):
        self.target = str(target)

    def __reduce__(self):
        return open, (self.target, "w")


def test_no_code_in_a_file_is_run(tmp_path):
    path, target = tmp_path / "a", tmp_path / "created"
    path.write_bytes(pickle.dumps(Hostile(target)))
    with pytest.raises(ValueError, match="not a checkpoint"):
        load_checkpoint(path)
    with open(path, "w+b") as file:
        checkpoint._write(file, Hostile(target))
    with pytest.raises(ValueError, match="holds more than plain data"):
        load_checkpoint(path)
    assert not target.exists()
    pickle.loads(pickle.dumps(Hostile(target))).close()
    assert target.exists()  # it would have been made


def test_tensors_of_the_cpu_stay_on_the_cpu(tmp_path):
    save_checkpoint(tmp_path / "a", torch.ones(2))
    assert load_checkpoint(tmp_path / "a", device="meta").device.type == "cpu"


KILLS = """
import os, random, signal, sys, time
from pathlib import Path
import torch
from po_book.checkpoint import load_checkpoint, save_checkpoint

path, rng = Path(sys.argv[1]), random.Random(0)
part = path.with_name(path.name + ".part")
for _ in range(15):
    told, tell = os.pipe()
    child = os.fork()
    if not child:
        for step in range(1, 10_000):
            x = torch.full((300_000,), float(step))
            save_checkpoint(path, {"step": step, "x": x})
            os.write(tell, step.to_bytes(4, "big"))
    first = os.read(told, 4)
    time.sleep(rng.uniform(0, 0.05))
    os.kill(child, signal.SIGKILL)
    os.waitpid(child, 0)
    os.close(tell)
    steps = first + os.read(told, 100_000)
    os.close(told)
    state = load_checkpoint(path)
    same = bool((state["x"] == state["step"]).all())
    last = int.from_bytes(steps[-4:], "big")
    print(last, state["step"], int(same), int(part.exists()))
"""


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork and SIGKILL")
def test_a_save_that_is_killed_leaves_a_whole_file(tmp_path):
    command = [sys.executable, "-c", KILLS, tmp_path / "run.ckpt"]
    # Only a process with one thread may fork.
    env = os.environ | {"OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    out = subprocess.run(command, env=env, capture_output=True, text=True, timeout=60)
    assert out.returncode == 0, out.stderr
    rows = [tuple(map(int, line.split())) for line in out.stdout.splitlines()]
    assert len(rows) == 15
    for reported, found, whole, _ in rows:
        assert found in (reported, reported + 1) and whole
    assert any(left for *_, left in rows), "no kill came while a file was written"
