"""Training by Lightning's Trainer with the callback is the hand-written loop with LayerwiseLR, to the bit."""

from __future__ import annotations

import copy
import csv
import logging

import by_hand
import pytest
import torch
from torch.utils.data import DataLoader, IterableDataset

import layerwise
from layerwise.rules import AllLayers, Constant, GradientAmplification, LayerAdaptive, Phase

lightning = pytest.importorskip("lightning", reason="Lightning is not installed")

from lightning.pytorch.callbacks import LearningRateFinder, ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.plugins.precision import MixedPrecision
from lightning.pytorch.strategies import SingleDeviceStrategy

from layerwise.integrations.lightning import LayerwiseCallback

pytestmark = [
    pytest.mark.filterwarnings("ignore:The '.*_dataloader' does not have many workers"),
    pytest.mark.filterwarnings("ignore:`isinstance\\(treespec, LeafSpec\\)` is deprecated"),
    pytest.mark.filterwarnings("ignore:Be aware that when using `ckpt_path`, callbacks used to create"),
]
every_rule = pytest.mark.parametrize("rule", by_hand.RULES.values(), ids=by_hand.RULES)


@pytest.fixture(autouse=True)
def _quiet():
    loggers = [logging.getLogger("lightning.pytorch"), logging.getLogger("lightning.fabric")]
    before = [logger.level for logger in loggers]
    for logger in loggers:
        logger.setLevel(logging.ERROR)
    yield
    for logger, level in zip(loggers, before, strict=True):
        logger.setLevel(level)


class Module(lightning.LightningModule):
    def __init__(self, configure=by_hand.momentum):
        super().__init__()
        self.net = by_hand.network()
        self.configure = configure

    def training_step(self, batch, index):
        return by_hand.loss_of(self.net, batch)

    def configure_optimizers(self):
        return self.configure(self.net.parameters())


class Validated(Module):
    def validation_step(self, batch, index):
        by_hand.loss_of(self.net, batch)


class Looked(Validated):
    def test_step(self, batch, index):
        self.validation_step(batch, index)


class ResumableLoader(DataLoader):
    """Goes on where it was, as Lightning asks of a loader for resuming in the middle of an epoch."""

    position = 0

    def __iter__(self):
        first = self.position
        for number, batch in enumerate(super().__iter__()):
            if number >= first:
                self.position = (number + 1) % len(self)
                yield batch

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def make_trainer(folder, *callbacks, package=lightning, **arguments):
    quiet = {"logger": False, "enable_progress_bar": False, "enable_model_summary": False}
    checkpoints = any(isinstance(callback, ModelCheckpoint) for callback in callbacks)
    return package.Trainer(
        accelerator="cpu",
        default_root_dir=folder,
        callbacks=list(callbacks),
        **{"max_epochs": 3, "enable_checkpointing": checkpoints, **quiet, **arguments},
    )


def fit(folder, callback, module=None, **arguments):
    module = module or Module()
    trainer = make_trainer(folder, *([callback] if callback else []), **arguments)
    trainer.fit(module, DataLoader(by_hand.examples(), by_hand.BATCH))
    return module.net


def expected(rule, optimizer=by_hand.momentum, **arguments):
    model = by_hand.network()
    optimizer = optimizer(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, rule, model)
    trained = by_hand.train(model, optimizer, adapter, **arguments)
    adapter.detach()  # its last values remain when the optimizer is gone
    return trained, adapter


def without_prefix(factors):
    return {name.removeprefix("net."): factor for name, factor in factors.items()}


# --- Against the hand-written loop ------------------------------------------------------------------------------------

