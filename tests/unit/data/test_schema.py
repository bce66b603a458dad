import pytest

from simcse_trainer.data.schema import (
    find_numeric_column,
    find_problem,
    find_score_problem,
    resolve_text_columns,
)
from simcse_trainer.errors import InputError


@pytest.mark.parametrize(
    ("names", "columns", "expected"),
    [
        (["text"], None, {"sent0": "text"}),
        (["hard_neg"], None, {"sent0": "hard_neg"}),
        (["sent0", "id"], None, {"sent0": "sent0"}),
        (["sent1", "id", "sent0"], None, {"sent0": "sent0", "sent1": "sent1"}),
        (
            ["hard_neg_b", "sent0", "hard_neg_a", "sent1"],
            None,
            {
                "sent0": "sent0",
                "sent1": "sent1",
                "hard_neg_b": "hard_neg_b",
                "hard_neg_a": "hard_neg_a",
            },
        ),
        (["a", "b"], ["b"], {"sent0": "b"}),
        (["a", "b"], "b", {"sent0": "b"}),
        (["sent0", "sent1"], ["sent1", "sent0"], {"sent0": "sent1", "sent1": "sent0"}),
        (list("abc"), list("cab"), {"sent0": "c", "sent1": "a", "hard_neg": "b"}),
        (
            list("abcd"),
            list("abcd"),
            {"sent0": "a", "sent1": "b", "hard_neg_1": "c", "hard_neg_2": "d"},
        ),
    ],
)
def test_roles(names, columns, expected):
    mapping = resolve_text_columns(names, columns, source="x.csv")
    assert list(mapping.items()) == list(expected.items())


@pytest.mark.parametrize(
    ("names", "columns", "words"),
    [
        (["premise", "the text"], None, ["'premise', 'the text'", "columns premise 'the text'"]),
        (["sent_0", "sent_1"], None, ["'sent_0' looks like 'sent0'", "columns sent_0 sent_1"]),
        (["Sent0", "id"], None, ["'Sent0' looks like 'sent0'"]),
        (["hard-neg", "id"], None, ["'hard-neg' looks like 'hard_neg'"]),
        (["sent0", "hard_neg"], None, ["'hard_neg' needs", "'sent1'", "columns sent0"]),
        (
            ["sentence1", "b"],
            ["sentence"],
            ["'sentence'", "nearest: 'sentence1'", "found 'sentence1'"],
        ),
        (["a", "b"], ["a", "a"], ["columns a a", "twice"]),
        (["a\nb", "c"], None, [r"'a\nb', 'c'"]),
        ([], None, ["no columns"]),
    ],
)
def test_unclear_columns_name_the_way_out(names, columns, words):
    with pytest.raises(InputError) as error:
        resolve_text_columns(names, columns, source="x.csv")
    for word in ["x.csv", *words]:
        assert word in str(error.value)


def test_misspelt_optional_column_is_warned_about(caplog):
    assert resolve_text_columns(["sent0", "sent_1"], source="x.csv") == {"sent0": "sent0"}
    assert "'sent_1' looks like 'sent1', which is ignored" in caplog.text


@pytest.mark.parametrize(
    ("value", "problem"),
    [
        ("", "is empty"),
        (" \t\u3000", "is empty"),
        ("a\0b", "NUL"),
        ("a\ud83d", r"half of a character, \ud83d"),
        (None, "is null"),
        (3, "a number (3), expected text"),
        (0.5, "a number (0.5)"),
        (True, "a boolean (True)"),
        (["a"], "a list (['a'])"),
        ({"a": 1}, "an object ({'a': 1})"),
        (b"a", "bytes (b'a')"),
    ],
)
def test_bad_cells(value, problem):
    found = find_problem({"a": "good", "b": value}, {"sent0": "a", "sent1": "b"})
    assert found.startswith("column 'b' ")
    assert problem in found


def test_good_and_missing_cells():
    assert find_problem({"a": " 한국어 \U0001f600", "b": None}, {"sent0": "a"}) is None
    assert find_problem({"a": "x" * 1_000_000}, {"sent0": "a"}) is None
    assert find_problem({"a": "x"}, {"sent0": "b"}) == "column 'b' is missing"


def test_numeric_columns():
    columns = {"sent0": "a", "sent1": "b"}
    assert find_numeric_column([{"a": "x", "b": "1"}, {"a": "2", "b": "-3.5e1"}], columns) == "b"
    assert find_numeric_column([{"a": "x", "b": "1"}, {"a": "2", "b": "y"}], columns) is None
    assert find_numeric_column([{"a": "", "b": None}], columns) is None
    assert find_numeric_column([], columns) is None


@pytest.mark.parametrize("score", ["3.5", "-1", 0, 2.5, "1e2"])
def test_good_scores(score):
    assert find_score_problem({"score": score}) is None


@pytest.mark.parametrize(
    ("score", "words"),
    [
        ("high", "'high', expected a number"),
        ("", "'', expected a number"),
        ("nan", "nan, expected a finite number"),
        (float("inf"), "inf, expected a finite number"),
        (10**400, "expected a finite number"),
        (None, "expected a number"),
        (True, "a boolean (True), expected a number"),
    ],
)
def test_bad_scores(score, words):
    assert words in find_score_problem({"score": score})
