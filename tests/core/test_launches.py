"""What CUDA would launch in a step: with an adapter a constant number more, whatever the number of layers.

Counted on fake tensors. A `_foreach_` call is one launch only where the kernel for lists takes it: tensors of equal
sizes, strides and types, and numbers as scalars. Elsewhere it is one for each tensor.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise.apply import Factors
from layerwise.rules import (
    LARS,
    AdaLip,
    FreezeOut,
    InitialSNR,
    LayerAdaptive,
    LDoG,
    NoiseAdaptive,
    RandomTraining,
    RelativeGradient,
    Rule,
    Trust,
    WidthDepth,
)

MOST = 24
WITHOUT_A_LAUNCH = {
    *("detach", "view", "unbind", "select", "alias", "expand", "slice", "unsqueeze", "squeeze", "t", "transpose"),
    *("permute", "as_strided", "_unsafe_view", "split", "split_with_sizes", "_reshape_alias", "empty", "empty_like"),
    *("empty_strided", "lift_fresh", "device"),
}


class Launches(TorchDispatchMode):
    """Counts what CUDA would launch."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        name = func._schema.name.split("::")[1]
        if name.startswith("_foreach_"):
            given = [*args, *kwargs.values()]
            lists = [one for one in given if isinstance(one, (list, tuple)) and one and isinstance(one[0], Tensor)]
            self.count += 1 if are_alike(lists) else len(lists[0])
        elif name not in WITHOUT_A_LAUNCH:
            self.count += 1
        return func(*args, **kwargs)


def are_alike(lists: list[list[Tensor]]) -> bool:
    """Tell whether the kernel for lists takes them."""
    kinds = {(t.dtype, t.device) for one in lists for t in one}
    forms = [[(t.shape, t.stride()) for t in one] for one in lists]
    return len(kinds) == 1 and all(form == forms[0] for form in forms)


def watched_steps(
    mode: Callable[[], Any], make: Callable[[Any], optim.Optimizer], shape: Any, count: int, rule: Any, **options: Any
) -> list[Any]:
    """Take four steps on fake CUDA tensors, each under a mode of its own, and return the modes."""
    modes: list[Any] = []
    with FakeTensorMode():
        named = [(f"{i}.weight", nn.Parameter(torch.empty(shape, device="cuda"))) for i in range(count)]
        optimizer = make(named)
        if rule is not None:
            layerwise.LayerwiseLR(optimizer, rule)
        if options.get("hooks"):
            optimizer.register_step_pre_hook(lambda *_: None)
            optimizer.register_step_post_hook(lambda *_: None)
        for _ in range(4):
            for _, p in named:
                p.grad = torch.empty_like(p)
            with mode() as watching:
                optimizer.step()
            modes.append(watching)
    return modes


def launches(make: Callable[[Any], optim.Optimizer], layers: int, rule: Any, *, hooks: bool = False) -> int:
    """Return the launches of the third step, with a rule or without; `hooks` adds two of another program."""
    return watched_steps(Launches, make, (8, 8), layers, rule, hooks=hooks)[2].count


@pytest.fixture(autouse=True)
def _factors_can_be_read(monkeypatch: pytest.MonkeyPatch) -> None:
    """Let the one transfer of a step give factors that all differ."""
    monkeypatch.setattr(Factors, "read", lambda self: [1 + 0.001 * i for i in range(len(self._included))])


FOREACH: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda p: optim.SGD(p, foreach=True),
    "SGD decay": lambda p: optim.SGD(p, weight_decay=0.1, foreach=True),
    "SGD momentum": lambda p: optim.SGD(p, momentum=0.9, foreach=True),
    "SGD momentum decay": lambda p: optim.SGD(p, momentum=0.9, weight_decay=0.1, foreach=True),
    "SGD Nesterov": lambda p: optim.SGD(p, momentum=0.9, nesterov=True, foreach=True),
    "Adagrad": lambda p: optim.Adagrad(p, foreach=True),
    "Adam": lambda p: optim.Adam(p, weight_decay=0.1, foreach=True),
    "AdamW": lambda p: optim.AdamW(p, foreach=True),
    "Adamax": lambda p: optim.Adamax(p, foreach=True),
    "NAdam": lambda p: optim.NAdam(p, foreach=True),
    "RAdam": lambda p: optim.RAdam(p, foreach=True),
    "RMSprop": lambda p: optim.RMSprop(p, momentum=0.9, foreach=True),
    "Adadelta": lambda p: optim.Adadelta(p, foreach=True),
}


@pytest.mark.parametrize("layers", [10, *(pytest.param(many, marks=pytest.mark.full) for many in (160, 1000))])
@pytest.mark.parametrize("name", FOREACH)
def test_an_attached_step_launches_a_constant_number_more(name: str, layers: int) -> None:
    surplus = launches(FOREACH[name], layers, LayerAdaptive()) - launches(FOREACH[name], layers, None)
    assert surplus <= MOST


@pytest.mark.parametrize("rule", [LayerAdaptive(), LARS()], ids=repr)
@pytest.mark.parametrize("name", ["SGD momentum decay", "AdamW"])
def test_the_number_does_not_grow_with_the_layers(name: str, rule: Any) -> None:
    surplus = [launches(FOREACH[name], n, rule) - launches(FOREACH[name], n, None) for n in (20, 200)]
    assert surplus[0] == surplus[1] <= MOST


