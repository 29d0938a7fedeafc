"""report.html of one or several runs, self-contained: python train/report.py runs/a runs/b --out report.html"""

import base64
import html
import json
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from sharding.command import option, positional, run_script
from train import figures
from train.inputs import gib
from train.metrics import TITLES
from train.runs import Run, find_run, write_text

_STYLE = """
:root { color-scheme: light dark; --ink: #1b1b1b; --paper: #fff; --soft: #667; --line: #d8d8de; --warn: #fff4d6 }
@media (prefers-color-scheme: dark) {
  :root { --ink: #e8e8ec; --paper: #17181c; --soft: #a0a4b0; --line: #3a3c44; --warn: #4a3d14 }
}
body { font: 15px/1.5 system-ui, sans-serif; color: var(--ink); background: var(--paper) }
body { max-width: 68rem; margin: 2rem auto; padding: 0 1rem }
h1 { font-size: 1.5rem; margin-bottom: 0 } h2 { font-size: 1.1rem; margin: 2rem 0 .5rem }
p.note { color: var(--soft); margin-top: .2rem }
.warn { background: var(--warn); padding: .5rem .8rem; border-radius: 4px; margin: .4rem 0 }
.wide { overflow-x: auto } table { border-collapse: collapse; font-variant-numeric: tabular-nums }
th, td { text-align: right; padding: .3rem .55rem; border-bottom: 1px solid var(--line); white-space: nowrap }
th:nth-child(-n+2), td:nth-child(-n+2) { text-align: left } td:nth-child(2) { white-space: normal }
th { font-weight: 600; white-space: normal; vertical-align: bottom } td.best { font-weight: 700 }
.row { display: flex; flex-wrap: wrap; gap: 1rem; align-items: flex-start }
figure { margin: 0; padding: .5rem; max-width: 100%; background: #fff; color: #000 }
figure { border: 1px solid var(--line); border-radius: 4px }
figure svg, figure img { max-width: 100%; height: auto; display: block }
details { margin: .4rem 0 } pre { overflow-x: auto; font-size: .8rem; border: 1px solid var(--line); padding: .6rem }
@media print { body { max-width: none; margin: 0 } details { display: none } figure { break-inside: avoid } }
"""


@dataclass(frozen=True)
class ReportConfig:
    """Which runs, and where to."""

    runs: list[str] = positional("runs, by name or folder")
    out: str = option("report.html", "the file to write")
    title: str = option("Runs side by side", "the heading")
    storage: str = option("runs", "folder for runs")


def write_report(runs: Sequence[Run], path: Path, *, title: str | None = None) -> Path:
    """Write the report of finished runs. Returns its path. Raises ValueError when a run is not finished."""
    results = {run.name: run.result for run in runs}
    learnt = [run for run in runs if run.metrics()]
    judged = [run for run in runs if "metrics" in results[run.name]]
    pretrained = [run for run in runs if results[run.name]["kind"] == "pretrain"]
    parts = [_header(title or runs[0].name, runs), *_said(results, "warnings"), *_said(results, "notes")]
    if judged:
        parts += ["<h2>Judged</h2>", _judged_table(judged, results)]
    if pretrained:
        parts += ["<h2>Pretrained</h2>", _pretrained_table(pretrained, results)]
    if learnt:
        parts += ["<h2>Training</h2>", _curves(learnt)]
    if judged:
        parts += ["<h2>Confusion matrices</h2>", _confusions(judged, results)]
    parts += [_pairs(run) for run in pretrained]
    parts += ["<h2>Records</h2>", *(_record(run) for run in runs)]
    body = "\n".join(parts)
    heading = html.escape(title or runs[0].name)
    write_text(
        path,
        f'<!doctype html>\n<html lang="en"><head><meta charset="utf-8"><title>{heading}</title>'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{_STYLE}</style></head>\n'
        f"<body>\n{body}\n</body></html>\n",
    )
    return path


def _header(title, runs):
    record = runs[0].record
    note = f"{record['started'][:10]} · commit {record['commit'][:10]} · {record['machine']['cores']} cores · {record['device']}"
    return f'<h1>{html.escape(title)}</h1><p class="note">{html.escape(note)}</p>'


def _said(results, kind):
    """What the results warn of or note, each sentence once, with the runs that it is about."""
    said: dict[str, list[str]] = {}
    for name, result in results.items():
        for sentence in result.get(kind, []):
            said.setdefault(sentence, []).append(name)
    style, mark = ("warn", "⚠ ") if kind == "warnings" else ("note", "")
    return [f'<p class="{style}">{mark}{html.escape(text)} ({html.escape(", ".join(names))})</p>' for text, names in said.items()]


def _judged_table(runs, results):
    best = {}
    for name in TITLES:
        lower = name in ("log_loss", "calibration_error")
        values = [results[run.name]["metrics"][name] for run in runs if results[run.name]["metrics"][name] is not None]
        best[name] = (min if lower else max)(values, default=None)
    rows = []
    for run in runs:
        result = results[run.name]
        chain = " → ".join(result["chain"]) or "random weights"
        cells = [run.name, f"{chain} → {result['kind']}", f"{result['labels']:,}", f"{result['test_patches']:,}"]
        line = [_cell(cell) for cell in cells]
        for name in TITLES:
            value = result["metrics"][name]
            text = "–" if value is None else f"{value:.3f}"
            line.append(_cell(text, best=len(runs) > 1 and value is not None and value == best[name]))
        rows.append(line)
    return _table(["run", "chain", "labels", "test patches", *TITLES.values()], rows)


