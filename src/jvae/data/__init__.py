"""Datasets: by name through tensorflow-datasets without TensorFlow, or your own."""

from jvae.data.dataset import (
    DataError,
    Dataset,
    Examples,
    check_support,
    content_sha256,
    hold_out,
)
from jvae.data.image_files import ImageFiles
from jvae.data.loading import NAMES, default_data_dir, is_path, load
from jvae.data.own_files import check_varied, from_array, load_path
from jvae.data.raw_files import NoNetworkError
from jvae.data.raw_formats import read_idx
from jvae.data.streaming import batches
from jvae.data.validation import hold_out_validation

__all__ = [
    "NAMES",
    "DataError",
    "Dataset",
    "Examples",
    "ImageFiles",
    "NoNetworkError",
    "batches",
    "check_support",
    "check_varied",
    "content_sha256",
    "default_data_dir",
    "from_array",
    "hold_out",
    "hold_out_validation",
    "is_path",
    "load",
    "load_path",
    "read_idx",
]
