"""Records that are handed on: without hosts, and of each folder or URL only the last part.

Folders are often named after people, and a report or a run's folder is shared.
"""

import dataclasses
import re
from pathlib import PurePosixPath
from typing import Any

# A path that is not below the working directory, or a URL; of an argument perhaps with its flag.
_PLACE = re.compile(r"(--[\w-]+=)?((?:[a-z][a-z0-9+.-]*://|/|~|\.\.?/).+)", re.DOTALL)
_PLACE_FIELDS = ("data", "storage", "init", "backbone", "probe_data", "mix")  # of the configs; also below the working directory


def without_places(value: Any) -> Any:
    """Plain data without entries called "host", and of each text that is a path or a URL its last part."""
    if isinstance(value, dict):
        return {name: without_places(each) for name, each in value.items() if name != "host"}
    if isinstance(value, list):
        return [without_places(each) for each in value]
    if isinstance(value, str) and (place := _PLACE.fullmatch(value)):
        return f"{place[1] or ''}{last_part(place[2])}"
    return value


def last_part(place: str) -> str:
    """The name of a file or folder, without the folders that it is in. Names of models (hf-hub:OWNER/MODEL) stay."""
    scheme, colon, rest = place.partition(":")
    if colon and scheme == "hf-hub":
        return place
    if colon and scheme == "local-dir":
        return f"{scheme}:{PurePosixPath(rest).name}"
    return PurePosixPath(place).name or place


def with_name_of(place: str, lines: list[str]) -> list[str]:
    """The lines, with the last part of a place instead of all of it."""
    return [line.replace(place, last_part(place)) for line in lines]


def private_config(config: Any) -> Any:
    """A stage's config with the last part of each place."""

    def shortened(value: Any) -> Any:
        return [last_part(each) for each in value] if isinstance(value, list) else last_part(value) if value else value

    names = {field.name for field in dataclasses.fields(config)}
    return dataclasses.replace(config, **{name: shortened(getattr(config, name)) for name in _PLACE_FIELDS if name in names})


def private_record(record: dict[str, Any]) -> dict[str, Any]:
    """run.json without places, hosts and commands."""
    sets = [each | {"shards": last_part(each["shards"]), "packed_by": []} for each in record["input"]["sets"]]
    shared = without_places(record) | {"command": [], "data": last_part(record["data"])}
    return shared | {"input": without_places(record["input"]) | {"sets": sets}}
