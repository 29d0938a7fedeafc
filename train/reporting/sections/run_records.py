"""All that was recorded of each run, folded away."""

import json
from collections.abc import Sequence

from train.reporting.markup import Html, element, joined
from train.reporting.run_view import Shown


def show(runs: Sequence[Shown]) -> list[Html]:
    on_paper = element("p", "The complete records are in the file that this was printed from.", class_="note on-paper")
    return [on_paper, *(_record(run) for run in runs)]


def _record(run: Shown) -> Html:
    text = json.dumps(run.record, indent=2, ensure_ascii=False)
    return element("details", joined([element("summary", run.name), element("pre", text, tabindex="0")]))
