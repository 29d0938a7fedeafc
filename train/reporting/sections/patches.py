"""Patches to look at: nearest neighbours by the backbone, and the most confident mistakes of the classifier."""

from collections.abc import Sequence
from typing import Any

from train.reporting.markup import Content, Html, element, joined, note, photo
from train.reporting.run_view import RunView, per_run


def show_neighbours(runs: Sequence[RunView]) -> list[Html]:
    asked = [run for run in runs if run.is_evaluation and run.gallery]
    if not asked:
        return []
    text = note(
        "Left: a test patch. Beside it: the patches most similar to it by the cosine of their features. A ✗ marks another class."
    )
    return [text, *per_run(runs, asked, lambda run: [_among(run), *(_neighbours(run, each) for each in run.gallery)])]


def show_mistakes(runs: Sequence[RunView]) -> list[Html]:
    evaluations = [run for run in runs if run.is_evaluation and run.mistakes is not None]
    if not evaluations:
        return []
    text = note("The test patches with the highest probability for a wrong class, at most three per slide.")
    return [text, *per_run(runs, evaluations, lambda run: [_mistakes(run)])]


def _among(run: RunView) -> Html:
    """Where the neighbours come from: not from the training patches if the backbone was trained on their labels."""
    test = run.gallery[0]["among"] == "test"
    return note("Among the other test patches." if test else "Among the training patches whose labels were used.")


def _neighbours(run: RunView, query: dict[str, Any]) -> Html:
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


def _mistakes(run: RunView) -> Html:
    if not run.mistakes:
        return note("There are no mistakes.")
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
    caption = element("figcaption", *(element("span", line) for line in lines if line))
    return element("figure", photo(run.thumbnails[each["id"]], alt), caption, class_="patch wrong" if wrong else "patch")


def _class_line(run, label, same):
    return _class(run, label) if same else f"✗ {_class(run, label)}"


def _class(run, label):
    return run.classes[label] if label >= 0 else "no class"


def _slide(each):
    return each["group"] or "slide not known"
