"""The page of `simcse-trainer demo`: search, and a heat map; the only importer of gradio."""

from __future__ import annotations

import math
import os
from collections.abc import Sequence
from html import escape
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any

import numpy as np

from simcse_trainer.errors import InputError

if TYPE_CHECKING:
    from simcse_trainer.inference.simcse import Hits, SimCSE

# More do not fit a phone's width.
MOST_COMPARED = 10

# Colours of their own, which are legible on light and dark pages: a cell's text turns white where
# its ground is dark.
_STYLE = """
.gradio-container main {width: 100%; max-width: 860px !important; margin: 0 auto !important}
.hits {list-style: none; padding: 0; margin: 0}
.hits li {display: flex; gap: .8em; padding: .55em 0; border-bottom: 1px solid #8884}
.hits .score {flex: 0 0 4.2em; font-variant-numeric: tabular-nums; font-weight: 600}
.hits .bar {display: block; height: 4px; border-radius: 2px; background: #2a78b5; margin-top: 3px}
.hits .text, .heat .text {overflow-wrap: anywhere; word-break: keep-all}
.heat table {border-collapse: separate; border-spacing: 2px; width: 100%; table-layout: fixed;
  border: 0 !important}
.heat th, .heat td {text-align: center; padding: .5em 0; font-variant-numeric: tabular-nums;
  font-size: .85em; border: 0; border-radius: 3px}
.heat th.text {text-align: left; width: 45%; font-weight: 400; padding-right: .6em}
.heat ol {display: none; padding-left: 1.6em; list-style: decimal}
.heat th.text .number {font-weight: 600; margin-right: .5em}
@media (max-width: 640px) {
  .heat th.text {width: 1.6em; text-align: center; padding: .5em 0}
  .heat th.text .long {display: none}
  .heat th.text .number {margin: 0}
  .heat th, .heat td {font-size: .72em}
  .heat ol {display: block}
  .gradio-container {padding: 8px !important}
}
"""
_SEARCHES, _COMPARES = "Search", "Compare"


def require_gradio() -> None:
    """Raise an `InputError` that says how to install it, if it is not there."""
    if find_spec("gradio") is None:
        raise InputError("The demo needs gradio. Run: pip install 'simcse-trainer[demo]'")


def serve(simcse: SimCSE, *, host: str, port: int | None) -> Any:
    """Open the page, in threads of this process.

    Args:
        simcse: The model, which has an index.
        host: 127.0.0.1 for this machine alone; 0.0.0.0 for all that reach it.
        port: By default the first free one from 7860.

    Returns:
        The running `gradio.Blocks`: `local_url`, `block_thread()`, `close()`.

    Raises:
        InputError: gradio is not installed, or the port is taken.
    """
    require_gradio()
    # It would report its use, and ask for newer versions.
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"
    import gradio

    page = build_page(simcse)
    fonts = ("system-ui", "sans-serif")
    try:
        page.launch(
            server_name=host,
            server_port=port,
            theme=gradio.themes.Default(
                primary_hue="blue", font=fonts, font_mono=("ui-monospace", "monospace")
            ),
            css=_STYLE,
            footer_links=[],
            share=False,
            ssr_mode=False,
            quiet=True,
            prevent_thread_lock=True,
        )
    except (OSError, ValueError) as error:
        where = host if port is None else f"{host}:{port}"
        raise InputError(
            f"The page could not be opened at {where}: {str(error).split('. ')[0]}. Pass another "
            "--port or --host."
        ) from error
    return page


