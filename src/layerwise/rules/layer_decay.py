"""Layer-wise learning-rate decay by depth, as in the fine-tuning of ELECTRA and BEiT."""

from __future__ import annotations

import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Literal

import torch
from torch import Tensor

from .._arguments import has_type
from ..layers import Layer, some
from ..statistics import Statistics
from .base import Rule, is_number
from .constant import fixed_factors
from .state import State

_BLOCK = re.compile(r"^(?:.*?\.)?\d+(?=\.|$)")


def depths(names: Sequence[str]) -> list[int]:
    """Return the depth of each layer, counted from 0 at the input, from the names alone.

    Layers of one numbered block (`blocks.3`, `encoder.layer.3`, `layer1.0`, `3`) share a depth. Layers named before the
    first block are its embeddings, all of depth 0; those after the last block are the head, all of the last depth;
    those in between belong to the block before them. Without numbered blocks every layer is a depth of its own.

    Example:
        >>> depths(["patch_embed", "blocks.0.attn", "blocks.0.mlp", "blocks.1.attn", "norm", "head"])
        [0, 1, 1, 2, 3, 3]
    """
    blocks = [found and found[0] for found in map(_BLOCK.match, names)]
    numbered = [i for i, block in enumerate(blocks) if block]
    if not numbered:
        return list(range(len(names)))
    in_order = list(dict.fromkeys(filter(None, blocks)))
    depth_of = {block: depth for depth, block in enumerate(in_order, 1 if numbered[0] > 0 else 0)}
    head = depth_of[in_order[-1]] + 1
    result: list[int] = []
    current = 0
    for i, (name, block) in enumerate(zip(names, blocks, strict=True)):
        current = depth_of.get(block or "", current)
        result.append(head if i > numbered[-1] or name.rpartition(".")[2] == "rel_pos_bias" else current)
    return result


# Names of layers next to the loss, and of layers next to the input.
_HEAD = re.compile(r"(?:^|_)(?:head|classifier|logits)s?(?:_?\d+)?$|^final")
_HEAD_WORD = re.compile(r"^(?:fc|out|output|score|cls|readout|predictions|project_out)$")
_EMBEDDING = re.compile(r"embed(?!_?out)|^(?:stem|wte|wpe)$")


def _doubts(layers: Sequence[Layer], levels: Sequence[int]) -> list[str]:
    """Return the reasons why depths from the layers' names may be wrong; empty if the names are unambiguous."""
    names = [layer.name for layer in layers]
    blocks = [found and found[0] for found in map(_BLOCK.match, names)]
    stacks: dict[str, list[int]] = {}
    for block in dict.fromkeys(filter(None, blocks)):
        stack, _, number = block.rpartition(".")
        stacks.setdefault(stack, []).append(int(number))
    head = _head_stack(layers, blocks)
    bodies = [stack for stack in stacks if stack != head]
    kinds = {re.sub(r"\d+", "", stack) for stack in bodies}
    reasons: list[str] = []
    if len(kinds) > 1:
        shown = some([f"{stack}.*".lstrip(".") for stack in bodies], 4)
        reasons.append(f"there are several numbered stacks ({shown}), and each is taken to lie above the one before")
    if len(kinds) < len(bodies) or _has_inner_blocks(names, blocks):
        shown = some(filter(None, blocks), 3)
        reasons.append(f"names hold numbers at two levels, and the depths count {shown}")
    if any(numbers != sorted(numbers) for numbers in stacks.values()):
        reasons.append("numbered blocks are not in their order")
    reasons += _doubts_outside(layers, blocks) if stacks else _doubts_without_numbers(names)
    single = [(name, level) for name, block, level in zip(names, blocks, levels, strict=True) if not block]
    if low := [name for name, level in single if level < max(levels) and _is_head(name, numbered=bool(stacks))]:
        reasons.append(f"{some(low, 3)} by name next to the loss, but not last in the model's order")
    if above := [name for name, level in single if level > 0 and any(map(_EMBEDDING.search, name.split(".")))]:
        reasons.append(f"{some(above, 3)} by name next to the input, but not first in the model's order")
    paths = any("/" in name for layer in layers for name in layer.parameter_names)
    if paths and len(names) > 1 and names == sorted(names):
        reasons.append("the names are those of a dictionary in alphabetical order, which says nothing of depth")
    return reasons


