"""The templates of the pages, and what stands in every page: style, policy, data and script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from contextlib import suppress
from datetime import datetime, timezone
from functools import cache
from importlib import metadata
from pathlib import Path
from typing import Any

from platformdirs import user_cache_path

import layerwise
from layerwise.lab.errors import shown
from layerwise.lab.report.figures import COLOURS, CONFIG, Figure, cleaned
from layerwise.lab.runs.store import write_whole

HERE = Path(__file__).parent


@cache
def bundle() -> str:
    """Give the script that defines ``vegaEmbed``: Vega, Vega-Lite and Vega-Embed in one.

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


def template(name: str, **options: Any) -> Any:
    """Give a template, in which names that are not given are refused."""
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    how = {"trim_blocks": True, "lstrip_blocks": True, "undefined": StrictUndefined, **options}
    return Environment(loader=FileSystemLoader(HERE), **how).get_template(name)


def rendered(name: str, figures: Mapping[str, Figure], **values: Any) -> str:
    """Make a page that needs no network from a template, and a figure in each element whose id names one.

    Every string is escaped. The page's policy allows its own script alone, by checksum, and no request.
    """
    script = (HERE / "page.js").read_text(encoding="utf-8")
    code = f"{bundle()}\n{script}" if figures else script
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    common = {"made": now, "version": layerwise.__version__, "colours": COLOURS, "script": digest}
    html = shown(template(name, autoescape=True).render(**common, **values), lines=True)
    drawn = {key: {"spec": figure.spec, "data": figure.data} for key, figure in figures.items()}
    data = json.dumps(cleaned({"config": CONFIG, "figures": drawn}), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":  # nothing in it is a tag
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    scripts = f'<script type="application/json" id="data">{data}</script>\n<script>{code}</script>\n'
    return f"{html}{scripts}</body>\n</html>\n"
