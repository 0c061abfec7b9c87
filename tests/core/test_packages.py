"""The optimizers of further packages, each in turn at every place: right or refused; docs/optimizers.md says which."""

from __future__ import annotations

import re
from typing import Any

import pytest
import torch

import layerwise
import optimizers_page
import packages
from layerwise.rules import Constant
from other_optimizers import Guest, build, further_guests, surroundings
from other_trials import (
    CHANGING,
    DISTINCT,
    Scheduled,
    attach,
    by_hand,
    distance,
    factors,
    same,
    trained,
    tried,
    with_permanent_groups,
)

pytestmark = [
    # What the packages themselves import is deprecated here and there.
    pytest.mark.filterwarnings("ignore::DeprecationWarning"),
]
# Of packages with many classes, those that differ in what they keep and where; `--faults` tries all.
SOME = {
    "bitsandbytes.optim": {"AdEMAMix8bit", "AdamW", "LARS", "Lion8bit", "PagedAdamW8bit"},
    "heavyball": {"AdamW", "MSAMLaProp", "SAMWrapper", "SFAdamW", "SOAP"},
    "timm.optim": {"Adahessian", "Lamb", "Lookahead", "MADGRAD", "Muon"},
    "torch_optimizer": {"A2GradExp", "AdaBound", "Adafactor", "Lookahead", "RAdam", "Ranger", "SWATS"},
    "torchao.optim": {"AdamW8bit"},
}
ALWAYS = {"lion_pytorch"}  # a small package, which every run of the tests tries
GUESTS: list[Any] = []
for _package in packages.PACKAGES:
    if not packages.is_here(_package):
        _skip = pytest.mark.skip(reason=f"{packages.PACKAGES[_package]} is not installed")
        GUESTS.append(pytest.param(Guest(_package, ""), id=_package, marks=_skip))
        continue
    for _guest in further_guests(_package):
        _few = _guest.name in SOME.get(_package, {_guest.name})
        _mark = () if _package in ALWAYS else pytest.mark.full if _few else pytest.mark.faults
        GUESTS.append(pytest.param(_guest, id=str(_guest), marks=_mark))
ROUNDING = {torch.float64: 1e-12, torch.float32: 1e-6}
"""Relative to how far the weights move."""
by_guest = pytest.mark.parametrize("guest", GUESTS, scope="module")  # the tests of one follow each other: see `tried`


@by_guest
def test_it_is_right_or_refused_at_each_place(guest: Guest) -> None:
    finding = tried(guest)
    assert "WRONG" not in str(finding)
    assert finding.one, "an adapter whose factors are all 1 has changed the training"
    assert finding.automatic is None or finding.places[finding.automatic] in {"yes", "own groups", "inside"}
    assert set(finding.reasons) == {
        place for place, word in finding.places.items() if word in {"refused", "own groups"}
    }


@by_guest
def test_a_refusal_changes_nothing_and_its_remedy_works(guest: Guest) -> None:
    places = tried(guest).places
    for place in (name for name, word in places.items() if word in {"refused", "own groups"}):
        with surroundings(guest):
            run = build(guest)
            before, groups = {**vars(run.inner)}, [{**group} for group in run.inner.param_groups]
            start = [p.detach().clone() for p in run.model.parameters()]
            with pytest.raises(ValueError, match=r"use |attach to|build it with") as caught:
                layerwise.LayerwiseLR(run.stepped, Constant({"*": 2.0}), run.model, apply=place, decay="plain")
            assert vars(run.inner) == before
            assert [list(group) for group in run.inner.param_groups] == [list(group) for group in groups]
            assert same([p.detach() for p in run.model.parameters()], start)
            assert_remedies_work(guest, str(caught.value))


def assert_remedies_work(guest: Guest, message: str) -> None:
    """Do what the message advises."""
    found = set(re.findall(r"use apply='(\w+)'", message))
    places = tried(guest).places
    for place in found & set(places):
        assert places[place] in {"yes", "inside"} or "param_groups" in message
    if "gradient" in found:
        run = build(guest)
        attach(run, Constant({"third": 3.0}), apply="gradient")
        assert not same(trained(run), trained(build(guest)))
    if "a group for each layer" in message:
        assert "own groups" in places.values()
    if "permanent groups" in message:
        fixed = [DISTINCT[0]] * len(DISTINCT)
        neutral = [factors(1, 1, 1)] * len(DISTINCT)
        weights = [with_permanent_groups(build(guest, by_layer=True), entries) for entries in (fixed, neutral)]
        assert not same(*weights)
    if "changes next to nothing" in message:
        tripled = [factors(3, 3, 3)] * len(DISTINCT)
        start, bare = build(guest).weights(), trained(build(guest))
        assert distance(by_hand(build(guest), tripled, "gradient"), bare) < 0.02 * distance(bare, start)
    if "use another optimizer" in message:
        run = build(guest)
        run.stepped = run.target = torch.optim.AdamW(run.model.parameters(), lr=0.01)
        attach(run, Constant({"third": 3.0}))
        assert not same(trained(run), build(guest).weights())
    assert found or re.search(r"permanent groups|a group for each layer|attach to|use another|without", message)


@by_guest
def test_the_page_says_what_is_found(guest: Guest) -> None:
    title = optimizers_page.title(guest.package)
    section = optimizers_page.sections().get(title)
    if section is None:
        pytest.skip(f"docs/optimizers.md was written without {title}")
    assert optimizers_page.full_row(guest, section) == optimizers_page.cells(tried(guest))


ON_ACCELERATORS = {
    Guest("lion_pytorch", "Lion"): ("lr", "scaled writes"),
    Guest("optimi", "AdamW"): ("lr", "scaled writes"),
    Guest("prodigyopt", "Prodigy"): ("update", "scaled writes"),
    Guest("heavyball", "AdamW"): ("update", "interpolation"),  # its kernels write into parameters unseen
}


@pytest.mark.parametrize(
    "guest",
    [pytest.param(guest, marks=() if guest.package in ALWAYS else pytest.mark.full) for guest in ON_ACCELERATORS],
    ids=str,
)
def test_on_an_accelerator_it_equals_a_slow_reference(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip(guest.package)
    monkeypatch.setattr("layerwise._places.allowed.is_on_accelerator", lambda optimizer: True)
    place, route = ON_ACCELERATORS[guest]
    with surroundings(guest):
        run = build(guest)
        adapter = attach(run, Scheduled(CHANGING))
        assert f"apply={place!r} by {route}" in repr(adapter)
        result = trained(run)
        if place == "lr":
            expected = with_permanent_groups(build(guest, by_layer=True), CHANGING)
        else:
            expected = by_hand(build(guest), CHANGING, place)
        assert distance(result, expected) <= ROUNDING[guest.dtype] * distance(result, build(guest).weights())


@pytest.mark.parametrize("name", ["AdamWScheduleFree", "SGDScheduleFree"])
def test_schedule_free_is_not_scaled_on_an_accelerator(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("schedulefree")
    monkeypatch.setattr("layerwise._places.allowed.is_on_accelerator", lambda optimizer: True)
    guest = Guest("schedulefree", name)
    run = build(guest, by_layer=True)
    adapter = attach(run, Scheduled(CHANGING))
    assert adapter.apply == "lr"
    assert "scaled writes" not in repr(adapter)
    assert same(trained(run), with_permanent_groups(build(guest, by_layer=True), CHANGING))
