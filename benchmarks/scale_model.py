"""A cost model of SimCLR pretraining: what limits it, for so many GPUs and so many patches.

W ranks (GPUs), V views of a patch, B patches of a rank in a step, D width of the projection, M = V B anchors of a rank, N = W M
anchors of all. Times in seconds, volumes in bytes, rates in units per second; machines.yaml says what each constant is.

A step takes what its parts take one after the other (`step_parts`). Patches are read and decoded at the same time. So the rate of
the whole is the lowest of the rates of all stages (`limits`), and that stage is the bottleneck.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import NamedTuple

STREAMS = 4  # shards that a rank fetches at once: pipelines.shard_cache.RemoteSet's `parallel`
REQUEST_BYTES = 8 * 2**20  # of one of its requests
_FLOAT = 4  # bytes; gradients, weights and embeddings are float32
_BACKWARD = 2 / 3  # of a step's computing, during which gradients are reduced
_LOSS_PRODUCTS = 3  # of M x D by D x N: the similarities, and the gradients of both sides
_MAPPINGS = 65_530  # that Linux lets a process have (vm.max_map_count), of which each shard that is open takes one
_CACHED = 0.5  # of a node's memory, that its page cache may have; the rest is the ranks'


@dataclass(frozen=True)
class Workload:
    """What is trained. sources: where each constant comes from, by field.

    largest_batch: of all ranks together; beyond it more GPUs take smaller parts. None: however large.
    """

    parameters: float
    norms: float
    flops_per_view: float
    bytes_per_patch: float
    projection_dim: int
    batch_per_gpu: int
    largest_batch: int | None
    shard_bytes: float
    index_bytes: float
    manifest_bytes: float
    views: int = 2
    sources: Mapping[str, str] = field(default_factory=dict)

    def part(self, gpus: int) -> float:
        """B, patches of a rank in a step; a fraction where the GPUs outnumber the largest batch."""
        return self.batch_per_gpu if self.largest_batch is None else min(self.batch_per_gpu, self.largest_batch / gpus)

    @property
    def gradient_bytes(self) -> float:
        return _FLOAT * self.parameters


@dataclass(frozen=True)
class Machine:
    """A node and what joins it to others. sources: where each constant comes from, by field.

    device_patches_per_s: None where the model's own cores decode and augment, which then takes its time from the model.
    sync_norms: batch norm's statistics are those of the global batch.
    """

    name: str
    gpus: int
    cores: float
    memory_bytes: float
    disk_bytes: float
    disk_bytes_per_s: float
    model_flops_per_s: float
    loss_flops_per_s: float
    launch_s: float
    device_patches_per_s: float | None
    host_core_s: float
    decode_core_s: float
    link_bytes_per_s: float
    network_bytes_per_s: float
    link_latency_s: float
    network_latency_s: float
    store_bytes_per_s: float
    store_requests_per_s: float
    stream_bytes_per_s: float
    overlap: float = 1.0
    sync_norms: bool = True
    sources: Mapping[str, str] = field(default_factory=dict)

    def nodes(self, gpus: int) -> int:
        return -(-gpus // self.gpus)


class Parts(NamedTuple):
    """Seconds of a step, part by part; they are taken one after the other."""

    compute: float
    loading: float
    loss: float
    gather: float
    norms: float
    reduce: float

    @property
    def total(self) -> float:
        return sum(self)


# What the parts of a step are called where they are the bottleneck.
PART_NAMES = {
    "compute": "compute",
    "loading": "decode on the model's cores",
    "loss": "loss (N^2)",
    "gather": "all-gather",
    "norms": "batch-norm sync",
    "reduce": "all-reduce",
}


def step_parts(work: Workload, machine: Machine, gpus: int, *, host_decode: float = 0.0) -> Parts:
    """Seconds of a step on so many GPUs. host_decode: share of the patches that the host decodes, 0 to 1.

    compute = max(launch, V B flops_per_view / model_flops)
    loading = B host_core / (cores / GPUs of the node) where the model's own cores load, else 0
    loss    = 3 x 2 M N D / loss_flops: similarities and both gradients (`models.ntxent`, which keeps none and repeats none)
    gather  = 2 x collective(4 N D): the embeddings out, their gradients back (a reduce-scatter)
    norms   = 3 x norms x hops: for each batch norm the statistics are gathered, and their gradients reduced, which is two
              collectives; so small that their bytes do not count
    reduce  = max(0, 2 x collective(4 x parameters) - overlap x 2/3 compute): a reduce-scatter and an all-gather, begun while
              the backward pass (2/3 of the computing) still runs
    """
    part = work.part(gpus)
    anchors = work.views * part
    compute = max(machine.launch_s, anchors * work.flops_per_view / machine.model_flops_per_s)
    loading = 0.0
    if machine.device_patches_per_s is None:
        loading = part * host_seconds(machine, host_decode) / (machine.cores / machine.gpus)
    loss = _LOSS_PRODUCTS * 2 * anchors * gpus * anchors * work.projection_dim / machine.loss_flops_per_s
    gather = 2 * collective(machine, gpus, gathered_bytes(work, gpus))
    norms = 3 * work.norms * hops(machine, gpus) if machine.sync_norms else 0.0
    reduce = max(0.0, 2 * collective(machine, gpus, work.gradient_bytes) - machine.overlap * _BACKWARD * compute)
    return Parts(compute, loading, loss, gather, norms, reduce)


def host_seconds(machine: Machine, host_decode: float) -> float:
    """Of a core, for each patch."""
    return machine.host_core_s + host_decode * machine.decode_core_s


def gathered_bytes(work: Workload, gpus: int) -> float:
    """Of all ranks' embeddings: 4 N D."""
    return _FLOAT * work.views * work.part(gpus) * gpus * work.projection_dim


