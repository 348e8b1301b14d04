"""Every bad input: an error of the kind that scikit-learn uses, with what was got and what to do; nothing is fitted."""

import inspect
import warnings
from collections.abc import Callable
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from PIL import Image
from scipy import sparse
from sklearn.exceptions import NotFittedError
from sklearn.utils.validation import check_is_fitted
from support.data import TinyNet, make_images, tiny_net
from torch import nn

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


def made(kind: str, **parameters: Any) -> Any:
    options: dict[str, Any] = {"backbone": NET, "prior": "last"}
    if kind == "cv":
        options["alphas"] = [0.1, 1.0]
    return ESTIMATORS[kind](**{**options, **parameters})


def targets(kind: str) -> np.ndarray:
    return NUMBERS if kind == "regressor" else Y


def refused(kind: str, fit: Callable[[Any], Any], error: type, message: str, **parameters: Any) -> None:
    """The estimator refuses, in these words, and is not fitted."""
    model = made(kind, **parameters)
    with warnings.catch_warnings(), pytest.raises(error, match=f"(?s){message}"):
        warnings.simplefilter("error")
        fit(model)
    with pytest.raises(NotFittedError):
        check_is_fitted(model)
    assert not [name for name in vars(model) if name.endswith("_")]


# ------------------------------------------------------------------------------------------------------ parameters


def _no_choice(*allowed: str) -> tuple[str, list]:
    return rf"must be one of .*{allowed[0]}.*{allowed[-1]}.*got ", [None, "", allowed[0].upper(), 0, True, [], PAIR]


def _no_bool() -> tuple[str, list]:
    return r"must be True or False, got ", [None, 0, 1, "True", [], NAN]


def _no_number(condition: str, *bad: Any) -> tuple[str, list]:
    return rf"must be .*a number {condition}.*got ", [
        "", "small", True, NAN, INF, -INF, [], [1.0], PAIR, {}, 1j, b"1", object(), 10**400, *bad
    ]  # fmt: skip


def _no_count(least: int = 1) -> tuple[str, list]:
    return rf"must be an int >= {least}, got ", [None, least - 1, -1, 2.5, 1e3, True, "5", NAN, [5], PAIR]


