"""Arrays and files that cannot be trained on are refused in one line."""

import gc
import re
import warnings
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image
from tiny_files import (
    GREY,
    LABELS,
    PARTS,
    TABLE,
    encoded,
    fill,
    npy,
    npy_header,
    npz,
    parquet,
    picture,
    refusal,
    zipped,
)

from jvae import data

# In a table a name has the file or array and the message.


def with_value(value: float, *index: int) -> np.ndarray:
    """The table with another value there."""
    table = TABLE.copy()
    table[index] = value
    return table


NUMBERS = "expected finite numbers"
NO_SHAPE = re.escape("expected (num, *data_shape)")
REFUSED_ARRAYS: dict[str, tuple[np.ndarray, str]] = {
    "NaN": (with_value(np.nan, 2, 1), f"row 3, column 2 is nan: {NUMBERS}"),
    "infinity": (
        with_value(-np.inf, 0, 2),
        f"row 1, column 3 is -inf: {NUMBERS}",
    ),
    "first of several": (
        np.where(TABLE < 80, TABLE, np.nan),
        f"row 4, column 1 is nan: {NUMBERS}",
    ),
    "NaN in images": (
        np.where(np.arange(24).reshape(4, 3, 2) == 9, np.nan, 0.5),
        f"row 2, column 2, 2 is nan: {NUMBERS}",
    ),
    "beyond float32": (
        with_value(1e39, 5, 0),
        rf"row 6, column 1 is 1e\+39: {NUMBERS}",
    ),
    "complex": (TABLE.astype(np.complex128), "values of type complex128, expected numbers"),
    "text": (np.array([["a"]] * 5), "values of type <U1, expected numbers"),
    "bytes": (np.array([[b"a"]] * 5), r"values of type \|S1, expected numbers"),
    "times": (np.zeros((5, 2), "M8[s]"), r"values of type datetime64\[s\], expected numbers"),
    "durations": (np.zeros((5, 2), "m8[s]"), r"values of type timedelta64\[s\], expected numbers"),
    "records": (np.zeros((5, 2), "f4,f4"), "values of type .*, expected numbers"),
    "no axis": (np.array(1.0), rf"shape \(\), {NO_SHAPE}"),
    "one axis": (np.arange(5.0), rf"shape \(5,\), {NO_SHAPE}"),
    "no rows": (np.zeros((0, 3)), rf"shape \(0, 3\), {NO_SHAPE}"),
    "no columns": (np.zeros((5, 0), np.uint8), rf"shape \(5, 0\), {NO_SHAPE}"),
    "constant column": (
        TABLE * [1, 0, 1] + [0, 2.5, 0],
        "column 2 is 2.5 in all 4 training rows: .*leave it out",
    ),
    "one training row": (TABLE[:3], "column 1 is -0.5 in all 1 training rows"),
}


@pytest.mark.parametrize("name", REFUSED_ARRAYS)
def test_arrays_are_refused(tmp_path: Path, name: str) -> None:
    array, message = REFUSED_ARRAYS[name]
    with pytest.raises(data.DataError, match=f"^array: {message}") as error:
        data.from_array(array)
    assert "\n" not in str(error.value)
    for suffix, raw in (("npy", npy(array)), ("npz", npz(train=array))):
        path = tmp_path / f"a.{suffix}"
        path.write_bytes(raw)
        assert re.match(message, refusal(path).removeprefix(f"{path}: "))


def test_objects_are_refused() -> None:
    objects = np.array([[object()]] * 5)
    with pytest.raises(data.DataError, match=r"^array: values of type object, expected numbers$"):
        data.from_array(objects)


