"""Train sentence embeddings with SimCSE on the Hugging Face Trainer.

```python
from simcse_trainer import SimCSEModel, SimCSETrainer, SimCSETrainingArguments
```
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

from simcse_trainer.errors import InputError
from simcse_trainer.version import __version__

if TYPE_CHECKING:
    from simcse_trainer.arguments import SimCSETrainingArguments
    from simcse_trainer.inference.simcse import SimCSE
    from simcse_trainer.model.adapters import lora_config
    from simcse_trainer.model.modeling import SimCSEModel
    from simcse_trainer.trainer import SimCSETrainer

# Imported when first asked for: loading a model needs no Trainer, asking the version no torch.
_LAZY = {
    "lora_config": "simcse_trainer.model.adapters",
    "SimCSE": "simcse_trainer.inference.simcse",
    "SimCSEModel": "simcse_trainer.model.modeling",
    "SimCSETrainer": "simcse_trainer.trainer",
    "SimCSETrainingArguments": "simcse_trainer.arguments",
}

__all__ = [
    "InputError",
    "SimCSE",
    "SimCSEModel",
    "SimCSETrainer",
    "SimCSETrainingArguments",
    "__version__",
    "lora_config",
]


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
