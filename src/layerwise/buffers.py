"""Buffers as large as the parameters: made, shared among processes, and read back as the parameters are."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, cast

import torch
from torch import Tensor

from .sharding import Piece


class Buffers:
    """What is known of the buffers of some parameters.

    Args:
        parameters: The parameters.
        pieces: What this process holds of each; None for all of it.
        samples: How many numbers of each are kept; None for all.
    """

    def __init__(
        self, parameters: Sequence[Tensor], pieces: Sequence[Piece | None], samples: Sequence[int | None]
    ) -> None:
        self._parameters, self._pieces, self._samples = parameters, pieces, samples

    def zeros(self, i: int, gradient: Tensor) -> Tensor:
        """Return zeros like a parameter's gradient, at least float32.

        Those of a DTensor are one too, so that a distributed checkpoint can share them out anew.
        """
        dtype = torch.promote_types(gradient.dtype, torch.float32)
        parameter = cast(Any, self._parameters[i])
        if not hasattr(parameter, "device_mesh"):
            return torch.zeros_like(gradient, dtype=dtype)
        if not parameter.is_complex():
            return torch.zeros_like(parameter.detach(), dtype=dtype)
        from torch.distributed.tensor import DTensor

        shape, zeros = self.shape(i), torch.zeros_like(gradient, dtype=dtype)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(
            zeros, parameter.device_mesh, parameter.placements, run_check=False, shape=shape, stride=stride
        )

    def shape(self, i: int) -> torch.Size:
        """Return the shape of a parameter's buffer; of a DTensor, that of all of it."""
        parameter, sample = self._parameters[i], self._samples[i]
        if sample is not None:
            return torch.Size([sample])
        return torch.Size([*parameter.shape, 2]) if parameter.is_complex() else parameter.shape

    def loaded(self, i: int, buffer: Any, name: str, *, scalar: bool) -> Tensor:
        """Return a copy of a saved buffer, shared among processes as its parameter is now.

        Args:
            i: The number of its parameter.
            buffer: What was saved: a tensor, or a DTensor of any mesh.
            name: What messages call it.
            scalar: Whether it is one number instead of a buffer like the parameter.

        Raises:
            ValueError: It is no tensor, has another shape, or is the shard of another process.
        """
        wanted = torch.Size() if scalar else self.shape(i)
        if not isinstance(buffer, Tensor) or buffer.shape != wanted:
            found = tuple(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
            raise ValueError(f"the saved sums of {name!r} have shape {found}, here {tuple(wanted)}; same rule?")
        if hasattr(buffer, "device_mesh"):
            check_own_shard(buffer, name)  # whatever is computed of it has forgotten whose it was
        saved, parameter, piece = cast(Any, buffer.detach()), cast(Any, self._parameters[i]), self._pieces[i]
        shared = hasattr(parameter, "device_mesh") and not scalar
        if hasattr(saved, "device_mesh"):
            if shared and saved.device_mesh == parameter.device_mesh and saved.placements == parameter.placements:
                return saved.clone()
            saved = saved.full_tensor()
        return piece.of(saved.to(parameter.device), parameter) if shared and piece is not None else saved.clone()


def check_own_shard(saved: Any, name: str) -> None:
    """Raise unless a DTensor from a file is the shard that this process would hold.

    Raises:
        ValueError: It was written by another process, whose shard it still is.
    """
    there = torch.distributed.is_initialized() and (saved.device_mesh.mesh == torch.distributed.get_rank()).nonzero()
    coordinate = saved.device_mesh.get_coordinate()
    if there is False or coordinate is None or there.tolist() != [list(coordinate)]:
        raise ValueError(
            f"the saved sums of {name!r} are the shard of another process, as torch.save writes it: save with "
            "torch.distributed.checkpoint and load with layerwise.load_checkpoint, or let each process save its own"
        )


def number_count(tensor: Tensor) -> int:
    """Return how many real numbers a tensor holds."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)