def _is_head(name: str, *, numbered: bool) -> bool:
    parts = name.split(".")
    return any(map(_HEAD.search, parts)) or (numbered and bool(_HEAD_WORD.match(parts[-1])))


def _head_stack(layers: Sequence[Layer], blocks: Sequence[str | None]) -> str | None:
    """Return the stack of a head that is a numbered chain at the end, such as `classifier.0`, `classifier.3`."""
    stack = (blocks[-1] or "").rpartition(".")[0]
    if stack.rpartition(".")[2] not in ("head", "classifier", "fc", "mlp_head", "lm_head"):
        return None
    chain = [layer for layer, block in zip(layers, blocks, strict=True) if block and block.rpartition(".")[0] == stack]
    shapes = [p.shape for layer in chain for p in layer.whole() if p.ndim > 1]
    fits = all(one[0] == two[1] for one, two in pairwise(shapes))
    at_end = list(layers[-len(chain) :]) == chain
    return stack if fits and at_end and all(layer.name in blocks for layer in chain) else None


def _has_inner_blocks(names: Sequence[str], blocks: Sequence[str | None]) -> bool:
    """Return whether blocks contain numbered blocks of several layers, or two numbers follow each other in a name."""
    inner: dict[str, dict[str, set[str]]] = {}
    for name, block in zip(names, blocks, strict=True):
        rest = name.removeprefix(block).removeprefix(".") if block else ""
        if re.match(r"\d+(?:\.|$)", rest):
            return True
        if (found := re.match(r"(.+?)\.(\d+)(?:\.(.+))?$", rest)) and "expert" not in found[1]:
            inner.setdefault(f"{block}.{found[1]}", {}).setdefault(found[2], set()).add(found[3] or "")
    return any(sum(len(below) > 1 for below in numbered.values()) > 1 for numbered in inner.values())


def _doubts_outside(layers: Sequence[Layer], blocks: Sequence[str | None]) -> list[str]:
    """Return doubts about layers that share the first or last depth while each numbered layer has its own."""
    numbered = [i for i, block in enumerate(blocks) if block]
    if any(layers[i].name != blocks[i] for i in numbered):
        return []
    for end, which in ((layers[: numbered[0]], "first"), (layers[numbered[-1] + 1 :], "last")):
        weights = [one.name for one in end if one.name and any(p.ndim > 1 for p in one.whole())]
        if len([name for name in weights if not _EMBEDDING.search(name)]) > 1:
            return [
                f"{some(weights, 3)} have no number and share the {which} depth, while numbered layers have one each"
            ]
    return []


def _doubts_without_numbers(names: Sequence[str]) -> list[str]:
    """Return doubts about names without numbered components, where each layer is a depth of its own."""
    members: dict[str, list[str]] = {}
    for name in names:
        parts = name.split(".")
        for i in range(1, len(parts)):
            members.setdefault(".".join(parts[:i]), []).append(".".join(parts[i:]))
    members = {parent: below for parent, below in members.items() if len(below) > 1}
    numbered = [parent for parent in members if parent[-1].isdigit()]
    if len({re.sub(r"\d+", "", parent) for parent in numbered}) < len(numbered):
        return [f"numbers within words ({some(numbered, 3)}) count as no blocks, and each layer is a depth of its own"]
    twins: dict[tuple[int, tuple[str, ...]], list[str]] = {}
    for parent, below in members.items():
        twins.setdefault((parent.count("."), tuple(below)), []).append(parent)
    for parents in twins.values():
        if len(parents) > 1:
            return [f"{some(parents, 3)} hold layers of the same names, and each is taken to lie above the one before"]
    return []


