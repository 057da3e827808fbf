"IPPO, MAPPO and HAPPO: who sees what, who moves when, and by how much."

import json
import signal
import subprocess
import sys
import time
from dataclasses import replace

import gymnasium as gym
import numpy as np
import pytest
import torch
from gymnasium.spaces import Box
from gymnasium.vector import SyncVectorEnv
from test_team_env import Script
from torch import nn
from torch.distributions import Normal

from po_book import multi_agent
from po_book.advantage import gae
from po_book.algorithm import new_learner
from po_book.batch import critic_batch
from po_book.cli import main
from po_book.mdp import random_mdp
from po_book.multi_agent import (
    HAPPOConfig,
    IPPOConfig,
    MAPPOConfig,
    OwnNetworks,
    agent_advantages,
    happo_iteration,
    joint_policy,
    make_team_policy,
    turn,
)
from po_book.ppo import ratio
from po_book.rollout import make_stepper
from po_book.spaces import make_policy
from po_book.team_env import MatrixGame, Meeting, TeamEnv
from po_book.train import PPOConfig, default_config, load_run, ppo_iteration, resume, rollout_batch, train

TINY = dict(total_steps=1_200, n_envs=4, n_steps=33, minibatch=64, epochs=2, hidden=(16,))
PLAIN = dict(normalize_obs=False, normalize_rewards=False)
METHODS = {"ippo": IPPOConfig, "mappo": MAPPOConfig, "happo": HAPPOConfig}


def meeting(**more):
    return lambda: TeamEnv(Meeting(**more))


def rows(env, n=3, seed=0):
    "Observations of a vector of teams, as the policy gets them."
    return make_stepper(env, n, seed=seed).obs


def policy_of(env, seed=0, **more):
    vector = SyncVectorEnv([env] * 2)
    return make_team_policy(vector, (8,), torch.Generator().manual_seed(seed), **more)


@pytest.mark.parametrize("sizes", [(3,), (2, 3), (2, 2, 2, 2)])
def test_advantages_of_agents_add_up(sizes):
    mdp = random_mdp(3, int(np.prod(sizes)), 0.9, seed=1)
    g = torch.Generator().manual_seed(0)
    policies = [torch.rand(3, n, generator=g, dtype=torch.float64) for n in sizes]
    policies = [pi / pi.sum(-1, keepdim=True) for pi in policies]
    pi = joint_policy(policies)
    assert pi.shape == (3, *sizes)
    torch.testing.assert_close(pi.flatten(1).sum(1), torch.ones(3).double())
    Q = mdp.q_values(pi.flatten(1)).reshape(3, *sizes)
    order = list(range(len(sizes)))[::-1]
    parts = agent_advantages(Q, policies, order)
    expected = mdp.advantages(pi.flatten(1)).reshape(3, *sizes)
    torch.testing.assert_close(sum(parts), expected.expand(3, *sizes), atol=1e-12, rtol=0)
    for k, (i, part) in enumerate(zip(order, parts)):
        shown = [1 + j for j in order[: k + 1]]
        assert [a for a in range(1, pi.ndim) if part.shape[a] > 1] == sorted(shown)
        mean = (part * policies[i].reshape(3, *(part.shape[a] if a == i + 1 else 1 for a in range(1, pi.ndim)))).sum(i + 1)
        torch.testing.assert_close(mean, torch.zeros_like(mean), atol=1e-12, rtol=0)


def test_advantages_by_hand():
    "Paid 1 if exactly one raises its hand; both do with .6. By hand in the chapter."
    hands = [[[0.0, 1.0], [1.0, 0.0]]]
    first, second = agent_advantages(hands, [[[0.4, 0.6]]] * 2, order=[1, 0])
    torch.testing.assert_close(first[0, 0], torch.tensor([0.12, -0.08]).double())
    torch.testing.assert_close(second[0], torch.tensor([[-0.6, 0.6], [0.4, -0.4]]).double())


