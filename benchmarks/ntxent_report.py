"""What the benchmark of the loss says: what is not run and why, ratios, targets and tables."""

import statistics
from typing import Any

import measuring
from measuring import heading, markdown_table
from ntxent_contenders import CONTENDERS

Record = dict[str, Any]
Runs = dict[str, dict[str, list[Record]]]  # by contender and anchors, one for each round

TIME_TO_PLAIN = 1.1  # ours, at most
LARGEST, LARGEST_WIDTH, LARGEST_BYTES = 65_536, 128, 2**30  # so many anchors of that width need less
_AS_THE_EMBEDDINGS = 1.0  # growth of ours beyond where the plain formula fits, as a multiple of the embeddings' growth
_MIB, _GIB = 2**20, 2**30
_LOSS_ERROR = 1e-4  # relative; sums of tens of thousands of float32 in another order


def refusal(name: str, anchors: int, runs: Runs, *, seconds: float) -> str | None:
    """Why a contender is not started at this size, from what the largest size before it took; None: it is.

    Time grows with the square of the anchors, memory with the contender's own power of them.
    """
    before = {int(size): found for size, found in runs.get(name, {}).items() if found and int(size) < anchors}
    if not before:
        return None
    size = max(before)
    found, factor = before[size], anchors / size
    if any("no_memory" in run for run in found):
        return f"no memory at {size:,}"
    need = statistics.median(run["peak_bytes"] for run in found) * factor ** CONTENDERS[name].memory_power
    if need > found[-1]["budget_bytes"]:
        return f"needs about {need / _GIB:.1f} GiB"
    expected = statistics.median(run["seconds"] for run in found) * factor**2
    return f"takes about {expected:,.0f} s" if expected > seconds else None


def other_loss(run: Record, runs: Runs, anchors: int) -> str | None:
    """What is wrong with a run whose loss is not that of the contender before it at this size; None: nothing."""
    for name, sizes in runs.items():
        for other in sizes.get(str(anchors), []):
            if "loss" in run and "loss" in other and not abs(run["loss"] / other["loss"] - 1) < _LOSS_ERROR:
                return f"its loss is {run['loss']:.6g}, that of {CONTENDERS[name].title} {other['loss']:.6g}"
    return None


def summarise(runs: Runs) -> dict[str, dict[str, dict[str, float | None]]]:
    """By anchors and contender: medians over the rounds, and medians of the ratios within a round, so that a slow minute of
    the machine cancels out. A ratio is None where its other side was not measured."""
    measured = {
        name: {size: found for size, found in sizes.items() if found and not any("no_memory" in run for run in found)}
        for name, sizes in runs.items()
    }
    sizes = sorted({int(size) for found in measured.values() for size in found})
    summary: dict[str, dict[str, dict[str, float | None]]] = {}
    for size in map(str, sizes):
        here = {name: found[size] for name, found in measured.items() if size in found}
        summary[size] = {
            name: {
                "seconds": statistics.median(run["seconds"] for run in found),
                "peak_bytes": statistics.median(run["peak_bytes"] for run in found),
                "time_to_plain": _ratio(found, here.get("plain")),
                "time_to_ours": _ratio(found, here.get("ours")),
            }
            for name, found in here.items()
        }
    return summary


def _ratio(runs: list[Record], others: list[Record] | None) -> float | None:
    pairs = zip(runs, others or (), strict=False)  # one that failed later has fewer rounds
    ratios = [mine["seconds"] / theirs["seconds"] for mine, theirs in pairs]
    return statistics.median(ratios) if ratios else None


