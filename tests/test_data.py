"Rows that become problems, answers that are found and compared, epochs."

import json
import sys
from collections import Counter
from fractions import Fraction

import numpy as np
import pytest

from po_book.data import (
    Problems,
    after_hashes,
    last_boxed,
    last_number,
    normalized,
    read_jsonl,
    same_math,
    same_number,
    same_text,
)
from po_book.rewards import OFFERED
from po_book.tasks import is_held_out


def line(**row) -> str:
    return json.dumps(row, ensure_ascii=False) + "\n"


def written(tmp_path, text, encoding="utf-8"):
    path = tmp_path / "x.jsonl"
    path.write_bytes(text.encode(encoding))
    return path


def sums(n: int = 40) -> list[dict]:
    return [{"prompt": f"{a}+1=", "answer": a + 1} for a in range(n)]


NUMBERS = {
    "so it is 12": 12, "12.0.": 12, "12 or 13": 13, "1,200": 1200, "1,234,567.5": "1234567.5",
    "1\u00a0200": 1200, "1\u202f234\u202f567.5": "1234567.5", "1 200": 200, "1,2": 2, "1,2345": 2345, "12,345.": 12345, "0012": 12, ".5": "1/2", "it is .25.": "1/4", "-.5": "-1/2",
    "1e3": 1000, "2.5E-1": "1/4", "1e+22": 10**22, "1e−2": "1/100", "-5": -5, "−5": -5, "–5": -5, "is:-5": -5,
    "3-5": 5, "3 - 5": 5, "(2)-5": 5, "x-5": 5, "10%-50%": 50, "[1]-2": 2, "{1}-2": 2, "3 -5": -5, "+5": 5,
    "x = -5": -5, "(-5)": -5, "$-5": -5, "-$5": -5, r"-\$5": -5, "−€1,000": -1000, "$18": 18, "50%": 50, "18 dollars": 18,
    "1/2": "1/2", "-1/2": "-1/2", "1 / 4": "1/4", "1.5/3": "1/2", "10/4/2020": 2020, "20/4 = 5": 5, "$\\boxed{7}$": 7,
    "She has 16.\n#### 18": 18, "9" * 400: int("9" * 400), "2+4=6": 6, "version 3.10.5": 5, "0.1": "1/10",
    "12345678901234567891": 12345678901234567891, "٣": 3,
}  # fmt: skip


@pytest.mark.parametrize("text", NUMBERS, ids=lambda x: x[:20])
def test_the_last_number_is_read_exactly(text):
    assert last_number(text) == Fraction(NUMBERS[text])


@pytest.mark.parametrize("text", ["", "six", "-", ".", "1/0", "5 or 1/0", "9" * 5000, "NaN", "inf"], ids=lambda x: x[:9])
def test_a_text_may_have_no_number(text):
    assert last_number(text) is None
    assert not same_number(text, text) and not same_number("5", text)


def test_numbers_are_compared_to_the_last_digit():
    assert same_number("0.10", ".1") and not same_number("0.3333", "1/3")
    assert not same_number(str(2**53 + 1), str(2**53))
    assert same_number("3e0", "It is 3.")


