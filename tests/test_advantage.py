"Advantage estimates: peers, invariances, gradients, episode ends, bad input."
import gymnasium
import numpy as np
import pytest
import torch
from stable_baselines3.common.buffers import RolloutBuffer

from po_book.advantage import (
    gae,
    lambda_return,
    n_step_advantage,
    normalize,
    td_error,
    td_target,
)
from po_book.mdp import random_mdp, sample_trajectories
from po_book.policy_gradient import discounted_returns

GAMMA, LAM = 0.97, 0.9
LENGTHS = [1, 2, 7, 8, 9, 15, 16, 17, 33, 63, 64, 65, 72, 513]


def rollout(T, N, seed=0, p_end=0.08, dtype=torch.float64):
    "Rewards, values, next values and flags, consistent inside every episode."
    generator = torch.Generator().manual_seed(seed)
    rewards, values, last = torch.randn(3, T, N, dtype=dtype, generator=generator)
    terminated, truncated = torch.rand(2, T, N, generator=generator) < p_end
    done = terminated | truncated
    next_values = torch.where(done, last, torch.cat([values[1:], last[-1:]]))
    return rewards, values, next_values, terminated, done


def naive_gae(rewards, values, next_values, terminated, done, gamma, lam):
    "The recursion in plain Python floats."
    T, N = rewards.shape
    out = np.zeros((T, N))
    for i in range(N):
        after = 0.0
        for t in reversed(range(T)):
            follows = 0.0 if terminated[t, i] else float(next_values[t, i])
            delta = float(rewards[t, i]) + gamma * follows - float(values[t, i])
            after = delta + (0.0 if done[t, i] else gamma * lam * after)
            out[t, i] = after
    return torch.from_numpy(out)


def close(a, b, atol=1e-12):
    torch.testing.assert_close(a, b, rtol=0, atol=atol)


@pytest.mark.parametrize("T", LENGTHS)
@pytest.mark.parametrize("N", [1, 3])
@pytest.mark.parametrize("p_end", [0.0, 0.1, 1.0])
def test_gae_is_the_recursion(T, N, p_end):
    steps = rollout(T, N, seed=T, p_end=p_end)
    close(gae(*steps, GAMMA, LAM), naive_gae(*steps, GAMMA, LAM))


@pytest.mark.parametrize("seed", range(20))
def test_gae_on_random_masks_and_factors(seed):
    rng = np.random.default_rng(seed)
    T, N = rng.integers(1, 200), rng.integers(1, 6)
    gamma, lam = rng.choice([0.0, 1.0, *rng.random(2)], 2)
    steps = rollout(T, N, seed, p_end=rng.random() ** 2)
    close(gae(*steps, gamma, lam), naive_gae(*steps, gamma, lam), atol=1e-11)


@pytest.mark.parametrize("shape", [(2048, 64), (128, 4096)])
def test_float32_is_as_good_as_the_loop(shape):
    steps = rollout(*shape, p_end=0.01, dtype=torch.float32)
    delta = td_error(*steps[:4], GAMMA)
    loop, fast = [delta[-1]], gae(*steps, GAMMA, LAM)
    for t in reversed(range(len(delta) - 1)):
        loop.append(delta[t] + GAMMA * LAM * loop[-1] * ~steps[4][t])
    loop = torch.stack(loop[::-1])
    assert fast.dtype == torch.float32
    assert (fast - loop).abs().max() <= 1e-6 * loop.abs().max()


def test_inputs_are_not_overwritten():
    steps = rollout(50, 3)
    before = [x.clone() for x in steps]
    gae(*steps), lambda_return(steps[0], *steps[2:]), n_step_advantage(*steps)
    discounted_returns(steps[0], steps[4]), td_error(*steps[:4])
    discounted_returns(steps[0], steps[4], bootstrap=steps[2])
    assert all(torch.equal(x, y) for x, y in zip(steps, before, strict=True))


