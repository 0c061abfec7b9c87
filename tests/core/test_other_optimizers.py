"""Every optimizer of pytorch-optimizer and schedulefree, and torch's Muon, as docs/optimizers.md states."""

from __future__ import annotations

import math
import re
from importlib import import_module
from typing import Any

import pytest
import torch
from torch import nn, optim

import layerwise
from layerwise._places.allowed import no_effect
from layerwise.optimizers import (
    FACTS,
    SCALE_INVARIANT_NAMES,
    SCHEDULE_FREE,
    Where,
    decay_is_coupled,
    has_decay,
    known_reason,
)
from layerwise.rules import Constant, LayerAdaptive

pytorch_optimizer = pytest.importorskip("pytorch_optimizer", reason="pytorch-optimizer is not installed")
schedulefree = pytest.importorskip("schedulefree", reason="schedulefree is not installed")

import optimizers_page  # noqa: E402
from other_optimizers import AROUND, NOT_TRIED, RATE, SHARPNESS, Guest, Run, all_guests, build, surroundings  # noqa: E402
from other_trials import CHANGING, DISTINCT, DRAWS, JOINED, PULL, Scheduled, attach, factors, pull, same, trained, tried  # noqa: E402
from other_trials import with_permanent_groups as permanent  # noqa: E402

GUESTS = [guest for guest in all_guests() if guest.name not in NOT_TRIED]
# Trying one takes a second or two; those that every run of the tests tries take less, and meet most of the reasons.
FEW = {
    *("AdaBound", "AliG", "EmoNavi", "GSAM", "LARS", "Lion", "Lookahead", "PID", "SGDW", "ScheduleFreeSGD", "SignSGD"),
}


def of_guests(guests: list[Guest]) -> Any:
    """Parametrize a test over optimizers; the tests of one follow each other, for what it was tried for is kept."""
    cases = [
        pytest.param(guest, id=str(guest), marks=() if str(guest).partition(".")[2] in FEW else pytest.mark.full)
        for guest in guests
    ]
    return pytest.mark.parametrize("guest", cases, scope="module")


by_guest = of_guests(GUESTS)


def with_reason(where: Where) -> Any:
    """Parametrize a test over the optimizers against which there is a reason."""
    found = []
    for guest in GUESTS:
        with surroundings(guest):
            found += [guest] if known_reason(build(guest).inner, where) else []
    return of_guests(found)


def test_all_that_the_packages_offer_is_tried() -> None:
    here = {guest.kind for guest in all_guests()}
    offered = {pytorch_optimizer.load_optimizer(name) for name in pytorch_optimizer.get_supported_optimizers()}
    assert {kind for kind in offered if not kind.__module__.startswith("torch.")} <= here
    for package in (pytorch_optimizer, schedulefree):
        kinds = {
            kind for kind in vars(package).values() if isinstance(kind, type) and issubclass(kind, optim.Optimizer)
        }
        assert {kind for kind in kinds if not kind.__module__.startswith("torch.")} <= here
    assert len(here) > 140


@by_guest
def test_it_is_right_or_refused_at_each_place(guest: Guest) -> None:
    finding = tried(guest)
    assert "WRONG" not in str(finding)
    assert finding.one, "an adapter whose factors are all 1 has changed the training"
    assert finding.automatic is None or finding.places[finding.automatic] in {"yes", "own groups", "inside"}
    refused = {place for place, word in finding.places.items() if word in {"refused", "own groups"}}
    assert set(finding.reasons) == refused


def entries(guest: Guest) -> list[dict[str, float]]:
    return CHANGING if {DRAWS, JOINED}.isdisjoint(tried(guest).remarks) else DISTINCT


