"""Train sentence embeddings with SimCSE on the Hugging Face Trainer.

```python
from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
```
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Mapping
from importlib import import_module
from typing import TYPE_CHECKING, Any

from simcse_trainer.errors import InputError
from simcse_trainer.version import __version__

if TYPE_CHECKING:
    from simcse_trainer.arguments import SimCSETrainingArguments
    from simcse_trainer.inference.simcse import SimCSE
    from simcse_trainer.model.lora import lora_config
    from simcse_trainer.model.modeling import SimCSEModel
    from simcse_trainer.training.trainer import SimCSETrainer

__all__ = [
    "InputError",
    "SimCSE",
    "SimCSEModel",
    "SimCSETrainer",
    "SimCSETrainingArguments",
    "__version__",
    "lora_config",
]


def attach_lazily(
    package: str, modules: Mapping[str, str]
) -> tuple[Callable[[str], Any], Callable[[], list[str]]]:
    """Return `__getattr__` and `__dir__` of a package whose names are imported when asked for.

    Loading a model needs no Trainer, asking the version or speaking to the Hub no torch.

    Args:
        package: The package's `__name__`.
        modules: Public name -> the module in it that has the name.
    """

    def get(name: str) -> Any:
        if name in modules:
            return getattr(import_module(f"{package}.{modules[name]}"), name)
        raise AttributeError(f"module {package!r} has no attribute {name!r}")

    def names() -> list[str]:
        """Return the public names and the modules, without what the package imports itself."""
        own = vars(sys.modules[package])
        special = [name for name in own if name.startswith("__")]
        inside = [name for name in own if f"{package}.{name}" in sys.modules]
        return sorted({*modules, *special, *inside, *own.get("__all__", ())})

    return get, names


__getattr__, __dir__ = attach_lazily(
    __name__,
    {
        "lora_config": "model.lora",
        "SimCSE": "inference.simcse",
        "SimCSEModel": "model.modeling",
        "SimCSETrainer": "training.trainer",
        "SimCSETrainingArguments": "arguments",
    },
)
