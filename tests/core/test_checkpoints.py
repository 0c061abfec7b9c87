"""Checkpoints of an adapter and its optimizer: `torch.save`, and `torch.distributed.checkpoint` in one process."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.distributed.checkpoint as checkpoints
from torch import Tensor, nn, optim
from torch.distributed.checkpoint.state_dict import StateDictOptions, get_state_dict, set_state_dict

import layerwise
from layerwise.rules import (
    LARS,
    Directionality,
    GradientAmplification,
    LayerAdaptive,
    Phase,
    RandomLayers,
    Rule,
    bounds,
    chain,
)
from rule_cases import RULES as RULE_CASES

pytestmark = pytest.mark.filterwarnings(
    "ignore:torch.distributed is (disabled|unavailable)", "ignore:TypedStorage is deprecated"
)

OPTIMIZERS = {
    "SGD": lambda parameters: optim.SGD(parameters, lr=0.02, momentum=0.9, weight_decay=0.1),
    "AdamW": lambda parameters: optim.AdamW(parameters, lr=0.02),
    "Adagrad": lambda parameters: optim.Adagrad(parameters, lr=0.02),
}
RULES = {
    **{name: case.make(["0", "2", "4"]) for name, case in RULE_CASES.items()},
    "G": GradientAmplification(Directionality("G", threshold=0.5), [Phase(3, True)]),
    "G_prime": GradientAmplification(Directionality("G_prime", threshold=0.5), [Phase(3, True)]),
    "chain": chain(LayerAdaptive(), GradientAmplification(Directionality("G", threshold=0.5), [Phase(3, True)])),
    "random": GradientAmplification(RandomLayers(0.5, redraw="epoch"), [Phase(3, True)]),
}
STEPS_IN_AN_EPOCH, EPOCHS = 4, 3
every_optimizer = pytest.mark.parametrize("kind", OPTIMIZERS.values(), ids=OPTIMIZERS)
every_rule = pytest.mark.parametrize("rule", RULES, indirect=True)
scheduled = pytest.mark.parametrize("schedule", [True, False], ids=["with a schedule", "without"])


@dataclass
class Training:
    """A network, its optimizer, an adapter and perhaps a scheduler."""

    model: nn.Module
    optimizer: optim.Optimizer
    adapter: layerwise.LayerwiseLR
    scheduler: optim.lr_scheduler.LRScheduler | None

    def parts(self) -> dict[str, Any]:
        named = {"model": self.model, "optimizer": self.optimizer, "adapter": self.adapter}
        return named if self.scheduler is None else {**named, "scheduler": self.scheduler}


@pytest.fixture
def rule(request: pytest.FixtureRequest) -> Any:
    return RULES[request.param]


@pytest.fixture
def start(make_model) -> Callable[..., Training]:
    def begin(kind: Any, rule: Any, schedule: bool = False) -> Training:
        model = make_model()
        optimizer = kind(model.parameters())
        adapter = layerwise.LayerwiseLR(optimizer, rule, model, apply="gradient" if rule.needs_scale else "auto")
        scheduler = optim.lr_scheduler.ExponentialLR(optimizer, 0.8) if schedule else None
        return Training(model, optimizer, adapter, scheduler)

    return begin


@pytest.fixture
def go_on(backward) -> Callable[..., list[Any]]:
    """Return a function that takes the steps of a range, and returns each epoch's selection."""

    def run(training: Training, steps: range) -> list[Any]:
        seen = []
        for step in steps:
            backward(training.model, step)
            training.optimizer.step()
            seen.append(training.adapter.get_last_factors())
            if (step + 1) % STEPS_IN_AN_EPOCH == 0:
                training.adapter.end_epoch()
                if training.scheduler is not None:
                    training.scheduler.step()
        return seen

    return run


def assert_same(actual: Any, expected: Any) -> None:
    """Compare nested containers of tensors, numbers and words, tensors to the bit."""
    assert type(actual) is type(expected)
    if isinstance(actual, Mapping):
        assert list(actual) == list(expected)
        for name, value in actual.items():
            assert_same(value, expected[name])
    elif isinstance(actual, Tensor):
        torch.testing.assert_close(actual, expected, rtol=0, atol=0, equal_nan=True)
    elif isinstance(actual, list | tuple):
        for one, other in zip(actual, expected, strict=True):
            assert_same(one, other)
    else:
        assert actual == expected


def assert_same_end(actual: Training, expected: Training) -> None:
    assert_same(actual.model.state_dict(), expected.model.state_dict())
    assert_same(actual.optimizer.state_dict(), expected.optimizer.state_dict())
    assert_same(actual.adapter.state_dict(), expected.adapter.state_dict())


@pytest.fixture
def process_group(tmp_path: Path) -> Iterator[None]:
    """A process group of this process alone, which asynchronous saving wants."""
    dist.init_process_group("gloo", init_method=f"file://{tmp_path / 'group'}", rank=0, world_size=1)
    yield
    dist.destroy_process_group()


