"""Trunk activations in every place, when memory or disk end, and shared between fits."""

import copy
import errno
import gc
import os
import tempfile
from contextlib import nullcontext
from unittest.mock import Mock

import joblib
import pytest
import torch
from torch import nn

from sklearn_lqf.images.cache import SharedActivations, TrunkCache, batch_sizes
from sklearn_lqf.images.digests import module_digest

N = 11
ROWS = torch.randn(N, 4, 3, 2, generator=torch.Generator().manual_seed(0)).contiguous(memory_format=torch.channels_last)
VECTORS = torch.arange(N, dtype=torch.float64).view(N, 1)


class Evaluate:
    """Two activations for each row; counts the rows that were asked for."""

    def __init__(self, limit: int = N):
        self.count, self.limit = 0, limit

    def __call__(self, start: int, stop: int):
        if stop - start > self.limit:
            raise torch.OutOfMemoryError("too many")
        self.count += stop - start
        return ROWS[start:stop], VECTORS[start:stop]


def made(kind: str, batch_size: int = 4, evaluate: Evaluate | None = None) -> TrunkCache:
    return TrunkCache(evaluate or Evaluate(), N, batch_size, kind, lambda _: None)


def assert_holds_all(batches: TrunkCache) -> None:
    for z, expected in zip(map(torch.cat, zip(*batches, strict=True)), (ROWS, VECTORS), strict=True):
        assert torch.equal(z, expected)
        assert z.dtype == expected.dtype


@pytest.mark.parametrize("kind", ["memory", "disk", "none", "auto"])
def test_batches(kind):
    evaluate, reported = Evaluate(), []
    batches = TrunkCache(evaluate, N, 4, kind, reported.append)
    assert batches.sizes == [len(z[0]) for z in batches] == batch_sizes(list(batches)) == [4, 4, 3]
    assert len(batches) == 3
    assert_holds_all(batches)
    assert torch.equal(batches[-1][1], VECTORS[8:]) and [len(z[0]) for z in batches[1:]] == [4, 3]
    with pytest.raises(IndexError):
        batches[3]
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)
    if kind != "none":
        assert sum(reported) == evaluate.count == N
    assert batches.kind == ("memory" if kind == "auto" else kind)


@pytest.mark.parametrize(("memory", "disk", "kind"), [(0, 0, "memory"), (-1, 0, "disk"), (-1, -1, "none")])
def test_auto_takes_the_first_place_with_room(memory, disk, kind):
    size = (24 * 4 + 8) * N
    room = {"memory": size + memory, "disk": size + disk}
    with pytest.warns(UserWarning, match="neither memory nor") if kind == "none" else nullcontext():
        batches = TrunkCache(Evaluate(), N, 4, "auto", lambda _: None, **room)
    assert batches.kind == kind


def open_files() -> int:
    return len(os.listdir("/proc/self/fd")) if os.path.exists("/proc/self/fd") else 0


def test_no_file_is_left(monkeypatch, tmp_path):
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    before = open_files()
    batches = made("disk")
    assert not list(tmp_path.iterdir())  # it has no name already while it is in use
    del batches
    gc.collect()
    assert open_files() == before


def test_full_disk(monkeypatch):
    write = Mock(side_effect=OSError(errno.ENOSPC, "No space left on device"))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **_: Mock(write=write))
    with pytest.raises(OSError, match=r"11 rows take 1 KiB.*No space left.*cache='none'") as caught:
        made("disk")
    assert caught.value.errno == errno.ENOSPC
    with pytest.warns(UserWarning, match=r"take 1 KiB.*could not be written \(No space left.*TMPDIR"):
        batches = TrunkCache(Evaluate(), N, 4, "auto", lambda _: None, memory=0)
    assert batches.kind == "none"
    assert_holds_all(batches)


