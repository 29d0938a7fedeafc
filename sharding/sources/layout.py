"""A layout turns a patch's relative path into fields such as class and slide.

There are two ways to write one:

- a template, `{class}/{slide}/{magnification}/{name}`: each `{field}` stands for at least one character of one folder or
  file name and never spans a `/`. The file's extension is left off before matching, and the whole path must match.
  Two fields in the same part of a path need literal text between them (`{slide}_{name}`); the earlier field is then as
  short as possible. A field that occurs twice must have the same value in both places.
- `regex:` and a Python pattern with named groups, `regex:^(?P<class>[^/]+)/(?P<slide>[^/]+?) \\(`. It is searched for
  (`re.search`) in the whole relative path, extension included, so anchor it with ^ and $ if that matters. A group that does not
  take part in the match leaves its field empty.

Folders are separated by `/` on every system. Paths are matched in Unicode's composed form (NFC), because macOS writes Korean and
accented names with other code points than Linux. `scan` then normalizes the values.
"""

import math
import re
import unicodedata
from collections.abc import Callable
from dataclasses import dataclass

from sharding.manifest import COLUMNS

LABELLED_DEFAULT = "{class}/{name}"

# Names that no field may have: columns that the manifest fills itself (all but three), and columns of a scan's table.
RESERVED = (frozenset(COLUMNS) - {"class", "group", "split"}) | {"container", "path"}

_FIELD = re.compile(r"\{([^{}]*)\}")

Values = tuple[str | None, ...]


@dataclass(frozen=True)
class Layout:
    """A parsed layout: its text, its compiled pattern, and the names of its fields in order.

    halves: for a template, the patterns of its folders (None if it has none) and of its file name, if the two can be matched
    separately because they share no field.
    """

    text: str
    pattern: re.Pattern
    fields: tuple[str, ...]
    is_template: bool
    halves: tuple[re.Pattern | None, re.Pattern] | None = None

    @property
    def depth(self) -> float:
        """How many folder names the path of an image has."""
        return self.text.count("/") if self.is_template else math.inf

    @property
    def class_depth(self) -> int:
        """How many folder names lead to the class; 0 if no folder gives it. A pattern is taken to begin with the class."""
        if not self.is_template:
            return 1
        parts = self.text.split("/")[:-1]
        return next((depth for depth, part in enumerate(parts, start=1) if "{class}" in part), 0)

    def match(self, relative: str) -> dict[str, str | None] | None:
        """The fields of a relative path with `/` between folders, or None when the layout does not match it."""
        values = self._values(relative)
        return None if values is None else dict(zip(self.fields, values, strict=True))

    def names_in(self, folder: str) -> Callable[[str], Values | None]:
        """A function from a file name in this folder to the values of `fields`, or None when the layout does not match.

        The fields of the folder are matched once for all its patches. folder: "" for the source itself.
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
    """Parse a template or a `regex:` pattern. Raises ValueError when the text is not a layout."""
    is_template = not text.startswith("regex:")
    source = _template_pattern(text) if is_template else text.removeprefix("regex:")
    try:
        pattern = re.compile(unicodedata.normalize("NFC", source))
    except (re.error, RecursionError, OverflowError) as error:
        raise ValueError(f"--layout {text!r} is not a valid Python regular expression: {error}") from error
    fields = tuple(pattern.groupindex)
    if clash := sorted(RESERVED & set(fields)):
        raise ValueError(
            f"--layout {text!r} captures {clash[0]!r}, a column that the set fills itself: "
            "give the field another name, such as slide or patient"
        )
    return Layout(text, pattern, fields, is_template, _halves(text) if is_template else None)


def _halves(text: str) -> tuple[re.Pattern | None, re.Pattern] | None:
    """The patterns of a valid template's folders and of its file name, or None when they share a field."""
    head, slash, name = unicodedata.normalize("NFC", text).rpartition("/")
    if set(_FIELD.findall(head)) & set(_FIELD.findall(name)):
        return None
    return re.compile(_pattern_of(head)) if slash else None, re.compile(_pattern_of(name))


def _template_pattern(text: str) -> str:
    """The regular expression that a template must match in full."""
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
