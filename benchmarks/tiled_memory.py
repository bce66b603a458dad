"""Memory and time of the contrastive loss with and without its matrix of logits, in one run.

    python benchmarks/tiled_memory.py --rows 16384 --tile_size 512 1024 2048

Each way runs in a process of its own: inputs allocated and both ways warmed up on a few rows, then
forward and backward once. Extra memory is the growth of the process's peak resident memory
(ru_maxrss) over that, and so includes the gradients of the inputs, which every way must write.
Prints both and their ratios, and the losses and gradient norms, which must agree.
"""

from __future__ import annotations

import argparse
import json
import math
import platform
import resource
import subprocess
import sys
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from torch import Tensor

MEBIBYTE = 2**20


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--rows", type=int, default=16384, help="anchors, and rows of candidates")
    parser.add_argument("--dim", type=int, default=768)
    parser.add_argument("--columns", type=int, default=1, help="positives and hard negatives")
    parser.add_argument("--text_ids", action="store_true", help="mask false negatives")
    parser.add_argument("--tile_size", type=int, nargs="+", default=[1024])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--only", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.only is not None:
        print(json.dumps(measure(options, options.only)))
    else:
        print(json.dumps(compare(options), indent=2))


def compare(options: argparse.Namespace) -> dict[str, object]:
    # This process never imports torch: a child's ru_maxrss starts from its parent's memory.
    plain = measure_in_child(0)
    print("plain:", described(plain), flush=True)
    tiled = {}
    for size in options.tile_size:
        found = tiled[size] = measure_in_child(size)
        for name in ("loss", "gradient_norm"):
            if not math.isclose(plain[name], found[name], rel_tol=1e-4):
                raise SystemExit(f"{name}: plain {plain[name]}, tiled {found[name]}")
        found["memory_ratio"] = found["extra_bytes"] / plain["extra_bytes"]
        found["time_ratio"] = found["seconds"] / plain["seconds"]
        print(
            f"tiles of {size}: {described(found)}; of plain: memory {found['memory_ratio']:.3f}, "
            f"time {found['time_ratio']:.2f}",
            flush=True,
        )
    names = {name: value for name, value in vars(options).items() if name != "only"}
    return {"plain": plain, "tiled": tiled, "options": names, "machine": platform.machine()}


def measure_in_child(tile_size: int) -> dict[str, float]:
    command = [sys.executable, *sys.argv, "--only", str(tile_size)]
    run = subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, float] = json.loads(run.stdout)
    return found


def described(found: dict[str, float]) -> str:
    return (
        f"{found['extra_bytes'] / MEBIBYTE:.0f} MiB extra, {found['seconds']:.1f} s, "
        f"loss {found['loss']:.6f}, gradient norm {found['gradient_norm']:.6f}"
    )


def measure(options: argparse.Namespace, tile_size: int) -> dict[str, float | str]:
    """Forward and backward of one way; tile size 0 is the plain one."""
    import torch

    torch.manual_seed(0)
    torch.set_num_threads(options.threads)
    shape = (options.columns, options.rows, options.dim)
    anchors = torch.randn(options.rows, options.dim, requires_grad=True)
    # Something of the anchor in each positive: a loss and a gradient of the size training sees.
    candidates = torch.randn(shape)
    candidates[0].add_(anchors.detach(), alpha=0.3)
    candidates.requires_grad_()
    text_ids = None
    if options.text_ids:
        text_ids = torch.randint(0, options.rows, (1 + options.columns, options.rows))
    for warm_up in (0, 8):
        few = (x.detach()[..., :16, :].clone().requires_grad_() for x in (anchors, candidates))
        ids = None if text_ids is None else text_ids[:, :16]
        get_loss(*few, ids, warm_up).backward()

    before = peak_bytes()
    start = time.perf_counter()
    loss = get_loss(anchors, candidates, text_ids, tile_size)
    loss.backward()
    seconds = time.perf_counter() - start
    extra = peak_bytes() - before
    norms = [float(x.grad.norm()) for x in (anchors, candidates) if x.grad is not None]
    return {
        "extra_bytes": extra,
        "seconds": seconds,
        "loss": float(loss.detach()),
        "gradient_norm": math.hypot(*norms),
        "torch": torch.__version__,
    }


def get_loss(
    anchors: Tensor, candidates: Tensor, text_ids: Tensor | None, tile_size: int
) -> Tensor:
    from simcse_trainer.objective.loss import info_nce

    return info_nce(
        anchors, candidates, temperature=0.05, text_ids=text_ids, tile_size=tile_size or None
    )


def peak_bytes() -> int:
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else 1024 * peak


if __name__ == "__main__":
    main()
