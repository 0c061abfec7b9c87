"""Four processes that differ decide alike: none waits for another forever, and none goes its own way."""

from __future__ import annotations

import contextlib
import functools
import traceback
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from sharded.processes import run
from torch import Tensor, nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import FullyShardedDataParallel, fully_shard
from torch.distributed.tensor import DTensor, Replicate, Shard, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

import layerwise
from layerwise.rules import (
    LARS,
    BackMatching,
    Constant,
    Directionality,
    ElementwiseRule,
    GradientAmplification,
    LayerAdaptive,
    LayerDecay,
    Phase,
    bounds,
)

pytestmark = pytest.mark.full

WORLD = 4
CASES: dict[str, Callable[[int, int], Any]] = {}
"""What each process does, given its number and how many there are; one process alone does it too, for comparison."""


def case(function: Callable[[int, int], Any]) -> Callable[[int, int], Any]:
    CASES[function.__name__] = function
    return function


def work(rank: int, last: str) -> dict[str, Any]:
    """Do all cases; return what each returned, or the text of its error."""
    results = {}
    for name, function in CASES.items():
        torch.manual_seed(0)
        try:
            results[name] = function(rank, WORLD)
        except Exception as error:
            results[name] = f"{error}\n{traceback.format_exc()}"
    results["back_matching"] = back_matching_before_the_process_group(rank, last)
    return results


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the four processes did; a hang ends after three minutes, on a busy machine too."""
    return run(WORLD, work, str(tmp_path_factory.mktemp("processes") / "store"), timeout=180)


def zero_head(frozen: bool = False) -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(3)
        model = nn.Sequential(nn.Linear(16, 32), nn.Tanh(), nn.Linear(32, 2)).double()
    for p in model[2].parameters():
        nn.init.zeros_(p)
    model[0].requires_grad_(not frozen)
    return model


def sharded(model: nn.Module, world: int) -> nn.Module:
    if world > 1:
        for part in model:
            if list(part.parameters()):
                fully_shard(part)
        fully_shard(model)
    return model


def batch(step: int, rank: int, world: int) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(step)
    x = torch.randn(8, 16, generator=generator, dtype=torch.float64)
    y = torch.stack([x.sum(1), x[:, 0] * x[:, 1]], 1)
    return x.chunk(world)[rank], y.chunk(world)[rank]


def whole(model: nn.Module) -> dict[str, Tensor]:
    """Return the whole weights."""
    full = {name: p.detach() for name, p in model.named_parameters()}
    return {name: p.full_tensor().clone() if isinstance(p, DTensor) else p.clone() for name, p in full.items()}


def warm_up(
    model: nn.Module, rank: int, world: int, *, rule: Any, steps: int = 4, every: int = 0, pause: Any = None, **how: Any
) -> Any:
    """Train with a rate that starts at 0; return weights, factors, and the monitor's records."""
    model = sharded(model, world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: min(1, step / 3))
    adapter = None if rule is None else layerwise.LayerwiseLR(optimizer, rule, model, **how)
    monitor = layerwise.Monitor(optimizer, model, every=every) if every else None
    factors, records = [], []
    for step in range(steps):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        with contextlib.nullcontext() if pause is None or not pause(step, rank) else adapter.paused():
            optimizer.step()
        scheduler.step()
        factors.append(None if adapter is None else adapter.get_last_factors())
        if monitor is not None:
            last = monitor.get_last_record()
            records.append((monitor.steps, None if last is None else (last.step, last.gradient_norm, last.update_norm)))
    return whole(model), factors, records


@case
def zero_initialised_head(rank: int, world: int) -> Any:
    return warm_up(zero_head(), rank, world, rule=LayerAdaptive())


@case
def frozen_backbone(rank: int, world: int) -> Any:
    return warm_up(zero_head(frozen=True), rank, world, rule=LayerAdaptive())


@case
def monitor_alone(rank: int, world: int) -> Any:
    return warm_up(zero_head(), rank, world, rule=None, every=2)


@case
def monitor_with_a_rule(rank: int, world: int) -> Any:
    return warm_up(zero_head(), rank, world, rule=LARS(), every=3, steps=6)


