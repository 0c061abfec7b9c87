"""What a monitor records, against a slow loop in float64; and that training is the same to the bit."""

from __future__ import annotations

import copy
import gc
import logging
import math
import pickle
import random
import re
import runpy
import sys
import weakref
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise import Monitor, _tensors, sinks
from layerwise.apply import Factors
from layerwise.rules import LARS, Constant, LayerAdaptive
from layerwise.sinks.record import QUANTITIES, Record
from optimizer_cases import CASES, Case, network, take_step

every_place = pytest.mark.parametrize("apply", ["auto", "gradient", "lr", "update"])


def norm(tensors: list[Tensor | None]) -> float:
    """Return the norm over tensors together, one number at a time in float64."""
    total = 0.0
    for tensor in tensors:
        if tensor is not None:
            tensor = tensor.to_dense() if tensor.layout is not torch.strided else tensor
            total += sum(abs(complex(x)) ** 2 for x in tensor.detach().flatten().tolist())
    return math.sqrt(total)


def by_layer(model: nn.Module) -> dict[str, list[nn.Parameter]]:
    """Return the parameters of each module that owns some."""
    modules = {name: list(module.parameters(recurse=False)) for name, module in model.named_modules()}
    return {name: owned for name, owned in modules.items() if owned}


def watched_step(model: nn.Module, optimizer: Any) -> dict[str, dict[str, float]]:
    """Take a step and measure it by hand: quantity to layer to number."""
    layers = by_layer(model)
    gradients = {name: norm([p.grad for p in owned]) for name, owned in layers.items()}
    weights = {name: norm(list(owned)) for name, owned in layers.items()}
    before = {p: p.detach().clone() for owned in layers.values() for p in owned}
    optimizer.step()
    moved = {
        name: norm([p.detach().to(torch.promote_types(p.dtype, torch.float64)) - before[p] for p in owned])
        for name, owned in layers.items()
    }
    return {"gradient_norm": gradients, "weight_norm": weights, "update_norm": moved}


def as_dicts(record: Record | None) -> dict[str, dict[str, float]]:
    """Return quantity to layer to number."""
    assert record is not None
    return {quantity: dict(zip(record.layers, getattr(record, quantity), strict=True)) for quantity in QUANTITIES}


def check(record: Record | None, expected: dict[str, dict[str, float]], rel: float = 1e-12) -> None:
    """Compare a record with what was measured by hand, and its ratio with its norms."""
    found = as_dicts(record)
    for quantity, values in expected.items():
        assert found[quantity] == pytest.approx(values, rel=rel, abs=1e-300), quantity
    for layer, ratio in found["update_ratio"].items():
        assert ratio == pytest.approx(found["update_norm"][layer] / found["weight_norm"][layer], rel=1e-15)


# --- The numbers ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW, optim.Adagrad], ids=lambda c: c.__name__)
def test_without_an_adapter_the_norms_are_those_of_a_loop_and_the_rate_is_the_optimizers(kind, make_model, backward):
    model = make_model()
    optimizer = kind(model.parameters(), lr=0.02, weight_decay=0.1)
    watching = Monitor(optimizer, model, every=1)
    for step in range(4):
        backward(model, step)
        optimizer.param_groups[0]["lr"] /= 2
        expected = watched_step(model, optimizer)
        rate = optimizer.param_groups[0]["lr"]
        check(
            watching.get_last_record(),
            {**expected, "factor": dict.fromkeys("024", 1.0), "lr": dict.fromkeys("024", rate)},
        )
        assert watching.get_last_record().step == step + 1