@pytest.mark.parametrize("order", [[0], [0, 0], [0, 2]])
def test_an_order_names_every_agent_once(order):
    with pytest.raises(ValueError, match=r"order must be one of the agents \[0, 1\]"):
        agent_advantages(torch.zeros(1, 2, 2), [torch.full((1, 2), 0.5)] * 2, order)


def test_a_table_that_does_not_fit_is_named():
    with pytest.raises(ValueError, match=r"Q must have shape \(1, 2, 2\), got \(1, 2, 3\)"):
        agent_advantages(torch.zeros(1, 2, 3), [torch.full((1, 2), 0.5)] * 2, [0, 1])
    with pytest.raises(ValueError, match=r"rows of policies\[1\] must sum to one"):
        joint_policy([torch.full((1, 2), 0.5), torch.ones(1, 2)])


@pytest.mark.parametrize("share", [True, False])
def test_networks_get_their_own_part(share):
    inputs = []

    def make(n):
        inputs.append(n)
        layer = nn.Linear(n, 1, bias=False)
        nn.init.constant_(layer.weight, 10.0 ** len(inputs))
        return layer

    nets = OwnNetworks(slice(1, 7), 3, share, make)
    found = nets(torch.tensor([9.0, 1, 2, 3, 4, 5, 6, 9])).squeeze(-1)
    assert inputs == ([5] if share else [2, 2, 2])
    # Shared, the one of the agent's number is an input, too.
    expected = [10 * (3 + 1), 10 * (7 + 1), 10 * (11 + 1)] if share else [30, 700, 11_000]
    assert found.tolist() == expected
    assert nets(torch.zeros(4, 5, 8)).shape == (4, 5, 3, 1)


@pytest.mark.parametrize("share", [True, False])
@pytest.mark.parametrize("central", [True, False])
def test_who_sees_what(share, central):
    "Gradients of each agent's answers reach its own columns, and no others."
    policy = policy_of(meeting(), share=share, central=central)
    obs = rows(meeting()).requires_grad_()
    own = [list(range(6, 13)), list(range(13, 20))]  # behind the masks
    for i, mine in enumerate(own):
        (slope,) = torch.autograd.grad(policy.actor(obs)[:, i].sum(), obs)
        assert [k for k in range(20) if slope[:, k].any()] == mine
        (slope,) = torch.autograd.grad(policy.value(obs)[:, i].sum(), obs)
        assert [k for k in range(20) if slope[:, k].any()] == (sum(own, []) if central else mine)


def test_a_joint_critic_sees_the_state_where_there_is_one():
    def env():
        return TeamEnv(Script(state_space=Box(-9, 9, (3,), np.float32)), state=True)

    policy, obs = policy_of(env), rows(env).requires_grad_()
    (slope,) = torch.autograd.grad(policy.value(obs).sum(), obs)
    assert [k for k in range(7) if slope[:, k].any()] == [4, 5, 6]


def test_masks_belong_to_their_agent():
    policy = policy_of(meeting())
    team = TeamEnv(Meeting())
    team.reset()
    team.env.places = np.array([0, 6])
    seen = team._see(team.env.look())
    obs = torch.tensor(np.concatenate([seen[k].ravel() for k in seen])).float()
    probs = policy.distribution(obs).probs
    assert probs[0, 0] == 0 and probs[1, 2] == 0 and (probs == 0).sum() == 2
    drawn = policy.act(obs.expand(500, -1), torch.Generator().manual_seed(0))
    assert sorted(set(drawn[:, 0].tolist())) == [1, 2] and sorted(set(drawn[:, 1].tolist())) == [0, 1]


