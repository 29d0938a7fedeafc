"""What the benchmark of a training step says: ratios, targets and tables."""

import statistics
from typing import Any, NamedTuple

from measuring import heading, markdown_table
from step_contenders import CONTENDERS

Record = dict[str, Any]
Runs = dict[str, list[Record]]  # by contender, one for each round


class Ratio(NamedTuple):
    """The img/s of two contenders. at_least: what is aimed at, None: nothing."""

    name: str
    other: str
    text: str
    at_least: float | None = None


RATIOS = (
    Ratio("loader", "model", "the loader alone, its img/s as a multiple of the model's alone"),
    Ratio("joint", "model", "both together, as a share of the model alone", 0.95),
    Ratio("ray", "joint", "one Ray worker, as a share of the same loop without Ray", 0.98),
    Ratio("joint", "lightly", "both together, as a multiple of lightly's", 3.0),
    Ratio("joint", "simclr", "both together, as a multiple of Spijkervet's", 3.0),
)
DATA_WAIT = 0.02  # of ours, at most
# By torch's name of it: floating-point operations per second in bf16, dense, by NVIDIA's data sheets
PEAKS = {
    "NVIDIA H200": 989e12,
    "NVIDIA H100 80GB HBM3": 989e12,
    "NVIDIA A100-SXM4-80GB": 312e12,
    "NVIDIA A100-SXM4-40GB": 312e12,
}


def summarise(runs: Runs) -> dict[str, dict[str, float | None]]:
    """Medians over the rounds. spread: from the slowest to the fastest, as a share of the median."""
    found: dict[str, dict[str, float | None]] = {}
    for name, rounds in runs.items():
        if rounds:
            rates = [run["img_per_s"] for run in rounds]
            waits = [run["data_wait"] for run in rounds if run["data_wait"] is not None]
            found[name] = {
                "img_per_s": statistics.median(rates),
                "spread": (max(rates) - min(rates)) / statistics.median(rates),
                "data_wait": statistics.median(waits) if waits else None,
            }
    return found


def judge(runs: Runs) -> list[Record]:
    """Each ratio, and the data wait, with what was reached (None: not measured) and whether that is enough (None: nothing is
    wanted, or nothing was measured). Ratios are medians of those within a round, so that a slow minute of the machine cancels
    out."""
    found: list[Record] = []
    for ratio in RATIOS:
        pairs = zip(runs.get(ratio.name, ()), runs.get(ratio.other, ()), strict=False)  # one that failed later has fewer rounds
        ratios = [mine["img_per_s"] / theirs["img_per_s"] for mine, theirs in pairs]
        reached = statistics.median(ratios) if ratios else None
        enough = None if reached is None or ratio.at_least is None else reached >= ratio.at_least
        found.append({"text": ratio.text, "reached": reached, "enough": enough, "at_least": ratio.at_least, "at_most": None})
    wait = summarise(runs).get("joint", {}).get("data_wait")
    enough = None if wait is None else wait <= DATA_WAIT
    text = "both together, share of the time spent waiting for data"
    return [*found, {"text": text, "reached": wait, "enough": enough, "at_least": None, "at_most": DATA_WAIT}]


def completed(record: Record) -> Record:
    """The record with what is made of its runs, of which some may be missing."""
    return record | {"summary": summarise(record["runs"]), "targets": judge(record["runs"])}


class Utilisation(NamedTuple):
    """Of the model alone. flops: floating-point operations per second, a multiply and an add being two; share: of what the
    device could do at most (MFU, model FLOPs utilisation), None where that is not known; gpu: its name, None on a CPU."""

    flops: float
    share: float | None
    gpu: str | None


def utilisation(record: Record) -> Utilisation | None:
    """The median over the rounds; None where the model alone was not measured."""
    runs = record["runs"].get("model")
    if not runs:
        return None
    flops = statistics.median(run["flops_per_step"] * run["steps"] / run["seconds"] for run in runs)
    gpu = runs[-1]["gpu"]
    peak = PEAKS.get(gpu) if record["timed"]["bf16"] else None
    return Utilisation(flops, flops / peak if peak else None, gpu)


