"""Comparisons between processes, which shard of a parameter this process holds, and sums over processes."""

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
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from ._tensors import local, moved

# --- Comparisons between processes -----------------------------------------------------------------------------------

SECONDS = 10.0
"""Time to wait for processes that may not take part."""

LONGEST = 60.0
"""Time to wait for processes without which the next collective would hang."""

Table = dict[str, Any]
_counts: WeakKeyDictionary[Any, Counter[str]] = WeakKeyDictionary()  # of comparisons, by the process group's store


def compared(
    kind: str, own: Table, merge: Callable[[Table, Table], Table], ranks: Sequence[int] | None, seconds: float
) -> Table | None:
    """Return the merged table of all processes; None if one of them does not arrive in time.

    The processes exchange tables of JSON through the process group's key-value store. Unlike a collective, it can time
    out. Each process merges its table into that of the process before it. All of them get the last table, or none does.
    The n-th comparison of a kind among some ranks (None for all) is matched with the n-th in the other processes.
    """
    store: Any = torch.distributed.distributed_c10d._get_default_store()
    several = torch.distributed.get_world_size() if ranks is None else len(ranks)
    counts, among = _counts.setdefault(store, Counter()), digest([kind, ranks])
    counts[among] += 1
    key = f"layerwise/{among}/{counts[among]}"
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
    store = cast(Any, torch.distributed.distributed_c10d)._get_default_store()
    return store is not None and torch.distributed.get_backend() != "fake"


def digest(value: Any) -> str:
    """Return a short hash of a value that JSON can hold."""
    return hashlib.sha256(json.dumps(value).encode()).hexdigest()[:16]


# --- Shards ----------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, eq=False)
class Shard:
    """The shard of a parameter that this process holds."""

    shape: torch.Size  # of the whole parameter
    copies: int  # how many processes hold this same shard
    # To sum over in turn; several for a mesh of several dimensions that is only a part of all processes.
    groups: tuple[Any, ...] = field(repr=False)
    device_type: str  # where these groups communicate
    ranks: tuple[int, ...] = field(repr=False)  # the processes that share the parameter
    span: tuple[int, int] | None = None  # begin and end in the flattened parameter, where FSDP1 has cut it

    def of(self, whole: Tensor, like: Tensor) -> Tensor:
        """Return the shard of another whole tensor of this shape, in the form of the parameter `like`."""
        if self.span is not None:
            return whole.flatten()[slice(*self.span)]
        from torch.distributed.tensor import DTensor, Replicate

        parameter: Any = like
        mesh = parameter.device_mesh
        same = DTensor.from_local(whole, mesh, [Replicate()] * mesh.ndim, run_check=False)
        return same.redistribute(mesh, parameter.placements)


def find_shards(parameters: Sequence[Tensor], model: nn.Module | None) -> dict[int, Shard]:
    """Return the shard of each parameter that processes share, by the parameter's id.

    A DTensor (FSDP2, tensor parallel) holds its sharding; for FSDP1 only the model does.
    """
    shards = {id(p): _shard_of_dtensor(p) for p in parameters if hasattr(p, "device_mesh")}
    flattened = [p for p in parameters if getattr(p, "_fsdp_flattened", False)]
    if not flattened:
        return shards
    if any(getattr(p, "_is_flat_param", False) for p in flattened):
        raise ValueError(
            "FullyShardedDataParallel has merged the layers' parameters into flat ones, so there are no layers left: "
            "wrap the model with use_orig_params=True, or use fully_shard"
        )
    if model is None:
        raise ValueError(
            "these parameters are shards of FullyShardedDataParallel, and only the model holds their shapes: pass "
            "model=, the wrapped model"
        )
    known = dict(_shards_of_fsdp(model))
    if missing := [p for p in flattened if id(p) not in known]:
        raise ValueError(
            f"{len(missing)} of the optimizer's parameters are shards of FullyShardedDataParallel that are not in "
            "this model: pass the wrapped model itself"
        )
    return shards | {id(p): shard for p in flattened if (shard := known[id(p)])}


def _shard_of_dtensor(parameter: Any) -> Shard:
    mesh, copies = parameter.device_mesh, 1
    for size, placement in zip(mesh.shape, parameter.placements, strict=True):
        if placement.is_partial():
            raise ValueError(f"a parameter with placements {parameter.placements} is a sum over processes; reduce it")
        copies *= size if placement.is_replicate() else 1
    # No group is made here, since all processes would have to take part in that.
    everywhere = mesh.ndim > 1 and mesh.size() == torch.distributed.get_world_size()
    groups = (torch.distributed.group.WORLD,) if everywhere else tuple(mesh.get_all_groups())
    return Shard(parameter.shape, copies, groups, mesh.device_type, tuple(sorted(mesh.mesh.flatten().tolist())))


