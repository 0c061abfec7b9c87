"""A network trained before a run, on images as they are: where fine-tuning begins, the same for all seeds and arms."""

from __future__ import annotations

from collections.abc import Mapping
from functools import lru_cache
from pathlib import Path

import torch
from torch import Tensor
from torch.nn import functional

from layerwise.lab import data
from layerwise.lab.training import networks
from layerwise.lab.training.solvers import scheduler
from layerwise.lab.training.streams import MemoryStream, shortened

RATE = 0.003
SEED = 0
BATCH_SIZE = 128


@lru_cache(maxsize=1)
def pretrained(
    data_name: str, data_dir: Path | None, count: int, form: str, model: str, width: float | None, iterations: int
) -> Mapping[str, Tensor]:
    """Train a network on the first images of a data set, once a process, and give its weights.

    So many updates of Adam, its rate a cosine from 0.003 to 0, on shuffled batches of 128, on the CPU in float32.
    """
    whole = data.load(data_name, data_dir)
    dataset, classes = shortened(whole, count, 1), int(whole.train_labels.max()) + 1
    sizes = {"batch_size": BATCH_SIZE, "test_batch_size": BATCH_SIZE, "seed": SEED}
    stream = MemoryStream(dataset=dataset, classes=classes, form=form, order="shuffled", **sizes)
    network = networks.build(model, SEED, classes=classes, channels=stream.channels, width=width)
    network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
    optimizer = torch.optim.Adam(network.parameters(), lr=RATE)
    policy = scheduler(optimizer, "cosine", max_iter=iterations)
    done, epoch = 0, 0
    while done < iterations:
        epoch += 1
        for images, labels in stream.batches(epoch):
            optimizer.zero_grad()
            scores = network(images.contiguous(memory_format=torch.channels_last))
            functional.cross_entropy(scores, labels).backward()
            optimizer.step()
            policy.step()
            done += 1
            if done == iterations:
                break
    return {name: value.detach().clone() for name, value in network.state_dict().items()}
