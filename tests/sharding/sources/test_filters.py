"""`--where` keeps what it says, and says what it does not find."""

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.sources.filters import apply_where, parse_where

FIELDS = ("class", "slide")


def columns(classes, slides) -> pa.Table:
    return pa.table({"class": pa.array(classes, pa.string()).dictionary_encode(), "slide": pa.array(slides).dictionary_encode()})


FILES = columns(["a", "a", "b", "c", None], ["1", "2", "1", "3", "1"])


@pytest.mark.parametrize(
    ("where", "kept"),
    [
        (["class=a"], [0, 1]),
        (["class=a", "class=c"], [0, 1, 3]),
        (["class=a", "slide=1"], [0]),
        (["class!=a"], [2, 3, 4]),  # what has no class has not that one either
        (["class!=a", "class!=c"], [2, 4]),
        (["class=a", "class=b", "class!=a"], [2]),
        (["slide!=1"], [1, 3]),
        (["slide=1", "class!=b"], [0, 4]),
    ],
)
def test_what_is_kept(where, kept):
    mask, notes = apply_where(FILES, parse_where(where, FIELDS))
    assert mask.nonzero()[0].tolist() == kept
    assert notes == []


def test_a_value_may_hold_anything():
    files = columns(["x=y", "!", "종"], ["", "a b", "é"])
    for where, kept in (("class=x=y", 0), ("class=!", 1), ("slide= a  b", 1), (f"class={unicodedata.normalize('NFD', '종')}", 2)):
        assert apply_where(files, parse_where([where], FIELDS))[0].nonzero()[0].tolist() == [kept]


def test_a_value_that_no_image_has_is_said():
    mask, notes = apply_where(FILES, parse_where(["class=a", "class=A", "slide!=9"], FIELDS))
    assert mask.tolist() == [True, True, False, False, False]
    assert notes == [
        "--where names a class that no image has, 'A': class is one of a, b, c",
        "--where names a slide that no image has, '9': slide is one of 1, 2, 3",
    ]


@pytest.mark.parametrize(
    ("where", "words"),
    [
        (["class"], "field=value"),
        (["class!"], "field=value"),
        (["stain=HE"], "no field 'stain'; there is class, slide"),
        (["stain!=HE"], "no field 'stain'; there is class, slide"),
        (["class=d"], "class is one of a, b, c"),
        (["class=b", "slide=3"], "all conditions at once"),
        (["slide!=1", "slide!=2", "slide!=3"], "all conditions at once"),
    ],
)
def test_a_condition_that_cannot_be_met_is_one_sentence(where, words):
    with pytest.raises(ValueError, match="--where") as caught:
        apply_where(FILES, parse_where(where, FIELDS))
    assert words in str(caught.value)


VALUES = st.sampled_from(["a", "b", "c"])


@given(
    rows=st.lists(st.tuples(VALUES, VALUES), min_size=1, max_size=6),
    where=st.lists(st.tuples(st.sampled_from(FIELDS), st.booleans(), VALUES)),
)
def test_as_one_would_do_it_row_by_row(rows, where):
    def meets(row):
        values = dict(zip(FIELDS, row, strict=True))
        wanted = {field: {v for f, no, v in where if f == field and not no} for field in FIELDS}
        unwanted = {(field, v) for field, no, v in where if no}
        return all(values[f] in wanted[f] or not wanted[f] for f in FIELDS) and unwanted.isdisjoint(values.items())

    conditions = parse_where([f"{field}{'!=' if no else '='}{value}" for field, no, value in where], FIELDS)
    expected = [meets(row) for row in rows]
    files = columns(*zip(*rows, strict=True))
    if any(expected):
        assert apply_where(files, conditions)[0].tolist() == expected
    else:
        with pytest.raises(ValueError, match="leaves none"):
            apply_where(files, conditions)
