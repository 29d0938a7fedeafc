"""The cost model's formulas by hand, its constants against the results that they name, and what the check derives."""

import dataclasses
import itertools
import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import scale
import scale_check
from harness import RunFailed
from patch_set import PatchSet
from scale import (
    FIELDS,
    MACHINES,
    Machine,
    Workload,
    constants_of,
    limits,
    machine,
    part_of,
    predict,
    step_parts,
    walls,
    workload,
)

from pipelines.shard_reader import ShardReader
from sharding.manifest import read_manifest

WORK = Workload(
    25e6, 50, 24e9, 20e3, 128, batch_per_gpu=100, largest_batch=None, shard_bytes=1e8, index_bytes=100, manifest_bytes=300
)
NODE = Machine(
    name="node",
    gpus=4,
    cores=40,
    memory_bytes=1e12,
    disk_bytes=10e12,
    disk_bytes_per_s=1e9,
    model_flops_per_s=48e12,
    loss_flops_per_s=1e13,
    launch_s=0.004,
    device_patches_per_s=2000,
    host_core_s=1e-5,
    link_bytes_per_s=100e9,
    network_bytes_per_s=10e9,
    link_latency_s=1e-5,
    network_latency_s=1e-4,
    store_bytes_per_s=20e9,
    store_requests_per_s=1e6,
    stream_bytes_per_s=1e8,
)


def _node(**changes) -> Machine:
    return dataclasses.replace(NODE, **changes)


# The formulas, by hand


def test_a_step_alone_is_what_it_computes():
    """2 x 100 views of 24 GFLOP at 48 TFLOP/s: 0.1 s. The loss: 3 x 2 x 200 x 200 x 128 operations at 10^13."""
    parts = step_parts(WORK, NODE, 1)
    assert parts == pytest.approx({"compute": 0.1, "loading": 0, "loss": 3.072e-6, "gather": 0, "norms": 0, "reduce": 0})
    assert predict(WORK, NODE, 1, 1000)["patches_per_s"] == pytest.approx(100 / (0.1 + 3.072e-6))


def test_a_step_of_two_nodes():
    """8 GPUs, 4 to a node: a word takes two hops within and one between, 20 + 100 us."""
    slow = _node(network_bytes_per_s=1e9)
    parts, size = step_parts(WORK, slow, 8), 4 * 2 * 100 * 8 * 128  # bytes of 1,600 embeddings
    assert slow.hops(8) == pytest.approx(120e-6) and WORK.gathered_bytes(8) == size
    assert parts["gather"] == pytest.approx(2 * (size * 7 / 8 / 1e9 + 120e-6))
    assert parts["norms"] == pytest.approx(3 * 50 * 120e-6)
    assert parts["loss"] == pytest.approx(3 * 2 * 200 * 1600 * 128 / 1e13)
    # 100 MB of gradients: 2 x 7/8 x 100 MB at 1 GB/s, less the backward pass, two thirds of 0.1 s.
    assert parts["reduce"] == pytest.approx(0.175 + 240e-6 - 0.1 * 2 / 3)
    parts = step_parts(WORK, _node(network_bytes_per_s=1e9, overlap=0.0, sync_norms=False), 8)
    assert parts["reduce"] == pytest.approx(0.175 + 240e-6) and parts["norms"] == 0


def test_within_a_node_the_link_counts_and_beyond_it_the_network():
    assert NODE.collective(1, 1e9) == 0
    assert NODE.collective(4, 1e9) == pytest.approx(0.75e9 / 100e9 + 20e-6)
    assert NODE.collective(5, 1e9) == pytest.approx(0.8e9 / 10e9 + 120e-6)
    single = _node(gpus=1, link_bytes_per_s=1.0)  # no link is crossed where nobody has a neighbour
    assert single.collective(2, 1e9) == pytest.approx(0.5e9 / 10e9 + 100e-6)


