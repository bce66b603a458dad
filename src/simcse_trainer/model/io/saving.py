"""One folder, loaded by everyone: writing a SimCSE model.

The backbone and the tokenizer write their own files, `layout` the ones beside them. Checkpoints
also hold what only training uses, in `training_heads.safetensors`, so that a run can go on.
"""

from __future__ import annotations

import copy
import json
import logging
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any
from uuid import uuid4

import torch
from huggingface_hub import try_to_load_from_cache
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedModel

from simcse_trainer.errors import InputError
from simcse_trainer.files import (
    ADAPTER_BASE,
    ADAPTER_BESIDE,
    ADAPTER_CONFIG,
    ADAPTER_WEIGHTS,
    CONFIG,
    HIDDEN_ADAPTER,
    TRAINING_HEADS,
    WEIGHTS,
)
from simcse_trainer.model.backbone import load_quietly
from simcse_trainer.model.decoders import is_bidirectional
from simcse_trainer.model.finite import is_finite, not_finite
from simcse_trainer.model.heads import saved_heads
from simcse_trainer.model.io.adapter import BaseWeights, find_base, write_adapter
from simcse_trainer.model.io.folder import ForeignFilesError, list_files, make_tmp, replace_files
from simcse_trainer.model.io.layout import (
    REFUSED,
    TRANSFORMER,
    Layout,
    add_older_keys,
    read_layout,
    write_layout,
)
from simcse_trainer.model.io.tensors import follow_umask, writing_tensors
from simcse_trainer.model.io.terms import write_terms
from simcse_trainer.model.lora import (
    MergeError,
    active_adapter,
    fill,
    get_base_model,
    has_adapter,
    in_float32,
    merged_state,
    restore_adapter,
)
from simcse_trainer.model.pooling import LAYER_PAIRS
from simcse_trainer.model.quantization import describe_quantization, quantization_bits
from simcse_trainer.model.tokenizer import (
    choose_padding_token,
    count_word_embeddings,
    save_tokenizer,
)

logger = logging.getLogger(__name__)


@contextmanager
def replaced_at_once(folder: Path) -> Iterator[Path]:
    """Give a folder to write a model into, which then takes the place of the one in `folder`.

    Args:
        folder: Made if it is not there; other files in it stay.

    Raises:
        InputError: It holds files of the same names, or that would be loaded with the model, which
            no save has written.
    """
    tmp = make_tmp(folder, uuid4().hex[:16])
    try:
        yield tmp / "model"
        replace_files(tmp / "model", folder)
    except ForeignFilesError as error:
        raise InputError(f"{error} Save in another folder, or move them away.") from None
    finally:
        shutil.rmtree(tmp, ignore_errors=True)


def save_model(
    model: Any,
    folder: Path,
    *,
    training_heads: bool = False,
    state_dict: Mapping[str, Tensor] | None = None,
    lora_save: str | None = None,
) -> None:
    """Write the files of a model one by one. Two saves of one model are byte-identical.

    Args:
        model: The model, a `SimCSEModel`.
        folder: Made if it is not there.
        training_heads: Also write what only training uses, for resuming.
        state_dict: The model's, gathered from the processes where it is spread over them.
        lora_save: Of an adapted model: `adapter`, `merged`, or `both`: merged, and the adapter in
            `adapter/`. By default that of `choose_lora_save`.

    Raises:
        InputError: Merged weights of few bits; or, a `MergeError`, the adapter cannot be merged, or
            the merged model embeds texts otherwise.
        OSError: It cannot be written, as on a full disk.
        RuntimeError: The state is that of a process which holds none of it.
    """
    if state_dict is not None and not state_dict:
        raise RuntimeError("this process was given no weights to save")
    state = model.state_dict() if state_dict is None else state_dict
    _check_finite(model, state)
    form = choose_lora_save(model, lora_save)
    if form in ("merged", "both") and state_dict is not None:
        logger.warning("Weights that are spread over processes are not merged: see %s.", folder)
        form = "adapter"
    as_adapter = form == "adapter"
    with writing_tensors(folder):
        _write(model, folder, state, as_adapter=as_adapter, training_heads=training_heads)
        if form == "both":
            _write(model, folder / ADAPTER_BESIDE, state, as_adapter=True, training_heads=False)
    follow_umask(folder)
    if has_adapter(model.backbone) and form != "adapter" and model.tokenizer is not None:
        _check_merged(model, folder)


