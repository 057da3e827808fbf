"Scripts that compare and record: they run here on little, and assert no time."
import csv
import json
import subprocess
import sys
from dataclasses import asdict, replace
from time import perf_counter

import po_book.learner
import po_book.train
import pytest
import torch
from conftest import ROOT
from po_book.train import PPOConfig

sys.path.insert(0, str(ROOT / "benchmarks"))


def table(path):
    with open(path, newline="", encoding="utf-8") as file:
        return list(csv.reader(file))


def test_what_a_card_is_asked_runs_without_one(tmp_path):
    script = [sys.executable, "benchmarks/gpu.py", "--device", "cpu", "--small"]
    done = subprocess.run([*script, "--out", tmp_path], cwd=ROOT, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    checked = {what: result for what, _, result in table(tmp_path / "gpu_checks.csv")[1:]}
    assert checked["11_checks.ipynb"] == "passed"
    assert "failed" not in checked["tests that need a card"]
    (n, backend, rate), = table(tmp_path / "cartpole_gpu.csv")[1:]
    assert (n, backend) == ("64", "eager") and float(rate) >= 0
    (n, backend, seed, seconds), = table(tmp_path / "cartpole_gpu_solved.csv")[1:]
    assert (n, backend, seed) == ("64", "eager", "0") and float(seconds) > 0
    ways = [what + how for what in ("all weights, ", "LoRA, ") for how in ("bf16", "bf16, recompute")]
    steps = {name: rest for name, *rest in table(tmp_path / "lm_step_cpu.csv")[1:]}
    assert list(steps) == ["all weights, float32", *ways]
    assert all(float(seconds) > float(sampling) > 0 for seconds, _, _, sampling, *_ in steps.values())
    assert [name for name, *_ in table(tmp_path / "lm_t4_cpu.csv")[1:]] == ways[1:]
    assert len(table(tmp_path / "lm_t4_reckoned.csv")) == 8
    samplers = [(name, float(over)) for _, name, *_, over, _ in table(tmp_path / "lm_sampling_cpu.csv")[1:]]
    assert [name for name, _ in samplers] == ["generate", "po_book sample"] * 3
    assert [over for name, over in samplers if name == "po_book sample"] == [1] * 3
    curve = [(what, steps) for what, _, steps, *_ in table(tmp_path / "lm_from_scratch_cpu.csv")[1:]]
    assert curve == [("fine-tuning", "2"), ("fine-tuning", "4"), ("GRPO", "1"), ("GRPO", "2")]


def test_lines_are_kept_one_by_one_and_none_is_begun_too_late(tmp_path):
    from cartpole_gpu import Plan, keep

    def lines():
        yield ["1", "a"]
        assert table(tmp_path / "some.csv") == [["n", "what"], ["1", "a"]]
        yield ["2", "b"]

    assert keep(Plan("cpu", folder=tmp_path), "some", ["n", "what"], lines()) == [["1", "a"], ["2", "b"]]
    assert len(table(tmp_path / "some.csv")) == 3
    late = Plan("cpu", folder=tmp_path, deadline=0.0)
    assert keep(late, "none", ["n"], iter([["1"]])) == []
    assert not (tmp_path / "none.csv").exists()


def test_an_error_is_a_line_and_does_not_end_the_table():
    from cartpole_gpu import tried

    assert tried(lambda x: x / 3, 1) == "0.33" and tried(lambda: None) == ""
    assert tried(lambda: 1 / 0) == "failed: ZeroDivisionError: division by zero"


def test_a_part_has_its_share_of_the_time():
    from cartpole_gpu import Plan

    whole = Plan("cpu", deadline=perf_counter() + 100)
    assert 29 < whole.share(0.3).deadline - perf_counter() <= 30
    assert Plan("cpu").share(0.3).deadline == float("inf")


def test_a_card_that_is_too_small_says_so():
    from lm_gpu import line

    def full():
        raise torch.cuda.OutOfMemoryError("2 GiB more were asked for")

    assert line("a", 4, lambda: ["1", "2", "3"]) == ["a", "1", "2", "3"]
    assert line("b", 4, full) == ["b", "out of memory", "", ""]
    assert line("c", 3, lambda: [1 / 0]) == ["c", "failed: ZeroDivisionError: division by zero", ""]


def test_what_has_no_time_left_or_fails_says_so_and_the_next_is_begun(tmp_path, capsys):
    from cartpole_gpu import Plan
    from lm_gpu import from_scratch, tried

    from_scratch(Plan("cpu", True, tmp_path, deadline=0.0))
    assert "no time was left" in capsys.readouterr().out and not [*tmp_path.iterdir()]
    tried("some table", lambda: 1 / 0)
    assert capsys.readouterr().out == "some table: failed: ZeroDivisionError: division by zero\n"


def test_what_is_held_is_counted_by_hand():
    from reckoning import GIB, Job, Shape, counted, memory

    shape = Shape(hidden=32, layers=2, heads=2, kv_heads=1, intermediate=64, vocabulary=512)
    norms, attention, mlp = 2 * 32, 32 * 32 * 2 + 2 * 32 * 16 + 32 + 2 * 16, 3 * 32 * 64
    weights = 512 * 32 + 2 * (norms + attention + mlp) + 32
    adapters = 2 * 16 * (2 * (32 + 32) + 2 * (32 + 16) + 3 * (32 + 64))
    assert counted(shape, lora=False) == (weights, weights)
    assert counted(shape, lora=True) == (weights + adapters, adapters)
    job = Job(shape, prompts=2, group=4, prompt=5, new=3, micro_tokens=32)
    parts = {name: x * GIB for name, x in memory(job).items()}
    assert parts["weights"] == parts["gradients"] == 4 * weights and parts["moments"] == 8 * weights
    assert parts["second gradient of the table"] == 4 * 512 * 32
    assert parts["cache"] == 4 * (2 * 16) * 2 * 8 * (5 + 3)
    assert parts["logits"] == 12 * (4 * 3) * 512  # half of the batch at a time
    always = parts["weights"] + parts["moments"] + parts["context"]
    backward = "gradients", "second gradient of the table", "activations", "logits"
    assert parts["all"] == pytest.approx(always + sum(parts[name] for name in backward))
    half = {name: x * GIB for name, x in memory(replace(job, precision="fp16", lora=True)).items()}
    assert half["weights"] == 2 * weights + 4 * adapters and half["moments"] == 8 * adapters
    assert half["weights in two bytes"] == half["second gradient of the table"] == 0


@pytest.mark.parametrize("how", [{}, {"recompute": True}, {"precision": "bf16", "lora": True}])
def test_the_reckoning_is_near_what_tensors_take(how):
    from lm_gpu import held, steps
    from reckoning import Job, Shape, memory

    shape = Shape(hidden=128, layers=3, heads=4, kv_heads=2, intermediate=512, vocabulary=4096)
    job = Job(shape, prompts=2, group=4, prompt=24, new=12, micro_tokens=144, **how)
    _, (measured, _) = held("cpu", lambda: steps(job, "cpu", 1))
    assert memory(job, context=0)["all"] == pytest.approx(float(measured), rel=0.15)


def test_the_recorded_reckoning_is_what_is_reckoned():
    from cartpole_gpu import Plan
    from lm_gpu import reckoned

    assert table(ROOT / "results" / "lm_t4_reckoned.csv")[1:] == list(reckoned(Plan("cpu")))


def test_gradient_steps_are_counted_as_both_libraries_take_them():
    from race import gradient_steps

    # 3 iterations of 20 epochs over 1000 rows in parts of 256; TRPO adds its own step.
    assert gradient_steps(3, 20, 1000, 256, natural=False) == 3 * 20 * 4
    assert gradient_steps(3, 20, 1000, 256, natural=True) == 3 * (20 * 4 + 1)


def test_one_variant_is_recorded_again_and_the_others_stay(tmp_path, monkeypatch):
    from po_book.train import PPOConfig
    from recording import Record, asked

    whole = Record("some", 1, {"a": PPOConfig(), "b": PPOConfig(clip=0.1)})
    rows = [{"variant": name, "seed": 0, "mean_return": 1.5} for name in "ab"]
    whole.write("some", rows, tmp_path, device="another")
    Record("some", 1, {"b": PPOConfig(clip=0.3)}).add("some", [rows[1] | {"mean_return": 2.5}], tmp_path)
    assert table(tmp_path / "some.csv")[1:] == [["a", "0", "1.5"], ["b", "0", "2.5"]]
    note = json.loads((tmp_path / "some.json").read_text(encoding="utf-8"))
    assert {name: x["clip"] for name, x in note["settings"].items()} == {"a": 0.2, "b": 0.3}
    assert note["device"].startswith("another (b: ") and note["seeds"] == "seeds 0 to 0"
    assert "(b: " not in note["python"]
    assert whole.only("b").variants == {"b": PPOConfig(clip=0.1)}
    for words, found in (["some"], ("some", 1)), (["some", "2", "b"], ("some", 2, "b")):
        monkeypatch.setattr(sys, "argv", ["record.py", *words])
        assert asked("", {"some": whole}, most=3) == found
    for words in [], ["other"], ["some", "1", "c"], ["some", "1", "b", "b"]:
        monkeypatch.setattr(sys, "argv", ["record.py", *words])
        with pytest.raises(SystemExit, match="NAME is one of: some"):
            asked("", {"some": whole}, most=3)


NAMED = {  # what a detail's name says, as settings
    "as it is": {},
    "rate and clip range constant": {"anneal": False},
    "advantages not normalised": {"normalize_advantages": False},
    "gradient not bounded": {"max_grad_norm": 1e9},
    "ratio not clipped": {"clip": None},
    "one epoch": {"epochs": 1},
    "lambda 0": {"lam": 0.0},
    "lambda 1": {"lam": 1.0},
    "observations normalised": {"normalize_obs": True},
    "entropy bonus 0.01": {"entropy_coef": 0.01},
    "one environment": {"n_envs": 1, "n_steps": 1024},
    "epochs end at 0.01 nats": {"target_kl": 0.01},
    "rewards normalised": {"normalize_rewards": True},
}


def test_a_detail_of_ppo_changes_what_its_name_says_and_nothing_else():
    from record import RECORDS

    variants = dict(RECORDS["ppo_details"].variants)
    base, general = variants["as it is"], variants.pop("general defaults")
    assert variants == {name: replace(base, **more) for name, more in NAMED.items()}
    for name, more in NAMED.items():
        assert all(getattr(base, key) != value for key, value in more.items()), name
    assert general == PPOConfig(total_steps=base.total_steps, eval_every=base.eval_every)
    pairs = zip(asdict(base).values(), asdict(general).values())
    assert sum(one != other for one, other in pairs) == 7  # as the page says


SWITCHED = {  # what the first variant has, and what the names of the others change
    "dqn_cartpole": {
        "replay and target network": {"memory": 50_000, "tau": 0.03},
        "without target network": {"tau": 1.0},
        "without replay": {"memory": 256, "learning_starts": 256},
        "with neither": {"tau": 1.0, "memory": 256, "learning_starts": 256},
    },
    "ddpg_pendulum": {"noise 0.2": {"sigma": 0.2}, "noise 0.01": {"sigma": 0.01}},
    "trpo_pendulum": {
        "rollouts of 200 steps": {"n_steps": 200},
        "rollouts of 128 steps": {"n_steps": 128},
    },
}


@pytest.mark.parametrize("name", SWITCHED)
def test_a_switch_changes_what_its_name_says_and_nothing_else(name):
    from record import RECORDS

    variants = RECORDS[name].variants
    first = variants[next(iter(SWITCHED[name]))]
    assert variants == {variant: replace(first, **more) for variant, more in SWITCHED[name].items()}
    assert len(set(map(repr, variants.values()))) == len(variants)


TEN = "ppo_details", "ppo_acrobot", "ppo_pendulum", "ppo_lunarlander", *SWITCHED


@pytest.mark.parametrize("name", TEN)
def test_a_record_has_ten_seeds_of_what_the_code_would_run(name):
    from record import RECORDS

    note = json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))
    assert note["settings"] == json.loads(json.dumps(RECORDS[name].settings()))
    runs = {(variant, seed) for variant, seed, *_ in table(ROOT / "results" / f"{name}.csv")[1:]}
    assert runs == {(variant, str(seed)) for variant in note["settings"] for seed in range(10)}