# Of each parameter: what messages say after its name, and values that are refused with it.
PARAMETERS: dict[str, list[tuple[str, list]]] = {
    "backbone": [
        (r"must be the name of a classification model.*nn\.Module.*callable.*got ",
        [None, 3, True, [], {}, b"resnet18"]),
        (r" 'resnet81'.*[Nn]earest names: 'resnet", ["resnet81"]),
        (r" 'timm:resnet81'.*'timm:resnet", ["timm:resnet81"]),
        (r" ''\.", [""]),
        (r"must return an nn\.Module; .* returned NoneType", [lambda: None]),
        (r"='vector' takes vectors, but X holds images", ["vector"])],
    "weights": [
        (r" of 'TinyNet' must be one of 'auto', None, the path.*got ", [3, True, [], {}, NAN, b"x"]),
        (r" 'imagenet'; it takes 'auto', None, the path", ["imagenet"])],
    "download": [_no_bool()],
    "tangent_layers": [
        (r"must be 'head', 'all', an int .* or a list of module names, got ", [None, 1.5, True, {}, [1], PAIR]),
        (r"must be at least 0, got -1", [-1]),
        (r"names 'blok2', which is no module of the backbone\. Blocks: .*'block2",
        ["blok2", ["blok2"], ["block2", "blok2"]]),
        (r"names '', which is no module", ["", [""]])],
    "tangents": [
        (r"must be one of \['local', 'network', 'both'\] or None, got ",
        ["", "LOCAL", "last", 0, True, [], ["local"], PAIR])],
    "n_directions": [_no_count(0)],
    "sketch_size": [(r"must be an int >= 1, got ", [0, -1, 2.5, 1e3, True, "5", NAN, [5], PAIR])],
    "prior": [
        (r"must be one of \['leave-one-out', .*'last'\], a dict of numbers by group.*got ", ["", "LAST", "even"]),
        (r"must be one of .* or hold numbers; got ", [None, 3, 0.5, True, [], {}, {1.0, 2.0}, np.ones(0)]),
        (r"Each number of prior must be a number >= 0, got ",
        [{"last": -1}, {"last": NAN}, {"last": "1"}, ["a"], [None, 1], [-1.0, 2.0], [INF], [[1.0], [2.0]]]),
        (r"names \['first'\], which are no groups of this network; its groups: \['last'", [{"first": 1.0}]),
        (r"must have a number for each of the \d groups, \['last', .*got an array of shape \(2,\)", [[1.0, 2.0], PAIR]),
        (r"must hold finite and non-negative numbers, not all zero; got ", [{"last": 0}])],
    "negative_slope": [_no_number(">= 0", None, -0.1), (r"must be below 1, got ", [1, 1.0, 3])],
    "solver": [_no_choice("auto", "closed", "pcg", "sgd"),
        (r"='sgd' is the paper's: set model='paper', or use 'auto', 'closed' or 'pcg'", ["sgd"])],
    "max_iter": [_no_count()],
    "tol": [_no_number(">= 0", None, -0.1)],
    "views": [
        (r"must name each of \['identity', 'flip'\] at most once, got ", [None, 3, True, "", "rotate", [], (),
        ("flip", "flip"), ("identity", None), [["flip"]], {"identity": 1, "x": 2}])],
    "image_shape": [
        (
            r"must be 2 or 3 positive ints, \(H, W\) or with channels, got ",
            [3, "8x8", (8,), (8, 8, 3, 1), (0, 8), (8, -8), (8.0, 8), (True, 8), [], PAIR],
        ),
        (r"=\(8, 8\)", [(8, 8)]),  # of color images
        (r"=\(8, 8, 1\)", [(8, 8, 1)]),
        (r"=\(9, 8, 3\)", [(9, 8, 3)]),
    ],
    "image_size": [
        (r"must be a positive int, a pair \(H, W\) of them, or None, got ",
        [0, -3, 2.5, True, "large", (8,), (8, 0), (8, 8, 3), (8.0, 8), PAIR, {}]),
        (r"The size at which TinyNet was trained is not known: set image_size", ["backbone"])],
    "channel_axis": [
        (r"=.* is not supported.*-1 for \(H, W, C\) or 0 for \(C, H, W\)", [None, 1, 3, -3, 0.5, "last", PAIR])],
    "preprocessing": [
        (r"must be None or a dict with any of the keys .*'mean'.*got ", [3, "imagenet", [], PAIR]),
        (r"has unknown keys \['mena'\]; allowed are .*'mean'", [{"mena": 0}]),
        (r"\['mean'\] must be one number or 3.*finite; got", [{"mean": (0, 0)}, {"mean": NAN}, {"mean": "0"}]),
        (r"\['std'\] must be one number or 3.*finite and positive; got",
        [{"std": 0}, {"std": (1, 1, -1)}, {"std": None}]),
        (r"\['interpolation'\] must be one of .*'bilinear'.*got 'best'", [{"interpolation": "best"}]),
        (r"\['size'\] must be a positive int, a pair", [{"size": 0}, {"size": (8, 8, 8)}, {"size": 2.5}])],
    "batch_size": [_no_count()],
    "memory": [
        (r"'memory' should be None.* a string or have the same interface as joblib\.Memory.*Got ", [3, True, [], 1.5])
        ],
    "store_data": [_no_bool()],
    "device": [
        (r"=.* is not a device; present here: \['cpu'.*\(or 'auto'\)", ["quantum", "", "cpu:x", None, [], 1.5, PAIR]),
        (r"='cuda:99' is not present; present here: \['cpu'", ["cuda:99"]),
        (r"='meta' is not present", ["meta"])],
    "distributed": [_no_bool()],
    "dtype": [_no_choice("auto", "float32", "float64"),
        (r"must be one of .*got ", ["float16", np.float32, torch.float64])],
    "random_state": [
        (r"must be an int from 0 to 2\*\*32 - 1, a RandomState or None, got ",
        [-1, 2**32, 1.5, "0", NAN, [], {}, object()])],
    "verbose": [(r"must be an int >= 0, got ", [None, -1, 0.5, "yes", NAN, [], PAIR])],
}  # fmt: skip
# Of some of the estimators.
ALPHA = [_no_number("> 0", None, 0, -1.0)]
OWN_PARAMETERS: dict[tuple[str, str], list[tuple[str, list]]] = {
    ("classifier", "alpha"): ALPHA,
    ("regressor", "alpha"): ALPHA,
    ("classifier", "model"): [_no_choice("groups", "paper")],
    ("classifier", "class_weight"): [
        (r" must be an instance of 'dict', a str among \{'balanced'\} or None\. Got ",
        [3, True, "even", [1, 2, 3], PAIR]),
        (r"must give finite and non-negative weights, not all zero; got ",
        [{"ant": -1.0}, {"ant": 0, "bee": 0, "cow": 0}, {"ant": NAN}, {"bee": INF}])],
    ("cv", "alphas"): [
        (r"must be some different numbers, got ",
        [None, "auto", [], 1.0, [[1.0, 2.0]], [1, 1.0], ["auto"], {}, object(), 1j]),
        (r"Each of alphas must be a number > 0, got ", [[0.0], [1.0, -1.0], [NAN], [1.0, INF]])],
    ("cv", "cv"): [
        (r"at least one train/test split.*got n_splits=", [1, 0, -1]),
        (r"Expected .?cv.? as an integer.* cross-validation object .* an iterable.* Got ", ["five", 2.5]),
        (r"yields no folds; an iterator yields them once: make it a list", [[]])],
    ("cv", "scoring"): [
        (r"must be the name of a scorer, a callable or None, got ", [3, True, [], {}, NAN]),
        (r"'acuracy'", ["acuracy"]),
        (r"gives nan for each of alphas", [lambda *_: NAN])],
}  # fmt: skip