@pytest.mark.parametrize(
    ("train", "test", "message"),
    [
        (
            TABLE,
            TABLE[:, :2],
            r"test has examples of float32 \(2,\), train of float32 \(3,\)",
        ),
        (
            PARTS["train"],
            PARTS["test"] / 100,
            r"test has examples of float32 \(2, 3\), train of uint8 \(2, 3\)",
        ),
        # Of integers the values decide.
        (
            np.arange(4).reshape(4, 1, 1),
            np.arange(254, 257).reshape(3, 1, 1),
            r"test has examples of float32 \(1, 1\), train of uint8 \(1, 1\)",
        ),
        (TABLE, np.where(TABLE < 5, np.nan, TABLE), f"test: row 1, column 1 is nan: {NUMBERS}"),
        (TABLE * [1, 1, 0], TABLE, r"column 3 is 0.0 in all 6 training rows"),
        (TABLE, TABLE[:0], rf"test: shape \(0, 3\), {NO_SHAPE}"),
    ],
)
def test_parts_that_do_not_fit_are_refused(
    tmp_path: Path, train: np.ndarray, test: np.ndarray, message: str
) -> None:
    with pytest.raises(data.DataError, match=f"^mine: {message}"):
        data.from_array(train, test, name="mine")
    path = tmp_path / "a.npz"
    path.write_bytes(npz(train=train, test=test))
    assert re.match(message, refusal(path).removeprefix(f"{path}: "))


def test_check_varied() -> None:
    table = np.array([[1.0, 2.0, 3.0], [4.0, 2.0, 3.0]])
    with pytest.raises(
        data.DataError,
        match=re.escape("t.csv: column 2 ('b') is 2.0 in all 2 training rows"),
    ):
        data.check_varied(table, "t.csv", ["a", "b", "c"])
    images = np.array([[[1.0, 2.0], [5.0, 4.0]], [[2.0, 3.0], [5.0, 4.0]]])
    with pytest.raises(data.DataError, match=r"^x: column 2, 1 is 5\.0 in all 2 training rows"):
        data.check_varied(images, "x")
    data.check_varied(np.array([[1.0, 2.0], [1.0, 3.0], [2.0, 2.0]]), "x")


