"""`--where`: select images by the values of their fields."""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sharding.field_values import normalized
from sharding.manifest import decoded
from sharding.sources.file_listing import counted


class Condition(NamedTuple):
    """For one field, the values to keep (empty: all) and the values to exclude."""

    wanted: set[str]
    unwanted: set[str]


def parse_where(where: Sequence[str], fields: Sequence[str]) -> dict[str, Condition]:
    """Parse `field=value` and `field!=value` into a condition for each field. Raises ValueError for any other form."""
    conditions: dict[str, Condition] = {}
    for text in where:
        name, equals, value = text.partition("=")
        if not equals:
            raise ValueError(f"--where {text!r} is not of the form field=value or field!=value")
        unwanted = name.endswith("!")
        name = name.removesuffix("!")
        if name not in fields:
            raise ValueError(f"--where {text!r}: there is no field {name!r}; there is {', '.join(fields) or 'none'}")
        condition = conditions.setdefault(name, Condition(set(), set()))
        (condition.unwanted if unwanted else condition.wanted).add(normalized(value))
    return conditions


def apply_where(files: pa.Table, conditions: Mapping[str, Condition]) -> tuple[np.ndarray, list[str]]:
    """(n,) bool, which rows meet every condition; and a message for each value that no row has.

    An empty field has no value: it is neither wanted nor unwanted. Raises ValueError when no row is left.
    """
    kept = np.ones(len(files), bool)
    notes, reason = [], "no image meets all conditions at once"
    for name, condition in conditions.items():
        codes, values = decoded(files[name])
        present = f"{name} is one of {', '.join(values[:8])}{', ...' if len(values) > 8 else ''}"
        for value in sorted((condition.wanted | condition.unwanted) - set(values)):
            notes.append(f"--where names a {name} that no image has, {value!r}: {present}")
        if condition.wanted:
            kept &= np.isin(codes, _indexes(values, condition.wanted))
            if condition.wanted.isdisjoint(values):
                reason = present
        kept &= ~np.isin(codes, _indexes(values, condition.unwanted))
    if not kept.any():
        raise ValueError(f"--where leaves none of {counted(len(files), 'image')}: {reason}")
    return kept, notes


def _indexes(values: Sequence[str], chosen: set[str]) -> list[int]:
    return [index for index, value in enumerate(values) if value in chosen]
