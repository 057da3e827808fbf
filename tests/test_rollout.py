import weakref

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AsyncVectorEnv, AutoresetMode, SyncVectorEnv

from po_book.batch import critic_batch
from po_book.checkpoint import capture, restore
from po_book.policies import CategoricalPolicy, GaussianPolicy
from po_book.ppo import clipped_surrogate
from po_book.rollout import (
    Stepper,
    act,
    collect,
    collect_episodes,
    episode_returns,
    evaluate,
    make_stepper,
    spawn_seed,
)
from po_book.spaces import make_policy, make_q_policy


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


class Countdown(gym.Env):
    "Observation: steps left. Ends by itself, or by a limit, after a seeded number of steps."

    observation_space = gym.spaces.Box(0, 9, (1, 1))
    action_space = gym.spaces.Discrete(3, start=-1)

    def __init__(self, truncates: bool = False):
        self.truncates = truncates

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.left = int(self.np_random.integers(1, 9))
        return np.full((1, 1), self.left, np.float32), {}

    def step(self, action):
        assert action in (-1, 0, 1)
        self.left -= 1
        over = self.left == 0
        flags = (False, over) if self.truncates else (over, False)
        return np.full((1, 1), self.left, np.float32), float(action), *flags, {}


def vector(mode: AutoresetMode, n: int = 3, **kwargs) -> SyncVectorEnv:
    return SyncVectorEnv([lambda: Countdown(**kwargs)] * n, autoreset_mode=mode)


@pytest.fixture
def policy():
    return CategoricalPolicy(1, 3, generator=generator())


@pytest.mark.parametrize("truncates", [False, True])
@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_rows_are_true_transitions_in_every_mode(policy, mode, truncates):
    stepper = Stepper(vector(mode, truncates=truncates), seed=0)
    # Two rollouts, so that one of them starts in the middle of what the first left.
    for _ in range(2):
        table = collect(policy, stepper, 25, generator())
        valid = table.valid
        assert (table.next_obs[valid] == table.obs[valid] - 1).all()
        assert (table.done == (table.next_obs.squeeze(-1) == 0))[valid].all()
        assert not table.done[~valid].any() and (table.rewards[~valid] == 0).all()
        assert (table.truncated if truncates else table.terminated)[valid].any()
        assert not (table.terminated if truncates else table.truncated).any()
        # The row after an end is a first step, unless it restarts.
        follows = table.done[:-1] & valid[1:]
        assert (table.obs[1:].squeeze(-1)[follows] >= 1).all()
        assert valid.all() == (mode != AutoresetMode.NEXT_STEP)
        assert table.complete == (mode != AutoresetMode.NEXT_STEP)


@pytest.mark.parametrize("mode", list(AutoresetMode))
def test_returns_are_sums_of_rewards_wherever_rollouts_end(policy, mode):
    "Cut into rollouts of 40, 1 and 60 rows, or in one piece; an episode of its own, or many."
    stepper = Stepper(vector(mode), seed=0)
    by_hand, total, so_far = [], torch.zeros(3), torch.zeros(3).double()
    for steps in 40, 1, 60:
        table, ended = collect(policy, stepper, steps, generator(steps)), []
        for rewards, done in zip(table.rewards, table.done):
            total += rewards
            ended += total[done].tolist()
            total[done] = 0
        returns, so_far = episode_returns(table, so_far)
        assert returns.tolist() == ended
        torch.testing.assert_close(so_far, total.double())
        by_hand += ended
    assert len(by_hand) > 30


def test_returns_of_whole_episodes_carry_nothing_over(policy):
    table = collect_episodes(policy, Stepper(vector(AutoresetMode.NEXT_STEP)), generator(), seed=0)
    returns, so_far = episode_returns(table, torch.zeros(3).double())
    assert sorted(returns.tolist()) == sorted((table.rewards * table.valid).sum(0).tolist())
    assert not so_far.any()


def test_an_environment_that_reuses_its_arrays_does_not_change_the_past(policy):
    env = SyncVectorEnv([Countdown] * 2, copy=False, autoreset_mode="NextStep")
    table = collect(policy, Stepper(env, seed=0), 10, generator())
    valid = table.valid
    assert (table.next_obs[valid] == table.obs[valid] - 1).all()


