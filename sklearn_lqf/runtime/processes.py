"""Processes that share a fit: which process holds which rows, and sums over all of them.

This is the only module that imports torch.distributed. With one process every operation returns its argument.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor

__all__ = ["ALONE", "ProcessGroup", "default_group"]

T = TypeVar("T")


@contextmanager
def _communicating() -> Iterator[None]:
    """An error that says what it means where a process ended, or did not answer in time."""
    try:
        yield
    except RuntimeError as error:  # of each backend a kind of its own
        raise RuntimeError(
            "The processes of this fit could not communicate: one of them ended, or did not answer within the time "
            "limit of the process group (timeout of torch.distributed.init_process_group, by default 30 minutes with "
            f"gloo and 10 with NCCL). All of them have to be started again. ({error})"
        ) from error


class ProcessGroup:
    """A group of processes, each of which must call the same operations in the same order.

    Parameters
    ----------
    size : int
        Number of processes.
    rank : int
        Number of this process, from 0 to size - 1.
    device : torch.device or None
        Device of tensors while they are communicated; not used with one process.
    """

    def __init__(self, size: int = 1, rank: int = 0, device: torch.device | None = None):
        self.size, self.rank, self._device = size, rank, device

    def share(self, n: int) -> slice:
        """The rows of this process among n: shares follow the order of ranks, and differ by at most one row."""
        return slice(n * self.rank // self.size, n * (self.rank + 1) // self.size)

    def all_reduce(self, tensor: Tensor) -> Tensor:
        """Sum a tensor over the processes, in place; the result is the same to the last bit on all of them."""
        if self.size == 1:
            return tensor
        message = tensor.to(self._device).contiguous()
        with _communicating():
            dist.all_reduce(message)
        return tensor if message is tensor else tensor.copy_(message)

    def all_gather_rows(self, tensor: Tensor) -> Tensor:
        """Rows (n_rank, ...) of all processes in the order of ranks, (n, ...); n_rank may differ."""
        if self.size == 1:
            return tensor
        sizes = torch.zeros(self.size, dtype=torch.int64)
        sizes[self.rank] = len(tensor)
        self.all_reduce(sizes)
        out = torch.empty(int(sizes.sum()), *tensor.shape[1:], dtype=tensor.dtype, device=self._device)
        parts = out.split(sizes.tolist())
        parts[self.rank].copy_(tensor)
        for rank, part in enumerate(parts):  # all_gather wants equal numbers of rows
            if len(part):
                with _communicating():
                    dist.broadcast(part, rank)
        return out.to(tensor.device)

    def of_the_first(self, value: T) -> T:
        """The value of process 0, on all processes: so decisions agree even if rounding differs between them."""
        if self.size == 1:
            return value
        found = [value if self.rank == 0 else None]
        with _communicating():
            dist.broadcast_object_list(found, 0, device=self._device)
        return cast(T, found[0])

    def together(self, function: Callable[..., T], *args: Any) -> T:
        """Call ``function(*args)`` on each process; if it raises on one of them, an error is raised on all.

        Otherwise the other processes would wait for ever. The function itself must not communicate.
        """
        if self.size == 1:
            return function(*args)
        value, error, text = None, None, ""
        try:
            value = function(*args)
        except Exception as caught:
            error, text = caught, f"Process {self.rank}: {type(caught).__name__}: {caught}\n"
        texts = self.all_gather_rows(torch.tensor(list(text.encode()), dtype=torch.uint8))
        if error is not None:
            raise error
        if len(texts):
            raise RuntimeError(f"Another process of this fit failed.\n{bytes(texts.tolist()).decode().rstrip()}")
        return cast(T, value)

    def check_same(self, values: Mapping[str, str | Iterable[Tensor]]) -> None:
        """Raise ValueError on every process unless all have the same values; their digests are compared.

        Parameters
        ----------
        values : mapping of str to str or iterable of Tensor
            The keys name the values in the message, and must be the same on all processes.
        """
        if self.size == 1:
            return
        digests = self.all_gather_rows(torch.tensor([[_digest(v) for v in values.values()]]))  # (size, values)
        for name, column in zip(values, digests.T, strict=True):
            others = (column != column[0]).nonzero().flatten().tolist()
            if others:
                raise ValueError(
                    f"With distributed=True every process must call fit with the same data and parameters, but {name} "
                    f"of process(es) {others} differ from those of process 0."
                )


ALONE = ProcessGroup()


def default_group(device: torch.device) -> ProcessGroup:
    """torch.distributed's default process group.

    Parameters
    ----------
    device : torch.device
        Device of the tensors of this process.

    Returns
    -------
    ProcessGroup

    Raises
    ------
    ValueError
        There is no default process group, or it cannot communicate tensors of that device.
    """
    if not dist.is_available():
        raise ValueError("distributed=True needs torch.distributed, which this build of torch lacks.")
    if not dist.is_initialized():
        raise ValueError(
            "distributed=True needs torch.distributed's default process group: start the script with torchrun and call "
            "torch.distributed.init_process_group() before fit."
        )
    return ProcessGroup(dist.get_world_size(), dist.get_rank(), _message_device(device))


def _message_device(device: torch.device) -> torch.device:
    """The device itself if it has a backend of its own, such as NCCL; else the CPU."""
    backends = dict(pair.split(":") for pair in str(dist.get_backend_config()).split(","))  # "cpu:gloo,cuda:nccl"
    if backends.get(device.type, "gloo") != "gloo":
        return device
    if "cpu" in backends:
        return torch.device("cpu")
    raise ValueError(
        f"The process group has the backend {dist.get_backend()!r}, which cannot communicate tensors of the device "
        f"{str(device)!r}: set device, or initialize it with the backend 'gloo'."
    )


def _digest(value: str | Iterable[Tensor]) -> int:
    """Digest of a text or of tensors, as a signed int of 64 bits."""
    found = hashlib.blake2b(digest_size=8)
    if isinstance(value, str):
        found.update(value.encode())
    else:
        for tensor in value:
            found.update(repr((tensor.dtype, tensor.shape)).encode())
            found.update(tensor.detach().cpu().reshape(-1).view(torch.uint8).numpy().data)
    return int.from_bytes(found.digest(), "big", signed=True)
