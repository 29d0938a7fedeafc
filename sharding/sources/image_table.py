"""Image files as they are found -> columns, with the fields that a layout captures from their paths."""

from collections.abc import Iterable, Sequence

import pyarrow as pa

from sharding.sources.file_listing import BATCH, Found, printable
from sharding.sources.layout import Layout, Values

PLACE = {
    "container": pa.dictionary(pa.int32(), pa.binary()),  # the tar or zip to open; null: a plain file
    "path": pa.binary(),  # of the file to open, or of the member
    "offset": pa.int64(),  # where to begin in the archive: at the data in a tar, at the local header in a zip; else -1
    "size": pa.int64(),  # bytes, as the file system or the archive says; -1 where there is no such file
}


class Gathering:
    """Turns what is found into tables, and counts what it was given and what the layout does not match.

    Files are Python objects only until a batch of them is full, so that ten million take as many bytes as their columns.
    """

    def __init__(self, layout: Layout | None, fields: Sequence[str]) -> None:
        """fields: those of the layout that become columns."""
        self.seen = 0
        self.unmatched = 0
        self.example = ""  # the first path that the layout does not match
        self._layout = layout
        self._places = {field: layout.fields.index(field) for field in fields} if layout else {}
        self._paths: list[bytes] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._values: list[Values] = []

    def table(self, found: Iterable[Found], container: bytes | None, prefix: bytes) -> pa.Table:
        """Columns of PLACE and of the fields, a row for each image that the layout matches.

        container: the archive that the images lie in. prefix: what stands before each path below the source.
        """
        batches = [self._flushed(container)]  # with no row: so that there are columns even where nothing is found
        for batch in found:
            self._add(batch, prefix)
            if len(self._paths) >= BATCH:
                batches.append(self._flushed(container))
        batches.append(self._flushed(container))
        return pa.Table.from_batches(batches)

    def _add(self, found: Found, prefix: bytes) -> None:
        self.seen += len(found.names)
        if found.folder:
            prefix += found.folder + b"/"
        if self._layout is None:
            self._paths += [prefix + name for name in found.names]
            self._offsets += found.offsets
            self._sizes += found.sizes
            return
        values_of = self._layout.names_in(printable(found.folder))
        for name, offset, size in zip(found.names, found.offsets, found.sizes, strict=True):
            values = values_of(printable(name))
            if values is None:
                self.unmatched += 1
                self.example = self.example or printable(found.folder + b"/" + name if found.folder else name)
            else:
                self._paths.append(prefix + name)
                self._offsets.append(offset)
                self._sizes.append(size)
                self._values.append(values)

    def _flushed(self, container: bytes | None) -> pa.RecordBatch:
        count = len(self._paths)
        codes = pa.nulls(count, pa.int32()) if container is None else pa.repeat(pa.scalar(0, pa.int32()), count)
        columns = {
            "container": pa.DictionaryArray.from_arrays(codes, pa.array([] if container is None else [container], pa.binary())),
            "path": pa.array(self._paths, PLACE["path"]),
            "offset": pa.array(self._offsets, PLACE["offset"]),
            "size": pa.array(self._sizes, PLACE["size"]),
        }
        for field, place in self._places.items():
            columns[field] = pa.array([values[place] for values in self._values], pa.string()).dictionary_encode()
        for column in (self._paths, self._offsets, self._sizes, self._values):
            column.clear()
        return pa.RecordBatch.from_pydict(columns)