def test_one_row_of_a_limit_lets_the_others_go_on():
    env = gym.make_vec("CartPole-v1", num_envs=3)
    env.unwrapped.max_episode_steps = 5
    policy = make_policy(env, generator=generator())
    table = collect(policy, Stepper(env, seed=0), 12, generator())
    assert table.truncated[4].all() and not table.terminated.any()
    assert not table.valid[5].any() and table.valid[6].all()


def test_one_episode_of_each_environment(policy):
    table = collect_episodes(policy, Stepper(vector("NextStep", n=5)), generator(), seed=0)
    lengths = table.valid.sum(0)
    assert (lengths == table.obs[0].squeeze(-1)).all()
    for i, length in enumerate(lengths):
        assert table.valid[:length, i].all() and table.done[length - 1, i]
    assert len(table.valid) == lengths.max()


def test_same_seed_same_rollout_and_untouched_global_state(policy):
    def rollout():
        env = gym.make_vec("CartPole-v1", num_envs=2)
        fresh = make_policy(env, generator=generator())
        return collect(fresh, Stepper(env, seed=1), 50, generator())

    torch.manual_seed(123)
    state = torch.get_rng_state()
    a, b = rollout(), rollout()
    assert torch.equal(a.obs, b.obs) and torch.equal(a.actions, b.actions)
    assert torch.equal(torch.get_rng_state(), state)


def test_actions_reach_the_environment_in_its_own_form():
    env = gym.make_vec("Pendulum-v1", num_envs=2, vectorization_mode="sync")
    policy = make_policy(env, generator=generator())
    assert isinstance(policy, GaussianPolicy)
    with torch.no_grad():
        policy.log_std.fill_(3.0)
    table = collect(policy, Stepper(env, seed=0), 20, generator())
    # What is stored is what was sampled, beyond the bounds of the torque.
    assert table.actions.abs().max() > 2


def test_an_evaluation_leaves_the_mode_as_it_was():
    env = gym.make_vec("CartPole-v1", num_envs=2)
    policy = make_q_policy(env, generator=generator())
    returns = evaluate(policy, "CartPole-v1", 5)
    assert policy.training and torch.equal(returns, evaluate(policy.eval(), "CartPole-v1", 5))
    assert not policy.training


def test_evaluate_counts_every_reward_of_one_episode_each():
    env = gym.make_vec("CartPole-v1", num_envs=2)
    policy = make_policy(env, generator=generator())
    returns = evaluate(policy, "CartPole-v1", episodes=20, seed=3)
    assert returns.shape == (20,) and (returns == returns.round()).all()
    assert torch.equal(returns, evaluate(policy, "CartPole-v1", episodes=20, seed=3))
    assert not torch.equal(returns, evaluate(policy, "CartPole-v1", episodes=20, seed=4))


def test_a_policy_that_always_pushes_right_earns_what_a_plain_loop_says():
    policy = CategoricalPolicy(4, 2, generator=generator())
    with torch.no_grad():
        policy.actor[-1].weight.zero_()
        policy.actor[-1].bias.copy_(torch.tensor([-50.0, 50.0]))
    env, lengths = gym.make("CartPole-v1"), []
    for seed in range(200):
        env.reset(seed=seed)
        lengths.append(1)
        while not any(env.step(1)[2:4]):
            lengths[-1] += 1
    returns = evaluate(policy, "CartPole-v1", episodes=200)
    assert set(returns.tolist()) == set(lengths)
    assert abs(returns.mean() - sum(lengths) / 200) < 0.3


def test_bad_arguments():
    policy = CategoricalPolicy(4, 2, generator=generator())
    with pytest.raises(ValueError, match="episodes must be positive, got 0"):
        evaluate(policy, "CartPole-v1", episodes=0)
    with pytest.raises(gym.error.Error, match="Kartpole"):
        evaluate(policy, "Kartpole-v1")


@pytest.mark.parametrize("env_id", ["CartPole-v1", "Pendulum-v1"])
def test_a_float64_default_changes_nothing(env_id):
    torch.set_default_dtype(torch.float64)
    try:
        env = gym.make_vec(env_id, num_envs=2)
        table = collect(make_policy(env, generator=generator()), Stepper(env, seed=0), 3)
    finally:
        torch.set_default_dtype(torch.float32)
    floats = table.obs, table.next_obs, table.rewards
    assert {x.dtype for x in floats} == {torch.float32}


