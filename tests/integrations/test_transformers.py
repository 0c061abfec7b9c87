"""Training by the Hugging Face Trainer with the callback is the hand-written loop with LayerwiseLR, to the bit."""

from __future__ import annotations

import math
import shutil

import by_hand
import pytest
import torch
from torch import nn
from torch.utils.data import IterableDataset, SequentialSampler

import layerwise
from layerwise._hooks import OptimizerHooks
from layerwise.rules import Constant, LayerAdaptive

transformers = pytest.importorskip("transformers", reason="Transformers is not installed")
pytest.importorskip("accelerate", reason="Accelerate is not installed, which the Trainer needs")

from layerwise.integrations.transformers import STATE_FILE, LayerwiseCallback

every_rule = pytest.mark.parametrize("rule", by_hand.RULES.values(), ids=by_hand.RULES)
AMPLIFICATION = by_hand.RULES["GradientAmplification"]


pytestmark = pytest.mark.usefixtures("few_objects")  # the Trainer collects garbage before it trains


class Model(nn.Module):
    def __init__(self):
        super().__init__()
        self.net = by_hand.network()

    def forward(self, inputs, labels):
        return {"loss": by_hand.loss_of(self.net, (inputs, labels))}


class InOrder(transformers.Trainer):
    def _get_train_sampler(self, dataset=None):
        return SequentialSampler(self.train_dataset)


def rows():
    inputs, labels = by_hand.examples().tensors
    return [{"inputs": one, "labels": label} for one, label in zip(inputs, labels, strict=True)]


def make_trainer(folder, *callbacks, kind=transformers.Trainer, optimizer=None, model=None, data=None, **arguments):
    quiet = {"report_to": [], "disable_tqdm": True, "use_cpu": True, "dataloader_pin_memory": False}
    usual = {"num_train_epochs": 3, "save_strategy": "no", "logging_strategy": "no", "learning_rate": 0.1}
    model = model or Model()
    trainer = kind(
        model,
        transformers.TrainingArguments(
            str(folder), per_device_train_batch_size=by_hand.BATCH, **{**quiet, **usual, **arguments}
        ),
        train_dataset=data or rows(),
        callbacks=list(callbacks),
        optimizers=(optimizer and optimizer(model.parameters()), None),
    )
    trainer.remove_callback(transformers.PrinterCallback)
    return trainer


def linear(optimizer, steps):
    return torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: (steps - step) / steps)


def theirs(model):
    """The optimizer that the Trainer makes: AdamW, decay for weights alone."""
    weights = [p for name, p in model.named_parameters() if "bias" not in name]
    others = [p for name, p in model.named_parameters() if "bias" in name]
    groups = [{"params": weights, "weight_decay": 0.01}, {"params": others, "weight_decay": 0.0}]
    return torch.optim.AdamW(groups, lr=0.1, fused=True)


FORMS = {
    "full precision": (0.0, 1, None),
    "clipping": (0.3, 1, None),
    "accumulation and clipping": (0.3, 3, None),
    "bf16": (0.0, 1, torch.bfloat16),
}


# --- Against the hand-written loop ------------------------------------------------------------------------------------


