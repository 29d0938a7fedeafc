"""Which files are taken as images, and how a scan lists them and counts the files that it skips."""

import os
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

# Files with these extensions are taken as images. Those that cannot be used are refused by name.
IMAGE_EXTENSIONS = frozenset(
    (b"jpg", b"jpeg", b"jpe", b"jfif", b"png", b"gif", b"tif", b"tiff", b"bmp", b"webp", b"jp2", b"j2k", b"heic", b"avif")
)
ARCHIVE_EXTENSIONS = frozenset((b"tar", b"zip", b"tgz"))

# Files and folders of operating systems, network storage and photo programs, in lower case: thumbnails, deleted files and copies,
# never data. More of them begin with a dot (.Trashes, ._1.jpg) and are hidden.
SYSTEM_NAMES = frozenset(
    (
        *(b"@eadir", b"#recycle", b"#snapshot", b"@recycle", b"@recently-snapshot", b"~snapshot", b"network trash folder"),
        *(b"$recycle.bin", b"recycler", b"system volume information", b"thumbs.db", b"ehthumbs.db", b"desktop.ini"),
        *(b"__macosx", b"lost+found", b"__pycache__"),
    )
)
_SYSTEM_SUFFIX = b".lrdata"  # previews of Lightroom

BATCH = 16_384  # files held as Python objects at a time; the rest are Arrow columns


class ImageBatch(NamedTuple):
    """At most BATCH images of one folder, sorted by name.

    folder: below the source, b"" for the source itself. sizes: bytes, -1 for a broken link. offsets: in the archive, -1 for a
    plain file. files: of plain files, device and inode, and whether a link leads there.
    """

    folder: bytes
    names: list[bytes]
    offsets: list[int]
    sizes: list[int]
    files: Sequence[tuple[int | None, int | None, bool]] = ()


@dataclass
class SkippedFiles:
    """What a scan skips, how often, and further remarks on the sources.

    take_system: whether files and folders with SYSTEM_NAMES are taken. folder_depth: how many folder names of a path to remember
    in `folders`; 0 remembers none.
    """

    take_system: bool = False
    folder_depth: int = 0
    folders: set[bytes] = field(default_factory=set)
    hidden: int = 0
    system: Counter[str] = field(default_factory=Counter)
    special: int = 0
    repeated_folders: int = 0
    archives: list[str] = field(default_factory=list)
    extensions: Counter[str] = field(default_factory=Counter)
    remarks: list[str] = field(default_factory=list)

    def skips(self, name: bytes) -> bool:
        """Whether a file or folder of this name is hidden or a system's; it is then counted."""
        if name.startswith(b"."):
            self.hidden += 1
            return True
        lower = name.lower()
        if self.take_system or not (lower in SYSTEM_NAMES or lower.endswith(_SYSTEM_SUFFIX)):
            return False
        self.system[printable(name)] += 1
        return True

    def saw_folder(self, folder: bytes) -> None:
        if self.folder_depth and folder:
            self.folders.add(cut_path(folder, self.folder_depth))

    def notes(self) -> list[str]:
        notes = []
        if self.extensions:
            kinds = ", ".join(
                f"{count:,} {'.' + e if e else 'without extension'}" for e, count in sorted(self.extensions.items())
            )
            notes.append(f"{counted(self.extensions.total(), 'file')} skipped by extension: {kinds}")
        if self.archives:
            archives = counted(len(self.archives), "archive in the folders was", "archives in the folders were")
            notes.append(f"{archives} not opened, for example {min(self.archives)}: to pack it, give it as a source")
        if self.hidden:
            notes.append(f"{counted(self.hidden, 'hidden entry', 'hidden entries')} skipped (name begins with a dot)")
        if self.system:
            names = ", ".join(f"{count:,} {name}" for name, count in sorted(self.system.items()))
            entries = counted(self.system.total(), "system file or folder", "system files or folders")
            notes.append(f"{entries} skipped ({names}): --system-files packs them")
        if self.special:
            notes.append(f"{counted(self.special, 'file')} skipped: neither a file nor a folder")
        if self.repeated_folders:
            folders = counted(self.repeated_folders, "folder was", "folders were")
            notes.append(f"{folders} reached again (by a link or as another source) and taken once")
        return notes + self.remarks

    def hint(self) -> str:
        notes = self.notes()
        return f" ({'; '.join(notes)})" if notes else ""


def extension(name: bytes) -> bytes:
    """What follows the last dot of a file name, in lower case; empty when the dot comes first."""
    stem, dot, end = name.rpartition(b".")
    return end.lower() if stem and dot else b""


def split_path(path: bytes) -> tuple[bytes, bytes]:
    """The folder (b"" if none) and the name of a relative path."""
    folder, _, name = path.rpartition(b"/")
    return folder, name


def cut_path(folder: bytes, depth: int) -> bytes:
    """The first `depth` names of a relative path."""
    return b"/".join(folder.split(b"/", depth)[:depth])


def printable(path: str | bytes) -> str:
    """A path as text that can be printed and stored: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def counted(count: int, one: str, several: str | None = None) -> str:
    """A number with its noun: "1 file", "2,000 files". several: by default with an s."""
    return f"{count:,} {one if count == 1 else several or f'{one}s'}"
