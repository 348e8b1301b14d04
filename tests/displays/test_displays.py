"""Displays: what is drawn, where, and what is refused."""

import doctest
import sys

import matplotlib.pyplot as plt
import numpy as np
import pandas as pd
import pytest
from numpy.testing import assert_allclose, assert_array_equal
from PIL import Image
from scipy.sparse import csr_matrix
from sklearn.dummy import DummyClassifier
from sklearn.exceptions import NotFittedError
from sklearn.experimental import enable_halving_search_cv  # noqa: F401, makes HalvingGridSearchCV importable
from sklearn.linear_model import Ridge
from sklearn.model_selection import GridSearchCV, HalvingGridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from support.data import make_images, tiny_net
from support.images import Pairs, as_files, as_pil

from sklearn_lqf import (
    ConvergenceDisplay,
    InfluenceDisplay,
    LQFClassifier,
    LQFRegressor,
    PriorDisplay,
    RegularizationPathDisplay,
)

X, Y = make_images(15)
NEW_X, NEW_Y = make_images(3, seed=1)
DISPLAYS = [ConvergenceDisplay, InfluenceDisplay, PriorDisplay, RegularizationPathDisplay]


@pytest.fixture(autouse=True)
def closed():
    yield
    plt.close("all")


@pytest.fixture(scope="module")
def clf():
    return LQFClassifier(tiny_net(), solver="pcg", tol=1e-6).fit(X, Y)


def texts(legend) -> list[str]:
    return [text.get_text() for text in legend.get_texts()]


# ------------------------------------------------------------------------------------------------------- convergence


def test_convergence(clf):
    display = ConvergenceDisplay.from_estimator(clf, color="tab:green")
    assert_array_equal(display.line_.get_ydata(), clf.residual_norms_)
    assert_array_equal(display.line_.get_xdata(), np.arange(clf.n_iter_ + 1))
    assert_array_equal(display.tol_line_.get_ydata(), [1e-6, 1e-6])
    assert display.line_.get_color() == "tab:green"
    assert display.figure_ is display.ax_.figure
    assert display.ax_.get_yscale() == "log"
    assert texts(display.ax_.get_legend()) == ["LQFClassifier", "tol = 1e-06"]
    with pytest.raises(ValueError, match="closed form"):
        ConvergenceDisplay.from_estimator(LQFClassifier(tiny_net()).fit(X, Y))


def test_solvers_are_compared_on_one_axes():
    _, ax = plt.subplots()
    one = ConvergenceDisplay(residual_norms=[1, 0.1], tol=1e-6, estimator_name="one").plot(ax)
    two = ConvergenceDisplay(residual_norms=[1, 0.2], tol=1e-6).plot(ax, name="two")
    three = ConvergenceDisplay(residual_norms=[1, 0.3], tol=1e-2).plot(ax)
    none = ConvergenceDisplay(residual_norms=[1, 0.3], tol=0.0).plot(ax)
    assert one.ax_ is two.ax_ is three.ax_ is ax
    assert one.tol_line_ is two.tol_line_ is not three.tol_line_
    assert none.tol_line_ is None
    assert len({d.line_.get_color() for d in (one, two, three)}) == 3
    assert texts(ax.get_legend()) == ["one", "tol = 1e-06", "two", "tol = 0.01"]
    assert ConvergenceDisplay(residual_norms=[1, 0.1]).plot().ax_.get_legend() is None


# ------------------------------------------------------------------------------------------------------------- prior


def test_prior_is_drawn_over_the_depth(clf):
    display = PriorDisplay.from_estimator(clf, linewidth=2)
    ax = display.ax_
    assert display.prior is clf.prior_ and display.figure_ is ax.figure
    assert [label.get_text() for label in ax.get_yticklabels()] == ["block1.1", "block2.1", "last"]
    assert ax.yaxis_inverted()  # the first stage at the top
    drawn, ends = {}, {}
    for kind, bars in display.bars_.items():
        for bar in bars:
            row = round(bar.get_y() + bar.get_height() / 2)
            drawn[("block1.1", "block2.1", "last")[row], kind] = bar.get_width()
            assert bar.get_x() == pytest.approx(ends.get(row, 0.0))  # bars of a stage do not overlap
            ends[row] = bar.get_x() + bar.get_width()
            assert bar.get_linewidth() == 2
    assert sum(ends.values()) == pytest.approx(1)
    expected = {(name.rpartition(" ")[0] or "last", name.rpartition(" ")[2]): v for name, v in clf.prior_.items()}
    assert drawn == pytest.approx(expected)
    assert ax.get_title() == "LQFClassifier"
    assert texts(ax.get_legend()) == ["last features", "local tangents", "deviations"]