@by_guest
def test_foreach_with_a_closure_equals_permanent_groups(guest: Guest) -> None:
    word = tried(guest).places["lr"]
    if word in {"refused", "inside"}:
        pytest.skip(f"apply='lr' is {word}")
    with surroundings(guest):
        run, by_hand = (build(guest, by_layer=own, foreach=True) for own in (word == "own groups", True))
        attach(run, Scheduled(entries(guest)), apply="lr")
        assert same(trained(run, with_closure=True), permanent(by_hand, entries(guest), with_closure=True))


@by_guest
def test_scaled_decay_is_that_of_permanent_groups_or_refused(guest: Guest) -> None:
    with surroundings(guest):
        run, reference, rule = build(guest), build(guest, by_layer=True), Scheduled(entries(guest))
        coupled = {decay_is_coupled(run.inner, group) for group in run.inner.param_groups}
        if tried(guest).places["gradient"] == "refused" or coupled == {False} or not has_decay(run.inner):
            pytest.skip("refused, or no decay that could be in the gradient")
        if known_reason(run.inner, "groups"):
            with pytest.raises(ValueError, match="pass decay='plain'"):
                attach(run, rule, apply="gradient", decay="scaled")
            return
        attach(run, rule, apply="gradient", decay="scaled")
        assert same(trained(run), with_scaled_decay(reference, entries(guest)))


def with_scaled_decay(run: Run, entries: list[dict[str, float]]) -> list[torch.Tensor]:
    """Train with the decay of permanent groups, and the gradients, multiplied by hand."""
    layer_of, groups, step_alone, entry = run.layer_of, run.inner.param_groups, run.inner.step, iter(entries)
    decays = [group.get("weight_decay") for group in groups]

    def step(*args: Any, **kwargs: Any) -> Any:
        now = next(entry)
        for group, decay in zip(groups, decays, strict=True):
            factor = now[layer_of[id(group["params"][0])]]
            if decay:
                group["weight_decay"] = decay * factor if factor != 1 else decay
            for p in group["params"]:
                p.grad.detach().mul_(factor)
        return step_alone(*args, **kwargs)

    run.inner.step = step
    return trained(run)


@by_guest
def test_a_refusal_changes_nothing_and_names_a_remedy(guest: Guest) -> None:
    for place in (name for name, word in tried(guest).places.items() if word in {"refused", "own groups"}):
        with surroundings(guest):
            run = build(guest)
            before = {**vars(run.inner)}
            with pytest.raises(ValueError, match=r"use |attach to|build it with"):
                layerwise.LayerwiseLR(run.stepped, Constant({"*": 2.0}), run.model, apply=place, decay="plain")
            assert vars(run.inner) == before
            assert not run.inner._optimizer_step_pre_hooks


def test_every_name_in_the_list_of_reasons_exists() -> None:
    names = SCALE_INVARIANT_NAMES.union(*(fact.names for fact in FACTS))
    missing = {name for name in names if not hasattr(import_module(name.partition(".")[0]), name.partition(".")[2])}
    assert not missing


@by_guest
def test_a_gradient_whose_scale_means_nothing_gives_a_warning(guest: Guest) -> None:
    if guest.name in AROUND | SHARPNESS or guest.variant:
        pytest.skip("its inner optimizer decides, or an option")
    if tried(guest).places["gradient"] == "refused":
        pytest.skip("it is not attached")
    with surroundings(guest):
        warned = no_effect(build(guest).stepped, "gradient", LayerAdaptive()) is not None
    assert warned == (tried(guest).places["gradient"] == "no effect")


@by_guest
def test_update_is_refused_exactly_where_the_optimizer_goes_back_to_weights_of_its_own(guest: Guest) -> None:
    places = tried(guest).places
    if guest.name in AROUND | SHARPNESS | {"SPlus", "EmoNavi"} or set(places.values()) == {"refused"}:
        pytest.skip("another reason, or the weights are the wrapper's")
    with surroundings(guest):
        assert (pull(guest) > PULL) == (places["update"] == "refused")


def without_reasons(patch: pytest.MonkeyPatch) -> None:
    for name in ("optimizers.known_reason", "_places.allowed.reason_against"):
        patch.setattr(f"layerwise.{name}", lambda optimizer, where: None)


