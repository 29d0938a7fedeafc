"""A cluster of two nodes, on which a checkup finds all well; a run whose shards are not those that it began with, and a feature
pass over such shards.

python tests/train/cluster/two_nodes_checked.py SHARDS FOLDER     # prints the findings as JSON, and then what run and pass say
"""

import dataclasses
import json
import sys
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from sharding.manifest import fingerprint
from tests.train.cluster.test_launcher import make_job
from train.cluster.diagnostics import examine
from train.cluster.launcher import map_on_workers, run_job
from train.cluster.ray_cluster import NodeActors, connect, possible_nodes


def main(shards: Path, folder: Path) -> None:
    cluster = Cluster(initialize_head=True, head_node_args={"num_cpus": 1, "include_dashboard": False})
    cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    connect()
    given = {"workers": 2, "possible": possible_nodes(), "packages": ("torch", "ray"), "commit": ""}
    with NodeActors() as nodes:
        print(json.dumps(list(examine(nodes, data=str(shards), storage=str(folder / "runs"), **given))))
    job = make_job(folder / "run", shards)
    assert job.input.sets[0].fingerprint == fingerprint(shards)
    other = dataclasses.replace(job.input.sets[0], fingerprint="f" * 64)
    try:
        run_job(dataclasses.replace(job, input=dataclasses.replace(job.input, sets=(other,))), workers=2)
    except ValueError as error:
        print(error)
    try:
        for _ in map_on_workers(divmod, None, [1], sets=[(str(shards), "e" * 64)], workers=2):
            raise AssertionError("it was called")
    except ValueError as error:
        print(error)
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
