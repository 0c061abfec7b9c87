"""Basodi et al. 2020 and 2023: the schedule, the choice, and what amplification does to a step."""

from __future__ import annotations

import copy
import io
import logging
import math
import re
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode, unset_fake_temporarily

import layerwise
import reference
from layerwise.rules import (
    PARAMS_1,
    PARAMS_2,
    AllLayers,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    LayerFreezing,
    Phase,
    RandomLayers,
    ShuffledLayers,
    bounds,
    chain,
)

SHORT = [Phase(1, False), Phase(4, True), Phase(6, True, 3.0), Phase(7, False)]
STEPS = 5


def network(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    generator = torch.Generator().manual_seed(0)
    layers = [
        nn.Conv2d(1, 3, 3),
        nn.BatchNorm2d(3),
        nn.Conv2d(3, 4, 3),
        nn.Flatten(),
        nn.Linear(16, 5),
        nn.Linear(5, 2),
    ]
    model = nn.Sequential(*layers).to(dtype)
    for p in model.parameters():
        p.data = 0.3 * torch.randn(p.shape, generator=generator, dtype=torch.float64).to(dtype)
    return model


def batch(epoch: int, step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    generator = torch.Generator().manual_seed(100 * epoch + step)
    return torch.randn(6, 1, 6, 6, generator=generator, dtype=torch.float64).to(dtype)


def sgd(model: nn.Module, **options: Any) -> torch.optim.SGD:
    return torch.optim.SGD(model.parameters(), **{"lr": 0.01, "momentum": 0.9, "weight_decay": 0.05, **options})


def backward(model: nn.Module, images: Tensor) -> None:
    model.zero_grad()
    model(images).square().sum(1).mean().backward()


def train(model: nn.Module, optimizer: Any, adapter: Any, epochs: range, steps: int = STEPS) -> list[dict[str, float]]:
    """Train, and return the factors of each epoch, which are those of each of its steps."""
    seen = []
    for epoch in epochs:
        factors = []
        for step in range(steps):
            backward(model, batch(epoch, step))
            optimizer.step()
            factors.append(adapter.get_last_factors())
        assert all(one == factors[0] for one in factors)
        seen.append(factors[0])
        adapter.end_epoch()
    return seen


def weights(model: nn.Module) -> list[Tensor]:
    return [x.detach().clone() for x in model.state_dict().values()]


def assert_same_bits(first: list[Tensor], second: list[Tensor]) -> None:
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


# --- The schedule -----------------------------------------------------------------------------------------------------

TABLE = {
    "PARAMS_1": (PARAMS_1, {51, 101}, {*range(52, 101), *range(102, 131)}),
    "PARAMS_2": (PARAMS_2, {11, 101}, {*range(12, 101), *range(102, 146)}),
}


@pytest.mark.parametrize(("phases", "analysis", "amplified"), TABLE.values(), ids=TABLE)
def test_the_papers_phases_give_the_papers_epochs(phases: Any, analysis: set[int], amplified: set[int]) -> None:
    rule = GradientAmplification(Directionality(), phases)
    epochs = range(1, 151)
    assert {epoch for epoch in epochs if rule.analysed(epoch)} == analysis
    assert {epoch for epoch in epochs if rule.amplified(epoch)} == amplified
    plain = [(phase.until, phase.amplify, phase.factor) for phase in phases]
    names = ["analysis" if rule.analysed(e) else "amplified" if rule.amplified(e) else "plain" for e in epochs]
    assert names == [name for name, _ in reference.schedule(plain, 150)]


@pytest.mark.parametrize(("phases", "analysis", "amplified"), TABLE.values(), ids=TABLE)
def test_an_attached_rule_follows_the_papers_epochs(phases: Any, analysis: set[int], amplified: set[int]) -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    optimizer = sgd(model, lr=1e-6)
    rule = GradientAmplification(Directionality(threshold=0.1, sides="both"), phases)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    for epoch in range(1, 153):
        assert adapter.epoch == epoch
        for step in range(2):
            generator = torch.Generator().manual_seed(epoch + 1000 * step)
            for p in model.parameters():
                p.grad = torch.randn(p.shape, generator=generator)
            optimizer.step()
            assert bool(adapter._attached.state["sums"]) == (epoch in analysis)
        assert set(adapter.get_last_factors().values()) == ({2.0} if epoch in amplified else {1.0})
        adapter.end_epoch()
        assert not adapter._attached.state["sums"]


@pytest.mark.parametrize(
    ("every", "measured"), [(1, {2, 3, 4, 5, 6, 7}), (2, {2, 3, 5, 7}), (3, {2, 4, 7}), (None, {2})]
)
def test_a_renewed_choice_is_measured_in_the_epoch_before_it(every: int | None, measured: set[int]) -> None:
    rule = GradientAmplification(Directionality(reselect=every), [Phase(1, False), Phase(8, True)])
    assert {epoch for epoch in range(1, 12) if rule.analysed(epoch)} == measured
    assert {epoch for epoch in range(1, 12) if rule.amplified(epoch)} == set(range(3, 9))


def test_random_layers_are_amplified_from_the_first_epoch_of_a_phase_unless_they_wait() -> None:
    for waits, first in ((False, {2, 3, 4, 5, 6}), (True, {3, 4, 6})):
        rule = GradientAmplification(RandomLayers(0.5, after_analysis=waits), SHORT)
        assert {epoch for epoch in range(1, 9) if rule.amplified(epoch)} == first
        assert not any(rule.analysed(epoch) for epoch in range(1, 9))


# --- The choice -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("measure", ["G", "G_prime"])
@pytest.mark.parametrize("sides", ["upper", "both"])
def test_the_choice_is_that_of_the_reference(dtype: torch.dtype, measure: Any, sides: Any) -> None:
    model = network(dtype)
    optimizer = sgd(model)
    rule = GradientAmplification(Directionality(measure, threshold=0.6, sides=sides), SHORT)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    for epoch in range(1, 8):
        steps = []
        for step in range(STEPS):
            backward(model, batch(epoch, step, dtype))
            steps.append(
                [[p.grad.double().numpy().copy() for p in layer.parameters] for layer in adapter.layer_table()]
            )
            optimizer.step()
        adapter.end_epoch()
        if epoch in (2, 5):
            values = reference.directionality(steps, measure)
            z = reference.z_scores(values)
            found = adapter.get_last_selection()
            assert list(found) == adapter.layers
            np.testing.assert_allclose([one.value for one in found.values()], values, rtol=1e-6)
            np.testing.assert_allclose([one.z for one in found.values()], z, rtol=1e-4, atol=1e-5)
            assert [one.selected for one in found.values()] == reference.chosen(z, 0.6, sides).tolist()


def test_before_anything_is_measured_nothing_is_known() -> None:
    model = network()
    optimizer, alone = sgd(model), sgd(model)
    adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(Directionality(), SHORT), model)
    for value, z, selected in adapter.get_last_selection().values():
        assert math.isnan(value)
        assert math.isnan(z)
        assert selected is False
    plain = layerwise.LayerwiseLR(alone, LayerAdaptive(), model)
    with pytest.raises(ValueError, match="chooses no layers; attach a rule that does, such as GradientAmplification"):
        plain.get_last_selection()


def test_who_forgets_the_ends_of_epochs_is_told_once_when_asking_for_the_choice(caplog: Any) -> None:
    def told(selection: Any, phases: Any, ends: int = 0) -> int:
        model = network()
        optimizer = sgd(model)
        adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(selection, phases), model)
        caplog.clear()
        adapter.get_last_selection()
        assert not caplog.messages  # no step yet
        backward(model, batch(1, 1))
        optimizer.step()
        for _ in range(ends):
            adapter.end_epoch()
        for _ in range(2):
            adapter.get_last_selection()
        return sum("no epoch has ended: call end_epoch()" in message for message in caplog.messages)

    assert told(Directionality(), SHORT) == 1
    assert told(RandomLayers(0.5), SHORT) == 1
    assert told(RandomLayers(1.0), [Phase(2, True)]) == 0  # chosen from the start
    assert told(Directionality(), SHORT, ends=1) == 0