@pytest.mark.parametrize(
    "text, found",
    [
        (r"\boxed{5}", "5"), (r"so $\boxed{ 5 }$.", "5"), (r"\boxed{1} no \boxed{2}", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"), (r"\boxed{\sqrt{a_{1}}} {x}", r"\sqrt{a_{1}}"),
        (r"\boxed{\{1, 2\}}", r"\{1, 2\}"), (r"\boxed{\left\{1\right.}", r"\left\{1\right."),
        (r"\boxed{1} or \boxed{2", "1"), (r"\boxed{\boxed{5}}", "5"), (r"\boxed{1 \boxed{2} 3}", "2"),
        (r"\fbox{7}", "7"), (r"\boxed {7}", "7"), (r"$\boxed 7$.", "7"), (r"\boxed{1} \boxed 2", "2"),
        (r"} \boxed{5}", "5"), (r"{ \boxed{5}", "5"), (r"\boxed{a\\}", "a\\\\"), ("\\boxed{1\n2}", "1\n2"),
        (r"\boxed{}", ""), ("", None), ("5", None), (r"\boxed", None), (r"\boxed{", None), (r"\boxed{{5}", None),
        (r"\boxed{5\}", None), (r"\boxes{5}", None), ("boxed{5}", None),
    ],
)  # fmt: skip
def test_the_last_closed_box(text, found):
    assert last_boxed(text) == found


def test_a_response_of_many_open_boxes_is_read_in_one_walk():
    assert last_boxed(r"\boxed{" * 100_000 + "5}") == "5"


@pytest.mark.parametrize(
    "text, found",
    [("9+9\n#### 18", "18"), ("#### 1\n#### 2\nso", "2"), ("####18  ", "18"), ("#### -1,000\n", "-1,000"),
     ("18", None), ("####", None), ("####\n18", None), ("### 18", None), ("", None)],
)  # fmt: skip
def test_the_answer_after_hashes(text, found):
    assert after_hashes(text) == found


@pytest.mark.parametrize(
    "text, other, same",
    [
        ("Paris", "paris.", True), ('"Paris"', "PARIS", True), (" new\u00a0 york\n", "New York", True), ("“Ja”", "ja", True),
        ("Stra\u00dfe", "STRASSE", True), ("cafe\u0301", "caf\u00e9", True), ("Paris!", "Paris?", True), ("It is Paris", "Paris", False),
        ("-5", "5", False), (".5", "5", False), ("(1,2)", "[1,2]", False), ("caf\u00e9", "cafe", False), ("x\u00b2", "x2", False),
        ("", "", False), ("...", "...", False), ("Lyon", "Paris", False), ("True", "true", True),
    ],
)  # fmt: skip
def test_texts_are_the_same_up_to_what_does_not_matter(text, other, same):
    assert same_text(text, other) == same_text(other, text) == same
    assert normalized(normalized(text)) == normalized(text)


@pytest.mark.parametrize(
    "completion, answer, same",
    [
        (r"\frac12", "0.5", True), ("1+x", "x+1", True), (r"2\sqrt{2}", r"\sqrt{8}", True), (r"\{2,1\}", r"\{1,2\}", True),
        ("x-1", "x+1", False), ("(2,1)", "(1,2)", False), (r"so $\frac{2}{4}$.", r"\frac{1}{2}", True), (r"\boxed{4}", "4", True),
        ("", "4", False), ("", "", False), (r"\text{Paris}", r"\text{Paris}", True),
    ],
)  # fmt: skip
def test_formulas_are_the_same_if_they_mean_the_same(completion, answer, same):
    pytest.importorskip("math_verify")
    assert same_math(completion, answer) is same


def test_without_the_library_formulas_are_refused_by_its_name(monkeypatch):
    monkeypatch.setitem(sys.modules, "math_verify", None)
    same_math.__globals__["_formula"].cache_clear()
    with pytest.raises(ImportError, match=r"same_math needs math-verify: pip install 'po-book\[math\]'"):
        Problems([{"prompt": "q", "answer": "1"}], same=same_math)


FILES = {
    "U+2028": (line(prompt="a\u2028b", answer="1") + line(prompt="c", answer=2), ["a\u2028b", "c"]),
    "U+0085": (line(prompt="a\u0085b", answer="1"), ["a\u0085b"]),
    "form feed": ('{"prompt": "a\\fb", "answer": 1}', ["a\fb"]),
    "blank lines": ("\n" + line(prompt="a", answer=1) + " \n\n" + line(prompt="c", answer=2) + "\n\n", ["a", "c"]),
    "BOM": ("\ufeff" + line(prompt="a", answer=1), ["a"]),
    "CRLF": ((line(prompt="a", answer=1) + line(prompt="c", answer=2)).replace("\n", "\r\n"), ["a", "c"]),
    "no end": (line(prompt="a", answer=1).strip(), ["a"]),
}


@pytest.mark.parametrize("name", FILES)
def test_a_file_is_read_line_by_line(tmp_path, name):
    text, prompts = FILES[name]
    known = Problems(written(tmp_path, text))
    assert sorted(known.training + known.held_out) == sorted(prompts)


def test_rows_of_a_file_have_their_lines(tmp_path):
    path = written(tmp_path, '\n{"a": 1}\n\n{"a": 2}')
    assert read_jsonl(path) == {f"{path}, line 2": {"a": 1}, f"{path}, line 4": {"a": 2}}


GOOD = line(prompt="b", answer="1,200.")
BAD = {
    "{": "line 2 must be JSON in UTF-8: Expecting", "5": "line 2 must be a JSON object, got 5",
    "[1]": r"line 2 must be a JSON object, got \[1\]", "null": "line 2 must be a JSON object, got None",
    "{} {}": "line 2 must be JSON in UTF-8: Extra data",
    line(prompt="a"): r"line 2 must be a row with a column 'answer', got \['prompt'\]",
    line(answer=1): r"line 2 must be a row with a column 'prompt', got \['answer'\]",
    line(prompt=None, answer=1): "line 2: prompt must be a text or a list of messages, got None",
    line(prompt=12, answer=1): "line 2: prompt must be a text or a list of messages, got 12",
    line(prompt="", answer=1): "line 2: prompt must be a text or a list of messages, got ''",
    line(prompt=" \n", answer=1): "line 2: prompt must be a text or a list of messages",
    line(prompt=[], answer=1): r"line 2: prompt must be a text or a list of messages, got \[\]",
    line(prompt=[1, 2], answer=1): "line 2: prompt must be a text or a list of messages",
    line(prompt=["a"], answer=1): "line 2: prompt must be a text or a list of messages",
    line(prompt=[{"role": "user"}], answer=1): "line 2: prompt must be a text or a list of messages",
    line(prompt=[{"role": "user", "content": None}], answer=1): "line 2: prompt must be a text or a list of messages",
    line(prompt="a", answer=None): "line 2: answer must be a text or a number, got None",
    line(prompt="a", answer=[3]): r"line 2: answer must be a text or a number, got \[3\]",
    line(prompt="a", answer="twelve"): "line 2: answer must be one that same_number can match, got 'twelve'",
    line(prompt="a", answer=""): "line 2: answer must be one that same_number can match, got ''",
    line(prompt="a", answer=True): "line 2: answer must be one that same_number can match, got 'True'",
    line(prompt="a", answer=float("nan")): "line 2: answer must be one that same_number can match, got 'nan'",
    line(prompt="a", answer=float("inf")): "line 2: answer must be one that same_number can match, got 'inf'",
    line(prompt="b", answer=3): "line 2: the prompt of .*line 1 again, with another answer",
    line(prompt="a", answer=3, level=1): r"line 2 must be a row with the other columns of .*line 1, \['answer'\], got \['answer', 'level'\]",
}  # fmt: skip


@pytest.mark.parametrize("bad", BAD)
def test_a_bad_line_is_refused_with_file_line_and_field(tmp_path, bad):
    path = written(tmp_path, GOOD + bad)
    with pytest.raises(ValueError, match=rf"x\.jsonl, {BAD[bad]}"):
        Problems(path)


@pytest.mark.parametrize("encoding, number", [("latin-1", 2), ("utf-16", 1), ("utf-16-le", 1), ("cp1252", 2)])
def test_a_file_in_another_encoding_is_refused(tmp_path, encoding, number):
    text = line(prompt="a", answer=1) + line(prompt="é", answer=1)
    with pytest.raises(ValueError, match=f"line {number} must be JSON in UTF-8"):
        Problems(written(tmp_path, text, encoding))


@pytest.mark.parametrize(
    "data, told",
    [
        ("no.jsonl", "data must be a file, or rows, got the name 'no.jsonl'"), ([], "data must be at least one row, got none"),
        (7, "data must be a file or rows, got int"), ([3], r"data\[0\] must be a dictionary, got 3"),
        ({"prompt": ["a"], "answer": [1]}, r"data must be rows, or splits with a train, got \['prompt', 'answer'\]"),
        ({"train": [], "test": []}, "data must be at least one row"), ({"train": {}}, "train must be a file or rows, got dict"),
        (lambda: [], "data must be at least one row"),
        ([{"prompt": "a", "answer": 1, "finished": 2}], r"data\[0\] must be a row without columns named .*, got \['finished'\]"),
    ],
)  # fmt: skip
def test_data_that_are_no_rows_are_refused(data, told):
    with pytest.raises(ValueError, match=told):
        Problems(data)


def test_an_empty_file_has_no_rows(tmp_path):
    for text in "", "\n\n", "\ufeff":
        with pytest.raises(ValueError, match="data must be at least one row, got none"):
            Problems(written(tmp_path, text))


def test_a_row_may_come_twice_but_not_with_another_answer():
    row = {"prompt": "a", "answer": 1, "level": 2}
    twice = Problems([row, dict(row)])
    assert len(twice.training + twice.held_out) == 1
    with pytest.raises(ValueError, match=r"data\[1\]: the prompt of data\[0\] again, with another level"):
        Problems([row, row | {"level": 3}])


def test_rows_come_from_files_lists_functions_and_splits(tmp_path):
    rows = sums(8)
    path = written(tmp_path, "".join(line(**row) for row in rows))
    same = [Problems(x) for x in (path, str(path), rows, tuple(rows), lambda: rows, lambda: path, iter(rows), {"train": rows})]
    assert all(x.training == same[0].training and x.held_out == same[0].held_out for x in same)
    assert rows == sums(8)  # left as they were


def test_a_data_set_is_rows_and_a_dictionary_of_them_has_its_splits():
    datasets = pytest.importorskip("datasets")
    rows = sums(6)
    one = datasets.Dataset.from_list(rows)
    assert Problems(one).training == Problems(rows).training
    assert Problems(one.to_iterable_dataset()).training == Problems(rows).training
    splits = datasets.DatasetDict(train=one.select(range(4)), test=one.select([4, 5]))
    both = Problems(splits)
    assert both.training == ["0+1=", "1+1=", "2+1=", "3+1="] and both.held_out == ["4+1=", "5+1="]
    assert both.columns(["5+1="]) == {"answer": [6]}
    with pytest.raises(ValueError, match=r"train\[0\] must be a row with a column 'solution', got \['prompt', 'answer'\]"):
        Problems(splits, answer="solution")
    chats = datasets.Dataset.from_list([{"prompt": [{"role": "user", "content": "1+1?"}], "answer": "2"}])
    assert Problems(chats).verify([{"role": "user", "content": "1+1?"}], "2")


def test_a_given_split_is_held_out_and_nothing_else():
    rows = sums(9)
    given = Problems(rows[:6], held_out=rows[6:])
    assert given.training == [row["prompt"] for row in rows[:6]]
    assert given.held_out == [row["prompt"] for row in rows[6:]]
    assert sorted(given.prompts(3, held_out=True)) == sorted(given.held_out)
    assert Problems({"train": rows[:6], "test": rows[6:8]}, held_out=rows[8:]).held_out == ["8+1="]
    with pytest.raises(ValueError, match=r"held_out\[1\]: the prompt of data\[5\] again: what is held out"):
        Problems(rows[:6], held_out=[rows[7], rows[5]])


def test_without_a_split_one_in_eight_is_held_out_as_in_every_task():
    known = Problems(sums(200))
    assert known.training == [x for row in sums(200) if not is_held_out(x := row["prompt"])]
    assert known.held_out == [x for row in sums(200) if is_held_out(x := row["prompt"])]
    assert len(known.held_out) > 10


def test_a_part_without_problems_is_told_with_a_remedy_for_files(tmp_path):
    rows = [row for row in sums() if not is_held_out(row["prompt"])][:5]
    few = Problems(written(tmp_path, "".join(line(**row) for row in rows)))
    told = r"^Problems\(x.jsonl: 5 for training, 0 held out, code \w{8}\) has too few held-out problems: "
    with pytest.raises(ValueError, match=told + "add rows, or give others as held_out$"):
        few.prompts(1, held_out=True)
    assert few.prompts(0, held_out=True) == []
    with pytest.raises(ValueError, match="too few training problems"):
        Problems([row for row in sums() if is_held_out(row["prompt"])]).take(1, 0)


@pytest.mark.parametrize("rows, world", [(7, 1), (7, 2), (12, 3), (12, 5)])
def test_every_problem_comes_once_an_epoch_over_all_processes(rows, world):
    data = sums(rows)
    known, epochs = Problems(data, held_out=sums(50)[40:]), 4
    shares = [known.take(rows * epochs, 0, 3, rank, world) for rank in range(world)]
    stream = [prompt for turn in zip(*shares) for prompt in turn][: rows * epochs]
    parts = [stream[i : i + rows] for i in range(0, len(stream), rows)]
    assert all(Counter(part) == Counter(known.training) for part in parts)
    assert len({tuple(part) for part in parts}) == epochs
    assert stream == known.take(rows * epochs, 0, 3)


def test_a_stream_goes_on_from_its_place_whatever_was_asked_between():
    known = Problems(sums())
    whole = known.take(100, 0, 5)
    known.prompts(3, 1)
    assert known.take(40, 60, 5) == whole[60:] and Problems(sums()).take(1, 99, 5) == whole[99:]
    assert known.take(100, 0, 6) != whole and known.take(5, 10**12, 5) == known.take(5, 10**12, 5)
    assert known.prompts(7, -3) == known.prompts(7, -3)


def test_asking_for_more_than_there_are_asks_all_equally_often():
    known = Problems(sums())
    asked = Counter(known.prompts(2 * len(known.held_out), 1, held_out=True))
    assert asked == Counter({x: 2 for x in known.held_out})
    assert len({*known.prompts(len(known.training))}) == len(known.training)


def test_columns_reach_rewards_as_they_are():
    rows = [{"q": "a", "answer": 1, "level": None, "tags": ["x"]}, {"q": "b", "answer": "#### 2", "level": 3, "tags": []}]
    known = Problems(rows, prompt="q")
    assert known.columns(["b", "a", "b"]) == {"answer": ["#### 2", 1, "#### 2"], "level": [3, None, 3], "tags": [[], ["x"], []]}
    assert known.columns([]) == {} and known.solution("a") == "1"
    for method in known.solution, lambda x: known.columns([x]), lambda x: known.verify(x, "1"):
        with pytest.raises(ValueError, match=r"prompt must be one of Problems\(list: .*, got 'c'"):
            method("c")


def test_messages_are_prompts():
    chat = [{"role": "system", "content": "Add."}, {"role": "user", "content": "1+1?"}]
    known = Problems([{"prompt": chat, "answer": 2}], held_out=[{"prompt": "2+2?", "answer": 4}])
    assert known.take(2, 0) == [chat, chat] and known.columns([chat]) == {"answer": [2]}
    assert known.verify(chat, "it is 2") and not known.verify(chat, "3")
    assert known.verify([dict(reversed(m.items())) for m in chat], "2")  # the same messages


def test_without_answers_there_is_nothing_to_verify():
    open_ended = Problems([{"prompt": "a", "x": 1}], answer=None)
    assert open_ended.columns(["a"]) == {"x": [1]}
    with pytest.raises(ValueError, match="answer must be a column"):
        open_ended.verify("a", "b")


GSM8K = {
    "train": [{"question": "9 red and 9 blue cards?", "answer": "9 + 9 = <<9+9=18>>18 cards.\n#### 18"}],
    "test": [{"question": "1,000 pens at $2?", "answer": "1000 * 2 = <<1000*2=2000>>2000.\n#### 2,000"}],
}
MATH = [
    {"problem": r"$\frac{1}{4}+\frac{1}{4}$?", "level": "Level 1", "solution": r"It is $\boxed{\frac{1}{2}}$."},
    {"problem": "$3+4$?", "level": "Level 1", "solution": r"Count: $\boxed 7$."},
]


def test_rows_in_the_format_of_gsm8k():
    school = Problems(GSM8K, prompt="question")
    assert school.training == ["9 red and 9 blue cards?"] and school.held_out == ["1,000 pens at $2?"]
    assert school.verify("1,000 pens at $2?", "They cost $2000.") and school.verify("1,000 pens at $2?", "x\n#### 2,000")
    strict = Problems(GSM8K, prompt="question", extract=after_hashes)
    assert strict.verify("9 red and 9 blue cards?", "#### 18\nbecause 9 and 9")
    assert not strict.verify("9 red and 9 blue cards?", "18")


def test_rows_in_the_format_of_math():
    names = dict(prompt="problem", answer="solution", extract=last_boxed)
    texts = Problems(MATH, same=same_text, **names)
    half, seven = (row["problem"] for row in MATH)
    assert texts.verify(half, r"\boxed{\frac{1}{2}}") and not texts.verify(half, r"\boxed{0.5}")
    assert texts.verify(seven, r"\boxed{7}") and not texts.verify(seven, "7")
    assert texts.columns([half])["level"] == ["Level 1"]
    pytest.importorskip("math_verify")
    means = Problems(MATH, same=same_math, **names)
    assert means.verify(half, r"\boxed{0.5}") and not means.verify(half, r"\boxed{0.4}")
    assert not means.verify(half, "0.5")


def test_bare_answers_may_be_asked_for_in_a_box_but_marks_are_for_all_or_none():
    bare = Problems([{"prompt": "a", "answer": 7}], extract=last_boxed)
    assert bare.verify("a", r"\boxed{7.0}, of 9") and not bare.verify("a", "7")
    mixed = [{"prompt": "a", "answer": r"\boxed{1}"}, {"prompt": "b", "answer": "so it is 2"}]
    with pytest.raises(ValueError, match=r"data\[1\]: answer must be marked for last_boxed as others are, got 'so it is 2'"):
        Problems(mixed, extract=last_boxed)


def test_a_rule_of_ones_own_decides_what_can_be_matched():
    def even(completion, answer):
        return int(completion) % 2 == int(answer) % 2 == 0

    assert Problems([{"prompt": "a", "answer": 2}], same=even).verify("a", "4")
    with pytest.raises(ValueError, match="one that even can match, got '3'"):
        Problems([{"prompt": "a", "answer": 3}], same=even)


REPORTED = [
    ("18", "So it is 18."), (18.0, "18"), ("1,234", "about 1234"), ("#### 18", "The answer is 18."),
    ("She sells 16.\n#### 18", "#### 18"), ("$18", "She has $18."), ("50%", "It is 50%."), ("1/2", "It is 1/2"),
    ("x = 5", "x = 5"), ("1e3", "1000"), ("-5", "the result is −5"), (".5", "it is .5"), ("5", "the range is 3-5"),
    ("18 dollars", "18 dollars"),
]  # fmt: skip


@pytest.mark.parametrize("answer, said", REPORTED, ids=str)
def test_answers_as_data_sets_write_them_are_matched(answer, said):
    assert Problems([{"prompt": "q", "answer": answer}]).verify("q", said)


@pytest.mark.parametrize(
    "completion, right",
    [("so it is 12", True), ("12", True), ("12.0.", True), ("21", False), ("12 or 13", False), ("", False), ("twelve", False)],
)
def test_a_problem_in_words_is_solved_by_its_last_number(completion, right):
    assert Problems([{"prompt": "7+5?", "answer": 12}]).verify("7+5?", completion) is right


def test_the_name_tells_data_apart(tmp_path):
    rows = sums()
    assert str(Problems(rows)) == str(Problems(rows)) != str(Problems(rows[::-1]))
    assert str(Problems(rows)) != str(Problems([*rows[:-1], rows[-1] | {"answer": 0}]))
    assert str(Problems(written(tmp_path, line(prompt="a", answer=1)))).startswith("Problems(x.jsonl: 1 for training, 0")


# What is looked at


def test_powers_have_three_digits_at_most():
    "More would make numbers that no memory holds."
    assert last_number("1e999") == 10**999 and last_number("2e-999") == Fraction(2, 10**999)
    assert last_number("1e9999") == 9999 and last_number("1e99999999999999") == 99999999999999


@pytest.mark.parametrize("mark", [*".,;:!?\"'”’»", "?!", ' ."'])
def test_no_stop_and_no_quotation_mark_stands_at_an_end(mark):
    assert normalized(f"Paris{mark}") == "paris"


@pytest.mark.parametrize("mark", [*"\"'“‘«", " «"])
def test_no_quotation_mark_stands_at_the_beginning(mark):
    assert normalized(f"{mark}Paris") == "paris"


def test_a_formula_is_compared_with_that_of_the_data():
    "An interval may be the answer to inequalities, but not the other way round."
    pytest.importorskip("math_verify")
    assert same_math("(1,2)", "1<x<2") and not same_math("1<x<2", "(1,2)")


@pytest.mark.parametrize(
    "text", [r"\$5 + \$13", "so $18$.", r"so \(18\).", r"so \[18\].", r"so \boxed{18}, not 19"]
)
def test_delimiters_say_where_the_formula_is(text):
    pytest.importorskip("math_verify")
    assert same_math(text, "18") and not same_math(text, "19")


@pytest.mark.parametrize("name", ["prompts", "completions", *OFFERED])
def test_a_column_has_no_name_that_rewards_have(name):
    with pytest.raises(ValueError, match=rf"data\[0\] must be a row without columns named .*, got \['{name}'\]"):
        Problems([{"prompt": "a", "answer": 1, name: 2}])


@pytest.mark.parametrize("rows", [[{"level": 1}, {}], [{}, {"level": 1}], [{"level": 1}, {"kind": 1}]], ids=str)
def test_all_rows_have_the_same_columns(rows):
    rows = [{"prompt": f"{i}+1=", "answer": i + 1} | row for i, row in enumerate(rows)]
    with pytest.raises(ValueError, match=r"data\[1\] must be a row with the other columns of data\[0\], \["):
        Problems(rows)


@pytest.mark.parametrize("name", ["answer", "level", "kind"])
def test_a_prompt_that_comes_again_has_the_same_in_all_columns(name):
    row = {"prompt": "a", "answer": 1, "level": 2, "kind": 3}
    with pytest.raises(ValueError, match=rf"data\[2\]: the prompt of data\[0\] again, with another {name}$"):
        Problems([row, dict(row), row | {name: 4}])


def test_the_order_of_an_epoch_is_drawn_from_its_own_seed():
    "So it is the same in every version, and a run goes on where it was left."
    known = Problems(sums(), held_out=[{"prompt": f"{a}+2=", "answer": a + 2} for a in range(9)])
    for seed in 0, 5, -1:
        for part, n, held_out in (known.training, 40, False), (known.held_out, 9, True):
            spawned = [np.random.SeedSequence(seed % 2**64, spawn_key=(epoch,)) for epoch in range(2)]
            orders = [np.random.default_rng(x).permutation(n).tolist() for x in spawned]
            stream = [part[i] for order in orders for i in order]
            assert known.prompts(2 * n, seed, held_out) == stream
            assert held_out or known.take(2 * n, 0, seed) == stream


def test_a_rule_is_asked_for_a_response_and_then_for_the_answer():
    def begins(completion, answer):
        return completion.startswith(answer)

    known = Problems([{"prompt": "a", "answer": "Par"}], same=begins)
    assert known.verify("a", "Paris") and not known.verify("a", "Pa")