def collective(machine: Machine, gpus: int, size: float) -> float:
    """Seconds of an all-gather or a reduce-scatter of so many bytes in all; an all-reduce is one of each.

    bytes (W - 1) / W / bandwidth + hops: a ring's volume over the slowest link that it crosses, and a tree's hops. Source:
    Patarasuk and Yuan, "Bandwidth optimal all-reduce algorithms for clusters of workstations", Journal of Parallel and
    Distributed Computing 69, 2009, section 3.
    """
    bandwidth = machine.link_bytes_per_s
    if machine.nodes(gpus) > 1:
        bandwidth = machine.network_bytes_per_s if machine.gpus == 1 else min(bandwidth, machine.network_bytes_per_s)
    return size * (gpus - 1) / gpus / bandwidth + hops(machine, gpus)


def hops(machine: Machine, gpus: int) -> float:
    """Seconds until a word of one rank is with all others."""
    within, nodes = min(gpus, machine.gpus), machine.nodes(gpus)
    return math.ceil(math.log2(within)) * machine.link_latency_s + math.ceil(math.log2(nodes)) * machine.network_latency_s


def fetch_rate(machine: Machine, gpus: int) -> float:
    """Bytes/s at which a node fetches shards from the object store while all others do: the least of its network, its streams
    (4 for each of its ranks), and its share of what the store gives, in bytes and in requests of 8 MiB."""
    streams = STREAMS * min(gpus, machine.gpus) * machine.stream_bytes_per_s
    store = min(machine.store_bytes_per_s, machine.store_requests_per_s * REQUEST_BYTES)
    return min(machine.network_bytes_per_s, streams, store / machine.nodes(gpus))


STEP, DEVICE, HOST, DISK, STORE = "the step", "decode on the GPU", "the host", "a node's disk", "reading from storage"


def limits(work: Workload, machine: Machine, gpus: int, patches: int, *, host_decode: float = 0.0) -> dict[str, float]:
    """Patches/s that each stage would let through by itself, all GPUs together, after the first epoch.

    the step              W B / step
    decode on the GPU     W device_patches_per_s, where GPUs decode
    the host              nodes x cores / core seconds per patch
    a node's disk         nodes x disk_bytes_per_s / bytes_per_patch, where the set is larger than half of a node's memory
    reading from storage  patches / (set / fetch rate of a node), where the set is larger than a node's disk: every node fetches
                          every shard, whole, in every epoch, since each global batch is dealt to all nodes
    """
    nodes, size = machine.nodes(gpus), set_bytes(work, patches)
    found = {STEP: gpus * work.part(gpus) / step_parts(work, machine, gpus, host_decode=host_decode).total}
    if machine.device_patches_per_s is not None:
        found[DEVICE] = gpus * machine.device_patches_per_s
    found[HOST] = nodes * machine.cores / host_seconds(machine, host_decode)
    if size > _CACHED * machine.memory_bytes:
        found[DISK] = nodes * machine.disk_bytes_per_s / work.bytes_per_patch
    if size > machine.disk_bytes:
        found[STORE] = patches * fetch_rate(machine, gpus) / size
    return found


