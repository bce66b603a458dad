"""Which files of a folder are published, and in what form; needs no torch.

A list of what is allowed: what the folder's manifest records, and in a folder without one what
loaders read. Whatever else is there stays where it is.
"""

from __future__ import annotations

import json
import os
import re
import shutil
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    ADAPTER_BASE,
    ADAPTER_CONFIG,
    CARD,
    CONFIG,
    DOCUMENTS,
    MANIFEST,
    MODULES,
    OLD_MANIFEST,
    RESULTS,
    RUN,
    STATE,
    TOKENIZER_CONFIG,
    TRAINING_ARGS,
    is_inside,
)
from simcse_trainer.hub.model_card import cut_paths
from simcse_trainer.model.io.manifest import Manifest, parse_manifest, read_manifest

# What transformers, peft, sentence-transformers and tokenizers read in the folder of a model, or of
# one of its modules.
_LOADED = re.compile(
    r"""config\.json | generation_config\.json | modules\.json
    | model(-\d{5}-of-\d{5})?\.safetensors | model\.safetensors\.index\.json
    | adapter_config\.json | adapter_model\.safetensors | simcse_adapter\.json
    | config_sentence_transformers\.json | sentence_[a-z0-9-]+_config\.json
    | tokenizer\.json | tokenizer_config\.json | special_tokens_map\.json | added_tokens\.json
    | vocab\.(txt|json) | merges\.txt | (tokenizer|spiece|sentencepiece(\.bpe)?)\.model
    | chat_template\.jinja | (pre)?processor_config\.json""",
    re.VERBOSE,
)
# An adapter that not every loader may find stands in one of these.
_ADAPTER_FOLDERS = ("lora", "adapter")
# What resuming reads, beside the files of a model. PyTorch's files are read with `weights_only`.
_RESUMED = re.compile(
    r"trainer_state\.json | training_run\.json | training_heads\.safetensors | training_args\.json"
    r"| optimizer\.(pt|bin) | (scheduler|scaler)\.pt | rng_state(_\d+)?\.pth"
    r"| pytorch_model_fsdp\.bin | checkpoint_files\.json",
    re.VERBOSE,
)
# DeepSpeed's own checkpoints are pickles that its engine executes when it reads them.
_DEEPSPEED = re.compile(r"global_step\d+/.*|latest|zero_to_fp32\.py")

# Files in which paths of this machine may stand anywhere, and keys of other files under which.
_REPORTS = (TRAINING_ARGS, STATE, RUN, *RESULTS)
_PATH_KEYS = re.compile(r".*(name_or_path|_file|_dir|_folder)|name")
_CONFIGS = (CONFIG, TOKENIZER_CONFIG, ADAPTER_CONFIG, ADAPTER_BASE)


def list_published(folder: Path, include: Iterable[str] = ()) -> list[str]:
    """Return the files of a model's folder that go to the Hub, with forward slashes.

    Args:
        folder: The folder of a model.
        include: Patterns of further files, relative to the folder: `*.md`, `onnx/**/*`.

    Raises:
        InputError: The manifest is malformed, or a pattern leads out of the folder.
    """
    manifest = find_record(folder)
    # A card that the user has written is the model's too.
    names = _list_loaded(folder) if manifest is None else [*sorted(manifest.model_files), CARD]
    found = dict.fromkeys(name for name in names if (folder / name).is_file())
    for pattern in include:
        found |= dict.fromkeys(_match(folder, pattern))
    return list(found)


def find_record(folder: Path) -> Manifest | None:
    """Return a folder's manifest, also of a checkpoint of version 0.1.0; None if there is none.

    Raises:
        InputError: The manifest is malformed.
    """
    manifest = read_manifest(folder)
    if manifest is None and (folder / OLD_MANIFEST).is_file():
        text = (folder / OLD_MANIFEST).read_text(encoding="utf-8")
        manifest = parse_manifest(text, str(folder / OLD_MANIFEST))
    return manifest


def is_deepspeed(name: str) -> bool:
    """Return whether a file of a training state is one that DeepSpeed reads."""
    return _DEEPSPEED.fullmatch(name) is not None


def is_resumed(name: str) -> bool:
    """Return whether a file may be fetched with a training state from the Hub.

    What the pattern does not know could be executed, or read by something else.
    """
    last = name.rsplit("/", 1)[-1]
    return bool(
        _RESUMED.fullmatch(name)
        or _LOADED.fullmatch(last)
        or last in DOCUMENTS
        or last.endswith(".py")  # only read with --trust_remote_code
        or name in ("best_model/training_heads.safetensors", MANIFEST)
    )


