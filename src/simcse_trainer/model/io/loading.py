"""Load the parts of a model, wherever it comes from; they do not know the class."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from transformers import AutoConfig, AutoModel, AutoTokenizer, PreTrainedTokenizerBase

from simcse_trainer.errors import InputError
from simcse_trainer.files import TOKENIZER_CONFIG
from simcse_trainer.model.backbone import explain_code, first_position, load_backbone
from simcse_trainer.model.choices import PROJECTION_HEADS
from simcse_trainer.model.decoders import default_pooling, is_decoder, pad_on_the_right
from simcse_trainer.model.heads import (
    MLMHead,
    ProjectionHead,
    load_head,
    load_mlm_head,
    saved_heads,
)
from simcse_trainer.model.io.adapter import (
    AdapterFolder,
    BaseWeights,
    check_base,
    describe_base,
    find_base,
    read_adapter,
)
from simcse_trainer.model.io.layout import Layout, read_layout
from simcse_trainer.model.io.lookup import find_file
from simcse_trainer.model.io.manifest import check_complete
from simcse_trainer.model.io.resolve import resolve_model
from simcse_trainer.model.io.terms import Terms, read_terms
from simcse_trainer.model.lora import add_adapter, load_adapter
from simcse_trainer.model.tokenizer import (
    TEXT,
    apply_prompt,
    choose_padding_token,
    ends_by_itself,
    lower_case,
)

if TYPE_CHECKING:
    from peft import LoraConfig

logger = logging.getLogger(__name__)

# What tokenizers and configurations say when they know no limit is some number above this.
_UNLIMITED = 10**9

# The original project's checkpoints carry a trained pooler either way and no sentence-transformers
# files; only the name tells that the unsupervised ones are to be read before it.
_RELEASED = {"unsup-simcse-": "none", "sup-simcse-": "pooler"}


@dataclass
class ModelComponents:
    """The parts of a model, by the names that `SimCSEModel` takes them by."""

    backbone: Any
    tokenizer: PreTrainedTokenizerBase
    pooling_mode: str
    head: ProjectionHead | None
    mlp_only_train: bool | None
    mlm_head: MLMHead | None
    max_seq_length: int
    padding_free: bool
    normalize_embeddings: bool
    prompts: dict[str, str]
    include_prompt: bool
    base_weights: BaseWeights | None = None
    terms: Terms | None = None


def load_components(
    name_or_path: str,
    *,
    pooling_mode: str | None = None,
    projection_head: str | None = None,
    mlp_only_train: bool | None = None,
    mlm_head: bool = False,
    max_seq_length: int | None = None,
    padding_free: bool = True,
    normalize_embeddings: bool | None = None,
    prompt: str | None = None,
    append_eos_token: bool | None = None,
    lora: LoraConfig | None = None,
    load_in_4bit: bool | None = None,
    load_in_8bit: bool | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    token: str | bool | None = None,
    **options: Any,
) -> ModelComponents:
    """Load the parts of a model; the arguments are those of `SimCSEModel.from_pretrained`.

    Raises:
        InputError: Nothing there, or something that SimCSE cannot represent.
    """
    hub = {"revision": revision, "token": token}
    # Then no file that could not be asked for would tell anything else.
    said = pooling_mode is not None and projection_head is not None
    trust, manifest = _pop_trust(options), check_complete(Path(name_or_path))
    source = _find_source(resolve_model(name_or_path), base_model, hub, said)
    options["bits"] = _choose_bits(source, load_in_4bit, load_in_8bit)
    projection_head = _check_head(projection_head, source)
    options |= {"pooling_layer": projection_head == "pooler", "refuse_parts": lora is not None}
    backbone = _load_backbone(source, **trust, **options)
    tokenizer = _load_tokenizer(source, trust, prompt, append_eos_token, backbone)
    saved = saved_heads(source.path, {**hub, "assume_absent": said})
    pooling_mode = pooling_mode or default_pooling(source.layout, backbone.config)
    head, decided = load_head(backbone, source.layout, saved, projection_head, pooling_mode)
    layout = source.layout
    components = ModelComponents(
        backbone=_adapt(backbone, source, lora, without_pooler=projection_head != "pooler"),
        tokenizer=tokenizer,
        pooling_mode=pooling_mode,
        head=head,
        mlp_only_train=decided if mlp_only_train is None else mlp_only_train,
        mlm_head=load_mlm_head(
            backbone, source.base_path, saved, mlm_head, source.base_hub | trust
        ),
        max_seq_length=choose_max_length(max_seq_length, layout, backbone, tokenizer),
        padding_free=padding_free,
        normalize_embeddings=bool(
            layout and layout.normalize if normalize_embeddings is None else normalize_embeddings
        ),
        prompts=dict(layout.prompts) if layout else {},
        include_prompt=layout.include_prompt if layout else True,
        terms=read_terms(backbone.config, source.base_path, source.base_hub),
    )
    if source.adapter is not None or lora is not None:
        known = source.adapter.base.sha256 if source.adapter else None  # checked, if there is one
        components.base_weights = describe_base(
            source.base_path, backbone, source.base_hub, sha256=known
        )
    if check_complete(Path(name_or_path)) != manifest:
        raise InputError(f"'{name_or_path}' was replaced while it was read. Load it again.")
    return components


def load_tokenizer(
    name_or_path: str,
    *,
    max_seq_length: int | None = None,
    prompt: str | None = None,
    append_eos_token: bool | None = None,
    base_model: str | None = None,
    revision: str | None = None,
    trust_remote_code: bool = False,
) -> tuple[PreTrainedTokenizerBase, int]:
    """Load a model's tokenizer as `load_components` does, without the model's weights.

    Args:
        name_or_path: A folder, a name on the Hub, or an installed model package.
        max_seq_length: As asked for, in tokens.
        prompt: The template around every text.
        append_eos_token: End every text with the end-of-text token.
        base_model: The base model of an adapter.
        revision: Branch, tag or commit on the Hub.
        trust_remote_code: Run model code that comes with the model.

    Returns:
        The tokenizer, and the length at which it cuts, in tokens.

    Raises:
        InputError: Nothing there, or something that SimCSE cannot represent.
    """
    hub, trust = {"revision": revision}, {"trust_remote_code": trust_remote_code}
    source = _find_source(resolve_model(name_or_path), base_model, hub, False)
    try:
        config = AutoConfig.from_pretrained(source.base_path, **source.base_hub, **trust)
        with torch.device("meta"):
            backbone = AutoModel.from_config(config, **trust)
    except (OSError, ValueError, ImportError) as error:
        raise InputError(
            explain_code(source.base_path, error)
            or f"No model could be read from '{name_or_path}': {str(error).strip().splitlines()[0]}"
        ) from error
    tokenizer = _load_tokenizer(source, trust, prompt, append_eos_token, backbone)
    return tokenizer, choose_max_length(max_seq_length, source.layout, backbone, tokenizer)


def _pop_trust(options: dict[str, Any]) -> dict[str, bool]:
    return {"trust_remote_code": bool(options.pop("trust_remote_code", False))}


@dataclass(frozen=True)
class _Source:
    """Where a model's parts are.

    Attributes:
        path: What was named: tokenizer, layout, heads, and the adapter or the backbone.
        hub: `revision` and `token` of it.
        layout: Its own, else that of an adapter's base.
        adapter: If it is one.
        base_path: The backbone: `path` itself, or an adapter's base.
        base_hub: `revision` and `token` of that.
    """

    path: str
    hub: dict[str, Any]
    layout: Layout | None
    adapter: AdapterFolder | None
    base_path: str
    base_hub: dict[str, Any]


def _find_source(
    path: str, base_model: str | None, hub: dict[str, Any], assume_absent: bool
) -> _Source:
    asking = hub | {"assume_absent": assume_absent}
    layout, adapter = read_layout(path, **asking), read_adapter(path, hub)
    if adapter is None:
        if base_model is not None:
            raise InputError(f"base_model is given, but '{path}' is no adapter. Leave it out.")
        return _Source(path, hub, layout, None, path, hub)
    base_path = resolve_model(base_model) if base_model else find_base(adapter.base)
    base_hub = hub | {"revision": None if base_model else adapter.base.revision}
    asking = base_hub | {"assume_absent": assume_absent}
    return _Source(
        path, hub, layout or read_layout(base_path, **asking), adapter, base_path, base_hub
    )


def _choose_bits(source: _Source, four: bool | None, eight: bool | None) -> int | None:
    if four or eight:
        return 4 if four else 8
    adapter_asks = source.adapter is not None and four is None and eight is None
    return source.adapter.base.bits if adapter_asks and source.adapter else None


def _check_head(projection_head: str | None, source: _Source) -> str | None:
    if projection_head not in (None, *PROJECTION_HEADS):
        expected = ", ".join(PROJECTION_HEADS)
        raise InputError(f"projection_head is '{projection_head}'; expected one of {expected}.")
    if projection_head is not None or source.layout is not None:
        return projection_head
    name = Path(source.path).name
    return next((head for prefix, head in _RELEASED.items() if name.startswith(prefix)), None)


def _load_backbone(source: _Source, **options: Any) -> Any:
    if source.adapter is None:
        return load_backbone(source.base_path, **source.base_hub, **options)
    options["refuse_parts"] = True
    if source.adapter.base.bidirectional:
        options.setdefault("bidirectional_attention", True)
    try:
        backbone = load_backbone(source.base_path, **source.base_hub, **options)
    except InputError as error:
        raise InputError(
            f"The adapter in '{source.path}' needs its base model. {error} Where that is elsewhere "
            "now, pass --base_model with its folder or name."
        ) from error
    check_base(source.adapter.base, source.base_path, source.path, source.base_hub)
    return backbone


def _adapt(backbone: Any, source: _Source, lora: LoraConfig | None, *, without_pooler: bool) -> Any:
    if source.adapter is None:
        return backbone if lora is None else add_adapter(backbone, lora)
    if lora is not None:
        logger.info("The adapter in %s is trained on, with its own rank and layers.", source.path)
    return load_adapter(
        backbone,
        source.path,
        is_trainable=lora is not None,
        without_pooler=without_pooler,
        subfolder=source.adapter.subfolder,
        **source.hub,
    )


def _load_tokenizer(
    source: _Source,
    trust: dict[str, bool],
    prompt: str | None,
    append_eos: bool | None,
    backbone: Any,
) -> PreTrainedTokenizerBase:
    """Load the folder's tokenizer, or the base's; with the prompt and end of text as asked for."""
    # A whole model has its own; an adapter may leave it to its base.
    own = source.adapter is None or (
        find_file(source.path, TOKENIZER_CONFIG, **source.hub) is not None
    )
    path, hub = (source.path, source.hub) if own else (source.base_path, source.base_hub)
    try:
        tokenizer: PreTrainedTokenizerBase = AutoTokenizer.from_pretrained(path, **hub, **trust)
    except (
        *(OSError, ValueError, ImportError, RuntimeError, KeyError),
        *(TypeError, AttributeError),  # of malformed files
    ) as error:
        raise InputError(
            explain_code(path, error)
            or f"No tokenizer could be loaded from '{path}': {str(error).strip().splitlines()[0]} "
            "A model folder needs its tokenizer files beside config.json."
        ) from error
    if append_eos is None:
        # A text that ends with a special token already needs no second one.
        append_eos = (
            source.layout is None and is_decoder(backbone.config) and not ends_by_itself(tokenizer)
        )
    if source.layout is not None and source.layout.do_lower_case:
        tokenizer = lower_case(tokenizer)
    default = source.layout.default_prompt if source.layout else None
    if default:
        tokenizer = apply_prompt(tokenizer, default + TEXT, append_eos=append_eos)
    tokenizer = apply_prompt(tokenizer, prompt, append_eos=append_eos)
    choose_padding_token(tokenizer, backbone.config)
    pad_on_the_right(tokenizer, backbone, path, trained=source.layout is not None)
    return tokenizer


def choose_max_length(
    asked: int | None, layout: Layout | None, backbone: Any, tokenizer: PreTrainedTokenizerBase
) -> int:
    """Return what is asked for, else what the folder says, else the most that the model can take.

    Raises:
        InputError: More is asked for than the backbone can take, or too little.
    """
    positions = getattr(backbone.config, "max_position_embeddings", None) or _UNLIMITED
    # Of XLNet it is -1.
    available = positions - first_position(backbone) if positions > 0 else _UNLIMITED
    around = len(tokenizer("")["input_ids"])
    if asked is not None and not max(2, around + 1) <= asked <= available:
        raise InputError(
            f"max_seq_length is {asked}; this backbone takes 2 to {available}, and prompt "
            f"and special tokens take {around} of them."
        )
    said = layout.max_seq_length if layout is not None else None
    tokenizer_limit = min(available, tokenizer.model_max_length)
    default = tokenizer_limit if tokenizer_limit < _UNLIMITED else 512
    return min(asked or said or default, available)
