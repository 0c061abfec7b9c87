"""What a training loop does around a step in backward: closures, hooks, pauses, failures, lifetimes."""

from __future__ import annotations

import gc
import logging
import re
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict
from torch.optim.optimizer import register_optimizer_step_post_hook

import layerwise
from layerwise import adapter as attaching
from layerwise.rules import LARS, LayerAdaptive


class GradientForm(LayerAdaptive):
    """Acts on the gradient without momentum too, where `"lr"` would have to read the rate."""

    default_decay = "plain"


DATA = [torch.randn(6, 4, generator=torch.Generator().manual_seed(seed), dtype=torch.float64) for seed in range(9)]


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_of(model: nn.Module, step: int) -> Tensor:
    return model(DATA[step]).square().sum()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def same(first: Any, second: Any) -> None:
    torch.testing.assert_close(first, second, rtol=0, atol=0)


def momentum(model: nn.Module, **options: Any) -> optim.SGD:
    return optim.SGD(model.parameters(), lr=0.05, momentum=0.9, **options)


@pytest.mark.parametrize("rule", [None, LayerAdaptive()], ids=["none", "LayerAdaptive"])
def test_a_closure_is_called_once_and_steps(rule: Any) -> None:
    results, calls = [], []
    for in_backward in (False, True):
        model = network()
        optimizer = momentum(model)
        if in_backward:
            layerwise.step_in_backward(optimizer, model, rule)
        elif rule is not None:
            layerwise.LayerwiseLR(optimizer, rule, model)
        for step in range(4):

            def closure(step: int = step, model: nn.Module = model, optimizer: Any = optimizer) -> Tensor:
                optimizer.zero_grad()
                loss = loss_of(model, step)
                loss.backward()
                calls.append(step)
                return loss

            loss = optimizer.step(closure)
            assert loss is not None
        results.append([loss, weights(model)])
    same(results[1], results[0])
    assert calls == [0, 1, 2, 3] * 2


def test_other_hooks_run_once_a_step_and_see_the_optimizer() -> None:
    model = network()
    optimizer = momentum(model)
    layerwise.step_in_backward(optimizer, model, LayerAdaptive())
    seen: list[Any] = []
    optimizer.register_step_pre_hook(lambda o, args, kwargs: seen.append(args[0]))
    optimizer.register_step_post_hook(lambda o, args, kwargs: seen.append(args[0]))
    everywhere = register_optimizer_step_post_hook(lambda o, args, kwargs: seen.append(o))
    try:
        loss_of(model, 0).backward()
        assert seen == []
        optimizer.step()
    finally:
        everywhere.remove()
    assert len(seen) == 3
    assert all(one is optimizer for one in seen)


def test_between_layers_the_optimizer_is_unchanged() -> None:
    model = network()
    optimizer = momentum(model)
    groups = optimizer.param_groups
    layerwise.step_in_backward(optimizer, model, LayerAdaptive())
    before = {**groups[0], "params": list(groups[0]["params"])}
    seen: list[bool] = []
    for p in model.parameters():
        p.register_post_accumulate_grad_hook(
            lambda _: seen.append(optimizer.param_groups is groups and groups == [before])
        )
    loss_of(model, 0).backward()
    assert seen == [True] * 4


def test_each_backward_reads_the_rate_that_the_scheduler_has_set() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), lr=1.0)
    handle = layerwise.step_in_backward(optimizer, model)
    scheduler = optim.lr_scheduler.MultiStepLR(optimizer, [1, 2], gamma=0.5)
    rates = []
    for step in range(3):
        loss_of(model, step).backward()
        rates.append(handle.get_last_lr()["0"])
        optimizer.step()  # without it the scheduler warns, and warnings are errors here
        scheduler.step()
    assert rates == [1.0, 0.5, 0.25]


@pytest.mark.parametrize("rule", [None, LayerAdaptive()], ids=["none", "LayerAdaptive"])
def test_gradients_accumulate_where_all_but_the_last_backward_are_paused(rule: Any) -> None:
    results = []
    for in_backward in (False, True):
        model = network()
        optimizer = momentum(model)
        handle: Any = None
        if in_backward:
            handle = layerwise.step_in_backward(optimizer, model, rule)
        elif rule is not None:
            layerwise.LayerwiseLR(optimizer, rule, model)
        for step in range(0, 6, 2):
            optimizer.zero_grad()
            if handle is None:
                loss_of(model, step).backward()
            else:
                with handle.paused():
                    loss_of(model, step).backward()
            loss_of(model, step + 1).backward()
            optimizer.step()
        results.append(weights(model))
    same(results[1], results[0])


