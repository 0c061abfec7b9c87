"""A person's own task: what is read of it, what it does to random numbers, and how mistakes are told."""

from __future__ import annotations

import inspect
import os
import pickle
import random
import re
import shutil
import subprocess
import sys
import textwrap
from dataclasses import fields
from pathlib import Path

import numpy
import pytest
import torch
from lab_helpers import series_of, stored

import layerwise
from layerwise.lab import Task
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import chain as chains
from layerwise.lab.experiments.plan import Arm, PlannedRun
from layerwise.lab.runs.configuration import Configuration
from layerwise.lab.runs.folder import Runs
from layerwise.lab.tasks import layout
from layerwise.lab.tasks import task as tasks
from layerwise.lab.tasks.task import Stream, moved, same
from layerwise.lab.training.trial import StoppedError

HEAD = """
import torch
from torch import nn
import layerwise
from layerwise.lab import Task

def parts(**changes):
    given = dict(
        model=nn.Linear(3, 1),
        batches=[torch.ones(2, 3), torch.zeros(2, 3)],
        loss=lambda model, batch: model(batch).square().mean(),
        metric=lambda model: {"test_error": float(model(torch.ones(1, 3)).abs().sum())},
    )
    return {**given, **changes}
"""

RANDOM = """
import random
import numpy
import torch
from torch import nn
from torch.utils.data import DataLoader, Dataset

class Examples(Dataset):
    def __len__(self):
        return 12

    def __getitem__(self, place):
        noise = random.random() + float(numpy.random.rand()) + float(torch.rand(()))
        return torch.full((4,), float(place)) * 0.1 + noise, torch.tensor([1.0])

def task(seed, lr=0.02):
    loader = DataLoader(Examples(), batch_size=2, shuffle=True, generator=torch.Generator().manual_seed(seed))
    tests = DataLoader(Examples(), batch_size=4, shuffle=True)
    model = nn.Sequential(nn.Linear(4, 6), nn.Dropout(0.5), nn.Linear(6, 1))
    optimizer = torch.optim.SGD(model.parameters(), lr=lr, momentum=0.9)
    return {
        "model": model,
        "batches": loader,
        "loss": lambda model, batch: (model(batch[0]) - batch[1]).square().mean() + 0.001 * random.random(),
        "metric": lambda model: {"error": sum(float(model(x).sum()) for x, _ in tests)},
        "optimizer": optimizer,
        "scheduler": torch.optim.lr_scheduler.StepLR(optimizer, 1, 0.5),
        "epochs": 3,
    }
"""


@pytest.fixture
def write(tmp_path: Path):
    """Return a function that writes a file of a task and loads it."""

    def make(body: str, name: str = "own.py", head: str = HEAD, **values) -> tasks.TaskFile:
        path = tmp_path / name
        path.write_text(head + textwrap.dedent(body), encoding="utf-8")
        return tasks.load(f"{path}:task", values)

    return make


def returning(expression: str) -> str:
    return f"def task(seed, lr=0.1):\n    return {expression}\n"


def configuration_of(task_file: tasks.TaskFile, seed: int = 0, **more) -> Configuration:
    return Configuration(trial=task_file.configuration(layers_every=2), seed=seed, **more)


# --- What is read -----------------------------------------------------------------------------------------------------


def test_the_file_is_read_once_and_travels_whole(write):
    task_file = write("def task(seed, lr=0.1, width=4, kind='a', flag=True):\n    return parts()\n")
    assert task_file.parameters == ("lr", "width", "kind", "flag")
    assert task_file.defaults == {"lr": 0.1, "width": 4, "kind": "a", "flag": True}
    task_file.path.unlink()
    again = pickle.loads(pickle.dumps(task_file))
    assert again == task_file
    assert again.trial(configuration_of(again)).total == 10


def test_a_run_is_another_where_file_function_or_values_are_but_not_where_the_folder_is(write, tmp_path):
    task_file = write(returning("parts()") + "other = task\n")
    first = configuration_of(task_file).identity
    moved_to = tmp_path / "elsewhere" / "renamed.py"
    moved_to.parent.mkdir()
    shutil.copy(task_file.path, moved_to)
    assert configuration_of(tasks.load(f"{moved_to}:task")).identity == first
    assert configuration_of(tasks.load(f"{moved_to}:other")).identity != first
    assert configuration_of(task_file.with_values({"lr": 0.2})).identity != first
    assert configuration_of(task_file.with_values({"lr": 0.2}).with_values({"lr": 0.1})).identity == first
    moved_to.write_text(moved_to.read_text(encoding="utf-8") + "# changed\n", encoding="utf-8")
    assert configuration_of(tasks.load(f"{moved_to}:task")).identity != first