def test_a_node_fetches_with_the_least_of_network_streams_and_its_share_of_the_store():
    assert NODE.fetch_rate(1) == 4 * 1e8  # four streams of one rank
    assert NODE.fetch_rate(4) == 16 * 1e8
    assert NODE.fetch_rate(4 * 20) == 20e9 / 20
    assert _node(network_bytes_per_s=1e8).fetch_rate(4) == 1e8
    assert _node(store_requests_per_s=10).fetch_rate(4) == 10 * 2**23


def test_time_and_needs_of_an_epoch():
    """A million patches of 20 KB on 4 GPUs of one node: 20 GB, at 1.6 GB/s 12.5 s to fetch."""
    found = predict(WORK, NODE, 4, 10**6)
    assert found["epoch_s"] == pytest.approx(10**6 / found["patches_per_s"])
    assert found["first_epoch_s"] == max(found["epoch_s"], 12.5) and found["network_bytes_per_s"] == 0
    two = predict(WORK, NODE, 8, 10**6)
    assert two["read_bytes_per_s"] == pytest.approx(2 * 20e9 / two["epoch_s"])
    assert two["read_requests_per_s"] == pytest.approx(two["read_bytes_per_s"] / 2**23)
    volume = 2 * (100e6 + 4 * 1600 * 128) * 7 / 8
    assert two["network_bytes_per_s"] == pytest.approx(volume / (800 / two["patches_per_s"]))


@pytest.mark.parametrize(
    ("changes", "patches", "gpus", "bottleneck"),
    [
        ({}, 1000, 1, "compute"),
        ({"device_patches_per_s": 500}, 1000, 1, "decode on the GPU"),
        ({"gpus": 1, "cores": 2, "device_patches_per_s": None, "host_core_s": 1.0}, 1000, 1, "decode on the model's cores"),
        ({"cores": 0.001}, 1000, 1, "the host"),
        ({"memory_bytes": 1e6, "disk_bytes_per_s": 1e6}, 1000, 1, "a node's disk"),
        ({"disk_bytes": 1e6, "stream_bytes_per_s": 1e6}, 1000, 1, "reading from storage"),
        ({"network_bytes_per_s": 1e8}, 1000, 8, "all-reduce"),
        ({"link_latency_s": 0.1}, 1000, 4, "batch-norm sync"),
        ({"loss_flops_per_s": 1e6}, 1000, 4, "loss (N^2)"),
    ],
)
def test_the_first_bottleneck_is_named(changes, patches, gpus, bottleneck):
    assert predict(WORK, _node(**changes), gpus, patches)["bottleneck"] == bottleneck


def test_walls():
    assert walls(WORK, NODE, 16, 1600) == [] and walls(WORK, NODE, 16, 1599) == ["a batch of 1,600 is larger than the set"]
    assert walls(dataclasses.replace(WORK, shard_bytes=1e6), NODE, 1, 10**8) == [
        "2,000,000 shards, of which 65,530 can be open: --shuffle-window or larger shards"
    ]
    small = _node(memory_bytes=35e9, disk_bytes=1e12)
    assert walls(WORK, small, 1, 10**8) == ["larger than a node's disk: --shuffle-window and --cache-gib"]
    assert walls(WORK, small, 4, 10**8)[0] == "index: 40 GB of memory on each node"
    assert walls(WORK, small, 1, 2 * 10**8)[0] == "manifest: 60 GB of memory where the run is started"


def test_a_store_that_all_share_gives_each_node_less():
    """Every node fetches every shard: with twice the nodes the store gives each half, and all together half the patches."""
    node = _node(disk_bytes=1e6, stream_bytes_per_s=1e12, network_bytes_per_s=1e12, model_flops_per_s=1e18)
    few, many = (limits(WORK, node, gpus, 10**9)["reading from storage"] for gpus in (64, 128))
    assert few == pytest.approx(20e9 / 16 / 20e3) and many == pytest.approx(few / 2)


# The constants


RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


