import subprocess
import sys

import gymnasium as gym
import numpy as np
import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from po_book.rollout import Stepper, collect, collect_episodes, evaluate, make_stepper
from po_book.spaces import make_policy
from po_book.tensor_env import CartPole, Recorded, TensorStepper, cartpole_motion


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


CARTPOLE = "po_book/CartPole-v1"


def beside_gymnasium(n: int, steps: int, choose) -> tuple:
    "A stepper after `steps`, its columns, and those of plain environments with the same starts."
    stepper = TensorStepper(CartPole(n), seed=0)
    plain = [gym.make("CartPole-v1") for _ in range(n)]
    rows, starts = [], list(range(n))
    for _ in range(steps):
        for i in starts:
            plain[i].reset()
            plain[i].unwrapped.state = stepper.env.state[i].numpy().copy()
        actions = choose(stepper.obs)
        next_obs, *ours, valid = stepper.step(actions)
        obs, *theirs, _ = zip(*(env.step(a) for env, a in zip(plain, actions.tolist())))
        columns = (*next_obs.T, *ours), (*np.stack(obs).T, *theirs)
        rows.append([torch.stack([torch.as_tensor(x).double() for x in c]) for c in columns])
        starts = [i for i in range(n) if theirs[1][i] or theirs[2][i]]
        # What ended starts anew, and the rest goes on from the next state.
        goes_on = (stepper.obs == next_obs).all(-1)
        assert valid.all() and (~goes_on).nonzero()[:, 0].tolist() == starts
    return stepper, *map(torch.stack, zip(*rows))


def balance(obs: torch.Tensor) -> torch.Tensor:
    return (obs @ torch.tensor([0.05, 0.2, 1.0, 0.5]) > 0).long()


@pytest.mark.parametrize("n, steps", [(1, 10_000), (50, 200)])
def test_ten_thousand_random_steps_are_gymnasiums(n, steps):
    noise = generator(1)
    stepper, ours, theirs = beside_gymnasium(
        n, steps, lambda obs: torch.randint(2, (n,), generator=noise)
    )
    assert (ours[:, :4] - theirs[:, :4]).abs().max() < 1e-6
    assert torch.equal(ours[:, 4:], theirs[:, 4:])
    assert (ours[:, 4] == 1).all() and not ours[:, 6].any()
    assert ours[:, 5].sum() > 300


def test_a_balanced_pole_is_truncated_after_exactly_500_steps():
    stepper, ours, theirs = beside_gymnasium(3, 1100, balance)
    assert (ours[:, :4] - theirs[:, :4]).abs().max() < 1e-6
    assert torch.equal(ours[:, 4:], theirs[:, 4:])
    assert not ours[:, 5].any()
    assert ours[:, 6].nonzero()[:, 0].tolist() == [499] * 3 + [999] * 3


@pytest.mark.parametrize("side", [-1, 1])
@pytest.mark.parametrize("coordinate, limit", [(0, 2.4), (2, 12 * 2 * np.pi / 360)])
def test_an_episode_terminates_past_each_bound(coordinate, limit, side):
    env, plain = CartPole(2), gym.make("CartPole-v1").unwrapped
    state = torch.zeros(2, 4, dtype=torch.float64)
    # The position of the next step is the present one if nothing moves yet.
    state[:, coordinate] = side * (limit + torch.tensor([-1e-12, 1e-12], dtype=torch.float64))
    env.reset(seed=0)
    env.state.copy_(state)
    obs, _, terminated, truncated, info = env.step(torch.tensor([0, 0]))
    assert terminated.tolist() == [False, True] and not truncated.any()
    for i in range(2):
        plain.reset()
        plain.state = state[i].numpy()
        assert plain.step(0)[2] == terminated[i]
    assert torch.equal(obs[0], info["final_obs"][0]) and obs[1].abs().max() <= 0.05


def test_a_pole_that_falls_at_the_limit_has_both_flags():
    env = CartPole(1)
    env.reset(seed=0)
    env.steps.fill_(499)
    env.state[0, 2] = 0.3
    _, _, terminated, truncated, _ = env.step(torch.tensor([1]))
    assert terminated.all() and truncated.all() and not env.steps.any()


