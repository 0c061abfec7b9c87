"""What is installed for development: pinned, locked with hashes, and under licences that are known."""

from __future__ import annotations

import re
from importlib import metadata

import pytest
from packaging.specifiers import SpecifierSet

import licences_page as page

pytestmark = pytest.mark.full


def test_every_pinned_package_is_on_the_page_with_its_version():
    assert {name: version for name, (version, _) in page.rows().items()} == dict(page.pins())


def test_the_page_says_what_the_packages_that_are_installed_say():
    compared = 0
    for name, (version, licence) in page.rows().items():
        if installed(name) and metadata.version(name).partition("+")[0] == version:
            assert (name, licence) == (name, page.licence_of(name))
            compared += 1
    if not compared:
        pytest.skip("nothing that constraints.txt pins is installed in its version")


def test_no_licence_asks_for_the_sources_of_a_program_that_uses_the_package():
    unknown = {name: licence for name, (_, licence) in page.rows().items() if page.parts(licence) - page.ALLOWED}
    assert not unknown


def test_every_pin_can_be_installed_on_the_oldest_python_that_the_makefile_takes():
    (oldest,) = re.findall(r"version_info < \((\d+), (\d+)\)", (page.ROOT / "Makefile").read_text())
    oldest = ".".join((*oldest, "0"))
    asked = {name: metadata.metadata(name).get("Requires-Python") for name, _ in page.pins() if installed(name)}
    if not asked:
        pytest.skip("nothing that constraints.txt pins is installed")
    refused = {name: pythons for name, pythons in asked.items() if pythons and oldest not in SpecifierSet(pythons)}
    assert not refused


def installed(name: str) -> bool:
    try:
        metadata.version(name)
    except metadata.PackageNotFoundError:
        return False
    return True


def test_the_lock_holds_a_hash_for_everything_that_is_pinned_but_pytorch():
    lock = (page.ROOT / "requirements-dev.lock").read_text()
    entries = re.findall(r"^(\S+)==(\S+) \\\n((?: +--hash=sha256:[0-9a-f]{64}(?: \\)?\n)+)", lock, flags=re.MULTILINE)
    locked = {canonical(name): version for name, version, _ in entries}
    assert locked == {canonical(name): version for name, version in page.pins() if name != "torch"}


def canonical(name: str) -> str:
    return re.sub(r"[-_.]+", "-", name).lower()
