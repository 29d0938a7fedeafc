"""A table says what each image is, whoever wrote it, and nothing in it is lost in silence."""

import datetime
import os
import unicodedata

import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from sharding.field_values import normalized
from sharding.sources.label_table import SourcePaths, match_table, read_label_table
from sharding.sources.scan import Scan, scan_sources, source_names
from tests.helpers import write_tree
from tests.sharding.sources.archive_files import write_tar, write_zip


def cells(path) -> list[dict]:
    """The rows of a table as the scan will see them."""
    labels = read_label_table(str(path))
    columns = {"path": labels.paths, **labels.fields}
    return [
        dict(zip(columns, row, strict=True)) for row in zip(*(column.to_pylist() for column in columns.values()), strict=True)
    ]


def rows(scan: Scan) -> list[dict]:
    """The rows of a scan: source and fields, and whether the image is there."""
    fields = scan.files.select(scan.fields).to_pylist()
    there = [size >= 0 for size in scan.files["size"].to_pylist()]
    return [{"source": s, "there": t, **f} for s, t, f in zip(source_names(scan.files), there, fields, strict=True)]


# Reading


@pytest.mark.parametrize(
    "data",
    [
        b"path,class,group\na/1.jpg,007,p 1\na/2.jpg,,NA\n",
        b"\xef\xbb\xbfpath;class;group\r\na/1.jpg;007;p 1\r\na/2.jpg;;NA\r\n",
        b"path\tclass\tgroup\na/1.jpg\t007\tp 1\na/2.jpg\t\tNA",
        b'"path";"class";"group"\n"a/1.jpg";"007";"p 1"\n\n"a/2.jpg";"";"NA"\n',
        b"class,group,path\r007,p 1,./a/1.jpg\r,NA,././a/2.jpg\r",
        b'group,class,path,"a;b;c;d;e"\np 1,007,a/1.jpg,\nNA,,a/2.jpg,\n',
    ],
)
def test_a_csv_is_text_as_written(tmp_path, data):
    (tmp_path / "labels.csv").write_bytes(data)
    first, second = cells(tmp_path / "labels.csv")
    assert {key: first[key] for key in ("path", "class", "group")} == {"path": "a/1.jpg", "class": "007", "group": "p 1"}
    assert {key: second[key] for key in ("path", "class", "group")} == {"path": "a/2.jpg", "class": None, "group": "NA"}


def test_odd_cells_of_a_csv(tmp_path):
    (tmp_path / "labels.csv").write_text('path,class\n"a\n,""b"".jpg", x \n1e3,nan\n1.0,null\n', newline="", encoding="utf-8")
    assert cells(tmp_path / "labels.csv") == [
        {"path": 'a\n,"b".jpg', "class": "x"},
        {"path": "1e3", "class": "nan"},
        {"path": "1.0", "class": "null"},
    ]


def test_a_cell_with_a_line_break_in_a_long_table(tmp_path):
    """A long table is read in parts."""
    lines = [f'"folder\n{i}/{"x" * 60}.jpg",a\n' for i in range(40_000)]
    (tmp_path / "labels.csv").write_text("path,class\n" + "".join(lines), encoding="utf-8")
    labels = read_label_table(str(tmp_path / "labels.csv"))
    assert len(labels.paths) == 40_000
    assert pc.all(pc.starts_with(labels.paths, "folder\n")).as_py()


