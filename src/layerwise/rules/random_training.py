"""Pan et al. 2024: a few random blocks train at a time (LISA)."""

from __future__ import annotations

import hashlib
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from .._arguments import check_count, has_type
from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import Rule, shown
from .selection import check_whole
from .state import State

_BLOCK = re.compile(r"(?:.*?\.)?\d+(?=\.|$)")
"""A name up to its first number."""


@dataclass(frozen=True)
class RandomTraining(Rule):
    """A few random blocks train for some steps, then others; what is in no block always trains.

    f_l = 1 for layers of the drawn blocks and in no block, else 0

    Start: `LayerwiseLR(optimizer, RandomTraining(), model)`. Keep the optimizer's own rate: the factors are 0 or 1.

    Blocks are the numbered ones in the names (`h.3`, `layer1.0`); embeddings, the last normalisation and the head are
    in none. A block whose layers are all excluded is not drawn. The draws are uniform, without replacement, from a
    stream of random numbers of their own, which the state holds: a run that is continued draws what the whole run would
    have drawn, and every process draws the same.

    The factor acts on the rate, so decoupled decay rests with it; the optimizer's moments still see the gradients.

    When it helps: the authors of LISA fine-tune language models of 7 billion weights in 24 GB, and report more than
    LoRA reaches. When not: the factors alone save no memory and no time, which takes `requires_grad=False` for the
    blocks that rest. Costs: nothing but the groups.

    Args:
        blocks: Blocks that train at a time.
        every: Steps from one draw to the next. A step that a gradient scaler skips counts too where the optimizer is
            called for it, as a fused one is.
        seed: Of the draws.
        block: A function from a layer's name to the name of its block, or None for a layer that always trains.

    Raises:
        TypeError: A number is no whole number, or `block` returns no string.
        ValueError: A number is out of its range; or, when attached, there is no block.

    Example:
        >>> rule = RandomTraining(blocks=1, every=2, seed=1)
        >>> layers = [Layer(name, (torch.zeros(1),)) for name in ("embed", "h.0.a", "h.0.b", "h.1.a", "head")]
        >>> state = rule.init(layers, torch.device("cpu"))
        >>> for _ in range(4):
        ...     factors, state = rule.factors(Statistics(), state)
        ...     print(factors.tolist())
        [1.0, 0.0, 0.0, 1.0, 1.0]
        [1.0, 0.0, 0.0, 1.0, 1.0]
        [1.0, 1.0, 1.0, 0.0, 1.0]
        [1.0, 1.0, 1.0, 0.0, 1.0]

    Reference:
        Pan et al.: LISA: layerwise importance sampling for memory-efficient large language model fine-tuning, 2024,
        arXiv 2403.17919; 20 steps are its code's default. The code draws from NumPy's global stream, which no
        checkpoint holds.
    """

    blocks: int = 2
    every: int = 20
    seed: int = 0
    block: Callable[[str], str | None] | None = None
    needs = ()
    default_place = "lr"
    scales_rates = True
    compares_layers = True

    def __post_init__(self) -> None:
        check_count("blocks", self.blocks)
        check_count("every", self.every)
        check_whole("seed", self.seed, 0)

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the stream of draws: its seed, and the number of the first step."""
        blocks = self._blocks(layers)
        if not any(blocks):
            raise ValueError(
                "RandomTraining found no numbered blocks in the layers' names: pass block=, a function from a layer's "
                "name to the name of its block"
            )
        ones = torch.ones(len(layers), dtype=common_device(layers)[1], device=common_device(layers)[0])
        choices = {one for one, layer in zip(blocks, layers, strict=True) if one is not None and layer.included}
        return {
            "seed": self.seed, "step": 0, "_blocks": blocks, "_choices": choices, "_drawn": None, "_factors": ones,
        }  # fmt: skip

    def _blocks(self, layers: Sequence[Layer]) -> list[str | None]:
        names = [layer.name for layer in layers]
        if self.block is None:
            return [found and found[0] for found in map(_BLOCK.match, names)]
        found = [self.block(name) for name in names]
        for name, one in zip(names, found, strict=True):
            if one is not None and not has_type(one, str):
                raise TypeError(f"block({name!r}) returned {one!r}; it must be the name of a block, or None")
        return found

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return 1 for what trains; the same tensor until the next draw."""
        stream = (state["seed"], state["step"] // self.every)
        new: State = {**state, "step": state["step"] + 1}
        if state["_drawn"] != stream:
            training = _drawn(state["_choices"], self.blocks, *stream)
            values = [float(one is None or one in training) for one in state["_blocks"]]
            old: Tensor = state["_factors"]
            new |= {"_drawn": stream, "_factors": torch.tensor(values, dtype=old.dtype, device=old.device)}
        return new["_factors"], new

    def table(self, layers: Sequence[Layer]) -> list[str]:
        """Return the lines of a table: the blocks and what always trains."""
        members: dict[str, list[str]] = {}
        for layer, one in zip(layers, self._blocks(layers), strict=True):
            members.setdefault(one or "(always)", []).append(layer.name or "(root)")
        lines = [f"{'block':<16} layers"]
        for block, names in members.items():
            lines.append(f"{block:<16} {shown(names)}")
        return lines


def _drawn(names: Iterable[str], count: int, seed: int, draw: int) -> list[str]:
    """Return some of the names, uniformly and without replacement; the same for the same seed and draw, everywhere."""
    return sorted(names, key=lambda name: hashlib.sha256(f"{seed}/{draw}/{name}".encode()).digest())[:count]
