"""What a model's licence asks of everything that is made from it, carried from folder to folder.

It stands in the backbone's configuration, which every save of a model writes and every load reads,
also those of other tools.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from simcse_trainer.errors import InputError
from simcse_trainer.files import CONFIG, NOTICE
from simcse_trainer.model.io.lookup import find_file

logger = logging.getLogger(__name__)

# The key in `config.json`.
_KEY = "simcse_terms"
_WORDS = ("license", "base_model", "origin", "notice", "modified")
# Documents are written beside the weights: nothing else may be called so.
_DOCUMENT = re.compile(r"[\w-]*(terms|licen[cs]e|policy)[\w-]*(\.(html|md|pdf|txt))?", re.I | re.A)


@dataclass(frozen=True)
class Terms:
    """What has to be said of a model, and of all that are made from it.

    Attributes:
        license: Identifier of the Hub's list, such as gemma.
        base_model: Name on the Hub of the model that the weights are from.
        origin: How they were made from it, such as "dequantised from Q4_K_M".
        notice: The sentence that has to stand in a file beside the weights.
        modified: What has to be said of changes to them.
        documents: File name -> contents, such as the agreement that has to be passed on; None
            where the model came without.
    """

    license: str = ""
    base_model: str = ""
    origin: str = ""
    notice: str = ""
    modified: str = ""
    documents: Mapping[str, bytes | None] = field(default_factory=dict)

    @property
    def notice_text(self) -> str:
        """All that has to be said, a paragraph each."""
        return "\n\n".join(line for line in (self.notice, self.modified) if line)


def set_terms(config: Any, terms: Terms) -> None:
    """Note terms in a backbone's configuration."""
    said: dict[str, Any] = {name: getattr(terms, name) for name in _WORDS if getattr(terms, name)}
    setattr(config, _KEY, said | {"documents": sorted(terms.documents)})


def read_terms(config: Any, name_or_path: str, hub: Mapping[str, Any]) -> Terms | None:
    """Return the terms of a backbone; None where its configuration has none.

    Args:
        config: The backbone's configuration.
        name_or_path: Where the backbone is: the documents stand beside it.
        hub: What the Hub is asked with: `revision` and `token`.

    Raises:
        InputError: What it says of documents is not a list of names for such.
    """
    said = getattr(config, _KEY, None)
    if not isinstance(said, Mapping):
        return None
    names = said.get("documents", [])
    listed = names if isinstance(names, list) else [names]
    for name in listed:
        if not isinstance(name, str) or not _DOCUMENT.fullmatch(name):
            raise InputError(
                f"{CONFIG} of '{name_or_path}': {_KEY} lists {name!r} as a document; expected "
                "names of files such as LICENSE.txt or TERMS.html. Take it out of the list."
            )
    # A model can be used without them; what is made of it lacks them, which is said then.
    found = {name: find_file(name_or_path, name, assume_absent=True, **hub) for name in listed}
    documents = {name: path.read_bytes() if path else None for name, path in found.items()}
    return Terms(**{name: str(said.get(name, "")) for name in _WORDS}, documents=documents)


def write_terms(terms: Terms, folder: Path) -> None:
    """Write the notice and the documents into the folder of a model; warn of what is missing."""
    for name, content in terms.documents.items():
        if content is not None:
            (folder / name).write_bytes(content)
        else:
            logger.warning(
                "%s belongs to this model, and what it is made from came without it. Put it into "
                "the saved folder before you pass that on.",
                name,
            )
    if terms.notice_text:
        (folder / NOTICE).write_text(terms.notice_text + "\n", encoding="utf-8")
