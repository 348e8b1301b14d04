"""What goes wrong while an estimator works: killed, interrupted, out of room, not finite, in threads and workers."""

import errno
import gc
import multiprocessing
import os
import pickle
import random
import sys
import tempfile
import threading
import traceback
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import Any

import joblib
import numpy as np
import pytest
import torch
from PIL import Image
from sklearn.base import clone
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from support.callbacks import Silent
from support.data import make_images, merged, tiny_net
from torch import nn

import sklearn_lqf
from sklearn_lqf import LQFClassifier, LQFRegressor
from sklearn_lqf.engine.features import GroupFeatures
from sklearn_lqf.engine.problem import Problem
from sklearn_lqf.images import cache
from sklearn_lqf.images.reading import ImageInputs
from sklearn_lqf.network.linearize import Point
from sklearn_lqf.network.prepared import PreparedNetwork
from sklearn_lqf.paper.kfac import KFAC
from sklearn_lqf.paper.objective import Quadratic
from sklearn_lqf.runtime.threads import shared_by_threads

X, Y = make_images(12, size=8)
NET = tiny_net(width=4)
PAPER = {"model": "paper", "tol": 1e-6, "max_iter": 500}


def classifier(**options) -> LQFClassifier:
    return LQFClassifier(**merged({"backbone": NET, "execution": {"dtype": "float64"}}, options))


@pytest.fixture(autouse=True)
def one_thread():
    """Of torch in each thread: those of the tests are more than the cores, and rounding depends on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


class CountedCalls:
    """A function that does something else at one call, counted from 1."""

    def __init__(self, function: Callable, number: int, instead: Callable[[], Any]):
        self.function, self.number, self.instead, self.calls = function, number, instead, 0

    def __get__(self, owner: Any, kind: Any = None) -> Callable:
        return lambda *args, **kwargs: self(owner, *args, **kwargs)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        self.calls += 1
        if self.calls == self.number:
            self.instead()
        return self.function(*args, **kwargs)


def raise_(error: BaseException) -> None:
    raise error


def assert_not_fitted(estimator: Any) -> None:
    with pytest.raises(NotFittedError):
        check_is_fitted(estimator)
    with pytest.raises(NotFittedError):
        estimator.predict(X)
    assert not [name for name in vars(estimator) if name.endswith("_")]


# ------------------------------------------------------------------------------------------------ temporary files


@pytest.mark.parametrize(
    ("place", "error"),
    [("TemporaryFile", OSError(errno.EROFS, "Read-only file system")), ("gettempdir", FileNotFoundError("No folder"))],
)
def test_without_room_on_the_disk_activations_are_computed_again(monkeypatch, place, error):
    expected = classifier(execution={"batch_size": 2}, **PAPER).fit(X, Y)
    monkeypatch.setattr(cache, "_MEMORY_PART", 0.0)
    monkeypatch.setattr(tempfile, place, lambda **_: raise_(error))
    clf = classifier(execution={"batch_size": 2}, **PAPER).fit(X, Y)
    assert np.array_equal(clf.coef_, expected.coef_)
    assert clf._fingerprint == expected._fingerprint


# ---------------------------------------------------------------------------------------------- images among many


@pytest.fixture(scope="module")
def thousand(tmp_path_factory):
    """Paths of 1,000 images, of which one is broken and one is absent, and their labels."""
    folder = tmp_path_factory.mktemp("images")
    paths = []
    for i, image in enumerate(X):
        paths.append(folder / f"{i}.png")
        Image.fromarray(image).save(paths[-1])
    many = [paths[i % 12] for i in range(1000)]
    (folder / "broken.png").write_bytes(paths[0].read_bytes()[:-60])
    return many, folder / "broken.png", folder / "absent.png", np.resize(Y, 1000)


@pytest.mark.parametrize("model", ["groups", "paper"])
@pytest.mark.parametrize("fault", ["broken", "absent"])
def test_one_bad_file_among_a_thousand(thousand, model, fault):
    paths, broken, absent, labels = thousand
    bad, error = (broken, ValueError) if fault == "broken" else (absent, FileNotFoundError)
    several = [*paths[:517], bad, *paths[518:]]
    said = rf"X\[517\] \('.*{fault}\.png'\) (cannot be read as an image|does not exist)"
    clf = classifier(model=model)
    with pytest.raises(error, match=said):
        clf.fit(several, labels)
    assert_not_fitted(clf)
    if model == "paper":
        return
    clf.fit(paths[:24], labels[:24])
    before = pickle.dumps(clf)
    for method in ("predict", "predict_proba", "decision_function", "features"):
        with pytest.raises(error, match=said):
            getattr(clf, method)(several)
    assert pickle.dumps(clf) == before


# --------------------------------------------------------------------------------------------------- interruptions


def _settings() -> dict[str, Any]:
    """Everything global that a fit might leave changed."""
    cuda, cudnn = torch.backends.cuda, torch.backends.cudnn
    found = {
        "threads": torch.get_num_threads(),
        "gradients": torch.is_grad_enabled(),
        "inference": torch.is_inference_mode_enabled(),
        "dtype": torch.get_default_dtype(),
        "device": torch.get_default_device(),
        "deterministic": torch.are_deterministic_algorithms_enabled(),
        "cudnn": (cudnn.enabled, cudnn.benchmark, cudnn.deterministic, cudnn.allow_tf32),
        "matmul": cuda.matmul.allow_tf32,
        "attention": (cuda.flash_sdp_enabled(), cuda.math_sdp_enabled(), cuda.mem_efficient_sdp_enabled()),
        "fast path": torch.backends.mha.get_fastpath_enabled(),
        "forward mode": torch.autograd.forward_ad._current_level,
        "modules": (nn.Module.__call__, nn.Module.__getattr__),
        "warnings": list(warnings.filters),
        "numpy": np.geterr(),
        "python": random.getstate(),
        "numpy generator": pickle.dumps(np.random.get_state()),  # noqa: NPY002 - the global generator is the subject
        "torch generator": torch.get_rng_state().numpy().tobytes(),
    }
    if hasattr(cuda.matmul, "fp32_precision"):
        found["precision"] = (cuda.matmul.fp32_precision, cudnn.conv.fp32_precision, cudnn.rnn.fp32_precision)
    return found


def _module(net: nn.Module) -> dict[str, Any]:
    """What must not change of the caller's module."""
    return {
        "weights": {k: (v.device, v.dtype, v.numpy().tobytes()) for k, v in net.state_dict().items()},
        "identities": [id(p) for p in net.parameters()],
        "training": [m.training for m in net.modules()],
        "gradients": [(p.requires_grad, p.grad) for p in net.parameters()],
        "hooks": [
            (len(m._forward_hooks), len(m._forward_pre_hooks), len(m._backward_hooks), len(m._backward_pre_hooks))
            for m in net.modules()
        ],
        "attributes": [sorted(vars(m)) for m in net.modules()],
    }


