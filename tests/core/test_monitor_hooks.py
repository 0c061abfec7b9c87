"""Monitors around steps that are not plain: closures, scalers, exceptions, nested steps, wrappers, compilation."""

from __future__ import annotations

import copy
import math
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import layerwise
from layerwise import Monitor, sinks
from layerwise.rules import Directionality, GradientAmplification, LayerAdaptive, Phase

FORMS: dict[str, Callable[[Any, Any], Any]] = {
    "positional": lambda optimizer, closure: optimizer.step(closure),
    "named": lambda optimizer, closure: optimizer.step(closure=closure),
}
every_form = pytest.mark.parametrize("call", FORMS.values(), ids=FORMS)


def sgd(model: nn.Module, **options: Any) -> optim.SGD:
    return optim.SGD(model.parameters(), **{"lr": 0.02, "momentum": 0.9, "weight_decay": 0.1, **options})


def attach(model: nn.Module, optimizer: Any, adapter: str = "none", **options: Any) -> sinks.Memory:
    """Attach a monitor, and an adapter that acts, none, or a paused one; return where records go."""
    memory = sinks.Memory()
    options = {"every": 1, "sinks": [memory], **options}
    if adapter == "none":
        Monitor(optimizer, model, **options)
        return memory
    attached = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    attached.enabled = adapter != "paused"
    Monitor(optimizer, model, **options)
    return memory


every_company = pytest.mark.parametrize("adapter", ["none", "acting", "paused"])


# --- Closures ---------------------------------------------------------------------------------------------------------


@every_form
@every_company
def test_a_step_with_a_closure_is_recorded_as_a_backward_and_a_step(
    call, adapter, make_model, backward, weights, assert_same_bits
):
    plain, closed = make_model(), make_model()
    optimizers = [sgd(plain), sgd(closed)]
    memories = [attach(m, o, adapter, every=2) for m, o in zip((plain, closed), optimizers, strict=True)]
    calls, losses = [], []
    for step in range(4):
        backward(plain, step)
        optimizers[0].step()

        def closure(step=step):
            calls.append(step)
            losses.append(backward(closed, step))
            return losses[-1]

        assert call(optimizers[1], closure) is losses[-1]
    assert calls == [0, 1, 2, 3]
    assert memories[0].records == memories[1].records
    assert [record.step for record in memories[1].records] == [2, 4]
    assert min(memories[1].records[0].gradient_norm) > 0
    assert_same_bits(weights(plain), weights(closed))


class Twice(optim.SGD):
    """Evaluates its closure, takes half a step, and evaluates it again."""

    @torch.no_grad()
    def step(self, closure: Any = None) -> Any:
        assert closure is not None
        with torch.enable_grad():
            closure()
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * p.grad
        with torch.enable_grad():
            loss = closure()
        for p in self.param_groups[0]["params"]:
            p -= 0.01 * p.grad
        return loss


@pytest.mark.parametrize("kind", [optim.LBFGS, Twice], ids=lambda kind: kind.__name__)
def test_an_optimizer_may_evaluate_its_closure_several_times_and_the_first_is_recorded(
    kind, make_model, backward, weights, assert_same_bits
):
    results = []
    for watched in (False, True):
        model = make_model()
        optimizer = kind(model.parameters(), lr=0.1)
        memory = attach(model, optimizer) if watched else sinks.Memory()
        for step in range(3):
            before, norms = weights(model), []

            def closure(step=step, model=model, norms=norms):
                loss = backward(model, step)
                norms.append(float(torch.nn.utils.get_total_norm([p.grad for p in model.parameters()])))
                return loss

            optimizer.step(closure)
            assert len(norms) > 1
            if watched:
                record = memory.records[-1]
                assert math.hypot(*record.gradient_norm) == pytest.approx(norms[0], rel=1e-12)
                moved = [q - before[name] for name, q in weights(model).items()]
                assert math.hypot(*record.update_norm) == pytest.approx(
                    float(torch.nn.utils.get_total_norm(moved)), rel=1e-9
                )
        results.append(weights(model))
    assert [record.step for record in memory.records] == [1, 2, 3]
    assert_same_bits(results[0], results[1])


