"""The report writer of all benchmarks: ratios over rounds, targets, tables, and a result as Markdown."""

import statistics
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from rich.console import Console
from rich.table import Table as ConsoleTable

Record = dict[str, Any]


@dataclass(frozen=True)
class Table:
    header: Sequence[str]
    rows: Sequence[Sequence[str]]


Block = str | Table  # of a report: a paragraph, an item of a list where it begins with "- ", or a table


@dataclass(frozen=True)
class Report:
    """What a benchmark makes of its record: the record with everything derived from its runs, a title, and blocks."""

    record: Record
    title: str
    blocks: Sequence[Block]


# ---- Over rounds ----


def medians(runs: Sequence[Record], *names: str) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in names}


def spread(values: Sequence[float]) -> float:
    """From the lowest to the highest, as a share of the median."""
    return (max(values) - min(values)) / statistics.median(values)


def ratio(runs: Sequence[Record] | None, others: Sequence[Record] | None, name: str) -> float | None:
    """Median of the ratios within a round, so that a slow minute of the machine cancels out. None where one was not measured."""
    pairs = zip(runs or (), others or (), strict=False)  # one that failed later has fewer rounds
    ratios = [mine[name] / theirs[name] for mine, theirs in pairs]
    return statistics.median(ratios) if ratios else None


def summarise(
    runs: Mapping[str, Sequence[Record]],
    value: str,
    *others: str,
    ratios: Mapping[str, tuple[str, str]],
    among: Mapping[str, Sequence[Record]] | None = None,
) -> Record:
    """By contender the medians of `value` and of the others over its rounds, the spread of `value`, and ratios within a round.

    ratios: by name the contender that is compared with, and the measurement. among: where those are; None: in `runs`. A
    contender without a finished run is missing.
    """
    return {
        name: {
            **medians(found, value, *others),
            "spread": spread([run[value] for run in found]),
            **{key: ratio(found, (among or runs).get(other), what) for key, (other, what) in ratios.items()},
        }
        for name, found in runs.items()
        if found
    }


# ---- Targets ----


@dataclass(frozen=True)
class Target:
    """What `rows[row][value]` should reach at least, or at most; wanted None: it is reported without a target."""

    row: str
    value: str
    wanted: float | None
    text: str
    at_least: bool = True


def judge(rows: Mapping[str, Mapping[str, Any]], targets: Iterable[Target]) -> list[Record]:
    """Each target with what was reached (None: not measured) and whether that is enough (None: no target, or not measured)."""
    found = []
    for target in targets:
        reached = rows.get(target.row, {}).get(target.value)
        enough = None
        if reached is not None and target.wanted is not None:
            enough = reached >= target.wanted if target.at_least else reached <= target.wanted
        found.append({**asdict(target), "reached": reached, "enough": enough})
    return found


def number(value: float) -> str:
    """Three digits, or all before the point."""
    return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"


def target_lines(record: Record, show: Callable[[float], str] = number) -> list[str]:
    lines = []
    for target in record["targets"]:
        reached, wanted = target["reached"], target["wanted"]
        word = {True: "reached", False: "MISSED"}.get(target["enough"], "measured" if reached is not None else "not measured")
        value = f": {show(reached)}" if reached is not None else ""
        limit = f", wanted at {'least' if target['at_least'] else 'most'} {show(wanted)}" if wanted is not None else ""
        lines.append(f"- {word}: {target['text']}{value}{limit}")
    return lines


def missing_lines(record: Record, contenders: Mapping[str, Any]) -> list[str]:
    """Contenders that could not run, and why."""
    return [f"- {contenders[name].title if name in contenders else name}: {why}" for name, why in record["missing"].items()]


# ---- Tables ----


def with_failure(title: str, record: Record, name: str) -> str:
    return f"{title} (FAILED: {record['failed'][name]})" if name in record["failed"] else title


def cell(value: float | None, form: str = ".2f") -> str:
    return "-" if value is None else format(value, form)


def rounds_table(
    record: Record, titles: Mapping[str, str], value: str, unit: str, columns: Mapping[str, tuple[str, str]]
) -> Table:
    """A row for each contender with its rounds, their median, spread, and further columns of its summary.

    columns: by title the name in the summary and the format.
    """
    runs = {name: found for name, found in record["runs"].items() if name in titles}
    rounds = record.get("timed", {}).get("rounds") or max(map(len, runs.values()), default=0)
    rows = []
    for name, found in runs.items():
        row = record["summary"].get(name, {})
        cells = [number(run[value]) for run in found] + ["-"] * (rounds - len(found))
        cells += [number(row[value]) if row else "-", cell(row.get("spread"), ".0%")]
        cells += [cell(row.get(key), form) for key, form in columns.values()]
        rows.append([with_failure(titles[name], record, name), *cells])
    header = ["contender", *(f"round {i}" for i in range(1, rounds + 1)), f"median {unit}", "spread", *columns]
    return Table(header, rows)


def images_line(images: Record) -> str:
    kind = "drawn" if images["drawn"] else "real"
    return f"{images['patches']:,} {kind} patches of {images['kilobytes']:.1f} KB on average, in the page cache."


def packed_line(described: Mapping[str, Any]) -> str:
    """How a shard set was packed, from `harness.set_of`."""
    commands = ", then ".join(f"`{command}`" for command in described["packed_by"])
    return f"{described['name']!r} was packed by {commands} (fingerprint {described['fingerprint'][:12]})."


# ---- Output ----


def markdown_lines(blocks: Iterable[Block]) -> list[str]:
    lines: list[str] = []
    for block in blocks:
        in_list = isinstance(block, str) and block.startswith("- ")
        if lines and not (in_list and lines[-1].startswith("- ")):
            lines.append("")
        lines += [block] if isinstance(block, str) else _markdown_table(block)
    return lines


def _markdown_table(table: Table) -> list[str]:
    lines = [table.header, ["---", *["---:"] * (len(table.header) - 1)], *table.rows]
    return ["| " + " | ".join(" ".join(each.split()).replace("|", "/") for each in line) + " |" for line in lines]


def heading(title: str, record: Record) -> list[str]:
    """What was measured, when, on what, by which command."""
    m = record["machine"]
    where = f"{m['cpu']}, {m['cores']} cores, {m['workers']} workers, {m['memory_bytes'] / 1e9:,.0f} GB of memory"
    versions = ", ".join(f"{package} {version}" for package, version in record["versions"].items())
    first = f"{where}, load {m['load'][0]} before the start. Commit {record['commit']}; `{record['command']}`."
    return [f"# {title}, {record['date']}, {m['cores']} cores", first, versions + "."]


def markdown(report: Report) -> str:
    return "\n".join([*markdown_lines([*heading(report.title, report.record), *report.blocks]), ""])


def print_blocks(console: Console, blocks: Iterable[Block]) -> None:
    """The tables, and the items of lists."""
    for block in blocks:
        if isinstance(block, Table):
            table = ConsoleTable(*block.header)
            for column in table.columns[1:]:
                column.justify = "right"
            for row in block.rows:
                table.add_row(*row)
            console.print(table)
        elif block.startswith("- "):
            console.print(block[2:], markup=False)
