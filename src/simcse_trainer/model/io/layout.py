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
import logging
import re
from collections.abc import Callable
from dataclasses import dataclass, field, replace
from functools import partial
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor, zeros
from transformers import PreTrainedConfig

from simcse_trainer.errors import InputError
from simcse_trainer.files import CONFIG, MODULES, SENTENCE_BERT, SENTENCE_TRANSFORMERS, WEIGHTS
from simcse_trainer.model.io.lookup import find_file
from simcse_trainer.model.io.tensors import check_downloaded, explain_damage, read_json
from simcse_trainer.model.pooling import LAYER_PAIRS

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
        folder: A folder that exists already.
        layout: What the folder is to say.
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
        _write_json(folder / path / CONFIG, config)
        if weights:
            save_file(weights, folder / path / WEIGHTS)

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
        folder / MODULES,
        [
            {"idx": i, "name": str(i), "path": path, "type": kind}
            for i, (path, kind) in enumerate(modules)
        ],
    )
    reading: dict[str, Any] = {"max_seq_length": layout.max_seq_length, "do_lower_case": False}
    if quantization:
        reading["model_args"] = {"quantization_config": quantization}
    _write_json(folder / SENTENCE_BERT, reading)
    _write_json(
        folder / SENTENCE_TRANSFORMERS,
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

    def read(filename: str, parse: Callable[[Path], Any] = read_json) -> Any:
        path = find_file(name_or_path, filename, **hub)
        return None if path is None else parse(path)

    modules = read(MODULES, partial(read_json, kind=list))
    if modules is None:
        return None
    kinds = [_read_kind(module, name_or_path) for module in modules]
    # Only early versions wrote the backbone to a folder of its own.
    if not _MODULES.fullmatch("".join(f"{kind} " for kind in kinds)) or modules[0]["path"]:
        found = ", ".join(
            f"{module['path']} ({kind})" if "." in kind else module["path"] or kind
            for kind, module in zip(kinds, modules, strict=True)
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
        config: dict[str, Any] = read(f"{path}/{CONFIG}") or {}
        if not config and hub.get("assume_absent"):
            continue  # the caller says how it is read
        weights = read(f"{path}/{WEIGHTS}", read_tensors)
        layout = replace(layout, **_READ_MODULE[kind](config, weights, layout, name_or_path))
    reading: dict[str, Any] = next(filter(None, map(read, _TRANSFORMER_CONFIGS)), {})
    _check_settings(reading, "Transformer", name_or_path)
    length = reading.get("max_seq_length")
    if length is not None and not (isinstance(length, int) and length > 0):
        raise _malformed(f"max_seq_length {length!r}", "a number of tokens", name_or_path)
    said = read(SENTENCE_TRANSFORMERS) or {}
    _check_settings(said, "SentenceTransformer", name_or_path)
    texts = said.get("prompts") or {}
    if not isinstance(texts, dict) or not all(isinstance(x, str | None) for x in texts.values()):
        raise _malformed(f"prompts {texts!r}", "texts by their names", name_or_path)
    prompts = {name: text for name, text in texts.items() if text}
    default = prompts.pop(said.get("default_prompt_name") or "", None)
    if default and not layout.include_prompt:
        raise UnsupportedModulesError(
            f"'{name_or_path}' pools without the tokens of its default prompt (include_prompt "
            "false), which SimCSE does not. Use another checkpoint."
        )
    return replace(
        layout,
        max_seq_length=length,
        do_lower_case=reading.get("do_lower_case") is True,
        prompts=prompts,
        default_prompt=default,
    )


def _read_kind(module: Any, source: str) -> str:
    """Return what a module is: the name of its class, if it is sentence-transformers' own."""
    said = module if isinstance(module, dict) else {}
    kind, path = said.get("type"), said.get("path")
    if not isinstance(kind, str) or not isinstance(path, str):
        raise _malformed(f"the module {module!r} in {MODULES}", "a type and a path", source)
    own = kind.startswith("sentence_transformers.") or kind == REFUSED
    return kind.rsplit(".", 1)[-1] if own else kind


def _malformed(found: str, expected: str, source: str) -> InputError:
    return InputError(
        f"'{source}' has {found}; expected {expected}. Correct it, or download the model again."
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
        raise explain_damage(path, error) from None


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


def _read_pooling(config: dict[str, Any], _: Any, layout: Layout, source: str) -> dict[str, Any]:
    _check_settings(config, "Pooling", source)
    modes = config.get("pooling_mode")
    if modes is None:
        flags = {flag: mode for mode, flag in _POOLING_FLAGS.items()}
        modes = [
            flags.get(key, key) for key, on in config.items() if "_mode_" in key and on is True
        ]
    modes = [modes] if isinstance(modes, str) else modes
    if not isinstance(modes, list) or not all(isinstance(mode, str) for mode in modes):
        raise _malformed(
            f"the pooling_mode {modes!r}", f"one of {', '.join(_POOLING_FLAGS)}", source
        )
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
    config: dict[str, Any], weights: dict[str, Tensor] | None, _: Layout, source: str
) -> dict[str, Any]:
    _check_settings(config, "WeightedLayerPooling", source)
    if weights is None or "layer_weights" not in weights:
        raise UnsupportedModulesError(
            f"'{source}' averages layers, and their weights are not there as {WEIGHTS}. Use "
            "another checkpoint."
        )
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
    activation = str(config.get("activation_function") or "").rsplit(".", 1)[-1]
    if activation != "Tanh" or {*(weights or ())} != {"linear.bias", "linear.weight"}:
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


def _write_json(path: Path, content: Any) -> None:
    path.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")


logger = logging.getLogger(__name__)

# Where the layers of a family have two frequencies: its older names of the two.
_THETAS = {
    "gemma3_text": ("rope_theta", "rope_local_base_freq"),
    "modernbert": ("global_rope_theta", "local_rope_theta"),
}


def add_older_keys(path: Path) -> None:
    """Write the rotary positions of a `config.json` under their older names too.

    Older readers take 10,000 for a frequency that they do not find. A key that transformers itself
    would read otherwise is left out.

    Args:
        path: As transformers has just written it.
    """
    said = json.loads(path.read_text(encoding="utf-8"))
    older = _older_rope(said.get("model_type"), said.get("rope_parameters"))
    if not older:
        return
    expected, found = (_read(one) for one in (said, said | older))
    if any(found.get(name) != value for name, value in expected.items()):
        logger.warning(
            "%s: rope_parameters cannot be said under their older names; readers before "
            "transformers 5 compute other positions.",
            path,
        )
        return
    path.write_text(json.dumps(said | older, indent=2) + "\n", encoding="utf-8")


def _older_rope(family: Any, rope: Any) -> dict[str, Any]:
    if not isinstance(rope, dict):
        return {}
    if all(isinstance(one, dict) for one in rope.values()):
        if family not in _THETAS or {*rope} != {"full_attention", "sliding_attention"}:
            logger.warning(
                "The layers of a %s have rope_parameters of their own, which readers before "
                "transformers 5 do not know.",
                family,
            )
            return {}
        far, near = _THETAS[family]
        full, sliding = rope["full_attention"], rope["sliding_attention"]
        return {far: full["rope_theta"], near: sliding["rope_theta"], **_scaling(full)}
    older = {"rope_theta": rope["rope_theta"]} if "rope_theta" in rope else {}
    if "partial_rotary_factor" in rope:
        older["partial_rotary_factor"] = rope["partial_rotary_factor"]
    return older | _scaling(rope)


def _scaling(rope: dict[str, Any]) -> dict[str, Any]:
    if rope.get("rope_type", "default") == "default":
        return {}
    apart = ("rope_theta", "partial_rotary_factor")
    return {"rope_scaling": {k: v for k, v in rope.items() if k not in apart}}


def _read(said: dict[str, Any]) -> dict[str, Any]:
    """Read a configuration as transformers does."""
    from transformers import AutoConfig

    said = dict(said)
    config: PreTrainedConfig = AutoConfig.for_model(said.pop("model_type"), **said)
    return config.to_dict()