@pytest.mark.parametrize("share", [True, False])
def test_real_actions_have_a_density_for_each_agent(share):
    low, high = np.array([0, -1], np.float32), np.array([4, 1], np.float32)

    def env():
        return TeamEnv(Script(move=Box(low, high)))

    policy, obs = policy_of(env, share=share), rows(env)
    with torch.no_grad():
        policy.log_std.copy_(torch.tensor([-1.0, 0.5]) if share else torch.tensor([[-1, 0.5], [0, 2]]))
    deviations = policy.log_std.exp().expand(2, 2) * torch.tensor([2.0, 1.0])
    actions = policy.act(obs, torch.Generator().manual_seed(0))
    assert actions.shape == (3, 2, 2)
    mean = torch.tensor([2.0, 0.0]) + torch.tensor([2.0, 1.0]) * policy.actor(obs)
    normal = Normal(mean, deviations.expand(3, 2, 2))
    logp, entropy = policy.evaluate(obs, actions)
    torch.testing.assert_close(logp, normal.log_prob(actions).sum(-1))
    torch.testing.assert_close(entropy, normal.entropy().sum(-1))


@pytest.mark.parametrize("kind", [IPPOConfig, MAPPOConfig])
def test_a_batch_is_gae_of_every_agent(kind):
    learner = new_learner(meeting(), 0, kind(**TINY))
    rollout = learner.collect(33)
    batch = critic_batch(learner.policy, rollout, 0.9, 0.8)
    assert not rollout.valid.all()
    with torch.no_grad():
        values, after = learner.policy.value(rollout.obs), learner.policy.value(rollout.next_obs)
    for i in range(2):
        ends = rollout.terminated, rollout.done
        A = gae(rollout.rewards, values[..., i], after[..., i], *ends, 0.9, 0.8)
        torch.testing.assert_close(batch["advantages"][:, i], A[rollout.valid])
        torch.testing.assert_close(batch["returns"][:, i], (A + values[..., i])[rollout.valid])
    assert batch["obs"].shape == (int(rollout.valid.sum()), 20)
    same = torch.equal(batch["advantages"][:, 0], batch["advantages"][:, 1])
    assert same == (kind is MAPPOConfig)


class Alone(Meeting):
    "One player, who is paid for being in the first cell."

    def __init__(self):
        super().__init__()
        self.possible_agents = self.possible_agents[:1]

    def step(self, actions):
        seen, _, *rest = super().step(actions)
        return seen, {"player_0": -float(self.places[0])}, *rest


@pytest.mark.parametrize("name, iteration", [
    ("ippo", ppo_iteration), ("mappo", ppo_iteration), ("happo", happo_iteration)])
def test_with_one_agent_every_method_is_ppo(name, iteration):
    settings = dict(n_envs=2, n_steps=22, minibatch=16, epochs=2, hidden=(8,), **PLAIN)
    more = {} if name == "happo" else {"share": False}
    config = METHODS[name](**settings, **more)
    learner = new_learner(lambda: TeamEnv(Alone()), 0, config)

    class Plain(nn.Module):
        "The same weights, without an axis of agents."

        def __init__(self, env):
            super().__init__()
            self.actor = learner.policy.actor[-1].networks[0]
            critic = learner.policy.critic[-1]
            self.critic = critic.networks[0] if name == "ippo" else critic.network
            for part in "actor", "critic":
                copy = type(getattr(self, part))(*(type(m)() if not isinstance(m, nn.Linear) else
                    nn.Linear(m.in_features, m.out_features) for m in getattr(self, part)))
                copy.load_state_dict(getattr(self, part).state_dict())
                setattr(self, part, copy)

        def logits(self, obs):
            return self.actor(obs[..., 3:]).masked_fill(obs[..., :3] == 0, -torch.inf)

        def act(self, obs, generator=None):
            clocks = torch.empty(len(obs), 1, 3).exponential_(generator=generator)
            return (self.logits(obs)[:, None] - clocks.log()).argmax(-1)

        def evaluate(self, obs, actions):
            logits = self.logits(obs)
            logp = logits.clamp(min=torch.finfo(logits.dtype).min).log_softmax(-1)
            return logp.gather(-1, actions)[..., 0], -(logp.exp() * logp).sum(-1)

        def value(self, obs):
            return self.critic(obs[..., 3:])[..., 0]

    plain = new_learner(lambda: TeamEnv(Alone()), 0, PPOConfig(**settings), policy=Plain)
    if name == "happo":  # which draws an order before its epochs
        plain.collect = lambda steps, collect=plain.collect: (collect(steps), torch.randperm(1, generator=plain.order))[0]
    for _ in range(2):
        iteration(learner, config, 1.0)
        ppo_iteration(plain, PPOConfig(**settings), 1.0)
    torch.testing.assert_close(learner.weights, plain.weights, atol=1e-6, rtol=1e-5)


