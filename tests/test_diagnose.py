"Rules on logs made by hand, logs of other libraries, and runs that were broken on purpose."

import csv
import json
import sys
from collections import Counter
from dataclasses import dataclass, replace
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from conftest import ROOT
from po_book.language_model import tiny_lm
from po_book.diagnose import (
    RULES,
    Rule,
    diagnose,
    mean_advantage,
    read_rows,
    target_variance,
)

sys.path.insert(0, str(ROOT / "benchmarks"))
import broken_runs  # noqa: E402

TOLD = {"rate × 30": "rate too high", "clip 10": "clip too wide"}
UNSEEN = {  # as the page says
    "GRPO: advantages not centred", "GRPO: wrong KL sign (β .04)",
    "DQN: rate × 30", "DDPG: rate × 30",
}  # fmt: skip
WRITING = 5  # seeds that were looked at


def log(n=12, **columns):
    "Rows; a column is a number, or a function of the share of the run."
    return [
        {"steps": i} | {k: x(i / (n - 1)) if callable(x) else x for k, x in columns.items()}
        for i in range(n)
    ]


def faults(rows):
    return [finding.fault for finding in diagnose(rows).findings]


HEALTHY = dict(
    approx_kl=lambda t: 0.02 * (1 - t), clip_fraction=lambda t: 0.2 * (1 - t), entropy=0.6,
    value_loss=lambda t: 20 - 15 * t, explained_variance=lambda t: 0.9 * t, policy_loss=0.01,
    kl_coef=0.5, kl=lambda t: 0.1 + 0.3 * t, length=9.0, dead_groups=0.3, mismatch=0.01,
    reward=lambda t: 0.2 + 0.3 * t, success=lambda t: 0.2 + 0.3 * t, q=lambda t: 50 * t,
) | {"return": lambda t: 20 + 100 * t}  # fmt: skip


def test_a_healthy_log_is_passed_over_in_silence_with_every_rule_asked():
    report = diagnose(log(**HEALTHY))
    assert report.findings == () and report.open == {}
    assert report.rows == 12 and report.asked == len(RULES)
    assert str(report) == "12 rows\nno fault is seen"


MARKS = [
    ("sampler mismatch", dict(mismatch=lambda t: 0.1 * t), 0.0773),
    ("dead groups", dict(dead_groups=0.875), 0.875),
    ("no mask", dict(approx_kl=2.0, clip_fraction=0.3), 2.0),
    ("wrong KL sign", dict(approx_kl=lambda t: 3 * (t < 0.3), clip_fraction=0), 3.0),
    ("clip too wide", dict(approx_kl=lambda t: 0.3 * (t < 0.5), clip_fraction=0.028), 10.0),
    ("scores at another temperature", dict(approx_kl=0.02, clip_fraction=0.1), 0.02),
    ("rate too high", dict(approx_kl=lambda t: 9.5 * (t == 0), clip_fraction=0.5), 9.5),
    ("bf16 weights", dict(approx_kl=1e-4, kl=1e-4), 1.0),
    ("value loss with the wrong sign", dict(value_loss=lambda t: 10 * 100**t,
                                            explained_variance=-0.01), 43.3),
    ("value loss with the wrong sign", dict(q=5.0), 0.336),
    ("value loss with the wrong sign", dict(value_loss=-5.0, q=50.0), 1.0),
    ("episode ends ignored", dict(q=1000.0), 10.5),
    ("advantages not centred", dict(policy_loss=0.9), 1.5),
    ("rate too high", dict(approx_kl=lambda t: 1.5 * (t == 0), clip_fraction=0.5), 1.5),
    ("reward hacking", dict(success=lambda t: 0.5 - 0.4 * t), 0.7),
    ("wrong KL sign", dict(kl=lambda t: 3.3 * t), 3.0),
    ("episode ends ignored", dict(value_loss=lambda t: 20 * 1e-4**t, explained_variance=0), 12.3),
]  # fmt: skip


@pytest.mark.parametrize("fault, change, number", MARKS, ids=[x[0] for x in MARKS])
def test_a_mark_is_named_first_with_its_number_and_its_page(fault, change, number):
    if fault in ("clip too wide", "rate too high"):
        change = change | {"kl_coef": ""}  # a penalty would be blamed first
    report = diagnose(log(23 if fault == "episode ends ignored" else 12, **HEALTHY | change))
    first = report.findings[0]
    assert first.fault == fault
    assert first.evidence.split(", above")[0].endswith(f" {number:.3g}")
    assert (ROOT / "nbs" / f"{first.page}.ipynb").exists()


