"""How many GPUs and which storage for so many patches? A cost model of SimCLR pretraining, on the constants of machines.yaml.

    python benchmarks/scale.py                                              # on a CPU, on A100 and on H200
    python benchmarks/scale.py --machines h200 --step STEP.json --loader LOADER.json   # with what a GPU host has measured
    python benchmarks/scale.py --machines my_cluster.yaml                   # a machine of one's own
    python benchmarks/scale.py --check --work DISK/bench                    # against one and two real workers on this machine

For every number of GPUs and of patches: patches/s, time per epoch, what the network and the storage have to give, and the first
bottleneck. Results: <out>/<date>-scale.json and .md; of the check <date>-scale-check.json and .md (scale_check.py).

W ranks (GPUs), V = 2 views of a patch, B patches of a rank in a step, D width of the projection, M = V B anchors of a rank,
N = W M anchors of all. Times in seconds, volumes in bytes, rates in units per second; machines.yaml says what each constant is. A
step takes what its parts take one after the other (`step_parts`). Patches are read and decoded at the same time. So the rate of
the whole is the lowest of the rates of all stages (`limits`), and that stage is the bottleneck. Formulas, constants and tables
are one file, so that a number in a table can be followed to its formula.
"""

import dataclasses
import itertools
import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from harness import Result, check_at_least, script
from report import Block, Record, Report, Table, number
from step import utilisation
from worker import ROOT

from sharding.cli import option

BACKBONE, IMAGE_SIZE, VIEWS = "resnet50", 224, 2
MACHINES = ("cpu", "a100", "h200")
STREAMS = 4  # shards that a rank fetches at once: pipelines.shard_cache.RemoteSet's `parallel`
REQUEST_BYTES = 8 * 2**20  # of one of its requests
_FLOAT = 4  # bytes; gradients, weights and embeddings are float32
_BACKWARD = 2 / 3  # of a step's computing, during which gradients are reduced
_LOSS_PRODUCTS = 3  # of M x D by D x N: the similarities, and the gradients of both sides
_MAPPINGS = 65_530  # that Linux lets a process have (vm.max_map_count), of which each shard that is open takes one
_CACHED = 0.5  # of a node's memory, that its page cache may have; the rest is the ranks'

# ---- The model ----


@dataclass(frozen=True)
class Workload:
    """What is trained; machines.yaml says what each field is. largest_batch: None: however large."""

    parameters: float
    norms: float
    flops_per_view: float
    bytes_per_patch: float
    projection_dim: int
    batch_per_gpu: int
    largest_batch: int | None
    shard_bytes: float
    index_bytes: float
    manifest_bytes: float

    def part(self, gpus: int) -> float:
        """B, patches of a rank in a step; a fraction where the GPUs outnumber the largest batch."""
        return self.batch_per_gpu if self.largest_batch is None else min(self.batch_per_gpu, self.largest_batch / gpus)

    def gathered_bytes(self, gpus: int) -> float:
        """Of all ranks' embeddings: 4 N D."""
        return _FLOAT * VIEWS * self.part(gpus) * gpus * self.projection_dim


@dataclass(frozen=True)
class Machine:
    """A node and what joins it to others; machines.yaml says what each field is.

    device_patches_per_s: None where the model's own cores decode and augment, which then takes its time from the model.
    sync_norms: batch norm's statistics are those of the global batch.
    """

    name: str
    gpus: int
    cores: float
    memory_bytes: float
    disk_bytes: float
    disk_bytes_per_s: float
    model_flops_per_s: float
    loss_flops_per_s: float
    launch_s: float
    host_core_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    link_latency_s: float
    network_latency_s: float
    store_bytes_per_s: float
    store_requests_per_s: float
    stream_bytes_per_s: float
    device_patches_per_s: float | None = None
    overlap: float = 1.0
    sync_norms: bool = True

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.gpus)

    def hops(self, gpus: int) -> float:
        """Seconds until a word of one rank is with all others."""
        within, nodes = min(gpus, self.gpus), self.nodes(gpus)
        return math.ceil(math.log2(within)) * self.link_latency_s + math.ceil(math.log2(nodes)) * self.network_latency_s

    def collective(self, gpus: int, size: float) -> float:
        """Seconds of an all-gather or a reduce-scatter of so many bytes in all; an all-reduce is one of each.

        bytes (W - 1) / W / bandwidth + hops: a ring's volume over the slowest link that it crosses, and a tree's hops. Source:
        Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", Journal of Parallel and
        Distributed Computing 69, 2009, section 3.
        """
        bandwidth = self.link_bytes_per_s
        if self.nodes(gpus) > 1:
            bandwidth = self.network_bytes_per_s if self.gpus == 1 else min(bandwidth, self.network_bytes_per_s)
        return size * (gpus - 1) / gpus / bandwidth + self.hops(gpus)

    def fetch_rate(self, gpus: int) -> float:
        """Bytes/s at which a node fetches shards from the object store while all others do: the least of its network, its
        streams (4 for each of its ranks), and its share of what the store gives, in bytes and in requests of 8 MiB."""
        streams = STREAMS * min(gpus, self.gpus) * self.stream_bytes_per_s
        store = min(self.store_bytes_per_s, self.store_requests_per_s * REQUEST_BYTES)
        return min(self.network_bytes_per_s, streams, store / self.nodes(gpus))


