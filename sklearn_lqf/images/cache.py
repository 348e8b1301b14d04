"""Activations: those of the rows of one fit within a budget of memory, and what is shared between fits.

Hides where activations lie (memory of the device, of the host, a temporary file, or nowhere) and in which order of
memory, and how those of one image are found again.
"""

from __future__ import annotations

import hashlib
import warnings
from collections.abc import Callable, Sequence
from functools import partial
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from ..runtime.memory import device_budget, disk_budget, memory_budget, with_smaller_batches
from ..runtime.tables import RowFile, TemporaryFileError, amount
from .digests import DIGEST, image_digest

__all__ = ["SharedActivations", "TrunkCache", "batch_sizes"]


Activations = tuple[Tensor, ...]


class TrunkCache(Sequence[Activations]):
    """Batches of trunk activations, evaluated once as far as there is room for them.

    Parameters
    ----------
    evaluate : callable
        (start, stop) -> activations of these rows, each of shape (B, ...), on the device.
    n_rows : int
    batch_size : int
        Rows of a batch; halved while the device has no memory for it.
    kind : {"auto", "memory", "disk", "none"}
        Where activations are kept; ``"auto"`` is the first of these that has room.
    report : callable
        Called with the number of rows after each batch that was evaluated.
    memory, disk : int or None
        Bytes that ``"auto"`` may take there; None: the budgets of this machine.

    Attributes
    ----------
    kind : str
        Where they are kept.
    sizes : list of int
        Rows of each batch.

    Raises
    ------
    OSError
        The temporary file cannot be written.
    """

    def __init__(
        self,
        evaluate: Callable[[int, int], Activations],
        n_rows: int,
        batch_size: int,
        kind: str,
        report: Callable[[int], object],
        *,
        memory: int | None = None,
        disk: int | None = None,
    ):
        self._evaluate, self._n_rows, self.batch_size = evaluate, n_rows, batch_size
        first = with_smaller_batches(partial(self._from, 0), batch_size)
        size = sum(z[0].numel() * z.element_size() for z in first) * n_rows
        self.device = first[0].device
        on_device = size <= device_budget(self.device)
        if kind != "auto":
            self.kind = kind
        elif on_device or size <= (memory_budget() if memory is None else memory):
            self.kind = "memory"
        else:
            self.kind = "disk" if size <= (disk_budget() if disk is None else disk) else "none"
            if self.kind == "none":
                _warn_of_no_cache(size, "for which neither memory nor the folder of temporary files has room")
        self._store: _Held | _Files | None = None
        if self.kind == "none":
            return
        try:
            on_disk = self.kind == "disk"
            self._store = (
                _Files(first) if on_disk else _Held(first, n_rows, self.device if on_device else torch.device("cpu"))
            )
            self._fill(first, report)
        except TemporaryFileError as error:
            if kind == "auto":
                _warn_of_no_cache(size, f"and the file for them could not be written ({error.strerror or error})")
                self.kind, self._store = "none", None
                return
            raise OSError(
                error.errno,
                f"The trunk activations of {n_rows} rows take {amount(size)}, and the temporary file for them could "
                f"not be written ({error.strerror}): make room, point TMPDIR elsewhere, or set cache='none'.",
            ) from error

    def _fill(self, part: Activations, report: Callable[[int], object]) -> None:
        assert self._store is not None
        start = 0
        try:
            while True:
                self._store.append(part)
                report(len(part[0]))
                start += len(part[0])
                if start == self._n_rows:
                    break
                part = with_smaller_batches(partial(self._from, start), self.batch_size)
            self._store.finish()
        except BaseException:
            self._store.discard()
            raise

    def _from(self, start: int, batch_size: int) -> Activations:
        """Evaluate one batch; its size is the one that the device has memory for."""
        self.batch_size = batch_size
        return self._evaluate(start, min(start + batch_size, self._n_rows))

    @property
    def sizes(self) -> list[int]:
        """Rows of each batch."""
        return [min(self.batch_size, self._n_rows - a) for a in range(0, self._n_rows, self.batch_size)]

    def __len__(self) -> int:
        return len(self.sizes)

    @overload
    def __getitem__(self, index: int) -> Activations: ...
    @overload
    def __getitem__(self, index: slice) -> list[Activations]: ...
    def __getitem__(self, index: int | slice) -> Activations | list[Activations]:
        if isinstance(index, slice):
            return [self[k] for k in range(len(self))[index]]
        start = range(len(self))[index] * self.batch_size
        return self._rows(start, min(start + self.batch_size, self._n_rows))

    def _rows(self, start: int, stop: int) -> Activations:
        if self._store is None:
            return self._evaluate(start, stop)
        return tuple(z.to(self.device, non_blocking=True) for z in self._store.rows(start, stop))