def set_bytes(work: Workload, patches: int) -> float:
    return patches * work.bytes_per_patch


class Prediction(NamedTuple):
    """bottleneck: the stage, or the longest part of the step where that is the step. efficiency: patches/s of a GPU, as a share
    of those of one GPU alone. first_epoch_s: with every shard fetched to every node meanwhile. network: bytes/s of a node for
    gradients and embeddings, each way. read: bytes/s and requests/s of all nodes, such that the first epoch takes no longer
    than the others. walls: what keeps the run from starting, or asks for a setting, in words.
    """

    gpus: int
    nodes: int
    patches: int
    batch: float
    step: Parts
    limits: dict[str, float]
    patches_per_s: float
    bottleneck: str
    efficiency: float
    epoch_s: float
    first_epoch_s: float
    network_bytes_per_s: float
    read_bytes_per_s: float
    read_requests_per_s: float
    walls: list[str]


def predict(work: Workload, machine: Machine, gpus: int, patches: int, *, host_decode: float = 0.0) -> Prediction:
    """patches/s is the lowest of `limits`; an epoch takes patches / patches_per_s, and the first one as long as fetching the set
    to every node, if that is longer. A node's network carries 2 x (4 N D + 4 x parameters) (W - 1) / W bytes in a step."""
    stages = limits(work, machine, gpus, patches, host_decode=host_decode)
    lowest = min(stages, key=lambda stage: stages[stage])
    step, nodes = step_parts(work, machine, gpus, host_decode=host_decode), machine.nodes(gpus)
    longest = max(PART_NAMES, key=lambda name: getattr(step, name))
    alone = min(limits(work, machine, 1, patches, host_decode=host_decode).values())
    rate, size, batch = stages[lowest], set_bytes(work, patches), gpus * work.part(gpus)
    volume = 2 * (gathered_bytes(work, gpus) + work.gradient_bytes) * (gpus - 1) / gpus if nodes > 1 else 0.0
    read = nodes * size * rate / patches
    return Prediction(
        gpus=gpus,
        nodes=nodes,
        patches=patches,
        batch=batch,
        step=step,
        limits=stages,
        patches_per_s=rate,
        bottleneck=PART_NAMES[longest] if lowest == STEP else lowest,
        efficiency=rate / gpus / alone,
        epoch_s=patches / rate,
        first_epoch_s=max(patches / rate, size / fetch_rate(machine, gpus)),
        network_bytes_per_s=volume * rate / batch,
        read_bytes_per_s=read,
        read_requests_per_s=read / REQUEST_BYTES,
        walls=walls(work, machine, gpus, patches),
    )


def walls(work: Workload, machine: Machine, gpus: int, patches: int) -> list[str]:
    """What rules out so many patches whatever the speed: a batch larger than the set, memory for the manifest and for each rank's
    index, shards that are open, and the size of the disk."""
    found = []
    batch = gpus * work.part(gpus)
    if batch > patches:
        found.append(f"a batch of {batch:,.0f} is larger than the set")
    driver, ranks = patches * work.manifest_bytes, min(gpus, machine.gpus) * patches * work.index_bytes
    if driver > machine.memory_bytes:
        found.append(f"manifest: {driver / 1e9:,.0f} GB of memory where the run is started")
    if ranks > machine.memory_bytes:
        found.append(f"index: {ranks / 1e9:,.0f} GB of memory on each node")
    shards = set_bytes(work, patches) / work.shard_bytes
    if set_bytes(work, patches) > machine.disk_bytes:
        found.append("larger than a node's disk: --shuffle-window and --cache-gib")
    elif shards > _MAPPINGS:
        found.append(f"{shards:,.0f} shards, of which {_MAPPINGS:,} can be open: --shuffle-window or larger shards")
    return found