# The parts of a step, and what they are called where they are the bottleneck.
PARTS = {
    "compute": "compute",
    "loading": "decode on the model's cores",
    "loss": "loss (N^2)",
    "gather": "all-gather",
    "norms": "batch-norm sync",
    "reduce": "all-reduce",
}


def step_parts(work: Workload, machine: Machine, gpus: int) -> dict[str, float]:
    """Seconds of a step on so many GPUs, by PARTS (docs/scaling.md has them as a table)."""
    part = work.part(gpus)
    anchors = VIEWS * part
    compute = max(machine.launch_s, anchors * work.flops_per_view / machine.model_flops_per_s)
    loads = machine.device_patches_per_s is None
    exchange = 2 * machine.collective(gpus, _FLOAT * work.parameters)  # a reduce-scatter and an all-gather
    return {
        "compute": compute,
        "loading": part * machine.host_core_s / (machine.cores / machine.gpus) if loads else 0.0,
        # The similarities and both gradients, by `models.ntxent`, which keeps none and repeats none
        "loss": _LOSS_PRODUCTS * 2 * anchors * gpus * anchors * work.projection_dim / machine.loss_flops_per_s,
        "gather": 2 * machine.collective(gpus, work.gathered_bytes(gpus)),  # the embeddings out, their gradients back
        # For each batch norm statistics are gathered, and their gradients reduced: so few bytes that only hops count
        "norms": 3 * work.norms * machine.hops(gpus) if machine.sync_norms else 0.0,
        "reduce": max(0.0, exchange - machine.overlap * _BACKWARD * compute),  # begun while the backward pass still runs
    }


def limits(work: Workload, machine: Machine, gpus: int, patches: int) -> dict[str, float]:
    """Patches/s that each stage would let through by itself, all GPUs together, after the first epoch.

    Every node fetches every shard, whole, in every epoch, since each global batch is dealt to all nodes: from its disk where the
    set is larger than half of its memory, and from the store where it is larger than its disk.
    """
    nodes, size = machine.nodes(gpus), patches * work.bytes_per_patch
    found = {"the step": gpus * work.part(gpus) / sum(step_parts(work, machine, gpus).values())}
    if machine.device_patches_per_s is not None:
        found["decode on the GPU"] = gpus * machine.device_patches_per_s
    found["the host"] = nodes * machine.cores / machine.host_core_s
    if size > _CACHED * machine.memory_bytes:
        found["a node's disk"] = nodes * machine.disk_bytes_per_s / work.bytes_per_patch
    if size > machine.disk_bytes:
        found["reading from storage"] = patches * machine.fetch_rate(gpus) / size
    return found


def predict(work: Workload, machine: Machine, gpus: int, patches: int) -> Record:
    """patches_per_s is the lowest of `limits`; an epoch takes patches / patches_per_s, and the first one as long as fetching the
    set to every node, if that is longer.

    bottleneck: the stage, or the longest part of the step where that is the step. efficiency: patches/s of a GPU, as a share of
    those of one GPU alone. network_bytes_per_s: of a node for gradients and embeddings, each way, 2 x (4 N D + 4 x parameters)
    (W - 1) / W bytes in a step. read_*: bytes/s and requests/s of all nodes, such that the first epoch takes no longer than the
    others. walls: what keeps the run from starting, or asks for a setting, in words.
    """
    stages, step = limits(work, machine, gpus, patches), step_parts(work, machine, gpus)
    lowest, nodes = min(stages, key=stages.__getitem__), machine.nodes(gpus)
    rate, size, batch = stages[lowest], patches * work.bytes_per_patch, gpus * work.part(gpus)
    alone = min(limits(work, machine, 1, patches).values())
    volume = 2 * (work.gathered_bytes(gpus) + _FLOAT * work.parameters) * (gpus - 1) / gpus if nodes > 1 else 0.0
    read = nodes * size * rate / patches
    return {
        "gpus": gpus,
        "nodes": nodes,
        "patches": patches,
        "batch": batch,
        "step": step,
        "limits": stages,
        "patches_per_s": rate,
        "bottleneck": PARTS[max(step, key=step.__getitem__)] if lowest == "the step" else lowest,
        "efficiency": rate / gpus / alone,
        "epoch_s": patches / rate,
        "first_epoch_s": max(patches / rate, size / machine.fetch_rate(gpus)),
        "network_bytes_per_s": volume * rate / batch,
        "read_bytes_per_s": read,
        "read_requests_per_s": read / REQUEST_BYTES,
        "walls": walls(work, machine, gpus, patches),
    }


