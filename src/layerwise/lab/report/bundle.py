"""The script that draws a page's figures: Vega, Vega-Lite and Vega-Embed in one."""

from __future__ import annotations

from contextlib import suppress
from functools import cache
from importlib import metadata

from platformdirs import user_cache_path

from layerwise.lab.runs.store import write_whole


@cache
def bundle() -> str:
    """Give the script, which defines ``vegaEmbed``.

    ``vl_convert`` takes three seconds to put it together, so it is kept in the user's cache folder for each of its
    versions. Where that folder cannot be read or written, it is put together anew.
    """
    import vl_convert

    version = metadata.version("vl-convert-python")
    place = user_cache_path("layerwise") / f"vega-{version}.js"
    with suppress(OSError, UnicodeError):
        found = place.read_text(encoding="utf-8")
        if "window.vegaEmbed=" in found:
            return found
    made = vl_convert.javascript_bundle()  # pyright: ignore[reportCallIssue]
    if "</script" in made or "<!--" in made:
        raise RuntimeError(f"vl_convert {version}: its bundle cannot stand inside a page")
    with suppress(OSError):
        write_whole(place, made.encode())
    return made
