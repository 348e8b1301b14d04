"""The state of torch while the package computes: what is set inside, and that it is put back."""

import contextlib
import subprocess
import sys
import threading
from collections.abc import Callable
from functools import partial
from typing import Any

import pytest
import torch

from sklearn_lqf.runtime import arithmetic
from sklearn_lqf.runtime.arithmetic import (
    choose_device,
    full_precision,
    ordinary_arithmetic,
    shared_by_threads,
)

# Run in a process of its own, since torch cannot be brought back to its first state: some settings, once written, no
# longer follow the others. The module is read by its path: the whole package takes long to import.
PRECISION = """
import contextlib, runpy, sys, torch
full_precision = runpy.run_path(sys.argv[1])["full_precision"]
b = torch.backends
new = hasattr(b.cuda.matmul, "fp32_precision")
owners = [b.cuda.matmul, b.cudnn, *([b.cudnn.conv, b.cudnn.rnn, b.mkldnn.matmul, b.mkldnn.conv] if new else [])]

def read():
    found = {}
    for i, owner in enumerate(owners):
        for name in ("allow_tf32", "fp32_precision"):
            try:
                found[i, name] = getattr(owner, name)
            except (RuntimeError, AttributeError) as error:
                found[i, name] = type(error).__name__
    try:
        found["matmul"] = torch.get_float32_matmul_precision()
    except RuntimeError:
        found["matmul"] = "refused"
    return found

def choose(owner, name, value):
    return lambda: setattr(owner, name, value)

settings = [lambda: None, *(lambda v=v: torch.set_float32_matmul_precision(v) for v in ("medium", "high"))]
settings += [choose(b.cudnn, "allow_tf32", v) for v in (False, True)]
settings += [choose(b.cuda.matmul, "allow_tf32", v) for v in (False, True)]
settings += [lambda: torch.set_float32_matmul_precision("highest")]
if new:
    settings += [choose(b.cuda.matmul, "fp32_precision", "tf32"), choose(b.mkldnn.matmul, "fp32_precision", "bf16")]
    settings += [choose(b.cudnn.conv, "fp32_precision", "ieee"), choose(b.mkldnn.conv, "fp32_precision", "bf16")]
x = torch.randn(256, 256, generator=torch.Generator().manual_seed(0))
expected = x @ x
for i, setting in enumerate(settings):
    setting()
    before = read()
    for fails in (False, True):
        with contextlib.suppress(ZeroDivisionError), full_precision():
            precisions = {k: v for k, v in read().items() if v in ("tf32", "bf16", True, "high", "medium")}
            # cuDNN's old setting may not follow; the one of convolutions, which counts, is among the others.
            assert not {k for k in precisions if not new or k != (1, "allow_tf32")}, (i, precisions)
            assert torch.equal(x @ x, expected), i
            1 / (not fails)
        after = read()
        assert after == before, (i, fails, before, after)
"""


def test_precision_is_full_inside_and_restored():
    subprocess.run([sys.executable, "-c", PRECISION, arithmetic.__file__], check=True, timeout=120)


@contextlib.contextmanager
def chosen(write: Callable[[Any], None], value: Any, usual: Any):
    write(value)
    yield
    write(usual)


MODES = {
    "no_grad": torch.no_grad,
    "autocast of another device": lambda: chosen(partial(torch.set_autocast_enabled, "cuda"), True, False),
    "default device": lambda: torch.device("meta"),
    "default dtype": lambda: chosen(torch.set_default_dtype, torch.float64, torch.float32),
}


def modes() -> tuple[Any, ...]:
    """What a computation meets of the modes of torch."""
    autocast = torch.is_autocast_enabled("cuda")
    return autocast, torch.is_grad_enabled(), torch.get_default_dtype(), torch.get_default_device()


@pytest.mark.parametrize("mode", MODES.values(), ids=MODES)
def test_modes_of_the_caller_do_not_count(mode):
    """tests/estimators/test_settings.py tries each public method."""
    expected = modes()
    with mode():
        before = modes()
        assert before != expected
        with ordinary_arithmetic():
            assert modes() == expected
            with ordinary_arithmetic():  # within itself
                assert torch.ones(2).requires_grad_().sum().requires_grad
        assert modes() == before
        with pytest.raises(ZeroDivisionError), ordinary_arithmetic():
            raise ZeroDivisionError
        assert modes() == before


def test_a_shared_setting_is_left_by_the_last_thread():
    value, entered = ["before"], []

    class Setting:
        def __enter__(self):
            entered.append(value[0])
            value[0] = "inside"

        def __exit__(self, *_):
            value[0] = entered[-1]

    def elsewhere(work: Callable, *args: Any) -> None:
        thread = threading.Thread(target=work, args=args)
        thread.start()
        thread.join()

    shared = shared_by_threads(Setting)
    first, second = shared(), shared()
    first.__enter__()
    with shared():  # within itself
        pass
    elsewhere(second.__enter__)
    first.__exit__(None, None, None)
    assert value[0] == "inside"
    elsewhere(second.__exit__, None, None, None)
    assert value[0] == "before"
    assert entered == ["before"]
    with pytest.raises(ZeroDivisionError), shared():
        raise ZeroDivisionError
    assert value[0] == "before"


def test_devices():
    assert choose_device("cpu") == torch.device("cpu")
    assert choose_device("auto").type == ("cuda" if torch.cuda.is_available() else "cpu")
    with pytest.raises(ValueError, match=r"device='tpu9' is not a device; present here: \['cpu'"):
        choose_device("tpu9")
    with pytest.raises(ValueError, match="device='meta' is not present"):
        choose_device("meta")


@pytest.mark.gpu
def test_products_on_a_gpu_are_in_full_precision():
    x = torch.randn(512, 512, device="cuda", generator=torch.Generator("cuda").manual_seed(0))
    with full_precision():
        expected = x @ x
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high")
    try:
        with ordinary_arithmetic():
            assert torch.equal(x @ x, expected)
    finally:
        torch.set_float32_matmul_precision(before)