@pytest.mark.parametrize("layout", ["transposed", "expanded", "sliced"])
def test_memory_layout_does_not_matter(layout):
    steps = rollout(33, 4)
    if layout == "expanded":
        steps = tuple(x[:, :1] for x in steps)
    contiguous = gae(*(x.contiguous() for x in steps))
    if layout == "transposed":
        steps = tuple(x.T.contiguous().T for x in steps)
    elif layout == "expanded":
        steps = tuple(x.expand(-1, 4) for x in steps)
        contiguous = contiguous.expand(-1, 4)
    else:
        steps = tuple(x.repeat_interleave(2, 0)[::2] for x in steps)
    close(gae(*steps), contiguous)


def sb3_advantages(rewards, values, next_values, terminated, done):
    "stable-baselines3 adds the value of a truncated state to the reward."
    T, N = rewards.shape
    box, two = gymnasium.spaces.Box(-1, 1, (1,)), gymnasium.spaces.Discrete(2)
    buffer = RolloutBuffer(T, box, two, "cpu", LAM, GAMMA, N)
    truncated = done & ~terminated
    buffer.rewards[:] = rewards + GAMMA * next_values * truncated
    buffer.values[:] = values
    buffer.episode_starts[1:] = done[:-1]  # row t + 1 starts where row t was done
    buffer.compute_returns_and_advantage(next_values[-1], done[-1].numpy())
    return torch.from_numpy(buffer.advantages), torch.from_numpy(buffer.returns)


@pytest.mark.parametrize("seed", range(3))
def test_equals_stable_baselines3(seed):
    steps = rollout(100, 5, seed, dtype=torch.float32)
    advantages, returns = sb3_advantages(*steps)
    close(gae(*steps, GAMMA, LAM), advantages, atol=2e-6)
    target = lambda_return(steps[0], *steps[2:], GAMMA, LAM)
    close(target, returns, atol=2e-6)


def test_target_by_hand_and_without_reading_what_is_terminal():
    end = torch.tensor([False, True, True])
    worth = torch.tensor([10.0, float("nan"), float("inf")])
    y = td_target(torch.tensor([1.0, 1.0, -2.0]), worth, end, 0.9)
    close(y, torch.tensor([10.0, 1.0, -2.0]), 1e-6)


def test_gradient_of_the_target_stops_at_the_end():
    worth = torch.tensor([3.0, 4.0], requires_grad=True)
    y = td_target(torch.zeros(2), worth, torch.tensor([False, True]), 0.9)
    (slope,) = torch.autograd.grad(y.sum(), worth)
    close(slope, torch.tensor([0.9, 0.0]), 1e-6)


@pytest.mark.parametrize(
    "change, name",
    [
        ({"next_values": torch.zeros(3, 1)}, "next_values"),
        ({"terminated": torch.zeros(1, dtype=torch.bool)}, "terminated"),
        ({"terminated": torch.zeros(3)}, "^terminated must be a bool"),
        ({"gamma": 1.1}, "gamma"),
        ({"gamma": -0.1}, "gamma"),
    ],
)
def test_bad_targets_are_refused(change, name):
    good = dict(
        rewards=torch.zeros(3),
        next_values=torch.zeros(3),
        terminated=torch.zeros(3, dtype=torch.bool),
        gamma=0.9,
    )
    with pytest.raises(ValueError, match=name):
        td_target(**good | change)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (7,), (33, 5), (2, 3, 4)])
def test_the_target_takes_any_shape(shape, dtype):
    generator = torch.Generator().manual_seed(0)
    r, v = torch.randn(2, *shape, dtype=dtype, generator=generator)
    end = torch.rand(shape, generator=generator) < 0.3
    y = td_target(r, v, end, GAMMA)
    assert y.shape == shape and y.dtype == dtype
    close(y, torch.where(end, r, r + GAMMA * v), 1e-6 if dtype == torch.float32 else 1e-12)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(1, 1), (37, 5), (2048, 64)])
def test_td_error_is_the_target_minus_the_value_to_the_bit(shape, dtype):
    "One rounding for the product and the sum: records depend on it."
    rewards, values, next_values, terminated, _ = rollout(*shape, dtype=dtype)
    delta = td_error(rewards, values, next_values, terminated, GAMMA)
    follows = torch.where(terminated, 0, next_values)
    assert torch.equal(delta, (rewards - values).add_(follows, alpha=GAMMA))
    made = td_target(rewards - values, next_values, terminated, GAMMA)
    assert torch.equal(delta, made)


