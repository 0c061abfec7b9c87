"""torch.compile of the model, of `optimizer.step` and of a whole training step: graphs counted, numbers compared.

The graphs of a bare optimizer are counted beside those of the same one with an adapter. Most tests take a backend that
counts the graphs and runs them as they are; one compiles for real.
"""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch._dynamo as dynamo
from torch import Tensor, nn, optim
from torch._dynamo.utils import counters

import layerwise
from layerwise.rules import Constant, Directionality, GradientAmplification, LayerAdaptive, Phase, Replay, save_factors

pytestmark = [
    # torch's compiler imports what torch itself has deprecated, and looks at gradients that are not there.
    pytest.mark.filterwarnings("ignore:`torch.jit.script:DeprecationWarning"),
    pytest.mark.filterwarnings("ignore:The .grad attribute of a Tensor that is not a leaf:UserWarning"),
    pytest.mark.filterwarnings("ignore:Skipping serialization of skipfiles_inline_module_allowlist:UserWarning"),
]

OPTIMIZERS: dict[str, Callable[[Any], optim.Optimizer]] = {
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.02),
    "SGD with decay": lambda parameters: optim.SGD(parameters, lr=0.02, weight_decay=0.1),
    "SGD with momentum and decay": lambda parameters: optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "SGD with a tensor as rate": lambda parameters: optim.SGD(parameters, lr=torch.tensor(0.02), momentum=0.9),
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=0.02),
    "AdamW for each": lambda parameters: optim.AdamW(parameters, lr=0.02, foreach=True),
    "AdamW fused": lambda parameters: optim.AdamW(parameters, lr=0.02, fused=True),
}
STEPS = 5
EXACT = 1e-15 if torch.__version__ < (2, 13) else 0.0
"""How far compiled SGD may be from eager SGD: in PyTorch 2.6 and 2.7 it rounds otherwise, without an adapter too."""