TRUNCATED = "not a whole .np[yz] file"
NAMES = "expected one array, or arrays named train, valid, test, train_labels, valid_labels, "
# file, bytes, message after "<path>: " or "<path> "
REFUSED_FILES: dict[str, tuple[str, bytes, str]] = {
    # Arrays.
    "two rows.npy": ("a.npy", npy(TABLE[:2]), "2 examples, at least 3 are needed"),
    "cut.npy": ("a.npy", npy(TABLE)[:-1], TRUNCATED),
    "cut in its header.npy": ("a.npy", npy(TABLE)[:50], TRUNCATED),
    "empty.npy": ("a.npy", b"", TRUNCATED),
    "a zip.npy": ("a.npy", npz(a=TABLE), "not an .npy file"),
    "a web page.npy": ("a.npy", b"<html>404</html>", ""),
    "claims terabytes.npy": ("a.npy", npy_header("(1000000000000, 2)"), TRUNCATED),
    "claims beyond 64 bits.npy": ("a.npy", npy_header(f"({10**30}, 2)"), TRUNCATED),
    "claims 2**66 numbers.npy": ("a.npy", npy_header(f"({2**32}, {2**32}, 4)"), TRUNCATED),
    "negative shape.npy": ("a.npy", npy_header("(-1, 2)"), TRUNCATED),
    "negative shapes.npy": ("a.npy", npy_header("(-2, -4)"), TRUNCATED),
    "true shape.npy": ("a.npy", npy_header("(True, 2)"), TRUNCATED),
    "unclosed header.npy": ("a.npy", b"\x93NUMPY\x01\x00\x08\x00" + b"((((((((", TRUNCATED),
    "unknown type.npy": ("a.npy", npy_header("(4, 2)", "'zz'"), TRUNCATED),
    # Archives.
    "cut.npz": ("a.npz", npz(train=TABLE)[:-1], TRUNCATED),
    "half.npz": ("a.npz", npz(train=TABLE)[:150], TRUNCATED),
    "empty.npz": ("a.npz", b"", TRUNCATED),
    "no zip.npz": ("a.npz", npy(TABLE), TRUNCATED),
    "text.npz": ("a.npz", b"hello", TRUNCATED),
    "an array cut in it.npz": ("a.npz", zipped({"train.npy": npy(TABLE)[:-8]}), TRUNCATED),
    "a byte flipped.npz": (
        "a.npz",
        (lambda raw: raw[:200] + bytes([raw[200] ^ 1]) + raw[201:])(npz(train=TABLE)),
        TRUNCATED,
    ),
    "no arrays.npz": ("a.npz", npz(), f"holds nothing: {NAMES}"),
    "unknown names.npz": ("a.npz", npz(x=TABLE, y=LABELS), f"holds x, y: {NAMES}"),
    "a name too many.npz": (
        "a.npz",
        npz(train=TABLE, test=TABLE, weights=TABLE),
        f"holds test, train, weights: {NAMES}",
    ),
    "two names for one.npz": (
        "a.npz",
        npz(train=TABLE, x_train=TABLE),
        f"holds train, x_train: {NAMES}",
    ),
    "test alone.npz": ("a.npz", npz(test=TABLE), f"holds test: {NAMES}"),
    "labels alone.npz": ("a.npz", npz(y_train=LABELS), f"holds train_labels: {NAMES}"),
    "labels without test.npz": (
        "a.npz",
        npz(train=TABLE, y_test=LABELS),
        "holds test_labels without test",
    ),
    "labels without valid.npz": (
        "a.npz",
        npz(train=TABLE, y_val=LABELS),
        "holds valid_labels without valid",
    ),
    "a label too few.npz": (
        "a.npz",
        npz(train=TABLE, train_labels=LABELS[:5]),
        r"train_labels are int64 \(5,\), expected integers \(6,\)",
    ),
    "labels of test.npz": (
        "a.npz",
        npz(train=TABLE, test=TABLE[:2], test_labels=LABELS),
        r"test_labels are int64 \(6,\), expected integers \(2,\)",
    ),
    "labels of valid.npz": (
        "a.npz",
        npz(train=TABLE, valid=TABLE[:2], y_val=LABELS),
        r"valid_labels are int64 \(6,\), expected integers \(2,\)",
    ),
    "labels in columns.npz": (
        "a.npz",
        npz(train=TABLE, train_labels=LABELS[:, None]),
        r"train_labels are int64 \(6, 1\), expected integers \(6,\)",
    ),
    "floats for labels.npz": (
        "a.npz",
        npz(train=TABLE, train_labels=LABELS / 2),
        r"train_labels are float64 \(6,\), expected integers \(6,\)",
    ),
    "names for labels.npz": (
        "a.npz",
        npz(train=TABLE, train_labels=np.array(["cat"] * 6)),
        r"train_labels are <U3 \(6,\), expected integers \(6,\)",
    ),
    "text in it.npz": ("a.npz", zipped({"notes.txt": b"hello"}), ""),
    "text for an array.npz": ("a.npz", zipped({"train.npy": b"hello"}), ""),
    "an empty array file.npz": ("a.npz", zipped({"train.npy": b""}), ""),
    "claims terabytes.npz": (
        "a.npz",
        zipped({"train.npy": npy_header("(1000000000000, 2)")}),
        TRUNCATED,
    ),
    "claims beyond 64 bits.npz": (
        "a.npz",
        zipped({"train.npy": npy_header(f"({10**30}, 2)")}),
        TRUNCATED,
    ),
    "deflate gone wrong.npz": (
        "a.npz",
        (lambda raw: raw[:45] + b"\xff" * 20 + raw[65:])(zipped({"train.npy": npy(TABLE)})),
        TRUNCATED,
    ),
    "encrypted.npz": (
        "a.npz",
        zipped({"train.npy": npy(TABLE)})
        .replace(b"PK\x03\x04\x14\x00\x00", b"PK\x03\x04\x14\x00\x01")
        .replace(b"PK\x01\x02\x14\x03\x14\x00\x00", b"PK\x01\x02\x14\x03\x14\x00\x01"),
        "",
    ),
    # Text.
    "empty.csv": ("a.csv", b"", ""),
    "blank.csv": ("a.csv", b"\n\n", ""),
    "a header alone.csv": ("a.csv", b"a,b\n", ""),
    "two rows.csv": ("a.csv", b"1,2\n3,4\n", "2 examples, at least 3 are needed"),
    "text in a cell.csv": (
        "a.csv",
        b"a,b\n1,2\n3,4\n5,six\n",
        r"line 4, column 2 \('b'\): 'six' is not a number",
    ),
    "text without a header.csv": (
        "a.csv",
        b"1,2\n3,4\nfive,6\n",
        "line 3, column 1: 'five' is not a number",
    ),
    "an empty cell.csv": (
        "a.csv",
        b"a,b,c\n1,2,3\n4,,6\n7,8,9\n",
        r"line 3, column 2 \('b'\): '' is not a number",
    ),
    "a missing value.tsv": (
        "a.tsv",
        b"1\t2\n3\tNA\n5\t6\n",
        "line 2, column 2: 'NA' is not a number",
    ),
    "blank lines count.csv": (
        "a.csv",
        b"a,b\n\n1,2\n\n3,x\n",
        r"line 5, column 2 \('b'\): 'x' is not a number",
    ),
    "an underscore.csv": ("a.csv", b"a,b\n1,2\n1_000,3\n4,5\n", ".*'1_000'"),
    "other digits.csv": ("a.csv", "a,b\n1,2\n٣,3\n4,5\n".encode(), ".*'٣'"),
    "hexadecimal.csv": (
        "a.csv",
        b"1,2\n0x10,3\n4,5\n",
        "line 2, column 1: '0x10' is not a number$",
    ),
    "two commas.csv": (
        "a.csv",
        b"a;b\n1,500,000;2\n3;4\n",
        r"line 2, column 1 \('a'\): '1,500,000' is not a number$",
    ),
    "a decimal comma alone.csv": (
        "a.csv",
        b"1;2\n3; -4,25 \n",
        "line 2, column 2: ' -4,25 ' is not a number: write a decimal point$",
    ),
    "numbers for names.csv": (
        "a.csv",
        b"0,1,2\n1,5,3\n4,5,6\n7,8,10\n",
        "line 1 is 0, 1, …, 2, as pandas numbers columns without names: name them, or write no "
        "header$",
    ),
    "numbers for names.tsv": ("a.tsv", b"0\t1\t2\t3\n1\t5\t3\t2\n", "line 1 is 0, 1, …, 3, as"),
    "an index alone.csv": ("a.csv", b'""\n0\n1\n2\n', rf"shape \(3, 0\), {NO_SHAPE}"),
    "decimal commas.csv": (
        "a.csv",
        b"a;b\n1,5;2\n3,5;4\n",
        r"line 2, column 1 \('a'\): '1,5' is not a number: write a decimal point$",
    ),
    "NaN.csv": (
        "a.csv",
        b"a,b\n1,2\n3,nan\n5,6\n7,8\n",
        rf"row 2, column 2 \('b'\) is nan: {NUMBERS}",
    ),
    "infinity.csv": ("a.csv", b"1,2\n3,4\n-inf,6\n7,8\n", f"row 3, column 1 is -inf: {NUMBERS}"),
    "beyond float64.csv": ("a.csv", b"1,2\n3,1e400\n5,6\n", f"row 2, column 2 is inf: {NUMBERS}"),
    "beyond float32.csv": (
        "a.csv",
        b"1,2\n3,-1e39\n5,6\n",
        rf"row 2, column 2 is -1e\+39: {NUMBERS}",
    ),
    "a row too short.csv": ("a.csv", b"1,2\n3\n5,6\n", "line 2: 1 columns, expected 2"),
    "a row too long.csv": ("a.csv", b"a,b\n1,2\n3,4,5\n", "line 3: 3 columns, expected 2"),
    "a name too many.csv": ("a.csv", b"a,b,c\n1,2\n3,4\n5,6\n", "3 names of columns for 2 columns"),
    "a name too few.csv": ("a.csv", b"a,b\n1,2,3\n4,5,6\n7,8,9\n", "2 names of columns for 3"),
    "Latin-1.csv": ("a.csv", "a,b\n1,é\n".encode("latin-1"), "not a text in UTF-8"),
    "Latin-1 far down.csv": (
        "a.csv",
        b"a,b\n" + b"1,2\n3,4\n" * 5000 + b"\xe9,1\n",
        "not a text in UTF-8",
    ),
    "UTF-16.csv": ("a.csv", "a,b\n1,2\n".encode("utf-16"), "not a text in UTF-8"),
    "a constant column.csv": (
        "a.csv",
        b"width,height\n1,2\n3,2\n5,2\n7,2\n9,2\n",
        r"column 2 \('height'\) is 2.0 in all 3 training rows: .*leave it out",
    ),
    "constant, with a quoted name.csv": (
        "a.csv",
        b'"width, cm","height, ""cm"""\n1,2\n3,2\n5,2\n7,2\n9,2\n',
        r"""column 2 \('height, "cm"'\) is 2.0 in all 3 training rows""",
    ),
    "constant, without names.csv": (
        "a.csv",
        b"1,2\n1,3\n1,4\n1,5\n",
        "column 1 is 1.0 in all 2 training rows",
    ),
    "a quote never closed.csv": ("a.csv", b'a,b\n1,2\n3,"4\n5,6\n', "line 4, column 2"),
    "a cell of 200,000 letters.csv": ("a.csv", b"1,2\n3," + b"x" * 200_000 + b"\n", ""),
    "a line of 200,000 letters.csv": ("a.csv", b"x" * 200_000, ""),
    "a byte of zero.csv": ("a.csv", b"1,2\n3,\0\n", "line 2, column 2: .* is not a number"),
    # A first row with a gap is no header.
    "an empty cell in the first row.csv": ("a.csv", b"1,,3\n4,5,6\n7,8,10\n9,5,2\n3,1,0\n", ""),
    "a missing value in the first row.csv": ("a.csv", b"1,NA\n3,4\n5,6\n7,8\n9,9\n", ""),
    # Parquet.
    "two rows.parquet": ("a.parquet", parquet({"a": [1.0, 2]}), "2 examples, at least 3"),
    "no rows.parquet": ("a.parquet", parquet({"a": np.zeros(0)}), ""),
    "no columns.parquet": ("a.parquet", parquet({}), "no columns"),
    "an index alone.parquet": ("a.parquet", parquet({"__index_level_0__": LABELS}), "no columns"),
    "text.parquet": (
        "a.parquet",
        parquet({"a": LABELS, "name": ["x"] * 6}),
        "column 'name' holds string, expected numbers",
    ),
    "booleans.parquet": (
        "a.parquet",
        parquet({"yes": [True, False, True]}),
        "column 'yes' holds bool, expected numbers",
    ),
    "times.parquet": (
        "a.parquet",
        parquet({"when": np.zeros(3, "M8[s]")}),
        r"column 'when' holds timestamp\[.*\], expected numbers",
    ),
    "lists.parquet": (
        "a.parquet",
        parquet({"l": [[1.0]] * 3}),
        "column 'l' holds list<.*>, expected numbers",
    ),
    "nothing but nulls.parquet": (
        "a.parquet",
        parquet({"n": pa.nulls(3)}),
        "column 'n' holds null, expected numbers",
    ),
    "a null.parquet": (
        "a.parquet",
        parquet({"a": [1.0, 2, 3, 4], "b": [1.0, 2, None, None]}),
        "row 3, column 'b' is empty: expected a number",
    ),
    "a null among integers.parquet": (
        "a.parquet",
        parquet({"a": [1, 2, 3, None]}, row_group_size=2),
        "row 4, column 'a' is empty: expected a number",
    ),
    "NaN.parquet": (
        "a.parquet",
        parquet({"a": [1.0, 2, 3], "b": [1.0, 2, np.nan]}),
        rf"row 3, column 2 \('b'\) is nan: {NUMBERS}",
    ),
    "a constant column.parquet": (
        "a.parquet",
        parquet({"a": TABLE[:, 0], "b": [1] * 6}),
        r"column 2 \('b'\) is 1.0 in all 4 training rows: .*leave it out",
    ),
    "cut.parquet": ("a.parquet", parquet({"a": LABELS})[:-1], "not a whole Parquet file"),
    "half.parquet": ("a.parquet", parquet({"a": LABELS})[:200], "not a whole Parquet file"),
    "empty.parquet": ("a.parquet", b"", "not a whole Parquet file"),
    "a table of text.parquet": ("a.parquet", b"a,b\n1,2\n", "not a whole Parquet file"),
    # Others.
    "a suffix too many.csv.gz": (
        "a.csv.gz",
        b"",
        "expected a folder of images or a file of .npy, .npz, .csv, .tsv, .parquet, got '.gz'",
    ),
    "one image.png": ("a.png", encoded(picture(2, 2)), "expected a folder of images.*got '.png'"),
    "no suffix": ("data", b"1,2\n", "expected a folder of images or a file of .*, got ''"),
}


