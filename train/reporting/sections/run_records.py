"""The record of each run, collapsed. A report is shared, so it names no host, and of a path or URL only the last part."""

import json
from collections.abc import Sequence

from train.records.places import without_places
from train.reporting.markup import Html, element, joined
from train.reporting.run_view import RunView


def show(runs: Sequence[RunView]) -> list[Html]:
    on_paper = element("p", "The runs' records are in the HTML file of this report.", class_="note on-paper")
    return [on_paper, *(_record(run) for run in runs)]


def _record(run: RunView) -> Html:
    text = json.dumps(without_places(run.record), indent=2, ensure_ascii=False)
    return element("details", joined([element("summary", run.name), element("pre", text, tabindex="0")]))