@pytest.mark.parametrize("rule", [None, LayerAdaptive()], ids=["none", "LayerAdaptive"])
def test_gradients_kept_by_a_pause_are_clipped_and_step(rule: Any) -> None:
    results = []
    for in_backward in (False, True):
        model = network()
        optimizer = momentum(model)
        handle: Any = None
        if in_backward:
            handle = layerwise.step_in_backward(optimizer, model, rule)
        elif rule is not None:
            handle = layerwise.LayerwiseLR(optimizer, rule, model)
        for step in range(4):
            optimizer.zero_grad()
            if in_backward:
                with handle.paused():
                    loss_of(model, step).backward()
            else:
                loss_of(model, step).backward()
            nn.utils.clip_grad_norm_(model.parameters(), 0.1)
            optimizer.step()
        results.append([weights(model), rule and handle.get_last_factors()])
    same(results[1], results[0])


def test_while_paused_the_optimizer_steps_alone() -> None:
    paused, plain = network(), network()
    optimizers = [momentum(model) for model in (paused, plain)]
    handle = layerwise.step_in_backward(optimizers[0], paused, LayerAdaptive())
    with handle.paused():
        assert repr(handle).endswith("paused)")
        for step in range(3):
            for model, optimizer in zip((paused, plain), optimizers, strict=True):
                optimizer.zero_grad()
                loss_of(model, step).backward()
                optimizer.step()
    same(weights(paused), weights(plain))


def test_clipping_by_value_is_done_by_hooks_on_the_tensors() -> None:
    clipped, in_backward = network(), network()
    optimizers = [momentum(model) for model in (clipped, in_backward)]
    layerwise.step_in_backward(optimizers[1], in_backward)
    for p in in_backward.parameters():
        p.register_hook(lambda gradient: gradient.clamp(-0.1, 0.1))
    for step in range(4):
        optimizers[0].zero_grad()
        loss_of(clipped, step).backward()
        nn.utils.clip_grad_value_(clipped.parameters(), 0.1)
        loss_of(in_backward, step).backward()
        for optimizer in optimizers:
            optimizer.step()
    same(weights(in_backward), weights(clipped))


@pytest.mark.parametrize("in_closure", [False, True])
@pytest.mark.parametrize("rule", [None, LayerAdaptive()], ids=["none", "LayerAdaptive"])
def test_gradients_set_by_hand_step_with_the_rule(rule: Any, in_closure: bool) -> None:
    results = []
    for in_backward in (False, True):
        model = network()
        optimizer = momentum(model)
        if in_backward:
            layerwise.step_in_backward(optimizer, model, rule)
        elif rule is not None:
            layerwise.LayerwiseLR(optimizer, rule, model)
        for step in range(3):

            def put(step: int = step, model: Any = model) -> float:
                parameters = list(model.parameters())
                for p, gradient in zip(parameters, torch.autograd.grad(loss_of(model, step), parameters), strict=True):
                    p.grad = gradient
                return 1.0

            if in_closure:
                optimizer.step(put)
            else:
                put()
                optimizer.step()
        results.append(weights(model))
    same(results[1], results[0])


class Fails(torch.autograd.Function):
    """Raises in its backward."""

    @staticmethod
    def forward(ctx: Any, hidden: Tensor) -> Tensor:
        return hidden.clone()

    @staticmethod
    def backward(ctx: Any, gradient: Tensor) -> Any:
        raise ArithmeticError("half-way")


def test_training_goes_on_after_a_backward_that_fails_half_way(caplog: Any) -> None:
    model, expected = network(), network()
    optimizer = optim.SGD(model.parameters(), lr=0.05)
    layerwise.step_in_backward(optimizer, model, LayerAdaptive())
    before = weights(model)
    with pytest.raises(ArithmeticError, match="half-way"):
        model[2](torch.tanh(Fails.apply(model[0](DATA[0])))).square().sum().backward()
    assert torch.equal(model[0].weight, before[0])
    assert not torch.equal(model[2].weight, before[2])
    expected.load_state_dict(model.state_dict())
    with caplog.at_level(logging.WARNING, "layerwise"):
        loss_of(model, 1).backward()
    assert "failed half-way" in caplog.text
    optimizer.step()
    reference = optim.SGD(expected.parameters(), lr=0.05)
    layerwise.LayerwiseLR(reference, LayerAdaptive(), expected)
    loss_of(expected, 1).backward()
    reference.step()
    same(weights(model), weights(expected))