@pytest.mark.parametrize("adapter", ["none", "acting"])
def test_a_closure_may_detach_the_monitor_and_attach_another_one(adapter, make_model, backward):
    model = make_model()
    optimizer = sgd(model)
    memory = sinks.Memory()
    attach(model, optimizer, adapter, every=1000)
    first = Monitor(optimizer, model, every=1, sinks=[memory])
    others = []

    def closure():
        first.detach()
        others.append(Monitor(optimizer, model, every=1, sinks=[memory]))
        return backward(model)

    optimizer.step(closure)
    assert memory.records == []
    assert others[0].steps == 0
    assert first._seen is None, "it keeps no copy of the parameters"
    optimizer.step()
    assert [record.step for record in memory.records] == [1]


# --- Steps that fail, or contain steps --------------------------------------------------------------------------------


class Failing(optim.SGD):
    fail = False

    def step(self, closure: Any = None) -> Any:
        if self.fail:
            raise OSError("out of memory")
        return super().step(closure)


@every_company
@pytest.mark.parametrize("where", ["in the step", "in a hook before", "in the closure"])
def test_a_step_that_raises_is_not_counted_and_the_next_one_is_recorded_as_if_it_had_not_been(
    adapter, where, make_model, backward, train
):
    memories = []
    for disturbed in (False, True):
        model = make_model()
        optimizer = Failing(model.parameters(), lr=0.02, momentum=0.9)
        memories.append(attach(model, optimizer, adapter))
        train(model, optimizer, 2)
        if disturbed:
            backward(model, 7)

            def fail(*_: Any) -> Any:
                raise OSError("not now")

            handle = optimizer.register_step_pre_hook(fail) if where == "in a hook before" else None
            optimizer.fail = where == "in the step"
            with pytest.raises(OSError, match=r"not now|out of memory"):
                optimizer.step(fail) if where == "in the closure" else optimizer.step()
            optimizer.fail = False
            if handle is not None:
                handle.remove()
        train(model, optimizer, 2, first=2)
    assert memories[0].records == memories[1].records
    assert [record.step for record in memories[1].records] == [1, 2, 3, 4]


class Decayed(optim.SGD):
    """Shrinks the weights, takes the step of its base, and shrinks them again; steps itself count, once each."""

    inner = 1

    def step(self, closure: Any = None) -> Any:
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p *= 0.5
        for _ in range(self.inner):
            super().step(closure)
        with torch.no_grad():
            for p in (p for group in self.param_groups for p in group["params"]):
                p *= 0.5


@every_company
@pytest.mark.parametrize("inner", [1, 2])
def test_a_step_that_takes_the_steps_of_its_base_counts_once_and_is_recorded_as_a_whole(
    adapter, inner, make_model, backward, weights, assert_same_bits
):
    assert "step" in vars(optim.SGD)
    sgd(make_model())  # torch puts its hooks around the step of a class when the first object is made
    results = []
    for watched in (False, True):
        model = make_model()
        optimizer = Decayed(model.parameters(), lr=0.02, momentum=0.9)
        optimizer.inner = inner
        if watched:
            memory = attach(model, optimizer, adapter, every=2)
        elif adapter == "acting":
            layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
        for step in range(4):
            before = weights(model)
            backward(model, step)
            optimizer.step()
        results.append(weights(model))
    assert_same_bits(results[0], results[1])
    assert [record.step for record in memory.records] == [2, 4]
    moved = {name: float((q - before[name]).square().sum()) for name, q in weights(model).items()}
    expected = [math.sqrt(moved[f"{name}.weight"] + moved[f"{name}.bias"]) for name in "024"]
    assert memory.records[-1].update_norm == pytest.approx(expected, rel=1e-12)


def test_a_rule_that_sums_gradients_counts_a_step_inside_a_step_once(make_model, backward):
    sgd(make_model())
    model = make_model()
    optimizer = Decayed(model.parameters(), lr=0.02)
    adapter = layerwise.LayerwiseLR(optimizer, GradientAmplification(Directionality(), [Phase(2, True)]), model)
    for step in range(3):
        backward(model, step)
        optimizer.step()
    assert int(adapter.state_dict()["state"]["sums"]["iterations"]) == 3


# --- Gradient scalers -------------------------------------------------------------------------------------------------


def scaled_steps(model: nn.Module, optimizer: Any, overflows: set[int], *, unscale: bool) -> None:
    """Take eight steps through a gradient scaler, and attempts besides whose gradients are not finite."""
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=1000)
    taken = 0
    for attempt in range(8 + len(overflows)):
        model.zero_grad()
        scaler.scale(loss_of(model, taken)).backward()
        if attempt in overflows:
            model[0].weight.grad[0, 0] = math.inf
        else:
            taken += 1
        if unscale:
            scaler.unscale_(optimizer)
        scaler.step(optimizer)
        scaler.update()
    assert taken == 8


