import io
import json
import sys
from dataclasses import fields

import matplotlib.pyplot as plt
import numpy as np
import pytest

import po_book.figures as figures
from conftest import ROOT
from po_book.figures import recorded, recorded_finals, recorded_table, spread, spread_curves

sys.path.insert(0, str(ROOT / "benchmarks"))
import record  # noqa: E402
import record_lm  # noqa: E402

NAMES = {path.stem for path in (ROOT / "results").glob("*.csv")}
RECORDS = {name: module for module in (record, record_lm) for name in module.RECORDS}
GRADE = {record: "mean_return", record_lm: "success"}  # the column that each module calls so


def test_spread_curves_meets_every_run_where_all_were_measured():
    "Straight lines of slope 1 and 2, measured at other points: the median is 1.5 x."
    _, ax = plt.subplots()
    curves = [([0, 4, 10], [0, 4, 10]), ([1, 2, 12], [2, 4, 24])]
    spread_curves(ax, curves, "lines", points=5)
    x, y = ax.lines[0].get_data()
    np.testing.assert_allclose(x, np.linspace(1, 10, 5))
    np.testing.assert_allclose(y, 1.5 * x)
    assert ax.lines[0].get_label() == "lines (n=2)"


def test_spread_is_the_median_shaded_from_the_lowest_to_the_highest():
    "Of 1, 2 and 9 the median is 2, the mean 4, the quartiles 1.5 and 5.5."
    _, ax = plt.subplots()
    spread(ax, [0, 5], [[9, 10], [1, 30], [2, 20]], "runs")
    (line,), (shade,) = ax.lines, ax.collections
    np.testing.assert_array_equal(line.get_xydata(), [[0, 2], [5, 20]])
    corners = {tuple(corner) for corner in shade.get_paths()[0].vertices}
    assert corners == {(0, 1), (0, 9), (5, 10), (5, 30)}
    assert line.get_label() == "runs (n=3)"
    assert shade.get_facecolor()[0, :3] == pytest.approx(plt.matplotlib.colors.to_rgb(line.get_color()))
    assert shade.get_facecolor()[0, 3] == 0.2


def test_spread_refuses_runs_of_another_length():
    _, ax = plt.subplots()
    with pytest.raises(ValueError, match=r"runs must be \[runs, 3\], got \[2, 4\]"):
        spread(ax, [1, 2, 3], np.zeros((2, 4)), "x")


def provenance(name: str) -> dict:
    return json.loads((ROOT / "results" / f"{name}.json").read_text(encoding="utf-8"))


OFF = {"normalize_rewards": False}  # a later setting whose default changes something
LATER = {  # of the settings of a language model: as if they were not there
    "top_k": None, "top_p": None, "min_p": None, "stop": [], "vocabulary": None, "sample_batch": 0,
    "micro_tokens": 0, "precision": None, "recompute": False, "corrected": False, "selection": {},
    "correction": {}, "entropy_coef": 0, "overlong": 0, "oversample": 3, "reset_every": 0,
    "normalize": False,
}  # fmt: skip
# Whoever had one of these says that it is stale.
GONE = {"fast_cpu", "informative_only", "reset_reference"}


def within(then: dict, now: dict, name: str) -> bool:
    "Whether settings of now are those of then, and what came later is off."
    gone = then.keys() - now.keys()
    assert gone <= GONE and (not gone or "stale" in provenance(name))
    assert all(now[key] == LATER[key] for key in now.keys() - then.keys())
    return {key: now[key] for key in then if key not in gone and not isinstance(now[key], dict)} == {
        key: x for key, x in then.items() if key not in gone and not isinstance(x, dict)
    } and all(within(x, now[key], name) for key, x in then.items() if isinstance(x, dict))


@pytest.mark.parametrize("name", RECORDS)
def test_a_record_was_made_with_the_settings_that_the_code_has_now(name):
    "A setting that came later than the record is off: nothing changed."
    record, then = RECORDS[name].RECORDS[name], provenance(name)["settings"]
    assert then.keys() == record.variants.keys()
    for variant, settings in json.loads(json.dumps(record.settings())).items():
        now, kind = record.variants[variant], type(record.variants[variant])
        assert within(then[variant], {key: settings[key] for key in then[variant]}, name)
        later = [f for f in fields(kind) if f.name not in then[variant]]
        assert all(getattr(now, f.name) == OFF.get(f.name, f.default) for f in later)


