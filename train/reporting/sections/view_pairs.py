"""Patches and the views that pretraining saw."""

import itertools
from collections.abc import Sequence

from train.reporting.kept_views import VIEWS_NAME, keep_views
from train.reporting.markup import Html, element, note, photo
from train.reporting.run_view import RunView, per_run


def show(runs: Sequence[RunView]) -> list[Html]:
    pretrained = [run for run in runs if not run.is_evaluation]
    if not pretrained:
        return []
    text = note(
        "Each patch, and beside it its views in the first epoch with their parameters: the crop (width x height at left, top),"
        " and the augmentations in order."
    )
    return [text, *per_run(runs, pretrained, lambda run: [_views(run)])]


def _views(run: RunView) -> Html:
    try:
        keep_views(run.run, run.record["data"])
        table = run.table(VIEWS_NAME)
    except ValueError as error:  # the data may have moved since; the report then says so
        return note(f"No images: {error}")
    pairs = itertools.groupby(table.to_pylist(), key=lambda each: each["row"])
    return element("div", *(element("div", *map(_picture, pair), class_="pair") for _, pair in pairs), class_="views")


def _picture(each):
    lines = [line for line in each["said"].split("\n") if line]
    caption = element("figcaption", *(element("span", line) for line in lines))
    return element("figure", photo(each["jpeg"], ", ".join(lines)), caption, class_="patch")
