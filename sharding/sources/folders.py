"""A source folder -> its images, folder by folder, in the order of their whole paths."""

import os
import stat
from bisect import bisect_left
from collections.abc import Iterator

from sharding.sources.file_listing import ARCHIVE_EXTENSIONS, BATCH, IMAGE_EXTENSIONS, Found, Skipped, extension, printable

Visited = set[tuple[int, int]]  # device and inode of each folder or archive that was taken


def images_under(source: bytes, visited: Visited, skipped: Skipped) -> Iterator[Found]:
    """The images under a folder, sorted by relative path (as bytes). Links to folders are followed, each folder once.

    Raises OSError where a folder cannot be listed.
    """
    # One entry per folder on the way down: its path below the source, its images, and the folders in it, last one first.
    # Both are sorted as they sort within whole paths: a folder by its name and a slash.
    trail = [_listed(source, b"", visited, skipped)]
    while trail:
        folder, names, folders = trail[-1]
        end = bisect_left(names, folders[-1]) if folders else len(names)
        for start in range(0, end, BATCH):
            yield _measured(source, folder, names[start : min(start + BATCH, end)], skipped)
        del names[:end]
        if folders:
            trail.append(_listed(source, _join(folder, folders.pop()[:-1]), visited, skipped))
        else:
            trail.pop()


def _listed(source: bytes, folder: bytes, visited: Visited, skipped: Skipped) -> tuple[bytes, list[bytes], list[bytes]]:
    """A folder, the names of its images, and those of its folders with a slash in reverse order: nothing if visited before."""
    path = _join(source, folder)
    names: list[bytes] = []
    folders: list[bytes] = []
    status = os.stat(path)
    if (status.st_dev, status.st_ino) in visited:
        skipped.repeated_folders += 1
        return folder, names, folders
    visited.add((status.st_dev, status.st_ino))
    with os.scandir(path) as entries:
        for entry in entries:
            name = entry.name
            kind = extension(name)
            if name.startswith(b"."):
                skipped.hidden += 1
            elif _is_folder(entry):
                folders.append(name + b"/")
            elif kind in IMAGE_EXTENSIONS:
                names.append(name)
            elif not (entry.is_symlink() or entry.is_file()):
                skipped.special += 1
            elif kind in ARCHIVE_EXTENSIONS:
                skipped.archives.append(printable(_join(path, name)))
            else:
                skipped.extensions[printable(kind)] += 1
    names.sort()
    folders.sort(reverse=True)
    return folder, names, folders


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to where one may not look
        return False


def _measured(source: bytes, folder: bytes, names: list[bytes], skipped: Skipped) -> Found:
    """The images with their sizes. A link that leads nowhere has the size -1: it shall be missed by name."""
    path = _join(source, folder)
    kept: list[bytes] = []
    sizes: list[int] = []
    for name in names:
        try:
            status = os.stat(path + b"/" + name)
        except OSError:
            kept.append(name)
            sizes.append(-1)
            continue
        if stat.S_ISREG(status.st_mode):
            kept.append(name)
            sizes.append(status.st_size)
        else:
            skipped.special += 1  # a pipe or a socket would block whoever opens it
    return Found(folder, kept, [-1] * len(kept), sizes)


def _join(folder: bytes, name: bytes) -> bytes:
    return os.path.join(folder, name) if name else folder