@pytest.mark.parametrize("name", REFUSED_FILES)
def test_files_are_refused(tmp_path: Path, name: str) -> None:
    file, raw, message = REFUSED_FILES[name]
    path = tmp_path / file
    path.write_bytes(raw)
    after = refusal(path).split(str(path), 1)[1]
    assert re.match(f"[:,]? ?{message}", after)


def test_no_file_is_left_open(tmp_path: Path) -> None:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always", ResourceWarning)
        for file, raw, _ in REFUSED_FILES.values():
            (tmp_path / file).write_bytes(raw)
            refusal(tmp_path / file)
        gc.collect()
    assert [str(warning.message) for warning in caught] == []


@pytest.mark.parametrize("name", ["here.npy", "here", "a/b/c.csv", "a\0b.npy"])
def test_a_path_that_does_not_exist_is_refused(tmp_path: Path, name: str) -> None:
    assert refusal(tmp_path / name) == f"{tmp_path / name} does not exist"


def test_a_path_that_cannot_be_looked_at_is_refused() -> None:
    path = "a" * 300 + ".npy"
    assert refusal(path) == f"{path} cannot be read: File name too long"


def test_the_home_of_an_unknown_user_is_refused() -> None:
    refusal("~nobody-of-this-name/a.npy")


# Whatever bytes are there.