@with_reason("lr")
def test_without_the_refusal_the_rate_would_do_nothing_or_break(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    if guest.name == "SWATS" and not guest.variant:
        pytest.skip("it turns to SGD later; the variant does within a few steps")
    without_reasons(monkeypatch)
    with surroundings(guest):
        run, alone = build(guest, separate=0.05), build(guest, separate=0.05)
        attach(run, Constant({"second": 3.0}), apply="lr")
        try:
            result = trained(run)
        except RuntimeError:  # the parts of a group disagree
            return
        groups = permanent(build(guest, by_layer=True, separate=0.05), [factors(1, 3, 1)] * len(CHANGING))
        assert same(result, trained(alone)) or not same(result, groups)


@pytest.mark.parametrize("guest", [g for g in GUESTS if g.name.startswith("DAdapt") or g.name == "Prodigy"], ids=str)
def test_the_first_group_s_rate_is_that_of_all(guest: Guest) -> None:
    def with_rates(**rates: float) -> Any:
        return permanent(build(guest, by_layer=True, separate=0.05), [factors(1, 1, 1) | rates] * len(CHANGING))

    assert same(with_rates(second=3.0, third=0.5), with_rates())
    assert not same(with_rates(first=3.0), with_rates())


@with_reason("groups")
def test_without_the_refusal_a_divided_group_would_be_wrong(guest: Guest, monkeypatch: pytest.MonkeyPatch) -> None:
    if guest.name == "SWATS" and not guest.variant:
        pytest.skip("it turns to SGD later; the variant does within a few steps")
    without_reasons(monkeypatch)
    with surroundings(guest):
        run = build(guest)
        if guest.name == "LoRARite":  # a layer of one parameter has no pair, and is not trained at all
            start = run.weights()
            names = [name for name, _ in run.model.named_parameters()]
            attach(run, Constant({name: 2.0 + i for i, name in enumerate(names)}), apply="lr", layers="parameter")
            assert same(trained(run), start)
            return
        with_closure = guest.name.startswith("Emo")
        attach(run, Scheduled(CHANGING), apply="lr")
        try:
            result = trained(run, with_closure=with_closure)
        except (RuntimeError, IndexError):
            return
        assert not same(result, permanent(build(guest, by_layer=True), CHANGING, with_closure=with_closure))


# RAdam's greatest rate has more in it, and that of the form after the paper is not kept.
COUNTING = [name for name in SCHEDULE_FREE if "RAdam" not in name and "Paper" not in name]


@of_guests([g for g in GUESTS if str(g) in COUNTING])
def test_schedule_free_with_a_group_a_layer_keeps_its_counts_in_each(guest: Guest) -> None:
    with surroundings(guest):
        with pytest.raises(
            ValueError, match=rf"build it with a group for each layer, {guest.name}\(layerwise.param_groups"
        ):
            attach(build(guest), LayerAdaptive())
        run = build(guest, by_layer=True)
        adapter = attach(run, Scheduled(CHANGING), apply="auto")
        trained(run)
    assert adapter.apply == "lr"
    greatest = [max(entry[name] for entry in CHANGING) for name in adapter.layers]
    assert [group["lr_max"] for group in run.inner.param_groups] == pytest.approx([RATE * f for f in greatest])
    assert {group.get("k", group.get("step")) for group in run.inner.param_groups} == {len(CHANGING)}


NOT_FOUND_BY_TRYING = {
    ("WSAM", "lr"): "takes a part of its step itself",
    ("SPlus", "update"): r"averages the weights for eval\(\) inside its step",
    ("LoRARite", "lr"): "pairs the parameters of a group by their positions",
    **{(f"Emo{name}", "update"): "moves the weights towards them" for name in ("Fact", "Lynx", "Navi")},
}


@pytest.mark.full
@pytest.mark.parametrize(("name", "place"), NOT_FOUND_BY_TRYING)
def test_what_six_steps_of_a_small_network_do_not_show_is_refused(name: str, place: Any) -> None:
    run = build(Guest("pytorch_optimizer", name, {"use_shadow": True} if name.startswith("Emo") else {}))
    with pytest.raises(ValueError, match=NOT_FOUND_BY_TRYING[name, place]):
        layerwise.LayerwiseLR(run.stepped, LayerAdaptive(), run.model, apply=place)


@pytest.mark.full
def test_under_update_splus_would_average_weights_that_are_never_reached(monkeypatch: pytest.MonkeyPatch) -> None:
    without_reasons(monkeypatch)
    run = build(Guest("pytorch_optimizer", "SPlus"), decay=0.01)
    attach(run, Constant({"*": 0.25}), apply="update")
    weight, average, rate = run.model.second.weight, torch.zeros(4, 6, dtype=torch.float64), 0.999
    for number in range(4):
        run.step(number)
        average = rate * average + (1 - rate) * weight.detach()
    run.stepped.eval()
    assert not torch.allclose(weight, average / (1 - rate**4), rtol=1e-3)


def test_a_wrapper_that_is_no_optimizer_names_the_one_it_holds() -> None:
    model = nn.Linear(2, 1)
    wrapper = schedulefree.ScheduleFreeWrapper(optim.SGD(model.parameters(), lr=0.1))
    with pytest.raises(TypeError, match=r"no torch\.optim\.Optimizer; pass the one that it holds, \.base"):
        layerwise.LayerwiseLR(wrapper, LayerAdaptive(), model)


def test_a_layer_in_muon_and_another_optimizer_has_the_norm_of_its_part_in_each() -> None:
    model = nn.Linear(3, 2, dtype=torch.float64)
    muon, adamw = optim.Muon([model.weight], lr=0.1), optim.AdamW([model.bias], lr=0.1)
    adapters = [layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model) for optimizer in (muon, adamw)]
    model(torch.ones(4, 3, dtype=torch.float64)).square().sum().backward()
    for part, optimizer, adapter in zip((model.weight, model.bias), (muon, adamw), adapters, strict=True):
        norm = math.sqrt(sum(g * g for g in part.grad.flatten().tolist()))
        optimizer.step()
        assert adapter.get_last_factors() == {"": pytest.approx(1 + math.log(1 + 1 / norm), rel=1e-14)}


