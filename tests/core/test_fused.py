"""Fused kernels dealt out by factor give the bits of a parameter group for each layer."""

from __future__ import annotations

import copy
import sys
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode

import layerwise
from layerwise import _fused as fused
from layerwise import adapter as attaching
from layerwise import apply
from layerwise.rules import LARC, LARS, Constant, ElementwiseRule, LayerAdaptive

CASES: dict[str, tuple[Any, dict[str, Any], str]] = {
    "SGD": (optim.SGD, {"lr": 0.05}, "lr"),
    "SGD, rate an integer": (optim.SGD, {"lr": 1}, "lr"),
    "SGD with decay, gradient": (optim.SGD, {"lr": 0.05, "weight_decay": 0.1}, "gradient"),
    "SGD with momentum and decay, auto": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}, "auto"),
    "SGD with momentum and decay, lr": (optim.SGD, {"lr": 0.05, "momentum": 0.9, "weight_decay": 0.1}, "lr"),
    "SGD with Nesterov, maximize": (
        optim.SGD,
        {"lr": 0.05, "momentum": 0.9, "nesterov": True, "maximize": True, "weight_decay": 0.1},
        "auto",
    ),
    "Adam with decay": (optim.Adam, {"lr": 0.05, "weight_decay": 0.1}, "lr"),
    "AdamW": (optim.AdamW, {"lr": 0.05}, "lr"),
    "AdamW with amsgrad, maximize": (optim.AdamW, {"lr": 0.05, "amsgrad": True, "maximize": True}, "lr"),
    "Adagrad": (optim.Adagrad, {"lr": 0.05, "lr_decay": 0.1, "weight_decay": 0.1}, "lr"),
}


ADAGRAD_TAKES_A_TENSOR = "tensor_lr" in torch.ops.aten._fused_adagrad_.overloads()
"""Whether this PyTorch's kernel takes the rate as a tensor, without which nothing can be dealt out; 2.6's does not."""


class Calls(TorchDispatchMode):
    """Counts the calls of fused kernels."""

    def __init__(self) -> None:
        super().__init__()
        self.fused = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        self.fused += "_fused_" in str(func)
        return func(*args, **(kwargs or {}))


def network() -> nn.Module:
    torch.manual_seed(0)
    first, second, third, fourth = nn.Linear(3, 4), nn.Linear(4, 4).double(), nn.Linear(4, 2), nn.Linear(2, 2)
    fourth.bias.requires_grad_(False)
    return nn.Sequential(first, second, third, fourth, nn.Linear(5, 5))  # the last one never has a gradient


def made(name: str) -> tuple[nn.Module, optim.Optimizer, layerwise.LayerwiseLR]:
    """Two parameter groups, two types, a frozen parameter, one in no layer, one layer without a gradient."""
    kind, options, place = CASES[name]
    model = network()
    outside = nn.Parameter(torch.ones(3))
    parameters = list(model.parameters())
    groups = [{"params": parameters[:3]}, {"params": [*parameters[3:], outside], "lr": 0.5 * options["lr"]}]
    optimizer = kind(groups, **options, fused=True)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)
    return model, optimizer, adapter


def train(optimizer: optim.Optimizer, steps: int = 4, scaled: bool = False) -> None:
    generator = torch.Generator().manual_seed(1)
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    for step in range(steps):
        for p in parameters:
            if p.requires_grad and p.numel() != 25 and p.numel() != 5:
                p.grad = torch.randn(p.shape, generator=generator, dtype=p.dtype)
        if scaled:  # as a gradient scaler leaves it on a fused optimizer; the third step overflows
            optimizer.grad_scale = torch.tensor(8.0)
            optimizer.found_inf = torch.tensor(float(step == 2))
            for p in parameters:
                if p.grad is not None:
                    p.grad.mul_(8.0 if step != 2 else float("inf"))
        optimizer.step()


def everything(optimizer: optim.Optimizer) -> list[torch.Tensor]:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    states = [x for p in parameters for x in optimizer.state[p].values() if isinstance(x, torch.Tensor)]
    return [*(p.detach() for p in parameters), *states]


