"""The cost model's formulas by hand, its constants against the results that they name, and what the check derives."""

import json
import statistics
from pathlib import Path

import numpy as np
import pytest
import scale
import scale_check
from harness import RunFailed
from patch_set import PatchSet
from scale import FIELDS, MACHINES, CostModel, constants_of, machine, measured_on_gpu

from pipelines.shard_reader import ShardReader
from sharding.manifest import read_manifest

WORK = {"parameters": 25e6, "norms": 50, "flops_per_view": 24e9, "bytes_per_patch": 20e3, "projection_dim": 128}
WORK |= {"batch_per_gpu": 100, "shard_bytes": 1e8, "index_bytes": 100, "manifest_bytes": 300}
NODE = {"gpus": 4, "cores": 40, "memory_bytes": 1e12, "disk_bytes": 10e12, "disk_bytes_per_s": 1e9, "host_core_s": 1e-5}
NODE |= {"model_flops_per_s": 48e12, "loss_flops_per_s": 1e13, "launch_s": 0.004, "device_patches_per_s": 2000}
NODE |= {"link_bytes_per_s": 100e9, "network_bytes_per_s": 10e9, "link_latency_s": 1e-5, "network_latency_s": 1e-4}
NODE |= {"store_bytes_per_s": 20e9, "store_requests_per_s": 1e6, "stream_bytes_per_s": 1e8, "overlap": 1.0, "sync_norms": 1}
RESULTS = Path(__file__).resolve().parents[2] / "benchmarks/results"


def _model(**changes) -> CostModel:
    return CostModel(**(WORK | NODE | changes))


# The formulas, by hand


def test_a_step_alone_is_what_it_computes():
    """2 x 100 views of 24 GFLOP at 48 TFLOP/s: 0.1 s. The loss: 3 x 2 x 200 x 200 x 128 operations at 10^13."""
    parts = _model().step_parts(1)
    assert parts == pytest.approx({"compute": 0.1, "loading": 0, "loss": 3.072e-6, "gather": 0, "norms": 0, "reduce": 0})
    assert _model().predict(1, 1000)["patches_per_s"] == pytest.approx(100 / (0.1 + 3.072e-6))


def test_a_step_of_two_nodes():
    """8 GPUs, 4 to a node: a word takes two hops within and one between, 20 + 100 us."""
    slow = _model(network_bytes_per_s=1e9)
    parts, size = slow.step_parts(8), 4 * 2 * 100 * 8 * 128  # bytes of 1,600 embeddings
    assert slow.hops(8) == pytest.approx(120e-6) and slow.gathered_bytes(8) == size
    assert parts["gather"] == pytest.approx(2 * (size * 7 / 8 / 1e9 + 120e-6))
    assert parts["norms"] == pytest.approx(3 * 50 * 120e-6)
    assert parts["loss"] == pytest.approx(3 * 2 * 200 * 1600 * 128 / 1e13)
    # 100 MB of gradients: 2 x 7/8 x 100 MB at 1 GB/s, less the backward pass, two thirds of 0.1 s.
    assert parts["reduce"] == pytest.approx(0.175 + 240e-6 - 0.1 * 2 / 3)
    parts = _model(network_bytes_per_s=1e9, overlap=0.0, sync_norms=0).step_parts(8)
    assert parts["reduce"] == pytest.approx(0.175 + 240e-6) and parts["norms"] == 0
    assert _model(largest_batch=400).part(8) == 50


def test_within_a_node_the_link_counts_and_beyond_it_the_network():
    assert _model().collective(1, 1e9) == 0
    assert _model().collective(4, 1e9) == pytest.approx(0.75e9 / 100e9 + 20e-6)
    assert _model().collective(5, 1e9) == pytest.approx(0.8e9 / 10e9 + 120e-6)
    single = _model(gpus=1, link_bytes_per_s=1.0)  # no link is crossed where nobody has a neighbour
    assert single.collective(2, 1e9) == pytest.approx(0.5e9 / 10e9 + 100e-6)


