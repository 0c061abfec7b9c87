"""What stepping in backward refuses before any weight changes."""

from __future__ import annotations

import copy
import pickle
import re
from collections.abc import Iterator
from datetime import timedelta
from functools import partial
from typing import Any

import pytest
import torch
from torch import Tensor, distributed, nn, optim
from torch.utils.checkpoint import checkpoint

import layerwise
from layerwise.rules import (
    BackMatching,
    Constant,
    Directionality,
    ElementwiseRule,
    GradientAmplification,
    LayerAdaptive,
    Rule,
    ShuffledLayers,
    bounds,
    chain,
)
from rule_cases import RULES
from rules.samples import layers_of, one_group
from rules.samples import network as random_network
from rules.test_every_rule import NAMES


def network() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 5), nn.Tanh(), nn.Linear(5, 3)).double()


def loss_of(model: nn.Module) -> Tensor:
    return model(torch.ones(2, 4, dtype=torch.float64)).square().sum()


def weights(model: nn.Module) -> list[Tensor]:
    return [p.detach().clone() for p in model.parameters()]


def assert_untouched(optimizer: optim.Optimizer, before: list[Tensor]) -> None:
    parameters = [p for group in optimizer.param_groups for p in group["params"]]
    torch.testing.assert_close([p.detach() for p in parameters], before, rtol=0, atol=0)
    assert not optimizer.state
    assert all(p.grad is None for p in parameters)


class OwnStep(optim.SGD):
    """An SGD whose step is its own."""

    def step(self, closure: Any = None) -> None:
        super().step(closure)


class OwnDefaults(optim.SGD):
    """An SGD with another default, whose step is torch's."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, lr=0.5)


@pytest.mark.parametrize(
    "make", [optim.RMSprop, optim.Rprop, optim.LBFGS, OwnStep, optim.Adafactor], ids=lambda c: c.__name__
)
def test_optimizers_with_another_step_are_refused(make: Any) -> None:
    model = network()
    with pytest.raises(ValueError, match=rf"optimizer={make.__name__}: .* SGD, Adagrad, Adam and AdamW"):
        layerwise.step_in_backward(make(model.parameters()), model)
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


def test_a_subclass_with_torchs_step_is_taken() -> None:
    model = network()
    optimizer = OwnDefaults(model.parameters())
    layerwise.step_in_backward(optimizer, model)
    loss_of(model).backward()
    assert model[0].weight.grad is None


@pytest.mark.parametrize("option", ["capturable", "differentiable"])
def test_options_that_keep_gradients_are_refused(option: str) -> None:
    model = network()
    with pytest.raises(ValueError, match=rf"Adam\({option}=True\).* use {option}=False"):
        layerwise.step_in_backward(optim.Adam(model.parameters(), **{option: True}), model)


def test_gradients_present_are_refused() -> None:
    model = network()
    loss_of(model).backward()
    model[0].bias.grad = None
    with pytest.raises(ValueError, match=r"3 of 4 parameters hold a gradient already.*zero_grad\(\) first"):
        layerwise.step_in_backward(optim.SGD(model.parameters()), model)


def test_arguments_of_the_wrong_type_are_refused() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters())
    with pytest.raises(TypeError, match=r"no torch\.optim\.Optimizer"):
        layerwise.step_in_backward(model, optimizer)
    with pytest.raises(TypeError, match="model must be a torch"):
        layerwise.step_in_backward(optimizer, LayerAdaptive())
    with pytest.raises(TypeError, match=r"LayerAdaptive is a class; call it"):
        layerwise.step_in_backward(optimizer, model, LayerAdaptive)
    with pytest.raises(ValueError, match="have no names"):
        layerwise.step_in_backward(optimizer, None)
    with pytest.raises(ValueError, match="matches none"):
        layerwise.step_in_backward(optimizer, model, Constant({"head": 2.0}))
    assert not any(p._post_accumulate_grad_hooks for p in model.parameters())


class Mean(Rule):
    """Needs the other layers, and does not declare `own_layer`."""

    def factors(self, statistics: Any, state: Any) -> Any:
        return statistics.gradient_norm / statistics.gradient_norm.mean(), state


class Mixed(ElementwiseRule):
    """An elementwise rule whose factors are no longer its φ."""

    def factor(self, gradient_norm: Any) -> Any:
        return gradient_norm

    def factors(self, statistics: Any, state: Any) -> Any:
        return statistics.gradient_norm.flip(0), state


class Counting(ElementwiseRule):
    """Needs `counts`, which depends on all layers."""

    needs = ("gradient_norm", "counts")

    def factor(self, gradient_norm: Any, counts: Any) -> Any:
        return gradient_norm


@pytest.mark.parametrize(
    ("make", "reason"),
    [
        (lambda: Mean(), "does not say own_layer = True"),
        (lambda: Mixed(), "does not say own_layer = True"),
        (lambda: chain(LayerAdaptive(), BackMatching()), "does not say own_layer = True"),
        (lambda: bounds(Mean(), 0.0, 2.0), "does not say own_layer = True"),
        (lambda: Counting(), "counts the steps whose gradients are finite in every layer"),
        (
            lambda: GradientAmplification(ShuffledLayers(Directionality())),
            "compares the gradients of all layers",
        ),
        *((partial(case.make, ["0", "2"]), case.refused) for case in RULES.values() if case.refused),
    ],
)
def test_rules_that_need_other_layers_are_refused(make: Any, reason: str) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters())
    with pytest.raises(ValueError, match=rf"cannot step in backward: it {reason}.* use LayerwiseLR"):
        layerwise.step_in_backward(optimizer, model, make())
    loss_of(model).backward()
    assert model[0].weight.grad is not None


@pytest.mark.parametrize("name", RULES)
def test_rules_declare_own_layer_truthfully(name: str) -> None:
    """Other gradients and weights in one layer change no other layer's factor, if the rule says so."""
    rule = RULES[name].make(NAMES)
    assert rule.needs_own_layer_only() == (not RULES[name].refused)
    if RULES[name].refused:
        return
    model = random_network(0)
    layers = layers_of(model)
    statistics = layerwise.statistics.LayerStatistics(layers, rule.needs)
    state = rule.init(layers, torch.device("cpu"))
    groups = one_group(model, weight_decay=0.01)
    before = rule.factors(statistics.compute(groups), state)[0].clone()
    for number, layer in enumerate(layers):
        for p in layer.parameters:
            p.data *= 3
            p.grad *= 0.1
        after = rule.factors(statistics.compute(groups), state)[0].clone()
        others = torch.arange(len(layers)) != number
        assert torch.equal(after[others], before[others])
        before = after


