"""What a layer did in a short training: medians of its numbers."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from statistics import median

from layerwise.sinks import Record


@dataclass(frozen=True)
class LayerNumbers:
    """A layer's medians over the updates whose numbers are finite and in which it has a gradient, if there are any.

    Attributes:
        name: of the layer.
        gradient: ‖g‖.
        weight: ‖w‖.
        relative_gradient: ‖g‖ / ‖w‖.
        ratio: ‖Δw‖ / ‖w‖ of one update.
        lr: its rate.
        dead_from: first of the updates that leave it without a gradient to the end, if that is half of them; else 0.
        largest_update: ‖Δw‖, of all updates whose numbers are finite.
        from_zero: its weights were all 0 at first.
    """

    name: str
    gradient: float
    weight: float
    relative_gradient: float
    ratio: float
    lr: float
    dead_from: int
    largest_update: float
    from_zero: bool


def is_finite(record: Record) -> bool:
    """Tell whether all norms of a record are finite."""
    return all(map(math.isfinite, (*record.gradient_norm, *record.weight_norm, *record.update_norm)))


def numbers_of(records: Sequence[Record]) -> list[LayerNumbers]:
    """Take the medians of every layer.

    Args:
        records: of the updates in order; those from the first on that is not finite are left out.

    Returns:
        Numbers of each layer, in the network's order; none without a finite record.

    Example:
        >>> (layer,) = numbers_of([Record(1, ("conv",), [0.5], [2.0], [0.01], [1.0], [0.1], [0.005])])
        >>> layer.relative_gradient, layer.ratio
        (0.25, 0.005)
    """
    kept = finite_part(records)
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


def finite_part(records: Sequence[Record]) -> Sequence[Record]:
    """Give the records before the first one that is not finite."""
    end = next((place for place, record in enumerate(records) if not is_finite(record)), len(records))
    return records[:end]