@case
def embedding_rows_without_tokens(rank: int, world: int) -> Any:
    """Two processes hold only rows of tokens that never come, and every process holds zeros in the first step."""
    with torch.random.fork_rng():
        torch.manual_seed(5)
        model = nn.Sequential(nn.Embedding(8, 4), nn.Linear(4, 2)).double()
    model = sharded(model, world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: step)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, layers="parameter")
    monitor = layerwise.Monitor(optimizer, model, every=2)
    for _ in range(4):
        optimizer.zero_grad()
        model(torch.tensor([0, 1, 2, 3])).square().mean().backward()
        optimizer.step()
        scheduler.step()
    return whole(model), adapter.get_last_factors(), monitor.get_last_record().gradient_norm


SINGLE = [
    "zero_initialised_head",
    "frozen_backbone",
    "monitor_alone",
    "monitor_with_a_rule",
    "embedding_rows_without_tokens",
]


def close(found: Any, wanted: Any) -> None:
    torch.testing.assert_close(found, wanted, rtol=1e-9, atol=1e-11)


@pytest.mark.dist
@pytest.mark.parametrize("name", SINGLE)
def test_rate_that_starts_at_zero_trains_as_one_process(results, name):
    torch.manual_seed(0)
    wanted = CASES[name](0, 1)
    for result in results:
        assert not isinstance(result[name], str), result[name]
        for found, expected in zip(result[name], wanted, strict=True):
            assert_same(found, expected)


def assert_same(found: Any, wanted: Any) -> None:
    if isinstance(wanted, dict):
        assert found.keys() == wanted.keys()
        for key in wanted:
            assert_same(found[key], wanted[key])
    elif isinstance(wanted, list | tuple):
        assert len(found) == len(wanted)
        for one, other in zip(found, wanted, strict=True):
            assert_same(one, other)
    elif isinstance(wanted, Tensor):
        close(found, wanted)
    else:
        assert found == (wanted if wanted is None else pytest.approx(wanted, rel=1e-9))


# --- Pauses, and what is asked of a monitor ------------------------------------------------------------------------


@case
def paused_in_one(rank: int, world: int) -> Any:
    return warm_up(zero_head(), rank, world, rule=bounds(LayerAdaptive(), 1.5, 9), pause=lambda k, r: k == 2 and r == 1)


@case
def paused_in_all(rank: int, world: int) -> Any:
    return warm_up(zero_head(), rank, world, rule=bounds(LayerAdaptive(), 1.5, 9), pause=lambda k, r: k == 2)


@case
def paused_in_one_and_raising(rank: int, world: int) -> Any:
    rule = bounds(LayerAdaptive(), 1.5, 9)
    return warm_up(zero_head(), rank, world, rule=rule, pause=lambda k, r: k == 2 and r == 1, on_nonfinite="raise")


@pytest.mark.dist
@pytest.mark.parametrize("name", ["paused_in_one", "paused_in_one_and_raising"])
def test_pause_in_one_process_pauses_all(results, name):
    torch.manual_seed(0)
    wanted, _, _ = CASES["paused_in_all"](0, 1)
    never, _, _ = warm_up(zero_head(), 0, 1, rule=bounds(LayerAdaptive(), 1.5, 9))
    assert not torch.allclose(wanted["2.weight"], never["2.weight"], rtol=1e-3), "the pause changes nothing"
    for result in results:
        assert not isinstance(result[name], str), result[name]
        close(result[name][0], wanted)
        assert_same(result["paused_in_all"][0], wanted)


