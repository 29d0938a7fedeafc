"""What a build reports about refused and converted images, one sentence each."""

from pathlib import Path

import numpy as np
import pyarrow as pa

from sharding.images.image_processing import ImageOptions
from sharding.manifest_writer import ShardContents
from sharding.sources.file_listing import counted
from sharding.sources.scan import Scan, source_names


def refusal_messages(scan: Scan, contents: ShardContents, out: Path, strict: bool) -> list[str]:
    """The sentence on refused images, if any. Raises ValueError when no image is left, or when strict is True."""
    count = contents.refused.total()
    if not count:
        return []
    assert contents.first_refused is not None
    row, detail = contents.first_refused
    reasons = ", ".join(f"{number:,} {reason}" for reason, number in sorted(contents.refused.items()))
    message = f"{counted(count, 'image was', 'images were')} refused ({reasons}), the first: {_source(scan, row)} ({detail})"
    if not len(contents.files):
        raise ValueError(f"all {message}: give images that can be decoded")
    if strict:
        raise ValueError(f"{message}; repair or remove it, or leave out --strict: nothing was written")
    return [f"{message}; the list is {out / 'quarantine.parquet'}"]


def processing_messages(scan: Scan, contents: ShardContents, options: ImageOptions) -> list[str]:
    """The sentences on converted images, on the loss of their encoding, and on formats that no GPU decodes."""
    messages = []
    converted = contents.counts["converted"]
    if count := converted.total():
        kinds = ", ".join(f"{number:,} {what}" for what, number in converted.most_common(8))
        more = ", ..." if len(converted) > 8 else ""
        messages.append(f"{counted(count, 'image was', 'images were')} converted: {kinds}{more}")
    if len(contents.psnr):
        worst = int(np.argmin(contents.psnr))
        mean = float(contents.psnr.mean(dtype=np.float64))
        source = _source(scan, int(contents.psnr_files[worst]))
        messages.append(f"PSNR of lossy encoding: mean {mean:.1f} dB, worst {contents.psnr[worst]:.1f} dB ({source})")
    if (count := contents.counts["format"]["png"]) and options.encode == "keep":
        messages.append(
            f"{count:,} PNG will be decoded on the CPU in training; --encode jpeg:95 or jpeg2000 (lossless) lets a GPU do it"
        )
    return messages


def _source(scan: Scan, row: int) -> str:
    return source_names(scan.files.take(pa.array([row])))[0]