def test_the_page_says_what_is_found() -> None:
    text = page()
    head, tail = optimizers_page.TEXT.format(
        versions=optimizers_page.versions(), table="{table}", reasons="{reasons}", further="{further}"
    ).split("{table}")
    assert text.startswith(head), "run make optimizers-page"
    remarks, after = tail.partition("{reasons}")[2].split("{further}")
    assert remarks in text, "run make optimizers-page"
    assert text.endswith(after), "run make optimizers-page"
    table = text.removeprefix(head).partition("\n\n")[0]
    assert re.findall(r"^\| `([^`\"]*)` \|", table, re.M) == [str(guest) for guest in all_guests()]
    numbers = [int(number) for number in re.findall(r" \((\d+)\) \|", table)]
    reasons = re.findall(r"^(\d+)\. It .*\.$", text.partition("**Remarks**")[0], re.M)
    assert list(dict.fromkeys(numbers)) == list(map(int, reasons)) == list(range(1, max(numbers) + 1))


@of_guests(all_guests())
def test_a_row_of_the_page_says_what_is_found(guest: Guest) -> None:
    text = page().partition("## Further packages")[0]
    assert optimizers_page.full_row(guest, text) == optimizers_page.cells(tried(guest), optimizers_page.PLACES)


def page() -> str:
    """Return the page, or skip a test where it was written with other versions."""
    text = optimizers_page.PAGE.read_text(encoding="utf-8")
    here = optimizers_page.versions()
    if here not in text:
        pytest.skip(f"docs/optimizers.md was written with other versions than {here}")
    return text
