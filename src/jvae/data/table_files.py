"""Tables of numbers in files: `.csv`, `.tsv` and `.parquet`."""

import csv
import re
import warnings
from pathlib import Path

import numpy as np

from jvae.data.array_files import refuse_bomb
from jvae.data.dataset import DataError

SUFFIXES = (".csv", ".tsv", ".parquet")


def read_table(path: Path) -> tuple[list[str], np.ndarray]:
    """Read a table of numbers.

    Returns:
      The names of the columns, none where the file has no header, and the numbers
      [rows, columns].

    Raises:
      DataError: a damaged file, or a cell that is no number, by row, column and value.
    """
    return _read_parquet(path) if path.suffix.lower() == ".parquet" else _read_text(path)


def _read_text(path: Path) -> tuple[list[str], np.ndarray]:
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            first: list[str] = []
            # A comma last: beside another delimiter it marks decimals.
            for delimiter in "\t" if path.suffix.lower() == ".tsv" else "\t;,":
                file.seek(0)
                first = next(filter(None, csv.reader(file, delimiter=delimiter)), [])
                if len(first) > 1:
                    break
            if len(first) > 2 and first == [str(i) for i in range(len(first))]:
                raise DataError(
                    f"{path}, line 1 is 0, 1, …, {len(first) - 1}, as pandas numbers columns "
                    "without names: name them, or write no header"
                )
            file.seek(0)
            # With a number in it, it is a row, even with a gap beside.
            names = [] if any(map(_is_number, first)) else [name.strip() for name in first]
            if names:
                next(filter(None, csv.reader(file, delimiter=delimiter)))
            with warnings.catch_warnings(action="ignore"):  # no rows: refused below
                table = np.loadtxt(file, delimiter=delimiter, comments=None, quotechar='"', ndmin=2)
    except DataError:
        raise
    except UnicodeDecodeError as error:
        raise DataError(f"{path}: not a text in UTF-8 ({error})") from error
    except csv.Error as error:
        raise DataError(f"{path}: {error}") from error
    except ValueError as error:
        raise _bad_row(path, delimiter, names, error) from error
    if not table.size:
        raise DataError(f"{path}: no rows of numbers")
    if names and len(names) != table.shape[1]:
        raise DataError(f"{path}: {len(names)} names of columns for {table.shape[1]} columns")
    if names and not names[0] and (table[:, 0] == np.arange(len(table))).all():
        return names[1:], table[:, 1:]  # an index, as pandas writes it
    return names, table


def _is_number(text: str) -> bool:
    """Whether NumPy reads it as one: Python also takes 1_000 and the digits of other scripts."""
    try:
        float(text)
    except ValueError:
        return False
    return text.isascii() and "_" not in text


def _bad_row(path: Path, delimiter: str, names: list[str], error: ValueError) -> DataError:
    """The refusal of the first row that is wrong, found by a second look."""
    width = len(names)
    try:
        with path.open(encoding="utf-8-sig", newline="") as file:
            rows = csv.reader(file, delimiter=delimiter)
            for number, row in enumerate(filter(None, rows)):
                if names and number == 0:
                    continue
                where = f"{path}, line {rows.line_num}"
                width = width or len(row)
                if len(row) != width:
                    return DataError(f"{where}: {len(row)} columns, expected {width}")
                for i, text in enumerate(row):
                    if not _is_number(text):
                        name = f" ({names[i]!r})" if names else ""
                        cell = repr(text if len(text) <= 50 else f"{text[:50]}…")
                        decimal = re.fullmatch(r"\s*-?\d+,\d+\s*", text)
                        remedy = ": write a decimal point" if decimal else ""
                        return DataError(
                            f"{where}, column {i + 1}{name}: {cell} is not a number{remedy}"
                        )
    except csv.Error as found:
        return DataError(f"{path}, line {rows.line_num}: {found}")
    return DataError(f"{path}: {error}")


def _read_parquet(path: Path) -> tuple[list[str], np.ndarray]:
    import pyarrow.parquet
    import pyarrow.types as types

    try:
        with pyarrow.parquet.ParquetFile(path) as file:
            refuse_bomb(path, 8 * file.metadata.num_rows * file.metadata.num_columns)
            schema = file.schema_arrow
            # pandas stores an index beside the columns.
            chosen = [i for i, n in enumerate(schema.names) if not n.startswith("__index_level_")]
            for i in chosen:
                kind = schema.types[i]
                if not (types.is_floating(kind) or types.is_integer(kind)):
                    raise DataError(
                        f"{path}: column {schema.names[i]!r} holds {kind}, expected numbers"
                    )
            table = file.read()
    except DataError:
        raise
    except Exception as error:  # of a damaged file: arrow's own, OSError, UnicodeDecodeError
        reason = " ".join(str(error).split())
        raise DataError(f"{path}: not a whole Parquet file ({reason})") from error
    names = [schema.names[i] for i in chosen]
    columns = []
    for i, name in zip(chosen, names, strict=True):
        column = table.column(i)
        if column.null_count:
            row = int(np.argmax(column.is_null().to_numpy())) + 1
            raise DataError(f"{path}: row {row}, column {name!r} is empty: expected a number")
        columns.append(column.to_numpy().astype(np.float64))
    if not columns:
        raise DataError(f"{path}: no columns")
    return names, np.stack(columns, axis=1)
