"""Generated images that stand in for Frey Face."""

import numpy as np

from jvae import data


def frey_like(num: int = 250) -> data.Dataset:
    """Images of Frey Face's shape: bright in one half, with noise."""
    generator = np.random.default_rng(0)
    images = generator.integers(0, 60, (num, 28, 20)).astype(np.uint8)
    images[: num // 2, :14] += 150
    images[num // 2 :, 14:] += 150
    generator.shuffle(images)
    return data.Dataset(
        name="frey_face",
        train=images[30:],
        test=images[:30],
        source="generated",
        sha256="none",
        licence="none",
    )