@pytest.mark.pairwise
@every_rule
@pytest.mark.parametrize(("clip", "accumulate", "half"), FORMS.values(), ids=FORMS)
@pytest.mark.parametrize("given", [False, True], ids=["its own AdamW", "momentum that is given"])
def test_the_weights_are_those_of_the_loop(given, half, clip, accumulate, rule, tmp_path, weights, assert_same_bits):
    model = by_hand.network()
    optimizer = by_hand.momentum(model.parameters()) if given else theirs(model)
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    schedule = linear(optimizer, 18 // accumulate)
    options = {"accumulate": accumulate, "clip": clip or None, "half": half, "scheduler": schedule}
    by_hand.train(model, optimizer, adapter, **options)

    callback = LayerwiseCallback(rule)
    trainer = make_trainer(
        tmp_path,
        callback,
        kind=InOrder,
        optimizer=by_hand.momentum if given else None,
        weight_decay=0.01,
        gradient_accumulation_steps=accumulate,
        max_grad_norm=clip,
        bf16=half is not None,
    )
    trainer.train()
    assert_same_bits(weights(trainer.model.net), weights(model))
    factors = {f"net.{name}": factor for name, factor in adapter.get_last_factors().items()}
    assert callback.adapter.get_last_factors() == factors
    assert callback.adapter.epoch == adapter.epoch == 4


def test_the_rule_makes_a_difference(tmp_path, weights):
    ends = []
    for callbacks in ([], [LayerwiseCallback(LayerAdaptive())], [LayerwiseCallback(AMPLIFICATION)]):
        trainer = make_trainer(tmp_path, *callbacks, kind=InOrder)
        trainer.train()
        ends.append(weights(trainer.model)["net.first.weight"])
    assert not torch.equal(ends[0], ends[1])
    assert not torch.equal(ends[0], ends[2])


def test_the_arguments_are_those_of_the_adapter(tmp_path):
    callback = LayerwiseCallback(
        Constant({"*": 4.0}), layers="parameter", apply="update", exclude=["*bias"], bounds=(0.5, 3.0)
    )
    make_trainer(tmp_path, callback).train()
    assert callback.adapter.apply == "update"
    assert callback.adapter.get_last_factors() == {
        f"net.{layer}.{name}": 3.0 if name == "weight" else 1.0
        for layer in ("first", "second", "head")
        for name in ("weight", "bias")
    }
    callback = LayerwiseCallback(Constant({"*": 4.0}), on_nonfinite="never")
    with pytest.raises(ValueError, match="on_nonfinite='never'"):
        make_trainer(tmp_path, callback).train()


# --- Checkpoints ------------------------------------------------------------------------------------------------------

MOMENTS = {
    "every second step": {"save_strategy": "steps", "save_steps": 2},
    "every epoch": {"save_strategy": "epoch"},
}
LIMITS = {"epochs": {"num_train_epochs": 4}, "steps": {"max_steps": 22}}


def without_saving(arguments):
    return {**arguments, "save_strategy": "no"}


@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize("saving", MOMENTS.values(), ids=MOMENTS)
def test_resuming_from_any_checkpoint_is_the_uninterrupted_training(saving, limit, tmp_path, weights, assert_same_bits):
    uninterrupted = LayerwiseCallback(AMPLIFICATION)
    whole = make_trainer(tmp_path, uninterrupted, **saving, **limit)
    whole.train()
    every = sorted(int(folder.name.rpartition("-")[2]) for folder in tmp_path.glob("checkpoint-*"))
    assert every == ([*range(2, limit.get("max_steps", 24) + 1, 2)] if "save_steps" in saving else every[:4])
    # In the epoch of analysis, at its ends, and where nothing is left to do; from 22 the Trainer takes a step too many.
    for step in [step for step in every if step in (6, 10, 12, 24)]:
        folder = tmp_path / f"checkpoint-{step}"
        callback = LayerwiseCallback(AMPLIFICATION)
        trainer = make_trainer(tmp_path, callback, **without_saving(saving), **limit)
        trainer.train(resume_from_checkpoint=str(folder))
        assert_same_bits(weights(trainer.model), weights(whole.model))
        one, other = callback.adapter.state_dict(), uninterrupted.adapter.state_dict()
        assert_same_bits(one["state"], other["state"])
        assert one["epoch"] == other["epoch"] == limit.get("max_steps", 24) // by_hand.BATCHES + 1


def test_a_training_that_was_cut_short_by_max_steps_can_be_lengthened(tmp_path, weights, assert_same_bits):
    """Only the schedule knows of the end, so there is none here."""
    ends = []
    for stops in ([24], [10, 24]):
        for number, stop in enumerate(stops):
            callback = LayerwiseCallback(AMPLIFICATION)
            trainer = make_trainer(
                tmp_path, callback, max_steps=stop, save_strategy="epoch", lr_scheduler_type="constant"
            )
            trainer.train(resume_from_checkpoint=number > 0)
        ends.append(weights(trainer.model))
        assert callback.adapter.epoch == 5
        shutil.rmtree(tmp_path)
    assert_same_bits(ends[0], ends[1])


@pytest.fixture
def saved(tmp_path):
    """A checkpoint in the middle of the epoch of analysis."""
    trainer = make_trainer(
        tmp_path / "saved", LayerwiseCallback(AMPLIFICATION), max_steps=8, save_strategy="steps", save_steps=8
    )
    trainer.train()
    return tmp_path / "saved" / "checkpoint-8"


def test_the_sums_of_an_epoch_of_analysis_are_beside_the_optimizers_state(saved):
    (adapter,) = torch.load(saved / STATE_FILE, weights_only=True)["adapters"]
    assert adapter["epoch"] == 2
    assert adapter["state"]["sums"]["signed"]["/net.first.weight"].shape == (8, 6)
    assert not list(saved.glob("*.tmp"))


def test_resuming_from_another_place_is_refused_unless_it_is_named(saved, tmp_path):
    callback = LayerwiseCallback(AMPLIFICATION)
    trainer = make_trainer(tmp_path / "new", callback)
    with pytest.raises(ValueError, match="is not found: give the folder that"):
        trainer.train(resume_from_checkpoint=str(saved))
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks
    trainer = make_trainer(tmp_path / "new", callback, resume_from_checkpoint=str(saved))
    trainer.train(resume_from_checkpoint=trainer.args.resume_from_checkpoint)
    assert callback.adapter.epoch == 4


def test_the_checkpoint_of_another_training_is_not_mistaken_for_the_one_that_is_resumed(saved, tmp_path):
    arguments = {"max_steps": 8, "save_strategy": "steps", "save_steps": 8, "learning_rate": 0.05}
    arguments.update(logging_strategy="steps", logging_steps=4)
    make_trainer(tmp_path / "other", LayerwiseCallback(AMPLIFICATION), **arguments).train()
    trainer = make_trainer(tmp_path / "other", LayerwiseCallback(AMPLIFICATION))
    with pytest.raises(ValueError, match="is not found"):
        trainer.train(resume_from_checkpoint=str(saved))


def test_a_checkpoint_of_another_step_is_not_mistaken_either(saved, tmp_path):
    other = tmp_path / "other"
    make_trainer(other, LayerwiseCallback(AMPLIFICATION), max_steps=4, save_strategy="steps", save_steps=4).train()
    callback = LayerwiseCallback(AMPLIFICATION)
    trainer = make_trainer(saved.parent, callback, max_steps=9, resume_from_checkpoint=str(other / "checkpoint-4"))
    trainer.train(resume_from_checkpoint=str(saved))
    assert callback.adapter.state_dict()["state"]["sums"]["iterations"] == 3, "the third step of epoch 2"


def test_a_rule_without_memory_resumes_from_anywhere(saved, tmp_path, caplog):
    callback = LayerwiseCallback(LayerAdaptive())
    make_trainer(tmp_path / "new", callback).train(resume_from_checkpoint=str(saved))
    assert not [record for record in caplog.records if record.name == "layerwise"]


def test_a_checkpoint_without_a_state_begins_the_rule_anew_and_says_so(saved, caplog):
    (saved / STATE_FILE).unlink()
    callback = LayerwiseCallback(AMPLIFICATION)
    make_trainer(saved.parent, callback).train(resume_from_checkpoint=True)
    assert "training goes on from step 8" in caplog.text
    assert callback.adapter.epoch == 3, "of its own epochs two have ended"


def test_a_state_of_another_rule_is_refused_before_training(saved):
    trainer = make_trainer(saved.parent, LayerwiseCallback(Constant({"*": 2.0})))
    with pytest.raises(ValueError, match="saved for the rule GradientAmplification, this adapter has Constant"):
        trainer.train(resume_from_checkpoint=True)
    assert not trainer.optimizer.optimizer._optimizer_step_pre_hooks


def test_a_checkpoint_of_the_model_alone_holds_no_state(tmp_path):
    arguments = {"save_strategy": "epoch", "save_only_model": True}
    make_trainer(tmp_path, LayerwiseCallback(AMPLIFICATION), **arguments).train()
    assert len(list(tmp_path.glob("checkpoint-*"))) == 3
    assert not list(tmp_path.glob(f"checkpoint-*/{STATE_FILE}"))


# --- Beginning, epochs and end ----------------------------------------------------------------------------------------


def test_the_optimizer_is_free_again_after_training(tmp_path):
    trainer = make_trainer(tmp_path, LayerwiseCallback(LayerAdaptive()))
    trainer.train()
    optimizer = trainer.optimizer.optimizer
    assert not optimizer._optimizer_step_pre_hooks
    assert not optimizer._optimizer_step_post_hooks


def test_training_again_after_an_exception_attaches_once_and_begins_anew(tmp_path):
    class Failing(transformers.TrainerCallback):
        armed = True

        def on_step_end(self, args, state, control, **kwargs):
            if self.armed and state.global_step == 8:
                self.armed = False
                raise ZeroDivisionError("a bug of theirs")

        def on_epoch_begin(self, args, state, control, optimizer, **kwargs):
            self.adapters = len(OptimizerHooks.members_of(optimizer.optimizer))

    callback, failing = LayerwiseCallback(Constant({"net.first": 2.0})), Failing()
    trainer = make_trainer(tmp_path, callback, failing, optimizer=by_hand.momentum)
    with pytest.raises(ZeroDivisionError):
        trainer.train()
    trainer.train()
    assert failing.adapters == 1
    assert callback.adapter.epoch == 4


def test_a_stream_without_a_length_has_an_epoch_each_time_it_is_read(tmp_path):
    class Stream(IterableDataset):
        def __iter__(self):
            return iter(rows())

    callback = LayerwiseCallback(AMPLIFICATION)
    make_trainer(tmp_path, callback, data=Stream(), max_steps=17).train()
    assert callback.adapter.epoch == 3, "the third was cut short"
    assert all(0 < layer.value < 1 for layer in callback.adapter.get_last_selection().values())


def test_a_model_made_from_a_configuration_trains(tmp_path, weights):
    """A transformer, with its embeddings left alone."""
    configuration = transformers.ViTConfig(
        image_size=8,
        patch_size=4,
        num_channels=1,
        hidden_size=8,
        num_hidden_layers=1,
        num_attention_heads=2,
        intermediate_size=16,
    )
    pixels = torch.rand(12, 1, 8, 8)
    data = [{"pixel_values": one, "labels": torch.tensor(i % 2)} for i, one in enumerate(pixels)]
    model = transformers.ViTForImageClassification(configuration)
    callback = LayerwiseCallback(LayerAdaptive(), exclude=["vit.embeddings*"])
    make_trainer(tmp_path, callback, model=model, data=data, num_train_epochs=1).train()
    factors = callback.adapter.get_last_factors()
    assert "classifier" in factors
    assert all((factor == 1) == name.startswith("vit.embeddings") for name, factor in factors.items())
    assert all(math.isfinite(factor) for factor in factors.values())


# --- Logs -------------------------------------------------------------------------------------------------------------


class Noting(transformers.TrainerCallback):
    """Reads the adapter after every step, and the logs that reach it."""

    def __init__(self, callback):
        self.callback, self.rows, self.logs = callback, {}, []

    def on_step_end(self, args, state, control, **kwargs):
        adapter = self.callback.adapter
        row = {f"layerwise/lr/{name}": rate for name, rate in adapter.get_last_lr().items()}
        row.update({f"layerwise/factor/{name}": factor for name, factor in adapter.get_last_factors().items()})
        self.rows[state.global_step] = row

    def on_log(self, args, state, control, logs, **kwargs):
        self.logs.append(dict(logs))


def ours(log):
    return {name: value for name, value in log.items() if name.startswith("layerwise/")}


def test_the_trainers_logs_hold_rates_and_factors(tmp_path):
    callback = LayerwiseCallback(LayerAdaptive(), log_every=4)
    noting = Noting(callback)
    trainer = make_trainer(tmp_path, callback, noting, logging_strategy="steps", logging_steps=2)
    trainer.train()
    logged = {log["step"]: ours(log) for log in trainer.state.log_history if ours(log)}
    assert logged == {step: noting.rows[step] for step in (4, 8, 12, 16)}
    assert [ours(log) for log in noting.logs if ours(log)] == list(logged.values())
    assert set(logged[4]) == {
        f"layerwise/{what}/net.{layer}" for what in ("lr", "factor") for layer in ("first", "second", "head")
    }


def test_none_logs_nothing(tmp_path):
    trainer = make_trainer(
        tmp_path, LayerwiseCallback(LayerAdaptive(), log_every=None), logging_strategy="steps", logging_steps=1
    )
    trainer.train()
    assert not [log for log in trainer.state.log_history if ours(log)]


def test_tensorboard_gets_them_from_a_callback_in_front(tmp_path, monkeypatch):
    events = pytest.importorskip(
        "tensorboard.backend.event_processing.event_accumulator", reason="TensorBoard is not installed"
    )
    monkeypatch.setenv("TENSORBOARD_LOGGING_DIR", str(tmp_path / "events"))
    callback = LayerwiseCallback(LayerAdaptive(), log_every=2)
    noting = Noting(callback)
    trainer = make_trainer(tmp_path, noting, report_to=["tensorboard"], logging_strategy="steps", logging_steps=2)
    trainer.callback_handler.callbacks.insert(0, callback)
    trainer.train()
    accumulator = events.EventAccumulator(str(tmp_path / "events"))
    accumulator.Reload()
    for name in noting.rows[2]:
        scalars = {event.step: event.value for event in accumulator.Scalars(f"train/{name}")}
        assert scalars == pytest.approx({step: noting.rows[step][name] for step in range(2, 19, 2)}, rel=1e-6)
