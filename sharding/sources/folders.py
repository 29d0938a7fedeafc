"""Find the images under a source folder: first by real folders, then by links to folders."""

import os
import stat
from bisect import bisect_left
from collections.abc import Iterator
from typing import NamedTuple

from sharding.sources.file_listing import (
    ARCHIVE_EXTENSIONS,
    BATCH,
    IMAGE_EXTENSIONS,
    ImageBatch,
    SkippedFiles,
    extension,
    printable,
)

Identity = tuple[int, int]  # device and inode of a folder or archive
Visited = set[Identity]  # of those that were taken by a path without links


def images_under(source: bytes, visited: Visited, skipped: SkippedFiles, revisit_depth: float = 0) -> Iterator[ImageBatch]:
    """The images under a folder: those in real folders, sorted by relative path (as bytes), then those behind links to folders.

    A folder is taken once, by its real path if it has one below the source. But a link leads to it again where the path by the
    link has at most `revisit_depth` folder names: a layout may give these images other fields. Such images have the same device
    and inode. A link to a folder above itself is not followed.
    Raises OSError when a folder cannot be listed.
    """
    walk = _Walk(source, visited, skipped, revisit_depth)
    yield from walk.images(_Link(b"", (), True), linked=False)
    while walk.links:
        links, walk.links = sorted(walk.links), []
        for link in links:
            yield from walk.images(link, linked=True)


class _Link(NamedTuple):
    """A link to a folder. above: the folders that its path leads through. revisits: whether it may lead to a folder again."""

    path: bytes
    above: tuple[Identity, ...]
    revisits: bool


class _Folder(NamedTuple):
    """A listed folder. subfolders: with a slash, in reverse order. links: the images that are links themselves."""

    path: bytes
    above: tuple[Identity, ...]
    images: list[bytes]
    subfolders: list[bytes]
    links: set[bytes]


class _Walk:
    def __init__(self, source: bytes, visited: Visited, skipped: SkippedFiles, revisit_depth: float) -> None:
        self.links: list[_Link] = []  # to folders, found and not followed yet
        self._source = source
        self._visited = visited
        self._followed: set[Identity] = set()  # folders that were taken by a path with a link
        self._skipped = skipped
        self._revisit_depth = revisit_depth

    def images(self, top: _Link, *, linked: bool) -> Iterator[ImageBatch]:
        """The images under a folder and its real subfolders, sorted by relative path."""
        # A subfolder sorts by its name and a slash, as it does in a path.
        stack = [self._list(top, linked)]
        while stack:
            folder = stack[-1]
            names, subfolders = folder.images, folder.subfolders
            end = bisect_left(names, subfolders[-1]) if subfolders else len(names)
            for start in range(0, end, BATCH):
                yield self._batch(folder, names[start : min(start + BATCH, end)], linked)
            del names[:end]
            if subfolders:
                path = _join(folder.path, subfolders.pop()[:-1])
                stack.append(self._list(_Link(path, folder.above, top.revisits), linked))
            else:
                stack.pop()

    def _list(self, place: _Link, linked: bool) -> _Folder:
        """List a folder; as empty if it was taken before and is not to be taken again."""
        path = _join(self._source, place.path)
        status = os.stat(path)
        identity = status.st_dev, status.st_ino
        folder = _Folder(place.path, (*place.above, identity), [], [], set())
        again = identity in self._visited or identity in self._followed
        depth = len(place.path.split(b"/"))
        if identity in place.above or (again and not (linked and place.revisits and depth <= self._revisit_depth)):
            self._skipped.repeated_folders += 1
            return folder
        (self._followed if linked else self._visited).add(identity)
        skipped = SkippedFiles(self._skipped.take_system) if again else self._skipped
        skipped.saw_folder(place.path)
        with os.scandir(path) as entries:
            for entry in entries:
                name = entry.name
                kind = extension(name)
                if skipped.skips(name):
                    continue
                if _is_folder(entry):
                    if entry.is_symlink():
                        self.links.append(_Link(_join(place.path, name), folder.above, not again))
                    else:
                        folder.subfolders.append(name + b"/")
                elif kind in IMAGE_EXTENSIONS:
                    folder.images.append(name)
                    if entry.is_symlink():
                        folder.links.add(name)
                elif not (entry.is_symlink() or entry.is_file()):
                    skipped.special += 1
                elif kind in ARCHIVE_EXTENSIONS:
                    skipped.archives.append(printable(_join(path, name)))
                else:
                    skipped.extensions[printable(kind)] += 1
        folder.images.sort()
        folder.subfolders.sort(reverse=True)
        return folder

    def _batch(self, folder: _Folder, names: list[bytes], linked: bool) -> ImageBatch:
        """The images with their sizes. A broken link has the size -1, so that it is refused by name."""
        path = _join(self._source, folder.path)
        kept: list[bytes] = []
        sizes: list[int] = []
        files: list[tuple[int | None, int | None, bool]] = []
        for name in names:
            try:
                status = os.stat(path + b"/" + name)
            except OSError:
                kept.append(name)
                sizes.append(-1)
                files.append((None, None, False))
                continue
            if stat.S_ISREG(status.st_mode):
                kept.append(name)
                sizes.append(status.st_size)
                files.append((status.st_dev, status.st_ino, linked or name in folder.links))
            else:
                self._skipped.special += 1  # opening a pipe or a socket would block
        return ImageBatch(folder.path, kept, [-1] * len(kept), sizes, files)


def _is_folder(entry: os.DirEntry) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link to itself, or to a folder without permission
        return False


def _join(folder: bytes, name: bytes) -> bytes:
    return os.path.join(folder, name) if name else folder