def test_bars_are_under_no_legend_and_within_the_axes():
    prior = {"a tangents": 0.3, "a deviation": 0.3, "b deviation": 0.1, "b directions": 0.2, "last": 0.1}
    display = PriorDisplay(prior=prior).plot(name="one")
    display.figure_.canvas.draw()
    ax, legend = display.ax_, display.ax_.get_legend().get_window_extent()
    assert not legend.overlaps(ax.title.get_window_extent())
    for bars in display.bars_.values():
        assert not any(legend.overlaps(bar.get_window_extent()) for bar in bars)
    assert ax.get_xlim()[1] > 0.6
    other = PriorDisplay(prior={"last": 1.0}).plot(ax, color="k")
    assert other.ax_ is ax and ax.yaxis_inverted()


def test_what_is_no_prior_of_groups():
    with pytest.raises(ValueError, match=r"'a mode'.*'tangents'"):
        PriorDisplay(prior={"a mode": 1.0}).plot()
    with pytest.raises(ValueError, match="model='paper'"):
        PriorDisplay.from_estimator(LQFClassifier(tiny_net(), model="paper", tangent_layers="head").fit(X, Y))


# --------------------------------------------------------------------------------------------------------- influence


def shown(display: InfluenceDisplay) -> list[np.ndarray]:
    return [np.asarray(drawn.get_array()) for drawn in display.images_]


def test_influence_on_the_loss(clf):
    display = InfluenceDisplay.from_estimator(clf, X, Y, NEW_X[0], NEW_Y[0], n_images=2)
    effect = clf.influence(X, Y, NEW_X[:1], NEW_Y[:1])[0]
    order = np.argsort(-effect)
    expected = [order[0], order[1], order[-1], order[-2]]
    assert effect[expected[1]] > 0 > effect[expected[3]]
    assert_array_equal(display.indices, expected)
    assert_array_equal(display.effect, effect[expected])
    assert_array_equal(display.labels, Y[expected])
    assert (display.label, display.predicted) == (NEW_Y[0], clf.predict(NEW_X[:1])[0])
    for found, image in zip(shown(display), [NEW_X[0], *X[expected]], strict=True):
        assert_allclose(found, image / 255, atol=1e-6)
    assert display.axes_.shape == (2, 2)
    titles = [ax.get_title() for ax in display.axes_.flat]
    assert titles == [f"{Y[i]}\n{effect[i]:+.2g}" for i in expected]
    assert display.ax_.get_title() == f"predicted {display.predicted}\nlabel {NEW_Y[0]}"
    assert [ax.get_ylabel().split(":")[0] for ax in display.axes_[:, 0]] == ["helps", "harms"]
    blue, red = (plt.matplotlib.colors.to_rgba(name) for name in ("tab:blue", "tab:red"))
    assert [ax.spines["left"].get_edgecolor() for ax in display.axes_.flat] == [blue, blue, red, red]


def test_influence_on_the_output(clf):
    weights = np.r_[np.zeros(3), np.ones(12)]  # rows without one have no effect and are not drawn
    weighted = LQFClassifier(tiny_net()).fit(X, Y, weights)
    display = InfluenceDisplay.from_estimator(weighted, X, Y, NEW_X[0], sample_weight=weights, n_images=15)
    assert sorted(display.indices) == list(range(3, 15)) and len(display.images_) == 13
    display = InfluenceDisplay.from_estimator(clf, X, Y, NEW_X[:1], n_images=2, colors=("g", "k"))
    order = np.argsort(clf.influence(X, Y, NEW_X[:1])[0])
    assert_array_equal(display.indices, [*order[:2], *order[:-3:-1]])
    assert display.label is None
    assert display.ax_.get_title() == f"predicted {display.predicted}"
    assert [ax.get_ylabel().split(":")[0] for ax in display.axes_[:, 0]] == ["raises it", "lowers it"]


