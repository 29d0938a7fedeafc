"""How many GPUs and which storage for so many patches? A cost model of SimCLR pretraining, from measured constants.

    python benchmarks/scale.py                                              # on a CPU, on A100 and on H200
    python benchmarks/scale.py --machines h200 --step STEP.json --loader LOADER.json   # with what a GPU host has measured
    python benchmarks/scale.py --machines my_cluster.yaml                   # a machine of one's own: see scale_constants.machine
    python benchmarks/scale.py --check --work DISK/bench                    # against one and two real workers on this machine

For every number of GPUs and of patches: patches/s, time per epoch, what the network and the storage have to give, and the first
bottleneck. The formulas are in scale_model.py, the constants in machines.yaml and in result files; what is assumed is marked.

Results: <out>/<date>-scale.json, .md and .png; of the check <date>-scale-check.json and .md.
"""

import itertools
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import scale_check
from harness import Result, check_at_least, script
from report import Block, Record, Report, Table, number
from scale_constants import BACKBONE, FIELDS, MACHINES, all_sources, machine, packing_rate, part_of, workload
from scale_model import PART_NAMES, REQUEST_BYTES, Workload, predict, set_bytes

from sharding.cli import option

GPUS = [1, 2, 4, 8, 16, 64, 256, 1024]
PATCHES = [150_000, 1_500_000, 100_000_000, 1_000_000_000]


@dataclass(frozen=True)
class Config:
    """Which machines, how many of them, and for how many patches."""

    machines: list[str] = option(list(MACHINES), f"of {', '.join(MACHINES)}, or YAML files that describe others")
    gpus: list[int] = option(GPUS, "numbers of GPUs (on the machine cpu: of workers)")
    patches: list[int] = option(PATCHES, "numbers of patches")
    batch_per_gpu: int = option(256, "patches of a GPU in a step, at most")
    largest_batch: int = option(8192, "patches of all GPUs in a step, at most (8192 is SimCLR's largest); 0: however many")
    host_decode: float = option(0.0, "share of the patches that no GPU decodes (PNG), 0 to 1")
    step: str | None = option(None, "a GPU's result of benchmarks/step.py or `make gpu-bench`, for the one machine that is given")
    loader: str | None = option(None, "the same of benchmarks/loader.py")
    results: str = option("benchmarks/results", "folder of the results that the constants come from")
    out: str = option("benchmarks/results", "folder for the results")
    check: bool = option(False, "measure one and two workers on this machine, and what the model says of them")
    work: str | None = option(None, "for --check: a folder to work in; drawn images, shard sets and runs stay there")
    rounds: int = option(3, "for --check: how often one and two workers run")


def main(config: Config) -> None:
    check_at_least(config, batch_per_gpu=1, largest_batch=0, rounds=1)
    for name in ("gpus", "patches"):
        values = getattr(config, name)
        if not values or min(values) < 1:
            raise ValueError(f"--{name} {values}: give numbers from 1")
    if not 0 <= config.host_decode <= 1:
        raise ValueError(f"--host-decode {config.host_decode:g} is out of range: give a share from 0 to 1")
    if (config.step or config.loader) and len(config.machines) != 1:
        raise ValueError("--step and --loader are one machine's results: say with --machines which one's")
    if config.check and config.work is None:
        raise ValueError("--check needs --work FOLDER, where drawn patches and runs stay")
    result = Result(config.out, "scale-check" if config.check else "scale", ["torch", "ray", "timm"])
    if config.check:
        scale_check.check(result, Path(str(config.work)).resolve(), config.rounds)
        return
    result.record |= predictions(config)
    plot(result.record, result.path.with_suffix(".png"))
    report = report_of(result.record, result.path.with_suffix(".png").name)
    shown: list[Block] = []
    for each in result.record["machines"]:
        shown += [_short(_prediction_table(each)), *_wall_lines(each)]
    result.finish(report, show=shown)