def _shards_of_fsdp(model: nn.Module) -> Iterable[tuple[int, Shard | None]]:
    """Yield the shard of each parameter of FSDP1; None where each process holds all of it."""
    from torch.distributed.fsdp import FullyShardedDataParallel

    for module in FullyShardedDataParallel.fsdp_modules(model):
        handle: Any = getattr(module, "_handle", None)
        if handle is None or handle.flat_param._params is None:  # the latter without use_orig_params
            continue
        flat, group = handle.flat_param, handle.process_group
        if any(extension is not None for extension in flat._param_extensions):
            raise ValueError(
                "FullyShardedDataParallel over tensor parallel parameters hides how these are shared; use fully_shard"
            )
        ranks = tuple(sorted(torch.distributed.get_process_group_ranks(group)))
        for p, shape, where in zip(flat._params, flat._shapes, flat._shard_param_infos, strict=True):
            span = (where.intra_param_start_idx, where.intra_param_end_idx + 1) if where.in_shard else (0, 0)
            shard = Shard(shape, 1, (group,), handle.device.type, ranks, span)
            yield id(p), shard if handle.uses_sharded_strategy else None


def stand_in(parameter: Tensor, shard: Shard | None) -> Tensor:
    """Return a tensor of the whole parameter's shape: the parameter, unless FSDP1 has cut it."""
    if shard is None or shard.span is None:
        return parameter
    return torch.empty(shard.shape, dtype=parameter.dtype, device="meta", requires_grad=parameter.requires_grad)


def settled_gradient(parameter: Any) -> Tensor | None:
    """Return this process's shard of a parameter's gradient.

    Under sequence parallelism some gradients arrive as partial sums. They are reduced here and stay so, because the
    optimizer would do it again.
    """
    gradient = parameter.grad
    if gradient is None or not hasattr(gradient, "placements"):
        return gradient
    if gradient.placements != parameter.placements:
        gradient = parameter.grad = gradient.redistribute(parameter.device_mesh, parameter.placements)
    return local(gradient)


# --- Sums over processes ---------------------------------------------------------------------------------------------

_absent: ContextVar[bool] = ContextVar("absent", default=False)
is_absent = _absent.get
"""Returns whether this process takes part in collectives without a share."""


@contextlib.contextmanager
def absent(yes: bool = True) -> Generator[None]:
    """Take part in the collectives of other processes without a share: inside, the sums of all processes are NaN.

    Factors computed from NaN are 1, and the step does not count. So a paused process keeps no other waiting.
    """
    token = _absent.set(yes)
    try:
        yield
    finally:
        _absent.reset(token)


class Sharing:
    """Sums over processes of numbers of which each process knows its share.

    Processes that hold different parameters share only some meshes. All go through their meshes in one order, the small
    ones first, so that no two of them wait for each other.

    `shards` has for each number the shard of its parameter, or None if every process knows all of it. With `flag` there
    is a last number that is summed over each mesh in turn, so that it reaches every process.
    """

    def __init__(self, shards: Sequence[Shard | None], *, flag: bool = False) -> None:
        self._copies = [1 if shard is None else shard.copies for shard in shards] + [1] * flag
        self._positions: dict[tuple[tuple[Any, ...], str], list[int]] = {}
        shared = [(i, shard) for i, shard in enumerate(shards) if shard]
        for i, shard in sorted(shared, key=lambda one: (len(one[1].ranks), one[1].ranks)):
            self._positions.setdefault((shard.groups, shard.device_type), []).append(i)
        for positions in self._positions.values():
            positions += [len(shards)] * flag
        self._device: torch.device | None = None
        self._weights: Tensor | None = None
        self._collectives: list[tuple[tuple[Any, ...], torch.device, Tensor | None]] = []

    def sum(self, shares: Tensor) -> Tensor:
        """Return the sums over all processes, all of which have to call this; one collective for each mesh.

        `shares` is what this process contributes, one column for each number, and is changed in place.
        """
        if self._device != shares.device:
            self._prepare(shares)
        if is_absent():
            shares.fill_(torch.nan)
        if self._weights is not None:
            shares *= self._weights
        for groups, device, positions in self._collectives:
            part = moved(shares if positions is None else shares.index_select(1, positions), device)
            for group in groups:
                torch.distributed.all_reduce(part, group=group)
            part = moved(part, shares.device)
            shares = part if positions is None else shares.index_copy_(1, positions, part)
        return shares

    def _prepare(self, shares: Tensor) -> None:
        """Copy to the device once what every step needs there."""
        device = self._device = shares.device
        if max(self._copies) > 1:
            self._weights = torch.tensor([1 / n for n in self._copies], dtype=shares.dtype, device=device)
        self._collectives = []
        for (groups, device_type), positions in self._positions.items():
            every = len(positions) == len(self._copies)
            index = None if every else torch.tensor(positions, dtype=torch.long, device=device)
            there = device if device.type == device_type else torch.device(device_type)
            self._collectives.append((groups, there, index))


