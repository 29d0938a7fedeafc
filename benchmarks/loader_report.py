"""What the loader benchmark says: ratios, targets and tables."""

import statistics
from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

import measuring
from loader_parts import PARTS
from loader_peers import ALL
from measuring import heading, markdown_table

RATIOS = {
    "rate_to_torchvision": "rate / torchvision",
    "rate_to_dali": "rate / DALI",
    "rate_to_decode": "rate / decoding",
    "time_to_ours": "time / ours",
}
_HOST = ("reading", "drawing")  # what is done on the host for every patch so that views are functions of their numbers

Record = dict[str, Any]


class Target(NamedTuple):
    """What should be reached. row: a contender, "parts", or "memory" and a batch size; figure: its; at_least: or else at most."""

    row: str
    figure: str
    wanted: float
    at_least: bool
    text: str


TARGETS = (
    Target("ours", "rate_to_torchvision", 4.0, True, "ours, its rate as a multiple of torchvision's"),
    Target("ours", "rate_to_dali", 1.0, True, "ours, its rate as a multiple of that of DALI's own operators"),
    Target("ours-blur", "time_to_ours", 2.0, False, "ours with blur, its time as a multiple of ours without"),
    Target("parts", "share", 0.03, False, "reading and drawing, their share of the loader's CPU time"),
    Target("parts", "patches_per_s", 60_000, True, "reading and drawing, patches/s on one core"),
)


GPU_TARGETS = (Target("ours", "rate_to_decode", 0.8, True, "ours, its rate as a share of decoding alone"),)


def targets(memory_batches: Iterable[int]) -> list[Target]:
    """On the CPU, with one for the memory at each of these batch sizes."""
    text = "memory at batch {:,}, at the end of the last epoch as a multiple of that at the end of the second"
    return [*TARGETS, *(Target(f"memory {size}", "growth", 1.05, False, text.format(size)) for size in memory_batches)]


def summarise(runs: dict[str, list[dict[str, float]]]) -> dict[str, dict[str, float | None]]:
    """Medians over the rounds, and medians of the ratios within a round, so that a slow minute of the machine cancels out.

    spread: from the slowest to the fastest round, as a share of the median. A contender with blur is held against torchvision and
    DALI with blur. A ratio is None where its other side was not measured.
    """
    found: dict[str, dict[str, float | None]] = {}
    for name, rounds in runs.items():
        if rounds and name in ALL:
            rates = [run["patches_per_s"] for run in rounds]
            blur = "-blur" if ALL[name].blur else ""
            found[name] = {
                "patches_per_s": statistics.median(rates),
                "spread": (max(rates) - min(rates)) / statistics.median(rates),
                "rate_to_torchvision": _ratio(rounds, runs.get(f"torchvision{blur}")),
                "rate_to_dali": _ratio(rounds, runs.get(f"dali{blur}")),
                "rate_to_decode": _ratio(rounds, runs.get("decode")),
                "time_to_ours": _ratio(runs.get("ours"), rounds),
            }
    return found


def _ratio(runs: Sequence[dict] | None, others: Sequence[dict] | None) -> float | None:
    """Of the rates, round by round."""
    pairs = zip(runs or (), others or (), strict=False)  # one that failed later has fewer rounds
    ratios = [mine["patches_per_s"] / theirs["patches_per_s"] for mine, theirs in pairs]
    return statistics.median(ratios) if ratios else None


def summarise_parts(found: dict[str, list[float]]) -> dict[str, Any]:
    """found: CPU milliseconds per patch by part and round. Medians over the rounds of each part ("ms"), of what the whole loader
    takes beyond the sum of its parts ("rest_ms"), of the host's share of the whole ("share"), and of the host's rate."""
    rounds = [dict(zip(found, times, strict=True)) for times in zip(*found.values(), strict=True)]
    host = [sum(times[name] for name in _HOST) for times in rounds]
    return {
        "ms": {name: statistics.median(times) for name, times in found.items()},
        "rest_ms": statistics.median(2 * times["loader"] - sum(times.values()) for times in rounds),
        "share": statistics.median(mine / times["loader"] for mine, times in zip(host, rounds, strict=True)),
        "patches_per_s": statistics.median(1000 / mine for mine in host),
    }


def completed(record: Record) -> Record:
    """The record with what is made of its runs, of which some may be missing."""
    return record | judged(record)


def judged(record: Record) -> Record:
    """What is made of a record's runs: summary, parts and targets."""
    runs = record["runs"]
    summary = summarise(runs)
    parts = summarise_parts(runs["parts"][0]["ms"]) if runs.get("parts") else None
    sizes = [int(key.removeprefix("memory ")) for key in runs if key.startswith("memory ")]
    rows: dict[str, dict] = {**summary, "parts": parts or {}}
    rows |= {f"memory {size}": {"growth": _growth(runs[f"memory {size}"])} for size in sizes}
    wanted = GPU_TARGETS if record["timed"]["device"] == "cuda" else targets(sizes)
    return {"summary": summary, "parts": parts, "targets": judge(rows, wanted)}


