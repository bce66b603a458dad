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
from dataclasses import dataclass, field, replace
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
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, zeros

from simcse_trainer.errors import InputError
from simcse_trainer.model.pooling import LAYER_PAIRS
from simcse_trainer.tensor_files import check_downloaded, explain_torn

TRANSFORMER = "sentence_transformers.models.Transformer"
POOLING = "sentence_transformers.models.Pooling"
LAYER_POOLING = "sentence_transformers.models.WeightedLayerPooling"
DENSE = "sentence_transformers.models.Dense"
NORMALIZE = "sentence_transformers.models.Normalize"
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


# What `Layout` can say, in order.
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
        normalize: Embeddings have the length 1.
        include_prompt: Tokens of a named prompt are pooled too.
        do_lower_case: Texts are put into small letters first; only read.
    """

    pooling_mode: str
    max_seq_length: int | None
    dense: dict[str, Tensor] | None
    prompts: dict[str, str] = field(default_factory=dict)
    default_prompt: str | None = None
    normalize: bool = False
    include_prompt: bool = True
    do_lower_case: bool = False


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
    if not layout.include_prompt:
        flags["include_prompt"] = False
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
    if layout.normalize:
        modules.append((f"{len(modules)}_Normalize", NORMALIZE))
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
    layout = Layout("mean", None, None, normalize="Normalize" in kinds)
    for kind, module in zip(kinds[1:], modules[1:], strict=True):
        path = module["path"]
        if kind == "Normalize":
            continue
        config: dict[str, Any] = read(f"{path}/config.json") or {}
        if not config and hub.get("assume_absent"):
            continue  # the caller says how it is read
        weights = read(f"{path}/model.safetensors", read_tensors)
        layout = replace(layout, **_READ_MODULE[kind](config, weights, layout, name_or_path))
    reading: dict[str, Any] = next(filter(None, map(read, _TRANSFORMER_CONFIGS)), {})
    _check_settings(reading, "Transformer", name_or_path)
    said = read("config_sentence_transformers.json") or {}
    _check_settings(said, "SentenceTransformer", name_or_path)
    prompts = {name: text for name, text in (said.get("prompts") or {}).items() if text}
    default = prompts.pop(said.get("default_prompt_name") or "", None)
    if default and not layout.include_prompt:
        raise UnsupportedModulesError(
            f"'{name_or_path}' pools without the tokens of its default prompt (include_prompt "
            "false), which SimCSE does not. Use another checkpoint."
        )
    return replace(
        layout,
        max_seq_length=reading.get("max_seq_length"),
        do_lower_case=reading.get("do_lower_case") is True,
        prompts=prompts,
        default_prompt=default,
    )


def read_tensors(path: Path) -> dict[str, Tensor]:
    """Return what a file of safetensors holds.

    Raises:
        InputError: A Git LFS pointer, or a damaged file.
    """
    check_downloaded(path)
    try:
        return load_file(path)
    except SafetensorError as error:
        raise explain_torn(path, error) from None


def _check_settings(config: dict[str, Any], kind: str, source: str) -> None:
    """Raise for a setting that would be dropped, and has another value than its default."""
    for name, value in config.items():
        known = _SETTINGS[kind].get(name, _UNKNOWN)
        if value in (None, {}, []) or known is _ANY or (known is not _UNKNOWN and value in known):
            continue
        raise UnsupportedModulesError(
            f"'{source}': its {kind} has {name} {json.dumps(value)}, which SimCSE does not know. "
            "Use another checkpoint."
        )


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


def _read_pooling(config: dict[str, Any], _: Any, layout: Layout, source: str) -> dict[str, Any]:
    _check_settings(config, "Pooling", source)
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
    pair = layout.pooling_mode in LAYER_PAIRS
    if pair and modes[0] != "mean":
        raise UnsupportedModulesError(
            f"'{source}' pools the mean of two layers by {modes[0]}; SimCSE only by mean. Use "
            "another checkpoint."
        )
    mode = layout.pooling_mode if pair else str(modes[0])
    return {"pooling_mode": mode, "include_prompt": config.get("include_prompt") is not False}


def _read_layer_pair(
    config: dict[str, Any], weights: dict[str, Tensor], _: Layout, source: str
) -> dict[str, Any]:
    _check_settings(config, "WeightedLayerPooling", source)
    found = weights["layer_weights"]
    used = found.nonzero()[:, 0].tolist()
    if not config.get("layer_start") and len(set(found[used].tolist())) == 1:
        for mode, pair in LAYER_PAIRS.items():
            if used == sorted(range(len(found))[layer] for layer in pair):
                return {"pooling_mode": mode}
    raise UnsupportedModulesError(
        f"'{source}' averages layers with the weights {found.tolist()}; SimCSE knows "
        f"{', '.join(LAYER_PAIRS)}. Use another checkpoint."
    )


def _read_dense(
    config: dict[str, Any], weights: dict[str, Tensor] | None, _: Layout, source: str
) -> dict[str, Any]:
    _check_settings(config, "Dense", source)
    activation = config.get("activation_function", "").rsplit(".", 1)[-1]
    if activation != "Tanh" or weights is None or "linear.bias" not in weights:
        raise UnsupportedModulesError(
            f"'{source}' has a Dense module with activation {activation or 'none'}; SimCSE's "
            "projection head is a linear layer with bias and Tanh, as safetensors. "
            "Use another checkpoint."
        )
    return {"dense": weights}


_READ_MODULE: dict[str, Callable[..., dict[str, Any]]] = {
    "WeightedLayerPooling": _read_layer_pair,
    "Pooling": _read_pooling,
    "Dense": _read_dense,
}
# Where any version of sentence-transformers keeps what its Transformer is told.
_TRANSFORMER_CONFIGS = tuple(
    f"sentence_{family}_config.json"
    for family in ("bert", "roberta", "distilbert", "camembert", "albert", "xlm-roberta", "xlnet")
)
_ANY, _UNKNOWN = object(), object()
_EMBEDDING = ("sentence_embedding",)
# Of each module the settings that are read here, or change nothing with the values given.
_SETTINGS: dict[str, dict[str, Any]] = {
    "Transformer": {
        **dict.fromkeys(("max_seq_length", "do_lower_case", "unpad_inputs", "model_args"), _ANY),
        "transformer_task": ("feature-extraction",),
        "module_output_name": ("token_embeddings",),
        "modality_config": (
            {"text": {"method": "forward", "method_output_name": "last_hidden_state"}},
        ),
    },
    "SentenceTransformer": {
        **dict.fromkeys(("__version__", "prompts", "default_prompt_name"), _ANY),
        "similarity_fn_name": _ANY,
        "model_type": ("SentenceTransformer",),
    },
    "Pooling": dict.fromkeys(
        (
            "pooling_mode",
            "pooling_mode_mean_sqrt_len_tokens",
            "include_prompt",
            "word_embedding_dimension",
            "embedding_dimension",
            *_POOLING_FLAGS.values(),
        ),
        _ANY,
    ),
    "WeightedLayerPooling": dict.fromkeys(
        ("word_embedding_dimension", "embedding_dimension", "layer_start", "num_hidden_layers"),
        _ANY,
    ),
    "Dense": {
        **dict.fromkeys(("in_features", "out_features", "bias", "activation_function"), _ANY),
        "module_input_name": _EMBEDDING,
        "module_output_name": _EMBEDDING,
        "use_residual": (False,),
    },
}


def _read_json(path: Path) -> Any:
    check_downloaded(path)
    try:
        return json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise explain_torn(path, error) from None


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
