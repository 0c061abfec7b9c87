"""Files made to do harm: nothing in them is run, written elsewhere, shown as it is, or fills the memory."""

from __future__ import annotations

import gzip
import hashlib
import io
import json
import os
import pickle
import stat
import subprocess
import sys
import tarfile
import tracemalloc
import zipfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import polars
import pytest
import torch
from made_up import finish, outcome_of, table_plan
from mutations import named
from PIL import Image
from test_browser import browser  # noqa: F401
from test_cifar import publish, text  # noqa: F401
from test_data import put, sets  # noqa: F401

from layerwise import rules
from layerwise.lab import report
from layerwise.lab.data import cifar, folder, mnist, photographs
from layerwise.lab.errors import UsageError
from layerwise.lab.experiments.pool import Failure
from layerwise.lab.report import saved
from layerwise.lab.runs import record as recorder
from layerwise.lab.runs import store
from layerwise.lab.runs.folder import MAGIC, RunFolder, Runs
from layerwise.lab.runs.record import read_run
from layerwise.lab.runs.store import signed, write_whole

pytestmark = pytest.mark.full


class Hostile:
    """Pickles into a command that makes a file."""

    def __init__(self, mark):
        self.mark = mark

    def __reduce__(self):
        return os.system, (f"touch '{self.mark}'",)


def payloads(mark):
    """Give the same command in every form in which a reader might unpickle it."""
    made = {"pickle": pickle.dumps(Hostile(mark)), "old pickle": pickle.dumps({b"data": Hostile(mark)}, protocol=0)}
    for name, options in (("torch", {}), ("old torch", {"_use_new_zipfile_serialization": False})):
        buffer = io.BytesIO()
        torch.save({"model": Hostile(mark)}, buffer, **options)
        made[name] = buffer.getvalue()
    buffer = io.BytesIO()
    np.save(buffer, np.array([Hostile(mark)], dtype=object), allow_pickle=True)
    made["numpy"] = buffer.getvalue()
    made["gzip"] = gzip.compress(made["pickle"])
    return made


FORMS = list(payloads(Path("mark")))


@pytest.fixture
def mark(tmp_path):
    place = tmp_path / "was run"
    yield place
    assert not place.exists()


@pytest.fixture
def finished(tmp_path):
    plan = table_plan(seeds=1)
    (run,) = [run for run in plan.runs if run.subject == "sgd" and run.arm.name == "layer-adaptive"]
    return finish(tmp_path / "runs", run, 1.5)


def test_the_command_of_these_tests_would_be_run_by_a_reader_that_trusts(tmp_path):
    for form in ("pickle", "old pickle"):
        pickle.loads(payloads(tmp_path / form)[form])
        assert (tmp_path / form).exists()


@pytest.mark.parametrize("form", FORMS)
def test_no_file_of_a_run_is_run(tmp_path, finished, mark, form):
    content, place = payloads(mark)[form], finished.folder
    whole = {path.name: path.read_bytes() for path in place.iterdir()}
    for name in ("run.json", "record.json", "metrics.parquet", "status.json", "plan.json", "runs.json"):
        for file, before in whole.items():
            (place / file).write_bytes(before)
        (place / name).write_bytes(content)
        Runs(tmp_path / "runs").find(finished.configuration)
        assert saved.rebuilt(place) is None
        if name in ("plan.json", "runs.json", "status.json"):
            assert read_run(place).summary == finished.summary
    (place / "metrics.parquet").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read"):
        recorder.read_frame(place / "metrics.parquet")
    for packed in (content, MAGIC + hashlib.sha256(content).digest() + content):
        (place / "checkpoint.pt").write_bytes(packed)
        try:
            assert RunFolder(place, finished.configuration).load_checkpoint() is None
        except UsageError as error:
            named(error, "nothing in it was run")
    (place / "factors.jsonl").write_bytes(content)
    with pytest.raises(ValueError, match="does not start with the header"):
        rules.Replay(place / "factors.jsonl")


