"""What is to be read below a table: how its figures came about, and how far its best ones can be believed."""

from collections.abc import Iterator

from tune.table_data import Entry, FilledTable

SMOKE = (
    "Smoke size: the study's machinery at work on little data. Nothing here is comparable, least of all with published figures."
)
_NAMED = 3  # of more rows, only the number is told


def remarks(table: FilledTable) -> list[str]:
    """Sentences, each about something that is in the table."""
    entries = table.all_entries
    said = []
    if any(entry.std is not None for entry in entries):
        said.append("±: standard deviation over seeds; all count alike, also those of several runs.")
    if any(len(entry.runs) > 1 for entry in entries):
        said.append("Where an entry joins several runs, its mean has no interval.")
    if any(entry.status == "partial" for entry in entries):
        said.append("Where some cells are failed or missing, the mean is of the others.")
    if any(entry.best for entry in entries):
        said.append("Bold: the best of its column, among those of the same data and share of the labels; equals are all marked.")
    if _unlike_losses(table):
        said.append(
            "Losses of unlike batch sizes, methods, temperatures or sets do not compare; they are marked among their like."
        )
    overlaps = list(_overlaps(table))
    if overlaps:
        said.append(f"Their 95 % intervals overlap the best one's, so the difference may be chance: {'; '.join(overlaps)}.")
    return said


def _unlike_losses(table: FilledTable) -> bool:
    if "loss" not in table.metrics:
        return False
    columns = (table.column_entries(column, "loss") for column in range(len(table.column_heads)))
    return any(len({entry.compares for entry in entries if entry.mean is not None}) > 1 for entries in columns)


def _overlaps(table: FilledTable) -> Iterator[str]:
    for metric, title in table.metrics.items():
        for column in range(len(table.column_heads)):
            entries = table.column_entries(column, metric)
            best = [entry for entry in entries if entry.best]
            others = [(row, entry) for row, entry in enumerate(entries) if entry.compares in {one.compares for one in best}]
            others = [(row, entry) for row, entry in others if entry.mean is not None and not entry.best]
            near = [row for row, entry in others if any(_overlap(entry, one) for one in best)]
            if near:
                names = " and ".join(table.row_text(row) for row in near)
                which = names if len(near) <= _NAMED else f"{len(near)} of {len(others)} others"
                yield f"{' at '.join(part for part in (title, table.column_text(column)) if part)}: {which}"


def _overlap(one: Entry, other: Entry) -> bool:
    if one.compares != other.compares or one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high
