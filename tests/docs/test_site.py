"""The built documentation in a real browser; `make docs` builds it."""

from __future__ import annotations

import functools
import http.server
import re
import shutil
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

pytestmark = pytest.mark.full

SITE = Path(__file__).parents[2] / "site"
PAGES = [path.relative_to(SITE).as_posix() for path in sorted([*SITE.glob("*.html"), *SITE.glob("rules/*.html")])]
PAGES += ["api/rules.html", "benchmarks/index.html"]


class Quiet(http.server.SimpleHTTPRequestHandler):
    def log_message(self, format: str, *args: Any) -> None:
        """Say nothing."""


@pytest.fixture(scope="module")
def address() -> Iterator[str]:
    if not (SITE / "index.html").exists():
        pytest.skip("site/ is not built; run make docs")
    with http.server.ThreadingHTTPServer(("127.0.0.1", 0), functools.partial(Quiet, directory=SITE)) as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield f"http://127.0.0.1:{server.server_port}/"
        server.shutdown()


@pytest.fixture(scope="module")
def browser() -> Iterator[Any]:
    api = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    chromium = shutil.which("chromium")
    if chromium is None:
        pytest.skip("no Chromium is installed")
    with api.sync_playwright() as playwright:
        found = playwright.chromium.launch(executable_path=chromium, args=["--no-sandbox"])
        yield found
        found.close()


@pytest.fixture
def opened(browser: Any, address: str) -> Iterator[Callable[..., Any]]:
    """Give a function that opens a window; in the end nothing else was asked for and nothing was complained of."""
    contexts, asked, complaints = [], [], []

    def open_window(width: int, scheme: str) -> Any:
        context = browser.new_context(viewport={"width": width, "height": 900}, color_scheme=scheme)
        contexts.append(context)
        context.on("request", lambda one: asked.append(one.url))
        context.on("weberror", lambda error: complaints.append(str(error.error)))
        context.on("console", lambda message: complaints.append(message.text) if message.type == "error" else None)
        return context.new_page()

    yield open_window
    for context in contexts:
        context.close()
    assert asked
    assert [url for url in asked if not url.startswith((address, "data:", f"blob:{address}"))] == []
    assert complaints == []


@pytest.mark.parametrize(
    ("scheme", "rule", "path"),
    [
        ("light", "LayerAdaptive", "rules/layer-adaptive.html"),
        ("dark", "LayerAdaptive", "rules/layer-adaptive.html"),
        ("light", "HeavyTail", "rules/heavy-tail.html"),
    ],
)
def test_the_search_finds_a_rule(scheme: str, rule: str, path: str, opened: Callable[..., Any], address: str) -> None:
    page = opened(1280, scheme)
    page.goto(address)
    assert page.locator("h1").inner_text().startswith("layerwise")
    dark = page.evaluate("getComputedStyle(document.body).getPropertyValue('color-scheme')")
    assert dark == scheme
    page.locator("input[name=query]").click()
    page.keyboard.type(rule, delay=10)
    found = page.locator(f".md-search-result__item a[href*='{path}']").first
    found.wait_for(timeout=15_000)


def test_no_page_is_wider_than_a_telephone(opened: Callable[..., Any], address: str) -> None:
    page, wide = opened(390, "light"), {}
    for path in PAGES:
        page.goto(address + path, wait_until="domcontentloaded")
        width = page.evaluate("document.documentElement.scrollWidth")
        if width > 390:
            wide[path] = width
    assert wide == {}


def test_no_page_names_another_server_as_the_place_of_a_part_of_it() -> None:
    if not (SITE / "index.html").exists():
        pytest.skip("site/ is not built; run make docs")
    part = re.compile(r"<(?:script|img|iframe|source|link)\b[^>]*?(?:src|href)=[\"']?(?:https?:)?//[^>]*>")
    for path in SITE.rglob("*.html"):
        assert part.findall(path.read_text(encoding="utf-8")) == [], path
    for path in SITE.rglob("*.css"):
        assert re.findall(r"(?:@import|url\()\s*[\"']?(?:https?:)?//", path.read_text(encoding="utf-8")) == [], path
