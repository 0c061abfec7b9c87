"""One drawing: Vega-Lite rendered to SVG for use inside an HTML page, with no script and no address."""

from __future__ import annotations

import re
from typing import Any

VEGA_LITE = "https://vega.github.io/schema/vega-lite/v5.json"
"""Names the grammar; it is not fetched, and not written to the page."""


def _config() -> dict[str, Any]:
    """Give the look that all charts share."""
    return {
        "background": None,
        "font": "sans-serif",
        "view": {"stroke": None},
        "axis": {
            "labelColor": "var(--muted)",
            "titleColor": "var(--muted)",
            "gridColor": "var(--line)",
            "domainColor": "var(--line)",
            "tickColor": "var(--line)",
            "labelFontSize": 11,
            "titleFontSize": 11,
            "titleFontWeight": "normal",
        },
    }


def svg(specification: dict[str, Any], label: str, prefix: str) -> str:
    """Render a chart for use inside the page.

    Args:
        specification: Vega-Lite without schema and configuration.
        label: what the chart shows, for those who do not see it; plain text.
        prefix: unique in the page; put before every id, as ids of several drawings in one page would clash.

    Returns:
        An ``svg`` element without any address, scaled by the page.
    """
    import vl_convert
    from markupsafe import escape

    drawn = vl_convert.vegalite_to_svg({"$schema": VEGA_LITE, "config": _config(), **specification})
    drawn = re.sub(r' (?:xmlns(?::xlink)?|role|aria-[a-z]+|version|class)="[^"]*"', "", drawn)
    drawn = re.sub(r' (id="|clip-path="url\(#|fill="url\(#)', rf" \g<1>{prefix}-", drawn)
    return re.sub(
        r'^<svg width="([\d.]+)" height="[\d.]+"',
        rf'<svg role="img" aria-label="{escape(label)}" style="max-width:\g<1>px"',
        drawn,
        count=1,
    )
