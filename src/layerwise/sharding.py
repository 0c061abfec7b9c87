"""Which shard of a parameter this process holds, collectives over shards, and comparisons between processes."""

from __future__ import annotations

import contextlib
import hashlib
import json
from collections import Counter
from collections.abc import Callable, Generator, Iterable, Sequence
from contextvars import ContextVar
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, cast

import torch
from torch import Tensor, nn

from ._tensors import local, moved

SECONDS = 10.0
"""Time to wait for processes that may not take part."""

LONGEST = 60.0
"""Time to wait for processes without which the next collective would hang."""

Table = dict[str, Any]
_counts: tuple[Any, Counter[str]] = (None, Counter())


def compared(
    kind: str, own: Table, merge: Callable[[Table, Table], Table], ranks: Sequence[int] | None, seconds: float
) -> Table | None:
    """Return the merged table of all processes; None if one of them does not arrive in time.

    The processes exchange their tables through the process group's key-value store. Unlike a collective, it can time
    out. Each process merges its table into that of the process before it, so each writes one table. Either all of them
    get the last table, or none does.

    Args:
        kind: What is compared. The n-th comparison of a kind is matched with the n-th in the other processes.
        own: This process's table, as JSON can hold it.
        merge: Merges two tables.
        ranks: The processes; None for all.
        seconds: The time to wait for them.
    """
    global _counts
    distributed = torch.distributed
    store: Any = distributed.distributed_c10d._get_default_store()
    several = distributed.get_world_size() if ranks is None else len(ranks)
    if _counts[0] is not store:  # a new process group
        _counts = (store, Counter())
    among = hashlib.sha256(json.dumps([kind, ranks]).encode()).hexdigest()[:16]
    _counts[1][among] += 1
    key = f"layerwise/{among}/{_counts[1][among]}"
    ticket = store.add(f"{key}/came", 1)
    try:
        if 1 < ticket <= several:
            store.wait([f"{key}/{ticket - 1}"], timedelta(seconds=seconds))
            own = merge(json.loads(store.get(f"{key}/{ticket - 1}")), own)
        store.set(f"{key}/{ticket}", json.dumps(own))
        if ticket == several:
            store.compare_set(f"{key}/verdict", "", "all")
        store.wait([f"{key}/verdict"], timedelta(seconds=seconds))
    except RuntimeError:  # a timeout; the first process to report it decides for all
        store.compare_set(f"{key}/verdict", "", "missing")
    if store.get(f"{key}/verdict") != b"all":
        return None
    return json.loads(store.get(f"{key}/{several}"))


def can_compare() -> bool:
    """Return whether there is a store. MPI has none, and a fake process group has no other processes."""
    distributed = torch.distributed
    store: Any = distributed.distributed_c10d._get_default_store()
    return store is not None and distributed.get_backend() != "fake"


