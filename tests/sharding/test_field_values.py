"""What looks the same is one value, what looks alike is known to be, and what may mean two things stays two."""

import unicodedata

import pyarrow as pa
import pytest
from hypothesis import given
from hypothesis import strategies as st

from sharding.field_values import alike, alike_key, alike_notes, normalize_column, normalized, normalized_values, number_notes

TEXT = st.text(st.characters(exclude_categories=["Cs"]), max_size=8)


@pytest.mark.parametrize(
    "value",
    [
        "S 1 ",
        " S 1",
        "S  1",
        "S\u00a01",
        "S\u30001",
        "S\t1\n",
        "S \u200b1",
        "\ufeffS 1",
        "S\u2009\u20091",
        "Ｓ １",
        "S\u2800 1\u00ad",
    ],
)
def test_blanks_invisible_characters_and_width_make_no_difference(value):
    assert normalized(value) == "S 1"


def test_whatever_it_is_made_of_hangul_is_one():
    assert normalized(unicodedata.normalize("NFD", "종양 ")) == normalized("종양\u3164") == "종양"
    assert normalized("ｶﾞﾝ") == "ガン"


@pytest.mark.parametrize("value", ["HER2²", "H₂O", "Ⅲ", "½", "①", "a-b", "a–b", "007", "1.0", "Benign", "benign", "Naïve", "µm"])
def test_what_may_mean_something_stays(value):
    assert normalized(value) == unicodedata.normalize("NFC", value)


@given(TEXT)
def test_normalizing_again_changes_nothing(value):
    once = normalized(value)
    assert normalized(once) == once
    assert normalized_values(pa.array([value])) == ({} if once == value else {value: once})
    assert unicodedata.is_normalized("NFC", once)
    assert alike_key(once) == alike_key(value) == alike_key(value.casefold()) == alike_key(unicodedata.normalize("NFD", value))


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ("S1", "s1"),
        ("S1", "S1.0"),
        ("7", "7.00"),
        ("S-1", "S–1"),
        ("Barrett's", "Barrett’s"),
        ("Grade III", "Grade Ⅲ"),
        ("ﬁbroma", "fibroma"),
        ("0.5 μm", "0.5 µm"),
        ("S1", "S1 "),
    ],
)
def test_alike(one, other):
    assert alike_key(one) == alike_key(other)
    assert alike([one, other, "T", one]) == [sorted([one, other])]


@pytest.mark.parametrize(
    ("one", "other"), [("S1", "S10"), ("HER2²", "HER22"), ("7", "007"), ("1.0", "1.01"), ("S 1", "S1"), ("S_1", "S-1")]
)
def test_not_alike(one, other):
    assert alike([one, other]) == []


def test_notes():
    assert alike_notes(["S1", "S2"], "slide") == []
    assert alike_notes(["S1", "s1", "S1.0", "S2"], "slide") == [
        "slide: 2 values differ from another one only in case, punctuation or a final .0, for example 'S1' and 'S1.0' and 's1'"
    ]
    assert number_notes(["1", "2", "007", "S1.0", "E+1"], "slide") == []
    for names, example in ((["1.0", "2"], "'1.0'"), (["1.23E+15"], "'1.23E+15'"), (["7", "007"], "'7' beside '007'")):
        (note,) = number_notes(names, "slide")
        assert f"for example {example}: export the column as text" in note


def test_a_column_is_normalized_by_its_distinct_values():
    parts = [pa.array(["a ", "b", None]).dictionary_encode(), pa.array(["a", " "]).dictionary_encode()]
    column, notes = normalize_column(pa.chunked_array(parts), "class")
    assert column.to_pylist() == ["a", "b", None, "a", None]
    assert column.unify_dictionaries().chunk(1).dictionary.to_pylist() == ["a", "b"]
    assert "for example 'a', 'a '" in notes[0]
    for chunks in ([], [pa.array(["a b", "종", None, "~!"]).dictionary_encode()]):
        column = pa.chunked_array(chunks, parts[0].type)
        assert normalize_column(column, "class") == (column, [])
