"""What people install: the wheel and the source distribution, built, taken apart, and the wheel installed."""

from __future__ import annotations

import subprocess
import sys
import tarfile
import zipfile
from email import message_from_string
from email.message import Message
from importlib import metadata
from pathlib import Path

import pytest

import layerwise

pytest.importorskip("hatchling", reason="hatchling, which builds the package, is not installed")
packaging_requirements = pytest.importorskip("packaging.requirements", reason="packaging is not installed")

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
NOT_SHIPPED = (".ci/", ".github/")
NOTICE = "src/layerwise/lab/data/digits5k.txt"


def build(tree: Path, kind: str, folder: Path) -> Path:
    command = [sys.executable, "-m", "hatchling", "build", "-t", kind, "-d", str(folder)]
    subprocess.run(command, cwd=tree, check=True, capture_output=True, text=True)
    (made,) = folder.iterdir()
    return made


@pytest.fixture(scope="module")
def wheel(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return build(ROOT, "wheel", tmp_path_factory.mktemp("wheel"))


@pytest.fixture(scope="module")
def unpacked_sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sdist")
    with tarfile.open(build(ROOT, "sdist", tmp_path_factory.mktemp("archive"))) as archive:
        archive.extractall(folder, filter="data")
    (tree,) = folder.iterdir()
    return tree


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    # Importing pip, or looking for its module, would make setuptools leave distutils to the standard library for good.
    if not list(metadata.distributions(name="pip")):
        pytest.skip("pip is not installed")
    folder = tmp_path_factory.mktemp("installed")
    options = ["--quiet", "--disable-pip-version-check", "--no-index", "--no-deps", "--no-compile", "--target", folder]
    subprocess.run([sys.executable, "-m", "pip", "install", *map(str, options), str(wheel)], check=True)
    return folder


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Return a folder with links to PyTorch and what it requires, and nothing else that is installed."""
    folder = tmp_path_factory.mktemp("torch")
    waiting, seen = ["torch"], set()
    while waiting:
        name = waiting.pop()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:  # required on another platform
            continue
        if found.name in seen:
            continue
        seen.add(found.name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            link = folder / top
            if not link.exists():
                link.symlink_to(Path(str(found.locate_file(top))))
        needed = map(packaging_requirements.Requirement, found.requires or ())
        waiting += [one.name for one in needed if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert "numpy" not in seen
    return folder


def contents(wheel: Path) -> dict[str, bytes]:
    with zipfile.ZipFile(wheel) as archive:
        return {name: archive.read(name) for name in archive.namelist()}


def about(wheel: Path, name: str) -> bytes:
    (found,) = [content for path, content in contents(wheel).items() if path.endswith(f".dist-info/{name}")]
    return found


def described(wheel: Path) -> Message:
    return message_from_string(about(wheel, "METADATA").decode("utf-8"))


def run_with(folders: list[Path], program: str, *words: str) -> subprocess.CompletedProcess[str]:
    """Run a program that finds the standard library and these folders only."""
    code = f"import sys; sys.path += {[str(folder) for folder in folders]!r}\n{program}"
    command = [sys.executable, "-I", "-S", "-c", code, *words]
    return subprocess.run(command, capture_output=True, text=True, cwd=folders[0])


def test_the_wheel_holds_every_file_of_the_package_and_nothing_else(wheel: Path) -> None:
    files = (path for path in (ROOT / "src" / "layerwise").rglob("*") if path.is_file())
    source = {path.relative_to(ROOT / "src").as_posix(): path.read_bytes() for path in files if path.suffix != ".pyc"}
    assert {path.rpartition(".")[2] for path in source} == {"py", "toml", "j2", "js", "typed", "gz", "txt"}
    packed = {path: content for path, content in contents(wheel).items() if ".dist-info/" not in path}
    assert packed.keys() == source.keys()
    assert packed == source


def test_no_test_is_in_the_wheel(wheel: Path) -> None:
    found = [Path(path) for path in contents(wheel)]
    assert [path for path in found if "tests" in path.parts or path.name.startswith(("test_", "conftest"))] == []


def test_type_checkers_are_told_to_read_its_annotations(wheel: Path) -> None:
    assert "layerwise/py.typed" in contents(wheel)


def test_the_wheel_says_what_it_is(wheel: Path) -> None:
    told = described(wheel)
    assert (told["Name"], told["Version"]) == ("layerwise", layerwise.__version__)
    assert told["License-Expression"] == "MIT AND CC-BY-SA-3.0"
    assert told.get_all("License-File") == ["LICENSE", NOTICE]
    assert told["Requires-Python"] == ">=3.10"
    assert told["Description-Content-Type"] == "text/markdown"
    assert str(told.get_payload()).strip() == (ROOT / "README.md").read_text(encoding="utf-8").strip()
    for name in ("LICENSE", NOTICE):
        assert about(wheel, f"licenses/{name}") == (ROOT / name).read_bytes()
    assert b"layerwise = layerwise.__main__:main" in about(wheel, "entry_points.txt")


def test_without_an_extra_it_requires_torch_alone(wheel: Path) -> None:
    required = [packaging_requirements.Requirement(line) for line in described(wheel).get_all("Requires-Dist") or ()]
    plain = [one for one in required if one.marker is None or one.marker.evaluate({"extra": ""})]
    assert [str(one) for one in plain] == ["torch>=2.6"]
    assert len(required) > len(plain)


def test_the_source_distribution_holds_every_file_of_the_project(unpacked_sdist: Path) -> None:
    listing = ["git", "ls-files", "--cached", "--others", "--exclude-standard"]
    try:
        listed = subprocess.run(listing, cwd=ROOT, capture_output=True, text=True, check=True).stdout.splitlines()
    except (OSError, subprocess.CalledProcessError):
        pytest.skip("this is no checkout of git")
    project = {name for name in listed if not name.startswith(NOT_SHIPPED) and (ROOT / name).is_file()}
    packed = {path.relative_to(unpacked_sdist).as_posix() for path in unpacked_sdist.rglob("*") if path.is_file()}
    assert packed - {"PKG-INFO"} == project


def test_the_wheel_made_of_the_source_distribution_is_the_same(
    wheel: Path, unpacked_sdist: Path, tmp_path: Path
) -> None:
    assert contents(build(unpacked_sdist, "wheel", tmp_path)) == contents(wheel)


def test_the_installed_wheel_trains_where_nothing_but_torch_is_installed(installed: Path, torch_alone: Path) -> None:
    program = """
import torch, layerwise
assert not [name for name in sys.modules if name.partition(".")[0] in ("numpy", "polars", "rich")]
torch.manual_seed(0)
model = torch.nn.Sequential(torch.nn.Linear(3, 4), torch.nn.Linear(4, 1)).double()
optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
adapter = layerwise.LayerwiseLR(optimizer, layerwise.rules.LayerAdaptive(), model)
model(torch.ones(2, 3, dtype=torch.float64)).sum().backward()
before = [p.detach().clone() for p in model.parameters()]
optimizer.step()
for layer, factor in zip(model, adapter.get_last_factors().values(), strict=True):
    norm = sum(p.grad.square().sum() for p in layer.parameters()).sqrt().item()
    assert abs(factor - (1 + torch.log(torch.tensor(1 + 1 / norm, dtype=torch.float64)).item())) < 1e-9, factor
    for p, old in zip(layer.parameters(), before[:2], strict=True):
        assert torch.allclose(p, old - 0.1 * factor * p.grad, rtol=0, atol=1e-14)
    del before[:2]
print(layerwise.__file__, layerwise.__version__)
"""
    result = run_with([installed, torch_alone], program)
    assert result.returncode == 0, result.stderr
    assert result.stdout.split() == [str(installed / "layerwise" / "__init__.py"), layerwise.__version__]


def test_its_command_says_which_extra_it_needs_where_that_is_missing(installed: Path, torch_alone: Path) -> None:
    assert (installed / "bin" / "layerwise").is_file() or sys.platform == "win32"
    result = run_with([installed, torch_alone], "from layerwise.__main__ import main; sys.exit(main())", "list")
    assert (result.returncode, result.stdout) == (1, "")
    # PyTorch itself may warn, before that, that there is no NumPy.
    assert result.stderr.splitlines()[-1].startswith("layerwise: the lab needs the module ")
    assert "Traceback" not in result.stderr