def test_the_threshold_itself_is_not_above_it() -> None:
    assert Directionality(threshold=1.0).choose([True] * 3, [1.0, math.nextafter(1.0, 2), -1.5], 0) == [
        False,
        True,
        False,
    ]
    both = Directionality(threshold=1.0, sides="both")
    assert both.choose([True] * 4, [1.0, -1.0, math.nextafter(-1.0, -2), 3.0], 0) == [False, False, True, True]


def test_an_empty_choice_amplifies_nothing_and_is_logged(caplog: pytest.LogCaptureFixture) -> None:
    model, other = network(), network()
    optimizer, plain = sgd(model), sgd(other)
    rule = GradientAmplification(Directionality(threshold=10.0), SHORT)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    with caplog.at_level(logging.INFO, logger="layerwise"):
        train(model, optimizer, adapter, range(1, 8))
    warnings = [record.getMessage() for record in caplog.records if record.levelno == logging.WARNING]
    assert warnings[0] == "threshold=10 chooses nothing: z of 5 layers is at most 2.00"
    messages = warnings[1:]
    assert [message[:31] for message in messages] == [
        "epoch 2: no layer is chosen (Di",
        "epoch 5: no layer is chosen (Di",
    ]
    adapter.detach()
    train(other, plain, layerwise.LayerwiseLR(plain, chain(LayerAdaptive(), LayerAdaptive()), other), range(0))
    other = network()
    plain = sgd(other)
    for epoch in range(1, 8):
        for step in range(STEPS):
            backward(other, batch(epoch, step))
            plain.step()
    assert_same_bits(weights(model), weights(other))