@dataclass(frozen=True)
class LayerDecay(Rule):
    """Layer-wise learning-rate decay.

    f_l = d^(D − depth_l), depth 0 for the embeddings, D for the head (BEiT)

    With `style="electra"` there is one more power between the last block and the head: f_l = d^(D + 1 − depth_l) below
    the head and 1 for the head. It scales the rate, and so decoupled weight decay too.

    Args:
        decay: d, in (0, 1]; ELECTRA uses 0.8 (base) and 0.9 (large), BEiT 0.65 to 0.9.
        style: `"beit"` or `"electra"`.
        depth: A function from layer name to depth (0 at the input), for networks whose names do not show it. By
            default `depths` reads the names, and warns with a table of depths where they are ambiguous.

    Raises:
        ValueError: `decay` or `style` is out of its range, or a depth is no whole number of at least 0.

    Example:
        >>> names = ["embeddings", "layer.0", "layer.1", "head"]
        >>> layers = [Layer(name, (torch.zeros(1),)) for name in names]
        >>> LayerDecay(0.5).init(layers, torch.device("cpu"))["_factors"]
        tensor([0.1250, 0.2500, 0.5000, 1.0000], dtype=torch.float64)

    Reference:
        Clark et al.: ELECTRA, ICLR 2020, arXiv 2003.10555; Bao et al.: BEiT, ICLR 2022, arXiv 2106.08254.
    """

    decay: float
    style: Literal["beit", "electra"] = "beit"
    depth: Callable[[str], int] | None = None
    needs = ()
    default_place = "lr"
    own_layer = True
    compares_layers = True

    def __post_init__(self) -> None:
        if not (is_number(self.decay) and 0 < self.decay <= 1):
            raise ValueError(f"decay={self.decay!r} must be a number in (0, 1]; 0.65 to 0.9 are usual")
        if self.style not in ("beit", "electra"):
            raise ValueError(f"style={self.style!r} is unknown; allowed: 'beit', 'electra'")

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the factors as a tensor."""
        return fixed_factors(layers, self._values(self._levels(layers)))

    def doubts(self, layers: Sequence[Layer]) -> list[str]:
        """Return a warning with the table of depths if `depth` is not given and the names are ambiguous."""
        reasons = [] if self.depth else _doubts(layers, self._levels(layers))
        if not reasons:
            return []
        text = (
            "LayerDecay takes the depths from the layers' names, which leave room for doubt: "
            f"{'; '.join(reasons)}. Pass LayerDecay({self.decay!r}, depth=function), a function from a layer's name to "
            "its depth"
        )
        return ["\n".join([text, *self.table(layers)])]

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the lines of a table: each depth with its factor and its layers."""
        levels = self._levels(layers)
        factor_of = dict(zip(levels, self._values(levels), strict=True))
        lines = [f"{'depth':>5}  {'factor':<9}  layers"]
        for level in sorted(factor_of):
            own = [layer.name or "(root)" for layer, at in zip(layers, levels, strict=True) if at == level]
            shown = ", ".join(own) if len(own) < 3 else f"{own[0]}, … {own[-1]} ({len(own)})"
            lines.append(f"{level:>5}  {factor_of[level]:<9.4g}  {shown}")
        return lines

    def _levels(self, layers: Sequence[Layer]) -> list[int]:
        names = [layer.name for layer in layers]
        levels = depths(names) if self.depth is None else [self.depth(name) for name in names]
        for name, level in zip(names, levels, strict=True):
            if isinstance(level, bool) or not has_type(level, int) or level < 0:
                raise ValueError(f"depth({name!r}) returned {level!r}; it must be a whole number of at least 0")
        return levels

    def _values(self, levels: Sequence[int]) -> list[float]:
        top, gap = max(levels), int(self.style == "electra")
        return [1.0 if level == top else float(self.decay) ** (top + gap - level) for level in levels]

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the tensor made by `init`."""
        return state["_factors"], state
