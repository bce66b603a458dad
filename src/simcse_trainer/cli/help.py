"""`--help`, and `--help WORD`: the options whose name or text has the word.

Training has over a hundred options, most of them the Trainer's, which names no groups: they are
grouped here by their names.
"""

from __future__ import annotations

import argparse
import difflib
import re
import shutil
import textwrap
from collections.abc import Iterable, Sequence

from simcse_trainer.errors import InputError

HELP = ("-h", "--help")

# Heading -> names, as a regular expression; the first that matches a whole name counts.
_GROUPS = {
    "Adapters and few bits": r"(use_|no_)?(lora|dora|rslora).*|load_in_.bit|liger.*",
    "The Hub": r".*hub.*|model_card_template|language|license",
    "The data": r"train_file|dataset.*|columns|nli_triplets|drop_invalid_rows|streaming|"
    r"shuffle_buffer_size|preprocessing_num_workers|encoding|delimiter",
    "The model": r"model_.*|base_model|pooling_mode|projection_head|mlp_only_train|prompt|"
    r"normalize_embeddings|max_seq_length|append_eos_token|bidirectional_attention|"
    r"attention_dropout|attn_implementation|dtype|trust_remote_code",
    "Evaluation, and the best model": r"eval_.*|sts_data_dir|neighbor_queries|.*_eval|do_predict|"
    r"per_device_eval_batch_size|metric_for_.*|greater_is_better|load_best_model_at_end|"
    r"batch_eval_metrics|include_for_metrics|prediction_loss_only|label_names",
    "The objective": r"temperature|hard_negative.*|mask_duplicate_.*|augmentation.*|mlm_.*|"
    r"gather_across_devices|mini_batch_size|contrastive_.*|hardness_.*|false_negative_.*|"
    r"alignment_weight|uniformity_weight|orthogonality_weights|matryoshka_.*|num_hard_negatives|label_smoothing.*",
    "Batches, steps and the optimizer": r"per_device_train_.*|learning_rate|num_train_epochs|"
    r"max_steps|warmup_steps|weight_decay|lr_.*|optim.*|adam_.*|max_grad_norm|seed|data_seed|"
    r"gradient_acc.*|neftune.*|average_tokens.*|auto_find_batch_size|do_train|full_determinism|"
    r"train_sampling_strategy|length_column_name",
    "Saving and going on": r"output_dir|overwrite_output_dir|save_.*|resume_.*|restore_.*|"
    r"ignore_data_skip|allow_resume_mismatch|enable_jit_checkpoint",
    "What is logged": r"log.*|report_to|run_name|project|trackio.*|disable_tqdm|include_num_.*|"
    r"skip_memory_metrics|debug",
    "Speed, memory and devices": r".*",
}


def asked_for_help(words: Sequence[str]) -> tuple[bool, str]:
    """Return whether help is asked for, and the word behind it that is searched for, or ''."""
    places = [i for i, word in enumerate(words) if word in HELP]
    if not places:
        return False, ""
    behind = words[places[0] + 1 : places[0] + 2]
    return True, behind[0].lstrip("-").replace("-", "_").lower() if behind else ""


def training_help(parser: argparse.ArgumentParser, word: str = "") -> str:
    """Return the help on the options of training, in groups.

    Args:
        parser: The parser, from `build_parser`.
        word: Only options whose name or text has it.

    Raises:
        InputError: No option has the word; the nearest are named.
    """
    # A flag that is on by default has a second action, --no_x.
    actions = [a for a in parser._actions if not a.option_strings[0].startswith("--no_")]
    options = {a.dest: a for a in actions if a.dest != "help"}
    found = search_words(word, {name: action.help or "" for name, action in options.items()})
    grouped: dict[str, list[str]] = {heading: [] for heading in _GROUPS}
    for name in found:
        grouped[find_group(name)].append(_describe(options[name]))
    parts = [f"{heading}\n\n" + "\n".join(each) for heading, each in grouped.items() if each]
    usage = f"usage: {parser.usage}\n\n{parser.description}\n"
    more = "--help WORD lists the options whose name or text has the word, such as --help batch.\n"
    return "\n".join([usage, *parts, "" if word else more])


def find_group(name: str) -> str:
    """Return the heading of an option of training."""
    return next(heading for heading, names in _GROUPS.items() if re.fullmatch(names, name))


def search_words(word: str, texts: dict[str, str]) -> list[str]:
    """Return the names that have the word, and then those whose text has it.

    Raises:
        InputError: There is none; the nearest names are in the message.
    """
    has = [name for name in texts if word in name.lower()]
    has += [name for name in texts if word in texts[name].lower() and name not in has]
    if has:
        return has
    raise InputError(f"No option has '{word}' in its name or text. {_nearest(word, texts)}")


def _nearest(word: str, names: Iterable[str]) -> str:
    parts = {part: name for name in names for part in [name, *name.split("_")]}
    near = difflib.get_close_matches(word, parts, n=3, cutoff=0.5)
    options = dict.fromkeys(f"--{parts[each]}" for each in near)
    return f"The nearest are {', '.join(options)}." if options else "Leave it out for all of them."


def _describe(action: argparse.Action) -> str:
    """Return an option's name and values, and below them its text."""
    value = (
        "{" + ",".join(map(str, action.choices)) + "}" if action.choices else action.dest.upper()
    )
    text = " ".join((action.help or "").split())
    if action.default not in (None, [], argparse.SUPPRESS) and "efault:" not in text:
        default = action.default
        shown = " ".join(map(str, default)) if isinstance(default, list) else default
        text += f" (default: {getattr(shown, 'value', shown)})"
    width = min(shutil.get_terminal_size().columns, 100)
    lines = textwrap.wrap(text, width=max(width, 40) - 6)
    return "\n".join([f"  --{action.dest} {value}", *(f"      {line}" for line in lines)])