def digest(value: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# --- Shards ----------------------------------------------------------------------------------------------------------

_absent: ContextVar[bool] = ContextVar("absent", default=False)


@contextlib.contextmanager
def absent(yes: bool = True) -> Generator[None]:
    """Take part in the collectives of other processes without a share: inside, the sums of all processes are NaN.

    Factors that follow from them are 1, and a step with them does not count. So a process that is paused keeps the
    others waiting for nothing, and none of them acts alone.

    Args:
        yes: Whether to do so.
    """
    token = _absent.set(yes)
    try:
        yield
    finally:
        _absent.reset(token)


def is_absent() -> bool:
    """Return whether this process takes part without a share."""
    return _absent.get()


@dataclass(frozen=True, eq=False)
class Piece:
    """The piece of a parameter that this process holds.

    Args:
        shape: Shape of the whole parameter.
        copies: How many of the processes hold this same piece.
        groups: The process groups to sum over, one after another: one, but for a mesh of several dimensions that is
            only a part of all processes.
        device_type: Where these groups communicate.
        ranks: The processes that share the parameter.
        span: Of a parameter that is cut in its flattened form (FSDP1), the first number of the piece and the one after
            its last.
    """

    shape: torch.Size
    copies: int
    groups: tuple[Any, ...] = field(repr=False)
    device_type: str
    ranks: tuple[int, ...] = field(repr=False)
    span: tuple[int, int] | None = None

    def of(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return the piece of another whole tensor of this shape, in the form of the parameter `like`."""
        if self.span is not None:
            return whole.flatten()[slice(*self.span)]
        from torch.distributed.tensor import DTensor, Replicate

        parameter: Any = like
        mesh = parameter.device_mesh
        same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return same.redistribute(mesh, parameter.placements)


def find_pieces(parameters: Iterable[Tensor], model: nn.Module | None) -> dict[int, Piece]:
    """Return the piece of each parameter that is shared among processes, by the parameter's id.

    Args:
        parameters: Parameters, of which DTensors (FSDP2, tensor parallel) know how they are shared.
        model: Knows it of the parameters of FSDP1.

    Raises:
        ValueError: A parameter is shared in a way in which its norm is not defined, or cannot be known.
    """
    parameters = list(parameters)
    pieces = {id(p): _piece_of_dtensor(p) for p in parameters if hasattr(p, "device_mesh")}
    flattened = [p for p in parameters if getattr(p, "_fsdp_flattened", False)]
    if not flattened:
        return pieces
    if any(getattr(p, "_is_flat_param", False) for p in flattened):
        raise ValueError(
            "FullyShardedDataParallel has merged the layers' parameters into flat ones, so there are no layers left: "
            "wrap the model with use_orig_params=True, or use fully_shard"
        )
    if model is None:
        raise ValueError(
            "these parameters are pieces of FullyShardedDataParallel's, which only the model knows: pass model=, the "
            "wrapped model"
        )
    known = dict(_pieces_of_fsdp(model))
    if missing := [p for p in flattened if id(p) not in known]:
        raise ValueError(
            f"{len(missing)} of the optimizer's parameters are pieces of FullyShardedDataParallel's that are not in "
            "this model: pass the wrapped model itself"
        )
    return {**pieces, **{id(p): piece for p in flattened if (piece := known[id(p)]) is not None}}


def _piece_of_dtensor(parameter: Any) -> Piece:
    mesh, copies = parameter.device_mesh, 1
    for size, placement in zip(mesh.shape, parameter.placements, strict=True):
        if placement.is_partial():
            raise ValueError(f"a parameter with placements {parameter.placements} is a sum over processes; reduce it")
        copies *= size if placement.is_replicate() else 1
    ranks = tuple(sorted(mesh.mesh.flatten().tolist()))
    return Piece(parameter.shape, copies, _groups_of(mesh), mesh.device_type, ranks)


def _groups_of(mesh: Any) -> tuple[Any, ...]:
    """Return groups over which to sum in turn; none is made, since all processes would have to take part in that."""
    if mesh.ndim > 1 and mesh.size() == torch.distributed.get_world_size():
        return (torch.distributed.group.WORLD,)
    return tuple(mesh.get_all_groups())


def _pieces_of_fsdp(model: nn.Module) -> Iterable[tuple[int, Piece | None]]:
    """Yield the piece of each parameter of FSDP1; None where each process holds all of it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle: Any = getattr(module, "_handle", None)
        if handle is None or handle.flat_param._params is None:  # the latter without use_orig_params
            continue
        flat = handle.flat_param
        if any(extension is not None for extension in flat._param_extensions):
            raise ValueError(
                "FullyShardedDataParallel over tensor parallel parameters hides how these are shared; use fully_shard"
            )
        for p, shape, where in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            if not handle.uses_sharded_strategy:
                yield id(p), None
                continue
            span = (where.intra_param_start_idx, where.intra_param_end_idx + 1) if where.in_shard else (0, 0)
            group = handle.process_group
            ranks = tuple(sorted(torch.distributed.get_process_group_ranks(group)))
            yield id(p), Piece(shape, 1, (group,), handle.device.type, ranks, span)


class Sharing:
    """Sums over processes of numbers of which each process knows its share.

    Processes that hold different parameters meet in some meshes only. All go through their meshes in one order, the
    small ones first, so that none waits for a process that waits for it.

    Args:
        pieces: For each number the piece of a parameter that it belongs to; None for what every process knows whole.
    """

    def __init__(self, pieces: Sequence[Piece | None]) -> None:
        self.pieces = list(pieces)
        self._positions: dict[tuple[tuple[Any, ...], str], list[int]] = {}
        shared = [(i, piece) for i, piece in enumerate(self.pieces) if piece is not None]
        for i, piece in sorted(shared, key=lambda one: (len(one[1].ranks), one[1].ranks)):
            self._positions.setdefault((piece.groups, piece.device_type), []).append(i)
        self._ready: tuple[torch.device, Tensor, list[tuple[Any, torch.device, Tensor | None]]] | None = None

    def sum(self, shares: Tensor) -> Tensor:
        """Return the sums over all processes; one collective for each distinct set of processes.

        Every process has to call this, also with zeros only.

        Args:
            shares: What this process contributes, shape `[k, n_pieces]`; changed in place.
        """
        if self._ready is None or self._ready[0] != shares.device:
            self._ready = self._prepared(shares)
        _, weights, collectives = self._ready
        if is_absent():
            shares.fill_(torch.nan)
        shares *= weights
        for groups, device, positions in collectives:
            part = moved(shares if positions is None else shares.index_select(1, positions), device)
            for group in groups:
                torch.distributed.all_reduce(part, group=group)
            part = moved(part, shares.device)
            shares = part if positions is None else shares.index_copy_(1, positions, part)
        return shares

    def flagged(self, flags: Tensor) -> tuple[Tensor, Tensor]:
        """Return which flags are set in any process, and whether any flag of any process is.

        What is set in one mesh is carried on to the next ones, so that processes hear of a parameter that they do not
        hold. As many collectives as `sum` takes.

        Args:
            flags: 1 or 0 for each number, shape `[n_pieces]`; changed in place.
        """
        if self._ready is None or self._ready[0] != flags.device:
            self._ready = self._prepared(flags[None])
        some = flags.max()
        if is_absent():
            some = torch.full_like(some, torch.nan)
        for groups, device, positions in self._ready[2]:
            part = flags if positions is None else flags.index_select(0, positions)
            part = moved(torch.cat([part, some[None]]), device)
            for group in groups:
                torch.distributed.all_reduce(part, group=group)
            part = moved(part, flags.device)
            flags = part[:-1] if positions is None else flags.index_copy_(0, positions, part[:-1])
            some = part[-1]
        return flags, some

    def _prepared(self, shares: Tensor) -> tuple[torch.device, Tensor, list[tuple[Any, torch.device, Tensor | None]]]:
        """Copy to the device once what every step needs there."""
        device = shares.device
        copies = [1.0 if piece is None else 1 / piece.copies for piece in self.pieces]
        collectives: list[tuple[Any, torch.device, Tensor | None]] = []
        for (groups, device_type), positions in self._positions.items():
            every = len(positions) == len(self.pieces)
            index = None if every else torch.tensor(positions, dtype=torch.long, device=device)
            collectives.append((groups, device if device.type == device_type else torch.device(device_type), index))
        return device, torch.tensor(copies, dtype=shares.dtype, device=device), collectives


def stand_in(parameter: Tensor, piece: Piece | None) -> Tensor:
    """Return a tensor of the whole parameter's shape, for a question about it: the parameter, if it still has it."""
    if piece is None or piece.span is None:
        return parameter
    return torch.empty(piece.shape, dtype=parameter.dtype, device="meta", requires_grad=parameter.requires_grad)


def sharing_of(pieces: Sequence[Piece | None]) -> Sharing | None:
    """Return how numbers of these pieces add up over processes; None if no parameter is shared."""
    return Sharing(pieces) if any(piece is not None for piece in pieces) else None


def settled_gradient(parameter: Any) -> Tensor | None:
    """Return this process's piece of a parameter's gradient.

    Under sequence parallelism some gradients arrive as sums that are still to be formed. They are formed here, and left
    so: the optimizer would do it again.
    """
    gradient = parameter.grad
    if gradient is None or not hasattr(gradient, "placements"):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return local(gradient)


# --- Buffers of shards -----------------------------------------------------------------------------------------------


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
