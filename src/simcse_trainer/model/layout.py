"""The folder layout: what stands beside the backbone's own files, as data.

The layout is that of sentence-transformers in its oldest form, which all its versions load:

    modules.json                      the order of the modules
    sentence_bert_config.json         the maximal length
    config_sentence_transformers.json the similarity function
    1_Pooling/                        preceded by 1_WeightedLayerPooling/ where two layers are read
    2_Dense/                          the projection head, where inference uses it
"""

from __future__ import annotations

import json
import re
import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from huggingface_hub import (
    _CACHED_NO_EXIST,
    hf_hub_download,
    is_offline_mode,
    try_to_load_from_cache,
)
from huggingface_hub._tree_cache import read_tree_cache
from huggingface_hub.errors import (
    EntryNotFoundError,
    HFValidationError,
    LocalEntryNotFoundError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from safetensors.torch import load_file, save_file
from torch import Tensor, zeros

from simcse_trainer.errors import InputError
from simcse_trainer.model.pooling import LAYER_PAIRS

TRANSFORMER = "sentence_transformers.models.Transformer"
POOLING = "sentence_transformers.models.Pooling"
LAYER_POOLING = "sentence_transformers.models.WeightedLayerPooling"
DENSE = "sentence_transformers.models.Dense"
# No such class: sentence-transformers names it in its error, and gives no wrong embedding.
REFUSED = "simcse_trainer.BidirectionalAdapterToBeMergedFirst"

# The flags of Pooling's oldest form. "mean_sqrt_len_tokens" has no counterpart here.
_POOLING_FLAGS = {
    "cls": "pooling_mode_cls_token",
    "mean": "pooling_mode_mean_tokens",
    "max": "pooling_mode_max_tokens",
    "lasttoken": "pooling_mode_lasttoken",
    "weightedmean": "pooling_mode_weightedmean_tokens",
}


# What `Layout` can say, in order; cosines do not see whether the length is normalised.
_MODULES = re.compile(
    rf"(Transformer|{REFUSED.rsplit('.', 1)[-1]}) "
    r"(WeightedLayerPooling )?Pooling (Dense )?(Normalize )?"
)


class UnsupportedModulesError(InputError):
    """A folder of sentence-transformers that only sentence-transformers can compute."""


@dataclass(frozen=True)
class Layout:
    """What a folder says about its sentence embedding.

    Attributes:
        pooling_mode: How tokens become a sentence embedding.
        max_seq_length: In tokens, special ones included; None if the folder does not say.
        dense: State dict of the projection head (`linear.weight`, `linear.bias`), or None.
        prompts: Name -> text before a text, for who asks for it by name.
        default_prompt: The text before every text, where there is one; only read.
    """

    pooling_mode: str
    max_seq_length: int | None
    dense: dict[str, Tensor] | None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None


def write_layout(
    folder: Path,
    layout: Layout,
    *,
    hidden_size: int,
    num_layers: int,
    transformer: str = TRANSFORMER,
    quantization: dict[str, Any] | None = None,
) -> None:
    """Write everything but the backbone and the tokenizer.

    Args:
        folder: An existing folder.
        layout: What to write.
        hidden_size: D of the backbone.
        num_layers: Layers of the backbone.
        transformer: The class that is to load the backbone.
        quantization: How it is to be quantised, as `from_pretrained` takes it.
    """
    modules = [("", transformer)]

    def add(kind: str, config: dict[str, Any], weights: dict[str, Tensor] | None = None) -> None:
        path = f"{len(modules)}_{kind.rsplit('.', 1)[-1]}"
        modules.append((path, kind))
        (folder / path).mkdir(exist_ok=True)
        _write_json(folder / path / "config.json", config)
        if weights:
            save_file(weights, folder / path / "model.safetensors")

    token_pooling = layout.pooling_mode
    if pair := LAYER_PAIRS.get(layout.pooling_mode):
        token_pooling = "mean"
        weights = zeros(num_layers + 1)
        weights[list(pair)] = 1.0
        config = {"word_embedding_dimension": hidden_size, "layer_start": 0}
        add(LAYER_POOLING, config | {"num_hidden_layers": num_layers}, {"layer_weights": weights})
    flags = {flag: mode == token_pooling for mode, flag in _POOLING_FLAGS.items()}
    add(POOLING, {"word_embedding_dimension": hidden_size, **flags})
    if layout.dense is not None:
        out_features, in_features = layout.dense["linear.weight"].shape
        add(
            DENSE,
            {
                "in_features": in_features,
                "out_features": out_features,
                "bias": True,
                "activation_function": "torch.nn.modules.activation.Tanh",
            },
            layout.dense,
        )
    _write_json(
        folder / "modules.json",
        [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    reading: dict[str, Any] = {"max_seq_length": layout.max_seq_length, "do_lower_case": False}
    if quantization:
        reading["model_args"] = {"quantization_config": quantization}
    _write_json(folder / "sentence_bert_config.json", reading)
    _write_json(
        folder / "config_sentence_transformers.json",
        {"prompts": layout.prompts, "default_prompt_name": None, "similarity_fn_name": "cosine"},
    )


def read_layout(name_or_path: str, **hub: Any) -> Layout | None:
    """Read what `write_layout`, or any version of sentence-transformers, has written.

    Args:
        name_or_path: A folder, or a name on the Hub.
        hub: `revision` and `token`, and `assume_absent` of `find_file`.

    Returns:
        None if there is no `modules.json`: a plain backbone.

    Raises:
        UnsupportedModulesError: The folder has modules that SimCSE cannot represent.
    """

    def read(filename: str, parse: Callable[[Path], Any] = _read_json) -> Any:
        path = find_file(name_or_path, filename, **hub)
        return None if path is None else parse(path)

    modules = read("modules.json")
    if modules is None:
        return None
    kinds = [module["type"].rsplit(".", 1)[-1] for module in modules]
    # Only early versions wrote the backbone to a folder of its own.
    if not _MODULES.fullmatch("".join(f"{kind} " for kind in kinds)) or modules[0]["path"]:
        found = ", ".join(
            module["path"] or kind for kind, module in zip(kinds, modules, strict=True)
        )
        raise UnsupportedModulesError(
            f"'{name_or_path}' has the modules {found}; SimCSE models consist of Transformer, "
            "Pooling, Dense and Normalize, the last two optional. Use another checkpoint."
        )
    pooling_mode, dense, layer_pair = "mean", None, None
    for kind, module in zip(kinds[1:], modules[1:], strict=True):
        path = module["path"]
        if kind == "Normalize":
            continue
        config: dict[str, Any] = read(f"{path}/config.json") or {}
        if not config and hub.get("assume_absent"):
            continue  # the caller says how it is read
        if kind == "WeightedLayerPooling":
            layer_pair = _layer_pair(read(f"{path}/model.safetensors", load_file), name_or_path)
        elif kind == "Pooling":
            pooling_mode = _pooling_mode(config, name_or_path)
        elif kind == "Dense":
            dense = _dense(config, read(f"{path}/model.safetensors", load_file), name_or_path)
    length = (read("sentence_bert_config.json") or {}).get("max_seq_length")
    said = read("config_sentence_transformers.json") or {}
    prompts = {name: text for name, text in (said.get("prompts") or {}).items() if text}
    default = prompts.pop(said.get("default_prompt_name") or "", None)
    return Layout(layer_pair or pooling_mode, length, dense, prompts, default)


def find_file(
    name_or_path: str, filename: str, *, assume_absent: bool = False, **hub: Any
) -> Path | None:
    """Find an optional file of a folder or of a Hub repository.

    Args:
        name_or_path: A folder, or a name on the Hub.
        filename: With forward slashes.
        assume_absent: The caller does without it where nobody can say whether it is there.
        hub: `revision` and `token`.

    Returns:
        None only if the answer was that it is not there, or nothing is known of the model at all:
        loading the backbone then says so in full.

    Raises:
        InputError: Whether it is there could not be asked.
    """
    if Path(name_or_path).is_dir():
        return _find_here(Path(name_or_path, filename))
    revision = hub.get("revision")
    try:
        return Path(hf_hub_download(name_or_path, filename, **hub))
    except (RepositoryNotFoundError, RevisionNotFoundError, HFValidationError):
        return None
    except ValueError:
        return None  # no name of a repository
    except Exception as error:  # each layer of the client has its own; none of them is an answer
        if isinstance(error, EntryNotFoundError) and not isinstance(error, LocalEntryNotFoundError):
            return None
        reason = error
    known = try_to_load_from_cache(name_or_path, filename, revision=revision)
    if known is _CACHED_NO_EXIST or assume_absent:
        return None
    snapshot = _find_snapshot(name_or_path, revision)
    if snapshot is None and is_offline_mode():
        return None
    if snapshot is not None and not _may_hold(snapshot, filename):
        return None
    cause = " ".join(str(reason.__cause__ or reason).split())[:200].rstrip(".")
    raise InputError(
        f"Whether '{name_or_path}' has {filename} could not be asked ({cause}), and without it the "
        "model may be read wrongly. Try again with the Hub in reach; or say how it is read, "
        "--pooling_mode and --projection_head both, if you know that it has none."
    ) from reason


def _find_snapshot(name: str, revision: str | None) -> Path | None:
    """The folder in the Hub's cache with what is known of a model."""
    for filename in ("config.json", "modules.json", "adapter_config.json"):
        path = try_to_load_from_cache(name, filename, revision=revision)
        if isinstance(path, str):
            return Path(path).parent
    return None


def _may_hold(snapshot: Path, filename: str) -> bool:
    # What `hf download` has fetched comes with a list of all files.
    listed = read_tree_cache(str(snapshot.parents[1]), snapshot.name)
    return listed is None or filename in listed


def _find_here(path: Path) -> Path | None:
    try:
        return path if stat.S_ISREG(path.stat().st_mode) else None
    except (FileNotFoundError, NotADirectoryError):
        if path.is_symlink():
            raise InputError(
                f"{path} points to a file that is not there. Download the model again."
            ) from None
        return None
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}. Give access to it.") from None


def _pooling_mode(config: dict[str, Any], source: str) -> str:
    modes = config.get("pooling_mode")
    if modes is None:
        flags = {flag: mode for mode, flag in _POOLING_FLAGS.items()}
        modes = [
            flags.get(key, key) for key, on in config.items() if "_mode_" in key and on is True
        ]
    modes = [modes] if isinstance(modes, str) else list(modes)
    if len(modes) != 1 or modes[0] not in _POOLING_FLAGS:
        raise UnsupportedModulesError(
            f"'{source}' pools by {' + '.join(modes) or 'nothing'}; expected one of "
            f"{', '.join(_POOLING_FLAGS)}. Use another checkpoint."
        )
    return str(modes[0])


def _layer_pair(weights: dict[str, Tensor], source: str) -> str:
    used = weights["layer_weights"].nonzero()[:, 0].tolist()
    for mode, pair in LAYER_PAIRS.items():
        if used == sorted(range(len(weights["layer_weights"]))[layer] for layer in pair):
            return mode
    raise UnsupportedModulesError(
        f"'{source}' averages the layers {used}; SimCSE knows {', '.join(LAYER_PAIRS)}. "
        "Use another checkpoint."
    )


def _dense(
    config: dict[str, Any], weights: dict[str, Tensor] | None, source: str
) -> dict[str, Tensor]:
    activation = config.get("activation_function", "").rsplit(".", 1)[-1]
    if activation != "Tanh" or weights is None or "linear.bias" not in weights:
        raise UnsupportedModulesError(
            f"'{source}' has a Dense module with activation {activation or 'none'}; SimCSE's "
            "projection head is a linear layer with bias and Tanh, as safetensors. "
            "Use another checkpoint."
        )
    return weights


def _read_json(path: Path) -> Any:
    return json.loads(path.read_text(encoding="utf-8"))


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