def test_parquet_becomes_text(tmp_path):
    table = pa.table(
        {
            "path": pa.array(["a", "b", "c", "d"], pa.large_string()),
            "int": [7, None, -3, 10**12],
            "float": [3.0, None, 2.5, 1e20],
            "gap": pa.array([float("nan"), float("inf"), -0.0, 0.1], pa.float32()),
            "yes": [True, False, None, True],
            "day": [datetime.date(2020, 1, 2)] * 4,
            "kind": pa.array(["x", "", None, "x"]).dictionary_encode(),
            "none": pa.nulls(4),
            "bytes": [b"a", b"b", b"c", b"d"],
        }
    )
    pq.write_table(table, tmp_path / "labels.parquet")
    columns = {key: [row[key] for row in cells(tmp_path / "labels.parquet")] for key in table.column_names}
    assert columns == {
        "path": ["a", "b", "c", "d"],
        "int": ["7", None, "-3", "1000000000000"],
        "float": ["3", None, "2.5", "100000000000000000000"],
        "gap": [None, "inf", "0", "0.1"],
        "yes": ["true", "false", None, "true"],
        "day": ["2020-01-02"] * 4,
        "kind": ["x", None, None, "x"],
        "none": [None] * 4,
        "bytes": ["a", "b", "c", "d"],
    }


def test_what_is_not_taken_is_said(tmp_path):
    text = ",path,class,sha256,name,container,Unnamed: 0,__index_level_0__\n0,a.jpg,x,1,n,c,0,0\n1,,y,2,m,c,1,1\n"
    (tmp_path / "labels.csv").write_text(text, encoding="utf-8")
    labels = read_label_table(str(tmp_path / "labels.csv"))
    assert list(labels.fields) == ["class"]
    assert labels.paths.to_pylist() == ["a.jpg"]
    notes = "\n".join(labels.notes)
    assert "sha256, name, container not taken" in notes
    assert "without a name (row numbers) not taken" in notes
    assert "1 row without a path left out" in notes


@pytest.mark.parametrize(
    ("data", "words"),
    [
        (b"", "cannot be read"),
        (b"path,class\n", "no row with a path"),
        (b"path,class\n,a\n", "no row with a path"),
        (b"file,class\na,b\n", "no column 'path' but 'file', 'class': rename"),
        (b"path,class,class\na,b,c\n", "'class' more than once"),
        (b"path,class\na,b\na,b,c\n", "Row #3: Expected 2 columns, got 3"),
        ("path,class\na,종양\n".encode("cp949"), "not in UTF-8: save it as CSV UTF-8"),
        ("path,종류\na,b\n".encode("cp949"), "not in UTF-8: save it as CSV UTF-8"),
        ("path,class\na,종양\n".encode("utf-16"), "not in UTF-8: save it as CSV UTF-8"),
        (b"PK\3\4 and so on", "a workbook: save it as CSV UTF-8"),
        (b"PAR1 and so on", "cannot be read"),
        (b"path,class\na,b\na,c\n", "contradicts itself about 'a': its class is 'b' and 'c'"),
        (b"path,class\na,b\n./a,\n", "contradicts itself about 'a': its class is 'b' and ''"),
        ("path,class\ne\u0301,b\n\u00e9,c\n".encode(), "contradicts itself about 'é'"),
    ],
)
def test_a_table_that_cannot_be_used_is_one_sentence(tmp_path, data, words):
    (tmp_path / "labels.csv").write_bytes(data)
    with pytest.raises(ValueError, match="--table") as caught:
        read_label_table(str(tmp_path / "labels.csv"))
    assert words in str(caught.value)
    assert type(caught.value) is ValueError


def test_a_table_that_is_not_there(tmp_path):
    for path, words in ((tmp_path / "nowhere.csv", "no such file"), (tmp_path, "is a folder")):
        with pytest.raises(ValueError, match=words):
            read_label_table(str(path))
    pq.write_table(pa.table({"path": ["a"], "list": [[1]]}), tmp_path / "x.parquet")
    with pytest.raises(ValueError, match=r"'list' is list.*write it as text"):
        read_label_table(str(tmp_path / "x.parquet"))


def test_a_pipe_is_not_waited_for(tmp_path):
    os.mkfifo(tmp_path / "x.csv")
    with pytest.raises(ValueError, match=r"x\.csv is not a file: give a \.csv"):
        read_label_table(str(tmp_path / "x.csv"))


