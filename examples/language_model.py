"""A small transformer on text, with AdamW and tied embeddings: plain, layer-adaptive, and plain at the mean factor.

python examples/language_model.py [SEEDS]
"""

import sys

import torch
from torch.nn import functional

import layerwise
from layerwise.lab.data import text
from layerwise.lab.models.transformer import TransformerLanguageModel

RATE, STEPS, BATCH, CONTEXT = 1e-3, 150, 8, 64
reference = text.load()  # Python's own language reference, byte by byte
tests = text.windows(reference.test, 64, CONTEXT + 1, torch.Generator().manual_seed(1))


def loss_on(model, windows):
    """Give the mean loss of the next byte, in nats."""
    return functional.cross_entropy(model(windows[:, :-1]).flatten(0, 1), windows[:, 1:].flatten())


def train(seed, lr, rule=None):
    """Train from the seed's weights on the seed's batches; give the loss on held-out text and the mean factor."""
    model = TransformerLanguageModel(seed, context=CONTEXT, width=32)
    optimizer = torch.optim.AdamW(model.parameters(), lr=lr)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model) if rule else None
    generator, factors = torch.Generator().manual_seed(seed), []
    for _ in range(STEPS):
        optimizer.zero_grad()
        loss_on(model, text.windows(reference.train, BATCH, CONTEXT + 1, generator)).backward()
        optimizer.step()
        factors.extend(adapter.get_last_factors().values() if adapter else ())
    with torch.no_grad():
        return loss_on(model, tests).item(), sum(factors) / len(factors) if factors else 1.0


seeds = range(int(sys.argv[1]) if len(sys.argv) > 1 else 3)
plain = [train(seed, RATE)[0] for seed in seeds]
adaptive, means = zip(*(train(seed, RATE, layerwise.rules.LayerAdaptive()) for seed in seeds), strict=True)
control = [train(seed, RATE * mean)[0] for seed, mean in zip(seeds, means, strict=True)]

print(f"loss on held-out text in nats a byte; without context no model is below {text.entropy(reference.test):.2f}\n")
print(f"{'arm':<28}" + "".join(f"{f'seed {seed}':>9}" for seed in seeds))
for name, row in {"plain": plain, "layer-adaptive": adaptive, "plain at the mean factor": control}.items():
    print(f"{name:<28}" + "".join(f"{value:>9.3f}" for value in row))
print(f"{'the mean factor':<28}" + "".join(f"{value:>9.2f}" for value in means))
print("\nA few seeds at one untuned rate are a glimpse and no comparison. Layer-adaptive rates are larger on average,")
print("so the row to beat is the third: `layerwise compare examples/language_model_task.py:task` tests that.")
