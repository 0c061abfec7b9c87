import re
from dataclasses import replace
from html.parser import HTMLParser

import pytest

from layerwise.lab.report import charts, render, summary
from layerwise.lab.verdict import compare

CLEAR = {
    "plain": [5.0, 5.1, 5.2, 4.9, 5.0],
    "layer-adaptive": [4.0, 4.12, 4.15, 3.92, 4.01],
    "control": [4.02, 4.0, 4.3, 3.8, 4.1],
}


class Checker(HTMLParser):
    """Keeps the addresses, the ids and the open elements of a page."""

    VOID = frozenset({"meta", "link", "line", "rect", "circle", "path", "br", "stop"})

    def __init__(self):
        super().__init__()
        self.addresses, self.ids, self.open = [], [], []

    def handle_starttag(self, tag, attrs):
        if tag not in self.VOID:
            self.open.append(tag)
        for name, value in attrs:
            if name in ("src", "href", "xlink:href", "srcset", "action", "data"):
                self.addresses.append(value)
            if name == "id":
                self.ids.append(value)

    def handle_startendtag(self, tag, attrs):
        pass

    def handle_endtag(self, tag):
        if tag not in self.VOID:
            assert self.open.pop() == tag


@pytest.fixture
def page(make_outcome):
    return render(make_outcome(CLEAR, ("sgd", "nag")), "layerwise demo")


def test_the_page_asks_the_network_for_nothing(page):
    checker = Checker()
    checker.feed(page)
    assert set(checker.addresses) <= {"data:,"}
    assert not re.search(r"https?:|//cdn|@import|fetch\(|<script|url\((?!#)", page)
    assert "default-src 'none'" in page


def test_the_page_is_well_formed_and_ids_are_unique(page):
    checker = Checker()
    checker.feed(page)
    assert checker.open == []
    assert len(checker.ids) == len(set(checker.ids))


def test_the_page_holds_verdict_table_charts_and_caveats(page):
    for words in (
        "beats the plain solver but not the control",
        "Student&#39;s t",
        "Bonferroni",
        "±",
        "plain at the mean factor",
        "conv2",
        "How it was run",
        "Caveats",
        "a processor, 2 cores",
        "prefers-color-scheme: dark",
    ):
        assert words in page
    # Two solvers: differences, error, loss, heat-map each; and two legends of three signs.
    assert len(re.findall(r'<svg role="img"', page)) == 8
    assert len(re.findall(r"<svg", page)) == 8 + 6


def test_hostile_strings_are_escaped(make_outcome):
    hostile = '<script>alert("x")</script>'
    outcome = make_outcome(CLEAR)
    for record in outcome.results.records.values():
        record["hardware"]["processor"] = hostile
        record["versions"]["torch"] = hostile
    outcome.title = hostile
    outcome.interrupted = True
    page = render(outcome, f"layerwise demo --out {hostile}")
    assert "<script" not in page
    assert page.count("&lt;script&gt;alert(&#34;x&#34;)") == 4


def test_the_label_of_a_chart_is_escaped():
    words = {"solver": '"><script>', "arm": "a", "against": "b", "iteration": 4}
    made_up = compare({0: 1.0}, {0: 2.0}, 2, **words)
    assert "<script" not in charts.differences([(made_up, replace(made_up))])[0]


def test_an_interrupted_demo_says_what_is_missing(make_outcome):
    outcome = make_outcome({"plain": [5.0]}, ("sgd", "nag"), interrupted=True)
    del outcome.results.records["nag", "plain", 0]
    page = render(outcome, "layerwise demo")
    assert "Interrupted" in page
    assert "1 of 6 runs are finished" in page
    assert "no pair of finished runs" in page
    assert "Rate of each layer" not in page


def test_a_diverged_run_is_flagged(make_outcome):
    outcome = make_outcome(CLEAR)
    outcome.results.records["sgd", "control", 0]["diverged_at"] = 1
    page = render(outcome, "layerwise demo")
    assert "1 of 5 diverged" in page
    assert "1 runs diverged" in page
    assert "1 of these runs diverged" in page


def test_one_seed_makes_a_page(make_outcome):
    page = render(make_outcome({arm: values[:1] for arm, values in CLEAR.items()}), "layerwise demo")
    assert "nan" not in page.lower()
    assert "fewer than 5 pairs" in page


def test_no_error_at_all_can_be_drawn(make_outcome):
    assert "<svg" in render(make_outcome({arm: [0.0] * 5 for arm in CLEAR}), "layerwise demo")


def test_the_summary_counts_what_is_shown(make_outcome):
    words = summary(make_outcome(CLEAR))
    assert "lower test error than the plain solver with 1 of 1 solvers, and with none of these" in words
    better = CLEAR | {"control": CLEAR["plain"]}
    assert "with 1 of these it is shown to be more" in summary(make_outcome(better))
    assert "not shown to lower" in summary(make_outcome(dict.fromkeys(CLEAR, CLEAR["plain"])))