def _named(value: Any) -> str:
    text = value.__name__ if callable(value) and hasattr(value, "__name__") else repr(value)
    return "an object" if type(value) is object else text[:40]


BAD_PARAMETERS = {
    f"{kind}-{name}={_named(v)}": (kind, name, v, message)
    for kinds, table in [
        *((("classifier",), {name: PARAMETERS[name]}) for name in PARAMETERS),  # the others share the checks
        *(((kind,), {name: cases}) for (kind, name), cases in OWN_PARAMETERS.items()),
    ]
    for kind in kinds
    for name, cases in table.items()
    for message, values in cases
    for v in values
}


@pytest.mark.parametrize("case", BAD_PARAMETERS)
def test_parameters(case):
    kind, name, value, message = BAD_PARAMETERS[case]
    parameters = {name: value}
    words = (
        message if message.startswith(("Each", "The size")) else f"{name}.*{message}".replace(r"device.*=", "device=")
    )
    if name in ("backbone", "class_weight", "scoring", "weights", "cv", "memory"):
        words = message  # which may begin with something else than the name
    error = TypeError if name in ("backbone", "weights", "preprocessing") else ValueError
    refused(kind, lambda m: m.fit(X, targets(kind)), (error, ValueError), words, **parameters)


@pytest.mark.parametrize("kind", ESTIMATORS)
def test_every_parameter_has_bad_values(kind):
    names = set(inspect.signature(ESTIMATORS[kind].__init__).parameters) - {"self"}
    assert names <= {name for k, name, *_ in BAD_PARAMETERS.values() if k in (kind, "classifier")}


COMBINATIONS: dict[str, tuple[dict[str, Any], str]] = {
    "closed form": ({"solver": "closed"}, "model='paper' has no closed form: use solver='auto', 'pcg' or 'sgd'"),
    "stored data": ({"store_data": True}, "model='paper' does not support store_data=True"),
    "views": ({"views": ("identity", "flip")}, r"model='paper' does not support views=\('identity', 'flip'\)"),
}


@pytest.mark.parametrize("case", COMBINATIONS)
def test_combinations_with_the_papers_model(case):
    parameters, message = COMBINATIONS[case]
    refused("classifier", lambda m: m.fit(X, Y), ValueError, message, model="paper", **parameters)


# ------------------------------------------------------------------------------------------------------------- X


def objects(*elements: Any) -> np.ndarray:
    found = np.empty(len(elements), dtype=object)
    found[:] = list(elements)
    return found


def spoiled(value: float, dtype: str = "float32") -> np.ndarray:
    """Images as floats, one value of which is another."""
    found = (X / 255).astype(dtype)
    found[7, 3, 2, 1] = value
    return found


