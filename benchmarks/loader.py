"""How fast are two views of every patch made: by ours, by torchvision on Pillow, and by DALI's own operators?

    python benchmarks/loader.py --work DISK/bench                         # 4,096 drawn patches of 224 px
    python benchmarks/loader.py --work DISK/bench --images data/breast    # a folder of real patches
    python benchmarks/loader.py --work DISK/bench --peers DISK/peers      # and other packages' loaders
    python benchmarks/loader.py --work DISK/bench --device cuda           # on a GPU, and others that work there

All contenders have the same patches in the page cache, batches of the same size and the same cores. The steady state is timed
by the wall clock: whole batches, after the first ones, for at least `--seconds`, and as many as an epoch (or `--lap`) has.

On the CPU two further measurements follow. `parts`: CPU milliseconds per patch of our loader and of each part, on one core,
and the share of the host's part (reading and drawing). `memory`: of our loader's process at the end of each of ten short epochs
at --batch-size.

Results: <out>/<date>-loader.json and .md, on a GPU <date>-loader-cuda.
"""

import dataclasses
import functools
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from contenders import loader_peers
from contenders.loader import CONTENDERS, LOADERS, PARTS, Task
from harness import Result, absent, check_at_least, chosen, cores_of, run_contender, script, settings_of
from patch_set import patch_set
from peers import LOADER_PEERS, Environment, environment_of
from report import (
    Block,
    Record,
    Report,
    Table,
    Target,
    images_line,
    judge,
    medians,
    missing_lines,
    number,
    ratio,
    rounds_table,
    summarise,
    target_lines,
)

from sharding.cli import option, required

ALL = LOADERS | loader_peers.CONTENDERS
NAMES = (*ALL, "parts", "memory")
_WARM = 2  # batches that are not timed, at least
_PART_SECONDS = 1.0  # of CPU time, at least, for each part and round
_PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "numba", "numpy")
_HOST = ("reading", "drawing")  # what the host does for every patch so that views are functions of their numbers
TARGETS = (
    Target("ours", "rate_to_torchvision", 4.0, "ours, its rate as a multiple of torchvision's"),
    Target("ours", "rate_to_dali", 1.0, "ours, its rate as a multiple of that of DALI's own operators"),
    Target("ours-blur", "time_to_ours", 2.0, "ours with blur, its time as a multiple of ours without", at_least=False),
    Target("parts", "share", 0.03, "reading and drawing, their share of the loader's CPU time", at_least=False),
    Target("parts", "patches_per_s", 60_000, "reading and drawing, patches/s on one core"),
    Target("memory", "growth", 1.05, "memory after the last epoch as a multiple of that after the second", at_least=False),
)
GPU_TARGETS = (Target("ours", "rate_to_decode", 0.8, "ours, its rate as a share of decoding alone"),)
_COMPARED = {"torchvision": "torchvision", "dali": "DALI", "decode": "decoding"}


@dataclass(frozen=True)
class Config:
    """Who makes views of what, and where."""

    work: str = required("a folder to work in: drawn images and the shard set stay there")
    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(None, "folder of environments for other packages, one each; made with pip where they are missing")
    images: str | None = option(None, "a folder of real patches (JPEG or PNG) to use instead of drawn ones")
    device: Literal["cpu", "cuda"] = option("cpu", "where the views are wanted")
    patches: int = option(4096, "patches to draw")
    size: int = option(224, "side of the drawn patches and of all views, pixels")
    batch_size: int = option(256, "patches per batch")
    rounds: int = option(3, "how often each contender runs")
    contenders: list[str] = option([], f"only these of {', '.join(NAMES)} (default: all of the device; with --peers, these too)")
    cores: int = option(0, "cores that every contender may use (0: all)")
    seconds: float = option(5.0, "how long each run is timed at least")
    lap: int | None = option(None, "batches, or a multiple of them, that are timed; default: as many as an epoch has")


def main(config: Config) -> None:
    others = [*loader_peers.CONTENDERS] if config.peers and config.device == "cpu" else []
    names = chosen(config.contenders or [*of_device(config.device), *others], NAMES)
    check_at_least(config, rounds=1, size=1, batch_size=1, patches=config.batch_size, lap=1)
    cores = cores_of(config.cores)
    result = Result(config.out, "loader-cuda" if config.device == "cuda" else "loader", _PACKAGES, cores=cores)
    environments = {name: environment_in(config.peers, name) for name in names if name in LOADER_PEERS}
    missing = absent(ALL, names)
    for environment in environments.values():
        missing |= environment.missing
        result.record["versions"] |= environment.versions
    names = result.leave_out(missing, names)
    result.say("drawing patches and packing them, unless they are there")
    sizes = {"patches": config.patches, "size": config.size, "batch_size": config.batch_size}
    data = patch_set(config.images, Path(config.work).resolve(), cores=cores, **sizes)
    task = task_of(config, data.shards, data.described["patches"], cores)
    result.record |= {"images": data.described, "timed": settings_of(task)}

    def measure(name: str) -> Record:
        module = "contenders.loader_peers" if name in LOADER_PEERS else "contenders.loader"
        python = environments[name].python if name in environments else sys.executable
        return run_contender(module, name, task, python=python)

    loaders = [name for name in names if name in ALL]
    result.rounds(loaders, config.rounds, measure, lambda run: f"{run['patches_per_s']:,.0f} patches/s")
    if "parts" in names:
        of_parts = dataclasses.replace(task, device="cpu", cores=1, seconds=min(_PART_SECONDS, config.seconds))
        job = functools.partial(run_contender, "contenders.loader", "parts", of_parts)
        result.take("parts", "parts", job, lambda run: f"{run['ms']['loader'][-1]:.3f} CPU ms per patch")
    if "memory" in names:
        job = functools.partial(run_contender, "contenders.loader", "memory", dataclasses.replace(task, device="cpu"))
        result.take("memory", "memory", job, lambda run: f"{run['peak_bytes'] / 1e6:,.0f} MB at most")
    result.finish(report_of(result.record))


