import pytest

from simcse_trainer.data.nli import build_triplets, resolve_nli_columns
from simcse_trainer.errors import InputError


def rows(*cells):
    return [dict(zip(("premise", "hypothesis", "label"), row, strict=True)) for row in cells]


def triplets(*cells):
    return [tuple(triplet.values()) for triplet in build_triplets(rows(*cells))]


def test_each_entailment_takes_the_next_contradiction():
    assert triplets(
        ("Q", "no entailment", "contradiction"),
        ("P", "e1", "entailment"),
        ("P", "n1", "neutral"),
        ("R", "e", "entailment"),
        ("P", "c1", "contradiction"),
        ("P", "e2", "entailment"),
        ("N", "no contradiction", "entailment"),
        ("R", "c", "contradiction"),
        ("P", "e3", "entailment"),
        ("P", "c2", "contradiction"),
    ) == [("P", "e1", "c1"), ("P", "e2", "c2"), ("P", "e3", "c1"), ("R", "e", "c")]


def test_triplets_have_the_canonical_columns():
    (triplet,) = build_triplets(rows(("P", "e", 0), ("P", "c", 2)))
    assert triplet == {"sent0": "P", "sent1": "e", "hard_neg": "c"}


@pytest.mark.parametrize(
    "labels", [("0", "2"), (0, 2), (0.0, 2.0), ("ENTAILMENT", " Contradiction ")]
)
@pytest.mark.parametrize("unlabelled", ["-", -1, "-1"])
def test_label_spellings(labels, unlabelled):
    entailment, contradiction = labels
    found = triplets(("P", "e", entailment), ("P", "c", contradiction), ("P", None, unlabelled))
    assert found == [("P", "e", "c")]


@pytest.mark.parametrize("label", ["maybe", "", None, 3, True, 0.5, [0]])
def test_unknown_labels(label):
    with pytest.raises(
        InputError, match=r"row 2: column 'label' is .*expected entailment"
    ) as error:
        triplets(("P", "e", 0), ("P", "c", label))
    assert str(label) in str(error.value) or label is None


def test_empty_texts_and_missing_columns():
    with pytest.raises(InputError, match="row 2: column 'hypothesis' is empty"):
        triplets(("P", "e", 0), ("P", " ", 2))
    with pytest.raises(InputError, match="row 1: column 'premise' is missing"):
        list(build_triplets([{"label": 0}]))
    with pytest.raises(InputError, match="row 1: column 'label' is missing"):
        list(build_triplets([{"premise": "P"}]))


def test_no_triplet_at_all():
    with pytest.raises(InputError, match=r"no premise of the 2 rows has both.*no triplet"):
        triplets(("P", "e", 0), ("Q", "c", 2))
    with pytest.raises(InputError, match="no triplet"):
        triplets()


def test_columns_by_name_and_by_position():
    names = ["label", "premise", "hypothesis", "id"]
    expected = {"premise": "premise", "hypothesis": "hypothesis", "label": "label"}
    assert resolve_nli_columns(names, None, source="x") == expected
    found = resolve_nli_columns(["s1", "s2", "gold"], ["s1", "s2", "gold"], source="x")
    assert found == {"premise": "s1", "hypothesis": "s2", "label": "gold"}


@pytest.mark.parametrize(
    ("names", "columns", "words"),
    [
        (
            ["premise", "hypotesis", "label"],
            None,
            ["'hypothesis' (nearest: 'hypotesis')", "columns"],
        ),
        (["a", "b", "c"], ["a", "b"], ["columns a b", "premise, hypothesis, label"]),
        (["a", "b", "c"], ["a", "b", "b"], ["columns a b b"]),
        (["a", "b", "c"], ["a", "b", "d"], ["no column 'd'", "'a', 'b', 'c'"]),
    ],
)
def test_unclear_columns(names, columns, words):
    with pytest.raises(InputError) as error:
        resolve_nli_columns(names, columns, source="nli.csv")
    for word in ["nli.csv", *words]:
        assert word in str(error.value)
