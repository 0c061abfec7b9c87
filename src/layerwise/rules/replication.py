"""Refuses factors that would differ between processes which hold different parameters."""

from __future__ import annotations

import gc
import sys
import warnings
from collections import defaultdict
from collections.abc import Iterable, Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .._tensors import several_processes
from ..layers import Layer, some
from ..sharding import LONGEST, SECONDS, Table, can_compare, compared, digest, settled_gradient
from ..statistics import MOMENTS, NORMS, LayerStatistics
from .base import Rule
from .state import State, described, is_state

_REMEDY = (
    "use rules.Constant({layer: factor}) with the factors of the whole network, or a rule that computes each factor "
    "from its own layer (own_layer = True), such as LayerAdaptive, LARS or LARC"
)


def refuse_stages(rule: Rule, parameters: Iterable[Tensor]) -> None:
    """Raise a ValueError if a rule that compares layers is attached to a `PipelineStage`."""
    kind: Any = getattr(sys.modules.get("torch.distributed.pipelining.stage"), "_PipelineStageBase", None)
    if kind is None or not rule.depends_on_other_layers():
        return
    ours = set(map(id, parameters))
    # A stage leaves no mark on its module, so this searches all live objects.
    for stage in [one for one in gc.get_objects() if kind in type(one).__mro__]:
        if stage.num_stages > 1 and any(id(p) in ours for p in stage.submod.parameters()):
            raise ValueError(
                f"{described(rule)} compares layers, and this process holds only those of stage {stage.stage_index} of "
                f"a pipeline of {stage.num_stages} stages: {_REMEDY}"
            )


def check_processes(rule: Rule, state: State, layers: Sequence[Layer], statistics: LayerStatistics) -> None:
    """Raise in all processes if their factors for shared parameters would differ.

    The processes compare once what each of them holds, through the key-value store. This waits for the device. It also
    waits up to `SECONDS` for processes that do not step with this rule, and then warns. Where parameters are shared, it
    waits up to `LONGEST`, and then raises.
    """
    if not several_processes() or not can_compare():
        return
    needs = set(rule.needs)
    if statistics.sharing is not None:
        alike = {"rule": described(rule), "epoch": _epochs(state)}
        check_members("LayerwiseLR", alike, statistics, needs_all=bool(needs))
    compares = rule.depends_on_other_layers()
    # A rule with own_layer may sum gradients without using them for its factors, so only these needs count.
    reads = bool(needs - {"learning_rate"} if compares else needs & {*NORMS, *MOMENTS, "normalisation_gain"})
    everywhere = torch.distributed.get_world_size()
    if all(shard is not None and len(shard.ranks) == everywhere for shard in statistics.shards):
        return  # all parameters are sharded over all processes
    judges = compares or (reads and any(layer.included and len(layer.parameters) > 1 for layer in layers))
    own: Table = _table(layers, statistics) if judges else {"layers": "", "held": {}}
    table = compared(f"held {rule.rule_kind}", own, _merged, None, SECONDS)
    if table is None:
        _warn_of_others("LayerwiseLR", everywhere)
    elif judges:
        _judge(rule, table, compares=compares, reads=reads)


def check_members(what: str, alike: Table, statistics: LayerStatistics, *, needs_all: bool) -> None:
    """Raise in all processes that share parameters unless each has attached the same to the same layers.

    `alike` holds the values, by name, that must be equal in all of them; with `needs_all` a collective follows, which
    would hang without one of them.
    """
    if not can_compare():
        return
    shared: defaultdict[tuple[int, ...], list[str]] = defaultdict(list)
    names = (f"{layer.name}:{name}" for layer in statistics.layers for name in layer.parameter_names)
    for name, shard in zip(names, statistics.shards, strict=True):
        if shard is not None:
            shared[shard.ranks].append(name)
    own = {name: [repr(value)] for name, value in alike.items()}
    for ranks in sorted(shared, key=lambda ranks: (len(ranks), ranks)):
        table = {**own, "names of layers": [digest(shared[ranks])]}
        found = compared(what, table, _united, ranks, LONGEST if needs_all else SECONDS)
        if found is None and needs_all:
            raise RuntimeError(
                f"the processes {list(ranks)} share parameters, and not all of them reached the first step with a "
                f"{what} within {LONGEST:g} s: create it in every process, because its statistics are sums over all "
                "of them"
            )
        if found is None:
            _warn_of_others(what, len(ranks))
        for name, values in (found or {}).items():
            if len(values) > 1:
                shown = f" ({', '.join(values)})" if name in own else ""
                raise ValueError(
                    f"{what}: {name} differs between the processes that share the parameters{shown}; pass the same "
                    "in all of them"
                )


