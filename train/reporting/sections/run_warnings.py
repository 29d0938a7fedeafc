"""Warnings, then notes, each once with the runs that it concerns."""

from collections.abc import Sequence

from train.reporting.markup import Content, Html, element, joined
from train.reporting.run_view import RunView


def show(runs: Sequence[RunView]) -> list[Html]:
    warnings = _by_sentence(runs, "warnings")
    notes = _by_sentence(runs, "notes")
    listed = [element("ul", *_items(warnings, runs, mark=True), class_="warnings")] if warnings else []
    return listed + ([element("ul", *_items(notes, runs, mark=False), class_="notes")] if notes else [])


def _by_sentence(runs, kind):
    found: dict[str, list[str]] = {}
    for run in runs:
        for sentence in run.result.get(kind, []):
            found.setdefault(sentence, []).append(run.name)
    return found


def _items(found, runs, mark):
    for sentence, names in found.items():
        about: Content = "all runs" if len(names) == len(runs) > 1 else ", ".join(names)
        parts: list[Content] = [element("b", "Warning: ")] if mark else []
        parts.append(sentence)
        if len(runs) > 1:
            parts.append(joined([" ", element("span", f"({about})", class_="about")]))
        yield element("li", *parts)
