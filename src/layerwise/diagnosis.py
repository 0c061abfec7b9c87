"""What attaching a rule would do and cost, before training."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

from torch import nn
from torch.optim import Adafactor, Optimizer

from ._arguments import chosen
from ._hooks import OptimizerHooks
from ._places.allowed import no_effect, scales_writes, why_not_rate
from ._places.trial import reason_against, verdict_of
from ._rows import whole_of
from ._tensors import holds_weights
from .adapter import LayerwiseLR, parameters_of
from .apply import damps_history
from .layers import (
    DOUBTS,
    Layer,
    Model,
    as_module,
    as_specification,
    divided,
    flattened,
    joining,
    named_parameters,
    rows_of,
)
from .optimizers import SCALE_INVARIANT, acting_optimizer, decay_is_coupled, has_capturable, unwrap
from .rules import ByRole, FreezeOut, LayerAdaptive, LayerDecay, Unfreezing, WidthDepth
from .rules.base import is_number
from .rules.layer_decay import depths_of
from .rules.roles import roles_of
from .statistics import MOMENTS, NORMS, OF_ROWS, OF_STEP, WEIGHT_NORMS

LAUNCHES = 7
"""The most kernels that one norm of all layers takes on an accelerator; a test counts them."""

WIDTH = 80  # of the lines of roles
LEFT = ("layer", "role", "layers", "")  # columns that are aligned on the left


def diagnose(
    optimizer: Any,
    model: Model | None = None,
    rule: Any = None,
    *,
    most: int = 40,
    seconds: float | None = None,
    **arguments: Any,
) -> str:
    """Print which layers exist, where a factor would act and why, what it costs, and what would not work.

    Each layer has a line with its role and its depth, as rules such as `ByRole` and `LayerDecay` read them. The column
    is "depth?" where names leave room for doubt, and a note says why. Nothing stays attached, and nothing is changed,
    to the bit. The cost is what a step does in addition: passes over memory, parameter groups and, on accelerators,
    launches. It follows from the rule and the optimizer; nothing is timed.

    Args:
        optimizer: The optimizer.
        model: Its model, as for `LayerwiseLR`.
        rule: The rule that would be attached; `LayerAdaptive()` if None.
        most: How many layers are listed; where that is too few for all, frozen ones come last, and a second table has
            a line for each role.
        seconds: Without effect, since no step is timed.
        **arguments: As for `LayerwiseLR`: `layers`, `apply`, `decay`, `exclude`, `split`, `bounds`,
            `normalize`.

    Returns:
        The text that was printed.

    Raises:
        TypeError: There is no optimizer in `optimizer`, `model` is no module, or `seconds` no number.
        ValueError: `seconds` is negative or not finite.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> model = nn.Sequential(nn.Linear(784, 10))
        >>> text = diagnose(torch.optim.AdamW(model.parameters()), model)
        LayerAdaptive on AdamW: 1 layer, 2 parameter tensors, 7,850 numbers
        <BLANKLINE>
        layer  tensors  numbers     lr  decay  role   depth
        0            2    7,850  0.001   0.01  other      0
        <BLANKLINE>
        acts on   'lr': the layer's rate in this step is f lr
        because   AdamW divides out what multiplies the gradient, and is exact in its rate
        route     divided groups: one for each distinct factor, at most 1 in place of 1
        costs     1 pass over the gradients
        problems  none found
        note      decoupled weight decay is multiplied by the rate, so the factor scales it too
        next      adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    """
    if seconds is not None and not is_number(seconds):
        raise TypeError(f"seconds={seconds!r} must be a number of seconds from 0, or None")
    if seconds is not None and not 0 <= seconds < math.inf:
        raise ValueError(f"seconds={seconds!r} must be finite and at least 0")
    rule = LayerAdaptive() if rule is None else rule
    inner = unwrap(optimizer)
    model = as_module(model)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", DOUBTS, UserWarning)  # printed below
            arguments["layers"] = as_specification(arguments.get("layers", "auto"))
            adapter = LayerwiseLR(inner, rule, model, **arguments)
    except (TypeError, ValueError) as error:
        text = f"{type(rule).__name__} on {type(inner).__name__}: cannot be attached\n\nproblem   {error}"
    else:
        adapter.detach()
        text = _describe(adapter, inner, model, most, arguments)
    print(text)
    return text


def _describe(
    adapter: LayerwiseLR, optimizer: Optimizer, model: nn.Module | None, most: int, arguments: Mapping[str, Any]
) -> str:
    rule, layers = adapter.rule, adapter.layer_table()
    automatic = arguments.get("apply", "auto") == "auto"
    specification = chosen(arguments["layers"], rule.default_layers, "module")
    group_of = {id(p): group for group in optimizer.param_groups for p in group["params"]}
    inside = {id(whole_of(p)) for layer in layers for p in layer.parameters}
    outside = sum(holds_weights(p) and id(p) not in inside for p in parameters_of(optimizer.param_groups))
    roles = roles_of(layers, rule.role if isinstance(rule, ByRole | WidthDepth) else None)
    read = depths_of(layers, rule.depth if isinstance(rule, FreezeOut | LayerDecay | Unfreezing) else None)
    depth = "depth?" if read.doubts else "depth"
    entries = list(zip(layers, roles, read.depth, strict=True))
    listed = entries if len(entries) <= most else sorted(entries, key=lambda entry: _frozen(entry[0]))[:most]
    rows = [["layer", "tensors", "numbers", "lr", "decay", "role", depth, ""]]
    for layer, role, level in listed:
        groups = [group_of[id(whole_of(p))] for p in layer.parameters]
        numbers = f"{sum(p.numel() for p in layer.whole()):,}"
        rates = _values(groups, "lr"), _values(groups, "weight_decay")
        frozen = "frozen" if _frozen(layer) else ""
        rows.append([layer.name or "(root)", str(len(groups)), numbers, *rates, role, str(level), frozen])
    lines = [
        f"{type(rule).__name__} on {type(optimizer).__name__}: {_count(len(layers), 'layer')}, "
        f"{_count(len(inside), 'parameter tensor')}, "
        f"{sum(p.numel() for layer in layers for p in layer.whole()):,} numbers",
        "",
        *_table(rows),
    ]
    if len(layers) > most:
        lines.append(f"… and {len(layers) - most} more (most={len(layers)} lists all)")
    table = rule.table(layers)
    # Some rules list the layers of each role themselves.
    if len(layers) > most and not any("role" in line.split() for line in table[:1]):
        lines += ["", *_by_role(entries, depth)]
    if table:
        lines += ["", *table]
    route, costs = _cost(adapter, optimizer, automatic)
    lines += ["", f"acts on   {adapter.apply!r}: {_where(adapter, optimizer)}"]
    lines += [f"because   {_why(adapter, optimizer, automatic)}", f"route     {route}", f"costs     {costs}"]
    problems = _problems(adapter, optimizer, model, outside)
    # Without their tables, which stand above.
    problems += [doubt.partition("\n")[0] for doubt in flattened(layers, specification) + rule.doubts(layers)]
    lines += [f"problem   {problem}" for problem in problems] or ["problems  none found"]
    doubts = [doubt for doubt in read.doubts if not any(doubt in problem for problem in problems)]
    if doubts:
        lines.append(f"note      depths are read from names, which leave room for doubt: {'; '.join(doubts)}")
    lines += [f"note      {note}" for note in _notes(adapter, optimizer)]
    if specification == "module":
        lines += [f"note      {note}" for note in _divided(layers)]
    if OptimizerHooks.members_of(acting_optimizer(optimizer)):
        lines.append("next      nothing: an adapter is attached already; another one's factors would multiply with its")
    else:
        lines.append("next      adapter = layerwise.LayerwiseLR(optimizer, rule, model)")
    return "\n".join(lines)


def _table(rows: Sequence[Sequence[str]]) -> list[str]:
    """Return lines of aligned columns, of which the first line has the titles."""
    sides = ["<" if title in LEFT else ">" for title in rows[0]]
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    form = "  ".join(f"{{:{side}{width}}}" for side, width in zip(sides, widths, strict=True))
    return [form.format(*row).rstrip() for row in rows]


def _by_role(entries: Sequence[tuple[Layer, str, int]], depth: str) -> list[str]:
    """Return the lines of a table: each role with the depths, number and names of its layers."""
    members: dict[str, list[tuple[Layer, int]]] = {}
    for layer, role, level in entries:
        members.setdefault(role, []).append((layer, level))
    rows = [["role", depth, "number"]]
    for role, own in members.items():
        levels = sorted({level for _, level in own})
        reach = "…".join(map(str, levels if len(levels) < 2 else (levels[0], levels[-1])))
        rows.append([role, reach, str(len(own))])
    starts = _table(rows)
    room = WIDTH - len(starts[0]) - 2
    lines = [f"{starts[0]}  layers"]
    for start, own in zip(starts[1:], members.values(), strict=True):
        first, last = own[0][0].name or "(root)", own[-1][0].name
        if len(own) == 1:
            lines.append(f"{start}  {_end(first, room)}")
            continue
        # Of the last name only what follows the components that both begin with.
        shared = takewhile(lambda pair: pair[0] == pair[1], zip(first.split("."), last.split("."), strict=False))
        last = ".".join(last.split(".")[len(list(shared)) :])
        last = _end(last, max((room - 3) // 2, room - 3 - len(first)))
        lines.append(f"{start}  {_end(first, room - 3 - len(last))}{', ' if len(own) == 2 else ' … '}{last}")
    return lines


def _end(name: str, room: int) -> str:
    """Return the end of a name that is too long, since that tells layers apart."""
    return name if len(name) <= room else f"…{name[1 - room :]}"


def _where(adapter: LayerwiseLR, optimizer: Optimizer) -> str:
    if adapter.apply == "gradient":
        return f"the gradient becomes {'f (g + λw)' if adapter.decay == 'scaled' else 'f g'} before any momentum"
    if adapter.apply == "lr":
        limit = ", inside its min(lr, 1/√t)" if isinstance(optimizer, Adafactor) else ""
        return f"the layer's rate in this step is f lr{limit}"
    return "w ← w_old + f (w_new − w_old)"


def _why(adapter: LayerwiseLR, optimizer: Optimizer, automatic: bool) -> str:
    name = type(optimizer).__name__
    if not automatic:
        return "the argument apply says so"
    if adapter.rule.places == ("update",):
        return "the rule's factors follow from the finished step"
    if rows_of(adapter.layer_table()):
        return "a parameter that is split has one rate, so factors of its parts act beside it"
    if _units(adapter) and adapter.apply == "update":
        return "a parameter has one rate, so factors of its rows act beside it"
    if adapter.apply == "update":
        return f"{name} {why_not_rate(optimizer) or reason_against(optimizer, 'groups')}"
    if adapter.apply == "gradient":
        return "the rule's method multiplies the gradient, inside the momentum"
    verdict = verdict_of(optimizer)
    if verdict is not None and verdict.untried is None:
        return f"{name} follows the rates of its parameter groups in a trial on toy parameters"
    if adapter.rule.default_place != "gradient":
        return "the rule scales rates"
    if isinstance(optimizer, SCALE_INVARIANT):
        return f"{name} divides out what multiplies the gradient, and is exact in its rate"
    return f"for {name} as it is set, the same as multiplying the gradient, for less"


def _cost(adapter: LayerwiseLR, optimizer: Optimizer, automatic: bool) -> tuple[str, str]:
    """Return the route that the factors take, and what a step does in addition."""
    needs, place = set(adapter.rule.needs), adapter.apply
    if "counts" in needs:
        needs.add("gradient_norm")
    on_cpu, groups = _device_of(optimizer) in ("cpu", "meta"), optimizer.param_groups
    units = _units(adapter)
    has_parts = bool(units or rows_of(adapter.layer_table()))
    layer_of = {id(p): number for number, layer in enumerate(adapter.layer_table()) for p in layer.parameters}
    parts = sum(len({layer_of.get(id(p)) for p in group["params"]}) for group in groups)
    what = "calls of the fused kernel" if groups[0].get("fused") else "groups"
    division = f"divided {what}: one for each distinct factor, at most {parts} in place of {len(groups)}"
    scales_decay = adapter.decay == "scaled" and any(
        group.get("weight_decay") and decay_is_coupled(optimizer, group) is not False for group in groups
    )
    costs: list[str] = []
    if "gradient_norm" in needs:
        costs.append("1 pass over the gradients")
    if needs & MOMENTS:
        costs.append("1 pass over the gradients for their moments, some operations a tensor")
    if needs & WEIGHT_NORMS:
        costs.append("1 pass over the weights")
    norms = needs & (NORMS | {"counts"})
    if units and not on_cpu:
        costs.append(f"{len(needs & {*OF_ROWS})} launches a tensor for the norms of rows, 1 to multiply them")
    elif norms and not on_cpu:
        costs.append(f"at most {LAUNCHES * len(norms)} launches for the norms at any number of layers")
    if "gradients" in needs:
        costs.append("in epochs of analysis one number a parameter for G, two for G′, or those of the sample")
    if place == "gradient":
        if automatic and on_cpu and not has_parts and damps_history(optimizer):
            route = f"SGD's dampening in {division}"
        else:
            route = "the gradients are multiplied in place"
            changed = " that have a factor other than 1" if units and on_cpu else ""
            costs.append(f"1 pass over the gradients{changed} to multiply them")
            if scales_decay and on_cpu and not has_parts:
                route += f"; weight decay in {division}"
            elif scales_decay:
                costs.append("1 pass over gradients and weights to add the weight decay")
    elif needs & OF_STEP:
        route = "the finished step is measured, then scaled"
        costs.append("a copy of the parameters during the step, 3 passes over them")
    elif not units and scales_writes(optimizer, place):
        route = "scaled writes: what the step writes into a weight is multiplied; no parameter group is divided"
        if has_capturable(optimizer) and not on_cpu:
            costs.append("1 launch for each tensor")
    elif place == "lr":
        route = division
    else:
        route = "interpolation between the old and the new weights after the step"
        costs.append("a copy of the parameters during the step, 3 passes over them")
    return route, ", ".join(costs) or "no pass over memory"


def _problems(adapter: LayerwiseLR, optimizer: Optimizer, model: nn.Module | None, outside: int) -> list[str]:
    problem = no_effect(optimizer, adapter.apply, adapter.rule)
    problems = [] if problem is None else [problem]
    if outside:
        problems.append(f"{_count(outside, 'parameter tensor')} of the optimizer in no layer; the factor there is 1")
    if model is not None:
        held = set(map(id, parameters_of(optimizer.param_groups)))
        missing = [name for name, p in named_parameters(model) if p.requires_grad and id(p) not in held]
        if missing:
            names = ", ".join(missing[:5]) + (", …" if len(missing) > 5 else "")
            problems.append(f"{_count(len(missing), 'trainable parameter')} not in the optimizer: {names}")
    return problems


def _notes(adapter: LayerwiseLR, optimizer: Optimizer) -> list[str]:
    notes: list[str] = []
    if units := _units(adapter):
        notes.append(f"{units:,} rows have a factor each; the factor that is reported of a layer is their mean")
    if adapter.counts_epochs:
        notes.append("the rule counts epochs: call adapter.end_epoch() after each")
    integers = sum(not holds_weights(p) for p in parameters_of(optimizer.param_groups))
    if integers:
        notes.append(f"{_count(integers, 'parameter tensor')} of integers (quantised weights) in no layer")
    if _device_of(optimizer) != "cpu" and not has_capturable(optimizer):
        notes.append("factors are read from the device once a step; capturable=True avoids it, at a launch a tensor")
    if adapter.apply != "gradient" and any(
        group.get("weight_decay") and decay_is_coupled(optimizer, group) is False for group in optimizer.param_groups
    ):
        notes.append("decoupled weight decay is multiplied by the rate, so the factor scales it too")
    return notes


def _divided(layers: list[Layer]) -> list[str]:
    """Say which modules own parameters beside modules below them, and how they become one layer each."""
    layers = [layer for layer in layers if not rows_of([layer])]
    modules = divided(layers)
    if not modules:
        return []
    notes = list(map(str, modules[:5]))
    if len(modules) > 5:
        notes.append(f"… and {len(modules) - 5} more such modules")
    # To join the root would join the whole network.
    inner = [one for one in modules if one.layer.name] or modules
    verb = "joins" if len(inner) == 1 else "join"
    return [*notes, f"layers={joining(layers, inner)} {verb} them"]


def _device_of(optimizer: Optimizer) -> str:
    return parameters_of(optimizer.param_groups)[0].device.type


def _units(adapter: LayerwiseLR) -> int:
    """Return how many rows have a factor each, under `layers="unit"`."""
    layers = adapter.layer_table()
    return sum(layer.parameters[0].shape[layer.dimension] for layer in layers if layer.dimension is not None)


def _frozen(layer: Layer) -> bool:
    return not any(p.requires_grad for p in layer.parameters)


def _values(groups: list[dict[str, Any]], key: str) -> str:
    values = list(dict.fromkeys(f"{float(group[key]):.4g}" for group in groups if group.get(key) is not None))
    return "/".join(values) if values else "-"


def _count(number: int, noun: str) -> str:
    return f"{number:,} {noun}{'' if number == 1 else 's'}"
