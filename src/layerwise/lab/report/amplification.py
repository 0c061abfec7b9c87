"""The report of the amplification demo: one HTML page that needs no network."""

from __future__ import annotations

import statistics
from typing import Any

from layerwise.lab.amplification.demo import Outcome
from layerwise.lab.amplification.results import Finding
from layerwise.lab.amplification.training import ARMS, MEASURED, RANDOM_RATIO, THRESHOLD
from layerwise.lab.report import amplification_charts as charts
from layerwise.lab.report.page import fill
from layerwise.lab.terminal import capital
from layerwise.lab.verdict import MINIMUM_PAIRS

PAPER_NETWORKS = "VGG-19 and ResNet-18 to -101, 64 wide, 50,000 images, 150 epochs"


def summary(outcome: Outcome) -> str:
    """Say in one sentence what came out.

    Args:
        outcome: of the demo.

    Returns:
        The sentence.
    """
    protocol, findings = outcome.protocol, outcome.results.findings()
    photographs = "CIFAR\N{NON-BREAKING HYPHEN}10" if outcome.dataset == "cifar10" else "digits"
    begin = f"After {protocol.epochs} epochs of a narrow ResNet-{protocol.depth} on a slice of {photographs},"
    if max(len(finding.comparisons[0].seeds) for finding in findings) < MINIMUM_PAIRS:
        return f"{begin} too few runs are finished to tell whether amplified gradients change the test accuracy."
    better = [ARMS[finding.arm] for finding in findings if finding.comparisons[0].better]
    worse = [ARMS[finding.arm] for finding in findings if finding.comparisons[0].worse]
    beyond = [ARMS[finding.arm] for finding in findings if _beyond(finding)]
    if not better:
        words = "amplified gradients are not shown to raise the test accuracy in any arm"
        return f"{begin} {words}{f'; they lower it in {_listed(worse)}' if worse else ''}."
    more = f"it is for {_listed(beyond)}" if beyond else "for none of these arms it is"
    return (
        f"{begin} the test accuracy is higher than that of plain training with {_listed(better)}; {more} shown to be "
        "more than amplifying every layer gives."
    )


def _beyond(finding: Finding) -> bool:
    """Say whether an arm beats both plain training and the control."""
    return len(finding.comparisons) == 2 and all(comparison.better for comparison in finding.comparisons)


def _listed(words: list[str]) -> str:
    return " and ".join(filter(None, (", ".join(words[:-1]), words[-1])))


def _table(outcome: Outcome) -> list[dict[str, Any]]:
    """Give the rows of the table of accuracies; the highest mean of a column is marked."""
    results = outcome.results
    rows = [
        {
            "arm": arm,
            "words": words,
            "last": results.last(arm),
            "best_epoch": results.best_epoch(arm),
            "best_run": results.best_run(arm),
            "count": len(results.of(arm)),
            "diverged": results.diverged(arm),
        }
        for arm, words in ARMS.items()
    ]
    for column in ("last", "best_epoch"):
        best = max(row[column].mean for row in rows if row[column])
        for row in rows:
            row[f"bold_{column}"] = bool(row[column]) and row[column].mean == best
    return rows


def _counts(outcome: Outcome) -> list[dict[str, Any]]:
    """Give the chosen layers of each run and phase."""
    results = outcome.results
    return [
        {
            "arm": arm,
            "words": ARMS[arm],
            "phases": [
                {"epoch": epoch, "runs": counts, "mean": statistics.fmean(counts), "empty": counts.count(0)}
                for epoch, counts in results.counts(arm).items()
            ],
        }
        for arm in charts.AMPLIFIED
        if results.counts(arm)
    ]


def _about(outcome: Outcome) -> list[tuple[str, str]]:
    """Say what was trained, and how."""
    protocol = outcome.protocol
    recipe = protocol.recipe(outcome.settings.weight_decay)
    first, then = protocol.phases[0].until, protocol.analysis_epochs
    ends = [phase.until for phase in protocol.phases]
    augmentation = (
        "cropped at random from 4 pixels of padding and mirrored at random"
        if outcome.dataset == "cifar10"
        else "not augmented, as a mirrored digit is another sign"
    )
    return [
        (
            "Network",
            f"ResNet-{protocol.depth} with the paper's stem, {protocol.width} channels wide instead of 64; "
            f"{outcome.results.layer_count() or '?'} layers, each the parameters of one module",
        ),
        ("Images", f"{augmentation}; the same batches and crops in every arm of a seed"),
        (
            "Optimizer",
            f"SGD, batches of {recipe.batch_size}, momentum {recipe.momentum}, weight decay {recipe.weight_decay:g}; "
            f"rate {recipe.rate} up to epoch {recipe.milestones[0]}, then {recipe.rate * recipe.rate_decay:.2g}",
        ),
        (
            "Phases",
            f"The paper's params_1 compressed from 150 to {protocol.epochs} epochs: plain to {first}, measured in "
            f"{then[0]}, amplified to {ends[1]}, measured in {then[1]}, amplified to {ends[2]}, plain to {ends[3]}; "
            f"factor {protocol.phases[1].factor:g}",
        ),
        (
            "Choice",
            f"z above {THRESHOLD:g}, of G or G′ over the epoch of analysis; at random {RANDOM_RATIO:.0%} of the "
            "layers, drawn anew in each phase",
        ),
    ]


