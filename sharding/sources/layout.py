"""Where a patch lies tells what it is: a layout turns a relative path into fields such as class and slide.

Two ways to write one:

- a template, `{class}/{slide}/{magnification}/{name}`: each `{field}` stands for at least one character of one folder or
  file name and never spans a `/`. The file's extension is left off before matching, and the whole path must match.
  Between two fields of the same name part there must be literal text (`{slide}_{name}`); the earlier field is then as
  short as possible. A field that comes twice must have the same value in both places.
- `regex:` and a Python pattern with named groups, `regex:^(?P<class>[^/]+)/(?P<slide>[^/]+?) \\(`. It is searched for
  (`re.search`) in the whole relative path, extension included, so anchor it with ^ and $ where that matters. A group that
  takes no part in the match leaves its field empty.

Folders are separated by `/` everywhere. Values are brought to Unicode's composed form (NFC), because a Mac writes the same
Korean or accented name in other code points than Linux does, and one class must not become two.
"""

import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from sharding.manifest import COLUMNS

LABELLED_DEFAULT = "{class}/{name}"

# Columns that the manifest fills itself, so that nobody may give a field of that name, and those that say where a file lies
# while it is packed. Three of the manifest's are filled from fields.
RESERVED = (frozenset(COLUMNS) - {"class", "group", "split"}) | {"container", "path"}

_FIELD = re.compile(r"\{([^{}]*)\}")

Values = tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """A layout ready to match: its text, its compiled pattern, and the names of its fields in order.

    halves: for a template, the patterns of its folders (None where it has none) and of its file name, where the one can be
    matched without the other: where no field of the file name stands in the folders too.
    """

    text: str
    pattern: re.Pattern
    fields: tuple[str, ...]
    is_template: bool
    halves: tuple[re.Pattern | None, re.Pattern] | None = None

    def match(self, relative: str) -> dict[str, str | None] | None:
        """The fields of a relative path with `/` between folders, or None where the layout does not match it."""
        values = self._values(relative)
        return None if values is None else dict(zip(self.fields, values, strict=True))

    def names_in(self, folder: str) -> Callable[[str], Values | None]:
        """What `match` says of `folder/name`, as a function of the file name: its values, in the order of `fields`.

        Every patch of a folder shares the folder's fields, so that these are matched once. folder: "" for the source itself.
        """
        prefix = f"{folder}/" if folder else ""
        if self.halves is None:
            return lambda name: self._values(prefix + name)
        folders, file = self.halves
        above: Values | None = ()
        if folders is None:
            above = None if folder else ()
        else:
            found = folders.fullmatch(unicodedata.normalize("NFC", folder))
            above = found.groups() if found else None
        if above is None:
            return lambda name: None

        def values(name: str) -> Values | None:
            found = file.fullmatch(_stem(unicodedata.normalize("NFC", name)))
            return above + found.groups() if found else None

        return values

    def _values(self, relative: str) -> Values | None:
        path = unicodedata.normalize("NFC", relative)
        if self.is_template:
            head, slash, name = path.rpartition("/")
            found = self.pattern.fullmatch(head + slash + _stem(name))
        else:
            found = self.pattern.search(path)
        if found is None:
            return None
        values = tuple([found[field] or None for field in self.fields])
        if "class" in self.fields and values[self.fields.index("class")] is None:
            return None
        return values


def _stem(name: str) -> str:
    return name.rpartition(".")[0] or name


def parse_layout(text: str) -> Layout:
    """The layout that a template or a `regex:` pattern describes. Raises ValueError where the text is not a layout."""
    is_template = not text.startswith("regex:")
    source = _template_pattern(text) if is_template else text.removeprefix("regex:")
    try:
        pattern = re.compile(unicodedata.normalize("NFC", source))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"--layout {text!r} is not a regular expression that Python understands: {error}") from error
    fields = tuple(pattern.groupindex)
    if clash := sorted(RESERVED & set(fields)):
        raise ValueError(
            f"--layout {text!r} captures {clash[0]!r}, a column that the set fills itself: "
            "give the field another name, such as slide or patient"
        )
    return Layout(text, pattern, fields, is_template, _halves(text) if is_template else None)


def _halves(text: str) -> tuple[re.Pattern | None, re.Pattern] | None:
    """The patterns of a good template's folders and of its file name, or None where they share a field."""
    head, slash, name = unicodedata.normalize("NFC", text).rpartition("/")
    if set(_FIELD.findall(head)) & set(_FIELD.findall(name)):
        return None
    return re.compile(_pattern_of(head)) if slash else None, re.compile(_pattern_of(name))


def _template_pattern(text: str) -> str:
    """The regular expression of a template, to be matched in full."""
    if not text or text.startswith("/") or text.endswith("/"):
        raise ValueError(f"--layout {text!r} must be a path relative to the source folder, such as {LABELLED_DEFAULT}")
    end = 0
    for field in _FIELD.finditer(text):
        if not (field[1].isidentifier() and field[1].isascii()):
            raise ValueError(f"--layout {text!r}: {field[0]!r} is not a field; a field is a word such as {{slide}}")
        if end and end == field.start():
            raise ValueError(f"--layout {text!r}: put text or a / between {field[0]} and the field before it")
        end = field.end()
    if not end:
        raise ValueError(f"--layout {text!r} has no {{field}}: write something like {LABELLED_DEFAULT}")
    literals = _FIELD.sub("", text)
    if "{" in literals or "}" in literals:
        raise ValueError(f"--layout {text!r} has a brace that belongs to no {{field}}")
    return _pattern_of(text)


def _pattern_of(text: str) -> str:
    parts: list[str] = []
    seen: set[str] = set()
    end = 0
    for field in _FIELD.finditer(text):
        name = field[1]
        parts += [re.escape(text[end : field.start()]), f"(?P={name})" if name in seen else f"(?P<{name}>[^/]+?)"]
        seen.add(name)
        end = field.end()
    return "".join(parts) + re.escape(text[end:])
