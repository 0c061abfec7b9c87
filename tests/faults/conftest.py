"""The fault suite: its quick part runs with --full, its long part with --faults beside it."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

sys.path.append(str(Path(__file__).parents[1] / "lab"))  # what the tests of the lab share


@pytest.fixture(autouse=True)
def _quiet_log() -> Iterator[None]:
    """Thousands of attachments, each with its remarks."""
    logger = logging.getLogger("layerwise")
    before = logger.level
    logger.setLevel(logging.ERROR)
    yield
    logger.setLevel(before)