def loss_of(model: nn.Module, step: int) -> Tensor:
    generator = torch.Generator().manual_seed(step)
    return model(torch.randn(7, 5, generator=generator)).square().sum()


@pytest.mark.pairwise
@every_company
@pytest.mark.parametrize("every", [1, 3])
@pytest.mark.parametrize("unscale", [False, True], ids=["scaled", "unscaled"])
@pytest.mark.parametrize("form", [{}, {"fused": True}], ids=["default", "fused"])
@pytest.mark.parametrize("overflows", [set(), {2}, {1, 2, 6, 7}], ids=str)  # not 0: torch's fused momentum is at fault
def test_through_a_gradient_scaler_the_records_are_those_of_a_run_without_one(
    overflows, form, unscale, every, adapter, make_model, weights
):
    bare, scaled = make_model(torch.float32), make_model(torch.float32)
    optimizers = [sgd(bare, **form), sgd(scaled, **form)]
    expected, found = (attach(m, o, adapter, every=every) for m, o in zip((bare, scaled), optimizers, strict=True))
    for step in range(8):
        bare.zero_grad()
        loss_of(bare, step).backward()
        optimizers[0].step()
    scaled_steps(scaled, optimizers[1], overflows, unscale=unscale)
    assert [record.step for record in found.records] == list(range(every, 9, every))
    for one, other in zip(expected.records, found.records, strict=True):
        for quantity in sinks.record.QUANTITIES:
            assert getattr(other, quantity) == pytest.approx(getattr(one, quantity), rel=1e-5), quantity


def test_the_number_of_steps_leaves_out_those_that_were_skipped_also_between_records(make_model):
    model = make_model(torch.float32)
    optimizer = sgd(model, fused=True)
    watching = Monitor(optimizer, model, every=1000)
    scaled_steps(model, optimizer, {1, 3}, unscale=False)
    assert watching.steps == 8
    assert watching.state_dict() == {"version": 1, "steps": 8}
    watching.load_state_dict({"version": 1, "steps": 5})
    assert watching.steps == 5


# --- Checkpoints and first steps --------------------------------------------------------------------------------------


@every_company
@pytest.mark.parametrize("kind", [optim.SGD, optim.AdamW], ids=lambda kind: kind.__name__)
@pytest.mark.parametrize("rate", [0.02, torch.tensor(0.02)], ids=["number", "tensor"])
def test_the_empty_step_by_which_a_checkpoint_begins_the_state_is_not_counted(kind, rate, adapter, make_model, train):
    from torch.distributed.checkpoint.state_dict import get_optimizer_state_dict

    model = make_model()
    optimizer = kind(model.parameters(), lr=rate)
    memory = attach(model, optimizer, adapter)
    calls: list[float] = []
    optimizer.register_step_post_hook(lambda *_: calls.append(float(optimizer.param_groups[0]["lr"])))
    get_optimizer_state_dict(model, optimizer)
    assert calls == [0.0], "the trap: a step that is none"
    train(model, optimizer, 2)
    assert [record.step for record in memory.records] == [1, 2]


def test_a_first_step_of_rate_zero_counts_as_in_a_warm_up(make_model, train):
    model = make_model()
    optimizer = optim.AdamW(model.parameters(), lr=0.0)
    memory = attach(model, optimizer)
    train(model, optimizer, 2)
    assert [record.step for record in memory.records] == [1, 2]
    assert memory.records[0].update_norm == [0.0] * 3


def test_loading_a_state_into_the_optimizer_changes_nothing_for_the_monitor(make_model, train):
    model = make_model()
    optimizer = sgd(model)
    memory = attach(model, optimizer)
    train(model, optimizer, 1)
    optimizer.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    optimizer.param_groups[0]["lr"] = 0.5
    train(model, optimizer, 1)
    assert [record.lr for record in memory.records] == [[0.02] * 3, [0.5] * 3]


def test_the_rate_of_a_record_is_that_of_its_step_and_not_of_the_next(make_model, backward):
    model = make_model()
    optimizer = sgd(model)
    memory = attach(model, optimizer, "acting")
    scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.5)
    for step in range(3):
        backward(model, step)
        optimizer.step()
        scheduler.step()
    for record, rate in zip(memory.records, (0.02, 0.01, 0.005), strict=True):
        assert record.lr == pytest.approx([rate * factor for factor in record.factor], rel=1e-15)


