"""What becomes of an optimizer of another package when a rule is attached to it, tried against slow references."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from functools import cache
from typing import Any

import torch
from torch import Tensor

import layerwise
import packages
from layerwise._places.allowed import why_not_rate
from layerwise._places.trial import reason_against
from layerwise.optimizers import PLACES, PlaceName
from layerwise.rules import Constant, LayerAdaptive, Rule
from other_optimizers import AROUND, NOT_TRIED, SHARPNESS, Guest, Run, build, draws_random_numbers, surroundings

Factors = dict[str, float]
NAMES = ("first", "second", "third")
CURVATURE = 0.05
DRAWS, JOINED = "draws random numbers", "a statistic over all layers"
CLOSE = 1e-9
"""Of the way that the weights go: rounding in float64, which some optimizers enlarge."""
SINGLE = 1e-5
"""The same in float32."""
EIGHT_BITS = 2e-2
"""The same where rounding of the weights may take a state of eight bits or fewer to its next level."""


def factors(*numbers: float) -> Factors:
    """Return the factors of the three layers."""
    return dict(zip(NAMES, numbers, strict=True))


# Layers that share a factor, steps at which all are 1, and factors that change while counters go on.
CHANGING = [factors(0.5, 1.25, 2), factors(1, 1, 1), factors(2, 0.25, 2)]
CHANGING += [factors(0.5, 1.25, 2), factors(1, 3, 1), factors(0.75, 0.75, 0.75)]
# Layers that share a factor share a group, so that random numbers are drawn, and sums over all layers made, in another
# order.
DISTINCT = [factors(0.5, 1.25, 2), factors(1.5, 0.5, 0.75)] * 3


class Scheduled(Rule):
    """The factors of a list, one entry a step."""

    needs = ()

    def __init__(self, entries: Sequence[Factors]) -> None:
        self.entries = entries

    def init(self, layers: Any, device: Any) -> dict[str, Any]:
        """Begin with the first."""
        return {"step": 0, "_names": [layer.name for layer in layers]}

    def factors(self, statistics: Any, state: dict[str, Any]) -> tuple[Tensor, dict[str, Any]]:
        """Return the next."""
        now = self.entries[state["step"]]
        return torch.tensor([now[name] for name in state["_names"]]), {**state, "step": state["step"] + 1}


def attach(run: Run, rule: Any, **arguments: Any) -> layerwise.LayerwiseLR:
    """Attach a rule to the optimizer of a run."""
    model = None if hasattr(run.stepped, "fp32_params") else run.model
    return layerwise.LayerwiseLR(run.target, rule, model, **{"decay": "plain", **arguments})


def trained(run: Run, before: Callable[[int], None] = lambda step: None, *, with_closure: bool = False) -> list[Tensor]:
    """Return the weights after six steps."""
    for step in range(len(CHANGING)):
        before(step)
        run.step(step, with_closure=with_closure)
    return run.weights()


def with_permanent_groups(
    run: Run, entries: Sequence[Factors], *, inside: bool = False, with_closure: bool = False
) -> list[Tensor]:
    """Train with a group a layer, the rates set by hand before each step, or while the inner optimizer steps only."""
    layer_of, groups, step_alone = run.layer_of, run.inner.param_groups, run.inner.step
    rates = [group["lr"] for group in groups]
    now: Factors = {}

    def set_rates(entry: Factors) -> None:
        for group, rate in zip(groups, rates, strict=True):
            factor = entry[layer_of[id(group["params"][0])]]
            group["lr"] = rate * factor if factor != 1 else rate

    def step_inside(*args: Any, **kwargs: Any) -> Any:
        set_rates(now)
        result = step_alone(*args, **kwargs)
        set_rates(factors(1, 1, 1))
        return result

    def before(step: int) -> None:
        now.update(entries[step])
        if not inside:
            set_rates(now)

    if inside:
        run.inner.step = step_inside
    return trained(run, before, with_closure=with_closure)


def by_hand(run: Run, entries: Sequence[Factors], place: str) -> list[Tensor]:
    """Train with the gradients multiplied before each step, or the weights moved after it."""
    layer_of, step_alone, parameters = run.layer_of, run.inner.step, run.parameters
    entry = iter(entries)

    def step(*args: Any, **kwargs: Any) -> Any:
        now = next(entry)
        old = [p.detach().clone() for p in parameters]
        with torch.no_grad():
            for p in parameters if place == "gradient" else []:
                if p.grad is not None:
                    p.grad.mul_(now[layer_of[id(p)]])
        result = step_alone(*args, **kwargs)
        with torch.no_grad():
            for p, before in zip(parameters, old, strict=True) if place == "update" else []:
                p.copy_(before + now[layer_of[id(p)]] * (p - before))
        return result

    run.inner.step = step
    return trained(run)


def distance(first: list[Tensor], second: list[Tensor]) -> float:
    """Return the largest difference between weights; infinite if one is not a number."""
    largest = [(a - b).abs().max().item() for a, b in zip(first, second, strict=True)]
    return max(d if d == d else float("inf") for d in largest)


def same(first: list[Tensor], second: list[Tensor]) -> bool:
    """Tell whether weights are equal to the bit."""
    return all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


@dataclass
class Finding:
    """What was found of an optimizer.

    Args:
        guest: The optimizer.
        automatic: The place that `apply="auto"` takes, or None.
        places: Of each place: `"yes"`, `"own groups"` (with a group a layer), `"inside"` (while the inner optimizer
            steps), `"no effect"`, `"refused"`, or `"WRONG"`.
        reasons: Why places are refused, or groups of several layers at this place.
        messages: What the refusals say in full.
        remarks: What else is to be known.
        one: Whether nothing changes at factor 1, without and with a closure.
    """

    guest: Guest
    automatic: str | None = None
    places: dict[str, str] = field(default_factory=dict)
    reasons: dict[str, str] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)
    remarks: list[str] = field(default_factory=list)
    one: bool = True


@cache
def tried(guest: Guest) -> Finding:
    """Try everything on an optimizer; on those of further packages what matters most, in a third of the time."""
    finding = Finding(guest)
    places: tuple[PlaceName, ...] = ("lr", "update") if guest.further else PLACES
    skipped = packages.NOT_TRIED.get(guest.key) if guest.further else NOT_TRIED.get(guest.name)
    if skipped:
        finding.remarks.append(f"not tried here: {skipped}")
        return finding
    with surroundings(guest):
        run = build(guest)
        never = reason_against(run.stepped, "anywhere")
        if never is not None:
            finding.reasons = dict.fromkeys(places, never)
            finding.places = dict.fromkeys(places, "refused")
            return finding
        remark_on_wrapping(run, finding)
        draws = guest.further or draws_random_numbers(build(guest))
        joined = guest.further or are_joined(guest)
        for place in places:
            finding.places[place] = place_tried(guest, place, finding, draws=draws, joined=joined)
        by_layer = finding.places["lr"] == "own groups" and finding.places["update"] == "refused"
        if any(finding.places[place] != "refused" for place in ("lr", "update")):
            finding.automatic = attach(build(guest, by_layer=by_layer), Constant({"*": 2.0})).apply
        if guest.further:
            finding.one = nothing_changes(guest, finding, by_layer, with_closure=False)
            return finding
        finding.one = all(nothing_changes(guest, finding, by_layer, with_closure) for with_closure in (False, True))
        finding.remarks += [DRAWS] if draws else []
        finding.remarks += [JOINED] if joined else []
        if finding.automatic == "lr":
            remark_on_zero(guest, finding, by_layer)
    return finding


def are_joined(guest: Guest) -> bool:
    """Tell whether other weights and gradients of one layer change another layer, where each has a loss of its own."""
    for name in ("second", "third"):
        run = build(guest, separate=CURVATURE)
        with torch.no_grad():
            for p in run.model.get_submodule(name).parameters():
                p.mul_(1.5)
        doubled = [factors(1, 1, 1) | {name: 2.0}] * len(CHANGING)
        if changed_layers(guest, by_hand(run, doubled, "gradient")) - {name}:
            return True
    return False


def changed_layers(guest: Guest, weights: list[Tensor], *, by_layer: bool = False) -> set[str]:
    """Return the layers that have become other than without an adapter, where each has a loss of its own."""
    run = build(guest, separate=CURVATURE, by_layer=by_layer)
    named = [name.partition(".")[0] for name, _ in run.model.named_parameters()] * 2  # trained, and evaluated
    return {name for name, a, b in zip(named, trained(run), weights, strict=True) if not torch.equal(a, b)}


def remark_on_wrapping(run: Run, finding: Finding) -> None:
    """Say where to attach, if the factor acts on an optimizer inside."""
    if run.inner is not run.stepped:
        name = next(k for k, v in vars(run.stepped).items() if v is run.inner)
        finding.remarks.append(f"{'acts on' if run.target is run.stepped else 'attach to'} its `.{name}`")
    if hasattr(run.stepped, "fp32_params"):
        finding.remarks.append("trains copies: build it from `named_parameters()` and pass no model")


def place_tried(guest: Guest, place: PlaceName, finding: Finding, *, draws: bool, joined: bool) -> str:
    """Compare an attached rule at one place to its slow reference."""
    entries = DISTINCT if draws or joined else CHANGING
    for by_layer in (False, True):
        run = build(guest, by_layer=by_layer)
        try:
            attach(run, Scheduled(entries), apply=place)
        except ValueError as error:
            against = why_not_rate(run.inner) if place == "lr" else reason_against(run.inner, place)
            reason = against or reason_against(run.inner, "groups") or outer_reason(run) or "unknown"
            finding.reasons[place] = reason if reason in str(error) else f"WRONG: {error}"
            finding.messages[place] = str(error)
            continue
        one = build(guest, separate=CURVATURE, by_layer=by_layer)
        attach(one, Constant({"third": 3.0}), apply=place)
        changed = changed_layers(guest, trained(one), by_layer=by_layer)
        alone = changed == {"third"} or ("third" in changed and (draws or joined))
        if not (alone or (place == "gradient" and means_nothing(guest))):
            return f"WRONG: a factor on the third layer changes {sorted(changed)}"
        if guest.further and guest.key not in packages.AROUND and place == "update" and pull(guest) > PULL:
            return "WRONG: it goes back to weights of its own"
        return equal_to_reference(guest, place, trained(run), entries, "own groups" if by_layer else "yes")
    return "refused"


def outer_reason(run: Run) -> str | None:
    """Return why nothing is attached to a wrapper."""
    return "wraps another optimizer" if run.inner is run.stepped and hasattr(run.stepped, "base_optimizer") else None


PULL = 0.05
"""Of a move by hand; whoever undoes more goes back to weights of its own."""


def pull(guest: Guest) -> float:
    """Return how far the next steps undo a move of the weights made by hand, in units of it, at next to no rate."""
    ways = []
    for shift in (0.0, 0.1):
        run = build(guest, separate=1e-4, rate=1e-6)
        for number in range(3):
            run.step(number)
        with torch.no_grad():
            for p in run.model.second.parameters():
                p.add_(shift)
        start = [p.detach().clone() for p in run.model.parameters()]
        for number in range(3, 11):
            run.step(number)
        ways.append([p.detach() - s for p, s in zip(run.model.parameters(), start, strict=True)])
    return distance(*ways) / 0.1


def equal_to_reference(
    guest: Guest, place: PlaceName, result: list[Tensor], entries: Sequence[Factors], word: str
) -> str:
    """Return the word if the weights are those of the reference, or what else they are."""
    if place == "lr":
        for found, inside in ((word, False), ("inside", True)):
            if same(result, with_permanent_groups(build(guest, by_layer=True), entries, inside=inside)):
                return found
        return "WRONG"
    way = distance(trained(build(guest)), build(guest).weights())
    close = CLOSE if {p.dtype for p in build(guest).parameters} == {torch.float64} else SINGLE
    if guest.package in packages.WIDE:
        close = EIGHT_BITS
    if not distance(result, by_hand(build(guest), entries, place)) < close * way:
        return "WRONG"
    return "no effect" if place == "gradient" and means_nothing(guest) else word


@cache
def means_nothing(guest: Guest) -> bool:
    """Tell whether with all gradients doubled no layer goes more than a twentieth of its way elsewhere."""
    if guest.name in AROUND | SHARPNESS:  # the optimizer inside decides
        return False
    start, once = (f(build(guest, separate=CURVATURE, decay=0.0)) for f in (Run.weights, trained))
    doubled = [factors(2, 2, 2)] * len(CHANGING)
    twice = by_hand(build(guest, separate=CURVATURE, decay=0.0), doubled, "gradient")
    return all(distance([t], [o]) <= 0.05 * distance([o], [s]) for t, o, s in zip(twice, once, start, strict=True))


def nothing_changes(guest: Guest, finding: Finding, by_layer: bool, with_closure: bool) -> bool:
    """Tell whether at factor 1 an adapter that measures leaves training as it is, to the bit."""
    run = build(guest, by_layer=by_layer)
    attach(run, LayerAdaptive(), bounds=(1.0, 1.0), apply=finding.automatic or "gradient")
    alone = build(guest, by_layer=by_layer)
    return same(trained(run, with_closure=with_closure), trained(alone, with_closure=with_closure))


def remark_on_zero(guest: Guest, finding: Finding, by_layer: bool) -> None:
    """Say what a factor of 0 does, unless the layer then rests."""
    run = build(guest, by_layer=by_layer)
    attach(run, Constant({"second": 0.0}), apply="lr")
    start = [p.detach().clone() for p in run.model.second.parameters()]
    try:
        trained(run)
    except ZeroDivisionError:
        finding.remarks.append("factor 0 divides by zero")
        return
    moved = distance([p.detach() for p in run.model.second.parameters()], start)
    if moved > CLOSE:
        finding.remarks.append("factor 0 gives NaN" if moved == float("inf") else "moves at factor 0 too")
