"""Faults planted in real networks are found by a short training, each alone, and none in a healthy one."""

from __future__ import annotations

import json
import math
import re
import shutil
import textwrap
from pathlib import Path

import pytest
import torch

from layerwise.lab import cli
from layerwise.lab.errors import UsageError
from layerwise.lab.tasks import doctor
from layerwise.lab.tasks import task as tasks

HEAD = """
import torch
from torch import nn
from torch.nn import functional

def mlp(activation=nn.ReLU, depth=3):
    layers, width = [], 20
    for _ in range(depth):
        layers += [nn.Linear(width, 32), activation()]
        width = 32
    return nn.Sequential(*layers, nn.Linear(width, 4))

def parts(model, optimizer, spoil=None):
    inputs = torch.randn(640, 20)
    labels = inputs[:, :4].argmax(1)

    def batches(epoch):
        for number, rows in enumerate(torch.arange(640).split(32)):
            yield (inputs[rows] * (float("nan") if number == spoil else 1.0), labels[rows])

    return {
        "model": model,
        "batches": batches,
        "loss": lambda model, batch: functional.cross_entropy(model(batch[0]), batch[1]),
        "metric": lambda model: {"error": float((model(inputs).argmax(1) != labels).float().mean())},
        "optimizer": optimizer,
    }

def task(seed):
"""

FAULTS = {
    "healthy": ("model = mlp()", "torch.optim.SGD(model.parameters(), lr=0.03)", None, []),
    "healthy with Adam": ("model = mlp()", "torch.optim.Adam(model.parameters(), lr=3e-4)", None, []),
    "dead ReLU": (
        "model = mlp(); nn.init.constant_(model[2].bias, -100.0)",
        "torch.optim.SGD(model.parameters(), lr=0.03)",
        None,
        [("dead", ("2", "0"))],
    ),
    "sigmoids": (
        "model = mlp(nn.Sigmoid, 7)",
        "torch.optim.SGD(model.parameters(), lr=0.01)",
        None,
        [("vanishing", ("0", "2", "4"))],
    ),
    "large weights": (
        "model = mlp(depth=5); [nn.init.normal_(layer.weight) for layer in model[::2]]",
        "torch.optim.SGD(model.parameters(), lr=1e-5)",
        None,
        [("exploding", ("10", "8", "6", "4", "2", "0"))],
    ),
    "large rate": ("model = mlp()", "torch.optim.Adam(model.parameters(), lr=0.1)", None, [("fast", None)]),
    "small rate": ("model = mlp()", "torch.optim.SGD(model.parameters(), lr=1e-6)", None, [("slow", None)]),
    "frozen": (
        "model = mlp(); model[0].requires_grad_(False)",
        "torch.optim.SGD(model.parameters(), lr=0.03)",
        None,
        [("frozen", ("0",))],
    ),
    "rate of 0": (
        "model = mlp(); rest = model[1:].parameters()",
        "torch.optim.SGD([{'params': model[0].parameters(), 'lr': 0.0}, {'params': rest}], lr=0.03)",
        None,
        [("unmoved", ("0",))],
    ),
    "NaN in a batch": (
        "model = mlp()",
        "torch.optim.SGD(model.parameters(), lr=0.03)",
        13,
        [("non-finite", ("0", "2", "4", "6"))],
    ),
    "NaN in the backward pass": (
        "model = mlp(); model[3].register_forward_hook(lambda m, i, o: o + (o - o).sqrt())",
        "torch.optim.SGD(model.parameters(), lr=0.03)",
        None,
        [("non-finite", ("0", "2"))],
    ),
}


@pytest.fixture
def write(tmp_path):
    """Return a function that writes a task with a fault and gives its name."""

    def make(name: str) -> str:
        model, optimizer, spoil, _ = FAULTS[name]
        body = f"{model}\nreturn parts(model, {optimizer}, {spoil})\n"
        path = tmp_path / "faulty.py"
        path.write_text(HEAD + textwrap.indent(body, "    "), encoding="utf-8")
        return f"{path}:task"

    return make


@pytest.mark.parametrize("name", FAULTS)
def test_a_planted_fault_is_found_alone(write, name):
    expected = FAULTS[name][3]
    found = doctor.train(tasks.load(write(name)))
    assert [finding.kind for finding in found.findings] == [kind for kind, _ in expected], [
        finding.sentence for finding in found.findings
    ]
    for finding, (_, layers) in zip(found.findings, expected, strict=True):
        assert layers is None or sorted(finding.layers) == sorted(layers)
        assert finding.serious == (finding.kind != "frozen")
        assert finding.remedy
        assert f"({finding.limit})" in finding.sentence


