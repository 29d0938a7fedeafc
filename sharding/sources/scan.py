"""Scan the sources: one row per image, in an order that depends on names alone.

A source is a folder, or a tar or zip that is read in place. The fields of an image come from its path (a layout) or from a table.
`Scan.notes` reports everything that was left out and why, one sentence each.
"""

import math
import os
import re
import stat
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import groupby
from typing import NamedTuple

import pyarrow as pa
import pyarrow.compute as pc

from sharding.field_values import normalize_column
from sharding.sources.archives import images_in
from sharding.sources.file_listing import ImageBatch, SkippedFiles, counted, printable, split_path
from sharding.sources.filters import apply_where, parse_where
from sharding.sources.folders import Visited, images_under
from sharding.sources.image_table import LOCATION, ImageTableBuilder
from sharding.sources.label_table import LabelTable, SourcePaths, UnmatchedRow, match_table, read_label_table
from sharding.sources.layout import LABELLED_DEFAULT, Layout, parse_layout
from sharding.sources.linked_images import repeated_images


@dataclass
class Scan:
    """The images of the sources, and messages about what was left out.

    files: columns of LOCATION, then a string column for each field, null where the field is empty. fields: their names.
    """

    files: pa.Table
    fields: tuple[str, ...]
    notes: list[str]


def scan_sources(
    sources: Sequence[str | os.PathLike],
    *,
    layout: str | None = None,
    table: str | os.PathLike | None = None,
    where: Sequence[str] = (),
    labelled: bool = True,
    split_field: str = "split",
    system_files: bool = False,
) -> Scan:
    """List every image in the sources that the layout matches, that is in the table and that `where` selects.

    Rows are ordered by source and then by relative path (as bytes). Rows of the table without an image come last, with size -1.
    layout: see sharding.sources.layout; None means `{class}/{name}`, or any path with a table or without labels.
    table: see sharding.sources.label_table. where: see sharding.sources.filters; conditions on one field are joined by "or" for
    `=` and by "nor" for `!=`, conditions on different fields by "and".
    split_field: the field that may give the split. system_files: take files and folders with SYSTEM_NAMES too.
    Values of fields are normalized (sharding.field_values). An image that links lead to again is listed again only with another
    class or split.
    Raises ValueError when a source is missing, has no image or is damaged, when layout, table or where leave nothing, and when
    an image of a labelled set has no class; OSError when a folder cannot be listed.
    """
    if not sources:
        raise ValueError("no source was given")
    labels = read_label_table(os.fspath(table)) if table is not None else None
    parsed = parse_layout(layout or LABELLED_DEFAULT) if layout or (labelled and labels is None) else None
    fields = _all_fields(parsed, labels, labelled)
    conditions = parse_where(where, fields)

    columns = [field for field in fields if field != "name" or "name" in conditions]
    depth = parsed.class_depth if parsed else 0
    builder = ImageTableBuilder(parsed, [field for field in columns if parsed and field in parsed.fields], depth)
    skipped, visited = SkippedFiles(system_files, depth), Visited()
    revisit_depth = parsed.depth if parsed else math.inf if labels else 0
    opened, tables = [], []
    for source in sources:
        opened.append(_open_source(os.fspath(source), visited))
        before = builder.seen
        images = _images(opened[-1], visited, skipped, revisit_depth)
        tables.append(_in_order(builder.table(images, opened[-1].container, opened[-1].prefix)))
        if builder.seen == before:
            raise ValueError(f"{source} has no image: give the folder that does" + skipped.hint())
    notes = skipped.notes() + _folder_notes(skipped.folders, builder.folders)
    if builder.unmatched == builder.seen:
        assert parsed is not None
        raise ValueError(
            f"--layout {parsed.text!r} matches none of {counted(builder.seen, 'image')}, such as {builder.example!r}: "
            "give one that fits the paths below the source, or --unlabelled without a layout"
        )
    if builder.unmatched:
        notes.append(f"{counted(builder.unmatched, 'file')} left out: the layout does not match, for example {builder.example!r}")
    if labels is not None:
        tables, more = _join_labels(tables, opened, labels, parsed, builder)
        notes += more
    found = pa.concat_tables(tables).unify_dictionaries()
    for field in columns:
        values, more = normalize_column(found[field], field)
        found = found.set_column(found.column_names.index(field), field, values)
        notes += more
    if conditions:
        kept, more = apply_where(found, conditions)
        notes += more
        if left_out := len(kept) - int(kept.sum()):
            notes.append(f"{counted(left_out, 'file')} left out by --where")
            found = found.filter(pa.array(kept))
    kept, more = repeated_images(found, [field for field in ("class" if labelled else "", split_field) if field in columns])
    notes += more
    if not kept.all():
        found = found.filter(pa.array(kept))
    if labelled:
        _check_classes(found)
    kept_fields = tuple(field for field in columns if field != "name")
    # In one chunk, because taking rows from many chunks joins them each time.
    scan = Scan(found.select([*LOCATION, *kept_fields]).combine_chunks(), kept_fields, notes)
    del found, tables
    pa.default_memory_pool().release_unused()  # what sorting and joining used: as much again as the rows
    return scan


def source_names(files: pa.Table) -> list[str]:
    """The path of each row for messages and the manifest; `<archive>/<member>` for a member."""
    rows = zip(files["container"].to_pylist(), files["path"].to_pylist(), strict=True)
    return [printable(path) if container is None else f"{printable(container)}/{printable(path)}" for container, path in rows]


