"""What the layers of a short training show that is wrong, in words, each with its number, its limit and a remedy.

The limits are rules of thumb, each with its source or reason beside it; docs/doctor.md says the same.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass, replace
from itertools import takewhile
from operator import attrgetter
from statistics import median

from layerwise.sinks import Record

LOW_RATIO, HIGH_RATIO = 1e-4, 1e-2
"""Usual range of ‖Δw‖ / ‖w‖ of one update. About 1e-3 is the rule of thumb of Stanford's course CS231n (notes "Neural
Networks Part 3", section "Ratio of weights:updates"); this is a decade to either side."""

FAR = 3.0
"""How many times outside of that range is a problem; nearer, within half a decade, is a note, since small networks
train well at 2e-2."""

EXPLODING = 10.0
"""‖g‖ / ‖w‖ above which gradients explode: plain descent then moves the layer by more than HIGH_RATIO an update even at
a rate of 1e-3, among the smallest in common use; healthy networks have 0.001 to 1. That gradients grow so is described
by Pascanu et al. 2013. It is a note where it is nearer than FAR times and the updates keep to their range, as the sum
of a loss over the batch in place of its mean does it too."""

VANISHING = 1e-4
"""Part of the largest ‖g‖ / ‖w‖ of all layers below which a layer's vanishes. One rate serves all layers if these lie
within the two decades of the usual range; at twice as many a layer stands still where another moves as far as it may.
That gradients shrink so from layer to layer is described by Glorot and Bengio 2010."""

MOST_NAMED = 5  # layers that a sentence names


@dataclass(frozen=True)
class LayerNumbers:
    """A layer's medians over the updates whose numbers are finite and in which it has a gradient, if there are any."""

    name: str
    gradient: float  # ‖g‖
    weight: float  # ‖w‖
    relative_gradient: float  # ‖g‖ / ‖w‖
    ratio: float  # ‖Δw‖ / ‖w‖ of one update
    lr: float
    dead_from: int  # first of the updates that leave it without a gradient to the end, if that is half of them; else 0
    largest_update: float  # ‖Δw‖, of all updates whose numbers are finite
    from_zero: bool  # its weights were all 0 at first


def _is_finite(record: Record) -> bool:
    return all(map(math.isfinite, (*record.gradient_norm, *record.weight_norm, *record.update_norm)))


def numbers_of(records: Sequence[Record]) -> list[LayerNumbers]:
    """Take the medians of every layer, in the network's order, of the records up to the first that is not finite."""
    kept = list(takewhile(_is_finite, records))
    if not kept:
        return []
    found = []
    for place, name in enumerate(kept[0].layers):
        live = [record for record in kept if record.gradient_norm[place]]
        dead_from = live[-1].step + 1 if live else kept[0].step
        pairs = [(r.gradient_norm[place], r.weight_norm[place]) for r in live or kept]
        found.append(
            LayerNumbers(
                name=name,
                gradient=median(gradient for gradient, _ in pairs),
                weight=median(weight for _, weight in pairs),
                relative_gradient=median(g / w if w else (math.inf if g else 0.0) for g, w in pairs),
                ratio=median(record.update_ratio[place] for record in live or kept),
                lr=median(record.lr[place] for record in live or kept),
                dead_from=dead_from if 2 * (kept[-1].step + 1 - dead_from) >= len(kept) else 0,
                largest_update=max(record.update_norm[place] for record in kept),
                from_zero=kept[0].weight_norm[place] == 0,
            )
        )
    return found


@dataclass(frozen=True, kw_only=True)
class Finding:
    """A finding about one layer or several; without layers, the template of a kind of finding."""

    kind: str
    serious: bool = True  # a problem, not a note
    layers: tuple[str, ...] = ()  # names, the worst first; empty where no layer can be named
    values: tuple[float, ...] = ()  # a number of each, what ``quantity`` says; none where there is nothing to measure
    quantity: str = ""
    limit: str  # what the numbers should keep to
    words: str
    remedy: str

    @property
    def evidence(self) -> str:
        """What was measured: the numbers and the layers; "" where no layer can be named."""
        numbers = [f"{value:.3g} in " for value in self.values] or [""] * len(self.layers)
        pairs = zip(self.layers[:MOST_NAMED], numbers, strict=False)
        named = ", ".join(f"{number}{layer or '(root)'!r}" for layer, number in pairs)
        more = len(self.layers) - MOST_NAMED
        named += f" and {more} more" if more > 0 else ""
        return f"{self.quantity} {named}".strip()

    @property
    def sentence(self) -> str:
        """The finding with layers, numbers and limit."""
        return f"{': '.join(filter(None, (self.words, self.evidence)))} ({self.limit})"


