"""Per-layer rates in the Hugging Face Trainer: one callback. A small vision transformer on 4,000 digits.

In the clone: pip install -e '.[lab,transformers]' and python examples/hf_trainer.py
"""

import tempfile

from transformers import PrinterCallback, Trainer, TrainingArguments, ViTConfig, ViTForImageClassification, set_seed

from layerwise.integrations.transformers import LayerwiseCallback
from layerwise.lab import data
from layerwise.rules import LayerDecay

digits = data.load("digits5k")  # the lab's embedded data; nothing is downloaded


def rows(images, labels):
    return [{"pixel_values": image, "labels": label} for image, label in zip(data.pixels(images), labels, strict=True)]


set_seed(0)
sizes = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 64}
model = ViTForImageClassification(ViTConfig(image_size=28, patch_size=14, num_channels=1, num_labels=10, **sizes))
layers = LayerwiseCallback(LayerDecay(0.8), log_every=None)  # this line is all there is

with tempfile.TemporaryDirectory() as folder:
    quiet = {"report_to": [], "disable_tqdm": True, "save_strategy": "no", "dataloader_pin_memory": False}
    trainer = Trainer(
        model,
        TrainingArguments(
            folder, num_train_epochs=3, learning_rate=5e-3, per_device_train_batch_size=64, use_cpu=True, **quiet
        ),
        train_dataset=rows(digits.train_images, digits.train_labels),
        eval_dataset=rows(digits.test_images, digits.test_labels),
        compute_metrics=lambda outcome: {"accuracy": (outcome.predictions.argmax(1) == outcome.label_ids).mean()},
        callbacks=[layers],
    )
    trainer.remove_callback(PrinterCallback)
    trainer.train()
    accuracy = trainer.evaluate()["eval_accuracy"]

print(f"accuracy on 1,000 test digits: {accuracy:.1%}")
print("what the rate was multiplied by, from the layer next to the data to the head:")
for name, factor in layers.adapter.get_last_factors().items():
    print(f"  {factor:.3f}  {name}")
