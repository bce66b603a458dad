"""Memory of optimizers, by the names that transformers has for them."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor

# Elements of state per trained parameter and bytes of each; None: as wide as the parameter.
_STATES: dict[str, tuple[int, int | None]] = {
    "adamw_torch": (2, None),
    "adamw_torch_fused": (2, None),
    "adamw_bnb_8bit": (2, 1),
    "adamw_8bit": (2, 1),
    "paged_adamw_32bit": (2, 4),
    "paged_adamw_8bit": (2, 1),
    "adamw_torch_8bit": (2, 1),
    "ademamix": (3, 4),
    "ademamix_8bit": (3, 1),
    "paged_ademamix_32bit": (3, 4),
    "paged_ademamix_8bit": (3, 1),
    "lion_32bit": (1, 4),
    "lion_8bit": (1, 1),
    "paged_lion_32bit": (1, 4),
    "paged_lion_8bit": (1, 1),
    "adagrad": (1, None),
    "rmsprop": (1, None),
    "rmsprop_bnb": (1, 4),
    "rmsprop_bnb_32bit": (1, 4),
    "rmsprop_bnb_8bit": (1, 1),
    "sgd": (0, None),
}
# bitsandbytes leaves smaller parameters in 32 bits, and has a float32 constant for each block.
_SMALL, _BLOCK = 4096, 256


def is_known(optim: str) -> bool:
    """Whether the size of an optimizer's state is known; else it is taken to be AdamW's."""
    return optim in _STATES or optim == "adafactor"


def state_bytes(optim: str, trained: Sequence[Tensor]) -> int:
    """What an optimizer keeps from step to step.

    Args:
        optim: `TrainingArguments.optim`.
        trained: The parameters.
    """
    return sum(_state_bytes(optim, parameter) for parameter in trained)


def _state_bytes(optim: str, parameter: Tensor) -> int:
    size = parameter.numel()
    if optim == "adafactor":  # a row and a column instead of the matrix (Shazeer and Stern 2018)
        return 4 * (sum(parameter.shape) if parameter.ndim > 1 else size)
    count, width = _STATES.get(optim, (2, None))
    if width == 1:
        return count * (4 * size if size < _SMALL else size + 4 * -(-size // _BLOCK))
    return count * size * (width or parameter.element_size())


def step_bytes(optim: str, trained: Sequence[Tensor], *, gpu: bool) -> int:
    """What the update needs beside gradients and state, while it lasts."""
    if optim in ("adamw_torch_fused", "sgd") or not trained:
        return 0
    sizes = [parameter.nbytes for parameter in trained]
    if optim == "adamw_torch" and gpu:  # all parameters at once
        return sum(sizes)
    return 2 * max(sizes)
