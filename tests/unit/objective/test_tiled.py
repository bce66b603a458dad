import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from simcse_trainer.objective.loss import find_false_negatives, info_nce


def tiled_info_nce(anchors, candidates, *, tile_size=1024, **options):
    return info_nce(anchors, candidates, tile_size=tile_size, **options)


def batch(columns=2, rows=7, size=5, offset=0, dtype=torch.float64):
    """Anchors, candidates, and text ids with many equal ones."""
    complete = torch.randn(rows, 4, dtype=dtype)
    anchors = complete[offset : offset + size].clone().requires_grad_()
    candidates = torch.randn(columns, rows, 4, dtype=dtype, requires_grad=True)
    return anchors, candidates, torch.randint(0, 6, (1 + columns, rows))


def compare(anchors, candidates, text_ids=None, *, offset=0, tile_size=3, **options):
    options |= {"temperature": 0.1, "offset": offset}
    if text_ids is not None:
        assert find_false_negatives(text_ids, offset=offset, size=len(anchors)).any()
    # Not the plain mean: the gradient of each row must pass through.
    expected = info_nce(anchors, candidates, text_ids=text_ids, **options) * 1.7
    loss = tiled_info_nce(anchors, candidates, text_ids=text_ids, tile_size=tile_size, **options)
    loss = loss * 1.7
    torch.testing.assert_close(loss, expected, rtol=1e-10, atol=1e-12)
    inputs = [x for x in (anchors, candidates) if x.requires_grad]
    found = torch.autograd.grad(loss, inputs)
    wanted = torch.autograd.grad(expected, inputs)
    for a, b in zip(found, wanted, strict=True):
        torch.testing.assert_close(a, b, rtol=1e-10, atol=1e-12)


@pytest.mark.parametrize("columns", [1, 2, 3])
@pytest.mark.parametrize("tile_size", [1, 2, 3, 7, 100])
@pytest.mark.parametrize("masked", [False, True])
@pytest.mark.parametrize("weight", [0.0, 0.7])
def test_value_and_gradient_are_those_of_info_nce(columns, tile_size, masked, weight):
    for rows, size, offset in [(7, 7, 0), (7, 3, 2), (7, 2, 5), (12, 5, 4)]:
        anchors, candidates, ids = batch(columns, rows, size, offset)
        compare(
            anchors,
            candidates,
            ids if masked else None,
            offset=offset,
            tile_size=tile_size,
            hard_negative_weight=weight,
        )


def test_only_what_is_asked_for_gets_a_gradient():
    anchors, candidates, ids = batch()
    compare(anchors.detach(), candidates, ids)
    compare(anchors, candidates.detach(), ids)


def test_gradcheck():
    anchors, candidates, ids = batch(columns=2, rows=3, size=2, offset=1)
    options = {"temperature": 0.5, "hard_negative_weight": 0.7, "offset": 1, "tile_size": 2}
    for text_ids in (None, ids):
        assert torch.autograd.gradcheck(
            lambda a, c, ids=text_ids: tiled_info_nce(a, c, text_ids=ids, **options),
            (anchors, candidates),
        )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32])
def test_half_precision_is_raised_even_under_autocast(dtype):
    anchors, candidates, _ = batch(dtype=dtype)
    expected = info_nce(anchors, candidates, temperature=0.05)
    wanted = torch.autograd.grad(expected, [anchors, candidates])
    with torch.autocast("cpu", dtype=torch.bfloat16):
        loss = tiled_info_nce(anchors, candidates, temperature=0.05, tile_size=3)
        found = torch.autograd.grad(loss, [anchors, candidates])
    assert loss.dtype == torch.float32
    torch.testing.assert_close(loss, expected)
    for a, b in zip(found, wanted, strict=True):
        assert a.dtype == dtype
        torch.testing.assert_close(a, b)


def test_a_row_with_its_positive_alone_has_no_loss():
    assert tiled_info_nce(torch.randn(1, 4), torch.randn(1, 1, 4), temperature=0.05) == 0
    # All others carry the anchor's text; in tiles of 1 most tiles are masked as a whole.
    anchors, candidates = torch.randn(4, 4, requires_grad=True), torch.randn(2, 4, 4)
    ids = torch.ones(3, 4, dtype=torch.long)
    loss = tiled_info_nce(anchors, candidates, temperature=0.05, text_ids=ids, tile_size=1)
    assert loss == 0
    assert torch.equal(torch.autograd.grad(loss, anchors)[0], torch.zeros(4, 4))


def test_twice_the_same():
    anchors, candidates, ids = batch(dtype=torch.float32)
    options = {"temperature": 0.05, "text_ids": ids, "tile_size": 2}
    losses = [tiled_info_nce(anchors, candidates, **options) for _ in range(2)]
    first, second = (torch.autograd.grad(loss, [anchors, candidates]) for loss in losses)
    assert torch.equal(*losses)
    assert all(map(torch.equal, first, second))


class Largest(TorchDispatchMode):
    """Number of elements of the largest tensor that any operation returns."""

    elements = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for x in result if isinstance(result, tuple | list) else [result]:
            if isinstance(x, torch.Tensor):
                self.elements = max(self.elements, x.numel())
        return result


def test_nothing_as_large_as_the_logits_is_made():
    anchors, candidates, ids = batch(columns=2, rows=64, size=64, dtype=torch.float32)
    with Largest() as tiled:
        tiled_info_nce(anchors, candidates, temperature=0.05, text_ids=ids, tile_size=16).backward()
    with Largest() as plain:
        info_nce(anchors, candidates, temperature=0.05).backward()
    assert plain.elements == 64 * 2 * 64
    # The candidates, or a tile's text ids against its anchors and candidates.
    assert tiled.elements == candidates.numel()


def test_impossible_requests_are_refused():
    anchors, candidates, _ = batch(rows=7, size=5)
    with pytest.raises(ValueError, match="5 anchors from row 3 on and 7 rows"):
        tiled_info_nce(anchors, candidates, temperature=0.05, offset=3)
    with pytest.raises(ValueError, match="tile_size of at least 1, found 0"):
        tiled_info_nce(anchors, candidates, temperature=0.05, tile_size=0)