class Interrupts(Silent):
    """A callback that raises after the second iteration."""

    def __init__(self):
        self.ends = 0

    def on_fit_task_end(self, estimator, context, **_):
        self.ends += 1
        if self.ends == 2:
            raise KeyboardInterrupt


def by_a_callback(monkeypatch, clf):
    pytest.importorskip("sklearn.callback")
    clf.set_callbacks(Interrupts())


def at(owner: type, name: str, number: int) -> Callable:
    def prepare(monkeypatch, _):
        monkeypatch.setattr(
            owner, name, CountedCalls(getattr(owner, name), number, lambda: raise_(KeyboardInterrupt()))
        )

    return prepare


# Where, and of which model.
INTERRUPTED = {
    "reading images": (at(ImageInputs, "batch", 3), {}),
    "evaluation of the trunk": (at(PreparedNetwork, "activations", 4), {}),
    "features": (at(GroupFeatures, "__call__", 2), {}),
    "choice of the prior": (at(Problem, "_choose_prior", 1), {}),
    "solution": (at(Problem, "solve", 1), {}),
    "callback": (by_a_callback, PAPER),
    "factorization": (at(KFAC, "factorize", 1), PAPER),
    "solver": (at(Quadratic, "matvec", 2), PAPER),
    "after the solver": (at(Quadratic, "distance_bound", 1), PAPER),
}