def _result(source: str) -> dict:
    """The file that a source names, such as "measured: FILE.json, of what"."""
    return json.loads((RESULTS / source.partition(": ")[2].split(",")[0]).read_text())


def test_every_constant_has_a_source_and_every_measured_one_its_file():
    for name, (item, sources) in {"workload": workload(256, 8192), **{name: machine(name) for name in MACHINES}}.items():
        fields = {each.name for each in dataclasses.fields(item)} & FIELDS.keys()
        assert {field for field in fields if getattr(item, field) is not None} <= sources.keys() <= FIELDS.keys(), name
        for value, source in sources.values():
            assert value >= 0 and source.startswith(("measured", "counted", "assumed", "the default of", "given on")), source
            if source.startswith(("measured", "counted by torch")):
                assert _result(source)["date"]


def test_the_measured_constants_are_those_of_the_files_that_they_name():
    work, cpu, gpu = constants_of("workload"), constants_of("cpu"), constants_of("gpu")
    step, loader = _result(work["flops_per_view"].source), _result(gpu["host_core_s"].source)["parts"]["ms"]
    assert work["flops_per_view"].value == step["runs"]["model"][-1]["flops_per_step"] / 2 / step["timed"]["batch_size"]
    assert work["bytes_per_patch"].value == 1000 * _result(work["bytes_per_patch"].source)["images"]["kilobytes"]
    for name in ("index_bytes", "manifest_bytes"):
        assert work[name].value == _result(work[name].source)["memory"][name]
    assert cpu["model_flops_per_s"].value == scale.utilisation(step).flops
    assert [cpu[name].value for name in ("cores", "memory_bytes")] == [step["machine"][key] for key in ("cores", "memory_bytes")]
    assert cpu["host_core_s"].value == loader["loader"] / 1000
    assert gpu["host_core_s"].value == sum(loader[part] for part in ("reading", "drawing", "rows")) / 1000
    seconds = statistics.median(run["seconds"] for run in _result(cpu["loss_flops_per_s"].source)["runs"]["ours"]["65536"])
    assert cpu["loss_flops_per_s"].value == 3 * 2 * 65536**2 * 128 / seconds
    packing = constants_of("packing")["patches_per_core_s"]
    record = _result(packing.source)
    assert packing.value == record["summary"]["ours-decode"]["patches_per_s"] / record["machine"]["cores"]


def test_the_counts_are_those_of_the_model():
    import torch
    from contenders.step import PROJECTION, TEMPERATURE
    from torch import nn

    from models.backbones import build_backbone
    from train.trainer.methods import SimCLR

    with torch.device("meta"):
        backbone = build_backbone("resnet50", 224)
        head = SimCLR(PROJECTION, TEMPERATURE).build_head(int(backbone.num_features))
    modules = nn.ModuleList([backbone, head])
    work, _ = workload(1, None)
    assert sum(each.numel() for each in modules.parameters()) == work.parameters
    assert sum(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in modules.modules()) == work.norms
    assert work.projection_dim == PROJECTION


def _step(device="cuda", backbone="resnet50"):
    run = {"img_per_s": 4000.0, "flops_per_step": 10**13, "steps": 10, "seconds": 1.0, "gpu": "NVIDIA H200", "data_wait": None}
    timed = {"backbone": backbone, "image_size": 224, "batch_size": 256, "device": device, "bf16": True}
    return {"date": "2026-01-02", "timed": timed, "runs": {"model": [run]}, "summary": {"model": {"img_per_s": 4000.0}}}


def _loader(device="cuda"):
    return {"date": "2026-01-02", "timed": {"device": device}, "runs": {}, "summary": {"ours": {"patches_per_s": 12345.0}}}