@pytest.mark.parametrize("name", ["SGD momentum decay", pytest.param("AdamW", marks=pytest.mark.full)])
def test_a_rule_of_the_finished_step_launches_a_constant_number_more(name: str) -> None:
    surplus = [launches(FOREACH[name], n, Trust()) - launches(FOREACH[name], n, None) for n in (20, 200)]
    assert surplus[0] == surplus[1] <= 40


@pytest.mark.parametrize(
    "rule",
    [
        AdaLip(),
        FreezeOut(50),
        InitialSNR(within=1),
        LDoG(),
        NoiseAdaptive(),
        RandomTraining(block=str),
        RelativeGradient(batches=50),
        WidthDepth(4, width=8),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_a_rule_that_remembers_or_follows_a_schedule_launches_a_constant_number_more(rule: Any) -> None:
    make = FOREACH["SGD momentum decay"]
    surplus = [launches(make, n, rule) - launches(make, n, None) for n in (20, 60)]
    assert surplus[0] == surplus[1] <= 40


class Spread(Rule):
    """A rule of both moments of the gradients."""

    needs = ("gradient_mean", "gradient_std")

    def factors(self, statistics: Any, state: Any) -> Any:
        return statistics.gradient_mean + statistics.gradient_std, state


def test_moments_of_gradients_launch_one_more_for_each_tensor() -> None:
    make = FOREACH["SGD momentum decay"]
    surplus = [launches(make, n, Spread()) - launches(make, n, None) for n in (20, 120)]
    assert surplus[1] - surplus[0] == 100
    assert surplus[0] <= 20 + 60


def test_a_capturable_step_with_such_a_rule_reads_nothing() -> None:
    make = lambda p: optim.AdamW(p, capturable=True, foreach=True)  # noqa: E731
    for layers in (10, 160):
        assert launches(make, layers, Trust()) - launches(make, layers, None) <= layers + 40


def test_many_small_tensors_share_a_fused_call() -> None:
    make = lambda p: optim.AdamW(p, fused=True)  # noqa: E731
    assert launches(make, 160, LayerAdaptive()) - launches(make, 160, None) <= MOST


@pytest.mark.parametrize("name", ["SGD momentum decay", "AdamW"])
def test_the_hooks_of_another_program_add_no_launch(name: str) -> None:
    alone, beside = (launches(FOREACH[name], 20, LayerAdaptive(), hooks=hooks) for hooks in (False, True))
    assert alone == beside


@pytest.mark.parametrize(
    "kind", [optim.RMSprop, *(pytest.param(kind, marks=pytest.mark.full) for kind in (optim.NAdam, optim.Adam))]
)
def test_a_capturable_step_launches_one_more_for_each_tensor(kind: Any) -> None:
    make = lambda p: kind(p, capturable=True, foreach=True)  # noqa: E731
    for layers in (10, 160):
        assert launches(make, layers, LayerAdaptive()) - launches(make, layers, None) <= layers + MOST


@pytest.mark.parametrize("kind", [optim.AdamW, optim.ASGD])
def test_what_a_step_costs_on_an_accelerator_is_told(kind: Any) -> None:
    with FakeTensorMode():
        named = [(f"{i}.weight", nn.Parameter(torch.empty(8, 8, device="cuda"))) for i in range(3)]
        text = layerwise.diagnose(kind(named), seconds=0)
    assert "route     scaled writes: " in text


class Temporaries(TorchDispatchMode):
    """Keeps the bytes of each tensor that a step makes."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[int] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        name = func._schema.name.split("::")[1]
        made = result if isinstance(result, (list, tuple)) else [result]
        if name not in WITHOUT_A_LAUNCH and not name.endswith("_"):
            self.calls.append(sum(t.numel() * t.element_size() for t in made if isinstance(t, Tensor)))
        return result


@pytest.mark.parametrize(("shape", "count"), [((1024, 1024), 64), ((8192, 4096), 10)])
@pytest.mark.parametrize("name", ["SGD", "SGD momentum decay", "AdamW", "RMSprop"])
def test_temporaries_are_no_larger_than_64_mib_or_one_tensor(name: str, shape: tuple[int, int], count: int) -> None:
    bare, attached = (
        watched_steps(Temporaries, FOREACH[name], shape, count, rule)[2].calls for rule in (None, LayerAdaptive())
    )
    most = max(2**26, 4 * shape[0] * shape[1])
    assert max(attached) <= max(most, *bare, 0)
    assert sum(one > most for one in attached) <= sum(one > most for one in bare)


@pytest.mark.parametrize("kind", [optim.NAdam, optim.RMSprop, optim.Adam, optim.AdamW])
def test_a_capturable_step_makes_the_same_tensors_each_time(kind: Any) -> None:
    make = lambda p: kind(p, capturable=True, foreach=True)  # noqa: E731
    sizes = [mode.calls for mode in watched_steps(Temporaries, make, (8, 8), 5, LayerAdaptive())]
    assert sizes[1] == sizes[2] == sizes[3]
