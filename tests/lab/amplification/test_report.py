import re
import shutil
from collections.abc import Iterator

import pytest
from test_report import Checker

from amplification.test_results import ACCURACIES
from layerwise.lab.amplification.training import ARMS
from layerwise.lab.report import amplification_charts, page
from layerwise.lab.report.amplification import render, summary

HOSTILE = '"><script>alert("x")</script>'


@pytest.fixture
def html(make_outcome):
    return render(make_outcome(ACCURACIES), "layerwise demo amplification")


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


def test_the_page_asks_the_network_for_nothing(html):
    checker = Checker()
    checker.feed(html)
    assert set(checker.addresses) <= {"data:,"}
    assert not re.search(r"https?:|//cdn|@import|fetch\(|<script|url\((?!#)", html)
    assert "default-src 'none'" in html


def test_the_page_is_well_formed_and_ids_are_unique(html):
    checker = Checker()
    checker.feed(html)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


def test_the_page_holds_verdict_table_maps_counts_and_caveats(html):
    for words in (
        "The gain is more than that of amplifying every layer",
        "Bonferroni",
        "best epoch",
        "best run",
        "Which layers were chosen",
        "layer1.0.conv1",
        "How many layers were chosen",
        "2, 2, 2, 2, 2",
        "none in 5",
        "No layer was ever chosen",
        "Share of amplified layers",
        "How it was run",
        "plain to 3, measured in 4, amplified to 5, measured in 6, amplified to 7, plain to 8",
        "these accuracies are not the paper&#39;s",
        "best of 9 or 19 thresholds",
        "In 10 phases no layer passed the threshold",
        "With --weight-decay 0",
    ):
        assert words in html
    # Four differences, accuracies and losses, three maps, one share.
    assert len(re.findall(r'<svg role="img"', html)) == 4 + 4 + 3 + 1 + 4


def test_hostile_strings_are_escaped(make_outcome):
    outcome = make_outcome(ACCURACIES)
    for record in outcome.results.records.values():
        record["hardware"]["processor"] = HOSTILE
        record["versions"]["torch"] = HOSTILE
        for choice in record["selections"]:
            choice["layers"] = {f"{HOSTILE}{name}": row for name, row in choice["layers"].items()}
    outcome.title = HOSTILE
    outcome.interrupted = True
    html = render(outcome, f"layerwise demo amplification --out {HOSTILE}")
    assert "<script" not in html
    assert html.count("&lt;script&gt;alert(&#34;x&#34;)") >= 4


def test_an_interrupted_demo_says_what_is_missing(make_outcome):
    html = render(make_outcome({"plain": [40.0]}, interrupted=True), "layerwise demo amplification")
    assert "Interrupted" in html
    assert "1 of 5 runs are finished" in html
    assert "no pair of finished runs" in html
    assert "Which layers were chosen" not in html
    assert "too few runs are finished" in html


def test_one_seed_makes_a_page(make_outcome):
    html = render(make_outcome({arm: [40.0] for arm in ARMS}), "layerwise demo amplification")
    assert "nan" not in html.lower()
    assert "fewer than 5 pairs" in html


def test_many_seeds_show_the_first_in_the_maps(make_outcome):
    outcome = make_outcome({arm: values * 2 for arm, values in ACCURACIES.items()})
    shown = amplification_charts.MAP_SEEDS
    assert f"The first {shown} seeds of 10." in render(outcome, "layerwise demo amplification")
    cells = amplification_charts._map_cells(outcome.results, "G")
    assert len({cell["left"] for cell in cells}) == 2 * shown


def test_a_diverged_run_is_flagged(make_outcome):
    outcome = make_outcome(ACCURACIES)
    outcome.results.records["all", 0]["diverged_at"] = 1
    html = render(outcome, "layerwise demo amplification")
    assert "1 of 5 diverged" in html
    assert "1 runs diverged" in html


def test_the_summary_claims_no_more_than_is_shown(make_outcome):
    words = summary(make_outcome(ACCURACIES))
    assert "is higher than that of plain training with layers by G; it is for layers by G shown to be more" in words
    same = dict.fromkeys(ACCURACIES, ACCURACIES["plain"])
    assert "are not shown to raise the test accuracy in any arm." in summary(make_outcome(same))
    lower = same | {"all": [30.0, 31.1, 32.0, 29.4, 30.5]}
    assert "they lower it in every layer" in summary(make_outcome(lower))
    both = ACCURACIES | {"all": [42.0, 43.2, 44.1, 41.5, 42.5]}
    assert "with layers by G and every layer; for none of these arms it is shown" in summary(make_outcome(both))


@pytest.mark.parametrize("scheme", ["light", "dark"])
@pytest.mark.parametrize("width", [1280, 390])
def test_a_browser_shows_the_page_without_errors_requests_or_overflow(browser, make_outcome, width, scheme):
    outcome = make_outcome(ACCURACIES)
    for record in outcome.results.records.values():
        for choice in record["selections"]:
            choice["layers"] = {f"{HOSTILE}{name}": row for name, row in choice["layers"].items()}
    path = page.write(outcome, render(outcome, f"layerwise demo amplification --out {HOSTILE}"))
    view = browser.new_page(viewport={"width": width, "height": 900}, color_scheme=scheme)
    told, asked = [], []
    view.on("console", lambda message: told.append(message.text))
    view.on("pageerror", lambda error: told.append(str(error)))
    view.on("dialog", lambda dialog: told.append(dialog.message))
    view.on("request", lambda request: asked.append(request.url))
    view.goto(path.as_uri())
    assert told == []
    assert [address for address in asked if not address.startswith("data:")] == [path.as_uri()]
    assert view.evaluate("document.documentElement.scrollWidth") <= width
    assert view.locator("svg[role=img]").count() == 16
    sizes = view.evaluate("[...document.querySelectorAll('svg[role=img]')].map(e => e.getBoundingClientRect().height)")
    assert min(sizes) > 50
    view.close()