@pytest.mark.parametrize("form", [{}, {"fused": True}], ids=str)
def test_detaching_leaves_the_optimizer_as_it_was(form: dict[str, bool]) -> None:
    model, plain = network(), network()
    optimizers = [momentum(model, **form), momentum(plain, **form)]
    before = dict(vars(optimizers[0]))
    handle = layerwise.step_in_backward(optimizers[0], model)
    for step in range(4):
        if step == 2:
            handle.detach()
            handle.detach()
            assert vars(optimizers[0]) == before
            assert not optimizers[0]._optimizer_step_pre_hooks
            assert not optimizers[0]._optimizer_step_post_hooks
            assert not any(p._post_accumulate_grad_hooks for p in model.parameters())
            assert repr(handle) == "StepInBackward(detached, 2 layers)"
        for net, optimizer in zip((model, plain), optimizers, strict=True):
            optimizer.zero_grad()
            loss_of(net, step).backward()
            optimizer.step()
    same(weights(model), weights(plain))
    same(optimizers[0].state_dict()["state"], optimizers[1].state_dict()["state"])


def test_it_lives_as_long_as_the_optimizer_and_no_longer() -> None:
    model = network()
    optimizer = momentum(model)
    handle = weakref.ref(layerwise.step_in_backward(optimizer, model, LayerAdaptive()))
    loss_of(model, 0).backward()
    assert model[0].bias.grad is None
    optimizer.step()
    assert handle() is not None
    gc.disable()
    try:
        del optimizer
        assert handle() is None
    finally:
        gc.enable()
    loss_of(model, 1).backward()
    assert model[0].bias.grad is not None


def test_a_handle_whose_optimizer_is_gone_does_nothing() -> None:
    model = network()
    optimizer = momentum(model)
    handle = layerwise.step_in_backward(optimizer, model, LayerAdaptive())
    del optimizer
    loss_of(model, 0).backward()
    assert model[0].bias.grad is not None
    with pytest.raises(RuntimeError, match="no longer exists"):
        handle.get_last_lr()
    handle.detach()
    assert handle.get_last_lr() == {"0": 0.05, "2": 0.05}


def test_detaching_during_backward_leaves_the_remaining_gradients() -> None:
    model = network()
    model[0].bias.register_post_accumulate_grad_hook(lambda _: handle.detach())
    optimizer = momentum(model)
    handle = layerwise.step_in_backward(optimizer, model)
    loss_of(model, 0).backward()
    assert [p.grad is None for p in model.parameters()] == [False, False, True, True]


def test_a_model_on_another_device_is_resolved_again() -> None:
    model = network()
    optimizer = momentum(model)
    handle = layerwise.step_in_backward(optimizer, model, LayerAdaptive())
    handle._found.statistics.device = torch.device("meta")
    loss_of(model, 0).backward()
    assert handle._found.statistics.device == torch.device("cpu")


@pytest.mark.parametrize("group", [0, 1])
def test_a_parameter_that_has_left_the_optimizer_keeps_its_gradient(group: int) -> None:
    model, plain = network(), network()
    for net in (model, plain):
        optimizer = optim.SGD([{"params": net[0].parameters()}, {"params": net[2].parameters()}], lr=0.1)
        if net is model:
            layerwise.step_in_backward(optimizer, net)
        loss_of(net, 0).backward()
        optimizer.step()
        optimizer.zero_grad()
        del optimizer.param_groups[group]
        for step in (1, 2):
            loss_of(net, step).backward()
            optimizer.step()
            optimizer.zero_grad()
    same(weights(model), weights(plain))
    same([p.grad for p in model[2 * group].parameters()], [p.grad for p in plain[2 * group].parameters()])


