"""The pages say what is so: blocks run or parse, links lead somewhere, both languages agree."""

import ast
import configparser
import importlib.util
import re
import shutil
from pathlib import Path

import pytest
import torch.distributed.run
import typer.main
from accelerate.commands.launch import launch_command_parser
from helpers import ROOT
from helpers.documents import (
    ENGLISH,
    KOREAN,
    PAGES,
    get_commands,
    make_checkout,
    parse_page,
    read_page,
)
from packaging.requirements import Requirement

from simcse_trainer import SimCSEModel
from simcse_trainer.cli import app
from simcse_trainer.cli.config import build_parser, config_tokens, parse_for_another_machine

LANGUAGES = {"python", "bash", "yaml", "text"}
FOLDERS = ("configs/", "examples/", "benchmarks/", "docs/", "tests/", ".github/")


def by_name(path: Path) -> str:
    return str(path.relative_to(ROOT))


pages = pytest.mark.parametrize("path", PAGES, ids=by_name)


@pytest.fixture
def checkout(tmp_path, monkeypatch):
    make_checkout(tmp_path)
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pages
def test_every_block_says_what_it_is(path):
    page = read_page(path)
    assert {block.language for block in page.blocks} <= LANGUAGES
    assert not page.indented, "indented code has no language: fence it"


@pages
def test_lines_are_short(path):
    fenced = False
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), 1):
        fenced ^= line.startswith("```")
        assert len(line) <= 100 or fenced or line.startswith("|"), f"line {number}"


@pages
def test_links_and_named_files_are_there(path):
    page = read_page(path)
    for link in page.links:
        if link.startswith(("https://", "http://")):
            continue
        file, _, anchor = link.partition("#")
        target = (path.parent / file).resolve() if file else path
        assert target.exists(), link
        assert not anchor or anchor in read_page(target).anchors, link
    for code in page.codes:
        if code.startswith(FOLDERS) and re.fullmatch(r"[\w./-]+", code):
            assert (ROOT / code).exists(), code


def test_every_page_is_linked_from_the_readme():
    linked = {(ROOT / link.partition("#")[0]).resolve() for link in read_page(ENGLISH).links}
    pages_of_docs = set(ROOT.glob("docs/*.md"))
    assert pages_of_docs
    assert pages_of_docs <= linked


@pages
def test_commands_are_taken_by_what_they_call(path, checkout):
    for block in read_page(path).blocks:
        if block.language == "bash":
            commands = get_commands(block.text, checkout)
            assert commands, f"line {block.line}: no command"
            for words in commands:
                check_command(words)
                if words[:2] == ["simcse-trainer", "init"] and "--output" in words:
                    # What `train` reads in the next line.
                    config = checkout / words[words.index("--output") + 1]
                    config.parent.mkdir(exist_ok=True)
                    shutil.copy(ROOT / "configs/my_data.yaml", config)


def check_command(words: list[str]) -> None:
    for word in words:
        assert not word.startswith(FOLDERS) or (ROOT / word).exists(), word
    match words:
        case ["simcse-trainer", *rest]:
            check_own_command(rest)
        case ["accelerate", "launch", *rest]:
            launch = launch_command_parser().parse_args(rest)
            check_launched(launch)
        case ["torchrun", *rest]:
            launch = torch.distributed.run.get_args_parser().parse_args(rest)
            check_launched(launch)
        case ["python", script, *rest]:
            check_script(script, rest)
        case ["python3", "-m", "venv", ".venv"]:
            pass
        case ["make", target]:
            makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
            assert re.search(rf"^(\S+ )*{target}( \S+)*:", makefile, re.MULTILINE), target
        case ["pip", "install", *options, requirement]:
            assert {o for o in options if "://" not in o} <= {"-e", "--upgrade", "--index-url"}
            check_extras(requirement)
        case ["pytest", *paths]:
            assert all((ROOT / path).exists() for path in paths)
        case _:
            assert words[:3] == ["hf", "auth", "login"], words


def check_launched(launch) -> None:
    if launch.module:
        assert launch.training_script == "simcse_trainer"
        check_own_command(launch.training_script_args)
    else:
        check_script(launch.training_script, launch.training_script_args)


def check_script(script: str, rest: list[str]) -> None:
    if script == "train_simcse.py":
        parse_for_another_machine([word for word in rest if word != "--help"])
        return
    source = (ROOT / script).read_text(encoding="utf-8")
    for word in rest:
        assert not word.startswith("--") or f'"{word}"' in source, word