OPTIMIZERS = {
    "momentum": by_hand.momentum,
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01),
    "fused AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.01, fused=True),
}
PRECISIONS = {
    "automatic optimization": ({}, {}),
    "accumulation, the last batches fewer": ({"accumulate_grad_batches": 4}, {"accumulate": 4}),
    "clipping": ({"gradient_clip_val": 0.3}, {"clip": 0.3}),
    "accumulation and clipping": (
        {"accumulate_grad_batches": 2, "gradient_clip_val": 0.3},
        {"accumulate": 2, "clip": 0.3},
    ),
    "bf16-mixed": ({"precision": "bf16-mixed"}, {"half": torch.bfloat16}),
}


@pytest.mark.pairwise
@every_rule
@pytest.mark.parametrize("optimizer", OPTIMIZERS.values(), ids=OPTIMIZERS)
@pytest.mark.parametrize(("lightnings", "ours"), PRECISIONS.values(), ids=PRECISIONS)
def test_the_weights_are_those_of_the_loop(lightnings, ours, optimizer, rule, tmp_path, weights, assert_same_bits):
    model, adapter = expected(rule, optimizer, **ours)
    callback = LayerwiseCallback(rule)
    assert_same_bits(weights(fit(tmp_path, callback, Module(optimizer), **lightnings)), weights(model))
    assert without_prefix(callback.adapters[0].get_last_factors()) == adapter.get_last_factors()
    bare = by_hand.network()
    by_hand.train(bare, optimizer(bare.parameters()), None, **ours)
    assert not torch.equal(bare.first.weight, model.first.weight), "the rule must make a difference to be tested"


@pytest.mark.pairwise
@every_rule
@pytest.mark.parametrize("clip", [None, 0.3])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_float16_with_a_scaler_that_skips_steps_is_the_loop(name, clip, rule, tmp_path, weights, assert_same_bits):
    scalers = [torch.amp.GradScaler("cpu", init_scale=2.0**20) for _ in range(2)]
    plugin = MixedPrecision("16-mixed", "cpu", scalers[0])
    module, callback = Module(OPTIMIZERS[name]), LayerwiseCallback(rule)
    if name.startswith("fused") and clip is not None:
        with pytest.raises(RuntimeError, match="does not allow for gradient clipping"):  # Lightning's own
            fit(tmp_path, callback, module, plugins=[plugin], gradient_clip_val=clip)
        return
    model, _ = expected(rule, OPTIMIZERS[name], half=torch.float16, scaler=scalers[1], clip=clip)
    actual = fit(tmp_path, callback, module, plugins=[plugin], gradient_clip_val=clip)
    assert_same_bits(weights(actual), weights(model))
    assert scalers[0].get_scale() == scalers[1].get_scale()
    assert scalers[0].get_scale() < 2.0**20, "a step must have been skipped"


def test_rates_of_a_scheduler_are_scaled(tmp_path, weights, assert_same_bits):
    def configure(parameters):
        optimizer = by_hand.momentum(parameters)
        scheduler = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=18)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}

    model = by_hand.network()
    optimizer = by_hand.momentum(model.parameters())
    adapter = layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    by_hand.train(model, optimizer, adapter, scheduler=torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 18))
    callback = LayerwiseCallback(LayerAdaptive())
    assert_same_bits(weights(fit(tmp_path, callback, Module(configure))), weights(model))
    assert without_prefix(callback.adapters[0].get_last_lr()) == adapter.get_last_lr()


class TwoOptimizers(Module):
    """Manual optimization: SGD with momentum for the first layer, AdamW for the others at every second batch."""

    automatic_optimization = False

    def __init__(self):
        super().__init__()
        self.automatic_optimization = False

    def training_step(self, batch, index):
        first, others = self.optimizers()
        loss = by_hand.loss_of(self.net, batch)
        self.manual_backward(loss)
        first.step()
        first.zero_grad()
        if index % 2:
            others.step()
            others.zero_grad()

    def configure_optimizers(self):
        return self.make(self.net)

    @staticmethod
    def make(net):
        others = [*net.second.parameters(), *net.head.parameters()]
        return [by_hand.momentum(net.first.parameters()), torch.optim.AdamW(others, lr=0.01)]