def test_fewer_images_on_one_side():
    images = np.zeros((3, 4, 4), dtype=np.uint8) + np.array([10, 20, 30], dtype=np.uint8)[:, None, None]
    options = {"image": images[0], "images": images, "labels": [1.23456, 2.0, 3.0], "predicted": 0.5}
    display = InfluenceDisplay(label=None, effect=[0.1, -1e-5, 0.2], **options).plot()
    titles = [[ax and ax.get_title() for ax in row] for row in display.axes_]
    assert titles == [["2\n-1e-05", None], ["3\n+0.2", "1.23\n+0.1"]]
    assert [image.get_clim() for image in display.images_] == [(0, 255)] * 4
    nothing = InfluenceDisplay(label=0.5, effect=[0.0, 0.0, 0.0], **options).plot()
    assert len(nothing.images_) == 1


def test_axes_are_divided(clf):
    figure, axes = plt.subplots(1, 2)
    display = InfluenceDisplay.from_estimator(clf, X, Y, NEW_X[0], NEW_Y[0], ax=axes[1], n_images=1)
    assert display.figure_ is figure
    assert not axes[1].axison and axes[0].axison
    assert display.ax_.get_subplotspec().get_topmost_subplotspec() == axes[1].get_subplotspec()
    with pytest.raises(ValueError, match=r"plt\.subplots"):
        display.plot(figure.add_axes((0, 0, 1, 1)))


GRAY = X[..., 0]


@pytest.mark.parametrize("form", ["floats", "table", "channels first", "paths", "data set"])
def test_images_in_every_form(form, tmp_path):
    parameters = {"table": {"image_shape": (12, 12)}, "channels first": {"channel_axis": 0}}
    rows = {
        "floats": X.astype(np.float32) / np.float32(255),
        "table": pd.DataFrame(GRAY.reshape(len(X), -1)).rename(columns=str).astype("UInt8"),
        "channels first": X.transpose(0, 3, 1, 2),
        "paths": pd.Series(list(map(str, as_files(X, tmp_path))), index=range(100, 115)),
        "data set": Pairs(as_pil(X)),  # with labels, and without slices
    }[form]
    clf = LQFClassifier(tiny_net(), prior="equal", alpha=0.1, **parameters.get(form, {})).fit(rows, Y)
    taken = rows.iloc if hasattr(rows, "iloc") else as_pil(X) if form == "data set" else rows
    expected = GRAY if form == "table" else X
    for x_test in (taken[2], taken[2:3]):
        display = InfluenceDisplay.from_estimator(clf, rows, Y, x_test, Y[2], n_images=1)
        for found, image in zip(shown(display), expected[[2, *display.indices]], strict=True):
            assert_allclose(found, image / 255, atol=1e-6)


def test_mixed_and_large_images_and_many_channels():
    rows = [Image.fromarray(X[0]).resize((1040, 520)), *X[1:]]
    clf = LQFClassifier(tiny_net(), image_size=12).fit(rows, Y)
    display = InfluenceDisplay.from_estimator(clf, rows, Y, rows[0], n_images=2)
    expected = [(12, 12, 3) if i else (256, 512, 3) for i in [0, *display.indices]]
    assert [image.shape for image in shown(display)] == expected
    five = np.concatenate([X, X[..., :2]], 3)  # other numbers of channels are averaged
    clf = LQFClassifier(tiny_net(channels=5), preprocessing={"mean": 0.5, "std": 0.5}).fit(five, Y)
    display = InfluenceDisplay.from_estimator(clf, five, Y, five[0], n_images=1)
    assert_allclose(shown(display)[0], five[0].mean(2) / 255, atol=1e-6)


