import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv
from torch.utils._python_dispatch import TorchDispatchMode

from po_book.rollout import (
    CartPole,
    CategoricalPolicy,
    DeterministicPolicy,
    GaussianPolicy,
    Normalizer,
    QPolicy,
    Stepper,
    TensorStepper,
    cartpole_motion,
    collect,
    collect_episodes,
    episode_returns,
    evaluate,
    make_deterministic_policy,
    make_policy,
    make_q_policy,
    make_stepper,
    mlp,
)


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


def test_gaussian_gradient_against_torch():
    policy = GaussianPolicy(2, 3, generator=generator())
    obs, actions = torch.randn(4, 2), torch.randn(4, 3)
    ours = torch.autograd.grad(policy.evaluate(obs, actions)[0].sum(), policy.parameters(), allow_unused=True)
    normal = torch.distributions.Normal(policy.actor(obs), policy.log_std.exp())
    theirs = torch.autograd.grad(normal.log_prob(actions).sum(), policy.parameters(), allow_unused=True)
    for a, b in zip(ours, theirs):
        assert (a is None) == (b is None)
        if a is not None:
            torch.testing.assert_close(a, b)


def test_a_distribution_says_what_evaluate_says():
    for policy, actions in (
        (CategoricalPolicy(2, 3, generator=generator()), torch.tensor([0, 2, 1, 1])),
        (GaussianPolicy(2, 3, generator=generator()), torch.randn(4, 3)),
    ):
        obs = torch.randn(4, 2)
        logp, entropy = policy.evaluate(obs, actions)
        torch.testing.assert_close(policy.distribution(obs).log_prob(actions), logp)
        torch.testing.assert_close(policy.distribution(obs).entropy(), entropy)


def test_actor_parameters_are_what_the_distribution_depends_on():
    for policy in CategoricalPolicy(2, 3), GaussianPolicy(2, 3):
        actions = policy.act(torch.zeros(5, 2))
        logp, _ = policy.evaluate(torch.ones(5, 2), actions)
        grads = torch.autograd.grad(logp.sum(), list(policy.parameters()), allow_unused=True)
        needed = {p for p, g in zip(policy.parameters(), grads) if g is not None}
        assert set(policy.actor_parameters()) == needed


def test_a_q_policy_explores_in_training_mode_only():
    policy, obs = QPolicy(4, 3, generator=generator()), torch.randn(1, 4).expand(30_000, -1)
    best = policy.q(obs[:1]).argmax().item()
    policy.epsilon = 0.3
    shares = policy.act(obs, generator()).bincount(minlength=3) / 30_000
    expected = torch.full((3,), 0.1)
    expected[best] = 0.8
    torch.testing.assert_close(shares, expected, atol=0.01, rtol=0)
    assert (policy.eval().act(obs, generator()) == best).all()


def test_a_deterministic_policy_stays_within_uneven_bounds():
    low, high = torch.tensor([-1.0, 2.0]), torch.tensor([3.0, 2.5])
    policy = DeterministicPolicy(4, low, high, generator=generator())
    with torch.no_grad():
        policy.actor[-1].bias.copy_(torch.tensor([20.0, -20.0]))
    obs = torch.randn(5000, 4)
    torch.testing.assert_close(policy.mean(obs[:1]), torch.tensor([[3.0, 2.0]]))
    policy.sigma = 0.2
    noisy = policy.act(obs, generator())
    assert (noisy >= low).all() and (noisy <= high).all() and noisy.std(0).min() > 0
    # Half of the noise is cut off at the bound; the rest scales with the width.
    inside = (policy.mean(obs) - noisy).abs().mean(0)
    torch.testing.assert_close(inside[0] / inside[1], torch.tensor(8.0), atol=0.6, rtol=0)
    assert torch.equal(policy.eval().act(obs), policy.mean(obs).detach())


def test_the_critic_sees_actions_in_half_widths():
    wide = DeterministicPolicy(4, torch.tensor([-20.0]), torch.tensor([20.0]), generator=generator())
    unit = DeterministicPolicy(4, torch.tensor([-1.0]), torch.tensor([1.0]), generator=generator())
    obs, actions = torch.randn(6, 4), torch.rand(6, 1)
    torch.testing.assert_close(wide.q(obs, 20 * actions), unit.q(obs, actions))


def test_a_score_leaves_the_mode_as_it_was():
    env = gym.make_vec("CartPole-v1", num_envs=2)
    policy = make_q_policy(env, generator=generator())
    returns = evaluate(policy, "CartPole-v1", 5)
    assert policy.training and torch.equal(returns, evaluate(policy.eval(), "CartPole-v1", 5))
    assert not policy.training


@pytest.mark.parametrize(
    "make, env_id, message",
    [
        (make_q_policy, "Pendulum-v1", "action space must be Discrete, got Box"),
        (make_deterministic_policy, "CartPole-v1", "action space must be a Box, got Discrete"),
    ],
)
def test_a_method_that_does_not_fit_the_actions(make, env_id, message):
    with pytest.raises(ValueError, match=message):
        make(gym.make_vec(env_id, num_envs=1))


