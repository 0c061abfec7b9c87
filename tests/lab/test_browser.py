"""The report in a real browser: nothing asked for, nothing overlaps, everything can be read in light and dark."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from dataclasses import replace

import pytest
from made_up import (
    SWEEP_LAYERS,
    TABLE_STEPS,
    finish_plan,
    outcome_of,
    sweep_plan,
    sweep_selections,
    sweep_value,
    table_plan,
    table_value,
)

from layerwise.lab import report

pytestmark = pytest.mark.full

HOSTILE = '"><script>alert("x")</script>'
HOSTILE_WORD = "<img/src=x onerror=alert(1)>" + "w" * 90

OWN = "const own = element => [...element.childNodes].some(n => n.nodeType === 3 && n.data.trim());"
"""Says whether an element has text of its own."""

CONTRASTS = (
    "() => {"
    + OWN
    + """
  const numbers = text => { const m = text.match(/[\\d.]+/g).map(Number); return m.length > 3 ? m : [...m, 1]; };
  const luminance = c => { const [r, g, b] = c.slice(0, 3).map(v => { v /= 255;
    return v <= 0.04045 ? v / 12.92 : ((v + 0.055) / 1.055) ** 2.4; }); return 0.2126 * r + 0.7152 * g + 0.0722 * b; };
  const behind = element => { for (let e = element; e; e = e.parentElement) {
    const c = numbers(getComputedStyle(e).backgroundColor); if (c[3] === 1) return c; } return [255, 255, 255, 1]; };
  const found = [];
  for (const element of document.querySelectorAll('body *')) {
    if (!own(element) || !element.getClientRects().length) continue;
    const style = getComputedStyle(element);
    const colour = numbers(element.ownerSVGElement ? style.fill : style.color);
    const [a, b] = [luminance(colour), luminance(behind(element))].sort((x, y) => y - x);
    const ratio = (a + 0.05) / (b + 0.05);
    if (ratio < 4.5) found.push([element.tagName, element.textContent.slice(0, 40), ratio]);
  }
  return found; }"""
)
"""Gives the texts whose contrast against their background is below 4.5."""

OVERFLOWS = (
    "() => {"
    + OWN
    + """
  const wide = document.documentElement.clientWidth, found = [];
  for (const element of document.querySelectorAll('body *')) {
    if (!own(element) || !element.getClientRects().length) continue;
    const box = element.getBoundingClientRect();
    const holder = element.closest('.scroll, .card');
    const inside = holder && holder.classList.contains('scroll') && holder.scrollWidth > holder.clientWidth;
    const edge = holder ? holder.getBoundingClientRect() : {left: 0, right: wide};
    if (!inside && (box.right > Math.min(edge.right, wide) + 1 || box.left < edge.left - 1))
      found.push([element.tagName, element.textContent.slice(0, 40), box.left, box.right, edge.right]);
  }
  return found; }"""
)
"""Gives the texts that leave their card or the page."""

OVERLAPS = """() => {
  const found = [];
  for (const svg of document.querySelectorAll('svg[role=img]')) {
    const seen = new Set(), boxes = [];
    for (const text of svg.querySelectorAll('text')) {
      const b = text.getBoundingClientRect();
      const key = [text.textContent, Math.round(b.left), Math.round(b.top)].join();
      if (!b.width || seen.has(key)) continue;
      seen.add(key);
      boxes.push([b, text.textContent]);
    }
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, b] = [boxes[i][0], boxes[j][0]];
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      // The box of a text holds the room of letters that it may not have: a few pixels upright are no overlap.
      if (x > 1 && y > 0.4 * Math.min(a.height, b.height))
        found.push([svg.getAttribute('aria-label').slice(0, 60), boxes[i][1], boxes[j][1], x, y]);
    }
  }
  return found; }"""
"""Gives the pairs of texts of a drawing that lie on each other."""

VISIBLE = "[...document.querySelectorAll('svg[role=img]')].filter(e => e.checkVisibility())"


@pytest.fixture(scope="module")
def browser() -> Iterator:
    """Start a real Chromium, or skip."""
    playwright = pytest.importorskip("playwright.sync_api", reason="playwright is not installed")
    place = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if place is None:
        pytest.skip("no Chromium is installed: the report is not looked at in a browser")
    with playwright.sync_playwright() as driver:
        started = driver.chromium.launch(executable_path=place, args=["--no-sandbox"])
        yield started
        started.close()


@pytest.fixture(scope="module")
def pages(tmp_path_factory):
    """Write a page of Table I, one of thresholds, and one in which every name is hostile."""
    runs, out = tmp_path_factory.mktemp("runs"), tmp_path_factory.mktemp("pages")
    finish_plan(table_plan(), runs, table_value, steps=TABLE_STEPS)
    names = [HOSTILE + SWEEP_LAYERS[0], *SWEEP_LAYERS[1:]]

    def selections(planned):
        made = sweep_selections(planned)
        return [{**each, "layers": dict(zip(names, each["layers"].values(), strict=True))} for each in made]

    more = {"layers": names, "selections": selections, "quantity": "accuracy"}
    finish_plan(sweep_plan("best"), runs, sweep_value, **more)
    table = outcome_of(table_plan(), runs, out / "table")
    sweep = outcome_of(sweep_plan("best"), runs, out / "sweep")
    hostile = outcome_of(table_plan(), runs, out / "hostile")
    plan = hostile.plan
    hostile.plan = hostile.results.plan = replace(
        plan,
        title=HOSTILE_WORD,
        source=HOSTILE,
        notes=(HOSTILE_WORD,),
        subjects=tuple(replace(each, words=f"{each.words} {HOSTILE_WORD}") for each in plan.subjects),
        arms=tuple(replace(each, words=f"{each.words} {HOSTILE_WORD}") for each in plan.arms),
    )
    return {
        "table": report.write(table, "layerwise run singh2015-table1 --scale reduced"),
        "sweep": report.write(sweep, f"layerwise run --out {HOSTILE}"),
        "hostile": report.write(hostile, HOSTILE_WORD),
    }


@pytest.fixture
def view(browser):
    """Give a function that opens a page and keeps what it says and asks for."""
    opened = []

    def open_page(path, width=1280, scheme="light"):
        made = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(made)
        made.told, made.asked = [], []
        made.on("console", lambda message: made.told.append(message.text))
        made.on("pageerror", lambda error: made.told.append(str(error)))
        made.on("dialog", lambda dialog: made.told.append(dialog.message))
        made.on("request", lambda request: made.asked.append(request.url))
        made.goto(path.as_uri())
        return made

    yield open_page
    for each in opened:
        each.close()


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
@pytest.mark.parametrize("name", ["table", "sweep", "hostile"])
def test_a_page_is_quiet_and_can_be_read(view, pages, name, width, scheme):
    page = view(pages[name], width, scheme)
    assert page.told == []
    assert [address for address in page.asked if not address.startswith("data:")] == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for tab in range(page.locator(".tabs > label").count()):
        page.locator(".tabs > label").nth(tab).click()
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(OVERFLOWS) == []
        assert page.evaluate(CONTRASTS) == []
    sizes = page.evaluate(f"{VISIBLE}.map(e => e.getBoundingClientRect()).map(b => Math.min(b.width, b.height))")
    assert min(sizes) > 50
    for summary in page.locator("summary").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWS) == []
    assert page.evaluate(CONTRASTS) == []


def test_every_tab_shows_its_own_maps_with_cells(view, pages):
    page = view(pages["table"])
    seen = []
    labels = page.locator(".tabs > label")
    assert labels.all_inner_texts() == ["Factor", "Rate", "Gradient norm", "Update to weight"]
    for number in range(4):
        labels.nth(number).click()
        assert page.locator(".pane:visible").count() == 1
        maps = page.locator(".pane:visible svg[role=img]")
        assert maps.count() == 6
        boxes = [maps.nth(place).locator("g.cells path").first.bounding_box() for place in range(6)]
        assert all(box and box["width"] > 0 for box in boxes)
        seen.append(page.locator(".pane:visible").screenshot())
    assert len(set(seen)) == 4


def test_the_tabs_can_be_used_from_the_keyboard(view, pages):
    page = view(pages["table"])
    page.locator("#tab-factor").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#pane-rate").is_visible()
    assert not page.locator("#pane-factor").is_visible()


def test_every_drawing_has_a_size_and_a_label(view, pages):
    page = view(pages["sweep"])
    assert page.locator("svg[role=img]").count() > 20
    assert page.evaluate("[...document.querySelectorAll('svg[role=img]')].every(e => e.getAttribute('aria-label'))")
    assert page.locator(".card g.cells circle").count() > 0


def test_files_of_figures_are_drawings_by_themselves(view, pages):
    folder = pages["table"].parent / "figures"
    page = view(folder / "differences-sgd-layer-adaptive.svg", 800)
    assert page.told == []
    assert page.evaluate("document.documentElement.tagName") == "svg"
    assert page.evaluate("document.querySelectorAll('circle, path').length") > 5
