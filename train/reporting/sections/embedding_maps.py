"""The embeddings of the test patches in two dimensions, coloured by class and by slide."""

from collections.abc import Sequence

import numpy as np

from sharding.manifest import decoded
from train.reporting import plots
from train.reporting.legends import class_legend, mark_legend
from train.reporting.markup import Html, figure, note, row
from train.reporting.run_view import RunView, per_run

_NAMED = 20  # groups; nobody reads a longer legend


def show(runs: Sequence[RunView]) -> list[Html]:
    mapped = [run for run in runs if run.is_evaluation and run.map is not None]
    if not mapped:
        return []
    text = note(
        "Each point is a test patch; nearby points look similar to the backbone. It can tell classes apart that are well"
        " separated. If slides are separated too, it may have learned their stains. Distances between clusters have no meaning."
    )
    return [text, *per_run(runs, mapped, _map_section)]


def _map_section(run: RunView) -> list[Html]:
    assert run.map is not None
    table, how = run.map
    x, y = table["x"].to_numpy(), table["y"].to_numpy()
    labels = table["label"].to_numpy()
    codes, names = decoded(table["group"])
    settings = ", ".join(f"{name.replace('_', ' ')} {value}" for name, value in how["settings"].items())
    shown = f"{table.num_rows:,} of {how['of']:,}" if table.num_rows < how["of"] else f"All {how['of']:,}"
    by_class = figure(
        plots.scatter(x, y, [(labels == k, *plots.class_style(k)) for k in range(len(run.classes))]),
        "By class",
        alt=f"Map of the test patches of {run.name}, coloured by class",
        more=class_legend(run.classes),
    )
    method = note(f"{shown} test patches by {how['method']}{f' ({settings})' if settings else ''} on features of unit length.")
    return [method, row(by_class, *_by_group(run, x, y, codes, names))]


def _by_group(run: RunView, x: np.ndarray, y: np.ndarray, codes: np.ndarray, names: list[str]) -> list[Html]:
    if not names:
        return []
    colours = plots.MANY_COLOURS
    groups = [(codes == k, colours[k % len(colours)], "o") for k in range(len(names))]
    entries = [(name, colours[k % len(colours)], "o") for k, name in enumerate(names)]
    if (codes < 0).any():
        groups.append((codes < 0, "#888888", "o"))
        entries.append(("not known", "#888888", "o"))
    many = f"{len(names):,} slides in {len(colours)} colours: colours repeat."
    more = mark_legend(entries) if len(names) <= _NAMED else note(many)
    alt = f"Map of the test patches of {run.name}, coloured by slide or patient"
    return [figure(plots.scatter(x, y, groups), "By slide or patient", alt=alt, more=more)]