def environment_in(folder: str | None, name: str) -> Environment:
    """The environment of that peer alone."""
    return environment_of(folder and str(Path(folder) / name), [name], LOADER_PEERS)


def of_device(device: str) -> list[str]:
    """Who is measured there unless others are asked for."""
    return [name for name, contender in CONTENDERS.items() if device in contender.devices]


def task_of(config: Config, shards: str, patches: int, cores: int) -> Task:
    """The timed batches divide by the cores: torchvision's workers make a batch each, and all as many."""
    lap = -(-(config.lap or patches // config.batch_size) // cores) * cores
    size = {"batch_size": config.batch_size, "image_size": config.size}
    return Task(shards, cores, **size, warm=_WARM, lap=lap, seconds=config.seconds, rounds=config.rounds, device=config.device)


# ---- The report ----


def summary_of(runs: dict[str, list[Record]]) -> Record:
    """A loader with blur is compared with torchvision and DALI with blur."""
    found: Record = {}
    for blur in ("", "-blur"):
        mine = {name: each for name, each in runs.items() if name in ALL and name.endswith("-blur") == bool(blur)}
        others = {"torchvision": f"torchvision{blur}", "dali": f"dali{blur}", "decode": "decode"}
        ratios = {f"rate_to_{key}": (other, "patches_per_s") for key, other in others.items()}
        found |= summarise(mine, "patches_per_s", ratios=ratios, among=runs)
    for name, row in found.items():
        row["time_to_ours"] = ratio(runs.get("ours"), runs[name], "patches_per_s")
    return found


def summarise_parts(found: dict[str, list[float]]) -> Record:
    """found: CPU milliseconds per patch by part and round. Medians over the rounds: of each part ("ms"), of what the whole loader
    takes beyond the sum of its parts ("rest_ms"), of the host's share of the whole ("share"), and the host's rate."""
    rounds: list[Record] = [dict(zip(found, times, strict=True)) for times in zip(*found.values(), strict=True)]
    for times in rounds:
        host = sum(times[name] for name in _HOST)
        rest = 2 * times["loader"] - sum(times.values())
        times |= {"rest_ms": rest, "share": host / times["loader"], "patches_per_s": 1000 / host}
    return {"ms": medians(rounds, *found), **medians(rounds, "rest_ms", "share", "patches_per_s")}


def summarise_memory(run: Record) -> Record:
    """Bytes at the end of the second and of the last epoch, the peak, and how much more the last has than the second."""
    second, last = run["resident_bytes"][1], run["resident_bytes"][-1]
    return {"second": second, "last": last, "peak": run["peak_bytes"], "growth": last / second}


def report_of(record: Record) -> Report:
    """Of a record of which some runs may be missing."""
    runs, timed = record["runs"], record["timed"]
    summary = summary_of(runs)
    parts = summarise_parts(runs["parts"][0]["ms"]) if runs.get("parts") else {}
    memory = summarise_memory(runs["memory"][0]) if runs.get("memory") else {}
    targets = judge(summary | {"parts": parts, "memory": memory}, GPU_TARGETS if timed["device"] == "cuda" else TARGETS)
    record = record | {"summary": summary, "parts": parts, "memory": memory, "targets": targets}
    blocks: list[Block] = [images_line(record["images"])]
    if any(name in ALL for name in runs):
        columns = {f"rate / {word}": (f"rate_to_{key}", ".2f") for key, word in _COMPARED.items()}
        columns["time / ours"] = ("time_to_ours", ".2f")
        titles = {name: contender.title for name, contender in ALL.items()}
        blocks += [
            f"Two views of {timed['image_size']} px on the {timed['device']}, batch {timed['batch_size']}. Patches/s of the"
            f" steady state: after {timed['warm']} batches, {timed['lap']} batches or a multiple of them that takes at least"
            f" {timed['seconds']:g} s; a fresh process each time, the rounds interleaved. Ratios are medians of the ratios within"
            " a round; with blur, against others with blur. Spread: from the slowest to the fastest round, as a share of the"
            " median.",
            rounds_table(record, titles, "patches_per_s", "patches/s", columns),
        ]
    if parts:
        ms = parts["ms"]
        times = {title: ms[name] for name, title in PARTS.items()} | {"everything else": parts["rest_ms"]}
        rows = [[title, f"{value:.4f}", f"{value / ms['loader']:.2%}"] for title, value in times.items()]
        text = "CPU time of all threads per patch, recipe simclr, on one core with one thread; medians over the rounds."
        blocks += [text, Table(["part", "CPU ms per patch", "share of the loader"], rows)]
    if memory:
        text = (
            "Resident memory (MB are 10^6 bytes; the mapped tars' pages are in it) of a process that runs the loader for ten"
            f" short epochs, recipe simclr, batch {timed['batch_size']:,}."
        )
        cells = [f"{memory[name] / 1e6:,.0f}" for name in ("second", "last", "peak")]
        blocks += [text, Table(["after epoch 2, MB", "after the last epoch, MB", "peak, MB"], [cells])]
    lines = target_lines(record, lambda value: number(value) if value >= 1000 else f"{value:.3g}")
    failed = [f"- {name}: FAILED: {record['failed'][name]}" for name in ("parts", "memory") if name in record["failed"]]
    return Report(record, "The loader", [*blocks, *lines, *failed, *missing_lines(record, ALL)])


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
