"""Every term of the objective against its definition, one scalar at a time."""

import itertools
import math
from dataclasses import replace

import pytest
import torch
from helpers.training import UNSUPERVISED, build_args, build_model
from torch.nn.functional import cosine_similarity

from simcse_trainer import InputError, SimCSETrainer, SimCSETrainingArguments
from simcse_trainer.objective import contrastive
from simcse_trainer.objective.contrastive import ContrastiveObjective
from simcse_trainer.objective.logits import DIRECTIONS, HARDNESS_MODES, MARGIN_TYPES, LogitRules

DIMS = {"matryoshka_dims": (6, 4, 2), "matryoshka_weights": (1.0, 0.5, 0.25)}
SYMMETRIC = {"contrastive_directions": DIRECTIONS[:2], "contrastive_partition": "per_direction"}
ALL = {"contrastive_directions": DIRECTIONS}
RULES = LogitRules(0.1, hard_negative_weight=0.7)
GUIDED = replace(RULES, false_negative_margin=0.1)
CASES = {
    "plain": ContrastiveObjective(RULES),
    "symmetric": ContrastiveObjective(RULES, **SYMMETRIC),
    "joint, two directions": ContrastiveObjective(RULES, contrastive_directions=DIRECTIONS[:2]),
    "queries too": ContrastiveObjective(
        RULES, contrastive_directions=(DIRECTIONS[0], DIRECTIONS[2])
    ),
    "all directions": ContrastiveObjective(RULES, **ALL),
    **{
        f"hardness of {mode}": ContrastiveObjective(
            replace(RULES, hardness_strength=5.0, hardness_mode=mode), **ALL
        )
        for mode in HARDNESS_MODES
    },
    **{
        f"margin {margin} {kind}": ContrastiveObjective(
            replace(RULES, false_negative_margin=margin, false_negative_margin_type=kind), **ALL
        )
        for margin in (0.0, 0.3)
        for kind in ("absolute", "relative")
    },
    "guided, symmetric": ContrastiveObjective(
        replace(RULES, false_negative_margin=0.1), **SYMMETRIC
    ),
    "cut": ContrastiveObjective(
        RULES, matryoshka_dims=(6, 4, 2), matryoshka_weights=(1.0, 0.5, 0.25), **ALL
    ),
    "cut and guided": ContrastiveObjective(
        replace(RULES, false_negative_margin=0.0),
        matryoshka_dims=(6, 3),
        matryoshka_weights=(1.0, 2.0),
    ),
    "alignment": ContrastiveObjective(RULES, contrastive_weight=0.0, alignment_weight=0.3),
    "uniformity": ContrastiveObjective(RULES, contrastive_weight=0.0, uniformity_weight=0.4),
    "orthogonality": ContrastiveObjective(RULES, orthogonality_weights=(0.5, 2.0)),
    "everything": ContrastiveObjective(
        replace(RULES, hardness_strength=2.0, false_negative_margin=0.2),
        alignment_weight=0.3,
        uniformity_weight=0.4,
        orthogonality_weights=(0.5, 2.0),
        matryoshka_dims=(4, 6),
        **ALL,
    ),
}


def batch(columns=2, rows=6, equal=True):
    views = torch.randn(1 + columns, rows, 6, dtype=torch.float64)
    # Near enough to its anchor that not all others are nearer.
    views[1] += views[0]
    ids = torch.randint(0, 9, (1 + columns, rows)) if equal else torch.arange(views[..., 0].numel())
    return views.requires_grad_(), ids.reshape(1 + columns, rows), torch.randn(1 + columns, rows, 4)


def reference(objective, views, ids, guide):
    guided = objective.rules.false_negative_margin is not None
    guide = (views.detach() if guide is None else guide.double()) if guided else None
    total = 0.0
    dims = objective.matryoshka_dims or [views.shape[-1]]
    for i, size in enumerate(dims):
        weight = objective.matryoshka_weights[i] if objective.matryoshka_weights else 1.0
        cut = views[..., :size]
        if objective.contrastive_weight:
            total += weight * contrastive_reference(objective, cut, ids, guide)
        total += weight * objective.alignment_weight * alignment_reference(cut)
        total += weight * objective.uniformity_weight * uniformity_reference(cut[0])
        for factor, term in zip(objective.orthogonality_weights, (0, 1), strict=True):
            found = [orthogonality_reference(column)[term] for column in cut]
            total += weight * factor * sum(found) / len(found)
    return total


