"The loop, with each of the six methods as the one that it is given."

import re
from dataclasses import dataclass, replace
from functools import partial

import gymnasium as gym
import numpy as np
import pytest
import torch
from test_train import SMALL, Bandit, cartpole, quick, vector

import po_book.algorithm
import po_book.learner
import po_book.runner
from po_book.advantage import normalize
from po_book.checkpoint import load_checkpoint, save_checkpoint
from po_book.ppo import ppo_loss
from po_book.rollout import collect_episodes, spawn_seed
from po_book.algorithm import Algorithm, Config, new_learner
from po_book.learner import find_device, flatten_parameters
from po_book.runner import Diverged, read_run, resume_run, start_run
from po_book.spaces import make_policy
from po_book.tensor_env import CartPole
from po_book.train import ALGORITHMS, PPOConfig


@pytest.mark.parametrize("algorithm", SMALL)
def test_an_evaluation_does_not_change_the_run(algorithm):
    "Evaluation has random numbers and environments of its own."
    plain = quick(algorithm)
    graded = quick(algorithm, config=replace(SMALL[algorithm], eval_every=500, eval_episodes=5))
    assert len(graded.curve("mean_return")[0]) >= 2 and not plain.curve("mean_return")[0]
    for x, y in zip(plain.policy.parameters(), graded.policy.parameters()):
        assert torch.equal(x, y)