@case
def paused_in_one_in_an_epoch_of_analysis(rank: int, world: int) -> Any:
    rule = GradientAmplification(Directionality(threshold=0.1, kinds=None), [Phase(9, True)])
    model = sharded(zero_head(), world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    for step in range(4):
        x, y = batch(step, rank, world)
        optimizer.zero_grad()
        (model(x) - y).square().mean().backward()
        adapter.enabled = not (step == 2 and (rank == 1 or world == 1))
        optimizer.step()
    adapter.enabled = True
    adapter.end_epoch()
    return [tuple(one) for one in adapter.get_last_selection().values()]


@pytest.mark.dist
def test_step_paused_in_one_process_counts_in_none(results):
    name = "paused_in_one_in_an_epoch_of_analysis"
    wanted = CASES[name](0, 1)
    for result in results:
        assert_same(result[name], wanted)


@case
def every_differs(rank: int, world: int) -> Any:
    try:
        return warm_up(zero_head(), rank, world, rule=None, every=2 if rank else 3)
    except ValueError as error:
        return str(error)


@case
def resumed_steps_differ(rank: int, world: int) -> Any:
    model = sharded(zero_head(), world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    monitor = layerwise.Monitor(optimizer, model, every=2)
    if rank == 0:
        monitor.load_state_dict({"version": 1, "steps": 7})
    model(batch(0, rank, world)[0]).sum().backward()
    before = whole(model)
    with pytest.raises(ValueError, match="the number of steps counted differs between the processes"):
        optimizer.step()
    close(whole(model), before)
    return "refused"


@case
def loaded_states_differ(rank: int, world: int) -> Any:
    choice = GradientAmplification(Directionality(kinds=None), [Phase(9, True)])
    model = sharded(zero_head(), world)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, choice, model)
    saved = adapter.state_dict()
    if rank == 0:
        saved["state"]["epoch"] = 2
    adapter.load_state_dict(saved)
    model(batch(0, rank, world)[0]).sum().backward()
    with pytest.raises(ValueError, match="epoch differs between the processes"):
        optimizer.step()
    return "refused"


@case
def rules_differ(rank: int, world: int) -> Any:
    try:
        return warm_up(zero_head(), rank, world, rule=LARS() if rank else LayerAdaptive())
    except ValueError as error:
        return str(error)


@pytest.mark.dist
def test_arguments_that_differ_are_refused_in_every_process(results):
    for result in results:
        assert "Monitor: every differs between the processes" in result["every_differs"]
        assert "(2, 3)" in result["every_differs"]
        assert result["resumed_steps_differ"] == "refused", result["resumed_steps_differ"]
        assert result["loaded_states_differ"] == "refused", result["loaded_states_differ"]
        assert "LayerwiseLR: rule differs between the processes" in result["rules_differ"]


# --- Errors in one process -----------------------------------------------------------------------------------------


class Own(nn.Module):
    """Shared layers, and a parameter that each process holds alone."""

    def __init__(self) -> None:
        super().__init__()
        self.up = nn.Linear(16, 4)
        self.own = nn.Parameter(torch.ones(4))

    def forward(self, x: Tensor) -> Tensor:
        """Return the outputs of the layer, each scaled."""
        return self.up(x) * self.own


@case
def broken_where_only_one_process_holds_it(rank: int, world: int) -> Any:
    model = Own().double()
    fully_shard(model.up)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    for step in range(3):
        optimizer.zero_grad()
        model(batch(step, rank, world)[0]).square().mean().backward()
        if step == 1 and rank == 2:
            model.own.grad[0] = torch.inf
        before, factors = whole(model), adapter.get_last_factors()
        if step == 1:
            with pytest.raises(FloatingPointError, match="own" if rank == 2 else "another process holds"):
                optimizer.step()
            close(whole(model), before)
            assert adapter.get_last_factors() == factors
        else:
            optimizer.step()
    return "raised"


@case
def broken_in_a_mesh_of_two(rank: int, world: int) -> Any:
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    model = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    for p, small in zip(model[0].parameters(), (mesh["rows"], mesh["rows"]), strict=True):
        replace(model[0], p, distribute_tensor(p.detach(), small, [Shard(0)]))
    for p in list(model[1].parameters()):
        replace(model[1], p, distribute_tensor(p.detach(), mesh["columns"], [Shard(0)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    for p in model.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    if rank == 0:
        model[0].weight.grad.to_local()[0] = torch.nan
    with pytest.raises(FloatingPointError):
        optimizer.step()
    return "raised"


def replace(module: nn.Module, old: nn.Parameter, new: Tensor) -> None:
    name = next(name for name, p in module.named_parameters() if p is old)
    setattr(module, name, nn.Parameter(new))


@pytest.mark.dist
@pytest.mark.parametrize("name", ["broken_where_only_one_process_holds_it", "broken_in_a_mesh_of_two"])
def test_gradient_broken_in_one_process_raises_in_all(results, name):
    assert [result[name] for result in results] == ["raised"] * WORLD


# --- Gradients and layers that some processes do not have ----------------------------------------------------------


class Experts(nn.Module):
    """A gate that all hold, and two matrices of experts, shared among pairs of processes."""

    def __init__(self) -> None:
        super().__init__()
        self.gate = nn.Linear(3, 4)
        self.first = nn.Linear(5, 4, bias=False)
        self.experts = nn.Linear(6, 4, bias=False)


def experts_gradients(step: int) -> dict[str, Tensor]:
    """Return the whole gradients of a step; in odd ones those of the second half of the experts are missing."""
    generator = torch.Generator().manual_seed(step)
    sizes = {"gate.weight": (4, 3), "gate.bias": (4,), "first.weight": (4, 5), "experts.weight": (4, 6)}
    found = {n: torch.randn(size, generator=generator, dtype=torch.float64) for n, size in sizes.items()}
    found["experts.weight"] += 1.5
    found["first.weight"] += 0.3
    if step % 2:
        found["experts.weight"][2:] = 0
    return found


def directionality(measure: str) -> dict[str, float]:
    """Return G or G' of the layers, from their definitions."""
    steps = [experts_gradients(step) for step in range(4)]
    result = {}
    for layer in ("gate", "first", "experts"):
        names = [name for name in steps[0] if name.startswith(f"{layer}.")]
        signed = torch.cat([sum(one[name] for one in steps).abs().flatten() for name in names])
        absolute = torch.cat([sum(one[name].abs() for one in steps).flatten() for name in names])
        ratio = signed.sum() / absolute.sum() if measure == "G" else (signed / absolute).mean()
        result[layer] = float(ratio)
    return result


def choose_experts(rank: int, world: int, measure: str) -> Any:
    model = Experts().double()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("copies", "experts"))["experts"]
    half = rank % 2
    model.experts.weight = nn.Parameter(distribute_tensor(model.experts.weight.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.01)
    choice = Directionality(measure, threshold=0.5, kinds=None)
    adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(choice, [Phase(9, True)]), model)
    for step in range(4):
        gradients = experts_gradients(step)
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        part = gradients["experts.weight"].chunk(2)[half]
        missing = step % 2 and half
        # In a step without tokens for its experts a process has no gradient at all.
        model.experts.weight.grad = None if missing else DTensor.from_local(part.clone(), mesh, [Shard(0)])
        optimizer.step()
    adapter.end_epoch()
    return {name: tuple(one) for name, one in adapter.get_last_selection().items()}


@case
def experts_without_a_gradient_by_g(rank: int, world: int) -> Any:
    return choose_experts(rank, world, "G")


@case
def experts_without_a_gradient_by_g_prime(rank: int, world: int) -> Any:
    return choose_experts(rank, world, "G_prime")


@pytest.mark.dist
@pytest.mark.parametrize(("name", "measure"), [("by_g", "G"), ("by_g_prime", "G_prime")])
def test_processes_choose_the_layers_that_one_process_chooses(results, name, measure):
    wanted = directionality(measure)
    for result in results:
        found = result[f"experts_without_a_gradient_{name}"]
        assert not isinstance(found, str), found
        assert {layer: one[0] for layer, one in found.items()} == pytest.approx(wanted, rel=1e-12)
        chosen = [layer for layer, one in found.items() if one[2]]
        assert chosen == ["experts"]


@case
def experts_never_used_here(rank: int, world: int) -> Any:
    """Norms where a process has no gradient of its part, from the first step on."""
    model = Experts().double()
    mesh = init_device_mesh("cpu", (world,))
    model.experts.weight = nn.Parameter(distribute_tensor(model.experts.weight.detach(), mesh, [Shard(0)]))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    monitor = layerwise.Monitor(optimizer, model, every=1)
    for _ in range(2):
        gradients = experts_gradients(0)
        for name, p in model.named_parameters():
            p.grad = gradients[name]
        part = gradients["experts.weight"].chunk(world)[rank]
        model.experts.weight.grad = DTensor.from_local(part, mesh, [Shard(0)]) if rank == 0 else None
        optimizer.step()
    gate = torch.cat([gradients["gate.weight"].flatten(), gradients["gate.bias"]]).norm()
    used = gradients["experts.weight"][:1].norm()
    norms = [float(gate), float(gradients["first.weight"].norm()), float(used)]
    assert monitor.get_last_record().gradient_norm == pytest.approx(norms, rel=1e-9)
    return adapter.get_last_factors()


@pytest.mark.dist
def test_missing_gradient_of_a_part_counts_as_zero(results):
    import math

    gradients = experts_gradients(0)
    used = gradients["experts.weight"][:1].norm()
    for result in results:
        assert not isinstance(result["experts_never_used_here"], str), result["experts_never_used_here"]
        factors = result["experts_never_used_here"]
        assert factors == results[0]["experts_never_used_here"]
        assert factors["experts"] == pytest.approx(1 + math.log1p(1 / float(used)), rel=1e-9)


@case
def layers_in_another_order(rank: int, world: int) -> Any:
    """Processes meet in pairs and all together, and go through their layers in different orders."""
    meshes = init_device_mesh("cpu", (2, 2), mesh_dim_names=("rows", "columns"))
    everyone = init_device_mesh("cpu", (world,))
    parts = {
        "all": distribute_tensor(torch.ones(4, 2), everyone, [Shard(0)]),
        "row": distribute_tensor(torch.full((4, 2), 2.0), meshes["columns"], [Shard(0)]),
        "column": distribute_tensor(torch.full((4, 2), 3.0), meshes["rows"], [Shard(0)]),
    }
    order = ["all", "row", "column"] if rank in (0, 3) else ["column", "row", "all"]
    model = nn.ParameterDict({name: nn.Parameter(parts[name]) for name in order})
    optimizer = torch.optim.SGD(model.parameters(), lr=0.0)
    adapter = layerwise.LayerwiseLR(optimizer, LARS(eps=0), model, layers="parameter", exclude=None)
    for _ in range(2):
        for p in model.values():
            p.grad = torch.ones_like(p)
        optimizer.step()
    return dict(sorted(adapter.get_last_factors().items()))


@pytest.mark.dist
def test_layers_in_another_order_do_not_block(results):
    for result in results:
        found = result["layers_in_another_order"]
        assert found == pytest.approx({"all": 0.001, "row": 0.002, "column": 0.003}, rel=1e-6), found


# --- The step with which a checkpoint makes a state ----------------------------------------------------------------


@case
def checkpoint_before_training(rank: int, world: int) -> Any:
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = sharded(zero_head(), world)
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.05)
    rule = GradientAmplification(Directionality(threshold=0.1, kinds=None), [Phase(9, True)])
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    monitor = layerwise.Monitor(optimizer, model, every=1)
    get_optimizer_state_dict(model, optimizer)
    assert monitor.steps == 0
    assert adapter.state_dict()["state"]["sums"] == {}
    model(batch(0, rank, world)[0]).sum().backward()
    optimizer.step()
    return monitor.steps, int(adapter.state_dict()["state"]["sums"]["iterations"])


@case
def checkpoint_step_of_one_process(rank: int, world: int) -> Any:
    """A process that holds nothing that is trained takes the checkpoint's step alone."""
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = nn.Sequential(nn.Linear(2, 2, bias=False), nn.Linear(2, 40)).double()
    model[1].requires_grad_(False)
    model = FullyShardedDataParallel(model, use_orig_params=True, device_id=torch.device("cpu"))
    optimizer = torch.optim.AdamW(model.parameters(), lr=0.01)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, on_nonfinite="raise")
    monitor = layerwise.Monitor(optimizer, model, every=1)
    for _ in range(2):
        optimizer.zero_grad()
        model(torch.ones(3, 2, dtype=torch.float64)).sum().backward()
        optimizer.step()
    optimizer.zero_grad()
    stateless = not optimizer.state
    get_optimizer_state_dict(model, optimizer)
    model(torch.ones(3, 2, dtype=torch.float64)).sum().backward()
    optimizer.step()
    return stateless, monitor.steps, adapter.get_last_factors()["0"] > 1


@pytest.mark.dist
def test_checkpoint_step_is_left_out_in_every_process(results):
    assert [result["checkpoint_before_training"] for result in results] == [(1, 1)] * WORLD
    found = [result["checkpoint_step_of_one_process"] for result in results]
    assert [one[1:] for one in found] == [(3, True)] * WORLD, found


# --- Pipelines, and experts of a process's own ---------------------------------------------------------------------


def whole_chain() -> nn.Sequential:
    with torch.random.fork_rng():
        torch.manual_seed(9)
        return nn.Sequential(*(nn.Linear(4, 4) for _ in range(8))).double()


def step_of_a_stage(model: nn.Module, rule: Any, rank: int) -> Any:
    """Take a step of one stage; the gradients are those of no other process."""
    if rule is COMPARING["depth by a function of the stage"]:
        rule = LayerDecay(0.5, depth=functools.partial(shifted, rank))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    for p in model.parameters():
        p.grad = torch.randn(p.shape, generator=torch.Generator().manual_seed(rank), dtype=p.dtype)
    before = whole(model)
    try:
        adapter = layerwise.LayerwiseLR(optimizer, rule, model)
        optimizer.step()
    except ValueError as error:
        close(whole(model), before)
        return str(error)
    return adapter.get_last_factors()


def stage_with_its_names(rank: int) -> nn.Module:
    return nn.ModuleDict({str(i): whole_chain()[i] for i in (2 * rank, 2 * rank + 1)})


def shifted(rank: int, name: str) -> int:
    """Return the depth in the whole network of a layer of a stage: the largest one is still that of the stage."""
    return int(name) + 2 * rank


COMPARING = {
    "depth": LayerDecay(0.5),
    "bounded depth": bounds(LayerDecay(0.5), 0.1, 1),
    "depth by a function": LayerDecay(0.5, depth=int),
    "depth by a function of the stage": LayerDecay(0.5),  # to be made in each process
    "products": BackMatching(),
    "scores": GradientAmplification(Directionality(kinds=None), [Phase(9, True)]),
}


@case
def stages_with_their_names(rank: int, world: int) -> Any:
    return {name: step_of_a_stage(stage_with_its_names(rank), rule, rank) for name, rule in COMPARING.items()}


@case
def stages_with_equal_names(rank: int, world: int) -> Any:
    return {
        name: step_of_a_stage(whole_chain()[2 * rank : 2 * rank + 2], rule, rank) for name, rule in COMPARING.items()
    }


@case
def stages_of_torch(rank: int, world: int) -> Any:
    from torch.distributed.pipelining import PipelineStage

    found = {}
    for name, rule in COMPARING.items():
        module = whole_chain()[2 * rank : 2 * rank + 2]
        stage = PipelineStage(module, rank, world, torch.device("cpu"))
        found[name] = step_of_a_stage(module, rule, rank)
        del stage
    return found


@case
def stages_with_rules_of_single_layers(rank: int, world: int) -> Any:
    factors = {str(i): 0.5 ** (7 - i) for i in range(2 * rank, 2 * rank + 2)}
    return [
        step_of_a_stage(stage_with_its_names(rank), LayerAdaptive(), rank),
        step_of_a_stage(stage_with_its_names(rank), Constant(factors), rank),
    ]


@pytest.mark.dist
@pytest.mark.parametrize("name", ["stages_with_their_names", "stages_with_equal_names", "stages_of_torch"])
def test_rules_that_compare_layers_refuse_a_pipeline_stage(results, name):
    for result in results:
        assert isinstance(result[name], dict), result[name]
        for rule, found in result[name].items():
            assert isinstance(found, str), f"{rule}: {found}"
            assert "compares layers" in found
            assert "rules.Constant" in found


@pytest.mark.dist
def test_remedies_for_a_pipeline_stage_are_right(results):
    for rank, result in enumerate(results):
        adaptive, constant = result["stages_with_rules_of_single_layers"]
        assert all(factor > 1 for factor in adaptive.values())
        assert constant == {str(i): 0.5 ** (7 - i) for i in range(2 * rank, 2 * rank + 2)}


class Router(nn.Module):
    """A router that all processes hold alike, and the experts of this one."""

    def __init__(self, rank: int) -> None:
        super().__init__()
        self.router = nn.Parameter(torch.linspace(-1, 1, 8))
        self.own = nn.Parameter(torch.linspace(-1, 1, 8) + rank)


def route(rank: int, rule: Any, **how: Any) -> Any:
    model = Router(rank).double()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, **how)
    before = whole(model)
    for step in range(10):
        generator = torch.Generator().manual_seed(step)
        model.router.grad = torch.randn(8, generator=generator, dtype=torch.float64)
        model.own.grad = torch.randn(8, generator=generator.manual_seed(100 * rank + step), dtype=torch.float64)
        try:
            optimizer.step()
        except ValueError as error:
            close(whole(model), before)
            return str(error)
    return whole(model)["router"], adapter.get_last_factors()