def test_a_deterministic_policy_needs_bounds():
    with pytest.raises(ValueError, match="action bounds must be finite"):
        DeterministicPolicy(2, torch.tensor([-1.0]), torch.tensor([torch.inf]))


def test_evaluate_counts_every_reward_of_one_episode_each():
    env = gym.make_vec("CartPole-v1", num_envs=2)
    policy = make_policy(env, generator=generator())
    returns = evaluate(policy, "CartPole-v1", episodes=20, seed=3)
    assert returns.shape == (20,) and (returns == returns.round()).all()
    assert torch.equal(returns, evaluate(policy, "CartPole-v1", episodes=20, seed=3))
    assert not torch.equal(returns, evaluate(policy, "CartPole-v1", episodes=20, seed=4))


def test_a_policy_that_always_pushes_right_scores_what_a_plain_loop_says():
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


@pytest.mark.parametrize(
    "field, space, message",
    [
        ("single_observation_space", gym.spaces.Discrete(3), "observation space"),
        ("single_action_space", gym.spaces.MultiBinary(3), "action space"),
    ],
)
def test_spaces_that_do_not_fit(field, space, message):
    env = gym.make_vec("CartPole-v1", num_envs=1)
    setattr(env.unwrapped, field, space)
    with pytest.raises(ValueError, match=message):
        make_policy(env)


def test_bad_arguments():
    policy = CategoricalPolicy(4, 2, generator=generator())
    with pytest.raises(ValueError, match="episodes must be positive, got 0"):
        evaluate(policy, "CartPole-v1", episodes=0)
    with pytest.raises(gym.error.Error, match="Kartpole"):
        evaluate(policy, "Kartpole-v1")


def test_mlp_is_orthogonal_and_seeded():
    a, b = mlp([5, 8, 3], 0.5, generator()), mlp([5, 8, 3], 0.5, generator())
    assert all(torch.equal(x, y) for x, y in zip(a.parameters(), b.parameters()))
    weight = a[-1].weight.detach()
    torch.testing.assert_close(weight @ weight.T, 0.25 * torch.eye(3))
    assert all((layer.bias == 0).all() for layer in a if hasattr(layer, "bias"))


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


# CartPole as tensors

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
    a, b = ({k: (v.shape, v.dtype) for k, v in vars(x).items()} for x in tables)
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
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


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
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


@pytest.mark.parametrize("cuts", [[50], [1, 2, 3], [10, 10, 90], []])
def test_the_normalizer_has_the_moments_of_all_it_saw(cuts):
    obs = torch.randn(100, 3, generator=generator()) * torch.tensor([1.0, 1e-3, 1e4]) + 5
    normalizer = Normalizer(3)
    for part in obs.tensor_split(cuts):
        normalizer.update(part)
    torch.testing.assert_close(normalizer.mean, obs.double().mean(0))
    torch.testing.assert_close(normalizer.variance, obs.double().var(0, correction=0))
    out = normalizer(obs)
    assert out.dtype == torch.float32
    torch.testing.assert_close(out.mean(0), torch.zeros(3), atol=1e-4, rtol=0)
    torch.testing.assert_close(out.std(0, correction=0)[[0, 2]], torch.ones(2), atol=1e-3, rtol=0)


def test_a_new_normalizer_changes_outliers_only_and_an_empty_batch_nothing():
    normalizer, obs = Normalizer(2), torch.tensor([[3.0, -1e6]])
    normalizer.update(torch.empty(0, 2))
    torch.testing.assert_close(normalizer(obs), torch.tensor([[3.0, -10.0]]))


def test_a_normalizer_is_part_of_actor_and_critic_and_no_parameter():
    env = gym.make_vec("CartPole-v1")
    plain, scaled = (make_policy(env, generator=generator(), normalize_obs=on) for on in (False, True))
    scaled.normalizer.update(torch.randn(50, 4, generator=generator()) + 3)
    obs = torch.randn(7, 4, generator=generator())
    torch.testing.assert_close(scaled.actor(obs), plain.actor(scaled.normalizer(obs)))
    torch.testing.assert_close(scaled.value(obs), plain.value(scaled.normalizer(obs)))
    assert len(list(scaled.parameters())) == len(list(plain.parameters()))
    assert len(scaled.actor_parameters()) == 6


def test_a_vector_is_scored_in_rounds_of_whole_episodes():
    "Three environments, eight episodes; the environments stay open."
    env = gym.make_vec("CartPole-v1", num_envs=3)
    policy = make_policy(env, generator=generator())
    returns = evaluate(policy, env, 8)
    assert returns.shape == (8,) and not env.closed
    assert torch.equal(returns[:3], evaluate(policy, env, 3))
    assert not torch.equal(returns[:3], returns[3:6])
    assert torch.equal(returns, evaluate(policy, env, 8))
