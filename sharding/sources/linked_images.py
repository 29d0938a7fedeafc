"""Images that several paths lead to by links: each is packed once, unless its paths give it different classes or splits."""

from collections.abc import Sequence

import numpy as np
import pyarrow as pa

from sharding.manifest import decoded
from sharding.sources.file_listing import counted, printable


def repeated_images(files: pa.Table, labels: Sequence[str]) -> tuple[np.ndarray, list[str]]:
    """(n,) bool, which rows to keep; and messages about images with several rows.

    files: with the columns of LOCATION and FILE. labels: the columns by which an image may have several rows. Of rows with equal
    labels those without a link are kept, else the first. Hard links are files of their own.
    """
    kept = np.ones(len(files), bool)
    linked = files["linked"].to_numpy()
    if not linked.any():
        return kept, []
    keys = [files[name].fill_null(0).to_numpy() for name in ("device", "inode")]
    codes = [decoded(files[name])[0] for name in labels]
    order = np.lexsort((linked, *codes, *keys))  # stable: in equal files by label, real paths first, then in the order of rows
    kept[order] = ~linked[order] | _changes([*codes, *keys], order)
    notes = []
    if dropped := int((~kept).sum()):
        links = counted(dropped, "link leads", "links lead")
        notes.append(f"{links} to images that are packed under another path: each image is packed once")
    order = np.lexsort((linked, *keys))
    order = order[kept[order]]
    is_first = _changes(keys, order)
    first, file = np.flatnonzero(is_first), np.cumsum(is_first) - 1
    by_link = np.bincount(file, linked[order]) > 0  # of each file
    for name, column in zip(labels, codes, strict=True):
        differs = (column[order] != column[order][first][file]) & by_link[file]
        if differs.any():
            row = int(np.flatnonzero(differs)[0])
            paths = [printable(files["path"][int(order[at])].as_py()) for at in (first[file[row]], row)]
            images = counted(len(np.unique(file[differs])), "image")
            several = "classes" if name == "class" else "splits, which leaks test data into training"
            notes.append(
                f"WARNING: links put {images} into several {several}, for example {paths[0]} and {paths[1]}: remove the links, "
                "or exclude their values with --where"
            )
    return kept, notes


def _changes(columns: Sequence[np.ndarray], order: np.ndarray) -> np.ndarray:
    """(n,) bool: where a value of the ordered columns differs from the one before; True at first."""
    found = np.ones(len(order), bool)
    found[1:] = np.any([column[order][1:] != column[order][:-1] for column in columns], axis=0)
    return found
