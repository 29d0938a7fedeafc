"""A cluster of two nodes of one core each, of which the one without the driver dies in the middle of a run on both.

    python tests/train/cluster/two_nodes.py CONFIG.json     # of pretraining; workers is 1:2

Ends with exit code 0 when the run was finished by the node that is left.
"""

import json
import os
import sys
import threading
import time
from pathlib import Path

import ray
from ray.cluster_utils import Cluster

from train.cluster.ray_cluster import connect
from train.config import PretrainConfig
from train.records.runs import Run
from train.stages.pretraining import pretrain


def lose(cluster: Cluster, node, run: Run, lost: threading.Event) -> None:
    """Kill the node once two workers have taken a few steps."""
    while not (steps := [row["step"] for row in run.metrics()]) or steps[-1] < 3:
        time.sleep(0.02)
    assert json.loads((run.folder / "engine.json").read_text())["workers"] == 2
    cluster.remove_node(node, allow_graceful=False)
    lost.set()


def main(given: str) -> None:
    os.environ["RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S"] = "10"
    connect_settings = {"num_cpus": 1, "include_dashboard": False}
    cluster = Cluster(initialize_head=True, head_node_args=connect_settings)
    other = cluster.add_node(num_cpus=1)
    ray.init(address=cluster.address, log_to_driver=False)
    connect()
    config = PretrainConfig(**json.loads(given), workers="1:2")
    lost = threading.Event()
    run = Run(Path(config.storage) / config.name)
    threading.Thread(target=lose, args=(cluster, other, run, lost), daemon=True).start()
    pretrain(config)
    assert lost.is_set(), "the run ended before the node died"
    assert json.loads((run.folder / "engine.json").read_text())["workers"] == 1
    ray.shutdown()
    cluster.shutdown()


if __name__ == "__main__":
    main(sys.argv[1])