def sharing_of(shards: Sequence[Shard | None], *, flag: bool = False) -> Sharing | None:
    """Return how numbers of these shards add up over processes; None if no parameter is shared."""
    return Sharing(shards, flag=flag) if any(shards) else None


# --- Buffers of shards -----------------------------------------------------------------------------------------------


class Buffers:
    """Makes and loads buffers in the form of some parameters; `samples` are how many numbers of each are kept."""

    def __init__(
        self, parameters: Sequence[Tensor], shards: Sequence[Shard | None], samples: Sequence[int | None]
    ) -> None:
        self._parameters, self._shards, self._samples = parameters, shards, samples

    def zeros(self, i: int, gradient: Tensor) -> Tensor:
        """Return zeros like the gradient of parameter i, at least float32.

        Those of a DTensor are a DTensor too, so that a distributed checkpoint can reshard them.
        """
        parameter = cast(Any, self._parameters[i])
        zeros = torch.zeros_like(gradient, dtype=torch.promote_types(gradient.dtype, torch.float32))
        if not hasattr(parameter, "device_mesh"):
            return zeros
        from torch.distributed.tensor import DTensor

        mesh, places, shape = parameter.device_mesh, parameter.placements, self.shape(i)
        stride = torch.empty(shape, device="meta").stride()
        return DTensor.from_local(zeros, mesh, places, run_check=False, shape=shape, stride=stride)

    def shape(self, i: int) -> torch.Size:
        """Return the shape of a parameter's buffer; of a DTensor, that of all of it."""
        parameter, sample = self._parameters[i], self._samples[i]
        if sample is not None:
            return torch.Size([sample])
        return torch.Size([*parameter.shape, 2]) if parameter.is_complex() else parameter.shape

    def loaded(self, i: int, buffer: Any, name: str, *, scalar: bool) -> Tensor:
        """Return a copy of a saved buffer, a tensor or a DTensor of any mesh, sharded as parameter i is now.

        A `scalar` is one number instead of a buffer like the parameter; messages have the parameter's name.
        """
        wanted = torch.Size() if scalar else self.shape(i)
        if not isinstance(buffer, Tensor) or buffer.shape != wanted:
            found = tuple(buffer.shape) if isinstance(buffer, Tensor) else type(buffer).__name__
            raise ValueError(f"the saved sums of {name!r} have shape {found}, here {tuple(wanted)}; same rule?")
        if hasattr(buffer, "device_mesh"):
            _check_own_shard(buffer, name)  # the result of detach() no longer says whose shard it was
        saved, parameter, shard = cast(Any, buffer.detach()), cast(Any, self._parameters[i]), self._shards[i]
        sharded = hasattr(parameter, "device_mesh") and not scalar
        if hasattr(saved, "device_mesh"):
            if sharded and saved.device_mesh == parameter.device_mesh and saved.placements == parameter.placements:
                return saved.clone()
            saved = saved.full_tensor()
        return shard.of(saved.to(parameter.device), parameter) if sharded and shard is not None else saved.clone()


def _check_own_shard(saved: Any, name: str) -> None:
    """Raise unless a DTensor from a file is the shard that this process would hold."""
    mesh = saved.device_mesh
    here: list[list[int]] = []
    if torch.distributed.is_initialized():
        here = (mesh.mesh == torch.distributed.get_rank()).nonzero().tolist()
    if here != [list(mesh.get_coordinate() or ())]:
        raise ValueError(
            f"the saved sums of {name!r} are the shard of another process, as torch.save writes it: save with "
            "torch.distributed.checkpoint and load with layerwise.load_checkpoint, or let each process save its own"
        )


def number_count(tensor: Tensor) -> int:
    """Return how many real numbers a tensor holds."""
    return tensor.numel() * (2 if tensor.is_complex() else 1)