def _caveats(outcome: Outcome) -> list[str]:
    """Say what the page does not show."""
    protocol, results = outcome.protocol, outcome.results
    caveats = [
        f"A network of {protocol.width} channels, {protocol.train_count:,} images and {protocol.epochs} epochs, where "
        f"the paper has {PAPER_NETWORKS}: these accuracies are not the paper's, and a small effect there may be none "
        "here.",
        f"Batches of {protocol.batch_size} make {protocol.batches} steps in the epoch of analysis, where noise alone "
        f"gives a G of about {protocol.batches**-0.5:.2f}; with the paper's data and batches of 128 it is 0.05. Batch "
        "size, momentum, weight decay and augmentation are not in the paper: they are those of a common recipe, and "
        "the batch is smaller.",
        "The paper's tables show the best of 9 or 19 thresholds, it seems a single run each, beside the mean of the "
        "plain runs, which favours the method. Here there is one threshold, set by how many layers it chooses and not "
        "by any accuracy, and means are compared. The column “best run” shows what the other way does, even to plain "
        "training.",
        f"The accuracy after the last epoch is judged. That of the best epoch is chosen by the test images themselves. "
        f"All runs share {outcome.test_count:,} test images, whose own error of sampling the intervals do not hold.",
        "Every module with parameters is a layer. A normalisation of 16 numbers has a noisier G than a "
        "convolution of thousands, which makes an extreme z likelier: see in the map which were chosen.",
        "“Every layer” doubles all gradients in the same epochs, which for SGD is close to doubling the rate there: a "
        "gain that it shows too is no gain of choosing layers. No rate was tuned for any arm.",
    ]
    if outcome.dataset != "cifar10":
        caveats.append("The paper has no experiment on digits. With --data-dir a slice of CIFAR-10 is used.")
    if outcome.settings.weight_decay:
        caveats.append(
            "The paper's plain networks are weaker than this recipe makes them, perhaps for want of weight decay. "
            "With --weight-decay 0 the demo is run so, into a report of its own."
        )
    empty = [counts.count(0) for arm in MEASURED for counts in results.counts(arm).values()]
    if sum(empty):
        caveats.append(
            f"In {sum(empty)} phases no layer passed the threshold; a run without any is plain training, and a gain of "
            "it would be no evidence on the method."
        )
    diverged = sum(results.diverged(arm) for arm in ARMS)
    if diverged:
        caveats.append(
            f"{diverged} runs diverged (a loss that is not finite). They are kept in every mean: from then on their "
            "accuracy counts as 10 %, that of guessing."
        )
    return caveats


def render(outcome: Outcome, command: str) -> str:
    """Make the page.

    Args:
        outcome: of the demo, with at least one finished run.
        command: the command line that made it.

    Returns:
        HTML, with every string escaped.
    """
    from markupsafe import Markup

    results, protocol = outcome.results, outcome.protocol
    drawings = charts.differences(results)
    panels = {
        "accuracy": charts.curves(results, protocol, "accuracy", "test accuracy, %"),
        "loss": charts.curves(results, protocol, "training_loss", "training loss, nats"),
        "maps": charts.selection_maps(results),
    }
    return fill(
        "amplification.html.j2",
        outcome,
        command,
        summary=summary(outcome),
        about=_about(outcome),
        caveats=_caveats(outcome),
        legend=charts.LOOK.legend(),
        legend_amplified=charts.LOOK.legend(charts.AMPLIFIED),
        verdicts=[
            {
                "subject": capital(ARMS[finding.arm]),
                "conclusion": finding.words,
                "sentences": [capital(comparison.sentence) for comparison in finding.comparisons],
                "chart": Markup(drawings[finding.arm]),
            }
            for finding in results.findings()
        ],
        epochs=protocol.epochs,
        analysis=" and ".join(map(str, protocol.analysis_epochs)),
        table=_table(outcome),
        names={arm: capital(words) for arm, words in ARMS.items()},
        panels={name: {arm: Markup(drawing) for arm, drawing in row.items()} for name, row in panels.items()},
        shares=Markup(charts.shares(results, protocol)),
        counts=_counts(outcome),
        layers=results.layer_count(),
        z_limit=charts.Z_LIMIT,
        threshold=THRESHOLD,
        map_seeds=min(charts.MAP_SEEDS, len(results.seeds)),
        all_seeds=len(results.seeds),
    )
