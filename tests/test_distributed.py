"Several processes are one: parameters, log, checkpoint, what goes wrong."

import os
import re
import signal
import socket
import subprocess
import sys
from pathlib import Path

import distributed_workers as workers
import gymnasium as gym
import numpy as np
import pytest
import torch

from po_book import distributed
from po_book.checkpoint import load_checkpoint
from po_book.distributed import RowsOfAll, train_together
from po_book.processes import launch
from po_book.runs import read_log
from po_book.train import load_run, train

HERE = Path(__file__).parent
TORCHRUN = [sys.executable, "-m", "torch.distributed.run"]
TINY = "--n-envs 4 --n-steps 32 --minibatch 32 --epochs 2 --total-steps 700"
COMMAND = ["-m", "po_book.cli", "train", "ppo", "--env", "distributed_workers:Mortal-v0",
           *TINY.split(), "--checkpoint-every", "200", "--eval-episodes", "2", "--device", "cpu"]  # fmt: skip


@pytest.fixture(scope="module")
def seen():
    "What each of two processes has seen, all in one launch."
    return launch(workers.everything, 2, timeout=240)


ENVS = workers.cartpole, "po_book/CartPole-v1"


@pytest.mark.parametrize("name", workers.CONFIGS)
@pytest.mark.parametrize("env", ENVS, ids=["a function", "tensors"])
def test_two_processes_are_one_with_all_environments(seen, name, env):
    weights, log = workers.learned(train, name, env, config=workers.CONFIGS[name])
    # Conjugate gradients in float32 make much of a last digit; the next test has them in float64.
    compared = {} if name == "trpo" else weights
    for rank in (0, 1):
        theirs, their_log = seen[rank][str(workers.label(env)), name]
        assert theirs.keys() == weights.keys()
        for key, x in compared.items():
            np.testing.assert_allclose(theirs[key], x, atol=1e-6, rtol=0, err_msg=key)
        assert [row["steps"] for row in their_log] == [row["steps"] for row in log]
        assert [row.get("return") for row in their_log] == [row.get("return") for row in log]
        for row, ours in zip(their_log, log):
            assert row.keys() == ours.keys()
            for key in row.keys() & {"value_loss", "explained_variance", "entropy", "approx_kl"}:
                assert row[key] == pytest.approx(ours[key], abs=1e-3 if name == "trpo" else 1e-5)


def test_in_double_precision_trpo_is_the_same_to_seven_digits(seen):
    "Advantages are float32 all the same, and their mean has another last digit."
    weights, log = workers.double("trpo", train)
    for rank in (0, 1):
        theirs, their_log = seen[rank]["double"]
        for key, x in weights.items():
            np.testing.assert_allclose(theirs[key], x, atol=1e-7, rtol=0, err_msg=key)
        assert [r["fraction"] for r in their_log] == [r["fraction"] for r in log]


def test_both_processes_hold_the_same_bits(seen):
    for key in seen[0]:
        if isinstance(key, tuple):
            first, second = (seen[rank][key][0] for rank in (0, 1))
            assert all(np.array_equal(first[name], second[name]) for name in first)


def test_images_are_not_sent_for_the_log(seen):
    weights, log = workers.learned(train, "a2c", workers.Bright, config=workers.CONFIGS["a2c"])
    theirs, their_log = seen[1]["images"]
    assert [row["return"] for row in their_log] == [row["return"] for row in log]
    for key, x in weights.items():
        np.testing.assert_allclose(theirs[key], x, atol=1e-6, rtol=0, err_msg=key)
    bytes_sent, _ = seen[0]["volume of images"]
    # The scale of rewards, moments of one step, a reward and three flags; a picture has 432.
    assert bytes_sent["all_gather"] == 64 * (4 + 1 + 1) + 3 * 8 + 64 * (4 + 3)


def test_the_group_averages_by_rows_and_normalises_over_all(seen):
    for rank in (0, 1):
        numbers = seen[rank]["numbers"]
        assert numbers["average"] == [4.0]  # of 1 once and 5 three times
        assert numbers["of nothing"] == [2.0]  # a process without rows does not count
        x = torch.tensor([1.0, 4.0, 5.0, 6.0])
        want = (x - x.mean()) / x.std(correction=0)
        got = [y for r in (0, 1) for y in seen[r]["numbers"]["normalized"]]
        np.testing.assert_allclose(got, want, atol=1e-6)