def predictions(config: Config) -> Record:
    """For each machine its constants with their sources, and a prediction for each number of GPUs and patches."""
    results = Path(config.results)
    work = workload(results, batch_per_gpu=config.batch_per_gpu, largest_batch=config.largest_batch or None)
    measured = {name: part_of(path, name) for name in ("step", "loader") if (path := getattr(config, name))}
    found = []
    for name in config.machines:
        node = machine(name, results, **measured)
        predicted = [
            predict(work, node, gpus, patches, host_decode=config.host_decode)
            for patches, gpus in itertools.product(config.patches, config.gpus)
        ]
        constants = {key: constant._asdict() for key, constant in all_sources(node).items()}
        rows = [each._asdict() | {"step": each.step._asdict()} for each in predicted]
        found.append({"name": node.name, "constants": constants, "predictions": rows})
    return {
        "backbone": BACKBONE,
        "host_decode": config.host_decode,
        "constants": {key: constant._asdict() for key, constant in all_sources(work).items()},
        "sets": sets(work, results, config.patches),
        "machines": found,
    }


def sets(work: Workload, results: Path, patches: list[int]) -> list[Record]:
    """What a set of so many patches takes whoever trains on it: bytes, shards, memory of its index, time to pack it."""
    rate, source = packing_rate(results)
    return [
        {
            "patches": count,
            "bytes": set_bytes(work, count),
            "shards": -(-set_bytes(work, count) // work.shard_bytes),
            "index_bytes": count * work.index_bytes,
            "manifest_bytes": count * work.manifest_bytes,
            "fetch_requests": set_bytes(work, count) / REQUEST_BYTES,
            "packing_core_hours": count / rate / 3600,
            "packing_source": source,
        }
        for count in patches
    ]


# ---- The report ----


def report_of(record: Record, picture: str) -> Report:
    sets_header = ["patches", "stored", "shards", "index, each rank", "manifest, driver", "requests to fetch it"]
    sets_rows = [
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
    blocks: list[Block] = [
        f"Predicted, not measured: SimCLR of {record['backbone']} at 224 px, by the formulas of `benchmarks/scale_model.py`. Each"
        " constant has its source below; what is assumed was measured by nobody here. The first epoch also fetches the set from"
        " the object store to every node. Read and requests/s: such that the first epoch takes no longer than the others. First"
        " bottleneck: what would have to be faster first. Below each table: what keeps a set from being used as it is.",
        f"![patches/s by number of GPUs]({picture})",
        "## What a set takes",
        Table([*sets_header, "packing, core hours"], sets_rows),
        f"Packing: {record['sets'][0]['packing_source']}, every patch decoded. Sizes are of 10^3, 10^6, ... bytes.",
    ]
    for each in record["machines"]:
        blocks += [f"## {each['name']}", _prediction_table(each), *_wall_lines(each), _step_table(each)]
        blocks += [_constants_table(f"{each['name']}: constant", each["constants"])]
    blocks += ["## The workload", _constants_table("constant", record["constants"])]
    return Report(record, "Pretraining at scale: a cost model", blocks)


def _prediction_table(node: Record) -> Table:
    """A row for each number of patches and of GPUs."""
    header = ["patches/s", "per GPU / one alone", "an epoch", "the first one", "network of a node", "read, all nodes"]
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
        for each in node["predictions"]
    ]
    return Table([f"{node['name']}: patches, GPUs", *header, "requests/s", "first bottleneck"], rows)


def _short(table: Table) -> Table:
    """The columns that a terminal has room for."""
    header, *rows = ([line[i] for i in (0, 1, 3, -1)] for line in (table.header, *table.rows))
    return Table(header, rows)


def _wall_lines(node: Record) -> list[str]:
    """What keeps a set from being used as it is, each once, and from how many GPUs on."""
    first: dict[tuple[int, str], int] = {}
    for each in node["predictions"]:
        for wall in each["walls"]:
            key = (each["patches"], wall)
            first[key] = min(each["gpus"], first.get(key, each["gpus"]))
    return [
        f"- {node['name']}: {_count(patches)} patches" + (f" from {gpus:,} GPUs on" if gpus > 1 else "") + f": {wall}"
        for (patches, wall), gpus in first.items()
    ]


def _step_table(node: Record) -> Table:
    """Milliseconds of a step, part by part, for each number of GPUs; they do not depend on the number of patches."""
    first = node["predictions"][0]["patches"]
    header = [f"{node['name']}: GPUs", "nodes", "batch", *(f"{name}, ms" for name in PART_NAMES.values()), "step, ms"]
    rows = []
    for each in node["predictions"]:
        if each["patches"] == first:
            times = [each["step"][part] for part in PART_NAMES]
            counts = [f"{each['gpus']:,}", f"{each['nodes']:,}", f"{each['batch']:,.0f}"]
            rows.append([*counts, *(_number(1000 * seconds) for seconds in (*times, sum(times)))])
    return Table(header, rows)


def _constants_table(title: str, constants: Record) -> Table:
    rows = [[FIELDS[name], _number(each["value"]), each["source"]] for name, each in constants.items()]
    return Table([title, "value", "where from"], rows)


def plot(record: Record, path: Path) -> None:
    """A PNG: patches/s by GPUs, a panel for each machine and a line for each number of patches, with the name of the first
    bottleneck where it changes."""
    from matplotlib.figure import Figure

    machines = record["machines"]
    figure = Figure(figsize=(5.2 * len(machines), 4.4), layout="constrained")
    for axes, node in zip(figure.subplots(1, len(machines), squeeze=False)[0], machines, strict=True):
        labelled: set[Any] = set()
        for patches in dict.fromkeys(each["patches"] for each in node["predictions"]):
            points = [each for each in node["predictions"] if each["patches"] == patches]
            x, y = [each["gpus"] for each in points], [each["patches_per_s"] for each in points]
            axes.plot(x, y, marker=".", linewidth=1.4, label=f"{_count(patches)} patches")
            before = None
            for each in points:
                name, place = each["bottleneck"], (each["gpus"], round(each["patches_per_s"]))
                if name != before and (name, place) not in labelled:  # lines lie upon each other where the set does not matter
                    labelled.add((name, place))
                    # The lines rise to the right, so that there is room beside the first point.
                    offset, side = ((7, -3), "left") if each is points[0] else ((3, -12), "right")
                    point = (each["gpus"], each["patches_per_s"])
                    axes.annotate(name, point, xytext=offset, ha=side, textcoords="offset points", fontsize=7)
                before = name
        axes.set(xscale="log", yscale="log", title=node["name"], xlabel="GPUs", ylabel="patches/s, predicted")
        axes.set_xticks(x, [f"{count:,}" for count in x], fontsize=7)
        axes.minorticks_off()
        axes.grid(alpha=0.3)
        axes.legend(fontsize=7, loc="upper left")
    figure.savefig(path, dpi=110)


def _number(value: float) -> str:
    return number(value) if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def _scaled(value: float, units: dict[float, str], form: str) -> str:
    """In the largest unit that it reaches."""
    size, unit = next(((size, unit) for size, unit in units.items() if value >= size), (1, ""))
    return f"{value / size:{form}}{unit}"


def _count(patches: int) -> str:
    return _scaled(patches, {1e9: " billion", 1e6: " million", 1e3: " thousand"}, "g")


def _bytes(value: float) -> str:
    return (
        _scaled(value, {1e15: " PB", 1e12: " TB", 1e9: " GB", 1e6: " MB", 1e3: " kB"}, ".3g")
        if value >= 1e3
        else f"{value:.0f} B"
    )


def _duration(seconds: float) -> str:
    return _scaled(seconds, {86400: " d", 3600: " h", 60: " min"}, ",.3g") if seconds >= 60 else f"{seconds:.3g} s"


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
