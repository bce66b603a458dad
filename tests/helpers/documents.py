"""The pages of the documentation, and what is in them, for the tests."""

import os
import re
import subprocess
from dataclasses import dataclass
from pathlib import Path

from markdown_it import MarkdownIt

from helpers import ROOT

ENGLISH, KOREAN = ROOT / "README.md", ROOT / "README.ko.md"
PAGES = [
    *sorted(ROOT.glob("*.md")),
    *sorted(ROOT.glob("docs/*.md")),
    *sorted(ROOT.glob("examples/*/README.md")),
]
PAGES.remove(ROOT / "model_card_template.md")  # a template, with tests of its own
NOT_RUN = re.compile(r"<!-- not run: .+ -->")
# What a page runs; each is replaced by a script that notes its words.
COMMANDS = [
    "simcse-trainer",
    "python",
    "python3",
    "accelerate",
    "torchrun",
    "make",
    "pip",
    "pytest",
    "hf",
]
_NOTE = """#!/bin/sh
printf '%s\\037' "${0##*/}" "$@" >> "$WORDS"; printf '\\036' >> "$WORDS"
"""


@dataclass(frozen=True)
class Block:
    """A fenced block: its language, its text, its line, and whether it is only to be read."""

    language: str
    text: str
    line: int
    only_read: bool


@dataclass(frozen=True)
class Page:
    blocks: list[Block]
    headings: list[tuple[str, str]]
    links: list[str]
    codes: list[str]
    indented: int

    @property
    def anchors(self) -> set[str]:
        """As GitHub makes them."""
        kept = (re.sub(r"[^\w\- ]", "", text.lower()) for _, text in self.headings)
        return {text.replace(" ", "-") for text in kept}


def read_page(path: Path) -> Page:
    return parse_page(path.read_text(encoding="utf-8"))


def parse_page(text: str) -> Page:
    tokens = MarkdownIt("commonmark").enable("table").parse(text)
    inline = [child for token in tokens for child in token.children or ()]
    return Page(
        blocks=[
            Block(
                token.info,
                token.content,
                token.map[0] + 1,
                bool(NOT_RUN.fullmatch(tokens[place - 1].content.strip())),
            )
            for place, token in enumerate(tokens)
            if token.type == "fence"
        ],
        headings=[
            (token.tag, tokens[place + 1].content)
            for place, token in enumerate(tokens)
            if token.type == "heading_open"
        ],
        links=[
            str(token.attrs.get("href") or token.attrs.get("src"))
            for token in inline
            if token.type in ("link_open", "image")
        ],
        codes=[token.content for token in inline if token.type == "code_inline"],
        indented=sum(token.type == "code_block" for token in tokens),
    )


def make_checkout(folder: Path) -> None:
    """What a reader who follows the pages has in the working folder."""
    for path in ROOT.iterdir():
        if path.name in ("configs", "examples", "benchmarks", "docs", "train_simcse.py"):
            (folder / path.name).symlink_to(path)
    (folder / ".venv/bin").mkdir(parents=True)
    (folder / ".venv/bin/activate").touch()
    # What init makes of the reader's own data.
    (folder / "my_faq.yaml").symlink_to(ROOT / "configs/my_data.yaml")


def get_commands(block: str, folder: Path) -> list[list[str]]:
    """The words of every command that a shell runs for a block, loops and variables included."""
    scripts, noted = folder / ".venv/scripts", folder / ".venv/words"
    scripts.mkdir(exist_ok=True)
    noted.write_text("")
    for name in COMMANDS:
        (scripts / name).write_text(_NOTE)
        (scripts / name).chmod(0o755)
    environment = {"PATH": f"{scripts}:/usr/bin:/bin", "WORDS": str(noted), "HOME": str(folder)}
    subprocess.run(
        ["bash", "-euo", "pipefail", "-c", block],
        cwd=folder,
        env={**os.environ, **environment},
        check=True,
        timeout=30,
    )
    lines = noted.read_text().split("\036")[:-1]
    return [line.split("\037")[:-1] for line in lines]