def test_the_chosen_layers_are_logged_with_their_number(caplog: pytest.LogCaptureFixture) -> None:
    model = network()
    optimizer = sgd(model)
    adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(AllLayers(("fc",)), SHORT), model)
    with caplog.at_level(logging.INFO, logger="layerwise"):
        train(model, optimizer, adapter, range(1, 3), steps=1)
    assert any("epoch 2: 2 of 2 layers chosen (AllLayers): ['4', '5']" in r.getMessage() for r in caplog.records)


def test_kinds_are_those_of_the_modules() -> None:
    model = network()
    for kinds, names in {("conv",): {"0", "2"}, ("bn",): {"1"}, ("conv", "fc"): {"0", "2", "4", "5"}}.items():
        optimizer = sgd(model)
        adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(AllLayers(kinds), [Phase(2, True)]), model)
        adapter.end_epoch()
        assert {name for name, one in adapter.get_last_selection().items() if one.selected} == names


class Convolution(nn.Linear):
    """A module that no kind names."""


MessagePassing = type("MessagePassing", (nn.Module,), {"__module__": "torch_geometric.nn.conv.message_passing"})


class GraphConvolution(MessagePassing):
    """A convolution as PyTorch Geometric has them: its bias its own, its weight in a submodule."""

    def __init__(self) -> None:
        super().__init__()
        self.lin = nn.Linear(2, 2, bias=False)
        self.bias = nn.Parameter(torch.zeros(2))


OF_A_KIND: dict[Any, Callable[[], nn.Module]] = {
    "recurrent": lambda: nn.LSTM(2, 3, num_layers=2),
    "attention": lambda: nn.MultiheadAttention(4, 2),
    "embedding": lambda: nn.Embedding(5, 2),
    "graph": GraphConvolution,
    Convolution: lambda: Convolution(2, 2),
}


@pytest.mark.parametrize("kind", [*OF_A_KIND, "bag", "cell"], ids=str)
def test_kinds_know_recurrent_attention_embedding_and_graph_layers(kind: Any) -> None:
    others = {"bag": lambda: nn.EmbeddingBag(5, 2), "cell": lambda: nn.GRUCell(2, 3)}
    of_kind = OF_A_KIND.get(kind) or others[kind]
    kind = {"bag": "embedding", "cell": "recurrent"}.get(kind, kind)
    rest = [make() for other, make in OF_A_KIND.items() if other != kind]
    model = nn.ModuleList([of_kind(), *rest, nn.Conv1d(2, 2, 1)])
    optimizer = sgd(model)
    adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(AllLayers((kind,)), [Phase(2, True)]), model)
    adapter.end_epoch()
    assert [name for name, one in adapter.get_last_selection().items() if one.selected] == ["0"]


