"""Kill builds at random moments, and hold what they end in against an undisturbed build.

    python benchmarks/killed_builds.py --images data/breast --layout '{class}/{name}' --work /tmp/killed --kills 20

Each build is a command as a user types it, with all its processes killed by SIGKILL after a random part of the time that the
undisturbed build took; the same command follows until one ends by itself. Then every file must be the same, byte for byte. The
kills are spread over as many sets as that takes.
"""

import dataclasses
import hashlib
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path.insert(0, str(ROOT))

from sharding.cli import option, required, run_script  # noqa: E402


@dataclasses.dataclass(frozen=True)
class Config:
    """What is built and how often it is killed."""

    images: str = required("the folder of images to pack")
    work: str = required("an empty folder to work in")
    layout: str = option("{class}/{name}", "as for sharding/build.py")
    kills: int = option(20, "builds to kill")
    encode: str = option("keep", "as for sharding/build.py")
    seed: int = option(0, "of the moments")


def main(config: Config) -> None:
    """Kill, go on, compare; raise ValueError at the first difference."""
    work = Path(config.work)
    work.mkdir(parents=True, exist_ok=True)
    if any(work.iterdir()):
        raise ValueError(f"--work {work} is not empty: give another folder")
    started = time.monotonic()
    assert _build(config, work / "undisturbed" / "set", None)
    whole = time.monotonic() - started
    expected = _digests(work / "undisturbed" / "set")
    print(f"undisturbed: {whole:.1f} s, {len(expected)} files", flush=True)
    chance, kills, sets = random.Random(config.seed), 0, 0
    while kills < config.kills:
        out = work / "killed" / "set"
        moments = []
        while kills < config.kills:
            moment = chance.uniform(0, whole)
            if _build(config, out, moment):
                break
            kills += 1
            moments.append(f"{moment:.2f}")
        assert out.exists() or _build(config, out, None)
        if _digests(out) != expected:
            raise ValueError(f"{out} differs from {work / 'undisturbed' / 'set'} after kills at {', '.join(moments)} s")
        sets += 1
        left = "nothing else" if sorted(path.name for path in out.parent.iterdir()) == ["set"] else "something else"
        killed = f"killed after {', '.join(moments)} s" if moments else "not killed"
        print(f"set {sets}: {killed}; the same {len(expected)} files, and {left}", flush=True)
        shutil.rmtree(out.parent)
    print(f"{kills} kills over {sets} sets: every set is the same as the undisturbed one")


def _build(config: Config, out: Path, seconds: float | None) -> bool:
    """Run the build; kill it after so many seconds. Returns whether it ended by itself."""
    command = [sys.executable, str(ROOT / "sharding/build.py"), config.images, "--out", str(out), "--layout", config.layout]
    command += ["--split", "train=0.8,test=0.2", "--encode", config.encode]
    build = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True, start_new_session=True)
    try:
        _, said = build.communicate(timeout=seconds)
    except subprocess.TimeoutExpired:
        os.killpg(build.pid, signal.SIGKILL)
        build.communicate()
        return False
    if build.returncode:
        raise ValueError(f"the build failed: {said.strip()}")
    return True


def _digests(folder: Path) -> dict[str, str]:
    return {path.name: hashlib.sha256(path.read_bytes()).hexdigest() for path in sorted(folder.iterdir())}


if __name__ == "__main__":
    sys.exit(run_script(main, Config, prog="benchmarks/killed_builds.py", description=(__doc__ or "").split("\n")[0]))
