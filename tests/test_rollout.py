import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.vector import AutoresetMode, SyncVectorEnv

from po_book.rollout import (
    CategoricalPolicy,
    DeterministicPolicy,
    GaussianPolicy,
    QPolicy,
    Stepper,
    collect,
    collect_episodes,
    evaluate,
    make_deterministic_policy,
    make_policy,
    make_q_policy,
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
def test_finished_returns_are_sums_of_rewards(policy, mode):
    stepper = Stepper(vector(mode, n=1), seed=0)
    table = collect(policy, stepper, 40, generator())
    returns, total = [], 0.0
    for reward, done in zip(table.rewards[:, 0].tolist(), table.done[:, 0].tolist()):
        total += reward
        if done:
            returns.append(total)
            total = 0.0
    assert stepper.finished == returns


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
