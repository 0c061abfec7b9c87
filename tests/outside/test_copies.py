"""Modules that hold a monitor, an adapter or a handle: copied and pickled without it, which is said once."""

from __future__ import annotations

import copy
import dataclasses
import io
import pickle
import warnings
from collections.abc import Callable
from typing import Any

import pytest
import torch
from torch import Tensor, nn, optim

import layerwise
from layerwise import sinks
from layerwise.rules import Constant, LayerAdaptive


class Held(nn.Module):
    """A module that keeps what was attached to its optimizer, as a LightningModule does."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(3, 2)
        self.attached: Any = None

    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x)


def saved(thing: Any) -> Any:
    buffer = io.BytesIO()
    torch.save(thing, buffer)
    buffer.seek(0)
    return torch.load(buffer, weights_only=False)


COPIES: dict[str, Callable[[Any], Any]] = {
    "deepcopy": copy.deepcopy,
    "pickle": lambda thing: pickle.loads(pickle.dumps(thing)),
    "old pickle": lambda thing: pickle.loads(pickle._dumps(thing, protocol=2)),
    "torch.save": saved,
}
KINDS: dict[str, Callable[[Any, Any], Any]] = {
    "LayerwiseLR": lambda optimizer, model: layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model),
    "Monitor": lambda optimizer, model: layerwise.Monitor(optimizer, model, every=1, sinks=[print, sinks.Memory()]),
    "StepInBackward": lambda optimizer, model: layerwise.step_in_backward(optimizer, model, LayerAdaptive()),
}


def holding(kind: str) -> tuple[Held, optim.Optimizer]:
    model = Held()
    optimizer = optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    model.attached = KINDS[kind](optimizer, model)
    return model, optimizer


@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_of_a_module_comes_without_it_and_says_so_once(kind: str, duplicate: Any) -> None:
    model, optimizer = holding(kind)
    with pytest.warns(UserWarning, match=f"a {kind} is not copied or pickled: the copy holds None") as caught:
        twin = duplicate(model)
    assert len(caught) == 1
    assert twin.attached is None
    assert duplicate(model).attached is None  # a second warning would be an error
    assert model.attached is not None
    for name, p in twin.named_parameters():
        assert torch.equal(p, model.get_parameter(name))
    # The copy trains as a bare module, and the original with what it holds.
    alone = optim.SGD(twin.parameters(), lr=0.1)
    before = model.layer.weight.detach().clone()
    for net, stepping in ((twin, alone), (model, optimizer)):
        net(torch.ones(1, 3)).sum().backward()
        stepping.step()
    torch.testing.assert_close(twin.layer.weight.detach(), before - 0.1)
    assert not torch.equal(model.layer.weight, before)


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_itself_is_none_with_the_remedy(kind: str) -> None:
    model, _ = holding(kind)
    with pytest.warns(UserWarning, match="belongs to one optimizer, whose hooks are not copied either"):
        assert copy.copy(model.attached) is None


def test_the_warning_points_at_the_line_that_copies() -> None:
    model, _ = holding("Monitor")
    with pytest.warns(UserWarning, match="not copied") as caught:
        copy.deepcopy({"nested": [model]})
    assert caught[0].filename == __file__


def test_the_remedy_goes_on_with_the_copy() -> None:
    model, optimizer = holding("LayerwiseLR")
    model.attached.end_epoch()
    with pytest.warns(UserWarning, match=r"carry the state over with state_dict\(\) and load_state_dict\(\)"):
        twin, stepping = copy.deepcopy((model, optimizer))
    adapter = layerwise.LayerwiseLR(stepping, LayerAdaptive(), twin)
    adapter.load_state_dict(model.attached.state_dict())
    assert adapter.epoch == 2
    for net, one in ((model, optimizer), (twin, stepping)):
        net(torch.ones(1, 3)).sum().backward()
        one.step()
    assert torch.equal(model.layer.weight, twin.layer.weight)


@pytest.mark.parametrize("kind", KINDS)
def test_averages_of_a_module_that_holds_one(kind: str) -> None:
    model, optimizer = holding(kind)
    with pytest.warns(UserWarning, match="not copied"):
        average = torch.optim.swa_utils.AveragedModel(model, avg_fn=lambda old, new, n: (old + new) / 2)
    for _ in range(2):
        model(torch.ones(1, 3)).sum().backward()
        optimizer.step()
        optimizer.zero_grad()
        average.update_parameters(model)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        copy.deepcopy(average)
    assert average.module.attached is None


def test_a_dataclass_and_a_scheduler_that_hold_one() -> None:
    @dataclasses.dataclass
    class Training:
        model: Any
        adapter: Any
        schedule: Any

    model, optimizer = holding("LayerwiseLR")
    training = Training(model, model.attached, optim.lr_scheduler.StepLR(optimizer, 1))
    with pytest.warns(UserWarning, match="not copied"):
        twin = copy.deepcopy(training)
    assert twin.adapter is None
    assert not twin.schedule.optimizer._optimizer_step_pre_hooks
    assert dataclasses.asdict(training)["adapter"] is None


@pytest.mark.filterwarnings("error")
@pytest.mark.parametrize("duplicate", COPIES.values(), ids=COPIES)
def test_a_copy_of_an_optimizer_and_of_a_rule_says_nothing(duplicate: Any) -> None:
    _, optimizer = holding("LayerwiseLR")
    assert not duplicate(optimizer)._optimizer_step_pre_hooks
    assert repr(duplicate(Constant({"*": 2.0}))) == repr(Constant({"*": 2.0}))


def test_sinks_with_a_file_or_a_connection_stay_behind(tmp_path: Any) -> None:
    pytest.importorskip("polars")
    kept = {
        "parquet": sinks.Parquet(tmp_path / "a.parquet"),
        "memory": sinks.Memory(),
        "lines": sinks.JSONL(tmp_path / "a.jsonl"),
    }
    with pytest.warns(UserWarning, match="a Parquet is not copied or pickled"):
        twin = copy.deepcopy(kept)
    assert twin["parquet"] is None
    assert type(twin["memory"]) is sinks.Memory
    assert repr(twin["lines"]) == repr(kept["lines"])


def test_a_copied_callback_attaches_its_own_adapters() -> None:
    pytest.importorskip("transformers")
    from layerwise.integrations.transformers import LayerwiseCallback

    callback = LayerwiseCallback(LayerAdaptive(), log_every=None)
    model = Held()
    optimizer = optim.SGD(model.parameters(), lr=0.1)
    state = type("State", (), {"global_step": 0, "epoch": 0.0})()
    callback.on_train_begin(None, state, None, optimizer=optimizer, model=model)
    for duplicate in (copy.deepcopy, COPIES["pickle"]):
        twin = duplicate(callback)
        assert twin.adapter is None
        other = Held()
        twin.on_train_begin(None, state, None, optimizer=optim.SGD(other.parameters(), lr=0.1), model=other)
        assert twin.adapter.layers == ["layer"]
    assert callback.adapter is not None


@pytest.mark.filterwarnings("ignore:.*LeafSpec:FutureWarning", "ignore:.*does not have many workers")
def test_a_lightning_module_that_holds_both_fits_twice_with_averaging(tmp_path: Any) -> None:
    lightning = pytest.importorskip("lightning")
    from lightning.pytorch.callbacks import StochasticWeightAveraging

    from layerwise.integrations.lightning import LayerwiseCallback

    class Module(lightning.LightningModule):
        def __init__(self) -> None:
            super().__init__()
            self.layer = nn.Linear(3, 2)

        def training_step(self, batch: Any, number: int) -> Tensor:
            return self.layer(batch).square().mean()

        def configure_optimizers(self) -> Any:
            optimizer = optim.SGD(self.parameters(), lr=0.1)
            self.adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), self)
            self.monitor = layerwise.Monitor(optimizer, self, every=1)
            return optimizer

    def fit(*callbacks: Any) -> None:
        trainer = lightning.Trainer(
            max_epochs=2,
            accelerator="cpu",
            logger=False,
            enable_checkpointing=False,
            enable_progress_bar=False,
            enable_model_summary=False,
            default_root_dir=tmp_path,
            callbacks=list(callbacks),
        )
        trainer.fit(module, torch.utils.data.DataLoader(torch.ones(4, 3), batch_size=2))

    module, callback = Module(), LayerwiseCallback(Constant({"*": 1.0}), log_every=None)
    fit()
    with pytest.warns(UserWarning, match="not copied"):
        fit(StochasticWeightAveraging(swa_lrs=0.05, swa_epoch_start=1), callback)
    with pytest.warns(UserWarning, match="not copied"):  # Lightning hangs the module's own methods on its callbacks
        twin = copy.deepcopy(callback)
    assert twin.adapters == []
    assert len(callback.adapters) == 1
