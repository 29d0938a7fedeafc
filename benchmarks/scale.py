"""How many GPUs and which storage for so many patches? A cost model of SimCLR pretraining, on the constants of machines.yaml.

    python benchmarks/scale.py                                              # on a CPU, on A100 and on H200
    python benchmarks/scale.py --machines h200 --measured BENCH.json        # with what `make gpu-bench` has measured
    python benchmarks/scale.py --machines my_cluster.yaml                   # a machine of one's own
    python benchmarks/scale.py --check --work DISK/bench                    # against one and two real workers on this machine

For every number of GPUs and of patches: patches/s, time per epoch, what the network and the storage have to give, and the first
bottleneck. Results: <out>/<date>-scale.json and .md; of the check <date>-scale-check.json and .md (scale_check.py).
"""

import itertools
import math
from dataclasses import dataclass
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import yaml
from harness import Result, check_at_least, script
from report import Block, Record, Report, Table, number
from step import utilisation
from worker import ROOT

from sharding.cli import option
from train.records.json_files import read_json

BACKBONE, IMAGE_SIZE, VIEWS = "resnet50", 224, 2
MACHINES = ("cpu", "a100", "h200")
STREAMS = 4  # shards that a rank fetches at once: pipelines.shard_cache.RemoteSet's `parallel`
REQUEST_BYTES = 8 * 2**20  # of one of its requests
_FLOAT = 4  # bytes; gradients, weights and embeddings are float32
_BACKWARD = 2 / 3  # of a step's computing, during which gradients are reduced
_LOSS_PRODUCTS = 3  # of M x D by D x N: the similarities, and the gradients of both sides
_MAPPINGS = 65_530  # that Linux lets a process have (vm.max_map_count), of which each shard that is open takes one
_CACHED = 0.5  # of a node's memory, that its page cache may have; the rest is the ranks'

# The parts of a step, and what they are called where they are the bottleneck.
PARTS = {
    "compute": "compute",
    "loading": "decode on the model's cores",
    "loss": "loss (N^2)",
    "gather": "all-gather",
    "norms": "batch-norm sync",
    "reduce": "all-reduce",
}