def test_spellings_that_look_the_same_are_one(tmp_path):
    """Also where a path comes twice: that is no contradiction."""
    path = tmp_path / "labels.csv"
    path.write_text("path,class,group\na,A,S1\nb,A ,S1\u00a0\nc,\u200bA,Ｓ１\na,A ,S1\nd, ,S  1\n", encoding="utf-8")
    labels = read_label_table(str(path))
    assert labels.fields["class"].to_pylist() == ["A", "A", "A", "A", None]
    assert labels.fields["group"].to_pylist() == ["S1", "S1", "S1", "S1", "S 1"]
    assert labels.notes == [
        "--table: class: 1 value is written in several ways that look the same, for example 'A', 'A ', '\\u200bA'",
        "--table: group: 1 value is written in several ways that look the same, for example 'S1', 'S1\\xa0', 'Ｓ１'",
    ]


CELLS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=6)


@settings(max_examples=50)
@given(values=st.lists(st.tuples(CELLS, CELLS), min_size=1, max_size=5), delimiter=st.sampled_from(",;\t"))
def test_any_text_comes_back(tmp_path_factory, values, delimiter):
    path = tmp_path_factory.getbasetemp() / "any.csv"
    quoted = [
        delimiter.join('"' + cell.replace('"', '""') + '"' for cell in (f"{i}{a}", a, b)) for i, (a, b) in enumerate(values)
    ]
    path.write_bytes("\n".join([delimiter.join(("path", "class", "group")), *quoted]).encode())

    def kept(text):
        return normalized(text) or None

    expected = [(unicodedata.normalize("NFC", f"{i}{a}"), kept(a), kept(b)) for i, (a, b) in enumerate(values)]
    assert cells(path) == [{"path": path, "class": label, "group": group} for path, label, group in expected]


# Looking up


def table(path, text: str) -> str:
    path.write_text(text, encoding="utf-8")
    return str(path)


def test_each_image_gets_its_row(tmp_path):
    composed = "종é"
    apart = unicodedata.normalize("NFD", composed)
    root = write_tree(tmp_path / "in", {"a/1.jpg": b"x", f"b/{apart}.jpg": b"x", "c.jpg": b"x", "d.jpg": b"x"})
    labels = f"patient,path,class,split\np1,a/1.jpg,x,train\np2,b/{composed}.jpg,{apart},test\np3,{root}/c.jpg,x,\n,c.jpg,,\n"
    with pytest.raises(ValueError, match=r"contradicts itself about 'c\.jpg': its patient"):
        scan_sources([root], table=table(tmp_path / "t.csv", labels))
    labels = labels.replace("\n,c.jpg,,", "\np3,./c.jpg,x,")
    scan = scan_sources([root], table=table(tmp_path / "t.csv", labels))
    assert scan.fields == ("patient", "class", "split")
    assert rows(scan) == [
        {"source": f"{root}/a/1.jpg", "there": True, "patient": "p1", "class": "x", "split": "train"},
        {"source": f"{root}/b/{apart}.jpg", "there": True, "patient": "p2", "class": composed, "split": "test"},
        {"source": f"{root}/c.jpg", "there": True, "patient": "p3", "class": "x", "split": None},
    ]
    assert scan.notes == ["1 file left out: --table has no row for it, for example 'd.jpg'"]


def test_a_row_without_an_image_becomes_a_record(tmp_path):
    """The packer will list it among the refused."""
    root = write_tree(tmp_path / "in", {"a/1.jpg": b"x", "a/hidden/.2.jpg": b"x"})
    text = f"path,class\nb/0.jpg,x\na/1.jpg,x\n/elsewhere/3.jpg,y\n{root}/a/hidden/.2.jpg,z\nb/0.jpg,x\n"
    scan = scan_sources([root], table=table(tmp_path / "t.csv", text))
    assert rows(scan) == [
        {"source": f"{root}/a/1.jpg", "there": True, "class": "x"},
        {"source": "/elsewhere/3.jpg", "there": False, "class": "y"},
        {"source": f"{root}/a/hidden/.2.jpg", "there": False, "class": "z"},
        {"source": f"{root}/b/0.jpg", "there": False, "class": "x"},
    ]
    assert scan.notes[-1] == "3 rows of --table name no image in the sources, for example '/elsewhere/3.jpg': unreadable"