@pytest.mark.parametrize("place", INTERRUPTED)
@pytest.mark.parametrize("before", ["new", "fitted"])
def test_an_interrupted_fit_changes_nothing(monkeypatch, place, before):
    net = tiny_net(width=4).train()
    net.fc.weight.requires_grad_(False)
    net.stem.register_forward_hook(lambda *_: None)
    weights = np.linspace(1, 2, 12)
    prepare, options = INTERRUPTED[place]
    clf = classifier(backbone=net, execution={"batch_size": 3}, **options)
    expected = clone(clf).fit(X, Y, weights)
    if before == "fitted":
        clf.fit(X, Y)
    data = [v.copy() for v in (X, Y, weights)]
    settings, module = _settings(), _module(net)
    with monkeypatch.context() as patched:
        prepare(patched, clf)
        with pytest.raises(KeyboardInterrupt):
            clf.fit(X, Y, weights)
    assert_not_fitted(clf)
    assert _settings() == settings
    assert _module(net) == module
    assert all(np.array_equal(a, b) for a, b in zip(data, (X, Y, weights), strict=True))
    if place == "callback":
        clf._skl_callbacks = []
    assert np.array_equal(clf.fit(X, Y, weights).coef_, expected.coef_)


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


@pytest.mark.parametrize("kind", ["images", "vectors"])
def test_interrupted_anywhere(kind):
    """At calls spread over the whole fit, more densely at its start, where most of them differ."""
    net = tiny_net(width=2, n_classes=2)
    clf = classifier(backbone=net, execution={"batch_size": 6}, tangents="both", n_directions=1, sketch_size=2)
    if kind == "vectors":
        clf = LQFRegressor(execution={"batch_size": 6})
    data = (X, Y) if kind == "images" else (X[:, 0, :, 0] / 255, np.arange(12.0))
    settings, module = _settings(), _module(net)
    expected = clf.fit(*data).coef_  # what is done once in a process is done
    total = interrupt(lambda: clf.fit(*data), 0)
    assert total > 300
    # The first two calls only lead into the fit, and the last ones, for a warning, follow it.
    for number in np.unique(np.geomspace(3, total - 3, 25).astype(int)):
        with pytest.raises(KeyboardInterrupt):
            interrupt(lambda: clf.fit(*data), number)
        with pytest.raises(NotFittedError):
            check_is_fitted(clf)
        assert _settings() == settings, number
        assert _module(net) == module, number
    assert np.array_equal(clf.fit(*data).coef_, expected)


def test_an_interrupted_prediction_changes_nothing():
    clf = classifier().fit(X, Y)
    expected, state, settings = clf.predict_proba(X), pickle.dumps(clf), _settings()
    total = interrupt(lambda: clf.predict_proba(X), 0)
    for number in range(1, total + 1, 9):
        with pytest.raises(KeyboardInterrupt):
            interrupt(lambda: clf.predict_proba(X), number)
        assert _settings() == settings, number
    assert pickle.dumps(clf) == state
    assert np.array_equal(clf.predict_proba(X), expected)


# ---------------------------------------------------------------------------------------------------- not finite


def scaled(layer: str, factor: float) -> nn.Module:
    net = tiny_net()
    with torch.no_grad():
        net.get_submodule(layer).weight.mul_(factor)
    return net


FACTORS = {
    "nan in the trunk": ("stem.0", float("nan")),
    "infinity in the trunk": ("stem.0", float("inf")),
    "overflow in the trunk": ("stem.0", 1e38),
    "nan in the tail": ("block2.0", float("nan")),
    "infinity in the tail": ("block2.0", float("inf")),
}


@pytest.mark.parametrize("estimator", [LQFClassifier, LQFRegressor])
@pytest.mark.parametrize("case", FACTORS)
def test_a_network_that_is_not_finite(case, estimator):
    clf = estimator(scaled(*FACTORS[case]))
    with pytest.raises(ValueError, match=r"not (all )?finite.*check its weights and preprocessing"):
        clf.fit(X, np.arange(12) % 2)
    assert_not_fitted(clf)


def test_large_features_are_no_overflow():
    clf = LQFClassifier(scaled("block2.0", 1e30)).fit(X, Y)
    assert np.array_equal(clf.predict(X), Y)


def test_new_images_at_which_the_network_overflows():
    overflow = ("stem.0", 1e20)
    dark = X // 100
    dark[:, 0, 0, 0] = np.arange(12)
    clf = LQFClassifier(scaled(*overflow)).fit(dark, Y)
    assert np.isfinite(clf.decision_function(dark)).all()
    both = np.concatenate([dark[:3], np.full_like(X[:2], 255)])
    for method in ("predict", "predict_proba", "decision_function"):
        with pytest.raises(ValueError, match=r"2 of 5 rows of X are not finite, the first X\[3\].*float32.*'float64'"):
            getattr(clf, method)(both)
    wide = LQFClassifier(scaled(*overflow), execution={"dtype": "float64"}).fit(dark, Y)
    assert np.isfinite(wide.decision_function(both)).all()