@pytest.mark.parametrize("form", FORMS)
def test_no_file_of_data_is_run(tmp_path, mark, form, sets, publish):  # noqa: F811
    content = payloads(mark)[form]
    put(tmp_path / "mnist", sets["mnist"])
    (tmp_path / "mnist" / "t10k-labels-idx1-ubyte.gz").write_bytes(content)
    with pytest.raises(UsageError, match="damaged"):
        mnist.load.__wrapped__(tmp_path, "mnist")

    def alter(files):
        files["data_batch_1"] = content + bytes(max(0, 3 * 3072 - len(content)))

    publish(tmp_path / "cifar", "cifar10", "python", alter=alter)
    with pytest.raises(UsageError, match="data_batch_1: damaged: MD5"):
        cifar.load.__wrapped__("cifar10", tmp_path / "cifar")
    (tmp_path / "a.png").write_bytes(content)
    with pytest.raises(UsageError, match="cannot be read as an image"):
        photographs.decoded(tmp_path / "a.png", 8)
    for part in ("train", "val"):
        (tmp_path / part / "a").mkdir(parents=True)
        Image.new("RGB", (9, 9)).save(tmp_path / part / "a" / "1.png")
    opened = folder.ImageFolder(tmp_path, side=8, crop=8, cache=tmp_path / "cache")
    expected = opened.mean
    (kept,) = (tmp_path / "cache").glob("mean-*.npy")
    kept.write_bytes(content + hashlib.sha256(content).digest())
    again = folder.ImageFolder(tmp_path, side=8, crop=8, cache=tmp_path / "cache")
    assert np.array_equal(again.mean, expected)


def test_a_picture_in_postscript_starts_no_interpreter(tmp_path):
    path = tmp_path / "a.png"
    Image.new("RGB", (4, 4)).save(path, "EPS")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        photographs.decoded(path, 8)
    Image.new("RGB", (4, 4)).save(path, "BMP")
    with pytest.raises(UsageError, match="cannot be read as an image"):
        photographs.decoded(path, 8)


def member(name, kind=tarfile.REGTYPE, link="", content=b""):
    made = tarfile.TarInfo(name)
    made.type, made.linkname, made.size = kind, link, len(content)
    return made, io.BytesIO(content)


def test_an_archive_writes_nothing_anywhere(tmp_path, publish, monkeypatch):  # noqa: F811
    place = tmp_path / "data"
    publish(place, "cifar10", "python", packed=True)
    path, other = place / "cifar-10-python.tar.gz", tmp_path / "other"
    form, binary = cifar.FORMS["cifar10"]
    other.write_bytes(b"secret")
    with tarfile.open(path, "w:gz") as archive:
        for each, content in (
            member("../escaped", content=b"x"),
            member(str(tmp_path / "absolute"), content=b"x"),
            member(f"{form.folder}/data_batch_1", tarfile.SYMTYPE, str(other)),
            member(f"{form.folder}/data_batch_2", tarfile.LNKTYPE, "../../other"),
            member(f"{form.folder}/data_batch_3", tarfile.CHRTYPE),
            member(f"{form.folder}/data_batch_4", tarfile.FIFOTYPE),
            member(f"{form.folder}/../../data_batch_5", content=b"x"),
        ):
            archive.addfile(each, content)
    digest = hashlib.md5(path.read_bytes(), usedforsecurity=False).hexdigest()
    monkeypatch.setitem(cifar.FORMS, "cifar10", (replace(form, md5=digest), binary))
    before = sorted(tmp_path.rglob("*"))
    with pytest.raises(UsageError, match="the training images are not those of CIFAR-10"):
        cifar.load.__wrapped__("cifar10", place)
    assert sorted(tmp_path.rglob("*")) == before
    assert other.read_bytes() == b"secret"


