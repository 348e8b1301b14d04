"""What goes wrong while an estimator works: interrupted, out of room, not finite, in threads and workers."""

import gc
import multiprocessing
import os
import pickle
import sys
import tempfile
import threading
import warnings
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from support.data import make_images, merged, tiny_net
from support.settings import settings
from torch import nn

import sklearn_lqf
from sklearn_lqf import LQFClassifier, LQFRegressor
from sklearn_lqf.runtime import memory

pytestmark = pytest.mark.usefixtures("one_thread")

X, Y = make_images(12, size=8)
NET = tiny_net(width=4)
PAPER = {"model": "paper", "tol": 1e-6, "max_iter": 500}


def classifier(**options) -> LQFClassifier:
    return LQFClassifier(**merged({"backbone": NET, "execution": {"dtype": "float64"}}, options))


def assert_not_fitted(estimator: Any) -> None:
    with pytest.raises(NotFittedError):
        check_is_fitted(estimator)
    assert not [name for name in vars(estimator) if name.endswith("_")]


def test_features_beyond_the_memory_are_on_the_disk(monkeypatch, tmp_path):
    everything = {"store_data": True, "solver": "closed", "prior": "last"}
    expected = classifier(**everything).fit(X, Y)
    opened, make = [], tempfile.TemporaryFile
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    monkeypatch.setattr(tempfile, "TemporaryFile", lambda **options: opened.append(make(**options)) or opened[-1])
    monkeypatch.setattr(memory, "machine_memory", lambda: 4 << 9)  # enough for square matrices alone
    clf = classifier(**everything).fit(X, Y)
    assert opened and not any(tmp_path.iterdir())
    np.testing.assert_allclose(clf.coef_, expected.coef_, rtol=1e-10)
    again = pickle.loads(pickle.dumps(clf))
    np.testing.assert_array_equal(again.leave_one_out(), clf.leave_one_out())
    again.forget([0])
    np.testing.assert_allclose(again.coef_, expected.forget([0]).coef_, rtol=1e-9)


# --------------------------------------------------------------------------------------------------- interruptions


def _module(net: nn.Module) -> dict[str, Any]:
    """What must not change of the caller's module."""
    return {
        "weights": {k: (v.device, v.dtype, v.numpy().tobytes()) for k, v in net.state_dict().items()},
        "parameters": [(id(p), p.requires_grad, p.grad) for p in net.parameters()],
        "modules": [(m.training, len(m._forward_hooks), sorted(vars(m))) for m in net.modules()],
    }


PACKAGE = str(Path(sklearn_lqf.__file__).parent)
_GENERATOR = 0x20  # flag of the code of generators, which are entered again where they are left


def interrupt(work: Callable[[], Any], number: int) -> int:
    """Do some work, interrupted at one call of a function of the package; how many were called."""
    calls = 0

    def see(frame: Any, event: str, _: Any) -> None:
        nonlocal calls
        code = frame.f_code
        if event == "call" and code.co_filename.startswith(PACKAGE) and not code.co_flags & _GENERATOR:
            calls += 1
            if calls == number:
                raise KeyboardInterrupt

    old = sys.getprofile()
    sys.setprofile(see)
    try:
        work()
    finally:
        sys.setprofile(old)
    return calls