NOT_2D = r"(Expected 2D array|Expected a 2-dimensional container)"
ONE_IMAGE = r"Expected images as an array or as a sequence of paths.*Put a single image into a list"
NO_DTYPE = r"X has dtype .*, supported are uint8 \(0\.\.255\) and float16, float32, float64 \(0\.\.1\): cast to uint8"
NO_IMAGE = r"is not an image: expected a path, a PIL image or an array of shape .*, got "
OUT_OF_RANGE = r"Float images must lie in 0\.\.1, got values from .* in X.*divide them.*or cast them to uint8"
NO_CHANNELS = r"X has \d channels \(shape of one image .*\), but 3 channel\(s\) are needed\. "
# X, the exception, and its message; with 12 labels.
IMAGES: dict[str, tuple[Any, type, str]] = {
    "None": (None, ValueError, NOT_2D),
    "a number": (3, ValueError, NOT_2D),
    "an array without axes": (np.array(3), ValueError, NOT_2D),
    "one path": ("a.png", ValueError, ONE_IMAGE),
    "one image": (Image.fromarray(X[0]), ValueError, ONE_IMAGE),
    "a dict": ({"a": 1}, TypeError, "dict"),
    "a set": ({1, 2}, TypeError, "set"),
    "a generator": ((x for x in X), TypeError, "generator"),
    "a row of numbers": (NUMBERS, ValueError, NOT_2D),
    "a Series of numbers": (pd.Series(NUMBERS), ValueError, NOT_2D),
    "five axes": (X[None], ValueError, r"got an array with 5 dimension\(s\), shape \(1, 12, 8, 8, 3\)"),
    "no image": (X[:0], ValueError, r"Found array with 0 sample\(s\)"),
    "an empty list": ([], ValueError, NOT_2D),
    "an empty tuple": ((), ValueError, NOT_2D),
    "no width": (X[:, :, :0], ValueError, r"Found array with 0 feature\(s\)"),
    "no channel": (X[..., :0], ValueError, r"Found array with 0 feature\(s\)"),
    "two channels": (X[..., :2], ValueError, NO_CHANNELS + "Drop the alpha channel"),
    "four channels": (X[..., [0, 1, 2, 2]], ValueError, NO_CHANNELS + "Drop the alpha channel"),
    "five channels": (X[..., [0, 1, 2, 2, 2]], ValueError, NO_CHANNELS + "Convert the images"),
    "channels first": (X.transpose(0, 3, 1, 2), ValueError, NO_CHANNELS + ".*pass channel_axis=0"),
    **{dtype: (X.astype(dtype), ValueError, NO_DTYPE) for dtype in ("int8", "int16", "uint16", "int32", "int64")},
    **{
        dtype: (X.astype(dtype), ValueError, NO_DTYPE) for dtype in ("bool", "complex64", "longdouble", "object", "str")
        },
    "dates": (X.astype("M8[s]"), ValueError, NO_DTYPE),
    "nested lists of ints": (X.tolist(), ValueError, NO_DTYPE),
    "bfloat16": (torch.zeros(12, 8, 8, 3, dtype=torch.bfloat16), ValueError,
        r"dtype torch\.bfloat16.*pass a CPU tensor"),
    "a tensor elsewhere": (torch.zeros(12, 8, 8, 3, device="meta"), ValueError, r"on device meta: pass a CPU tensor"),
    **{f"nan, {d}": (spoiled(NAN, d), ValueError, r"contains NaN.*X\[0:12\]")
        for d in ("float16", "float32", "float64")},
    "infinity": (spoiled(INF), ValueError, r"contains infinity.*X\[0:12\]"),
    "minus infinity": (spoiled(-INF), ValueError, r"contains infinity.*X\[0:12\]"),
    "floats to 255": (X.astype(float), ValueError, OUT_OF_RANGE),
    "floats from -1": (X / 127.5 - 1, ValueError, OUT_OF_RANGE),
    "just above 1": (spoiled(1.01), ValueError, OUT_OF_RANGE),
    "just below 0": (spoiled(-0.01), ValueError, OUT_OF_RANGE),
    "sparse": (sparse.csr_matrix(VECTORS), TypeError, r"Sparse data was passed for X.*toarray"),
    "other length": (X[:5], ValueError, r"inconsistent numbers of samples: \[5, 12\]"),
    "raveled, without image_shape": (RAVELED, ValueError, r"input of shape \(192,\).*set image_shape"),
    "absent files": (["a.png"] * 12, FileNotFoundError, r"X\[0\] \('a\.png'\) does not exist"),
    "an absent file": ([*X[:11], "gone.png"], FileNotFoundError, r"X\[11\] \('gone\.png'\) does not exist"),
    **{f"{name} in a list": ([*X[:7], element, *X[8:]], ValueError, rf"X\[7\] {NO_IMAGE}{got}")
        for name, element, got in [("None", None, "NoneType"), ("nan", NAN, "float"), ("an int", 5, "int"),
        ("bytes", b"a.png", "bytes"), ("a list", ["a.png"], "list of str"),
        ("a vector", np.zeros(4), r"numpy\.ndarray of shape \(4,\)"),
        ("four axes", X[:1], r"numpy\.ndarray of shape \(1, 8, 8, 3\)")]},
    "None in an object array": (objects(*X[:11], None), ValueError, rf"X\[11\] {NO_IMAGE}NoneType"),
    "None in a Series": (pd.Series([*X[:11], None]), ValueError, rf"X\[11\] {NO_IMAGE}NoneType"),
    "an empty image in a list": ([*X[:11], X[0, :0]], ValueError,
        r"X\[11\] is an empty image: its shape is \(0, 8, 3\)"),
    "ints in a list": ([*X[:11], X[0].astype(int)], ValueError, r"X\[11\] has dtype int64.*cast to uint8"),
    "nan in a list": ([*X[:11], spoiled(NAN)[7]], ValueError, r"contains NaN.*X\[11\]"),
    "floats to 255 in a list": ([*X[:11], X[0] * 1.0], ValueError, r"must lie in 0\.\.1.*X\[11\]"),
    "four channels in a list": ([*X[:11], X[0][..., [0, 1, 2, 2]]], ValueError, r"X\[11\] has 4 channels"),
    "mixed sizes": ([*X[:11], X[0, :4]], ValueError,
        r"X\[11\] is 4x8 \(height x width\) but X\[0\] is 8x8.*image_size="),
    "16 bits": ([Image.fromarray(x[..., 0].astype(np.uint16)) for x in X], ValueError,
        r"X\[0\].*more than 8 bits.*pass an array"),
    "32 bits": ([Image.fromarray(x[..., 0].astype(np.float32)) for x in X], ValueError, r"X\[0\].*more than 8 bits"),
}  # fmt: skip