def test_the_records_are_those_of_a_loop_by_hand(write):
    task_file = tasks.load(write("healthy"))
    found = doctor.train(task_file, steps=25)
    assert [record.step for record in found.records] == list(range(1, 26))
    assert found.words.startswith("25 updates, in ")
    # Model, data and batches of seed 0, trained here in float64 arithmetic of the norms.
    trial = task_file.tried().trial
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    batches = [batch for epoch in (1, 2) for batch in trial.batches(epoch, 0)]
    layers = {name: list(module.parameters(recurse=False)) for name, module in trial.model.named_children()}
    layers = {name: own for name, own in layers.items() if own}
    for record, batch, loss in zip(found.records, batches, found.losses, strict=False):
        trial.optimizer.zero_grad()
        value = trial.loss(trial.model, batch)
        value.backward()
        assert float(value.detach()) == loss
        before = {name: [p.detach().clone() for p in own] for name, own in layers.items()}
        gradients = {name: [p.grad for p in own] for name, own in layers.items()}
        trial.optimizer.step()
        for place, (name, own) in enumerate(layers.items()):
            norm = math.sqrt(sum(float(t.double().square().sum()) for t in before[name]))
            moved = [new.detach() - old for new, old in zip(own, before[name], strict=True)]
            change = math.sqrt(sum(float(t.double().square().sum()) for t in moved))
            gradient = math.sqrt(sum(float(t.double().square().sum()) for t in gradients[name]))
            assert record.layers[place] == name
            assert record.gradient_norm[place] == pytest.approx(gradient, rel=1e-5)
            assert record.update_ratio[place] == pytest.approx(change / norm, rel=1e-5)
    torch.set_num_threads(threads)


def test_a_run_that_is_shorter_than_asked_for_is_whole(tmp_path):
    path = tmp_path / "short.py"
    body = (
        "model = mlp()\n"
        "return parts(model, torch.optim.SGD(model.parameters(), lr=0.03)) | {'iterations': 7, 'test_every': 7}\n"
    )
    path.write_text(HEAD + textwrap.indent(body, "    "), encoding="utf-8")
    found = doctor.train(tasks.load(f"{path}:task"))
    assert (len(found.records), found.asked, found.ended_early) == (7, 7, False)


def test_the_clock_ends_it_earlier_and_says_so(write, monkeypatch):
    clock = iter(range(1000))
    monkeypatch.setattr(doctor.time, "perf_counter", lambda: next(clock))
    found = doctor.train(tasks.load(write("healthy")), seconds=10.0)
    assert 1 <= len(found.records) < 100
    assert f"{len(found.records)} updates of 100, as the time was up" in found.words
    assert found.findings == ()


def test_the_progress_is_told(write):
    seen: list[tuple[int, int]] = []
    doctor.train(tasks.load(write("healthy")), steps=5, advance=lambda done, total: seen.append((done, total)))
    assert seen[0] == (0, 5)
    assert (4, 5) in seen


def test_random_numbers_and_threads_stay_as_they_were(write):
    task_file = tasks.load(write("healthy"))
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        doctor.train(task_file, steps=3)
        assert torch.equal(torch.get_rng_state(), before)
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(threads)


@pytest.mark.parametrize(
    ("how", "words"),
    [
        ({"steps": 0}, "steps=0: must be from 1 to 100,000; 100 is the default"),
        ({"steps": 100_001}, "steps=100001"),
        ({"seconds": 0.0}, "seconds=0.0: must be finite and above 0; 30 is the default"),
        ({"seconds": math.nan}, "seconds=nan"),
    ],
)
def test_a_length_out_of_its_range_is_refused(write, how, words):
    with pytest.raises(UsageError, match=re.escape(words)):
        doctor.examine(tasks.load(write("healthy")), **how)


# --- The command ------------------------------------------------------------------------------------------------------


def test_the_command_tells_the_finding_the_remedy_and_the_page(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "80")
    name = write("sigmoids")
    assert cli.main(["doctor", name]) == 1
    said = capsys.readouterr().out
    assert max(map(len, said.splitlines())) <= 80 + len(name)  # the next command is never folded
    words = " ".join(said.split())
    assert "problem gradients vanish: relative ‖g‖/‖w‖" in words
    assert "(limit 0.0001 of the largest) remedy Replace saturating activations" in words
    assert "page runs/doctor/faulty-task.html" in words
    assert f"Next: layerwise doctor {name} (once that is fixed)" in words
    page = (tmp_path / "runs" / "doctor" / "faulty-task.html").read_text(encoding="utf-8")
    assert "1 problem was found" in page
    assert "gradients vanish" in page


