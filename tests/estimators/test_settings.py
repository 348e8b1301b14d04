"""No parameter that is set after a fit changes an answer, unless an error names it, nor does any setting of torch."""

import contextlib
import copy
import inspect
import warnings
from collections.abc import Iterator
from typing import Any

import numpy as np
import pytest
import torch
from sklearn.base import clone
from sklearn.model_selection import KFold
from support.data import make_images, tiny_net
from support.settings import settings

from sklearn_lqf import ImageFeatures, LQFClassifier, LQFClassifierCV, LQFRegressor

N = 12
X, Y = make_images(N, size=8)
VALUES = X[:, :4, :4, 0].mean((1, 2)) + np.arange(N)
VECTORS = X[:, ::4, ::4, 0].reshape(N, -1) / 255
NEW, NEW_Y = make_images(3, size=8, seed=1)
ROWS = np.arange(1, N)  # the fit; the first row is added later
OPTIONS: dict[str, Any] = {
    "backbone": tiny_net(width=4), "tangents": "both", "n_directions": 1, "sketch_size": 2, "store_data": True,
    "execution": {"dtype": "float64"},
}  # fmt: skip
# An estimator, its X and y.
CASES: dict[str, tuple[Any, np.ndarray, np.ndarray]] = {
    "classifier": (LQFClassifier(class_weight="balanced", **OPTIONS), X, Y),
    "iterative": (LQFClassifier(solver="pcg", prior="equal", alpha=1.0, **OPTIONS), X, Y),
    "cv": (LQFClassifierCV(alphas=[0.03, 0.3], cv=2, scoring="neg_log_loss", **OPTIONS), X, Y),
    "regressor": (LQFRegressor(**OPTIONS), X, VALUES),
    "vectors": (LQFClassifier(store_data=True), VECTORS, Y),
    "paper": (LQFClassifier(OPTIONS["backbone"], model="paper", tol=0.1, execution=OPTIONS["execution"]), X, Y),
}
# Of each parameter values with which `fit` would make another model, or none.
OTHERS: dict[str, list[Any]] = {
    "backbone": [tiny_net(seed=1, width=4), "resnet18"], "weights": ["of nobody"], "output": ["a"],
    "tangents": [None],
    "tangent_layers": ["all"], "n_directions": [0], "sketch_size": [None], "model": ["paper", "groups"],
    "prior": ["last", None], "alpha": [100.0], "alphas": [[100.0]], "cv": [None, KFold(3)], "scoring": [None, max],
    "class_weight": [None, {"ant": 5.0}], "negative_slope": [0.5], "solver": ["closed", "pcg"], "max_iter": [1],
    "tol": [0.5], "views": [("identity", "flip")], "image_shape": [(4, 4, 3)], "image_size": [5], "channel_axis": [0],
    "preprocessing": [{"mean": 0.5, "std": 0.1}], "store_data": [False], "random_state": [None], "verbose": [1],
    "execution": [None, {"dtype": "float32", "batch_size": 1, "n_jobs": 2}], "execution__device": ["cuda:77"],
    "execution__download": [False], "execution__distributed": [True],
}  # fmt: skip


def equal(one: Any, other: Any, tolerance: float = 1e-9) -> bool:
    """Labels to the letter, numbers but for the rounding of other batches."""
    one, other = np.asarray(one), np.asarray(other)
    return np.array_equal(one, other) if one.dtype.kind == "U" else np.allclose(one, other, tolerance, tolerance)


def tensor(model: Any, new: np.ndarray) -> torch.Tensor:
    """New rows as a module takes them."""
    rows = new.transpose(0, 3, 1, 2) / 255 if new.ndim == 4 else new
    return torch.from_numpy(rows).to(model._model.network.dtype)