def pickle_bombs():
    """Give pickles of some kilobytes that would take gigabytes."""
    many = b"\x80\x02" + b"}" * 2_000_000 + b"."
    far = b"\x80\x02Nr" + (2**31 - 1).to_bytes(4, "little") + b"."
    far_in_words = b"Np4000000000\n."
    long = b"a" * 100_000
    call = b"h\x01h\x00h\x02\x86R"
    texts = (
        b"X"
        + len(long).to_bytes(4, "little")
        + long
        + b"q\x00"
        + b"c_codecs\nencode\nq\x01X\x06\x00\x00\x00latin1q\x02"
    )
    return {
        "operations": many,
        "a far place": far,
        "a far place in words": far_in_words,
        "texts": b"\x80\x02" + texts + call * 5000 + b".",
    }


@pytest.mark.parametrize("name", list(pickle_bombs()))
def test_a_small_pickle_does_not_fill_the_memory(tmp_path, name, publish):  # noqa: F811
    content = pickle_bombs()[name]
    publish(tmp_path, "cifar10", "python", alter=lambda files: files.update(data_batch_1=content))
    tracemalloc.start()
    try:
        with pytest.raises(UsageError, match="data_batch_1: damaged: MD5"):
            cifar.load.__wrapped__("cifar10", tmp_path)
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 3 * len(content) + 5_000_000


def test_a_compressed_checkpoint_is_refused_before_it_is_unpacked(tmp_path):
    buffer = io.BytesIO()
    torch.save({"model": torch.zeros(10_000_000)}, buffer)
    packed = io.BytesIO()
    with zipfile.ZipFile(buffer) as given, zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as smaller:
        for part in given.infolist():
            smaller.writestr(part.filename, given.read(part))
    content = packed.getvalue()
    assert len(content) < 100_000
    (tmp_path / "checkpoint.pt").write_bytes(MAGIC + hashlib.sha256(content).digest() + content)
    with pytest.raises(UsageError, match="it is compressed, as no checkpoint is"):
        RunFolder(tmp_path, None).load_checkpoint()


def test_a_picture_that_would_fill_the_memory_is_named(tmp_path):
    path = tmp_path / "a.png"
    Image.new("1", (14_000, 14_000)).save(path)
    assert path.stat().st_size < 100_000
    with pytest.raises(UsageError, match=r"a\.png: cannot be read as an image \(Image size .*exceeds limit"):
        photographs.decoded(path, 8)


def test_a_table_of_more_rows_than_a_run_has_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(recorder, "LARGEST_ROWS", 1000)
    made = recorder.Recorder()
    for step in range(1001):
        made.add("training_loss", step, 1, 0.0)
    made.frame().write_parquet(tmp_path / "metrics.parquet")
    with pytest.raises(UsageError, match=r"holds 1001 rows of .* not up to 1000"):
        recorder.read_frame(tmp_path / "metrics.parquet")
    polars.DataFrame({"step": [1]}).write_parquet(tmp_path / "metrics.parquet")
    with pytest.raises(UsageError, match="holds 1 rows of step, not"):
        recorder.read_frame(tmp_path / "metrics.parquet")


def test_a_file_of_brackets_and_one_that_is_too_large_are_damaged(tmp_path, monkeypatch):
    (tmp_path / "run.json").write_bytes(b"[" * 500_000)
    with pytest.raises(ValueError, match="damaged"):
        store.read_signed(tmp_path / "run.json")
    (tmp_path / "run.json").write_bytes(signed({"words": "x" * 1000}))
    monkeypatch.setattr(store, "LARGEST_JSON", 1000)
    with pytest.raises(ValueError, match="has more than 1,000 bytes"):
        store.read_signed(tmp_path / "run.json")