def test_a_second_backward_before_the_step_changes_nothing() -> None:
    model, expected = network(), network()
    optimizers = [optim.SGD(net.parameters(), lr=0.1, momentum=0.9) for net in (model, expected)]
    layerwise.step_in_backward(optimizers[0], model)
    loss_of(model).backward()
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"second backward\(\) before optimizer\.step\(\).*handle\.paused\(\)"):
        loss_of(model).backward()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert all(p.grad is None for p in model.parameters())
    optimizers[0].step()
    loss_of(model).backward()  # and training goes on
    for _ in range(2):
        optimizers[1].zero_grad()
        loss_of(expected).backward()
        optimizers[1].step()
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0)


def test_reentrant_checkpoints_are_refused() -> None:
    model = nn.Sequential(*(nn.Linear(4, 4) for _ in range(3)))
    optimizer = optim.SGD(model.parameters())
    layerwise.step_in_backward(optimizer, model)
    hidden = torch.ones(2, 4, requires_grad=True)
    for layer in model:
        hidden = checkpoint(layer, hidden, use_reentrant=True)
    with pytest.raises(RuntimeError, match="use_reentrant=False"):
        hidden.sum().backward()


class Twice(nn.Module):
    """A weight that is used in a reentrant checkpoint and above it."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.layer, self.head = nn.Linear(4, 4).double(), nn.Linear(4, 4).double()

    def forward(self, inputs: Tensor, *, recompute: bool = True) -> Tensor:
        def block(x: Tensor) -> Tensor:
            return torch.tanh(self.layer(x))

        hidden = checkpoint(block, inputs, use_reentrant=True) if recompute else block(inputs)
        return self.head(self.layer(hidden))


def test_a_reentrant_checkpoint_below_layers_that_have_stepped() -> None:
    """The weight has stepped with a part of its gradient."""
    model = Twice()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    layerwise.step_in_backward(optimizer, model)
    inputs = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
    with pytest.raises(RuntimeError, match=r"a backward\(\) inside another one.*Use use_reentrant=False"):
        model(inputs).sum().backward()
    assert all(p.grad is None for p in model.parameters())
    before, gradients = weights(model), torch.autograd.grad(model(inputs, recompute=False).sum(), [*model.parameters()])
    history = [optimizer.state[p]["momentum_buffer"].clone() for p in model.parameters()]
    model(inputs, recompute=False).sum().backward()  # and training goes on
    expected = [p - 0.1 * (0.9 * v + g) for p, v, g in zip(before, history, gradients, strict=True)]
    torch.testing.assert_close(weights(model), expected)


def test_a_network_that_is_one_reentrant_checkpoint_steps() -> None:
    model, expected = network(), network()
    for net in (model, expected):
        optimizer = optim.SGD(net.parameters(), lr=0.1, momentum=0.9)
        if net is model:
            layerwise.step_in_backward(optimizer, net)
        for _ in range(2):
            inputs = torch.ones(2, 4, dtype=torch.float64, requires_grad=True)
            output = checkpoint(net, inputs, use_reentrant=True) if net is model else net(inputs)
            output.sum().backward()
            assert (net[0].weight.grad is None) == (net is model)
            optimizer.step()
            optimizer.zero_grad()
    torch.testing.assert_close(weights(model), weights(expected), rtol=0, atol=0)


# torch's compiler imports what torch itself has deprecated, and looks at gradients that are not there.
@pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning")
@pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning")
def test_compiled_autograd_is_refused() -> None:
    from torch._dynamo import compiled_autograd

    model = network()
    optimizer = optim.SGD(model.parameters(), momentum=0.9)
    layerwise.step_in_backward(optimizer, model)
    before, loss = weights(model), loss_of(model)
    with (
        pytest.raises(RuntimeError, match=r"compiled autograd runs this backward.*no weight has changed"),
        compiled_autograd._enable(torch.compile(backend="eager")),
    ):
        loss.backward()
    torch._dynamo.reset()
    torch.testing.assert_close(weights(model), before, rtol=0, atol=0)
    assert not optimizer.state


def test_a_copy_of_the_handle_is_none() -> None:
    model = network()
    handle = layerwise.step_in_backward(optim.SGD(model.parameters()), model)
    with pytest.warns(UserWarning, match=r"belongs to one optimizer.* call step_in_backward with the copy's"):
        assert copy.deepcopy(handle) is None
    assert copy.copy(handle) is None
    assert pickle.loads(pickle.dumps(handle)) is None


@pytest.mark.filterwarnings("ignore:Using backward.. with create_graph=True")
def test_create_graph_is_refused() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), momentum=0.9)
    layerwise.step_in_backward(optimizer, model)
    before = weights(model)
    with pytest.raises(RuntimeError, match="create_graph=True"):
        loss_of(model).backward(create_graph=True)
    assert_untouched(optimizer, before)


@pytest.mark.parametrize("form", [{}, {"fused": True}], ids=str)
def test_a_gradient_scaler_is_seen_before_the_first_weight_moves(form: dict[str, bool]) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), momentum=0.9, **form)
    layerwise.step_in_backward(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    before = weights(model)
    with pytest.raises(RuntimeError, match=r"a GradScaler has scaled this loss.* No weight has changed"):
        scaler.scale(loss_of(model)).backward()
    assert_untouched(optimizer, before)
    with pytest.raises(RuntimeError, match=r"a GradScaler.*bfloat16"):
        scaler.step(optimizer)


def test_a_gradient_scaler_among_several_losses_is_seen_too() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), momentum=0.9)
    layerwise.step_in_backward(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    before = weights(model)
    with pytest.raises(RuntimeError, match="a GradScaler has scaled this loss"):
        torch.autograd.backward([loss_of(model), *scaler.scale([loss_of(model)])])
    assert_untouched(optimizer, before)


@pytest.mark.parametrize("form", [{}, {"fused": True}], ids=str)
def test_a_hidden_gradient_scaler_is_refused_at_its_step(form: dict[str, bool]) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters(), **form)
    layerwise.step_in_backward(optimizer, model)
    scaler = torch.amp.GradScaler("cpu")
    (scaler.scale(loss_of(model)) + 0.0).backward()
    with pytest.raises(RuntimeError, match=r"a GradScaler.* the weights have moved"):
        scaler.step(optimizer)


@pytest.mark.parametrize("scaler", ["unused", "not_enabled", "of_another_loss"])
def test_a_gradient_scaler_of_another_loss_is_allowed(scaler: str) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters())
    layerwise.step_in_backward(optimizer, model)
    one = torch.amp.GradScaler("cpu", enabled=scaler != "not_enabled")
    if scaler == "of_another_loss":
        one.scale(torch.ones(1))
        (loss_of(model) * loss_of(model)).backward()
    elif scaler == "unused":
        (2.0 * loss_of(model)).backward()
    else:
        one.scale(2.0 * loss_of(model)).backward()
        one.step(optimizer)
        one.update()
    assert model[0].weight.grad is None


ATTACHMENTS = {"adapter": lambda o, m: layerwise.LayerwiseLR(o, LayerAdaptive(), m), "monitor": layerwise.Monitor}


@pytest.mark.parametrize("later", [False, True])
@pytest.mark.parametrize("attach", ATTACHMENTS.values(), ids=ATTACHMENTS)
def test_another_attachment_to_the_same_optimizer_is_refused(attach: Any, later: bool) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters())
    before = weights(model)
    if later:
        layerwise.step_in_backward(optimizer, model)
        attached = attach(optimizer, model)
        with pytest.raises(RuntimeError, match="a LayerwiseLR or a monitor is attached"):
            loss_of(model).backward()
    else:
        attached = attach(optimizer, model)
        with pytest.raises(ValueError, match="a LayerwiseLR or a monitor is attached"):
            layerwise.step_in_backward(optimizer, model)
    assert_untouched(optimizer, before)
    attached.detach()
    if not later:
        layerwise.step_in_backward(optimizer, model)
    loss_of(model).backward()
    assert weights(model)[0].ne(before[0]).any()


def test_the_same_parameters_twice_are_refused() -> None:
    model = network()
    optimizer = optim.SGD(model.parameters())
    first = layerwise.step_in_backward(optimizer, model)
    for second in (optimizer, optim.AdamW(model[2].parameters())):
        with pytest.raises(ValueError, match=r"step in backward already: call detach\(\)"):
            layerwise.step_in_backward(second, model)
    first.detach()
    layerwise.step_in_backward(optimizer, model)


@pytest.fixture
def process_group() -> Iterator[None]:
    """A group of this process alone."""
    distributed.init_process_group(
        "gloo", store=distributed.HashStore(), rank=0, world_size=1, timeout=timedelta(seconds=20)
    )
    yield
    distributed.destroy_process_group()


@pytest.mark.usefixtures("process_group")
@pytest.mark.parametrize("order", ["wrapper", "module", "wrapped_later"])
def test_data_parallel_wrappers_are_refused(order: str) -> None:
    model = network()
    optimizer = optim.SGD(model.parameters())
    before = weights(model)
    message = re.escape("belong to a DistributedDataParallel")
    if order == "wrapped_later":
        layerwise.step_in_backward(optimizer, model)
        wrapper = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match=message):
            loss_of(wrapper).backward()
    else:
        wrapper = nn.parallel.DistributedDataParallel(model)
        with pytest.raises(ValueError, match=message):
            layerwise.step_in_backward(optimizer, wrapper if order == "wrapper" else model)
    assert_untouched(optimizer, before)


@pytest.mark.usefixtures("process_group")
def test_other_networks_may_be_data_parallel() -> None:
    model, other = network(), nn.parallel.DistributedDataParallel(network())
    optimizer = optim.SGD(model.parameters())
    layerwise.step_in_backward(optimizer, model)
    loss_of(model).backward()
    assert model[0].weight.grad is None
    assert len(list(other.parameters())) == 4


@pytest.mark.usefixtures("process_group")
def test_sharded_parameters_are_refused() -> None:
    from torch.distributed.fsdp import fully_shard

    model = network()
    fully_shard(model, mesh=distributed.init_device_mesh("cpu", (1,)))
    with pytest.raises(ValueError, match=r"sharded parameters \(DTensor\)"):
        layerwise.step_in_backward(optim.SGD(model.parameters()), model)


@pytest.mark.usefixtures("process_group")
@pytest.mark.filterwarnings("ignore:FSDP is switching to use `NO_SHARD`:UserWarning")
@pytest.mark.parametrize("use_orig_params", [False, True])
def test_parameters_of_fsdp1_are_refused(use_orig_params: bool) -> None:
    from torch.distributed.fsdp import FullyShardedDataParallel

    model = FullyShardedDataParallel(network(), device_id=torch.device("cpu"), use_orig_params=use_orig_params)
    optimizer = optim.SGD(model.parameters())
    before = weights(model)
    with pytest.raises(ValueError, match="FullyShardedDataParallel"):
        layerwise.step_in_backward(optimizer, model)
    assert_untouched(optimizer, before)


class Returning(Rule):
    """Returns a given result, with or without statistics."""

    own_layer = True

    def __init__(self, result: Any, needs: tuple[str, ...]) -> None:
        self.result, self.needs = result, needs

    def factors(self, statistics: Any, state: Any) -> Any:
        return self.result


@pytest.mark.parametrize("needs", [(), ("gradient_norm",)], ids=["needs nothing", "needs a norm"])
@pytest.mark.parametrize(
    "result",
    [torch.ones(2), (torch.ones(2),), (torch.ones(3), {}), (torch.ones(()), {}), ([1.0, 1.0], {}), None],
    ids=["no state", "alone", "too many", "no dimension", "a list", "None"],
)
def test_a_rule_with_wrong_factors_raises_before_weights_change(result: Any, needs: tuple[str, ...]) -> None:
    model = network()
    before = copy.deepcopy(model.state_dict())
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    layerwise.step_in_backward(optimizer, model, Returning(result, needs))
    with pytest.raises(TypeError, match=re.escape("factors must return (factors, state), factors of shape [2]")):
        model(torch.ones(3, 4, dtype=torch.float64)).sum().backward()
    assert all(torch.equal(p, before[name]) for name, p in model.named_parameters())