def test_every_rule_has_a_mark_here_and_a_page_that_is_there():
    assert {rule.fault for rule in RULES} == {fault for fault, *_ in MARKS}
    assert all((ROOT / "nbs" / f"{rule.page}.ipynb").exists() for rule in RULES)


def test_the_variance_of_targets_and_the_mean_advantage():
    np.testing.assert_allclose(target_variance(np.array([0.125, 2]), np.array([0.75, 0])), [1, 4])
    np.testing.assert_allclose(target_variance(np.array(1.0), np.array(1.0)), 2e6)
    loss, entropy = np.array([1.2, -0.3, 5.0]), np.array([0.6, 0.6, 0.0])
    np.testing.assert_allclose(mean_advantage(loss, entropy), [2, -0.5, 0])


def test_columns_are_taken_from_the_rows_that_have_all_of_them():
    "A log with scores in some rows: only those rows tell of reward and success."
    rows = log(60, reward=lambda t: t, approx_kl=0.001)
    for i, row in enumerate(rows[::6]):
        row["success"] = 0.9 - 0.05 * i
    assert faults(rows) == ["reward hacking"]
    rows[0]["success"] = float("nan")
    assert faults(rows) == ["reward hacking"]


# Bad input


def test_three_rows_say_little_and_the_report_says_what():
    report = diagnose(log(3, dead_groups=1.0, approx_kl=2.0, length=9.0))
    assert [x.fault for x in report.findings] == ["dead groups"]
    assert report.open["no mask"] == "needs 10 rows, has 3"
    assert report.open["advantages not centred"] == "needs policy_loss, entropy"
    assert "not looked for: no mask (needs 10 rows, has 3)" in str(report) and report.asked == 1


def test_where_no_rule_can_speak_nothing_is_called_healthy():
    report = diagnose(log(3, approx_kl=0.01))
    assert str(report).startswith("3 rows\nnothing can be said\nnot looked for: ")
    assert len(report.open) == len({rule.fault for rule in RULES})


@pytest.mark.parametrize("rows", [[], [{}], [{"epoch": 1, "accuracy": 0.9}], [{"approx_kl": "high"}]])
def test_a_log_without_a_known_column_is_refused(rows):
    with pytest.raises(ValueError, match="source must be a log with some of approx_kl, .*, got"):
        diagnose(rows)


@pytest.mark.parametrize(
    "name, data",
    [
        ("progress.json", b"{"),
        ("progress.json", b"5\n6\n"),
        ("trainer_state.json", b"{}"),
        ("trainer_state.json", b"[]"),
        ("log.csv", b"\xff\xfe\0\0"),
    ],
)
def test_a_damaged_file_is_named(name, data, tmp_path):
    (tmp_path / name).write_bytes(data)
    with pytest.raises(ValueError, match=f"{name} is not a log"):
        diagnose(tmp_path)


def test_a_folder_without_a_log_is_named(tmp_path):
    for path in tmp_path, tmp_path / "nowhere":
        with pytest.raises(ValueError, match=f"{path} holds no log yet: there is none of log.csv"):
            diagnose(path)


# Where logs come from


def written(path, rows):
    with open(path, "w", newline="", encoding="utf-8") as file:
        table = csv.DictWriter(file, list(dict.fromkeys(k for row in rows for k in row)))
        table.writeheader()
        table.writerows(rows)


def test_a_run_its_folder_and_its_file_say_the_same(tmp_path):
    rows = log(approx_kl=2.0, note="x")
    written(tmp_path / "log.csv", rows)
    (tmp_path / "checkpoint-00000012").mkdir()
    (tmp_path / "checkpoint-00000012" / "trainer_state.json").write_text("{}")
    sources = rows, SimpleNamespace(log=rows), tmp_path, str(tmp_path), tmp_path / "log.csv"
    assert all(read_rows(x) == read_rows(rows) for x in sources)
    assert read_rows(rows)[3] == {"steps": 3.0, "approx_kl": 2.0}