@every_rule
def test_manual_optimization_with_two_optimizers_is_the_loop(rule, tmp_path, weights, assert_same_bits):
    model = by_hand.network()
    first, others = optimizers = TwoOptimizers.make(model)
    adapters = [layerwise.LayerwiseLR(optimizer, rule, model) for optimizer in optimizers]
    for _ in range(3):
        for index, batch in enumerate(by_hand.batches()):
            by_hand.loss_of(model, batch).backward()
            first.step()
            first.zero_grad()
            if index % 2:
                others.step()
                others.zero_grad()
        for adapter in adapters:
            adapter.end_epoch()
    callback = LayerwiseCallback(rule)
    assert_same_bits(weights(fit(tmp_path, callback, TwoOptimizers())), weights(model))
    assert [adapter.layers for adapter in callback.adapters] == [["net.first"], ["net.second", "net.head"]]
    for actual, adapter in zip(callback.adapters, adapters, strict=True):
        assert without_prefix(actual.get_last_factors()) == adapter.get_last_factors()


@pytest.mark.filterwarnings("ignore:`training_step` returned `None`")
def test_a_step_without_a_loss_changes_nothing(tmp_path, weights, assert_same_bits):
    class Skipping(Module):
        def training_step(self, batch, index):
            return None if index == 2 else super().training_step(batch, index)

    model = by_hand.network()
    optimizer = by_hand.momentum(model.parameters())
    layerwise.LayerwiseLR(optimizer, LayerAdaptive(), model)
    for index, batch in enumerate(by_hand.batches()):
        optimizer.zero_grad()
        if index != 2:
            by_hand.loss_of(model, batch).backward()
        optimizer.step()
    actual = fit(tmp_path, LayerwiseCallback(LayerAdaptive()), Skipping(), max_epochs=1)
    assert_same_bits(weights(actual), weights(model))


def test_the_arguments_are_those_of_the_adapter(tmp_path):
    callback = LayerwiseCallback(
        Constant({"*": 4.0}), layers="parameter", apply="update", exclude=["*bias"], bounds=(0.5, 3.0)
    )
    fit(tmp_path, callback)
    (adapter,) = callback.adapters
    assert adapter.apply == "update"
    assert adapter.get_last_factors() == {
        f"net.{layer}.{name}": 3.0 if name == "weight" else 1.0
        for layer in ("first", "second", "head")
        for name in ("weight", "bias")
    }
    callback = LayerwiseCallback(Constant({"*": 4.0}), on_nonfinite="never")
    with pytest.raises(ValueError, match="on_nonfinite='never'"):
        fit(tmp_path, callback)


def test_the_other_package_works_too(tmp_path, weights, assert_same_bits):
    other = pytest.importorskip("pytorch_lightning", reason="pytorch_lightning is not installed")

    class TheirModule(other.LightningModule):
        def __init__(self):
            super().__init__()
            self.net = by_hand.network()

        def training_step(self, batch, index):
            return by_hand.loss_of(self.net, batch)

        def configure_optimizers(self):
            return by_hand.momentum(self.parameters())

    logging.getLogger("pytorch_lightning").setLevel(logging.ERROR)
    module, (model, _) = TheirModule(), expected(LayerAdaptive())
    callback = LayerwiseCallback(LayerAdaptive())
    assert_same_bits(weights(fit(tmp_path, callback, module, package=other)), weights(model))


# --- Checkpoints ------------------------------------------------------------------------------------------------------

MOMENTS = {
    "after every second step, without validation": ({"every_n_train_steps": 2}, False),
    "after every second step, with validation": ({"every_n_train_steps": 2}, True),
    "at the end of training epochs, without validation": ({}, False),
    "at the end of training epochs, with validation": ({"save_on_train_epoch_end": True}, True),
    "at the end of validation": ({"save_on_train_epoch_end": False}, True),
}
LIMITS = {"epochs": {"max_epochs": 4}, "steps": {"max_epochs": -1, "max_steps": 22}}


