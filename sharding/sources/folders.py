"""Find the images under a source folder, in the order of their paths."""

import os
import stat
from bisect import bisect_left
from collections.abc import Iterator

from sharding.sources.file_listing import (
    ARCHIVE_EXTENSIONS,
    BATCH,
    IMAGE_EXTENSIONS,
    ImageBatch,
    SkippedFiles,
    extension,
    printable,
)

Visited = set[tuple[int, int]]  # device and inode of each folder or archive that was taken


def images_under(source: bytes, visited: Visited, skipped: SkippedFiles) -> Iterator[ImageBatch]:
    """The images under a folder, sorted by relative path (as bytes). Follows links to folders, and takes each folder once.

    Raises OSError when a folder cannot be listed.
    """
    # A stack of folders: the path below the source, the images, and the subfolders in reverse order. A subfolder sorts by its
    # name and a slash, as it does in a path.
    stack = [_list_folder(source, b"", visited, skipped)]
    while stack:
        folder, names, folders = stack[-1]
        end = bisect_left(names, folders[-1]) if folders else len(names)
        for start in range(0, end, BATCH):
            yield _with_sizes(source, folder, names[start : min(start + BATCH, end)], skipped)
        del names[:end]
        if folders:
            stack.append(_list_folder(source, _join(folder, folders.pop()[:-1]), visited, skipped))
        else:
            stack.pop()


def _list_folder(source: bytes, folder: bytes, visited: Visited, skipped: SkippedFiles) -> tuple[bytes, list[bytes], list[bytes]]:
    """A folder, its images, and its subfolders with a slash, in reverse order; empty for a folder that was visited before."""
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
    except OSError:  # a link to itself, or to a folder without permission
        return False


def _with_sizes(source: bytes, folder: bytes, names: list[bytes], skipped: SkippedFiles) -> ImageBatch:
    """The images with their sizes. A broken link has the size -1, so that it is refused by name."""
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
            skipped.special += 1  # opening a pipe or a socket would block
    return ImageBatch(folder, kept, [-1] * len(kept), sizes)


def _join(folder: bytes, name: bytes) -> bytes:
    return os.path.join(folder, name) if name else folder