@pytest.mark.parametrize("kind", ["images", "vectors", "paper"])
def test_interrupted_anywhere(kind):
    """At calls spread over the whole fit, more densely at its start, where most of them differ."""
    net = tiny_net(width=2, n_classes=2).train()
    net.fc.weight.requires_grad_(False)
    net.stem.register_forward_hook(lambda *_: None)
    options = PAPER if kind == "paper" else {"tangents": "both", "n_directions": 1, "sketch_size": 2}
    clf: Any = classifier(backbone=net, execution={"batch_size": 6}, **options)
    data: tuple[np.ndarray, ...] = (X, Y, np.linspace(1, 2, 12))
    if kind == "vectors":
        clf, data = LQFRegressor(execution={"batch_size": 6}), (X[:, 0, :, 0] / 255, np.arange(12.0))
    before, module, copies = settings(), _module(net), [v.copy() for v in data]
    expected = clf.fit(*data).coef_  # what is done once in a process is done
    total = interrupt(lambda: clf.fit(*data), 0)
    assert total > 300
    # The first calls only lead into the fit, and the last ones, for a warning, follow it.
    for number in np.unique(np.geomspace(6, total - 3, 18).astype(int)):
        with pytest.raises(KeyboardInterrupt):
            interrupt(lambda: clf.fit(*data), number)
        assert_not_fitted(clf)
        assert settings() == before, number
        assert _module(net) == module, number
    assert np.array_equal(clf.fit(*data).coef_, expected)
    with pytest.raises(ValueError, match="inconsistent"):  # a fit that is refused leaves nothing of the one before
        clf.fit(data[0], data[1][1:])
    assert_not_fitted(clf)
    assert all(np.array_equal(a, b) for a, b in zip(data, copies, strict=True))


def test_an_interrupted_prediction_changes_nothing():
    clf = classifier().fit(X, Y)
    expected, state, before = clf.predict_proba(X), pickle.dumps(clf), settings()
    total = interrupt(lambda: clf.predict_proba(X), 0)
    for number in range(1, total + 1, 11):
        with pytest.raises(KeyboardInterrupt):
            interrupt(lambda: clf.predict_proba(X), number)
        assert settings() == before, number
    assert pickle.dumps(clf) == state
    assert np.array_equal(clf.predict_proba(X), expected)


# ---------------------------------------------------------------------------------------------------- not finite


def scaled(layer: str, factor: float) -> nn.Module:
    net = tiny_net()
    with torch.no_grad():
        net.get_submodule(layer).weight.mul_(factor)
    return net


@pytest.mark.parametrize("estimator", [LQFClassifier, LQFRegressor])
def test_a_network_that_is_not_finite(estimator):
    for layer, factor in (("stem.0", np.nan), ("stem.0", 1e38), ("block2.0", np.inf)):
        model = estimator(scaled(layer, factor))
        with pytest.raises(ValueError, match=r"not (all )?finite.*check its weights and preprocessing"):
            model.fit(X, np.arange(12) % 2)
        assert_not_fitted(model)
    # So are outputs for new images; large ones are no overflow.
    dark, labels = X // 100, np.arange(12) % 2
    dark[:, 0, 0, 0] = np.arange(12)
    model = estimator(scaled("stem.0", 1e20)).fit(dark, labels)
    both = np.concatenate([dark[:3], np.full_like(X[:2], 255)])
    for call in (model.predict, model.features, lambda new: model.influence(dark, labels, new)):
        with pytest.raises(ValueError, match=r"2 of 5 rows of X are not finite, the first X\[3\].*float32.*'float64'"):
            call(both)
    wide = estimator(scaled("stem.0", 1e20), execution={"dtype": "float64"}).fit(dark, labels)
    assert np.isfinite(wide.predict(both)).all()
    assert np.isfinite(estimator(scaled("block2.0", 1e30)).fit(X, labels).predict(X)).all()


# ------------------------------------------------------------------------------------------------------- threads


