"""Where the cost model's constants come from: what was measured, by the file of results that has it, and what is assumed.

A source begins with "measured", "counted" (from the code) or "assumed". Nothing that is assumed was measured by anyone here.
"""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import step_report
import yaml
from scale_model import FIELDS, Machine, Workload

Record = dict[str, Any]

BACKBONE, IMAGE_SIZE = "resnet50", 224
_GBIT = 1e9 / 8
_USABLE = 0.8  # of a network's nominal rate
_S3 = "assumed: Amazon's guide to S3's performance, "


class Figure(NamedTuple):
    value: float
    source: str


def _assumed(value: float, why: str) -> Figure:
    return Figure(value, f"assumed: {why}")


# What no GPU of ours has measured, and what every machine is joined by.
_JOINED = {
    "network_bytes_per_s": _assumed(_USABLE * 100 * _GBIT, "100 Gbit/s Ethernet for each node, of which 80 % are usable"),
    "network_latency_s": _assumed(30e-6, "a small message between nodes over TCP or RoCE, with the library's own share"),
    "store_bytes_per_s": _assumed(200e9, "the store itself is not the limit before its requests are"),
    "store_requests_per_s": Figure(5500, _S3 + "5,500 GETs/s for one prefix"),
    "stream_bytes_per_s": Figure(85e6, _S3 + "85 to 90 MB/s for one request"),
}
_ON_GPU = {
    "launch_s": _assumed(5e-3, "about 1,000 kernels of a step at 5 us each, not compiled"),
    "link_latency_s": _assumed(10e-6, "a small message between GPUs of a node"),
    "overlap": _assumed(1.0, "DistributedDataParallel reduces while the backward pass runs"),
}
_A100_IMG = "2,470 img/s of ResNet-50 in mixed precision on an A100 of 80 GB (NVIDIA's DeepLearningExamples)"
_A100_FLOPS = 2470 * 24.3e9  # operations of an image as torch counts them
_H200: dict[str, Figure] = {
    "gpus": _assumed(8, "NVIDIA's data sheet of the DGX H200"),
    "cores": _assumed(112, "the same: two CPUs of 56 cores"),
    "memory_bytes": _assumed(2e12, "the same"),
    "disk_bytes": _assumed(30e12, "the same: eight NVMe disks of 3.84 TB"),
    "disk_bytes_per_s": _assumed(10e9, "random reads of 20 KB from eight NVMe disks, well below their data sheets' 4 KB rates"),
    "model_flops_per_s": _assumed(4.8 / 2.0 * _A100_FLOPS, _A100_IMG + ", times the data sheets' ratio of memory bandwidth"),
    "loss_flops_per_s": _assumed(30e12, "half of the data sheet's 67 TFLOP/s in float32"),
    "device_patches_per_s": _assumed(8000, "no vendor's figure for these steps; `make gpu-bench` measures it"),
    "link_bytes_per_s": _assumed(_USABLE * 450e9, "NVLink's 900 GB/s in the data sheet are both ways together; 80 % usable"),
}  # fmt: skip
_A100: dict[str, Figure] = {
    "gpus": _assumed(8, "NVIDIA's data sheet of the DGX A100"),
    "cores": _assumed(128, "the same: two CPUs of 64 cores"),
    "memory_bytes": _assumed(1e12, "the same"),
    "disk_bytes": _assumed(15e12, "the same: four NVMe disks of 3.84 TB"),
    "disk_bytes_per_s": _assumed(5e9, "random reads of 20 KB from four NVMe disks, well below their data sheets' 4 KB rates"),
    "model_flops_per_s": _assumed(_A100_FLOPS, _A100_IMG),
    "loss_flops_per_s": _assumed(10e12, "half of the data sheet's 19.5 TFLOP/s in float32"),
    "device_patches_per_s": _assumed(4000, "no vendor's figure for these steps; `make gpu-bench` measures it"),
    "link_bytes_per_s": _assumed(_USABLE * 300e9, "NVLink's 600 GB/s in the data sheet are both ways together; 80 % usable"),
}  # fmt: skip
_CPU: dict[str, Figure] = {
    "gpus": Figure(1, "counted: a worker for each node"),
    "disk_bytes": _assumed(200e9, "a small node's disk"),
    "disk_bytes_per_s": _assumed(0.5e9, "random reads of 20 KB from one NVMe disk"),
    "launch_s": Figure(0, "counted: a CPU starts no kernels"),
    "link_bytes_per_s": _assumed(_USABLE * 100 * _GBIT, "not used: a worker for each node"),
    "link_latency_s": _assumed(0, "not used: a worker for each node"),
    "overlap": _assumed(0.0, "the cores that reduce are the model's"),
}
MACHINES = ("cpu", "a100", "h200")