def save_trained_model(
    model: Any,
    folder: Path,
    *,
    in_checkpoint: bool,
    state_dict: Mapping[str, Tensor] | None,
    lora_save: str | None,
) -> None:
    """Write the model of a run.

    Where merging fails, the adapter is written in its place: it is all that the run has learned.
    The model remembers that, for the card and the next save.

    Args:
        model: The model, a `SimCSEModel`.
        folder: As `save_model` takes it.
        in_checkpoint: A checkpoint is for going on, and for little space: it holds what only
            training uses, and of an adapted model the adapter.
        state_dict: As `save_model` takes it.
        lora_save: As `save_model` takes it.

    Raises:
        InputError: As `save_model`.
    """
    if in_checkpoint and has_adapter(model.backbone):
        lora_save = "adapter"
    save = partial(
        save_model,
        model,
        folder,
        training_heads=in_checkpoint,
        state_dict=state_dict,
        lora_save=lora_save,
    )
    try:
        save()
    except MergeError as error:
        logger.warning("%s The adapter is saved in its place.", error)
        model.cannot_merge = True
        shutil.rmtree(folder)
        save()


# A few texts of several lengths and scripts, to compare two models by.
_PROBE_TEXTS = ("A woman is reading.", "12 kg of rice", "서울은 오늘 비가 온다.", "a")


def _check_merged(model: Any, folder: Path) -> None:
    """Read a merged model again and compare it with the one that has the adapter.

    Both compute in float32: in 16 bits either of them is a few percent off itself in another batch.
    """
    dtype = get_base_model(model.backbone).dtype
    exact = dtype in (torch.float32, torch.float64)
    with in_float32(model):
        expected = model.encode(_PROBE_TEXTS)
    saved = type(model).from_pretrained(
        folder,
        dtype=dtype if exact else torch.float32,
        padding_free=False,
        # Code that came with the base is at work in this process already.
        trust_remote_code=bool(getattr(model.config, "auto_map", None)),
    )
    found = saved.encode(_PROBE_TEXTS)
    off = float((found - expected).abs().max() / expected.abs().max())
    if not off <= (1e-3 if exact else 5e-2):
        raise MergeError(
            f"The merged model computes something else than the adapter on its base: embeddings "
            f"are {off:.2g} of their size apart. It was not kept."
        )


def choose_lora_save(model: Any, asked: str | None) -> str | None:
    """Choose what is written of an adapted model; None if it has no adapter.

    By default the adapter: it is small. Only that of a decoder that attends to both sides is
    merged, because sentence-transformers and `AutoModel` cannot load it. Once a merge has failed,
    it is the adapter whatever was asked.

    Raises:
        InputError: Merged weights of few bits, or no adapter to merge.
    """
    if not has_adapter(model.backbone):
        if asked is not None:
            raise InputError(f"lora_save is '{asked}', but the model has no adapter: --use_lora.")
        return None
    active_adapter(model.backbone)
    _check_rows(model)
    if model.cannot_merge:
        return "adapter"
    bits = quantization_bits(get_base_model(model.backbone))
    if bits is not None and asked in ("merged", "both"):
        raise InputError(
            f"lora_save is '{asked}', but an adapter cannot be added to weights of {bits} bits. "
            "Leave it out, and merge afterwards: simcse-trainer merge OUTPUT_DIR NEW_DIR."
        )
    if asked is not None or bits is not None:
        return asked or "adapter"
    return "merged" if is_bidirectional(model.config) else "adapter"


def find_source(model: Any) -> Path | None:
    """Return the folder that a model was loaded from, of an adapted one its base; None elsewhere.

    What is saved there, or deleted, is what an adapter cannot do without.
    """
    base = model.base_weights if has_adapter(model.backbone) else None
    name = base.name if base is not None else get_base_model(model.backbone).config._name_or_path
    return Path(name).resolve() if name and Path(name).is_dir() else None


def check_base_stays(model: Any, folder: Path, lora_save: str | None) -> None:
    """Refuse to put an adapter in the place of the weights that it is for.

    Raises:
        InputError: The folder holds the adapter's base.
    """
    form = choose_lora_save(model, lora_save)
    if form in ("adapter", "both") and find_source(model) == folder.resolve():
        raise InputError(
            f"{folder} holds the base model of this adapter, which is nothing without it. Save in "
            "another folder, or the merged model alone: lora_save='merged'."
        )


def _check_finite(model: Any, state: Mapping[str, Tensor]) -> None:
    for name, _ in model.named_parameters():
        tensor = state.get(name)
        if tensor is not None and tensor.is_floating_point() and not is_finite(tensor):
            raise not_finite(f"The weight {name}", tensor.dtype)