def run(folder, rule, *, validation, checkpoint=None, saved=None, strategy="auto", **limits):
    module, callback = Validated() if validation else Module(), LayerwiseCallback(rule)
    savers = [] if saved is None else [ModelCheckpoint(folder, save_top_k=-1, **saved)]
    trainer = make_trainer(folder, callback, *savers, strategy=strategy, **limits)
    data = ResumableLoader(by_hand.examples(), by_hand.BATCH)
    loaders = [data, DataLoader(by_hand.examples(), 12)] if validation else [data]
    trainer.fit(module, *loaders, ckpt_path=checkpoint, weights_only=True if checkpoint else None)
    return module.net, callback


@pytest.mark.pairwise
@pytest.mark.parametrize("limit", LIMITS.values(), ids=LIMITS)
@pytest.mark.parametrize(("saved", "validation"), MOMENTS.values(), ids=MOMENTS)
def test_resuming_from_any_checkpoint_is_the_uninterrupted_training(
    saved, validation, limit, tmp_path, weights, assert_same_bits
):
    rule = by_hand.RULES["GradientAmplification"]
    whole, uninterrupted = run(tmp_path, rule, validation=validation, saved=saved, **limit)
    checkpoints = sorted(tmp_path.glob("*.ckpt"))
    assert len(checkpoints) >= 3
    if "max_steps" in limit and not saved:
        return  # Lightning 2.6 then trains one batch more in the epoch that has ended, with or without this callback
    for checkpoint in checkpoints:
        model, callback = run(tmp_path, rule, validation=validation, checkpoint=checkpoint, **limit)
        if callback.adapters:  # else there was nothing left to train
            assert_same_bits(weights(model), weights(whole))
        (one,), (other,) = callback.state_dict()["adapters"], uninterrupted.state_dict()["adapters"]
        assert_same_bits(one["state"], other["state"])
        assert one["epoch"] == other["epoch"] == limit.get("max_steps", 24) // by_hand.BATCHES + 1


class LateRestoring(SingleDeviceStrategy):
    """Loads checkpoints once the optimizers are there, as the strategies do that shard them."""

    @property
    def restore_checkpoint_after_setup(self):
        return True


def test_a_strategy_that_loads_checkpoints_late_works_too(tmp_path, weights, assert_same_bits):
    rule = by_hand.RULES["GradientAmplification"]
    whole, _ = run(tmp_path, rule, validation=False, saved={"every_n_train_steps": 2}, max_epochs=4)
    checkpoint = next(tmp_path.glob("*step=8.ckpt"))
    module, callback = Module(), LayerwiseCallback(rule)
    trainer = make_trainer(tmp_path, callback, strategy=LateRestoring(), max_epochs=4)
    trainer.fit(module, ResumableLoader(by_hand.examples(), by_hand.BATCH), ckpt_path=checkpoint)
    assert_same_bits(weights(module.net), weights(whole))


def test_a_checkpoint_saved_after_training_holds_the_state(tmp_path):
    callback, module = LayerwiseCallback(by_hand.RULES["GradientAmplification"]), Module()
    trainer = make_trainer(tmp_path, callback)
    trainer.fit(module, DataLoader(by_hand.examples(), by_hand.BATCH))
    trainer.save_checkpoint(tmp_path / "last.ckpt")
    saved = torch.load(tmp_path / "last.ckpt", weights_only=True)["callbacks"]["LayerwiseCallback"]
    assert saved["adapters"][0]["epoch"] == 4
    assert len(torch.load(tmp_path / "last.ckpt", weights_only=True)["optimizer_states"][0]["param_groups"]) == 1


