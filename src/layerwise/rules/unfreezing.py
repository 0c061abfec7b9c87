"""Unfreezing by depth: the layers next to the loss begin, and others follow from epoch to epoch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, cast

import torch
from torch import Tensor
from torch.utils.weak import WeakIdKeyDictionary

from .._arguments import check_choice, check_count, has_type
from ..layers import Layer, check_patterns, matches, some
from ..statistics import Statistics, common_device
from .base import Rule, shown
from .layer_decay import DepthArgument, check_depth, depths_of, doubt
from .selection import check_flag
from .state import State

Groups = int | Sequence[str | Sequence[str]] | None


@dataclass(frozen=True)
class Unfreezing(Rule):
    """Gradual unfreezing, from the layers next to the loss to the input.

    f_l = 1 if the group of layer l is among the last ⌈epoch / every⌉, else 0

    Start: `LayerwiseLR(optimizer, chain(LayerDecay(1 / 2.6), Unfreezing(4)), model)`. It is for fine-tuning with a new
    head. Take the rate that the last layer alone needs. Call `adapter.end_epoch()` after every epoch; the callbacks for
    trainers do.

    Under `order="chain"` the last group trains first, then each other one alone, from the input on, and then all: f_l =
    1 for one group at a time. Pass groups as patterns where layers belong together, such as `["embed*", "blocks.*",
    "*"]`; of several patterns for a layer the first counts.

    Frozen layers stand still, with decoupled weight decay, where the factor multiplies the rate, as by default. The
    state is the number of the epoch.

    When it helps: with a new head, which learns before its gradients reach what pretraining found. When not: fewer
    layers learn in the first epochs, so compare with the plain optimizer over as many epochs, and with `LayerDecay`
    alone. Costs: nothing in a step. It saves nothing either: the gradients of frozen layers are computed, and the
    optimizer's momentum and moments take them in.

    With `requires_grad=True` the parameters of frozen layers have `requires_grad=False` until their epoch begins. This
    saves their backward pass, and their momentum stays empty. Inside `adapter.paused()` and after `adapter.detach()`
    they have what they had before, and so do parameters that were frozen already. Reentrant checkpointing of
    activations loses the gradients above frozen layers: use `use_reentrant=False`.

    Args:
        groups: The number of groups of about equally many depths; patterns of layer names, or lists of patterns, a
            group each, from the input to the loss; or None for a group a depth.
        every: Epochs from one group to the next.
        order: `"top-down"` or `"chain"`.
        depth: As for `LayerDecay`.
        requires_grad: Whether the parameters of frozen layers have `requires_grad=False`.

    Raises:
        TypeError: An argument has the wrong type.
        ValueError: An argument is out of its range, there are fewer depths than groups, a pattern matches no layer, or
            a layer has no group; or, when attached with `requires_grad=True`, there is a process group, or layers step
            in backward.

    Example:
        >>> from layerwise import LayerwiseLR
        >>> from layerwise.rules import LayerDecay, chain
        >>> model = torch.nn.Sequential(torch.nn.Linear(4, 4), torch.nn.Linear(4, 4), torch.nn.Linear(4, 2))
        >>> optimizer = torch.optim.AdamW(model.parameters(), lr=1e-3)
        >>> adapter = LayerwiseLR(optimizer, chain(LayerDecay(0.5), Unfreezing(every=2)), model)
        >>> for epoch in range(1, 6):
        ...     model(torch.ones(1, 4)).sum().backward()
        ...     optimizer.step()
        ...     print(epoch, adapter.get_last_factors())
        ...     adapter.end_epoch()
        1 {'0': 0.0, '1': 0.0, '2': 1.0}
        2 {'0': 0.0, '1': 0.0, '2': 1.0}
        3 {'0': 0.0, '1': 0.5, '2': 1.0}
        4 {'0': 0.0, '1': 0.5, '2': 1.0}
        5 {'0': 0.25, '1': 0.5, '2': 1.0}

    Reference:
        Howard, Ruder: Universal language model fine-tuning for text classification (ULMFiT), ACL 2018, arXiv
        1801.06146: a group more each epoch. `"chain"` is the order of chain-thaw as huggingface/torchMoji's code has
        it, where each stage trains until the validation loss stalls, with a new optimizer and a lower rate after the
        first; here a stage is `every` epochs and the optimizer goes on.
    """

    groups: Groups = None
    every: int = 1
    order: Literal["top-down", "chain"] = "top-down"
    depth: DepthArgument = None
    requires_grad: bool = False
    needs = ()
    default_place = "lr"
    scales_rates = True
    own_layer = True
    compares_layers = True

    def __post_init__(self) -> None:
        if has_type(self.groups, int):
            check_count("groups", self.groups)
        elif self.groups is not None:
            self._check_patterns()
        check_count("every", self.every)
        check_choice("order", self.order, ("top-down", "chain"))
        check_depth(self.depth)
        check_flag("requires_grad", self.requires_grad)
        if self.depth is not None and self._patterns:
            raise ValueError("depth says the groups only where groups is None or a number: leave one of them out")

    def _check_patterns(self) -> None:
        wanted = "a number, or patterns of layer names from the input to the loss, such as ['embed*', 'blocks.*', '*']"
        if isinstance(self.groups, str) or not has_type(self.groups, Sequence):
            raise TypeError(f"groups={self.groups!r} must be {wanted}")
        given = cast("Sequence[Any]", self.groups)
        if not all(has_type(one, str) or has_type(one, Sequence) for one in given):
            raise TypeError(f"groups={self.groups!r} must hold strings, or lists of strings for groups of several")
        if not self._patterns or not all(self._patterns):
            raise ValueError(f"groups={self.groups!r} names no layer; it must be {wanted}")

    @property
    def _patterns(self) -> list[list[str]]:
        if self.groups is None or isinstance(self.groups, int):
            return []
        return [[one] if isinstance(one, str) else list(one) for one in self.groups]

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the number of the epoch, and the factors of each stage."""
        distributed = torch.distributed
        if self.requires_grad and distributed.is_available() and distributed.is_initialized():
            raise ValueError(
                "requires_grad=True does not work with DistributedDataParallel and FSDP, which settle which parameters "
                "get gradients when they wrap the model: leave it out; the factor 0 freezes layers as well"
            )
        groups = self._groups(layers)
        device, dtype = common_device(layers)
        stages = [[float(group in trained) for group in groups] for trained in self._stages(max(groups) + 1)]
        factors = torch.tensor(stages, dtype=dtype, device=device)
        return self.derived({"epoch": 1, "_stages": factors, "_trained": stages})

    def _groups(self, layers: Sequence[Layer]) -> list[int]:
        """Return the group of each layer, from 0 at the input."""
        if self._patterns:
            return self._groups_of_patterns([layer.name for layer in layers])
        read = depths_of(layers, self.depth)
        below_head = [top - depth for depth, top in zip(read.depth, read.top, strict=True)]
        ranks = sorted(set(below_head), reverse=True)
        number = len(ranks) if self.groups is None else cast(int, self.groups)
        if number > len(ranks):
            raise ValueError(f"groups={number}, but the layers have {len(ranks)} depths: pass at most {len(ranks)}")
        return [ranks.index(one) * number // len(ranks) for one in below_head]

    def _groups_of_patterns(self, names: Sequence[str]) -> list[int]:
        check_patterns([pattern for group in self._patterns for pattern in group], names, "groups")
        found = [
            next((i for i, group in enumerate(self._patterns) if any(matches(name, one) for one in group)), None)
            for name in names
        ]
        if missing := [name for name, group in zip(names, found, strict=True) if group is None]:
            raise ValueError(f"groups={self.groups!r} leaves out {some(missing)}; add a pattern for them, such as '*'")
        used = sorted(set(cast("list[int]", found)))  # a pattern may match only what earlier ones have taken
        return [used.index(cast(int, group)) for group in found]

    def _stages(self, number: int) -> list[set[int]]:
        """Return the groups that are trained in each stage."""
        if self.order == "top-down":
            return [set(range(first, number)) for first in reversed(range(number))]
        alone = [{number - 1}, *({group} for group in range(number - 1))]
        return [*alone, set(range(number))] if number > 1 else alone

    def derived(self, state: State) -> State:
        """Return the state with the factors of its epoch."""
        stages: Tensor = state["_stages"]
        return {**state, "_factors": stages[self._stage(state)]}

    def _stage(self, state: State) -> int:
        return min((state["epoch"] - 1) // self.every, len(state["_trained"]) - 1)

    def trained(self, state: State) -> list[bool] | None:
        """Return which layers are trained in this epoch, with `requires_grad=True`."""
        return [factor > 0 for factor in state["_trained"][self._stage(state)]] if self.requires_grad else None

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the factors of this epoch."""
        return state["_factors"], state

    def end_epoch(self, state: State) -> State:
        """Return the state for the next epoch."""
        return self.derived({**state, "epoch": state["epoch"] + 1})

    def load(self, saved: Any, state: State) -> State:
        """Return the state with the saved epoch."""
        return self.derived(super().load(saved, state))

    def doubts(self, layers: Sequence[Layer]) -> list[str]:
        """Return a warning with the table of groups if they follow from depths that the names leave in doubt."""
        reasons = [] if self._patterns else depths_of(layers, self.depth).doubts
        return doubt("Unfreezing", "Unfreezing(depth=function)", reasons, self.table(layers))

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the lines of a table: each group with the epochs in which it is trained, and its layers."""
        groups = self._groups(layers)
        stages = self._stages(max(groups) + 1)
        lines = [f"{'group':>5}  {'epochs':<12} layers"]
        for group in range(max(groups) + 1):
            own = [layer.name or "(root)" for layer, at in zip(layers, groups, strict=True) if at == group]
            lines.append(f"{group:>5}  {self._epochs(group, stages):<12} {shown(own)}")
        return lines

    def _epochs(self, group: int, stages: Sequence[set[int]]) -> str:
        """Return the epochs in which a group is trained, as text."""
        runs: list[str] = []
        last = len(stages) - 1
        at = [stage for stage, trained in enumerate(stages) if group in trained]
        for stage in at:
            if stage - 1 in at:
                continue
            end = next(one for one in range(stage, last + 1) if one == last or one + 1 not in at)
            begin = stage * self.every + 1
            until = "on" if end == last else str((end + 1) * self.every)
            runs.append(f"{begin} on" if until == "on" else str(begin) if until == str(begin) else f"{begin}-{until}")
        return ", ".join(runs)


_frozen_by: Any = WeakIdKeyDictionary()
"""Parameter to the `FrozenLayers` that have set its `requires_grad` to False."""


def is_trainable(parameter: Tensor) -> bool:
    """Return whether a parameter is trained, now or once no `FrozenLayers` freezes it."""
    return parameter.requires_grad or parameter in _frozen_by


class FrozenLayers:
    """The parameters whose `requires_grad` is False because their layers are not trained now.

    Several may freeze a parameter. It is trained again when none does, and what was frozen before stays frozen.

    Example:
        >>> layers = [Layer(name, (torch.nn.Parameter(torch.zeros(1)),)) for name in "ab"]
        >>> frozen = FrozenLayers()
        >>> frozen.freeze(layers, [False, True])
        >>> [layer.parameters[0].requires_grad for layer in layers]
        [False, True]
        >>> frozen.freeze(layers, None)
        >>> [layer.parameters[0].requires_grad for layer in layers]
        [True, True]
    """

    def __init__(self) -> None:
        self._parameters: dict[int, Tensor] = {}

    def freeze(self, layers: Sequence[Layer], trained: Sequence[bool] | None) -> None:
        """Set `requires_grad=False` for layers that are not trained, and restore True for those frozen before.

        `trained=None` restores all. Excluded layers are not touched.
        """
        wanted: dict[int, Tensor] = {}
        for layer, own in zip(layers, [True] * len(layers) if trained is None else trained, strict=True):
            if layer.included and not own:
                wanted |= {id(p): p for p in layer.parameters if is_trainable(p)}
        for p in wanted.values():
            p.requires_grad_(False)
            _frozen_by.setdefault(p, set()).add(id(self))
        for number in self._parameters.keys() - wanted.keys():
            p = self._parameters[number]
            _frozen_by[p].discard(id(self))
            if not _frozen_by[p]:
                del _frozen_by[p]
                p.requires_grad_(True)
        self._parameters = wanted