@every_place
@pytest.mark.parametrize("first", ["monitor", "adapter"])
def test_with_an_adapter_it_tells_of_gradients_before_the_factor_and_updates_after_it(
    apply, first, make_model, backward
):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.02, momentum=0.9, weight_decay=0.1)
    if first == "monitor":
        watching = Monitor(optimizer, model, every=1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=apply)
    if first == "adapter":
        watching = Monitor(optimizer, model, every=1)
    for step in range(4):
        backward(model, step)
        expected = watched_step(model, optimizer)
        assert min(adapter.get_last_factors().values()) > 1.01
        check(
            watching.get_last_record(),
            {**expected, "factor": adapter.get_last_factors(), "lr": adapter.get_last_lr()},
        )


def test_factors_of_several_adapters_multiply_and_a_paused_one_counts_as_one(make_model, backward):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, Constant({"0": 3.0, "2": 0.5}), model)
    second = layerwise.LayerwiseLR(optimizer, LARS(), model, layers="module", exclude=None)
    watching = Monitor(optimizer, model, every=1)
    backward(model)
    optimizer.step()
    theirs = second.get_last_factors()
    found = as_dicts(watching.get_last_record())["factor"]
    assert found == pytest.approx({"0": 3 * theirs["0"], "2": 0.5 * theirs["2"], "4": theirs["4"]}, rel=1e-14)
    with second.paused():
        backward(model)
        optimizer.step()
    assert as_dicts(watching.get_last_record())["factor"] == {"0": 3.0, "2": 0.5, "4": 1.0}


@pytest.mark.parametrize(("dtype", "rel"), [(torch.float32, 1e-6), (torch.bfloat16, 3e-3), (torch.float16, 1e-3)])
def test_the_norms_of_other_types_are_right_too(dtype, rel, make_model, backward):
    model = make_model(dtype)
    optimizer = optim.SGD(model.parameters(), lr=0.5)
    watching = Monitor(optimizer, model, every=1)
    for step in range(2):
        backward(model, step)
        expected = watched_step(model, optimizer)
        check(watching.get_last_record(), expected, rel)


def test_sparse_complex_and_missing_gradients_and_the_root_module_are_measured():
    class Mixed(nn.Module):
        def __init__(self):
            super().__init__()
            self.table = nn.Embedding(6, 3, sparse=True, dtype=torch.float64)
            self.phase = nn.Parameter(torch.randn(3, dtype=torch.complex128))
            self.unused = nn.Linear(3, 2, dtype=torch.float64)

    model = Mixed()
    optimizer = optim.SGD(model.parameters(), lr=0.3)
    watching = Monitor(optimizer, model, every=1)
    rows = model.table(torch.tensor([1, 4, 1]))
    (rows.square().sum() + model.phase.abs().square().sum()).backward()
    expected = watched_step(model, optimizer)
    assert watching.layers == ["", "table", "unused"]
    assert expected["gradient_norm"]["unused"] == expected["update_norm"]["unused"] == 0
    check(watching.get_last_record(), expected)


def test_a_weight_of_zero_has_ratio_infinity_when_it_moves_and_zero_when_it_does_not():
    still, moving = nn.Parameter(torch.zeros(2)), nn.Parameter(torch.zeros(2))
    still.grad, moving.grad = torch.zeros(2), torch.ones(2)
    optimizer = optim.SGD([("still", still), ("moving", moving)], lr=0.1)
    watching = Monitor(optimizer, every=1, layers="parameter")
    optimizer.step()
    assert watching.get_last_record().update_ratio == [0.0, math.inf]


def test_numbers_that_are_not_finite_are_recorded_as_they_are(make_model, backward):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    watching = Monitor(optimizer, model, every=1)
    backward(model)
    model[0].weight.grad[0, 0] = math.inf
    model[2].weight.grad[0, 0] = math.nan
    optimizer.step()
    found = as_dicts(watching.get_last_record())
    assert found["gradient_norm"]["0"] == found["update_norm"]["0"] == found["update_ratio"]["0"] == math.inf
    assert all(math.isnan(found[quantity]["2"]) for quantity in ("gradient_norm", "update_norm", "update_ratio"))
    assert all(math.isfinite(found[quantity]["4"]) for quantity in QUANTITIES)