def test_factors_are_products_of_the_ratios_of_those_before(monkeypatch):
    config = HAPPOConfig(**TINY)
    learner = new_learner(meeting(players=3), 0, config)
    turns, after, epochs = [], [], multi_agent.ppo_epochs

    def spy(learner, config, batch, remaining):
        turns.append(batch)
        metrics = epochs(learner, config, batch, remaining)
        with torch.no_grad():
            after.append(learner.policy.evaluate(batch["obs"], batch["actions"])[0])
        return metrics

    monkeypatch.setattr(multi_agent, "ppo_epochs", spy)
    rollout, metrics = happo_iteration(learner, config, 1.0)
    order = [int(batch["mask"][0].int().argmax()) for batch in turns]
    assert sorted(order) == [0, 1, 2]
    factor = torch.ones(len(turns[0]["logp"]), 1)
    A = turns[0]["advantages"]
    values, returns = turns[0]["returns"] - A, turns[0]["returns"]
    explained = 1 - (returns - values).var(correction=0) / returns.var(correction=0)
    torch.testing.assert_close(metrics["explained_variance"], explained)
    for agent, batch, logp in zip(order, turns, after):
        assert batch["mask"][:, agent].all()
        assert batch["mask"].sum() == len(batch["mask"]) == rollout.valid.sum()
        torch.testing.assert_close(batch["advantages"], factor * A)
        factor = factor * ratio(logp, batch["logp"])[:, [agent]]
        assert (factor != 1).any()


def test_rows_that_are_masked_stay_so_in_every_turn(monkeypatch):
    "Where nobody waits, on a GPU, rows that are no transitions stay in the batch."
    config, turns = HAPPOConfig(**TINY), []
    learner = new_learner(meeting(), 0, config)
    batch = rollout_batch(learner, learner.collect(33), config)
    batch["mask"] = (torch.rand(len(batch["logp"]), 1) > 0.3).expand(batch["logp"].shape)
    monkeypatch.setattr(multi_agent, "rollout_batch", lambda *_: batch)
    monkeypatch.setattr(multi_agent, "ppo_epochs", lambda _, config, batch, remaining: turns.append(batch) or {})
    happo_iteration(learner, config, 1.0)
    first, second = (turn["mask"] for turn in turns)
    assert torch.equal(first | second, batch["mask"]) and not (first & second).any()


@pytest.mark.parametrize("move", [None, Box(-1, 1, (2,))])
def test_a_turn_leaves_the_others_as_they_were(move):
    config = HAPPOConfig(**TINY)
    learner = new_learner(lambda: TeamEnv(Script(move=move)), 0, config)
    happo_iteration(learner, config, 1.0)
    state = learner.optimizer.state[learner.weights]
    kept = {"weights": learner.weights.data, "exp_avg": state["exp_avg"], "exp_avg_sq": state["exp_avg_sq"]}
    before = {name: x.clone() for name, x in kept.items()}
    first, second = learner.policy.actor[-1].networks
    mine = {p.data_ptr() for p in second.parameters()}
    batch = rollout_batch(learner, learner.collect(33), config)
    mask = torch.tensor([False, True]).expand(batch["logp"].shape)
    with turn(learner, 1):
        multi_agent.ppo_epochs(learner, config, batch | {"mask": mask}, 1.0)
    for name, p in learner.policy.named_parameters():
        part = slice(p.storage_offset(), p.storage_offset() + p.numel())
        for key, now in kept.items():
            same = torch.eq(now[part], before[key][part]).view(p.shape)
            if name == "log_std":
                assert same[0].all() and not same[1].any()
            elif name.startswith("actor") and p.data_ptr() not in mine:
                assert same.all()
            else:
                assert not same.all(), (name, key)