def test_what_a_gpu_has_measured_replaces_what_is_assumed(tmp_path):
    path = tmp_path / "bench.json"
    path.write_text(json.dumps({"parts": {"step": {"status": "ok", "found": _step()}, "loader": {"found": _loader()}}}))
    (tmp_path / "step.json").write_text(json.dumps(_step()))
    assert part_of(str(path), "step") == part_of(str(tmp_path / "step.json"), "step") == _step()
    node, sources = machine("h200", step=part_of(str(path), "step"), loader=part_of(str(path), "loader"))
    assert (node.model_flops_per_s, node.device_patches_per_s) == (1e14, 12345)
    assert sources["model_flops_per_s"].source == "measured: step of 2026-01-02 on NVIDIA H200"
    assert sources["device_patches_per_s"].source.startswith("measured") and sources["launch_s"].source.startswith("assumed")
    for given in ({"step": _step(device="cpu")}, {"step": _step(backbone="resnet18")}, {"loader": _loader("cpu")}):
        with pytest.raises(ValueError, match=r"no result of (resnet50 at 224 px|our loader) on a GPU"):
            machine("h200", **given)


def test_a_machine_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("like: a100\ngpus: 2\nnetwork_bytes_per_s: 1.0e+9\n")
    node, sources = machine(str(path))
    assert (node.name, node.gpus, node.network_bytes_per_s, node.cores) == ("mine", 2, 1e9, 128)
    assert sources["gpus"].source == "given: mine.yaml" and node.sync_norms
    for text, message in (
        ("gpu: 2", "a machine has no 'gpu'"),
        ("like: h300", "like 'h300'"),
        ("cores: many", "cores 'many' is no number"),
    ):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            machine(str(path))
    with pytest.raises(ValueError, match="choose of cpu, a100, h200, or give a YAML file"):
        machine("h300")


# The command


def test_the_committed_prediction_is_made_again_to_the_last_bit():
    committed = json.loads((RESULTS / "2026-11-23-scale-2.json").read_text())
    made = json.loads(json.dumps(scale.predictions(scale.Config())))
    for each in committed["machines"]:
        del each["constants"]["decode_core_s"]  # of patches that no GPU decodes, of which there were none
    assert {name: committed[name] for name in made} == made


def test_the_command_writes_tables(tmp_path, run_main):
    config = scale.Config(out=str(tmp_path), gpus=[1, 8, 64], patches=[150_000, 10**9])
    record, page, _ = run_main(scale.main, config)
    for each in record["machines"]:
        places = [(row["patches"], row["gpus"]) for row in each["predictions"]]
        assert places == list(itertools.product([150_000, 10**9], [1, 8, 64]))
        assert all(row["patches_per_s"] == min(row["limits"].values()) for row in each["predictions"])
    assert "| 1 billion, 64 |" in page and "assumed: NVIDIA's data sheet of the DGX H200" in page
    assert "- cpu: 1 billion patches: larger than a node's disk" in page


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"gpus": [0]}, "--gpus 0 is out of range: give at least 1"),
        ({"step": "x.json"}, "say with --machines which one's"),
        ({"check": True}, "--check needs --work"),
    ],
)
def test_bad_settings_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        scale.main(scale.Config(**settings))


# The check

EXCHANGE = {"parameters": 25e6, "reduce_s": 0.25, "gather_s": 0.001, "hop_s": 0.0, "slowdown": 1.0}
FREE = EXCHANGE | {"parameters": 1.0, "reduce_s": 1e-12}


def test_two_workers_wait_for_gradients_and_embeddings():
    """A step of 32 patches at 50 patches/s and the reduce of 100 MB, which gives the bandwidth that the embeddings see too."""
    assert scale_check.predicted(50.0, FREE) == pytest.approx(100 * (1 - scale_check.RAY_CORES / 2))
    assert scale_check.predicted(50.0, FREE | {"slowdown": 1.25}) == pytest.approx(80 * (1 - scale_check.RAY_CORES / 2))
    computing = 32 / 50 / (1 - scale_check.RAY_CORES / 2)
    gather = 2 * (4 * 4 * 32 * 128 / 2) / (100e6 / 0.25)
    assert scale_check.predicted(50.0, EXCHANGE) == pytest.approx(64 / (computing + 0.25 + gather))
    hop = EXCHANGE | {"hop_s": 0.01}  # is in the reduce's time already, twice; the gather has two of its own
    gather = 2 * (4 * 4 * 32 * 128 / 2) / (100e6 / 0.23) + 0.02
    assert scale_check.predicted(50.0, hop) == pytest.approx(64 / (computing + 0.25 + gather))