def test_the_rate_is_that_of_the_layers_first_parameter_as_a_number_or_a_tensor(make_model, backward):
    model = make_model()
    groups = [
        {"params": [model[0].weight, model[2].bias], "lr": 0.1},
        {"params": [model[0].bias], "lr": 0.2},
        {"params": [model[2].weight, *model[4].parameters()], "lr": torch.tensor(0.25)},
    ]
    optimizer = optim.SGD(groups, lr=0.1)
    layerwise.LayerwiseLR(optimizer, Constant({"*": 2.0}), model, apply="update")
    watching = Monitor(optimizer, model, every=1)
    backward(model)
    optimizer.step()
    assert watching.get_last_record().lr == [0.2, 0.5, 0.5]


def test_an_optimizer_without_a_rate_has_rate_nan(make_model, train):
    class Still(optim.Optimizer):
        def step(self, closure=None):
            return None

    model = make_model()
    optimizer = Still(model.parameters(), {})
    watching = Monitor(optimizer, model, every=1)
    train(model, optimizer, 1)
    assert all(map(math.isnan, watching.get_last_record().lr))
    assert watching.get_last_record().update_norm == [0.0] * 3


# --- Training is the same to the bit ----------------------------------------------------------------------------------


BESIDE = [*((case, False) for case in CASES), *((case, True) for case in CASES if not case.form)]


@pytest.mark.pairwise
@pytest.mark.parametrize(("case", "adapter"), BESIDE, ids=lambda x: str(x) if isinstance(x, Case) else "+adapter" * x)
def test_every_optimizer_steps_to_the_same_bits_with_and_without(case: Case, adapter: bool):
    results: list[Any] = []
    for watched in (False, True):
        model = network(case)
        optimizer = case.make(model.parameters())
        if adapter:
            layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        watching = Monitor(optimizer, model, every=2) if watched else None
        random.seed(0)
        np.random.seed(0)
        for step in range(5):
            take_step(model, optimizer, step)
        gradients = [p.grad for p in model.parameters()]
        drawn = torch.rand(3), random.random(), np.random.rand()
        results.append((list(model.parameters()), gradients, optimizer.state_dict(), drawn))
    assert watching is not None
    assert watching.get_last_record().step == 4
    torch.testing.assert_close(results[0], results[1], rtol=0, atol=0)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="SGD takes a rate that is learned from PyTorch 2.7 on")
def test_a_differentiable_step_keeps_its_graph():
    gradients = []
    for watched in (False, True):
        rate = torch.tensor(0.1, requires_grad=True)
        start = torch.tensor([1.0, 2.0], requires_grad=True)
        p = start.clone()
        optimizer = optim.SGD([("p", p)], lr=rate, differentiable=True)
        if watched:
            watching = Monitor(optimizer, every=1)
        p.grad = torch.tensor([3.0, 4.0], requires_grad=True)
        optimizer.step()
        gradients.append(torch.autograd.grad(p.square().sum(), [rate, start]))
    assert watching.get_last_record().update_norm == pytest.approx([0.5])
    torch.testing.assert_close(gradients[0], gradients[1], rtol=0, atol=0)


class Operations(TorchDispatchMode):
    """Records the operations that reach a kernel."""

    def __init__(self) -> None:
        super().__init__()
        self.names: list[str] = []

    def __torch_dispatch__(self, operation: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.names.append(str(operation))
        return operation(*args, **(kwargs or {}))


def test_a_step_that_is_not_recorded_runs_the_operations_of_the_bare_optimizer_and_one_that_is_a_constant_number_more():
    found = []
    for watched, layers in ((False, 4), (True, 4), (True, 40)):
        model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(layers)))
        optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
        watching = Monitor(optimizer, model, every=3) if watched else None
        counts = []
        for _ in range(7):
            for p in model.parameters():
                p.grad = torch.ones_like(p)
            with Operations() as operations:
                optimizer.step()
            counts.append(
                [name for name in operations.names if name not in ("aten.clone.default", "aten.detach.default")]
            )
        assert watching is None or watching.get_last_record().step == 6
        found.append(counts)
    bare, four, forty = found
    assert [four[i] == bare[i] for i in range(7)] == [True, True, False, True, True, False, True]
    assert four[5] == forty[5]
    assert len(four[5]) - len(bare[5]) <= 30


