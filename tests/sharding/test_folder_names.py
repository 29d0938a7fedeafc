"""Names that become a folder's."""

import hypothesis
import hypothesis.strategies as st
import pytest

from sharding.folder_names import MAX_BYTES, check_name, to_name

NAMES = st.text(max_size=100) | st.text(alphabet="ab가é. /_-+()%\\\n\u00a0\ud800", max_size=300)


@pytest.mark.parametrize("name", ["kidney", "신장 (2판)", "v1.2_b-c+d", "हिन्दी", "a" * MAX_BYTES, "가" * 66])
def test_ordinary_names(name):
    check_name(name)
    assert to_name(name) == name if len(name.encode()) < MAX_BYTES - 10 else to_name(name) != name


@pytest.mark.parametrize(
    ("name", "words"),
    [
        ("", "'' is empty"),
        ("  ", "is empty"),
        (".", "begins with a dot"),
        ("..", "begins with a dot"),
        (".hidden", "begins with a dot"),
        ("../outside", "the character '/'"),
        ("/abs", "the character '/'"),
        ("a/b", "the character '/'"),
        ("a\\b", r"the character '\\\\'"),
        ("a\0b", r"the character '\\x00'"),
        ("a\nb", r"the character '\\n'"),
        ("a\u200bb", r"the character '\\u200b'"),
        ("a\ud800", r"the character '\\ud800'"),
        ("a:b", "the character ':'"),
        (" a", "a space at its ends"),
        ("a ", "a space at its ends"),
        ("a" * (MAX_BYTES + 1), "has 201 bytes: give a name of at most 200"),
        ("가" * 67, "has 201 bytes"),
    ],
)
def test_other_names_are_refused(name, words):
    with pytest.raises(ValueError, match=words) as error:
        check_name(name)
    assert "\n" not in str(error.value) and str(error.value).startswith("--name")


@hypothesis.given(NAMES)
def test_any_text_becomes_a_name(text):
    if not to_name(text):
        assert not text.strip()
        return
    check_name(to_name(text))
    check_name(f"{to_name(text)}-01234567")


@hypothesis.given(st.text(alphabet="ab ", min_size=200, max_size=300), st.text(alphabet="ab ", min_size=200, max_size=300))
def test_long_texts_that_differ_have_names_that_differ(one, other):
    assert (to_name(one) == to_name(other)) == (one == other)