@pytest.mark.skipif(sys.platform == "win32", reason="needs links")
def test_links_that_lie_in_a_folder_are_not_followed(tmp_path):
    outside, place = tmp_path / "outside", tmp_path / "run"
    outside.write_bytes(b"mine")
    place.mkdir()
    for name in (f".status.json.{os.getpid()}.tmp", "status.json"):
        (place / name).symlink_to(outside)
    write_whole(place / "status.json", b"{}")
    assert not (place / "status.json").is_symlink()
    (place / f"factors.jsonl.{os.getpid()}.part").symlink_to(outside)
    rules.save_factors(place / "factors.jsonl", [{"a": 1.0}])
    (place / "lock").symlink_to(tmp_path / "made by a lock")
    with pytest.raises(UsageError, match=r"lock: is a link.*remove it"), RunFolder(place, None).lock():
        pass
    assert outside.read_bytes() == b"mine"
    assert not (tmp_path / "made by a lock").exists()


WORDS = (
    "</script><script>document.title='ran'</script>",
    "<img src=x onerror=\"document.title='ran'\">",
    "'><svg/onload=document.title='ran'>",
    "<a href=\"javascript:document.title='ran'\" id=trap>click</a>",
    "{{ 7 * 7 }}{% raw %}<!--",
    "]]></style><script>document.title='ran'</script>",
)
"""What would run in a page, were it written as it is."""


@pytest.fixture(scope="module")
def hostile_page(tmp_path_factory):
    """Write a report of runs each of whose words is hostile, as their files say, with right checksums."""
    tmp_path = tmp_path_factory.mktemp("hostile")
    plan = table_plan(seeds=3)
    for place, run in enumerate([run for run in plan.runs if run.subject == "sgd" and not run.arm.control]):
        word = WORDS[place % len(WORDS)]
        record = finish(tmp_path / "runs", run, 1.5, layers=[f"{word}{n}" for n in range(2)])
        about = store.read_signed(record.folder / "run.json")
        about |= {"hardware": {"processor": WORDS[0], "cores": WORDS[1], "system": WORDS[2]}, "python": WORDS[3]}
        about["versions"] = {"torch": WORDS[4], "layerwise": WORDS[5]}
        (record.folder / "run.json").write_bytes(signed(about))
    arms = tuple(replace(arm, words=WORDS[2] + arm.name) for arm in plan.arms if not arm.control)
    runs = tuple(run for run in plan.runs if run.subject == "sgd" and not run.arm.control)
    subject = replace(plan.subject("sgd"), words=WORDS[1])
    quantity = replace(plan.quantity, words=WORDS[5], unit=WORDS[0], difference_unit=WORDS[1])
    plan = replace(plan, subjects=(subject,), arms=arms, runs=runs, quantity=quantity, source=WORDS[4])
    outcome = outcome_of(plan, tmp_path / "runs", tmp_path / "page")
    outcome.failures = [Failure(WORDS[0], WORDS[1], f"RuntimeError: {word}", word) for word in WORDS]
    outcome.plan = outcome.results.plan = replace(outcome.plan, scale="smoke", title=WORDS[0], notes=WORDS)
    outcome.results.records.pop(next(iter(outcome.results.records)))
    return report.write(outcome, f"layerwise report '{WORDS[3]}'", figures=True)


@pytest.mark.parametrize("bypass", [False, True], ids=["as it is", "without its own rules against scripts"])
def test_no_word_of_a_run_is_run_in_a_browser(browser, hostile_page, bypass):  # noqa: F811
    context = browser.new_context(bypass_csp=bypass)
    page, told, asked = context.new_page(), [], []
    page.on("dialog", lambda dialog: told.append(dialog.message))
    page.on("pageerror", lambda error: told.append(str(error)))
    page.on("request", lambda request: asked.append(request.url))
    page.goto(hostile_page.as_uri())
    assert page.evaluate("document.title") != "ran"
    page.locator(".plot svg").first.wait_for()
    assert page.evaluate("document.querySelectorAll('body > script').length") == 2
    traps = "main script, #trap, [onerror], [onload], iframe, object"
    assert page.evaluate(f"document.querySelectorAll('{traps}').length") == 0
    assert (
        page.evaluate("[...document.querySelectorAll('[href]')].filter(e => e.href.startsWith('javascript')).length")
        == 0
    )
    assert "document.title='ran'" in page.evaluate("document.body.innerText")
    assert told == []
    assert asked == [hostile_page.as_uri()]
    for drawing in sorted((hostile_page.parent / "figures").glob("*.svg"))[:5]:
        page.goto(drawing.as_uri())
        assert page.evaluate("document.querySelectorAll('script, [onload]').length") == 0
    context.close()