def test_minibatches_are_those_of_one_process_and_each_row_is_somebodys(seen):
    "Rows are their own number; a process without a row in a part gets one that is masked."
    for name, valid in ("parts", workers.LOST | True), ("fewer parts", workers.LOST):
        alone = workers.parts_alone(valid)
        mine, other = (seen[rank]["numbers"][name] for rank in (0, 1))
        assert len(mine) == len(other) == len(alone) == {"parts": 12, "fewer parts": 10}[name]
        for part, *parts in zip(alone, mine, other):
            assert sorted(parts[0] + parts[1]) == sorted(part)
        assert not all(mine + other)  # some had none


def test_an_iteration_sends_a_gradient_a_step_and_its_rows_once(seen):
    "Two epochs of six minibatches; 64 rows are of this process."
    bytes_sent, (weights,) = seen[0]["volume"]
    assert bytes_sent["all_reduce"] == 12 * 4 * (weights + 1)
    assert bytes_sent["broadcast"] == 4 * weights
    scale = 64 * (4 + 1 + 1)
    moments, watched = 12 * 3 * 8, 64 * 5 * 4
    rows = 64 * (4 * 4 + 4 + 3)  # four observations, a reward, three flags
    assert bytes_sent["all_gather"] == scale + moments + watched + rows


def test_what_cannot_be_shared_is_refused_in_all_processes(seen):
    for rank in (0, 1):
        said = seen[rank]["refused"]
        assert said["n_envs"] == "n_envs must be a multiple of 2, the number of processes, got 5"
        assert said["dqn"].startswith("algorithm must be one of a2c, trpo, ppo, got 'dqn'")
        assert said["vector"].startswith("env must be an id or a function")
        assert said["config"] == "lr must be 0.001 as on process 0, got 0.002 on process 1"
        assert said["draw"] == (
            "drawing in act must be by one of uniform_, normal_, exponential_, bernoulli_, "
            "random_, got multinomial"
        )


def test_an_early_stop_is_of_all(seen):
    assert [seen[rank]["stopped"] for rank in (0, 1)] == [2, 2]


def test_the_first_one_grades_and_all_stop_when_it_is_solved(seen):
    assert seen[0]["solved"] == seen[1]["solved"]
    assert len(seen[0]["solved"]) == 2 and seen[0]["solved"][0] is None
    assert seen[0]["solved"][1] > 1


