"""The state of torch: its settings while the package computes, its devices, and locks for what one thread may use.

Hides that torch keeps most settings for the whole process. Without this module the caller's settings would change the
answers, and several threads could leave settings changed, or mix up their traces and dual numbers.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from functools import partial, wraps
from typing import Any, TypeVar, cast

import torch

__all__ = [
    "DUAL_NUMBERS", "GENERATOR", "TRACING", "choose_device", "full_precision", "in_ordinary_arithmetic",
    "ordinary_arithmetic", "shared_by_threads",
]  # fmt: skip

Setting = Callable[[], AbstractContextManager]
Method = TypeVar("Method", bound=Callable)

TRACING = threading.RLock()  # torch.fx replaces nn.Module.__call__ while it traces
DUAL_NUMBERS = threading.RLock()  # forward-mode differentiation has one level; functional_call swaps parameters
GENERATOR = threading.RLock()  # torch's global generator, while it is seeded and until it is put back

_AUTOCAST = ("cpu", "cuda", "mps", "xpu")  # types of devices that `choose_device` may return


def shared_by_threads(setting: Setting) -> Setting:
    """Share a context between threads: the first thread enters it, and the last one leaves it.

    Parameters
    ----------
    setting : callable
        Returns the context manager that changes a setting of the process and restores it.

    Returns
    -------
    callable
        Returns a context manager for any number of threads.
    """
    lock, undo, inside = threading.RLock(), ExitStack(), 0

    @contextmanager
    def enter() -> Iterator[None]:
        nonlocal inside
        with lock:
            if not inside:
                undo.enter_context(setting())
            inside += 1
        try:
            yield
        finally:
            with lock:
                inside -= 1
                if not inside:
                    undo.close()

    return enter


# ------------------------------------------------------------------------------------------------------- settings


@contextmanager
def ordinary_arithmetic() -> Iterator[None]:
    """Compute as torch does by default, in full precision, whatever the caller has set.

    Inside, tensors may have gradients and keep their own precision: inference mode, no_grad, autocast and the default
    device of the caller, which torch keeps for each thread, have no effect. The default dtype is float32, and TF32 and
    bfloat16 are off in products of float32. torch keeps these settings for the process, so they are changed only if
    they differ, and restored when the last thread has left. The setting of deterministic algorithms stays that of the
    caller.
    """
    with ExitStack() as stack:
        stack.enter_context(_settings_of_the_process())
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        for kind in _AUTOCAST:
            if torch.is_autocast_enabled(kind):
                stack.enter_context(torch.autocast(kind, enabled=False))
        if torch.get_default_device().type != "cpu":
            stack.enter_context(torch.device("cpu"))
        yield


def in_ordinary_arithmetic(method: Method) -> Method:
    """Decorate a method so that it computes in `ordinary_arithmetic`."""

    @wraps(method)
    def computed(*args: Any, **kwargs: Any) -> Any:
        with ordinary_arithmetic():
            return method(*args, **kwargs)

    return cast(Method, computed)


@shared_by_threads
@contextmanager
def full_precision() -> Iterator[None]:
    """Switch off TF32 and bfloat16 in products of float32, and restore the caller's settings.

    torch has an old and a new interface to the same settings, and refuses to read the old one if the caller has used
    the new one. Therefore each setting is kept and restored if it exists and can be read.
    """
    with ExitStack() as undo:
        for read, write, wanted in _precisions():
            try:
                before = read()
            except (AttributeError, RuntimeError):
                continue
            undo.callback(write, before)
            if before != wanted:
                write(wanted)
        yield


def _precisions() -> list[tuple[Callable[[], Any], Callable[[Any], Any], Any]]:
    """How to read and write each setting of the precision of products of float32, and the value to set.

    Each setting comes before those that overwrite it.
    """
    cuda, cudnn, mkldnn = torch.backends.cuda, cast(Any, torch.backends.cudnn), cast(Any, torch.backends.mkldnn)
    owners: list[Any] = []
    if hasattr(cuda.matmul, "fp32_precision"):  # torch >= 2.9
        owners = [cuda.matmul, *(getattr(b, p) for b in (cudnn, mkldnn) for p in ("conv", "rnn")), mkldnn.matmul]
    return [
        *((partial(getattr, o, "fp32_precision"), partial(setattr, o, "fp32_precision"), "ieee") for o in owners),
        (torch.get_float32_matmul_precision, torch.set_float32_matmul_precision, "highest"),
        *((partial(getattr, o, "allow_tf32"), partial(setattr, o, "allow_tf32"), False) for o in (cuda.matmul, cudnn)),
    ]


@shared_by_threads
@contextmanager
def _settings_of_the_process() -> Iterator[None]:
    """The settings that torch keeps for the process: precision, and the default dtype."""
    dtype = torch.get_default_dtype()
    with full_precision():
        try:
            if dtype is not torch.float32:
                torch.set_default_dtype(torch.float32)
            yield
        finally:
            if torch.get_default_dtype() is not dtype:
                torch.set_default_dtype(dtype)


def in_precision(precision: str, device: torch.device) -> AbstractContextManager[Any]:
    """Within it, products of float32 on a device are computed in ``"bfloat16"``; ``"full"`` changes nothing."""
    return torch.autocast(device.type, torch.bfloat16) if precision == "bfloat16" else nullcontext()


# -------------------------------------------------------------------------------------------------------- devices


def choose_device(device: Any) -> torch.device:
    """The device to compute on.

    Parameters
    ----------
    device : str or torch.device
        ``"auto"``: the accelerator of this machine, or the CPU if there is none. Accelerators are those of
        torch.accelerator: CUDA and ROCm, and MPS and XPU, which are untested.

    Returns
    -------
    torch.device

    Raises
    ------
    ValueError
        It is no device, or not one of this machine; the message lists those that are.
    """
    present, fastest = ["cpu"], "cpu"
    accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    if accelerator is not None:
        fastest = accelerator.type
        present += [fastest, *(f"{fastest}:{i}" for i in range(torch.accelerator.device_count()))]
    if isinstance(device, str) and device == "auto":
        return torch.device(fastest)
    try:
        found = torch.device(device)
    except (RuntimeError, TypeError) as error:
        raise ValueError(f"device={device!r} is not a device; present here: {present} (or 'auto').") from error
    if str(found) not in present:
        raise ValueError(f"device={str(found)!r} is not present; present here: {present} (or 'auto').")
    return found


def float64_device(device: torch.device) -> torch.device:
    """The device itself where it is known to have float64 at some speed, else the CPU."""
    return device if device.type == "cuda" else torch.device("cpu")