@pytest.mark.filterwarnings("ignore:.*in no layer")
@pytest.mark.parametrize("scaled", [False, True])
@pytest.mark.parametrize("name", CASES)
def test_dealt_out_or_in_groups_gives_the_same_bits(name, scaled, monkeypatch):
    _, dealt, adapter = made(name)
    train(dealt, scaled=scaled)
    monkeypatch.setattr(attaching, "can_be_dealt", lambda optimizer: False)
    _, grouped, reference = made(name)
    train(grouped, scaled=scaled)
    assert adapter.get_last_factors() == reference.get_last_factors()
    assert len(set(adapter.get_last_factors().values())) > 3
    for actual, expected in zip(everything(dealt), everything(grouped), strict=True):
        assert torch.equal(actual, expected)


@pytest.mark.parametrize("name", ["SGD with momentum and decay, auto", "AdamW", "Adagrad"])
def test_the_kernel_is_called_once_for_each_factor_and_kind_of_tensor(name):
    _, optimizer, adapter = made(name)
    train(optimizer)
    with Calls() as calls:
        optimizer.step()
    # Group 1: the first layer, and the second's weight, in float64. Group 2: the second's bias, in float64; in float32
    # the third, the fourth and the parameter in no layer.
    assert calls.fused == 2 + 4
    adapter.detach()
    with Calls() as calls:
        optimizer.step()
    assert calls.fused == 2 + 2


def test_layers_with_equal_factors_share_a_call():
    model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(5)))
    optimizer = optim.AdamW(model.parameters(), fused=True)
    layerwise.LayerwiseLR(optimizer, Constant({"0": 3.0, "2": 2.0, "4": 3.0}), model)
    train(optimizer)
    with Calls() as calls:
        optimizer.step()
    assert calls.fused == 3


def test_the_optimizer_itself_never_holds_such_a_rate():
    _, optimizer, _ = made("AdamW")
    train(optimizer)
    assert [type(group["lr"]) for group in optimizer.param_groups] == [float, float]
    copy.deepcopy(optimizer)


def rates_seen(optimizer: optim.Optimizer) -> list[type]:
    seen: list[type] = []
    optimizer.register_step_pre_hook(lambda _, args, __: seen.extend(type(g["lr"]) for g in args[0].param_groups))
    train(optimizer, steps=1)
    return seen


def test_other_hooks_see_groups_with_plain_rates():
    _, optimizer, _ = made("AdamW")
    assert rates_seen(optimizer) == [float] * 6


def test_a_post_hook_that_was_there_before_sees_plain_rates_and_this_steps_factors():
    model = network()
    optimizer = optim.AdamW(model.parameters(), lr=0.05, fused=True)
    seen: list[Any] = []
    optimizer.register_step_post_hook(
        lambda _, args, __: seen.append(({type(g["lr"]) for g in args[0].param_groups}, adapter.get_last_factors()))
    )
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for _ in range(3):
        train(optimizer, steps=1)
        assert seen[-1] == ({float}, adapter.get_last_factors())


def test_two_adapters_multiply(monkeypatch):
    results = []
    for allowed in (True, False):
        if not allowed:
            monkeypatch.setattr(attaching, "can_be_dealt", lambda optimizer: False)
        model, optimizer, _ = made("AdamW")
        layerwise.LayerwiseLR(optimizer, Constant({"0": 3.0}), model, apply="lr")
        train(optimizer)
        results.append(everything(optimizer))
    assert all(map(torch.equal, *results))


class OwnStep(optim.AdamW):
    def step(self, closure=None):  # reads the rate itself
        assert all(type(group["lr"]) is float for group in self.param_groups)
        return super().step(closure)


@pytest.mark.parametrize(
    ("optimizer", "expected"),
    [
        (lambda p: optim.SGD(p, fused=True), True),
        (lambda p: optim.Adam(p, fused=True), True),
        (lambda p: optim.AdamW(p, fused=True), True),
        (lambda p: optim.Adagrad(p, fused=True), ADAGRAD_TAKES_A_TENSOR),
        (lambda p: optim.AdamW(p), False),
        (lambda p: optim.AdamW(p, lr=torch.tensor(0.1), fused=True), False),
        (lambda p: OwnStep(p, fused=True), False),
        (lambda p: optim.AdamW([{"params": p}, {"params": [nn.Parameter(torch.ones(1))], "fused": False}], fused=True),
         False),
    ],
)  # fmt: skip
def test_it_is_known_which_optimizers_hand_the_rate_on(optimizer, expected):
    assert fused.can_be_dealt(optimizer([nn.Parameter(torch.ones(2))])) is expected


