"""Scales what `optimizer.step()` writes into the parameters.

While `step` runs, a `TorchFunctionMode` sees each PyTorch call that Python makes. A call that writes into a parameter,
`p ← p + d`, is made with `f d` in place of `d`. Parameter groups and state stay as they are, and the number of
operations does not grow with the number of layers.
"""

from __future__ import annotations

import sys
from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from functools import cache, partial
from itertools import pairwise
from typing import Any, TypeAlias, cast

import torch
from torch import Tensor
from torch.nn import Parameter
from torch.overrides import TorchFunctionMode
from torch.utils._device import DeviceContext
from torch.utils._python_dispatch import _disable_current_modes
from torch.utils._pytree import tree_leaves

from ._rows import Rows, whole_of
from ._tensors import local, shards_of

Factor: TypeAlias = "float | Tensor"
"""A number; or a 0-dim tensor on the parameter's device, which is never read but costs a launch for each parameter."""

FEW = 8
"""Distinct factors up to which one call for each costs less than a temporary."""
SMALL = 65_536
"""Elements below which a launch costs more than its work."""
CHUNK = 2**26
"""Bytes of a temporary; a larger one is only made for a single tensor."""
HALF = (torch.float16, torch.bfloat16)
_NAMES = ("_fused_sgd_", "_fused_adam_", "_fused_adamw_", "_fused_adagrad_")
FUSED = frozenset(getattr(torch, name) for name in _NAMES if hasattr(torch, name))
"""The fused kernels, which take one rate a call."""

_NAMES_OF_KINDS = {
    "add": ("add_", "sub_"),
    "multiply": ("mul_", "div_"),
    "addc": ("addcdiv_", "addcmul_"),
    "lerp": ("lerp_", "copy_"),
}
_CALLS = {name: kind for kind, names in _NAMES_OF_KINDS.items() for name in names}
_HANDED_OUT = ("numpy", "__array__", "__dlpack__", "data_ptr", "untyped_storage")
KINDS: dict[Any, str | None] = {
    **{getattr(Tensor, name): kind for name, kind in _CALLS.items()},
    **{getattr(torch, f"_foreach_{name}"): kind for name, kind in _CALLS.items()},
    **dict.fromkeys(FUSED, "fused"),
    **{getattr(Tensor, name): "handed out" for name in _HANDED_OUT},
    cast(Any, Tensor.data).__set__: "data",
}
"""How each function writes; None if it does not. `kind_of` adds those that it has not met before."""
_UNKNOWN = "unknown"
_OF_ONE = frozenset(_NAMES_OF_KINDS)
_PLAIN = frozenset({Tensor, Parameter, Rows})


class FactorsOfRows(list[tuple[Rows, Factor]]):
    """The factors of the rows of a parameter that is split, in order, in place of its factor.

    Args:
        shared: The factor of the whole parameter, which multiplies each of them.
    """

    def __init__(self, shared: Factor) -> None:
        super().__init__()
        self._shared = shared

    def add(self, rows: Rows, factor: Factor) -> None:
        """Add rows and their factor."""
        self.append((rows, factor if _is_one(self._shared) else self._shared * factor))

    def between(self, old: Tensor, new: Tensor) -> Tensor:
        """Return `old + f (new − old)` of all rows."""
        return torch.cat([_between(rows.of(old), rows.of(new), f) for rows, f in self], self[0][0].span[0])


class CannotScaleError(RuntimeError):
    """A step writes into a parameter unseen, or in a way that has no factor.

    Args:
        reason: What it does.
    """

    def __init__(self, reason: str) -> None:
        super().__init__(
            f"this step cannot be scaled as it writes: {reason}. It may have moved weights: resume from a checkpoint, "
            "and use permanent groups (layerwise.param_groups)"
        )