def contrastive_reference(objective, views, ids, guide):
    rules, rows = objective.rules, views.shape[1]
    losses, nothing = [], views.new_tensor(-torch.inf)
    for i in range(rows):
        parts = [
            torch.stack([*logits_of_row(objective, direction, i, views, ids, guide), nothing])
            for direction in objective.contrastive_directions
        ]
        parts = [torch.cat(parts)] if objective.contrastive_partition == "joint" else parts
        own = cosine_similarity(views[0, i], views[1, i], dim=0) / rules.temperature
        losses.append(sum(part.logsumexp(0) for part in parts) / len(parts) - own)
    return sum(losses) / rows


def logits_of_row(objective, direction, i, views, ids, guide):
    """The logits of all that row i meets in a direction and that is not left out."""
    rules = objective.rules
    start, end = direction.split("_to_")
    row = 0 if start == "query" else 1
    columns = [0] if end == "query" else range(1, len(views))
    for v, j in itertools.product(columns, range(views.shape[1])):
        own = i == j
        if own and start == end:
            continue
        positive = own and v == columns[0]
        if not positive and (
            (objective.mask_duplicate_negatives and belongs(ids, i, v, j))
            or (guide is not None and is_near(rules, guide, i, guide[row, i], guide[v, j]))
        ):
            continue
        cosine = cosine_similarity(views[row, i], views[v, j], dim=0)
        logit = cosine / rules.temperature
        if direction == "query_to_doc":
            hard = own and not positive
            counts = {
                "in_batch_negatives": not own,
                "hard_negatives": hard,
                "all_negatives": not positive,
            }
            strength = rules.hardness_strength * counts[rules.hardness_mode]
            logit = logit + hard * rules.hard_negative_weight + strength * cosine.detach()
        yield logit


def belongs(ids, i, v, j):
    """Text v of row j is one of row i's, or an anchor or a positive whose partner is."""
    texts = {int(ids[0, i]), int(ids[1, i])}
    partner = {0: ids[1, j] == ids[1, i], 1: ids[0, j] == ids[0, i]}
    return int(ids[v, j]) in texts or bool(partner.get(v, False))


def is_near(rules, guide, i, one, other):
    near = cosine_similarity(guide[0, i], guide[1, i], dim=0)
    margin = rules.false_negative_margin * (
        abs(near) if rules.false_negative_margin_type == "relative" else 1
    )
    return cosine_similarity(one, other, dim=0) > near - margin


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


def alignment_reference(views):
    return sum((unit(a) - unit(b)).norm() ** 2 for a, b in zip(*views[:2], strict=True)) / len(
        views[0]
    )


def uniformity_reference(anchors):
    pairs = [
        torch.exp(-2 * (unit(anchors[i]) - unit(anchors[j])).norm() ** 2)
        for i, j in itertools.permutations(range(len(anchors)), 2)
    ]
    return torch.log(sum(pairs) / len(pairs))


def orthogonality_reference(column):
    found = [
        unit(column[i]) @ unit(column[j]) for i, j in itertools.permutations(range(len(column)), 2)
    ]
    found = torch.stack(found)
    square = found.square().mean() - 1 / column.shape[1]
    return found.mean() ** 2, square * (square > 0)


@pytest.mark.parametrize("tiles", [False, True], ids=["whole", "tiles"])
@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("name", CASES)
def test_loss_and_gradient_are_those_of_the_definition(name, columns, tiles, monkeypatch):
    if tiles:
        monkeypatch.setattr(contrastive, "LARGEST_MATRIX", 0)
        monkeypatch.setattr(contrastive, "TILE_SIZE", 4)
    for guide_given, equal in ((True, True), (False, False)):
        views, ids, guide = batch(columns, equal=equal)
        guide = guide if guide_given else None
        expected = reference(CASES[name], views, ids, guide)
        loss = CASES[name](views, ids, None if guide is None else guide.double())
        assert loss.item() == pytest.approx(expected.item(), abs=1e-9)
        (wanted,) = torch.autograd.grad(expected, views)
        (found,) = torch.autograd.grad(loss, views)
        torch.testing.assert_close(found, wanted, atol=1e-9, rtol=1e-9)
        assert math.isfinite(loss)


def to_sentence_transformers(objective, views):
    losses = pytest.importorskip("sentence_transformers.losses")
    loss = losses.MultipleNegativesRankingLoss(
        None,
        scale=1 / objective.rules.temperature,
        directions=objective.contrastive_directions,
        partition_mode="joint" if objective.contrastive_partition == "joint" else "per_direction",
        hardness_mode=objective.rules.hardness_mode if objective.rules.hardness_strength else None,
        hardness_strength=objective.rules.hardness_strength,
    )
    return loss.compute_loss_from_embeddings(list(views), None)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize(
    "name",
    ["plain", "symmetric", "all directions", *(f"hardness of {mode}" for mode in HARDNESS_MODES)],
)
def test_directions_and_hardness_are_those_of_sentence_transformers(name, columns):
    objective = CASES[name]
    objective = replace(objective, rules=replace(objective.rules, hard_negative_weight=0.0))
    views, ids, _ = batch(columns, equal=False)
    expected = to_sentence_transformers(objective, views)
    loss = objective(views, ids)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    (wanted,), (found,) = (torch.autograd.grad(x, views) for x in (expected, loss))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


