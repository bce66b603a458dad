"""The protocol of SentEval, against plain loops over scikit-learn."""

import csv

import numpy as np
import pytest
import torch
from helpers.checks import fails
from scipy.linalg import cho_factor, cho_solve
from sklearn.linear_model import LogisticRegression
from sklearn.model_selection import StratifiedKFold

from simcse_trainer import SimCSEModel
from simcse_trainer.evaluation import transfer
from simcse_trainer.evaluation.metrics import F1, Accuracy
from simcse_trainer.evaluation.suite import encode_once
from simcse_trainer.evaluation.tasks import EVALUATE_OPTIONS
from simcse_trainer.evaluation.transfer import evaluate_transfer, load_transfer_task, split_texts

DIMENSIONS = 5
# Of the gradients here, where the package has its solvers' own.
TOLERANCE = 1e-6


def embed(texts):
    """Number k of a text is a point that says a little about its label, k modulo 2 or 3."""
    rows = []
    for text in texts:
        number = int(text.split()[1])
        point = torch.randn(DIMENSIONS, generator=torch.Generator().manual_seed(number))
        point[number % int(text.split()[0])] += 1.2
        rows.append(point)
    return torch.stack(rows)


def data(numbers, classes=2):
    return {
        "text": [f"{classes} {number}" for number in numbers],
        "label": [str(number % classes) for number in numbers],
    }


def arrays(split):
    return embed(split["text"]).double().numpy(), np.array([int(label) for label in split["label"]])


def folds(count=10):
    return StratifiedKFold(count, shuffle=True, random_state=1111)


def cv_accuracy(x, y, c, cv=None):
    hits = []
    for train, held_out in (cv or folds()).split(x, y):
        model = LogisticRegression(C=c, tol=TOLERANCE, max_iter=10_000)
        model.fit(x[train], y[train])
        hits.append(np.mean(model.predict(x[held_out]) == y[held_out]))
    return np.mean(hits)


@pytest.mark.parametrize("classes", [2, 3])
def test_without_validation_ten_folds_choose(classes):
    splits = {"train": data(range(150), classes), "test": data(range(200, 290), classes)}
    x, y = arrays(splits["train"])
    best = max([2.0**k for k in range(-1, 6)], key=lambda c: cv_accuracy(x, y, c))
    model = LogisticRegression(C=best, tol=TOLERANCE, max_iter=10_000).fit(x, y)
    test_x, test_y = arrays(splits["test"])
    found = evaluate_transfer(embed, {"x": splits})
    assert found["x_accuracy"] == pytest.approx(100 * np.mean(model.predict(test_x) == test_y))
    assert ("x_f1" in found) == (classes == 2)
    assert 100 / classes + 10 < found["avg_transfer"] < 99


def test_a_validation_split_chooses_and_is_not_trained_on():
    splits = {
        "train": data(range(60)),
        "validation": data(range(100, 150)),
        "test": data(range(200, 300)),
    }
    x, y = arrays(splits["train"])
    models = [
        LogisticRegression(C=2.0**k, tol=TOLERANCE, max_iter=10_000).fit(x, y) for k in range(-2, 4)
    ]
    best = max(models, key=lambda m: m.score(*arrays(splits["validation"])))
    found = evaluate_transfer(embed, {"x": splits})
    assert found["x_accuracy"] == pytest.approx(100 * best.score(*arrays(splits["test"])))


def test_one_split_is_tested_on_every_example_by_nested_folds(monkeypatch):
    monkeypatch.setattr(transfer, "_FOLDS", folds(4))  # ten times ten fits would be slow
    split = data(range(80))
    x, y = arrays(split)
    right = 0
    for train, held_out in folds(4).split(x, y):
        c = max(
            [2.0**k for k in range(-2, 4)],
            key=lambda c: cv_accuracy(x[train], y[train], c, folds(4)),
        )
        model = LogisticRegression(C=c, tol=TOLERANCE, max_iter=10_000).fit(x[train], y[train])
        right += np.sum(model.predict(x[held_out]) == y[held_out])
    found = evaluate_transfer(embed, {"x": {"train": split}})
    assert found["x_accuracy"] == pytest.approx(100 * right / 80)


def test_metrics_need_no_network():
    given = {"predictions": [1, 1, 0, 0], "references": [1, 0, 1, 0]}
    assert Accuracy().compute(**given) == {"accuracy": 50.0}
    assert F1().compute(**given) == {"f1": 50.0}
    assert F1().compute(predictions=[0, 0], references=[1, 0]) == {"f1": 0.0}


def test_too_little_to_learn_from():
    few = data(range(10))
    fails(lambda: evaluate_transfer(embed, {"x": {"train": few}}), "x: there are 5", "ten folds")
    one = {"text": ["2 0"] * 20, "label": ["a"] * 20}
    fails(lambda: evaluate_transfer(embed, {"x": {"train": one}}), "found 1 different labels")
    both = {"train": data(range(40)), "validation": data(range(40))}
    fails(lambda: evaluate_transfer(embed, {"x": both}), "train and validation without test")