def detail(name):
    "The log of a short run of a detail, four rollouts."
    from record import RECORDS

    config = replace(RECORDS["ppo_details"].variants[name], total_steps=4096, eval_every=0)
    return po_book.train.train("ppo", "CartPole-v1", config=config, progress=False).log


def test_a_run_without_the_clip_clips_nothing():
    def fractions(name):
        return [row["clip_fraction"] for row in detail(name)]

    assert set(fractions("ratio not clipped")) == {0.0}
    assert max(fractions("as it is")) > 0.05


def test_a_run_whose_epochs_end_early_takes_fewer(monkeypatch):
    made, epochs = po_book.learner.minibatches, []
    monkeypatch.setattr(po_book.learner, "minibatches", lambda *x: epochs.append(1) or made(*x))
    taken = {}
    for name in "as it is", "epochs end at 0.01 nats":
        epochs.clear()
        rollouts = len(detail(name))
        taken[name] = len(epochs) / rollouts
    assert taken["as it is"] == 6 > taken["epochs end at 0.01 nats"] >= 1


@pytest.mark.parametrize("name", ["as it is", "rewards normalised", "general defaults"])
def test_a_run_with_normalised_rewards_learns_from_other_numbers(name, monkeypatch):
    made, seen = po_book.train.critic_batch, []
    monkeypatch.setattr(
        po_book.train, "critic_batch", lambda *x: seen.append(x[1].rewards[x[1].valid]) or made(*x)
    )
    detail(name)
    ones = [bool((rewards == 1).all()) for rewards in seen]
    assert len(seen) >= 4 and all(ones) == (name == "as it is")
    if name != "as it is":
        assert max(rewards.max() for rewards in seen[1:]) < 0.5  # returns deviate by more than 2
