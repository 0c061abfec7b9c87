"""Write docs/optimizers.md: `python tests/optimizers_page.py`."""

from __future__ import annotations

import re
from importlib.metadata import version
from pathlib import Path

import torch

import packages
from other_optimizers import PACKAGES, Guest, all_guests, further_guests
from other_trials import Finding, tried

PLACES = ("lr", "update", "gradient")
FURTHER = ("lr", "update")
PAGE = Path(__file__).parents[1] / "docs" / "optimizers.md"
TEXT = """# Optimizers of other packages

Written by `python tests/optimizers_page.py` with {versions}; the packages further down stand
with their versions. It tries every optimizer that they offer and writes down what it finds; tests compare this page to
that.

`apply="auto"` takes the place in the second column (for a rule that scales rates; the table in the
[page on places](places.md#what-auto-takes) has torch's own optimizers). The next three columns hold the result for each
place, on three layers over six steps in float64, with factors that change from step to step:

* **yes**: under `"lr"` equal, bit for bit, to the same optimizer with one permanent parameter group per layer, whose
  rates are set by hand before each step; under `"update"` equal to `w_old + f (w_new − w_old)` made by hand after
  each step; under `"gradient"` equal to gradients multiplied by hand before it (with `decay="plain"`).
* **own groups**: the same, but only if each parameter group holds one layer, as with
  `Optimizer(layerwise.param_groups(model), …)`; otherwise refused for the reason given. What such an optimizer
  computes over a group is then computed over a layer.
* **inside**: equal to permanent groups whose rates are set while the inner optimizer steps; what the wrapper itself
  computes from the rates, its weight decay and the weights of its average, follows the rates without factors.
* **no effect**: right, but the optimizer divides by the size of its gradients. Doubling all gradients changes the path
  of no layer by more than a twentieth. The logger `layerwise` warns about it.
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

## Further packages

The same test at `"lr"` and `"update"`, with different factors at each step and for each layer. bitsandbytes, heavyball
and torchao run in float32, where `"update"` is equal up to 1e-5 of the distance that the weights move. `"update"` is
also refused where later steps at a rate near 0 undo more than a twentieth of a shift of the weights. bitsandbytes and
torchao keep their states in eight bits or fewer, and `"lr"` is exact, bit for bit. heavyball and torchao are tried
uncompiled (`heavyball.utils.compile_mode = None`, `torch.compiler.set_stance("force_eager")`).

{further}

## Muon beside another optimizer

`torch.optim.Muon` takes matrices only, so biases and the like go to a second optimizer, with an adapter of its own. A
layer whose weight is in one and whose bias in the other has two factors: a rule's norms are over the layer's
parameters *in this optimizer*. The Muon of `pytorch_optimizer` and its relatives hold both kinds, in two groups
(`use_muon`), and a layer has one factor.

## Optimizers that are in no table

Any other `torch.optim.Optimizer` is tried when an adapter is attached to it: runs of twelve steps of a copy of it on a
few tiny tensors. It gets `"lr"` if its groups can be divided and a rate that changes with each step acts as that of
permanent groups. Otherwise it gets `"update"`, if later steps do not take the weights back. Else it is refused, with
the reason and the remedy. A trial cannot show what an optimizer begins to do later. If values in a group then differ
between its parts, a `RuntimeError` after that step names `apply="update"`. Numbers that a step keeps in a group, such
as a count, are equal in all parts and are carried over. Where they are tensors on an accelerator, comparing them waits
for the device once a step.
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


def title(package: str) -> str:
    """Return the heading of a further package."""
    return f"### {packages.PACKAGES[package]} {version(packages.PACKAGES[package])}"


def sections() -> dict[str, str]:
    """Return what the page says of each further package, by heading."""
    found = re.split(r"^(?=##)", PAGE.read_text(encoding="utf-8"), flags=re.MULTILINE)
    return {text.partition("\n")[0]: text for text in found if text.startswith("### ")}


def section(package: str) -> str:
    """Return what there is to say of a further package; what the page says already, where it is not installed."""
    if not packages.is_here(package):
        name = f"### {packages.PACKAGES[package]} "
        return next((text.rstrip() for heading, text in sections().items() if heading.startswith(name)), "")
    numbers: dict[str, int] = {}
    rows = ['| optimizer | `"auto"` | `"lr"` | `"update"` | remarks |', "|---|---|---|---|---|"]
    for guest in further_guests(package):
        own = cells(tried(guest))
        for place, reason in tried(guest).reasons.items():
            at = 1 + FURTHER.index(place)
            own[at] = own[at].replace(f"({reason})", f"({numbers.setdefault(reason, len(numbers) + 1)})")
        rows.append("| " + " | ".join([f"`{guest}`", *own]) + " |")
    reasons = [f"{number}. It {reason}." for reason, number in numbers.items()]
    return "\n".join([title(package), "", *rows, *([""] if reasons else []), *reasons])


def cells(finding: Finding, places: tuple[str, ...] = FURTHER) -> list[str]:
    """Return an optimizer's row behind its name, with the reasons written out."""
    row = [f'`"{finding.automatic}"`' if finding.automatic else "none"]
    for place in places:
        word = {"refused": "no", None: "–"}.get(finding.places.get(place), finding.places.get(place, "–"))
        row.append(f"{word} ({finding.reasons[place]})" if place in finding.reasons else word)
    return [*row, "; ".join(finding.remarks)]


def full_row(guest: Guest, text: str) -> list[str]:
    """Return what a section says of an optimizer, with the reasons written out."""
    reasons = dict(re.findall(r"^(\d+)\. It (.*)\.$", text, flags=re.MULTILINE))
    (row,) = re.findall(rf"^\| `{re.escape(str(guest))}` \| (.*) \|$", text, flags=re.MULTILINE)
    return [re.sub(r"\((\d+)\)$", lambda found: f"({reasons[found[1]]})", cell.strip()) for cell in row.split(" | ")]


def versions() -> str:
    """Return the versions that are tried."""
    packages = [f"{name} {version(name)}" for name in PACKAGES.values()]
    return f"{', '.join(packages)} and torch {torch.__version__.partition('+')[0]}"


def page(*, with_further: bool = True) -> str:
    """Return the page as it should be, with or without the further packages."""
    numbers: dict[str, int] = {}
    rows = table([tried(guest) for guest in all_guests()], numbers)
    reasons = "\n".join(f"{number}. It {reason}." for reason, number in numbers.items())
    further = "\n\n".join(filter(None, map(section, packages.PACKAGES))) if with_further else "{further}"
    return TEXT.format(versions=versions(), table=rows, reasons=reasons, further=further)


if __name__ == "__main__":
    PAGE.write_text(page(), encoding="utf-8")