def test_frozen_layers_and_layers_without_gradients_do_not_distort_z() -> None:
    model = network()
    model[0].requires_grad_(False)
    optimizer = sgd(model)
    rule = GradientAmplification(Directionality(threshold=0.0), [Phase(3, True)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    for step in range(STEPS):
        backward(model, batch(1, step))
        model[5].weight.grad = model[5].bias.grad = None
        optimizer.step()
    adapter.end_epoch()
    found = adapter.get_last_selection()
    assert math.isnan(found["0"].z)
    assert math.isnan(found["5"].z)
    assert not found["0"].selected
    live = [found[name] for name in ("1", "2", "4")]
    np.testing.assert_allclose([one.z for one in live], reference.z_scores([one.value for one in live]), rtol=1e-9)


def test_random_layers_are_drawn_once_a_phase_or_epoch_and_follow_from_the_seed() -> None:
    def choices(selection: Any) -> list[tuple[bool, ...]]:
        with torch.random.fork_rng():
            model = nn.Sequential(*(nn.Linear(2, 2) for _ in range(20)))
        optimizer = sgd(model)
        adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(selection, SHORT), model)
        seen = []
        for _ in range(6):
            seen.append(tuple(one.selected for one in adapter.get_last_selection().values()))
            adapter.end_epoch()
        return seen

    before = torch.get_rng_state()
    once, again = choices(RandomLayers(0.35, seed=1)), choices(RandomLayers(0.35, seed=1))
    assert torch.equal(torch.get_rng_state(), before)
    assert once == again
    assert once[0] == (False,) * 20
    assert once[1] == once[2] == once[3] != once[4] == once[5]
    assert [sum(chosen) for chosen in once[1:]] == [7] * 5
    assert choices(RandomLayers(0.35, seed=2)) != once
    assert len(set(choices(RandomLayers(0.35, redraw="epoch"))[1:])) == 5
    assert sum(choices(RandomLayers(0))[1]) == 0
    assert sum(choices(RandomLayers(1.0))[1]) == 20


def test_shuffled_layers_are_as_many_as_the_measured_ones() -> None:
    found = {}
    for selection in (Directionality(threshold=0.3), ShuffledLayers(Directionality(threshold=0.3), seed=3)):
        model = network()
        optimizer = sgd(model)
        adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(selection, SHORT), model)
        train(model, optimizer, adapter, range(1, 3))
        found[type(selection)] = adapter.get_last_selection()
    measured, shuffled = found.values()
    assert [one.value for one in measured.values()] == [one.value for one in shuffled.values()]
    assert sum(one.selected for one in measured.values()) == sum(one.selected for one in shuffled.values()) > 0


# --- The step ---------------------------------------------------------------------------------------------------------