def test_an_evaluation_is_due_where_a_multiple_is_crossed():
    run = quick("ppo", config=replace(SMALL["ppo"], eval_every=500, eval_episodes=2))
    steps = [0, *(row["steps"] for row in run.log)]
    crossed = [b // 500 > a // 500 for a, b in zip(steps, steps[1:])]
    assert ["mean_return" in row for row in run.log] == crossed and sum(crossed) == 3 < len(crossed)


def test_numbers_that_are_read_together_keep_their_names(monkeypatch):
    "As on a GPU, which is waited for once."
    def numbers():
        return [{k: x for k, x in row.items() if k != "seconds"} for row in quick("ppo").log]

    one_by_one = numbers()
    monkeypatch.setattr(po_book.runner, "readable", lambda x: False)
    assert numbers() == one_by_one and len(one_by_one[0]) > 5


@pytest.mark.parametrize("algorithm", SMALL)
def test_the_log_counts_transitions_and_time(algorithm):
    run = quick(algorithm)
    steps = [row["steps"] for row in run.log]
    seconds = [row["seconds"] for row in run.log]
    assert steps == sorted(steps) and steps[-2] < 1500 <= steps[-1]
    assert all(np.diff(seconds) > 0)
    assert all(np.isfinite(list(row.values())).all() for row in run.log)


def test_learning_stops_at_the_first_mean_return_that_is_good_enough():
    config = cartpole("ppo", total_steps=50_000, eval_every=1, eval_episodes=5, solved_at=1.0)
    run = quick("ppo", config=config)
    assert len(run.log) == 1 and run.log[0]["mean_return"] >= 1.0


def test_a_mean_return_just_as_high_is_good_enough():
    def paid():
        return gym.wrappers.TransformReward(Bandit(), lambda r: 2.0)

    config = replace(SMALL["ppo"], eval_every=300, eval_episodes=2, solved_at=20.0)
    run = quick("ppo", env=paid, config=config)
    assert run.curve("mean_return") == ([run.steps], [20.0]) and 300 <= run.steps < 600


def test_flat_parameters_are_the_parameters():
    "Two steps of the flat Adam are two steps of the ordinary one, gradient bound included."
    policies = [make_policy(vector("CartPole-v1"), (8,), torch.Generator().manual_seed(0)) for _ in range(2)]
    weights = flatten_parameters(policies[0])
    optimizers = [torch.optim.Adam(p) for p in ([weights], policies[1].parameters())]
    obs = torch.randn(5, 4, generator=torch.Generator().manual_seed(1))
    for _ in range(2):
        for policy, optimizer in zip(policies, optimizers):
            optimizer.zero_grad(set_to_none=False)
            (policy.value(obs).sum() + policy.actor(obs).square().sum()).backward()
            torch.nn.utils.clip_grad_norm_(optimizer.param_groups[0]["params"], 0.5)
            optimizer.step()
    for a, b in zip(*(policy.parameters() for policy in policies)):
        torch.testing.assert_close(a, b, atol=1e-6, rtol=0)
    starts = [p.data_ptr() - weights.data_ptr() for p in policies[0].parameters()]
    assert starts[0] == 0 and all(start % 64 == 0 for start in starts)
    assert weights.numel() == sum(-(-p.numel() // 16) * 16 for p in policies[0].parameters())
    places = torch.ones(weights.numel(), dtype=torch.bool)
    for p, start in zip(policies[0].parameters(), starts):
        places[start // 4 : start // 4 + p.numel()] = False
    assert places.any() and (weights[places] == 0).all()  # what lies between stays zero


def test_a_function_that_makes_an_environment():
    config = cartpole("ppo", total_steps=20_000, n_envs=8, eval_every=1_000, eval_episodes=20, solved_at=9.0)
    assert quick("ppo", env=Bandit, config=config).log[-1]["mean_return"] >= 9.0


def test_a_vector_environment_is_used_as_it_is_and_left_open():
    vector_env = gym.make_vec("CartPole-v1", num_envs=3)
    run = quick("ppo", env=vector_env)
    assert run.config.n_envs == 3 and run.env is vector_env and not vector_env.closed
    by_id = quick("ppo", config=replace(SMALL["ppo"], n_envs=3))
    assert all(map(torch.equal, run.policy.parameters(), by_id.policy.parameters()))
    assert run.evaluate(7).shape == (7,)
    with pytest.raises(ValueError, match="an evaluation needs fresh environments"):
        quick("ppo", env=vector_env, config=replace(SMALL["ppo"], eval_every=100))
    one_by_one = gym.vector.SyncVectorEnv([lambda: gym.make("CartPole-v1")] * 2)
    quick("ppo", env=one_by_one)
    assert not one_by_one.closed  # CartPole's own vector would not say


@pytest.mark.parametrize("algorithm", ["a2c", "ppo", "trpo"])
def test_observations_are_normalised_where_asked(algorithm):
    "A scale of a thousand makes no difference then, once two rollouts are seen."
    config = replace(SMALL[algorithm], normalize_obs=True, total_steps=4000)
    run = quick(algorithm, env=lambda: Bandit(scale=1000.0), config=config)
    normalizer = run.policy.normalizer
    assert normalizer.count == run.steps
    assert normalizer.variance[0].sqrt() == pytest.approx(1000, rel=0.2)
    seen = normalizer(torch.tensor([[1000.0, 0.0], [-1000.0, 0.0]]))[:, 0]
    assert seen.tolist() == pytest.approx([1.0, -1.0], abs=0.3)


@pytest.mark.parametrize(
    "settings, message",
    [
        ({"observation": np.nan}, "observation of environment [0-3] is not finite: .*nan"),
        ({"observation": np.inf}, "observation of environment [0-3] is not finite: .*inf"),
        ({"reward": np.nan}, "reward of environment [0-3] is not finite: nan"),
    ],
)
def test_numbers_that_are_not_finite_name_the_environment(settings, message):
    with pytest.raises(ValueError, match=message) as caught:
        quick("ppo", env=lambda: Bandit(**settings), config=SMALL["ppo"])
    assert caught.value.__notes__ == ["ppo stopped after 0 transitions"]


def test_an_environment_that_raises_says_when():
    with pytest.raises(ConnectionError, match="gone") as caught:
        quick("ppo", env=lambda: Bandit(raises_at=100), config=SMALL["ppo"])
    # Environment 0 counts its own steps, and every eleventh row of a rollout is a restart.
    assert 300 < int(re.fullmatch(r"ppo stopped after (\d+) transitions", *caught.value.__notes__)[1]) < 400


def test_a_run_that_diverges_stops():
    config = replace(SMALL["ppo"], lr=1e38, max_grad_norm=1e38)
    with pytest.raises((Diverged, ValueError)) as caught:
        quick("ppo", config=config)
    assert "ppo stopped after" in caught.value.__notes__[0]


@pytest.mark.parametrize("device", ["cuda:99", "warp", "meta2"])
def test_a_device_that_is_not_there(device):
    with pytest.raises(ValueError, match=f"device {device} is not there, use cpu or auto"):
        quick("ppo", device=device)


def test_auto_finds_a_device():
    assert find_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")


@pytest.mark.parametrize("env", [Bandit(), None, 3])
def test_what_is_no_environment(env):
    with pytest.raises(ValueError, match="env must be an id, a function .* or a VectorEnv, got"):
        quick("ppo", env=env)


class Talks(gym.Env):
    observation_space = gym.spaces.Dict(
        position=gym.spaces.Box(-1, 1, (2,)), says=gym.spaces.Text(5)
    )
    action_space = gym.spaces.Discrete(2)


def test_spaces_that_are_not_supported():
    with pytest.raises(ValueError, match="says.*Text"):
        quick("ppo", env=Talks)
    assert quick("ppo", env="FrozenLake-v1", config=replace(SMALL["ppo"], total_steps=200)).steps >= 200


@pytest.mark.parametrize(
    "backend, message",
    [
        ("fast", "backend of ppo must be one of .*recorded.*, got 'fast'"),
        ("recorded", "backend recorded needs environments made of tensors on a GPU"),
    ],
)
def test_a_backend_that_is_not_there(backend, message):
    with pytest.raises(ValueError, match=message):
        quick("ppo", env="po_book/CartPole-v1", backend=backend)


class Counting:
    "A stand-in for a compiler or a recorder, which only sees what it is given."

    prepared: list = []

    def __init__(self, function, *rest):
        self.prepared.append(function.__name__)
        self.function, self.places = function, {}

    def __call__(self, **inputs):
        assert all(torch.is_tensor(x) for x in inputs.values())
        for name, x in inputs.items():
            if x.ndim == 0:  # a number that changes has a place that does not
                assert self.places.setdefault(name, x.data_ptr()) == x.data_ptr()
        return self.function(**inputs)


@pytest.mark.parametrize(
    "algorithm, backend, prepared",
    [
        ("ppo", "compiled", ["loss"]),
        ("a2c", "compiled", ["loss"]),
        ("dqn", "compiled", ["error"]),
        ("ppo", "recorded", ["walk", "epoch"]),
        ("a2c", "recorded", ["walk", "improve"]),
        ("dqn", "recorded", ["walk", "learn"]),
    ],
)
def test_a_backend_gets_the_same_functions_and_numbers_as_tensors(algorithm, backend, prepared, monkeypatch):
    "Every method that offers a backend hands it what it says; weights are the eager run's."
    monkeypatch.setattr(Counting, "prepared", [])
    monkeypatch.setattr(po_book.learner, "check_backend", lambda *_: None)
    monkeypatch.setattr(po_book.algorithm, "check_backend", lambda *_: None)
    monkeypatch.setattr(po_book.learner, "Recorded", Counting)
    monkeypatch.setattr(torch, "compile", Counting)
    monkeypatch.setattr(CartPole, "compile", lambda env: None)
    kinds = "eager", backend  # environments that lose no row: all minibatches are of one shape
    runs = [quick(algorithm, env="po_book/CartPole-v1", backend=kind) for kind in kinds]
    assert list(dict.fromkeys(Counting.prepared)) == prepared and len(Counting.prepared) <= len(prepared) + 1
    for a, b in zip(*(run.policy.parameters() for run in runs)):
        torch.testing.assert_close(a, b, atol=1e-4, rtol=0)


@pytest.mark.parametrize("algorithm", ["a2c", "ppo", "dqn"])
def test_a_compiled_loss_is_one_graph(algorithm, monkeypatch):
    "Traced for real, without what generates code; a number that is looked at would break it."
    traced = partial(torch.compile, backend="eager", fullgraph=True)
    monkeypatch.setattr(torch, "compile", traced)
    config = replace(SMALL[algorithm], total_steps=300)
    kinds = "eager", "compiled"
    runs = [quick(algorithm, env="po_book/CartPole-v1", backend=kind, config=config) for kind in kinds]
    for a, b in zip(*(run.policy.parameters() for run in runs)):
        torch.testing.assert_close(a, b, atol=1e-5, rtol=0)


@pytest.mark.parametrize("algorithm, backend", [
    ("reinforce", "compiled"), ("reinforce", "recorded"), ("trpo", "compiled"), ("trpo", "recorded"), ("ddpg", "compiled"),
])
def test_a_backend_that_would_do_nothing_is_refused(algorithm, backend):
    with pytest.raises(ValueError, match=f"backend of {algorithm} must be one of eager.*, got '{backend}'"):
        quick(algorithm, backend=backend)


def test_a_gradient_step_reads_nothing_where_it_would_have_to_wait():
    "Tensors without data, which refuse to be read, stand for those of a GPU."
    policy = make_policy(vector("CartPole-v1")).to("meta")
    obs, row = torch.empty(8, 4, device="meta"), torch.empty(8, device="meta")
    logp, entropy = policy.evaluate(obs, torch.zeros(8, dtype=torch.long, device="meta"))
    clip = torch.tensor(0.2, device="meta")
    loss = ppo_loss(logp, row, normalize(row), entropy, policy.value(obs), row, clip_low=clip)
    loss.backward()
    with pytest.raises(RuntimeError, match="meta"):
        loss.item()


@pytest.mark.cuda
@pytest.mark.parametrize("backend", ["recorded", "compiled"])
def test_backends_learn_the_same_on_a_gpu(backend):
    config = cartpole("ppo", total_steps=8_000, n_envs=64, n_steps=32)
    kwargs = {"env": "po_book/CartPole-v1", "device": "cuda", "config": config}
    eager, other = (quick("ppo", backend=name, **kwargs) for name in ("eager", backend))
    assert [row["return"] for row in eager.log[:2]] == [row["return"] for row in other.log[:2]]
    for a, b in zip(eager.policy.parameters(), other.policy.parameters()):
        torch.testing.assert_close(a, b, atol=1e-3, rtol=0)


@dataclass(frozen=True)
class CountConfig(Config):
    "Settings of a method that learns nothing and remembers how often it was asked."

    n_envs: int = 2

    def prepare(self, policy):
        return {"asked": torch.zeros(()), "draws": []}


def count(learner, config, remaining):
    learner.extra["asked"] += 1
    learner.extra["draws"].append(float(torch.rand((), generator=learner.generator)))
    return learner.collect(16), {"asked": learner.extra["asked"].clone(), "draw": learner.extra["draws"][-1]}


METHODS = {"count": Algorithm(CountConfig, count)}


def test_the_loop_knows_no_method_and_keeps_what_a_method_keeps(tmp_path):
    config = CountConfig(total_steps=300, checkpoint_every=100)
    asked = "count", METHODS["count"], "CartPole-v1", config

    def stop(row):
        if row["steps"] >= 200:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        start_run(*asked, out=tmp_path, progress=False, report=stop)
    kept = read_run(tmp_path, METHODS)
    assert 100 <= kept.steps < 300
    runs = resume_run(tmp_path, METHODS, progress=False), start_run(*asked, progress=False)
    a, b = ([(row["asked"], row["draw"]) for row in run.log] for run in runs)
    assert a == b and [n for n, _ in a] == list(range(1, len(a) + 1))


class Numbered(gym.Env):
    "Episodes of one step; the n-th pays n."

    observation_space, action_space = gym.spaces.Box(0, 1, (1,)), gym.spaces.Discrete(2)
    played = 0

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        return np.zeros(1, np.float32), {}

    def step(self, action):
        self.played += 1
        return np.zeros(1, np.float32), float(self.played), True, False, {}


def test_the_return_of_a_row_is_the_mean_of_the_latest_hundred():
    "Every other row is a restart and counts for nothing."
    config = CountConfig(total_steps=152, n_envs=1)  # the nineteenth row is the last
    run = start_run("count", METHODS["count"], Numbered, config, progress=False)
    ended = [row["steps"] for row in run.log]
    assert ended == [8 * i for i in range(1, 20)]
    expected = [np.mean(range(max(n - 100, 0) + 1, n + 1)) for n in ended]
    assert [row["return"] for row in run.log] == pytest.approx(expected)


class Trunk(torch.nn.Module):
    "Actor and critic share a layer."

    def __init__(self, env=None):
        super().__init__()
        self.body = torch.nn.Linear(4, 8)
        self.actor, self.critic = torch.nn.Linear(8, 2), torch.nn.Linear(8, 1)

    def features(self, obs):
        return self.body(obs).tanh()

    def distribution(self, obs):
        return torch.distributions.Categorical(logits=self.actor(self.features(obs)))

    def act(self, obs, generator=None):
        return torch.multinomial(self.distribution(obs).probs, 1, generator=generator)[:, 0]

    def evaluate(self, obs, actions):
        chosen = self.distribution(obs)
        return chosen.log_prob(actions), chosen.entropy()

    def value(self, obs):
        return self.critic(self.features(obs))[..., 0]

    def actor_parameters(self):
        return [*self.body.parameters(), *self.actor.parameters()]


class Apart(Trunk):
    "The critic reads the shared layer and leaves it as it is."

    def value(self, obs):
        return self.critic(self.features(obs).detach())[..., 0]


class TrunkConfig(PPOConfig):
    "Settings that bring their own policy."

    def make_policy(self, env, generator):
        return Trunk()


def test_a_subclass_of_a_configuration_brings_its_own_policy():
    run = quick("ppo", config=TrunkConfig(total_steps=300, n_envs=4))
    assert isinstance(run.policy, Trunk) and run.steps >= 300


@pytest.mark.parametrize("algorithm", ["ppo", "a2c", "reinforce"])
def test_a_policy_with_a_shared_layer_is_trained_and_by_the_seed_alone(algorithm):
    torch.manual_seed(5)
    before = torch.random.get_rng_state()
    runs = [quick(algorithm, policy=Trunk, seed=seed) for seed in (0, 0, 1)]
    assert torch.equal(before, torch.random.get_rng_state())
    a, b, c = (torch.cat([p.flatten() for p in run.policy.parameters()]) for run in runs)
    assert torch.equal(a, b) and not torch.equal(a, c)
    start = new_learner("CartPole-v1", 0, SMALL[algorithm], policy=Trunk).policy
    moved = [not torch.equal(p, q) for p, q in zip(start.parameters(), runs[0].policy.parameters())]
    assert moved == [True] * 4 + [algorithm != "reinforce"] * 2  # body, actor, critic


def test_a_policy_that_is_made_draws_from_the_seed_whatever_was_drawn_before():
    torch.manual_seed(spawn_seed(5, "weights"))
    wanted = Trunk()
    for before in 0, 1:
        torch.manual_seed(before)
        made = new_learner("CartPole-v1", 5, SMALL["ppo"], policy=Trunk).policy
        assert all(map(torch.equal, made.parameters(), wanted.parameters()))


def test_a_module_is_trained_itself_and_the_function_sees_the_spaces():
    policy, seen = Trunk().eval(), []
    start = [p.detach().clone() for p in policy.parameters()]
    assert quick("ppo", policy=policy).policy is policy and policy.training
    assert not any(map(torch.equal, policy.parameters(), start))

    def make(env):
        seen.append((env.single_observation_space.shape, int(env.single_action_space.n)))
        return policy

    quick("ppo", policy=make)
    assert seen == [((4,), 2)]


def test_a_policy_that_is_given_is_the_one_that_would_be_made():
    "Equal weights, equal run."
    weights = torch.Generator().manual_seed(spawn_seed(0, "weights"))
    made = make_policy(vector("CartPole-v1"), generator=weights)
    runs = quick("ppo", policy=made), quick("ppo")
    assert all(map(torch.equal, *(run.policy.parameters() for run in runs)))


def test_trpo_refuses_a_critic_that_moves_the_actor():
    with pytest.raises(ValueError, match="policy of TRPO must be one whose critic shares no weights with its actor, got 2"):
        quick("trpo", policy=Trunk)
    learner = new_learner("CartPole-v1", 0, SMALL["trpo"], policy=Apart)
    before = [p.detach().clone() for p in learner.policy.parameters()]
    ALGORITHMS["trpo"].iteration(learner, SMALL["trpo"], 1.0)
    assert not any(map(torch.equal, learner.policy.parameters(), before))


METHODS_NEED = {
    "reinforce": ["evaluate"],
    "a2c": ["evaluate", "value"],
    "ppo": ["evaluate", "value"],
    "trpo": ["evaluate", "value", "distribution", "actor_parameters"],
    "dqn": ["q", "epsilon"],
    "ddpg": ["mean", "q", "critic", "sigma"],
}


@pytest.mark.parametrize("algorithm, name", [(a, n) for a, names in METHODS_NEED.items() for n in names])
def test_what_a_policy_lacks_is_named(algorithm, name):
    class Lacking(torch.nn.Module):
        def __init__(self, env):
            super().__init__()
            self.weight = torch.nn.Parameter(torch.zeros(1))
            for other in METHODS_NEED[algorithm]:
                if other != name:
                    setattr(self, other, None)

        def act(self, obs, generator=None):
            raise NotImplementedError

    need = ", ".join(["act", *METHODS_NEED[algorithm]])
    with pytest.raises(ValueError, match=f"policy must be a module with {need}, got Lacking without {name}$"):
        quick(algorithm, policy=Lacking)


@pytest.mark.parametrize(
    "policy, message",
    [
        (torch.nn.Linear(4, 2), "a module with act.obs, generator., got Linear"),
        ("mlp", "a module with act.obs, generator., got str"),
        (lambda env: None, "a module with act.obs, generator., got NoneType"),
        (Trunk().requires_grad_(False), "a module with weights to train, got Trunk"),
    ],
)
def test_what_is_no_policy(policy, message):
    with pytest.raises(ValueError, match=f"policy must be {message}"):
        quick("ppo", policy=policy)


class Bright(gym.Env):
    "Ten pictures of 8 x 8; the reward is 1 where the action names the bright half."

    observation_space = gym.spaces.Box(0, 255, (1, 8, 8), np.uint8)
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        super().reset(seed=seed)
        self.steps = 0
        return self.picture(), {}

    def picture(self):
        self.right = int(self.np_random.integers(2))
        picture = self.np_random.integers(0, 100, (1, 8, 8))
        picture[:, :, 4 * self.right : 4 * self.right + 4] += 100
        return picture.astype(np.uint8)

    def step(self, action):
        self.steps += 1
        reward = float(action == self.right)
        return self.picture(), reward, self.steps == 10, False, {}


class Looks(Trunk):
    "The trunk is a convolution."

    def __init__(self, env):
        super().__init__()
        self.shape = env.single_observation_space.shape
        conv, flat = torch.nn.Conv2d(1, 4, 4, stride=4), torch.nn.Flatten()
        self.body = torch.nn.Sequential(conv, torch.nn.ReLU(), flat, torch.nn.Linear(16, 8))

    def features(self, obs):
        return self.body(obs.reshape(-1, *self.shape) / 255 - 0.5).reshape(*obs.shape[:-1], 8).tanh()


def test_a_network_for_images():
    config = cartpole("ppo", total_steps=16_000, n_envs=16, n_steps=32, lr=1e-2)
    run = quick("ppo", env=Bright, policy=Looks, config=config)
    assert run.log[0]["return"] < 7 and run.evaluate().mean() > 9


def test_a_policy_that_cannot_act_is_refused():
    class NoConfig(PPOConfig):
        def make_policy(self, env, generator):
            return torch.nn.Linear(4, 2)

    with pytest.raises(ValueError, match="policy must be a module with act.obs, generator., got Linear"):
        quick("ppo", config=NoConfig())


@pytest.mark.parametrize("part", ["extra", "order"])
def test_a_checkpoint_without_what_a_learner_keeps_is_refused(tmp_path, part):
    quick("ppo", out=tmp_path)
    state = load_checkpoint(tmp_path / "checkpoint.pt")
    del state["learner"][part]
    save_checkpoint(tmp_path / "checkpoint.pt", state)
    with pytest.raises(ValueError, match="another version of po_book"):
        resume_run(tmp_path, ALGORITHMS, progress=False)


def better_half(learner, config, remaining):
    rollout = collect_episodes(learner.policy, learner.stepper, learner.generator)
    returns = (rollout.rewards * rollout.valid).sum(0)
    better = rollout.valid & (returns > returns.median())
    logp, _ = learner.policy.evaluate(rollout.obs, rollout.actions)
    learner.step(-(logp * better).sum() / better.sum().clamp(min=1))
    return rollout, {}


def test_an_algorithm_of_ones_own_in_ten_lines():
    config = Config(total_steps=20_000, lr=1e-2)
    run = start_run("better half", Algorithm(Config, better_half), "CartPole-v1", config, progress=False)
    assert run.algorithm == "better half" and run.log[0]["return"] < 40 < 80 < run.log[-1]["return"]


def test_a_report_gets_the_row_and_if_it_takes_them_the_run_and_the_learner():
    rows, triples = [], []
    run = quick("ppo", report=rows.append)
    assert rows == run.log

    def watch(row, run, learner):
        triples.append((row, run, learner.policy))

    run = quick("ppo", report=watch)
    assert [row for row, _, _ in triples] == run.log
    assert all(r is run and p is run.policy for _, r, p in triples)
    quick("ppo", report=lambda *row: rows.append(row))
    assert len(rows[-1]) == 1


def test_only_false_stops():
    for answer in None, 0, True, "":
        assert quick("ppo", report=lambda row: answer).finished
    assert len(quick("ppo", report=lambda row: False).log) == 1


def test_evaluations_are_played_in_eval_env():
    vector_env = gym.make_vec("CartPole-v1", num_envs=4)
    config = replace(SMALL["ppo"], eval_every=500, eval_episodes=5)
    run = quick("ppo", env=vector_env, eval_env="CartPole-v1", config=config)
    plain = quick("ppo", config=config)
    assert run.curve("mean_return") == plain.curve("mean_return") and run.curve("mean_return")[0]
    assert all(map(torch.equal, run.policy.parameters(), plain.policy.parameters()))
    # Ten steps of reward 0 or 1 are not CartPole's.
    twos = quick("ppo", env=Bandit, eval_env=lambda: gym.wrappers.TransformReward(Bandit(), lambda r: 2.0), config=config)
    assert set(twos.curve("mean_return")[1]) == {20.0} and twos.evaluate(3).tolist() == [20.0] * 3
    for missing in None, vector_env:
        with pytest.raises(ValueError, match="an evaluation needs fresh environments: give eval_env, or set eval_every to 0"):
            quick("ppo", env=vector_env, eval_env=missing, config=config)


def test_a_folder_has_one_trainer_at_a_time(tmp_path):
    "It is locked before the checkpoint is read, and free again after an error."
    config = replace(SMALL["ppo"], total_steps=400)
    refused = []

    def second(row):
        for start in (
            lambda: quick("ppo", config=config, out=tmp_path / "r"),
            lambda: resume_run(tmp_path / "r", ALGORITHMS, progress=False),
        ):
            with pytest.raises(ValueError, match="another process is training in this folder"):
                start()
            refused.append(row["steps"])
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        quick("ppo", config=config, out=tmp_path / "r", report=second)
    assert len(refused) == 2
    assert resume_run(tmp_path / "r", ALGORITHMS, progress=False).finished