def test_a_node_fetches_with_the_least_of_network_streams_and_its_share_of_the_store():
    assert [_model().fetch_rate(gpus) for gpus in (1, 4, 80)] == [4 * 1e8, 16 * 1e8, 20e9 / 20]
    assert _model(network_bytes_per_s=1e8).fetch_rate(4) == 1e8
    assert _model(store_requests_per_s=10).fetch_rate(4) == 10 * 2**23


def test_time_and_needs_of_an_epoch():
    """A million patches of 20 KB on 4 GPUs of one node: 20 GB, at 1.6 GB/s 12.5 s to fetch."""
    found = _model().predict(4, 10**6)
    assert found["epoch_s"] == pytest.approx(10**6 / found["patches_per_s"])
    assert found["first_epoch_s"] == max(found["epoch_s"], 12.5) and found["network_bytes_per_s"] == 0
    two = _model().predict(8, 10**6)
    assert two["read_bytes_per_s"] == pytest.approx(2 * 20e9 / two["epoch_s"])
    assert two["read_requests_per_s"] == pytest.approx(two["read_bytes_per_s"] / 2**23)
    volume = 2 * (100e6 + 4 * 1600 * 128) * 7 / 8
    assert two["network_bytes_per_s"] == pytest.approx(volume / (800 / two["patches_per_s"]))


@pytest.mark.parametrize(
    ("changes", "gpus", "bottleneck"),
    [
        ({}, 1, "compute"),
        ({"device_patches_per_s": 500}, 1, "decode on the GPU"),
        ({"gpus": 1, "cores": 2, "device_patches_per_s": None, "host_core_s": 1.0}, 1, "decode on the model's cores"),
        ({"cores": 0.001}, 1, "the host"),
        ({"memory_bytes": 1e6, "disk_bytes_per_s": 1e6}, 1, "a node's disk"),
        ({"disk_bytes": 1e6, "stream_bytes_per_s": 1e6}, 1, "reading from storage"),
        ({"network_bytes_per_s": 1e8}, 8, "all-reduce"),
        ({"link_latency_s": 0.1}, 4, "batch-norm sync"),
        ({"loss_flops_per_s": 1e6}, 4, "loss (N^2)"),
    ],
)
def test_the_first_bottleneck_is_named(changes, gpus, bottleneck):
    assert _model(**changes).predict(gpus, 1000)["bottleneck"] == bottleneck


def test_walls():
    assert _model().walls(16, 1600) == [] and _model().walls(16, 1599) == ["a batch of 1,600 is larger than the set"]
    assert _model(shard_bytes=1e6).walls(1, 10**8)[0].startswith("2,000,000 shards, of which 65,530 can be open")
    small = _model(memory_bytes=35e9, disk_bytes=1e12)
    assert small.walls(1, 10**8) == ["larger than a node's disk: --shuffle-window and --cache-gib"]
    assert small.walls(4, 10**8)[0] == "index: 40 GB of memory on each node"
    assert small.walls(1, 2 * 10**8)[0] == "manifest: 60 GB of memory where the run is started"


# The constants


def _result(constant: dict) -> dict:
    """The file that a source names, such as "measured: FILE.json, of what"."""
    return json.loads((RESULTS / constant["source"].partition(": ")[2].split(",")[0]).read_text())


def test_every_constant_has_a_source_and_every_measured_one_its_file():
    for constants in (constants_of("workload"), *map(machine, MACHINES)):
        assert constants.keys() <= FIELDS.keys()
        for each in constants.values():
            assert each["value"] >= 0 and each["source"].startswith(("measured", "counted", "assumed", "the default of"))
            if each["source"].startswith(("measured", "counted by torch")):
                assert _result(each)["date"]