# --- In memory ------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("rule", [RULES["G"], RULES["G_prime"], RULES["chain"]], ids=["G", "G_prime", "chain"])
def test_a_state_that_is_kept_in_memory_is_changed_by_none_of_those_who_saved_or_loaded_it(rule, start, go_on):
    saving, first, second = (start(OPTIMIZERS["SGD"], rule) for _ in range(3))
    go_on(saving, range(2))
    state = saving.adapter.state_dict()
    before = copy.deepcopy(state)
    go_on(saving, range(2, 4))
    assert_same(state, before)
    for other in (first, second):
        other.adapter.load_state_dict(state)
        go_on(other, range(2, 4))
        assert_same(state, before)


# --- torch.save -----------------------------------------------------------------------------------------------------


@pytest.mark.pairwise
@scheduled
@every_rule
@pytest.mark.parametrize("kind", [OPTIMIZERS["SGD"], OPTIMIZERS["AdamW"]], ids=["SGD", "AdamW"])
@pytest.mark.parametrize("at", [2, 4, 6], ids=["in an epoch of analysis", "between epochs", "in the next epoch"])
def test_training_goes_on_from_a_file_to_the_bit(at, kind, rule, schedule, start, go_on, tmp_path):
    whole = start(kind, rule, schedule)
    go_on(whole, range(at))
    torch.save({name: part.state_dict() for name, part in whole.parts().items()}, tmp_path / "checkpoint.pt")
    expected = go_on(whole, range(at, EPOCHS * STEPS_IN_AN_EPOCH))

    resumed = start(kind, rule, schedule)
    saved = torch.load(tmp_path / "checkpoint.pt", weights_only=True)
    for name, part in resumed.parts().items():
        part.load_state_dict(saved[name])
    assert resumed.adapter.epoch == 1 + at // STEPS_IN_AN_EPOCH
    assert go_on(resumed, range(at, EPOCHS * STEPS_IN_AN_EPOCH)) == expected
    assert_same_end(resumed, whole)
    if isinstance(rule, GradientAmplification) and rule.selection.measure is not None:
        assert any(one.selected for one in resumed.adapter.get_last_selection().values())


@pytest.mark.parametrize("order", [("optimizer", "adapter"), ("adapter", "optimizer")], ids=" then ".join)
def test_the_order_of_loading_does_not_matter_though_the_groups_are_replaced(order, start, go_on):
    whole, resumed = (start(OPTIMIZERS["SGD"], RULES["chain"]) for _ in range(2))
    go_on(whole, range(2))
    saved = {name: copy.deepcopy(part.state_dict()) for name, part in whole.parts().items() if name != "adapter"}
    saved["adapter"] = whole.adapter.state_dict()  # which does not change as training goes on, unlike the others
    go_on(whole, range(2, 12))
    go_on(resumed, range(1))  # the adapter has seen the groups that are about to be replaced
    group = resumed.optimizer.param_groups[0]
    for name in ("model", *order):
        resumed.parts()[name].load_state_dict(saved[name])
    assert resumed.optimizer.param_groups[0] is not group
    go_on(resumed, range(2, 12))
    assert_same_end(resumed, whole)


# --- torch.distributed.checkpoint -----------------------------------------------------------------------------------


class Application:
    """Model and optimizer as `torch.distributed.checkpoint` wants them: by the names of the parameters."""

    def __init__(self, training: Training, flat: bool) -> None:
        self.training, self.options = training, StateDictOptions(flatten_optimizer_state_dict=flat)

    def state_dict(self) -> dict[str, Any]:
        model, optimizer = get_state_dict(self.training.model, self.training.optimizer, options=self.options)
        return {"model": model, "optimizer": optimizer}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        set_state_dict(
            self.training.model,
            self.training.optimizer,
            model_state_dict=state["model"],
            optim_state_dict=state["optimizer"],
            options=self.options,
        )


def stateful(training: Training, flat: bool = False) -> dict[str, Any]:
    parts: dict[str, Any] = {"application": Application(training, flat), "adapter": training.adapter}
    return parts if training.scheduler is None else {**parts, "scheduler": training.scheduler}