def build_page(simcse: SimCSE) -> Any:
    """Build a `gradio.Blocks` of two tabs; `simcse` has an index."""
    import gradio

    assert simcse.index is not None
    sentences = simcse.index.sentences
    with gradio.Blocks(title="SimCSE", analytics_enabled=False) as page:
        gradio.Markdown(f"## Sentences by meaning\n`{simcse.name}`, {len(sentences):,} sentences")
        with gradio.Tab(_SEARCHES):
            query = gradio.Textbox(
                label="What are you looking for?", placeholder=sentences[0], autofocus=True
            )
            button = gradio.Button(_SEARCHES, variant="primary")
            with gradio.Accordion("Options", open=False), gradio.Row():
                top_k = gradio.Slider(1, 50, value=10, step=1, label="Hits, at most")
                threshold = gradio.Slider(0, 1, value=0.3, step=0.05, label="Smallest cosine")
            hits = gradio.HTML()
            gradio.on(
                [query.submit, button.click],
                lambda *given: search_html(simcse, *given),
                [query, top_k, threshold],
                hits,
                api_visibility="private",
            )
        with gradio.Tab(_COMPARES):
            texts = gradio.Textbox(
                label=f"Sentences, one a line, {MOST_COMPARED} at most",
                lines=5,
                value="\n".join(sentences[:4]),
            )
            compare = gradio.Button(_COMPARES, variant="primary")
            heat = gradio.HTML()
            compare.click(
                lambda text: compare_html(simcse, text), texts, heat, api_visibility="private"
            )
    return page


def search_html(simcse: SimCSE, query: str, top_k: float, threshold: float) -> str:
    """Show the hits of a query as a list with bars, or say what is missing."""
    if not query.strip():
        return "<p>Write what you are looking for.</p>"
    nearest: Any = simcse.search(query, top_k=int(top_k), threshold=-math.inf)
    hits = [hit for hit in nearest if hit[1] >= threshold]
    if not hits:
        said = f"<p>No sentence has a cosine of {threshold:.2f} or above. The nearest is</p>"
        return said + _list_hits(nearest[:1])
    return _list_hits(hits)


def compare_html(simcse: SimCSE, text: str) -> str:
    """Show the cosines of all pairs of lines as a heat map, or say what is wrong with the lines."""
    sentences = [line.strip() for line in text.splitlines() if line.strip()]
    if not 2 <= len(sentences) <= MOST_COMPARED:
        return f"<p>Expected 2 to {MOST_COMPARED} sentences, found {len(sentences)}.</p>"
    return _heat_map(sentences, np.asarray(simcse.similarity(sentences, sentences)))


def _list_hits(hits: Hits) -> str:
    items = (
        f'<li><span class="score">{score:.2f}'
        f'<span class="bar" style="width: {100 * max(score, 0):.0f}%"></span></span>'
        f'<span class="text">{escape(sentence)}</span></li>'
        for sentence, score in hits
    )
    return f'<ul class="hits">{"".join(items)}</ul>'


def _heat_map(sentences: Sequence[str], cosines: np.ndarray) -> str:
    """Build a table [n, n]; on a narrow page rows have numbers, and the texts stand below."""
    numbers = range(1, len(sentences) + 1)
    rows = [
        f'<tr><th class="text" scope="row"><span class="number">{number}</span>'
        f'<span class="long">{escape(sentence)}</span></th>{"".join(map(_cell, row))}</tr>'
        for number, sentence, row in zip(numbers, sentences, cosines, strict=True)
    ]
    head = "".join(f'<th scope="col">{number}</th>' for number in numbers)
    texts = "".join(f'<li class="text">{escape(sentence)}</li>' for sentence in sentences)
    return (
        f'<div class="heat"><table><tr><th class="text"></th>{head}</tr>{"".join(rows)}</table>'
        f"<ol>{texts}</ol></div>"
    )


def _cell(cosine: float) -> str:
    """Colour a cell from nearly white at 0 and below to dark blue at 1."""
    fraction = min(max(float(cosine), 0.0), 1.0)
    red, green, blue = (round(a + (b - a) * fraction) for a, b in ((240, 8), (245, 69), (250, 128)))
    # Where both have a contrast of 4.5 to 1.
    ink = "#fff" if fraction > 0.7 else "#000"
    return f'<td style="background: rgb({red}, {green}, {blue}); color: {ink}">{cosine:.2f}</td>'
