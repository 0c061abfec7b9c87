"""Write docs/optimizers.md: `python tests/optimizers_page.py`."""

from __future__ import annotations

from importlib.metadata import version
from pathlib import Path

import torch

from other_optimizers import PACKAGES, all_guests
from other_trials import Finding, tried

PLACES = ("lr", "update", "gradient")
PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
TEXT = """# Optimizers of other packages

Written by `python tests/optimizers_page.py` with {versions}. It tries every optimizer that these packages offer and
writes down what it finds; a test compares this page to that.

`apply="auto"` takes the place in the second column (for a rule that scales rates; the table in the
[page on places](places.md#what-auto-takes) has torch's own optimizers). The next three say what comes of each place,
tried on three layers over six steps in float64, the factors changing from step to step:

* **yes**: under `"lr"` equal, bit for bit, to the same optimizer with one permanent parameter group per layer, whose
  rates are set by hand before each step; under `"update"` equal to `w_old + f (w_new − w_old)` made by hand after
  each step; under `"gradient"` equal to gradients multiplied by hand before it (with `decay="plain"`).
* **own groups**: the same, but only if each parameter group holds one layer, as with
  `Optimizer(layerwise.param_groups(model), …)`; otherwise refused for the reason given. What such an optimizer
  computes over a group is then computed over a layer.
* **inside**: equal to permanent groups whose rates are set while the inner optimizer steps; what the wrapper itself
  computes from the rates, its weight decay and the weights of its average, follows the rates without factors.
* **no effect**: right, but the optimizer divides by the size of its gradients: with all of them doubled, no layer
  goes more than a twentieth of its way elsewhere. The logger `layerwise` warns of it.
* **no**: refused before anything changes, for the reason given.

Wherever a factor may act, an attached rule whose factors are all 1 leaves training as it is, bit for bit, with a
closure and without.

{table}

**Reasons**

{reasons}

**Remarks**

* *Attach to its …*: the wrapper is refused, or is no `torch.optim.Optimizer`, and the optimizer in this attribute
  takes the adapter; *acts on its …*: the adapter finds it by itself. The gradients that a rule measures are those
  that arrive there, so after SAM's second evaluation and OrthoGrad's projection.
* *A statistic over all layers*: the optimizer clips or scales by a norm, or another number, of all parameters, so
  that one layer's gradients change the steps of the others; a factor on one layer's gradients does too.
* *Draws random numbers*: layers with equal factors share a parameter group, so that the same numbers may go to other
  parameters than in permanent groups.
* With either of these two, equal bit for bit where all factors differ, else up to rounding, or to what is drawn.
* *Moves at factor 0 too*, *factor 0 gives NaN*, *divides by zero*: as a rate of 0 does in a parameter group of its
  own; `"update"`, where it may act, holds such a layer still.

## Muon beside another optimizer

`torch.optim.Muon` takes matrices only, so biases and the like go to a second optimizer, with an adapter of its own. A
layer whose weight is in one and whose bias in the other has two factors: a rule's norms are over the layer's
parameters *in this optimizer*. The Muon of `pytorch_optimizer` and its relatives hold both kinds, in two groups
(`use_muon`), and a layer has one factor.

## Optimizers that are in no table

Any other `torch.optim.Optimizer` gets `"lr"`, or `"update"` if its groups have no `"lr"`. That is equal to permanent
groups as long as `step()` reads the rate from the group it is working on and keeps nothing in groups that depends on
it. What can be seen is told: values that come out differently for the parts of a group raise a `RuntimeError` after
that step, which names `apply="update"`; so do closures that are evaluated more than once, or after the weights have
moved. What cannot be seen is a rate that is not read at all, read later, or taken from the first group: compare
`adapter.get_last_factors()` with how far each layer goes, or take `apply="update"`. `"update"` in turn is right for
any optimizer that keeps no copy of its weights from which it computes the next ones.
"""


def table(findings: list[Finding], numbers: dict[str, int]) -> str:
    """Return the rows; reasons get their numbers in the order in which they appear."""
    rows = ['| optimizer | `"auto"` | `"lr"` | `"update"` | `"gradient"` | remarks |', "|---|---|---|---|---|---|"]
    for finding in findings:
        cells = [f"`{finding.guest}`", f'`"{finding.automatic}"`' if finding.automatic else "none"]
        for place in PLACES:
            word = {"refused": "no", None: "–"}.get(finding.places.get(place), finding.places.get(place, "–"))
            reason = finding.reasons.get(place)
            cells.append(word if reason is None else f"{word} ({numbers.setdefault(reason, len(numbers) + 1)})")
        rows.append("| " + " | ".join([*cells, "; ".join(finding.remarks)]) + " |")
    return "\n".join(rows)


def versions() -> str:
    """Return the versions that are tried."""
    packages = [f"{name} {version(name)}" for name in PACKAGES.values()]
    return f"{', '.join(packages)} and torch {torch.__version__.partition('+')[0]}"


def page() -> str:
    """Return the page as it should be."""
    numbers: dict[str, int] = {}
    rows = table([tried(guest) for guest in all_guests()], numbers)
    reasons = "\n".join(f"{number}. It {reason}." for reason, number in numbers.items())
    return TEXT.format(versions=versions(), table=rows, reasons=reasons)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