def test_values_take_the_type_of_the_default(write):
    task_file = write("def task(seed, lr=0.1, width=4, kind='a', flag=True, **more):\n    return parts()\n")
    given = {"lr": 1, "width": 8, "kind": 5, "flag": "False", "another": 3}
    assert task_file.with_values(given).values == {"lr": 1.0, "width": 8, "kind": "5", "flag": False, "another": 3}
    assert task_file.with_values({"flag": "true", "kind": "a"}).values == {}
    # A count may be tried at a fraction, and nothing stands for itself whatever the default is.
    assert task_file.with_values({"width": 0.5, "lr": None}).values == {"width": 0.5, "lr": None}


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"rate": 0.1}, ["rate=0.1", "its own are lr, width", "def task(seed, rate=...)"]),
        ({"seed": 3}, ["seed=3", "no parameter"]),
        ({"lr": [1.0]}, ["lr=[1.0]", "number, a word"]),
        ({"lr": float("inf")}, ["lr=inf", "finite"]),
        ({"lr": "abc"}, ["lr='abc'", "must be a number, as its default 0.1 is"]),
        ({"lr": True}, ["lr=True", "must be a number"]),
        ({"width": "wide"}, ["width='wide'", "must be a number, as its default 4 is"]),
        ({"flag": 1}, ["flag=1", "must be True or False, as its default False is"]),
    ],
    ids=[
        "unknown",
        "the seed",
        "a list",
        "infinity",
        "a word",
        "a truth",
        "a word for a count",
        "a number for a truth",
    ],
)
def test_values_that_cannot_be_used_are_refused(write, values, words):
    task_file = write("def task(seed, lr=0.1, width=4, flag=False):\n    return parts()\n")
    with pytest.raises(UsageError) as caught:
        task_file.with_values(values)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_a_dict_and_a_task_are_the_same(write):
    for expression in ("parts(epochs=2)", "Task(**parts(epochs=2))"):
        trial = write(returning(expression)).trial(configuration_of(write(returning(expression))))
        assert (trial.epochs, trial.iterations, trial.test_every, trial.total) == (2, None, None, 4)


@pytest.mark.parametrize(
    ("call", "words"),
    [
        ("Task(**parts(epoch=3))", ["unexpected keyword argument 'epoch'"]),
        ("parts(epoch=3)", ["a dict with 'epoch': use the names model, batches", "Did you mean epochs?"]),
        (
            "Task(model=parts()['model'])",
            ["missing 3 required keyword-only arguments: 'batches', 'loss'"],
        ),
    ],
    ids=["an unknown name", "an unknown name in a dict", "missing names"],
)
def test_names_that_a_task_does_not_have_are_told_with_those_that_it_has(write, call, words):
    with pytest.raises(UsageError) as caught:
        write(returning(call)).build(0)
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_defaults_of_what_is_not_returned(write):
    task_file = write(returning("parts()"))
    trial = task_file.trial(configuration_of(task_file))
    group = trial.optimizer.param_groups[0]
    assert (type(trial.optimizer), group["lr"], group["momentum"]) == (torch.optim.SGD, 0.1, 0.9)
    assert (trial.epochs, trial.epoch_length, trial.scheduler) == (5, 2, None)
    tuned = task_file.with_values({"lr": 0.03})
    assert tuned.trial(configuration_of(tuned)).optimizer.param_groups[0]["lr"] == 0.03
    counted = write(returning("parts(iterations=33)"))
    trial = counted.trial(configuration_of(counted))
    assert (trial.epochs, trial.iterations, trial.test_every, trial.total) == (None, 33, 4, 33)