def test_the_measured_constants_are_those_of_the_files_that_they_name():
    found = constants_of("workload", "cpu", "packing")
    value = {name: each["value"] for name, each in found.items()}
    step, loader = _result(found["flops_per_view"]), _result(found["host_core_s"])["parts"]["ms"]
    assert value["flops_per_view"] == step["runs"]["model"][-1]["flops_per_step"] / 2 / step["timed"]["batch_size"]
    assert value["bytes_per_patch"] == 1000 * _result(found["bytes_per_patch"])["images"]["kilobytes"]
    for name in ("index_bytes", "manifest_bytes"):
        assert value[name] == _result(found[name])["memory"][name]
    assert value["model_flops_per_s"] == scale.utilisation(step).flops
    assert all(value[name] == step["machine"][name] for name in ("cores", "memory_bytes"))
    assert value["host_core_s"] == loader["loader"] / 1000
    host_of_gpu = constants_of("gpu")["host_core_s"]["value"]
    assert host_of_gpu == sum(loader[part] for part in ("reading", "drawing", "rows")) / 1000
    seconds = statistics.median(run["seconds"] for run in _result(found["loss_flops_per_s"])["runs"]["ours"]["65536"])
    assert value["loss_flops_per_s"] == 3 * 2 * 65536**2 * 128 / seconds
    packing = _result(found["patches_per_core_s"])
    assert value["patches_per_core_s"] == packing["summary"]["ours-decode"]["patches_per_s"] / packing["machine"]["cores"]


@pytest.mark.parametrize(("name", "size", "where"), [("resnet50", 224, None), (scale_check.BACKBONE, 64, scale_check.PARAMETERS)])
def test_the_counts_are_those_of_the_model(name, size, where):
    import torch
    from contenders.step import PROJECTION, TEMPERATURE
    from torch import nn

    from models.backbones import build_backbone
    from train.trainer.methods import SimCLR

    with torch.device("meta"):
        backbone = build_backbone(name, size)
        head = SimCLR(PROJECTION, TEMPERATURE).build_head(int(backbone.num_features))
    modules, work = nn.ModuleList([backbone, head]), constants_of("workload")
    assert sum(each.numel() for each in modules.parameters()) == (where or work["parameters"]["value"])
    norms = sum(isinstance(each, nn.modules.batchnorm._BatchNorm) for each in modules.modules())
    assert where or (norms, PROJECTION) == (work["norms"]["value"], work["projection_dim"]["value"])


def test_what_a_gpu_has_measured_replaces_what_is_assumed(tmp_path):
    path, run = tmp_path / "bench.json", {"flops_per_step": 10**13, "steps": 10, "seconds": 1.0, "gpu": "NVIDIA H200"}
    timed = {"backbone": "resnet50", "image_size": 224, "batch_size": 256, "device": "cuda", "bf16": True}
    step = {"date": "2026-01-02", "timed": timed, "runs": {"model": [run]}}
    loader = {"date": "2026-01-02", "timed": {"device": "cuda"}, "summary": {"ours": {"patches_per_s": 12345.0}}}
    path.write_text(json.dumps({"parts": {"step": {"status": "ok", "found": step}, "loader": {"found": loader}}}))
    assert {name: each["value"] for name, each in measured_on_gpu(str(path)).items()} == {
        "model_flops_per_s": 1e14,
        "device_patches_per_s": 12345,
    }
    (node,) = scale.predictions(scale.Config(machines=["h200"], measured=str(path)))["machines"]
    assert node["constants"]["model_flops_per_s"]["source"] == "measured: step of 2026-01-02 on NVIDIA H200"
    assert node["predictions"][0]["patches_per_s"] == pytest.approx(256 / (2 * 256 * 24313536512 / 1e14), rel=1e-3)
    step["timed"]["device"] = loader["timed"]["device"] = "cpu"
    path.write_text(json.dumps({"parts": {"step": {"found": step}, "loader": {"found": loader}}}))
    with pytest.raises(ValueError, match="there is no step of resnet50 at 224 px and no loader on a GPU in it"):
        measured_on_gpu(str(path))


def test_a_machine_of_ones_own(tmp_path):
    path = tmp_path / "mine.yaml"
    path.write_text("like: a100\ngpus: 2\nnetwork_bytes_per_s: 1.0e+9\n")
    found = machine(str(path))
    assert [found[name]["value"] for name in ("gpus", "network_bytes_per_s", "cores")] == [2, 1e9, 128]
    assert found["gpus"]["source"] == "given: mine.yaml"
    for text, message in (("gpu: 2", "no 'gpu'"), ("like: h300", "like 'h300'"), ("cores: many", "'many' is no number")):
        path.write_text(text)
        with pytest.raises(ValueError, match=message):
            machine(str(path))
    with pytest.raises(ValueError, match="choose of cpu, a100, h200, or give a YAML file"):
        machine("h300")