def test_motion_equals_gymnasium_in_float64_and_is_odd():
    state = torch.randn(500, 4, dtype=torch.float64, generator=generator())
    actions = torch.randint(2, (500,), generator=generator())
    env = gym.make_vec("CartPole-v1", num_envs=500).unwrapped
    env.reset(seed=0)
    env.state = state.T.numpy().copy()
    env.step(actions.numpy())
    moved = cartpole_motion(state, actions)
    torch.testing.assert_close(moved, torch.tensor(env.state.T), rtol=0, atol=1e-13)
    torch.testing.assert_close(cartpole_motion(-state, 1 - actions), -moved, rtol=0, atol=1e-13)


def test_environments_do_not_see_each_other():
    together, noise = CartPole(7), generator()
    together.reset(seed=0)
    state, actions = together.state.clone(), torch.randint(2, (30, 7), generator=noise)
    final = [together.step(row)[-1]["final_obs"] for row in actions]
    for i in range(7):
        alone, alive = CartPole(1), True
        alone.reset()
        alone.state.copy_(state[i : i + 1])
        for row, expected in zip(actions, final):
            if alive:
                _, _, terminated, _, info = alone.step(row[i : i + 1])
                torch.testing.assert_close(info["final_obs"][0], expected[i], rtol=0, atol=1e-6)
                alive = not terminated


def test_first_states_are_uniform_and_seeded():
    env = CartPole(20_000)
    first = env.reset(seed=0)[0]
    for low in -0.05, -0.025, 0.0, 0.025:
        share = ((first >= low) & (first < low + 0.025)).double().mean(0)
        assert (share - 0.25).abs().max() < 0.015  # 5 standard errors
    assert (torch.corrcoef(first.T) - torch.eye(4)).abs().max() < 0.035
    assert torch.equal(CartPole(20_000).reset(seed=0)[0], first)
    assert not torch.equal(env.reset()[0], first)
    assert not torch.equal(env.reset(seed=1)[0], first)
    assert not torch.equal(CartPole(9).reset()[0], CartPole(9).reset()[0])
    # A restart in the middle draws from the same distribution, and anew for each.
    env.state[:, 0] = 3.0
    again = env.step(torch.zeros(20_000, dtype=torch.long))[0]
    assert again.abs().max() <= 0.05 and abs(again.std() - 0.05 / 3**0.5) < 1e-3
    assert len(again[:, 0].unique()) > 15_000


def test_tensors_and_arrays_give_the_same_kind_of_rollout():
    tables = []
    for env_id in "CartPole-v1", CARTPOLE:
        stepper = make_stepper(env_id, 3, seed=0)
        policy = make_policy(stepper.env, generator=generator())
        tables.append(collect(policy, stepper, 60, generator()))
        stepper.env.close()
    columns = [{k: x for k, x in vars(table).items() if k != "complete"} for table in tables]
    a, b = ({k: (v.shape, v.dtype) for k, v in x.items()} for x in columns)
    assert [table.complete for table in tables] == [False, True]
    assert a == b
    # In the tensors' table no row is lost, and a row follows from the one before.
    table = tables[1]
    same = (table.obs[1:] == table.next_obs[:-1]).all(-1)
    assert table.valid.all() and torch.equal(same, ~table.done[:-1])
    torch.testing.assert_close(
        cartpole_motion(table.obs.flatten(0, 1), table.actions.flatten()),
        table.next_obs.flatten(0, 1),
    )


def test_one_episode_of_each_cartpole_and_its_score():
    stepper = make_stepper(CARTPOLE, 30)
    policy = make_policy(stepper.env, generator=generator())
    table = collect_episodes(policy, stepper, generator(), seed=0)
    assert not table.complete and torch.equal(table.mask, table.valid)  # what ended goes on
    lengths = table.valid.sum(0)
    for i, length in enumerate(lengths):
        assert table.valid[:length, i].all() and table.done[length - 1, i]
        assert not table.done[: length - 1, i].any()
    assert len(table.valid) == lengths.max()
    returns = evaluate(policy, CARTPOLE, episodes=30, seed=0)
    assert returns.shape == (30,) and torch.equal(returns, evaluate(policy, CARTPOLE, 30, 0))
    ours, theirs = (evaluate(policy, x, 2000) for x in (CARTPOLE, "CartPole-v1"))
    assert abs(ours.mean() - theirs.mean()) < 4 * (2 * ours.var() / 2000) ** 0.5


class NothingIsRead(TorchDispatchMode):
    "Refuses what would make a GPU wait: reading a number, or a shape that depends on one."

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        assert name not in ("_local_scalar_dense", "nonzero", "masked_select", "index"), name
        return func(*args, **kwargs or {})


