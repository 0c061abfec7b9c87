"""LoRA on a transformer that was trained on English and learns source code; needs PEFT.

In the clone: pip install -e '.[lab]' peft and python examples/lora.py [SEEDS]
"""

import inspect
import re
import sys
from copy import deepcopy

import torch
from peft import LoraConfig, get_peft_model

import layerwise
from layerwise.lab.data import text
from layerwise.lab.models.transformer import TransformerLanguageModel
from layerwise.rules import LayerAdaptive

RATE, PRETRAINING, STEPS, BATCH, LENGTH = 3e-3, 150, 80, 8, 65
english, program = text.load(), text.of(inspect.getsource(inspect))
tests = text.windows(program.test, 64, LENGTH, torch.Generator().manual_seed(1))


def one_layer_a_target(name, parameter):
    """Name the layer of a parameter by its module, and within a LoRA adapter by what it adapts and by its name."""
    found = re.fullmatch(r"(.+)\.lora_(?:A|B|embedding_A|embedding_B|magnitude_vector)\.([^.]+)(?:\.weight)?", name)
    return f"{found[1]}.{found[2]}" if found else name.rpartition(".")[0]


def loss_on(model, windows):
    """Give the mean loss of the next byte, in nats."""
    return torch.nn.functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(model, seed, words, steps, lr=RATE, layers=None):
    """Train what is not frozen; give the mean factor."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=lr)
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model, layers=layers) if layers else None
    generator, factors = torch.Generator().manual_seed(seed), []
    for _ in range(steps):
        optimizer.zero_grad()
        loss_on(model, text.windows(words, BATCH, LENGTH, generator)).backward()
        optimizer.step()
        factors.extend(adapter.get_last_factors().values() if adapter else ())
    return sum(factors) / len(factors) if factors else 1.0


rows = {name: [] for name in ("plain", "A and B two layers", "A and B one layer", "plain at the last's mean")}
for seed in (seeds := range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)):
    base, factor = TransformerLanguageModel(seed, width=32), 1.0
    train(base, seed, english.train, PRETRAINING)
    for arm, layers in zip(rows, (None, "module", one_layer_a_target, None), strict=True):
        torch.manual_seed(seed)  # of LoRA's A; B begins at 0
        model = get_peft_model(deepcopy(base), LoraConfig(r=4, target_modules=["query_key_value", "expand"]))
        factor = train(model, seed, program.train, STEPS, RATE * (1.0 if layers else factor), layers)
        rows[arm].append(loss_on(model, tests).item())
print(f"loss on unseen source code in nats a byte\n\n{'arm':<26}" + "".join(f"{f'seed {s}':>9}" for s in seeds))
print("\n".join(f"{name:<26}" + "".join(f"{value:>9.3f}" for value in row) for name, row in rows.items()))
print("\nA few seeds at one untuned rate are a glimpse and no comparison. The row to beat is the last.")