def walls(work: Workload, machine: Machine, gpus: int, patches: int) -> list[str]:
    """What rules out so many patches whatever the speed: a batch larger than the set, memory for the manifest and for each rank's
    index, shards that are open, and the size of the disk."""
    found = []
    batch, size = gpus * work.part(gpus), patches * work.bytes_per_patch
    if batch > patches:
        found.append(f"a batch of {batch:,.0f} is larger than the set")
    driver, ranks = patches * work.manifest_bytes, min(gpus, machine.gpus) * patches * work.index_bytes
    if driver > machine.memory_bytes:
        found.append(f"manifest: {driver / 1e9:,.0f} GB of memory where the run is started")
    if ranks > machine.memory_bytes:
        found.append(f"index: {ranks / 1e9:,.0f} GB of memory on each node")
    if size > machine.disk_bytes:
        found.append("larger than a node's disk: --shuffle-window and --cache-gib")
    elif size / work.shard_bytes > _MAPPINGS:
        shards = size / work.shard_bytes
        found.append(f"{shards:,.0f} shards, of which {_MAPPINGS:,} can be open: --shuffle-window or larger shards")
    return found


# ---- The constants: by field a value and its source ----


class Constant(NamedTuple):
    value: Any
    source: str


Constants = dict[str, Constant]
_YAML = yaml.safe_load((ROOT / "benchmarks" / "machines.yaml").read_text())
FIELDS: dict[str, str] = _YAML["fields"]


def constants_of(*sections: str) -> Constants:
    return {key: Constant(*pair) for name in sections for key, pair in _YAML[name].items()}


def workload(batch_per_gpu: int, largest_batch: int | None) -> tuple[Workload, Constants]:
    """ResNet-50 at 224 px."""
    given: dict[str, Any] = {"batch_per_gpu": batch_per_gpu, "largest_batch": largest_batch}
    found = constants_of("workload")
    work = Workload(**given, **{key: value for key, (value, _) in found.items()})
    source = "given on the command line, or its default"
    return work, found | {key: Constant(value, source) for key, value in given.items() if value is not None}


def machine(name: str, *, step: Record | None = None, loader: Record | None = None) -> tuple[Machine, Constants]:
    """One of MACHINES, or what a YAML file describes: fields of `Machine`, and `like`, one of MACHINES that has the others.

    step, loader: results of a GPU, which replace what is assumed of it. Raises ValueError for a name that is none, a file with
    other fields, and results that are not of ResNet-50 on a GPU.
    """
    given = {"like": name} if name in MACHINES else _read_machine(name)
    base = given.pop("like", "h200")
    found = constants_of(*(("joined", "cpu") if base == "cpu" else ("joined", "gpu", base)))
    found |= {key: Constant(value, f"given: {Path(name).name}") for key, value in given.items()}
    if step:
        timed, used = step["timed"], utilisation(step)
        if (timed["backbone"], timed["image_size"], timed["device"]) != (BACKBONE, IMAGE_SIZE, "cuda") or used is None:
            raise ValueError(f"--step: this is no result of {BACKBONE} at {IMAGE_SIZE} px on a GPU: make one with step.py")
        found["model_flops_per_s"] = Constant(used.flops, f"measured: step of {step['date']} on {used.gpu}")
    if loader:
        if loader["timed"].get("device") != "cuda" or "ours" not in loader["summary"]:
            raise ValueError("--loader: this is no result of our loader on a GPU: make one with loader.py --device cuda")
        rate = loader["summary"]["ours"]["patches_per_s"]
        found["device_patches_per_s"] = Constant(rate, f"measured: loader of {loader['date']}")
    values = {key: value for key, (value, _) in found.items()} | {"gpus": int(found["gpus"].value)}
    return Machine(name=Path(name).stem, sync_norms=base != "cpu", **values), found


