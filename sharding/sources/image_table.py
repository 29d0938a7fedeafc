"""Collect the images that a scan finds into a table, with the fields that the layout captures from their paths."""

from collections.abc import Iterable, Sequence

import pyarrow as pa

from sharding.sources.file_listing import BATCH, ImageBatch, cut_path, printable
from sharding.sources.layout import Layout, Values

LOCATION = {
    "container": pa.dictionary(pa.int32(), pa.binary()),  # the tar or zip; null: a plain file
    "path": pa.binary(),  # of the file, or of the member
    "offset": pa.int64(),  # in the archive: of the data in a tar, of the local header in a zip; else -1
    "size": pa.int64(),  # bytes, by the file system or the archive; -1 where there is no such file
}
# Which file it is, to find those that links lead to again.
FILE = {
    "device": pa.uint64(),  # null in an archive, and where there is no such file
    "inode": pa.uint64(),
    "linked": pa.bool_(),  # whether the path has a link in it
}


class ImageTableBuilder:
    """Makes tables from batches of images, and counts the images and those that the layout does not match.

    A batch of files at a time is held as Python objects; the others take no more memory than their columns.
    """

    def __init__(self, layout: Layout | None, fields: Sequence[str], folder_depth: int = 0) -> None:
        """fields: the fields of the layout that become columns. folder_depth: as in SkippedFiles."""
        self.seen = 0
        self.unmatched = 0
        self.example = ""  # the first path that the layout does not match
        self.folders: set[bytes] = set()  # that images were taken from, as in SkippedFiles
        self._folder_depth = folder_depth
        self._layout = layout
        self._field_index = {field: layout.fields.index(field) for field in fields} if layout else {}
        self._paths: list[bytes] = []
        self._offsets: list[int] = []
        self._sizes: list[int] = []
        self._files: list[tuple[int | None, int | None, bool]] = []
        self._values: list[Values] = []

    def table(self, images: Iterable[ImageBatch], container: bytes | None, prefix: bytes) -> pa.Table:
        """Columns of LOCATION, of FILE and of the fields, a row for each image that the layout matches.

        container: the archive that contains the images. prefix: prepended to each path below the source.
        """
        batches = [self._flush(container)]  # without rows: the table has its columns even when nothing is found
        for batch in images:
            self._add(batch, prefix)
            if len(self._paths) >= BATCH:
                batches.append(self._flush(container))
        batches.append(self._flush(container))
        return pa.Table.from_batches(batches)

    def _add(self, batch: ImageBatch, prefix: bytes) -> None:
        self.seen += len(batch.names)
        if batch.folder:
            prefix += batch.folder + b"/"
        files = batch.files or [(None, None, False)] * len(batch.names)
        if self._layout is None:
            self._paths += [prefix + name for name in batch.names]
            self._offsets += batch.offsets
            self._sizes += batch.sizes
            self._files += files
            return
        values_of, taken = self._layout.names_in(printable(batch.folder)), len(self._paths)
        for name, offset, size, file in zip(batch.names, batch.offsets, batch.sizes, files, strict=True):
            values = values_of(printable(name))
            if values is None:
                self.unmatched += 1
                self.example = self.example or printable(batch.folder + b"/" + name if batch.folder else name)
            else:
                self._paths.append(prefix + name)
                self._offsets.append(offset)
                self._sizes.append(size)
                self._files.append(file)
                self._values.append(values)
        if self._folder_depth and len(self._paths) > taken:
            self.folders.add(cut_path(batch.folder, self._folder_depth))

    def _flush(self, container: bytes | None) -> pa.RecordBatch:
        count = len(self._paths)
        codes = pa.nulls(count, pa.int32()) if container is None else pa.repeat(pa.scalar(0, pa.int32()), count)
        columns = {
            "container": pa.DictionaryArray.from_arrays(codes, pa.array([] if container is None else [container], pa.binary())),
            "path": pa.array(self._paths, LOCATION["path"]),
            "offset": pa.array(self._offsets, LOCATION["offset"]),
            "size": pa.array(self._sizes, LOCATION["size"]),
        }
        for number, (name, kind) in enumerate(FILE.items()):
            columns[name] = pa.array([file[number] for file in self._files], kind)
        for field, index in self._field_index.items():
            columns[field] = pa.array([values[index] for values in self._values], pa.string()).dictionary_encode()
        for column in (self._paths, self._offsets, self._sizes, self._files, self._values):
            column.clear()
        return pa.RecordBatch.from_pydict(columns)
