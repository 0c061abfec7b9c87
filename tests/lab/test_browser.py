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
  for (const svg of document.querySelectorAll('.plot svg')) {
    const seen = new Set(), boxes = [];
    for (const text of svg.querySelectorAll('text')) {
      const b = text.getBoundingClientRect();
      const key = [text.textContent, Math.round(b.left), Math.round(b.top)].join();
      if (!b.width || text.getAttribute('opacity') === '0' || seen.has(key)) continue;
      seen.add(key);
      boxes.push([b, text.textContent]);
    }
    for (let i = 0; i < boxes.length; i++) for (let j = i + 1; j < boxes.length; j++) {
      const [a, b] = [boxes[i][0], boxes[j][0]];
      const x = Math.min(a.right, b.right) - Math.max(a.left, b.left);
      const y = Math.min(a.bottom, b.bottom) - Math.max(a.top, b.top);
      // The box of a text holds the room of letters that it may not have: a few pixels upright are no overlap.
      if (x > 1 && y > 0.4 * Math.min(a.height, b.height))
        found.push([svg.parentElement.id, boxes[i][1], boxes[j][1], x, y]);
    }
  }
  return found; }"""
"""Gives the pairs of texts of a drawing that lie on each other."""

VISIBLE = "[...document.querySelectorAll('.plot svg')].filter(e => e.checkVisibility())"


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
        "table": report.write(table, "layerwise run singh2015-table1 --scale reduced", figures=True),
        "sweep": report.write(sweep, f"layerwise run --out {HOSTILE}"),
        "hostile": report.write(hostile, HOSTILE_WORD),
    }


def until(page, expression, arg=None):
    """Wait until an expression is true. Playwright's own way evaluates a string, which the policy forbids."""
    for _ in range(600):
        if page.evaluate(expression, arg):
            return
        page.wait_for_timeout(50)
    raise AssertionError(f"this did not come true in 30 s: {expression}")


@pytest.fixture
def view(browser):
    """Give a function that opens a page and keeps what it says and asks for."""
    opened = []

    def open_page(path, width=1280, scheme="light", *, wait=True):
        made = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
        opened.append(made)
        made.told, made.asked = [], []
        made.on("console", lambda message: made.told.append(message.text))
        made.on("pageerror", lambda error: made.told.append(str(error)))
        made.on("dialog", lambda dialog: made.told.append(dialog.message))
        made.on("request", lambda request: made.asked.append(request.url))
        made.goto(path.as_uri())
        if wait:
            until(made, DRAWN)
        return made

    yield open_page
    for each in opened:
        each.close()


DRAWN = """[...document.querySelectorAll('.plot')].filter(each => each.clientWidth)
  .every(each => each.dataset.drawn && each.querySelector('svg'))"""
"""Every figure that has room is drawn."""

FIGURE = "curve-test-error-sgd"


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 400])
@pytest.mark.parametrize("name", ["table", "sweep", "hostile"])
def test_a_page_is_quiet_and_can_be_read(view, pages, name, width, scheme):
    page = view(pages[name], width, scheme)
    assert [address for address in page.asked if not address.startswith("data:")] == [pages[name].as_uri()]
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for tab in range(page.locator(".tabs > label").count()):
        page.locator(".tabs > label").nth(tab).click()
        until(page, DRAWN)
        assert page.evaluate(OVERLAPS) == []
        assert page.evaluate(OVERFLOWS) == []
        assert page.evaluate(CONTRASTS) == []
    sizes = page.evaluate(f"{VISIBLE}.map(e => e.getBoundingClientRect()).map(b => Math.min(b.width, b.height))")
    assert min(sizes) > 50
    for summary in page.locator("summary:visible").all():
        summary.click()
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    assert page.evaluate(OVERFLOWS) == []
    assert page.evaluate(CONTRASTS) == []
    assert page.told == []


def test_hovering_a_curve_shows_arm_seed_step_and_value(view, pages):
    page = view(pages["table"])
    point = page.locator(f"#{FIGURE} svg .mark-symbol path").nth(-2)
    point.scroll_into_view_if_needed()
    point.hover()
    told = page.locator("#vg-tooltip-element")
    told.wait_for(state="visible")
    keys = told.locator("td.key").all_inner_texts()
    assert [key.rstrip(":") for key in keys] == ["arm", "seed", "iteration", "test error, %"]
    arm, seed, step, value = told.locator("td.value").all_inner_texts()
    assert arm in ("plain", "layer-adaptive", "plain at the mean factor")
    assert seed in ("mean", "0", "1", "2", "3", "4")
    assert step == "1,400"
    assert 1 < float(value) < 10


def test_hovering_a_heat_map_shows_layer_step_and_value(view, pages):
    page = view(pages["table"])
    cell = page.locator("#factor-sgd-layer-adaptive svg .mark-rect path").first
    cell.scroll_into_view_if_needed()
    cell.hover()
    told = page.locator("#vg-tooltip-element")
    told.wait_for(state="visible")
    assert told.locator("td.value").all_inner_texts() == ["conv1", "1", "1"]


