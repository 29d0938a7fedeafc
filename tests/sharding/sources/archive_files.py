"""Names as file systems take them, and tars and zips with such names."""

import io
import os
import tarfile
import zipfile
from collections.abc import Iterable
from pathlib import Path

from hypothesis import strategies as st

from sharding.sources.file_listing import SkippedFiles

# Names of files and folders: all bytes that a file system takes, but for names that are skipped. With .jpg at most 255 of them.
NAMES = st.one_of(
    st.binary(min_size=1, max_size=40),
    st.text(st.sampled_from("가각\u1100\u1161\u11a8종 \n-'.é\u0301"), min_size=1, max_size=12).map(str.encode),
    st.just(b"n" * 251),
).filter(lambda name: not {0, ord("/")} & set(name) and not SkippedFiles().skips(name))


def write_zip(path: Path, files: dict[bytes, bytes], *, method: int = zipfile.ZIP_STORED) -> Path:
    """A zip of a few files whose names do not say how they are encoded.

    zipfile would encode them. So it writes AAAAAAAAA, BBBBBBBBB, ..., which are then replaced.
    """
    file = io.BytesIO()
    letters = {bytes([ord("A") + number]) * max(9, len(name)): name for number, name in enumerate(files)}
    with zipfile.ZipFile(file, "w", method) as archive:
        for run, data in zip(letters, files.values(), strict=True):
            archive.writestr(run.decode(), data)
    data = file.getvalue()
    for run, name in letters.items():
        fill = len(run) - len(name)  # with ./ in front, which means nothing in a path
        data = data.replace(run, b"./" * (fill // 2) + b"/" * (fill % 2) + name)
    path.write_bytes(data)
    return path


def write_tar(path: Path, files: Iterable[tuple[bytes, bytes]], *, format: int = tarfile.GNU_FORMAT) -> Path:
    """A plain tar. files: (name, bytes), and a name may come again."""
    with tarfile.open(path, "w", format=format) as archive:
        for name, data in files:
            info = tarfile.TarInfo(os.fsdecode(name))
            info.size = len(data)
            archive.addfile(info, io.BytesIO(data))
    return path
