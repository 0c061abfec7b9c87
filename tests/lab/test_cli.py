"""The command as a person types it, on a recipe of a few updates."""

import builtins
import dataclasses
import json
import subprocess
import sys
from pathlib import Path

import pytest

import layerwise
from layerwise.lab import cli, data, options
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments import datasets as places
from layerwise.lab.experiments import recipe
from layerwise.lab.runs.configuration import Constants

RECIPE = """
title = "A few updates of LeNet"
source = "Nobody 2026, Table 0"
layout = "steps"
quantity = "test_error"
columns = [3, 6]
paper = [{ subject = "sgd", arm = "plain", step = 6, mean = 50.0, sd = 1.0 }]
claims = ["It learns."]

[constants]
data = { value = "digits5k", source = "ours" }
test_count = { value = 100, source = "ours" }
inputs = { value = "scaled", source = "ours" }
order = { value = "sequential", source = "ours" }
batch_size = { value = 32, source = "ours" }
model = { value = "lenet", source = "ours" }
solver = { value = "caffe-sgd", source = "ours" }
rate = { value = 0.01, source = "ours" }
iterations = { value = 6, source = "ours" }
test_every = { value = 3, source = "ours" }
factors_every = { value = 1, source = "ours" }
layers_every = { value = 2, source = "ours" }

[[subjects]]
name = "sgd"
words = "SGD"

[[arms]]
name = "plain"
words = "plain"

[[arms]]
name = "layer-adaptive"
words = "layer-adaptive"
rule = { name = "LayerAdaptive" }
apply = "lr"
against = ["plain", "mean-factor"]

[[arms]]
name = "mean-factor"
words = "plain at the mean factor"
control = "mean factor"
of = "layer-adaptive"

[scales.smoke]
seeds = 2
needs = { data = "5,000 MNIST digits", time = "5 s", memory = "0.5 GB" }

[scales.full]
seeds = 3
constants = { data = "mnist" }
needs = { data = "MNIST", time = "an hour", memory = "0.5 GB" }
"""


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    """A folder of its own, recipes of a few updates, and no data of the person's."""
    monkeypatch.delenv("LAYERWISE_DATA", raising=False)
    monkeypatch.setattr(places, "home", lambda: tmp_path / "nothing here")
    recipes = tmp_path / "recipes"
    recipes.mkdir()
    (recipes / "tiny.toml").write_text(RECIPE)
    (recipes / "demo-lenet.toml").write_text(RECIPE.replace("[scales.full]", "[scales.real]").replace("smoke", "full"))
    monkeypatch.setattr(recipe, "FOLDER", recipes)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def words_of(capsys):
    return " ".join(capsys.readouterr().out.split())


def test_the_command_alone_prints_its_help(capsys):
    with pytest.raises(SystemExit) as ended:
        cli.main([])
    assert ended.value.code == 0
    said = capsys.readouterr().out
    for name in options.COMMANDS:
        assert sum(line.split()[:1] == [name] for line in said.splitlines()) == 1
    assert len(said.splitlines()) <= len(options.COMMANDS) + 8
    assert max(map(len, said.splitlines())) <= 80
    with pytest.raises(SystemExit):
        cli.main(["--help"])
    assert capsys.readouterr().out == said


@pytest.mark.parametrize("name", options.COMMANDS)
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert ("SHELL" if name == "completion" else "--out") in capsys.readouterr().out


