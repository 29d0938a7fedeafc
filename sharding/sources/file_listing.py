"""What folders and archives are searched for, what they give, and how what they pass over is counted and said."""

import os
from collections import Counter
from dataclasses import dataclass, field
from typing import NamedTuple

# Files with these extensions are taken for images and looked at; what cannot be used is then refused by name.
IMAGE_EXTENSIONS = frozenset(
    (b"jpg", b"jpeg", b"jpe", b"jfif", b"png", b"gif", b"tif", b"tiff", b"bmp", b"webp", b"jp2", b"j2k", b"heic", b"avif")
)
ARCHIVE_EXTENSIONS = frozenset((b"tar", b"zip", b"tgz"))

BATCH = 16_384  # files that are held as Python objects at a time; the rest are columns in Arrow


class Found(NamedTuple):
    """Images that lie in one folder, sorted by name: at most BATCH of them, and not always all.

    folder: below the source, b"" for the source itself. sizes: bytes, -1 where a link leads nowhere. offsets: where to begin
    reading in the archive, -1 where there is none.
    """

    folder: bytes
    names: list[bytes]
    offsets: list[int]
    sizes: list[int]


@dataclass
class Skipped:
    """Counts of what a scan passed over, and sentences on what it saw besides."""

    hidden: int = 0
    special: int = 0
    repeated_folders: int = 0
    archives: list[str] = field(default_factory=list)
    extensions: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def notes(self) -> list[str]:
        notes = []
        if self.extensions:
            kinds = ", ".join(
                f"{count:,} {'.' + e if e else 'without extension'}" for e, count in sorted(self.extensions.items())
            )
            notes.append(f"{files(self.extensions.total())} skipped by extension: {kinds}")
        if self.archives:
            number, are = ("1 archive", "was") if len(self.archives) == 1 else (f"{len(self.archives):,} archives", "were")
            notes.append(
                f"{number} in the folders {are} not opened, for example {min(self.archives)}: to pack it, give it as a source"
            )
        if self.hidden:
            notes.append(f"{self.hidden:,} hidden {'entry' if self.hidden == 1 else 'entries'} skipped (name begins with a dot)")
        if self.special:
            notes.append(f"{files(self.special)} skipped: neither a file nor a folder")
        if self.repeated_folders:
            folders = "folder was" if self.repeated_folders == 1 else "folders were"
            notes.append(f"{self.repeated_folders:,} {folders} reached again (by a link or as another source) and taken once")
        return notes + self.remarks

    def hint(self) -> str:
        notes = self.notes()
        return f" ({'; '.join(notes)})" if notes else ""


def extension(name: bytes) -> bytes:
    """What follows the last dot of a file name, in lower case; nothing where the dot comes first."""
    stem, dot, end = name.rpartition(b".")
    return end.lower() if stem and dot else b""


def parted(path: bytes) -> tuple[bytes, bytes]:
    """A relative path's folder (b"" where it has none) and name."""
    folder, _, name = path.rpartition(b"/")
    return folder, name


def printable(path: str | bytes) -> str:
    """A path that any file can store: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"