@pytest.mark.parametrize("form, rate, named", [("csv", 3e-4, []), ("json", 0.3, ["rate too high"])])
def test_a_log_of_stable_baselines3(form, rate, named, tmp_path):
    "Written by its own logger, in a run of PPO with its own learning rate and one of 0.3."
    sb3 = pytest.importorskip("stable_baselines3")
    from stable_baselines3.common.logger import configure

    model = sb3.PPO("MlpPolicy", "CartPole-v1", n_steps=128, n_epochs=4, learning_rate=rate,
                    seed=0, device="cpu")  # fmt: skip
    model.set_logger(configure(str(tmp_path), [form]))
    model.learn(128 * 13)
    rows = read_rows(tmp_path)
    assert len(rows) == 13 and (tmp_path / f"progress.{form}").exists()
    known = {"steps", "approx_kl", "clip_fraction", "value_loss", "explained_variance", "return"}
    assert known <= rows[-1].keys() and rows[-1]["steps"] == 128 * 13
    assert faults(tmp_path)[:1] == named


def test_a_log_of_trl(tmp_path):
    "The state that its trainer saves, with the names of TRL 1.16."
    history = [
        {"step": i, "reward": 0.0, "frac_reward_zero_std": 1.0, "kl": 0.01, "entropy": 0.4,
         "completions/mean_length": 9.0, "clip_ratio/region_mean": 0.0, "grad_norm": 0.0,
         "sampling/sampling_logp_difference/mean": 0.002}
        for i in range(12)
    ] + [{"step": 12, "train_runtime": 3.0}]  # fmt: skip
    for step in 8, 12:
        folder = tmp_path / f"checkpoint-{step}"
        folder.mkdir()
        (folder / "trainer_state.json").write_text(json.dumps({"log_history": history[: step + 1]}))
    report = diagnose(tmp_path)
    assert [x.fault for x in report.findings] == ["dead groups"]
    assert report.rows in (9, 13) and "sampler mismatch" not in report.open
    assert report == diagnose(history[: report.rows])


@pytest.mark.parametrize("pays, named", [(len, []), (lambda text: 0.0, ["dead groups"])])
def test_a_run_of_trl(pays, named, tokenizer, tmp_path):
    "Twelve steps of its own trainer, paid for length, and for nothing."
    trl, datasets = pytest.importorskip("trl"), pytest.importorskip("datasets")
    config = trl.GRPOConfig(
        str(tmp_path), per_device_train_batch_size=8, num_generations=4, max_steps=12,
        max_completion_length=6, logging_steps=1, save_steps=12, report_to="none",
        use_cpu=True, bf16=False, disable_tqdm=True,
    )  # fmt: skip
    trl.GRPOTrainer(
        tiny_lm(tokenizer, width=16, layers=1, heads=2),
        lambda completions, **columns: [float(pays(text)) for text in completions],
        config,
        datasets.Dataset.from_dict({"prompt": ["1+2=", "3+4="]}),
        processing_class=tokenizer,
    ).train()
    rows = read_rows(tmp_path)
    known = {"step", "reward", "length", "dead_groups", "clip_fraction", "entropy", "truncated"}
    assert len(rows) == 12 and known <= rows[-1].keys()
    assert 0 < rows[-1]["length"] <= 6 and faults(tmp_path) == named


def test_the_names_of_trl_are_those_that_it_logs():
    inspect, trl = pytest.importorskip("inspect"), pytest.importorskip("trl")
    code = inspect.getsource(inspect.getmodule(trl.GRPOTrainer))
    for name in ("frac_reward_zero_std", "clip_ratio/region_mean", "completions/mean_length",
                 "completions/clipped_ratio", "sampling/sampling_logp_difference/mean"):
        assert f'"{name}"' in code


def test_rules_of_ones_own_are_asked_instead():
    rule = Rule("too long", ("length",), np.max, 100, "the length goes up to", "48a_batch", 2)
    report = diagnose([{"length": 50}, {"length": 150}], [rule])
    assert str(report) == (
        "2 rows\nlikely too long: the length goes up to 150, above 100; read 48a_batch"
    )


# Runs that were broken on purpose


@pytest.fixture(scope="module")
def named():
    "(variant, fault, seed) and the fault that is named first; empty for none."
    runs = {}
    with open(ROOT / "results" / "broken_runs.csv", newline="", encoding="utf-8") as file:
        for row in csv.DictReader(file):
            who = row["variant"], TOLD.get(row["fault"], row["fault"]), int(row["seed"])
            runs.setdefault(who, []).append(row)
    return {who: (faults(rows) or [""])[0] for who, rows in runs.items()}