def test_without_turns_adam_would_move_the_others():
    "Why weights are put back: the gradient of those who rest is zero, and yet."
    config = HAPPOConfig(**TINY)
    learner = new_learner(meeting(), 0, config)
    happo_iteration(learner, config, 1.0)
    before = nn.utils.parameters_to_vector(learner.policy.actor[-1].networks[0].parameters()).clone()
    batch = rollout_batch(learner, learner.collect(33), config)
    mask = torch.tensor([False, True]).expand(batch["logp"].shape)
    multi_agent.ppo_epochs(learner, config, batch | {"mask": mask}, 1.0)
    after = nn.utils.parameters_to_vector(learner.policy.actor[-1].networks[0].parameters())
    assert (after - before).abs().max() > 1e-4


@pytest.mark.parametrize("wrong, message", [
    (dict(share=True), "share of HAPPO must be False, got True"),
    (dict(clip_value=0.2), "clip_value of HAPPO must be None, got 0.2"),
])
def test_settings_of_happo_that_make_no_sense(wrong, message):
    with pytest.raises(ValueError, match=message):
        HAPPOConfig(**wrong)


@pytest.mark.parametrize("name", METHODS)
def test_an_environment_that_is_no_team_is_refused(name):
    with pytest.raises(ValueError, match="env must be a team, as TeamEnv makes one, got Box"):
        train(name, "CartPole-v1", progress=False)


class Grid(gym.Env):
    "One agent, whose observation is a table: no team."

    observation_space = gym.spaces.Dict(observation=Box(0, 1, (2, 2)))
    action_space = gym.spaces.Discrete(2)

    def reset(self, *, seed=None, options=None):
        return self.observation_space.sample(), {}


def test_a_table_alone_makes_no_team():
    with pytest.raises(ValueError, match="env must be a team, as TeamEnv makes one, got Dict"):
        train("mappo", Grid, progress=False)


def test_a_policy_that_is_not_of_a_team_is_refused():
    with pytest.raises(ValueError, match=r"policy of a team must be one whose values are \[16, agents\], got \[16\]"):
        train("mappo", meeting(), policy=lambda env: make_policy(env, (8,)), progress=False)
    with pytest.raises(ValueError, match="policy of HAPPO must be one with OwnNetworks that are not shared"):
        train("happo", meeting(), policy=lambda env: make_team_policy(env, (8,)), progress=False)


def test_xor_is_learnt_from_samples():
    config = HAPPOConfig(total_steps=8_000, n_envs=32, n_steps=16, epochs=4, lr=1e-2, **PLAIN)
    run = train("happo", "po_book/Xor-v0", config=config, progress=False)
    assert run.log[-1]["return"] >= 0.95


def test_two_learn_to_meet():
    "At random they are paid -3.3, and in the middle -0.3."
    config = replace(default_config("mappo", "po_book/Meeting-v0"), total_steps=15_000)
    run = train("mappo", "po_book/Meeting-v0", config=config, progress=False)
    assert run.evaluate(200).mean() > -1.5


@pytest.mark.parametrize("scaled", [{}, PLAIN], ids=["scaled", "plain"])
@pytest.mark.parametrize("name", METHODS)
def test_a_run_that_was_stopped_ends_with_the_same_weights(name, scaled, tmp_path):
    config = METHODS[name](**TINY, **scaled, checkpoint_every=300)
    stop = dict(report=lambda row: row["steps"] < 500)
    train(name, "po_book/Meeting-v0", config=config, out=tmp_path, progress=False, **stop)
    assert load_run(tmp_path).steps < 800
    resumed = resume(tmp_path, progress=False)
    whole = train(name, "po_book/Meeting-v0", config=config, progress=False)
    flat = nn.utils.parameters_to_vector
    assert torch.equal(flat(resumed.policy.parameters()), flat(whole.policy.parameters()))
    assert [row["return"] for row in resumed.log] == [row["return"] for row in whole.log]