@pytest.mark.parametrize("case", IMAGES)
def test_images(case):
    bad, error, message = IMAGES[case]
    refused("classifier", lambda m: m.fit(bad, Y), error, message)


def frame(prefix: str) -> pd.DataFrame:
    """Raveled images with names of columns."""
    return pd.DataFrame(RAVELED).rename(columns=lambda name: f"{prefix}{name}")


@pytest.fixture(scope="module")
def fitted() -> dict[str, Any]:
    models = {kind: made(kind).fit(X, targets(kind)) for kind in ESTIMATORS}
    models["raveled"] = made("classifier", image_shape=(8, 8, 3)).fit(frame("p"), Y)
    models["vectors"] = LQFClassifier().fit(VECTORS, Y)
    models["targets"] = made("regressor").fit(X, np.c_[NUMBERS, NUMBERS])
    models["labels"] = made("classifier").fit(X, LABELS)
    models["stored"] = made("classifier", store_data=True).fit(X, Y)
    return models


FOR_PREDICTIONS = {
    **{k: v for k, v in IMAGES.items() if k not in ("other length", "raveled, without image_shape", "a generator")},
    "a dict": ({"a": 1}, ValueError, NOT_2D),
    "a set": ({1, 2}, ValueError, NOT_2D),
    "a generator": ((x for x in X), ValueError, NOT_2D),
    "another size": (X[:, :4], ValueError,
        r"X has images of size \(4, 8\), but .* is expecting .*\(8, 8\).*set image_size"),
    "rows of another length": (RAVELED[:, :-3], ValueError, r"X has 189 features, but .* is expecting 192 features"),
}  # fmt: skip


@pytest.mark.parametrize("case", FOR_PREDICTIONS)
def test_images_to_predict(case, fitted):
    bad, error, message = FOR_PREDICTIONS[case]
    with pytest.raises(error, match=f"(?s){message}"):
        fitted["classifier"].predict(bad)


ROWS: dict[str, tuple[Any, type, str]] = {
    "one axis": (VECTORS[0], ValueError, NOT_2D),
    "nan": (np.where(VECTORS.max() == VECTORS, NAN, VECTORS), ValueError, "Input X contains NaN"),
    "infinity": (np.where(VECTORS.max() == VECTORS, INF, VECTORS), ValueError, "Input X contains infinity"),
    "complex": (VECTORS * 1j, ValueError, "Complex data not supported"),
    "text": (np.full((12, 5), "a"), ValueError, "could not convert string to float: .*'a'"),
    "objects": (np.full((12, 5), None, dtype=object), ValueError, "Input X contains NaN"),
    "no row": (VECTORS[:0], ValueError, r"Found array with 0 sample\(s\)"),
    "no column": (VECTORS[:, :0], ValueError, r"0 feature\(s\)"),
    "sparse": (sparse.csr_matrix(VECTORS), TypeError, r"Sparse data was passed for X.*toarray"),
}


@pytest.mark.parametrize("case", ROWS)
def test_vectors(case, fitted):
    bad, error, message = ROWS[case]
    refused("classifier", lambda m: m.fit(bad, Y), error, message, backbone="auto")
    with pytest.raises(error, match=message if case != "no column" else "0 feature|expecting 5 features"):
        fitted["vectors"].predict(bad)


# ------------------------------------------------------------------------------------------------- y and weights