def test_orthogonality_is_that_of_sentence_transformers():
    losses = pytest.importorskip("sentence_transformers.losses")
    theirs = losses.GlobalOrthogonalRegularizationLoss(
        None, mean_weight=0.5, second_moment_weight=2.0
    )
    views, ids, _ = batch(2)
    expected = sum(theirs.compute_loss_from_embeddings(list(views)).values())
    objective = ContrastiveObjective(contrastive_weight=0.0, orthogonality_weights=(0.5, 2.0))
    assert objective(views, ids).item() == pytest.approx(expected.item(), abs=1e-6)


@pytest.mark.parametrize("kind", MARGIN_TYPES)
@pytest.mark.parametrize("margin", [0.0, 0.1])
@pytest.mark.parametrize(
    ("columns", "directions"),
    [
        (1, ("query_to_doc",)),
        (1, ("query_to_doc", "query_to_query", "doc_to_doc")),
        (2, ("query_to_doc", "query_to_query")),
    ],
)
def test_a_guided_mask_is_that_of_sentence_transformers(columns, directions, kind, margin):
    losses = pytest.importorskip("sentence_transformers.losses")
    theirs = losses.GISTEmbedLoss.__new__(losses.GISTEmbedLoss)
    torch.nn.Module.__init__(theirs)  # a whole model is needed by the constructor alone
    theirs.model = lambda features: {"sentence_embedding": features["own"]}
    theirs.guide = lambda features: {"sentence_embedding": features["guide"]}
    theirs.must_retokenize = theirs.gather_across_devices = False
    theirs.contrast_anchors = "query_to_query" in directions
    theirs.contrast_positives = "doc_to_doc" in directions
    theirs.temperature, theirs.margin, theirs.margin_strategy = 0.1, margin, kind
    theirs.similarity_fct = torch.nn.CosineSimilarity(dim=-1)
    theirs.cross_entropy_loss = torch.nn.CrossEntropyLoss()
    views, ids, _ = batch(columns, equal=False)
    guide = torch.randn(1 + columns, 6, 4, dtype=torch.float64)
    guide[1] += guide[0]
    features = [{"own": view, "guide": of} for view, of in zip(views, guide, strict=True)]
    expected = theirs(features, None)
    objective = ContrastiveObjective(
        LogitRules(0.1, false_negative_margin=margin, false_negative_margin_type=kind), directions
    )
    loss = objective(views, ids, guide)
    rules = replace(objective.rules, false_negative_margin=None)
    plain = replace(objective, rules=rules)(views, ids)
    assert loss.item() == pytest.approx(expected.item(), abs=1e-6)
    assert abs(loss.item() - plain.item()) > 1e-3
    (wanted,), (found,) = (torch.autograd.grad(x, views) for x in (expected, loss))
    torch.testing.assert_close(found, wanted, atol=1e-6, rtol=1e-6)


@pytest.mark.parametrize(
    ("options", "said"),
    [
        ({"contrastive_directions": ["doc_to_query"]}, "expected query_to_doc, and others of"),
        ({"contrastive_directions": ["query_to_doc"] * 2}, "each once"),
        (
            {"contrastive_directions": DIRECTIONS, "contrastive_partition": "per_direction"},
            "alone: in others there is nothing to find",
        ),
        ({"matryoshka_dims": [8, 0]}, "different numbers from 1"),
        ({"matryoshka_dims": [8], "matryoshka_weights": [1.0, 2.0]}, "as many numbers above 0"),
        ({"uniformity_weight": -1.0}, "0 or more"),
        ({"orthogonality_weights": [1.0]}, "two numbers"),
        ({"hardness_mode": "hard"}, "one of in_batch_negatives, hard_negatives, all_negatives"),
        ({"false_negative_margin": -0.1}, "0 or more"),
    ],
)
def test_an_option_out_of_its_range_is_named(options, said, tmp_path):
    (name, *_) = reversed(options)
    with pytest.raises(InputError, match=f"{name} is .*{said}"):
        SimCSETrainingArguments(output_dir=str(tmp_path), **options)


def test_more_dimensions_than_there_are_are_refused(tmp_path):
    args = build_args(tmp_path, matryoshka_dims=[4096, 16])
    with pytest.raises(InputError, match="matryoshka_dims has 4096, but embeddings have 32"):
        SimCSETrainer(build_model(), args, UNSUPERVISED)