# The command


def test_the_committed_prediction_is_made_again_to_the_last_bit(tmp_path, run_main):
    committed = json.loads((RESULTS / "2026-11-23-scale-2.json").read_text())
    record, page, _ = run_main(scale.main, scale.Config(out=str(tmp_path)))
    for made, before in zip(record["machines"], committed["machines"], strict=True):
        assert made["predictions"] == before["predictions"]
        # Neither is a value of a formula that has changed: the one was unused, the other is a constant since.
        assert made["constants"] | before["constants"] | {"sync_norms": made["constants"]["sync_norms"]} == (
            made["constants"] | {"decode_core_s": before["constants"]["decode_core_s"]}
        )
    for made, before in zip(record["sets"], committed["sets"], strict=True):
        assert made.items() <= before.items()
    assert "| 1,000,000,000, 64 | 127,427 |" in page and "assumed: NVIDIA's data sheet of the DGX H200" in page


# The check


def test_two_workers_wait_for_gradients():
    """A step of 32 patches at 50 patches/s on what Ray leaves of two cores, and the exchange."""
    assert scale_check.predicted(50.0, 0.0) == pytest.approx(100 * (1 - 0.12 / 2))
    assert scale_check.predicted(50.0, 0.25) == pytest.approx(64 / (32 / 50 / (1 - 0.12 / 2) + 0.25))


def test_the_steady_state_leaves_out_the_first_rows():
    rows = [{"patches_per_s": rate} for rate in (1, 2, 10, 12, 11)]
    assert scale_check.steady(rows) == 11
    with pytest.raises(RunFailed, match="3 rows of metrics are too few"):
        scale_check.steady(rows[:3])


def test_one_and_two_workers_run_in_turn_and_a_failed_round_is_left_out(tmp_path, monkeypatch, run_main):
    seen, rates = [], {2: iter([60.0, None, 50.0]), 1: iter([30.0, 30.0, 30.0])}

    def run_workers(workers, shards, storage):
        seen.append(workers)
        if not (rate := next(rates[workers])):
            raise RunFailed("exit code 1: no Ray")
        return rate

    monkeypatch.setattr(scale_check, "patch_set", lambda *_, **__: PatchSet("shards", "images", {}))
    monkeypatch.setattr(scale_check, "run_contender", lambda *_, **__: {"seconds": 0.0})
    monkeypatch.setattr(scale_check, "memory", lambda *_: {"index_bytes": 90.0, "manifest_bytes": 310.0})
    monkeypatch.setattr(scale_check, "available_cores", lambda: 2)
    monkeypatch.setattr(scale_check, "run_workers", run_workers)
    config = scale.Config(check=True, work=str(tmp_path / "work"), out=str(tmp_path / "out"), rounds=3)
    record, page, code = run_main(scale.main, config)
    assert seen == [1, 2] * 3 and code == 1 and record["failed"] == {"round 2": "exit code 1: no Ray"}
    assert [each["error"] for each in record["rounds"]] == pytest.approx([56.4 / 60 - 1, 56.4 / 50 - 1])
    assert "| median | 30.00 | 55.00 | 56.40 | +3.4% |" in page and "FAILED: round 2: exit code 1: no Ray" in page


def test_a_large_set_is_a_small_one_again_and_again(shards, tmp_path, monkeypatch):
    monkeypatch.setattr(scale_check, "_SHARD_PATCHES", 100)
    scale_check.write_large_set(shards, tmp_path / "large", 300)
    reader = ShardReader(tmp_path / "large")
    assert len(reader) == 300 and reader.manifest["shard"].to_pylist() == [i // 100 for i in range(300)]
    first, second = reader.read(np.array([0, len(read_manifest(shards))]))
    assert np.array_equal(first, second)