@pytest.mark.parametrize("few", [True, False], ids=["numbers", "tensors"])
def test_factors_under_a_manual_grad_scale_use_true_gradients(few: bool, monkeypatch) -> None:
    if not few:
        monkeypatch.setattr(attaching, "MOST_NUMBERS", 0)
    model, plain = network(), network()
    for net in (model, plain):
        optimizer = momentum(net, fused=True)
        if net is model:
            layerwise.step_in_backward(optimizer, net, LayerAdaptive())
            optimizer.grad_scale = torch.tensor(64.0)
        else:
            layerwise.LayerwiseLR(optimizer, LayerAdaptive(), net)
        for step in range(3):
            ((64 if net is model else 1) * loss_of(net, step)).backward()
            optimizer.step()
            optimizer.zero_grad()
    same(weights(model), weights(plain))


def test_two_optimizers_of_one_network_each_step_their_own_layers() -> None:
    model, plain = network(), network()
    for net in (model, plain):
        optimizers = [optim.SGD(net[0].parameters(), lr=0.1), optim.AdamW(net[2].parameters(), lr=0.1)]
        if net is model:
            for optimizer in optimizers:
                layerwise.step_in_backward(optimizer, net)
        for step in range(3):
            loss_of(net, step).backward()
            for optimizer in optimizers:
                optimizer.step()
                optimizer.zero_grad()
    same(weights(model), weights(plain))


def test_the_zero_rate_step_of_distributed_checkpoints_changes_nothing() -> None:
    model = network()
    optimizer = optim.AdamW(model.parameters())
    layerwise.step_in_backward(optimizer, model, LayerAdaptive())
    before = weights(model)
    assert get_optimizer_state_dict(model, optimizer)["state"]
    same(weights(model), before)


def test_parameters_in_no_layer_are_logged_with_a_rule(caplog: Any) -> None:
    model = network()
    other = nn.Parameter(torch.ones(1))
    with caplog.at_level(logging.WARNING, "layerwise"):
        optimizer = optim.SGD([*model.parameters(), other])
        handle = layerwise.step_in_backward(optimizer, model, LARS())
    assert "1 of the optimizer's 5 parameters are in no layer" in caplog.text
    assert repr(handle) == (
        "StepInBackward(LARS(trust_coefficient=0.001, eps=1e-08) on SGD, 4 layers, apply='lr', 2 excluded, 1 parameters"
        " in no layer)"
    )


def test_the_repr_names_where_the_factor_acts() -> None:
    model = network()
    optimizer = momentum(model)
    assert repr(layerwise.step_in_backward(optimizer, model, LayerAdaptive())) == (
        "StepInBackward(LayerAdaptive(log_base=2.718281828459045) on SGD, 2 layers, apply='gradient', decay='scaled')"
    )


def test_a_weight_that_is_needed_further_down_makes_autograd_raise() -> None:
    weight = nn.Parameter(torch.eye(4))
    below = nn.Parameter(torch.ones(2, 4))
    optimizer = optim.SGD([weight, below], lr=0.1)
    layerwise.step_in_backward(optimizer, nn.ParameterDict({"weight": weight}))
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        ((below @ weight.detach()) @ weight).sum().backward()


def test_the_programs_of_its_page_run() -> None:
    page = (Path(__file__).parents[2] / "docs" / "step-in-backward.md").read_text(encoding="utf-8")
    namespace: dict[str, Any] = {}
    for block in re.findall(r"```python\n(.*?)```", page, re.S):
        exec(block, namespace)
    optimizer = optim.SGD(namespace["model"].parameters())
    with pytest.raises(ValueError, match="step in backward already"):
        layerwise.step_in_backward(optimizer, namespace["model"])
    namespace["handle"].detach()
    layerwise.step_in_backward(optimizer, namespace["model"], namespace["ByWeight"]())


@pytest.mark.parametrize("momentum", [0.0, 0.9])
def test_no_value_is_read_from_a_cuda_device_by_sgd(momentum: float) -> None:
    """Fake tensors, of which none can be; with gradients put there, since no backward runs on them."""
    with FakeTensorMode():
        shapes = {"a.weight": (6, 5), "a.bias": (6,), "b.weight": (4, 6)}
        named = [(name, nn.Parameter(torch.empty(shape, device="cuda"))) for name, shape in shapes.items()]
        optimizer = optim.SGD(named, lr=0.1, momentum=momentum, weight_decay=0.1)
        layerwise.step_in_backward(optimizer, None, GradientForm())
        for _ in range(3):
            for _, p in named:
                p.grad = torch.empty_like(p)
            optimizer.step()
            assert all(p.grad is None for _, p in named)