def _growth(runs: Sequence[Record]) -> float | None:
    return runs[0]["resident_bytes"][-1] / runs[0]["resident_bytes"][1] if runs else None


def judge(rows: dict[str, dict], wanted: Iterable[Target]) -> list[Record]:
    """Each target with what was reached (None: not measured) and whether that is enough."""
    found = []
    for target in wanted:
        value = rows.get(target.row, {}).get(target.figure)
        enough = None if value is None else (value >= target.wanted if target.at_least else value <= target.wanted)
        found.append({**target._asdict(), "reached": value, "enough": enough})
    return found


# ---- Tables ----


def target_lines(record: Record) -> list[str]:
    return measuring.target_lines(record, _number) + [
        f"{ALL[name].title if name in ALL else name}: {why}" for name, why in record["missing"].items()
    ]


def _number(value: float) -> str:
    return f"{value:,.0f}" if value >= 1000 else f"{value:.3g}"


def tables(record: Record) -> list[tuple[str, list[str], list[list[str]]]]:
    """What each shows, its header and its rows, with a row for whatever was asked for, and the reason where it failed."""
    found, runs = [], record["runs"]
    if any(key in ALL for key in runs):
        found.append((_speed_text(record), *_speed_table(record)))
    if "parts" in runs:
        text = "CPU time of all threads per patch, recipe simclr, on one core with one thread; medians over the rounds."
        found.append((text, *_parts_table(record)))
    if any(key.startswith("memory ") for key in runs):
        text = (
            "Resident memory (MB are 10^6 bytes; the mapped tars' pages are in it) of a process that runs the loader for ten "
            "short epochs, recipe simclr."
        )
        found.append((text, *_memory_table(record)))
    return found


def _speed_text(record: Record) -> str:
    timed = record["timed"]
    return (
        f"Two views of {timed['image_size']} px on the {timed['device']}, batch {timed['batch_size']}."
        " Patches/s of the steady state: after"
        f" {timed['warm']} batches, {timed['lap']} batches or a multiple of them that takes at least {timed['seconds']:g} s;"
        " a fresh process each time, the rounds interleaved. Ratios are medians of the ratios within a round; with blur, against"
        " the others with blur. Spread: from the slowest to the fastest round, as a share of the median."
    )


def _speed_table(record: Record) -> tuple[list[str], list[list[str]]]:
    runs = {name: found for name, found in record["runs"].items() if name in ALL}
    rounds = record["timed"]["rounds"]
    header = ["contender", *(f"round {number}" for number in range(1, rounds + 1)), "median patches/s", "spread"]
    rows = []
    for name, found in runs.items():
        row = record["summary"].get(name)
        rates = [f"{run['patches_per_s']:,.0f}" for run in found] + ["-"] * (rounds - len(found))
        cells = [f"{row['patches_per_s']:,.0f}", f"{row['spread']:.0%}"] if row else ["-", "-"]
        ratios = [f"{row[key]:.2f}" if row and row[key] is not None else "-" for key in RATIOS]
        rows.append([_named(ALL[name].title, record, name), *rates, *cells, *ratios])
    return [*header, *RATIOS.values()], rows


def _parts_table(record: Record) -> tuple[list[str], list[list[str]]]:
    header, found = ["part", "CPU ms per patch", "share of the loader"], record["parts"]
    if found is None:
        return header, [[_named("all parts", record, "parts"), "-", "-"]]
    ms = found["ms"]
    lines = {PARTS[name]: ms[name] for name in PARTS if name != "loader"}
    lines |= {"whatever else it does": found["rest_ms"], PARTS["loader"]: ms["loader"]}
    return header, [[title, f"{value:.4f}", f"{value / ms['loader']:.2%}"] for title, value in lines.items()]


def _memory_table(record: Record) -> tuple[list[str], list[list[str]]]:
    header = ["batch", "end of epoch 2, MB", "end of the last epoch, MB", "last / second", "peak, MB"]
    rows = []
    for key, runs in record["runs"].items():
        if key.startswith("memory "):
            title = _named(f"{int(key.removeprefix('memory ')):,}", record, key)
            cells = ["-"] * 4
            for run in runs:
                second, last = run["resident_bytes"][1], run["resident_bytes"][-1]
                cells = [f"{second / 1e6:,.0f}", f"{last / 1e6:,.0f}", f"{last / second:.3f}", f"{run['peak_bytes'] / 1e6:,.0f}"]
            rows.append([title, *cells])
    return header, rows


def _named(title: str, record: Record, key: str) -> str:
    return f"{title} (FAILED: {record['failed'][key]})" if key in record["failed"] else title


def markdown(record: Record) -> str:
    return "\n".join([*heading("The loader", record), *body(record), ""])


def body(record: Record) -> list[str]:
    """What follows the heading."""
    images = record["images"]
    lines = [
        f"{images['patches']:,} {'drawn' if images['drawn'] else 'real'} patches of {images['kilobytes']:.1f} KB on average, in "
        "the page cache.",
        "",
    ]
    for text, header, rows in tables(record):
        lines += [text, "", *markdown_table(header, rows), ""]
    return [*lines, *(f"- {line}" for line in target_lines(record))]
