"""`--where`: which images to take, by what their fields say."""

import unicodedata
from collections.abc import Mapping, Sequence
from typing import NamedTuple

import numpy as np
import pyarrow as pa

from sharding.manifest import decoded


class Condition(NamedTuple):
    """Of one field: the values that are wanted (empty: all), and those that are not."""

    wanted: set[str]
    unwanted: set[str]


def parse_where(where: Sequence[str], fields: Sequence[str]) -> dict[str, Condition]:
    """The condition on each field that `field=value` and `field!=value` name. Raises ValueError where one is not of that form."""
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
        # In the composed form, as all fields are.
        (condition.unwanted if unwanted else condition.wanted).add(unicodedata.normalize("NFC", value))
    return conditions


def apply_where(files: pa.Table, conditions: Mapping[str, Condition]) -> tuple[np.ndarray, list[str]]:
    """(n,) bool, which rows meet every condition, and a sentence for each value that no row has.

    An empty field has no value: it is not among the wanted, and not among the unwanted. Raises ValueError where no row is left.
    """
    kept = np.ones(len(files), bool)
    notes, reason = [], "no image meets all conditions at once"
    for name, condition in conditions.items():
        codes, words = decoded(files[name])
        present = f"{name} is one of {', '.join(words[:8])}{', ...' if len(words) > 8 else ''}"
        for value in sorted((condition.wanted | condition.unwanted) - set(words)):
            notes.append(f"--where names a {name} that no image has, {value!r}: {present}")
        if condition.wanted:
            kept &= np.isin(codes, _places(words, condition.wanted))
            if condition.wanted.isdisjoint(words):
                reason = present
        kept &= ~np.isin(codes, _places(words, condition.unwanted))
    if not kept.any():
        raise ValueError(f"--where leaves none of {len(files):,} images: {reason}")
    return kept, notes


def _places(words: Sequence[str], values: set[str]) -> list[int]:
    return [place for place, word in enumerate(words) if word in values]
