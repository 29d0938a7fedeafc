"""JSON and text files of a run: written atomically, and read with one sentence for a damaged one."""

import contextlib
import json
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any


def parse_row(line: bytes) -> dict[str, Any] | None:
    """A row of metrics.jsonl; None for what is none."""
    try:
        row = json.loads(line)
    except ValueError:  # neither JSON nor, it may be, text
        return None
    return row if isinstance(row, dict) and isinstance(row.get("step"), int) else None


def read_json(path: Path, hint: str) -> dict[str, Any]:
    """A JSON file's content. Raises ValueError, with the hint, when it is missing or broken."""
    try:
        content = json.loads(path.read_bytes())
    except FileNotFoundError:
        raise ValueError(f"{path}: no such file; {hint}") from None
    except ValueError:  # neither JSON nor, it may be, text
        content = None
    if not isinstance(content, dict):
        raise ValueError(f"{path}: this file is damaged; {hint}")
    return content


def check_fields(content: dict[str, Any], fields: dict[str, Any], path: Path) -> None:
    """Raise ValueError for a field of a run's JSON file that is missing or of another type. fields: types by name, with dots."""
    for field, kind in fields.items():
        value: Any = content
        for name in field.split("."):
            value = value.get(name) if isinstance(value, dict) else None
        if not isinstance(value, kind):
            raise ValueError(
                f"{path}: this file is damaged ({field} is {'missing' if value is None else 'of a wrong type'}): restore it, or"
                " remove the run's folder and run its command again"
            )


def write_json(path: Path, content: Any) -> None:
    """Write atomically: the whole file or the one that was there before."""
    write_text(path, json_text(content))


def json_text(content: Any) -> str:
    """The content as write_json writes it."""
    return json.dumps(content, indent=2, ensure_ascii=False) + "\n"


def write_text(path: Path, text: str) -> None:
    """Write atomically: the whole file or the one that was there before."""
    with replacing(path) as temporary:
        temporary.write_text(text)


@contextlib.contextmanager
def replacing(path: Path) -> Iterator[Path]:
    """A path to write to, which takes the place of the given one when the block ends well."""
    temporary = path.with_name(f".{path.name}.{os.getpid()}.partial")
    try:
        yield temporary
        os.replace(temporary, path)
    finally:
        temporary.unlink(missing_ok=True)  # a full disk needs the space