def _all_fields(layout: Layout | None, labels: LabelTable | None, labelled: bool) -> tuple[str, ...]:
    """The fields of the layout, then those of the table. Raises ValueError when both give one, or neither gives the class."""
    of_layout = layout.fields if layout else ()
    of_table = tuple(labels.fields) if labels else ()
    if labels and (twice := [field for field in of_layout if field in of_table]):
        raise ValueError(f"--layout and --table {labels.file} both give {twice[0]!r}: leave it out of one of them")
    if labelled and "class" not in of_layout + of_table:
        if labels:
            raise ValueError(
                f"--table {labels.file} has no column 'class': add it, or a --layout with {{class}}, or give --unlabelled"
            )
        assert layout is not None
        raise ValueError(f"--layout {layout.text!r} captures no class: add {{class}}, or give --unlabelled")
    return of_layout + of_table


class _Source(NamedTuple):
    """A source to scan. container: its path if it is an archive. prefix: prepended to each path below it."""

    path: bytes
    container: bytes | None
    prefix: bytes


def _open_source(source: str, visited: Visited) -> _Source:
    path = os.fsencode(source)
    if not os.path.exists(path):
        raise ValueError(f"{source}: there is no such folder; give the one that holds the images")
    if os.path.isdir(path):
        return _Source(path, None, os.path.join(path, b""))
    status = os.stat(path)
    if not stat.S_ISREG(status.st_mode):
        raise ValueError(f"{source} is neither a folder nor a file: give the folder that holds the images")
    if (status.st_dev, status.st_ino) in visited:
        raise ValueError(f"{source} was given twice: give it once")
    visited.add((status.st_dev, status.st_ino))
    return _Source(path, path, b"")


def _images(source: _Source, visited: Visited, skipped: SkippedFiles, revisit_depth: float) -> Iterator[ImageBatch]:
    if source.container:
        return images_in(source.path, skipped)
    return images_under(source.path, visited, skipped, revisit_depth)


def _in_order(table: pa.Table) -> pa.Table:
    """A source's images sorted by path: those behind links come last."""
    if not pc.any(table["linked"]).as_py():
        return table
    return table.take(pc.sort_indices(table, sort_keys=[("path", "ascending")]))


def _folder_notes(seen: set[bytes], taken: set[bytes]) -> list[str]:
    """A sentence on the folders, as deep as that of the class, from which no image is taken."""
    with_images = {folder[: slash.start()] for folder in taken for slash in re.finditer(b"/|$", folder)}
    missing = seen - with_images
    outermost = sorted(folder for folder in missing if folder.rpartition(b"/")[0] not in missing)
    if not outermost:
        return []
    names = ", ".join(printable(folder) for folder in outermost[:8]) + (", ..." if len(outermost) > 8 else "")
    return [f"no image was taken from {counted(len(outermost), 'folder')}: {names}"]


def _join_labels(
    tables: Sequence[pa.Table], sources: Sequence[_Source], labels: LabelTable, layout: Layout | None, builder: ImageTableBuilder
) -> tuple[list[pa.Table], list[str]]:
    """The images that have labels, with their fields; then the labels without an image; and messages about both."""
    source_paths = [
        SourcePaths(_nfc(os.path.abspath(source.path)), _below(table["path"], source))
        for source, table in zip(sources, tables, strict=True)
    ]
    matched = match_table(labels, source_paths)
    joined = [
        _with_fields(table.filter(pc.is_valid(rows)), labels, rows.drop_null())
        for table, rows in zip(tables, matched.rows, strict=True)
    ]
    # An image that the layout does not match may be there, and its row is no missing image.
    missing: list[UnmatchedRow] = []
    unmatched: list[UnmatchedRow] = []
    for row in matched.missing:
        (missing if layout is None or layout.match(row.path) else unmatched).append(row)
    for number, group in groupby(missing, key=lambda row: row.source):
        rows = list(group)
        source = sources[number] if number is not None else _Source(b"", None, b"")
        found = (ImageBatch(folder, [name], [-1], [-1]) for folder, name in (split_path(row.path.encode()) for row in rows))
        table = builder.table(found, source.container, source.prefix)
        joined.append(_with_fields(table, labels, pa.chunked_array([[row.row for row in rows]], pa.int64())))
    if missing:
        rows_name = counted(len(missing), "row of --table names", "rows of --table name")
        matched.notes.append(f"{rows_name} no image in the sources, for example {missing[0].path!r}: unreadable")
    if unmatched:
        matched.notes.append(
            f"{counted(len(unmatched), 'row')} of --table left out: the layout does not match, for example {unmatched[0].path!r}"
        )
    return joined, matched.notes


def _with_fields(table: pa.Table, labels: LabelTable, rows: pa.ChunkedArray) -> pa.Table:
    for field, words in labels.fields.items():
        table = table.append_column(field, pc.take(words, rows))
    return table


def _below(paths: pa.ChunkedArray, source: _Source) -> pa.ChunkedArray:
    """Paths below the source, as text in NFC."""
    start = len(source.prefix)
    chunks = [[_nfc(path[start:]) for path in chunk.to_pylist()] for chunk in paths.chunks]
    return pa.chunked_array(chunks, pa.string())


def _nfc(path: bytes) -> str:
    return unicodedata.normalize("NFC", printable(path))


def _check_classes(files: pa.Table) -> None:
    if count := files["class"].null_count:
        example = source_names(files.filter(pc.is_null(files["class"])).slice(0, 1))[0]
        images = counted(count, "image has no class:", "images have no class, the first:")
        raise ValueError(f"{images} {example}; give it one in --table or by its folder's name, remove it, or give --unlabelled")
