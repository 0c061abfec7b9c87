"""The code of docs/frameworks.md runs, and its links lead somewhere."""

from __future__ import annotations

import re
from pathlib import Path

import by_hand
import pytest
import torch
from torch import nn
from torch.utils.data import DataLoader

import layerwise

pytestmark = pytest.mark.full

DOCUMENT = Path(__file__).parents[2] / "docs" / "frameworks.md"
TEXT = DOCUMENT.read_text(encoding="utf-8")
BLOCKS = dict(re.findall(r"## ([^\n]+)\n\n<!--[^\n]*-->\n```python\n(.*?)```", TEXT, re.S))
NEEDS = {
    "Lightning Trainer": ["lightning"],
    "Fabric": ["lightning"],
    "Accelerate": ["accelerate"],
    "Hugging Face Trainer": ["transformers", "accelerate"],
}


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = by_hand.network()

    def forward(self, inputs, labels):
        return {"loss": by_hand.loss_of(self.net, (inputs, labels))}


def module_of_lightning():
    import lightning

    class Module(lightning.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = by_hand.network()

        def training_step(self, batch, index):
            return by_hand.loss_of(self.net, batch)

        def configure_optimizers(self):
            return by_hand.momentum(self.parameters())

    return Module()


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
@pytest.mark.parametrize("name", NEEDS)
def test_its_code_runs(name, tmp_path, monkeypatch, capsys):
    for package in NEEDS[name]:
        pytest.importorskip(package, reason=f"{package} is not installed")
    monkeypatch.chdir(tmp_path)
    model = Model() if name == "Hugging Face Trainer" else by_hand.network()
    inputs, labels = by_hand.examples().tensors
    namespace = {
        "model": model,
        "optimizer": by_hand.momentum(model.parameters()),
        "loader": DataLoader(by_hand.examples(), by_hand.BATCH),
        "dataset": [{"inputs": one, "labels": label} for one, label in zip(inputs, labels, strict=True)],
        "path": str(tmp_path / "folder"),
    }
    if name == "Lightning Trainer":
        namespace["module"] = module_of_lightning()
    with torch.random.fork_rng():
        exec(BLOCKS[name], namespace)
    if "print(" in BLOCKS[name]:
        assert "'net.first': " in capsys.readouterr().out
    else:
        assert namespace["adapter"].layers == ["first", "second", "head"]


def last_blocks():
    return re.findall(r"```python\n(.*?)```", TEXT.split("## A Monitor")[1], re.S)


@pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers")
@pytest.mark.filterwarnings("ignore:The number of training batches .* is smaller than the logging interval")
@pytest.mark.filterwarnings("ignore:Starting from v1.9.0, `tensorboardX` has been removed")
@pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated")
def test_a_monitor_made_in_configure_optimizers_records_in_lightning(tmp_path, monkeypatch):
    lightning = pytest.importorskip("lightning")
    monkeypatch.chdir(tmp_path)
    namespace = {"torch": torch, "layerwise": layerwise}
    exec(last_blocks()[0].replace("every=50", "every=1"), namespace)
    module = module_of_lightning()
    monkeypatch.setattr(type(module), "configure_optimizers", namespace["configure_optimizers"])
    loader = DataLoader(by_hand.examples(), by_hand.BATCH)
    quiet = {"logger": False, "enable_checkpointing": False, "enable_progress_bar": False}
    lightning.Trainer(max_epochs=2, accelerator="cpu", **quiet).fit(module, loader)
    assert module.monitor.get_last_record().step == 2 * len(loader)
    assert len((tmp_path / "runs" / "layers.jsonl").read_text().splitlines()) == 2 * len(loader)


@pytest.mark.filterwarnings("ignore:'pin_memory' argument is set as true but no accelerator is found")
def test_the_hugging_face_trainer_steps_in_backward_with_an_optimizer_of_ones_own(tmp_path):
    transformers = pytest.importorskip("transformers")
    pytest.importorskip("accelerate")
    model = Model()
    inputs, labels = by_hand.examples().tensors
    namespace = {
        "torch": torch,
        "layerwise": layerwise,
        "Trainer": transformers.Trainer,
        "TrainingArguments": transformers.TrainingArguments,
        "model": model,
        "dataset": [{"inputs": one, "labels": label} for one, label in zip(inputs, labels, strict=True)],
        "path": str(tmp_path / "folder"),
    }
    with torch.random.fork_rng():
        exec(last_blocks()[1], namespace)
        namespace["trainer"].train()
    assert all(rate > 1e-5 for rate in namespace["handle"].get_last_lr().values())
    assert list(namespace["handle"].get_last_factors()) == ["net.first", "net.second", "net.head"]
    assert min(namespace["handle"].get_last_factors().values()) > 1
    assert all(p.grad is None for p in model.parameters())


def test_every_section_of_a_framework_has_code():
    assert list(BLOCKS) == list(NEEDS)