def test_archives_and_several_sources(tmp_path):
    tar = write_tar(tmp_path / "x.tar", [(b"./a/1.jpg", b"x"), (b"only tar.jpg", b"x")])
    zipped = write_zip(tmp_path / "x.zip", {b"in the/zip.jpg": b"x", b"in the/1.jpg": b"x"})
    root = write_tree(tmp_path / "in", {"a/1.jpg": b"x", "only in.jpg": b"x"})
    text = "path,class\nonly tar.jpg,t\nonly in.jpg,i\nin the/zip.jpg,z\n"
    text += f"{tar}/a/1.jpg,t\n{root}/a/1.jpg,i\n{zipped}/gone.jpg,z\nnobody.jpg,n\n"
    scan = scan_sources([tar, root, zipped], table=table(tmp_path / "t.csv", text))
    assert [(row["source"], row["class"], row["there"]) for row in rows(scan)] == [
        (f"{tar}/a/1.jpg", "t", True),
        (f"{tar}/only tar.jpg", "t", True),
        (f"{root}/a/1.jpg", "i", True),
        (f"{root}/only in.jpg", "i", True),
        (f"{zipped}/in the/zip.jpg", "z", True),
        (f"{tar}/nobody.jpg", "n", False),
        (f"{zipped}/gone.jpg", "z", False),
    ]
    with pytest.raises(ValueError, match=r"'a/1\.jpg' is an image of .*/x\.tar and one of .*/in: write absolute paths"):
        scan_sources([tar, root], table=table(tmp_path / "t.csv", "path,class\na/1.jpg,t\n"))


def test_relative_sources_and_absolute_paths(tmp_path, monkeypatch):
    write_tree(tmp_path / "in", {"a/1.jpg": b"x"})
    monkeypatch.chdir(tmp_path)
    for source in ("in", "./in/", ".", "in/../in"):
        text = f"path,class\n{tmp_path}/in/a/1.jpg,x\n"
        assert [row["there"] for row in rows(scan_sources([source], table=table(tmp_path / "t.csv", text)))] == [True]


def test_a_name_that_is_not_utf8_is_found_by_what_is_shown_of_it(tmp_path):
    os.mkdir(tmp_path / "in")
    with open(os.fsencode(tmp_path) + b"/in/p\xe9.jpg", "wb") as file:
        file.write(b"x")
    scan = scan_sources([tmp_path / "in"], table=table(tmp_path / "t.csv", "path,class\np\\xe9.jpg,x\n"))
    assert [row["there"] for row in rows(scan)] == [True]


def test_layout_and_table_together(tmp_path):
    root = write_tree(tmp_path / "in", {"x/s1/1.jpg": b"x", "x/s2/2.jpg": b"x", "odd.jpg": b"x"})
    text = "path,group\nx/s1/1.jpg,p1\nx/s2/2.jpg,p2\nx/s3/3.jpg,p3\nodd.jpg,p4\n"
    scan = scan_sources([root], layout="{class}/{slide}/{name}", table=table(tmp_path / "t.csv", text))
    assert scan.fields == ("class", "slide", "group")
    assert [(row["class"], row["slide"], row["group"], row["there"]) for row in rows(scan)] == [
        ("x", "s1", "p1", True),
        ("x", "s2", "p2", True),
        ("x", "s3", "p3", False),
    ]
    assert scan.notes == [
        "1 file left out: the layout does not match, for example 'odd.jpg'",
        "1 row of --table names no image in the sources, for example 'x/s3/3.jpg': unreadable",
        "1 row of --table left out: the layout does not match, for example 'odd.jpg'",
    ]


