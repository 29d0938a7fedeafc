"""What the cost model says: tables and a plot."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from measuring import heading, markdown_table
from scale_constants import Packing
from scale_model import FIELDS, PART_NAMES, REQUEST_BYTES, Workload, set_bytes

Record = dict[str, Any]
Table = tuple[list[str], list[list[str]]]


def sets(work: Workload, packing: Packing, patches: Sequence[int]) -> list[Record]:
    """What a set of so many patches takes whoever trains on it: bytes, shards, memory of its index, time to pack it."""
    return [
        {
            "patches": number,
            "bytes": set_bytes(work, number),
            "shards": -(-set_bytes(work, number) // work.shard_bytes),
            "index_bytes": number * work.index_bytes,
            "manifest_bytes": number * work.manifest_bytes,
            "fetch_requests": set_bytes(work, number) / REQUEST_BYTES,
            "packing_core_hours": number / packing.patches_per_core_s / 3600,
            "packing_source": packing.source,
        }
        for number in patches
    ]


def sets_table(record: Record) -> Table:
    header = [
        "patches",
        "stored",
        "shards",
        "index, each rank",
        "manifest, driver",
        "requests to fetch it",
        "packing, core hours",
    ]
    rows = [
        [
            _count(each["patches"]),
            _bytes(each["bytes"]),
            f"{each['shards']:,.0f}",
            _bytes(each["index_bytes"]),
            _bytes(each["manifest_bytes"]),
            f"{each['fetch_requests']:,.0f}",
            _number(each["packing_core_hours"]),
        ]
        for each in record["sets"]
    ]
    return header, rows


def prediction_table(machine: Record) -> Table:
    """A row for each number of patches and of GPUs."""
    header = [
        f"{machine['name']}: patches, GPUs",
        "patches/s",
        "per GPU / one alone",
        "an epoch",
        "the first one",
        "network of a node",
        "read, all nodes",
        "requests/s",
        "first bottleneck",
    ]
    rows = [
        [
            f"{_count(each['patches'])}, {each['gpus']:,}",
            _number(each["patches_per_s"]),
            f"{each['efficiency']:.0%}",
            _duration(each["epoch_s"]),
            _duration(each["first_epoch_s"]),
            "-" if each["nodes"] == 1 else _bytes(each["network_bytes_per_s"]) + "/s",
            _bytes(each["read_bytes_per_s"]) + "/s",
            _number(each["read_requests_per_s"]),
            each["bottleneck"],
        ]
        for each in machine["predictions"]
    ]
    return header, rows


def short_table(machine: Record) -> Table:
    """The columns of the prediction that a terminal has room for."""
    header, rows = prediction_table(machine)
    shown = (0, 1, 3, len(header) - 1)
    return [header[i] for i in shown], [[row[i] for i in shown] for row in rows]


def wall_lines(machine: Record) -> list[str]:
    """What keeps a set from being used as it is, each once, and from how many GPUs on."""
    first: dict[tuple[int, str], int] = {}
    for each in machine["predictions"]:
        for wall in each["walls"]:
            key = (each["patches"], wall)
            first[key] = min(each["gpus"], first.get(key, each["gpus"]))
    return [
        f"{machine['name']}: {_count(patches)} patches" + (f" from {gpus:,} GPUs on" if gpus > 1 else "") + f": {wall}"
        for (patches, wall), gpus in first.items()
    ]


def step_table(machine: Record) -> Table:
    """Milliseconds of a step, part by part, for each number of GPUs; they do not depend on the number of patches."""
    first = machine["predictions"][0]["patches"]
    header = [f"{machine['name']}: GPUs", "nodes", "batch", *(f"{name}, ms" for name in PART_NAMES.values()), "step, ms"]
    rows = [
        [
            f"{each['gpus']:,}",
            f"{each['nodes']:,}",
            f"{each['batch']:,.0f}",
            *(_number(1000 * each["step"][part]) for part in PART_NAMES),
            _number(1000 * sum(each["step"].values())),
        ]
        for each in machine["predictions"]
        if each["patches"] == first
    ]
    return header, rows


def constants_table(title: str, constants: Record) -> Table:
    rows = [[FIELDS[name], _number(each["value"]), each["source"]] for name, each in constants.items()]
    return [title, "value", "where from"], rows


def markdown(record: Record, picture: str) -> str:
    lines = heading("Pretraining at scale: a cost model", record)
    lines += [
        f"Predicted, not measured: SimCLR of {record['backbone']} at 224 px, by the formulas of `benchmarks/scale_model.py`. Each"
        " constant has its source below; what is assumed was measured by nobody here. The first epoch also fetches the set from"
        " the object store to every node. Read and requests/s: such that the first epoch takes no longer than the others. First"
        " bottleneck: what would have to be faster first. Below each table: what keeps a set from being used as it is.",
        "",
        f"![patches/s by number of GPUs]({picture})",
        "",
    ]
    lines += ["## What a set takes", "", *markdown_table(*sets_table(record)), ""]
    lines += [f"Packing: {record['sets'][0]['packing_source']}, every patch decoded. Sizes are of 10^3, 10^6, ... bytes.", ""]
    for machine in record["machines"]:
        lines += [f"## {machine['name']}", "", *markdown_table(*prediction_table(machine)), ""]
        lines += [*(f"- {line}" for line in wall_lines(machine)), ""]
        lines += [*markdown_table(*step_table(machine)), ""]
        lines += [*markdown_table(*constants_table(f"{machine['name']}: constant", machine["constants"])), ""]
    lines += ["## The workload", "", *markdown_table(*constants_table("constant", record["constants"])), ""]
    return "\n".join(lines)


def plot(record: Record, path: Path) -> None:
    """A PNG: patches/s by GPUs, a panel for each machine and a line for each number of patches, with the name of the first
    bottleneck where it changes."""
    from matplotlib.figure import Figure

    machines = record["machines"]
    figure = Figure(figsize=(5.2 * len(machines), 4.4), layout="constrained")
    for axes, machine in zip(figure.subplots(1, len(machines), squeeze=False)[0], machines, strict=True):
        labelled = set()
        for patches in dict.fromkeys(each["patches"] for each in machine["predictions"]):
            points = [each for each in machine["predictions"] if each["patches"] == patches]
            x, y = [each["gpus"] for each in points], [each["patches_per_s"] for each in points]
            axes.plot(x, y, marker=".", linewidth=1.4, label=f"{_count(patches)} patches")
            before = None
            for each in points:
                name, place = each["bottleneck"], (each["gpus"], round(each["patches_per_s"]))
                if name != before and (name, place) not in labelled:  # lines lie upon each other where the set does not matter
                    labelled.add((name, place))
                    first = each is points[0]  # the lines rise to the right, so that there is room beside the first point
                    offset, side = ((7, -3), "left") if first else ((3, -12), "right")
                    point = (each["gpus"], each["patches_per_s"])
                    axes.annotate(name, point, xytext=offset, ha=side, textcoords="offset points", fontsize=7)
                before = name
        axes.set(xscale="log", yscale="log", title=machine["name"], xlabel="GPUs", ylabel="patches/s, predicted")
        axes.set_xticks(x, [f"{number:,}" for number in x], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=110)


# ---- Numbers ----


def _number(value: float) -> str:
    if value == 0 or 1e-3 <= abs(value) < 1e6:
        return f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return f"{value:.3g}"


def _count(patches: int) -> str:
    for size, name in ((10**9, " billion"), (10**6, " million"), (10**3, " thousand")):
        if patches >= size:
            return f"{patches / size:g}{name}"
    return str(patches)


def _bytes(value: float) -> str:
    for power, unit in ((15, "PB"), (12, "TB"), (9, "GB"), (6, "MB"), (3, "kB")):
        if value >= 10**power:
            return f"{value / 10**power:.3g} {unit}"
    return f"{value:.0f} B"


def _duration(seconds: float) -> str:
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= size:
            return f"{seconds / size:,.3g} {unit}"
    return f"{seconds:.3g} s"
