"""What each worker gets of a cluster, counted by hand and by trying."""

import pytest
from hypothesis import given
from hypothesis import strategies as st

from train.cluster.resources import NodeResources, WorkerResources, resources_per_worker


def shares(nodes, least, most=None, gpus=None, cpus=0):
    return resources_per_worker([NodeResources(*node) for node in nodes], least, most or least, gpus, cpus, workers="N")


@pytest.mark.parametrize(
    ("nodes", "least", "most", "gpus", "expected"),
    [
        ([(2, 0)], 1, 1, None, WorkerResources(2, 0)),
        ([(2, 0)], 2, 2, None, WorkerResources(1, 0)),
        ([(16, 2)], 2, 2, None, WorkerResources(8, 1)),
        ([(16, 2)], 1, 1, None, WorkerResources(16, 1)),
        ([(32, 0), (8, 1), (8, 1)], 2, 2, None, WorkerResources(8, 1)),  # the head's 32 cores are no node's that has a GPU
        ([(8, 1), (4, 1)], 2, 2, None, WorkerResources(4, 1)),  # the smaller node decides
        ([(8, 1), (4, 1)], 1, 1, None, WorkerResources(8, 1)),
        ([(16, 2)], 2, 8, None, WorkerResources(8, 1)),  # as many as there are now
        ([(16, 2)], 2, 2, 0, WorkerResources(8, 0)),
        ([(16, 1)], 1, 1, 0.25, WorkerResources(16, 0.25)),
        ([(3, 0), (3, 0)], 4, 4, None, WorkerResources(1, 0)),
        ([(5, 0)], 2, 2, None, WorkerResources(2, 0)),
    ],
)
def test_shares_by_hand(nodes, least, most, gpus, expected):
    assert shares(nodes, least, most, gpus) == expected


@pytest.mark.parametrize(
    ("nodes", "least", "most", "gpus", "words"),
    [
        ([(2, 0)], 3, 3, None, "--workers N: the cluster has 2 CPUs, and each worker takes at least one"),
        ([(64, 0), (8, 2)], 3, 3, None, "--workers N: the cluster has 2 GPUs, and each worker takes one"),
        ([(64, 0)], 1, 1, 1, "--workers N: the cluster has 0 GPUs, and each worker takes one"),
        ([(64, 0)], 1, 1, 0.5, "--workers N: the cluster has 0 GPUs, and each worker takes 0.5 of them"),
        ([(8, 2)], 2, 2, 0.5, "workers of one run cannot share a GPU; give --workers 1"),
        ([(8, 2)], 1, 2, 0.5, "workers of one run cannot share a GPU; give --workers 1"),
        ([(8, 2)], 1, 1, 2, "--gpus-per-worker 2: give 0"),
        ([(8, 2)], 1, 1, -1, "--gpus-per-worker -1: give 0"),
    ],
)
def test_what_does_not_fit_is_told(nodes, least, most, gpus, words):
    with pytest.raises(ValueError, match=words):
        shares(nodes, least, most, gpus)


@given(
    nodes=st.lists(st.tuples(st.integers(1, 12), st.integers(0, 4)), min_size=1, max_size=5),
    most=st.integers(1, 8),
)
def test_so_many_workers_fit_and_with_a_core_more_each_they_would_not(nodes, most):
    share = shares(nodes, 1, most)

    def room(cpus):  # worker by worker, on the first node that has room
        left = [list(node) for node in nodes]
        placed = 0
        while node := next((n for n in left if n[0] >= cpus and n[1] >= share.gpus), None):
            node[0] -= cpus
            node[1] -= share.gpus
            placed += 1
        return placed

    wanted = min(most, room(1))
    assert room(share.cpus) >= wanted > room(share.cpus + 1) or (wanted == room(share.cpus) == 0)
    assert share.gpus == float(any(gpus for _, gpus in nodes))


def test_cores_as_asked_for():
    assert shares([(16, 2)], 2, cpus=3) == WorkerResources(3, 1)
    assert shares([(16, 0), (4, 0)], 2, 8, cpus=4) == WorkerResources(4, 0)
    with pytest.raises(ValueError, match="the cluster has 2 GPUs, and each worker takes one and 9 of its 16 CPUs"):
        shares([(16, 2)], 2, cpus=9)
    with pytest.raises(ValueError, match="--cpus-per-worker -1"):
        shares([(16, 2)], 2, cpus=-1)