def test_a_healthy_task_ends_with_0_and_the_comparison_is_next(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    name = write("healthy")
    assert cli.main(["doctor", name, "--steps", "20", "--out", "elsewhere"]) == 0
    said = capsys.readouterr().out
    assert "problems    none found" in said
    assert "trained     20 updates, in" in said
    assert f"Next:   layerwise compare {name}" in said
    assert (tmp_path / "elsewhere" / "doctor" / "faulty-task.html").exists()
    assert not (tmp_path / "runs").exists()


def test_quiet_is_the_conclusion_and_the_page_alone(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("COLUMNS", "200")
    assert cli.main(["doctor", write("dead ReLU"), "--quiet"]) == 1
    captured = capsys.readouterr()
    assert [line[:12].strip() for line in captured.out.splitlines()][:3] == ["problem", "remedy", "page"] or (
        captured.out.splitlines()[0].startswith("problem     layers are dead")
    )
    assert "acts on" not in captured.out
    assert captured.err == ""


def test_json_is_one_object_with_every_number(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert cli.main(["doctor", write("NaN in a batch"), "--json"]) == 1
    captured = capsys.readouterr()
    told = json.loads(captured.out, parse_constant=lambda word: pytest.fail(word))
    assert captured.err == ""
    (finding,) = told["findings"]
    assert (finding["kind"], finding["layers"], finding["values"]) == ("non-finite", ["0", "2", "4", "6"], [None] * 4)
    assert told["problems"] == [finding["sentence"]]
    assert [layer["name"] for layer in told["training"]["layers"]] == ["0", "2", "4", "6"]
    assert Path(told["page"]).exists()


def test_the_page_needs_nothing_from_elsewhere_and_escapes_names(write, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    path = Path(write("dead ReLU").rpartition(":")[0])
    source = path.read_text(encoding="utf-8").replace("return nn.Sequential(*layers, nn.Linear(width, 4))", HOSTILE)
    path.write_text(source.replace("model[2]", "model[1]"), encoding="utf-8")
    assert cli.main(["doctor", f"{path}:task"]) == 1
    assert "\x1b" not in capsys.readouterr().out
    page = (tmp_path / "runs" / "doctor" / "faulty-task.html").read_text(encoding="utf-8")
    assert "default-src 'none'" in page
    assert page.count("<script") == 2  # its data and its own script
    own = re.sub(r"<script.*?</script>", "", page, flags=re.S)
    assert not re.search(r"(src|href)=[\"']?(http|//)", own)
    assert "<img/onerror" not in page


HOSTILE = (
    'made = nn.Sequential(); made.add_module("<img/onerror=x>", layers[0]); made.add_module("\\x1b[31m", layers[2]); '
    'made.add_module("relu", nn.ReLU()); made.add_module("out", nn.Linear(width, 4)); return made'
)


@pytest.mark.skipif(shutil.which("chromium") is None, reason="no Chromium is installed")
def test_the_page_is_shown_by_a_browser_without_an_error_or_a_request(write, tmp_path, monkeypatch, capsys):
    sync = pytest.importorskip("playwright.sync_api")
    monkeypatch.chdir(tmp_path)
    cli.main(["doctor", write("sigmoids"), "--quiet"])
    capsys.readouterr()
    with sync.sync_playwright() as play:
        browser = play.chromium.launch(executable_path=shutil.which("chromium"), args=["--no-sandbox"])
        page = browser.new_page(viewport={"width": 390, "height": 800})
        asked, wrong = [], []
        page.on("request", lambda request: asked.append(request.url))
        page.on("console", lambda message: wrong.append(message.text))
        page.goto(f"file://{tmp_path}/runs/doctor/faulty-task.html")
        assert len(asked) == 1
        assert page.evaluate("document.documentElement.scrollWidth <= document.documentElement.clientWidth")
        assert page.locator("h1").inner_text().startswith("1 problem was found")
        for number in range(4):
            page.locator(".tabs > label").nth(number).click()
            page.locator(".pane:visible .plot svg").wait_for()
        assert wrong == []
        assert len(asked) == 1
        browser.close()