WATCH = """
import os, sys
_place = os.environ["WATCHED"]
_writing = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_APPEND | os.O_TRUNC
_busy = False
def _watch(event, arguments):
    global _busy
    if _busy:
        return
    if event == "open":
        path, mode, flags = arguments
        if not isinstance(path, (str, bytes)) or not (flags or 0) & _writing:
            return
        words = os.path.abspath(os.fsdecode(path))
    elif event in ("os.rename", "os.symlink", "os.link"):
        words = os.path.abspath(os.fsdecode(arguments[1]))
    elif event in ("os.mkdir", "os.remove", "os.rmdir", "os.chmod", "os.truncate"):
        # What a temporary folder is emptied by names files relative to it.
        inside = arguments[1] if event in ("os.remove", "os.rmdir") and arguments[1] >= 0 else None
        above = "" if inside is None else os.readlink(f"/proc/self/fd/{inside}")
        words = os.path.abspath(os.path.join(above, os.fsdecode(arguments[0])))
    elif event in ("socket.connect", "socket.bind", "socket.getaddrinfo", "socket.sendto", "urllib.Request"):
        words = repr(arguments[1:])
    elif event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn"):
        words = repr(arguments[:2])
    else:
        return
    _busy = True
    with open(_place, "a") as stream:
        stream.write(event + "\\t" + words.replace("\\n", " ") + "\\n")
    _busy = False
sys.addaudithook(_watch)
"""

TASK = """
import torch
import layerwise

def task(seed):
    torch.manual_seed(seed)
    model = torch.nn.Linear(4, 2)
    x, y = torch.randn(32, 4), torch.arange(32) % 2
    return dict(
        model=model,
        optimizer=lambda parameters: torch.optim.SGD(parameters, lr=0.1),
        batches=[(x[i : i + 8], y[i : i + 8]) for i in range(0, 32, 8)],
        loss=lambda model, batch: torch.nn.functional.cross_entropy(model(batch[0]), batch[1]),
        metric=lambda model: float((model(x).argmax(1) == y).float().mean()),
        higher_is_better=True,
        epochs=2,
    )
"""


@pytest.fixture(scope="module")
def watched(tmp_path_factory, request):
    """Compare on a task, with its workers and its report; give what every process wrote, made and connected to."""
    place = tmp_path_factory.mktemp("watched")
    for name in ("home", "temporary", "site", "work"):
        (place / name).mkdir()
    (place / "site" / "sitecustomize.py").write_text(WATCH)
    (place / "work" / "my_task.py").write_text(TASK)
    environment = {
        **{name: value for name, value in os.environ.items() if not name.startswith(("XDG_", "LAYERWISE_", "TORCH"))},
        "WATCHED": str(place / "log"),
        "HOME": str(place / "home"),
        "TMPDIR": str(place / "temporary"),
        "PYTHONPATH": os.pathsep.join([str(place / "site"), *filter(None, sys.path)]),
        "PYTHONDONTWRITEBYTECODE": "1",
        "OMP_NUM_THREADS": "1",
    }
    start = [sys.executable, "-c", "from layerwise.lab.cli import main; raise SystemExit(main())"]
    command = ["compare", "my_task.py:task", "--seeds", "1", "--arms", "plain,layer-adaptive", "--jobs", "1"]
    more = [
        ["report", "runs", "--out", "runs/again"],
        ["list"],
        ["doctor", "my_task.py:task"],
        ["demo", "--seeds", "1"],
    ]
    for arguments in (command, *(more if request.config.getoption("--faults") else [])):
        done = subprocess.run(
            [*start, *arguments], cwd=place / "work", env=environment, capture_output=True, text=True, timeout=1200
        )
        assert done.returncode == 0 or (arguments[0], done.returncode) == ("doctor", 1), done.stderr  # 1: a finding
    events = [line.split("\t", 1) for line in (place / "log").read_text().splitlines()]
    return place, events


