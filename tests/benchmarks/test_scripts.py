"""Every benchmark as a command, at its smallest size: it measures, writes its record and its table, and nothing fails."""

import json

import pytest

SCRIPTS = {
    "packing": "--patches 12 --size 32 --distinct 3 --workers 1 --rounds 1 --contenders ours-header tar",
    "loader": "--patches 16 --size 32 --batch-size 4 --cores 1 --rounds 1 --seconds 0.1"
    " --contenders torchvision ours webdataset parts memory",
    "ntxent": "--anchors 64 --timed 0.05 --rounds 1 --cores 1",
    "heads": "--rows 80 --features 8 --epochs 2 --rounds 1 --cores 1",
    "step": "--dry --patches 16 --cores 1 --rounds 1 --seconds 0.1 --contenders loader model joint",
    "equal_work": "--dry --cores 1 --seeds 1 --contenders ours plain random",
    "starting": "--rounds 1",
    "trials": "--epochs 1 --trials 2 --rounds 1 --scenarios grid",
}
NO_WORK = ("ntxent", "heads")


@pytest.mark.faults
@pytest.mark.timeout(450)
@pytest.mark.parametrize("name", SCRIPTS)
def test_a_benchmark_at_its_smallest(tmp_path, run_script, name):
    """Each starts processes that import torch or Ray, which takes up to two minutes on a busy machine."""
    work = [] if name in NO_WORK else ["--work", tmp_path / "work"]
    done = run_script(f"{name}.py", *SCRIPTS[name].split(), *work, "--out", tmp_path / "out", timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    (path,) = (tmp_path / "out").glob("*.json")
    record, text = json.loads(path.read_text()), path.with_suffix(".md").read_text()
    assert record["failed"] == {} and record["command"].startswith(f"python benchmarks/{name}.py")
    assert text.startswith("# ") and "| --- | ---: |" in text and "FAILED" not in text
    runs = record.get("runs") or record["rounds"]
    assert all(runs.values() if isinstance(runs, dict) else runs)
    if name == "loader":
        ms = {part: times[0] for part, times in runs["parts"][0]["ms"].items()}
        assert 0 < ms["reading"] < ms["drawing"] < ms["loader"] and ms["decoding"] + ms["views"] < ms["loader"]
        (run,) = runs["memory"]
        assert len(run["resident_bytes"]) == 10 and all(100e6 < each <= run["peak_bytes"] for each in run["resident_bytes"])
    if name == "step":
        for (run,) in runs.values():
            assert run["img_per_s"] == pytest.approx(2 * 4 * run["steps"] / run["seconds"])
        assert runs["joint"][0]["steps"] >= record["timed"]["steps"] >= 3 and not list((tmp_path / "work").glob("run-*"))
