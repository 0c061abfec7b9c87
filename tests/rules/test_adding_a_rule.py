"""A rule that is exported and has a row in `tests/rule_cases.py` has every common test, its pages and the lab."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.full

ROOT = Path(__file__).parents[2]
RULE = '''
from typing import Any

from layerwise.rules import ElementwiseRule


class InverseNorm(ElementwiseRule):
    """A rule of the tests.

    f_l = 1 / ‖g_l‖

    Start: `LayerwiseLR(optimizer, InverseNorm(), model)`. Keep the optimizer's own rate.

    When it helps: in tests. When not: elsewhere. Costs: nothing.

    Args:
        scale: A number.

    Raises:
        ValueError: Never.

    Example:
        >>> InverseNorm().factor(2.0)
        0.5

    Reference:
        Nobody: Nothing, 2026.
    """

    needs = ("gradient_norm",)

    def __init__(self, scale: float = 1.0) -> None:
        self.scale = scale

    def factor(self, gradient_norm: Any) -> Any:
        """Return 1 / ‖g_l‖."""
        return self.scale / gradient_norm

    def __repr__(self) -> str:
        return f"InverseNorm({self.scale})"
'''
ROW = """
import inverse_norm
import numpy as np

import reference
import rule_cases
from layerwise import rules

rules.InverseNorm = inverse_norm.InverseNorm
rules.__all__.append("InverseNorm")
rule_cases.RULES["InverseNorm"] = rule_cases.RuleCase(
    lambda names: rules.InverseNorm(),
    lambda of: np.array([1 / reference.joint_norm(g) for g in of.gradients]),
)
"""
PAGES = """
import new_row
import rule_pages
from layerwise.lab.experiments.rules import make_rule

row = "| [`InverseNorm()`](rules/inverse-norm.md) | A rule of the tests. | f_l = 1 / ‖g_l‖ |"
assert row + " Nobody 2026 |" in rule_pages.expanded("rules.md", "<!-- rules -->")
assert rule_pages.page("InverseNorm").split()[:5] == ["#", "InverseNorm", "A", "rule", "of"]
assert "::: layerwise.rules.InverseNorm" in rule_pages.expanded("api/rules.md", "<!-- rules -->")
page = rule_pages.page("InverseNorm")
assert page.startswith("# InverseNorm\\n\\nA rule of the tests.\\n\\n## Start\\n\\n```python\\n"), page
assert "adapter = LayerwiseLR(optimizer, InverseNorm(), model)\\n```\\n\\nKeep the optimizer's own rate.\\n" in page
assert make_rule({"name": "InverseNorm", "scale": 2.0}, seed=0).scale == 2.0
"""
COMMON = [
    "tests/rules/test_every_rule.py",
    "tests/core/test_backward_refusals.py",
    "tests/core/test_checkpoints.py",
]
TESTS = {
    "factors_are_one_finite_number_a_layer",
    "rule_changes_neither_its_state_nor_the_network",
    "statistics_outside_its_needs_are_not_read",
    "scaled_gradients_are_measured_unscaled",
    "step_without_gradients_gives_finite_factors",
    "run_continues_to_the_bit_from_a_state_taken_in_the_middle",
    "saved_state_does_not_change_with_later_steps",
    "a_copy_and_a_pickle_of_a_rule_give_its_factors",
    "the_repr_of_a_rule_names_it",
    "first_factors_are_those_of_the_reference",
    "every_rule_is_exported_and_has_a_row_and_a_reference",
    "the_docstring_of_every_rule_has_its_equation_its_parts_and_an_example",
    "rows_have_factors_or_are_refused",
    "rules_declare_own_layer_truthfully",
    "training_goes_on_from_a_file_to_the_bit",
}


@pytest.fixture
def run(tmp_path: Path):
    """Return a function that runs Python where the rule and its row are there."""
    (tmp_path / "inverse_norm.py").write_text(RULE, encoding="utf-8")
    (tmp_path / "new_row.py").write_text(ROW, encoding="utf-8")
    paths = [str(tmp_path), *(str(ROOT / name) for name in ("src", "tests", "tests/process", "docs"))]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "PYTHONUTF8": "1"}

    def call(*words: str) -> str:
        command = [sys.executable, *words]
        done = subprocess.run(command, check=False, cwd=ROOT, env=environment, capture_output=True, text=True)
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout

    return call


def test_one_row_brings_every_common_test(run) -> None:
    out = run("-m", "pytest", "-p", "new_row", "-p", "no:cacheprovider", "-vv", "-k", "InverseNorm", *COMMON)
    found = {line.partition("::test_")[2].partition("[")[0] for line in out.splitlines() if "PASSED" in line}
    assert found == TESTS
    sharded = "import new_row; from sharded.cases import CASES; assert 'InverseNorm' in CASES"
    run("-c", sharded)
    run("-c", "import new_row, sys; sys.path.append('tests/faults'); import edges; assert 'InverseNorm' in edges.RULES")


def test_the_pages_and_the_lab_have_it(run) -> None:
    run("-c", PAGES)
