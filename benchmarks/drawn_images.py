"""Many image files from few different pictures, no two of them with equal contents.

Drawing a patch takes far longer than packing one, so a picture is drawn once and written many times, each time with another
comment in its JPEG header: a packer that looks for copies finds none, and a decoder has the same work with every one.
"""

import functools
import io
import multiprocessing
import os
import shutil
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path

import PIL.Image

from sharding.drawn_patches.patches import draw_patch, patch_classes

LAYOUT = "{class}/{slide}/{name}"
EXTENSIONS = (".jpg", ".jpeg", ".png")  # what every contender takes
_LEAST_SIZE = 32  # pixels: smaller patches are cut out of one of this size
_FOLDER = 10_000  # files in a folder, about
_SLIDES = 12  # at least
_SEED = 7


def draw_images(folder: Path, *, patches: int, size: int, distinct: int, quality: int, workers: int) -> Path:
    """A folder of so many JPEGs, `{class}/{slide}/{name}.jpg`, of `distinct` pictures. It appears whole or not at all.

    folder: where it is made, under a name that tells the arguments, so that the same ones are drawn once. size: pixels a side.
    quality: of the JPEGs, with Pillow's halved colour (4:2:0), as most scripts that cut slides into patches save them.
    """
    out = folder / f"images-{patches}-of-{distinct}-{size}px-q{quality}"
    if out.exists():
        return out
    partial = out.with_name(f"{out.name}.partial")
    shutil.rmtree(partial, ignore_errors=True)
    kinds = patch_classes(distinct, _SEED)
    slides = max(_SLIDES, -(-patches // _FOLDER) * 2)  # the largest class has half of the patches
    draw = functools.partial(_draw_picture, size=size, quality=quality)
    with ProcessPoolExecutor(workers, mp_context=multiprocessing.get_context("spawn")) as pool:
        pictures = [_parted(jpeg) for jpeg in pool.map(draw, range(distinct), kinds, chunksize=8)]
    places = [[f"{partial}/{kind}/S{slide:04d}" for slide in range(slides)] for kind in kinds]
    for place in {place for each in places for place in each}:
        os.makedirs(place)
    for i in range(patches):
        number, (head, tail) = i // distinct, pictures[i % distinct]
        with open(f"{places[i % distinct][number % slides]}/{i:08d}.jpg", "wb", buffering=0) as file:
            file.write(head + _comment(i) + tail)
    partial.rename(out)
    return out


def _draw_picture(index: int, kind: str, *, size: int, quality: int) -> bytes:
    patch = draw_patch("breast", kind, index=index, slide=index % _SLIDES, size=max(size, _LEAST_SIZE), seed=_SEED)
    file = io.BytesIO()
    PIL.Image.fromarray(patch[:size, :size]).save(file, "jpeg", quality=quality)
    return file.getvalue()


def _parted(jpeg: bytes) -> tuple[bytes, bytes]:
    """A JPEG's bytes up to the end of its first segment, which has to come first (JFIF's APP0), and the rest."""
    assert jpeg[:4] == b"\xff\xd8\xff\xe0", jpeg[:4]
    end = 4 + int.from_bytes(jpeg[4:6], "big")
    return jpeg[:end], jpeg[end:]


def _comment(number: int) -> bytes:
    """A comment segment (COM, ITU-T T.81 B.2.4.5); its length counts its own two bytes."""
    text = f"{number:012d}".encode()
    return b"\xff\xfe" + (2 + len(text)).to_bytes(2, "big") + text


def image_files(folder: str | Path) -> Iterator[tuple[str, int]]:
    """(path, label) of every image below a folder, in sorted order. The first folder's place among its like is the label."""
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir() and not entry.name.startswith("."))
    for label, name in enumerate(classes):
        for place, inner, names in os.walk(os.path.join(folder, name), followlinks=True):
            inner.sort()
            yield from ((f"{place}/{file}", label) for file in sorted(names) if file.lower().endswith(EXTENSIONS))
