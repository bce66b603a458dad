"""Numbers that are none: NaN and infinity are errors where they are first met."""

from __future__ import annotations

import torch
from torch import Tensor

from simcse_trainer.errors import InputError


def is_finite(tensor: Tensor) -> bool:
    """Return whether all numbers of a tensor are finite; found in the memory of a number."""
    if tensor.numel() == 0:
        return True
    # aminmax passes NaN on, and infinity is one of them.
    low, high = tensor.detach().aminmax()
    return bool(torch.isfinite(low) & torch.isfinite(high))


def not_finite(what: str, dtype: torch.dtype | str) -> InputError:
    """Return the error about a number that is not finite.

    Args:
        what: Where it was met, such as "The embedding of text 3".
        dtype: The type of the weights.
    """
    name = str(dtype).removeprefix("torch.")
    if name == "float16":
        return InputError(
            f"{what} is not finite, and the weights are float16, whose largest number is 65,504: "
            "many models compute larger ones. Pass --dtype bfloat16 or float32 (in Python "
            "dtype='float32')."
        )
    return InputError(
        f"{what} is not finite, and the weights are {name}. Where they came so, use an earlier "
        "checkpoint; where training made them so, a smaller --learning_rate or --dtype float32."
    )
