"""Patches to look at: what the backbone holds for alike, and where the classifier was wrong and sure of it."""

from collections.abc import Sequence
from typing import Any

from train.reporting.markup import Content, Html, element, heading, joined, note, photo
from train.reporting.run_view import Shown


def show_neighbours(runs: Sequence[Shown]) -> list[Html]:
    asked = [run for run in runs if run.is_judged and run.gallery]
    if not asked:
        return []
    said = note(
        "Left, a test patch; beside it the patches that the backbone holds for most alike, by the cosine of their features. A ✗"
        " stands before another class."
    )
    return [
        said,
        *(part for run in asked for part in [*_named(run, runs), _among(run), *(_neighbours(run, each) for each in run.gallery)]),
    ]


def show_mistakes(runs: Sequence[Shown]) -> list[Html]:
    judged = [run for run in runs if run.is_judged and run.mistakes is not None]
    if not judged:
        return []
    said = note("Test patches of which a wrong class was held for most probable, at most three of a slide.")
    return [said, *(part for run in judged for part in [*_named(run, runs), _mistakes(run)])]


def _named(run, runs):
    return [heading(run.name)] if len(runs) > 1 else []


def _among(run: Shown) -> Html:
    """Whose neighbours they are: a backbone that was trained for the classes is not asked about what it was trained on."""
    test = run.gallery[0]["among"] == "test"
    return note("Among the other test patches." if test else "Among the training patches whose labels were used.")


def _neighbours(run: Shown, query: dict[str, Any]) -> Html:
    near = [
        _patch(
            run,
            each,
            f"nearest {place}",
            [_class_line(run, each["label"], each["label"] == query["label"]), _slide(each), f"cosine {each['cosine']:.2f}"],
            wrong=each["label"] != query["label"],
        )
        for place, each in enumerate(query["neighbours"], 1)
    ]
    asked = _patch(run, query, "query", [element("b", _class(run, query["label"])), _slide(query), "test patch"])
    return element("div", asked, *near, class_="neighbours")


def _mistakes(run: Shown) -> Html:
    if not run.mistakes:
        return note("There is no mistake to show.")
    shown = [
        _patch(
            run,
            each,
            "mistake",
            [
                joined(["true ", element("b", _class(run, each["label"]))]),
                joined(["predicted ", element("b", _class(run, each["prediction"]))]),
                f"probability {each['probability']:.3f}",
                _slide(each),
            ],
        )
        for each in run.mistakes
    ]
    return element("div", *shown, class_="mistakes")


def _patch(run, each, role, lines: Sequence[Content], *, wrong=False):
    alt = f"{role}, patch {each['id']}: {_class(run, each['label'])}"
    said = element("figcaption", *(element("span", line) for line in lines if line))
    return element("figure", photo(run.thumbnails[each["id"]], alt), said, class_="patch wrong" if wrong else "patch")


def _class_line(run, label, same):
    return _class(run, label) if same else f"✗ {_class(run, label)}"


def _class(run, label):
    return run.classes[label] if label >= 0 else "no class"


def _slide(each):
    return each["group"] or "slide not known"
