"A team as one environment: what agents receive, what the runner sees, what is refused."

import warnings

import gymnasium as gym
import numpy as np
import pytest
from gymnasium.spaces import Box, Dict, Discrete, MultiDiscrete, Sequence

from po_book.multi_agent import MAPPOConfig
from po_book.team_env import MatrixGame, Meeting, TeamEnv
from po_book.train import PPOConfig, train

pettingzoo = pytest.importorskip("pettingzoo")


class Script:
    "Agents a and b, who see what they are told to, and note down what they are asked."

    metadata, possible_agents, render_mode = {"name": "script"}, ["b", "a"], None

    def __init__(self, seen=None, move=None, steps=3, **more):
        self.seen = seen or Box(-9, 9, (2,), np.float32)
        self.move, self.steps, self.asked = move or Discrete(4), steps, []
        vars(self).update(more)

    def observation_space(self, agent):
        return self.seen

    def action_space(self, agent):
        return self.move

    def look(self):
        first = np.array([self.time, 1], np.float32), np.array([self.time, 2], np.float32)
        return {"a": first[0], "b": first[1], "common": "not an agent"}

    def reset(self, seed=None, options=None):
        self.time, self.seed = 0, seed
        return self.look(), {}

    def step(self, actions):
        self.asked.append(actions)
        self.time += 1
        end = self.time == self.steps
        flags = dict.fromkeys("ab", False), dict.fromkeys("ab", end)
        return self.look(), {"a": 1.0, "b": 4.0}, *flags, {}

    def state(self):
        return np.array([7, 8, self.time], np.float32)

    def close(self):
        self.closed = True


@pytest.mark.parametrize("game", [MatrixGame([[0, 1], [1, 0]]), MatrixGame(np.ones((2, 3, 2))),
                                  Meeting(), Meeting(cells=3, players=4, steps=2)])
def test_pettingzoos_own_tests(game):
    from pettingzoo.test import api_test, parallel_api_test
    from pettingzoo.utils.conversions import parallel_to_aec

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        if isinstance(game, MatrixGame):
            warnings.filterwarnings("ignore", "Observation is a single number")
        else:
            warnings.filterwarnings("ignore", "Observation")  # a Dict, and its row
        parallel_api_test(game, num_cycles=50)
        api_test(parallel_to_aec(game), num_cycles=50)


def test_a_step_by_hand():
    script = Script()
    team = TeamEnv(script)
    assert team.action_space == MultiDiscrete([4, 4])
    seen, info = team.reset(seed=5)
    assert script.seed == 5 and info == {}
    assert seen["observation"].tolist() == [[0, 2], [0, 1]]  # in the agents' order
    seen, reward, terminated, truncated, _ = team.step(np.array([3, 0]))
    assert script.asked == [{"b": 3, "a": 0}]
    assert type(script.asked[0]["a"]) is int
    assert seen["observation"].tolist() == [[1, 2], [1, 1]]
    assert (reward, terminated, truncated) == (2.5, False, False)
    team.step(np.array([0, 0]))
    assert team.step(np.array([0, 0]))[2:4] == (False, True)
    assert team.observation_space.contains(seen)
    team.close()
    assert script.closed


def test_a_state_is_there_if_it_is_asked_for():
    script = Script(state_space=Box(-9, 9, (3,), np.float32))
    assert "state" not in TeamEnv(script).reset()[0]
    team = TeamEnv(script, state=True)
    team.reset()
    seen, *_ = team.step(np.array([0, 0]))
    assert seen["state"].tolist() == [7, 8, 1]
    with pytest.raises(ValueError, match="env must be one with a state_space, got Script"):
        TeamEnv(Script(), state=True)