class Network(nn.Module):
    """Two layers, in a class of its own: `model.compile()` compiles none of torch's, such as `nn.Sequential`."""

    def __init__(self, dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        torch.manual_seed(1)
        self.first, self.second = nn.Linear(5, 4, dtype=dtype), nn.Linear(4, 2, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.second(torch.tanh(self.first(x)))


class Graphs:
    """A backend that counts graphs, and the operations in each, and runs them as they are."""

    def __init__(self) -> None:
        self.operations: list[Counter[str]] = []

    def __call__(self, module: torch.fx.GraphModule, inputs: list[Tensor]) -> Callable[..., Any]:
        nodes = (node for node in module.graph.nodes if node.op in ("call_function", "call_method"))
        self.operations.append(Counter(str(node.target) for node in nodes))
        return module.forward


@pytest.fixture(autouse=True)
def nothing_compiled_before():
    dynamo.reset()
    counters.clear()
    yield
    dynamo.reset()


def batch(step: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(7, 5, generator=torch.Generator().manual_seed(100 + step), dtype=torch.float64).to(dtype)


def made(name: str, place: str | None, rule: Any = None) -> tuple[Network, optim.Optimizer, Any]:
    """Return a network, its optimizer, and an adapter unless the optimizer shall be bare."""
    model = Network()
    optimizer = OPTIMIZERS[name](model.parameters())
    adapter = None
    if place is not None:
        adapter = layerwise.LayerwiseLR(optimizer, rule or LayerAdaptive(), model, apply=place)
    return model, optimizer, adapter


def train(
    model: nn.Module,
    optimizer: optim.Optimizer,
    *,
    whole: bool = False,
    steps: int = STEPS,
    after: Callable[[int], Any] = lambda step: None,
    graphs: Graphs | None = None,
    **options: Any,
) -> list[int]:
    """Train, and return how many graphs there were after each step.

    Compiled is the step, or the whole iteration; nothing without `graphs`.
    """

    def iteration(x: Tensor) -> Tensor:
        optimizer.zero_grad()
        loss = model(x).square().sum()
        loss.backward()
        optimizer.step()
        return loss

    take = optimizer.step
    if graphs is not None and whole:
        iteration = torch.compile(iteration, backend=graphs, **options)
    elif graphs is not None:
        take = torch.compile(optimizer.step, backend=graphs, **options)
    counts = []
    for step in range(steps):
        if whole:
            iteration(batch(step))
        else:
            optimizer.zero_grad()
            model(batch(step)).square().sum().backward()
            take()
        after(step)
        counts.append(0 if graphs is None else len(graphs.operations))
    return counts


def exact(place: str) -> float:
    """The difference of two ways: under "update" a compiled step is scaled afterwards, any other one as it writes."""
    return 1e-15 if place == "update" else EXACT


def assert_close(actual: nn.Module, expected: nn.Module, relative: float = 1e-5) -> None:
    """Compare weights, relative to the largest.

    Compiled, Adam and AdamW keep their bias corrections as float32 tensors, with or without an adapter.
    """
    for p, q in zip(actual.parameters(), expected.parameters(), strict=True):
        assert (p - q).abs().max() <= relative * q.abs().max()


# --- The model ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("place", ["auto", "update"])
@pytest.mark.parametrize("in_place", [False, True], ids=["torch.compile(model)", "model.compile()"])
def test_a_compiled_model_trains_as_the_model_itself(place, in_place):
    models, factors = [], []
    for compiled in (False, True):
        network = model = Network()
        optimizer = OPTIMIZERS["SGD with momentum and decay"](model.parameters())
        if compiled and in_place:
            model.compile(backend="aot_eager", fullgraph=True)
        elif compiled:
            network = torch.compile(model, backend="aot_eager", fullgraph=True)
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), network, apply=place)
        assert adapter.layers == ["first", "second"]
        train(network, optimizer)
        models.append(model)
        factors.append(adapter.get_last_factors())
    assert counters["stats"]["unique_graphs"] == 1
    assert factors[0] == factors[1]
    assert_close(*models, relative=0)


# --- The step -------------------------------------------------------------------------------------------------------

# Graphs after the first step, after the second and after all. Without an adapter: SGD's momentum begins at the first
# step and goes on at the second, which makes two graphs; fused kernels are never compiled. With one, each layer has a
# number of its own in the optimizer's groups, which is a constant in the first graph and, since it changes at the
# second step, a variable in the second graph, once and for all; a scheduled rate does the same to a bare optimizer.
BARE = {
    "SGD": (1, 1, 1),
    "SGD with decay": (1, 1, 1),
    "SGD with momentum and decay": (1, 2, 2),
    "SGD with a tensor as rate": (1, 2, 2),
    "AdamW": (1, 1, 1),
    "AdamW for each": (1, 1, 1),
    "AdamW fused": (0, 0, 0),
}
ATTACHED = {
    # The decay is scaled with the gradient, `f λ`: the one number that "gradient" puts into the groups.
    ("SGD with decay", "gradient"): (1, 2, 2),
    ("SGD with decay", "lr"): (1, 2, 2),
    ("AdamW", "lr"): (1, 2, 2),
    ("AdamW for each", "lr"): (1, 2, 2),
}
CASES = [
    *((name, place) for name in ("SGD with decay", "AdamW") for place in ("gradient", "lr", "update")),
    *(("SGD with momentum and decay", place) for place in ("auto", "gradient", "lr", "update")),
    *(("SGD with a tensor as rate", "lr"), ("AdamW for each", "lr"), ("AdamW fused", "lr"), ("AdamW fused", "update")),
]


def three(counts: list[int]) -> tuple[int, int, int]:
    return counts[0], counts[1], counts[-1]


def expected_counts(name: str, place: str, adapter: layerwise.LayerwiseLR) -> tuple[int, int, int]:
    return ATTACHED.get((name, adapter.apply), BARE[name])


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_without_an_adapter_there_are_so_many_graphs(name):
    model, optimizer, _ = made(name, None)
    assert three(train(model, optimizer, graphs=Graphs())) == BARE[name]


@pytest.mark.parametrize(("name", "place"), CASES)
def test_a_compiled_step_is_right_and_is_compiled_no_more_after_the_second(name, place):
    graphs = Graphs()
    model, optimizer, adapter = made(name, place)
    counts = train(model, optimizer, graphs=graphs)
    expected, eager, reference = made(name, place)
    train(expected, eager)
    assert_close(model, expected, 1e-5 if "AdamW" in name else 1e-7 if "tensor" in name else exact(place))
    assert adapter.get_last_factors() == pytest.approx(reference.get_last_factors(), rel=1e-4)
    assert three(counts) == expected_counts(name, place, adapter)
    assert not any("norm" in operation for graph in graphs.operations for operation in graph), "a hook was traced"


@pytest.mark.parametrize(
    ("name", "place"),
    [("SGD with momentum and decay", "auto"), ("AdamW", "gradient"), ("AdamW", "lr"), ("AdamW", "update")],
)
def test_a_scheduled_rate_costs_no_graph_more_than_it_costs_the_bare_optimizer(name, place):
    counts, models = [], []
    for attached, graphs in ((None, Graphs()), (place, Graphs()), (place, None)):
        dynamo.reset()
        model, optimizer, _ = made(name, attached)
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        counts.append(train(model, optimizer, graphs=graphs, after=lambda step, s=scheduler: s.step()))
        models.append(model)
    assert three(counts[0]) == three(counts[1]) == (1, 2, 2)
    assert_close(*models[1:])


@pytest.mark.parametrize("place", ["gradient", "update"])
@pytest.mark.parametrize("name", ["SGD", "AdamW"])
def test_gradient_and_update_leave_the_very_graph_of_the_bare_optimizer(name, place):
    operations, explained = [], []
    for attached in (None, place):
        dynamo.reset()
        graphs = Graphs()
        model, optimizer, _ = made(name, attached)
        train(model, optimizer, graphs=graphs, steps=2)
        operations.append(graphs.operations)
        dynamo.reset()
        found = dynamo.explain(optimizer.step)()
        explained.append((found.graph_count, found.graph_break_count, found.op_count))
    assert len(operations[0]) == 1
    assert operations[0] == operations[1]
    assert explained[0] == explained[1]
    assert explained[0][:2] == (1, 0)


@pytest.mark.parametrize(
    ("name", "place"), [("SGD with momentum and decay", "auto"), ("AdamW", "lr"), ("AdamW", "update")]
)
def test_a_whole_iteration_is_right_and_breaks_no_more_often_than_without_an_adapter(name, place):
    counts, breaks, models = [], [], []
    for attached, graphs in ((None, Graphs()), (place, Graphs()), (place, None)):
        dynamo.reset()
        counters.clear()
        model, optimizer, adapter = made(name, attached)
        counts.append(train(model, optimizer, graphs=graphs, whole=True))
        breaks.append(sum(counters["graph_break"].values()))
        models.append(model)
    # The break at the hook takes the place of the one that torch makes by intention at the beginning of each step.
    assert breaks[:2] == [4, 3]
    assert three(counts[0]) == tuple(1 + count for count in BARE[name])  # the forward pass is one more
    assert three(counts[1]) == tuple(1 + count for count in expected_counts(name, place, adapter))
    assert_close(*models[1:])


@pytest.mark.parametrize(
    "rule", [None, LayerAdaptive(), Constant({"first": 2.0})], ids=lambda rule: type(rule).__name__
)
def test_steps_in_backward_stay_outside_the_graphs_of_a_whole_iteration(rule):
    models = []
    for in_backward in (True, False):
        model, optimizer, _ = made("SGD with a tensor as rate", None)
        if in_backward:
            layerwise.step_in_backward(optimizer, model, rule)
        elif rule is not None:
            layerwise.LayerwiseLR(optimizer, rule, model)
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
        graphs = Graphs() if in_backward else None
        counts = train(model, optimizer, graphs=graphs, whole=in_backward, after=lambda step, s=scheduler: s.step())
        assert counts == [int(in_backward)] * STEPS  # the forward pass
        models.append(model)
    torch.testing.assert_close(*([*model.parameters()] for model in models), rtol=0, atol=0)


@pytest.mark.parametrize(
    ("name", "place"),
    [("SGD with momentum and decay", "auto"), ("AdamW", "lr"), ("AdamW", "update"), ("AdamW fused", "lr")],
)
def test_what_is_attached_paused_and_detached_later_reaches_a_compiled_step(name, place):
    models = []
    for compiled in (False, True):
        model, optimizer, _ = made(name, None)
        take = torch.compile(optimizer.step, backend=Graphs()) if compiled else optimizer.step

        def go_on(steps, model=model, take=take):
            for step in steps:
                model.zero_grad()
                model(batch(step)).square().sum().backward()
                take()

        go_on(range(2))
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)
        go_on(range(2, 4))
        factors = adapter.get_last_factors()
        assert min(factors.values()) > 1
        with adapter.paused():
            go_on(range(4, 6))
        assert adapter.get_last_factors() == factors
        go_on(range(6, 7))
        assert adapter.get_last_factors() != factors
        adapter.detach()
        go_on(range(7, 9))
        models.append(model)
    assert_close(*models)