class CostModel(SimpleNamespace):
    """What is trained and on which machine: an attribute for each constant, as `fields` in machines.yaml describes them.

    W ranks (GPUs), V = 2 views of a patch, B patches of a rank in a step, D width of the projection, M = V B anchors of a rank,
    N = W M anchors of all. Times in seconds, volumes in bytes, rates in units per second.
    """

    device_patches_per_s = None  # where the model's own cores decode and augment, which then takes its time from the model
    largest_batch = None  # however large

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.gpus)

    def part(self, gpus: int) -> float:
        """B, patches of a rank in a step; a fraction where the GPUs outnumber the largest batch."""
        return self.batch_per_gpu if self.largest_batch is None else min(self.batch_per_gpu, self.largest_batch / gpus)

    def gathered_bytes(self, gpus: int) -> float:
        """Of all ranks' embeddings: 4 N D."""
        return _FLOAT * VIEWS * self.part(gpus) * gpus * self.projection_dim

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

    def step_parts(self, gpus: int) -> dict[str, float]:
        """Seconds of a step on so many GPUs, by PARTS, which come one after the other (docs/scaling.md has them as a table)."""
        part = self.part(gpus)
        anchors = VIEWS * part
        compute = max(self.launch_s, anchors * self.flops_per_view / self.model_flops_per_s)
        loads = self.device_patches_per_s is None
        exchange = 2 * self.collective(gpus, _FLOAT * self.parameters)  # a reduce-scatter and an all-gather
        return {
            "compute": compute,
            "loading": part * self.host_core_s / (self.cores / self.gpus) if loads else 0.0,
            # The similarities and both gradients, by `models.ntxent`, which keeps none and repeats none
            "loss": _LOSS_PRODUCTS * 2 * anchors * gpus * anchors * self.projection_dim / self.loss_flops_per_s,
            "gather": 2 * self.collective(gpus, self.gathered_bytes(gpus)),  # the embeddings out, their gradients back
            # For each batch norm statistics are gathered, and their gradients reduced: so few bytes that only hops count
            "norms": 3 * self.norms * self.hops(gpus) * self.sync_norms,
            "reduce": max(0.0, exchange - self.overlap * _BACKWARD * compute),  # begun while the backward pass still runs
        }

    def limits(self, gpus: int, patches: int) -> dict[str, float]:
        """Patches/s that each stage would let through by itself, all GPUs together, after the first epoch. Patches are read and
        decoded at the same time, so the rate of the whole is the lowest, and that stage is the bottleneck.

        Every node fetches every shard, whole, in every epoch, since each global batch is dealt to all nodes: from its disk where
        the set is larger than half of its memory, and from the store where it is larger than its disk.
        """
        nodes, size = self.nodes(gpus), patches * self.bytes_per_patch
        found = {"the step": gpus * self.part(gpus) / sum(self.step_parts(gpus).values())}
        if self.device_patches_per_s is not None:
            found["decode on the GPU"] = gpus * self.device_patches_per_s
        found["the host"] = nodes * self.cores / self.host_core_s
        if size > _CACHED * self.memory_bytes:
            found["a node's disk"] = nodes * self.disk_bytes_per_s / self.bytes_per_patch
        if size > self.disk_bytes:
            found["reading from storage"] = patches * self.fetch_rate(gpus) / size
        return found

    def predict(self, gpus: int, patches: int) -> Record:
        """patches_per_s is the lowest of `limits`; an epoch takes patches / patches_per_s, and the first one as long as fetching
        the set to every node, if that is longer.

        bottleneck: the stage, or the longest part of the step where that is the step. efficiency: patches/s of a GPU, as a share
        of those of one GPU alone. network_bytes_per_s: of a node for gradients and embeddings, each way, 2 x (4 N D + 4 x
        parameters) (W - 1) / W bytes in a step. read_*: bytes/s and requests/s of all nodes, such that the first epoch takes no
        longer than the others.
        """
        stages, step = self.limits(gpus, patches), self.step_parts(gpus)
        lowest, nodes = min(stages, key=stages.__getitem__), self.nodes(gpus)
        rate, size, batch = stages[lowest], patches * self.bytes_per_patch, gpus * self.part(gpus)
        alone = min(self.limits(1, patches).values())
        volume = 2 * (self.gathered_bytes(gpus) + _FLOAT * self.parameters) * (gpus - 1) / gpus if nodes > 1 else 0.0
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
            "first_epoch_s": max(patches / rate, size / self.fetch_rate(gpus)),
            "network_bytes_per_s": volume * rate / batch,
            "read_bytes_per_s": read,
            "read_requests_per_s": read / REQUEST_BYTES,
            "walls": self.walls(gpus, patches),
        }

    def walls(self, gpus: int, patches: int) -> list[str]:
        """What keeps so many patches from being used as they are, whatever the speed: a batch larger than the set, memory for the
        manifest and for each rank's index, shards that are open, and the size of the disk."""
        found = []
        batch, size = gpus * self.part(gpus), patches * self.bytes_per_patch
        if batch > patches:
            found.append(f"a batch of {batch:,.0f} is larger than the set")
        driver, ranks = patches * self.manifest_bytes, min(gpus, self.gpus) * patches * self.index_bytes
        if driver > self.memory_bytes:
            found.append(f"manifest: {driver / 1e9:,.0f} GB of memory where the run is started")
        if ranks > self.memory_bytes:
            found.append(f"index: {ranks / 1e9:,.0f} GB of memory on each node")
        if size > self.disk_bytes:
            found.append("larger than a node's disk: --shuffle-window and --cache-gib")
        elif size / self.shard_bytes > _MAPPINGS:
            shards = size / self.shard_bytes
            found.append(f"{shards:,.0f} shards, of which {_MAPPINGS:,} can be open: --shuffle-window or larger shards")
        return found


# ---- The constants ----

Constants = dict[str, Record]  # by field its value and its source
_YAML = yaml.safe_load((ROOT / "benchmarks" / "machines.yaml").read_text())
FIELDS: dict[str, str] = _YAML["fields"]


def constants_of(*sections: str) -> Constants:
    return {key: _constant(*pair) for name in sections for key, pair in _YAML[name].items()}


def _constant(value: Any, source: str) -> Record:
    return {"value": value, "source": source}