def test_the_record_has_every_fault_and_seeds_that_were_not_looked_at(named):
    seeds, of = Counter(variant for variant, *_ in named), {x[1] for x in named}
    assert {rule.fault for rule in RULES} == of - {"", "wrong KL sign (β .04)"}
    assert min(seeds.values()) > WRITING


def test_nine_of_ten_faults_are_found_in_seeds_that_were_not_looked_at(named):
    held_out = {x: found for x, found in named.items()
                if x[1] and x[2] >= WRITING and x[0] not in UNSEEN}  # fmt: skip
    found = sum(named == fault for (_, fault, _), named in held_out.items())
    assert len(held_out) >= 28 and found >= 0.9 * len(held_out)


def test_nineteen_of_twenty_healthy_runs_are_passed_over(named):
    held_out = [found for (_, fault, seed), found in named.items() if not fault and seed >= WRITING]
    assert len(held_out) >= 20 and held_out.count("") >= 0.95 * len(held_out)


def test_what_the_page_calls_unseen_is_not_seen(named):
    found = [named[x] == x[1] for x in named if x[0] in UNSEEN]
    assert found and np.mean(found) < 0.5


VARIANTS = broken_runs.VARIANTS


def test_a_fault_changes_what_its_name_says_and_nothing_else():
    "A setting, or a line that is put in the place of another; the rest is the healthy run's."
    setting = {
        "PPO: rate × 30": {"lr": 0.105},
        "PPO: clip 10": {"clip": 0.99, "clip_high": 10.0},
        "GRPO: rate × 30": {"lr": 0.03},
        "DQN: rate × 30": {"lr": 0.06},
        "DDPG: rate × 30": {"lr": 0.03},
        "GRPO: scores at another temperature": {"temperature": 0.6},
    }
    healthy = {"GRPO: wrong KL sign": "GRPO, β 1", "GRPO: bf16 weights": "GRPO, rate / 30"}
    for name, broken in VARIANTS.items():
        method, _, fault = name.partition(": ")
        base = VARIANTS[healthy.get(name, method)]
        changes = {**base.changes, **setting.get(name, {})}
        more = {"sampler mismatch": "sampler", "dead groups": "task", "reward hacking": "reward"}
        own = {more[fault]: getattr(broken, more[fault])} if fault in more else {}
        rest = replace(base, changes=pytest.approx(changes), broken=broken.broken, **own)
        assert rest == broken, name
        patched = broken.broken is not base.broken
        assert not fault or patched != (name in setting or fault in more) or "temperature" in fault


def test_what_is_put_in_the_place_of_a_line_does_what_it_is_called():
    assert broken_runs.minus(lambda x, y: x + y)(2, y=3) == -5
    assert broken_runs.climbing(lambda x, value_coef: (x, value_coef))(1, value_coef=0.5) == (1, -0.5)
    log = {"value_loss": torch.tensor(3.0)}
    assert broken_runs.ascending(lambda batch: (3.0, log))("batch") == (-3.0, log)
    end = torch.tensor([True, False])
    went_on = broken_runs.beyond(lambda r, v, end, gamma: (r, v, end.tolist(), gamma))
    assert went_on(1, 2, end, 0.9) == (1, 2, [False, False], 0.9) and end.any()
    assert broken_runs.ones([], ["1,21", "", "79"]) == [0.5, 0, 0]
    x = torch.tensor([1.0, 3.0])
    torch.testing.assert_close(broken_runs.divided(None)(None, x), x / 2**0.5)
    assert broken_runs.rounded(None)(torch.nn.Linear(1, 1)).weight.dtype == torch.bfloat16


def test_padding_counts_and_ends_do_not_where_a_fault_says_so():
    @dataclass
    class Ends:
        terminated: torch.Tensor
        truncated: torch.Tensor

    ends = Ends(*torch.tensor([[True, False], [False, True]]))
    seen = broken_runs.endless(lambda policy, rollout: rollout)(None, ends)
    assert not seen.terminated.any() and not seen.truncated.any() and ends.terminated.any()
    mask = torch.tensor([[False, True, True], [False, True, False]])
    table = {"mask": mask, "attention_mask": mask | torch.tensor([True, False, False]),
             "advantages": torch.tensor([[0.0, 2, 2], [0, -1, 0]])}  # fmt: skip
    wide = broken_runs.unmasked(lambda table: table)(table)
    assert wide["mask"].tolist() == [[False, True, True]] * 2 and wide["attention_mask"].all()
    assert wide["advantages"].tolist() == [[0, 2, 2], [0, -1, -1]]