def kind_of(func: Any) -> str | None:
    """Return how a function writes that `KINDS` does not name."""
    name = getattr(func, "__name__", "")
    if name.startswith("_record_function_enter_new"):
        return "begin"
    if name == "_record_function_exit._RecordFunction":
        return "end"
    if isinstance(func, (torch._ops.OpOverload, torch._ops.OpOverloadPacket)):
        return "operator" if _is_mutable(func) else None
    in_place = name.endswith("_") and not name.endswith("__") and name != "requires_grad_"
    return "other" if in_place or name == "__setitem__" else None


def _is_mutable(operator: Any) -> bool:
    overload = getattr(operator, operator.overloads()[0]) if hasattr(operator, "overloads") else operator
    return overload._schema.is_mutable


class ScaledWrites(TorchFunctionMode):
    """Scales the writes of one step. `begin` and `end` enclose the step; an exception in `step` ends it too.

    Args:
        parameters: All parameters of the optimizer.
        state: The optimizer's state.
    """

    def __init__(self, parameters: Iterable[Tensor], state: Mapping[Any, Any]) -> None:
        super().__init__()
        self._parameters = list(parameters)
        self._state = state
        self._factors: dict[int, Factor | FactorsOfRows] = {id(p): 1.0 for p in self._parameters}
        self._memory: dict[int, _Memory] = {}
        for p in self._parameters:
            self._keep(p)
        self._versions: dict[int, int] = {}
        self._moved: set[int] = set()
        self._scales_rows = False
        self._ranges = 0
        self._ended = False

    def _keep(self, p: Tensor) -> None:
        """Remember whose memory this is."""
        storage = storage_of(p)
        if storage is not None:
            self._memory.setdefault(storage, _Memory()).add(p)

    def _owners_of(self, tensor: Tensor) -> Sequence[Tensor]:
        """Return the parameters whose memory a tensor has, or a part of it."""
        memory = self._memory.get(cast(int, storage_of(tensor)))
        return () if memory is None else memory.overlapping(tensor)

    def scale(self, factors: Iterable[tuple[Tensor, Factor]]) -> None:
        """Multiply the factors of parameters, which are 1 at first, by these."""
        for p, factor in factors:
            if type(p) is Rows:
                shared = self._factors.get(id(p.whole), 1.0)
                if not isinstance(shared, FactorsOfRows):
                    shared = self._factors[id(p.whole)] = FactorsOfRows(shared)
                    self._scales_rows = True
                shared.add(p, factor)
                continue
            own = self._factors.get(id(p))
            if isinstance(own, FactorsOfRows):
                own[:] = [(rows, f * factor) for rows, f in own]
                continue
            if own is None:
                self._parameters.append(p)
                self._keep(p)
            self._factors[id(p)] = factor if own is None or _is_one(own) else own * factor

    def begin(self) -> None:
        """Scale writes from here on, unless it was removed before."""
        if self._ended:
            return
        # Parameters in one storage may count their versions together; inference tensors count none.
        shared = {id(p) for memory in self._memory.values() if len(memory.owners) > 1 for p in memory.owners}
        counting = (p for p in self._parameters if id(p) not in shared and not p.is_inference())
        self._versions = {id(p): p._version for p in counting}
        # Below the modes that are there: one that began before the closure of a step may end before the step does. A
        # `DeviceContext` that was entered itself stays at the bottom, where its exit looks; `torch.device` pushes
        # and pops one like any other mode.
        modes = self._popped()[::-1]
        default = int(bool(modes) and isinstance(modes[0], DeviceContext) and hasattr(modes[0], "old_device"))
        for mode in (*modes[:default], self, *modes[default:]):
            cast(Any, torch.overrides)._push_mode(mode)

    def end(self) -> None:
        """Stop scaling writes.

        Raises:
            CannotScaleError: A parameter was written by code that the mode does not see.
        """
        self.remove()
        self._expect(self._parameters, memory=True)

    def remove(self) -> None:
        """Take the mode off the stack, from any depth."""
        self._ended = True
        for mode in reversed(self._popped()):
            cast(Any, torch.overrides)._push_mode(mode)

    def _popped(self) -> list[Any]:
        """Pop the modes down to this one, from the top, and return those above it."""
        above: list[Any] = []
        while torch._C._len_torch_function_stack() and (top := torch.overrides._pop_mode()) is not self:
            above.append(top)
        return above

    def __torch_function__(
        self, func: Any, types: Iterable[type], args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Make a call, with the factors in it where it writes into parameters."""
        kind = KINDS.get(func, _UNKNOWN)
        kwargs = kwargs or {}
        if self._ended or (kind is None and not kwargs):  # most calls
            return func(*args, **kwargs)
        if kind in _OF_ONE and args and type(first := args[0]) in _PLAIN:
            return self._write_one(kind, func, first, args, kwargs)
        if kind is _UNKNOWN:
            kind = KINDS[func] = kind_of(func)
        if kind is None:
            if kwargs.get("out") is not None:
                kind = "out"
            elif kwargs.get("inplace") is True:  # of torch.nn.functional
                kind = "other"
            else:
                return func(*args, **kwargs)
        if kind in ("begin", "end"):
            return self._range(kind, func, args, kwargs)
        return self._write(kind, func, self._written(kind, args, kwargs), args, kwargs)

    def _write(self, kind: str, func: Any, written: list[Any], args: Any, kwargs: dict[str, Any]) -> Any:
        """Make a call that writes, with the factors of the parameters whose memory it writes into."""
        owners, factors, each_of_one, touched = self._owners(written)
        if kind == "data" and owners:
            return self._data(func, owners[0], factors[0], args)
        if not owners or all(map(_is_one, factors)):
            result = func(*args, **kwargs)
        elif kind == "handed out":
            raise CannotScaleError(f"{func.__name__} hands out a parameter's memory, where writes are not seen")
        else:
            self._expect(owners)
            scaled = getattr(self, f"_{kind}") if each_of_one else self._other
            if self._scales_rows and any(isinstance(f, FactorsOfRows) for f in factors):
                whole = kind not in _OF_ONE or not each_of_one
                scaled = self._other if whole else partial(self._in_rows, scaled)
            result = scaled(func, owners, factors, args, kwargs)
            self._moved.update(map(id, owners))
        self._versions.update([(id(p), p._version) for p in touched if id(p) in self._versions])
        return result

    def _write_one(self, kind: Any, func: Any, first: Tensor, args: Any, kwargs: dict[str, Any]) -> Any:
        """Write into one tensor: what most calls of a step do, so in few lines, because Python is most of the cost."""
        key = id(first)
        factor = self._factors.get(key)
        if factor is None:
            if storage_of(first) not in self._memory:  # optimizer state, temporaries
                return func(*args, **kwargs)
            return self._write(kind, func, [first], args, kwargs)
        known = self._versions.get(key)
        if known is not None and first._version != known:
            self._expect([first])
        if _is_one(factor):
            result = func(*args, **kwargs)
        elif self._scales_rows:
            return self._write(kind, func, [first], args, kwargs)
        else:
            result = getattr(self, f"_{kind}")(func, [first], [factor], args, kwargs)
            self._moved.add(key)
        if known is not None:
            self._versions[key] = first._version
        return result

    # --- What is written ----------------------------------------------------------------------------------------------

    def _range(self, kind: str, func: Any, args: Any, kwargs: Any) -> Any:
        """Follow the profiler's ranges: the end of one that began before this mode is that of `step` itself.

        It is seen only where `step` has raised, because `end` is called before it otherwise.
        """
        self._ranges += 1 if kind == "begin" else -1
        result = func(*args, **kwargs)
        return result if self._ranges >= 0 else _Remover([self])

    @staticmethod
    def _written(kind: str, args: Sequence[Any], kwargs: Mapping[str, Any]) -> list[Any]:
        """Return the tensors that a call may write into."""
        if kind == "operator":  # it may write into any of its arguments
            return tree_leaves((args, kwargs))
        first = kwargs["out"] if kind == "out" else args[0] if args else kwargs.get("self", kwargs.get("input"))
        return list(cast("Sequence[Any]", first)) if isinstance(first, (list, tuple)) else [first]

    def _owners(self, written: Sequence[Any]) -> tuple[list[Tensor], list[Any], bool, Iterable[Tensor]]:
        """Find whose memory is written.

        Returns:
            The parameters, their factors, whether each tensor is of exactly one, and all that share their storage.
        """
        factors = [self._factors.get(id(tensor)) for tensor in written]
        if None not in factors:
            return list(written), factors, True, written
        owners: dict[int, Tensor] = {}
        touched: list[Tensor] = []
        each_of_one = True
        for tensor in written:
            memory = self._memory.get(cast(int, storage_of(tensor))) if isinstance(tensor, Tensor) else None
            shared: Sequence[Tensor] = ()
            if memory is not None:
                touched += memory.owners if len(memory.owners) == 1 else ()
                shared = [tensor] if id(tensor) in self._factors else memory.overlapping(tensor)
            owners.update((id(p), p) for p in shared)
            each_of_one &= len(shared) == 1
        return list(owners.values()), [self._factors[key] for key in owners], each_of_one, touched

    def _expect(self, parameters: Iterable[Tensor], *, memory: bool = False) -> None:
        """Raise if a parameter was written since its last write that was seen."""
        for p in parameters:
            storage = storage_of(p) if memory else None
            moved = storage is not None and storage not in self._memory
            known = self._versions.get(id(p))
            if moved or (known is not None and p._version != known):
                raise CannotScaleError(
                    f"a parameter of shape {tuple(p.shape)} was written by code that PyTorch does not see"
                )

    # --- The calls, with factors --------------------------------------------------------------------------------------
    # Each is called as (function, parameters, factors, arguments, keyword arguments).

    def _multiply(self, func: Any, ps: list[Tensor], fs: list[Any], args: Any, kwargs: Any) -> Any:
        """`p s = p + (s − 1) p`, so the factor makes `1 + f (s − 1)` of s."""
        call = _Call(args, kwargs)
        scales = call.values(1, "other", "scalar", "scalars")
        integers = any(isinstance(s, Tensor) and not (s.is_floating_point() or s.is_complex()) for s in scales)
        if integers or kwargs.get("rounding_mode") is not None:
            return self._other(func, ps, fs, args, kwargs)
        if "div" in func.__name__:
            scales = [1 / s for s in scales]
        if any(isinstance(s, Tensor) for s in scales):
            self._expect_first(ps)
        if any(isinstance(f, Tensor) for f in fs) and all(isinstance(s, (int, float)) for s in scales):
            # On the stacked factors, because each operation on one of them is a launch.
            less = torch.tensor([s - 1 for s in scales], dtype=torch.float64).to(fs[0].device, fs[0].dtype)
            scaled: list[Any] = list((1 + torch.stack(fs) * less).unbind())
        else:
            scaled = [s if _is_one(f) else 1 + f * (s - 1) for f, s in zip(fs, scales, strict=True)]
        if isinstance(scaled[0], Tensor) and call.written[0].dtype in HALF:  # which a tensor would be rounded to
            for at in _chunks(call.written):
                wide = torch._foreach_mul([call.written[i].float() for i in at], [scaled[i] for i in at])
                torch._foreach_copy_([call.written[i] for i in at], wide)
            return args[0] if args else None
        return torch._foreach_mul_(call.written, scaled) if call.many else call.written[0].mul_(scaled[0])

    def _lerp(self, func: Any, ps: list[Tensor], fs: list[Any], args: Any, kwargs: Any) -> Any:
        """`p + w (q − p)`; `copy_` is the case w = 1."""
        call = _Call(args, kwargs)
        targets = call.values(1, "end", "tensors1", "other", "src")
        weights = [1.0] * len(ps) if "copy" in func.__name__ else call.values(2, "weight", "weights", "scalar")
        self._refuse_state(ps, targets)
        self._expect_first(ps)
        for w, q in zip(call.written, targets, strict=True):
            alike = isinstance(q, Tensor) and w.shape == q.shape and w.dtype == q.dtype and w.device == q.device
            if not alike or not w.is_floating_point():
                return self._other(func, ps, fs, args, kwargs)
        weights = [f * w for f, w in zip(fs, weights, strict=True)]
        if call.many:
            return torch._foreach_lerp_(call.written, targets, weights)
        return call.written[0].lerp_(targets[0], weights[0])

    def _addc(self, func: Any, ps: list[Tensor], fs: list[Any], args: Any, kwargs: Any) -> Any:
        """`p + v a b` or `p + v a / b`."""
        call = _Call(args, kwargs)
        first, second = call.values(1, "tensor1", "tensors1"), call.values(2, "tensor2", "tensors2")
        values = call.values(3, "value", "scalars", default=1)
        if not all(isinstance(a, Tensor) for a in first):  # the old order: value, tensor1, tensor2
            return self._other(func, ps, fs, args, kwargs)
        if any(isinstance(f, Tensor) for f in fs):
            first = torch._foreach_mul(first, fs) if call.many else [first[0] * fs[0]]
        else:
            values = [f * v for f, v in zip(fs, values, strict=True)]
        if call.many:
            return func(call.written, first, second, values)
        return func(call.written[0], first[0], second[0], value=values[0])

    def _add(self, func: Any, ps: list[Tensor], fs: list[Any], args: Any, kwargs: Any) -> Any:
        """`p ± α d`. The kernel for lists takes one α for all."""
        call, alpha = _Call(args, kwargs), kwargs.get("alpha", 1)
        written, changes = call.written, call.values(1, "other", "scalar", "scalars")
        if len(args) > 2:  # the old order: alpha, other
            return self._other(func, ps, fs, args, kwargs)
        if not call.many or (ps[0].is_cpu and type(ps[0]) in _PLAIN):  # where a call for lists is a loop
            single = getattr(Tensor, func.__name__.removeprefix("_foreach_"))
            for p, d, f in zip(written, changes, fs, strict=True):
                if isinstance(f, Tensor) or not isinstance(d, Tensor):
                    single(p, d * f, alpha=alpha)
                elif p.dtype in HALF and p.is_cpu and f != 1:  # to which alpha would be rounded
                    single(p, d.float() * (alpha * f))
                else:
                    single(p, d, alpha=alpha * f)
            return None if call.many else written[0]
        if not all(isinstance(d, Tensor) for d in changes):
            return self._other(func, ps, fs, args, kwargs)
        by = _by_factor(fs)
        if len(by) <= FEW and not any(isinstance(f, Tensor) for f in fs):
            for f, at in by.items():
                func([written[i] for i in at], [changes[i] for i in at], alpha=alpha * f)
        else:
            for at in _chunks(changes):
                some = torch._foreach_mul([changes[i] for i in at], [fs[i] for i in at])
                func([written[i] for i in at], some, alpha=alpha)
        return None

    def _fused(self, func: Any, ps: list[Tensor], fs: list[Any], args: Any, kwargs: Any) -> None:
        """Call a fused kernel, which takes one rate, once for each factor; small tensors of many factors together."""
        lists, rate = shards_of(args), kwargs["lr"]

        def call(at: Iterable[int], rate: Any) -> None:
            func(*([one[i] for i in at] if one else [] for one in lists), **{**kwargs, "lr": rate})

        by, together = _by_factor(fs), list[int]()
        if len(by) > FEW and not ps[0].is_cpu and not any(isinstance(f, Tensor) for f in fs):
            together = [i for i, p in enumerate(lists[0]) if p.numel() < SMALL and p.dtype not in HALF]
            apart = set(range(len(ps))).difference(together)
            by = {f: large for f, at in by.items() if (large := [i for i in at if i in apart])}
        for f, at in by.items():
            call(at, rate * f)
        if together:  # a copy of small tensors; half precision would lose digits
            new = [lists[0][i] for i in together]
            old = torch._foreach_clone(new)
            call(together, rate)
            torch._foreach_lerp_(old, new, [fs[i] for i in together])
            torch._foreach_copy_(new, old)

    def _data(self, func: Any, p: Tensor, f: Factor | FactorsOfRows, args: Any) -> None:
        """`p.data = q`."""
        old, new = p.detach(), args[1]
        if storage_of(new) == storage_of(old):
            func(*args)
            return
        if not _is_one(f):
            self._expect([p])
            self._expect_first([p])
            self._refuse_state([p], [new])
            if new.shape != old.shape or new.dtype != old.dtype or new.device != old.device:
                raise CannotScaleError("a parameter's data is replaced by that of another shape, type or device")
            new = _between(old, new.detach(), f)
        replaced = self._memory.get(cast(int, storage_of(old)))
        if replaced is not None and replaced.remove(p):  # freed memory may come back as another tensor's
            del self._memory[cast(int, storage_of(old))]
        func(p, new)
        self._keep(p)
        for rows, _ in f if isinstance(f, FactorsOfRows) else ():
            rows.renew()
        self._moved.add(id(p))
        if id(p) in self._versions:
            self._versions[id(p)] = p._version

    def _other(self, func: Any, ps: list[Tensor], fs: list[Any], args: Any, kwargs: Any) -> Any:
        """Make any other write, and go to `p_old + f (p_new − p_old)`; this copies the parameters for the call."""
        places = sorted((storage_of(p) or 0, *range_of(p)) for p in ps) if len(ps) > 1 else []
        if any(one[0] == other[0] and other[1] < one[2] for one, other in pairwise(places)):
            raise CannotScaleError("it writes into memory that several parameters share, each of which has a factor")
        self._expect_first(ps)
        old = [local(p.detach()).clone() for p in ps]
        result = func(*args, **kwargs)
        for p, before, f in zip(ps, old, fs, strict=True):
            now = local(p.detach())
            now.copy_(_between(before, now, f))
        return result

    _operator = _out = _other

    def _in_rows(
        self, scaled: Callable[..., Any], func: Any, ps: list[Tensor], fs: list[Any], args: Any, kwargs: Any
    ) -> Any:
        """Make an elementwise call with rows in place of the parameters that are split."""
        values = [*args, *kwargs.values()]
        many = bool(args) and isinstance(args[0], (list, tuple))
        lists = [many and (isinstance(v, (list, tuple)) or (isinstance(v, Tensor) and v.ndim == 1)) for v in values]
        columns = [list(v) if own else [v] * len(ps) for v, own in zip(values, lists, strict=True)]
        calls: list[tuple[Tensor, Factor, list[Any]]] = []
        for p, f, *row in zip(ps, fs, *columns, strict=True):
            if not isinstance(f, FactorsOfRows):
                calls.append((p, f, row))
            elif args and row[0].stride() == p.stride() and all(_has_rows(value, p) for value in row):
                calls += [(rows, own, [_of(rows, value) for value in row]) for rows, own in f]
                if id(p) in self._moved:
                    self._moved.update(id(rows) for rows, _ in f)
            else:
                return self._other(func, ps, fs, args, kwargs)
        count, names = len(args), list(kwargs)
        if many:
            rows = [row for *_, row in calls]
            new = [[row[i] for row in rows] if own else values[i] for i, own in enumerate(lists)]
            calls_of = [p for p, *_ in calls], [f for _, f, _ in calls]
            return scaled(func, *calls_of, new[:count], dict(zip(names, new[count:], strict=True)))
        for p, f, row in calls:
            scaled(func, [p], [f], row[:count], dict(zip(names, row[count:], strict=True)))
        return args[0]

    def _expect_first(self, ps: Sequence[Tensor]) -> None:
        """Raise in a second write that follows from the weights, since the first one has been scaled: in a projection.

        Only sums and numbers that multiply are the same from other weights.
        """
        if not self._moved.isdisjoint(map(id, ps)):
            raise CannotScaleError("it writes into the same weights twice, the second time from what they have become")

    def _refuse_state(self, ps: Sequence[Tensor], sources: Sequence[Any]) -> None:
        """Raise if a parameter is fetched from the state, which then holds the position itself."""
        for p, source in zip(ps, sources, strict=True):
            held: Any = self._state.get(whole_of(p), {})
            values: Iterable[Any] = cast("dict[Any, Any]", held).values() if isinstance(held, dict) else ()
            kept = {storage_of(value) for value in values if isinstance(value, Tensor)}
            if isinstance(source, Tensor) and storage_of(source) in kept - {None}:
                raise CannotScaleError("its weights are computed from weights of its own, which it keeps in its state")


class _Call:
    """The arguments of a call that writes into one tensor, or into those of a list."""

    def __init__(self, args: Sequence[Any], kwargs: Mapping[str, Any]) -> None:
        self._args, self._kwargs = args, kwargs
        written: Any = args[0] if args else kwargs["self"]
        self.many = isinstance(written, (list, tuple))
        self.written: list[Tensor] = list(written) if self.many else [written]

    def values(self, position: int, *names: str, default: Any = None) -> list[Any]:
        """Return an argument's value for each tensor: of a list, of a 1-dim tensor, or the same for all."""
        named = next((self._kwargs[name] for name in names if name in self._kwargs), default)
        found: Any = self._args[position] if len(self._args) > position else named
        if self.many and isinstance(found, (list, tuple)):
            return list(cast("Sequence[Any]", found))
        if self.many and isinstance(found, Tensor) and found.ndim == 1:
            return cast("list[Any]", found.tolist())
        return [found] * len(self.written)


class _Memory:
    """The parameters in one storage, by where they begin: some optimizers keep them and their state in one buffer."""

    def __init__(self) -> None:
        self.owners: list[Tensor] = []
        self._ranges: list[tuple[int, int, int]] = []
        self._longest = 0

    def add(self, p: Tensor) -> None:
        """Add a parameter."""
        place = range_of(p)
        at = bisect_left(self._ranges, place)
        self._ranges.insert(at, place)
        self.owners.insert(at, p)
        self._longest = max(self._longest, place[1] - place[0])

    def remove(self, p: Tensor) -> bool:
        """Remove a parameter; return whether none is left."""
        at = next((i for i, owner in enumerate(self.owners) if owner is p), None)
        if at is not None:
            del self.owners[at], self._ranges[at]
        return not self.owners

    def overlapping(self, tensor: Tensor) -> list[Tensor]:
        """Return the parameters that share numbers with a tensor of this storage.

        One that has just its place is the only one: columns of a matrix lie between each other.
        """
        begin, end, size = range_of(tensor)
        at = bisect_left(self._ranges, (begin - self._longest, 0, 0))
        found: list[Tensor] = []
        same: list[Tensor] = []
        while at < len(self._ranges) and self._ranges[at][0] < end:
            if self._ranges[at][1] > begin:
                found.append(self.owners[at])
                same += found[-1:] if self._ranges[at] == (begin, end, size) else []
            at += 1
        return same if len(same) == 1 else found


class _Remover(list[ScaledWrites]):
    """Removes its mode when the call that returned it is over: within that call PyTorch would put it back."""

    def __del__(self) -> None:
        self[0].remove()


def storage_of(tensor: Tensor) -> int | None:
    """Return what two tensors have in common exactly when they share memory; None for those without one memory."""
    try:
        return local(tensor).untyped_storage()._cdata
    except RuntimeError:  # sparse
        return None


def range_of(tensor: Tensor) -> tuple[int, int, int]:
    """Return the bytes of its storage between which a tensor lies, and how many of them it has."""
    own = local(tensor)
    begin = int(own.storage_offset()) * own.element_size()
    if not own.numel():
        return begin, begin, 0
    span = 1 + sum((size - 1) * stride for size, stride in zip(own.shape, own.stride(), strict=True))
    return begin, begin + int(span) * own.element_size(), int(own.numel()) * own.element_size()


def _has_rows(value: Any, p: Tensor) -> bool:
    """Return whether a value is the same for all rows of a parameter, or has rows as it has."""
    if not isinstance(value, Tensor) or not value.ndim:
        return True
    return value.shape == p.shape and value.layout is torch.strided


def _of(rows: Rows, value: Any) -> Any:
    return rows.of(value) if isinstance(value, Tensor) and value.ndim else value


def _between(old: Tensor, new: Tensor, factor: Any) -> Tensor:
    """Return `old + f (new − old)`."""
    if isinstance(factor, FactorsOfRows):
        return factor.between(old, new)
    return torch.lerp(old, new, factor) if new.is_floating_point() else old + factor * (new - old)


def _is_one(factor: Any) -> bool:
    return isinstance(factor, (int, float)) and factor == 1


def _by_factor(factors: Sequence[Any]) -> dict[Any, list[int]]:
    """Return the positions of each distinct factor."""
    found: dict[Any, list[int]] = {}
    for position, factor in enumerate(factors):
        found.setdefault(factor, []).append(position)
    return found


def _chunks(tensors: Sequence[Tensor]) -> list[list[int]]:
    """Return positions in chunks of at most `CHUNK` bytes, or of one tensor."""
    chunks: list[list[int]] = []
    size = CHUNK
    for position, tensor in enumerate(tensors):
        own = tensor.numel() * tensor.element_size()
        if size + own > CHUNK or not chunks:
            chunks.append([])
            size = 0
        chunks[-1].append(position)
        size += own
    return chunks


def is_compiled() -> bool:
    """Tell whether the step that begins now runs inside a function that `torch.compile` has made.

    The nearest frame of the compiler decides: inside `torch.compiler.disable` nothing is compiled.
    """
    frame: Any = sys._getframe()
    while frame is not None and frame.f_code is not STEP:
        frame = frame.f_back
    while frame is not None and frame.f_code.co_filename != _COMPILER:
        frame = frame.f_back
    return frame is not None and "DisableContext" not in getattr(frame.f_code, "co_qualname", "")


def _nothing(optimizer: Any) -> None:
    pass


_COMPILER = torch.compile.__code__.co_filename.replace("__init__.py", "_dynamo/eval_frame.py")
STEP = cast(Any, torch.optim.Optimizer.profile_hook_step)(_nothing).__code__
"""The code that PyTorch puts around the `step` of each class; it runs the hooks."""


@cache
def writes_can_be_scaled() -> bool:
    """Tell whether this PyTorch lets writes be scaled, by a step on two numbers and one that raises."""
    with _disable_current_modes():  # under fake tensors no value could be read
        parameters = [Parameter(torch.zeros(1, device="cpu")) for _ in range(2)]
        for p in parameters:
            p.grad = torch.ones(1, device="cpu")
        try:
            left = [_leaves_a_mode(kind(parameters, lr=1.0), parameters) for kind in (torch.optim.SGD, _Failing)]
        except (RuntimeError, TypeError, AttributeError):
            return False
        return not any(left) and [p.item() for p in parameters] == [-0.5, -1.0]


def _call(function: Callable[[], None], *_: Any) -> None:
    function()


class _Failing(torch.optim.SGD):
    def step(self, closure: Callable[[], Any] | None = None) -> None:
        raise ZeroDivisionError


def _leaves_a_mode(optimizer: torch.optim.Optimizer, parameters: Sequence[Tensor]) -> bool:
    """Take a step in which the first parameter has factor 0.5; return whether the mode stays on the stack."""
    depth = torch._C._len_torch_function_stack()
    mode = ScaledWrites(parameters, optimizer.state)
    mode.scale([(parameters[0], 0.5)])
    optimizer.register_step_pre_hook(partial(_call, mode.begin))
    optimizer.register_step_post_hook(partial(_call, mode.end))
    with suppress(ZeroDivisionError):
        optimizer.step()
    stays = torch._C._len_torch_function_stack() != depth
    mode.remove()
    return stays