def test_a_vector_is_evaluated_in_rounds_of_whole_episodes():
    "Three environments, eight episodes; the environments stay open."
    env = gym.make_vec("CartPole-v1", num_envs=3)
    policy = make_policy(env, generator=generator())
    returns = evaluate(policy, env, 8)
    assert returns.shape == (8,) and not env.closed
    assert torch.equal(returns[:3], evaluate(policy, env, 3))
    assert not torch.equal(returns[:3], returns[3:6])
    assert torch.equal(returns, evaluate(policy, env, 8))


def test_only_the_first_round_is_seeded(policy):
    "Seeded again, a round would start where the one before did."
    env, seeds = vector(AutoresetMode.NEXT_STEP), []
    reset = env.reset
    env.reset = lambda *, seed=None, options=None: seeds.append(seed) or reset(seed=seed, options=options)
    assert len(evaluate(policy, env, 8, seed=5)) == 8
    assert seeds == [None, spawn_seed(5, "evaluation", 0), None, None]


class Echo(gym.Env):
    "Shows samples of a space and keeps what it showed and was told; three steps long."

    def __init__(self, obs=gym.spaces.Box(-1, 1, (2,)), action=gym.spaces.Discrete(2)):
        self.observation_space, self.action_space = obs, action
        self.shown, self.told = [], []

    def show(self):
        self.shown.append(self.observation_space.sample())
        return self.shown[-1]

    def reset(self, *, seed=None, options=None):
        self.left = 3
        if seed is not None:
            self.observation_space.seed(seed)
        return self.show(), {}

    def step(self, action):
        assert self.action_space.contains(action), action
        self.told.append(np.copy(action))
        self.left -= 1
        return self.show(), 1.0, self.left == 0, False, {}


