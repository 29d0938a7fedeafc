"""How fast are two views of every patch made: by ours, by torchvision on Pillow, and by DALI's own operators?

    python benchmarks/loader.py --work DISK/bench                         # 4,096 drawn patches of 224 px
    python benchmarks/loader.py --work DISK/bench --images data/breast    # a folder of real patches
    python benchmarks/loader.py --work DISK/bench --peers DISK/peers      # and other packages' loaders
    python benchmarks/loader.py --work DISK/bench --device cuda           # on a GPU, and others that work there

All contenders run in turn, round by round (A B C A B C), each in a fresh process, on the same patches, in batches of the same
size, on the same cores, with the files in the page cache. What is timed is the steady state, by the clock on the wall: whole
batches, after the first ones, for at least `--seconds`, and as many as an epoch (or `--lap`) has or a multiple of that.

On the CPU two further measurements follow in processes of their own. `parts`: CPU milliseconds per patch of our loader and of
each of its parts, on one core with one thread, and from these the share of what the host does (reading and drawing). `memory`:
what our loader's process occupies at the end of each of ten short epochs, and the most at any time.

Results go to <out>/<date>-loader.json (on a GPU <date>-loader-cuda.json), written after every run, and at the end as tables to
the same name's .md. A target that was not reached is printed as MISSED; who could not run stands in the table with the reason,
and then the exit code is 1.
"""

import dataclasses
import functools
import json
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import ModuleType
from typing import Any, Literal, NamedTuple

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

import loader_contenders  # noqa: E402
import loader_parts  # noqa: E402
import loader_peers  # noqa: E402
from loader_contenders import Task  # noqa: E402
from loader_peers import ALL, NOT_TO_BE_HAD, PEER_CONTENDERS, PEERS  # noqa: E402
from loader_report import completed, markdown, tables, target_lines  # noqa: E402
from measuring import absent, chosen, conclude, machine, new_path, record_of, run_fresh, settings_of, take, versions_of  # noqa: E402
from patch_set import patch_set  # noqa: E402
from step_peers import Environment, environment_of  # noqa: E402

from pipelines.shard_reader import ShardReader  # noqa: E402
from sharding.cli import option, required, run_script  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402

NAMES = (*ALL, "parts", "memory")
_WARM = 2  # batches that are not timed, at least
_PART_SECONDS = 1.0  # of CPU time, at least, for each part and round
_PACKAGES = ("torch", "torchvision", "pillow", "nvidia-dali-cuda130", "numba", "numpy")


@dataclass(frozen=True)
class Config:
    """Who makes views of what, and where."""

    work: str = required("a folder to work in: drawn images and the shard set stay there")
    out: str = option("benchmarks/results", "folder for the results")
    peers: str | None = option(
        None, "folder of environments for other packages, one each; made, with pip, where they are not there"
    )
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
    memory_batches: list[int] = option([256, 1024], "the batch sizes at which memory is looked at")


def main(config: Config) -> None:
    others = PEER_CONTENDERS if config.peers and config.device == "cpu" else ()
    names = chosen(config.contenders or [*of_device(config.device), *others], NAMES)
    for name, least in (("rounds", 1), ("size", 1), ("batch_size", 1), ("patches", config.batch_size), ("cores", 0), ("lap", 1)):
        value = getattr(config, name)
        if value is not None and value < least:
            raise ValueError(f"--{name.replace('_', '-')} {value} is out of range: give at least {least}")
    cores = config.cores or available_cores()
    if cores > available_cores():
        raise ValueError(f"--cores {cores} is out of range: this process may use {available_cores()}")
    console = Console(highlight=False, soft_wrap=True)
    work = Path(config.work).resolve()
    started = machine(cores)
    peers = {name: environments(config.peers, name) for name in names if name in PEERS}
    missing = absent({name: contender.needs for name, contender in ALL.items()}, names)
    for environment in peers.values():
        missing |= environment.missing
    names = [name for name in names if name not in missing]
    console.print("drawing patches and packing them, unless they are there")
    data = patch_set(
        config.images,
        work,
        patches=config.patches,
        size=config.size,
        batch_size=config.batch_size,
        cores=cores,
    )
    reader = ShardReader(data.shards)
    console.print(f"{len(reader):,} patches of {data.described['kilobytes']:.1f} KB", markup=False)
    task = the_task(config, reader, cores)
    path = new_path(Path(config.out), "loader-cuda" if config.device == "cuda" else "loader")
    record: dict[str, Any] = {
        **record_of(started, versions_of(_PACKAGES) | {name: v for each in peers.values() for name, v in each.versions.items()}),
        "images": data.described,
        "timed": settings_of(task),
        "runs": {},
        "missing": missing | (NOT_TO_BE_HAD if config.peers else {}),
        "failed": {},
    }
    for job in jobs(config, names, task):
        python = peers[job.name].python if job.name in peers else sys.executable
        measure = functools.partial(one_run, job, work, python)
        take(record, job.key, job.title, path, console, measure, functools.partial(_shown, job))
    record = completed(record)
    conclude(
        record,
        path,
        console,
        markdown=markdown(record),
        tables=((header, rows) for _, header, rows in tables(record)),
        lines=target_lines(record),
    )


def environments(folder: str | None, name: str) -> Environment:
    """The environment of that peer alone."""
    return environment_of(folder and str(Path(folder) / name), [name], PEERS)


def of_device(device: str) -> list[str]:
    """Who is measured there unless others are asked for."""
    names = [name for name, contender in ALL.items() if device in contender.devices]
    return [*names, "parts", "memory"] if device == "cpu" else names


def the_task(config: Config, reader: ShardReader, cores: int) -> Task:
    """Of a contender. Both numbers of batches divide by the cores, so that of torchvision's workers, which make a batch each, no
    one has more to do than the others."""
    return Task(
        shards=str(reader.folder),
        cores=cores,
        batch_size=config.batch_size,
        image_size=config.size,
        warm=_divisible(_WARM, cores),
        lap=_divisible(config.lap or len(reader) // config.batch_size, cores),
        seconds=config.seconds,
        rounds=config.rounds,
        device=config.device,
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
            if name in ALL:
                script = loader_peers if name in PEER_CONTENDERS else loader_contenders
                yield Job(f"round {number}: {name}", script, name, task, name)
    if "parts" in names:
        alone = dataclasses.replace(task, device="cpu", cores=1, seconds=min(_PART_SECONDS, config.seconds))
        yield Job("parts", loader_parts, "parts", alone, "parts")
    if "memory" in names:
        for size in config.memory_batches:
            sized = dataclasses.replace(task, device="cpu", batch_size=size)
            yield Job(f"memory at batch {size:,}", loader_parts, "memory", sized, f"memory {size}")


def one_run(job: Job, work: Path, python: str) -> dict[str, Any]:
    """What it reports. python: the interpreter that has what it needs. Raises RunFailed."""
    result, load = work / "result.json", machine(job.task.cores)["load"][0]
    result.unlink(missing_ok=True)
    given = json.dumps(dataclasses.asdict(job.task))
    run_fresh([python, str(job.script.__file__), job.name, given, str(result)], work / "run.log")
    return {**json.loads(result.read_text()), "load_before": load}


def _shown(job: Job, found: dict[str, Any]) -> str:
    """A line for who waits; the tables say more."""
    if job.name in ALL:
        return f"{found['patches_per_s']:,.0f} patches/s"
    if job.name == "parts":
        return f"{found['ms']['loader'][-1]:.3f} CPU ms per patch"
    return f"{found['peak_bytes'] / 1e6:,.0f} MB at most"


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="loader.py", description=(__doc__ or "").splitlines()[0]))
