"""Writes `docs/licences.md`: what the packages in `constraints.txt` are licensed under, as they say themselves."""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import metadata
from pathlib import Path

ROOT = Path(__file__).parents[1]
PAGE = ROOT / "docs" / "licences.md"
HEAD = """# Licences

What `constraints.txt` pins, for every extra, for development and for these pages; written by `make licences-page` from
the packages' own metadata, and compared with what is installed by a test. The library itself needs PyTorch alone, the
rest comes with an extra or with development; nothing of it is copied into this repository. `BSD` is what a package says
that does not tell which of its clauses it means. The 5,000 digits of MNIST that `layerwise.lab` ships are under
CC-BY-SA-3.0; `digits5k.txt` beside them says whose they are.

| package | version | licence |
|---|---|---|
"""
SPDX = {
    "Apache Software License": "Apache-2.0",
    "BSD License": "BSD",
    "ISC License (ISCL)": "ISC",
    "MIT License": "MIT",
    "Mozilla Public License 2.0 (MPL 2.0)": "MPL-2.0",
    "Python Software Foundation License": "PSF-2.0",
    "3-Clause BSD License": "BSD-3-Clause",
    "Apache 2.0": "Apache-2.0",
    "Apache 2.0 License": "Apache-2.0",
}
PERMISSIVE = {"0BSD", "Apache-2.0", "Apache-2.0 WITH LLVM-exception", "BSD", "BSD-2-Clause", "BSD-3-Clause", "BSL-1.0"}
PERMISSIVE |= {"CC0-1.0", "CNRI-Python", "ISC", "MIT", "MIT-0", "MIT-CMU", "PSF-2.0", "Zlib"}
ALLOWED = PERMISSIVE | {"MPL-2.0"}
"""MPL-2.0 asks for the sources of changed files of the package alone, and none is changed or shipped here."""


def pins() -> Iterator[tuple[str, str]]:
    """Yield the packages and versions that are pinned."""
    for line in (ROOT / "constraints.txt").read_text().splitlines():
        if "==" in line:
            name, _, version = line.partition("==")
            yield name.strip(), version.strip()


def licence_of(name: str) -> str | None:
    """Return the licence of an installed package, as an SPDX expression where it gives one; None if not installed."""
    try:
        found = metadata.metadata(name)
    except metadata.PackageNotFoundError:
        return None
    expression = found.get("License-Expression")
    if expression:
        return expression
    classifiers = [c.split(" :: ")[-1] for c in found.get_all("Classifier") or [] if c.startswith("License :: OSI")]
    if classifiers:
        return " OR ".join(SPDX.get(one, one) for one in classifiers)
    first = (found.get("License") or licence_in_file(name)).strip().splitlines()[0]
    return SPDX.get(first, first)


def licence_in_file(name: str) -> str:
    """Return the licence of an installed package whose metadata say nothing, by the words of its licence file."""
    files = [file for file in metadata.files(name) or [] if file.name.startswith("LICENSE")]
    text = files[0].locate().read_text() if files else ""
    three = "Redistribution and use in source and binary forms" in text and "Neither the name" in text
    return "BSD-3-Clause" if three else "not stated"


def parts(expression: str) -> set[str]:
    """Return the licences in an expression."""
    return set(re.split(r" AND | OR ", expression.replace("(", "").replace(")", "")))


def rows() -> dict[str, tuple[str, str]]:
    """Return what the page says: package to version and licence."""
    found = re.findall(r"^\| (\S+) \| (\S+) \| (.+) \|$", PAGE.read_text(), flags=re.MULTILINE) if PAGE.exists() else []
    return {name: (version, licence) for name, version, licence in found if version != "version"}


def write() -> None:
    """Write the page; a package that is not installed keeps its row, if its version is the same."""
    before, lines = rows(), []
    for name, version in pins():
        known = before.get(name, ("", "not installed where this was written"))
        licence = licence_of(name) or (known[1] if known[0] == version else "not installed where this was written")
        lines.append(f"| {name} | {version} | {licence} |")
    PAGE.write_text(HEAD + "\n".join(lines) + "\n")


if __name__ == "__main__":
    write()