def _pretrained_table(runs, results):
    rows = []
    for run in runs:
        result, record = results[run.name], run.record
        cells = [
            run.name,
            " → ".join(result["chain"]),
            f"{result['patches']:,}",
            f"{result['steps']:,}",
            "–" if result["final"]["loss"] is None else f"{result['final']['loss']:.3f}",
            f"{result['nothing_learned_loss']:.3f}",
            _percent(result["final"], "top1", "rotation_accuracy"),
            _percent(result["final"], "probe_balanced_accuracy"),
            _percent(result["final"], "probe_knn_balanced_accuracy"),
            f"{result['patches_per_s']:.0f}",
            f"{result['data_wait']:.1%}",
            f"{record['wall_seconds']:.0f}",
        ]
        rows.append([_cell(cell) for cell in cells])
    titles = ["run", "chain", "patches", "steps", "loss", "if nothing is learned", "accuracy of the task", "ridge probe",
              "kNN probe", "patches/s", "data wait", "seconds"]  # fmt: skip
    note = ""
    if len(runs) > 1:
        note = (
            '<p class="note">A loss depends on the method and the batch size: compare such runs by their probes of one set: the'
            " balanced accuracy of a classifier on frozen features, judged on a held-out part of the training split.</p>"
        )
    return _table(titles, rows) + note


def _percent(final, *names):
    """The first of these figures that there is."""
    value = next((final[name] for name in names if name in final), None)
    return "–" if value is None else f"{value:.1%}"


def _curves(runs):
    metrics = {run.name: run.metrics() for run in runs}
    drawn = []
    # The losses of different tasks have nothing in common, so each task has its own axes.
    for kind, measure, title in (
        ("NT-Xent", "top1", "contrastive top-1 accuracy"),
        ("cross-entropy of quarter turns", "rotation_accuracy", "accuracy of predicted quarter turns"),
        ("cross-entropy", "train_accuracy", "accuracy on the training batch"),
    ):
        chosen = {name: rows for name, rows in metrics.items() if measure in rows[-1]}
        if chosen:
            names = ", ".join(chosen)
            drawn += [
                _figure(figures.curves(chosen, "loss", f"loss ({kind})"), f"Loss over steps of {names}"),
                _figure(figures.curves(chosen, measure, title), f"{title} over steps of {names}"),
                _figure(figures.curves(chosen, "learning_rate", "learning rate"), f"Learning rate over steps of {names}"),
            ]
    # Whatever the task was, probes of the same patches compare.
    for measure, title in (
        ("probe_balanced_accuracy", "balanced accuracy of the ridge probe"),
        ("probe_knn_balanced_accuracy", "balanced accuracy of the kNN probe"),
    ):
        chosen = {name: rows for name, rows in metrics.items() if any(measure in row for row in rows)}
        if chosen:
            drawn.append(_figure(figures.curves(chosen, measure, title), f"{title} over steps of {', '.join(chosen)}"))
    return f'<div class="row">{"".join(drawn)}</div>'


def _confusions(runs, results):
    drawn = []
    for run in runs:
        result = results[run.name]
        svg = figures.confusion(result["metrics"]["confusion"], result["classes"], run.name)
        drawn.append(_figure(svg, f"Confusion matrix of {run.name}: rows are the truth, columns the prediction"))
    return f'<div class="row">{"".join(drawn)}</div>'


def _pairs(run):
    record = run.record
    config = record["stage"]["config"]
    heading = f"<h2>Views of {html.escape(run.name)}</h2>"
    try:
        png = _views_png(run, record, config)
    except ValueError as error:  # the data may have moved since; the report says so instead of a picture
        return f'{heading}<p class="note">No picture: {html.escape(str(error))}</p>'
    image = f'<img alt="Patches and the views made of them" src="data:image/png;base64,{base64.b64encode(png).decode()}">'
    note = '<p class="note">Left: the patch. Right: its two views in the first epoch, and what was drawn for each.</p>'
    return f"{heading}{note}<figure>{image}</figure>"


def _views_png(run, record, config):
    """The sheet, made once and kept in the run's folder."""
    path = run.folder / "views.png"
    if not path.exists():
        settings = {name: config[name] for name in ("recipe", "image_size", "seed")}
        png = figures.pairs(record["data"], **settings, cache_bytes=gib(run.config.get("cache_gib")))
        path.write_bytes(png)
    return path.read_bytes()


def _record(run):
    text = json.dumps(run.record, indent=2, ensure_ascii=False)
    return f"<details><summary>{html.escape(run.name)}</summary><pre>{html.escape(text)}</pre></details>"


def _figure(svg, alt):
    return f'<figure role="img" aria-label="{html.escape(alt)}">{svg}</figure>'


def _cell(text, *, best=False):
    return f"<td{' class=best' if best else ''}>{html.escape(text)}</td>"


def _table(titles, rows):
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    body = "".join(f"<tr>{''.join(row)}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{head}</tr></thead><tbody>{body}</tbody></table></div>'


def main(config: ReportConfig) -> None:
    runs = []
    for name in config.runs:
        run = find_run(name, config.storage)
        if run is None:
            raise ValueError(f"{name}: no run of that name in {config.storage}, and no run's folder")
        runs.append(run)
    if len({run.name for run in runs}) < len(runs):
        raise ValueError("two of these runs have the same name, and a table could not tell them apart: report them one by one")
    out = Path(config.out)
    out.parent.mkdir(parents=True, exist_ok=True)
    print(write_report(runs, out, title=config.title))


if __name__ == "__main__":
    sys.exit(run_script(main, ReportConfig, prog="report.py", description="Lay runs side by side in one HTML file."))
