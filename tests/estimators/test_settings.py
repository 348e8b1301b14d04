"""Answers are those of torch's defaults, whatever the caller has set, and the caller's settings stay as they were."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from inspect import signature
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from support.data import make_images, tiny_net

from sklearn_lqf import LQFClassifier, LQFClassifierCV, LQFRegressor

X, LABELS = make_images(18, size=12)
TARGETS = np.random.default_rng(0).normal(size=18)
NEW = make_images(5, size=12, seed=1)[0]
NET = tiny_net()
PIXELS = torch.from_numpy(NEW).permute(0, 3, 1, 2) / 255
COMMON = {"backbone": NET, "store_data": True, "tangents": "both", "n_directions": 2}
ESTIMATORS = {
    "classifier": (LQFClassifier(**COMMON), LABELS),
    "conjugate gradients": (LQFClassifier(solver="pcg", tol=1e-2, alpha=1.0, **COMMON), LABELS),
    "paper": (LQFClassifier(backbone=NET, model="paper", alpha=1.0), LABELS),
    "search": (LQFClassifierCV(alphas=[0.1, 1.0], cv=2, **COMMON), LABELS),
    "regressor": (LQFRegressor(**COMMON), TARGETS),
}


def attributes(estimator: Any) -> dict[str, Any]:
    """What a fit has learned, in numbers."""
    names = ("coef_", "intercept_", "alpha_", "noise_variance_", "temperature_", "residual_norms_")
    return {name: getattr(estimator, name) for name in names if hasattr(estimator, name)}


# What each public method is called with: (fitted estimator, targets, folder) -> what is compared.
CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "decision_function": lambda m, y, _: m.decision_function(NEW),
    "decision_function, std": lambda m, y, _: m.decision_function(NEW, return_std=True),
    "features": lambda m, y, _: m.features(NEW),
    "fit": lambda m, y, _: attributes(clone(m).fit(X, y)),
    "forget": lambda m, y, _: attributes(copy.copy(m).forget([0, 3])),
    "influence": lambda m, y, _: m.influence(X, y, NEW, y[:5]),
    "leave_one_out": lambda m, y, _: m.leave_one_out(X, y),
    "load": lambda m, y, folder: type(m).load(folder / "model", backbone=NET).predict(NEW),
    "partial_fit": lambda m, y, _: attributes(copy.copy(m).partial_fit(NEW, y[:5])),
    "pickle": lambda m, y, _: attributes(pickle.loads(pickle.dumps(m)).partial_fit(NEW, y[:5])),
    "predict": lambda m, y, _: m.predict(NEW),
    "predict, std": lambda m, y, _: m.predict(NEW, return_std=True),
    "predict_log_proba": lambda m, y, _: m.predict_log_proba(NEW),
    "predict_proba": lambda m, y, _: m.predict_proba(NEW),
    "save": lambda m, y, folder: m.save(folder / "again", include_backbone=False),
    "score": lambda m, y, _: m.score(NEW, y[:5]),
    "to_module": lambda m, y, _: m.to_module()(PIXELS).numpy(),
}
NOT_OF_THE_PAPER = ("std", "features", "forget", "influence", "leave_one_out", "partial_fit", "pickle")
# They compute nothing.
OTHERS = {"get_metadata_routing", "get_params", "set_params", "set_callbacks"}


def calls_of(estimator: Any) -> list[str]:
    """Names of the calls that an estimator has."""

    def has(call: str) -> bool:
        name, _, option = call.partition(", ")
        method = getattr(estimator, name, None)
        return call == "pickle" or (
            method is not None and f"return_{option}" in [*signature(method).parameters, "return_"]
        )

    return [call for call in CALLS if has(call)]


@pytest.mark.parametrize("name", ESTIMATORS)
def test_every_public_method_is_called(name):
    estimator = ESTIMATORS[name][0]
    public = {n for n in dir(estimator) if not n.startswith("_") and callable(getattr(type(estimator), n, None))}
    public -= {n for n in public if n.startswith("set_") and n.endswith("_request")}
    assert public <= {call.partition(",")[0] for call in CALLS} | OTHERS, "give the new method arguments in CALLS"


@contextlib.contextmanager
def changed(read: Callable[[], Any], write: Callable[[Any], Any], value: Any) -> Iterator[None]:
    before = read()
    write(value)
    try:
        yield
    finally:
        write(before)


SETTINGS: dict[str, Callable[[], contextlib.AbstractContextManager]] = {
    "autocast": lambda: torch.autocast("cpu", torch.bfloat16),
    "inference mode": torch.inference_mode,
    "no_grad": torch.no_grad,
    "default dtype": lambda: changed(torch.get_default_dtype, torch.set_default_dtype, torch.float64),
    "deterministic": lambda: changed(
        torch.are_deterministic_algorithms_enabled, torch.use_deterministic_algorithms, True
    ),
}


def state() -> tuple[Any, ...]:
    """The settings of the caller."""
    return (
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")), torch.get_autocast_dtype("cpu"),
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
    )  # fmt: skip


@pytest.fixture(scope="module", params=ESTIMATORS)
def case(request, tmp_path_factory):
    """A fitted estimator, its targets, a folder with it, its calls, and what they return by default."""
    (estimator, y), folder = ESTIMATORS[request.param], tmp_path_factory.mktemp("saved")
    model = clone(estimator).fit(X, y)
    model.save(folder / "model", include_backbone=False)
    calls = calls_of(model)
    if request.param == "paper":
        calls = [call for call in calls if not any(word in call for word in NOT_OF_THE_PAPER)]
    return model, y, folder, {call: CALLS[call](model, y, folder) for call in calls}


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = tuple(found.values()), tuple(expected.values())
    for a, b in zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]:
        if b is None or np.asarray(b).dtype.kind not in "fc":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("setting", SETTINGS)
def test_settings_of_the_caller_do_not_count(case, setting):
    model, y, folder, expected = case
    for call, value in expected.items():
        with SETTINGS[setting]():
            before = state()
            found = CALLS[call](model, y, folder)
            assert state() == before, call
        assert_same(found, value)
    with SETTINGS[setting]():
        before = state()
        for call in expected.keys() - {"load", "save", "to_module", "pickle"}:
            with pytest.raises((ValueError, TypeError)):
                getattr(clone(model) if call == "fit" else model, call.partition(",")[0])("not images", None)
            assert state() == before, call