spaces = gym.spaces
NESTED = spaces.Dict(
    b=spaces.Tuple([spaces.Discrete(3, start=-1), spaces.MultiBinary((2, 2))]),
    a=spaces.Box(-1, 1, (2, 2)),
    c=spaces.MultiDiscrete([[2, 3], [4, 2]], start=[[0, 1], [-2, 5]]),
)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(
    "space",
    [
        spaces.Discrete(4, start=3),
        spaces.MultiDiscrete([3, 2]),
        spaces.MultiBinary(5),
        spaces.Box(-1, 1, ()),
        spaces.Box(-1, 1, (2, 1, 3)),
        spaces.Box(0, 255, (4,), np.uint8),
        NESTED,
    ],
)
def test_observations_are_gymnasiums_flat_vectors(space, mode):
    envs = [Echo(obs=space) for _ in range(3)]
    stepper = Stepper(SyncVectorEnv([lambda e=e: e for e in envs], autoreset_mode=mode), seed=0)
    policy = make_policy(stepper.env, generator=generator())
    table = collect(policy, stepper, 10, generator())
    assert table.obs.dtype == table.next_obs.dtype == torch.float32
    size = spaces.utils.flatdim(space)
    assert table.obs.shape == (10, 3, size)
    for i, env in enumerate(envs):
        flat = [spaces.utils.flatten(space, x) for x in env.shown]
        expected = torch.tensor(np.array(flat), dtype=torch.float32).reshape(len(flat), size)
        valid = table.valid[:, i]
        # What was shown are episodes of three steps, each with a first state.
        rows = [4 * (t // 3) + t % 3 for t in range(int(valid.sum()))]
        assert torch.equal(table.obs[valid, i], expected[rows])
        assert torch.equal(table.next_obs[valid, i], expected[[t + 1 for t in rows]])


@pytest.mark.parametrize(
    "space, sizes, start",
    [
        (spaces.MultiDiscrete([2, 3]), [2, 3], [0, 0]),
        (spaces.MultiDiscrete([[2], [3]], start=[[4], [-1]]), [2, 3], [4, -1]),
        (spaces.MultiBinary((1, 2)), [2, 2], [0, 0]),
    ],
)
def test_rows_of_choices_reach_the_environment_in_its_form(space, sizes, start):
    envs = [Echo(action=space) for _ in range(2)]
    stepper = Stepper(SyncVectorEnv([lambda e=e: e for e in envs], autoreset_mode="SameStep"))
    policy = make_policy(stepper.env, generator=generator())
    table = collect(policy, stepper, 30, generator())
    assert table.actions.shape == (30, 2, 2)
    assert [int(table.actions[..., k].max()) for k in range(2)] == [n - 1 for n in sizes]
    for i, env in enumerate(envs):
        told = np.array(env.told).reshape(30, 2)
        assert (told == table.actions[:, i].numpy() + start).all()
        assert env.told[0].shape == space.shape and env.told[0].dtype == space.dtype


def test_bounded_actions_are_spread_over_their_bounds_and_kept_unclipped():
    space = spaces.Box(np.float32([10, -2000]), np.float32([12, 2000]))
    envs = [Echo(action=space) for _ in range(2)]
    stepper = Stepper(SyncVectorEnv([lambda e=e: e for e in envs], autoreset_mode="SameStep"))
    policy = make_policy(stepper.env, generator=generator())
    table = collect(policy, stepper, 400, generator())
    told = torch.tensor(np.array([env.told for env in envs])).transpose(0, 1)
    unit = (table.actions - torch.tensor([11.0, 0])) / torch.tensor([1.0, 2000])
    low, high = torch.tensor(space.low), torch.tensor(space.high)
    expected = low + (unit.clamp(-1, 1) + 1) / 2 * (high - low)
    torch.testing.assert_close(told, expected, atol=5e-4, rtol=0)  # float32 at 2000
    assert unit.abs().max() > 2
    torch.testing.assert_close(unit.std((0, 1)), torch.ones(2), atol=0.1, rtol=0)
    logp = torch.distributions.Normal(policy.actor(table.obs), 1.0).log_prob(unit).sum(-1)
    ours = policy.evaluate(table.obs, table.actions)[0]
    torch.testing.assert_close(ours, logp - torch.tensor(2000.0).log(), atol=1e-3, rtol=0)


def test_images_stay_bytes_and_one_gradient_step_of_ppo_runs():
    envs = [Echo(obs=spaces.Box(0, 255, (6, 5, 3), np.uint8)) for _ in range(2)]
    stepper = Stepper(SyncVectorEnv([lambda e=e: e for e in envs]), seed=0)
    policy = make_policy(stepper.env, generator=generator())
    table = collect(policy, stepper, 8, generator())
    assert table.obs.dtype == table.next_obs.dtype == torch.uint8
    assert (table.obs[0, 1].reshape(6, 5, 3).numpy() == envs[1].shown[0]).all()
    batch = critic_batch(policy, table, 0.9, 0.8)
    logp, entropy = policy.evaluate(batch["obs"], batch["actions"])
    torch.testing.assert_close(logp.detach(), batch["logp"])
    values = policy.value(batch["obs"])
    clipped_surrogate(logp, batch["logp"], batch["advantages"]).mean().backward()
    (values - batch["returns"]).pow(2).mean().backward()
    assert all(p.grad.abs().sum() > 0 for p in policy.parameters() if p.ndim > 1)


def test_what_is_no_numbers_is_refused_by_name():
    for kwargs, message in (
        ({"obs": spaces.Dict(x=spaces.Text(3))}, r"observation space\['x'\] must be"),
        ({"action": spaces.Tuple([spaces.Discrete(2)])}, "action space must be Discrete, MultiDiscrete"),
    ):
        env = gym.vector.VectorEnv()
        env.single_observation_space = kwargs.get("obs", spaces.Discrete(2))
        env.single_action_space = kwargs.get("action", spaces.Discrete(2))
        with pytest.raises(ValueError, match=message):
            Stepper(env)


class Scripted(Echo):
    "Shows and pays what it is given, one after the other."

    def __init__(self, shows, pays=(1.0,) * 9):
        super().__init__(gym.spaces.Box(-np.inf, np.inf, (1,)))
        self.shows, self.pays = iter(shows), iter(pays)

    def show(self):
        return np.float32([next(self.shows)])

    def step(self, action):
        obs, _, *rest = super().step(action)
        return obs, next(self.pays), *rest


@pytest.mark.parametrize(
    "mode, shows, steps",
    [
        ("NextStep", [np.nan], 0),
        ("NextStep", [0, 1, np.inf], 2),
        ("Disabled", [0, 1, 2, 3, np.nan], 3),
        ("SameStep", [0, 1, 2, np.nan, 0], 3),
        ("SameStep", [0, 1, 2, 3, np.nan], 3),
    ],
)
def test_no_observation_escapes_the_check(mode, shows, steps):
    env = SyncVectorEnv([lambda: Scripted(shows)], autoreset_mode=mode)
    with pytest.raises(ValueError, match="observation of environment 0 is not finite: .(nan|inf)"):
        stepper = Stepper(env)
        for _ in range(steps):
            stepper.step(torch.tensor([0]))
    # The observation before is let through.
    env = SyncVectorEnv([lambda: Scripted(shows)], autoreset_mode=mode)
    if steps:
        stepper = Stepper(env)
        for _ in range(steps - 1):
            stepper.step(torch.tensor([0]))


@pytest.mark.parametrize("kind", [int, np.float32, np.float64, np.int64, bool, np.array])
def test_a_reward_may_be_any_number(kind):
    table = collect_episodes(
        CategoricalPolicy(1, 2), make_stepper(lambda: Scripted(range(9), [kind(1)] * 9), 1)
    )
    assert table.rewards.dtype == torch.float32 and table.rewards.tolist() == [[1.0]] * 3


def test_a_reward_that_is_no_number_is_refused_by_name():
    pays = [np.array([1.0, 2.0])] * 9
    stepper = make_stepper(lambda: Scripted(range(9), pays), 1)
    with pytest.raises(ValueError, match="a reward must be one number"):
        stepper.step(torch.tensor([0]))


def test_rewards_and_flags_of_another_shape_are_refused_by_name():
    class Odd(SyncVectorEnv):
        def step(self, actions):
            obs, *columns, info = super().step(actions)
            columns[odd] = columns[odd][:, None]
            return obs, *columns, info

    for odd, name in enumerate(("rewards", "terminated", "truncated")):
        stepper = Stepper(Odd([lambda: Echo()] * 2))
        with pytest.raises(ValueError, match=rf"{name} must be 2 numbers, got shape \(2, 1\)"):
            stepper.step(torch.tensor([0, 1]))


def test_a_function_that_returns_the_same_environment_is_refused():
    env = Echo()
    for again in lambda: env, lambda: gym.wrappers.TimeLimit(env, 5):
        with pytest.raises(ValueError, match="makes a new environment at every call, got 1 for 3"):
            make_stepper(again, 3)
    assert make_stepper(lambda: env, 1).env.num_envs == 1


class Clock(Echo):
    "Shows the seconds since 1970 as float64, and one more at every step."

    def __init__(self):
        super().__init__(gym.spaces.Dict(t=gym.spaces.Box(0, 2e9, (1,), np.float64)))
        self.now = 1.7e9

    def show(self):
        self.now += 1
        return {"t": np.array([self.now])}


@pytest.mark.parametrize("mode", ["NextStep", "SameStep", "Disabled"])
def test_float64_is_normalised_before_it_is_rounded(mode):
    stepper = Stepper(SyncVectorEnv([Clock] * 2, autoreset_mode=mode), seed=0)
    policies = [make_policy(stepper.env, generator=generator(), normalize_obs=on) for on in (0, 1)]
    plain, normalizing = policies
    assert collect(plain, stepper, 2).obs.dtype == torch.float32
    table = collect(normalizing, stepper, 12, generator())
    assert table.obs.dtype == table.next_obs.dtype == torch.float64
    valid = table.valid
    assert (table.next_obs[valid] - table.obs[valid] == 1).all()
    normalizing.observe(table.obs.flatten(0, 1))
    seen = normalizing.normalizer(table.obs)
    assert seen.dtype == torch.float32 and len(seen.unique()) == len(table.obs.unique())
    assert critic_batch(normalizing, table, 0.9, 0.9)["advantages"].isfinite().all()
    assert collect(plain, stepper, 1).next_obs.dtype == torch.float32
    with_float32 = Stepper(SyncVectorEnv([lambda: Countdown()] * 2), seed=0)
    normalizing = make_policy(with_float32.env, normalize_obs=True)
    assert collect(normalizing, with_float32, 2).obs.dtype == torch.float32


def test_an_episode_without_an_end_is_an_error_and_one_that_just_ends_is_not(policy):
    stepper = Stepper(SyncVectorEnv([lambda: Echo(gym.spaces.Box(0, 1, (1,)))] * 2))
    two = CategoricalPolicy(1, 2)
    assert len(collect_episodes(two, stepper, max_steps=3).valid) == 3
    assert evaluate(two, stepper.env, 2, max_steps=3).tolist() == [3.0, 3.0]
    for run in (
        lambda: collect_episodes(two, stepper, max_steps=2),
        lambda: evaluate(two, stepper.env, 2, max_steps=2),
    ):
        with pytest.raises(ValueError, match="not ended after 2 steps; give the environment"):
            run()
    assert two.training
    with pytest.raises(ValueError, match="max_steps must be positive, got 0"):
        evaluate(two, stepper.env, 2, max_steps=0)


def test_an_evaluation_keeps_no_observations():
    policy, seen = CategoricalPolicy(4, 2, generator=generator()), []
    plain = policy.act

    def watched(obs, generator=None):
        alive = sum(ref() is not None for ref in seen)
        seen.append(weakref.ref(obs))
        assert alive <= 2
        return plain(obs, generator)

    policy.act = watched
    returns = evaluate(policy, "CartPole-v1", 10)
    assert len(seen) == returns.max()


def test_deterministic_actions_are_the_most_likely_ones():
    two = CategoricalPolicy(1, 3, generator=generator())
    with torch.no_grad():
        two.actor[-1].weight.zero_()
        two.actor[-1].bias.copy_(torch.tensor([0.0, 0.1, 0.0]))
    # Action -1 + 1 = 0 pays nothing; the others pay -1 and 1.
    env = vector(AutoresetMode.NEXT_STEP, n=20)
    assert not evaluate(two, env, 20, deterministic=True).any()
    assert evaluate(two, env, 20).any()
    # A policy without a distribution does what it does.
    q = make_q_policy(gym.make_vec("CartPole-v1"), generator=generator())
    returns = evaluate(q, "CartPole-v1", 5)
    assert torch.equal(returns, evaluate(q, "CartPole-v1", 5, deterministic=True))


def test_asynchronous_environments_give_the_same_rollout():
    tables = []
    for kind in SyncVectorEnv, AsyncVectorEnv:
        env = kind([lambda: Countdown()] * 2)
        policy = CategoricalPolicy(1, 3, generator=generator())
        tables.append(collect(policy, Stepper(env, seed=0), 15, generator()))
        returns = evaluate(policy, env, 4)
        tables[-1] = {**vars(tables[-1]), "returns": returns}
        env.close()
    for name in tables[0]:
        assert np.array_equal(tables[0][name], tables[1][name]), name


@pytest.mark.parametrize(
    "action",
    [
        spaces.Discrete(3, start=5),
        spaces.MultiDiscrete([[2], [3]], start=[[4], [-1]]),
        spaces.MultiBinary(4),
        spaces.Box(np.float32([10, 0]), np.float32([12, 1])),
    ],
)
def test_one_action_for_one_raw_observation(action):
    env = Echo(NESTED, action)
    policy = make_policy(SyncVectorEnv([lambda: env]), generator=generator())
    obs, _ = env.reset(seed=0)
    for deterministic in False, True:
        drawn = act(policy, obs, env, generator(), deterministic)
        assert action.contains(drawn)
        flat = torch.tensor(spaces.utils.flatten(NESTED, obs), dtype=torch.float32)[None]
        mode = policy.distribution(flat).mode
        stepper = Stepper(SyncVectorEnv([lambda: Echo(NESTED, action)]))
        chosen = mode if deterministic else policy.act(flat, generator())
        stepper.step(chosen.detach())
        assert (np.asarray(drawn) == stepper.env.envs[0].told[0]).all()
    assert policy.training
    obs["a"] = obs["a"][0]
    with pytest.raises(ValueError, match=r"observation\['a'\] must be of shape \(2, 2\), got shape"):
        act(policy, obs, env)


def test_one_action_does_not_explore():
    env = gym.make("CartPole-v1")
    q = make_q_policy(gym.make_vec("CartPole-v1"), generator=generator())
    obs, _ = env.reset(seed=0)
    best = q.q(torch.tensor(obs)).argmax()
    assert {act(q, obs, env).item() for _ in range(50)} == {best.item()} and q.training
    vectors = gym.make_vec("CartPole-v1")
    assert act(q, obs, vectors) == best


class Masked(Echo):
    "Refuses what its random mask forbids; masks of what is over allow nothing."

    def __init__(self, action, start=0):
        sizes = [action.n] if isinstance(action, spaces.Discrete) else np.ravel(action.nvec)
        self.sizes, self.cuts = sizes, np.cumsum(sizes)[:-1]
        box = spaces.Box(-1, 1, (2,))
        mask = spaces.MultiBinary(int(sum(sizes)))
        super().__init__(spaces.Dict(a=box, action_mask=mask, z=spaces.Discrete(3)), action)

    def show(self):
        obs = super().show()
        if self.left == 0:
            self.mask = np.zeros(sum(self.sizes), np.int8)
        else:
            one = [np.arange(n) == self.np_random.integers(n) for n in self.sizes]
            self.mask = np.concatenate(one).astype(np.int8)
            self.mask |= self.np_random.integers(2, size=len(self.mask), dtype=np.int8)
        return obs | {"action_mask": self.mask}

    def step(self, action):
        choices = np.ravel(np.asarray(action) - self.action_space.start)
        for choice, part in zip(choices, np.split(self.mask, self.cuts)):
            assert part[choice] == 1
        return super().step(action)


@pytest.mark.parametrize("mode", list(AutoresetMode))
@pytest.mark.parametrize(
    "action", [spaces.Discrete(4, start=2), spaces.MultiDiscrete([2, 5, 3], start=[0, 3, -1])]
)
def test_a_mask_in_the_observation_rules_actions_out(action, mode):
    env = SyncVectorEnv([lambda: Masked(action)] * 3, autoreset_mode=mode)
    policy = make_policy(env, generator=generator(), normalize_obs=True)
    table = collect(policy, Stepper(env, seed=0), 60, generator())
    logp, entropy = policy.evaluate(table.obs[table.valid], table.actions[table.valid])
    assert (logp > -20).all() and (entropy >= 0).all()
    # Before anything is learned, what is allowed is equally likely.
    mask, sizes = table.obs[table.valid][:, policy.mask], Masked(action).sizes
    left = [part.sum(-1) for part in mask.split([int(n) for n in sizes], -1)]
    expected = -sum(n.log() for n in left)
    torch.testing.assert_close(logp, expected, atol=0.2, rtol=0)
    torch.testing.assert_close(entropy, -expected, atol=0.05, rtol=0)
    grads = torch.autograd.grad((logp + entropy).sum(), policy.actor_parameters())
    assert all(g.isfinite().all() for g in grads)


def test_a_mask_that_allows_nothing_is_refused_where_one_must_act():
    class Stuck(Masked):
        def show(self):
            obs = super().show()
            self.mask[2:] = 0
            return obs

    env = SyncVectorEnv([lambda: Masked(spaces.MultiDiscrete([2, 3])), lambda: Stuck(spaces.MultiDiscrete([2, 3]))])
    with pytest.raises(ValueError, match="action_mask of environment 1 allows nothing"):
        Stepper(env, seed=0)


def test_masks_that_do_not_fit_are_refused_by_name():
    def env(mask, action):
        vectors = gym.vector.VectorEnv()
        vectors.single_observation_space = spaces.Dict(a=spaces.Discrete(2), action_mask=mask)
        vectors.single_action_space = action
        return vectors

    two = spaces.Discrete(2)
    for bad in env(spaces.MultiBinary(3), two), env(two, two), env(spaces.MultiBinary(2), spaces.Box(0, 1, (2,))):
        with pytest.raises(ValueError, match="action_mask must be a Box or MultiBinary with an entry"):
            make_policy(bad)
    with pytest.raises(ValueError, match="action_mask must be left out: this method has no logits"):
        make_q_policy(env(spaces.MultiBinary(2), two))


@pytest.mark.parametrize(
    "make",
    [
        lambda: SyncVectorEnv([Clock] * 2),
        lambda: SyncVectorEnv([lambda: Masked(spaces.Discrete(4))] * 2),
        lambda: SyncVectorEnv([Countdown] * 2, copy=False),
    ],
)
def test_a_stepper_can_be_captured_and_restored(make):
    stepper, again = Stepper(make(), seed=0), Stepper(make(), seed=1)
    policy = make_policy(stepper.env, generator=generator(), normalize_obs=True)
    collect(policy, stepper, 5, generator())
    restore(again, capture(stepper))
    tables = [vars(collect(policy, x, 9, generator())) for x in (stepper, again)]
    assert tables[0].pop("complete") == tables[1].pop("complete")
    assert all(torch.equal(tables[0][name], tables[1][name]) for name in tables[0])
