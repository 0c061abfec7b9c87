"""What the command line takes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import tyro

DESCRIPTION = "Per-layer learning rates for PyTorch: compare methods with paired seeds, controls and intervals."


@dataclass(frozen=True, kw_only=True)
class Demo:
    """Train a network with and without per-layer rates, and say what the difference is worth.

    The demo lenet, which runs if none is named, trains Caffe's LeNet with three solvers (SGD, NAG, AdaGrad): plain,
    with the layer-adaptive rule, and plain at its mean factor. It uses 5,000 digits that need no download, or full
    MNIST from --data-dir.

    The demo amplification trains a narrow ResNet-10 plainly, and with the gradients doubled in some epochs of
    random layers, of the layers that G or G′ chooses, and of every layer. It uses a slice of CIFAR-10 from --data-dir,
    or the digits.

    Finished runs are never repeated. Each writes a report of its own, an HTML page.
    """

    which: tyro.conf.Positional[Literal["lenet", "amplification"]] = "lenet"
    """Which demo."""

    out: Path = Path("runs")
    """Folder of the report and the runs."""

    data_dir: Path | None = None
    """Folder that holds mnist/train-images-idx3-ubyte.gz and its companions, or CIFAR-10 as published (else
    LAYERWISE_DATA)."""

    seeds: int = 5
    """Number of seeds; fewer than 5 never show a difference."""

    jobs: int | None = None
    """Processes side by side; the number of usable cores if left out."""

    weight_decay: float | None = None
    """Of the amplification demo: 5e-4 if left out; 0 is the other one to look at."""

    json: bool = False
    """Print one JSON object and nothing else."""

    quiet: bool = False
    """Print the conclusion and the place of the report only."""


def parse(arguments: Sequence[str]) -> Demo:
    """Read the command line; prints help and exits where asked to.

    Args:
        arguments: without the program's name.

    Returns:
        What is asked for.
    """
    return tyro.extras.subcommand_cli_from_dict(
        {"demo": Demo},
        prog="layerwise",
        description=DESCRIPTION,
        args=list(arguments),
        config=(tyro.conf.FlagCreatePairsOff,),
    )