EXPLODES = Finding(
    kind="exploding",
    quantity="‖g‖/‖w‖",
    limit=f"limit {EXPLODING:g}",
    words="gradients explode",
    remedy="Look at the initialisation (gains far above 1) and at the scale of inputs, targets and loss; normalise the "
    "layers, or clip with torch.nn.utils.clip_grad_norm_.",
)
DIES = Finding(
    kind="dead",
    quantity="no gradient from update",
    limit="to the end",
    words="layers are dead",
    remedy="Look behind the one next to the loss: an activation that is 0 for every input (a ReLU after a large "
    "negative bias or too large a step), a detach(), or an unused branch. Lower the rate, use LeakyReLU or GELU, "
    "initialise anew.",
)
VANISHES = Finding(
    kind="vanishing",
    quantity="relative ‖g‖/‖w‖",
    limit=f"limit {VANISHING:g} of the largest",
    words="gradients vanish",
    remedy="Replace saturating activations (sigmoid, tanh) by ReLU or GELU, add normalisation or residual connections, "
    "and initialise for the activation (torch.nn.init.kaiming_normal_).",
)
STAYS = Finding(
    kind="unmoved",
    quantity="rate",
    limit="no change in any update, though there is a gradient",
    words="layers do not move",
    remedy="Is their rate 0, or a factor? Are they of a low precision, in which so small an update rounds to nothing?",
)
TOO_FAST = Finding(
    kind="fast",
    quantity="‖Δw‖/‖w‖",
    limit=f"usual {LOW_RATIO:g} to {HIGH_RATIO:g}",
    words="layers move fast",
    remedy="Lower the rate, of these layers (layerwise.rules.Constant) or of all; a small network may learn well all "
    "the same.",
)
TOO_SLOW = Finding(
    kind="slow",
    quantity="‖Δw‖/‖w‖",
    limit=f"usual {LOW_RATIO:g} to {HIGH_RATIO:g}",
    words="layers move slowly",
    remedy="Raise the rate, of these layers or of all, unless a scheduler still warms it up, or the loss is at its "
    "least.",
)
FROZEN = Finding(
    kind="frozen",
    serious=False,
    limit="requires_grad=False",
    words="layers are frozen",
    remedy="Right if you froze them; else call requires_grad_(True) before the optimizer is made.",
)

NOT_A_NUMBER = (
    "Look for NaN or infinity in that batch, and for log, sqrt or a division at 0; if numbers grew before, the rate is "
    "too large. torch.autograd.set_detect_anomaly(True) names the operation."
)
TOO_LARGE = "The gradients are finite and the update is not: lower the rate."


def find(
    records: Sequence[Record],
    *,
    diverged_at: int | None = None,
    frozen: Collection[str] = (),
    ungiven: Collection[str] = (),
) -> list[Finding]:
    """Say what is wrong, problems before notes.

    What follows from another finding is not reported again: a layer without a gradient does not vanish too, and a slow
    layer is no news where gradients vanish. Layers to which the loss gives no gradient at all, ``ungiven``, are
    reported elsewhere. ``diverged_at``: updates after which the loss was not finite.
    """
    layers = [layer for layer in numbers_of(records) if layer.name not in (*frozen, *ungiven)]
    dead = [layer for layer in layers if layer.dead_from]
    unmoved = [layer for layer in layers if layer.relative_gradient > 0 and layer.largest_update == 0]
    # Beside weights that grow from 0 everything is large at first, which says nothing.
    judged = [layer for layer in layers if layer.relative_gradient > 0 and not layer.from_zero]
    largest = max((layer.relative_gradient for layer in judged), default=0.0)
    exploding = [layer for layer in judged if layer.relative_gradient > EXPLODING]
    vanishing = [layer for layer in judged if layer.relative_gradient < VANISHING * largest]
    moving = [layer for layer in judged if layer not in unmoved]
    fast = [] if exploding else [layer for layer in moving if layer.ratio > HIGH_RATIO]
    slow = [] if vanishing else [layer for layer in moving if layer.ratio < LOW_RATIO]
    too_far = any(layer.relative_gradient > FAR * EXPLODING or layer.ratio > HIGH_RATIO for layer in exploding)
    relative, ratio = attrgetter("relative_gradient"), attrgetter("ratio")
    found = [
        *_non_finite(records, diverged_at),
        *_filled(EXPLODES, exploding, relative, serious=too_far, largest_first=True),
        *_filled(DIES, dead, attrgetter("dead_from")),
        *_filled(VANISHES, vanishing, lambda layer: layer.relative_gradient / largest),
        *_filled(STAYS, unmoved, attrgetter("lr")),
        *_filled(TOO_FAST, fast, ratio, serious=any(ratio(one) > FAR * HIGH_RATIO for one in fast), largest_first=True),
        *_filled(TOO_SLOW, slow, ratio, serious=any(ratio(one) < LOW_RATIO / FAR for one in slow)),
        *([replace(FROZEN, layers=tuple(frozen))] if frozen else []),
    ]
    return sorted(found, key=lambda finding: not finding.serious)


def _filled(
    template: Finding,
    layers: Sequence[LayerNumbers],
    value: Callable[[LayerNumbers], float],
    *,
    serious: bool = True,
    largest_first: bool = False,
) -> list[Finding]:
    """Fill in a template, if there are layers of its kind."""
    if not layers:
        return []
    backwards = layers[::-1]  # of equal ones, as the dead, the one next to the loss comes first
    ordered = sorted(backwards, key=value, reverse=largest_first)
    names, values = tuple(layer.name for layer in ordered), tuple(map(value, ordered))
    return [replace(template, serious=serious, layers=names, values=values)]


def _non_finite(records: Sequence[Record], diverged_at: int | None) -> list[Finding]:
    """Say where numbers ceased to be finite first."""
    first = next((record for record in records if not _is_finite(record)), None)
    if first is None and diverged_at is None:
        return []
    found: list[tuple[str, float]] = []
    quantity, update = "", (diverged_at or 0) + 1
    if first is not None:
        update = first.step
        for words, norms in (("‖Δw‖", first.update_norm), ("‖g‖", first.gradient_norm), ("‖w‖", first.weight_norm)):
            broken = [(name, v) for name, v in zip(first.layers, norms, strict=True) if not math.isfinite(v)]
            if broken:  # the weights are named rather than what follows from them
                quantity, found = words, broken
    return [
        Finding(
            kind="non-finite",
            layers=tuple(name for name, _ in found),
            values=tuple(value for _, value in found),
            quantity=quantity,
            limit="must be finite",
            words=f"{'numbers are' if found else 'the loss is'} not finite from update {update} on",
            remedy=TOO_LARGE if quantity == "‖Δw‖" else NOT_A_NUMBER,
        )
    ]
