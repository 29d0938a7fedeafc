"""The rule for names that become a folder's: of runs, of studies and their trials, and of shard sets."""

import hashlib
import unicodedata

MAX_BYTES = 200  # in UTF-8: file systems take 255, and temporary files add to a name
_SUFFIX_BYTES = 9  # "-" and 8 hex digits, which a study may append to a trial's name
_MARKS = " ._-+()"


def check_name(name: str, *, what: str = "--name") -> None:
    """Raise ValueError unless a name consists of letters and digits of any script and of _MARKS, has at most MAX_BYTES, does not
    begin with a dot, and has no blank at its ends. what: begins the message."""
    if not name.strip():
        raise ValueError(f"{what} {name!r} is empty: give a name, such as kidney")
    if wrong := [character for character in name if not _is_plain(character)]:
        raise ValueError(
            f"{what} {name!r} has the character {wrong[0]!r}, and the name becomes that of a folder: give letters, digits,"
            f" spaces and {' '.join(_MARKS.strip())}"
        )
    if name.startswith(".") or name != name.strip():
        raise ValueError(f"{what} {name!r}: a name neither begins with a dot nor has a space at its ends: leave it out")
    if (size := len(name.encode())) > MAX_BYTES:
        raise ValueError(f"{what} {name[:40]!r}... has {size} bytes: give a name of at most {MAX_BYTES}")


def to_name(text: str) -> str:
    """The text as a name that check_name takes: other characters become "_", and a long text is cut and ends in a hash of it."""
    name = "".join(character if _is_plain(character) else "_" for character in text).strip()
    name = f"_{name[1:]}" if name.startswith(".") else name
    room = MAX_BYTES - _SUFFIX_BYTES
    if len(name.encode()) <= room:
        return name
    digest = hashlib.sha256(text.encode(errors="backslashreplace")).hexdigest()[:8]
    return f"{name.encode()[: room - len(digest) - 1].decode(errors='ignore').rstrip()}-{digest}"


def _is_plain(character: str) -> bool:
    return character in _MARKS or unicodedata.category(character)[0] in "LMN"
