"""The demo in a browser: what it finds, on a wide screen and on a phone, and where it asks."""

import re
import shutil
import socket
import sys
from html import escape

import pytest
from helpers.checks import fails
from helpers.command_line import error
from helpers.tiny import tiny_config, tiny_tokenizer
from transformers import AutoModel

from simcse_trainer import SimCSE, SimCSEModel
from simcse_trainer.inference import demo

SENTENCES = [
    "a man is eating food",
    "the dog sleeps on the mat",
    "a big red cat runs",
    "the child plays",
    "a small dog",
]
ODD = '<script>document.title = "broken"</script> & "a dog"'


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    backbone = AutoModel.from_config(tiny_config("bert", initializer_range=0.2))
    backbone.pooler = None
    path = tmp_path_factory.mktemp("demo") / "model"
    SimCSEModel(backbone, tiny_tokenizer(), pooling_mode="mean").save_pretrained(path)
    return path


@pytest.fixture(scope="module")
def tool(folder):
    found = SimCSE(folder)
    found.build_index([*SENTENCES, ODD])
    return found


def test_what_the_page_shows(tool):
    found = demo.search_html(tool, "a small dog", 2, 0.5)
    assert found.count("<li>") == 2
    assert "a small dog</span>" in found
    assert ">1.00<" in found
    assert escape(ODD) in demo.search_html(tool, ODD, 1, 0.5)
    assert "<script>" not in demo.search_html(tool, ODD, 50, 0)
    nothing = demo.search_html(tool, "a dog", 5, 1.5)
    assert "No sentence has a cosine of 1.50 or above. The nearest is" in nothing
    assert nothing.count("<li>") == 1
    assert "Write what" in demo.search_html(tool, "  ", 5, 0.5)
    heat = demo.compare_html(tool, "a dog\n\n" + ODD)
    assert heat.count("<td") == 4
    assert "<script>" not in heat
    assert "found 1" in demo.compare_html(tool, "a dog\n")
    assert "found 11" in demo.compare_html(tool, "a dog\n" * 11)


def test_a_cell_is_legible_at_any_cosine():
    def luminance(color):
        parts = [x / 255 for x in color]
        parts = [x / 12.92 if x <= 0.03928 else ((x + 0.055) / 1.055) ** 2.4 for x in parts]
        return sum(a * b for a, b in zip((0.2126, 0.7152, 0.0722), parts, strict=True))

    for cosine in range(-100, 101):
        cell = demo._cell(cosine / 100)
        ground = luminance([int(x) for x in re.search(r"rgb\((.*?)\)", cell)[1].split(", ")])
        ink = luminance([255] * 3 if "#fff" in cell else [0] * 3)
        low, high = sorted((ground, ink))
        assert (high + 0.05) / (low + 0.05) >= 4.5, cosine


def test_without_gradio(monkeypatch, capsys):
    monkeypatch.setattr(demo, "find_spec", lambda name: None)
    said = error(monkeypatch, capsys, "demo", "nowhere", "--corpus", "none.txt")
    assert said.endswith("Run: pip install 'simcse-trainer[demo]'")


@pytest.fixture(scope="module")
def page(tool):
    pytest.importorskip("gradio", reason="pip install simcse-trainer[demo]")
    served = demo.serve(tool, host="127.0.0.1", port=None)
    yield served
    served.close()


@pytest.mark.slow
def test_it_listens_on_this_machine_alone(page, tool):
    port = page.server_port
    assert page.local_url == f"http://127.0.0.1:{port}/"
    fails(lambda: demo.serve(tool, host="127.0.0.1", port=port), "could not be opened", str(port))
    with socket.socket() as other:
        # Another address of this machine, where nobody answers.
        assert other.connect_ex(("127.0.0.2", port)) != 0


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api", reason="pip install playwright")
    program = shutil.which("chromium") or shutil.which("google-chrome")
    if program is None:
        pytest.skip("no chromium on this machine")
    with playwright.sync_playwright() as started:
        opened = started.chromium.launch(executable_path=program, args=["--no-sandbox"])
        yield opened
        opened.close()


@pytest.mark.parametrize(("width", "height"), [(1280, 900), (390, 844)], ids=["wide", "phone"])
def test_in_a_browser(page, browser, width, height):
    context = browser.new_context(
        viewport={"width": width, "height": height}, is_mobile=width < 500
    )
    tab, asked, broken = context.new_page(), [], []
    tab.on("request", lambda request: asked.append(request.url))
    tab.on("pageerror", lambda problem: broken.append(str(problem)))
    tab.goto(page.local_url)

    def search():
        tab.get_by_label("What are you looking for?").fill("a small dog")
        tab.keyboard.press("Enter")

    until_shown(tab, search, ".hits li")
    assert tab.locator(".hits li").first.inner_text().split("\n")[-1] == "a small dog"
    tab.get_by_role("tab", name="Compare").click()
    until_shown(tab, tab.get_by_role("button", name="Compare").click, ".heat td")
    assert tab.locator(".heat td").count() == 16
    assert tab.locator(".heat td").first.inner_text() == "1.00"
    # On a phone the texts stand below the map, and nothing is wider than the screen.
    assert tab.locator(".heat ol").is_visible() == (width < 500)
    assert tab.evaluate("document.documentElement.scrollWidth") <= width
    for cell in tab.locator(".heat td").all():
        box = cell.bounding_box()
        assert box["x"] >= 0
        assert box["x"] + box["width"] <= width
        assert box["width"] >= 24
    assert tab.title() == "SimCSE"
    assert broken == []
    outside = [url for url in asked if not url.startswith((page.local_url, "data:", "blob:"))]
    assert outside == []
    context.close()


def until_shown(tab, act, selector):
    """Act, again where the page was not listening yet."""
    from playwright.sync_api import TimeoutError

    for _ in range(12):
        act()
        try:
            tab.locator(selector).first.wait_for(timeout=5000)
            return
        except TimeoutError:
            continue
    pytest.fail(f"{selector} did not appear")


def test_the_server_asks_nobody(tool, monkeypatch):
    """No connection but to this machine, from the import to the page."""
    pytest.importorskip("gradio", reason="pip install simcse-trainer[demo]")
    reached = []
    connect = socket.socket.connect

    def watched(self, address):
        if self.family != socket.AF_UNIX:
            reached.append(address[0])
        return connect(self, address)

    monkeypatch.setattr(socket.socket, "connect", watched)
    served = demo.serve(tool, host="127.0.0.1", port=None)
    served.close()
    assert set(reached) <= {"127.0.0.1"}
    assert served.analytics_enabled is False
    assert "gradio" in sys.modules
