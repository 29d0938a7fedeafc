"""A layout says what a path means, or that it means nothing."""

import string
import unicodedata

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from sharding.manifest import COLUMNS
from sharding.sources.image_table import LOCATION
from sharding.sources.layout import RESERVED, parse_layout


@pytest.mark.parametrize(
    ("layout", "path", "fields"),
    [
        ("{class}/{name}", "a/b.jpg", {"class": "a", "name": "b"}),
        ("{class}/{name}", "a/b.tar.gz.jpg", {"class": "a", "name": "b.tar.gz"}),
        ("{class}/{name}", "a/b/c.jpg", None),
        ("{class}/{name}", "c.jpg", None),
        (
            "{class}/{slide}/x40/{name}",
            "종양/S 1 (2)/x40/p x40 (31).png",
            {"class": "종양", "slide": "S 1 (2)", "name": "p x40 (31)"},
        ),
        ("{class}/{slide}/x40/{name}", "a/s/x10/p.png", None),
        ("{class}/{slide}_{name}", "a/s1_p_2.jpg", {"class": "a", "slide": "s1", "name": "p_2"}),
        ("{class}/{slide}", "a/s1.jpg", {"class": "a", "slide": "s1"}),
        ("{class}/{class}_{slide}", "a/a_3.jpg", {"class": "a", "slide": "3"}),
        ("{class}/{class}_{slide}", "a/b_3.jpg", None),
        ("{class} (x)/{name}", "a (x)/b.jpg", {"class": "a", "name": "b"}),  # literal text is no pattern
        ("{class}.{name}", "a.b.jpg", {"class": "a", "name": "b"}),
        (r"regex:^(?P<class>[^/]+)/(?P<slide>\w+?)_", "a/s_1_2.jpg", {"class": "a", "slide": "s"}),
        (r"regex:(?P<name>\d+)\.jpg$", "deep/er/p12.jpg", {"name": "12"}),  # searched for; the extension is there
        (r"regex:(?P<class>[ab])(?P<slide>\d)?", "a/x.jpg", {"class": "a", "slide": None}),
        (r"regex:(?P<class>a)?/(?P<slide>\d)", "b/1.jpg", None),  # a path without a class is not matched
        ("{split}/{group}/{class}/{name}", "test/p 1/a/b.jpg", {"split": "test", "group": "p 1", "class": "a", "name": "b"}),
        (r"regex:^(?P<group>p\d)?", "a.jpg", {"group": None}),
    ],
)
def test_match(layout, path, fields):
    assert parse_layout(layout).match(path) == fields


def test_one_name_in_two_unicode_forms_is_one_class():
    layout = parse_layout("{class}/{name}")
    forms = [unicodedata.normalize(form, "종양é") for form in ("NFC", "NFD")]
    assert forms[0] != forms[1]
    assert layout.match(f"{forms[0]}/a.jpg") == layout.match(f"{forms[1]}/a.jpg")


@pytest.mark.parametrize(
    ("layout", "words"),
    [
        ("", "relative"),
        ("/{class}/{name}", "relative"),
        ("{class}/", "relative"),
        ("class/name", "has no {field}"),
        ("{class}{name}", "between"),
        ("{class}/{na me}", "not a field"),
        ("{}/{name}", "not a field"),
        ("{class/{name}", "brace"),
        ("{class}}/{name}", "brace"),
        ("{class}/{id}/{name}", "'id'"),
        ("regex:(?P<class>", "regular expression"),
        ("regex:(?P<sha256>x)", "'sha256'"),
    ],
)
def test_a_bad_layout_is_refused_with_a_reason(layout, words):
    with pytest.raises(ValueError, match="--layout") as caught:
        parse_layout(layout)
    assert words in str(caught.value)


def test_all_columns_are_reserved_but_those_that_fields_fill():
    assert set(COLUMNS) - RESERVED == {"class", "group", "split"}
    assert set(LOCATION) <= RESERVED  # or a field would take the place of where the file lies


NAMES = st.text(st.characters(exclude_characters="/\0", exclude_categories=["Cs"]), min_size=1, max_size=12)
PLAIN = st.text(string.ascii_letters, min_size=1, max_size=6)


@given(values=st.lists(NAMES, min_size=2, max_size=4))
def test_a_template_gives_back_what_the_path_was_made_of(values):
    values = [unicodedata.normalize("NFC", value) for value in values]
    fields = ["class", "slide", "magnification", "name"][: len(values)]
    layout = parse_layout("/".join(f"{{{field}}}" for field in fields))
    assert layout.match("/".join(values) + ".jpg") == dict(zip(fields, values, strict=True))


PIECES = (
    "{",
    "}",
    "/",
    "a",
    "_",
    ".",
    "(",
    "?",
    "*",
    "\\",
    "regex:",
    "(?P<",
    ">",
    ")",
    "{class}",
    "{slide}",
    "{group}",
    "{split}",
    "é",
    "e\u0301",
)


@given(text=st.lists(st.sampled_from(PIECES), max_size=12).map("".join), path=st.text(max_size=20))
def test_any_text_is_a_layout_or_a_value_error(text, path):
    try:
        layout = parse_layout(text)
    except ValueError:
        return
    layout.match(path)


# Few letters and many separators, so that paths fit layouts in several ways, or nearly.
TEMPLATES = st.lists(
    st.sampled_from(["{class}", "{slide}", "{group}", "{name}", "/", "/", "_", "a", "-", ".", "e\u0301"]), min_size=1, max_size=9
).map("".join)
PATHS = st.lists(st.text(st.sampled_from("ab_-.e\u0301"), min_size=1, max_size=8), min_size=1, max_size=4)


@settings(max_examples=400)
@given(text=TEMPLATES | st.sampled_from(["regex:(?P<class>a+)/.*(?P<slide>b)?", "regex:^(?P<slide>[^/]+)_"]), path=PATHS)
@example(text="{class}_{slide}/{class}-{name}", path=["a_b_c", "a_b-x.jpg"])  # the name decides what the folder's class is
@example(text="{class}/{name}", path=["a.jpg"])
@example(text="{class}/{name}", path=["e\u0301", "e\u0301.jpg"])
@example(text="{class}/{name}", path=["a", "b", "c.jpg"])
@example(text="{class}_{slide}/{group}_{name}", path=["a_b_c", "a_b_c.jpg"])
def test_matching_the_folder_first_changes_nothing(text, path):
    try:
        layout = parse_layout(text)
    except ValueError:
        return
    *folders, name = path
    values = layout.names_in("/".join(folders))(name)
    expected = layout.match("/".join(path))
    assert (None if values is None else dict(zip(layout.fields, values, strict=True))) == expected


def test_a_slash_keeps_names_apart_in_unicode_too():
    """What lets a folder and a name be composed one by one."""
    for code in range(0x110000):
        mark = chr(code)
        if not 0xD800 <= code < 0xE000:
            composed = unicodedata.normalize("NFC", mark)
            assert "/" not in composed or mark == "/"
            assert unicodedata.normalize("NFC", "a/" + mark) == "a/" + composed
