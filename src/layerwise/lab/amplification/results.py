"""The finished runs of the amplification demo: final accuracies, chosen layers, and what the comparisons mean."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, field
from typing import Any

from layerwise.lab.amplification.training import ARMS, MEASURED
from layerwise.lab.records import Cell, Records, Row, cell
from layerwise.lab.verdict import MINIMUM_PAIRS, NONE, Comparison, Rivals, conclusion

RIVALS = Rivals(plain="plain training", global_rate="amplifying every layer", control="amplifying every layer")
"""What conclusions call the other arms."""

AGAINST_ALL = ("random", "G", "G_prime")
"""The arms that are compared with ``all`` too."""


@dataclass(frozen=True)
class Finding:
    """What was found of one amplified arm.

    Attributes:
        arm: key of ``ARMS``.
        comparisons: with plain, and (but for ``all``) with every layer.
        words: what they mean together.
    """

    arm: str
    comparisons: tuple[Comparison, ...]
    words: str


@dataclass
class Results(Records):
    """The finished runs; their keys are arm and seed.

    Attributes:
        seeds: seeds of the plan.
        epochs: of a run; the accuracy after the last one is judged.
        batches: of an epoch.
        records: the finished runs.
    """

    seeds: tuple[int, ...]
    epochs: int
    batches: int
    records: dict[tuple[Any, ...], dict[str, Any]] = field(default_factory=dict)

    key_columns = ("arm",)
    step_column = "epoch"
    main_quantity = "accuracy"

    @property
    def family(self) -> int:
        """Number of comparisons planned: each amplified arm with plain, all but one of them with ``all``."""
        return len(ARMS) - 1 + len(AGAINST_ALL)

    def last(self, arm: str) -> Cell | None:
        """Summarise the accuracy after the last epoch, the primary result; None without a finished run."""
        return self._summary([final(record) for record in self.of(arm).values()])

    def best_epoch(self, arm: str) -> Cell | None:
        """Summarise the accuracy after the best epoch of each run, which the test images chose."""
        return self._summary([max(value for _, value in record["accuracy"]) for record in self.of(arm).values()])

    def best_run(self, arm: str) -> float | None:
        """Give the highest last accuracy of any seed: what a table of single best runs would show."""
        return max((final(record) for record in self.of(arm).values()), default=None)

    def _summary(self, values: list[float]) -> Cell | None:
        return cell(self.epochs, values) if values else None

    def counts(self, arm: str) -> dict[int, list[int]]:
        """Count the chosen layers: analysis epoch -> one number a finished run, in the order of the seeds."""
        found: dict[int, list[int]] = {}
        for record in self.of(arm).values():
            for selection in record["selections"]:
                chosen = sum(selected for _, _, selected in selection["layers"].values())
                found.setdefault(selection["epoch"], []).append(chosen)
        return found

    def layer_count(self) -> int | None:
        """Count the layers that may be chosen; None before any run that chooses is finished."""
        for record in self.records.values():
            for selection in record["selections"]:
                return len(selection["layers"])
        return None

    def findings(self) -> list[Finding]:
        """Compare each amplified arm with plain and with ``all`` at the last epoch."""
        found = []
        for arm in list(ARMS)[1:]:
            plain = self._compare(arm, "plain")
            if arm not in AGAINST_ALL:
                found.append(Finding(arm, (plain,), _alone(plain)))
                continue
            control = self._compare(arm, "all")
            words = " ".join(filter(None, (conclusion(plain, control, RIVALS), self._emptiness(arm))))
            found.append(Finding(arm, (plain, control), words))
        return found

    def _compare(self, arm: str, against: str) -> Comparison:
        return self.paired(
            (arm,),
            (against,),
            final,
            quantity="accuracy",
            solver="SGD",
            arm=ARMS[arm],
            against=ARMS[against],
            iteration=self.epochs * self.batches,
        )

    def _emptiness(self, arm: str) -> str:
        """Say in how many phases nothing passed the threshold: there the run is plain, whatever its accuracy."""
        counts = [count for chosen in self.counts(arm).values() for count in chosen]
        empty = counts.count(0)
        if arm not in MEASURED or not empty:
            return ""
        if empty == len(counts):
            return "No layer was ever chosen: these runs are plain training, and no evidence on the method."
        return f"In {empty} of {len(counts)} amplified phases no layer was chosen: they are no evidence on the method."

    def rows_of(self, record: dict[str, Any]) -> Iterable[Row]:
        """Give the numbers of one run: epoch, quantity, layer, value."""
        for quantity in ("accuracy", "training_loss", "share"):
            for epoch, value in record[quantity]:
                yield epoch, quantity, None, value
        for selection in record["selections"]:
            for layer, values in selection["layers"].items():
                for quantity, value in zip(("directionality", "z", "selected"), values, strict=True):
                    yield selection["epoch"], quantity, layer, None if value is None else float(value)


def final(record: dict[str, Any]) -> float:
    """Give the accuracy after the last epoch, in %."""
    return record["accuracy"][-1][1]


def _alone(plain: Comparison) -> str:
    """Say what the comparison of ``all`` with plain means."""
    if len(plain.differences) < MINIMUM_PAIRS:
        return f"Too few runs to tell: fewer than {MINIMUM_PAIRS} pairs are finished."
    if plain.outcome == NONE:
        return "These runs do not show that a larger rate in the same epochs changes the accuracy."
    beats = "beats" if plain.better else "does worse than"
    return f"A larger rate for all layers in the same epochs {beats} plain training."
