"""Tables in `.csv`, `.tsv` and `.parquet` files: delimiters, names of columns, an index."""

import csv
import io
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import assume, given
from hypothesis import strategies as st
from hypothesis.extra import numpy as npst
from tiny_files import (
    CHEAP,
    LARGEST,
    TABLE,
    assert_holds,
    fill,
    float32_tells_apart,
    has_constant_column,
    parquet,
    refusal,
)

from jvae import data

# What was written is read back.


@st.composite
def tables(draw: st.DrawFn) -> np.ndarray:
    """float64 [rows, columns] within float32, no column constant in the rows that are left."""
    shape = draw(st.tuples(st.integers(4, 12), st.integers(1, 4)))
    elements = st.floats(-LARGEST, LARGEST)
    array = draw(npst.arrays(np.float64, shape, elements=elements, fill=st.nothing(), unique=True))
    assume(float32_tells_apart(array))
    assume(not has_constant_column(array.astype(np.float32), 0.1, 0))
    return array


@CHEAP
@given(
    table=tables(),
    suffix=st.sampled_from([".csv", ".tsv"]),
    delimiter=st.sampled_from(",;\t"),
    header=st.booleans(),
    encoding=st.sampled_from(["utf-8", "utf-8-sig"]),
    line_end=st.sampled_from(["\n", "\r\n"]),
    quoting=st.sampled_from([csv.QUOTE_MINIMAL, csv.QUOTE_ALL]),
    last_line_ends=st.booleans(),
    choices=st.data(),
)
def test_text_tables_come_back(
    table: np.ndarray,
    suffix: str,
    delimiter: str,
    header: bool,
    encoding: str,
    line_end: str,
    quoting: Any,
    last_line_ends: bool,
    choices: st.DataObject,
) -> None:
    delimiter = "\t" if suffix == ".tsv" else delimiter
    rows: list[list[str]] = [[repr(float(value)) for value in row] for row in table]
    if header:
        name = st.text(f'xyé {delimiter}"', max_size=6)
        width = table.shape[1]
        rows.insert(0, choices.draw(st.lists(name, min_size=width, max_size=width)))
    text = io.StringIO()
    csv.writer(text, delimiter=delimiter, quoting=quoting, lineterminator=line_end).writerows(rows)
    written = text.getvalue() if last_line_ends else text.getvalue().removesuffix(line_end)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, f"table{suffix}")
        path.write_bytes(written.encode(encoding))
        assert_holds(data.load_path(path), table.astype(np.float32))


@CHEAP
@given(
    table=tables(),
    rows_a_group=st.integers(1, 5),
    compression=st.sampled_from(["none", "snappy", "zstd"]),
    choices=st.data(),
)
def test_parquet_tables_come_back(
    table: np.ndarray, rows_a_group: int, compression: str, choices: st.DataObject
) -> None:
    num, width = table.shape
    name = st.text(st.characters(codec="utf-8"), max_size=5)
    names = choices.draw(st.lists(name, min_size=width, max_size=width, unique=True))
    columns = dict(zip(names, table.T, strict=True))
    integers = choices.draw(st.booleans())
    expected = table
    if integers:
        counts = np.arange(num, dtype=choices.draw(st.sampled_from(["i1", "u2", "i4", "i8"])))
        columns["whole numbers"] = counts
        expected = np.column_stack([table, counts])
    # As pandas writes a table with an index.
    columns["__index_level_0__"] = np.arange(num)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder, "table.parquet")
        path.write_bytes(parquet(columns, row_group_size=rows_a_group, compression=compression))
        assert_holds(data.load_path(path), expected.astype(np.float32))


def test_columns_of_one_name_are_columns(tmp_path: Path) -> None:
    rows = "".join(f"{a},{b}\n" for a, b in TABLE[:, :2])
    columns = [pa.array(TABLE[:, i]) for i in (0, 1)]
    files = {
        "a.csv": f"x,x\n{rows}".encode(),
        "a.parquet": parquet(pa.Table.from_arrays(columns, names=["x", "x"])),
    }
    fill(tmp_path, files)
    for name in files:
        assert_holds(data.load_path(tmp_path / name), TABLE[:, :2].astype(np.float32))


