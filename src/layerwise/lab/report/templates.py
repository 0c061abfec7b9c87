"""The templates of the pages, and what stands in every page: style, policy, data and script."""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import layerwise
from layerwise.lab.errors import shown
from layerwise.lab.report.bundle import bundle
from layerwise.lab.report.figures import CONFIG, Figure, cleaned
from layerwise.lab.report.looks import COLOURS

HERE = Path(__file__).parent


def rendered(name: str, figures: Mapping[str, Figure], **values: Any) -> str:
    """Make a page that needs no network.

    Args:
        name: of the template. Every string is escaped, and names that are not given are refused.
        figures: id of an element -> the figure that the script draws in it.
        values: of the template.

    Returns:
        HTML. Its policy allows its own script alone, by checksum, and no request.
    """
    from jinja2 import Environment, FileSystemLoader, StrictUndefined

    loader, escapes = FileSystemLoader(HERE), {"autoescape": True, "undefined": StrictUndefined}
    environment = Environment(loader=loader, trim_blocks=True, lstrip_blocks=True, **escapes)
    script = (HERE / "page.js").read_text(encoding="utf-8")
    code = f"{bundle()}\n{script}" if figures else script
    digest = base64.b64encode(hashlib.sha256(code.encode()).digest()).decode()
    now = datetime.now(timezone.utc).strftime("%Y-%m-%d %H:%M UTC")
    common = {"made": now, "version": layerwise.__version__, "colours": COLOURS, "script": digest}
    html = shown(environment.get_template(name).render(**common, **values), lines=True)
    drawn = {key: {"spec": figure.spec, "data": figure.data} for key, figure in figures.items()}
    data = json.dumps(cleaned({"config": CONFIG, "figures": drawn}), separators=(",", ":"), allow_nan=False)
    for sign in "<>&":  # nothing in it is a tag
        data = data.replace(sign, f"\\u{ord(sign):04x}")
    scripts = f'<script type="application/json" id="data">{data}</script>\n<script>{code}</script>\n'
    return f"{html}{scripts}</body>\n</html>\n"