# ---- Results ----


def newest(results: Path, pattern: str, wanted: Callable[[Record], Any]) -> tuple[Record, str]:
    """The latest result of that name which has what is wanted, and its file's name. Raises ValueError where none has."""
    found = []
    for path in results.glob(pattern):
        record = json.loads(path.read_text())
        if wanted(record):
            found.append((record["date"], record["time"], path.name, record))
    if not found:
        raise ValueError(f"{results}: no {pattern} has the figures that the model needs; run that benchmark, or give --results")
    *_, name, record = max(found, key=lambda each: each[:3])
    return record, name


def part_of(path: str, part: str) -> Record:
    """A result of benchmarks/step.py or benchmarks/loader.py by itself, or as that part of what `make gpu-bench` wrote.

    Raises ValueError where it is neither.
    """
    try:
        record = json.loads(Path(path).read_text())
    except (OSError, ValueError) as error:
        raise ValueError(f"--{part} {path}: this is no file of results: {error}") from None
    found = record["parts"].get(part, {}).get("found") if "parts" in record and "runs" not in record else record
    if not found or "summary" not in found:
        raise ValueError(f"--{part} {path}: there is no finished result of benchmarks/{part}.py in it")
    return found


def _of_model(record: Record) -> bool:
    timed = record["timed"]
    return timed["backbone"] == BACKBONE and timed["image_size"] == IMAGE_SIZE and "model" in record.get("summary", {})


def workload(results: Path, *, batch_per_gpu: int, largest_batch: int | None) -> Workload:
    """ResNet-50 at 224 px. Raises ValueError where a result is missing."""
    step, step_name = newest(results, "*-step-cpu*.json", _of_model)
    real, real_name = newest(results, "*-loader*.json", lambda record: not record["images"]["drawn"])
    check, check_name = newest(results, "*-scale-check*.json", lambda record: record.get("memory"))
    run, timed = step["runs"]["model"][-1], step["timed"]
    figures = {
        "parameters": Figure(27_964_480, "counted: resnet50 of timm, and a projection of two layers to 128"),
        "norms": Figure(53, "counted: batch norms of resnet50"),
        "flops_per_view": Figure(run["flops_per_step"] / 2 / timed["batch_size"], f"counted by torch: {step_name}"),
        "bytes_per_patch": Figure(1000 * real["images"]["kilobytes"], f"measured: {real_name}, real patches of 224 px"),
        "projection_dim": Figure(128, "the default of train/pretrain.py"),
        "shard_bytes": Figure(128e6, "the default of sharding/build.py"),
        "index_bytes": Figure(check["memory"]["index_bytes"], f"measured: {check_name}"),
        "manifest_bytes": Figure(check["memory"]["manifest_bytes"], f"measured: {check_name}"),
    }
    values: dict[str, Any] = {name: figure.value for name, figure in figures.items()}
    sources = {name: figure.source for name, figure in figures.items()}
    sources |= dict.fromkeys(("batch_per_gpu", "largest_batch"), "given on the command line, or its default")
    values["projection_dim"] = 128
    return Workload(backbone=BACKBONE, batch_per_gpu=batch_per_gpu, largest_batch=largest_batch, sources=sources, **values)


class Packing(NamedTuple):
    """patches_per_core_s: of sharding/build.py, every patch decoded, on one core."""

    patches_per_core_s: float
    source: str


def packing(results: Path) -> Packing:
    record, name = newest(results, "*-packing*.json", lambda record: "ours-decode" in record.get("summary", {}))
    return Packing(record["summary"]["ours-decode"]["patches_per_s"] / record["machine"]["cores"], f"measured: {name}")


# ---- Machines ----


def machine(name: str, results: Path, *, step: Record | None = None, loader: Record | None = None) -> Machine:
    """One of MACHINES, or what a YAML file describes: fields of `Machine`, and `like`, one of MACHINES that has the others.

    step, loader: results of a GPU, whose figures replace what is assumed of it. Raises ValueError for a name that is none, a
    file with other fields, and results that are not of ResNet-50 on a GPU.
    """
    given: dict[str, Any] = {}
    base = name
    if name not in MACHINES:
        given = _read_machine(name)
        base = given.pop("like", "h200")
    figures = _cpu(results) if base == "cpu" else _gpu(base, results)
    figures |= {key: Figure(value, f"given: {Path(name).name}") for key, value in given.items()}
    if step:
        figures |= _from_step(step)
    if loader:
        figures |= _from_loader(loader)
    values: dict[str, Any] = {key: figure.value for key, figure in figures.items()}
    values["gpus"] = int(values["gpus"])
    sources = {key: figure.source for key, figure in figures.items()}
    on_gpu = base != "cpu"
    if not on_gpu:
        values["device_patches_per_s"] = None
    return Machine(name=Path(name).stem, sync_norms=on_gpu, sources=sources, **values)