@pytest.mark.parametrize("name", sorted(NAMES - RECORDS.keys()))
def test_a_recorded_table_says_where_it_comes_from_and_is_shown_whole(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "nbs")
    table = recorded_table(name)
    note = provenance(name)
    assert {"device", "torch", "date", "commit"} <= note.keys()
    said = ", ".join(x for x in note.values() if isinstance(x, str))
    assert " ".join(capsys.readouterr().out.split()) == said
    shown = table._repr_markdown_().splitlines()
    assert len(shown) == len(table.rows) + 2 and len({line.count("|") for line in shown}) == 1


@pytest.mark.parametrize("name", RECORDS)
def test_every_record_is_complete_and_says_where_it_comes_from(name, monkeypatch, capsys):
    monkeypatch.chdir(ROOT / "nbs")
    module = RECORDS[name]
    runs = recorded(name, GRADE[module])
    note = provenance(name)
    assert {"device", "torch", "date", "commit", "seeds"} <= note.keys()
    settings = note.pop("settings")
    assert " ".join(capsys.readouterr().out.split()) == ", ".join(note.values())
    assert runs.keys() == settings.keys()
    for curves in runs.values():
        assert len(curves) == module.RECORDS[name].seeds
        for steps, scores in curves:
            assert (np.diff(steps) > 0).all() and np.isfinite(scores).all()


def test_without_a_clone_a_record_comes_from_the_published_repository(monkeypatch, tmp_path):
    monkeypatch.chdir(tmp_path)
    files = {"csv": "variant,seed,steps,mean_return\na,0,1,2.5\na,0,3,4.5\n", "json": '{"device": "GPU"}'}
    asked = []

    def urlopen(url):
        asked.append(url)
        return io.BytesIO(files[url.rsplit(".", 1)[1]].encode())

    monkeypatch.setattr(figures, "urlopen", urlopen)
    (curve,) = recorded("some")["a"]
    np.testing.assert_array_equal(curve, [[1, 3], [2.5, 4.5]])
    assert {url.rsplit("/", 1)[0] for url in asked} == {
        "https://raw.githubusercontent.com/po-book/po_book/main/results"
    }


@pytest.fixture
def small_record(monkeypatch, tmp_path):
    "Two variants of two seeds and of one; the second has no kl, nor has one row."
    rows = ["variant,seed,steps,mean_return,kl,peak_mb"]
    rows += ["a,0,10,1,0.5,900", "a,0,20,2,,900", "a,0,30,3,0.25,1234.5"]
    rows += ["a,1,10,5,4,900", "a,1,30,8,0.75,800", "b,0,10,-0.5,,100"]
    (tmp_path / "nbs").mkdir()
    (tmp_path / "results").mkdir()
    (tmp_path / "results" / "small.csv").write_text("\n".join(rows), encoding="utf-8")
    (tmp_path / "results" / "small.json").write_text('{"device": "GPU"}', encoding="utf-8")
    monkeypatch.chdir(tmp_path / "nbs")


def test_a_column_is_read_without_the_rows_that_have_nothing_there(small_record):
    runs = recorded("small", "kl")
    assert runs.keys() == {"a"}  # b has no row with it
    first, second = runs["a"]
    np.testing.assert_array_equal(first, [[10, 30], [0.5, 0.25]])
    np.testing.assert_array_equal(second, [[10, 30], [4, 0.75]])
    np.testing.assert_array_equal(recorded("small")["a"][0], [[10, 20, 30], [1, 2, 3]])


def test_last_values_are_medians_and_ranges_over_seeds(small_record, capsys):
    table = recorded_finals("small", ["mean_return", "kl", "peak_mb"])
    assert capsys.readouterr().out == "GPU\n"
    assert table.rows == [
        {"variant": "a", "mean_return": "5.5 (3 to 8)", "kl": "0.5 (0.25 to 0.75)",
         "peak_mb": "1,017 (800 to 1,234)"},
        {"variant": "b", "mean_return": "-0.5 (-0.5 to -0.5)", "kl": "–",
         "peak_mb": "100 (100 to 100)"},
    ]  # fmt: skip


@pytest.mark.parametrize("read", [recorded, lambda name, key: recorded_finals(name, ["kl", key])])
def test_an_unknown_column_is_refused_with_the_names_of_those_there_are(small_record, read):
    columns = "variant, seed, steps, mean_return, kl, peak_mb"
    with pytest.raises(ValueError, match=f"key must be a column of small: {columns}; got 'lenght'"):
        read("small", "lenght")
