"""Per-layer rates in a Lightning Trainer: one callback. Two epochs on 4,000 digits, then each layer's rate.

In the clone: pip install -e '.[lab,lightning]' and python examples/lightning_trainer.py
"""

import csv
import tempfile
from pathlib import Path

import lightning
import torch
from lightning.pytorch.loggers import CSVLogger
from torch import nn
from torch.nn import functional
from torch.utils.data import DataLoader, TensorDataset

from layerwise.integrations.lightning import LayerwiseCallback
from layerwise.lab import data
from layerwise.rules import LayerAdaptive

digits = data.load("digits5k")  # the lab's embedded data; nothing is downloaded
training = TensorDataset(data.pixels(digits.train_images), digits.train_labels)
testing = TensorDataset(data.pixels(digits.test_images), digits.test_labels)


class Digits(lightning.LightningModule):
    def __init__(self):
        super().__init__()
        sizes = nn.Linear(784, 64), nn.ReLU(), nn.Linear(64, 32), nn.ReLU(), nn.Linear(32, 10)
        self.net = nn.Sequential(nn.Flatten(), *sizes)

    def training_step(self, batch, index):
        return functional.cross_entropy(self.net(batch[0]), batch[1])

    def validation_step(self, batch, index):
        self.log("accuracy", (self.net(batch[0]).argmax(1) == batch[1]).float().mean())

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.01, momentum=0.9)


lightning.seed_everything(0, verbose=False)
layers = LayerwiseCallback(LayerAdaptive(), log_every=20)  # this line is all there is
with tempfile.TemporaryDirectory() as folder:
    logs = CSVLogger(folder)
    quiet = {"enable_model_summary": False, "enable_progress_bar": False, "default_root_dir": folder}
    trainer = lightning.Trainer(max_epochs=2, accelerator="cpu", callbacks=[layers], logger=logs, **quiet)
    trainer.fit(Digits(), DataLoader(training, 64, shuffle=True), DataLoader(testing, 500))
    rows = list(csv.DictReader(Path(logs.log_dir, "metrics.csv").read_text().splitlines()))

print(f"accuracy on 1,000 test digits: {float(trainer.callback_metrics['accuracy']):.1%}")
print("the optimizer's rate is 0.01; that of each layer, every 20 steps, as the logger has it:")
for name in layers.adapters[0].layers:
    rates = [row[f"layerwise/lr/{name}"] for row in rows]
    print(f"  {name}  " + "  ".join(f"{float(rate):.4f}" for rate in rates if rate))