NOT_LABELS = r"Unknown label type"
NOT_INDICATORS = r"y with several columns must hold 0 and 1, for labels that are there or not; got "
OF_ANY_KIND: dict[str, tuple[Any, type, str]] = {
    "None": (None, ValueError, "requires y to be passed, but the target y is None"),
    "shorter": (NUMBERS[:5].astype(int), ValueError, r"inconsistent numbers of samples: \[12, 5\]"),
    "longer": (np.arange(24) % 2, ValueError, r"inconsistent numbers of samples: \[12, 24\]"),
    "empty": ([], ValueError, r"Found array with 0 sample\(s\)"),
    "nan": (np.append(NUMBERS[1:], NAN), ValueError, "Input y contains NaN"),
    "infinity": (np.append(NUMBERS[1:], INF), ValueError, "Input y contains infinity"),
    "a number": (3, TypeError, "got scalar"),
    "text": ("abc", TypeError, "got scalar"),
    "a dict": ({1: 2}, TypeError, "got scalar"),
    "complex": (NUMBERS * 1j, ValueError, "Complex data not supported"),
    "three axes": (np.zeros((12, 2, 2)), ValueError, "dim 3"),
    "no column": (np.zeros((12, 0)), ValueError, r"0 feature\(s\)"),
}
OF_CLASSES: dict[str, tuple[Any, type, str]] = {
    **OF_ANY_KIND,
    "one class": (np.repeat("ant", 12), ValueError,
        r"at least 2 classes, but the data contains only one class: .*'ant'"),
    "fractions": (NUMBERS / 7, ValueError, NOT_LABELS + ".*continuous"),
    "None among labels": (objects(None, *Y[1:]), ValueError, NOT_LABELS),
    "mixed types": (objects(*[1, "a"] * 6), ValueError, NOT_LABELS),
    "sets": ([{1}, {2}] * 6, ValueError, NOT_LABELS),
    "columns of text": (np.c_[Y, Y], ValueError, NOT_INDICATORS),
    "columns of classes": (LABELS + np.arange(3), ValueError, NOT_INDICATORS),
    "columns of fractions": (LABELS / 3, ValueError, f"{NOT_INDICATORS}|{NOT_LABELS}"),
}  # fmt: skip
OF_NUMBERS: dict[str, tuple[Any, type, str]] = {
    **OF_ANY_KIND,
    "labels": (Y, ValueError, "could not convert string to float: .*'ant'"),
    "objects": (objects(*[1, "a"] * 6), ValueError, "could not convert string to float: 'a'"),
    "sets": ([{1}, {2}] * 6, TypeError, "must be a string or a real number, not 'set'"),
    "sparse": (sparse.csr_matrix(LABELS), TypeError, r"y is sparse \(csr_matrix\).*pass y\.toarray\(\)"),
    "nan in a column": (np.c_[NUMBERS, np.append(NUMBERS[1:], NAN)], ValueError, "Input y contains NaN"),
}
Y_CASES = {
    **{f"classifier-{name}": ("classifier", *case) for name, case in OF_CLASSES.items()},
    **{f"regressor-{name}": ("regressor", *case) for name, case in OF_NUMBERS.items()},
}


@pytest.mark.parametrize("case", Y_CASES)
def test_targets(case):
    kind, bad, error, message = Y_CASES[case]
    refused(kind, lambda m: m.fit(X, bad), error, message)


def test_too_few_rows():
    for kind, y in (("classifier", Y), ("regressor", NUMBERS), ("cv", Y)):
        refused(kind, lambda m, y=y: m.fit(X[:1], y[:1]), ValueError, "n_samples=1|only one class")


WEIGHTS: dict[str, tuple[Any, type, str]] = {
    "shorter": (np.ones(3), ValueError, r"sample_weight\.shape == \(3,\), expected \(12,\)"),
    "two axes": (np.ones((12, 1)), ValueError, "must be 1D array or scalar"),
    "negative": (-np.ones(12), ValueError, "Negative values in data passed to .sample_weight"),
    "one negative": (np.append(np.ones(11), -1e-9), ValueError, "Negative values in data passed to .sample_weight"),
    "all zero": (np.zeros(12), ValueError, "Sample weights (are all zero|must contain at least one non-zero)"),
    "nan": (np.append(np.ones(11), NAN), ValueError, "Input sample_weight contains NaN"),
    "infinity": (np.append(np.ones(11), INF), ValueError, "Input sample_weight contains infinity"),
    "None among them": ([None] * 12, ValueError, "Input sample_weight contains NaN"),
    "a word": ("balanced", ValueError, "could not convert string to float: 'balanced'"),
    "text": (["a"] * 12, ValueError, "could not convert string to float: .*'a'"),
    "a dict": ({}, TypeError, "not 'dict'"),
    "complex": (np.ones(12) * 1j, ValueError, "Complex data not supported"),
    "one row left": (np.eye(12)[0], ValueError,
        r"One row with a positive weight is not enough \(n_samples=12\): give at least 2"),
    "huge": (np.full(12, 1e30), ValueError, r"must be 0 or from 1e-12 to 1e\+12, got 1e\+30 to 1e\+30: multiply all"),
    "one huge": (np.append(np.ones(11), 1e300), ValueError, r"must be 0 or from 1e-12 to 1e\+12, got 1 to 1e\+300"),
    "tiny": (np.full(12, 1e-320), ValueError, r"must be 0 or from 1e-12 to 1e\+12, got 9\.99.*e-321"),
}  # fmt: skip


