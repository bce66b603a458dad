"""Write the pages that say what stands elsewhere: `options.md` and the tables of `recipes.md`.

    python docs/generate.py

The options are those of `simcse_trainer.arguments`, the recipes the files of `configs/`.
"""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import yaml
from transformers import TrainingArguments

from simcse_trainer.arguments import DataArguments, ModelArguments, SimCSETrainingArguments

HERE = Path(__file__).parent
CONFIGS = HERE.parent / "configs"
COMMAND = "python docs/generate.py"
_WRITTEN = f"<!-- Written by `{COMMAND}`: edit that script, or what it reads. -->\n"

_SECTIONS = (
    ("The model", ModelArguments),
    ("The data", DataArguments),
    ("The training", SimCSETrainingArguments),
)
_OPTIONS_HEAD = """# Options

Every option can stand in a YAML file (`learning_rate: 3e-5`) and on the command line, which wins
(`--learning_rate 3e-5`). Options of several values take them one after the other
(`--train_file a.csv b.csv`), or as a YAML list. The file is the first word, or stands behind
`--config`. An unknown option is an error that names the nearest one, or the one that other tools
call so (`--lr`, `--epochs`, `--temp`).
"""
_INHERITED = """
Besides these, all options of transformers'
[`TrainingArguments`](https://huggingface.co/docs/transformers/main_classes/trainer) are there with
their own defaults: number of epochs or steps, schedule and warm-up, precision, evaluating, saving,
logging, the Hub. `python train_simcse.py --help` lists them with the others, in groups, and
`--help batch` those whose name or text has the word.
"""
_RECIPES_HEAD = """# Recipes

A recipe is a YAML file of [options](options.md). Give it to `simcse-trainer train` and change what
you like behind it; where there are several devices, to `accelerate launch train_simcse.py`:

```bash
simcse-trainer train configs/unsup_bert_base.yaml --seed 1 --output_dir outputs/seed1
```

Recipes are part of the package: where there is no checkout, their name is enough.

```bash
simcse-trainer train sup_bert_base --train_file my_pairs.csv --output_dir outputs/mine
```

Hyper-parameters of the BERT and RoBERTa recipes are those of the paper (appendix A); those of the
LoRA recipes are usual values that were not searched, but for gemma-3-270m. The large runs were not
repeated for this release: what was measured is in [measurements.md](measurements.md) and
[embedding_space.md](embedding_space.md). The batch is that of the whole run: divide it by the
number of devices. Memory is what `simcse-trainer plan` computes, with 1 GiB for what is no tensor.
What else there is to know of a recipe stands at its top.
"""
_LAUNCHERS_HEAD = """
## Configurations of accelerate

For `accelerate launch --config_file configs/accelerate/NAME.yaml train_simcse.py ...`:

| file | for |
|---|---|
"""


def main() -> None:
    """Write both pages."""
    for name, text in pages().items():
        (HERE / name).write_text(text, encoding="utf-8")


def pages() -> dict[str, str]:
    """File name -> what belongs in it."""
    return {"options.md": options_page(), "recipes.md": recipes_page()}


def options_page() -> str:
    """Our own options and those whose default we change, by class."""
    text = _WRITTEN + _OPTIONS_HEAD
    for title, options in _SECTIONS:
        text += f"\n## {title}\n\n| option | default | what it does |\n|---|---|---|\n"
        for field in _own_fields(options):
            choices = field.metadata.get("choices")
            listed = f" One of {', '.join(f'`{choice}`' for choice in choices)}." if choices else ""
            meaning = str(field.metadata["help"]).replace("|", "\\|") + listed
            text += f"| `{field.name}` | {_default(field)} | {meaning} |\n"
    return text + _INHERITED


def _own_fields(options: type) -> Iterator[dataclasses.Field[Any]]:
    inherited = {field.name: field for field in dataclasses.fields(TrainingArguments)}
    for field in dataclasses.fields(options):
        theirs = inherited.get(field.name)
        if theirs is None or theirs.metadata.get("help") != field.metadata.get("help"):
            yield field


def _default(field: dataclasses.Field[Any]) -> str:
    missing = field.default is dataclasses.MISSING
    value = field.default_factory() if missing else field.default
    if value is None or value == []:
        return ""
    if isinstance(value, bool):
        return f"`{str(value).lower()}`"
    return f"`{' '.join(map(str, value)) if isinstance(value, list) else value}`"


def recipes_page() -> str:
    """A row for every file of `configs/`."""
    header = ("recipe", "backbone", "trains", "data", "tokens", "batch", "learning rate", "epochs")
    text = _WRITTEN + _RECIPES_HEAD + f"\n| {' | '.join((*header, 'GPU memory'))} |\n"
    text += "|---" * (len(header) + 1) + "|\n"
    for path in sorted(CONFIGS.glob("*.yaml"), key=lambda path: path.name):
        options = yaml.safe_load(path.read_text(encoding="utf-8"))
        memory = re.search(r"GPU memory: ([\d.]+ GiB)", _comment(path))
        cells = [
            _link(path),
            options["model_name_or_path"],
            _what_trains(options),
            _data(options),
            options["max_seq_length"],
            options["per_device_train_batch_size"],
            options["learning_rate"],
            options.get("num_train_epochs") or f"{options['max_steps']} steps",
            memory[1] if memory else "",
        ]
        text += f"| {' | '.join(map(str, cells))} |\n"
    launchers = sorted(CONFIGS.glob("accelerate/*.yaml"))
    return text + _LAUNCHERS_HEAD + "".join(f"| {_link(p)} | {_comment(p)} |\n" for p in launchers)


def _what_trains(options: dict[str, Any]) -> str:
    if not options.get("use_lora"):
        return "everything"
    return "LoRA on 4 bits" if options.get("load_in_4bit") else "LoRA"


def _data(options: dict[str, Any]) -> str:
    name = options.get("dataset_name", "")
    return f"{name} {options.get('dataset_config_name') or options.get('train_file', '')}".strip()


def _link(path: Path) -> str:
    return f"[{path.stem}](../{path.relative_to(CONFIGS.parent).as_posix()})"


def _comment(path: Path) -> str:
    """The lines of comment that a file begins with, as one, without the command it is used by."""
    lines = path.read_text(encoding="utf-8").splitlines()
    count = next(i for i, line in enumerate(lines) if not line.startswith("#"))
    said = (line.removeprefix("#").strip() for line in lines[:count])
    return " ".join(line for line in said if not line.startswith("accelerate launch"))


if __name__ == "__main__":
    main()