@pytest.mark.parametrize("solver", ["pcg", "sgd"])
def test_derivatives_that_are_not_finite(monkeypatch, solver):
    tangent = Point.jvp
    monkeypatch.setattr(Point, "jvp", lambda *args: tangent(*args) * float("inf"))
    clf = classifier(**PAPER, solver=solver)
    with pytest.raises(ValueError, match=r"There is no solution\. Values are not finite: check the network's outputs"):
        clf.fit(X, Y)
    assert_not_fitted(clf)


# ------------------------------------------------------------------------------------------------------- threads


class Normalized(nn.Module):
    """A network with a layer that is differentiated by torch's forward mode, with its parameters swapped."""

    def __init__(self):
        super().__init__()
        self.conv1, self.conv2 = nn.Conv2d(3, 4, 3, 2), nn.Conv2d(4, 4, 3, 1, 1)
        self.norm1, self.norm2 = nn.GroupNorm(2, 4), nn.GroupNorm(2, 4)
        self.fc = nn.Linear(4, 2)

    def forward(self, x):
        x = self.norm2(self.conv2(torch.relu(self.norm1(self.conv1(x)))))
        return self.fc(torch.relu(x).mean((2, 3)))


class Untraced(Normalized):
    def forward(self, x):
        return super().forward(x) if bool(x.mean() > -1e9) else x  # depends on the data: no graph


class Attending(nn.Module):
    """A transformer, whose fused kernels are switched off while it is linearized."""

    def __init__(self):
        super().__init__()
        self.embed = nn.Conv2d(3, 8, 4, 4)
        self.layer = nn.TransformerEncoderLayer(8, 2, 8, 0.0, batch_first=True)
        self.fc = nn.Linear(8, 2)

    def forward(self, x):
        return self.fc(self.layer(self.embed(x).flatten(2).transpose(1, 2)).mean(1))


def seeded(kind: type) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        return kind().eval()


NETWORKS = {
    "convolutions": lambda: tiny_net(width=2),
    "normalized": lambda: seeded(Normalized),
    "attending": lambda: seeded(Attending),
    "untraced": lambda: seeded(Untraced),
}


def settings_of_torch() -> dict[str, Any]:
    """Without the filters of warnings: `warnings.catch_warnings`, in scikit-learn too, is not safe for threads."""
    return {k: v for k, v in _settings().items() if k != "warnings"}


def together(*works: Callable[[], Any]) -> list:
    """What functions return that start at one moment in threads of their own, which change often."""
    found, start = [None] * len(works), threading.Barrier(len(works))

    def run(i: int) -> None:
        start.wait()
        try:
            found[i] = works[i]()
        except BaseException:
            found[i] = AssertionError(traceback.format_exc())

    threads = [threading.Thread(target=run, args=(i,)) for i in range(len(works))]
    interval = sys.getswitchinterval()
    sys.setswitchinterval(1e-5)
    try:
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
    finally:
        sys.setswitchinterval(interval)
    for result in found:
        if isinstance(result, AssertionError):
            raise result
    return found


@pytest.mark.parametrize("network", NETWORKS)
def test_fits_in_threads_equal_fits_in_sequence(network):
    options = {"backbone": NETWORKS[network](), "tangents": "both", "tangent_layers": "all", "n_directions": 2}
    if network == "untraced":
        warnings.filterwarnings("ignore", "The backbone cannot be traced", UserWarning)
    models = [classifier(**o) for o in (options, {**options, "alpha": 0.3}, {"backbone": options["backbone"], **PAPER})]
    expected = [clone(m).fit(X, Y).decision_function(X) for m in models]
    settings = settings_of_torch()
    found = together(*(lambda m=m: clone(m).fit(X, Y).decision_function(X) for m in models))
    for one, other in zip(found, expected, strict=True):
        # Which kernel attention takes is a setting of the process: another thread's is as good, but for rounding.
        tolerance = 1e-6 if network == "attending" else 0
        np.testing.assert_allclose(one, other, rtol=0, atol=tolerance * np.abs(other).max())
    assert settings_of_torch() == settings