def test_a_subclass_with_a_step_of_its_own_gets_groups():
    model = nn.Linear(2, 2)
    optimizer = OwnStep(model.parameters(), fused=True)
    layerwise.LayerwiseLR(optimizer, Constant({"*": 2.0}), model)
    train(optimizer)


def test_a_pytorch_that_reads_the_rate_beforehand_is_not_trusted(monkeypatch):
    """What `_fused_adam` of some other version might do: take the number out of the tensor."""
    read = sys.modules["torch.optim.adam"]
    original = read._fused_adam
    monkeypatch.setattr(read, "_fused_adam", lambda *a, lr, **k: original(*a, lr=float(lr), **k))
    fused._hands_on_the_rate.cache_clear()
    try:
        assert not fused.can_be_dealt(optim.Adam([nn.Parameter(torch.ones(2))], fused=True))
        assert fused.can_be_dealt(optim.SGD([nn.Parameter(torch.ones(2))], fused=True))
    finally:
        fused._hands_on_the_rate.cache_clear()


@pytest.mark.parametrize("kind", [optim.SGD, optim.Adam, optim.AdamW, optim.Adagrad])
def test_a_first_step_on_fake_tensors_leaves_the_answer(kind):
    fused._hands_on_the_rate.cache_clear()
    with FakeTensorMode():
        assert fused.can_be_dealt(kind([nn.Parameter(torch.ones(2))], fused=True))
    assert fused.can_be_dealt(kind([nn.Parameter(torch.ones(2))], fused=True))


@pytest.mark.parametrize("error", [RuntimeError, TypeError, ValueError])
def test_a_pytorch_that_refuses_a_tensor_as_rate_is_given_groups(error, monkeypatch):
    """As versions do that take one under `capturable` only: attaching asks once, and the numbers are the same."""
    read = sys.modules["torch.optim.adam"]
    original, refused = read._fused_adam, []

    def refusing(*args, lr, **options):
        if isinstance(lr, Tensor):
            refused.append(lr)
            raise error("lr as a Tensor is not supported for capturable=False")
        return original(*args, lr=lr, **options)

    results = []
    for patched in (False, True):
        with monkeypatch.context() as patch:
            fused._hands_on_the_rate.cache_clear()
            if patched:
                patch.setattr(read, "_fused_adam", refusing)
            _, optimizer, adapter = made("AdamW")
            train(optimizer)
            assert fused.can_be_dealt(optimizer) is not patched
            results.append((everything(optimizer), adapter.get_last_factors()))
    fused._hands_on_the_rate.cache_clear()
    assert len(refused) == 1
    assert all(map(torch.equal, results[0][0], results[1][0]))
    assert results[0][1] == results[1][1]


def test_an_exception_in_the_middle_leaves_the_groups_as_they_were(monkeypatch):
    def broken(group, factor):
        raise KeyboardInterrupt

    _, optimizer, _ = made("AdamW")
    train(optimizer)
    before = [dict(group) for group in optimizer.param_groups]
    with monkeypatch.context() as patch:
        patch.setattr(apply.LearningRate, "_scaled", staticmethod(broken))
        with pytest.raises(KeyboardInterrupt):
            optimizer.step()
    assert optimizer.param_groups == before
    train(optimizer, steps=1)


@pytest.mark.skipif(torch.__version__ < (2, 7), reason="tensors are shared without a broadcast from PyTorch 2.7 on")
def test_only_what_is_shared_alike_is_taken_in_shards():
    """Moments that are whole, as of a checkpoint that was not sharded, are left to PyTorch, which refuses them."""
    from torch import distributed
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor
    from torch.testing._internal.distributed.fake_pg import FakeStore

    distributed.init_process_group("fake", store=FakeStore(), rank=0, world_size=2)
    try:
        mesh = init_device_mesh("cpu", (2,))
        shard = [distribute_tensor(torch.ones(4, 3), mesh, [Shard(0)], src_data_rank=None) for _ in range(3)]
        whole, replicated = (
            torch.ones(4, 3),
            distribute_tensor(torch.ones(4, 3), mesh, [Replicate()], src_data_rank=None),
        )
        count = torch.ones(())
        taken = fused.shards_of([[shard[0]], [shard[1]], [shard[2]], [], [count]])
        assert [[tuple(x.shape) for x in tensors] for tensors in taken] == [[(2, 3)], [(2, 3)], [(2, 3)], [], [()]]
        for other in (whole, replicated):
            lists = [[shard[0]], [shard[1]], [other], [], [count]]
            assert fused.shards_of(lists) is lists
    finally:
        distributed.destroy_process_group()


