"""A validation part for data that has none: what is chosen by it is not chosen by the test part."""

import dataclasses
from typing import Any

from jvae.data.dataset import DataError, Dataset, hold_out
from jvae.data.image_files import ImageFiles
from jvae.data.own_files import MAX_STREAMED_HELD_OUT


def hold_out_validation(dataset: Dataset, fraction: float, split_seed: int = 0) -> Dataset:
    """The dataset with a part of its training examples as its validation part.

    Of a folder of images that is not in memory, that part has at most `MAX_STREAMED_HELD_OUT`
    images, and is read into memory as the test part is.

    Args:
      dataset: one without a validation part.
      fraction: of the training part, between 0 and 1; at least two examples are held out.
      split_seed: the seed by which a test part was held out, if one was; this split takes the next.

    Returns:
      The same data under the same hash, in three parts.

    Raises:
      DataError: it has a validation part, fewer than three training examples, or an image that
        cannot be decoded.
      ValueError: a fraction outside (0, 1).
    """
    if dataset.valid is not None:
        raise DataError(f"{dataset.source} has {len(dataset.valid)} validation examples already")
    whole: Any = dataset.train
    on_disk = isinstance(whole, ImageFiles)
    if on_disk and 0 < fraction < 1:
        fraction = min(fraction, MAX_STREAMED_HELD_OUT / len(whole))
    # The seed of the test part would choose by the same numbers again.
    seed = split_seed + 1
    train, valid = hold_out(len(whole), fraction, seed, dataset.source)
    labels = {}
    if dataset.train_labels is not None:
        labels = {
            "train_labels": dataset.train_labels[train],
            "valid_labels": dataset.train_labels[valid],
        }
    return dataclasses.replace(
        dataset,
        train=whole.chosen(train) if on_disk else whole[train],
        valid=whole.chosen(valid).decode() if on_disk else whole[valid],
        **labels,
        source=f"{dataset.source}, {len(valid)} examples held out for validation (seed {seed})",
    )