# --- Where graphs are added -----------------------------------------------------------------------------------------


@pytest.fixture
def recorded(tmp_path):
    """Factors that the layers share at some steps and not at others; equal ones share a parameter group."""
    rows = [(1.5, 1.5), (1.5, 2.5), (3.0, 3.0), (2.0, 4.0), (2.0, 2.0), (1.0, 1.0)]
    save_factors(tmp_path / "factors", [dict(zip(("first", "second"), row, strict=True)) for row in rows])
    return Replay(tmp_path / "factors")


@pytest.mark.parametrize(
    ("place", "limit", "graphs"),
    [
        ("lr", 8, [1, 2, 3, 4, 4, 5]),
        ("lr", 2, [1, 2, 2, 2, 2, 2]),  # beyond torch's limit of recompilations the step goes on uncompiled
        ("gradient", 8, [1, 1, 1, 1, 1, 2]),
        ("update", 8, [1, 1, 1, 1, 1, 2]),
    ],
)
def test_layers_that_share_a_factor_in_another_way_are_another_graph_under_lr(place, limit, graphs, recorded):
    """And where no factor differs from 1, the optimizer steps by itself: the last graph of each."""
    model, optimizer, _ = made("SGD", place, recorded)
    expected, eager, _ = made("SGD", place, recorded)
    name = "recompile_limit" if hasattr(dynamo.config, "recompile_limit") else "cache_size_limit"
    with dynamo.config.patch({name: limit}):
        counts = train(model, optimizer, graphs=Graphs(), steps=6)
    train(expected, eager, steps=6)
    assert counts == graphs
    assert_close(model, expected, exact(place))


