"""Digests of images, of training sets and of modules, by which they are found again.

Hides the hash, and what counts: of a tensor its dtype, its shape and its values, not where it lies; of a module what it
computes.
"""

from __future__ import annotations

import hashlib
import re

import numpy as np
import torch
from torch import Tensor, nn

from ..versions import __version__

__all__ = ["DIGEST", "Fingerprint", "image_digest", "module_digest"]

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
    return hashlib.blake2b(_tensor_bytes(image), digest_size=DIGEST).digest()


def _tensor_bytes(value: Tensor) -> bytes:
    """What is hashed of a tensor on any device."""
    array = value.detach().cpu().contiguous().numpy()
    return repr((array.dtype.str, array.shape)).encode() + array.tobytes()


def module_digest(module: nn.Module) -> str:
    """The digest of what a module computes: of its code if it was traced, its layers and their options, its tensors."""
    digest = hashlib.blake2b(digest_size=DIGEST)
    code = module.code if isinstance(module, torch.fx.GraphModule) else repr(module)
    digest.update(repr((torch.__version__, __version__, code)).encode())
    common = vars(nn.Module()).keys()
    for name, layer in module.named_modules():
        digest.update(repr((name, type(layer).__module__, type(layer).__qualname__)).encode())
        for key in sorted(vars(layer).keys() - common) if name else ():  # such as the stride of a convolution
            value = vars(layer)[key]
            digest.update(key.encode() + (_tensor_bytes(value) if isinstance(value, Tensor) else _text(value)))
    for name, value in [*module.named_parameters(), *module.named_buffers()]:
        digest.update(name.encode() + _tensor_bytes(value))
    return digest.hexdigest()


def _text(value: object) -> bytes:
    """The representation without addresses, which change from process to process."""
    return re.sub(r" at 0x[0-9a-f]+", "", repr(value)).encode()