class Spread(ElementwiseRule):
    """The deviation of a layer's gradient."""

    needs = ("gradient_std",)

    def factor(self, gradient_std: Any) -> Any:
        return 1 + gradient_std


@case
def router_and_experts_of_ones_own(rank: int, world: int) -> Any:
    choice = GradientAmplification(Directionality(threshold=0.0, kinds=None), [Phase(9, True)])
    return [
        route(rank, LayerAdaptive()),
        route(rank, choice, layers="parameter"),
        route(rank, LayerAdaptive(), layers="parameter"),
        route(rank, Constant({"*": 2.0})),
        route(rank, Spread()),
    ]


@pytest.mark.dist
def test_layer_of_shared_and_own_parameters_is_refused(results):
    first = results[0]["router_and_experts_of_ones_own"]
    for result in results:
        joined, scores, apart, constant, spread = result["router_and_experts_of_ones_own"]
        for refused in (joined, spread):
            assert "pass layers='parameter'" in refused
            assert "(router)" in refused
            assert "(own)" in refused
        assert "compares layers" in scores
        assert torch.equal(apart[0], first[2][0])
        assert torch.equal(constant[0], first[3][0])


@case
def replicas(rank: int, world: int) -> Any:
    """Rules that compare layers in processes that hold the same, in DDP and with tensor parallel rows."""
    model = DistributedDataParallel(whole_chain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rules = [LayerDecay(0.5), BackMatching(), GradientAmplification(Directionality(kinds=None), [Phase(9, True)])]
    adapters = [layerwise.LayerwiseLR(optimizer, rule, model, bounds=(0.1, 2)) for rule in rules]
    generator = torch.Generator().manual_seed(rank)
    model(torch.randn(2, 4, generator=generator, dtype=torch.float64)).square().mean().backward()
    optimizer.step()
    with torch.no_grad():  # as on processors of different types
        for p in model.parameters():
            p += 1e-7 * rank
    for p in model.parameters():  # what the page advises
        torch.distributed.broadcast(p.detach(), 0)
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("data", "tensor"))["tensor"]
    parallel = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)).double()
    for part, placement in zip(parallel, (Shard(0), Replicate()), strict=True):
        for p in list(part.parameters()):
            replace(part, p, distribute_tensor(p.detach(), mesh, [placement]))
    for adapter in adapters:  # its last values remain when the optimizer is gone
        adapter.detach()
    optimizer = torch.optim.SGD(parallel.parameters(), lr=0.1)
    adapters += [layerwise.LayerwiseLR(optimizer, rule, parallel) for rule in rules]
    for p in parallel.parameters():
        p.grad = torch.ones_like(p)
    optimizer.step()
    return [adapter.get_last_factors() for adapter in adapters], whole(model)