def write(folder, task, split, rows, header=("text", "label")):
    (folder / task).mkdir(exist_ok=True)
    with open(folder / task / f"{split}.csv", "w", encoding="utf-8", newline="") as file:
        csv.writer(file).writerows([header, *rows])


def load(task, folder):
    return load_transfer_task(task, data_dir=str(folder), options=EVALUATE_OPTIONS)


def test_splits_of_a_folder_are_joined_as_senteval_has_them(tmp_path):
    pair = ("sentence1", "sentence2", "label")
    write(tmp_path, "mrpc", "train", [("a", "b", "1")], pair)
    write(tmp_path, "mrpc", "validation", [("c", "d", "0")], pair)
    write(tmp_path, "mrpc", "test", [("e", "f", "0")], pair)
    found = load("mrpc", tmp_path)
    assert list(found) == ["train", "test"]
    assert list(found["train"]["sentence2"]) == ["b", "d"]
    write(tmp_path, "mr", "train", [("good", "1"), ("bad", "0")])
    assert {split: len(part) for split, part in load("mr", tmp_path).items()} == {"train": 2}
    write(tmp_path, "mine", "train", [("good", "1")])
    write(tmp_path, "mine", "test", [("bad", "0")])
    assert list(load("mine", tmp_path)) == ["train", "test"]


def test_a_row_without_label_is_named(tmp_path):
    write(tmp_path, "mr", "train", [("good", "1"), ("bad", "")])
    fails(lambda: load("mr", tmp_path), "train.csv row 3: column 'label' is empty")
    write(tmp_path, "sst2", "train", [("good", "1")])
    fails(lambda: load("sst2", tmp_path), "sst2/validation.csv is not there", "data_dir")
    write(tmp_path, "cr", "train", [("good", "1")], ("sentence", "label"))
    fails(lambda: load("cr", tmp_path), "no column 'text'", "'sentence'")
    fails(
        lambda: load_transfer_task("mr", data_dir=None, options=EVALUATE_OPTIONS),
        "mr could not be loaded from the Hub",
        "tasks with a file of text, label",
    )


def newton(x, y, penalties):
    """Weights [D + 1], the constant last, at the minimum for each C: from one to the next it is
    a few steps, and the curvature is computed again only where a step was short of the minimum."""
    x = np.hstack([x, np.ones((len(x), 1))])
    ridge = np.diag([1.0] * (x.shape[1] - 1) + [0.0])
    weights = np.zeros(x.shape[1])
    for c in penalties:
        last = 0.0
        while True:
            p = 1 / (1 + np.exp(-x @ weights))
            gradient = c * x.T @ (p - y) + ridge @ weights
            size = np.abs(gradient).max()
            if size < TOLERANCE:
                break
            if size > last / 4:
                curvature = cho_factor(c * (x * (p * (1 - p))[:, None]).T @ x + ridge)
            last = size
            weights = weights - cho_solve(curvature, gradient)
        yield weights


def classify(weights, x):
    return (x @ weights[:-1] + weights[-1] > 0).astype(int)


@pytest.mark.real_weights
@pytest.mark.slow
def test_mrpc_agrees_with_an_independent_computation(minilm, transfer_dir):
    # Every eighth pair: what is compared is the protocol, on features of a real model.
    splits = {
        name: split.select(range(0, len(split), 8))
        for name, split in load("mrpc", transfer_dir).items()
    }
    texts = [text for data in splits.values() for text in split_texts(data)]
    encode = encode_once(SimCSEModel.from_pretrained(minilm).encode, texts)
    found = evaluate_transfer(encode, {"mrpc": splits})
    features = {}
    for name, split in splits.items():
        u, v = (encode(list(split[side])).double().numpy() for side in ("sentence1", "sentence2"))
        x = np.hstack([np.abs(u - v), u * v])
        features[name] = x, np.array([int(label) for label in split["label"]])
    x, y = features["train"]
    c = [2.0**k for k in range(-1, 6)]
    hits = np.zeros(len(c))
    for train, held_out in folds().split(x, y):
        for k, weights in enumerate(newton(x[train], y[train], c)):
            hits[k] += np.mean(classify(weights, x[held_out]) == y[held_out])
    *_, weights = newton(x, y, c[: np.argmax(hits) + 1])
    test_x, test_y = features["test"]
    predicted = classify(weights, test_x)
    assert found["mrpc_accuracy"] == pytest.approx(100 * np.mean(predicted == test_y))
    true = np.sum(predicted & test_y)
    f1 = 200 * true / (np.sum(predicted) + np.sum(test_y))
    assert found["mrpc_f1"] == pytest.approx(f1)
