"""Parameters without values: on the meta device, or fake tensors, as in estimates of memory."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch._subclasses.fake_tensor import FakeTensorMode

import layerwise
from layerwise.rules import (
    LARS,
    BackMatching,
    Constant,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    LayerDecay,
    Phase,
)

OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9, weight_decay=0.01),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
    "rate 0": lambda parameters: torch.optim.SGD(parameters, lr=0.0),
}
RULES = {
    "Constant": lambda: Constant({"*": 2.0}),
    "LayerDecay": lambda: LayerDecay(0.5),
    "LARS": lambda: LARS(),
    "LayerAdaptive": lambda: LayerAdaptive(),
    "BackMatching": lambda: BackMatching(),
    "directionality": lambda: GradientAmplification(Directionality(), [Phase(1, False), Phase(3, True)]),
}
WHERE = {"meta": lambda: torch.device("meta"), "fake": FakeTensorMode}
WITHOUT_VALUES = pytest.mark.parametrize("where", WHERE)


def make_model():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(4, 3), nn.Linear(3, 2))


def steps(model, optimizer, count=2):
    for _ in range(count):
        for p in model.parameters():
            p.grad = torch.ones_like(p)
        optimizer.step()


@pytest.mark.pairwise
@WITHOUT_VALUES
@pytest.mark.parametrize("optimizer_name", OPTIMIZERS)
@pytest.mark.parametrize(
    ("rule", "apply"),
    [(rule, "auto") for rule in RULES] + [(rule, "lr") for rule in RULES] + [("LARS", "update"), ("LARS", "gradient")],
)
@pytest.mark.filterwarnings("ignore")
def test_an_attached_optimizer_steps_without_values_as_a_bare_one(where, optimizer_name, apply, rule):
    with WHERE[where]():
        model = make_model()
        optimizer = OPTIMIZERS[optimizer_name](model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, RULES[rule](), model, apply=apply)
        for _ in range(2):
            steps(model, optimizer)
            adapter.end_epoch()
        assert set(adapter.get_last_factors().values()) == {1.0}
        adapter.state_dict()
        bare = OPTIMIZERS[optimizer_name](model.parameters())
        steps(model, bare)
        assert list(map(list, bare.state.values())) == list(map(list, optimizer.state.values()))


@WITHOUT_VALUES
def test_attaching_without_values_warns_once_at_the_users_line(where):
    with WHERE[where]():
        model = make_model()
        for attach, consequence in (
            (lambda o: layerwise.LayerwiseLR(o, LayerAdaptive(), model), "factors are 1"),
            (lambda o: layerwise.Monitor(o, model, every=1), "not recorded"),
        ):
            optimizer = OPTIMIZERS["SGD"](model.parameters())
            with pytest.warns(UserWarning, match=f"hold no values.*{consequence}") as caught:
                attached = attach(optimizer)
            assert [warning.filename for warning in caught] == [__file__]
            steps(model, optimizer)
            attached.detach()


@WITHOUT_VALUES
@pytest.mark.filterwarnings("ignore")
def test_a_monitor_counts_steps_without_values_and_records_none(where):
    with WHERE[where]():
        model = make_model()
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        monitor = layerwise.Monitor(optimizer, model, every=1)
        steps(model, optimizer)
        assert monitor.get_last_record() is None
        assert monitor.state_dict() == {"version": 1, "steps": 2}


@WITHOUT_VALUES
@pytest.mark.parametrize("rule", [LARS(), Constant({"*": 2.0}), LayerAdaptive(), None], ids=str)
@pytest.mark.filterwarnings("ignore")
def test_layers_step_in_backward_without_values(where, rule):
    with WHERE[where]():
        model = make_model()
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        handle = layerwise.step_in_backward(optimizer, model, rule)
        for _ in range(2):
            model(torch.ones(2, 4)).sum().backward()
            assert all(p.grad is None for p in model.parameters())
            optimizer.step()
        assert set(handle.get_last_factors().values()) == {1.0}


@WITHOUT_VALUES
@pytest.mark.filterwarnings("ignore")
def test_a_check_for_finite_gradients_passes_without_values(where):
    with WHERE[where]():
        model = make_model()
        optimizer = OPTIMIZERS["SGD"](model.parameters())
        layerwise.LayerwiseLR(optimizer, LARS(), model, on_nonfinite="raise")
        steps(model, optimizer)


@WITHOUT_VALUES
@pytest.mark.filterwarnings("ignore")
def test_diagnose_describes_parameters_without_values(where, capsys):
    with WHERE[where]():
        model = make_model()
        layerwise.diagnose(OPTIMIZERS["AdamW"](model.parameters()), model)
    assert "problems  none found" in capsys.readouterr().out


def test_a_real_model_steps_without_values_while_operations_are_fake():
    model = make_model()
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    monitor = layerwise.Monitor(optimizer, model, every=1)
    steps(model, optimizer, 1)
    factors = adapter.get_last_factors()
    assert min(factors.values()) > 1
    with FakeTensorMode(allow_non_fake_inputs=True):
        with pytest.warns(UserWarning, match="hold no values"):
            optimizer.step()
        assert set(adapter.get_last_factors().values()) == {1.0}
    assert monitor.get_last_record().step == 1


@pytest.mark.parametrize("absent", ["0", "1"])
def test_parameters_on_the_meta_device_are_left_out_beside_real_ones(absent):
    def build(every):
        model = make_model()
        model.get_submodule(absent).to("meta").requires_grad_(False)
        parameters = model.parameters() if every else [p for p in model.parameters() if p.requires_grad]
        return model, torch.optim.SGD(parameters, lr=0.1, momentum=0.9)

    def train(model, optimizer):
        for _ in range(2):
            for p in model.parameters():
                p.grad = torch.ones_like(p) if p.requires_grad else None
            optimizer.step()
        return [p.detach() for p in model.parameters() if p.requires_grad]

    alone, optimizer = build(every=False)
    reference = layerwise.LayerwiseLR(optimizer, LARS(), alone)
    expected, factors = train(alone, optimizer), reference.get_last_factors()
    model, optimizer = build(every=True)
    with pytest.warns(UserWarning, match=rf"hold no values.*{absent}\.weight, {absent}\.bias are in no layer"):
        adapter = layerwise.LayerwiseLR(optimizer, LARS(), model)
    monitor = layerwise.Monitor(optimizer, model, every=1)
    assert all(map(torch.equal, train(model, optimizer), expected))
    assert adapter.get_last_factors() == factors
    record = monitor.get_last_record()
    assert record is not None
    assert absent not in {name[0] for name in record.layers}


@pytest.mark.parametrize("rule", ["Constant", "LayerDecay", "LARS", "LayerAdaptive"])
def test_parameters_that_become_real_get_their_factors(rule):
    real = make_model()
    optimizer = OPTIMIZERS["SGD"](real.parameters())
    reference = layerwise.LayerwiseLR(optimizer, RULES[rule](), real)
    steps(real, optimizer)
    factors = reference.get_last_factors()

    model = make_model().to("meta")
    optimizer = OPTIMIZERS["SGD"](model.parameters())
    with pytest.warns(UserWarning, match="hold no values"):
        adapter = layerwise.LayerwiseLR(optimizer, RULES[rule](), model)
    monitor = layerwise.Monitor(optimizer, model, every=1)
    steps(model, optimizer)
    optimizer.state.clear()
    for p, made in zip(model.parameters(), make_model().parameters(), strict=True):
        torch.utils.swap_tensors(p, made)
    optimizer = rebuilt(optimizer, model)
    steps(model, optimizer)
    assert adapter.get_last_factors() == factors
    assert all(map(torch.equal, model.parameters(), real.parameters()))
    record = monitor.get_last_record()
    assert record is not None
    assert record.step == 4


def rebuilt(optimizer, model):
    """Put a model's parameters, made anew by `to_empty`, into the optimizer."""
    optimizer.param_groups[0]["params"] = list(model.parameters())
    return optimizer