def _warn_of_no_cache(size: int, cause: str) -> None:
    warnings.warn(
        f"The trunk activations take {amount(size)}, {cause}. They are evaluated anew each time, which is slower: "
        "make room, or point TMPDIR elsewhere.",
        UserWarning,
        stacklevel=3,
    )


def batch_sizes(batches: Sequence[Sequence[Tensor]]) -> list[int]:
    """Rows of each batch, without evaluating any."""
    return batches.sizes if isinstance(batches, TrunkCache) else [len(batch[0]) for batch in batches]


class _Held:
    """Activations in memory, each as one tensor (n, ...) with the axes in the order in which they came."""

    def __init__(self, first: Activations, n_rows: int, device: torch.device):
        self._orders = [_axes(z) for z in first]
        pairs = zip(first, self._orders, strict=True)
        shapes = [(n_rows, *(z.shape[a] for a in order[1:])) for z, order in pairs]
        self._tensors = [torch.empty(s, dtype=z.dtype, device=device) for s, z in zip(shapes, first, strict=True)]
        self._filled = 0

    def append(self, part: Activations) -> None:
        stop = self._filled + len(part[0])
        for z, order, held in zip(part, self._orders, self._tensors, strict=True):
            held[self._filled : stop].copy_(z.permute(order))
        self._filled = stop

    def finish(self) -> None:
        """Nothing is left to do."""

    def discard(self) -> None:
        """Nothing is open."""

    def rows(self, start: int, stop: int) -> list[Tensor]:
        return [z[start:stop].permute(_inverse(o)) for z, o in zip(self._tensors, self._orders, strict=True)]


class _Files:
    """Activations in files without a name."""

    def __init__(self, first: Activations):
        self._orders, self._files = [_axes(z) for z in first], list[RowFile]()
        self._arrays: list[np.ndarray] = []
        try:
            for z, order in zip(first, self._orders, strict=True):
                shape = tuple(z.shape[a] for a in order[1:])
                self._files.append(RowFile(shape, z[:0].cpu().numpy().dtype))
        except TemporaryFileError:
            self.discard()
            raise

    def append(self, part: Activations) -> None:
        for z, order, file in zip(part, self._orders, self._files, strict=True):
            file.append(z.permute(order).contiguous().cpu().numpy())

    def finish(self) -> None:
        """Map the files into memory."""
        self._arrays = [file.finish() for file in self._files]

    def discard(self) -> None:
        """Close what cannot be written to the end."""
        for file in self._files:
            file.discard()

    def rows(self, start: int, stop: int) -> list[Tensor]:
        pairs = zip(self._arrays, self._orders, strict=True)
        return [torch.from_numpy(z[start:stop]).permute(_inverse(order)) for z, order in pairs]


def _axes(z: Tensor) -> list[int]:
    """Axes in the order of memory, the batch first."""
    strides = z.stride()
    return [0, *sorted(range(1, z.ndim), key=lambda a: -strides[a])]


def _inverse(order: Sequence[int]) -> list[int]:
    return sorted(range(len(order)), key=order.__getitem__)


# ------------------------------------------------------------------------------------------ shared between fits


class SharedActivations:
    """What a network computes of single images, in a joblib.Memory, found by what an image and the network are.

    Parameters
    ----------
    memory : joblib.Memory
    network : object
        Everything that the values depend on beside the image: digests of modules, the preprocessing, and the like. Its
        ``repr`` counts.
    """

    def __init__(self, memory: Any, network: object):
        self._recall = memory.cache(_recall, ignore=["value"])
        self._network = hashlib.blake2b(repr(network).encode(), digest_size=DIGEST).hexdigest()

    def __call__(self, images: Tensor, evaluate: Callable[[Tensor], Activations]) -> Activations:
        """Values of images (B, ...), on any device; those not yet known are evaluated, together, and kept."""
        digests = [image_digest(x).hex() for x in images]
        known = [self._recall.check_call_in_cache(d, self._network, None) for d in digests]
        rows = [self._recall(d, self._network, None) if k else None for d, k in zip(digests, known, strict=True)]
        missing = [i for i, row in enumerate(rows) if row is None]  # or lost since
        if missing:
            found = evaluate(images[missing])
            for k, i in enumerate(missing):
                rows[i] = tuple(z[k].cpu().numpy() for z in found)
                self._recall(digests[i], self._network, rows[i])
        stacked = [torch.from_numpy(np.stack(parts)) for parts in zip(*rows, strict=True)]
        return tuple(z.contiguous(memory_format=torch.channels_last) if z.ndim == 4 else z for z in stacked)


def _recall(image: str, network: str, value: Any) -> Any:
    """The value, which joblib keeps under the two digests."""
    return value
