"""What the person at the terminal reads of the amplification demo: the table and the verdict."""

from __future__ import annotations

import statistics
from dataclasses import asdict

from rich.table import Table

from layerwise.lab.amplification.demo import Outcome
from layerwise.lab.amplification.training import ARMS
from layerwise.lab.terminal import Shown, cell_json, cell_text, comparisons_json, plain_table, whole_json
from layerwise.lab.verdict import confidence_note


def counts_text(counts: dict[int, list[int]]) -> str:
    """Write the mean number of chosen layers of each amplified phase; "-" where no layer is amplified."""
    return ", ".join(f"{statistics.fmean(chosen):.1f}" for chosen in counts.values()) or "-"


def table(outcome: Outcome) -> Table:
    """Make the table of test accuracies, at most 80 columns wide.

    Args:
        outcome: of the demo.

    Returns:
        One row an arm; an arm with fewer runs than planned, or with diverged ones, says so.
    """
    results = outcome.results
    made = plain_table(
        f"test accuracy in %, mean ± sd over {len(results.seeds)} seeds",
        (f"epoch {results.epochs}", "best epoch", "best run", f"layers of {results.layer_count() or '?'}"),
    )
    for arm, words in ARMS.items():
        best = results.best_run(arm)
        made.add_row(
            words,
            f"[bold]{cell_text(results.last(arm))}[/bold]",
            cell_text(results.best_epoch(arm)),
            "-" if best is None else f"{best:.2f}",
            counts_text(results.counts(arm)),
        )
        count, diverged = len(results.of(arm)), results.diverged(arm)
        if count < len(results.seeds) or diverged:
            made.add_row(f"  ({count} runs{f', {diverged} diverged' if diverged else ''})")
    return made


def shown(outcome: Outcome) -> Shown:
    """Gather what the person reads.

    Args:
        outcome: of the demo.

    Returns:
        Table, one verdict an amplified arm, and how the intervals were made.
    """
    results = outcome.results
    verdicts = [(ARMS[finding.arm], finding.words, finding.comparisons) for finding in results.findings()]
    key = (
        f"Epoch {results.epochs} is judged; best epoch, and best run (the best of the seeds there), are chosen by the "
        "test images themselves. "
        "Layers: how many are amplified in each amplified phase, mean over seeds."
    )
    return Shown(table(outcome), verdicts, confidence_note(results.family, len(results.seeds)), key)


def as_json(outcome: Outcome) -> str:
    """Write the outcome for a program.

    Args:
        outcome: of the demo.

    Returns:
        One JSON object: the accuracies, the chosen layers, the verdict, the files, and whether it is complete.
    """
    results = outcome.results
    accuracies = [
        {
            "arm": arm,
            "last_epoch": cell_json(last),
            "best_epoch": cell_json(best),
            "best_run": results.best_run(arm),
            "layers_chosen": {str(epoch): counts for epoch, counts in results.counts(arm).items()},
            "diverged": results.diverged(arm),
        }
        for arm in ARMS
        if (last := results.last(arm)) and (best := results.best_epoch(arm))
    ]
    verdict = [
        {"arm": finding.arm, "conclusion": finding.words, "comparisons": comparisons_json(finding.comparisons)}
        for finding in results.findings()
    ]
    return whole_json(
        outcome,
        weight_decay=outcome.settings.weight_decay,
        protocol=asdict(outcome.protocol),
        layers=results.layer_count(),
        accuracies=accuracies,
        verdict=verdict if results.records else [],
    )