def link_files(
    folder: Path, target: Path, names: Iterable[str], *, base_model: str | None = None
) -> None:
    """Make a copy of files that outlives their deletion, without paths of this machine.

    Args:
        folder: The folder that holds the files.
        target: Where to; hard links where nothing has to be changed.
        names: Names of files in it, with forward slashes.
        base_model: The name on the Hub of what an adapter is for, instead of the one it has.
    """
    for name in names:
        path = target / name
        path.parent.mkdir(parents=True, exist_ok=True)
        text = _portable_text(folder / name, base_model)
        if text is None:
            _link(folder / name, path)
        else:
            path.write_text(text, encoding="utf-8")


def find_local_base(folder: Path, names: Iterable[str]) -> str | None:
    """Return the base of an adapter where that is a folder of this machine, else None."""
    for name in names:
        if name.rsplit("/", 1)[-1] == ADAPTER_CONFIG:
            base = _read(folder / name).get("base_model_name_or_path")
            if isinstance(base, str) and is_local(base):
                return base
    return None


def is_local(name: str) -> bool:
    """Return whether a model's name is a path here, and no name on the Hub."""
    return name.startswith((".", "~")) or "\\" in name or Path(name).exists() or os.path.isabs(name)


def _list_loaded(folder: Path) -> list[str]:
    found = [*_list_level(folder, ""), *DOCUMENTS]
    modules = _read(folder / MODULES, list)
    paths = [one.get("path") for one in modules if isinstance(one, dict)]
    adapters = [one for one in _ADAPTER_FOLDERS if (folder / one / ADAPTER_CONFIG).is_file()]
    for path in map(str, [*paths, *adapters]):
        if is_inside(path) and (folder / path).is_dir():
            found += _list_level(folder / path, f"{path}/")
    for name in (CONFIG, TOKENIZER_CONFIG):
        code = _read(folder / name).get("auto_map")
        for one in _texts(code):
            module = one.split(".")[0]
            if "--" not in one and module.isidentifier():
                found.append(f"{module}.py")
    return found


def _list_level(folder: Path, prefix: str) -> list[str]:
    names = sorted(path.name for path in folder.iterdir())
    return [prefix + name for name in names if _LOADED.fullmatch(name)]


def _match(folder: Path, pattern: str) -> list[str]:
    if not is_inside(pattern):
        raise InputError(
            f"--include {pattern!r} leads out of {folder}. Pass a pattern below it, such as '*.md'."
        )
    paths = sorted(path for path in folder.glob(pattern) if path.is_file())
    names = [path.relative_to(folder).as_posix() for path in paths]
    if not names:
        raise InputError(f"--include {pattern!r} matches no file in {folder}. Correct the pattern.")
    return names


def _portable_text(path: Path, base_model: str | None) -> str | None:
    """Return the contents without paths; None where the file can stay as it is."""
    name = path.name
    if name in _REPORTS:
        content = _read(path)
        portable = cut_paths(content)
    elif name in _CONFIGS:
        content = _read(path)
        portable = _cut_names(content)
        key = {ADAPTER_CONFIG: "base_model_name_or_path", ADAPTER_BASE: "name"}.get(name)
        if base_model is not None and key in content:
            portable = {**portable, key: base_model}
            # They are of the folder, not of the repository.
            portable |= {"revision": None} if "revision" in content else {}
    else:
        return None
    return (
        None if portable == content else json.dumps(portable, indent=2, ensure_ascii=False) + "\n"
    )


def _cut_names(content: Any, key: str = "") -> Any:
    if isinstance(content, dict):
        return {name: _cut_names(value, name) for name, value in content.items()}
    if isinstance(content, str) and _PATH_KEYS.fullmatch(key) and is_local(content):
        return Path(content.replace("\\", "/")).name
    return content


def _read(path: Path, kind: type = dict) -> Any:
    """Read a JSON file; empty where it is of another kind, or cannot be read."""
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return kind()
    return content if isinstance(content, kind) else kind()


def _texts(value: Any) -> Iterator[str]:
    if isinstance(value, str):
        yield value
    for one in (
        value.values() if isinstance(value, dict) else value if isinstance(value, list) else ()
    ):
        yield from _texts(one)


def _link(source: Path, target: Path) -> None:
    try:
        os.link(os.path.realpath(source), target)
    except OSError:  # file systems without links
        shutil.copy2(source, target)
