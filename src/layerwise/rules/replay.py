"""Recorded factors once more, to ask whether they help when nothing adapts to the gradient."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .._arguments import has_type
from ..layers import Layer
from ..statistics import Statistics, common_device
from .base import Rule
from .constant import check_factor
from .state import State

FORMAT = "layerwise-factors"

LARGEST = 1 << 32
"""Bytes of recorded factors."""


def save_factors(file: str | os.PathLike[str], steps: Iterable[Mapping[str, float]]) -> None:
    """Write recorded factors for `Replay`.

    The file is JSON lines: a header that names the layers, then one list of factors a step. It is written beside its
    place and moved there when complete.

    Args:
        file: Where to.
        steps: One mapping a step, as `LayerwiseLR.get_last_factors()` returns it.

    Raises:
        ValueError: There is no step, the layers change from step to step, or a factor is out of its range.
    """
    rows = [dict(step) for step in steps]
    if not rows:
        raise ValueError("steps is empty; record at least one result of get_last_factors()")
    names = list(rows[0])
    lines = [json.dumps({"format": FORMAT, "version": 1, "layers": names})]
    for number, row in enumerate(rows):
        if list(row) != names:
            raise ValueError(f"step {number} has the layers {list(row)}, step 0 has {names}; record one adapter only")
        lines.append(json.dumps([check_factor(row[name], f"step {number}, layer {name!r}") for name in names]))
    partial = Path(f"{os.fspath(file)}.{os.getpid()}.part")
    partial.unlink(missing_ok=True)
    try:
        with partial.open("x", encoding="utf-8") as stream:  # made anew: a link that lies there is not followed
            stream.write("\n".join(lines) + "\n")
        partial.replace(file)
    finally:
        partial.unlink(missing_ok=True)


def load_factors(file: str | os.PathLike[str]) -> tuple[list[str], list[list[float]]]:
    """Read what `save_factors` wrote.

    Args:
        file: Where from.

    Returns:
        The layers' names, and one list of factors a step.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is not of this format, or damaged; the message names the line. Or it is no plain file.
    """
    name, path = os.fspath(file), Path(file)
    if path.exists() and (not path.is_file() or path.stat().st_size > LARGEST):
        raise ValueError(f"file={name!r} is no plain file of at most {LARGEST:,} bytes")
    lines = path.read_bytes().splitlines()
    try:
        header = json.loads(lines[0])
        layers: list[str] = header["layers"]
        known = header["format"] == FORMAT and header["version"] == 1 and has_type(layers, list)
        if not known or not all(has_type(x, str) for x in layers) or len(set(layers)) != len(layers):
            raise ValueError(header)
    except (ValueError, IndexError, KeyError, TypeError, RecursionError) as error:
        remedy = "write it with layerwise.rules.save_factors"
        raise ValueError(f"file={name!r} does not start with the header of a {FORMAT} file; {remedy}") from error
    steps: list[list[float]] = []
    for number, line in enumerate(lines[1:], 2):
        try:
            row = json.loads(line)
            if len(row) != len(layers):
                raise ValueError(f"{len(row)} factors for {len(layers)} layers")
            steps.append([check_factor(factor, "recorded") for factor in row])
        except (ValueError, TypeError, RecursionError) as error:
            raise ValueError(f"file={name!r}, line {number} is damaged ({error}); record the factors again") from error
    if not steps:
        raise ValueError(f"file={name!r} holds no step; record at least one")
    return layers, steps


@dataclass(frozen=True)
class Replay(Rule):
    """The factors of an earlier run, step by step.

    f_l(k) = the factor recorded for layer l at step k; the last ones after the last recorded step

    Start: `LayerwiseLR(optimizer, Replay("factors.jsonl"), model)`. Take the optimizer, rate, `apply`, `decay` and
    `layers` of the run that was recorded by `save_factors`.

    Steps that count are those with finite gradients that are not all zero, so a skipped step does not move the
    recording on.

    Args:
        file: A file written by `save_factors`.

    Raises:
        FileNotFoundError: There is no such file.
        ValueError: The file is damaged, or (when attached) its layers are not the optimizer's.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp()) / "factors.jsonl"
        >>> save_factors(file, [{"fc": 2.0}, {"fc": 3.0}])
        >>> rule = Replay(file)
        >>> state = rule.init([Layer("fc", (torch.zeros(1),))], torch.device("cpu"))
        >>> statistics = Statistics(counts=torch.tensor(True))
        >>> for _ in range(3):
        ...     factors, state = rule.factors(statistics, state)
        ...     print(factors.tolist())
        [2.0]
        [3.0]
        [3.0]
    """

    file: str | os.PathLike[str]
    needs = ("counts",)
    default_place = "lr"

    def __post_init__(self) -> None:
        load_factors(self.file)  # raises for a damaged file now, not at the first step

    def init(self, layers: Sequence[Layer], device: torch.device) -> State:
        """Return the table of factors and the number of the next step."""
        names, steps = load_factors(self.file)
        wanted = [layer.name for layer in layers]
        if set(names) != set(wanted):
            missing, extra = sorted(set(wanted) - set(names)), sorted(set(names) - set(wanted))
            raise ValueError(
                f"file={os.fspath(self.file)!r} was recorded of other layers: it lacks {missing} and has {extra} "
                "besides; attach with the layers= of the recorded run"
            )
        columns = [names.index(name) for name in wanted]
        table = torch.tensor(steps, dtype=common_device(layers)[1])[:, columns].to(device)
        return {"_table": table, "step": torch.zeros((), dtype=torch.int64, device=device)}

    def factors(self, statistics: Statistics, state: State) -> tuple[Tensor, State]:
        """Return the row of this step."""
        table, step = state["_table"], state["step"]
        row = table.index_select(0, step.clamp(max=len(table) - 1).reshape(1))[0]
        return row, {"_table": table, "step": step + statistics.counts}