def judge(summary: dict[str, dict[str, dict[str, Any]]], dim: int) -> list[Record]:
    """Each target with what was reached (None: not measured) and whether that is enough."""
    found: list[Record] = []

    def target(text: str, reached: float | None, wanted: float) -> None:
        enough = None if reached is None else reached <= wanted
        found.append({"text": text, "reached": reached, "wanted": wanted, "enough": enough})

    for size, here in summary.items():
        if "plain" in here:
            ratio = here.get("ours", {}).get("time_to_plain")
            target(f"2N = {int(size):,}: ours, its time as a multiple of the plain formula's", ratio, TIME_TO_PLAIN)
    largest = summary.get(str(LARGEST), {}).get("ours", {}).get("peak_bytes") if dim == LARGEST_WIDTH else None
    text = f"2N = {LARGEST:,}, D = {LARGEST_WIDTH}: ours, GiB beyond the embeddings"
    target(text, None if largest is None else largest / _GIB, LARGEST_BYTES / _GIB)
    both = [int(size) for size, here in summary.items() if "ours" in here and "plain" in here]
    mine = [int(size) for size, here in summary.items() if "ours" in here]
    grown = None
    if both and max(mine) > max(both):
        first, last = max(both), max(mine)
        grown = summary[str(last)]["ours"]["peak_bytes"] / summary[str(first)]["ours"]["peak_bytes"] * first / last
    text = "beyond the largest 2N of the plain formula: growth of ours in memory, as a multiple of the embeddings'"
    target(text, grown, _AS_THE_EMBEDDINGS)
    return found


def completed(record: Record) -> Record:
    """The record with what is made of its runs, of which some may be missing."""
    summary = summarise(record["runs"])
    return record | {"summary": summary, "targets": judge(summary, record["timed"]["dim"])}


# ---- Tables ----


def target_lines(record: Record) -> list[str]:
    return measuring.target_lines(record) + [f"{CONTENDERS[name].title}: {why}" for name, why in record["missing"].items()]


def tables(record: Record) -> list[tuple[str, list[str], list[list[str]]]]:
    """What each shows, its header, and its rows: one for each number of anchors, with the reason where nothing was measured."""
    timed, names = record["timed"], list(record["runs"])
    titles = [CONTENDERS[name].title for name in names]
    others = [name for name in names if name not in ("ours", "plain")]
    speed = (
        f"Milliseconds of a forward and backward pass in float32 on the {timed['device']}, D = {timed['dim']}; medians over"
        f" {timed['rounds']} rounds, in each of which {_where(timed)} runs for {timed['timed_s']:g} s, or once where that takes"
        " longer. Ratios are medians of the ratios within a round."
    )
    memory = (
        "MiB at most during a first pass, beyond the embeddings and their gradient"
        + (" (resident memory of the process)" if timed["device"] == "cpu" else " (what torch has allocated)")
        + f". What needs more than half of the memory, by the last size's figure, is not started; nor is what would take longer"
        f" than {timed['seconds']:g} s."
    )
    ratios = ["ours / plain", *(f"{CONTENDERS[name].title} / ours" for name in others)]
    times, peaks = [], []
    for anchors in timed["anchors"]:
        here = record["summary"].get(str(anchors), {})
        why = {name: record["not_run"].get(name, {}).get(str(anchors), "-") for name in names}
        cells = [_number(1000 * here[name]["seconds"]) if name in here else why[name] for name in names]
        found = [here.get("ours", {}).get("time_to_plain"), *(here.get(name, {}).get("time_to_ours") for name in others)]
        times.append([f"{anchors:,}", *cells, *("-" if ratio is None else f"{ratio:.2f}" for ratio in found)])
        embeddings = f"{2 * anchors * timed['dim'] * 4 / _MIB:.1f}"
        cells = [_number(here[name]["peak_bytes"] / _MIB) if name in here else why[name] for name in names]
        peaks.append([f"{anchors:,}", embeddings, *cells])
    return [
        (speed, ["2N", *titles, *ratios], times),
        (memory, ["2N", "embeddings and gradient", *titles], peaks),
    ]


def _where(timed: Record) -> str:
    return "the one process" if timed["in_process"] else "a fresh process"


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 100 else f"{value:.3g}"


def markdown(record: Record) -> str:
    return "\n".join([*heading("NT-Xent", record), *body(record), ""])


def body(record: Record) -> list[str]:
    """What follows the heading."""
    lines: list[str] = []
    for text, header, rows in tables(record):
        lines += [text, "", *markdown_table(header, rows), ""]
    return [*lines, *(f"- {line}" for line in target_lines(record))]