# ---- Tables ----


def target_lines(record: Record) -> list[str]:
    lines = []
    for target in record["targets"]:
        reached = "" if target["reached"] is None else f": {target['reached']:.3f}"
        words = {True: "reached", False: "MISSED", None: "measured" if reached else "not measured"}
        wanted = next(
            (f", wanted at {most} {target[f'at_{most}']:g}" for most in ("least", "most") if target[f"at_{most}"] is not None), ""
        )
        lines.append(f"{words[target['enough']]}: {target['text']}{reached}{wanted}")
    return lines + [f"{CONTENDERS[name].title}: {why}" for name, why in record["missing"].items()]


def model_lines(record: Record) -> list[str]:
    """How well the model alone uses the device, whether it was compiled, and the memory that it took."""
    used = utilisation(record)
    if used is None:
        return []
    run = record["runs"]["model"][-1]
    speed = f"the model alone: {used.flops / 1e12:.3g} TFLOP/s"
    if used.share is not None and used.gpu is not None:
        speed += f", {used.share:.1%} of the {PEAKS[used.gpu] / 1e12:g} of the {used.gpu} in dense bf16 (MFU)"
    elif used.gpu is not None:
        speed += f"; no share of the peak (MFU): for the {used.gpu} in {_precision(record)} none is known here"
    compiled = {True: "compiled", False: "not compiled"}.get(run["compiled"], f"not compiled ({run['compiled']})")
    memory = "" if run["peak_gib"] is None else f"; {run['peak_gib']:.1f} GiB at most"
    return [f"measured: {speed}; {compiled}{memory}"]


def _precision(record: Record) -> str:
    return "bf16" if record["timed"]["bf16"] else "float32"


def table(record: Record) -> tuple[list[str], list[list[str]]]:
    """Header and rows: one for each contender, with the reason where it could not run."""
    rounds = record["timed"]["rounds"]
    rows = []
    for name, found in record["runs"].items():
        row, why = record["summary"].get(name), record["failed"].get(name)
        rates = [_rate(run["img_per_s"]) for run in found] + ["-"] * (rounds - len(found))
        cells = [_rate(row["img_per_s"]), f"{row['spread']:.0%}"] if row else ["-", "-"]
        wait = "-" if row is None or row["data_wait"] is None else f"{row['data_wait']:.2%}"
        title = CONTENDERS[name].title
        rows.append([f"{title} (FAILED: {why})" if why else title, *rates, *cells, wait])
    header = ["contender", *(f"round {number}" for number in range(1, rounds + 1)), "median img/s", "spread", "data wait"]
    return header, rows


def _rate(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def text(record: Record) -> str:
    """What the table shows."""
    timed = record["timed"]
    return (
        f"{timed['backbone']} at {timed['image_size']} px, batch {timed['batch_size']}, on the {timed['device']} in"
        f" {_precision(record)}. Views/s (two of each patch) of forward, backward and the optimiser's step,"
        f" in the steady state: whole steps for at least {timed['seconds']:g} s after the first ones; a fresh process each time,"
        " the rounds interleaved. Data wait: the share of that time in which the next batch was not there. The others' loaders"
        " are torch's, with a process per core; nobody blurs."
    )


def markdown(record: Record) -> str:
    return "\n".join([*heading("A training step", record), *body(record), ""])


def body(record: Record) -> list[str]:
    """What follows the heading."""
    images = record["images"]
    return [
        f"{images['patches']:,} {'drawn' if images['drawn'] else 'real'} patches of {images['kilobytes']:.1f} KB on average, in "
        "the page cache.",
        "",
        text(record),
        "",
        *markdown_table(*table(record)),
        "",
        *(f"- {line}" for line in [*target_lines(record), *model_lines(record)]),
    ]