def test_the_version_is_printed(capsys):
    assert cli.main(["--version"]) == 0
    assert capsys.readouterr().out == f"layerwise {layerwise.__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (["demo", "--seeds", "0"], "seeds=0: must be from 1 to 1000"),
        (["run", "tiny", "--scale", "smoke", "--jobs", "0"], "jobs=0: must be from 1 to 1024; leave --jobs out"),
        (["run", "tiny", "--scale", "smoke", "--data-dir", "/nowhere/at/all"], "is not a folder: give an existing one"),
        (["run", "tiny", "--scale", "smoke", "--out", __file__], "is a file: give a folder"),
        (["run", "tin", "--scale", "smoke"], "recipe 'tin' is not known: layerwise list names them. Did you mean"),
        (["run", "tiny", "--scale", "reduced"], "scale='reduced': recipe tiny has smoke, full"),
        (["run", "tiny", "--scale", "full"], "layerwise data mnist fetches it or says where to put it"),
        (["sweep", "tiny", "--scale", "smoke"], "--vary is missing"),
        (["sweep", "tiny", "--scale", "smoke", "--vary", "rate"], "write NAME=VALUE"),
        (["sweep", "tiny", "--scale", "smoke", "--vary", "rat=1"], "unknown constant 'rat'"),
        (["demo", "--weight-decay", "0"], "the LeNet demo has Caffe's 0.0005"),
        (["report", "nowhere"], "nowhere"),
        (["data", "cifar11"], "name='cifar11': use one of"),
        (["data", "minst"], "Did you mean mnist?"),
        (["runn", "tiny"], "command 'runn' is not known: use one of demo, run, compare"),
        (["runn", "tiny"], "Did you mean run?"),
        (
            ["run", "tiny", "--job", "2"],
            "option '--job' is not known: layerwise run --help lists its options. Did you mean --jobs?",
        ),
        (["report", "--seeds=2"], "option '--seeds' is not known: layerwise report --help lists its options."),
        (["demo", "lent"], "demo 'lent' is not known: use lenet or amplification. Did you mean lenet?"),
        (["list", "tini"], "recipe 'tini' is not known: layerwise list names them. Did you mean tiny?"),
        (["sweep", "tiny", "--scale", "smoke", "--vary", "rte=1"], "Did you mean rate?"),
        (["run", "tiny", "--scale", "smoke", "--device", "gpu"], "device='gpu' is none of PyTorch's: use cpu"),
    ],
)
def test_a_value_that_cannot_be_used_is_one_line_and_exit_code_2(capsys, folder, arguments, words):
    assert cli.main(arguments) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert words in captured.err
    assert captured.err.count("\n") == 1
    assert not (folder / "runs" / "store").exists()


def test_a_missing_dependency_names_the_extra(capsys, monkeypatch):
    real = builtins.__import__

    def without_tyro(name, *rest, **more):
        if name == "tyro":
            raise ModuleNotFoundError("No module named 'tyro'", name="tyro")
        return real(name, *rest, **more)

    monkeypatch.setattr(builtins, "__import__", without_tyro)
    for name in ("tyro", "layerwise.lab.options"):
        monkeypatch.delitem(sys.modules, name, raising=False)
    assert cli.main(["demo"]) == 1
    assert "pip install -e '.[lab]'  in the clone" in capsys.readouterr().err