# --- Wrappers and compilation -----------------------------------------------------------------------------------------


class Wrapper:
    def __init__(self, optimizer: Any) -> None:
        self.optimizer = optimizer

    def step(self) -> None:
        self.optimizer.step()


@every_company
@pytest.mark.parametrize("when", ["before", "after"])
def test_it_attaches_to_the_optimizer_inside_a_wrapper(adapter, when, make_model, backward):
    model = make_model()
    optimizer = sgd(model)
    memory = attach(model, optimizer if when == "before" else Wrapper(optimizer), adapter)
    wrapped = Wrapper(optimizer)
    for step in range(2):
        backward(model, step)
        wrapped.step()
    assert [record.step for record in memory.records] == [1, 2]


@pytest.mark.parametrize("when", ["before", "after"])
def test_it_records_under_accelerate_each_step_that_is_one(when, make_model):
    accelerate = pytest.importorskip("accelerate")
    model = make_model(torch.float32)
    optimizer = sgd(model)
    memory = sinks.Memory()
    if when == "before":
        Monitor(optimizer, model, every=1, sinks=[memory])
    accelerator = accelerate.Accelerator(cpu=True, gradient_accumulation_steps=2)
    prepared, wrapped = accelerator.prepare(model, optimizer)
    if when == "after":
        Monitor(wrapped, prepared, every=1, sinks=[memory])
    for step in range(6):
        with accelerator.accumulate(prepared):
            accelerator.backward(loss_of(prepared, step))
            wrapped.step()
            wrapped.zero_grad()
    assert [record.step for record in memory.records] == [1, 2, 3]
    assert memory.records[0].layers == ("0", "2", "4")


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers")
def test_it_records_under_lightning_which_steps_with_a_closure(make_model, tmp_path):
    lightning = pytest.importorskip("lightning")
    memory = sinks.Memory()

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.model = make_model(torch.float32)

        def training_step(self, batch: Any, number: int) -> Tensor:
            return loss_of(self.model, number)

        def configure_optimizers(self) -> optim.Optimizer:
            optimizer = sgd(self.model)
            Monitor(optimizer, self, every=2, sinks=[memory])
            return optimizer

    trainer = lightning.Trainer(
        max_epochs=1,
        accelerator="cpu",
        logger=False,
        enable_checkpointing=False,
        enable_progress_bar=False,
        enable_model_summary=False,
        default_root_dir=tmp_path,
    )
    trainer.fit(Module(), torch.utils.data.DataLoader(range(5)))
    bare = make_model(torch.float32)
    optimizer = sgd(bare)
    expected = attach(bare, optimizer, every=2)
    for step in range(5):
        bare.zero_grad()
        loss_of(bare, step).backward()
        optimizer.step()
    assert [record.layers for record in memory.records] == [("model.0", "model.2", "model.4")] * 2
    assert [record.gradient_norm for record in memory.records] == [r.gradient_norm for r in expected.records]


def test_an_optimizer_around_another_is_refused_and_the_inner_one_is_named(make_model):
    class Outer(optim.Optimizer):
        def __init__(self, base: optim.Optimizer) -> None:
            super().__init__(base.param_groups, base.defaults)
            self.base_optimizer = base

    model = make_model()
    with pytest.raises(ValueError, match=r"wraps another optimizer.* attach to optimizer\.base_optimizer"):
        Monitor(Outer(sgd(model)), model)


@pytest.mark.filterwarnings("ignore:.*torch.jit.*is deprecated:DeprecationWarning")
@every_company
def test_a_compiled_step_is_recorded_as_an_eager_one(adapter, make_model, backward):
    records = []
    for compiled in (False, True):
        torch.compiler.reset()
        model = make_model()
        optimizer = sgd(model)
        memory = attach(model, optimizer, adapter, every=2)
        step_once = torch.compile(optimizer.step, backend="eager") if compiled else optimizer.step
        for step in range(4):
            backward(model, step)
            step_once()
        records.append(memory.records)
    assert [record.step for record in records[1]] == [2, 4]
    for eager, traced in zip(*records, strict=True):
        for quantity in sinks.record.QUANTITIES:
            assert getattr(traced, quantity) == pytest.approx(getattr(eager, quantity), rel=1e-12), quantity