@pytest.mark.parametrize("apply", ["lr", "update", "gradient"])
@pytest.mark.filterwarnings("ignore")
def test_an_imagined_accelerator_takes_steps_and_leaves_records_out(apply):
    with FakeTensorMode():
        named = [(name, nn.Parameter(torch.empty(3, 3, device="cuda"))) for name in ("a.weight", "b.weight")]
        optimizer = torch.optim.SGD(named, lr=0.1, momentum=0.9)
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), apply=apply)
        monitor = layerwise.Monitor(optimizer, every=1)
        for _ in range(2):
            for _, p in named:
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert set(adapter.get_last_factors().values()) == {1.0}
        assert monitor.get_last_record() is None
        assert monitor.steps == 2


@pytest.mark.parametrize("name", ["LayerwiseLR", "Monitor", "step_in_backward"])
@pytest.mark.parametrize("named", [True, False])
def test_an_optimizer_without_parameters_is_refused_by_all_alike(name, named):
    model = make_model()
    optimizer = torch.optim.SGD([{"params": []}], lr=0.1)
    given = model if named else None
    attach = {
        "LayerwiseLR": lambda: layerwise.LayerwiseLR(optimizer, LARS(), given),
        "Monitor": lambda: layerwise.Monitor(optimizer, given),
        "step_in_backward": lambda: layerwise.step_in_backward(optimizer, given, LARS()),
    }[name]
    with pytest.raises(ValueError, match="holds no parameters: attach when its parameter groups have been filled"):
        attach()
    given = model
    optimizer.param_groups[0]["params"].extend(model.parameters())
    attach()


class Plain(torch.optim.Optimizer):
    """An optimizer of another package."""

    def __init__(self, parameters):
        super().__init__(parameters, {"lr": 0.1})

    @torch.no_grad()
    def step(self, closure=None):
        for group in self.param_groups:
            for p in group["params"]:
                p.sub_(p.grad, alpha=group["lr"])


@WITHOUT_VALUES
@pytest.mark.filterwarnings("ignore")
def test_an_optimizer_of_another_package_steps_without_values_and_then_with_them(where):
    for place in (WHERE[where], lambda: torch.device("cpu")):
        with place():
            model = make_model()
            optimizer = Plain(model.parameters())
            adapter = layerwise.LayerwiseLR(optimizer, Constant({"0": 2.0}), model)
            steps(model, optimizer)
    assert adapter.get_last_factors() == {"0": 2.0, "1": 1.0}
    with torch.no_grad():
        before = make_model()
        assert torch.allclose(model[0].bias, before[0].bias - 0.4)
        assert torch.allclose(model[1].bias, before[1].bias - 0.2)
