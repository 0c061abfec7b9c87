"""The command as a person types it, on a recipe of a few updates."""

import builtins
import json
import subprocess
import sys
from pathlib import Path

import pytest

import layerwise
from layerwise.lab import cli, data, options, places, recipe
from layerwise.lab.errors import UsageError

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
    assert all(name in said for name in options.COMMANDS)


@pytest.mark.parametrize("name", options.COMMANDS)
def test_every_command_has_help(capsys, name):
    with pytest.raises(SystemExit) as ended:
        cli.main([name, "--help"])
    assert ended.value.code == 0
    assert "--out" in capsys.readouterr().out


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
    assert 'pip install "layerwise[lab]"' in capsys.readouterr().err


@pytest.mark.dist
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
    assert "no difference shown" in words.lower() or "Too few" in words
    assert "report.html" in words
    assert "Next: layerwise run tiny --scale full" in words

    assert cli.main([*arguments, "--quiet"]) == 0
    words = words_of(capsys)
    assert "report.html" in words
    assert "Next" not in words

    assert cli.main(["list"]) == 0
    words = words_of(capsys)
    assert "6 of 6 runs" in words
    assert "mnist (not here)" in words
    assert "Get it with layerwise data mnist" in words
    assert cli.main(["list", "--json"]) == 0
    (demo, tiny) = json.loads(capsys.readouterr().out)
    assert (demo["name"], tiny["name"]) == ("demo-lenet", "tiny")
    assert tiny["scales"]["smoke"]["finished"] == 6
    assert not tiny["scales"]["full"]["present"]

    assert cli.main(["report", "runs", "--out", "gathered"]) == 0
    assert "report.html" in words_of(capsys)
    assert (folder / "gathered" / "report.html").stat().st_size > 0


@pytest.mark.dist
def test_a_sweep_tries_every_combination(capsys, folder):
    arguments = ["sweep", "tiny", "--scale", "smoke", "--seeds", "1", "--vary", "rate=0.01,0.02"]
    assert cli.main([*arguments, "--vary", "momentum=0,0.9", "--json"]) == 0
    result = json.loads(capsys.readouterr().out)
    assert (result["planned"], result["finished"]) == (12, 12)
    assert len(list((folder / "runs" / "store").iterdir())) == 12


@pytest.mark.dist
def test_a_demo_ends_with_what_to_try_next(capsys):
    assert cli.main(["demo", "--seeds", "1"]) == 0
    assert "Next: layerwise run singh2015-table1 --scale full --data-dir FOLDER" in words_of(capsys)


@pytest.mark.parametrize("name", ["mnist", "cifar10", "imagenet", "digits5k"])
def test_data_that_cannot_be_fetched_say_where_to_put_them(capsys, monkeypatch, folder, name):
    from layerwise.lab.data import fetch

    def no_network(*_, **__):
        raise UsageError("no server gave train-images-idx3-ubyte.gz")

    monkeypatch.setattr(fetch, "fetch", no_network)
    code = cli.main(["data", name, "--data-dir", str(folder / "data")])
    captured = capsys.readouterr()
    if name == "digits5k":
        assert "nothing to fetch" in captured.out
    else:
        assert str(folder / "data" / name) in captured.out + captured.err
    assert code == (1 if name in ("mnist", "cifar10") else 0)


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
    assert json.loads(capsys.readouterr().out)["lines"]


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
