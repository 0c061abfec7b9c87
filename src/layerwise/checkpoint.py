"""Distributed checkpoints in which an epoch of analysis may be half done."""

from __future__ import annotations

import os
from typing import Any

import torch
from torch import Tensor

from .adapter import LayerwiseLR
from .rules.state import is_state


def load_checkpoint(adapter: LayerwiseLR, checkpoint: Any, key: str = "adapter") -> None:
    """Load an adapter's state out of a distributed checkpoint, for any number of processes.

    `torch.distributed.checkpoint.load` fills what the state of an adapter holds already, and so can load an adapter by
    itself, `load({"adapter": adapter}, …)`; but not the sums of an epoch of analysis, which are there in the checkpoint
    alone. This makes room for what the checkpoint holds, sharded as the parameters are now, and loads it.

    Every process has to call it.

    Args:
        adapter: An adapter with the rule and the layers of the one that was saved.
        checkpoint: The folder of the checkpoint, or a `torch.distributed.checkpoint.StorageReader`.
        key: Under which name the adapter was saved: `save({"adapter": adapter}, …)`.

    Raises:
        ValueError: The checkpoint holds nothing of this name, the state of other layers or another rule,
            or sums of parameters that FSDP1 has cut up.

    Example:
        >>> import tempfile, warnings
        >>> import torch.distributed.checkpoint as checkpoints
        >>> from layerwise.rules import Directionality, GradientAmplification, Phase
        >>> model = torch.nn.Linear(3, 1)
        >>> optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
        >>> rule = GradientAmplification(Directionality(threshold=0.0), [Phase(2, True)])
        >>> adapter = LayerwiseLR(optimizer, rule, model)
        >>> model(torch.ones(1, 3)).sum().backward()
        >>> optimizer.step()
        >>> with tempfile.TemporaryDirectory() as folder, warnings.catch_warnings():
        ...     warnings.simplefilter("ignore")  # of a checkpoint without a process group
        ...     _ = checkpoints.save({"adapter": adapter}, checkpoint_id=folder)
        ...     load_checkpoint(adapter, folder)
    """
    import torch.distributed.checkpoint as distributed

    reader = distributed.FileSystemReader(checkpoint) if isinstance(checkpoint, str | os.PathLike) else checkpoint
    metadata = reader.read_metadata()
    planned: dict[str, tuple[Any, ...]] = metadata.planner_data or {}
    paths = {name: path for name, path in planned.items() if path[0] == key}
    if not paths:
        held = sorted({str(path[0]) for path in planned.values()})
        raise ValueError(f"the checkpoint holds no key={key!r}; it holds {', '.join(held) or 'nothing'}")
    shards = [shard for layer in adapter.layer_table() for shard in layer.shards if shard is not None]
    cut = any(shard.span is not None for shard in shards)
    if cut and any("sums" in path for path in paths.values()):
        raise ValueError(
            "the checkpoint holds the sums of half an epoch, and FullyShardedDataParallel has cut the parameters into "
            "shards that a distributed checkpoint cannot tell apart: save adapter.state_dict() in each process by "
            "itself, save at the end of an epoch, or use fully_shard"
        )
    parameters = {
        f"/{name}": parameter
        for layer in adapter.layer_table()
        for name, parameter in zip(layer.parameter_names, layer.parameters, strict=True)
    }
    room: dict[str, Any] = {}
    for name, path in paths.items():
        inner = room
        for part in path[:-1]:
            inner = inner.setdefault(part, {})
        inner[path[-1]] = _room(metadata.state_dict_metadata[name], parameters.get(str(path[-1])))
    distributed.load(room, storage_reader=reader)
    _restore_empty(room[key], adapter.state_dict())
    adapter.load_state_dict(room[key])


def _restore_empty(loaded: dict[str, Any], current: dict[str, Any]) -> None:
    """Put back the empty dictionaries of a state, which a checkpoint leaves out."""
    for name, value in current.items():
        if is_state(value):
            if name in loaded:
                _restore_empty(loaded[name], value)
            else:
                loaded[name] = {}


def _room(saved: Any, parameter: Any) -> Tensor | None:
    """Return an empty tensor for a saved one, sharded as its parameter is; None for what is no tensor."""
    if not hasattr(saved, "size"):
        return None
    empty = torch.empty(saved.size, dtype=saved.properties.dtype, device="meta")
    if parameter is None:
        return torch.empty_like(empty, device="cpu")
    if not hasattr(parameter, "device_mesh") or saved.size != parameter.shape:
        return torch.empty_like(empty, device=parameter.device)
    from torch.distributed import tensor as distributed

    return distributed.empty(
        saved.size, dtype=empty.dtype, device_mesh=parameter.device_mesh, placements=parameter.placements
    )