def momentum(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [optimizer.state[p]["momentum_buffer"].clone() for g in optimizer.param_groups for p in g["params"]]


@pytest.mark.parametrize("apply", ["auto", "gradient"])
@pytest.mark.parametrize(
    "options", [{}, {"nesterov": True}, {"foreach": True}, {"fused": True}, {"maximize": True, "lr": 1e-4}], ids=str
)
def test_only_the_gradient_is_amplified_and_momentum_goes_on(apply: Any, options: dict[str, Any]) -> None:
    model = network()
    optimizer = sgd(model, **options)
    rule = GradientAmplification(AllLayers(("conv",)), [Phase(1, False), Phase(3, True), Phase(4, False)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, apply=apply)
    assert (adapter.apply, adapter.decay) == ("gradient", "plain")
    amplified = {id(p) for i in (0, 2) for p in model[i].parameters()}
    sign, rate = (-1 if options.get("maximize") else 1), options.get("lr", 0.01)
    velocity = None
    for epoch in range(1, 6):
        for step in range(3):
            backward(model, batch(epoch, step))
            factor = 2.0 if epoch == 3 else 1.0
            parameters = list(model.parameters())
            gradients = [sign * p.grad * (factor if id(p) in amplified else 1) + 0.05 * p for p in parameters]
            velocity = (
                gradients if velocity is None else [0.9 * v + g for v, g in zip(velocity, gradients, strict=True)]
            )
            moves = velocity
            if options.get("nesterov"):
                moves = [g + 0.9 * v for g, v in zip(gradients, velocity, strict=True)]
            expected = [(p - rate * v).detach() for p, v in zip(parameters, moves, strict=True)]
            velocity = [v.detach() for v in velocity]
            optimizer.step()
            torch.testing.assert_close(parameters, [e.requires_grad_() for e in expected], rtol=1e-13, atol=1e-16)
            torch.testing.assert_close(momentum(optimizer), velocity, rtol=1e-13, atol=1e-16)
        kept = momentum(optimizer)
        adapter.end_epoch()
        assert_same_bits(momentum(optimizer), kept)


def test_without_momentum_and_decay_it_is_twice_the_rate() -> None:
    model, other = network(), network()
    optimizer = sgd(model, momentum=0, weight_decay=0)
    groups = [{"params": list(other[i].parameters()), "lr": 0.02 if i in (0, 2) else 0.01} for i in (0, 1, 2, 4, 5)]
    by_rate = torch.optim.SGD(groups, lr=0.01)
    rule = GradientAmplification(AllLayers(("conv",), after_analysis=False), [Phase(1, True)])
    layerwise.LayerwiseLR(optimizer, rule, model)
    for step in range(5):
        for net, steps in ((model, optimizer), (other, by_rate)):
            backward(net, batch(1, step))
            steps.step()
    torch.testing.assert_close(weights(model), weights(other), rtol=1e-14, atol=0)


# --- Saving -----------------------------------------------------------------------------------------------------------


def through_a_file(value: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(value, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=True)


@pytest.mark.parametrize("place", [(2, 0), (2, 3), (3, 2), (5, 1), (4, 4)], ids=str)
@pytest.mark.parametrize(
    "selection",
    [
        Directionality(threshold=0.3),
        Directionality("G_prime", 0.3, "both", reselect=1),
        Directionality(threshold=0.3, sample=8),
        RandomLayers(0.4, redraw="epoch"),
        ShuffledLayers(Directionality(threshold=0.3)),
    ],
    ids=lambda selection: type(selection).__name__,
)
@pytest.mark.parametrize(
    "wrap", [lambda rule: rule, lambda rule: bounds(chain(LayerAdaptive(), rule), 0, 9)], ids=["", "chain"]
)
def test_a_run_stopped_anywhere_and_resumed_ends_with_the_same_bits(place: Any, selection: Any, wrap: Any) -> None:
    def begin(state: Any = None) -> Any:
        model = network()
        optimizer = sgd(model)
        adapter = layerwise.LayerwiseLR(optimizer, wrap(GradientAmplification(selection, SHORT)), model)
        if state is not None:
            model.load_state_dict(state["model"])
            optimizer.load_state_dict(state["optimizer"])
            adapter.load_state_dict(state["adapter"])
        return model, optimizer, adapter

    def go_on(model: Any, optimizer: Any, adapter: Any, epoch: int, step: int) -> Any:
        """Train to the end; return what was saved at the place, and the last selection and weights."""
        saved = None
        while epoch < 8:
            if (epoch, step) == place:
                parts = {"model": model, "optimizer": optimizer, "adapter": adapter}
                saved = through_a_file({name: part.state_dict() for name, part in parts.items()})
            if step == STEPS:
                adapter.end_epoch()
                epoch, step = epoch + 1, 0
                continue
            backward(model, batch(epoch, step))
            optimizer.step()
            step += 1
        return saved, repr(adapter.get_last_selection()), weights(model)

    saved, selection_at_end, whole = go_on(*begin(), 1, 0)
    kept = copy.deepcopy(saved["adapter"])
    _, resumed_selection, resumed = go_on(*begin(saved), *place)
    assert resumed_selection == selection_at_end
    assert_same_bits(resumed, whole)
    assert repr(saved["adapter"]) == repr(kept), "what was loaded must stay as it was"


def test_sums_survive_parameters_that_are_added_in_the_middle() -> None:
    model = network()
    optimizer = torch.optim.SGD([*model[:5].parameters()], lr=0.01)
    rule = GradientAmplification(Directionality(threshold=0.0), [Phase(3, True)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    gradients = []
    for step in range(4):
        if step == 2:
            optimizer.add_param_group({"params": [*model[5].parameters()]})
        backward(model, batch(1, step))
        gradients.append([[p.grad.numpy().copy() for p in layer.parameters] for layer in adapter.layer_table()[:4]])
        optimizer.step()
    adapter.end_epoch()
    found = [one.value for one in adapter.get_last_selection().values()]
    np.testing.assert_allclose(found[:4], reference.directionality(gradients), rtol=1e-9)


# --- Bad input --------------------------------------------------------------------------------------------------------

BAD: dict[str, tuple[Any, type[Exception], str]] = {
    "until": (lambda: Phase(0, True), ValueError, "until=0 must be a whole number of at least 1"),
    "amplify": (lambda: Phase(1, 1), TypeError, "amplify=1 must be True or False"),
    "factor zero": (lambda: Phase(1, True, 0.0), ValueError, "factor=0.0 must be a finite number above 0"),
    "factor negative": (lambda: Phase(1, True, -2.0), ValueError, "factor=-2.0"),
    "factor nan": (lambda: Phase(1, True, math.nan), ValueError, "factor=nan"),
    "not increasing": (
        lambda: GradientAmplification(AllLayers(), [Phase(5, True), Phase(5, False)]),
        ValueError,
        r"phases end at epochs \[5, 5\]; each must end after the one before it",
    ),
    "no phase": (lambda: GradientAmplification(AllLayers(), []), TypeError, "at least one; try PARAMS_1"),
    "a tuple": (lambda: GradientAmplification(AllLayers(), [(5, True)]), TypeError, r"must be Phase\(until"),
    "selection": (lambda: GradientAmplification("G"), TypeError, "selection='G' must be Directionality"),
    "ratio": (lambda: RandomLayers(1.5), ValueError, "ratio=1.5 must be a share of the layers, from 0 to 1"),
    "ratio nan": (lambda: RandomLayers(math.nan), ValueError, "ratio=nan"),
    "seed": (lambda: RandomLayers(0.5, seed=-1), ValueError, "seed=-1"),
    "redraw": (lambda: RandomLayers(0.5, redraw="step"), ValueError, "redraw='step' must be 'phase' or 'epoch'"),
    "kind": (lambda: AllLayers(("lstm",)), ValueError, "kinds holds 'lstm'; allowed: 'conv', 'bn', 'fc'"),
    "module": (lambda: AllLayers((nn.Linear(2, 2),)), ValueError, "or a class of modules"),
    "class": (lambda: AllLayers((int,)), ValueError, "kinds holds <class 'int'>; allowed"),
    "kinds": (lambda: AllLayers("conv"), ValueError, r"such as \('conv', 'fc'\)"),
    "measure": (lambda: Directionality("H"), ValueError, "measure='H' must be one of 'G', 'G_prime'"),
    "threshold": (lambda: Directionality(threshold=-1), ValueError, "threshold=-1"),
    "sides": (lambda: Directionality(sides="lower"), ValueError, "sides='lower' must be 'upper'"),
    "reselect": (lambda: Directionality(reselect=0), ValueError, "reselect=0"),
    "sample": (lambda: Directionality(sample=0), ValueError, "sample=0"),
    "ddof": (lambda: Directionality(ddof=2), ValueError, "ddof=2"),
    "shuffled": (lambda: ShuffledLayers(AllLayers()), TypeError, "measured=AllLayers"),
    "freezing": (lambda: LayerFreezing(1.5), ValueError, "threshold=1.5 must be from 0 to 1"),
    "freezing every": (lambda: LayerFreezing(0.5, every=0), ValueError, "every=0"),
    "freezing sample": (lambda: LayerFreezing(0.5, sample=0), ValueError, "sample=0"),
}


@pytest.mark.parametrize(("make", "error", "words"), BAD.values(), ids=BAD)
def test_bad_input_is_refused_with_the_remedy(make: Any, error: type[Exception], words: str) -> None:
    with pytest.raises(error, match=words):
        make()


def test_a_kind_that_no_layer_has_is_refused_when_attached() -> None:
    model = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    optimizer = sgd(model)
    words = re.escape("kinds=('fc', 'conv'): no layer is of kind 'conv'; the layers are Linear")
    with pytest.raises(ValueError, match=words):
        layerwise.LayerwiseLR(optimizer, GradientAmplification(AllLayers(("fc", "conv"))), model)
    assert not optimizer._optimizer_step_pre_hooks


def test_a_state_of_another_measure_is_refused_and_changes_nothing() -> None:
    def attached(selection: Any) -> Any:
        model = network()
        optimizer = sgd(model)
        adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(selection, SHORT), model)
        train(model, optimizer, adapter, range(1, 2))
        backward(model, batch(2, 0))
        optimizer.step()
        return adapter

    first, second = attached(Directionality("G")), attached(Directionality("G_prime"))
    before = repr(second.state_dict())
    with pytest.raises(ValueError, match="have shape"):
        second.load_state_dict(first.state_dict())
    assert repr(second.state_dict()) == before


@pytest.mark.parametrize(
    "selection", [Directionality(), AllLayers(after_analysis=False)], ids=lambda s: type(s).__name__
)
@pytest.mark.parametrize(
    "options", [{"momentum": 0.9, "weight_decay": 0.01}, {"momentum": 0.9, "foreach": False}], ids=str
)
def test_no_step_of_any_epoch_reads_a_value_from_an_accelerator(
    selection: Any, options: dict[str, Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    def real(self: Any, layers: Any, device: torch.device) -> Any:
        with unset_fake_temporarily():  # the rule's own numbers lie on the host
            return init(self, layers, device)

    def real_derived(self: Any, state: Any) -> Any:
        with unset_fake_temporarily():
            return derived(self, state)

    init, derived = GradientAmplification.init, GradientAmplification.derived
    monkeypatch.setattr(GradientAmplification, "init", real)
    monkeypatch.setattr(GradientAmplification, "derived", real_derived)
    with FakeTensorMode():
        named = {f"{i}.weight": nn.Parameter(torch.empty(3, 3, device="cuda")) for i in range(3)}
        optimizer = torch.optim.SGD(named.items(), lr=0.1, **options)
        adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(selection, [Phase(3, True)]))
        for _ in range(2):
            for p in named.values():
                p.grad = torch.empty_like(p)
            optimizer.step()
        assert bool(adapter._attached.state["sums"]) == isinstance(selection, Directionality)


@pytest.mark.parametrize("measure", ["G", "G_prime"])
@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("unscale", [False, True])
def test_under_a_gradient_scaler_the_measures_are_those_of_the_true_gradients(
    measure: Any, fused: bool, unscale: bool
) -> None:
    model = network(torch.float32)
    optimizer = sgd(model, fused=fused)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12, growth_interval=3)
    rule = GradientAmplification(Directionality(measure), [Phase(2, True)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    counted, scales = [], set()
    for step in range(8):
        scale = scaler.get_scale()
        scales.add(scale)
        model.zero_grad()
        scaler.scale(model(batch(1, step, torch.float32)).square().sum(1).mean()).backward()
        if step == 4:
            model[4].weight.grad[0, 0] = math.inf  # the scaler lets this step be skipped
        else:
            layers = [layer.parameters for layer in adapter.layer_table()]
            counted.append([[p.grad.double().numpy() / scale for p in parameters] for parameters in layers])
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert len(scales) == 2
    assert adapter._attached.state["sums"]["iterations"].item() == 7
    adapter.end_epoch()
    found = [one.value for one in adapter.get_last_selection().values()]
    np.testing.assert_allclose(found, reference.directionality(counted, measure), rtol=1e-6)


def test_accumulated_gradients_count_as_one_step() -> None:
    model = network()
    optimizer = sgd(model)
    adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(Directionality(), [Phase(2, True)]), model)
    steps = []
    for step in range(4):
        model.zero_grad()
        for part in range(3):
            model(batch(part, step)).square().sum(1).mean().backward()
        layers = [layer.parameters for layer in adapter.layer_table()]
        steps.append([[p.grad.numpy().copy() for p in parameters] for parameters in layers])
        optimizer.step()
    assert adapter._attached.state["sums"]["iterations"].item() == 4
    adapter.end_epoch()
    found = [one.value for one in adapter.get_last_selection().values()]
    np.testing.assert_allclose(found, reference.directionality(steps), rtol=1e-9)