@pytest.mark.parametrize("name", METHODS)
def test_from_a_shell(name, tmp_path, capsys):
    options = ["--env", "po_book/Meeting-v0", "--total-steps", "600", "--out", str(tmp_path / name)]
    assert main(["train", name, *options]) == 0
    assert "fresh episodes: mean -" in capsys.readouterr().out
    asked = json.loads((tmp_path / name / "run.json").read_text())
    assert (asked["algorithm"], asked["env"]) == (name, "po_book/Meeting-v0")
    assert asked["config"]["share"] == (name != "happo")
    assert main(["evaluate", str(tmp_path / name), "--episodes", "5"]) == 0


@pytest.mark.parametrize("name", METHODS)
def test_a_process_that_is_killed_goes_on_from_a_shell(name, tmp_path):
    sizes = "--n-envs 4 --n-steps 33 --minibatch 64 --epochs 2 --hidden 16 --eval-episodes 5"
    asked = f"train {name} --env po_book/Meeting-v0 {sizes} --total-steps 2400 --checkpoint-every 200"
    killed, whole = tmp_path / "killed", tmp_path / "whole"
    line = [*asked.split(), "--out", str(killed)]
    command = [sys.executable, "-c", "import sys; from po_book.cli import main; sys.exit(main())"]
    process = subprocess.Popen([*command, *line], stderr=subprocess.DEVNULL)
    while not (killed / "checkpoint.pt").exists():
        assert process.poll() is None
        time.sleep(0.005)
    process.send_signal(signal.SIGKILL)
    assert process.wait() == -signal.SIGKILL
    run = load_run(killed)
    assert 200 <= run.steps < 2_400 and not run.finished
    assert main(["resume", str(killed)]) == 0
    assert main([*asked.split(), "--out", str(whole)]) == 0
    runs = [load_run(out) for out in (killed, whole)]
    flat = nn.utils.parameters_to_vector
    assert torch.equal(*(flat(run.policy.parameters()) for run in runs))
    logs = [[{k: v for k, v in row.items() if k != "seconds"} for row in run.log] for run in runs]
    assert logs[0] == logs[1] and logs[0][-1]["steps"] >= 2_400


def test_ids_of_teams_take_options():
    team = gym.make("po_book/Meeting-v0", cells=4, players=3)
    assert team.observation_space["observation"].shape == (3, 4)
    assert isinstance(gym.make("po_book/Xor-v0").unwrapped.env, MatrixGame)


def test_runs_on_somebody_elses_environment_are_saved(tmp_path):
    pytest.importorskip("mpe2")
    config = MAPPOConfig(**TINY)
    with pytest.warns(UserWarning, match="Surface, which cannot be captured"):
        train("mappo", "mpe2/simple_spread-v3", config=config, out=tmp_path, progress=False)
    assert load_run(tmp_path).steps >= 1_200


def test_one_mind_with_masks_is_saved_and_resumed_too(tmp_path):
    "A slice among a policy's attributes is no obstacle."
    config = PPOConfig(**TINY, checkpoint_every=300)
    stop = dict(report=lambda row: row["steps"] < 500)
    train("ppo", "po_book/Meeting-v0", config=config, out=tmp_path, progress=False, **stop)
    whole = train("ppo", "po_book/Meeting-v0", config=config, progress=False)
    flat = nn.utils.parameters_to_vector
    resumed = resume(tmp_path, progress=False)
    assert resumed.policy.mask == slice(0, 6)
    assert torch.equal(flat(resumed.policy.parameters()), flat(whole.policy.parameters()))
