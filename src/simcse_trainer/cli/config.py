"""YAML and command line to the three argument classes.

A YAML file becomes command-line tokens in front of the real ones, so that one parser checks types,
choices and names of both, and the command line wins.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Collection, Iterable, Sequence
from importlib.resources import files
from pathlib import Path
from typing import Any, NoReturn

import yaml
from transformers import HfArgumentParser

from simcse_trainer.arguments import DataArguments, ModelArguments, SimCSETrainingArguments
from simcse_trainer.cli.spellings import refuse_option
from simcse_trainer.errors import InputError, at_command_line

USAGE = "train_simcse.py [CONFIG.yaml] [--option value ...]"


class _Parser(HfArgumentParser):
    """Raises instead of ending the process with the usage of 150 options."""

    def error(self, message: str) -> NoReturn:
        # argparse names every spelling: "argument --eval_steps/--eval-steps: ..."
        raise InputError(re.sub(r"^argument (--\w+)(/[\w-]+)+", r"\1", message) + ".")


def build_parser() -> HfArgumentParser:
    """Return the parser of all options."""
    classes: Any = (ModelArguments, DataArguments, SimCSETrainingArguments)
    return _Parser(
        classes,
        prog="train_simcse.py",
        usage=USAGE,
        description="Train sentence embeddings with SimCSE.",
        allow_abbrev=False,
    )


@at_command_line
def parse_arguments(
    argv: Sequence[str],
) -> tuple[ModelArguments, DataArguments, SimCSETrainingArguments]:
    """Parse `[CONFIG.yaml] [--option value ...]`.

    Raises:
        InputError: An unknown option, a value of the wrong type or not among the choices, a file
            that is no YAML mapping; with the nearest valid name.
    """
    parser = build_parser()
    model_args, data_args, training_args = _parse(parser, _all_tokens(argv, parser))
    return model_args, data_args, training_args


@at_command_line
def parse_for_another_machine(
    argv: Sequence[str],
) -> tuple[tuple[ModelArguments, DataArguments, SimCSETrainingArguments], bool]:
    """Parse the options of a run elsewhere: bf16 then needs no GPU here that has it.

    Returns:
        What `parse_arguments` gives, but with `use_cpu`; and whether the run itself has it.

    Raises:
        InputError: For the reasons of `parse_arguments`.
    """
    parser = build_parser()
    tokens = _all_tokens(argv, parser)
    on_cpu = parser.parse_known_args(tokens)[0].use_cpu
    model_args, data_args, training_args = _parse(parser, [*tokens, "--use_cpu=true"])
    return (model_args, data_args, training_args), bool(on_cpu)


def _all_tokens(argv: Sequence[str], parser: HfArgumentParser) -> list[str]:
    """Return the file's tokens, and behind them the command line's."""
    config, tokens = take_config(argv)
    if config is not None:
        path = find_config(config)
        from_file = config_tokens(path, parser)
        try:
            _, leftover = parser.parse_known_args(from_file)
        except InputError as error:
            raise InputError(f"{path}: {error}") from None
        if leftover:
            raise InputError(f"{path}: found a list with '{leftover[0]}' where one value belongs.")
        tokens = from_file + tokens
    return tokens


@at_command_line
def take_config(argv: Sequence[str]) -> tuple[str | None, list[str]]:
    """Take the configuration file, the first word or behind `--config`, out of a command line.

    Raises:
        InputError: Two files, or `--config` without one.
    """
    found, words = [], list(argv)
    if words and not words[0].startswith("-"):
        found.append(words.pop(0))
    rest: list[str] = []
    while words:
        name, equals, value = words.pop(0).partition("=")
        if name != "--config":
            rest.append(name + equals + value)
            continue
        if not equals:
            value = words.pop(0) if words and not words[0].startswith("-") else ""
        if not value:
            raise InputError(f"--config: expected a file behind it. Usage: {USAGE}")
        found.append(value)
    if len(found) > 1:
        raise InputError(f"Found two configuration files, {' and '.join(found)}; pass one.")
    return (found[0] if found else None), rest


def recipes_folder() -> Path:
    """Return the folder of the recipes: in the package, or where a checkout keeps them."""
    own = Path(str(files("simcse_trainer"))) / "configs"
    return own if own.is_dir() else Path(__file__).parents[3] / "configs"


def find_config(name: str) -> Path:
    """Return the file of that name, or else the recipe, with or without its ending.

    Raises:
        InputError: There is neither; the nearest recipes are named.
    """
    path = Path(name)
    if path.exists():
        return path
    recipes = {file.stem: file for file in sorted(recipes_folder().glob("*.yaml"))}
    stem = path.stem if path.suffix in (".yaml", ".yml") else path.name
    # A path says where a file is to be: the one of `configs/` is also a recipe.
    if path.parent.as_posix() in (".", "configs") and stem in recipes:
        return recipes[stem]
    near = difflib.get_close_matches(stem, recipes, n=3, cutoff=0.4)
    known = f"nearest: {', '.join(near)}" if near else f"there are {', '.join(recipes)}"
    raise InputError(
        f"Config file {name} does not exist, and no recipe has that name ({known}). Usage: {USAGE}"
    )


@at_command_line
def config_tokens(path: Path, parser: HfArgumentParser) -> list[str]:
    """Turn a YAML file into the command-line tokens that say the same.

    Raises:
        InputError: The file is missing, is no mapping of options, or has an unknown one.
    """
    try:
        content = yaml.load(path.read_text(encoding="utf-8"), _UniqueKeyLoader)
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"Config file {path} cannot be read: {error}.") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f" line {mark.line + 1}" if mark else ""
        reason = getattr(error, "problem", None) or str(error).splitlines()[0]
        raise InputError(f"{path}{where}: not valid YAML: {reason}.") from None
    if not isinstance(content, dict):
        found = "nothing" if content is None else type(content).__name__
        raise InputError(f"{path}: expected `option: value` lines, found {found}.")
    known = {action.dest: action for action in parser._actions if action.dest != "help"}
    tokens: list[str] = []
    if unknown := [str(key) for key in content if key not in known]:
        raise InputError(f"{path}: {_refuse(unknown, known)}")
    for key, value in content.items():
        if value is False and "no" in (known[key].choices or ()):
            value = "no"  # YAML 1.1 reads a bare no as false
        tokens += _tokens(str(key), value)
    return tokens


def _tokens(key: str, value: Any) -> list[str]:
    if value is None or value == []:
        return []
    if isinstance(value, list):
        return [f"--{key}", *(_scalar(item) for item in value)]
    # `--key=value`, or a value such as -1 would be read as an option.
    return [f"--{key}={_scalar(value)}"]


def _scalar(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _parse(parser: HfArgumentParser, tokens: list[str]) -> tuple[Any, ...]:
    try:
        *parsed, unknown = parser.parse_args_into_dataclasses(
            tokens, look_for_args_file=False, return_remaining_strings=True
        )
    except (ValueError, ImportError, OverflowError, TypeError) as error:
        # transformers' own checks of its options raise these, over several lines.
        raise InputError(" ".join(str(error).split())) from error
    if unknown:
        known = {action.dest for action in parser._actions}
        names = [word.split("=")[0] for word in unknown if re.match(r"--?[A-Za-z]", word)]
        if not unknown[0].startswith("-"):
            raise InputError(f"'{unknown[0]}' belongs to no option. Usage: {USAGE}")
        raise InputError(_refuse(names or unknown[:1], known))
    return tuple(parsed)


def _refuse(words: Iterable[str], known: Collection[str]) -> str:
    """Say of each word that is no option which one is meant."""
    return " ".join(refuse_option(word, known) for word in dict.fromkeys(words))


class _UniqueKeyLoader(yaml.SafeLoader):
    """PyYAML keeps the last of two equal keys without a word."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        seen = set()
        for key_node, _ in node.value:
            key = str(self.construct_object(key_node, deep=True))
            if key in seen:
                raise yaml.MarkedYAMLError(
                    problem=f"option '{key}' is given twice", problem_mark=key_node.start_mark
                )
            seen.add(key)
        mapping: dict[Any, Any] = super().construct_mapping(node, deep)
        return {str(key): value for key, value in mapping.items()}
