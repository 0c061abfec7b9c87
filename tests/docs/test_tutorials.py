"""The tutorials run, print what is committed, and their pages show both."""

from __future__ import annotations

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("numpy", reason="the tutorials read their digits with NumPy")

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
FOLDER = ROOT / "examples" / "tutorials"
NUMBER = re.compile(r"(?<![\w.])-?\d+(?:\.\d+)?(?:e-?\d+)?")
PAGES = {
    "first-cnn": ("first_cnn", ["first_cnn"]),
    "layer-decay": ("layer_decay", ["layer_decay"]),
    "dead-layer": ("dead_layer", ["dead_layer", "dead_layer_doctor"]),
}


def committed(name: str) -> str:
    return (FOLDER / "output" / f"{name}.txt").read_text(encoding="utf-8")


def ran(words: list[str], folder: Path, code: int = 0) -> str:
    environment = os.environ | {"OMP_NUM_THREADS": "1", "COLUMNS": "80"}
    ended = subprocess.run([sys.executable, *words], cwd=folder, env=environment, capture_output=True, text=True)
    assert ended.returncode == code, ended.stderr
    return ended.stdout


def assert_alike(text: str, expected: str) -> None:
    """The words are the same, and the numbers up to what another processor makes of them."""
    assert NUMBER.sub("#", text) == NUMBER.sub("#", expected)
    for found, wanted in zip(NUMBER.findall(text), NUMBER.findall(expected), strict=True):
        assert float(found) == pytest.approx(float(wanted), rel=0.15, abs=1e-9), (found, wanted)


@pytest.mark.parametrize("page", PAGES)
def test_the_page_shows_the_script_and_what_it_printed(page: str) -> None:
    script, outputs = PAGES[page]
    text = (ROOT / "docs" / "tutorials" / f"{page}.md").read_text(encoding="utf-8")
    assert f"```python\n{(FOLDER / f'{script}.py').read_text(encoding='utf-8')}```" in text
    for name in outputs:
        assert f"```text\n{committed(name)}```" in text
    for link in re.findall(r"\]\(([^)\s]+)\)", text):
        assert (ROOT / "docs" / "tutorials" / link).exists(), link


def test_the_list_of_tutorials_is_whole() -> None:
    text = (ROOT / "docs" / "tutorials" / "index.md").read_text(encoding="utf-8")
    assert set(re.findall(r"\]\(([\w-]+)\.md\)", text)) == set(PAGES)
    assert {path.stem for path in FOLDER.glob("*.py")} == {script for script, _ in PAGES.values()}


@pytest.mark.parametrize("name", ["first_cnn", "layer_decay", "dead_layer"])
def test_the_script_prints_what_is_committed(name: str, tmp_path: Path) -> None:
    assert_alike(ran([str(FOLDER / f"{name}.py")], tmp_path), committed(name))


def test_the_doctor_says_of_the_dead_layer_what_is_committed(tmp_path: Path) -> None:
    (tmp_path / "dead_layer.py").write_bytes((FOLDER / "dead_layer.py").read_bytes())
    words = ["-m", "layerwise", "doctor", "dead_layer.py:task", "--quiet"]
    assert_alike(ran(words, tmp_path, code=1), committed("dead_layer_doctor"))
    assert (tmp_path / "runs" / "doctor" / "dead_layer-task.html").exists()
    mended = (tmp_path / "dead_layer.py").read_text(encoding="utf-8").replace("bias=-50.0", "bias=0.0")
    (tmp_path / "dead_layer.py").write_text(mended, encoding="utf-8")
    assert ran(words, tmp_path).startswith("problems    none found\npage")


def test_numbers_that_differ_and_other_words_are_noticed() -> None:
    assert_alike("90 % in 0.5", "91 % in 0.52")
    with pytest.raises(AssertionError):
        assert_alike("90 % in 0.5", "91 % in 0.9")
    with pytest.raises(AssertionError):
        assert_alike("90 % of 0.5", "90 % in 0.5")