def _warn_of_others(what: str, processes: int) -> None:
    warnings.warn(
        f"not all of the {processes} processes reached the first step with a {what} of this rule within {SECONDS:g} s. "
        "If they hold the same parameters, these drift apart: create it in every process",
        stacklevel=2,
    )


def _epochs(state: State) -> list[int]:
    """Return the epochs that the rules count, since some epochs need collectives and others none."""
    inner = [epoch for value in state.values() if is_state(value) for epoch in _epochs(value)]
    return [value for name, value in state.items() if name == "epoch" and isinstance(value, int)] + inner


def _united(before: Table, own: Table) -> Table:
    return {name: sorted({*before[name], *own[name]}) for name in own}


def _table(layers: Sequence[Layer], statistics: LayerStatistics) -> Table:
    """Return a digest of the layers, and the norms of the gradients and weights that this process holds, by parameter.

    Each norm stands there twice, as the smallest and the largest of the processes so far; -1 if it is not finite.
    `holders` is the number of processes that hold the parameter if all are alike, `processes` that of those so far.
    """
    rank, everywhere = torch.distributed.get_rank(), torch.distributed.get_world_size()
    gradients = [settled_gradient(p) for p in statistics.members]
    squares = torch.stack([statistics.squares(gradients), statistics.squares(statistics.members)])
    norms = cast(list[list[float]], squares.sqrt().nan_to_num(-1.0, -1.0, -1.0).T.tolist())
    members = [(layer, *one) for layer in layers for one in zip(layer.parameter_names, layer.whole(), strict=True)]
    held: dict[str, dict[str, Any]] = {}
    for (layer, name, whole), shard, (gradient, weight) in zip(members, statistics.shards, norms, strict=True):
        shards = 1
        if shard is not None and len(shard.ranks) == everywhere:
            gradient, weight = 1.0, 1.0  # norms over all processes, equal in each
        elif shard is not None:
            shards = len(shard.ranks)
            name = f"{name} (shard {shard.ranks.index(rank)} of {shards})"
        if layer.included:
            held[name] = {
                "layer": layer.name,
                "matrix": whole.ndim > 1,
                "holders": everywhere // shards,
                "processes": 1,
                "gradient": [gradient, gradient],
                "weight": [weight, weight],
            }
    return {"layers": digest([[layer.name, name, list(whole.shape)] for layer, name, whole in members]), "held": held}


def _merged(before: Table, own: Table) -> Table:
    held = {**own["held"], **before["held"]}
    for name in own["held"].keys() & before["held"].keys():
        one, other = own["held"][name], before["held"][name]
        spans = {
            key: [min(one[key][0], other[key][0]), max(one[key][1], other[key][1])] for key in ("gradient", "weight")
        }
        held[name] = {**one, **spans, "processes": other["processes"] + 1}
    return {"layers": own["layers"] if before["layers"] == own["layers"] else "", "held": held}


def _judge(rule: Rule, table: Table, *, compares: bool, reads: bool) -> None:
    """Raise if the rule would compute different factors in different processes."""
    if compares and not table["layers"]:
        raise ValueError(
            f"{described(rule)} compares layers, and the processes hold different ones, as the stages of a pipeline "
            f"or experts do. Each process would compare its own layers alone: {_REMEDY}"
        )
    different: dict[str, str] = {}  # name to layer
    replicated: dict[str, str] = {}
    for name, one in table["held"].items():
        low, high = one["gradient"]
        if one["processes"] < one["holders"] or (low >= 0 and _differ(low, high)):
            different[name] = one["layer"]
        elif low > 0:
            replicated[name] = one["layer"]
    matrices = [_differ(*one["weight"]) for one in table["held"].values() if one["matrix"]]
    if compares and different and not replicated and all(matrices):
        raise ValueError(
            f"{described(rule)} compares layers, and the processes hold different weights under the same names, as "
            f"the stages of a pipeline do. Each process would compare its own layers alone: {_REMEDY}. Train "
            "unrelated networks without a process group"
        )
    if compares and reads and replicated and different:
        raise ValueError(
            f"{described(rule)} compares layers, and some parameters are replicated ({some(replicated, 4, str)}) while "
            f"others differ between the processes ({some(different, 4, str)}). The replicated ones would get different "
            f"factors in each process: make the others DTensors, or {_REMEDY}"
        )
    for layer in set(replicated.values()) & set(different.values()) if reads else ():
        alike, apart = ([name for name in names if names[name] == layer] for names in (replicated, different))
        raise ValueError(
            f"layer {layer!r} joins replicated parameters ({some(alike, 4, str)}) with parameters that differ between "
            f"the processes ({some(apart, 4, str)}). Its norm and its factor would differ between processes: pass "
            "layers='parameter', or patterns that keep the two apart, or make the latter DTensors"
        )


def _differ(low: float, high: float) -> bool:
    """Return whether norms in two processes differ by more than rounding."""
    return high - low > 1e-5 * high
