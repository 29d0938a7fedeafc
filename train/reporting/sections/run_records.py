"""The record of each run, collapsed. A report is shared, so it names no host, and of a path or URL only the last part."""

import json
import re
from collections.abc import Sequence
from pathlib import PurePosixPath
from typing import Any

from train.reporting.markup import Html, element, joined
from train.reporting.run_view import RunView

# A path that is not below the working directory, or a URL; of an argument perhaps with its flag.
_PLACE = re.compile(r"(--[\w-]+=)?((?:[a-z][a-z0-9+.-]*://|/|~|\.\.?/).+)", re.DOTALL)


def show(runs: Sequence[RunView]) -> list[Html]:
    on_paper = element("p", "The runs' records are in the HTML file of this report.", class_="note on-paper")
    return [on_paper, *(_record(run) for run in runs)]


def _record(run: RunView) -> Html:
    text = json.dumps(_to_share(run.record), indent=2, ensure_ascii=False)
    return element("details", joined([element("summary", run.name), element("pre", text, tabindex="0")]))


def _to_share(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _to_share(each) for name, each in value.items() if name != "host"}
    if isinstance(value, list):
        return [_to_share(each) for each in value]
    if isinstance(value, str) and (place := _PLACE.fullmatch(value)):
        return f"{place[1] or ''}{PurePosixPath(place[2]).name}"
    return value