@pytest.mark.dist
def test_rules_that_compare_layers_accept_replicas(results):
    for result in results:
        assert not isinstance(result["replicas"], str), result["replicas"]
        factors, weights = result["replicas"]
        assert factors == results[0]["replicas"][0]
        assert all(torch.equal(weights[name], w) for name, w in results[0]["replicas"][1].items())


@case
def adapter_on_one_process_alone(rank: int, world: int) -> Any:
    """Replicas of which only the first has a rule; nothing needs a collective, so only a warning can tell."""
    model = DistributedDataParallel(whole_chain())
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    if rank == 0:
        layerwise.LayerwiseLR(optimizer, Constant({"*": 0.5}), model)
    with warnings.catch_warnings(record=True) as told:
        warnings.simplefilter("always")
        for _ in range(2):
            model(torch.ones(2, 4, dtype=torch.float64)).square().mean().backward()
            optimizer.step()
    return [str(each.message) for each in told if "LayerwiseLR" in str(each.message)]


@pytest.mark.dist
def test_a_process_that_is_alone_with_its_rule_warns_once(results):
    first, *others = (result["adapter_on_one_process_alone"] for result in results)
    assert len(first) == 1, first
    assert "create it in every process" in first[0]
    assert others == [[]] * (WORLD - 1)


