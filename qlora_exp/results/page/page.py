"""Build the page of a comparison: one HTML file that asks the network for nothing.

Plotly draws; the page's own files are beside this module. What comes from runs is in one JSON element, which no browser
executes, and the page's policy allows no script but the two that are in it.
"""

import base64
import hashlib
import html
import json
import re
from importlib.resources import files
from typing import Any

from plotly.offline import get_plotlyjs

from qlora_exp.utils.display import visible_json


def build(content: dict[str, Any]) -> str:
    """Return the page that shows `content`, which `data.collect` returns."""
    own = "\n".join(_file(name) for name in ("table.js", "figures.js", "answers.js"))
    scripts = get_plotlyjs(), f'(() => {{\n"use strict";\n{own}}})();\n'
    text = json.dumps(content, ensure_ascii=False, allow_nan=False, separators=(",", ":"))
    parts = {
        "title": html.escape(content["title"]),
        "style": _file("report.css"),
        "hashes": " ".join(f"'sha256-{_digest(each)}'" for each in scripts),
        "data": visible_json(text).replace("<", r"\u003c"),  # nothing in it ends the element
        "plotly": scripts[0],
        "script": scripts[1],
    }
    return re.sub(r"\{\{(\w+)\}\}", lambda match: parts[match[1]], _file("report.html"))


def _file(name: str) -> str:
    return files(__package__).joinpath(name).read_text("utf-8")


def _digest(script: str) -> str:
    return base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