@pytest.mark.parametrize("case", WEIGHTS)
def test_weights(case):
    bad, error, message = WEIGHTS[case]
    for kind in ESTIMATORS:
        refused(kind, lambda m, kind=kind: m.fit(X, targets(kind), bad), error, message)


# ------------------------------------------------------------------------------------------------------ networks


def with_layers(*layers: nn.Module) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return nn.Sequential(*layers).eval()


def tied() -> nn.Module:
    net = with_layers(nn.Conv2d(3, 3, 3, padding=1), nn.Conv2d(3, 3, 3, padding=1))
    net[1].weight = net[0].weight
    return with_layers(*net, nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2))


class OfSize32(TinyNet):
    def forward(self, x):
        torch._assert(x.shape[-1] == 32, "needs 32 pixels")
        return super().forward(x)


class NotCopied(TinyNet):
    def __deepcopy__(self, memo):
        raise RuntimeError("holds a lock")


def altered(value: float) -> nn.Module:
    net = tiny_net(width=4)
    with torch.no_grad():
        net.block2[0].weight.fill_(value)
    return net


def quietly(kind: type) -> nn.Module:
    with torch.random.fork_rng(devices=[]):
        return kind().eval()


NETWORKS: dict[str, tuple[Callable[[], nn.Module], str]] = {
    "no Linear": (lambda: with_layers(nn.Conv2d(3, 2, 3), nn.Flatten(), nn.Tanh()), "Linear"),
    "no layer": (lambda: nn.Identity(),
        r"must return one tensor of shape \(batch, classes\); it returns .*\(2, 3, 8, 8\)"),
    "not one vector": (lambda: with_layers(nn.Conv2d(3, 2, 3), nn.Linear(6, 2)),
        r"must return one tensor of shape \(batch, classes\); it returns .*\(2, 2, 6, 2\)"),
    "tied weights": (tied, r"are tied \(one tensor\).*untie them, or choose tangent_layers"),
    "another size": (lambda: quietly(OfSize32),
        r"cannot be evaluated on .*\(3, 8, 8\).*needs 32 pixels.*set image_size"),
    "no copy": (lambda: quietly(NotCopied), r"NotCopied cannot be copied \(RuntimeError: holds a lock\)"),
    "nan": (lambda: altered(NAN), r"not finite.*check its weights"),
    "infinite": (lambda: altered(INF), r"not finite.*check its weights"),
    "overflow": (lambda: altered(1e38), r"not (all )?finite.*check its weights and preprocessing"),
}  # fmt: skip


@pytest.mark.parametrize("case", NETWORKS)
def test_networks(case):
    net, message = NETWORKS[case]
    options = {"tangents": "both", "tangent_layers": "all", "prior": "equal" if case == "overflow" else "evidence"}
    refused("classifier", lambda m: m.fit(X, Y), ValueError, message, backbone=net(), **options)


# ------------------------------------------------------------------------------------------------------- methods