VALID_FILES: dict[str, bytes] = {
    "a.npy": npy(TABLE),
    "a.npz": zipped({"train.npy": npy(TABLE[:, :2]), "y_train.npy": npy(LABELS)}),
    "stored.npz": npz(train=TABLE),
    "a.csv": b'"a","b"\n1,2.5\n-3,4e1\n5,6\n7.25,8\n9,1\n',
    "a.tsv": b"1\t2.5\n-3\t4e1\n5\t6\n7.25\t8\n9\t1\n",
    "a.parquet": parquet({"a": TABLE[:, 0], "b": LABELS}, compression="none"),
    "small.parquet": parquet({"a": TABLE[:, 0]}, compression="zstd", write_statistics=False),
    "folder/z.png": encoded(picture(5, 4)),
    "folder/z.jpg": encoded(picture(5, 4), "JPEG", optimize=True),
    "folder/z.bmp": encoded(Image.fromarray(np.eye(5, 4) > 0), "BMP"),
    "folder/z.pgm": encoded(picture(5, 4), "PPM"),
}


@pytest.mark.parametrize("damage", ["cut", "flipped", "one bit flipped"])
@pytest.mark.parametrize("name", VALID_FILES)
def test_any_file_is_read_or_refused_in_a_line(tmp_path: Path, name: str, damage: str) -> None:
    """Cut anywhere, or with any byte changed."""
    whole = VALID_FILES[name]
    path = tmp_path / name
    target = path.parent if path.parent != tmp_path else path
    fill(tmp_path, {name: whole} | ({f"folder/{n}": GREY[n] for n in GREY} if "/" in name else {}))
    assert isinstance(data.load_path(target), data.Dataset)
    others: dict[int, object] = {}
    for i in range(len(whole)):
        flipped = whole[i] ^ (0xFF if damage == "flipped" else 1 << i % 8)
        path.write_bytes(
            whole[:i] + (b"" if damage == "cut" else bytes([flipped]) + whole[i + 1 :])
        )
        try:
            data.load_path(target)
            if damage == "cut" and path.suffix in (".npy", ".npz", ".parquet"):
                others[i] = "read"
        except data.DataError as error:
            if "\n" in str(error) or str(target) not in str(error):
                others[i] = error
        except Exception as error:
            others[i] = error
    assert not others
