"Scripts that compare and record: they run here on little, and assert no time."
import csv
import json
import subprocess
import sys
from dataclasses import replace
from time import perf_counter

import pytest
import torch
from conftest import ROOT

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
    again = Record("some", 1, {"b": PPOConfig(clip=0.3)})
    again.add("some", [rows[1] | {"mean_return": 2.5}], tmp_path, start="b")
    again.add("new", [rows[1]], tmp_path, start="first")
    assert table(tmp_path / "new.csv")[1:] == [["b", "0", "1.5"]]
    assert json.loads((tmp_path / "new.json").read_text(encoding="utf-8"))["start"] == "first"
    assert table(tmp_path / "some.csv")[1:] == [["a", "0", "1.5"], ["b", "0", "2.5"]]
    note = json.loads((tmp_path / "some.json").read_text(encoding="utf-8"))
    assert {name: x["clip"] for name, x in note["settings"].items()} == {"a": 0.2, "b": 0.3}
    assert note["device"].startswith("another (b: ") and note["seeds"] == "seeds 0 to 0"
    assert "(b: " not in note["python"] and note["start"] == "b"
    assert whole.only("b").variants == {"b": PPOConfig(clip=0.1)}
    for words, found in (["some"], ("some", 1)), (["some", "2", "b"], ("some", 2, "b")):
        monkeypatch.setattr(sys, "argv", ["record.py", *words])
        assert asked("", {"some": whole}) == found
    for words in [], ["other"], ["some", "1", "c"], ["some", "1", "b", "b"]:
        monkeypatch.setattr(sys, "argv", ["record.py", *words])
        with pytest.raises(SystemExit, match="NAME is one of: some"):
            asked("", {"some": whole})


def test_a_line_of_a_race_is_of_those_who_got_there():
    from race import Finish, line

    won = [Finish(2.0, 2000, 40, True), Finish(6.0, 4000, 60, True), Finish(3.0, 3000, 50, True)]
    lost = [Finish(9.0, 9000, 90, False), Finish(8.0, 9000, 90, False)]
    row = ["a", "3 of 5", "3.00 (2.00 to 6.00)", "3000", "50", "60.00", "1.5"]
    assert line("a", won + lost, 2.0) == row
    assert line("b", lost, 2.0) == ["b", "0 of 2", "over 8", "", "", "", "over 4.0"]


def test_the_peer_on_lunarlander_has_our_settings():
    from lunarlander_cpu import OURS, alike

    from po_book.algorithm import new_learner

    peer, mine = alike(0), new_learner("LunarLander-v3", 0, OURS).policy
    same = dict(n_envs=OURS.n_envs, n_steps=OURS.n_steps, batch_size=OURS.minibatch,
                n_epochs=OURS.epochs, gamma=OURS.gamma, gae_lambda=OURS.lam,
                max_grad_norm=OURS.max_grad_norm, ent_coef=OURS.entropy_coef, target_kl=None,
                normalize_advantage=OURS.normalize_advantages, clip_range_vf=OURS.clip_value)
    assert {name: getattr(peer, name) for name in same} == same
    assert OURS.anneal and OURS.clip_high is None and not OURS.normalize_obs
    assert peer.lr_schedule(0.5) == OURS.lr / 2 and peer.clip_range(0.5) == OURS.clip / 2
    adam = peer.policy.optimizer.param_groups[0]
    assert (adam["eps"], adam["betas"]) == (1e-5, (0.9, 0.999))
    sizes = [sorted(p.numel() for p in who.parameters()) for who in (peer.policy, mine)]
    assert sizes[0] == sizes[1]


def small_race(**changes):
    from lm_end_to_end import Race

    from po_book.lm_learner import tiny_config

    small = dict(steps=4, prompts=4, group_size=4, max_new_tokens=12, warmup=2)
    return Race(tiny_config(**small | changes), (0.0, 2.0), every=2, problems=8, taught=1)


def test_both_trainers_of_a_race_run_and_their_lines_are_tabled(tmp_path, capsys):
    from lm_end_to_end import compete, ratios, table, teach

    race = small_race()
    assert 0 <= teach(race, tmp_path) < 0.5
    runs = compete(race, 2, tmp_path)
    words = [line.split()[:2] for line in capsys.readouterr().out.splitlines()]
    order = [word for word in words if word[0] in runs]
    assert order == [["po_book", "0"], ["TRL", "0"], ["TRL", "1"], ["po_book", "1"]]
    columns, rows = table(race, runs)
    rows = [dict(zip(columns, row)) for row in rows]
    assert [(row["trainer"], row["seed"]) for row in rows] == [
        ("po_book", 0), ("po_book", 1), ("TRL", 0), ("TRL", 1)]
    for row in rows:  # a look every second batch of 16; nobody reaches 2
        assert (row["batches"], row["samples to 0"], row["samples to 2"]) == (4, 32, "")
    over = ratios(race, runs)
    assert over["samples to 0"] == "1.00 (1.00 to 1.00), seeds: 2"
    assert over["seconds to 2"] == "no seed"


def test_a_run_of_a_race_ends_at_its_last_line(tmp_path):
    from lm_end_to_end import TRAINERS, Run, teach

    from po_book.pretrained import load_lm

    race = replace(small_race(), lines=(0.0,))
    teach(race, tmp_path)
    for trainer in TRAINERS.values():
        run = Run(race, *load_lm(tmp_path), 0)
        trainer(run)
        assert run.batches == 2 and run.reached[0.0][0] == 32


def test_trl_does_the_same_arithmetic_in_a_race(tmp_path, monkeypatch):
    "From the samples of `train_lm` it makes the same weights: two passes, two minibatches."
    import lm_end_to_end
    from trl import GRPOTrainer

    import po_book.train_lm
    from po_book.pretrained import load_lm

    drawn, sample = [], po_book.train_lm.sample

    def kept(*args, **how):
        drawn.append(sample(*args, **how))
        return drawn[-1]

    def same(trainer, prompts, *more):
        samples = drawn.pop(0)
        asked = samples.attention_mask & ~samples.mask
        assert prompts == [row[real].tolist() for row, real in zip(samples.ids, asked)]
        return [row[own].tolist() for row, own in zip(samples.ids, samples.mask)], None

    race = small_race(steps=3, lr=1e-3)
    lm_end_to_end.teach(race, tmp_path)
    monkeypatch.setattr(po_book.train_lm, "sample", kept)
    monkeypatch.setattr(GRPOTrainer, "_generate_single_turn", same)
    monkeypatch.setattr(torch, "randperm", lambda n, **where: torch.arange(n))  # nothing is mixed
    # Any answer may earn something, so that every batch has a gradient.
    monkeypatch.setattr(lm_end_to_end, "REWARD", lambda prompts, completions, **more: [
        sum(map(ord, text)) % 7 / 7 for text in completions])
    start, mine, theirs = (load_lm(tmp_path)[0] for _ in range(3))
    tokenizer = load_lm(tmp_path)[1]
    for trainer, model in (lm_end_to_end.ours, mine), (lm_end_to_end.trl, theirs):
        trainer(lm_end_to_end.Run(race, model, tokenizer, 0))
    assert not drawn
    for a, b, c in zip(start.parameters(), mine.parameters(), theirs.parameters()):
        assert (b - a).abs().mean() > 5e-4
        assert (c - b).norm() < 0.02 * (b - a).norm()
