"""Writes parts of CIFAR-10 to train teachers on: `python docs/cifar10-recorded/split.py DATA`.

`unseen.npz` has the 40,000 training images that `--train-limit 10000` leaves out, `seen.npz` those
10,000 and 30,000 of the others; both have all test images.
"""

import sys

import numpy as np

from ktg_jax.data.dataset import Split, limit_split
from ktg_jax.data.sources import load_dataset

full = load_dataset("cifar10", sys.argv[1], val_fraction=0.0)
small = load_dataset("cifar10", sys.argv[1], train_limit=10_000, val_fraction=0.0)
assert full.test is not None


def among(split: Split) -> np.ndarray:
    """Which of the training images are in the split."""
    found = {image.tobytes() for image in split.images}
    return np.array([image.tobytes() in found for image in full.train.images])


is_taught = among(small.train)
others = full.train.take(np.flatnonzero(~is_taught))
parts = {"seen": is_taught | among(limit_split(others, 30_000, 0)), "unseen": ~is_taught}
for name, chosen in parts.items():
    np.savez(
        f"{name}.npz",
        train_images=full.train.images[chosen],
        train_labels=full.train.labels[chosen],
        test_images=full.test.images,
        test_labels=full.test.labels,
    )
    print(f"{name}.npz: {chosen.sum()} training images")