def _read_cached_config(name: str, revision: str | None) -> dict[str, Any]:
    """Read a model's configuration where it is on this machine: a save asks no Hub."""
    path: Any = Path(name, CONFIG)
    if not Path(name).is_dir():
        with suppress(ValueError):  # no name of a repository
            path = try_to_load_from_cache(name, CONFIG, revision=revision)
    if not isinstance(path, str | Path) or not Path(path).is_file():
        return {}
    said: dict[str, Any] = json.loads(Path(path).read_text(encoding="utf-8"))
    return said


def _check_rows(model: Any) -> None:
    """Refuse an adapter on more word embeddings than its base has: it does not hold them."""
    config = get_base_model(model.backbone).config
    base = model.base_weights or BaseWeights(config._name_or_path)
    said = _read_cached_config(find_base(base), base.revision)
    rows, found = said.get("vocab_size"), count_word_embeddings(model.backbone)
    if rows is not None and found is not None and rows != found:
        raise InputError(
            f"The model has {found} word embeddings and its base '{base.name}' {rows}: an adapter "
            "does not hold the others. Save the resized model first, in a folder of its own, and "
            "put the adapter on that."
        )


def restore_model(model: Any, folder: Path) -> None:
    """Load weights of a checkpoint into a model of its kind, the training-only heads among them.

    The backbone is read by the class that is in memory: neither code nor an adapter's base is
    loaded a second time. Parameters may be spread over processes; all of them have to call.

    Raises:
        InputError: The checkpoint holds another model.
    """
    try:
        if has_adapter(model.backbone):
            hidden = folder / HIDDEN_ADAPTER
            restore_adapter(model.backbone, hidden if hidden.is_dir() else folder)
            weights = {}
        else:
            weights = _read_backbone(model, folder)
        _restore(model, weights | _read_heads(folder))
    except (RuntimeError, OSError, ValueError) as error:
        raise InputError(
            f"{folder} holds another model than the one in training. Resume with the options it "
            f"was trained with. ({str(error).splitlines()[-1].strip()})"
        ) from error


def _read_backbone(model: Any, folder: Path) -> dict[str, Tensor]:
    backbone = get_base_model(model.backbone)
    config = copy.deepcopy(backbone.config)
    loaded = load_quietly(type(backbone), str(folder), config=config, dtype=backbone.dtype)
    return {f"backbone.{name}": tensor for name, tensor in loaded.state_dict().items()}


def _read_heads(folder: Path) -> dict[str, Tensor]:
    heads, layout = saved_heads(str(folder), {}), read_layout(str(folder))
    if layout is not None and layout.dense is not None:
        heads |= {n.replace("linear.", "head.dense."): x for n, x in layout.dense.items()}
    return heads


def _restore(model: Any, weights: Mapping[str, Tensor]) -> None:
    own = model.state_dict()
    trained = {name for name, x in model.named_parameters() if not _is_of_the_base(name, x)}
    if has_adapter(model.backbone):
        trained = {name for name in trained if not name.startswith("backbone.")}
    missing = sorted(trained - {*weights})
    # A pooling layer that the model in training does without is read along.
    unknown = [n for n in weights if n not in own and not n.startswith("backbone.pooler.")]
    if unknown or missing:
        raise RuntimeError(f"it differs in {', '.join([*unknown, *missing][:5])}")
    fill({name: own[name] for name in weights if name in own}, weights)


def _write(
    model: Any,
    folder: Path,
    state: Mapping[str, Tensor],
    *,
    as_adapter: bool,
    training_heads: bool,
) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    backbone, head = _part(state, "backbone."), _part(state, "head.")
    exported = head if model.mlp_only_train is False else {}
    if as_adapter:
        write_adapter(model.backbone, folder, backbone, model.base_weights)
    else:
        if has_adapter(model.backbone):
            backbone = dict(merged_state(model.backbone))
        sizes = {*exported["dense.weight"].shape} if exported else ()
        fits = len(sizes) == 1 and has_tanh_pooler(get_base_model(model.backbone))
        if fits and model.pooling_mode == "cls":
            # As the released checkpoints do: AutoModel's pooler_output is the sentence embedding.
            backbone |= {f"pooler.{name}": tensor for name, tensor in exported.items()}
        _save_backbone(model, folder, backbone)
    _write_beside(model, folder, exported, as_adapter=as_adapter)
    if training_heads:
        _save_training_heads(model, folder, state)


