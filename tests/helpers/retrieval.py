"""Retrieval data made in tests, and what sentence-transformers finds on it."""

from __future__ import annotations

import json
import random
from pathlib import Path

from helpers.tiny import WORDS


def random_texts(count: int, seed: int) -> list[str]:
    """Different texts of the tiny tokenizer's words."""
    draw = random.Random(seed)
    found: dict[str, None] = {}
    while len(found) < count:
        found[" ".join(draw.choice(WORDS) for _ in range(draw.randint(2, 9)))] = None
    return list(found)


def write_beir(folder: Path, corpus, queries, qrels, split: str = "test") -> Path:
    """Write id -> text (or title and text), id -> text, and (query, passage, grade)."""
    (folder / "qrels").mkdir(parents=True, exist_ok=True)
    with open(folder / "corpus.jsonl", "w", encoding="utf-8") as file:
        for name, text in corpus.items():
            title, text = text if isinstance(text, tuple) else ("", text)
            file.write(json.dumps({"_id": name, "title": title, "text": text}) + "\n")
    with open(folder / "queries.jsonl", "w", encoding="utf-8") as file:
        for name, text in queries.items():
            file.write(json.dumps({"_id": name, "text": text}) + "\n")
    lines = ["query-id\tcorpus-id\tscore", *("\t".join(map(str, row)) for row in qrels)]
    (folder / "qrels" / f"{split}.tsv").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


def reference(model, queries, corpus, relevant) -> dict[str, float]:
    """What `InformationRetrievalEvaluator` gives, by our names and times 100.

    Args:
        model: Anything that has what `SentenceTransformer` offers the evaluator.
        queries: Id -> text.
        corpus: Id -> text.
        relevant: Id of a query -> ids of passages.
    """
    from sentence_transformers.sentence_transformer.evaluation import InformationRetrievalEvaluator

    evaluator = InformationRetrievalEvaluator(
        queries, corpus, relevant, precision_recall_at_k=[1, 5, 10], write_csv=False
    )
    found = evaluator(model)
    names = {f"recall_at_{k}": f"cosine_recall@{k}" for k in (1, 5, 10)}
    names |= {"mrr_at_10": "cosine_mrr@10", "ndcg_at_10": "cosine_ndcg@10"}
    return {ours: 100 * float(found[theirs]) for ours, theirs in names.items()}
