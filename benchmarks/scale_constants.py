"""The cost model's constants: what was measured, from the newest result file that has it, and what machines.yaml assumes."""

import dataclasses
import json
import statistics
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import yaml
from report import Record
from scale_model import Machine, Workload
from step import utilisation
from worker import ROOT

BACKBONE, IMAGE_SIZE = "resnet50", 224
MACHINES = ("cpu", "a100", "h200")


class Constant(NamedTuple):
    value: float
    source: str


_YAML = yaml.safe_load((ROOT / "benchmarks" / "machines.yaml").read_text())
FIELDS: dict[str, str] = _YAML["fields"]


def _assumed(*names: str) -> dict[str, Constant]:
    return {key: Constant(*pair) for name in names for key, pair in _YAML[name].items()}


def newest(results: Path, pattern: str, wanted: Callable[[Record], Any]) -> tuple[Record, str]:
    """The latest result of that name which has what is wanted, and its file's name. Raises ValueError where none has."""
    records = [(json.loads(path.read_text()), path.name) for path in results.glob(pattern)]
    found = [(record["date"], record["time"], name, record) for record, name in records if wanted(record)]
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
    flops = step["runs"]["model"][-1]["flops_per_step"] / 2 / step["timed"]["batch_size"]
    kilobytes, memory = real["images"]["kilobytes"], check["memory"]
    constants = _assumed("workload") | {
        "flops_per_view": Constant(flops, f"counted by torch: {step_name}"),
        "bytes_per_patch": Constant(1000 * kilobytes, f"measured: {real_name}, real patches of 224 px"),
        "index_bytes": Constant(memory["index_bytes"], f"measured: {check_name}"),
        "manifest_bytes": Constant(memory["manifest_bytes"], f"measured: {check_name}"),
    }
    given = dict.fromkeys(("batch_per_gpu", "largest_batch"), "given on the command line, or its default")
    values: dict[str, Any] = {name: constant.value for name, constant in constants.items()}
    sources = {name: constant.source for name, constant in constants.items()} | given
    return Workload(batch_per_gpu=batch_per_gpu, largest_batch=largest_batch, sources=sources, **values)


def packing_rate(results: Path) -> Constant:
    """Patches/s of sharding/build.py, every patch decoded, on one core."""
    record, name = newest(results, "*-packing*.json", lambda record: "ours-decode" in record.get("summary", {}))
    return Constant(record["summary"]["ours-decode"]["patches_per_s"] / record["machine"]["cores"], f"measured: {name}")


def machine(name: str, results: Path, *, step: Record | None = None, loader: Record | None = None) -> Machine:
    """One of MACHINES, or what a YAML file describes: fields of `Machine`, and `like`, one of MACHINES that has the others.

    step, loader: results of a GPU, which replace what is assumed of it. Raises ValueError for a name that is none, a file with
    other fields, and results that are not of ResNet-50 on a GPU.
    """
    given: dict[str, Any] = {}
    base = name
    if name not in MACHINES:
        given = _read_machine(name)
        base = given.pop("like", "h200")
    constants = _cpu(results) if base == "cpu" else _gpu(base, results)
    constants |= {key: Constant(value, f"given: {Path(name).name}") for key, value in given.items()}
    constants |= _from_step(step) if step else {}
    constants |= _from_loader(loader) if loader else {}
    values: dict[str, Any] = {key: constant.value for key, constant in constants.items()}
    values["gpus"] = int(values["gpus"])
    if base == "cpu":
        values["device_patches_per_s"] = None
    sources = {key: constant.source for key, constant in constants.items()}
    return Machine(name=Path(name).stem, sync_norms=base != "cpu", sources=sources, **values)


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


def _gpu(name: str, results: Path) -> dict[str, Constant]:
    loader, file = newest(results, "*-loader*.json", lambda record: record.get("parts"))
    ms = loader["parts"]["ms"]
    host = sum(ms[part] for part in ("reading", "drawing", "rows")) / 1000
    return _assumed("joined", "gpu", name) | {
        "host_core_s": Constant(host, f"measured on a CPU: {file}, reading and drawing"),
        "decode_core_s": Constant(ms["decoding"] / 1000, f"measured on a CPU: {file}, JPEG; a PNG takes longer"),
    }


def _cpu(results: Path) -> dict[str, Constant]:
    step, step_file = newest(results, "*-step-cpu*.json", _of_model)
    loader, loader_file = newest(results, "*-loader*.json", lambda record: record.get("parts"))
    loss, loss_file = newest(results, "*-ntxent-cpu*.json", lambda record: "ours" in record["runs"])
    used = utilisation(step)
    assert used is not None, step_file
    anchors = max(map(int, loss["runs"]["ours"]))
    seconds = statistics.median(run["seconds"] for run in loss["runs"]["ours"][str(anchors)])
    operations = 3 * 2 * anchors**2 * loss["timed"]["dim"]
    return _assumed("joined", "cpu") | {
        "cores": Constant(step["machine"]["cores"], f"measured on: {step_file}"),
        "memory_bytes": Constant(step["machine"]["memory_bytes"], f"measured on: {step_file}"),
        "model_flops_per_s": Constant(used.flops, f"measured: {step_file}"),
        "loss_flops_per_s": Constant(operations / seconds, f"measured: {loss_file}, 2N = {anchors:,}"),
        "host_core_s": Constant(loader["parts"]["ms"]["loader"] / 1000, f"measured: {loader_file}, the whole loader"),
    }


def _from_step(record: Record) -> dict[str, Constant]:
    used = utilisation(record)
    if record["timed"]["device"] != "cuda" or not _of_model(record) or used is None:
        raise ValueError(f"--step: this is no result of {BACKBONE} at {IMAGE_SIZE} px on a GPU: make one with benchmarks/step.py")
    return {"model_flops_per_s": Constant(used.flops, f"measured: step of {record['date']} on {used.gpu}")}


def _from_loader(record: Record) -> dict[str, Constant]:
    if record["timed"].get("device") != "cuda" or "ours" not in record["summary"]:
        raise ValueError("--loader: this is no result of our loader on a GPU: make one with benchmarks/loader.py --device cuda")
    rate = record["summary"]["ours"]["patches_per_s"]
    return {"device_patches_per_s": Constant(rate, f"measured: loader of {record['date']}")}


def all_sources(item: Workload | Machine) -> Mapping[str, Constant]:
    """Every constant with its source. One without is a mistake of ours."""
    found = {}
    for each in dataclasses.fields(item):
        value = getattr(item, each.name)
        if each.name in FIELDS and value is not None:
            assert each.name in item.sources, each.name
            found[each.name] = Constant(value, item.sources[each.name])
    return found
