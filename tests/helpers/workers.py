"""What each process of the tests here runs; importable, because the processes are spawned."""

from __future__ import annotations

from datetime import timedelta

import torch
import torch.distributed as dist
from torch import Tensor

from simcse_trainer.objective.contrastive import ShardSizes, gather_with_grad
from simcse_trainer.objective.loss import find_false_negatives, info_nce

DIM = 6
OPTIONS = {"temperature": 0.2, "hard_negative_weight": 0.7}


def run(rank: int, world: int, init_file: str, cases: list[tuple[int, ...]]) -> None:
    torch.set_num_threads(1)
    dist.init_process_group(
        "gloo",
        init_method=f"file://{init_file}",
        rank=rank,
        world_size=world,
        timeout=timedelta(seconds=15),
    )
    try:
        for sizes in cases:
            check_rows(sizes, rank)
            check_gradient_of_any_use(sizes, rank)
            for columns in (1, 3):
                check_training_step(sizes, rank, columns)
    finally:
        dist.destroy_process_group()


def check_rows(sizes: tuple[int, ...], rank: int) -> None:
    rows = ShardSizes.exchange(sizes[rank], "cpu")
    assert rows == ShardSizes(sizes, rank)
    assert rows.total == sum(sizes)
    # ShardSizes of any type and shape, also transposed ones; with the sizes known and without.
    for complete in (
        torch.arange(rows.total),
        torch.randn(3, rows.total, generator=seeded()).T,
        torch.randn(rows.total, 2, 3, generator=seeded()).bfloat16(),
    ):
        own = complete[rows.offset :][: rows.size]
        for found in (gather_with_grad(own, rows), gather_with_grad(own)):
            assert found.dtype == complete.dtype
            assert torch.equal(found, complete)
            assert not found.requires_grad


def check_gradient_of_any_use(sizes: tuple[int, ...], rank: int) -> None:
    """Every process weights every row by its own number: each row gets the sum of the numbers."""
    x = torch.randn(sizes[rank], 2, dtype=torch.float64, requires_grad=True)
    weights = torch.randn(len(sizes), sum(sizes), 2, dtype=torch.float64, generator=seeded())
    (gather_with_grad(x) * weights[rank]).sum().backward()
    expected = weights.sum(0).split(list(sizes))[rank]
    torch.testing.assert_close(x.grad, expected, rtol=1e-12, atol=1e-12)


def check_training_step(sizes: tuple[int, ...], rank: int, columns: int) -> None:
    """The averaged gradient of the processes is that of one process with the whole batch."""
    total, generator = sum(sizes), seeded()
    inputs = torch.randn(1 + columns, total, DIM, dtype=torch.float64, generator=generator)
    text_ids = torch.randint(0, total, (1 + columns, total), generator=generator)
    start = torch.randn(DIM, DIM, dtype=torch.float64, generator=generator)

    weight = start.clone().requires_grad_()
    anchors, *candidates = inputs @ weight
    assert find_false_negatives(text_ids).any()
    complete = info_nce(anchors, torch.stack(candidates), text_ids=text_ids, **OPTIONS)
    (expected,) = torch.autograd.grad(complete, weight)

    offset = sum(sizes[:rank])
    mine = slice(offset, offset + sizes[rank])
    for tiled in (False, True):
        weight = start.clone().requires_grad_()
        loss = local_loss(inputs[:, mine] @ weight, text_ids[:, mine], tiled)
        loss.backward()
        value = torch.nan_to_num(loss.detach())
        for x in (value, weight.grad):
            dist.all_reduce(x)
        case = f"sizes {sizes}, columns {columns}, tiled {tiled}: "
        for found, wanted in ((value, complete.detach()), (weight.grad, expected)):
            torch.testing.assert_close(
                found / len(sizes), wanted, rtol=1e-12, atol=1e-12, msg=lambda m, c=case: c + m
            )


def local_loss(embeddings: Tensor, text_ids: Tensor, tiled: bool) -> Tensor:
    """One process's part, as a trainer would write it."""
    anchors, candidates = embeddings[0], embeddings[1:]
    rows = ShardSizes.exchange(len(anchors), anchors.device)
    candidates = gather_with_grad(candidates.transpose(0, 1), rows).transpose(0, 1)
    text_ids = gather_with_grad(text_ids.T, rows).T
    options = OPTIONS | {"offset": rows.offset, "tile_size": 2 if tiled else None}
    return info_nce(anchors, candidates, text_ids=text_ids, **options) * rows.loss_scale


def seeded() -> torch.Generator:
    """The same numbers in every process."""
    return torch.Generator().manual_seed(0)