# Estimator, call, the exception and its message.
CALLS: dict[str, tuple[str, Callable[[Any], Any], type, str]] = {
    "images for a model of vectors": ("vectors", lambda m: m.predict(X), ValueError, "fitted on vectors"),
    "other columns": ("vectors", lambda m: m.predict(VECTORS[:, :3]), ValueError, "3 features, but .* expecting 5"),
    "other names": ("raveled", lambda m: m.predict(frame("q")), ValueError, "feature names should match"),
    "fewer pixels": ("raveled", lambda m: m.predict(frame("p").iloc[:, :-1]), ValueError, "missing"),
    "unknown class": ("classifier", lambda m: m.leave_one_out(X, np.append(Y[1:], "yak")), ValueError,
        "not among the classes.*yak"),
    "unknown class to explain": ("classifier", lambda m: m.influence(X, Y, X[:1], ["yak"]), ValueError,
        "y_test has labels .* not among the classes.*yak"),
    "length to explain": ("classifier", lambda m: m.influence(X, Y, X[:2], Y[:1]), ValueError, "inconsistent"),
    "columns of labels": ("labels", lambda m: m.leave_one_out(X, LABELS[:, :2]), ValueError,
        r"\(12, 2\), but the model has 3 labels"),
    "classes for labels": ("labels", lambda m: m.leave_one_out(X, LABELS[:, 0]), ValueError, "3 labels for each image"),
    "labels for classes": ("classifier", lambda m: m.leave_one_out(X, LABELS), ValueError, "one class for each image"),
    "columns of targets": ("targets", lambda m: m.leave_one_out(X, NUMBERS), ValueError,
        "1 targets, but the model was fitted on 2"),
    "score of other length": ("classifier", lambda m: m.score(X, Y[:5]), ValueError, "inconsistent"),
    "a class that is added": ("stored", lambda m: m.partial_fit(X[:2], ["ant", "yak"]), ValueError,
        "not among the classes.*yak"),
    "images of another size": ("stored", lambda m: m.partial_fit(X[:2, :4], Y[:2]), ValueError,
        r"size \(4, 8\).*\(8, 8\)"),
    "added without labels": ("stored", lambda m: m.partial_fit(X[:2], None), (ValueError, TypeError), "y|scalar|None"),
    "other classes than before": ("stored", lambda m: m.partial_fit(X[:2], Y[:2], classes=["ant", "bee"]),
        ValueError, "not the same as in the calls before"),
    "an unknown parameter": ("stored", lambda m: m.set_params(alfa=1), ValueError, "Invalid parameter 'alfa'"),
}  # fmt: skip


@pytest.mark.parametrize("case", CALLS)
def test_calls(case, fitted):
    kind, call, error, message = CALLS[case]
    state = dict(vars(fitted[kind]))
    with pytest.raises(error, match=f"(?s){message}"):
        call(fitted[kind])
    assert vars(fitted[kind]).keys() == state.keys()
    assert all(v is state[k] for k, v in vars(fitted[kind]).items())  # nothing was set


FIRST_CALLS: dict[str, tuple[str, Callable[[Any], Any], type, str]] = {
    "first part without classes": ("classifier", lambda m: m.partial_fit(X, Y), ValueError,
        "classes must be passed on the first call"),
    "classes that lack one": ("classifier", lambda m: m.partial_fit(X, Y, classes=["ant", "bee"]), ValueError, "cow"),
    "one class in all": ("classifier", lambda m: m.partial_fit(X, Y, classes=["ant"]), ValueError,
        "at least 2 classes"),
    "flipped vectors": ("classifier", lambda m: m.set_params(views="flip", backbone="auto").fit(VECTORS, Y),
        ValueError, "'flip', which mirrors images.*set image_shape"),
    "network for images": ("classifier", lambda m: m.set_params(backbone="resnet18").fit(VECTORS, Y), ValueError,
        "takes images, but X holds vectors of 5 features"),
    "weights of classes and labels": ("classifier", lambda m: m.set_params(class_weight="balanced").fit(X, LABELS),
        ValueError, "not supported with several labels.*use sample_weight"),
    "no process group": ("classifier", lambda m: m.set_params(execution={"distributed": True}).fit(X, Y),
        (ValueError, RuntimeError), "torchrun|process group"),
}  # fmt: skip


@pytest.mark.parametrize("case", FIRST_CALLS)
def test_first_calls(case):
    kind, call, error, message = FIRST_CALLS[case]
    refused(kind, call, error, message, store_data=True)


UNFITTED: dict[str, Callable[[Any], Any]] = {
    "predict": lambda m: m.predict(X),
    "predict_proba": lambda m: m.predict_proba(X),
    "predict_log_proba": lambda m: m.predict_log_proba(X),
    "decision_function": lambda m: m.decision_function(X),
    "score": lambda m: m.score(X, Y),
    "features": lambda m: m.features(X),
    "to_module": lambda m: m.to_module(),
    "leave_one_out": lambda m: m.leave_one_out(X, Y),
    "influence": lambda m: m.influence(X, Y, X),
    "forget": lambda m: m.forget(0),
}


@pytest.mark.parametrize("kind", ESTIMATORS)
@pytest.mark.parametrize("method", UNFITTED)
def test_not_fitted(method, kind):
    if hasattr(ESTIMATORS[kind], method) or method == "forget":
        refused(kind, UNFITTED[method], NotFittedError, "not fitted yet", store_data=True)