def _read_machine(path: str) -> dict[str, Any]:
    try:
        given = yaml.safe_load(Path(path).read_text())
    except (OSError, yaml.YAMLError):
        raise ValueError(f"--machines {path}: choose of {', '.join(MACHINES)}, or give a YAML file that describes one") from None
    fields = {each.name for each in dataclasses.fields(Machine)} & FIELDS.keys()
    given = given if isinstance(given, dict) else {}
    if unknown := sorted(given.keys() - fields - {"like"}):
        raise ValueError(f"{path}: a machine has no {unknown[0]!r}: choose of like, {', '.join(sorted(fields))}")
    if given.get("like", "h200") not in MACHINES:
        raise ValueError(f"{path}: like {given['like']!r}: choose of {', '.join(MACHINES)}")
    for key, value in given.items():
        if key != "like" and not (isinstance(value, int | float) and value >= 0):
            raise ValueError(f"{path}: {key} {value!r} is no number from 0 (YAML takes 1.0e9, not 1e9)")
    return given


def _gpu(name: str, results: Path) -> dict[str, Figure]:
    loader, file = newest(results, "*-loader*.json", lambda record: record.get("parts"))
    ms = loader["parts"]["ms"]
    host = sum(ms[part] for part in ("reading", "drawing", "rows")) / 1000
    return {**_JOINED, **_ON_GPU, **(_H200 if name == "h200" else _A100)} | {
        "host_core_s": Figure(host, f"measured on a CPU: {file}, reading and drawing"),
        "decode_core_s": Figure(ms["decoding"] / 1000, f"measured on a CPU: {file}, JPEG; a PNG takes longer"),
    }


def _cpu(results: Path) -> dict[str, Figure]:
    step, step_file = newest(results, "*-step-cpu*.json", _of_model)
    loader, loader_file = newest(results, "*-loader*.json", lambda record: record.get("parts"))
    loss, loss_file = newest(results, "*-ntxent-cpu*.json", lambda record: "ours" in record["runs"])
    used = step_report.utilisation(step)
    assert used is not None, step_file
    anchors = max(map(int, loss["runs"]["ours"]))
    seconds = statistics.median(run["seconds"] for run in loss["runs"]["ours"][str(anchors)])
    return {**_JOINED, **_CPU} | {
        "cores": Figure(step["machine"]["cores"], f"measured on: {step_file}"),
        "memory_bytes": Figure(step["machine"]["memory_bytes"], f"measured on: {step_file}"),
        "network_bytes_per_s": _assumed(_USABLE * 10 * _GBIT, "10 Gbit/s Ethernet for each node, of which 80 % are usable"),
        "model_flops_per_s": Figure(used.flops, f"measured: {step_file}"),
        "loss_flops_per_s": Figure(
            3 * 2 * anchors**2 * loss["timed"]["dim"] / seconds, f"measured: {loss_file}, 2N = {anchors:,}"
        ),
        "host_core_s": Figure(loader["parts"]["ms"]["loader"] / 1000, f"measured: {loader_file}, the whole loader"),
        "decode_core_s": Figure(0, "counted: it is in the loader's"),
    }


def _from_step(record: Record) -> dict[str, Figure]:
    used = step_report.utilisation(record)
    if record["timed"]["device"] != "cuda" or not _of_model(record) or used is None:
        raise ValueError(f"--step: this is no result of {BACKBONE} at {IMAGE_SIZE} px on a GPU: make one with benchmarks/step.py")
    return {"model_flops_per_s": Figure(used.flops, f"measured: step of {record['date']} on {used.gpu}")}


def _from_loader(record: Record) -> dict[str, Figure]:
    if record["timed"].get("device") != "cuda" or "ours" not in record["summary"]:
        raise ValueError("--loader: this is no result of our loader on a GPU: make one with benchmarks/loader.py --device cuda")
    rate = record["summary"]["ours"]["patches_per_s"]
    return {"device_patches_per_s": Figure(rate, f"measured: loader of {record['date']}")}


def all_sources(item: Workload | Machine) -> Mapping[str, Figure]:
    """Every constant with its source. A figure without one is a mistake of ours."""
    found = {}
    for each in dataclasses.fields(item):
        value = getattr(item, each.name)
        if each.name in FIELDS and value is not None:
            assert each.name in item.sources, each.name
            found[each.name] = Figure(value, item.sources[each.name])
    return found