@pytest.mark.usefixtures("in_process")
def test_a_recipe_is_run_its_report_written_and_nothing_repeated(capsys, folder):
    arguments = ["run", "tiny", "--scale", "smoke", "--seeds", "2"]
    assert cli.main([*arguments, "--json"]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    result = json.loads(captured.out)
    assert (result["planned"], result["finished"], result["found"]) == (6, 6, 0)
    experiment = folder / "runs" / "tiny-smoke"
    for name in ("report.html", "table.md", "tables/table.parquet", "tables/metrics.parquet"):
        assert (experiment / name).stat().st_size > 0
    assert (folder / "runs" / "report.html").read_bytes() == (experiment / "report.html").read_bytes()

    assert cli.main(arguments) == 0
    words = words_of(capsys)
    assert "6 of 6 runs were finished already" in words
    assert words.lower().count("too few") == 1
    assert "report.html" in words
    assert "Next: layerwise data mnist && layerwise run tiny --scale full" in words
    assert "This is the smoke scale" in words
    assert "Smoke test of: A few updates of LeNet" in words
    assert "no run was needed" in words
    assert "Student's paired t" not in words

    assert cli.main([*arguments, "--explain"]) == 0
    words = words_of(capsys)
    assert "runs/report.html is a copy until the next report" in words
    assert "Student's paired t" in words

    assert cli.main([*arguments, "--quiet"]) == 0
    words = words_of(capsys)
    assert "report.html" in words
    assert "Next" not in words

    assert cli.main(["list"]) == 0
    words = words_of(capsys)
    assert "6 done" in words
    assert "Get it with layerwise data mnist" in words
    assert cli.main(["list", "tiny"]) == 0
    words = words_of(capsys)
    assert "tiny" in words
    assert "runs 6/6" in words
    assert "mnist (not here)" in words
    assert "demo-lenet" not in words
    assert "Times are of cores that do nothing else" in words
    assert cli.main(["list", "--quiet"]) == 0
    assert capsys.readouterr().out == "demo-lenet\ntiny\n"
    assert cli.main(["list", "--json"]) == 0
    (demo, tiny) = json.loads(capsys.readouterr().out)
    assert (demo["name"], tiny["name"]) == ("demo-lenet", "tiny")
    assert tiny["scales"]["smoke"]["finished"] == 6
    assert not tiny["scales"]["full"]["present"]

    assert cli.main(["report", "runs", "--out", "gathered", "--explain"]) == 0
    words = words_of(capsys)
    assert "report.html" in words
    assert "Student's paired t" in words
    assert (folder / "gathered" / "report.html").stat().st_size > 0


@pytest.mark.usefixtures("in_process")
def test_a_sweep_tries_every_combination(capsys, folder):
    arguments = ["sweep", "tiny", "--scale", "smoke", "--seeds", "1", "--vary", "rate=0.01,0.02"]
    assert cli.main([*arguments, "--vary", "momentum=0,0.9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["planned"], result["finished"]) == (12, 12)
    assert len(list((folder / "runs" / "store").iterdir())) == 12


@pytest.mark.usefixtures("in_process")
def test_runs_that_a_sweep_does_not_change_are_counted_once(capsys, folder):
    assert cli.main(["sweep", "tiny", "--scale", "smoke", "--seeds", "1", "--vary", "log_base=2,10"]) == 0
    words = words_of(capsys)
    assert "5 runs in" in words
    assert "5/5 runs; " in words
    assert len(list((folder / "runs" / "store").iterdir())) == 5


@pytest.mark.usefixtures("in_process")
def test_a_demo_ends_with_what_to_try_next(capsys, folder):
    assert cli.main(["demo", "--seeds", "1"]) == 0
    assert "Next: layerwise data mnist && layerwise run singh2015-table1 --scale full" in words_of(capsys)
    (folder / "my data").mkdir()
    assert cli.main(["demo", "--seeds", "1", "--data-dir", "my data"]) == 0
    words = "Next: layerwise data mnist --data-dir 'my data' && layerwise run singh2015-table1 --scale full --data-dir"
    assert words in words_of(capsys)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet", "digits5k", "python-library"])
def test_data_that_cannot_be_fetched_say_where_to_put_them(capsys, monkeypatch, folder, name):
    from layerwise.lab.data import fetch

    def no_network(*_, **__):
        raise UsageError("no server gave train-images-idx3-ubyte.gz")

    monkeypatch.setattr(fetch, "fetch", no_network)
    code = cli.main(["data", name, "--data-dir", str(folder / "data")])
    captured = capsys.readouterr()
    at_hand = name in ("digits5k", "python-library")
    if at_hand:
        assert "nothing to fetch" in captured.out
    else:
        assert str(folder / "data" / name) in captured.out + captured.err
    assert code == (0 if at_hand else 1)


def test_what_no_server_gave_is_told_in_one_sentence(capsys, monkeypatch, folder):
    from layerwise.lab.data import fetch
    from layerwise.lab.data.download import MirrorsError

    def no_network(file, *_, **__):
        raise MirrorsError(file, dict.fromkeys(file.urls, "the name cannot be resolved"))

    monkeypatch.setattr(fetch, "fetch_file", no_network)
    assert cli.main(["data", "mnist", "--data-dir", str(folder / "data")]) == 1
    first, *rest = capsys.readouterr().out.splitlines()
    reason = "(the name cannot be resolved); run it again to go on."
    assert first == f"no server gave train-images-idx3-ubyte.gz {reason}"
    assert sum("MD5" in line for line in rest) == 4


def test_data_and_doctor_have_json_too(capsys, folder, monkeypatch):
    assert cli.main(["data", "--json"]) == 0
    listed = json.loads(capsys.readouterr().out)
    assert [each["name"] for each in listed["datasets"]] == [known.name for known in data.names()]
    assert listed["datasets"][0]["present"]
    from layerwise.lab.data import fetch

    def no_network(*_, **__):
        raise UsageError("no server gave train-images-idx3-ubyte.gz")

    monkeypatch.setattr(fetch, "fetch", no_network)
    assert cli.main(["data", "mnist", "--json", "--data-dir", str(folder / "data")]) == 1
    captured = capsys.readouterr()
    told = json.loads(captured.out)
    assert (told["name"], told["present"], captured.err) == ("mnist", False, "")
    assert "no server gave" in told["words"]
    example = Path(__file__).parents[2] / "examples" / "my_task.py"
    assert cli.main(["doctor", f"{example}:task", "--json"]) == 0
    told = json.loads(capsys.readouterr().out)
    assert told["lines"]
    assert told["problems"] == []


def test_the_doctor_ends_with_1_where_something_is_wrong(capsys, folder):
    example = Path(__file__).parents[2] / "examples" / "my_task.py"
    wrong = example.read_text(encoding="utf-8").replace("torch.optim.SGD", "torch.optim.LBFGS")
    (folder / "own.py").write_text(wrong.replace("lr=lr, momentum=0.9, weight_decay=weight_decay", "lr=lr"))
    assert cli.main(["doctor", "own.py:task", "--json"]) == 1
    (problem,) = json.loads(capsys.readouterr().out)["problems"]
    assert "cannot be attached" in problem
    assert cli.main(["doctor", "own.py:task"]) == 1
    said = capsys.readouterr().out
    assert "Next:   layerwise doctor own.py:task   (once that is fixed)" in said
    assert max(map(len, said.splitlines())) <= 80


def test_the_help_of_data_names_every_data_set(capsys):
    with pytest.raises(SystemExit):
        cli.main(["data", "--help"])
    said = words_of(capsys)
    assert all(known.name in said for known in data.names())
    assert "or folder" not in said


def test_quiet_data_are_names_alone(capsys):
    assert cli.main(["data", "--quiet"]) == 0
    assert capsys.readouterr().out.split() == [known.name for known in data.names()]


def test_the_help_says_what_holds_and_which_constants_there_are(capsys):
    with pytest.raises(SystemExit):
        cli.main(["sweep", "--help"])
    said = words_of(capsys)
    assert "default: None" not in said
    said = said.replace("│ ", "")
    constants = said[said.index("Constants: ") + len("Constants: ") :].partition(".")[0].split(", ")
    assert sorted(constants) == sorted(field.name for field in dataclasses.fields(Constants))


def test_what_follows_two_dashes_is_no_option():
    assert options.parse(["report", "--", "--odd"]).runs == (Path("--odd"),)


def test_data_alone_lists_all(capsys):
    assert cli.main(["data"]) == 0
    said = capsys.readouterr().out
    assert all(known.name in said for known in data.names())
    assert "digits5k        here" in said


def test_the_folder_of_the_data_is_the_one_named_then_the_environments_then_the_own(monkeypatch, tmp_path):
    assert places.data_dir(None) is None
    home = tmp_path / "home"
    home.mkdir()
    monkeypatch.setattr(places, "home", lambda: home)
    assert places.data_dir(None) == home
    monkeypatch.setenv("LAYERWISE_DATA", str(tmp_path))
    assert places.data_dir(None) == tmp_path
    assert places.data_dir(home) == home


def test_assignments_are_numbers_or_words():
    read = options.assignments(["rate=0.1, 1e-3,2", "solver=sgd"], "vary")
    assert read == {"rate": [0.1, 0.001, 2], "solver": ["sgd"]}
    for wrong in (["rate"], ["=1"], ["rate="], ["rate=1,,2"], ["rate=1", "rate=2"]):
        with pytest.raises(UsageError, match="--vary"):
            options.assignments(wrong, "vary")


def test_an_interrupt_before_any_run_ends_with_130(capsys, monkeypatch):
    def interrupted(name):
        raise KeyboardInterrupt

    monkeypatch.setattr(recipe, "load", interrupted)
    assert cli.main(["demo"]) == 130
    assert "interrupted" in capsys.readouterr().err


@pytest.mark.skipif(sys.platform == "win32", reason="needs a shell with pipes")
def test_a_reader_that_leaves_early_is_no_error():
    command = f"{sys.executable} -m layerwise list | head -1"
    ended = subprocess.run(command, shell=True, capture_output=True, text=True)
    assert ended.stderr == ""
    assert ended.stdout.count("\n") == 1


def test_an_option_is_left_out_of_a_command():
    assert cli.without(["--seeds", "5", "--out", "a"], "--seeds") == ["--out", "a"]
    assert cli.without(["--out", "a", "--seeds=5"], "--seeds") == ["--out", "a"]
