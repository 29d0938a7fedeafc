"""How fast are two views of every patch made on the CPU: by ours, by torchvision on Pillow, and by DALI's own operators?

    python benchmarks/loader.py --work DISK/bench                         # 4,096 drawn patches of 224 px
    python benchmarks/loader.py --work DISK/bench --images data/breast    # a folder of real patches

All contenders run in turn, round by round (A B C A B C), each in a fresh process, on the same patches, in batches of the same
size, on the same cores, with the files in the page cache. What is timed is the steady state, by the clock on the wall: whole
batches, after the first ones, for at least `--seconds`, and as many as an epoch has or a multiple of that.

Two further measurements follow in processes of their own. `parts`: CPU milliseconds per patch of our loader and of each of its
parts, on one core with one thread, and from these the share of what the host does (reading and drawing). `memory`: what our
loader's process occupies at the end of each of ten short epochs, and the most at any time.

Results go to <out>/<date>-loader.json, written after every run, and at the end as tables to the same name's .md. A target that
was not reached is printed as MISSED; who could not run stands in the table with the reason, and then the exit code is 1.
"""

import dataclasses
import json
import shlex
import sys
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, NamedTuple

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

import loader_contenders  # noqa: E402
import loader_parts  # noqa: E402
from loader_contenders import CONTENDERS, Task  # noqa: E402
from loader_report import judged, markdown, tables, target_lines  # noqa: E402
from measuring import RunFailed, chosen, conclude, machine, new_path, run_fresh, versions_of  # noqa: E402
from packing_images import draw_images  # noqa: E402

from pipelines.shards import ShardReader  # noqa: E402
from sharding.command import option, required, run_script  # noqa: E402
from sharding.packing import build_shards  # noqa: E402
from sharding.workers import available_cores  # noqa: E402
from train.runs import code_commit, write_json  # noqa: E402

NAMES = (*CONTENDERS, "parts", "memory")
_QUALITY = 90  # of the drawn JPEGs: 22 KB at 224 px
_DISTINCT = 1000  # different pictures among the drawn ones, at most; the others differ in a comment of their header
_WARM = 2  # batches that are not timed, at least
_PART_SECONDS = 1.0  # of CPU time, at least, for each part and round
_PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "numba", "numpy")


@dataclass(frozen=True)
class Config:
    """Who makes views of what, and where."""

    work: str = required("a folder to work in: drawn images and the shard set stay there")
    out: str = option("benchmarks/results", "folder for the results")
    images: str | None = option(None, "a folder of real patches (JPEG or PNG) to use instead of drawn ones")
    patches: int = option(4096, "patches to draw")
    size: int = option(224, "side of the drawn patches and of all views, pixels")
    batch_size: int = option(256, "patches per batch")
    rounds: int = option(3, "how often each contender runs")
    contenders: list[str] = option([], f"only these of {', '.join(NAMES)} (default: all)")
    cores: int = option(0, "cores that every contender may use (0: all)")
    seconds: float = option(5.0, "how long each run is timed at least")
    memory_batches: list[int] = option([256, 1024], "the batch sizes at which memory is looked at")


def main(config: Config) -> None:
    names = chosen(config.contenders, NAMES)
    for name, least in (("rounds", 1), ("size", 1), ("batch_size", 1), ("patches", config.batch_size), ("cores", 0)):
        if getattr(config, name) < least:
            flag = name.replace("_", "-")
            raise ValueError(f"--{flag} {getattr(config, name)} is out of range: give at least {least}")
    cores = config.cores or available_cores()
    if cores > available_cores():
        raise ValueError(f"--cores {cores} is out of range: this process may use {available_cores()}")
    console = Console(highlight=False, soft_wrap=True)
    work = Path(config.work).resolve()
    work.mkdir(parents=True, exist_ok=True)
    started = machine(cores)
    reader, images = the_set(config, work, cores, console)
    task = the_task(config, reader, cores)
    path = new_path(Path(config.out), "loader")
    record: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d"),
        "time": time.strftime("%H:%M:%S%z"),
        "machine": started,
        "commit": code_commit(),
        "command": shlex.join(["python", *sys.argv]),
        "versions": versions_of(_PACKAGES),
        "images": images,
        "timed": dataclasses.asdict(task),
        "runs": {},
        "failed": {},
    }
    for job in jobs(config, names, task):
        runs = record["runs"].setdefault(job.key, [])
        if job.key in record["failed"]:
            continue
        try:
            runs.append(one_run(job, work))
            console.print(f"{job.title}: {_shown(job, runs[-1])}", markup=False)
        except RunFailed as error:  # the others' figures are worth having; the exit code tells
            record["failed"][job.key] = str(error)
            console.print(f"{job.title}: FAILED: {error}", markup=False)
        write_json(path, record)
    record |= judged(record)
    conclude(
        record,
        path,
        console,
        markdown=markdown(record),
        tables=((header, rows) for _, header, rows in tables(record)),
        lines=target_lines(record),
    )