@pytest.mark.parametrize("network", NETWORKS)
def test_one_model_serves_many_threads(network):
    """Predictions, diagnostics and copies of one model, beside a fit of another."""
    if network == "untraced":
        warnings.filterwarnings("ignore", "The backbone cannot be traced", UserWarning)
    options = {"tangents": "both", "tangent_layers": "all", "n_directions": 2}
    clf = classifier(backbone=NETWORKS[network](), **options).fit(X, Y)
    expected, left_out, state = clf.predict_proba(X), clf.leave_one_out(X, Y), pickle.dumps(clf)
    settings = settings_of_torch()

    def predict() -> None:
        for _ in range(10):
            np.testing.assert_allclose(clf.predict_proba(X), expected, rtol=1e-10)

    def diagnose() -> None:
        for _ in range(3):
            np.testing.assert_allclose(clf.leave_one_out(X, Y), left_out, rtol=1e-8, atol=1e-10)
        clf.influence(X, Y, X[:1])

    def copy() -> None:
        for _ in range(3):
            data = pickle.dumps(clf)
            assert len(data) == len(state)
            np.testing.assert_allclose(pickle.loads(data).predict_proba(X[:2]), expected[:2], rtol=1e-10)

    together(predict, predict, diagnose, copy, lambda: clone(clf).fit(X[::-1], Y[::-1]))
    assert settings_of_torch() == settings
    predict()


def test_random_weights_in_threads():
    """Callables are called with torch's global generator seeded, one at a time."""

    def net() -> nn.Module:
        return nn.Sequential(nn.Conv2d(3, 4, 3), nn.ReLU(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(4, 2))

    models = [classifier(backbone=net, random_state=seed, tangents=None) for seed in range(4)]
    expected = [clone(m).fit(X, Y).coef_ for m in models]
    settings = settings_of_torch()
    found = together(*(lambda m=m: clone(m).fit(X, Y).coef_ for m in models))
    assert all(np.array_equal(a, b) for a, b in zip(found, expected, strict=True))
    assert settings_of_torch() == settings


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


# ------------------------------------------------------------------------------------------------------- workers


def fit_in_a_worker(clf: LQFClassifier) -> np.ndarray:
    torch.set_num_threads(1)  # OpenMP's threads do not survive a fork
    return clf.fit(X, Y).decision_function(X)


@pytest.mark.slow
def test_fits_in_workers_of_joblib():
    models = [classifier(alpha=a) for a in (0.1, 1.0)]
    with joblib.parallel_config("loky", n_jobs=2):
        found = joblib.Parallel()(joblib.delayed(fit_in_a_worker)(clone(m)) for m in models)
    for outputs, m in zip(found, models, strict=True):
        np.testing.assert_allclose(outputs, m.fit(X, Y).decision_function(X), rtol=1e-9)


@pytest.mark.skipif("fork" not in multiprocessing.get_all_start_methods(), reason="there is no fork")
def test_a_fit_in_a_fork():
    clf = classifier().fit(X, Y)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 warns of forks of processes with threads
        with multiprocessing.get_context("fork").Pool(1) as pool:
            found = pool.apply_async(fit_in_a_worker, [clone(clf)]).get(timeout=120)
    np.testing.assert_allclose(found, clf.decision_function(X), rtol=1e-9)


# -------------------------------------------------------------------------------------------------------- growth


def _resources() -> dict[str, float]:
    gc.collect()
    tensors = sum(issubclass(type(o), torch.Tensor) for o in gc.get_objects())
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return {
        "tensors": tensors,
        "objects": len(gc.get_objects()),
        "files": len(os.listdir("/proc/self/fd")),
        "threads": threading.active_count(),
        "bytes": pages * os.sysconf("SC_PAGE_SIZE"),
    }


@pytest.mark.skipif(not Path("/proc/self/fd").exists(), reason="reads files and memory in use from Linux")
def test_twenty_fits_need_no_more_than_five():
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

    for _ in range(5):
        work()
    before = _resources()
    for _ in range(20):
        work()
    after = _resources()
    assert after["tensors"] <= before["tensors"]
    assert after["files"] <= before["files"]
    assert after["threads"] <= before["threads"]
    # torch.fx keeps the source of each graph that it compiles, some kilobytes for each fit.
    assert after["objects"] - before["objects"] < 20 * 100
    assert after["bytes"] - before["bytes"] < 20 * activations / 2