# Delimiters are told by the rows, not by what stands within quotes.


@pytest.mark.parametrize(
    ("file", "header", "delimiter"),
    [
        ("a.csv", '"a,b,c";d', ";"),
        ("a.csv", '"a;b;c",d', ","),
        ("a.csv", '"a;b;c"\td', "\t"),
        ("a.tsv", '"a,b,c"\td', "\t"),
        ("a.tsv", "a,b,c\td", "\t"),
        ("a.csv", '"a\nb",c', ","),
        ("a.csv", '"a ""quoted"" name",c', ","),
    ],
)
def test_names_with_other_delimiters(
    tmp_path: Path, file: str, header: str, delimiter: str
) -> None:
    rows = "".join(f"{a}{delimiter}{b}\n" for a, b in TABLE[:, :2])
    (tmp_path / file).write_text(f"{header}\n{rows}")
    assert_holds(data.load_path(tmp_path / file), TABLE[:, :2].astype(np.float32))


@pytest.mark.parametrize(
    ("header", "delimiter", "names"),
    [
        ("a,b;c", ";", ["a,b", "c"]),
        ("a;b\tc,d", "\t", ["a;b", "c,d"]),
        ("a,b\tc", "\t", ["a,b", "c"]),
    ],
)
def test_a_tab_is_preferred_to_a_semicolon_and_that_to_a_comma(
    tmp_path: Path, header: str, delimiter: str, names: list[str]
) -> None:
    path = tmp_path / "a.csv"
    rows = [delimiter.join(map(str, row)) for row in TABLE[:, :2]]
    path.write_text("\n".join([header, *rows]))
    assert_holds(data.load_path(path), TABLE[:, :2].astype(np.float32))
    for i, name in enumerate(names):
        constant = TABLE[:, :2].copy()
        constant[:, i] = 7
        rows = [delimiter.join(map(str, row)) for row in constant]
        path.write_text("\n".join([header, *rows]))
        assert refusal(path).startswith(f"{path}: column {i + 1} ({name!r}) is 7.0 in all 4 ")


def test_an_index_without_a_name_is_dropped(tmp_path: Path) -> None:
    """As pandas writes a table."""
    expected = TABLE[:, :2].astype(np.float32)
    rows = "".join(f"{i},{a},{b}\n" for i, (a, b) in enumerate(TABLE[:, :2]))
    path = tmp_path / "a.csv"
    path.write_text(f",x,y\n{rows}")
    assert_holds(data.load_path(path), expected)
    # The columns that stay keep their names.
    path.write_text(",x,y\n" + "".join(f"{i},{a},7\n" for i, a in enumerate(TABLE[:, 0])))
    assert refusal(path).startswith(f"{path}: column 2 ('y') is 7.0 in all 4 training rows")
    # One with a name is a column, and so is one that does not count from 0.
    counted = np.column_stack([np.arange(6), TABLE[:, :2]]).astype(np.float32)
    path.write_text(f"i,x,y\n{rows}")
    assert_holds(data.load_path(path), counted)
    path.write_text(rows)
    assert_holds(data.load_path(path), counted)
    path.write_text(
        ",x,y\n" + "".join(f"{i + 1},{a},{b}\n" for i, (a, b) in enumerate(TABLE[:, :2]))
    )
    assert_holds(data.load_path(path), counted + np.array([1, 0, 0], np.float32))


def test_numbers_from_0_in_the_first_row_are_a_row_of_less_than_three(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("0,1\n5,7\n3,2\n9,4\n")
    assert_holds(data.load_path(path), np.array([[0, 1], [5, 7], [3, 2], [9, 4]], np.float32))
    path.write_text("0,1,3\n5,7,1\n3,2,2\n9,4,8\n")
    expected = np.array([[0, 1, 3], [5, 7, 1], [3, 2, 2], [9, 4, 8]], np.float32)
    assert_holds(data.load_path(path), expected)