@pytest.mark.parametrize(
    ("place", "graphs"), [("lr", 2 if torch.__version__ < (2, 8) else STEPS), ("gradient", 1), ("update", 1)]
)
def test_where_dynamic_shapes_are_forbidden_each_rate_is_a_constant_of_a_new_graph(place, graphs):
    """So is a scheduled rate of a bare optimizer (but in PyTorch 2.6 and 2.7). The limit is torch's."""
    model, optimizer, _ = made("SGD", place)
    expected, eager, _ = made("SGD", place)
    assert train(model, optimizer, graphs=Graphs(), dynamic=False)[-1] == graphs
    train(expected, eager)
    assert_close(model, expected, exact(place))


@pytest.mark.parametrize("place", ["gradient", "update"])
def test_a_rule_that_stands_still_in_some_epochs_has_a_graph_for_these_and_one_for_the_others(place):
    phases = [Phase(2, False), Phase(4, True), Phase(6, False), Phase(8, True)]
    rule = GradientAmplification(Directionality(threshold=0.5), phases)
    models = []
    for graphs in (Graphs(), None):
        model, optimizer, adapter = made("SGD", place, rule)
        end_epoch = lambda step, adapter=adapter: adapter.end_epoch() if step % 2 else None  # noqa: E731
        counts = train(model, optimizer, graphs=graphs, steps=16, after=end_epoch)
        assert any(one.selected for one in adapter.get_last_selection().values())
        assert graphs is None or counts == [1] * 6 + [2] * 10
        models.append(model)
    assert_close(*models, relative=exact(place))


# --- Together with other things -------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("name", "place"), [("SGD with momentum and decay", "auto"), ("AdamW", "lr"), ("AdamW fused", "lr")]
)
def test_a_compiled_step_under_a_gradient_scaler_skips_and_unscales(name, place):
    models = []
    for compiled in (False, True):
        model = Network(torch.float32)
        optimizer = OPTIMIZERS[name](model.parameters())
        layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply=place)
        if compiled:
            optimizer.step = torch.compile(optimizer.step, backend=Graphs())
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10)
        for step in range(5):
            optimizer.zero_grad()
            scaler.scale(model(batch(step, torch.float32)).square().sum() * (1e38 if step == 2 else 1.0)).backward()
            scaler.step(optimizer)
            scaler.update()
        assert scaler.get_scale() == 2.0**9
        models.append(model)
    assert_close(*models)


@pytest.mark.full
@pytest.mark.skipif(shutil.which("g++") is None and shutil.which("clang++") is None, reason="needs a C++ compiler")
@pytest.mark.parametrize("what", ["the step", "the model"])
def test_code_that_is_really_compiled_gives_the_same_numbers(what, tmp_path, monkeypatch):
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", str(tmp_path))
    models = []
    for compiled in (False, True):
        network = model = Network(torch.float32)
        optimizer = OPTIMIZERS["AdamW"](model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        assert adapter.apply == "lr"
        with torch._inductor.config.patch(compile_threads=1):
            if compiled and what == "the model":
                network = torch.compile(model)
            take = torch.compile(optimizer.step) if compiled and what == "the step" else optimizer.step
            for step in range(4):
                optimizer.zero_grad()
                network(batch(step, torch.float32)).square().sum().backward()
                take()
        models.append(model)
    assert counters["stats"]["unique_graphs"] == (2 if what == "the step" else 1)
    assert_close(*models)