@pytest.mark.parametrize(
    "optimizer",
    [
        "torch.optim.AdamW",
        "lambda parameters: torch.optim.AdamW(parameters, lr=0.001)",
        "lambda model: torch.optim.AdamW([model.weight, model.bias], lr=0.001)",
    ],
    ids=["a class", "of parameters", "of the model"],
)
def test_an_optimizer_may_be_a_function(write, optimizer):
    task_file = write(returning(f"parts(optimizer={optimizer})"))
    trial = task_file.trial(configuration_of(task_file))
    assert isinstance(trial.optimizer, torch.optim.AdamW)
    assert {id(p) for p in trial.optimizer.param_groups[0]["params"]} == {id(p) for p in trial.model.parameters()}


def test_a_scheduler_may_be_a_function_of_the_optimizer(write):
    scheduler = "lambda optimizer: torch.optim.lr_scheduler.StepLR(optimizer, 1)"
    task_file = write(returning(f"parts(scheduler={scheduler}, schedule_unit='iteration')"))
    trial = task_file.trial(configuration_of(task_file))
    assert trial.scheduler.optimizer is trial.optimizer
    assert trial.schedule_unit == "iteration"


@pytest.mark.parametrize(
    ("changes", "name", "better"),
    [
        ("", "test_error", False),
        ("metric=lambda model: {'accuracy': 1.0, 'error': 2.0}", "accuracy", True),
        ("metric=lambda model: {'a': 1.0, 'loss': 2.0}, metric_name='loss'", "loss", False),
        ("metric=lambda model: 1, metric_name='top-1 accuracy'", "top-1 accuracy", True),
        ("metric=lambda model: 1.5, higher_is_better=True", "metric", True),
    ],
    ids=["of the dict", "its first entry", "a named entry", "given", "of nothing"],
)
def test_the_name_of_what_is_judged_and_which_way_is_better(write, changes, name, better):
    tried = write(returning(f"parts({changes})")).tried()
    assert (tried.metric, tried.higher_is_better) == (name, better)


def test_a_function_names_what_is_judged(write):
    body = "def accuracy(model):\n    return 0.5\n\n" + returning("parts(metric=accuracy)")
    tried = write(body).tried()
    assert (tried.metric, tried.higher_is_better, tried.value) == ("accuracy", True, 0.5)


def test_only_the_file_itself_is_executed_and_it_knows_its_place(write, tmp_path):
    (tmp_path / "beside.py").write_text("raise RuntimeError('executed')\n", encoding="utf-8")
    task_file = write("from pathlib import Path\nHERE = Path(__file__).parent\n" + returning("parts()"))
    assert task_file.tried().value >= 0
    with pytest.raises(UsageError, match=r"(?s)No module named 'beside'.*Only own\.py is read: install beside"):
        write("import beside\n" + returning("parts()"))
    with pytest.raises(UsageError, match="ZeroDivisionError") as caught:
        write("1 / 0\n" + returning("parts()"))
    assert "beside" not in str(caught.value)