@pytest.mark.parametrize("kind", ["memory", "disk"])
def test_batches_shrink_to_what_the_device_bears(kind):
    batches = made(kind, 8, Evaluate(limit=3))
    assert batches.batch_size == 2
    assert_holds_all(batches)
    with pytest.raises(MemoryError, match=r"batches of one row \(too many\)"):
        made(kind, 8, Evaluate(limit=0))


# ------------------------------------------------------------------------------------------ shared between fits


class Hidden(nn.Module):
    """A constant that is not part of the state."""

    def __init__(self, value: float):
        super().__init__()
        self.register_buffer("value", torch.tensor(value), persistent=False)

    def forward(self, x):
        return self.value * x


class Trunk(nn.Module):
    """Two activations, the first of which has its channels last."""

    def __init__(self, value: float = 2.0):
        super().__init__()
        self.weight = nn.Parameter(torch.tensor(value))

    def forward(self, x):
        return (self.weight * x).contiguous(memory_format=torch.channels_last), x.sum((1, 2, 3), keepdim=True)[:, 0, 0]


@torch.no_grad()
def evaluated(memory, images, trunk, options=()):
    """How many rows a trunk has to see for activations by way of the memory, which are its own."""
    seen = []

    def evaluate(x):
        seen.append(len(x))
        found = trunk(x)
        return found if isinstance(found, tuple) else (found,)

    found, expected = SharedActivations(memory, (module_digest(trunk), options))(images, evaluate), trunk(images)
    for a, b in zip(found, expected if isinstance(expected, tuple) else (expected,), strict=True):
        torch.testing.assert_close(a, b)  # batches of another size may round otherwise
    assert found[0].is_contiguous(memory_format=torch.channels_last)
    return sum(seen)


def test_each_image_is_evaluated_once(tmp_path):
    memory, trunk = joblib.Memory(tmp_path, verbose=0), Trunk()
    assert evaluated(memory, ROWS[:4], trunk) == 4
    assert evaluated(memory, ROWS[[2, 0, 5]], trunk) == 1
    assert evaluated(joblib.Memory(tmp_path, verbose=0), ROWS[:6], Trunk()) == 1
    assert evaluated(joblib.Memory(tmp_path, verbose=0, mmap_mode="r"), ROWS[:6], Trunk()) == 0
    for other in (evaluated(memory, ROWS, Trunk(3.0)), evaluated(memory, ROWS, trunk, "other preprocessing")):
        assert other == N
    assert evaluated(memory, ROWS.double(), trunk) == N


def test_what_is_another_trunk(tmp_path):
    memory = joblib.Memory(tmp_path, verbose=0)
    state = nn.Conv2d(4, 4, 3).state_dict()
    convolutions = [nn.Conv2d(4, 4, 3, **o) for o in ({}, {"stride": 2}, {"dilation": 2}, {"padding": 1})]
    for layer in convolutions:
        layer.load_state_dict(state)
    layers = [
        nn.ReLU(), nn.Sequential(nn.ReLU(), nn.ReLU()), nn.GELU(), nn.LeakyReLU(0.1), nn.LeakyReLU(0.2),
        nn.MaxPool2d(2), nn.AvgPool2d(2), *convolutions, Hidden(1.0), Hidden(2.0),
    ]  # fmt: skip
    images = torch.rand(2, 4, 8, 8, generator=torch.Generator().manual_seed(0))
    for layer in layers:
        graphs = (torch.fx.symbolic_trace(nn.Sequential(copy.deepcopy(layer))) for _ in range(2))
        assert [evaluated(memory, images, graph) for graph in graphs] == [2, 0]


@pytest.mark.filterwarnings("ignore:Exception while loading results")
def test_an_entry_that_was_broken_is_evaluated_again(tmp_path):
    memory = joblib.Memory(tmp_path, verbose=0)
    evaluated(memory, ROWS[:3], Trunk())
    entry = next(tmp_path.rglob("output.pkl"))
    entry.write_bytes(entry.read_bytes()[:50])
    assert evaluated(memory, ROWS[:3], Trunk()) == 1
