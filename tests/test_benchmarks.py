"Scripts that compare and record: they run here on little, and assert no time."
import csv
import json
import subprocess
import sys

import pytest
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
