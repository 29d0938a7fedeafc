"""What a build has to say of the images that it refused or changed, one sentence each."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from sharding.images.image_processing import Treatment
from sharding.manifest_writer import Contents
from sharding.sources.scan import Scan, source_names


def refusals(scan: Scan, contents: Contents, out: Path, strict: bool) -> list[str]:
    """The sentence on refused images. Raises ValueError where there is nothing else, or where strict is True."""
    count = contents.refused.total()
    if not count:
        return []
    assert contents.first_refused is not None
    row, detail = contents.first_refused
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(contents.refused.items()))
    images = "1 image was refused" if count == 1 else f"{count:,} images were refused"
    said = f"{images} ({reasons}), the first: {_source(scan, row)} ({detail})"
    if not len(contents.files):
        raise ValueError(f"all {said}: give images that can be decoded")
    if strict:
        raise ValueError(f"{said}; mend or remove it, or leave out --strict: nothing was written")
    return [f"{said}; the list is {out / 'quarantine.parquet'}"]


def treatments(scan: Scan, contents: Contents, treatment: Treatment) -> list[str]:
    """The sentences on converted images, on what their encoding lost, and on those that no GPU decodes."""
    notes = []
    converted = contents.counts["converted"]
    if count := converted.total():
        kinds = ", ".join(f"{number:,} {what}" for what, number in converted.most_common(8))
        more = ", ..." if len(converted) > 8 else ""
        notes.append(f"{count:,} {'image was' if count == 1 else 'images were'} converted: {kinds}{more}")
    if len(contents.psnr):
        worst = int(np.argmin(contents.psnr))
        mean = float(contents.psnr.mean(dtype=np.float64))
        source = _source(scan, int(contents.psnr_files[worst]))
        notes.append(f"PSNR of what was encoded with loss: mean {mean:.1f} dB, worst {contents.psnr[worst]:.1f} dB ({source})")
    if (count := contents.counts["format"]["png"]) and treatment.encode == "keep":
        notes.append(
            f"{count:,} PNG will be decoded on the CPU in training; --encode jpeg:95 or jpeg2000 (lossless) lets a GPU do it"
        )
    return notes


def _source(scan: Scan, row: int) -> str:
    return source_names(scan.files.take(pa.array([row])))[0]