def test_several_targets_and_labels():
    labels = csr_matrix(np.c_[Y == "ant", Y != "bee"] * 1)
    several = LQFClassifier(tiny_net(), prior="equal").fit(X, labels)
    display = InfluenceDisplay.from_estimator(several, X, labels, X[0], [1, 1], n_images=1)
    assert_array_equal(display.labels, labels.toarray()[display.indices])
    targets = np.c_[X.mean((1, 2, 3)), X.std((1, 2, 3))]
    reg = LQFRegressor(tiny_net()).fit(X, targets)
    display = InfluenceDisplay.from_estimator(reg, X, targets, X[0], targets[0], n_images=1)
    assert display.ax_.get_title().endswith(f"label {targets[0, 0]:.3g}, {targets[0, 1]:.3g}")
    with pytest.raises(ValueError, match="give y_test"):
        InfluenceDisplay.from_estimator(reg, X, targets, X[0])


def test_what_is_no_single_image(clf):
    gray = LQFClassifier(tiny_net(), image_shape=(12, 12)).fit(GRAY, Y)
    for x_test in (NEW_X, list(NEW_X), GRAY.reshape(len(X), -1), np.zeros(5)):
        with pytest.raises(ValueError, match=r"must be one image.*of (shape|length)"):
            InfluenceDisplay.from_estimator(gray, GRAY, Y, x_test)
    for n_images in (0, 1.5, True):
        with pytest.raises(ValueError, match="n_images"):
            InfluenceDisplay.from_estimator(clf, X, Y, NEW_X[0], n_images=n_images)
    table = X.reshape(len(X), -1)[:, :6] / 255
    with pytest.raises(ValueError, match="fitted on vectors"):
        InfluenceDisplay.from_estimator(LQFClassifier().fit(table, Y), table, Y, table[0])


# ----------------------------------------------------------------------------------------------------------- penalty


def searched(**results) -> DummyClassifier:
    """What a search by its own class leaves behind."""
    estimator = DummyClassifier().fit(X, Y)
    estimator.best_alpha_, scores = 1.0, np.array([0.5, 0.7, 0.9])
    estimator.cv_results_ = {"alpha": np.array([10.0, 0.1, 1.0]), "mean_test_score": scores, **results}
    return estimator


def test_path():
    estimator = searched(std_test_score=np.array([0.1, 0.2, 0.1]))
    display = RegularizationPathDisplay.from_estimator(estimator, name="LQF", linestyle=":")
    assert_array_equal(display.line_.get_xdata(), [0.1, 1, 10])
    assert_array_equal(display.line_.get_ydata(), [0.7, 0.9, 0.5])
    (band,) = display.fill_between_.get_paths()
    assert_allclose([band.vertices[:, 1].min(), band.vertices[:, 1].max()], [0.4, 1.0])
    assert_allclose(display.best_.get_xydata(), [[1, 0.9]])
    assert display.line_.get_linestyle() == ":"
    assert (display.ax_.get_xscale(), display.ax_.get_ylabel()) == ("log", "Accuracy")
    assert texts(display.ax_.get_legend()) == ["LQF", "chosen: alpha = 1"]
    assert display.figure_ is display.ax_.figure
    other = RegularizationPathDisplay.from_estimator(searched(), score_name="Share", ax=display.ax_)
    assert other.ax_ is display.ax_ and other.ax_.get_ylabel() == "Share"
    twin = RegularizationPathDisplay(alphas=[1, 2], scores=[0, 1]).plot(display.ax_)
    assert twin.ax_ is display.ax_
    assert twin.fill_between_ is None and twin.best_ is None
    display = RegularizationPathDisplay.from_estimator(searched())  # as of leave-one-out
    assert display.fill_between_ is None
    assert display.ax_.get_ylabel() == "Negative squared error"


def ridge_search(grid, kind=GridSearchCV, estimator=None, **options):
    table = X.reshape(len(X), -1) / 255
    search = kind(Ridge() if estimator is None else estimator, grid, cv=3, **options)
    return search.fit(table, table[:, 0] + np.arange(len(X)) % 3)