def test_an_arm_is_hidden_and_shown_again_from_the_keyboard(view, pages):
    page = view(pages["table"])
    lines = page.locator(f"#{FIGURE} svg .mark-line path[stroke='var(--plain)']")
    assert lines.count() > 1
    button = page.locator(".legend button", has_text="plain").first
    button.focus()
    page.keyboard.press("Enter")
    until(page, f"!document.querySelector('#{FIGURE} svg .mark-line path[stroke=\"var(--plain)\"]')")
    pressed = page.locator(".legend button[aria-pressed=false]").all_inner_texts()
    assert set(pressed) == {"plain"}
    page.keyboard.press("Enter")
    until(page, f"document.querySelector('#{FIGURE} svg .mark-line path[stroke=\"var(--plain)\"]')")
    assert page.locator(".legend button[aria-pressed=false]").count() == 0
    assert page.told == []


def test_a_heading_sorts_its_column_both_ways(view, pages):
    page = view(pages["table"])
    table = page.locator("table.sorts", has=page.locator("tfoot")).first
    first = table.locator("tbody th")
    assert first.all_inner_texts() == ["conv1", "conv2", "ip1"]
    head = table.locator("thead th").nth(1)
    for order, names in (("ascending", ["conv1", "conv2", "ip1"]), ("descending", ["ip1", "conv2", "conv1"])):
        head.locator("button").click()
        assert head.get_attribute("aria-sort") == order
        assert first.all_inner_texts() == names


def test_the_scale_and_the_smoothing_of_curves_can_be_chosen(view, pages):
    page = view(pages["table"])
    row = page.locator(".charts[data-curves]").first
    plot = page.locator(f"#{FIGURE} svg")
    changed = f"before => document.querySelector('#{FIGURE} svg')?.innerHTML !== before"
    before = plot.inner_html()
    for control in (row.locator("input[type=checkbox]"), row.locator("input[type=range]")):
        control.focus()
        page.keyboard.press("Space" if control.get_attribute("type") == "checkbox" else "PageUp")
        until(page, changed, arg=before)
        until(page, DRAWN)
        before = plot.inner_html()
    assert page.told == []


def test_a_curve_is_zoomed_by_the_wheel_with_shift(view, pages):
    page = view(pages["table"])
    plot = page.locator(f"#{FIGURE} svg")
    plot.scroll_into_view_if_needed()
    before, box = plot.inner_html(), plot.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2)
    page.keyboard.down("Shift")
    page.mouse.wheel(0, -300)
    until(page, f"before => document.querySelector('#{FIGURE} svg').innerHTML !== before", arg=before)
    page.keyboard.up("Shift")


def test_every_tab_shows_its_own_maps_with_cells(view, pages):
    page = view(pages["table"])
    seen = []
    labels = page.locator(".tabs > label")
    assert labels.all_inner_texts() == ["Factor", "Rate", "Gradient norm", "Update to weight"]
    for number in range(4):
        labels.nth(number).click()
        until(page, DRAWN)
        assert page.locator(".pane:visible").count() == 1
        maps = page.locator(".pane:visible .plot svg")
        assert maps.count() == 6
        boxes = [maps.nth(place).locator(".mark-rect path").first.bounding_box() for place in range(6)]
        assert all(box and box["width"] > 0 for box in boxes)
        seen.append(page.locator(".pane:visible").screenshot())
    assert len(set(seen)) == 4


def test_the_tabs_can_be_used_from_the_keyboard(view, pages):
    page = view(pages["table"])
    page.locator("#experiment-1-tab-factor").focus()
    page.keyboard.press("ArrowRight")
    assert page.locator("#experiment-1-pane-rate").is_visible()
    assert not page.locator("#experiment-1-pane-factor").is_visible()


def test_every_figure_has_a_label_and_a_sentence(view, pages):
    page = view(pages["sweep"])
    assert page.locator(".plot").count() > 15
    told = """[...document.querySelectorAll('.plot')].every(each => each.getAttribute('aria-label')
      && document.getElementById(each.getAttribute('aria-describedby')).textContent)"""
    assert page.evaluate(told)
    assert page.locator("[id^=chosen-layers] .mark-symbol path").count() > 0


def test_without_scripts_the_tables_and_verdicts_are_there(browser, pages):
    context = browser.new_context(java_script_enabled=False)
    page = context.new_page()
    page.goto(pages["table"].as_uri())
    assert page.locator("table.verdict tbody tr").count() == 6
    assert page.locator(".answer").all_inner_texts() == ["yes", "unclear"] * 3
    assert page.locator("figure details table").count() == 9 + 24
    assert page.locator("noscript").is_visible()
    context.close()


def test_figures_follow_the_width_of_the_page(view, pages):
    page = view(pages["table"])
    page.set_viewport_size({"width": 400, "height": 900})
    until(page, f"document.querySelector('#{FIGURE} svg').clientWidth < 360")
    assert page.evaluate("document.documentElement.scrollWidth") <= 400


def test_files_of_figures_are_drawings_by_themselves(view, pages):
    folder = pages["table"].parent / "figures"
    page = view(folder / "differences-sgd.svg", 800, wait=False)
    assert page.told == []
    assert page.evaluate("document.documentElement.tagName") == "svg"
    assert page.evaluate("document.querySelectorAll('circle, path').length") > 5