def test_a_step_reads_nothing_and_stays_in_its_memory():
    stepper = make_stepper(CARTPOLE, 5, seed=0)
    env, actions = stepper.env, torch.ones(5, dtype=torch.long)
    places = [x.data_ptr() for x in (env.state, env.steps)]
    with NothingIsRead():
        rows = [stepper.step(actions) for _ in range(30)]
        with pytest.raises(AssertionError, match="local_scalar"):
            stepper.obs[0, 0].item()
    assert torch.stack([row[2] for row in rows]).any()
    assert places == [x.data_ptr() for x in (env.state, env.steps)]


def test_a_rollout_of_tensors_reads_nothing():
    "So it can be recorded as one graph."
    stepper = make_stepper(CARTPOLE, 5, seed=0)
    policy = make_policy(stepper.env, generator=generator())
    with NothingIsRead():
        table = collect(policy, stepper, 40, generator())
    assert table.done.any()


def test_bad_input_to_cartpole():
    with pytest.raises(ValueError, match="num_envs must be positive, got 0"):
        CartPole(0)
    env = CartPole(3)
    env.reset()
    for shape in (3, 1), (2,), ():
        with pytest.raises(ValueError, match=r"actions must be 3 numbers, got shape"):
            env.step(torch.zeros(shape, dtype=torch.long))
    with pytest.raises(gym.error.Error, match="Kartpole"):
        make_stepper("Kartpole-v1", 1)


@pytest.mark.parametrize("kind", [torch.int64, torch.int32, torch.bool])
def test_cartpole_takes_any_integers_and_ignores_the_default_dtype(kind):
    torch.set_default_dtype(torch.float64)
    try:
        stepper = make_stepper(CARTPOLE, 2, seed=0)
        next_obs, rewards, *_ = stepper.step(torch.tensor([0, 1]).to(kind))
    finally:
        torch.set_default_dtype(torch.float32)
    assert {x.dtype for x in (next_obs, rewards, stepper.obs)} == {torch.float32}
    expected = make_stepper(CARTPOLE, 2, seed=0).step(torch.tensor([0, 1]))[0]
    assert torch.equal(next_obs, expected)


def test_spaces_are_gymnasiums():
    ours, theirs = CartPole(3), gym.make_vec("CartPole-v1", num_envs=3)
    for name in "single_observation_space", "single_action_space", "observation_space", "action_space":
        assert getattr(ours, name) == getattr(theirs, name)
    assert ours.observation_space.contains(ours.reset(seed=0)[0].numpy())


@pytest.mark.cuda
def test_cartpole_on_a_gpu():
    stepper = make_stepper(CARTPOLE, 64, "cuda", seed=0)
    actions = torch.randint(2, (200, 64), generator=generator())
    on_device = actions.cuda()
    torch.cuda.set_sync_debug_mode("error")
    try:
        rows = [(stepper.obs, *stepper.step(row)) for row in on_device]
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for action, row in zip(actions, rows):
        obs, next_obs, rewards, terminated, truncated, _ = (x.cpu() for x in row)
        torch.testing.assert_close(cartpole_motion(obs, action), next_obs, rtol=0, atol=1e-5)
        assert torch.equal(terminated, (next_obs.abs() > torch.tensor(CartPole.limits)).any(-1))
        assert not truncated.any() and (rewards == 1).all()
    assert sum(int(row[3].sum()) for row in rows) > 64
    policy = make_policy(stepper.env, generator=generator()).cuda()
    assert collect(policy, stepper, 5, torch.Generator("cuda")).obs.is_cuda
    assert evaluate(policy, CARTPOLE, 20).shape == (20,)


@pytest.mark.cuda
def test_a_recorded_step_is_an_eager_step():
    eager, recorded = CartPole(64, "cuda"), CartPole(64, "cuda")
    actions = torch.ones(64, dtype=torch.long, device="cuda")
    recorded.reset(seed=0)
    recorded.step(actions)  # warm up what is made at first use
    graph = torch.cuda.CUDAGraph()
    graph.register_generator_state(recorded.generator)
    with torch.cuda.graph(graph):
        obs, *_ = recorded.step(actions)
    for env in eager, recorded:
        env.reset(seed=1)
    before = eager.state.clone()
    for _ in range(5):
        graph.replay()
        torch.testing.assert_close(obs, eager.step(actions)[0], rtol=0, atol=1e-6)
    assert not torch.equal(obs, before)