def answers(model: Any, data: np.ndarray, y: np.ndarray, folder: Any) -> dict[str, Any]:
    """What a fitted estimator says, by the method's name: an array, or the words in which it refuses."""
    new = NEW if data.ndim > 2 else VECTORS[:3]
    numeric = isinstance(model, LQFRegressor)
    deviating = model.predict if numeric else model.decision_function

    def reloaded() -> np.ndarray:
        path = folder / "model"
        model.save(path)
        module = OPTIONS["backbone"] if data.ndim > 2 else None
        return type(model).load(path, device="cpu", backbone=module).predict(new)

    def updated() -> np.ndarray:
        twin = copy.copy(model).forget([0, 4])
        twin.partial_fit(data[:1], y[:1])
        outputs = twin.predict(new) if numeric else twin.predict_proba(new)
        score = getattr(twin, "best_score_", 0.0)
        return np.concatenate([outputs.ravel(), twin.leave_one_out().ravel(), [score]])

    calls = {
        "predict": lambda: model.predict(new),
        "predict raveled rows": lambda: model.predict(new.reshape(len(new), -1)),
        "score": lambda: model.score(data, y),
        "deviation": lambda: deviating(new, return_std=True)[1],
        "features": lambda: model.features(new),
        "leave_one_out": lambda: model.leave_one_out(data[ROWS], y[ROWS]),
        "influence": lambda: model.influence(None, None, new, y[:3]),
        "forget, partial_fit": updated,
        "to_module": lambda: model.to_module()(tensor(model, new)).detach().numpy(),
        "save, load": reloaded,
    }
    if not numeric:
        calls |= {
            "predict_proba": lambda: model.predict_proba(new),
            "predict_log_proba": lambda: model.predict_log_proba(new),
            "decision_function": lambda: model.decision_function(new),
        }
    found: dict[str, Any] = {}
    for name, call in calls.items():
        try:
            with warnings.catch_warnings():
                warnings.filterwarnings("ignore", "The solver stopped")
                found[name] = call()
        except (ValueError, TypeError, AttributeError) as error:
            found[name] = f"{error} {error.__cause__}"
    return found


@pytest.mark.parametrize("case", CASES)
def test_parameters_that_are_set_later_change_no_answer(case, tmp_path):
    estimator, data, y = CASES[case]
    model = clone(estimator).fit(data[ROWS], y[ROWS])
    expected, faults = answers(model, data, y, tmp_path), []
    refused = {name for name, value in expected.items() if isinstance(value, str)}
    assert not refused if case != "paper" else "predict" not in refused
    # A parameter without other values is an error.
    names = {*inspect.signature(type(model)).parameters, *(n for n in OTHERS if n.startswith("execution__"))}
    alone = names if case == "classifier" else {"backbone", "store_data"}  # the latter make some methods refuse
    changes = [{name: value} for name in alone for value in OTHERS[name]]
    for change in [*changes, {name: OTHERS[name][0] for name in names - alone}]:
        changed = copy.copy(model).set_params(**change)
        for method, found in answers(changed, data, y, tmp_path).items():
            if isinstance(found, str):
                named = len(change) == 1 and all(name.partition("__")[0] in found for name in change)
                fault = method not in refused and not named
            else:
                fault = method in refused or not equal(found, expected[method])
            if fault:
                faults.append(f"{method} after {change}: {found if isinstance(found, str) else 'changed'}")
    assert not faults, "\n".join(faults)


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


# Public methods that compute nothing, or that the tests below call by themselves.
APART = {"fit", "get_metadata_routing", "get_params", "set_callbacks", "set_params"}


@pytest.mark.parametrize("case", ["cv", "regressor", "vectors"])
def test_settings_of_torch_do_not_count(case, tmp_path):
    estimator, data, y = CASES[case]
    estimator = clone(estimator).set_params(execution__dtype="float32", store_data=True)
    model = clone(estimator).fit(data[ROWS], y[ROWS])
    expected = answers(model, data, y, tmp_path)
    public = {n for n in dir(model) if not n.startswith("_") and callable(getattr(type(model), n, None))}
    public -= {n for n in public if n.startswith("set_") and n.endswith("_request")}
    assert public <= {n for name in expected for n in name.split(", ")} | APART, "add the new method to the answers"
    with other_settings():
        before = settings()
        again = clone(estimator).fit(data[ROWS], y[ROWS])
        for found in (answers(model, data, y, tmp_path), answers(again, data, y, tmp_path)):
            assert [name for name in expected if not equal(found[name], expected[name], 1e-6)] == []
        with pytest.raises(ValueError, match="single image into a list"):
            again.fit("not images", y)
        assert settings() == before


def test_settings_of_torch_do_not_count_for_features():
    found = ImageFeatures(OPTIONS["backbone"])
    expected = found.fit_transform(X)
    with other_settings():
        before = settings()
        for features in (found.transform(X), found.fit_transform(X), found.fit(X).transform(X)):
            np.testing.assert_allclose(features, expected, atol=1e-6)
        assert settings() == before