def test_actions_that_start_elsewhere_and_real_ones():
    script = Script(move=Discrete(3, start=5))
    train("mappo", lambda: TeamEnv(script), progress=False,
          config=MAPPOConfig(total_steps=40, n_envs=1, n_steps=40, minibatch=40, epochs=1))
    asked = {x for actions in script.asked for x in actions.values()}
    assert asked == {5, 6, 7}
    script = Script(move=Box(np.array([[0.0, -1.0]], np.float32), np.array([[0.5, 3.0]], np.float32)))
    team = TeamEnv(script)
    assert team.action_space == Box(np.array([[0, -1]] * 2, np.float32), np.array([[0.5, 3]] * 2, np.float32))
    train("mappo", lambda: TeamEnv(script), progress=False,
          config=MAPPOConfig(total_steps=60, n_envs=1, n_steps=60, minibatch=60, epochs=1))
    asked = np.array([x for actions in script.asked for x in actions.values()])
    assert asked.shape[1:] == (1, 2)
    assert asked.min((0, 1)).tolist() == [0, -1] and asked.max((0, 1)).tolist() == [0.5, 3]


def test_return_and_steps_are_counted_once():
    "Two agents are paid 1 and 4 in each of 3 steps: a return of 7.5, three transitions."
    config = MAPPOConfig(total_steps=24, n_envs=2, n_steps=4, minibatch=8, epochs=1)
    run = train("mappo", lambda: TeamEnv(Script()), config=config, progress=False)
    assert [row["steps"] for row in run.log] == [6, 12, 18, 24]
    assert {row["return"] for row in run.log} == {7.5}
    assert run.evaluate(5).tolist() == [7.5] * 5


def test_aec_and_parallel_are_the_same_team():
    from pettingzoo.utils.conversions import parallel_to_aec

    teams = TeamEnv(Meeting()), TeamEnv(parallel_to_aec(Meeting()))
    first, second = (team.reset(seed=3)[0] for team in teams)
    for moves in ([0, 2], [1, 1], [2, 0], [2, 2]):
        np.testing.assert_equal(first, second)
        (first, *rest), (second, *others) = (team.step(np.array(moves)) for team in teams)
        assert rest == others


def test_an_environment_that_asks_in_turn():
    "Written as AEC: player b adds its move, a adds ten times its own; paid when both have."
    from pettingzoo import AECEnv
    from pettingzoo.test import api_test
    from pettingzoo.utils import AgentSelector

    class Adds(AECEnv):
        metadata = {"name": "adds", "is_parallelizable": True}
        possible_agents, render_mode = ["b", "a"], None

        def observation_space(self, agent):
            return self.spaces[0]

        def action_space(self, agent):
            return self.spaces[1]

        spaces = Box(-1, 99, (1,), np.float32), Discrete(4)

        def reset(self, seed=None, options=None):
            self.agents = self.possible_agents[:]
            self.rewards, self._cumulative_rewards = ({n: 0.0 for n in self.agents} for _ in range(2))
            self.terminations, self.truncations = ({n: False for n in self.agents} for _ in range(2))
            self.infos = {n: {} for n in self.agents}
            self.total, self.cycle, self.turn = 0, 0, AgentSelector(self.agents)
            self.agent_selection = self.turn.next()

        def observe(self, agent):
            return np.array([self.total], np.float32)

        def step(self, action):
            agent = self.agent_selection
            if self.terminations[agent] or self.truncations[agent]:
                return self._was_dead_step(action)
            self.rewards = dict.fromkeys(self.agents, 0.0)
            self._cumulative_rewards[agent] = 0.0
            self.total += action * (10 if agent == "a" else 1)
            if self.turn.is_last():
                self.rewards, self.cycle = {"b": 1.0 * self.total, "a": 0.0}, self.cycle + 1
                self.truncations = dict.fromkeys(self.agents, self.cycle == 3)
            self._accumulate_rewards()
            self.agent_selection = self.turn.next()

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # of its observations, which are single numbers
        api_test(Adds(), num_cycles=20)
    team = TeamEnv(Adds())
    for _ in range(2):
        assert team.reset(seed=0)[0]["observation"].tolist() == [[0], [0]]
        paid = []
        for moves in ([3, 1], [0, 2], [1, 0]):
            seen, reward, terminated, truncated, _ = team.step(np.array(moves))
            paid.append((seen["observation"].tolist(), reward, terminated, truncated))
        assert paid == [([[13]] * 2, 6.5, False, False), ([[33]] * 2, 16.5, False, False),
                        ([[34]] * 2, 17.0, False, True)]


