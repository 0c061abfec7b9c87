"""What stepping in backward cannot be joined with, how that is seen, and what is said of it."""

from __future__ import annotations

import gc
import inspect
import sys
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, optim

from .rules.questions import needs_of, own_layer

_KINDS: tuple[Any, ...] = (optim.SGD, optim.Adagrad, optim.Adam, optim.AdamW)
_STEPS = {inspect.unwrap(kind.step) for kind in _KINDS}

ACCUMULATED = (
    "a second backward() before optimizer.step(): step_in_backward has used and freed the gradients of the first one, "
    "so there is nothing to add these to; nothing has changed since the first. Call optimizer.step() after each "
    "backward(). To accumulate, run all but the last backward() inside `with handle.paused():`, which keeps the "
    "gradients; so do for the loss of another optimizer (a GAN's), before zero_grad(). Activation checkpoints need "
    "use_reentrant=False"
)
NESTED = (
    "a backward() inside another one, as activation checkpoints with use_reentrant=True run it: gradients of a weight "
    "that both reach would arrive apart, and step_in_backward may have used one of them; the layers above have been "
    "updated. Use use_reentrant=False, or run the whole inside `with handle.paused():`"
)
COMPILED = (
    "compiled autograd runs this backward, and does not tell step_in_backward of its end; no weight has changed. Turn "
    "it off (torch.compile of the model may stay), or use LayerwiseLR in place of step_in_backward"
)
CREATE_GRAPH = (
    "backward(create_graph=True) keeps a graph through the gradients, which step_in_backward frees and whose weights "
    "it changes; run it inside `with handle.paused():`, or detach()"
)
SCALED = (
    "a GradScaler is in use: whether a step is to be skipped is known only when all gradients exist, and "
    "step_in_backward has used the first of them by then. Use bfloat16 (torch.autocast without a scaler), or "
    "LayerwiseLR in place of step_in_backward"
)
ASKED = (
    "a GradScaler, or a trainer that would clip gradients, asks whether this optimizer unscales them; step_in_backward "
    "has used and freed them, and the weights have moved by what it was given. Use bfloat16 (torch.autocast without a "
    "scaler) and no clipping, or LayerwiseLR in place of step_in_backward"
)
ATTACHED_TOO = (
    "a LayerwiseLR or a monitor is attached to the same optimizer, and would find no gradient at step(): pass the rule "
    "to step_in_backward itself, or detach one of the two"
)


def check_optimizer(optimizer: optim.Optimizer) -> None:
    """Raise unless a part of the optimizer's parameters can step as all of them together would.

    Raises:
        ValueError: Another optimizer, a form of its step that cannot work so, sharded parameters, or gradients present.
    """
    name = type(optimizer).__name__
    if inspect.unwrap(type(optimizer).step) not in _STEPS:
        raise ValueError(
            f"optimizer={name}: step_in_backward steps one layer at a time, which is known to give the same numbers "
            "for torch.optim's SGD, Adagrad, Adam and AdamW; this step is another one. Use one of these, or LayerwiseLR"
        )
    check_options(optimizer)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    if any(hasattr(p, "device_mesh") for p in parameters):
        raise ValueError(
            "this optimizer holds sharded parameters (DTensor), whose gradients are reduced only after they have "
            "accumulated; use LayerwiseLR"
        )
    present = sum(p.grad is not None for p in parameters)
    if present:
        raise ValueError(
            f"{present} of {len(parameters)} parameters hold a gradient already, which the next backward() would add "
            "to: call optimizer.zero_grad() first"
        )


def check_options(optimizer: optim.Optimizer) -> None:
    """Raise for a form of the optimizer's step that cannot take one layer at a time.

    Raises:
        ValueError: A group asks for it.
    """
    name = type(optimizer).__name__
    for option, reason in (
        ("differentiable", "keeps the gradients in a graph, and these are freed"),
        ("capturable", "is for CUDA graphs of the whole step, and no step of the whole is left"),
    ):
        if any(group.get(option) for group in optimizer.param_groups):
            raise ValueError(f"{name}({option}=True) {reason}; use {option}=False with step_in_backward")


