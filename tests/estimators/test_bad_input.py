"""Bad input of every kind: an error that names what is wrong and where; nothing is fitted, and nothing changed."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pytest
import torch
from scipy import sparse
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from support.data import make_images, tiny_net

from sklearn_lqf import LQFClassifier, LQFClassifierCV, LQFRegressor

X, Y = make_images(12, size=8)
RAVELED = X.reshape(12, -1)
VECTORS = RAVELED[:, :5] / 255
NUMBERS = np.arange(12.0)
LABELS = (np.arange(12)[:, None] + np.arange(3)) % 2
NET = tiny_net(width=4)
NAN, INF = float("nan"), float("inf")
PAIR = np.array([1.0, 2.0])  # an array where a value is expected: comparisons with it have no truth value
ESTIMATORS = {"classifier": LQFClassifier, "regressor": LQFRegressor, "cv": LQFClassifierCV}
ERRORS = (ValueError, TypeError)


def made(kind: str, **parameters: Any) -> Any:
    """Its images are read in several batches."""
    given = {"backbone": NET, "prior": "last", "execution": {"batch_size": 5}}
    return ESTIMATORS[kind](**{**given, **parameters})


def targets(kind: str) -> np.ndarray:
    return NUMBERS if kind == "regressor" else Y


def refused(model: Any, call: Callable[[Any], Any], error: Any, message: str) -> None:
    """The estimator refuses, in these words; it is not fitted, and has the parameters that it had."""
    before = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    with warnings.catch_warnings(), pytest.raises(error, match=f"(?s){message}"):
        warnings.simplefilter("error")
        call(model)
    with pytest.raises(NotFittedError):
        check_is_fitted(model)
    assert not [name for name in vars(model) if name.endswith("_")]
    after = {k: v for k, v in vars(model).items() if not k.startswith("_")}
    assert after.keys() == before.keys() and all(after[k] is v for k, v in before.items())


# ------------------------------------------------------------------------------------------------------ parameters

CHOICE, BOOL, COUNT = [None, "", "AUTO", 0, [], PAIR], [None, 2, "True", [], NAN], [None, 0, -1, 2.5, "5", NAN, PAIR]
NUMBER = [None, -0.1, "small", NAN, INF, [1.0], PAIR, 1j]
# Values that are refused, of each parameter of any estimator.
BAD: dict[str, list[Any]] = {
    "backbone": [None, 3, [], b"resnet18", "resnet81", "timm:resnet81", "", lambda: None, "vector"],
    "weights": [3, True, [], NAN, "imagenet"],
    "tangents": ["", "LOCAL", 0, True, [], PAIR],
    "output": [3.5, {}, "features", 0, [], ["a", 0]],
    "tangent_layers": [None, 1.5, True, {}, [1], PAIR, -1, "blok2", ["block2", "blok2"], ""],
    "n_directions": [None, -1, 2.5, "5", NAN, PAIR],
    "sketch_size": COUNT[1:],
    "model": CHOICE,
    "prior": ["", "even", None, 3, {}, [], {1.0, 2.0}, {"last": -1}, {"last": "1"}, [INF], [[1.0]], {"first": 1.0},
        PAIR, {"last": 0}],
    "alpha": [*NUMBER, 0, ""],
    "alphas": [None, "auto", [], 1.0, [[1.0, 2.0]], [1, 1.0], ["auto"], [0.0], [1.0, -1.0], [NAN], [INF]],
    "cv": [1, -1, "five", 2.5, [], iter([])],
    "scoring": [3, True, [], NAN, "acuracy", lambda *_: NAN],
    "class_weight": [3, "even", [1, 2, 3], PAIR, {"ant": -1.0}, {"ant": 0, "bee": 0, "cow": 0}, {"ant": NAN}],
    "negative_slope": [*NUMBER, 1],
    "solver": [*CHOICE, "sgd"],
    "max_iter": COUNT,
    "tol": NUMBER,
    "views": [None, 3, "", "rotate", [], ("flip", "flip"), ("identity", None)],
    "image_shape": [3, "8x8", (8,), (8, -8), (8.0, 8), [], PAIR, (8, 8), (9, 8, 3)],
    "image_size": [0, 2.5, True, "large", (8,), (8, 0), PAIR, "backbone"],
    "channel_axis": [None, 1, -3, 0.5, "last", PAIR],
    "preprocessing": [3, "imagenet", [], {"mena": 0}, {"mean": (0, 0)}, {"mean": NAN}, {"std": 0}, {"std": None},
        {"interpolation": "best"}, {"size": 2.5}],
    "store_data": BOOL,
    "random_state": [-1, 2**32, 1.5, "0", NAN, []],
    "verbose": [None, -1, 0.5, "yes", PAIR],
    "execution": [3, "cpu", [], {"devise": "cpu"}, {1: 2}],
}  # fmt: skip
ITEMS: dict[str, list[Any]] = {
    "device": ["quantum", "", "cuda:99", "meta", None, 1.5, PAIR], "dtype": [*CHOICE, "float16", torch.float64],
    "tolerance": [-0.1, NAN, "0", None], "batch_size": COUNT, "n_jobs": [0, 2.5, "2"],
    "memory": [3, True, []], "distributed": BOOL, "download": BOOL,
}  # fmt: skip


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_parameters(kind):
    """All values of those of the classifier, and one of each that another estimator shares with it."""
    names = set(inspect.signature(ESTIMATORS[kind]).parameters)
    assert names <= set(BAD)
    shared = set() if kind == "classifier" else set(inspect.signature(LQFClassifier).parameters)
    for name in sorted(names):
        for value in BAD[name][:1] if name in shared else BAD[name]:
            refused(made(kind, **{name: value}), lambda m: m.fit(X, targets(kind)), ERRORS, name)


def test_items_of_execution():
    assert {f"execution__{name}" for name in ITEMS} == {n for n in made("cv").get_params() if "__" in n}
    for name, values in ITEMS.items():
        for value in values:
            for model in (made("cv", execution={name: value}), made("cv").set_params(**{f"execution__{name}": value})):
                refused(model, lambda m: m.fit(X, Y), ERRORS, name)
    with pytest.raises(ValueError, match="devise"):
        made("cv").set_params(execution__devise="cpu")
    with pytest.raises(ValueError, match="execution must be a dict or None, got 'cpu'"):
        made("cv", execution="cpu").set_params(execution__device="cpu")


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_parameters_of_version_0_1_have_a_new_spelling(kind):
    with pytest.raises(TypeError, match=r"'dtype'.*write execution=\{'dtype': \.\.\.\}"):
        made(kind, dtype="float64")
    with pytest.raises(ValueError, match=r"'batch_size'.*set_params\(execution__batch_size=\.\.\.\)"):
        made(kind).set_params(batch_size=3)
    with pytest.raises(TypeError, match="nonsense"):
        made(kind, nonsense=1)
    with pytest.raises(ValueError, match="Invalid parameter 'alfa'"):
        made(kind).set_params(alfa=1)


def test_combinations_with_the_papers_model():
    for name, value in {"solver": "closed", "store_data": True, "views": ("identity", "flip")}.items():
        refused(made("classifier", model="paper", **{name: value}), lambda m: m.fit(X, Y), ValueError, "paper")


# ------------------------------------------------------------------------------------------------------------- X


def objects(*elements: Any) -> np.ndarray:
    found = np.empty(len(elements), dtype=object)
    found[:] = list(elements)
    return found


# X, and what is said of it; with 12 labels. What else is no image, the tests of images know.
IMAGES: dict[str, tuple[Any, str]] = {
    "nothing": (None, ""), "a row of numbers": (NUMBERS, "2"), "no image": (X[:0], r"0 sample"),
    "channels first": (X.transpose(0, 3, 1, 2), "channel_axis=0"), "sparse": (sparse.csr_matrix(VECTORS), "toarray"),
    "an absent file": ([*X[:11], "gone.png"], r"X\[11\].*does not exist"),
    "nan among them": ([*X[:11], np.full((8, 8, 3), NAN)], r"NaN.*X\[11\]"),
    "mixed sizes": ([*X[:11], X[0, :4]], r"X\[11\] is 4x8.*image_size"),
}  # fmt: skip
OF_FITS = {"other length": (X[:5], "inconsistent"), "raveled": (RAVELED, "image_shape")}
OF_PREDICTIONS = {"another size": (X[:, :4], "image_size"), "shorter rows": (RAVELED[:, :-3], "189 .*192 features")}
WRONG = (ValueError, TypeError, FileNotFoundError)


@pytest.fixture(scope="module")
def fitted() -> dict[str, Any]:
    return {"classifier": made("classifier").fit(X, Y), "vectors": LQFClassifier().fit(VECTORS, Y)}


@pytest.mark.parametrize("case", [*IMAGES, *OF_FITS, *OF_PREDICTIONS])
def test_images(case, fitted):
    if case not in OF_PREDICTIONS:
        bad, message = {**IMAGES, **OF_FITS}[case]
        refused(made("classifier"), lambda m: m.fit(bad, Y), WRONG, message)
    if case not in OF_FITS:
        bad, message = {**IMAGES, **OF_PREDICTIONS}[case]
        with pytest.raises(WRONG, match=f"(?s){message}"):
            fitted["classifier"].predict(bad)


# ------------------------------------------------------------------------------------------------- y and weights

NOT_INDICATORS = "0 and 1|Unknown label type"
# What scikit-learn's own checks do not try.
OF_ANY_KIND: dict[str, tuple[Any, str]] = {
    "shorter": (NUMBERS[:5].astype(int), "inconsistent"), "empty": ([], "0 sample"), "a number": (3, ""),
    "text": ("abc", ""), "three axes": (np.zeros((12, 2, 2)), "dim 3"), "no column": (np.zeros((12, 0)), "0 feature"),
}  # fmt: skip
Y_CASES: dict[str, dict[str, tuple[Any, str]]] = {
    "classifier": {
        **OF_ANY_KIND, "one class": (np.repeat("ant", 12), "at least 2 classes.*'ant'"), "one row": (Y[:1], ""),
        "None among labels": (objects(None, *Y[1:]), ""), "mixed types": (objects(*[1, "a"] * 6), ""),
        "sets": ([{1}, {2}] * 6, ""),
        "columns of text": (np.c_[Y, Y], NOT_INDICATORS), "columns of classes": (LABELS + np.arange(3), NOT_INDICATORS),
        "columns of fractions": (LABELS / 3, NOT_INDICATORS),
    },
    "regressor": {
        **OF_ANY_KIND, "labels": (Y, "'ant'"), "objects": (objects(*[1, "a"] * 6), "'a'"),
        "sets": ([{1}, {2}] * 6, "set"), "sparse": (sparse.csr_matrix(LABELS), "toarray"),
        "nan in a column": (np.c_[NUMBERS, np.append(NUMBERS[1:], NAN)], "y contains NaN"),
    },
}  # fmt: skip


@pytest.mark.parametrize(("kind", "case"), [(kind, case) for kind, cases in Y_CASES.items() for case in cases])
def test_targets(kind, case):
    bad, message = Y_CASES[kind][case]
    refused(made(kind), lambda m: m.fit(X[:1] if case == "one row" else X, bad), ERRORS, message)


def test_weights():
    one = np.append(np.ones(11), 0)
    for bad, message in (
        (np.ones(3), r"\(3,\)"), (np.ones((12, 1)), "1D"), (one - 1e-9, "Negative"), (np.zeros(12), "zero"),
        (np.where(one, 1, NAN), "NaN"), (np.where(one, 1, INF), "infinity"), ([None] * 12, "NaN"), ("balanced", ""),
        ({}, ""), (np.ones(12) * 1j, "Complex"), (1 - one, "One row with a positive weight"),
        (np.full(12, 1e30), r"from 1e-12 to 1e\+12"), (np.where(one, 1, 1e300), "1e"), (np.full(12, 1e-320), "1e-12"),
    ):  # fmt: skip
        refused(made("classifier"), lambda m, w=bad: m.fit(X, Y, w), ERRORS, message)


# ------------------------------------------------------------------------------------------------------- methods


# Estimator, call, and what is said.
CALLS: list[tuple[str, Callable[[Any], Any], str]] = [
    ("vectors", lambda m: m.predict(X), "fitted on vectors"),
    ("vectors", lambda m: m.predict(VECTORS[:, :3]), "3 features.*5"),
    ("classifier", lambda m: m.influence(X, Y, X[:1], ["yak"]), "y_test.*yak"),
    ("classifier", lambda m: m.influence(X, Y, X[:2], Y[:1]), "inconsistent"),
    ("classifier", lambda m: m.score(X, Y[:5]), "inconsistent"),
]


def test_calls(fitted):
    for kind, call, message in CALLS:
        state = dict(vars(fitted[kind]))
        with pytest.raises(ValueError, match=f"(?s){message}"):
            call(fitted[kind])
        assert vars(fitted[kind]).keys() == state.keys()
        assert all(v is state[k] for k, v in vars(fitted[kind]).items())  # nothing was set


FIRST_CALLS: list[tuple[dict[str, Any], Callable[[Any], Any], str]] = [
    ({}, lambda m: m.partial_fit(X, Y), "classes must be passed on the first call"),
    ({}, lambda m: m.partial_fit(X, Y, classes=["ant", "bee"]), "cow"),
    ({}, lambda m: m.partial_fit(X, Y, classes=["ant"]), "at least 2 classes"),
    ({"views": "flip", "backbone": "auto"}, lambda m: m.fit(VECTORS, Y), "'flip'.*image_shape"),
    ({"backbone": "resnet18"}, lambda m: m.fit(VECTORS, Y), "5 features"),
    ({"class_weight": "balanced"}, lambda m: m.fit(X, LABELS), "use sample_weight"),
    ({"execution": {"distributed": True}}, lambda m: m.fit(X, Y), "torchrun|process group"),
]


def test_first_calls():
    for parameters, call, message in FIRST_CALLS:
        refused(made("classifier", store_data=True, **parameters), call, (ValueError, RuntimeError), message)


@pytest.mark.parametrize("kind", ["classifier", "regressor"])
def test_not_fitted(kind):
    y = targets(kind)
    calls: dict[str, tuple[Any, ...]] = {
        **dict.fromkeys(("predict", "decision_function", "predict_proba", "predict_log_proba", "features"), (X,)),
        "forget": (0,), "score": (X, y), "to_module": (), "leave_one_out": (), "influence": (X, y, X), "save": ("a/b",),
    }  # fmt: skip
    for name, arguments in calls.items():
        model = made(kind, store_data=True)
        if hasattr(ESTIMATORS[kind], name) or name == "forget":
            refused(model, lambda m, n=name, a=arguments: getattr(m, n)(*a), NotFittedError, "not fitted")