class Untraced(nn.Module):
    """A network without a graph, of layers that are differentiated by torch's forward mode, with parameters swapped."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 1, 1)
        self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        if bool(x.mean() > 1e9):  # depends on the data
            return x
        x = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return self.fc(torch.relu(x).mean((2, 3)))


class Attending(nn.Module):
    """A transformer, whose fused kernels are switched off while it is linearized."""

    def __init__(self):
        super().__init__()
        self.embed, self.fc = nn.Conv2d(3, 8, 4, 4), nn.Linear(8, 2)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)

    def forward(self, x):
        return self.fc(self.layer(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


# Callables are called with torch's global generator seeded, one at a time.
NETWORKS = {"convolutions": NET, "attending": Attending, "untraced": Untraced}


def together(*works: Callable[[], Any]) -> list:
    """What functions return that start at one moment in threads of their own, which change often."""
    start = threading.Barrier(len(works))

    def run(work: Callable[[], Any]) -> Any:
        start.wait()
        return work()

    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        with ThreadPoolExecutor(len(works)) as pool:
            return list(pool.map(run, works))
    finally:
        sys.setswitchinterval(interval)


@pytest.mark.filterwarnings("ignore:The backbone cannot be traced")
@pytest.mark.parametrize("network", NETWORKS)
def test_threads(network):
    """Fits in threads equal those in sequence; one model predicts, explains and is copied in several, beside a fit."""
    net = NETWORKS[network]
    options = {"backbone": net, "tangents": "both", "tangent_layers": "all", "n_directions": 2}
    models = [classifier(**o) for o in (options, {**options, "random_state": 1}, {"backbone": net, **PAPER})]
    expected = [clone(m).fit(X, Y).decision_function(X) for m in models]
    clf = clone(models[0]).fit(X, Y)
    left_out, state, before = clf.leave_one_out(X, Y), pickle.dumps(clf), settings(filters=False)
    found = together(*(lambda m=m: clone(m).fit(X, Y).decision_function(X) for m in models))
    for one, other in zip(found, expected, strict=True):
        # Which kernel attention takes is a setting of the process: another thread's is as good, but for rounding.
        tolerance = 1e-6 if network == "attending" else 0
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())
    close = {"rtol": 1e-8, "atol": 1e-10}

    def predict() -> None:
        for _ in range(6):
            np.testing.assert_allclose(clf.decision_function(X), expected[0], **close)

    def explain() -> None:
        np.testing.assert_allclose(clf.leave_one_out(X, Y), left_out, **close)
        clf.influence(X, Y, X[:1])

    def copy() -> None:
        data = pickle.dumps(clf)
        assert len(data) == len(state)
        np.testing.assert_allclose(pickle.loads(data).decision_function(X[:2]), expected[0][:2], **close)

    together(predict, predict, explain, copy, lambda: clone(clf).fit(X[::-1], Y[::-1]))
    assert settings(filters=False) == before
    predict()


# ------------------------------------------------------------------------------------------------------- workers


def fit_in_a_worker(clf: LQFClassifier) -> np.ndarray:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    return clf.fit(X, Y).decision_function(X)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="processes are not forked here")
def test_fits_in_a_fork():
    """Other workers, tests/runtime/test_processes.py tries."""
    expected = classifier().fit(X, Y).decision_function(X)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks of processes with threads
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found = pool.apply_async(fit_in_a_worker, [classifier()]).get(timeout=120)
    np.testing.assert_allclose(found, expected, rtol=1e-9)


def _resources() -> dict[str, float]:
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "tensors": sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects()),
        "objects": len(gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads files and memory in use from Linux")
def test_more_fits_need_no_more_room():
    """Of images large enough that the activations of one fit, kept, would be seen."""
    many, labels = make_images(24, size=64)
    activations = 24 * 4 * 32 * 32 * 4  # bytes at the cut
    clf = LQFClassifier(tiny_net(width=4))

    def work() -> None:
        twin = clone(clf).fit(many, labels)
        twin.predict(many)
        pickle.dumps(twin)
        with pytest.raises(ValueError, match="inconsistent"):
            twin.fit(many, labels[:-1])

    for _ in range(3):
        work()
    for _ in range(3):  # a leak grows each time, other memory of the process only sometimes
        before = _resources()
        for _ in range(6):
            work()
        after = _resources()
        if after["bytes"] - before["bytes"] < 6 * activations / 2:
            break
    assert all(after[name] <= before[name] for name in ("tensors", "files", "threads"))
    # torch.fx keeps the source of each graph that it compiles, some kilobytes for each fit.
    assert after["objects"] - before["objects"] < 6 * 100
    assert after["bytes"] - before["bytes"] < 6 * activations / 2