class Plain(optim.Optimizer):
    """Gradient descent that leaves the question of an overflow to others."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> None:
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


@pytest.mark.parametrize("apply", ["gradient", "update"])
def test_a_record_takes_one_transfer_from_the_device_and_other_steps_none(apply, monkeypatch):
    transfers: list[int] = []

    def count(tensor: Tensor) -> list[float]:
        assert tensor.device.type == "cuda"
        transfers.append(len(tensor))
        return [0.0] * 2 + [1.0] * (len(tensor) - 2)  # that nothing was skipped, then norms and factors

    monkeypatch.setattr(_tensors, "transferred", count)
    monkeypatch.setattr(Factors, "read", lambda self: [1.5] * 2)  # once a step, without a monitor too
    with FakeTensorMode():
        shapes = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (4, 6)}
        named = [(name, nn.Parameter(torch.empty(shape, device="cuda"))) for name, shape in shapes.items()]
        optimizer = Plain(named, {"lr": 0.1})
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), apply=apply)
        Monitor(optimizer, every=3)
        per_step = []
        for _ in range(6):
            for _, p in named:
                p.grad = torch.empty_like(p)
            optimizer.found_inf = torch.zeros((), device="cuda")
            optimizer.step()
            per_step.append(len(transfers))
    assert per_step == [0, 0, 1, 1, 1, 2]
    assert transfers == [6 + 2 + 2] * 2


@pytest.mark.usefixtures("few_objects")
def test_no_copy_of_the_parameters_is_kept_between_steps():
    def bytes_alive() -> int:
        gc.collect()
        # Of these types only: tensors that other tests have faked hold no memory.
        alive = {t.data_ptr(): t for t in gc.get_objects() if type(t) in (Tensor, nn.Parameter)}
        return sum(t.numel() * t.element_size() for t in alive.values())

    model = nn.Sequential(*(nn.Linear(100, 100) for _ in range(4)))
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    during: list[int] = []
    before = bytes_alive()
    watching = Monitor(optimizer, model, every=1)
    optimizer.register_step_pre_hook(lambda *_: during.append(bytes_alive()))
    optimizer.step()
    assert during[0] - before > 4 * 40_000, "the check sees the copy"
    assert bytes_alive() - before < 2_000
    assert watching.get_last_record() is not None


# --- Which steps are recorded -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("every", [1, 3, 7])
def test_steps_whose_number_is_a_multiple_are_recorded(every, make_model, train):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    memory = sinks.Memory()
    watching = Monitor(optimizer, model, every, [memory])
    train(model, optimizer, 10)
    assert [record.step for record in memory.records] == list(range(every, 11, every))
    assert watching.steps == 10
    assert watching.get_last_record() is memory.records[-1]


def test_a_resumed_run_counts_on(make_model, train):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    first = Monitor(optimizer, model, every=4)
    train(model, optimizer, 6)
    state = first.state_dict()
    first.detach()
    memory = sinks.Memory()
    second = Monitor(optimizer, model, every=4, sinks=[memory])
    second.load_state_dict(state)
    train(model, optimizer, 6)
    assert [record.step for record in memory.records] == [8, 12]


@pytest.mark.parametrize("state", [{}, {"steps": 3}, {"version": 2, "steps": 3}, {"version": 1, "steps": -1}], ids=str)
def test_a_foreign_state_is_refused(state, make_model):
    model = make_model()
    watching = Monitor(optim.SGD(model.parameters(), lr=0.01), model)
    with pytest.raises(ValueError, match="is no state of a Monitor"):
        watching.load_state_dict(state)
    with pytest.raises(TypeError, match="not list"):
        watching.load_state_dict([1])
    assert watching.state_dict() == {"version": 1, "steps": 0}


# --- Which layers -----------------------------------------------------------------------------------------------------


def test_the_layers_are_those_of_the_one_adapter_whenever_it_is_attached(make_model, train):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    watching = Monitor(optimizer, model, every=1)
    assert watching.layers == ["0", "2", "4"]
    adapter = layerwise.LayerwiseLR(optimizer, Constant({"*": 2.0}), model, layers=["4", "*weight"])
    train(model, optimizer, 1)
    assert watching.get_last_record().layers == tuple(adapter.layers) == ("*weight", "4")
    adapter.detach()
    train(model, optimizer, 1)
    assert watching.layers == ["*weight", "4"]
    assert Monitor(optimizer, model).layers == ["0", "2", "4"]


def test_an_adapter_or_the_optimizer_gives_the_names_where_there_is_no_model(make_model, train):
    model = make_model()
    assert Monitor(optim.SGD(model.named_parameters(), lr=0.01)).layers == ["0", "2", "4"]
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(ValueError, match=r"no names: pass model="):
        Monitor(optimizer)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert Monitor(optimizer).layers == ["0", "2", "4"]


def test_where_layers_are_given_the_factor_is_that_of_a_layers_first_parameter(make_model, train):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    factors = {"0.weight": 2.0, "0.bias": 3.0, "2.weight": 5.0}
    layerwise.LayerwiseLR(optimizer, Constant(factors), model, layers=["0.weight", "0.bias", "2.weight"])
    watching = Monitor(optimizer, model, every=1, layers="module")
    train(model, optimizer, 1)
    assert as_dicts(watching.get_last_record())["factor"] == {"0": 2.0, "2": 5.0, "4": 1.0}


def test_a_parameter_added_later_is_measured_and_one_of_no_layer_is_not(make_model, train, backward):
    model = make_model()
    optimizer = optim.SGD([*model.parameters(), nn.Parameter(torch.ones(1))], lr=0.01)
    watching = Monitor(optimizer, model, every=1)
    assert watching.layers == ["0", "2", "4"]
    train(model, optimizer, 1)
    model.append(nn.Linear(2, 2, dtype=torch.float64))
    optimizer.add_param_group({"params": model[5].parameters(), "lr": 0.5})
    backward(model)
    expected = watched_step(model, optimizer)
    check(watching.get_last_record(), expected)
    assert watching.layers == ["0", "2", "4", "5"]


# --- Attaching and detaching ------------------------------------------------------------------------------------------


def test_detaching_takes_the_hooks_off_closes_the_sinks_and_may_be_done_twice(make_model, train):
    class Closing(sinks.Memory):
        closed = 0

        def close(self):
            self.closed += 1

    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    sink = Closing()
    with Monitor(optimizer, model, every=1, sinks=[sink]) as watching:
        train(model, optimizer, 2)
    watching.detach()
    train(model, optimizer, 2)
    assert (len(sink.records), sink.closed) == (2, 1)
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks
    assert watching.get_last_record().step == 2


@pytest.mark.parametrize("first", ["monitor", "adapter"])
def test_monitor_and_adapter_leave_each_other_attached(first, make_model, train, weights, assert_same_bits):
    models = [make_model(), make_model()]
    optimizers = [optim.SGD(model.parameters(), lr=0.01, momentum=0.9) for model in models]
    adapters = [layerwise.LayerwiseLR(o, LayerAdaptive(), m) for o, m in zip(optimizers, models, strict=True)]
    watching = Monitor(optimizers[0], models[0], every=1)
    if first == "monitor":
        watching.detach()
    else:
        for adapter in adapters:
            adapter.detach()
    for model, optimizer in zip(models, optimizers, strict=True):
        train(model, optimizer, 2)
    assert_same_bits(weights(models[0]), weights(models[1]))
    assert watching.steps == (0 if first == "monitor" else 2)
    assert (min(adapters[0].get_last_factors().values()) > 1) == (first == "monitor")


def test_the_optimizer_is_freed_with_its_monitor_and_the_sinks_are_closed(make_model, train):
    closed = []

    class Closing(sinks.Memory):
        def close(self):
            closed.append(len(self.records))

    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    gone = weakref.ref(Monitor(optimizer, model, every=1, sinks=[Closing()]))
    train(model, optimizer, 2)
    assert gone() is not None
    del optimizer
    gc.collect()
    assert gone() is None
    assert closed == [2]


@pytest.mark.parametrize("attach", [Monitor, lambda o, m: layerwise.LayerwiseLR(o, LayerAdaptive(), m)], ids=["M", "A"])
def test_a_model_that_holds_its_optimizer_is_freed_with_it(attach, make_model, train):
    model = make_model()
    model.optimizer = optim.SGD(model.parameters(), lr=0.01)
    attach(model.optimizer, model)
    train(model, model.optimizer, 2)
    gone = weakref.ref(model.optimizer)
    del model
    gc.collect()
    assert gone() is None


def test_a_sink_that_holds_the_monitor_does_not_keep_it(make_model, train):
    class Trainer:
        def __init__(self):
            self.model = make_model()
            self.optimizer = optim.SGD(self.model.parameters(), lr=0.01)
            self.monitor = Monitor(self.optimizer, self.model, every=1, sinks=[self.note])
            self.steps = []

        def note(self, record):
            self.steps.append(record.step)

    trainer = Trainer()
    train(trainer.model, trainer.optimizer, 2)
    assert trainer.steps == [1, 2]
    gone = weakref.ref(trainer)
    del trainer
    gc.collect()
    assert gone() is None


def test_detaching_from_an_optimizer_whose_hooks_are_gone_is_no_error(make_model, train):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    watching = Monitor(optimizer, model, every=1)
    optimizer._optimizer_step_pre_hooks.clear()
    optimizer._optimizer_step_post_hooks.clear()
    gc.collect()
    watching.detach()
    again = Monitor(optimizer, model, every=1)
    train(model, optimizer, 1)
    assert (watching.steps, again.steps) == (0, 1)


def test_ever_other_layers_without_a_gradient_do_not_fill_the_memory(make_model):
    model = nn.ModuleList(nn.Linear(1, 1) for _ in range(10))
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    watching = Monitor(optimizer, model, every=1)
    for step in range(300):
        for number, layer in enumerate(model):
            for p in layer.parameters():
                p.grad = torch.ones_like(p) if step >> number & 1 else None
        optimizer.step()
        norms = [math.sqrt(2) * (step >> number & 1) for number in range(10)]
        assert watching.get_last_record().gradient_norm == pytest.approx(norms)
    assert len(watching._statistics._indices) <= 64


def test_a_second_monitor_is_told_of_in_the_log_and_both_record(make_model, train, caplog):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    first = Monitor(optimizer, model, every=1)
    with caplog.at_level(logging.WARNING, "layerwise"):
        second = Monitor(optimizer, model, every=2)
    assert "another Monitor attached already" in caplog.text
    train(model, optimizer, 2)
    assert first.get_last_record() == second.get_last_record()


def test_an_adapter_beside_a_monitor_is_not_taken_for_a_second_adapter(make_model, caplog):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    Monitor(optimizer, model)
    with caplog.at_level(logging.WARNING, "layerwise"):
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert not caplog.records


def test_its_representation_says_what_it_watches(make_model):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    watching = Monitor(optimizer, model, 10, [sinks.Memory(), print])
    assert repr(watching) == "Monitor(SGD, every 10 steps, 3 layers, Memory(0 records), print)"
    watching.detach()
    assert repr(watching).startswith("Monitor(detached, every 10 steps")


@pytest.mark.parametrize("duplicate", [copy.deepcopy, lambda x: pickle.loads(pickle.dumps(x))], ids=["copy", "pickle"])
def test_a_copy_of_it_is_none_and_says_why(duplicate, make_model):
    model = make_model()
    with pytest.warns(UserWarning, match=r"belongs to one optimizer.* state_dict"):
        assert duplicate(Monitor(optim.SGD(model.parameters(), lr=0.01), model)) is None


BAD = {
    "no steps": ({"every": 0}, ValueError, r"every=0 must be at least 1"),
    "half a step": ({"every": 0.5}, TypeError, r"every=0\.5 must be a whole number"),
    "a truth value": ({"every": True}, TypeError, r"every=True must be a whole number"),
    "one sink": ({"sinks": print}, TypeError, r"sinks=.*print.* must be a list .* write \[sink\]"),
    "a path": ({"sinks": "out.jsonl"}, TypeError, r"sinks='out\.jsonl' must be a list"),
    "no callable": ({"sinks": ["out.jsonl"]}, TypeError, r"sinks holds 'out\.jsonl' \(str\).*sinks\.JSONL"),
    "a class": ({"sinks": [sinks.Memory]}, TypeError, r"Memory, which is a class; call it: Memory\(\.\.\.\)"),
    "unknown layers": ({"layers": "modules"}, ValueError, r"layers='modules' is unknown"),
    "a stranger": ({"model": nn.Linear(2, 2)}, ValueError, r"owns none of the 6 parameters"),
    "no optimizer": ({"optimizer": "sgd"}, TypeError, r"'sgd'.*is no torch\.optim\.Optimizer"),
}


@pytest.mark.parametrize(("arguments", "error", "message"), BAD.values(), ids=BAD)
def test_a_wrong_argument_is_told_of_before_anything_is_attached(arguments, error, message, make_model):
    model = make_model()
    optimizer = optim.SGD(model.parameters(), lr=0.01)
    with pytest.raises(error, match=message):
        Monitor(**{"optimizer": optimizer, "model": model, **arguments})
    assert not optimizer._optimizer_step_pre_hooks


# --- What the documentation says --------------------------------------------------------------------------------------

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "monitor.md").read_text(encoding="utf-8")


def test_the_code_of_the_guide_runs_and_its_table_names_every_quantity(tmp_path, monkeypatch, capsys):
    polars = pytest.importorskip("polars")
    monkeypatch.chdir(tmp_path)
    blocks = re.findall(r"```python\n(.*?)```", GUIDE, re.S)
    exec(blocks[0], {})
    assert capsys.readouterr().out.startswith("step 100\nlayer     gradient norm")
    rows = [(50, "0"), (50, "2"), (100, "0"), (100, "2")]
    for line, column in zip(blocks[1].splitlines()[-2:], ("layers", "layer"), strict=True):
        assert eval(line, {"polars": polars}).select("step", column).rows() == rows
    assert re.findall(r"^\| `(\w+)` \|", GUIDE, re.M) == list(QUANTITIES)


def test_the_example_runs_twice_and_prints_the_table_of_the_guide(tmp_path, monkeypatch, capsys):
    pytest.importorskip("numpy")
    monkeypatch.setattr(sys, "argv", ["monitor.py", str(tmp_path)])
    for lines in (9, 18):
        runpy.run_path(str(ROOT / "examples" / "monitor.py"))
        assert len((tmp_path / "layers.jsonl").read_text().splitlines()) == lines
    printed = capsys.readouterr().out
    table = re.findall(r"```text\n(.*?)```", GUIDE, re.S)[0]
    assert printed.splitlines()[:2] == table.splitlines()[:2]
    assert [line.split()[0] for line in printed.splitlines()[2:5]] == ["conv1", "conv2", "head"]