def check_own_command(words: list[str]) -> None:
    group = typer.main.get_command(app)
    context = group.make_context("simcse-trainer", list(words))
    name, command, rest = group.resolve_command(context, words)
    found = command.make_context(name, rest, parent=context)
    if found.args or "config" in found.params:
        config = found.params.get("config")
        parse_for_another_machine([*([config] if config else []), *found.args])


def check_extras(requirement: str) -> None:
    wanted = Requirement(re.sub(r"^\.(?=\[|$)", "simcse-trainer", requirement))
    if wanted.name == "simcse-trainer":
        setup = configparser.ConfigParser()
        setup.read(ROOT / "setup.cfg", encoding="utf-8")
        assert wanted.extras <= set(setup["options.extras_require"])


@pages
def test_yaml_is_read_by_the_config_parser(path, checkout):
    for block in read_page(path).blocks:
        if block.language == "yaml":
            (checkout / "block.yaml").write_text(block.text, encoding="utf-8")
            assert config_tokens(checkout / "block.yaml", build_parser())
            parse_for_another_machine(["block.yaml"])


@pytest.mark.real_weights
@pytest.mark.parametrize("path", [page for page in PAGES if page != KOREAN], ids=by_name)
@pytest.mark.slow
def test_python_runs(path, checkout, minilm):
    """In order, in one namespace; in the folder that the quickstart leaves."""
    blocks = [block for block in read_page(path).blocks if block.language == "python"]
    if any("outputs/quickstart" in block.text for block in blocks):
        SimCSEModel.from_pretrained(minilm).save_pretrained("outputs/quickstart")
    namespace: dict[str, object] = {"__name__": "documentation"}
    for block in blocks:
        code = compile(block.text, f"{path.name}, line {block.line}", "exec")
        if not block.only_read:
            exec(code, namespace)


def test_both_readmes_are_in_step():
    english, korean = read_page(ENGLISH), read_page(KOREAN)
    assert [tag for tag, _ in korean.headings] == [tag for tag, _ in english.headings]
    assert [(b.language, b.text) for b in korean.blocks] == [
        (b.language, b.text) for b in english.blocks
    ]
    left_english = [text for _, text in korean.headings if not re.search("[가-힣]", text)]
    assert left_english == ["simcse-trainer", "Hub"]


def test_both_readmes_have_the_same_figures_code_and_links():
    """Section by section, in any order: languages differ in theirs."""
    english, korean = (
        re.split(r"^## ", path.read_text(encoding="utf-8"), flags=re.MULTILINE)
        for path in (ENGLISH, KOREAN)
    )
    for ours, theirs in zip(english, korean, strict=True):
        for found in (figures, codes, links):
            assert found(theirs) == found(ours), ours.splitlines()[0]


def figures(section: str) -> list[str]:
    return sorted(re.findall(r"\d[\d,.]*[.,]\d+", section))


def codes(section: str) -> list[str]:
    return sorted(parse_page(section).codes)


def links(section: str) -> list[str]:
    return sorted(set(parse_page(section).links) - {ENGLISH.name, KOREAN.name})


def test_the_layers_are_those_of_the_tree():
    rows = re.findall(r"^\| (`.+?) \|", (ROOT / "docs/architecture.md").read_text("utf-8"), re.M)
    named = re.findall(r"`(\w+)(?:/|\.py)`", "".join(rows))
    package = ROOT / "src/simcse_trainer"
    there = {
        p.stem for p in package.iterdir() if p.suffix == ".py" or (p / "__init__.py").is_file()
    }
    assert {*named} == there - {"__init__", "__main__"}


def test_the_generated_pages_are_up_to_date():
    spec = importlib.util.spec_from_file_location("generate", ROOT / "docs/generate.py")
    generate = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(generate)
    for name, text in generate.pages().items():
        written = (ROOT / "docs" / name).read_text(encoding="utf-8")
        assert written == text, f"docs/{name} is out of date. Run: {generate.COMMAND}"


def source_texts() -> list[str]:
    """Every text of the source, with `...` for what is filled in."""
    found = []
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            if isinstance(node, ast.JoinedStr):
                parts = [getattr(part, "value", None) for part in node.values]
                found.append("".join(p if isinstance(p, str) else "..." for p in parts))
            elif isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.append(re.sub(r"%[sd]|%\.0f", "...", node.value))
    return found


def test_the_messages_explained_are_those_of_the_source():
    known = source_texts()
    for block in read_page(ROOT / "docs/troubleshooting.md").blocks:
        assert block.language in ("text", "bash")
        if block.language == "text":
            parts = [part for part in re.split(r"\.\.\.", block.text.strip()) if part.strip(": ")]
            assert max(map(len, parts)) > 12
            assert any(all(part in text for part in parts) for text in known), block.text