# --- Steps with fused kernels ---------------------------------------------------------------------------------------


def small() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 4), nn.Linear(4, 2))


MAKERS: dict[str, Any] = {
    "SGD": lambda p, **options: optim.SGD(p, lr=0.05, momentum=0.9, weight_decay=0.1, **options),
    "AdamW": lambda p, **options: optim.AdamW(p, lr=0.05, **options),
}


def attached(optimizer: str, rule: Any, *, fused: bool = True) -> tuple[nn.Module, optim.Optimizer, Any]:
    model = small()
    made_optimizer = MAKERS[optimizer](model.parameters(), fused=fused)
    return model, made_optimizer, layerwise.LayerwiseLR(made_optimizer, rule, model)


class Own(ElementwiseRule):
    """A rule of somebody's own, which raises when a gradient is large."""

    def factor(self, gradient_norm):
        if isinstance(gradient_norm, float) and gradient_norm > 1e3:
            raise ValueError("too large")
        return 1 + gradient_norm


def test_a_rule_of_ones_own_may_raise_before_anything_has_changed():
    model, optimizer, _ = attached("SGD", Own())
    train(optimizer)
    before = [x.clone() for x in everything(optimizer)]
    model[3].weight.grad.fill_(1e6)
    with pytest.raises(ValueError, match="too large"):
        optimizer.step()
    assert all(map(torch.equal, everything(optimizer), before))


def test_a_monitor_sees_the_factors_of_the_step():
    model, optimizer, adapter = attached("AdamW", LayerAdaptive())
    sink = layerwise.sinks.Memory()
    layerwise.Monitor(optimizer, model, every=1, sinks=[sink])
    for _ in range(3):
        train(optimizer, steps=1)
        assert list(sink.records[-1].factor) == pytest.approx(list(adapter.get_last_factors().values()), rel=1e-12)


def test_the_factors_of_a_step_stay_when_gradients_are_gone():
    """A layer that no kernel is called for has factor 1."""
    _, optimizer, adapter = attached("SGD", LayerAdaptive())
    _, alike, reference = attached("SGD", LayerAdaptive(), fused=False)
    for each in (optimizer, alike):
        train(each, steps=2)
        each.param_groups[0]["params"][4].grad = each.param_groups[0]["params"][5].grad = None
        each.step()
        for p in each.param_groups[0]["params"]:
            p.grad = torch.full_like(p, 7.0)
    assert adapter.get_last_factors() == pytest.approx(reference.get_last_factors(), rel=1e-6)
    assert adapter.get_last_factors()["2"] == 1


def test_lazy_modules_are_attached_to_before_they_have_a_size():
    model = nn.Sequential(nn.LazyLinear(4), nn.LazyLinear(2))
    optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    model(torch.ones(3, 5)).sum().backward()
    optimizer.step()
    assert all(factor > 1 for factor in adapter.get_last_factors().values())


@pytest.mark.filterwarnings("ignore:the optimizer's parameters hold no values")
def test_parameters_without_memory_are_attached_to():
    with FakeTensorMode():
        model = small()
        optimizer = optim.SGD(model.parameters(), lr=0.1, fused=True)
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    assert adapter.layers == ["0", "1", "2", "3"]


@pytest.mark.parametrize("rule", [LARC(), LARS()], ids=repr)
def test_a_parameter_that_changes_its_group_takes_the_rate_and_the_decay_there(rule):
    model = small()
    first, *rest = (p for p in model.parameters() if p.ndim > 1)
    optimizer = optim.SGD([{"params": [first, rest[0]]}, {"params": rest[1:], "lr": 1.0, "weight_decay": 0.5}], lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    train(optimizer, steps=1)
    groups = optimizer.param_groups
    groups[1]["params"].insert(0, groups[0]["params"].pop())
    weight = rest[0].detach().double().norm().item()
    generator = torch.Generator().manual_seed(1)
    for p in (first, *rest):
        p.grad = torch.randn(p.shape, generator=generator)
    gradient = rest[0].grad.double().norm().item()
    optimizer.step()
    name = adapter.layers[1]
    expected = rule.factor(gradient, weight, 0.5 * weight, *([1.0] if isinstance(rule, LARC) else []))
    assert adapter.get_last_factors()[name] == pytest.approx(expected, rel=1e-6)
    assert adapter.get_last_lr()[name] == pytest.approx(expected, rel=1e-6)
