"""The notes below a table: how its values were computed, and how reliable the best ones are."""

from collections.abc import Iterator

from tune.reporting.table_data import ResultTable, TableEntry

SMOKE = "Smoke size: a trial run of the study on little data. No value is comparable, least of all with published ones."
_NAMED = 3  # rows; of more, the note gives only the number


def notes_below(table: ResultTable) -> list[str]:
    """The sentences that apply to this table."""
    entries = table.all_entries
    notes = []
    if any(entry.std is not None for entry in entries):
        notes.append("±: standard deviation over seeds, which all count equally, also across runs.")
    if any(len(entry.runs) > 1 for entry in entries):
        notes.append("An entry that joins several runs has no interval.")
    if any(entry.status == "partial" for entry in entries):
        notes.append("Where some trials failed or are missing, the mean is over the others.")
    if any(entry.best for entry in entries):
        notes.append(
            "Bold: the best of its column among values for the same data and fraction of the labels; ties are all marked."
        )
    if _unlike_losses(table):
        notes.append(
            "Losses of different batch sizes, methods, temperatures or sets are not comparable. If there are several of a kind,"
            " the best is marked."
        )
    overlaps = list(_overlapping(table))
    if overlaps:
        notes.append(f"The 95 % interval overlaps that of the best, so the difference may be chance: {'; '.join(overlaps)}.")
    return notes


def _unlike_losses(table: ResultTable) -> bool:
    if "loss" not in table.metrics:
        return False
    columns = (table.column_entries(column, "loss") for column in range(len(table.column_heads)))
    return any(len({entry.compares for entry in entries if entry.mean is not None}) > 1 for entries in columns)


def _overlapping(table: ResultTable) -> Iterator[str]:
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


def _overlap(one: TableEntry, other: TableEntry) -> bool:
    if one.compares != other.compares or one.low is None or one.high is None or other.low is None or other.high is None:
        return False
    return one.low <= other.high and other.low <= one.high