def check_own_layer(rule: Any) -> None:
    """Raise unless each layer's factor follows from that layer alone.

    Raises:
        ValueError: The rule needs other layers, or does not say that it needs none.
    """
    if own_layer(rule):
        return
    needs = set(needs_of(rule))
    if "counts" in needs:
        reason = "it counts the steps whose gradients are finite in every layer"
    elif "gradients" in needs:
        reason = "it compares the gradients of all layers"
    else:
        reason = "it does not say own_layer = True, that the factor of a layer follows from that layer alone"
    raise ValueError(
        f"rule={rule!r} cannot step in backward: {reason}. When a layer steps, the gradients of the layers below do "
        "not exist yet, and the layers above have moved. Rules that can: LayerAdaptive, LARS, LARC, Constant, "
        "LayerDecay, GradientAmplification of AllLayers or RandomLayers, chain and bounds of these, and every "
        "ElementwiseRule; for others use LayerwiseLR"
    )


def check_wrappers(parameters: Iterable[Tensor]) -> None:
    """Raise if a wrapper reduces the gradients of these parameters over processes, after the hooks have run.

    Raises:
        ValueError: One of them belongs to a DistributedDataParallel or FullyShardedDataParallel module.
    """
    if not (torch.distributed.is_available() and torch.distributed.is_initialized()):
        return
    # A wrapper leaves no mark on the parameters that can be read, so all that live are looked at, once.
    kinds: list[type] = [torch.nn.parallel.DistributedDataParallel]
    if "torch.distributed.fsdp" in sys.modules:
        kinds.append(sys.modules["torch.distributed.fsdp"].FullyShardedDataParallel)
    ours = set(map(id, parameters))
    for wrapper in _alive(*kinds):
        if any(id(p) in ours for p in wrapper.parameters()):
            raise ValueError(
                f"the parameters belong to a {type(wrapper).__name__}, which averages gradients over the processes "
                "only after step_in_backward has used them, so the processes would drift apart; use LayerwiseLR"
            )


def check_engine() -> None:
    """Raise if compiled autograd runs the backward: it loses what is queued for the end.

    Raises:
        RuntimeError: It does.
    """
    compiled = sys.modules.get("torch._dynamo.compiled_autograd")
    if compiled is not None and compiled.in_compiled_autograd_region:
        raise RuntimeError(COMPILED)


def check_loss() -> None:
    """Raise if the loss of the running backward has been multiplied by a GradScaler.

    A scaler leaves no mark on its product but that the root of the graph is a product with a constant; so that is
    looked for where a scaler lives that has been used.

    Raises:
        RuntimeError: It has been, as far as can be told.
    """
    if any(map(_is_scaled, _roots())) and any(
        scaler.is_enabled() and scaler._scale is not None for scaler in _alive(torch.amp.GradScaler)
    ):
        raise RuntimeError(f"{SCALED}. No weight has changed")


class ScalerRefusal:
    """Stands where `GradScaler.step` asks an optimizer whether it unscales by itself, and answers that it must not."""

    def __bool__(self) -> bool:
        raise RuntimeError(ASKED)


def _alive(*kinds: type) -> list[Any]:
    gc.collect()  # so that unused ones are not found
    # Of the types, because isinstance would run the code of proxies.
    return [one for one in gc.get_objects() if issubclass(type(one), kinds)]


def _roots() -> Iterator[Any]:
    """Yield what backward was called on, in whichever thread: on accelerators hooks run in another one."""
    run = torch.autograd.graph._engine_run_backward.__code__
    for frame in sys._current_frames().values():
        while frame is not None:
            if frame.f_code is run:
                yield from frame.f_locals["t_outputs"]
            frame = frame.f_back


def _is_scaled(root: Any) -> bool:
    node = root.grad_fn if isinstance(root, Tensor) else root.node
    return node is not None and node.name() == "MulBackward0" and node.next_functions[1][0] is None
