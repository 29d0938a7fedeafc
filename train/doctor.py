"""Check whether a cluster is fit for a run: python train/doctor.py --data shards/kidney --storage /nfs/runs --workers 4"""

import sys
from dataclasses import dataclass

from sharding.cli import option, run_script
from train.config import WorkerRange


@dataclass(frozen=True)
class DoctorConfig:
    """The settings of the run."""

    data: str | None = option(None, "folder or URL of the shard set; default: decode a synthetic patch instead")
    storage: str = option("runs", "folder or URL of runs")
    workers: WorkerRange | int = option(0, "number of workers of the run; 0: do not check")


def main(config: DoctorConfig) -> None:
    from train.cluster.diagnostics import examine  # torch and Ray take seconds to import, and --help should not
    from train.cluster.ray_cluster import NodeActors, connect, possible_nodes
    from train.records.data import place_of
    from train.records.runs import code_commit, versions

    connect()
    failed = []
    with NodeActors() as nodes:
        for finding in examine(
            nodes,
            data=place_of(config.data) if config.data else None,
            storage=place_of(config.storage),
            workers=config.workers,
            possible=possible_nodes(),
            packages=tuple(versions()),
            commit=code_commit(),
        ):
            print(finding, flush=True)
            failed += [finding.check] * (finding.status == "FAILED")
    if failed:
        print(f"doctor.py: FAILED: {', '.join(failed)}", file=sys.stderr)
        sys.exit(1)


if __name__ == "__main__":
    sys.exit(run_script(main, DoctorConfig, prog="doctor.py", description="Check whether a cluster is fit for a run."))