def _read_machine(path: str) -> dict[str, Any]:
    try:
        given = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError):
        raise ValueError(f"--machines {path}: choose of {', '.join(MACHINES)}, or give a YAML file that describes one") from None
    given = given if isinstance(given, dict) else {}
    fields = {each.name for each in dataclasses.fields(Machine)} & FIELDS.keys()
    if unknown := sorted(given.keys() - fields - {"like"}):
        raise ValueError(f"{path}: a machine has no {unknown[0]!r}: choose of like, {', '.join(sorted(fields))}")
    if given.get("like", "h200") not in MACHINES:
        raise ValueError(f"{path}: like {given['like']!r}: choose of {', '.join(MACHINES)}")
    for key, value in given.items():
        if key != "like" and not (isinstance(value, int | float) and value >= 0):
            raise ValueError(f"{path}: {key} {value!r} is no number from 0 (YAML takes 1.0e9, not 1e9)")
    return given


def part_of(path: str, part: str) -> Record:
    """A result of step.py or loader.py by itself, or as that part of what `make gpu-bench` wrote. Raises ValueError where it is
    neither."""
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--{part} {path}: this is no file of results: {error}") from None
    found = record["parts"].get(part, {}).get("found") if "parts" in record and "runs" not in record else record
    if not found or "summary" not in found:
        raise ValueError(f"--{part} {path}: there is no finished result of benchmarks/{part}.py in it")
    return found


# ---- The command ----


@dataclass(frozen=True)
class Config:
    """Which machines, how many of them, and for how many patches."""

    machines: list[str] = option(list(MACHINES), f"of {', '.join(MACHINES)}, or YAML files that describe others")
    gpus: list[int] = option([1, 2, 4, 8, 16, 64, 256, 1024], "numbers of GPUs (on the machine cpu: of workers)")
    patches: list[int] = option([150_000, 1_500_000, 100_000_000, 1_000_000_000], "numbers of patches")
    batch_per_gpu: int = option(256, "patches of a GPU in a step, at most")
    largest_batch: int = option(8192, "patches of all GPUs in a step, at most (8192 is SimCLR's largest); 0: however many")
    step: str | None = option(None, "a GPU's result of benchmarks/step.py or `make gpu-bench`, for the one machine that is given")
    loader: str | None = option(None, "the same of benchmarks/loader.py")
    out: str = option("benchmarks/results", "folder for the results")
    check: bool = option(False, "measure one and two workers on this machine, and what the model says of them")
    work: str | None = option(None, "for --check: a folder to work in; drawn images, shard sets and runs stay there")
    rounds: int = option(3, "for --check: how often one and two workers run")


def main(config: Config) -> None:
    check_at_least(config, batch_per_gpu=1, largest_batch=0, rounds=1)
    for name in ("gpus", "patches"):
        check_at_least({name: min(getattr(config, name), default=0)}, **{name: 1})
    if (config.step or config.loader) and len(config.machines) != 1:
        raise ValueError("--step and --loader are one machine's results: say with --machines which one's")
    if config.check and config.work is None:
        raise ValueError("--check needs --work FOLDER, where drawn patches and runs stay")
    result = Result(config.out, "scale-check" if config.check else "scale", ["torch", "ray", "timm"])
    if config.check:
        import scale_check

        scale_check.check(result, Path(str(config.work)).resolve(), config.rounds)
        return
    report = report_of(result.record | predictions(config))
    # The columns that a terminal has room for
    brief: list[Block] = [
        Table([*each.header[:2], each.header[3], each.header[-1]], [[*row[:2], row[3], row[-1]] for row in each.rows])
        for each in report.blocks
        if isinstance(each, Table) and each.header[-1] == "first bottleneck"
    ]
    result.finish(report, show=[*brief, *(each for each in report.blocks if isinstance(each, str) and each.startswith("- "))])