def machine(name: str) -> Constants:
    """One of MACHINES, or what a YAML file describes: some of the constants, and `like`, one of MACHINES that has the others.
    Raises ValueError for a name that is none, and for a file with anything else."""
    given = {"like": name} if name in MACHINES else _read_yaml(name)
    base = given.pop("like", "h200")
    if base not in MACHINES:
        raise ValueError(f"{name}: like {base!r}: choose of {', '.join(MACHINES)}")
    found = constants_of("joined", *(("cpu",) if base == "cpu" else ("gpu", base)))
    for key, value in given.items():
        if key not in found:
            raise ValueError(f"{name}: a machine has no {key!r}: choose of like, {', '.join(found)}")
        if not (isinstance(value, int | float) and value >= 0):
            raise ValueError(f"{name}: {key} {value!r} is no number from 0 (YAML takes 1.0e9, not 1e9)")
        found[key] = _constant(value, f"given: {Path(name).name}")
    return found


def _read_yaml(path: str) -> dict[str, Any]:
    try:
        return dict(yaml.safe_load(Path(path).read_text()))
    except (OSError, TypeError, ValueError, yaml.YAMLError):
        raise ValueError(f"--machines {path}: choose of {', '.join(MACHINES)}, or give a YAML file that describes one") from None


def measured_on_gpu(path: str) -> Constants:
    """What `make gpu-bench` has measured of that which is otherwise assumed. Raises ValueError for a result without any of it."""
    parts = read_json(Path(path), "give a result of `make gpu-bench`").get("parts", {})
    step, loader = (parts.get(name, {}).get("found", {}) for name in ("step", "loader"))
    found: Constants = {}
    of_model = step.get("timed", {}).items() >= {"backbone": BACKBONE, "image_size": IMAGE_SIZE, "device": "cuda"}.items()
    if of_model and (used := utilisation(step)):
        found["model_flops_per_s"] = _constant(used.flops, f"measured: step of {step['date']} on {used.gpu}")
    if loader.get("timed", {}).get("device") == "cuda" and "ours" in loader.get("summary", {}):
        rate = loader["summary"]["ours"]["patches_per_s"]
        found["device_patches_per_s"] = _constant(rate, f"measured: loader of {loader['date']}")
    if not found:
        raise ValueError(f"--measured {path}: there is no step of {BACKBONE} at {IMAGE_SIZE} px and no loader on a GPU in it")
    return found


def cost_model(*constants: Constants) -> CostModel:
    return CostModel(**{key: each["value"] for found in constants for key, each in found.items()})


# ---- The command ----


@dataclass(frozen=True)
class Config:
    """Which machines, how many of them, and for how many patches."""

    machines: list[str] = option(list(MACHINES), f"of {', '.join(MACHINES)}, or YAML files that describe others")
    gpus: list[int] = option([1, 2, 4, 8, 16, 64, 256, 1024], "numbers of GPUs (on the machine cpu: of workers)")
    patches: list[int] = option([150_000, 1_500_000, 100_000_000, 1_000_000_000], "numbers of patches")
    largest_batch: int = option(8192, "patches of all GPUs in a step, at most (8192 is SimCLR's largest); 0: however many")
    measured: str | None = option(None, "a result of `make gpu-bench`, of the one machine that is given")
    out: str = option("benchmarks/results", "folder for the results")
    check: bool = option(False, "measure one and two workers on this machine, and what the model says of them")
    work: str | None = option(None, "for --check: a folder to work in; drawn images, shard sets and runs stay there")
    rounds: int = option(3, "for --check: how often one and two workers run")


def main(config: Config) -> None:
    check_at_least(config, largest_batch=0, rounds=1)
    for name in ("gpus", "patches"):
        check_at_least({name: min(getattr(config, name), default=0)}, **{name: 1})
    if config.measured and len(config.machines) != 1:
        raise ValueError("--measured is one machine's: say with --machines which one's")
    if config.check:
        if config.work is None:
            raise ValueError("--check needs --work FOLDER, where drawn patches and runs stay")
        import scale_check

        scale_check.check(Result(config.out, "scale-check", ["torch", "ray", "timm"]), Path(config.work).resolve(), config.rounds)
        return
    result = Result(config.out, "scale")
    report = report_of(result.record | predictions(config))
    result.finish(report, show=[each for each in report.blocks if isinstance(each, Table) and "first bottleneck" in each.header])


