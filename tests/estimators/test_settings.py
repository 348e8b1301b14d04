"""Answers are those of torch's defaults, whatever the caller has set, and the caller's settings stay as they were."""

from __future__ import annotations

import contextlib
import copy
import pickle
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from support.data import make_images, tiny_net

from sklearn_lqf import ImageFeatures, LQFClassifierCV, LQFRegressor

X, LABELS = make_images(18, size=12)
TARGETS = np.random.default_rng(0).normal(size=18)
NEW = make_images(5, size=12, seed=1)[0]
NET = tiny_net()
PIXELS = torch.from_numpy(NEW).permute(0, 3, 1, 2) / 255
COMMON = {"backbone": NET, "tangents": "both", "n_directions": 2}
# Between them they have every public method.
ESTIMATORS = {
    "classifier": (LQFClassifierCV(alphas=[0.1, 1.0], cv=2, store_data=True, **COMMON), LABELS),
    "regressor": (LQFRegressor(store_data=True, **COMMON), TARGETS),
    "features": (ImageFeatures(**COMMON), LABELS),
}


def attributes(estimator: Any) -> dict[str, Any]:
    """What a fit has learned, in numbers."""
    names = ("coef_", "intercept_", "alpha_", "noise_variance_", "temperature_", "residual_norms_")
    return {name: getattr(estimator, name) for name in names if hasattr(estimator, name)}


# What each public method is called with: (fitted estimator, targets, path) -> what is compared.
CALLS: dict[str, Callable[[Any, Any, Any], Any]] = {
    "decision_function": lambda m, y, _: m.decision_function(NEW),
    "decision_function, std": lambda m, y, _: m.decision_function(NEW, return_std=True),
    "features": lambda m, y, _: m.features(NEW),
    "fit": lambda m, y, _: attributes(clone(m).fit(X, y)),
    "fit_transform": lambda m, y, _: clone(m).fit_transform(X, y),
    "forget": lambda m, y, _: attributes(copy.copy(m).forget([0, 3])),
    "influence": lambda m, y, _: m.influence(X, y, NEW, y[:5]),
    "leave_one_out": lambda m, y, _: m.leave_one_out(X, y),
    "partial_fit": lambda m, y, _: attributes(copy.copy(m).partial_fit(NEW, y[:5])),
    "partial_fit, pickled": lambda m, y, _: attributes(pickle.loads(pickle.dumps(m)).partial_fit(NEW, y[:5])),
    "predict": lambda m, y, _: m.predict(NEW),
    "predict, std": lambda m, y, _: m.predict(NEW, return_std=True),
    "predict_log_proba": lambda m, y, _: m.predict_log_proba(NEW),
    "predict_proba": lambda m, y, _: m.predict_proba(NEW),
    "save": lambda m, y, path: m.save(path, include_backbone=False),
    "load": lambda m, y, path: type(m).load(path, backbone=NET).predict(NEW),
    "score": lambda m, y, _: m.score(NEW, y[:5]),
    "to_module": lambda m, y, _: m.to_module()(PIXELS).numpy(),
    "transform": lambda m, y, _: m.transform(NEW),
}
# They compute nothing.
OTHERS = {"get_feature_names_out", "get_metadata_routing", "get_params", "set_callbacks", "set_output", "set_params"}


def calls_of(estimator: Any) -> list[str]:
    """Names of the calls that an estimator has."""
    without = "decision_function, std" if isinstance(estimator, LQFRegressor) else "predict, std"
    return [call for call in CALLS if call != without and hasattr(estimator, call.partition(",")[0])]


@contextlib.contextmanager
def other_settings() -> Iterator[None]:
    """Every mode of torch other than by default; what hides behind another, tests/runtime/test_arithmetic.py tries."""
    torch.set_default_dtype(torch.float64)
    torch.use_deterministic_algorithms(True)
    try:
        with torch.autocast("cpu", torch.bfloat16), torch.inference_mode():
            yield
    finally:
        torch.set_default_dtype(torch.float32)
        torch.use_deterministic_algorithms(False)


def state() -> tuple[Any, ...]:
    """The settings of the caller."""
    return (
        *(torch.is_autocast_enabled(kind) for kind in ("cpu", "cuda")), torch.get_autocast_dtype("cpu"),
        torch.is_inference_mode_enabled(), torch.is_grad_enabled(), torch.get_default_dtype(),
        torch.are_deterministic_algorithms_enabled(), torch.get_num_threads(),
    )  # fmt: skip


def assert_same(found: Any, expected: Any) -> None:
    if isinstance(expected, dict):
        assert found.keys() == expected.keys()
        found, expected = tuple(found.values()), tuple(expected.values())
    for a, b in zip(found, expected, strict=True) if isinstance(expected, tuple) else [(found, expected)]:
        if b is None or np.asarray(b).dtype.kind not in "fc":
            np.testing.assert_array_equal(a, b)
        else:
            np.testing.assert_allclose(a, b, rtol=1e-6, atol=1e-8)


@pytest.mark.parametrize("name", ESTIMATORS)
def test_settings_of_the_caller_do_not_count(name, tmp_path):
    estimator, y = ESTIMATORS[name]
    public = {n for n in dir(estimator) if not n.startswith("_") and callable(getattr(type(estimator), n, None))}
    public -= {n for n in public if n.startswith("set_") and n.endswith("_request")}
    assert public <= {call.partition(",")[0] for call in CALLS} | OTHERS, "give the new method arguments in CALLS"
    model = clone(estimator).fit(X, y)
    for call in calls_of(model):
        expected = CALLS[call](model, y, tmp_path / "model")
        with other_settings():
            before = state()
            found = CALLS[call](model, y, tmp_path / "model")
            assert state() == before, call
        assert_same(found, expected)
    with other_settings():
        before = state()
        with pytest.raises(ValueError, match="single image into a list"):
            clone(model).fit("not images", None if name == "features" else y)
        assert state() == before
