"""How many GPUs and which storage for so many patches? A cost model of SimCLR pretraining, from measured constants.

    python benchmarks/scale.py                                              # on a CPU, on A100 and on H200
    python benchmarks/scale.py --machines h200 --step STEP.json --loader LOADER.json   # with what a GPU host has measured
    python benchmarks/scale.py --machines my_cluster.yaml                   # a machine of one's own: see `machine`
    python benchmarks/scale.py --check --work DISK/bench                    # against one and two real workers on this machine

For every number of GPUs and of patches: patches/s, time per epoch, what the network and the storage have to give, and the first
bottleneck. The formulas are in scale_model.py, the constants in scale_constants.py; what is assumed is marked as that.

Results go to <out>/<date>-scale.json, its tables to .md and a plot to .png; of the check to <date>-scale-check.json and .md.
"""

import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.console import Console

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))  # the host may have the files alone, and not the project installed

import scale_check  # noqa: E402
import scale_report  # noqa: E402
from measuring import conclude, machine, new_path, record_of, versions_of  # noqa: E402
from scale_constants import MACHINES, all_sources, packing, part_of, workload  # noqa: E402
from scale_constants import machine as described  # noqa: E402
from scale_model import predict  # noqa: E402

from sharding.cli import option, run_script  # noqa: E402
from sharding.process_pool import available_cores  # noqa: E402
from train.records.runs import write_json  # noqa: E402

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
    _check_numbers(config)
    console = Console(highlight=False, soft_wrap=True)
    record: dict[str, Any] = {
        **record_of(machine(available_cores()), versions_of(["torch", "ray", "timm"])),
        "failed": {},
    }
    if config.check:
        if config.work is None:
            raise ValueError("--check needs --work FOLDER, where drawn patches and runs stay")
        path = new_path(Path(config.out), "scale-check")
        record = scale_check.check(record, Path(config.work).resolve(), config.rounds, lambda found: write_json(path, found))
        conclude(
            record,
            path,
            console,
            markdown=scale_check.markdown(record),
            tables=[scale_check.table(record)],
            lines=scale_check.lines(record),
        )
        return
    path = new_path(Path(config.out), "scale")
    record |= predictions(config)
    scale_report.plot(record, path.with_suffix(".png"))
    conclude(
        record,
        path,
        console,
        markdown=scale_report.markdown(record, path.with_suffix(".png").name),
        tables=[scale_report.short_table(each) for each in record["machines"]],
        lines=[line for each in record["machines"] for line in scale_report.wall_lines(each)],
    )


def predictions(config: Config) -> dict[str, Any]:
    """For each machine its constants with their sources, and a prediction for each number of GPUs and patches."""
    results = Path(config.results)
    work = workload(results, batch_per_gpu=config.batch_per_gpu, largest_batch=config.largest_batch or None)
    step = part_of(config.step, "step") if config.step else None
    loader = part_of(config.loader, "loader") if config.loader else None
    found = []
    for name in config.machines:
        node = described(name, results, step=step, loader=loader)
        predicted = [
            predict(work, node, gpus, patches, host_decode=config.host_decode)
            for patches in config.patches
            for gpus in config.gpus
        ]
        found.append(
            {
                "name": node.name,
                "constants": {key: figure._asdict() for key, figure in all_sources(node).items()},
                "predictions": [
                    each._asdict()
                    | {"step": each.step._asdict(), "limits": {limit.stage: limit.patches_per_s for limit in each.limits}}
                    for each in predicted
                ],
            }
        )
    return {
        "backbone": work.backbone,
        "host_decode": config.host_decode,
        "constants": {key: figure._asdict() for key, figure in all_sources(work).items()},
        "sets": scale_report.sets(work, packing(results), config.patches),
        "machines": found,
    }


def _check_numbers(config: Config) -> None:
    for name, least in (("batch_per_gpu", 1), ("largest_batch", 0), ("rounds", 1)):
        if getattr(config, name) < least:
            raise ValueError(f"--{name.replace('_', '-')} {getattr(config, name)} is out of range: give at least {least}")
    for name in ("gpus", "patches"):
        values = getattr(config, name)
        if not values or min(values) < 1:
            raise ValueError(f"--{name} {values}: give numbers from 1")
    if not 0 <= config.host_decode <= 1:
        raise ValueError(f"--host-decode {config.host_decode:g} is out of range: give a share from 0 to 1")
    if (config.step or config.loader) and len(config.machines) != 1:
        raise ValueError("--step and --loader are one machine's results: say with --machines which one's")


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="scale.py", description=(__doc__ or "").splitlines()[0]))