@pytest.mark.parametrize(
    ("text", "settings", "words"),
    [
        ("path,class\nin/a/1.jpg,x\n", {}, "for example 'a/1.jpg'; its first path is 'in/a/1.jpg'"),
        ("path,group\na/1.jpg,x\n", {}, "no column 'class'"),
        ("path,class\na/1.jpg,x\n", {"layout": "{class}/{name}"}, "both give 'class'"),
        ("path,slide\na/1.jpg,x\n", {"layout": "{group}/{name}"}, "no column 'class'"),
        ("path,class\na/1.jpg,x\na/2.jpg,\n", {}, "1 image has no class: {root}/a/2.jpg"),
        ("path,class\na/1.jpg,x\na/2.jpg,\n", {"where": ["class=y"]}, "class is one of x"),
        ("path,class\na/1.jpg,x\n", {"where": ["slide=y"]}, "no field 'slide'; there is class"),
    ],
)
def test_what_the_table_lacks_is_one_sentence(tmp_path, text, settings, words):
    root = write_tree(tmp_path / "in", {"a/1.jpg": b"x", "a/2.jpg": b"x"})
    with pytest.raises(ValueError, match=r"--table|--where|class") as caught:
        scan_sources([root], table=table(tmp_path / "t.csv", text), **settings)
    assert words.format(root=root) in str(caught.value)
    assert "\n" not in str(caught.value)


def test_without_labels_a_class_may_be_empty(tmp_path):
    root = write_tree(tmp_path / "in", {"a/1.jpg": b"x", "a/2.jpg": b"x"})
    scan = scan_sources([root], table=table(tmp_path / "t.csv", "path,class\na/1.jpg,x\na/2.jpg,\n"), labelled=False)
    assert [row["class"] for row in rows(scan)] == ["x", None]
    some = scan_sources([root], table=table(tmp_path / "t.csv", "path,class\na/1.jpg,x\na/2.jpg,\n"), where=["class=x"])
    assert [row["class"] for row in rows(some)] == ["x"]


PATHS = st.sampled_from(["a", "b", "c", "d"])


@given(
    images=st.lists(st.sets(PATHS, min_size=1), min_size=1, max_size=2),
    named=st.lists(st.tuples(st.sampled_from(["", "/s0/", "/s1/", "/else/"]), PATHS), min_size=1, max_size=5),
)
def test_every_image_and_every_row_is_accounted_for(tmp_path_factory, images, named):
    """Against a plain dict per source."""
    path = tmp_path_factory.getbasetemp() / "rows.csv"
    path.write_text("path,class\n" + "".join(f"{root}{name},{name}\n" for root, name in named), encoding="utf-8")
    searched = [SourcePaths(f"/s{i}", pa.chunked_array([sorted(names)])) for i, names in enumerate(images)]
    expected = [{name for root, name in named if root in ("", f"/s{i}/")} & names for i, names in enumerate(images)]
    ambiguous = len(images) == 2 and any(not root and name in images[0] & images[1] for root, name in named)
    labels = read_label_table(str(path))
    if ambiguous or not any(expected):
        with pytest.raises(ValueError, match=r"write absolute paths|no row for any"):
            match_table(labels, searched)
        return
    matched = match_table(labels, searched)
    for source, found, names in zip(searched, matched.rows, expected, strict=True):
        for name, row in zip(source.relative.to_pylist(), found.to_pylist(), strict=True):
            assert (row is not None) == (name in names)
            assert row is None or named[row][1] == name
    served = {(f"/s{i}/", name) for i, names in enumerate(images) for name in names}
    lost = {
        (root, name)
        for root, name in named
        if not any((place, name) in served for place in ([root] if root else ["/s0/", "/s1/"][: len(images)]))
    }
    assert len(matched.missing) == len({(root or "/s0/", name) for root, name in lost})
