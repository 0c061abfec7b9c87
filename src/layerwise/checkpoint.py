"""Loading an adapter from a distributed checkpoint, also in the middle of an epoch of analysis."""

from __future__ import annotations

import os
from typing import Any, cast

import torch
from torch import Tensor

from .adapter import LayerwiseLR
from .rules.state import is_state


def load_checkpoint(adapter: LayerwiseLR, checkpoint: Any, key: str = "adapter") -> None:
    """Load an adapter's state from a distributed checkpoint, for any number of processes.

    `torch.distributed.checkpoint.load({"adapter": adapter}, …)` fills tensors that the adapter's state already holds.
    It cannot load the sums of an epoch of analysis, which only the checkpoint holds. This function makes tensors for
    all that the checkpoint holds, sharded as the parameters are now, and loads them.

    Every process has to call it.

    Args:
        adapter: An adapter with the rule and the layers of the one that was saved.
        checkpoint: The folder of the checkpoint, or a `torch.distributed.checkpoint.StorageReader`.
        key: The name under which the adapter was saved: `save({"adapter": adapter}, …)`.

    Raises:
        ValueError: The checkpoint holds nothing of this name, the state of other layers or another rule,
            or sums of parameters that FSDP1 has sharded.

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
    from torch.distributed.checkpoint import _nested_dict as nested

    reader = distributed.FileSystemReader(checkpoint) if isinstance(checkpoint, str | os.PathLike) else checkpoint
    metadata = reader.read_metadata()
    planned: dict[str, tuple[Any, ...]] = metadata.planner_data or {}
    paths = {name: path for name, path in planned.items() if path[0] == key}
    if not paths:
        held = sorted({str(path[0]) for path in planned.values()})
        raise ValueError(f"the checkpoint holds no key={key!r}; it holds {', '.join(held) or 'nothing'}")
    cut = any(shard and shard.span for layer in adapter.layer_table() for shard in layer.shards)
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
    saved = metadata.state_dict_metadata
    empty = {name: _room(saved[name], parameters.get(str(path[-1]))) for name, path in paths.items()}
    room = cast("dict[str, Any]", nested.unflatten_state_dict(empty, paths))
    distributed.load(room, storage_reader=reader)
    _restore_empty(room[key], adapter.state_dict())
    adapter.load_state_dict(room[key])


def _restore_empty(loaded: dict[str, Any], current: dict[str, Any]) -> None:
    """Restore the empty dictionaries of a state, which a checkpoint leaves out."""
    for name, value in current.items():
        if is_state(value):
            if name in loaded:
                _restore_empty(loaded[name], value)
            else:
                loaded[name] = {}


def _room(saved: Any, parameter: Any) -> Tensor | None:
    """Return an empty tensor for a saved one, sharded as its parameter is; None if a saved value is no tensor."""
    if not hasattr(saved, "size"):
        return None
    dtype = saved.properties.dtype
    if hasattr(parameter, "device_mesh") and saved.size == parameter.shape:
        from torch.distributed import tensor as distributed

        mesh, placements = parameter.device_mesh, parameter.placements
        return distributed.empty(saved.size, dtype=dtype, device_mesh=mesh, placements=placements)
    return torch.empty(saved.size, dtype=dtype, device="cpu" if parameter is None else parameter.device)