@pytest.mark.full
@pytest.mark.parametrize("inside", [False, True], ids=["at the top", "in the function"])
@pytest.mark.parametrize("package", [False, True], ids=["a module", "a package"])
def test_the_command_finds_no_module_beside_the_file(tmp_path, inside, package):
    helper = tmp_path / "helper" / "__init__.py" if package else tmp_path / "helper.py"
    helper.parent.mkdir(exist_ok=True)
    helper.write_text("VALUE = 1\n", encoding="utf-8")
    statement = "    import helper\n" if inside else "import helper\n"
    body = f"def task(seed, lr=0.1):\n{statement}    return parts()\n" if inside else statement + returning("parts()")
    (tmp_path / "own.py").write_text(HEAD + body, encoding="utf-8")
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    environment["PYTHONPATH"] = str(Path(layerwise.__file__).parents[1])
    words = [sys.executable, "-m", "layerwise", "doctor", "own.py:task"]
    ended = subprocess.run(words, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert ended.returncode == 2, ended.stderr
    assert "ModuleNotFoundError: No module named 'helper'" in ended.stderr
    assert "Only own.py is read: install helper, or put its code into own.py" in ended.stderr


def test_the_source_of_a_function_is_the_one_that_was_read(write):
    task_file = write(returning("parts()"))
    task_file.path.write_text("changed = True\n", encoding="utf-8")
    assert inspect.getsource(task_file.import_function()) == returning("parts()")


def test_what_is_on_the_path_is_found_though_it_lies_beside_the_file(write, tmp_path, monkeypatch):
    (tmp_path / "helper_installed.py").write_text("VALUE = 1\n", encoding="utf-8")
    monkeypatch.syspath_prepend(str(tmp_path))  # as PYTHONPATH and editable installations do
    task_file = write("from helper_installed import VALUE\n" + returning("parts()"))
    assert task_file.tried().value >= 0


def test_what_the_file_adds_to_the_path_stays(write, tmp_path, monkeypatch):
    before = sys.path[:]
    monkeypatch.setattr(sys, "path", [str(tmp_path), *before])
    write("import sys\nsys.path.append('last')\nsys.path.insert(0, 'first')\n" + returning("parts()"))
    assert sys.path == ["first", str(tmp_path), *before, "last"]
    write("import sys\nsys.path.reverse()\n" + returning("parts()"))
    assert sorted(sys.path) == sorted(["first", str(tmp_path), *before, "last"])


def test_the_lab_imports_the_protocol_when_it_is_asked_for():
    code = "import sys, layerwise.lab; assert 'layerwise.lab.tasks.task' not in sys.modules; layerwise.lab.Task"
    subprocess.run([sys.executable, "-c", code], check=True)
    import layerwise.lab

    assert layerwise.lab.Task is Task
    with pytest.raises(AttributeError, match="Tusk"):
        _ = layerwise.lab.Tusk


# --- Random numbers ---------------------------------------------------------------------------------------------------


def draws() -> tuple[float, float, float]:
    return float(torch.rand(())), random.random(), float(numpy.random.rand())


def test_weights_and_batches_follow_from_the_seed_alone(write):
    task_file = write("", head=RANDOM)
    one, again, other = (task_file.trial(configuration_of(task_file, seed)) for seed in (1, 1, 2))
    torch.rand(3)  # what the training draws between the batches changes none of them
    for epoch in (1, 2):
        first = [one.prepare(batch) for batch in one.batches(epoch, 0)]
        draws()
        assert same(first, list(again.batches(epoch, 0)))
        assert not same(first, list(other.batches(epoch, 0)))
        assert same(first[3:], list(one.batches(epoch, 3)))
    assert not same(list(one.batches(1, 0)), list(one.batches(2, 0)))
    torch.testing.assert_close(one.model.state_dict(), again.model.state_dict(), rtol=0, atol=0)


def test_measuring_and_batches_change_no_random_number_of_the_training(write):
    task_file = write("", head=RANDOM)
    trial = task_file.trial(configuration_of(task_file))
    expected = draws()
    trial = task_file.trial(configuration_of(task_file))
    list(trial.batches(1, 0))
    first = trial.evaluate(trial.model, lambda: False)
    assert draws() == expected
    assert trial.evaluate(trial.model, lambda: False) == first


def test_a_try_leaves_the_random_numbers_as_they_were(write):
    task_file = write("", head=RANDOM)
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    expected = draws()
    torch.manual_seed(5)
    random.seed(5)
    numpy.random.seed(5)
    task_file.tried()
    assert draws() == expected


def test_a_stream_goes_on_where_it_ended():
    stream, whole = Stream(3), Stream(3)
    with stream:
        first = draws()
    draws()
    with stream:
        second = draws()
    with whole:
        assert (draws(), draws()) == (first, second)


def test_the_metric_sees_evaluation_mode_and_gives_each_module_its_own_back(write):
    body = """
    def task(seed):
        model = nn.Sequential(nn.Linear(3, 1), nn.Dropout(), nn.BatchNorm1d(1))
        model[2].eval()

        def metric(model):
            assert not model.training and not model[1].training and not torch.is_grad_enabled()
            return {"error": 1.0}

        return parts(model=model, metric=metric)
    """
    task_file = write(body)
    trial = task_file.trial(configuration_of(task_file))
    trial.evaluate(trial.model, lambda: False)
    assert [module.training for module in trial.model.modules()] == [True, True, True, False]
    with pytest.raises(StoppedError):
        trial.evaluate(trial.model, lambda: True)


# --- Runs -------------------------------------------------------------------------------------------------------------


def do(task_file: tasks.TaskFile, out: Path, stops: list[int] | None = None, **arm):
    """Do a run; stop it as often, each time after so many questions whether to stop."""
    configuration = configuration_of(task_file, **arm)
    planned = PlannedRun(
        subject="task", arm=Arm(name="arm", words="arm"), seed=0, configuration=configuration, task=task_file
    )
    chain = chains.Chain(runs=(planned,), out=out)
    for count in stops or ():
        left = iter(range(count))
        with pytest.raises(StoppedError):
            chains.do_run(planned, configuration, chain, chains.Alone(lambda left=left: next(left, None) is None))
    return chains.do_run(planned, configuration, chain, chains.Alone())


@pytest.mark.parametrize(
    "arm", [{}, {"rule": {"name": "LayerAdaptive"}}], ids=["the plain optimizer", "the layer-adaptive rule"]
)
def test_a_run_that_is_stopped_in_the_middle_of_epochs_is_the_same_to_the_bit(write, tmp_path, one_thread, arm):
    task_file = write("", head=RANDOM)
    whole = do(task_file, tmp_path / "whole", **arm)
    # 6 batches an epoch and a question before each batch and each test: stopped in epochs 1, 2 and 3.
    parted = do(task_file, tmp_path / "parted", [3, 6, 7], **arm)
    assert (whole.summary["sessions"], parted.summary["sessions"]) == (1, 4)
    assert parted.summary["weights"] == whole.summary["weights"]
    assert parted.metrics().equals(whole.metrics())


def test_parameters_of_the_root_module_are_a_layer(write, tmp_path, one_thread):
    body = """
    class Net(nn.Module):
        def __init__(self):
            super().__init__()
            self.shift = nn.Parameter(torch.ones(3))
            self.inner = nn.Linear(3, 1)

        def forward(self, x):
            return self.inner(x + self.shift)

    """
    task_file = write(textwrap.dedent(body) + returning("parts(model=Net(), epochs=2)"))
    record = do(task_file, tmp_path, rule={"name": "LayerAdaptive"})
    layers = record.summary["factor"]["layers"]
    assert list(layers) == ["", "inner"]
    assert record.summary["factor"]["mean"] == pytest.approx(sum(layers.values()) / 2, rel=1e-12)
    assert "factor" not in record.summary["finals"]
    assert len(record.metrics().filter(layer="", quantity="factor")) == 4


def test_a_number_that_is_not_finite_is_divergence_where_it_is_judged_and_left_out_where_it_is_not(
    write, tmp_path, one_thread
):
    body = """
    def task(seed, judged=True):
        calls = []

        def metric(model):
            calls.append(1)
            number = float("nan") if len(calls) > 1 else 1.0
            return {"error": number, "other": 2.0} if judged else {"error": 2.0, "other": number}

        return parts(metric=metric, epochs=3)
    """
    record = do(write(body), tmp_path)
    assert record.summary["diverged_at"] == 4
    assert series_of(record, "error") == [(2, 1.0)]
    record = do(write(body, judged=False), tmp_path)
    assert not record.diverged
    assert series_of(record, "other") == [(2, 1.0)]


def test_runs_that_tune_never_call_the_metric(write, tmp_path, one_thread):
    metric = "lambda model: {'error': 1.0 if model is None else seed / (seed - 0)}"
    task_file = write(returning(f"parts(metric={metric}, validation=lambda model: 3.0)"))
    configuration = Configuration(trial=task_file.configuration(measure="validation"))
    trial = task_file.trial(configuration)
    assert trial.evaluate(trial.model, lambda: False) == {"validation": 3.0}
    trial = task_file.trial(configuration_of(task_file))
    with pytest.raises(UsageError, match=r"metric\(model\) raised ZeroDivisionError"):
        trial.evaluate(trial.model, lambda: False)


def test_the_runs_folder_names_no_folder_of_the_person(write, tmp_path, one_thread):
    record = do(write(returning("parts(epochs=1)")), tmp_path / "runs")
    told = (record.folder / "run.json").read_text(encoding="utf-8")
    assert "own.py" not in told
    assert str(tmp_path) not in told
    assert [found.configuration for found in stored(Runs(tmp_path / "runs"))] == [record.configuration]


# --- Mistakes ---------------------------------------------------------------------------------------------------------

WRONG = {
    "nothing returned": (
        "None",
        ["returned nothing", "layerwise.lab.Task or a dict with model, batches, loss, metric"],
    ),
    "a tuple returned": ("(1, 2)", ["returned tuple", "Task"]),
    "a name too many": ("parts(modle=1)", ["'modle'", "use the names model, batches"]),
    "a part missing": ("{'model': nn.Linear(1, 1)}", ["without 'batches', without 'loss', without 'metric'"]),
    "a class as model": (
        "parts(model=nn.Linear)",
        ["model=<class 'torch.nn.modules.linear.", "return an instance"],
    ),
    "no module as model": ("parts(model=3)", ["model=3", "an instance of torch.nn.Module"]),
    "no parameters": ("parts(model=nn.ReLU())", ["ReLU has no parameters to train"]),
    "all parameters frozen": ("parts(model=nn.Linear(3, 1).requires_grad_(False))", ["no parameters to train"]),
    "lazy layers": ("parts(model=nn.LazyLinear(1))", ["lazy layers", "call it once"]),
    "a generator as batches": ("parts(batches=(b for b in [1, 2]))", ["generator", "exhausted after one epoch"]),
    "a number as batches": ("parts(batches=3)", ["batches gives int", "a list, a loader, or a function of the epoch"]),
    "batches without the epoch": (
        "parts(batches=lambda: [])",
        ["batches of epoch 1 raised TypeError", "takes 0 positional"],
    ),
    "empty batches": ("parts(batches=[])", ["no batch in epoch 1", "at least one"]),
    "batches of nothing": ("parts(batches=lambda epoch: None)", ["batches gives NoneType"]),
    "a generator of a function": (
        "parts(batches=lambda epoch, once=iter([torch.ones(2, 3)] * 2): once)",
        ["no batch in epoch 2", "makes it anew"],
    ),
    "a generator used up": (
        "parts(batches=lambda epoch, once=iter([torch.ones(2, 3)]): once)",
        ["no batch in epoch 1", "makes it anew"],
    ),
    "batches of a generator of their own": (
        "parts(batches=lambda epoch, g=torch.Generator(): [torch.rand(2, 3, generator=g)])",
        ["other batches when epoch 1 begins again", "of seed and epoch"],
    ),
    "a class as loss": (
        "parts(loss=nn.CrossEntropyLoss)",
        ["loss=<class", "CrossEntropyLoss", "a function of model"],
    ),
    "a number as loss": ("parts(loss=3)", ["loss=3", "a function of model and batch"]),
    "a loss without a sum": ("parts(loss=lambda model, b: model(b))", ["shape (2, 1)", ".mean()"]),
    "a loss that is a number": ("parts(loss=lambda model, b: 1.0)", ["loss returned float", "scalar tensor"]),
    "a detached loss": ("parts(loss=lambda model, b: model(b).sum().detach())", ["no gradient"]),
    "a metric of two": (
        "parts(metric=lambda model, data: 1.0)",
        ["metric(model) raised TypeError", ": 'data'"],
    ),
    "a tensor as metric": (
        "parts(metric=lambda m: torch.tensor(1.0), metric_name='error')",
        ["metric returned Tensor", "return a float, as float(tensor)"],
    ),
    "a tensor in the metric": (
        "parts(metric=lambda m: {'error': torch.ones(2)})",
        ["metric['error'] returned Tensor"],
    ),
    "a word as metric": ("parts(metric=lambda m: 'good')", ["metric returned str", "float"]),
    "nothing as metric": ("parts(metric=lambda m: None)", ["metric returned NoneType", "float"]),
    "an empty metric": ("parts(metric=lambda m: {})", ["metric returned a dict with nothing"]),
    "a metric without its name": (
        "parts(metric=lambda m: {'a': 1.0}, metric_name='error')",
        ["dict with 'a'", "must hold 'error'"],
    ),
    "NaN as metric": ("parts(metric=lambda m: {'error': float('nan')})", ["error is nan of the untrained model"]),
    "a reserved metric": ("parts(metric=lambda m: {'seconds': 1.0})", ["'seconds'", "choose another"]),
    "an unknown direction": ("parts(metric=lambda m: {'score': 1.0})", ["higher_is_better is not given", "'score'"]),
    "a wrong direction": ("parts(higher_is_better=1)", ["higher_is_better=1", "True or False"]),
    "a wrong name": ("parts(metric_name=' ')", ["metric_name=' '", "word"]),
    "epochs and iterations": ("parts(epochs=1, iterations=1)", ["epochs=1, iterations=1", "one of them"]),
    "epochs of nothing": ("parts(epochs=0)", ["epochs=0", "whole number from 1"]),
    "half an iteration": ("parts(iterations=0.5)", ["iterations=0.5", "whole number from 1"]),
    "an unknown unit": ("parts(schedule_unit='batch')", ["schedule_unit='batch'", "'epoch' or 'iteration'"]),
    "no optimizer": ("parts(optimizer=lambda parameters: 3)", ["optimizer is int", "torch.optim.Optimizer"]),
    "an optimizer of others": (
        "parts(optimizer=torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1))",
        ["holds no parameter of model", "model.parameters()"],
    ),
    "a scheduler of another": (
        "parts(scheduler=torch.optim.lr_scheduler.StepLR(torch.optim.SGD(nn.Linear(1, 1).parameters(), lr=1), 1))",
        ["of another optimizer"],
    ),
    "a scheduler that waits": (
        "parts(scheduler=torch.optim.lr_scheduler.ReduceLROnPlateau)",
        ["ReduceLROnPlateau", "CosineAnnealingLR"],
    ),
    "no scheduler": ("parts(scheduler=lambda optimizer: 3)", ["scheduler is int", "lr_scheduler"]),
    "no validation": ("parts()", ["has no validation, which --tune needs", "neither batches nor metric"]),
    "a validation of two": (
        "parts(validation=lambda a, b: 1)",
        ["validation(model) raised TypeError", ": 'b'"],
    ),
    "NaN as validation": ("parts(validation=lambda model: float('inf'))", ["validation is inf"]),
}


@pytest.mark.parametrize(("expression", "words"), WRONG.values(), ids=WRONG)
def test_what_cannot_be_used_is_told_with_what_to_return(write, expression, words):
    with pytest.raises(UsageError) as caught:
        write(returning(expression)).tried(validation=True)
    text = str(caught.value)
    assert all(word in text for word in ["own.py:task: ", *words]), text


def test_a_loader_with_a_generator_of_its_own_is_no_mistake(write):
    assert write("", head=RANDOM).tried().trial.total == 18


@pytest.mark.parametrize(
    ("text", "given", "words"),
    [
        ("def task(seed: return 1\n", "own.py:task", ["own.py, line 1", "def task(seed: return 1"]),
        ("\n\nx = (\n", "own.py:task", ["own.py, line 3", "never closed"]),
        ("a\0b\n", "own.py:task", ["own.py", "null bytes"]),
        ("def one(seed):\n    pass\ndef two(seed):\n    pass\n", "own.py:task", ["'task'", "own.py:one or own.py:two"]),
        ("x = 1\n", "own.py:task", ["no function 'task'", "write def task(seed, lr=0.1)"]),
        ("task = 3\n", "own.py:task", ["no function 'task'"]),
        ("def one(seed):\n    pass\n", "own.py", ["names no function", "own.py:one"]),
        ("def one(seed):\n    pass\n", "own.py:", ["No such file", "FILE:FUNCTION"]),
        ("", "missing.py:task", ["No such file", "FILE:FUNCTION"]),
        ("", ":task", ["is a folder", "FILE:FUNCTION"]),
        ("def task(lr=0.1):\n    pass\n", "own.py:task", ["does not take the seed", "def task(seed, lr=0.1)"]),
        ("def task(seed, width):\n    pass\n", "own.py:task", ["'width' has no default", "width=..."]),
    ],
    ids=[
        "a syntax error", "an open bracket", "a null byte", "another function", "no function", "a number", "no name",
        "an empty name", "no file", "a folder", "no seed", "no default",
    ],
)  # fmt: skip
def test_a_file_that_cannot_be_used_is_told_of(tmp_path, monkeypatch, text, given, words):
    monkeypatch.chdir(tmp_path)
    Path("own.py").write_text(text, encoding="utf-8")
    with pytest.raises(UsageError) as caught:
        tasks.load(given)
    assert all(word in str(caught.value) for word in words), str(caught.value)


@pytest.mark.parametrize(
    ("part", "doing"),
    [
        ("batches=lambda epoch: fail()", "batches of epoch 1"),
        ("batches=lambda epoch: (fail() for _ in range(2))", "batch 1 of epoch 1"),
        ("loss=lambda model, batch: fail()", "loss(model, batch)"),
        ("metric=lambda model: fail()", "metric(model)"),
        ("validation=lambda model: fail()", "validation(model)"),
        ("optimizer=lambda model: fail()", "optimizer"),
        ("scheduler=lambda optimizer: fail()", "scheduler(optimizer)"),
        ("epochs=fail()", "task(seed=0)"),
    ],
    ids=["batches", "a batch", "loss", "metric", "validation", "optimizer", "scheduler", "the function"],
)
@pytest.mark.parametrize("error", ["KeyError('gone')", "SystemExit(3)"], ids=["an exception", "an exit"])
def test_what_the_persons_code_raises_is_told_with_its_own_lines(write, part, doing, error):
    body = f"def fail():\n    raise {error}\n\n" + returning(f"parts({part})")
    with pytest.raises(UsageError) as caught:
        write(body).tried(validation=part.startswith("validation"))
    first, *rest = str(caught.value).splitlines()
    assert first.startswith(f"own.py:task: {doing} raised {error.partition('(')[0]}: ")
    line = int(re.search(r"\(line (\d+)\)$", first)[1])
    assert (HEAD + body).splitlines()[line - 1].strip() == f"raise {error}"
    places = [text for text in rest if text.startswith("  File ")]
    assert all('own.py", line' in place for place in places)  # no line of the lab's or of torch's
    assert places[-1].endswith(f"line {line}, in fail")
    assert f"    raise {error}" in rest


def test_errors_of_the_labs_own_reach_the_person_as_they_are(write):
    body = "from layerwise.lab import data\n" + returning("data.load('nothing')")
    with pytest.raises(UsageError, match=r"^name='nothing'"):
        write(body).build(0)


def test_a_run_of_another_file_is_refused(write):
    configuration = configuration_of(write(returning("parts()")))
    with pytest.raises(UsageError, match="another file"):
        write(returning("parts(epochs=2)")).trial(configuration)


def test_the_task_of_the_documentation_works_and_learns(tmp_path, carried_out):
    text = (Path(__file__).parents[2] / "docs" / "compare.md").read_text(encoding="utf-8")
    path = tmp_path / "documented.py"
    path.write_text(re.search(r"```python\n(.*?)```", text, re.DOTALL)[1], encoding="utf-8")
    tried = tasks.load(f"{path}:task").tried(validation=True)
    assert (tried.metric, tried.trial.total) == ("test_error", 160)
    outcome = carried_out(layout.plan(tasks.load(f"{path}:task"), seeds=1))
    errors = {arm: outcome.results.values("task", arm)[0] for arm in ("plain", "layer-adaptive")}
    assert max(errors.values()) < 30, errors  # guessing is wrong in 50 %
    named = re.findall(r"^\| `(\w+)`(?: or `(\w+)`)?", text.partition("\n## Arms\n")[0], re.MULTILINE)
    assert [name for pair in named for name in pair if name] == [field.name for field in fields(Task)]


# --- Small parts ------------------------------------------------------------------------------------------------------


def test_batches_of_any_nesting_are_moved():
    from collections import namedtuple

    Pair = namedtuple("Pair", "x y")
    one = torch.ones(2)
    batch = {"a": [one, (one, "word")], "b": Pair(one, 3)}
    there = moved(batch, "meta")
    assert there["a"][0].is_meta
    assert there["a"][1][0].is_meta
    assert there["a"][1][1] == "word"
    assert isinstance(there["b"], Pair)
    assert there["b"].x.is_meta


def test_batches_are_compared():
    nan = torch.tensor([float("nan"), 1.0])
    assert same({"a": [nan, "x"]}, {"a": [nan.clone(), "x"]})
    assert same(numpy.array([1.0, numpy.nan]), numpy.array([1.0, numpy.nan]))
    assert not same({"a": [nan, "x"]}, {"a": [nan, "y"]})
    assert not same([torch.ones(2)], [torch.ones(3)])
    assert not same([torch.ones(2)], [torch.ones(2, dtype=torch.float64)])
    assert same(object(), object())


def test_records_of_layers_are_about_forty_a_run(write):
    assert write(returning("parts(iterations=800)")).tried().layers_every == 20
    assert write(returning("parts(iterations=10)")).tried().layers_every == 1
    assert write(returning("parts(iterations=80000)")).tried().layers_every == tasks.LARGEST_INTERVAL
