import pytest
import torch
from helpers import workers
from helpers.processes import run_processes

from simcse_trainer.objective.contrastive import ShardSizes, gather_with_grad

# Processes, seconds each.
pytestmark = pytest.mark.slow

# Each tuple: number of rows of each process.
CASES = {
    2: [(4, 4), (5, 2), (1, 6), (0, 4)],
    3: [(3, 3, 3), (4, 1, 3), (2, 5, 0)],
}


@pytest.mark.parametrize("world", CASES)
def test_processes_together_are_one_with_the_whole_batch(world, tmp_path):
    # Starting a process imports torch: all cases of one world share its processes.
    run_processes(workers.run, world, world, str(tmp_path / "init"), CASES[world])


def test_one_process_needs_no_process_group():
    x = torch.randn(3, 2, requires_grad=True)
    rows = ShardSizes.exchange(3, "cpu")
    assert rows == ShardSizes((3,), 0)
    assert (rows.offset, rows.total, rows.loss_scale) == (0, 3, 1.0)
    assert gather_with_grad(x, rows) is x
    assert gather_with_grad(x) is x
    with pytest.raises(ValueError, match=r"expected the 3 rows of .* found 2"):
        gather_with_grad(x[:2], rows)


def test_offset_and_share():
    sizes = (4, 1, 3)
    parts = [ShardSizes(sizes, rank) for rank in range(3)]
    assert [part.offset for part in parts] == [0, 4, 5]
    assert [part.size for part in parts] == [4, 1, 3]
    assert [part.loss_scale for part in parts] == pytest.approx([4 * 3 / 8, 3 / 8, 3 * 3 / 8])
