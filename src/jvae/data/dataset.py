"""What a dataset is, its fingerprint, and the refusal of values without a density."""

import dataclasses
import hashlib
from typing import Any, Protocol, runtime_checkable

import numpy as np

from jvae.networks import FAMILIES

# Up to so many bytes, the training examples are compared with the test examples.
MAX_COMPARED_BYTES = 1 << 30


class DataError(ValueError):
    """Data that is missing, corrupt or outside its support; the message says what to do."""


@runtime_checkable
class Examples(Protocol):
    """Examples read one at a time: a NumPy array, or files decoded when they are asked for."""

    @property
    def shape(self) -> tuple[int, ...]:
        """(num, *data_shape)."""
        ...

    @property
    def dtype(self) -> np.dtype[Any]:
        """Of one example."""
        ...

    @property
    def nbytes(self) -> int:
        """Of all examples, decoded."""
        ...

    def __len__(self) -> int:
        """How many examples there are."""
        ...

    def __getitem__(self, index: Any) -> Any:
        """One example, an array of `shape[1:]`."""
        ...


@dataclasses.dataclass(frozen=True, eq=False, kw_only=True)
class Dataset:
    """Examples and where they come from.

    Attributes:
      name: as `load` takes it.
      train: [num, *data_shape]: uint8 for images, float32 for other numbers. A NumPy array,
        perhaps memory-mapped; of a folder of images larger than memory, `ImageFiles`.
      test: [num, *data_shape], as `train`.
      source: where the bytes were found.
      sha256: of the content: `content_sha256` of `train`, of `valid` where there is one, and of
        `test`. Of a folder of images, of its files. It stays where `hold_out_validation` makes
        two parts of `train`.
      licence: the terms the data is under.
      citation: what to cite, as BibTeX; empty where unknown.
      valid: [num, *data_shape], or None where the dataset has no validation part.
      train_labels: integers [num], or None.
      valid_labels: integers [num], or None.
      test_labels: integers [num], or None.
    """

    name: str
    train: Any
    test: np.ndarray
    source: str
    sha256: str
    licence: str
    citation: str = ""
    valid: np.ndarray | None = None
    train_labels: np.ndarray | None = None
    valid_labels: np.ndarray | None = None
    test_labels: np.ndarray | None = None

    @property
    def data_shape(self) -> tuple[int, ...]:
        """Shape of one example."""
        return tuple(self.train.shape[1:])

    @property
    def values(self) -> tuple[float, float]:
        """The smallest and the largest value, of the test part alone where train is on the disk."""
        on_disk = not isinstance(self.train, np.ndarray) or isinstance(self.train, np.memmap)
        parts = [self.test] if on_disk else [self.test, self.train]
        return float(min(p.min() for p in parts)), float(max(p.max() for p in parts))

    @property
    def is_binary(self) -> bool:
        """Whether the examples hold nothing but the two ends of the range: 0 and 255, or 0 and 1.

        A folder of images that is not in memory counts as grey without a look.
        """
        white = 255 if self.test.dtype == np.uint8 else 1
        parts = [self.test, self.train, *([] if self.valid is None else [self.valid])]
        return all(
            isinstance(p, np.ndarray) and bool(((p == 0) | (p == white)).all()) for p in parts
        )

    def count_repeated(self) -> int | None:
        """How many test examples are in train too; None where train is large or no array."""
        if not isinstance(self.train, np.ndarray) or self.train.nbytes > MAX_COMPARED_BYTES:
            return None
        seen = {_digest(example) for example in self.train}
        return sum(_digest(example) in seen for example in self.test)

    def describe(self) -> str:
        """One line: name, type, shape, sizes and range."""
        low, high = self.values
        valid = "" if self.valid is None else f"{len(self.valid):,} validation and "
        return (
            f"{self.name}: {self.train.dtype} {list(self.data_shape)}, {len(self.train):,} "
            f"training, {valid}{len(self.test):,} test examples, values {low:g} to {high:g}"
        )


def _digest(example: np.ndarray) -> bytes:
    return hashlib.blake2b(np.ascontiguousarray(example).data, digest_size=16).digest()


def content_sha256(*arrays: np.ndarray) -> str:
    """SHA-256 of the shapes, dtypes and bytes of `arrays`, wherever they were read from."""
    digest = hashlib.sha256()
    for array in arrays:
        digest.update(f"{array.dtype.str}{array.shape}".encode())
        digest.update(np.ascontiguousarray(array).data)
    return digest.hexdigest()


def hold_out(
    num: int, fraction: float, seed: int, where: str = "data"
) -> tuple[np.ndarray, np.ndarray]:
    """A seeded split of `num` examples into the rest and what is held out, each in rising order.

    The same for ever: PCG64's raw stream, unlike NumPy's permutations, never changes.

    Args:
      num: how many examples there are.
      fraction: of the examples to hold out, between 0 and 1; at least two are, since one has no
        standard error.
      seed: of the split.
      where: what the message calls the data.

    Raises:
      DataError: fewer than three examples.
      ValueError: a fraction outside (0, 1).
    """
    if not 0 < fraction < 1:
        raise ValueError(f"the fraction to hold out must be between 0 and 1, got {fraction}")
    if num < 3:
        raise DataError(f"{where}: {num} examples, at least 3 are needed to hold out a part")
    order = np.argsort(np.random.PCG64(seed).random_raw(num), kind="stable")
    num_held_out = min(max(2, round(num * fraction)), num - 1)
    return np.sort(order[num_held_out:]), np.sort(order[:num_held_out])


def check_likelihood(name: str) -> None:
    """Refuse the name of no likelihood.

    Raises:
      ValueError: names what is expected.
    """
    if name not in FAMILIES:
        raise ValueError(f"unknown likelihood {name!r}: expected one of {sorted(FAMILIES)}")


def check_support(x: np.ndarray, likelihood: str = "bernoulli", *, where: str = "x") -> None:
    """Refuse x that no bound is for: outside [0, 1] for Bernoulli, not finite for any.

    Grey values are targets of a Bernoulli's cross-entropy, as in the paper, and pass, though they
    are no data of it: its densities sum to 1 over 0 and 1 alone. Where data enters,
    `from_array(likelihood="bernoulli")` asks for that data, or for pixels to draw it from.

    Args:
      x: float [num, *data_shape].
      likelihood: a name in `jvae.networks.FAMILIES`.
      where: what the message calls `x`, such as the file it was read from.

    Raises:
      DataError: names the index and the value of the first offender.
      ValueError: an unknown likelihood.
    """
    check_likelihood(likelihood)
    x = np.asarray(x)
    inside = np.isfinite(x)
    expected = "finite"
    if likelihood == "bernoulli":
        inside &= (x >= 0) & (x <= 1)
        expected = "in [0, 1]"
    if not inside.all():
        index = tuple(int(i) for i in np.unravel_index(np.argmin(inside), x.shape))
        raise DataError(
            f"{where}{list(index)} is {x[index]}: the {likelihood} likelihood needs values "
            f"{expected}"
        )
