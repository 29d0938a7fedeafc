"""The values of fields (class, slide, split, ...): one spelling for what looks the same, and a key for what looks alike.

Values come from folder names and tables, where blanks at the end, invisible characters and full-width forms go unnoticed. Paths
are never changed.
"""

import re
import unicodedata
from collections.abc import Iterable, Mapping

import pyarrow as pa
import pyarrow.compute as pc

# Unicode's Default_Ignorable_Code_Point (DerivedCoreProperties.txt): zero-width blanks and joiners, marks of direction, variation
# selectors, fillers, ... Then the control characters that are no blanks.
_INVISIBLE = re.compile(
    "[\u00ad\u034f\u061c\u115f\u1160\u17b4\u17b5\u180b-\u180f\u200b-\u200f\u202a-\u202e\u2060-\u206f\u3164\ufe00-\ufe0f\ufeff\uffa0"
    "\ufff0-\ufff8\U0001bca0-\U0001bca3\U0001d173-\U0001d17a\U000e0000-\U000e0fff"
    "\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f]"
)
_NORMALIZED = r"^[!-~]+( [!-~]+)*$"  # some of the values that are
_BRAILLE_BLANK = "\u2800"  # a blank to the eye, which Unicode does not count among them
# Kinds of compatibility characters: those that differ in shape or width alone, and those that may mean something else. Neither
# has superscripts, subscripts, fractions and circled numbers: HER2² is not HER22.
_SHAPES = ("<wide>", "<narrow>", "<initial>", "<medial>", "<final>", "<isolated>")
_SYMBOLS = ("<compat>", "<font>", "<noBreak>", "<small>", "<square>", "<vertical>")
_TYPOGRAPHY = str.maketrans(
    dict.fromkeys("\u2010\u2011\u2012\u2013\u2014\u2015\u2043\u2212", "-")
    | dict.fromkeys("\u2018\u2019\u02bc\u2032", "'")
    | dict.fromkeys("\u201c\u201d\u2033", '"')
)
_TRAILING_ZEROS = re.compile(r"(?<=\d)\.0+\Z")
# What spreadsheets and pandas make of whole numbers with gaps, and of long ones.
_REWRITTEN = re.compile(r"\d+\.0+|\d(\.\d+)?E[+-]\d+", re.IGNORECASE)


def normalized(value: str) -> str:
    """The value in NFC, without blanks at its ends and invisible characters, with single blanks and letters of usual width.

    Case, accents, punctuation and symbols stay. Applying it again changes nothing.
    """
    text = _decomposed(value, _SHAPES).replace(_BRAILLE_BLANK, " ")
    return unicodedata.normalize("NFC", " ".join(_INVISIBLE.sub("", text).split()))


def alike_key(value: str) -> str:
    """Equal for values that hardly mean two things.

    They differ only in case, in the kind of a hyphen or quotation mark, in `.0` at the end, or in a symbol for letters (Roman
    numerals, ligatures, units).
    """
    text = _decomposed(value.casefold(), _SHAPES + _SYMBOLS).translate(_TYPOGRAPHY)
    return _TRAILING_ZEROS.sub("", normalized(normalized(text).casefold()))


def _decomposed(text: str, kinds: tuple[str, ...]) -> str:
    """The text with its compatibility characters of these kinds replaced by what they stand for."""
    if text.isascii():
        return text
    return "".join(
        unicodedata.normalize("NFKC", letter) if unicodedata.decomposition(letter).startswith(kinds) else letter
        for letter in text
    )


def alike(values: Iterable[str]) -> list[list[str]]:
    """The values that share their alike_key with another one, in groups."""
    groups: dict[str, list[str]] = {}
    for value in sorted(set(values)):
        groups.setdefault(alike_key(value), []).append(value)
    return [group for group in groups.values() if len(group) > 1]


def alike_notes(values: Iterable[str], field: str) -> list[str]:
    """A sentence if values are alike, which is usually a typing error."""
    found = alike(values)
    if not found:
        return []
    count = sum(map(len, found)) - len(found)
    differ = "value differs" if count == 1 else "values differ"
    example = " and ".join(map(repr, found[0]))
    return [f"{field}: {count:,} {differ} from another one only in case, punctuation or a final .0, for example {example}"]


def number_notes(values: Iterable[str], field: str) -> list[str]:
    """A sentence if a spreadsheet seems to have turned text into numbers: `1.0`, `1.2E+15`, or `7` beside `007`."""
    known = set(values)
    shortened = [value for value in known if value.startswith("0") and value.isdecimal() and value.lstrip("0") in known]
    if not (found := sorted([value for value in known if _REWRITTEN.fullmatch(value)] + shortened)):
        return []
    example = f"{found[0].lstrip('0')!r} beside {found[0]!r}" if found[0] in shortened else repr(found[0])
    return [f"{field}: a spreadsheet seems to have turned text into numbers, for example {example}: export the column as text"]


def normalized_values(values: pa.StringArray) -> dict[str, str]:
    """The values that normalizing changes, and what they become. Most values are seen at once to be normalized."""
    others = values.filter(pc.invert(pc.match_substring_regex(values, _NORMALIZED))).to_pylist()
    return {value: plain for value in others if (plain := normalized(value)) != value}


def replace_values(column: pa.ChunkedArray, replacements: Mapping[str, str]) -> pa.ChunkedArray:
    """A dictionary column with some of its values replaced; "" becomes null."""
    if not replacements or not column.num_chunks:
        return column
    column = column.unify_dictionaries()
    words = [replacements.get(word, word) or None for word in column.chunk(0).dictionary.to_pylist()]
    values = pa.array(words, pa.string()).dictionary_encode()  # by old code; several may be equal now
    return pa.chunked_array([values.take(chunk.indices) for chunk in column.chunks], column.type)


def normalize_column(column: pa.ChunkedArray, field: str) -> tuple[pa.ChunkedArray, list[str]]:
    """A dictionary column with normalized values; and a sentence if several spellings became one value."""
    column = column.unify_dictionaries()
    if not column.num_chunks:
        return column, []
    words = column.chunk(0).dictionary
    changes = normalized_values(words)
    spellings: dict[str, set[str]] = {}
    for value, plain in changes.items():
        spellings.setdefault(plain, set()).add(value)
    for plain in words.filter(pc.is_in(words, pa.array(list(spellings), pa.string()))).to_pylist():
        spellings[plain].add(plain)
    merged = sorted(sorted(same) for same in spellings.values() if len(same) > 1)
    notes = []
    if merged:
        several = "value is" if len(merged) == 1 else "values are"
        example = ", ".join(map(repr, merged[0][:4]))
        notes.append(f"{field}: {len(merged):,} {several} written in several ways that look the same, for example {example}")
    return replace_values(column, changes), notes
