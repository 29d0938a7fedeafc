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
from dataclasses import dataclass

LABELLED_DEFAULT = "{class}/{name}"

# Columns that the manifest fills itself, so that no layout may capture a field of that name.
RESERVED = frozenset(
    ("id", "key", "shard", "offset", "size", "label", "group", "split", "width", "height", "format", "sha256", "source")
)

_FIELD = re.compile(r"\{([^{}]*)\}")


@dataclass(frozen=True)
class Layout:
    """A layout ready to match: its text, its compiled pattern, and the names of its fields in order."""

    text: str
    pattern: re.Pattern
    fields: tuple[str, ...]
    is_template: bool

    @property
    def extra_columns(self) -> tuple[str, ...]:
        """Fields that become manifest columns of their own: all but class and name."""
        return tuple(field for field in self.fields if field not in ("class", "name"))

    def match(self, relative: str) -> dict[str, str | None] | None:
        """The fields of a relative path with `/` between folders, or None where the layout does not match it."""
        path = unicodedata.normalize("NFC", relative)
        if self.is_template:
            head, slash, name = path.rpartition("/")
            stem = name.rpartition(".")[0] or name
            found = self.pattern.fullmatch(head + slash + stem)
        else:
            found = self.pattern.search(path)
        if found is None:
            return None
        fields = found.groupdict()
        if "class" in fields and not fields["class"]:
            return None
        return {field: value or None for field, value in fields.items()}


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
    return Layout(text, pattern, fields, is_template)


def _template_pattern(text: str) -> str:
    """The regular expression of a template, to be matched in full."""
    if not text or text.startswith("/") or text.endswith("/"):
        raise ValueError(f"--layout {text!r} must be a path relative to the source folder, such as {LABELLED_DEFAULT}")
    parts: list[str] = []
    seen: set[str] = set()
    end = 0
    for field in _FIELD.finditer(text):
        literal, name = text[end : field.start()], field[1]
        if not (name.isidentifier() and name.isascii()):
            raise ValueError(f"--layout {text!r}: {field[0]!r} is not a field; a field is a word such as {{slide}}")
        if end and not literal:
            raise ValueError(f"--layout {text!r}: put text or a / between {{{name}}} and the field before it")
        again = name in seen
        parts += [re.escape(literal), f"(?P={name})" if again else f"(?P<{name}>[^/]+?)"]
        seen.add(name)
        end = field.end()
    if not seen:
        raise ValueError(f"--layout {text!r} has no {{field}}: write something like {LABELLED_DEFAULT}")
    parts.append(re.escape(text[end:]))
    literals = _FIELD.sub("", text)
    if "{" in literals or "}" in literals:
        raise ValueError(f"--layout {text!r} has a brace that belongs to no {{field}}")
    return "".join(parts)