def test_games_by_hand():
    game = MatrixGame(np.arange(12).reshape(2, 3, 2))
    game.reset()
    _, rewards, terminated, truncated, _ = game.step(dict(zip(game.possible_agents, (1, 2, 0))))
    assert rewards == dict.fromkeys(game.possible_agents, 10.0) and game.agents == []
    assert all(terminated.values()) and not any(truncated.values())
    meeting = Meeting(cells=5, players=3, steps=2)
    meeting.reset(seed=0)
    meeting.places = np.array([0, 4, 2])
    masks = [x["action_mask"].tolist() for x in meeting.look().values()]
    assert masks == [[0, 1, 1], [1, 1, 0], [1, 1, 1]]
    _, rewards, *_ = meeting.step(dict(zip(meeting.possible_agents, (2, 1, 0))))
    assert meeting.places.tolist() == [1, 4, 1] and rewards["player_2"] == -3 / 4
    _, _, terminated, truncated, _ = meeting.step(dict.fromkeys(meeting.possible_agents, 1))
    assert all(truncated.values()) and not any(terminated.values())
    again = [Meeting().reset(seed=9)[0]["player_0"]["observation"].tolist() for _ in range(2)]
    assert again[0] == again[1]


class Turns(Script):
    metadata = {"name": "turns", "is_parallelizable": False}

    def agent_iter(self):
        "Only AEC environments have it."

    def __str__(self):
        return "turns"


REFUSED = {
    "a PettingZoo environment that names its possible_agents, got CartPoleEnv": lambda: gym.make("CartPole-v1").unwrapped,
    "env must be one whose agents can act at the same time .is_parallelizable., got turns": Turns,
    "a PettingZoo environment that names its possible_agents, got Script": lambda: Script(possible_agents=[]),
    "observation space of a must be that of b, Box.0.0, 1.0, .2,., float32., got Box.0.0, 2.0, .2,., float32.: pad the smaller": lambda: Script(
        observation_space=lambda agent: Box(0, 1 + (agent == "a"), (2,))),
    "observation space of a must be that of b, Dict.* got Box": lambda: Script(  # a mask for one
        observation_space=lambda agent: Box(0, 1, (2,)) if agent == "a" else Dict(action_mask=Box(0, 1, (4,)))),
    "action space of a must be that of b, Discrete.2., got Discrete.3.: pad the smaller": lambda: Script(
        action_space=lambda agent: Discrete(2 + (agent == "a"))),
    "action space of a must be that of b, Discrete.2., got Box.*or make both of one kind": lambda: Script(
        action_space=lambda agent: Discrete(2) if agent == "b" else Box(0, 1, (1,))),
    "action space of an agent must be Discrete or a Box, got MultiDiscrete..2 2..: number its choices": lambda: Script(
        move=MultiDiscrete([2, 2])),
    "Sequence.Discrete.3., stack=False. cannot be flattened": lambda: Script(seen=Sequence(Discrete(3))),
}


@pytest.mark.parametrize("message", REFUSED)
def test_what_is_no_team_is_refused(message):
    with pytest.raises(ValueError, match=message):
        TeamEnv(REFUSED[message]())


@pytest.mark.parametrize("column, gone, message", [
    (0, "b", "observations must be there for all agents at all times, got no b: let an agent that is away wait"),
    (1, "a", "rewards must be there for all agents at all times, got no a: let"),
    (2, "b", "terminated must be there for all agents at all times, got no b: let"),
    (3, "a", "truncated must be there for all agents at all times, got no a: let"),
])
def test_an_agent_that_vanishes_is_named(column, gone, message):
    script = Script()
    team, step = TeamEnv(script), script.step
    team.reset()

    def without(actions):
        columns = step(actions)
        del columns[column][gone]
        return columns

    script.step = without
    with pytest.raises(ValueError, match=message):
        team.step(np.array([0, 0]))


def test_an_agent_that_leaves_first_or_comes_later_is_named():
    script = Script()
    team, step = TeamEnv(script), script.step
    script.step = lambda actions: (*step(actions)[:2], {"a": True, "b": False}, {"a": False, "b": False}, {})
    team.reset()
    message = "an episode must be over for all agents at once, got only a: let an agent that is away wait"
    with pytest.raises(ValueError, match=message):
        team.step(np.array([0, 0]))
    script.look = lambda: {"a": np.zeros(2, np.float32)}
    with pytest.raises(ValueError, match="observations must be there .* got no b"):
        team.reset()