@pytest.mark.dist
def test_nothing_asks_the_network(watched):
    _, events = watched
    assert len(events) > 50
    assert [words for event, words in events if event.startswith(("socket", "urllib"))] == []


@pytest.mark.dist
def test_nothing_is_written_outside_the_folders_of_runs_and_pages(watched):
    place, events = watched
    written = {words for event, words in events if event.startswith(("open", "os.")) and event != "os.posix_spawn"}
    # The page's script is put together once and kept in the user's cache.
    allowed = (str(place / "work" / "runs"), str(place / "temporary"), str(place / "home" / ".cache"))
    devices = ("/dev/null", "/dev/tty", "/proc/self/clear_refs", "/dev/shm")
    assert sorted(path for path in written if not path.startswith((*allowed, *devices))) == []
    assert sum(path.startswith(allowed[0]) for path in written) > 20
    # Also what is not written by Python.
    assert sorted(path.name for path in (place / "work").iterdir()) == ["my_task.py", "runs"]
    left = [path for path in (place / "temporary").rglob("*") if not path.name.startswith("torchinductor")]
    assert left == []  # but for an empty folder that torch makes when it is imported
    cached = [path for path in (place / "home").rglob("*") if path.is_file()]
    assert all(".cache" in path.parts for path in cached), cached


@pytest.mark.dist
def test_no_other_program_is_started(watched):
    _, events = watched
    started = [
        words for event, words in events if event in ("subprocess.Popen", "os.system", "os.exec", "os.posix_spawn")
    ]
    assert all("python" in words for words in started), started


@pytest.mark.skipif(sys.platform == "win32", reason="modes of files are others")
def test_folders_of_passing_use_are_private(tmp_path, monkeypatch):
    import tempfile

    from layerwise.lab.experiments import ray as cluster

    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    names = set()
    for _ in range(2):
        with tempfile.TemporaryDirectory(prefix="layerwise-") as made:
            assert stat.S_IMODE(os.stat(made).st_mode) == 0o700
            names.add(made)
    assert len(names) == 2
    source = Path(cluster.__file__).parent
    # Every folder of passing use comes from tempfile, which makes private ones of names that cannot be known.
    lines = [line for path in source.rglob("*.py") for line in path.read_text().splitlines() if '"/tmp' in line]
    assert len(lines) == 1
    assert "where = " in lines[0]


def test_the_command_says_which_code_it_loads(capsys):
    from layerwise.lab.cli import main

    with pytest.raises(SystemExit):
        main(["compare", "--help"])
    assert "This file is the only code that is loaded and run." in " ".join(capsys.readouterr().out.split())


def test_hostile_names_of_recipes_and_data_open_no_file(tmp_path, capsys):
    from layerwise.lab.cli import main

    (tmp_path / "mine.toml").write_text("x = 1")
    for name in (str(tmp_path / "mine"), "../../mine", "_base/../x"):
        assert main(["run", name]) == 2
    assert main(["data", "../../etc/passwd", "--data-dir", str(tmp_path)]) == 2
    assert "is not known" in capsys.readouterr().err
    assert json.dumps(sorted(path.name for path in tmp_path.iterdir())) == '["mine.toml"]'