def test_the_steady_state_leaves_out_the_first_rows():
    rows = [{"patches_per_s": rate, "data_wait": 0.1} for rate in (1, 2, 10, 12, 11)]
    assert scale_check.steady(rows) == {"patches_per_s": 11, "spread": pytest.approx(2 / 11), "rows": 3, "data_wait": 0.1}
    with pytest.raises(RunFailed, match="3 rows of metrics are too few"):
        scale_check.steady(rows[:3])


def test_errors_are_of_the_same_round_and_a_failed_run_leaves_its_round_out():
    free = FREE | {"slowdown": 1 - scale_check.RAY_CORES / 2}  # twice the one's
    pairs = [(50, 100), (40, 100), (60, 100)]
    rounds = [{"1": {"patches_per_s": one}, "2": {"patches_per_s": two}, "exchange": free} for one, two in pairs]
    found = scale_check.summarise({"rounds": [*rounds, {"1": None, "2": {"patches_per_s": 3}, "exchange": free}]})
    assert [each["error"] for each in found["rounds"]] == pytest.approx([0, -0.2, 0.2], abs=1e-6)
    assert (found["lowest"], found["error"], found["highest"]) == pytest.approx((-0.2, 0, 0.2), abs=1e-6)
    assert scale_check.summarise({"rounds": [each | {"exchange": None} for each in rounds]}) == {"rounds": []}


def test_one_and_two_workers_run_in_turn_and_a_failed_run_is_reported(tmp_path, monkeypatch, run_main):
    seen = []

    def run_workers(workers, shards, storage):
        seen.append(workers)
        if len(seen) == 4:
            raise RunFailed("exit code 1: no Ray")
        return {"patches_per_s": 30.0 * workers, "spread": 0.05, "rows": 9, "data_wait": 0.0, "load_before": 0.5}

    monkeypatch.setattr(scale_check, "patch_set", lambda *_, **__: PatchSet("shards", "images", {}))
    monkeypatch.setattr(scale_check, "run_contender", lambda *_, **__: EXCHANGE | {"alone_s": 1.0, "together_s": 1.0})
    monkeypatch.setattr(scale_check, "memory", lambda *_: {"index_bytes": 90.0, "manifest_bytes": 310.0})
    monkeypatch.setattr(scale_check, "available_cores", lambda: 2)
    monkeypatch.setattr(scale_check, "run_workers", run_workers)
    config = scale.Config(check=True, work=str(tmp_path / "work"), out=str(tmp_path / "out"), rounds=2)
    record, page, code = run_main(scale.main, config)
    assert seen == [1, 2, 1, 2] and code == 1 and len(record["summary"]["rounds"]) == 1
    assert record["failed"] == {"round 2, 2 workers": "exit code 1: no Ray"}
    assert "| round 1 | 30.00 | 60.00 |" in page and "FAILED: round 2, 2 workers: exit code 1: no Ray" in page


def test_a_large_set_is_a_small_one_again_and_again(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(scale_check, "_SHARD_PATCHES", 100)
    scale_check.write_large_set(shards, tmp_path / "large", 300)
    reader = ShardReader(tmp_path / "large")
    assert len(reader) == 300 and reader.manifest["shard"].to_pylist() == [i // 100 for i in range(300)]
    first, second = reader.read(np.array([0, len(read_manifest(shards))]))
    assert np.array_equal(first, second)
    assert scale_check.rank(scale_check.Task(str(tmp_path / "large")))["peak_bytes"] > 10**7