def the_set(config: Config, work: Path, cores: int, console: Console) -> tuple[ShardReader, dict[str, Any]]:
    """The shard set of the images, built where it is not there, and what is to be said of it. All of it is read once.

    Raises ValueError for a folder that is not there or holds too few images.
    """
    if config.images is not None:
        folder = Path(config.images).resolve()
        if not folder.is_dir():
            raise ValueError(f"--images {config.images}: there is no such folder")
    else:
        console.print(f"drawing {config.patches:,} patches, unless they are there", markup=False)
        distinct = min(_DISTINCT, config.patches)
        folder = draw_images(work, patches=config.patches, size=config.size, distinct=distinct, quality=_QUALITY, workers=cores)
    built = build_shards([folder], work / f"{folder.name}-shards", unlabelled=True, workers=cores)
    reader = ShardReader(built.out)
    if len(reader) < config.batch_size:
        raise ValueError(f"{folder}: {len(reader):,} patches are fewer than --batch-size {config.batch_size}: make that smaller")
    kilobytes = float(reader.manifest["size"].to_numpy().mean()) / 1e3
    console.print(f"{len(reader):,} patches of {kilobytes:.1f} KB; {built.quarantined:,} files left out", markup=False)
    for path in (*reader.manifest["source"].to_pylist(), *built.out.iterdir()):
        Path(path).read_bytes()  # so that every contender finds it in memory
    return reader, {
        "patches": len(reader),
        "kilobytes": kilobytes,
        "left_out": built.quarantined,
        "drawn": config.images is None,
    }


def the_task(config: Config, reader: ShardReader, cores: int) -> Task:
    """Of a contender. Both numbers of batches divide by the cores, so that of torchvision's workers, which make a batch each, no
    one has more to do than the others."""
    return Task(
        shards=str(reader.folder),
        cores=cores,
        batch_size=config.batch_size,
        image_size=config.size,
        warm=_divisible(_WARM, cores),
        lap=_divisible(len(reader) // config.batch_size, cores),
        seconds=config.seconds,
        rounds=config.rounds,
    )


def _divisible(least: int, by: int) -> int:
    return -(-least // by) * by


class Job(NamedTuple):
    """A process: the script that it runs, and by what name it does so. key: what its figures are kept under."""

    title: str
    script: ModuleType
    name: str
    task: Task
    key: str


def jobs(config: Config, names: Sequence[str], task: Task) -> Iterator[Job]:
    """In their order."""
    for number in range(1, config.rounds + 1):
        for name in names:
            if name in CONTENDERS:
                yield Job(f"round {number}: {name}", loader_contenders, name, task, name)
    if "parts" in names:
        alone = dataclasses.replace(task, cores=1, seconds=min(_PART_SECONDS, config.seconds))
        yield Job("parts", loader_parts, "parts", alone, "parts")
    if "memory" in names:
        for size in config.memory_batches:
            sized = dataclasses.replace(task, batch_size=size)
            yield Job(f"memory at batch {size:,}", loader_parts, "memory", sized, f"memory {size}")


def one_run(job: Job, work: Path) -> dict[str, Any]:
    """What it reports. Raises RunFailed."""
    result, load = work / "result.json", machine(job.task.cores)["load"][0]
    result.unlink(missing_ok=True)
    given = json.dumps(dataclasses.asdict(job.task))
    run_fresh([sys.executable, str(job.script.__file__), job.name, given, str(result)], work / "run.log")
    return {**json.loads(result.read_text()), "load_before": load}


def _shown(job: Job, found: dict[str, Any]) -> str:
    """A line for who waits; the tables say more."""
    if job.name in CONTENDERS:
        return f"{found['patches_per_s']:,.0f} patches/s"
    if job.name == "parts":
        return f"{found['ms']['loader'][-1]:.3f} CPU ms per patch"
    return f"{found['peak_bytes'] / 1e6:,.0f} MB at most"


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="loader.py", description=(__doc__ or "").splitlines()[0]))