class Walk(CartPole):
    "Another environment of tensors, that no table knows."


def test_an_environment_that_brings_a_stepper_is_stepped_by_it_and_a_wrapper_is_not():
    assert isinstance(make_stepper(Walk(3), 3, seed=0), TensorStepper)
    wrapped = gym.wrappers.vector.RecordEpisodeStatistics(gym.make_vec("CartPole-v1", num_envs=3))
    assert type(make_stepper(wrapped, 3, seed=0)) is Stepper
    assert not hasattr(gym.vector.VectorWrapper(Walk(3)), "stepper")


def test_importing_rollouts_imports_no_tensor_environment():
    code = "import sys, po_book.rollout; sys.exit('po_book.tensor_env' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code]).returncode == 0


class Tally(gym.vector.VectorEnv):
    "Adds what it is told, and ends at 5 steps; nothing but the stated protocol."

    metadata = {"autoreset_mode": gym.vector.AutoresetMode.SAME_STEP}
    single_observation_space = gym.spaces.Box(-np.inf, np.inf, (2,))

    def __init__(self, num_envs, action=gym.spaces.Discrete(2)):
        self.num_envs, self.single_action_space, self.told = num_envs, action, []

    def reset(self, *, seed=None, options=None):
        self.total = torch.zeros(self.num_envs, 2)
        return self.total.clone(), {}

    def step(self, actions):
        self.told.append(actions)
        added = actions.reshape(self.num_envs, -1)[:, :1].float()
        final = self.total + torch.cat([torch.ones_like(added), added], -1)
        over = final[:, 0] >= 5
        self.total = final.masked_fill(over[:, None], 0)
        obs, never = self.total.clone(), torch.zeros_like(over)
        return obs, final[:, 1], over, never, {"final_obs": final}

    def stepper(self, seed=None):
        return TensorStepper(self, seed)


@pytest.mark.parametrize(
    "space, start",
    [
        (gym.spaces.Discrete(2), 0),
        (gym.spaces.Discrete(3, start=4), 4),
        (gym.spaces.MultiDiscrete([2, 3], start=[1, -1]), torch.tensor([1, -1])),
        (gym.spaces.MultiBinary(3), 0),
    ],
)
def test_a_tensor_environment_by_the_stated_protocol(space, start):
    env = Tally(3, space)
    stepper = make_stepper(env, 3, seed=0)
    policy = make_policy(env, generator=generator())
    table = collect(policy, stepper, 12, generator())
    assert torch.equal(torch.stack(env.told), table.actions + start)
    first = (table.actions + start).reshape(12, 3, -1)[..., 0].float()
    torch.testing.assert_close(table.rewards[:5], first[:5].cumsum(0))
    assert table.done[:, 0].nonzero().flatten().tolist() == [4, 9] and table.valid.all()
    returns = evaluate(policy, env, 5, deterministic=True)
    best = policy.distribution(torch.zeros(1, 2)).mode
    assert returns.shape == (5,) and best.shape[1:] == table.actions.shape[2:]


def test_tensor_actions_are_clipped_to_their_bounds_and_kept_as_sampled():
    env = Tally(4, gym.spaces.Box(np.float32([-2, 10]), np.float32([2, 12])))
    policy = make_policy(env, generator=generator())
    table = collect(policy, make_stepper(env, 4), 50, generator())
    low, high = torch.tensor([-2.0, 10.0]), torch.tensor([2.0, 12.0])
    assert torch.equal(torch.stack(env.told), table.actions.clamp(low, high))
    assert (table.actions > high).any() and (table.actions < low).any()


def test_a_tensor_environment_that_breaks_the_protocol_is_refused_by_name():
    env = Tally(2)
    env.metadata = {"autoreset_mode": gym.vector.AutoresetMode.NEXT_STEP}
    with pytest.raises(ValueError, match="autoreset_mode of env must be .*SAME_STEP, got .*NEXT_STEP"):
        TensorStepper(env)
    env = Tally(2, gym.spaces.Text(3))
    with pytest.raises(ValueError, match="action space must be one of Discrete, .*, got Text"):
        TensorStepper(env)
    env = Tally(2)
    env.reset = lambda **_: (torch.zeros(2), {})
    with pytest.raises(ValueError, match=r"observations must be \[2, entries\], got shape \(2,\)"):
        TensorStepper(env)


def test_a_generator_is_optional_in_a_recording():
    own = generator()
    assert Recorded(lambda **x: x, [None, own]).generators == [own]