def test_rows_of_all_are_drawn_for_every_kind_of_number():
    for fill in "exponential_", "normal_", "uniform_", "bernoulli_", "random_":
        draws = []
        for size in (1, 2, 4):
            parts = []
            for rank in range(size):
                with RowsOfAll(rank, size):
                    x, g = torch.empty(16 // size, 3), torch.Generator().manual_seed(1)
                    parts.append(getattr(x, fill)(generator=g))
            draws.append(torch.cat(parts))
        assert torch.equal(draws[0], draws[1]) and torch.equal(draws[0], draws[2]), fill


def test_alone_it_is_train(tmp_path):
    config = workers.CONFIGS["ppo"]
    one = train_together("ppo", "CartPole-v1", config=config, progress=False)
    two = train("ppo", "CartPole-v1", config=config, progress=False)
    assert all(map(torch.equal, one.policy.parameters(), two.policy.parameters()))


def environment(**more: str) -> dict[str, str]:
    return os.environ | {"PYTHONPATH": f"{HERE.parent}{os.pathsep}{HERE}", "OMP_NUM_THREADS": "1"} | more


def weights(folder: Path) -> torch.Tensor:
    run = load_run(folder)
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


@pytest.fixture(scope="module")
def undisturbed():
    "Weights of one process, on the environment in which nobody dies."
    config = workers.replace(workers.CONFIGS["ppo"], hidden=(64, 64), minibatch=32, total_steps=700)
    run = train("ppo", workers.cartpole, config=config, progress=False)
    return torch.cat([p.detach().flatten() for p in run.policy.parameters()])


def test_a_worker_that_is_killed_is_named_and_its_run_goes_on(tmp_path, undisturbed):
    out = tmp_path / "run"
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", *COMMAND, "--out", str(out)]
    done = subprocess.run(command, env=environment(DIES_IN="0"), capture_output=True, text=True, timeout=900)
    assert done.returncode == 1
    cause = done.stderr[done.stderr.index("Root Cause") :]
    assert re.search(r"rank\s*: 1 \(local_rank: 1\)", cause) and "Signal 9 (SIGKILL)" in cause
    assert done.stdout.count("folder:") == 1  # one of them speaks
    state = load_checkpoint(out / "checkpoint.pt")
    assert len(state["learner"]["steppers"]) == 2
    assert 200 <= float(read_log(out)[-1]["steps"]) < 400
    command = [*TORCHRUN, "--standalone", "--nproc-per-node=2", "-m", "po_book.cli", "resume", str(out)]
    done = subprocess.run(command, env=environment(), capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr[-3000:]
    torch.testing.assert_close(weights(out), undisturbed, atol=1e-6, rtol=0)


def test_whoever_was_started_again_tells_the_others_and_the_first_one_knows_the_folder(monkeypatch):
    for said, wanted in {
        ((False, True), (True, False)): True,
        ((True, False), (False, True)): False,
        ((False, True), (False, True)): False,
    }.items():
        monkeypatch.setattr(distributed, "_all_say", lambda x, said=said: said)
        assert distributed._started_again(None) is wanted


def test_processes_are_started_again_and_go_on(tmp_path, undisturbed):
    out = tmp_path / "run"
    again = ["--standalone", "--nproc-per-node=2", "--max-restarts=1"]
    command = [*TORCHRUN, *again, *COMMAND, "--out", str(out)]
    how = dict(env=environment(DIES_IN="0"), capture_output=True, text=True, timeout=900)
    done = subprocess.run(command, **how)
    assert done.returncode == 0, done.stderr[-3000:]
    assert "exitcode: -9" in done.stderr
    torch.testing.assert_close(weights(out), undisturbed, atol=1e-6, rtol=0)


def free_port():
    with socket.socket() as s:
        s.bind(("localhost", 0))
        return s.getsockname()[1]


def test_two_hosts_meet_and_start_again_when_a_worker_dies(tmp_path, undisturbed):
    out = tmp_path / "run"
    meet = ["--nnodes=2", "--nproc-per-node=1", "--max-restarts=1", "--rdzv-backend=c10d",
            f"--rdzv-endpoint=localhost:{free_port()}", "--rdzv-id=test", "--local-addr=localhost"]  # fmt: skip
    command = [*TORCHRUN, *meet, *COMMAND, "--out", str(out)]
    how = dict(env=environment(DIES_IN="0"), stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
    hosts = [subprocess.Popen(command, start_new_session=True, **how) for _ in range(2)]
    try:
        said = [host.communicate(timeout=900) for host in hosts]
    finally:
        for host in hosts:
            if host.poll() is None:
                os.killpg(host.pid, signal.SIGKILL)
    assert [host.returncode for host in hosts] == [0, 0], said
    assert sum("exitcode: -9" in errors for _, errors in said) == 1
    assert sum(text.count("fresh episodes") for text, _ in said) == 1
    files = {p.name.split(".tfevents")[0] for p in out.iterdir()}
    assert files == {"run.json", "checkpoint.pt", "log.csv", "events.out"}
    torch.testing.assert_close(weights(out), undisturbed, atol=1e-6, rtol=0)


@pytest.mark.filterwarnings("ignore:.*capture")
def test_environments_in_other_processes_are_the_same_run():
    kinds = (gym.vector.SyncVectorEnv, gym.vector.AsyncVectorEnv)
    runs = []
    for kind in kinds:
        vector = kind([workers.cartpole] * 4)
        runs.append(train("ppo", vector, config=workers.CONFIGS["ppo"], progress=False))
        vector.close()
    assert all(map(torch.equal, *(run.policy.parameters() for run in runs)))