@pytest.mark.pairwise
@scheduled
@every_optimizer
@pytest.mark.parametrize("flat", [False, True], ids=["", "flattened"])
@pytest.mark.parametrize("rule", [RULES["chain"], RULES["random"]], ids=["chain", "random"])
def test_training_goes_on_from_a_distributed_checkpoint_to_the_bit(kind, rule, flat, schedule, start, go_on, tmp_path):
    whole, resumed = (start(kind, rule, schedule) for _ in range(2))
    at = STEPS_IN_AN_EPOCH + 2  # the epoch of analysis is over
    go_on(whole, range(at))
    checkpoints.save(stateful(whole, flat), checkpoint_id=tmp_path)
    expected = go_on(whole, range(at, EPOCHS * STEPS_IN_AN_EPOCH))
    checkpoints.load(stateful(resumed, flat), checkpoint_id=tmp_path)
    assert go_on(resumed, range(at, EPOCHS * STEPS_IN_AN_EPOCH)) == expected
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("rule", [RULES["G"], RULES["G_prime"], RULES["chain"]], ids=["G", "G_prime", "chain"])
def test_half_an_epoch_of_analysis_is_saved_while_training_goes_on(rule, start, go_on, tmp_path, process_group):
    whole, resumed = (start(OPTIMIZERS["SGD"], rule) for _ in range(2))
    go_on(whole, range(2))
    everything = stateful(whole)
    if torch.__version__ < (2, 7):  # whose async_save writes tensors on the CPU from where they are: pytorch#144657
        everything = {name: copy.deepcopy(part.state_dict()) for name, part in everything.items()}
    saving = checkpoints.async_save(everything, checkpoint_id=tmp_path / "checkpoint")
    go_on(whole, range(2, 4))  # changes weights and sums in place while they are being written
    saving.result()
    expected = go_on(whole, range(4, EPOCHS * STEPS_IN_AN_EPOCH))
    checkpoints.load({"application": Application(resumed, flat=False)}, checkpoint_id=tmp_path / "checkpoint")
    layerwise.load_checkpoint(resumed.adapter, tmp_path / "checkpoint")
    go_on(resumed, range(2, 4))
    assert go_on(resumed, range(4, EPOCHS * STEPS_IN_AN_EPOCH)) == expected
    assert_same_end(resumed, whole)


@pytest.mark.parametrize("name", ["G", "chain", "LayerFreezing"])
def test_sums_that_a_distributed_checkpoint_does_not_read_are_missed(name, start, go_on, tmp_path):
    """It fills what is there already, and a new adapter has no sums yet: half an epoch would be lost in silence."""
    whole, resumed = (start(OPTIMIZERS["SGD"], RULES[name]) for _ in range(2))
    go_on(whole, range(2))
    checkpoints.save({"adapter": whole.adapter}, checkpoint_id=tmp_path)
    with pytest.raises(Exception, match=r"sums of an epoch of analysis .* call layerwise.load_checkpoint"):
        checkpoints.load({"adapter": resumed.adapter}, checkpoint_id=tmp_path)
    assert resumed.adapter.epoch == 1


@every_optimizer
@pytest.mark.parametrize("flat", [False, True], ids=["", "flattened"])
def test_the_optimizers_part_is_that_of_a_bare_optimizer(kind, flat, start, go_on, make_model):
    training = start(kind, LayerAdaptive())
    go_on(training, range(2))
    bare = make_model()
    bare.load_state_dict(training.model.state_dict())
    alone = kind(bare.parameters())
    alone.load_state_dict(copy.deepcopy(training.optimizer.state_dict()))
    options = StateDictOptions(flatten_optimizer_state_dict=flat)
    assert_same(
        get_state_dict(training.model, training.optimizer, options=options),
        get_state_dict(bare, alone, options=options),
    )


# --- The rule's arguments -------------------------------------------------------------------------------------------


class Unnamed(Rule):
    """A rule without a `repr` of its own."""

    def factors(self, statistics, state):
        return 1 / statistics.gradient_norm, state


SAME = [LayerAdaptive(), LARS(), RULES["chain"], RULES["LayerFreezing"], Unnamed()]
CHANGED = [
    (LayerAdaptive(), LayerAdaptive(log_base=10), "LayerAdaptive(log_base=10)"),
    (LARS(), LARS(trust_coefficient=0.01), "trust_coefficient=0.01"),
    (RULES["G"], RULES["G_prime"], "measure='G_prime'"),
    (bounds(LayerAdaptive(), 0, 2), bounds(LayerAdaptive(), 0, 3), "0, 3)"),
    (chain(LARS(), LayerAdaptive()), chain(LARS(eps=0), LayerAdaptive()), "eps=0)"),
]


@pytest.mark.parametrize("rule", SAME, ids=lambda rule: type(rule).__name__)
def test_the_same_rule_goes_on_in_silence(rule, setup, caplog):
    _, _, saved = setup(rule)
    _, _, adapter = setup(copy.deepcopy(rule))
    caplog.clear()
    with caplog.at_level(logging.WARNING, "layerwise"):
        adapter.load_state_dict(saved.state_dict())
    assert not caplog.messages


@pytest.mark.parametrize(("before", "after", "difference"), CHANGED, ids=lambda x: x if isinstance(x, str) else "")
def test_a_rule_with_other_arguments_goes_on_with_them_and_the_log_names_both(before, after, difference, setup, caplog):
    _, _, saved = setup(before)
    _, _, adapter = setup(after)
    caplog.clear()
    with caplog.at_level(logging.WARNING, "layerwise"):
        adapter.load_state_dict(saved.state_dict())
    assert caplog.messages == [f"the state was saved for {before!r}; it goes on with {after!r}"]
    assert difference in repr(adapter.rule)