def test_environments_do_not_mix():
    steps = rollout(40, 6)
    order = torch.randperm(6)
    for estimate in gae, n_step_advantage:
        close(estimate(*(x[:, order] for x in steps)), estimate(*steps)[:, order])


@pytest.mark.parametrize("estimate", [gae, n_step_advantage])
def test_the_past_and_other_episodes_never_enter(estimate):
    rewards, *rest = rollout(30, 1, p_end=0.0)
    done = rest[-1].clone()
    done[12] = True
    rewards.requires_grad_()
    row = estimate(rewards, *rest[:-1], done)[8, 0]
    (gradient,) = torch.autograd.grad(row, rewards)
    seen = gradient[:, 0].nonzero().flatten().tolist()
    assert seen[0] == 8 and seen[-1] <= 12


def test_gradients_of_both_routes_agree_with_differences():
    rewards, values, next_values, terminated, done = rollout(19, 2)
    inputs = [x.clone().requires_grad_() for x in (rewards, values, next_values)]
    assert torch.autograd.gradcheck(lambda *x: gae(*x, terminated, done), inputs)
    with_grad = gae(*inputs, terminated, done)
    assert with_grad.requires_grad
    close(with_grad.detach(), gae(rewards, values, next_values, terminated, done))


def test_the_value_after_a_termination_is_never_read():
    rewards, values, next_values, terminated, done = rollout(60, 2)
    spoiled = next_values.masked_fill(terminated, float("nan"))
    close(gae(rewards, values, spoiled, terminated, done),
          gae(rewards, values, next_values, terminated, done))
    close(lambda_return(rewards, spoiled, terminated, done),
          lambda_return(rewards, next_values, terminated, done))


def test_rows_after_done_do_not_reach_real_rows():
    "A vector environment's reset rows hold garbage; the rest is the same to the bit."
    steps = rollout(200, 3, p_end=0.04, dtype=torch.float32)
    done = steps[4]
    fake = torch.cat([torch.zeros(1, 3).bool(), done[:-1]]) & ~done
    spoiled = [x.masked_fill(fake, -1e9) for x in steps[:3]] + list(steps[3:])
    for estimate in gae, n_step_advantage:
        assert torch.equal(estimate(*spoiled)[~fake], estimate(*steps)[~fake])


def cartpole_rollout(steps=80):
    "Two environments with reset rows; row by row, and where a row is a real step."
    env = gymnasium.vector.SyncVectorEnv(
        [lambda: gymnasium.make("CartPole-v1", max_episode_steps=15)] * 2,
        autoreset_mode=gymnasium.vector.AutoresetMode.NEXT_STEP,
    )
    rng, weight = np.random.default_rng(0), np.array([0.3, -1.0, 2.0, 0.5])
    obs, _ = env.reset(seed=0)
    rows, real = [], [np.ones(2, dtype=bool)]
    for _ in range(steps):
        following, reward, terminated, truncated, _ = env.step(rng.integers(0, 2, 2))
        done = terminated | truncated
        rows.append((reward, obs @ weight, following @ weight, terminated, done))
        real.append(~done)
        obs = following
    columns = (torch.from_numpy(np.stack(x)) for x in zip(*rows, strict=True))
    return tuple(columns), torch.from_numpy(np.stack(real[:-1]))


def test_gymnasium_next_step_autoreset():
    "A vector rollout with its reset rows gives what its episodes give one by one."
    steps, real = cartpole_rollout()
    rewards, values, next_values, terminated, done = steps
    assert terminated.any() and (done & ~terminated).any() and (~real).any()
    assert (rewards[~real] == 0).all() and not done[~real].any()
    # the reset row begins with the last observation: next values are one shift
    assert torch.equal(next_values[:-1], values[1:])
    together = gae(*steps)
    for i in range(2):
        cuts = [-1, *(~real[:, i]).nonzero().flatten().tolist(), len(rewards)]
        episodes = [slice(a + 1, b) for a, b in zip(cuts, cuts[1:], strict=False)]
        for episode in filter(lambda e: e.start < e.stop, episodes):
            alone = gae(*(x[episode, i : i + 1] for x in steps))
            close(together[episode, i], alone[:, 0])


