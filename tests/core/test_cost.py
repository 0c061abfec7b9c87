"""The cost that `diagnose` prints is what a step does in addition, and finding it out changes nothing."""

from __future__ import annotations

import random
import re
from collections.abc import Callable
from copy import deepcopy
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_flatten

import layerwise
from layerwise import adapter, diagnosis
from layerwise.rules import LARS, BackMatching, Constant, InitialSNR, LayerAdaptive
from layerwise.statistics import LayerStatistics

VIEWS = {"detach", "view", "unbind", "select", "alias", "expand", "slice", "unsqueeze", "empty", "empty_like"}


class Operations(TorchDispatchMode):
    """Records the operations that are dispatched, each with where the memory of its tensors begins."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []
        self.memory: list[set[int]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.split("::")[1]
        if name not in VIEWS:
            self.names.append(name)
            fake = torch._C._get_dispatch_mode(torch._C._TorchDispatchModeKey.FAKE) is not None
            tensors = [] if fake else [t for t in tree_flatten((args, kwargs))[0] if isinstance(t, Tensor)]
            self.memory.append({t.data_ptr() for t in tensors})
        return func(*args, **kwargs or {})

    def passes(self, tensor: Any) -> int:
        """Return how many operations took a tensor."""
        return sum(tensor.data_ptr() in memory for memory in self.memory)


def third_step(make: Callable[[Any], optim.Optimizer], rule: Any) -> tuple[Operations, nn.Sequential, str]:
    """Return the operations of the third step with a rule or without, the model, and what `diagnose` printed."""
    torch.manual_seed(0)
    model = nn.Sequential(*(nn.Linear(8, 8) for _ in range(5)))
    optimizer = make(model.parameters())
    text = layerwise.diagnose(optimizer, model, rule)
    if rule is not None:
        layerwise.LayerwiseLR(optimizer, rule, model)
    for _ in range(3):
        for p in model.parameters():
            p.grad = torch.randn_like(p)
        with Operations() as operations:
            optimizer.step()
    return operations, model, text


def printed(text: str, name: str) -> str:
    return next(line.removeprefix(name).strip() for line in text.splitlines() if line.startswith(name))


@pytest.mark.parametrize(
    ("make", "rule", "costs", "of_gradients", "of_weights"),
    [
        (lambda p: optim.SGD(p, 0.1), LayerAdaptive(), "1 pass over the gradients", 1, 0),
        (lambda p: optim.SGD(p, 0.1, 0.9), LayerAdaptive(), "1 pass over the gradients", 1, 0),
        (lambda p: optim.AdamW(p), Constant({"0": 2.0}), "no pass over memory", 0, 0),
        (lambda p: optim.AdamW(p), LARS(), "1 pass over the gradients, 1 pass over the weights", 1, 1),
        (
            lambda p: optim.SGD(p, 0.1, 0.9, nesterov=True),
            LayerAdaptive(),
            "1 pass over the gradients, 1 pass over the gradients to multiply them",
            2,
            0,
        ),
        (lambda p: optim.Rprop(p), LayerAdaptive(), "1 pass over the gradients", 1, 0),
        (
            lambda p: optim.SGD(p, 0.1),
            InitialSNR(),
            "1 pass over the gradients, 1 pass over the gradients for their moments, some operations a tensor",
            2,
            0,
        ),
    ],
    ids=["SGD", "SGD momentum", "constant", "LARS", "Nesterov", "Rprop", "moments"],
)
def test_the_passes_printed_are_those_of_a_step(
    make: Any, rule: Any, costs: str, of_gradients: int, of_weights: int
) -> None:
    bare, plain, _ = third_step(make, None)
    attached, model, text = third_step(make, rule)
    assert printed(text, "costs") == costs
    weight, reference = model[0].weight, plain[0].weight
    assert attached.passes(weight.grad) - bare.passes(reference.grad) == of_gradients
    assert attached.passes(weight) - bare.passes(reference) == of_weights


def test_interpolation_after_the_step_takes_the_passes_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (diagnosis, adapter):
        monkeypatch.setattr(module, "scales_writes", lambda *_: False)
    bare, plain, _ = third_step(optim.Rprop, None)
    attached, model, text = third_step(optim.Rprop, LayerAdaptive())
    assert printed(text, "route").startswith("interpolation")
    assert printed(text, "costs") == (
        "1 pass over the gradients, a copy of the parameters during the step, 3 passes over them"
    )
    assert attached.passes(model[0].weight) - bare.passes(plain[0].weight) == 3


@pytest.mark.parametrize(
    ("make", "what", "kernel"),
    [
        (lambda p: optim.AdamW(p, foreach=True), "divided groups", "_foreach_addcdiv_"),
        (lambda p: optim.AdamW(p, fused=True), "divided calls of the fused kernel", "_fused_adamw_"),
        (lambda p: optim.SGD(p, 0.1, 0.9, fused=True), "SGD's dampening in divided calls", "_fused_sgd_"),
    ],
    ids=["foreach", "fused", "dampening"],
)
def test_the_parts_printed_are_those_of_a_step(make: Any, what: str, kernel: str) -> None:
    operations, _, text = third_step(make, LayerAdaptive())
    route = printed(text, "route")
    assert route.startswith(what)
    assert route.endswith("one for each distinct factor, at most 5 in place of 1")
    assert operations.names.count(kernel) == 5


@pytest.mark.parametrize("count", [3, 200])
@pytest.mark.parametrize("needs", [("gradient_norm",), ("gradient_norm", "weight_norm", "decay_norm"), ("counts",)])
def test_norms_take_at_most_the_launches_printed(needs: tuple[str, ...], count: int) -> None:
    class Asking(layerwise.rules.Rule):
        def factors(self, statistics: Any, state: Any) -> Any:
            return torch.ones(count, device="cuda"), state

    Asking.needs = needs
    with FakeTensorMode():
        named = [(f"{i}.weight", nn.Parameter(torch.empty(8, 8 + i % 3, device="cuda"))) for i in range(count)]
        for _, p in named:
            p.grad = torch.empty_like(p)
        optimizer = optim.AdamW(named)
        stated = re.search(r"at most (\d+) launches", layerwise.diagnose(optimizer, rule=Asking()))
        layers = layerwise.LayerwiseLR(optimizer, Asking()).layer_table()
        statistics = LayerStatistics(layers, needs)
        statistics.compute(optimizer.param_groups)  # the first time copies indices to the device
        with Operations() as operations:
            statistics.compute(optimizer.param_groups)
    assert stated
    assert len(operations.names) <= int(stated[1])


@pytest.mark.parametrize("make", [optim.AdamW, optim.Rprop], ids=["lr", "update"])
def test_on_an_accelerator_the_route_is_scaled_writes(make: Any) -> None:
    with FakeTensorMode():
        named = [(f"{i}.weight", nn.Parameter(torch.empty(8, 8, device="cuda"))) for i in range(3)]
        text = layerwise.diagnose(make(named))
        capturing = layerwise.diagnose(make(named, capturable=True))
    assert printed(text, "route").startswith("scaled writes")
    assert printed(text, "costs") == (
        f"1 pass over the gradients, at most {diagnosis.LAUNCHES} launches for the norms at any number of layers"
    )
    assert printed(capturing, "costs").endswith(", 1 launch for each tensor")


class Noisy(optim.SGD):
    """Draws from every generator while it steps."""

    def step(self, closure: Any = None) -> Any:
        random.random()
        torch.rand(3)
        return super().step(closure)


@pytest.mark.parametrize("steps", [0, 2], ids=["before the first step", "with a state"])
@pytest.mark.parametrize("gradients", [False, True], ids=["without gradients", "with gradients"])
@pytest.mark.parametrize("kind", [Noisy, optim.Adam, optim.Rprop], ids=lambda kind: kind.__name__)
def test_nothing_changes_to_the_bit(make_model, backward, assert_same_bits, kind, gradients, steps):
    model = make_model()
    model.append(nn.BatchNorm1d(2).double())
    optimizer = kind(model.parameters(), lr=0.1)
    seen: list[int] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append(1))
    optim.lr_scheduler.StepLR(optimizer, 1)  # replaces `step`
    attached = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for step in range(steps):
        backward(model, step)
        optimizer.step()
    model.zero_grad()
    if gradients:
        backward(model, 7)

    def everything() -> Any:
        grads = [None if p.grad is None else p.grad.clone() for p in model.parameters()]
        tensors = [grads, *deepcopy((optimizer.state_dict(), model.state_dict())), torch.get_rng_state()]
        return (
            tensors,
            [p._version for p in model.parameters()],
            random.getstate(),
            len(seen),
            str(attached.state_dict()),
        )

    before, held = everything(), [p.grad for p in model.parameters()]
    layerwise.diagnose(optimizer, model, BackMatching())
    after = everything()
    assert_same_bits(after[0], before[0])
    assert after[1:] == before[1:]
    assert all(p.grad is grad for p, grad in zip(model.parameters(), held, strict=True))
    assert len(optimizer._optimizer_step_pre_hooks) == 2
    assert layerwise._hooks.OptimizerHooks.members_of(optimizer) == [attached._attached]


def test_a_waiting_backward_still_works_afterwards(make_model):
    model = make_model()
    loss = model(torch.ones(2, 5, dtype=torch.float64)).square().sum()
    layerwise.diagnose(optim.SGD(model.parameters(), lr=0.1), model)
    loss.backward()  # raises if a weight it has saved was written to


def test_a_model_that_cannot_be_copied_is_described(make_model):
    model = make_model()
    model.cached = next(model.parameters()) * 1
    assert "problems  none found" in layerwise.diagnose(optim.SGD(model.parameters(), lr=0.1), model)


def test_an_optimizer_of_sparse_gradients_is_described():
    model = nn.Embedding(10, 3, sparse=True)
    text = layerwise.diagnose(optim.SparseAdam(model.parameters()), model)
    assert printed(text, "costs").startswith("1 pass over the gradients")


def test_hooks_on_all_optimizers_are_not_called(make_model):
    from torch.optim.optimizer import register_optimizer_step_pre_hook

    model, calls = make_model(), []
    handle = register_optimizer_step_pre_hook(lambda *_: calls.append(1))
    try:
        layerwise.diagnose(optim.SGD(model.parameters(), lr=0.1), model)
    finally:
        handle.remove()
    assert not calls


def test_seconds_have_no_effect(make_model):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    texts = {layerwise.diagnose(optimizer, model, seconds=seconds) for seconds in (None, 0, 0.01, 5.0)}
    assert len(texts) == 1


@pytest.mark.parametrize("seconds", [-1.0, float("nan"), float("inf")])
def test_seconds_out_of_range_are_refused(make_model, seconds):
    model = make_model()
    with pytest.raises(ValueError, match="must be finite and at least 0"):
        layerwise.diagnose(optim.SGD(model.parameters()), model, seconds=seconds)


@pytest.mark.parametrize("seconds", ["1", True])
def test_seconds_of_the_wrong_type_are_refused(make_model, seconds):
    model = make_model()
    with pytest.raises(TypeError, match="must be a number of seconds"):
        layerwise.diagnose(optim.SGD(model.parameters()), model, seconds=seconds)


def test_one_of_several_processes_waits_for_no_other() -> None:
    from torch.testing._internal.distributed.fake_pg import FakeStore

    model = nn.Linear(3, 2)
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    alone = layerwise.diagnose(optimizer, model)
    torch.distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        assert layerwise.diagnose(optimizer, model) == alone
    finally:
        torch.distributed.destroy_process_group()