def test_a_checkpoint_without_a_state_begins_the_rule_anew_and_says_so(tmp_path, caplog):
    run(tmp_path, LayerAdaptive(), validation=False, saved={}, max_epochs=4)
    checkpoint = next(tmp_path.glob("*step=12.ckpt"))
    saved = torch.load(checkpoint, weights_only=True)
    saved["callbacks"] = {}
    torch.save(saved, checkpoint)
    _, callback = run(tmp_path, LayerAdaptive(), validation=False, checkpoint=checkpoint, max_epochs=4)
    assert not caplog.records, "LayerAdaptive remembers nothing"
    rule = by_hand.RULES["GradientAmplification"]
    _, callback = run(tmp_path, rule, validation=False, checkpoint=checkpoint, max_epochs=4)
    assert "training goes on from step 12" in caplog.text
    assert callback.adapters[0].epoch == 3, "of its own epochs two have passed"


def test_a_state_of_another_rule_is_refused_before_training(tmp_path):
    run(tmp_path, LayerAdaptive(), validation=False, saved={}, max_epochs=4)
    checkpoint = next(tmp_path.glob("*step=12.ckpt"))
    with pytest.raises(ValueError, match="saved for the rule LayerAdaptive, this adapter has Constant"):
        run(tmp_path, Constant({"*": 2.0}), validation=False, checkpoint=checkpoint, max_epochs=4)