def _write_beside(
    model: Any,
    folder: Path,
    exported: Mapping[str, Tensor],
    *,
    as_adapter: bool,
    pooling_mode: str | None = None,
) -> None:
    """Write the tokenizer, the layout and what a licence asks for: all but the backbone."""
    if model.tokenizer is not None:
        choose_padding_token(model.tokenizer, model.config)
        save_tokenizer(model.tokenizer, folder, model.max_seq_length)
    dense = {name.replace("dense.", "linear."): tensor for name, tensor in exported.items()}
    refused = as_adapter and is_bidirectional(model.config)
    write_layout(
        folder,
        Layout(
            pooling_mode or model.pooling_mode,
            model.max_seq_length,
            dense or None,
            model.prompts,
            normalize=model.normalize_embeddings,
            include_prompt=model.include_prompt,
        ),
        hidden_size=model.config.hidden_size,
        num_layers=model.config.num_hidden_layers,
        transformer=REFUSED if refused else TRANSFORMER,
        quantization=describe_quantization(get_base_model(model.backbone)) if as_adapter else None,
    )
    if model.terms is not None:
        write_terms(model.terms, folder)


def save_without_weights(model: Any, folder: Path, pooling_mode: str) -> None:
    """Write all of a model but the weights of its backbone, beside what stands in for that.

    Args:
        model: The model, a `SimCSEModel` without an adapter.
        folder: A folder that is there.
        pooling_mode: How the token embeddings of the stand-in are pooled.
    """
    head = _part(model.state_dict(), "head.") if model.mlp_only_train is False else {}
    _write_beside(model, folder, head, as_adapter=False, pooling_mode=pooling_mode)
    config = copy.deepcopy(model.config)
    config.architectures = [type(model.backbone).__name__]
    config.save_pretrained(folder)
    add_older_keys(folder / CONFIG)


def list_model_files(model: Any, lora_save: str | None = None) -> list[str]:
    """Return the names of the files that `save_model` would write.

    Args:
        model: The model, a `SimCSEModel`.
        lora_save: As `save_model` takes it.

    Raises:
        InputError: For the reasons of `save_model`.
    """
    form = choose_lora_save(model, lora_save)
    if form != "both":
        return _list_files(model, as_adapter=form == "adapter")
    beside = _list_files(model, as_adapter=True)
    merged = _list_files(model, as_adapter=False)
    return [*merged, *(f"{ADAPTER_BESIDE}/{name}" for name in beside)]


def _list_files(model: Any, *, as_adapter: bool) -> list[str]:
    head = _part(model.state_dict(), "head.") if model.mlp_only_train is False else {}
    # What a tokenizer writes, only writing it tells.
    with TemporaryDirectory() as tmp:
        _write_beside(model, Path(tmp), head, as_adapter=as_adapter)
        names = list_files(Path(tmp))
    config = model.config
    if as_adapter:
        place = f"{HIDDEN_ADAPTER}/" if is_bidirectional(config) else ""
        adapter = (ADAPTER_CONFIG, ADAPTER_WEIGHTS)
        return [*names, ADAPTER_BASE, *(place + name for name in adapter)]
    code = (getattr(config, "auto_map", None) or {}).values()
    own = {f"{str(one).split('--')[-1].split('.')[0]}.py" for one in code}
    return [*names, CONFIG, WEIGHTS, *sorted(own)]


def _part(state: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    return {
        name.removeprefix(prefix): tensor.detach().contiguous()
        for name, tensor in state.items()
        if name.startswith(prefix)
    }


def _save_backbone(model: Any, folder: Path, state: dict[str, Tensor]) -> None:
    backbone = get_base_model(model.backbone)
    config = backbone.config
    read_layers = config.output_hidden_states
    config.output_hidden_states = model.pooling_mode in LAYER_PAIRS
    backbone.save_pretrained(folder, state_dict=state)
    config.output_hidden_states = read_layers
    add_older_keys(folder / CONFIG)


def _save_training_heads(model: Any, folder: Path, state: Mapping[str, Tensor]) -> None:
    """Save what the rest of the folder does not hold; named_parameters lists shared ones once."""
    prefixes = ("mlm_head.",) if model.mlp_only_train is False else ("mlm_head.", "head.")
    names = [
        name
        for name, x in model.named_parameters()
        if name.startswith(prefixes) and not _is_of_the_base(name, x)
    ]
    if names:
        heads = {name: state[name].detach().contiguous() for name in names}
        save_file(heads, folder / TRAINING_HEADS)


def _is_of_the_base(name: str, parameter: Tensor) -> bool:
    """Return whether it is a frozen output layer, which the base model has, and no checkpoint."""
    return name.startswith("mlm_head.") and not parameter.requires_grad


def has_tanh_pooler(backbone: PreTrainedModel) -> bool:
    """Return whether `AutoModel` of this family has a pooling layer of a linear layer and tanh."""
    with torch.device("meta"):
        names = dict(type(backbone)(backbone.config).named_parameters())
    weight = names.get("pooler.dense.weight")
    size = backbone.config.hidden_size
    return weight is not None and weight.shape == (size, size)
