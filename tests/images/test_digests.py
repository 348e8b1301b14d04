"""Digests of training sets: the same for any order, another for every change."""

import numpy as np
import torch

from sklearn_lqf.images.digests import Fingerprint

N = 11
ROWS = torch.randn(N, 4, 3, 2, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
TARGETS, WEIGHTS = np.eye(3)[np.arange(N) % 3], np.linspace(0.5, 2, N)


def digests(images: torch.Tensor = ROWS) -> torch.Tensor:
    seen = Fingerprint(len(images))
    for start in (8, 0, 4):  # in any order of batches
        rows = np.arange(start, min(start + 4, len(images)))
        seen.see(rows, images[rows])
    return seen.images


def test_a_fingerprint_is_that_of_the_set_and_shows_every_change():
    every, order = digests(), np.random.default_rng(0).permutation(N)
    expected = Fingerprint.of(every, TARGETS, WEIGHTS)
    assert len(expected) == 32
    for same in (
        (every[order], TARGETS[order], WEIGHTS[order]),
        (digests(ROWS.contiguous()), TARGETS, WEIGHTS),
        (every, -1.0 * (-TARGETS), WEIGHTS),  # one zero, not two
        (every, TARGETS.astype(int), WEIGHTS),
    ):
        assert Fingerprint.of(*same) == expected
    other = ROWS.clone()
    other[3, 0, 0, 0] += 1e-6
    swapped, twice = np.r_[1, 0, 2:N], np.r_[0:N, 4, 4]
    changed = [
        (digests(other), TARGETS, WEIGHTS),
        (digests(ROWS.double()), TARGETS, WEIGHTS),
        (every[swapped], TARGETS, WEIGHTS),
        (every, TARGETS[swapped], WEIGHTS),
        (every, TARGETS, WEIGHTS[swapped]),
        (every, TARGETS, 2 * WEIGHTS),
        (every[1:], TARGETS[1:], WEIGHTS[1:]),
        (every[twice], TARGETS[twice], WEIGHTS[twice]),  # a pair does not cancel
        (every[:0], TARGETS[:0], WEIGHTS[:0]),
    ]
    assert len({expected, *(Fingerprint.of(*data) for data in changed)}) == 1 + len(changed)