def test_ends_of_lambda_and_n():
    steps = rollout(40, 3)
    rewards, values, next_values, terminated, done = steps
    delta = td_error(*steps[:4], GAMMA)
    follows = next_values.masked_fill(terminated, 0)
    returns = discounted_returns(rewards, done, GAMMA, bootstrap=follows)
    close(gae(*steps, GAMMA, 0.0), delta)
    close(gae(*steps, GAMMA, 1.0), returns - values)
    close(n_step_advantage(*steps, GAMMA, 1), delta)
    close(n_step_advantage(*steps, GAMMA, 10**6), returns - values)
    close(lambda_return(rewards, *steps[2:], GAMMA, 1.0), returns)
    close(lambda_return(rewards, *steps[2:], GAMMA, 0.0), delta + values)
    close(gae(*steps, 0.0, LAM), rewards - values)


@pytest.mark.parametrize("n", [1, 2, 3, 5, 12])
def test_n_step_by_its_definition(n):
    rewards, values, next_values, terminated, done = steps = rollout(30, 2, p_end=0.15)
    ours = n_step_advantage(*steps, GAMMA, n)
    for i in range(2):
        for t in range(30):
            total, l = 0.0, 0
            while True:
                total += GAMMA**l * rewards[t + l, i]
                last = done[t + l, i] or t + l == 29 or l == n - 1
                if last:
                    break
                l += 1
            if not terminated[t + l, i]:
                total += GAMMA ** (l + 1) * next_values[t + l, i]
            close(ours[t, i], total - values[t, i])


def test_returns_by_hand():
    r = torch.ones(4, 1)
    done = torch.tensor([[False], [True], [False], [False]])
    assert discounted_returns(r, done, 0.5)[:, 0].tolist() == [1.5, 1.0, 1.5, 1.0]
    # 8 follows the time limit, 4 the last row; the others are not read
    b = torch.tensor([[99.0], [8.0], [99.0], [4.0]])
    returns = discounted_returns(r, done, 0.5, bootstrap=b)[:, 0]
    assert returns.tolist() == [3.5, 5.0, 2.5, 3.0]


def test_termination_and_truncation_on_two_states():
    "Staying for ever is worth 10; a time limit must not change that, leaving must."
    T = 30
    r, v = torch.ones(T, 1).double(), torch.full((T, 1), 10.0).double()
    never, limit = torch.zeros(T, 1).bool(), torch.zeros(T, 1).bool()
    limit[9::10] = True
    close(gae(r, v, v, never, limit, 0.9, 0.8), torch.zeros(T, 1).double())
    ended = gae(r, v, v, limit, limit, 0.9, 0.8)
    surprise = -torch.full((3, 1), 9.0).double()
    close(ended[9::10], surprise)
    close(ended[8::10], 0.9 * 0.8 * surprise)


def test_exact_critic_is_unbiased_over_samples():
    mdp = random_mdp(4, 2, 0.9, seed=0)
    pi = torch.full((4, 2), 0.5)
    tau = sample_trajectories(mdp, pi, 20_000, 12, torch.Generator().manual_seed(0))
    V, s = mdp.values(pi), tau.states.T
    no = torch.zeros(12, 20_000).bool()
    for lam in 0.0, 0.9, 1.0:
        first = gae(tau.rewards.T, V[s[:-1]], V[s[1:]], no, no, 0.9, lam)[0]
        error = first - mdp.advantages(pi)[tau.states[:, 0], tau.actions[:, 0]]
        assert error.mean().abs() < 4 * error.std() / 20_000**0.5


def test_normalize():
    x = torch.randn(37, 5).double() * 7 - 3
    y = normalize(x)
    close(y.mean(), torch.zeros(()).double(), 1e-8)
    close(y.std(correction=0), torch.ones(()).double(), 1e-8)
    mask = torch.rand(37, 5) < 0.5
    masked = normalize(x.masked_fill(~mask, float("nan")), mask)
    close(masked[mask], normalize(x[mask]))
    assert (masked[~mask] == 0).all()
    close(normalize(x, torch.ones_like(mask)), y)


