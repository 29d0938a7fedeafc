"""Source folders -> one record per image, in an order that depends on names alone.

Nothing is passed over in silence: `Scan.notes` says what was skipped and why, one sentence each.
"""

import os
import unicodedata
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from sharding.layout import LABELLED_DEFAULT, Layout, parse_layout

# Files with these extensions are taken for images and looked at; what cannot be used is then refused by name.
IMAGE_EXTENSIONS = frozenset(
    ("jpg", "jpeg", "jpe", "jfif", "png", "gif", "tif", "tiff", "bmp", "webp", "jp2", "j2k", "heic", "avif")
)


class Record(NamedTuple):
    """One image file: the path to open, the path to show, and the fields that its layout captured."""

    path: str
    source: str
    fields: dict[str, str | None]


@dataclass
class Scan:
    """What the source folders hold, and what was left out."""

    records: list[Record]
    layout: Layout | None
    notes: list[str] = field(default_factory=list)


def scan_sources(sources: Sequence[str], *, layout: str | None = None, where: Sequence[str] = (), labelled: bool = True) -> Scan:
    """Every image under the source folders that the layout matches and `where` lets through.

    Records are ordered by source and then by relative path. Folders are followed through symbolic links, each once.
    layout: see sharding.layout; None means `{class}/{name}`, or any path where labelled is False.
    where: `field=value` conditions; the same field again means "or", another field means "and".
    Raises ValueError where a folder is missing or holds no image, or where layout or where leave nothing.
    """
    if not sources:
        raise ValueError("no source folder was given")
    parsed = parse_layout(layout or LABELLED_DEFAULT) if layout or labelled else None
    if labelled and parsed is not None and "class" not in parsed.fields:
        raise ValueError(f"--layout {parsed.text!r} captures no class: add {{class}}, or say --unlabelled")
    conditions = _parse_where(where, parsed)

    skipped = _Skipped()
    visited: set[tuple[int, int]] = set()
    found: list[tuple[str, str]] = []  # path to open, path relative to its source
    for source in sources:
        images = _images_under(source, visited, skipped)
        if not images:
            raise ValueError(f"{source} holds no image: give the folder that does" + skipped.hint())
        found += [(os.path.join(source, relative), relative) for relative in images]

    records, unmatched = [], []
    for path, relative in found:
        fields = parsed.match(printable(relative)) if parsed else {}
        if fields is None:
            unmatched.append(relative)
        else:
            records.append(Record(path, printable(path), fields))
    if not records:
        assert parsed is not None
        raise ValueError(
            f"--layout {parsed.text!r} matches none of {len(found):,} images, for example not"
            f" {printable(unmatched[0])!r}: give one that fits the paths below the source, or --unlabelled without a layout"
        )

    notes = skipped.notes()
    if unmatched:
        assert parsed is not None
        notes.append(f"{_files(len(unmatched))} left out: the layout does not match, for example {printable(unmatched[0])!r}")
    if conditions:
        kept = [r for r in records if all(r.fields[name] in allowed for name, allowed in conditions.items())]
        if not kept:
            raise ValueError(_nothing_where(records, conditions))
        if len(kept) < len(records):
            notes.append(f"{_files(len(records) - len(kept))} left out by --where")
        records = kept
    return Scan(records, parsed, notes)


def _parse_where(where: Sequence[str], layout: Layout | None) -> dict[str, set[str]]:
    conditions: dict[str, set[str]] = {}
    for text in where:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--where {text!r} is not of the form field=value")
        known = layout.fields if layout else ()
        if name not in known:
            raise ValueError(f"--where {text!r}: the layout has no field {name!r}; it has {', '.join(known) or 'none'}")
        conditions.setdefault(name, set()).add(unicodedata.normalize("NFC", value))  # as the layout does
    return conditions


def _nothing_where(records: list[Record], conditions: dict[str, set[str]]) -> str:
    for name, allowed in conditions.items():
        values = sorted({str(r.fields[name]) for r in records if r.fields[name] is not None})
        if not allowed & set(values):
            more = ", ..." if len(values) > 8 else ""
            return f"--where leaves none of {len(records):,} images: {name} is one of {', '.join(values[:8])}{more}"
    return f"--where leaves none of {len(records):,} images: no image meets all conditions at once"


def _images_under(source: str, visited: set[tuple[int, int]], skipped: "_Skipped") -> list[str]:
    """Relative posix paths of the images under one source folder, sorted."""
    if not os.path.exists(source):
        raise ValueError(f"{source}: there is no such folder; give the one that holds the images")
    if not os.path.isdir(source):
        raise ValueError(f"{source} is a file: give the folder that holds the images")
    images: list[str] = []
    folders = [""]
    while folders:
        folder = folders.pop()
        status = os.stat(os.path.join(source, folder))
        if (status.st_dev, status.st_ino) in visited:
            skipped.repeated_folders += 1
            continue
        visited.add((status.st_dev, status.st_ino))
        with os.scandir(os.path.join(source, folder)) as entries:
            listed = sorted(entries, key=lambda entry: entry.name)
        inner = []
        for entry in listed:
            relative = f"{folder}/{entry.name}" if folder else entry.name
            if entry.name.startswith("."):
                skipped.hidden += 1
            elif entry.is_dir():
                inner.append(relative)
            elif not (entry.is_file() or entry.is_symlink()):
                skipped.special += 1  # a pipe or a socket would block whoever opens it
            elif _extension(entry.name) in IMAGE_EXTENSIONS:
                images.append(relative)
            else:
                skipped.extensions[_extension(entry.name)] += 1
        folders += reversed(inner)  # so that the first by name is visited next
    return sorted(images)


@dataclass
class _Skipped:
    """Counts of what a scan passed over."""

    hidden: int = 0
    special: int = 0
    repeated_folders: int = 0
    extensions: Counter = field(default_factory=Counter)

    def notes(self) -> list[str]:
        notes = []
        if self.extensions:
            kinds = ", ".join(
                f"{count:,} {'.' + e if e else 'without extension'}" for e, count in sorted(self.extensions.items())
            )
            notes.append(f"{_files(self.extensions.total())} skipped by extension: {kinds}")
        if self.hidden:
            notes.append(f"{self.hidden:,} hidden {'entry' if self.hidden == 1 else 'entries'} skipped (name begins with a dot)")
        if self.special:
            notes.append(f"{_files(self.special)} skipped: neither a file nor a folder")
        if self.repeated_folders:
            folders = "folder was" if self.repeated_folders == 1 else "folders were"
            notes.append(f"{self.repeated_folders:,} {folders} reached again (by a link or as another source) and taken once")
        return notes

    def hint(self) -> str:
        notes = self.notes()
        return f" ({'; '.join(notes)})" if notes else ""


def _extension(name: str) -> str:
    stem, dot, extension = name.rpartition(".")
    return printable(extension.lower()) if stem and dot else ""


def printable(path: str) -> str:
    """A path that any file can store: bytes that are not UTF-8 become \\xNN."""
    return os.fsencode(path).decode("utf-8", "backslashreplace")


def _files(count: int) -> str:
    return "1 file" if count == 1 else f"{count:,} files"
