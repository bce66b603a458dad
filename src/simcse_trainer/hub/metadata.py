"""The metadata of a card: what the Hub reads, and whether it would take it."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from typing import Any

from huggingface_hub import EvalResult, ModelCardData
from huggingface_hub.errors import HFValidationError
from huggingface_hub.utils._validators import validate_repo_id

from simcse_trainer.errors import InputError
from simcse_trainer.hub.facts import CardFacts

TAGS = ["sentence-transformers", "simcse", "feature-extraction", "sentence-similarity"]

# What the Hub takes as `license`; any other is `other` with a `license_name`.
_LICENSE_NAMES = """
    afl-3.0 agpl-3.0 apache-2.0 apple-amlr apple-ascl artistic-2.0 bigcode-openrail-m
    bigscience-bloom-rail-1.0 bigscience-openrail-m bsd bsd-2-clause bsd-3-clause
    bsd-3-clause-clear bsl-1.0 c-uda cc cc-by-2.0 cc-by-2.5 cc-by-3.0 cc-by-4.0 cc-by-nc-2.0
    cc-by-nc-3.0 cc-by-nc-4.0 cc-by-nc-nd-3.0 cc-by-nc-nd-4.0 cc-by-nc-sa-2.0 cc-by-nc-sa-3.0
    cc-by-nc-sa-4.0 cc-by-nd-4.0 cc-by-sa-3.0 cc-by-sa-4.0 cc0-1.0 cdla-permissive-1.0
    cdla-permissive-2.0 cdla-sharing-1.0 creativeml-openrail-m deepfloyd-if-license ecl-2.0 epl-1.0
    epl-2.0 etalab-2.0 eupl-1.1 eupl-1.2 gemma gfdl gpl gpl-2.0 gpl-3.0 h-research intel-research
    isc lgpl lgpl-2.1 lgpl-3.0 lgpl-lr llama2 llama3 llama3.1 llama3.2 llama3.3 lppl-1.3c mit
    mpl-2.0 ms-pl ncsa odbl odc-by ofl-1.1 openrail openrail++ osl-3.0 pddl postgresql unknown
    unlicense wtfpl zlib
"""
_LICENSES = frozenset(_LICENSE_NAMES.split())


def check_license(name: str) -> None:
    """Raise InputError where a licence is no identifier."""
    if name == "other" or not re.fullmatch(r"[a-z0-9][a-z0-9.+-]*", name):
        raise InputError(
            f"license is '{name}'; expected an identifier in lower case such as apache-2.0, mit or "
            "cc-by-4.0 (https://huggingface.co/docs/hub/repositories-licenses), or a name of your "
            "own such as my-license."
        )


def check_language(code: str) -> None:
    """Raise InputError where a language is no code."""
    if not re.fullmatch(r"[a-z]{2,3}(-[A-Za-z0-9]{2,8})*|multilingual|code", code):
        raise InputError(
            f"language is '{code}'; expected an ISO 639 code such as en or ko, or multilingual."
        )


def is_repo_id(name: str) -> bool:
    """Whether this could be the name of a repository on the Hub."""
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


def card_data(facts: CardFacts) -> ModelCardData:
    """The metadata, checked by huggingface_hub; a missing fact has no key."""
    results = _eval_results(facts)
    other: dict[str, Any] = {}
    if facts.base_model:
        other["base_model_relation"] = facts.base_model_relation
    if facts.license and facts.license not in _LICENSES:
        other["license_name"] = facts.license
    if facts.emissions is not None:
        other["co2_eq_emissions"] = _emissions(facts.emissions, facts.hardware)
    return ModelCardData(
        # Without results it would be a key of its own.
        model_name=facts.title if results else None,
        base_model=facts.base_model or None,
        datasets=list(facts.datasets) or None,
        language=list(facts.language) or None,
        license=("other" if "license_name" in other else facts.license) or None,
        library_name="sentence-transformers",
        pipeline_tag="sentence-similarity",
        tags=TAGS,
        eval_results=results or None,
        **other,
    )


def finite(scores: Mapping[str, float]) -> dict[str, float]:
    """Without correlations that do not exist."""
    return {name: value for name, value in scores.items() if math.isfinite(value)}


def _eval_results(facts: CardFacts) -> list[EvalResult]:
    results = []
    for task, score in finite(facts.scores).items():
        if task == "avg_sts":  # no data set's
            continue
        source = facts.evaluated_on.get(task)
        results.append(
            EvalResult(
                task_type="semantic-similarity",
                task_name="Semantic Textual Similarity",
                dataset_type=source.dataset if source and source.dataset else task,
                dataset_name=task,
                dataset_config=source.config or None if source else None,
                dataset_split=source.split or None if source else None,
                metric_type="spearman_cosine",
                metric_name="Spearman of cosine x 100",
                metric_value=round(score, 2),
            )
        )
    return results


def _emissions(grams: float, hardware: str) -> dict[str, Any]:
    known = {"emissions": round(grams, 4), "source": "codecarbon", "training_type": "fine-tuning"}
    return known | ({"hardware_used": hardware} if hardware else {})