# --- What is checked again when it changes -------------------------------------------------------------------------


def back_matching_before_the_process_group(rank: int, store: str) -> Any:
    """Attach before there is a process group, make one, wrap, and step."""
    torch.distributed.destroy_process_group()
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Linear(4, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    layerwise.LayerwiseLR(optimizer, BackMatching(), model, bounds=(0.1, 10))
    swept = nn.Linear(2, 2)
    backward = torch.optim.SGD(swept.parameters(), lr=0.1)
    layerwise.step_in_backward(backward, swept)
    swept(torch.ones(1, 2)).sum().backward()
    backward.step()
    torch.distributed.init_process_group(
        "gloo", store=torch.distributed.FileStore(store, WORLD), rank=rank, world_size=WORLD
    )
    wrapped = DistributedDataParallel(model)
    wrapped(torch.randn(8, 4) + rank).sum().backward()
    before = whole(model)
    with pytest.raises(ValueError, match="convert_sync_batchnorm"):
        optimizer.step()
    close(whole(model), before)
    averaged = DistributedDataParallel(swept)
    before = whole(swept)
    with pytest.raises(ValueError, match="DistributedDataParallel"):
        averaged(torch.ones(1, 2)).sum().backward()
    close(whole(swept), before)
    return "refused"


@pytest.mark.dist
def test_checks_are_repeated_when_a_process_group_appears(results):
    assert [result["back_matching"] for result in results] == ["refused"] * WORLD


def test_frozen_layer_that_is_thawed_is_no_longer_excluded():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    rule = Constant({"*": 3.0})
    adapter = layerwise.LayerwiseLR(optimizer, rule, model, exclude=lambda name, p: not p.requires_grad)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert adapter.get_last_factors() == {"0": 1.0, "1": 3.0}
    model[0].requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert adapter.get_last_factors() == {"0": 3.0, "1": 3.0}


def test_option_that_is_set_after_attaching_is_refused_too():
    model = nn.Linear(2, 2)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, apply="update")
    optimizer.param_groups[0]["differentiable"] = True
    model(torch.ones(1, 2)).sum().backward()
    before = whole(model)
    with pytest.raises(ValueError, match="differentiable=True"):
        optimizer.step()
    close(whole(model), before)


def test_option_and_thawing_after_attaching_reach_step_in_backward():
    model = nn.Sequential(nn.Linear(2, 2), nn.Linear(2, 2))
    model[0].requires_grad_(False)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)

    class Frozen(Constant):
        """Fixed factors for what is trained."""

        default_exclude = staticmethod(lambda name, p: not p.requires_grad)

    handle = layerwise.step_in_backward(optimizer, model, Frozen({"*": 3.0}))
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert handle.get_last_factors() == {"0": 1.0, "1": 3.0}
    model[0].requires_grad_(True)
    model(torch.ones(1, 2)).sum().backward()
    optimizer.step()
    assert handle.get_last_factors() == {"0": 3.0, "1": 3.0}
    optimizer.param_groups[0]["differentiable"] = True
    before = whole(model)
    with pytest.raises(ValueError, match="differentiable=False"):
        model(torch.ones(1, 2)).sum().backward()
    close(whole(model), before)