def predictions(config: Config) -> Record:
    """For each machine its constants with their sources, and a prediction for each number of GPUs and patches; what a set takes
    whoever trains on it: bytes, shards, memory of its index and manifest, time to pack it."""
    work, constants = workload(config.batch_per_gpu, config.largest_batch or None)
    measured = {name: part_of(path, name) for name in ("step", "loader") if (path := getattr(config, name))}
    machines = []
    for name in config.machines:
        node, found = machine(name, **measured)
        rows = [predict(work, node, gpus, patches) for patches, gpus in itertools.product(config.patches, config.gpus)]
        machines.append({"name": node.name, "constants": _recorded(found), "predictions": rows})
    rate, source = constants_of("packing")["patches_per_core_s"]
    sets = [
        {
            "patches": count,
            "bytes": (size := count * work.bytes_per_patch),
            "shards": -(-size // work.shard_bytes),
            "index_bytes": count * work.index_bytes,
            "manifest_bytes": count * work.manifest_bytes,
            "fetch_requests": size / REQUEST_BYTES,
            "packing_core_hours": count / rate / 3600,
            "packing_source": source,
        }
        for count in config.patches
    ]
    return {"backbone": BACKBONE, "constants": _recorded(constants), "sets": sets, "machines": machines}


def _recorded(constants: Constants) -> Record:
    return {key: constants[key]._asdict() for key in FIELDS if key in constants}


# ---- The report ----


def report_of(record: Record) -> Report:
    header = [
        "patches",
        "stored",
        "shards",
        "index, each rank",
        "manifest, driver",
        "requests to fetch it",
        "packing, core hours",
    ]
    rows = []
    for each in record["sets"]:
        sizes = [_bytes(each[name]) for name in ("bytes", "index_bytes", "manifest_bytes")]
        requests, hours = f"{each['fetch_requests']:,.0f}", _number(each["packing_core_hours"])
        rows.append([_count(each["patches"]), sizes[0], f"{each['shards']:,.0f}", *sizes[1:], requests, hours])
    blocks: list[Block] = [
        f"Predicted, not measured: SimCLR of {record['backbone']} at 224 px, by the formulas of `benchmarks/scale.py`. Each"
        " constant has its source below; what is assumed was measured by nobody here. The first epoch also fetches the set from"
        " the object store to every node. Read and requests/s: such that the first epoch takes no longer than the others. First"
        " bottleneck: what would have to be faster first. Below each table: what keeps a set from being used as it is.",
        "## What a set takes",
        Table(header, rows),
        f"Packing: {record['sets'][0]['packing_source']}, every patch decoded. Sizes are of 10^3, 10^6, ... bytes.",
    ]
    for each in record["machines"]:
        blocks += [f"## {each['name']}", _prediction_table(each), *_wall_lines(each), _step_table(each)]
        blocks += [_constants_table(f"{each['name']}: constant", each["constants"])]
    blocks += ["## The workload", _constants_table("constant", record["constants"])]
    return Report(record, "Pretraining at scale: a cost model", blocks)


def _prediction_table(node: Record) -> Table:
    """A row for each number of patches and of GPUs."""
    header = [f"{node['name']}: patches, GPUs", "patches/s", "per GPU / one alone", "an epoch", "the first one"]
    header += ["network of a node", "read, all nodes", "requests/s", "first bottleneck"]
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
    header = [f"{node['name']}: GPUs", "nodes", "batch", *(f"{name}, ms" for name in PARTS.values()), "step, ms"]
    rows = []
    for each in node["predictions"]:
        if each["patches"] == node["predictions"][0]["patches"]:
            times = [*each["step"].values()]
            counts = [f"{each['gpus']:,}", f"{each['nodes']:,}", f"{each['batch']:,.0f}"]
            rows.append([*counts, *(_number(1000 * seconds) for seconds in (*times, sum(times)))])
    return Table(header, rows)


def _constants_table(title: str, constants: Record) -> Table:
    rows = [[FIELDS[name], _number(each["value"]), each["source"]] for name, each in constants.items()]
    return Table([title, "value", "where from"], rows)


def _number(value: float) -> str:
    return number(value) if value == 0 or 1e-3 <= abs(value) < 1e6 else f"{value:.3g}"


def _scaled(value: float, units: dict[float, str], form: str) -> str:
    """In the largest unit that it reaches."""
    size, unit = next(((size, unit) for size, unit in units.items() if value >= size), (1, units[1]))
    return f"{value / size:{form}}{unit}"


def _count(patches: int) -> str:
    return _scaled(patches, {1e9: " billion", 1e6: " million", 1e3: " thousand", 1: ""}, "g")


def _bytes(value: float) -> str:
    return _scaled(value, {1e15: " PB", 1e12: " TB", 1e9: " GB", 1e6: " MB", 1e3: " kB", 1: " B"}, ".3g")


def _duration(seconds: float) -> str:
    return _scaled(seconds, {86400: " d", 3600: " h", 60: " min", 1: " s"}, ",.3g")


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