def predictions(config: Config) -> Record:
    """For each machine its constants with their sources, and a prediction for each number of GPUs and patches; what a set takes
    whoever trains on it: bytes, shards, memory of its index and manifest, time to pack it."""
    work = constants_of("workload")
    if config.largest_batch:
        work["largest_batch"] = _constant(config.largest_batch, "given on the command line, or its default")
    machines = []
    for name in config.machines:
        constants = machine(name) | (measured_on_gpu(config.measured) if config.measured else {})
        model = cost_model(work, constants)
        rows = [model.predict(gpus, patches) for patches, gpus in itertools.product(config.patches, config.gpus)]
        machines.append({"name": Path(name).stem, "constants": constants, "predictions": rows})
    of_work, packing = cost_model(work), constants_of("packing")["patches_per_core_s"]
    sets = [
        {
            "patches": count,
            "bytes": (size := count * of_work.bytes_per_patch),
            "shards": -(-size // of_work.shard_bytes),
            "index_bytes": count * of_work.index_bytes,
            "manifest_bytes": count * of_work.manifest_bytes,
            "packing_core_hours": count / packing["value"] / 3600,
            "packing_source": packing["source"],
        }
        for count in config.patches
    ]
    return {"backbone": BACKBONE, "constants": work, "sets": sets, "machines": machines}


# ---- The report ----

Columns = dict[str, tuple[str, float]]  # by title the name of a value and the unit that it is shown in
SETS: Columns = {
    "stored, GB": ("bytes", 1e9),
    "shards": ("shards", 1),
    "index in each rank, GB": ("index_bytes", 1e9),
    "manifest in the driver, GB": ("manifest_bytes", 1e9),
    "packing, core hours": ("packing_core_hours", 1),
}
SPEED: Columns = {"patches/s": ("patches_per_s", 1), "efficiency, %": ("efficiency", 0.01), "an epoch, min": ("epoch_s", 60)}
NEEDS: Columns = {
    "the first epoch, min": ("first_epoch_s", 60),
    "network of a node, GB/s": ("network_bytes_per_s", 1e9),
    "read by all nodes, GB/s": ("read_bytes_per_s", 1e9),
    "requests/s": ("read_requests_per_s", 1),
}


def report_of(record: Record) -> Report:
    blocks: list[Block] = [
        f"Predicted, not measured: SimCLR of {record['backbone']} at 224 px, by the formulas of `benchmarks/scale.py`. Each"
        " constant has its source below; what is assumed was measured by nobody here. Efficiency: patches/s of each GPU, as a"
        " share of those of one alone. First bottleneck: what would have to be faster first. The first epoch also fetches the"
        " set from the object store to every node. Read and requests/s: such that it takes no longer than the others. In the"
        " way: what keeps a set from being used as it is. A GB is 10^9 bytes.",
        "## What a set takes",
        Table(["patches", *SETS], [[f"{each['patches']:,}", *_cells(each, SETS)] for each in record["sets"]]),
        f"Packing: {record['sets'][0]['packing_source']}, every patch decoded.",
    ]
    for node in record["machines"]:
        rows = {f"{each['patches']:,}, {each['gpus']:,}": each for each in node["predictions"]}
        speed = [[title, *_cells(each, SPEED), each["bottleneck"]] for title, each in rows.items()]
        needs = [[title, *_cells(each, NEEDS), "; ".join(each["walls"])] for title, each in rows.items()]
        blocks += [f"## {node['name']}", Table(["patches, GPUs", *SPEED, "first bottleneck"], speed)]
        blocks += [Table(["patches, GPUs", *NEEDS, "in the way"], needs), _step_table(node), _constants_table(node["constants"])]
    blocks += ["## The workload", _constants_table(record["constants"])]
    return Report(record, "Pretraining at scale: a cost model", blocks)


def _cells(values: Record, columns: Columns) -> list[str]:
    return [number(values[name] / unit) for name, unit in columns.values()]


def _step_table(node: Record) -> Table:
    """Milliseconds of a step, part by part, for each number of GPUs; they do not depend on the number of patches."""
    by_gpus = {each["gpus"]: each for each in node["predictions"]}
    rows = [
        [f"{gpus:,}", f"{each['batch']:,.0f}", *(number(1000 * s) for s in (*each["step"].values(), sum(each["step"].values())))]
        for gpus, each in by_gpus.items()
    ]
    return Table(["GPUs", "batch", *(f"{name}, ms" for name in PARTS.values()), "step, ms"], rows)


def _constants_table(constants: Constants) -> Table:
    rows = [[FIELDS[name], f"{each['value']:.3g}", each["source"]] for name, each in constants.items()]
    return Table(["constant", "value", "where from"], rows)


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