def test_an_agent_that_appears_in_an_episode_is_named():
    "Observations may say more; who is paid and is no member of the team is an error."
    script = Script()
    team, step = TeamEnv(script), script.step
    team.reset()

    def with_a_third(actions):
        seen, rewards, *flags = step(actions)
        return seen, rewards | {"c": 9.0}, *flags

    script.step = with_a_third
    with pytest.raises(ValueError, match="rewards must be those of possible_agents, got one of c"):
        team.step(np.array([0, 0]))


@pytest.mark.parametrize("flags, expected", [
    (({"a": True, "b": True}, {"a": False, "b": False}), (True, False)),
    (({"a": True, "b": False}, {"a": False, "b": True}), (False, True)),
    (({"a": True, "b": True}, {"a": True, "b": False}), (True, True)),
])
def test_how_an_episode_of_the_team_ends(flags, expected):
    script = Script()
    team, step = TeamEnv(script), script.step
    script.step = lambda actions: (*step(actions)[:2], *flags, {})
    team.reset()
    assert team.step(np.array([0, 0]))[2:4] == expected


@pytest.mark.parametrize("wrong", [dict(cells=1), dict(players=1), dict(steps=0), dict(cells=2.5)])
def test_settings_that_make_no_line_are_refused(wrong):
    (name,) = wrong
    with pytest.raises(ValueError, match=f"{name} must be"):
        Meeting(**wrong)


def test_parts_of_an_observation_beside_the_mask_are_flattened():
    seen = Dict(action_mask=Box(0, 1, (4,), np.int8), place=Discrete(3), speed=Box(-9, 9, (1,), np.float32))
    script = Script(seen=seen)
    one = {"action_mask": np.array([1, 0, 1, 1], np.int8), "place": 2, "speed": np.array([0.5], np.float32)}
    script.look = lambda: {"a": one, "b": one | {"place": 0}}
    team = TeamEnv(script)
    found, _ = team.reset()
    assert found["observation"].tolist() == [[1, 0, 0, 0.5], [0, 0, 1, 0.5]]
    assert found["action_mask"].tolist() == [[1, 0, 1, 1]] * 2
    config = PPOConfig(total_steps=30, n_envs=1, n_steps=30, minibatch=30, epochs=1)
    train("ppo", lambda: TeamEnv(script), config=config, progress=False)
    assert 1 not in {x for actions in script.asked for x in actions.values()}


def test_an_environment_of_somebody_else():
    pytest.importorskip("mpe2")
    from mpe2 import simple_spread_v3

    team, theirs = gym.make("mpe2/simple_spread-v3"), simple_spread_v3.parallel_env()
    found, (seen, _) = team.reset(seed=4)[0], theirs.reset(seed=4)
    for moves in ([1, 2, 3], [4, 0, 1]):
        np.testing.assert_equal(found["observation"], np.stack([seen[n] for n in theirs.agents]))
        found, reward, *_ = team.step(np.array(moves))
        seen, rewards, *_ = theirs.step(dict(zip(theirs.agents, moves)))
        assert reward == pytest.approx(np.mean(list(rewards.values())), abs=1e-12)


def test_what_simple_spread_pays():
    "Minus half of the distances of landmarks to their nearest; half a point a collision."
    pytest.importorskip("mpe2")
    team, collided = gym.make("mpe2/simple_spread-v3"), 0
    dice = np.random.default_rng(0)
    for seed in range(10):
        team.reset(seed=seed)
        for _ in range(25):
            seen, reward, *_ = team.step(dice.integers(5, size=3))
            landmarks, others = (seen["observation"][:, part].reshape(3, -1, 2) for part in (slice(4, 10), slice(10, 14)))
            nearest = np.linalg.norm(landmarks, axis=-1).min(0)
            hits = (np.linalg.norm(others, axis=-1) < 0.3).sum()  # each is of radius .15
            collided += hits
            assert reward == pytest.approx(-nearest.sum() / 2 - hits / 2 / 3, abs=1e-5)
    assert collided > 0
