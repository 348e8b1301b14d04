"""Digests of images and of training sets, by which they are found again.

Hides the hash, and what of a tensor counts: its dtype, its shape and its values, not where it lies.
"""

from __future__ import annotations

import hashlib

import numpy as np
import torch
from torch import Tensor

__all__ = ["DIGEST", "Fingerprint", "image_digest", "tensor_bytes"]

DIGEST = 16  # bytes


class Fingerprint:
    """Digest of the images, labels and weights of a training set, whatever the order of its rows.

    Parameters
    ----------
    n : int
        Number of rows.
    """

    def __init__(self, n: int):
        self.images = torch.zeros(n, DIGEST, dtype=torch.uint8)

    def see(self, rows: np.ndarray, images: Tensor) -> None:
        """Take the images (B, ...) of some rows."""
        for i, image in zip(rows, images, strict=True):
            self.images[i] = torch.frombuffer(bytearray(image_digest(image)), dtype=torch.uint8)

    @staticmethod
    def of(images: Tensor, targets: np.ndarray, weights: np.ndarray) -> str:
        """The digest, from those of the images (n, 16), targets (n, C) and weights (n,)."""
        total = 0
        known = np.column_stack([targets, weights]).astype(np.float64) + 0.0  # one zero, not two
        for image, numbers in zip(images.cpu().numpy(), known, strict=True):
            row = hashlib.blake2b(image.tobytes() + numbers.tobytes(), digest_size=DIGEST)
            total += int.from_bytes(row.digest(), "big")
        return f"{total % 256**DIGEST:032x}"


def image_digest(image: Tensor) -> bytes:
    """The digest of one image."""
    return hashlib.blake2b(tensor_bytes(image), digest_size=DIGEST).digest()


def tensor_bytes(value: Tensor) -> bytes:
    """What is hashed of a tensor on any device."""
    array = value.detach().cpu().contiguous().numpy()
    return repr((array.dtype.str, array.shape)).encode() + array.tobytes()