@pytest.mark.parametrize("look", ["validate", "test"])
def test_the_state_of_a_checkpoint_that_is_only_looked_at_is_not_taken_over(look, tmp_path, weights, assert_same_bits):
    run(tmp_path, by_hand.RULES["GradientAmplification"], validation=True, saved={}, max_epochs=2)
    (checkpoint,) = tmp_path.glob("*step=12.ckpt")
    rule, module = GradientAmplification(AllLayers(), [Phase(1, False), Phase(3, True)]), Looked()
    callback, data = LayerwiseCallback(rule), DataLoader(by_hand.examples(), by_hand.BATCH)
    trainer = make_trainer(tmp_path, callback)
    getattr(trainer, look)(module, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert callback.state_dict() == {}
    model = by_hand.network()
    model.load_state_dict(module.net.state_dict())
    trainer.fit(module, data, data)
    optimizer = by_hand.momentum(model.parameters())
    by_hand.train(model, optimizer, layerwise.LayerwiseLR(optimizer, rule, model))
    assert_same_bits(weights(module.net), weights(model))
    getattr(trainer, look)(module, data, ckpt_path=checkpoint, weights_only=True, verbose=False)
    assert callback.state_dict()["adapters"][0]["epoch"] == 4


# --- Beginning and end ------------------------------------------------------------------------------------------------


def hooks(trainer):
    return [len(o._optimizer_step_pre_hooks) + len(o._optimizer_step_post_hooks) for o in trainer.optimizers]


def test_the_optimizer_is_free_again_after_training(tmp_path):
    class Looking(lightning.Callback):
        def on_train_batch_start(self, trainer, *arguments):
            self.seen = hooks(trainer)

    looking = Looking()
    trainer = make_trainer(tmp_path, LayerwiseCallback(LayerAdaptive()), looking)
    trainer.fit(Module(), DataLoader(by_hand.examples(), by_hand.BATCH))
    assert looking.seen == [2]
    assert hooks(trainer) == [0]


def test_the_optimizer_is_free_again_after_an_exception(tmp_path):
    class Failing(Module):
        def training_step(self, batch, index):
            if index == 3:
                raise ZeroDivisionError("a bug of theirs")
            return super().training_step(batch, index)

    trainer = make_trainer(tmp_path, LayerwiseCallback(LayerAdaptive()))
    with pytest.raises(ZeroDivisionError):
        trainer.fit(Failing(), DataLoader(by_hand.examples(), by_hand.BATCH))
    assert hooks(trainer) == [0]


def test_a_trainer_that_fits_again_goes_on_and_another_one_begins_anew(tmp_path):
    callback = LayerwiseCallback(by_hand.RULES["GradientAmplification"])
    trainer, module = make_trainer(tmp_path, callback, max_epochs=2), Module()
    data = DataLoader(by_hand.examples(), by_hand.BATCH)
    trainer.fit(module, data)
    chosen = {name: layer.value for name, layer in callback.adapters[0].get_last_selection().items()}
    trainer.fit_loop.max_epochs = 4
    trainer.fit(module, data)
    assert callback.adapters[0].epoch == 5
    measured = {name: layer.value for name, layer in callback.adapters[0].get_last_selection().items()}
    assert all(0 < measured[name] < 1 and measured[name] != chosen[name] for name in chosen), "epoch 3 measured again"
    make_trainer(tmp_path, callback, max_epochs=1).fit(Module(), data)
    assert callback.adapters[0].epoch == 2


def test_validation_alone_and_the_check_before_training_end_no_epoch(tmp_path):
    callback = LayerwiseCallback(by_hand.RULES["GradientAmplification"])
    trainer = make_trainer(tmp_path, callback, num_sanity_val_steps=2, val_check_interval=2, max_epochs=2)
    module, data = Validated(), DataLoader(by_hand.examples(), by_hand.BATCH)
    trainer.fit(module, data, data)
    assert callback.adapters[0].epoch == 3
    trainer.validate(module, data)
    assert callback.adapters[0].epoch == 3


class Stream(IterableDataset):
    def __iter__(self):
        return iter(by_hand.examples())


class Leaving(Module):
    def on_train_batch_start(self, batch, index):
        return -1 if index == 4 else None  # which ends the epoch


SHORTER = {
    "fewer batches": (Module, {"limit_train_batches": 4}, by_hand.examples),
    "an epoch that the module leaves": (Leaving, {}, by_hand.examples),
    "a stream without a length": (Module, {}, Stream),
    "one batch an epoch": (Module, {"limit_train_batches": 1}, by_hand.examples),
    "accumulation": (Module, {"accumulate_grad_batches": 4}, by_hand.examples),
}


@pytest.mark.parametrize(("kind", "arguments", "data"), SHORTER.values(), ids=SHORTER)
def test_every_epoch_is_counted(kind, arguments, data, tmp_path):
    class Looking(lightning.Callback):
        epochs = ()

        def on_train_batch_end(self, trainer, *rest):
            self.epochs = *self.epochs, (trainer.current_epoch + 1, callback.adapters[0].epoch)

    callback, looking = LayerwiseCallback(by_hand.RULES["GradientAmplification"]), Looking()
    trainer = make_trainer(tmp_path, callback, looking, **arguments)
    trainer.fit(kind(), DataLoader(data(), by_hand.BATCH))
    assert {theirs for theirs, _ in looking.epochs} == {1, 2, 3}
    assert all(theirs == its for theirs, its in looking.epochs)
    assert callback.adapters[0].epoch == 4


@pytest.mark.filterwarnings("ignore:.*find the learning rate.*")
def test_a_search_for_the_rate_tries_without_factors_and_leaves_no_trace(tmp_path, weights, assert_same_bits):
    class Tunable(Module):
        lr = 0.1

        def configure_optimizers(self):
            return by_hand.momentum(self.net.parameters(), self.lr)

    callback, module = LayerwiseCallback(by_hand.RULES["GradientAmplification"]), Tunable()
    finder = LearningRateFinder(min_lr=1e-3, max_lr=0.5, num_training_steps=20, early_stop_threshold=None)
    trainer = make_trainer(tmp_path, finder, callback, enable_checkpointing=True)
    trainer.fit(module, DataLoader(by_hand.examples(), by_hand.BATCH))
    rate = finder.optimal_lr.suggestion()
    model, adapter = expected(callback._attachments.rule, lambda parameters: by_hand.momentum(parameters, rate))
    assert_same_bits(weights(module.net), weights(model))
    assert callback.adapters[0].epoch == adapter.epoch


def test_adapters_that_the_module_attaches_itself_work_without_the_callback(tmp_path, weights, assert_same_bits):
    class Attaching(Module):
        def on_train_start(self):
            layerwise.LayerwiseLR(self.optimizers(), LayerAdaptive(), self)  # Lightning's wrapper

    model, _ = expected(LayerAdaptive())
    assert_same_bits(weights(fit(tmp_path, None, Attaching())), weights(model))


def test_an_argument_that_is_refused_leaves_no_optimizer_attached(tmp_path):
    callback = LayerwiseCallback(LayerAdaptive(), exclude=["net.first"])  # which the second optimizer does not hold
    module = TwoOptimizers()
    trainer = make_trainer(tmp_path, callback)
    with pytest.raises(ValueError, match=r"exclude pattern 'net\.first' matches none"):
        trainer.fit(module, DataLoader(by_hand.examples(), by_hand.BATCH))
    assert hooks(trainer) == [0, 0]


def test_a_training_without_an_optimizer_is_refused(tmp_path):
    with pytest.raises(ValueError, match="no optimizer to attach LayerAdaptive"):
        fit(tmp_path, LayerwiseCallback(LayerAdaptive()), Module(lambda parameters: []))


def test_two_callbacks_are_refused_by_lightning(tmp_path):
    with pytest.raises(RuntimeError, match="more than one stateful callback"):
        make_trainer(tmp_path, LayerwiseCallback(LayerAdaptive()), LayerwiseCallback(Constant({"*": 2.0})))


def test_a_callback_can_be_copied_before_training():
    callback = copy.deepcopy(LayerwiseCallback(LayerAdaptive(), log_every=3))
    assert callback.adapters == []


# --- Logs -------------------------------------------------------------------------------------------------------------


class Noting(lightning.Callback):
    """Reads the adapter after every step."""

    def __init__(self, callback):
        self.callback, self.rows = callback, []

    def on_train_batch_end(self, *arguments):
        (adapter,) = self.callback.adapters
        rates, factors = adapter.get_last_lr(), adapter.get_last_factors()
        self.rows.append({f"layerwise/lr/{name}": rate for name, rate in rates.items()})
        self.rows[-1].update({f"layerwise/factor/{name}": factor for name, factor in factors.items()})


@pytest.mark.parametrize("accumulate", [1, 2])
def test_every_nth_step_is_logged_with_its_rates_and_factors(accumulate, tmp_path):
    callback = LayerwiseCallback(LayerAdaptive(), log_every=2)
    noting, logs = Noting(callback), CSVLogger(tmp_path)
    trainer = make_trainer(
        tmp_path, callback, noting, logger=logs, log_every_n_steps=1, accumulate_grad_batches=accumulate
    )
    trainer.fit(Module(), DataLoader(by_hand.examples(), by_hand.BATCH))
    with open(f"{logs.log_dir}/metrics.csv", encoding="utf-8") as file:
        rows = list(csv.DictReader(file))
    steps = [int(row.pop("step")) for row in rows]
    taken = noting.rows[accumulate - 1 :: accumulate]
    assert steps == list(range(1, len(taken), 2)), "steps are counted from 0 there, as by LightningModule.log"
    assert [{name: float(value) for name, value in row.items()} for row in rows] == taken[1::2]
    assert set(rows[0]) == {
        f"layerwise/{what}/net.{layer}" for what in ("lr", "factor") for layer in ("first", "second", "head")
    }


def test_none_logs_nothing(tmp_path):
    logs = CSVLogger(tmp_path)
    trainer = make_trainer(
        tmp_path, LayerwiseCallback(LayerAdaptive(), log_every=None), logger=logs, log_every_n_steps=1
    )
    trainer.fit(Module(), DataLoader(by_hand.examples(), by_hand.BATCH))
    assert not logs.experiment.metrics
