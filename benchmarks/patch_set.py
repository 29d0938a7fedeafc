"""The patches that the benchmarks of the loader and of the training step work on: drawn or given, packed, read into memory once.

python benchmarks/patch_set.py --work DISK/bench --patches 8192      # beforehand, so that no benchmark has to
"""

from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from drawn_images import draw_images
from harness import script
from report import Record

from sharding.cli import option, required
from sharding.manifest import read_manifest
from sharding.packing import build_shards
from sharding.process_pool import available_cores

_QUALITY = 90  # of the drawn JPEGs: 22 KB at 224 px
_DISTINCT = 1000  # different pictures among the drawn ones, at most; the others differ in a comment of their header


class PatchSet(NamedTuple):
    """shards: folder of the shard set; images: of the files that it was built from; described: what a result says of them."""

    shards: str
    images: str
    described: Record


def patch_set(given: str | None, work: Path, *, patches: int, size: int, batch_size: int, cores: int) -> PatchSet:
    """The shard set of a folder of images, or of drawn ones, made under `work` where it is not there, and read into memory.

    given: that folder; None: patches of `size` px are drawn. Raises ValueError for a folder that is not there, or holds fewer
    images than a batch.
    """
    if given is not None and not Path(given).is_dir():
        raise ValueError(f"--images {given}: there is no such folder; give the one that holds a folder for each class")
    work.mkdir(parents=True, exist_ok=True)
    if given is not None:
        folder = Path(given).resolve()
    else:
        distinct = min(_DISTINCT, patches)
        folder = draw_images(work, patches=patches, size=size, distinct=distinct, quality=_QUALITY, workers=cores)
    built = build_shards([folder], work / f"{folder.name}-shards", unlabelled=True, workers=cores)
    manifest = read_manifest(built.out)
    if len(manifest) < batch_size:
        raise ValueError(f"{folder}: {len(manifest):,} patches are fewer than --batch-size {batch_size}: make that smaller")
    for path in (*manifest["source"].to_pylist(), *built.out.iterdir()):
        Path(path).read_bytes()
    kilobytes = float(manifest["size"].to_numpy().mean()) / 1e3
    described = {"patches": len(manifest), "kilobytes": kilobytes, "left_out": built.quarantined, "drawn": given is None}
    return PatchSet(str(built.out), str(folder), described)


@dataclass(frozen=True)
class Config:
    """What is drawn, and where."""

    work: str = required("a folder to work in: drawn images and the shard set stay there")
    patches: int = option(8192, "patches to draw")
    size: int = option(224, "their side, pixels")


def main(config: Config) -> None:
    work = Path(config.work).resolve()
    sizes = {"patches": config.patches, "size": config.size}
    print(patch_set(None, work, batch_size=1, cores=available_cores(), **sizes).shards)


if __name__ == "__main__":
    script(main, Config, __file__, __doc__)
