"""Batches of data that is larger than memory, read with Grain while the device computes."""

from collections.abc import Iterator
from typing import Any

import jax
import numpy as np

from jvae import cores
from jvae.data.dataset import Examples
from jvae.training import steps_per_epoch

# Batches read ahead: enough to hide the disk, few enough for a small memory.
READ_AHEAD = 4


def batches(
    examples: Examples,
    batch_size: int,
    *,
    seed: int,
    step: int = 0,
    process_index: int | None = None,
    process_count: int | None = None,
) -> Iterator[np.ndarray]:
    """Batches from global step `step` to the end of its epoch.

    Every epoch is shuffled anew. A batch is a function of the seed and its step alone: a run that
    goes on from any step sees the batches of one that never stopped, and there is no state to
    save.

    Args:
      examples: an array, memory-mapped or not, or files decoded when asked for.
      batch_size: examples a step over all processes. What is left over at an epoch's end is not
        used; shuffled, it is others each time.
      seed: of the order.
      step: batches already taken since the start of the first epoch.
      process_index: which of the processes this is; by default `jax.process_index()`.
      process_count: how many there are; each reads its own rows of every batch, which are one
        part of the rows that a single process would read.

    Yields:
      [batch_size / process_count, *data_shape], in the dtype of `examples`.

    Raises:
      ImportError: Grain is not installed.
      ValueError: fewer examples than a batch, or a batch that the processes cannot share.
    """
    try:
        import grain
    except ImportError as error:
        raise ImportError(
            "data that does not fit into memory is read with Grain: pip install 'jvae[data]'"
        ) from error
    count = jax.process_count() if process_count is None else process_count
    index = jax.process_index() if process_index is None else process_index
    steps = steps_per_epoch(len(examples), batch_size)
    if not 0 <= index < count or step < 0:
        raise ValueError(f"no step {step} of process {index} among {count}")
    if batch_size % count:
        raise ValueError(f"batch_size {batch_size} cannot be shared by {count} processes")
    epoch = step // steps
    source: Any = grain.MapDataset.source(examples)
    endless = source.seed(seed).shuffle()[: steps * batch_size].repeat()
    size = batch_size // count

    class Share:
        """This process's rows of each batch, one after the other."""

        def __len__(self) -> int:
            return (epoch + 1) * steps * size

        def __getitem__(self, i: int) -> Any:
            step, row = divmod(int(i), size)
            return endless[step * batch_size + index * size + row]

    batched = grain.MapDataset.source(Share()).batch(size)
    options = grain.ReadOptions(
        num_threads=min(cores.count(), READ_AHEAD), prefetch_buffer_size=READ_AHEAD
    )
    return iter(batched[step:].to_iter_dataset(options))