def test_path_of_a_grid_search():
    grid = {"alpha": [1.0, 0.01, "auto"]}
    search = GridSearchCV(LQFClassifier(tiny_net()), grid, cv=2, scoring="neg_log_loss").fit(X, Y)
    display = RegularizationPathDisplay.from_estimator(search)
    assert_array_equal(display.line_.get_xdata(), [0.01, 1])
    assert_array_equal(display.line_.get_ydata(), search.cv_results_["mean_test_score"][[1, 0]])
    assert_array_equal(display.scores_std, search.cv_results_["std_test_score"][:2])
    assert display.ax_.get_ylabel() == "Negative log loss"
    best = search.best_params_["alpha"]
    assert display.best_alpha == (None if best == "auto" else best)


def test_successive_halving_has_one_score_of_each_penalty():
    search = ridge_search({"alpha": [1, 10, 100, 1000]}, HalvingGridSearchCV, factor=2, min_resources=7)
    display = RegularizationPathDisplay.from_estimator(search)
    assert len(search.cv_results_["params"]) == 6  # of which two are on more rows
    assert_array_equal(display.line_.get_xdata(), [1, 10, 100, 1000])
    assert_allclose(display.best_.get_xydata(), [[search.best_params_["alpha"], search.best_score_]])


def test_other_parameters_are_held_at_the_best():
    grid = {"ridge__alpha": [1, 10], "ridge__fit_intercept": [True, False]}
    search = ridge_search(grid, estimator=make_pipeline(StandardScaler(), Ridge()))
    display = RegularizationPathDisplay.from_estimator(search)
    best = search.best_params_
    kept = [p["ridge__fit_intercept"] == best["ridge__fit_intercept"] for p in search.cv_results_["params"]]
    assert_array_equal(display.alphas, [1, 10])
    assert_array_equal(display.scores, search.cv_results_["mean_test_score"][kept])
    assert display.best_alpha == best["ridge__alpha"]
    several = {"scoring": ["r2", "neg_mean_squared_error"]}
    search = ridge_search({"alpha": [1, 10]}, refit="r2", **several)
    display = RegularizationPathDisplay.from_estimator(search)
    assert_array_equal(display.scores, search.cv_results_["mean_test_r2"])
    assert display.ax_.get_ylabel() == "R2"
    for grid, options, message in (
        ({"alpha": [1, 10]}, {"refit": False, **several}, "set refit"),
        ({"fit_intercept": [True]}, {}, r"one parameter alpha, found \[\]"),
        ({"alpha": [np.ones(1)]}, {}, "number"),
    ):
        with pytest.raises(ValueError, match=message):
            RegularizationPathDisplay.from_estimator(ridge_search(grid, **options))


# -------------------------------------------------------------------------------------------------------- all of them


def arguments(display) -> tuple:
    return (X, Y, NEW_X[0]) if display is InfluenceDisplay else ()


@pytest.mark.parametrize("display", DISPLAYS)
def test_unfitted_and_other_estimators_are_refused(display):
    with pytest.raises(NotFittedError):
        display.from_estimator(LQFClassifier(), *arguments(display))
    with pytest.raises(TypeError, match=rf"{display.__name__} needs .* Ridge has no"):
        display.from_estimator(Ridge().fit(X.reshape(15, -1), np.arange(15)), *arguments(display))


@pytest.mark.parametrize("display", DISPLAYS)
def test_missing_matplotlib_is_named(display, clf, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    monkeypatch.setitem(sys.modules, "matplotlib.pyplot", None)
    with pytest.raises(ImportError, match=rf"{display.__name__}\.from_estimator needs matplotlib.*extra 'plot'"):
        display.from_estimator(clf, *arguments(display))
    names = list(display.__init__.__annotations__)
    with pytest.raises(ImportError, match=rf"{display.__name__}\.plot needs matplotlib.*sklearn-lqf\[plot\]"):
        display(**{name: None for name in names if name != "return"}).plot()


@pytest.mark.parametrize("display", DISPLAYS)
def test_examples_in_docstrings(display):
    found = doctest.testmod(sys.modules[display.__module__])
    assert found.attempted and not found.failed
