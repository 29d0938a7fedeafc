"""`ray down`, as typed on a laptop: the last that happens to the cluster of test_two_nodes and test_two_nodes_faults."""

import pytest

from tests.cluster.rig import missing

_MISSING = missing()
pytestmark = [
    pytest.mark.faults,
    pytest.mark.skipif(_MISSING is not None, reason=str(_MISSING)),
    pytest.mark.timeout(600),
]


def test_down_ends_the_head_and_the_documented_command_the_others(cluster):
    down = cluster.rig.here("ray", "down", cluster.file, "-y", timeout=120)
    assert down.returncode == 0, down.stdout
    running = "echo raylets $(pgrep -c raylet)"
    assert "raylets 0" in cluster.rig.on("head", running)
    stopped = cluster.rig.on("worker", "~/.patchclr/bin/ray stop")
    assert "Stopped" in stopped, stopped
    assert "raylets 0" in cluster.rig.on("worker", running)