def test_what_is_added_to_the_deviation_is_no_variance():
    "A deviation of 1e-4 becomes 1e-4 + 1e-8."
    x = torch.tensor([0.0, 2e-4], dtype=torch.float64)
    for y in normalize(x), normalize(x, torch.ones(2).bool()):
        close(y, torch.tensor([-1, 1]).double() / 1.0001)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32])
@pytest.mark.parametrize("m", [2, 3, 1000, 4097])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
def test_equal_entries_become_zero(dtype, m, eps):
    assert (normalize(torch.full((m,), 0.1, dtype=dtype), eps=eps) == 0).all()


def test_narrow_dtypes_and_inference_mode():
    steps = rollout(40, 3)
    exact = gae(*steps)
    with torch.inference_mode():
        half = gae(*(x.bfloat16() if x.is_floating_point() else x for x in steps))
    assert half.dtype == torch.bfloat16
    assert (half.double() - exact).abs().max() < 0.05 * exact.abs().max()


def replaced(name, value):
    names = "rewards", "values", "next_values", "terminated", "done"
    return {**dict(zip(names, rollout(6, 2), strict=True)), name: value}


@pytest.mark.parametrize("name, value", [
    ("rewards", torch.zeros(12)),
    ("rewards", torch.zeros(6, 2).long()),
    ("rewards", torch.full((6, 2), float("nan"))),
    ("values", torch.zeros(2, 6)),
    ("values", torch.full((6, 2), float("inf"))),
    ("next_values", torch.zeros(6, 1)),
    ("next_values", np.zeros((6, 2))),
    ("terminated", torch.zeros(6, 2)),
    ("terminated", [[False, False]] * 6),
    ("done", torch.zeros(6, 2)),
    ("done", torch.zeros(5, 2).bool()),
    ("gamma", 1.1),
    ("gamma", float("nan")),
    ("lam", -0.1),
])  # fmt: skip
def test_bad_input_is_named(name, value):
    arguments = replaced(name, value)
    with pytest.raises(ValueError, match=f"^{name} must"):
        gae(**arguments)
    if name != "values":
        arguments.pop("values")
        with pytest.raises(ValueError, match=f"^{name} must"):
            lambda_return(**arguments)


def test_swapped_flags_empty_segments_and_n():
    rewards, values, next_values, terminated, done = rollout(60, 2)
    with pytest.raises(ValueError, match="^done must be true wherever terminated"):
        gae(rewards, values, next_values, done, terminated)
    with pytest.raises(ValueError, match="^rewards must .* not empty"):
        gae(*(x[:0] for x in (rewards, values, next_values, terminated, done)))
    with pytest.raises(ValueError, match="^n must be at least 1, got 0"):
        n_step_advantage(rewards, values, next_values, terminated, done, n=0)
    with pytest.raises(ValueError, match="^bootstrap must"):
        discounted_returns(rewards, done, bootstrap=values[:5])
    with pytest.raises(ValueError, match="^rewards must be finite"):
        discounted_returns(rewards.masked_fill(done, float("inf")), done)


@pytest.mark.parametrize("arguments, message", [
    ((torch.zeros(1),), "x needs two entries"),
    ((torch.zeros(3), torch.tensor([True, False, False])), "x needs two entries"),
    ((torch.arange(3),), "x must be a floating point tensor"),
    (([0.0, 1.0],), "x must be a floating point tensor, got list"),
    ((torch.zeros(3), torch.ones(3)), "mask must be torch.bool"),
    ((torch.zeros(3), torch.ones(2).bool()), "mask must be torch.bool"),
    ((torch.tensor([0.0, float("nan")]),), "x must be finite"),
    ((torch.zeros(3), None, -1.0), "eps must be at least 0"),
])  # fmt: skip
def test_normalize_refuses(arguments, message):
    with pytest.raises(ValueError, match=f"^{message}"):
        normalize(*arguments)


@pytest.mark.cuda
def test_cuda_equals_cpu():
    steps = rollout(513, 33)
    on_device = [x.cuda() for x in steps]
    close(gae(*on_device).cpu(), gae(*steps))
    close(normalize(on_device[0], on_device[4]).cpu(), normalize(steps[0], steps[4]))
    close(discounted_returns(on_device[0], on_device[4]).cpu(),
          discounted_returns(steps[0], steps[4]))
