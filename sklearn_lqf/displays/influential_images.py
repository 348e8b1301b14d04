"""Display of the training images that support or oppose a prediction.

Hides how images in all forms of ``X`` become pixels to be drawn; they are read as the estimator reads them.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
from PIL import Image
from torch.utils.data import Subset

from ..images.reading import ImageInputs, is_image_input
from ..images.sources import is_dataset, plain_frame
from .figures import check_estimator, pyplot

__all__ = ["InfluenceDisplay"]

_SHOWN_MAX = 512  # pixels of the longer side of an image that is drawn; larger ones are made smaller
_HELPFUL, _HARMFUL = "tab:blue", "tab:red"  # color-blind readers can tell them apart


class InfluenceDisplay:
    """One image, the training images that help its prediction most, and those that harm it most.

    If the label of the image is not given, the training images are those that raise the output of the predicted class
    most, and those that lower it most.

    It is recommended to use `from_estimator` to create a display. All parameters are stored as attributes. Images have
    a form that matplotlib's ``imshow`` takes: (H, W) or (H, W, 3), uint8 in 0..255 or floats in 0..1.

    Parameters
    ----------
    image : array-like of shape (H, W) or (H, W, 3)
        The image to be explained.
    label : object
        Label or target of ``image``, or None. It decides what ``effect`` is, as in ``influence``.
    predicted : object
        Predicted label or target of ``image``.
    effect : array-like of shape (k,)
        Effect of leaving out each of k training images. With a ``label`` it is the change of the squared loss of
        ``image``, positive where the training image helps. Without it is the change of the output of the predicted
        class (of a regressor: of the output), negative where the training image raises that output. Images whose
        effect is 0 are not drawn.
    images : sequence of k arrays
        The training images.
    labels : array-like of shape (k,)
        Labels or targets of the training images.
    indices : array-like of shape (k,), default=None
        Rows of the training images in X.

    Attributes
    ----------
    images_ : list of matplotlib AxesImage
        ``image``, then the helpful images, most helpful first, then the harmful images, most harmful first.
    axes_ : ndarray of shape (2, columns)
        Axes of the helpful images in the first row, of the harmful ones in the second; None where there is no image.
    ax_ : matplotlib Axes
        Axes of ``image``.
    figure_ : matplotlib Figure
        Figure with all of them.

    See Also
    --------
    InfluenceDisplay.from_estimator : Explain a prediction of a fitted estimator.

    Examples
    --------
    >>> import numpy as np
    >>> from sklearn_lqf import InfluenceDisplay
    >>> images = np.random.default_rng(0).uniform(size=(4, 8, 8))
    >>> display = InfluenceDisplay(
    ...     image=images[0], label="cat", predicted="cat", effect=[0.2, -0.1, 0.1], images=images[1:],
    ...     labels=["cat", "dog", "cat"],
    ... ).plot()
    >>> [ax.get_title() for ax in display.axes_[0]]
    ['cat\\n+0.2', 'cat\\n+0.1']
    """

    def __init__(
        self,
        *,
        image: Any,
        label: Any,
        predicted: Any,
        effect: Any,
        images: Sequence[Any],
        labels: Any,
        indices: Any = None,
    ):
        self.image = image
        self.label = label
        self.predicted = predicted
        self.effect = effect
        self.images = images
        self.labels = labels
        self.indices = indices

    def plot(
        self, ax: Any = None, *, colors: Sequence[Any] = (_HELPFUL, _HARMFUL), **imshow_kw: Any
    ) -> InfluenceDisplay:
        """Draw the images.

        Parameters
        ----------
        ax : matplotlib Axes, default=None
            Axes of a grid, as from ``plt.subplots``. The images are drawn in its place, and it is turned off. None: a
            new figure.
        colors : pair of colors, default=("tab:blue", "tab:red")
            Colors of the frames of helpful and of harmful images.
        **imshow_kw : dict
            Passed to matplotlib's ``imshow``, such as ``cmap`` for grayscale images.

        Returns
        -------
        display : InfluenceDisplay
            The display itself.

        Raises
        ------
        ValueError
            ``ax`` is not one of a grid.
        ImportError
            matplotlib is not installed.
        """
        plt = pyplot("InfluenceDisplay.plot")
        rows = _by_effect(self.effect, self.label, len(self.images))
        columns = max(1, *map(len, rows))
        if ax is None:
            figure = plt.figure(figsize=(2.4 + 1.3 * columns, 3.6), layout="constrained")
            grid = figure.add_gridspec(2, columns + 2)
        else:
            place = ax.get_subplotspec()
            if place is None:
                raise ValueError("ax must be one of a grid, as from plt.subplots, since its place is divided.")
            ax.set_axis_off()
            figure, grid = ax.figure, place.subgridspec(2, columns + 2)
        self.ax_, self.figure_ = figure.add_subplot(grid[:, :2]), figure
        title = f"predicted {_short(self.predicted)}" + ("" if self.label is None else f"\nlabel {_short(self.label)}")
        self.images_ = [_show(self.ax_, self.image, title, "black", imshow_kw)]
        self.axes_ = np.full((2, columns), None)
        for row, color in enumerate(colors):
            for column, i in enumerate(rows[row]):
                ax = self.axes_[row, column] = figure.add_subplot(grid[row, 2 + column])
                title = f"{_short(self.labels[i])}\n{self.effect[i]:+.2g}"
                self.images_.append(_show(ax, self.images[i], title, color, imshow_kw))
            if len(rows[row]):
                self.axes_[row, 0].set_ylabel(self._meaning(row), color=color, fontsize="small")
        return self

    def _meaning(self, row: int) -> str:
        """What the effects of a row mean."""
        if self.label is None:
            return ("raises it:\noutput falls without", "lowers it:\noutput rises without")[row]
        return ("helps:\nloss rises without", "harms:\nloss falls without")[row]

    @classmethod
    def from_estimator(
        cls,
        estimator: Any,
        X: Any,
        y: Any,
        x_test: Any,
        y_test: Any = None,
        *,
        sample_weight: Any = None,
        n_images: int = 4,
        ax: Any = None,
        colors: Sequence[Any] = (_HELPFUL, _HARMFUL),
        **imshow_kw: Any,
    ) -> InfluenceDisplay:
        """Explain a prediction of a fitted estimator.

        Parameters
        ----------
        estimator : estimator instance
            An estimator with ``influence`` that was fitted on images, such as `LQFClassifier`.
        X : array-like or sequence of images
            The n images of `fit`, in any form that `fit` takes.
        y : array-like of shape (n,) or (n, n_targets)
            Labels or targets of the n images.
        x_test : image, or array-like or sequence with one image
            The image to be explained: an array, a raveled row, a path or a PIL image; or an ``X`` of one row.
        y_test : object, default=None
            Label or target of ``x_test``; the effects are then those on its squared loss. None: the effects are those
            on the output of the predicted class (of a regressor: on its output).
        sample_weight : array-like of shape (n,), default=None
            Weights of the training images in `fit`.
        n_images : int, default=4
            Largest number of helpful images, and of harmful images, that are drawn; at least 1.
        ax : matplotlib Axes, default=None
            Axes of a grid, as from ``plt.subplots``. The images are drawn in its place, and it is turned off. None: a
            new figure.
        colors : pair of colors, default=("tab:blue", "tab:red")
            Colors of the frames of helpful and of harmful images.
        **imshow_kw : dict
            Passed to matplotlib's ``imshow``, such as ``cmap`` for grayscale images.

        Returns
        -------
        display : InfluenceDisplay
            The display, drawn. It keeps only the images that are drawn.

        Raises
        ------
        TypeError
            The estimator has no ``influence``.
        ValueError
            The estimator was fitted on vectors or with ``model="paper"``, ``x_test`` is not one image, ``n_images`` is
            not at least 1, ``y_test`` is missing although there are several targets, or the training data are not those
            of `fit`.
        sklearn.exceptions.NotFittedError
            The estimator is not fitted.
        ImportError
            matplotlib is not installed.
        """
        pyplot("InfluenceDisplay.from_estimator")
        check_estimator(cls, estimator, "influence", "image_shape_")
        if estimator.image_shape_ is None:
            raise ValueError(
                f"InfluenceDisplay draws images, but this {type(estimator).__name__} was fitted on vectors: call "
                "influence for the numbers, or set image_shape if the rows of X are raveled images."
            )
        if not isinstance(n_images, Integral) or isinstance(n_images, bool) or n_images < 1:
            raise ValueError(f"n_images must be an int >= 1, got {n_images!r}.")
        if y_test is None and np.ndim(y) > 1:
            raise ValueError("Images with several targets have no single output to explain: give y_test.")
        row = _one_row(x_test, estimator.image_shape_)
        if y_test is not None and np.ndim(y_test) < np.ndim(y):
            y_test = [y_test]
        effect = estimator.influence(X, y, row, y_test, sample_weight)[0]
        label = None if y_test is None else np.asarray(y_test)[0]
        indices = np.concatenate(_by_effect(effect, label, int(n_images)))
        table, y = plain_frame(X), y.toarray() if hasattr(y, "toarray") else y
        display = cls(
            image=_pixels(row, estimator),
            label=label,
            predicted=estimator.predict(row)[0],
            effect=effect[indices],
            images=[_pixels(_row_of(table, int(i)), estimator) for i in indices],
            labels=np.asarray(y)[indices],
            indices=indices,
        )
        return display.plot(ax, colors=colors, **imshow_kw)


def _by_effect(effect: Any, label: Any, n: int) -> tuple[np.ndarray, np.ndarray]:
    """At most n most helpful, and n most harmful, each from the largest effect on."""
    help_ = np.asarray(effect) * (-1 if label is None else 1)
    order = np.argsort(-help_, kind="stable")
    return order[help_[order] > 0][:n], order[help_[order] < 0][::-1][:n]


def _row_of(X: Any, i: int) -> Any:
    """X of one row, that of this number."""
    if is_dataset(X):
        return Subset(X, [i])
    return (X.iloc if hasattr(X, "iloc") else X)[i : i + 1]


def _one_row(x: Any, image_shape: tuple[int, int, int]) -> Any:
    """X of one row, of that or of one image."""
    if isinstance(x, (str, os.PathLike, Image.Image)):
        return [x]
    if len(x) == 1:
        return x
    shape, n_features = getattr(x, "shape", ()), math.prod(image_shape)
    if tuple(shape) == (n_features,):
        return x.to_frame().T if hasattr(x, "to_frame") else x[None]  # a row of a DataFrame keeps its names
    if len(shape) in (2, 3) and shape[1:] != (n_features,):
        return [x]
    kind = f"{type(x).__name__} of " + (f"shape {tuple(shape)}" if shape else f"length {len(x)}")
    raise ValueError(f"x_test must be one image, or X with one row, got a {kind}.")


def _pixels(row: Any, estimator: Any) -> np.ndarray:
    """The image in an X of one row as it was given, (H, W) or (H, W, 3) in 0..1; a large one is made smaller."""
    h, w, channels = estimator.image_shape_
    channel_axis = estimator._image_options["channel_axis"]
    shape = (h, w, channels) if channel_axis == -1 else (channels, h, w)
    options: dict[str, Any] = {
        "image_shape": None if is_image_input(row) else shape,
        "channel_axis": channel_axis,
        "in_channels": 3 if channels == 1 else channels,  # grayscale may stand beside colors
    }
    images = ImageInputs(row, **options)
    h, w, _ = images.image_shape
    if max(h, w) > _SHOWN_MAX:
        size = tuple(max(1, side * _SHOWN_MAX // max(h, w)) for side in (h, w))
        images = ImageInputs(row, image_size=size, **options)
    pixels = images.batch(0, 1)[0].numpy()
    if (pixels == pixels[:1]).all():
        return pixels[0]
    return pixels.transpose(1, 2, 0) if len(pixels) == 3 else pixels.mean(0)


def _show(ax: Any, image: Any, title: str, color: Any, imshow_kw: Mapping[str, Any]) -> Any:
    """Draw an image with a title and a frame."""
    image = np.asarray(image)
    top = 255 if image.dtype == np.uint8 else 1
    drawn = ax.imshow(image, **{"cmap": "gray", "vmin": 0, "vmax": top, **imshow_kw})
    ax.set(xticks=[], yticks=[])
    ax.set_title(title, fontsize="small")
    for spine in ax.spines.values():
        spine.set(color=color, linewidth=3)
    return drawn


def _short(label: Any) -> str:
    """A label as text, numbers with few digits."""
    if np.ndim(label):
        return ", ".join(map(_short, label))
    return f"{label:.3g}" if isinstance(label, Real) and not isinstance(label, Integral) else str(label)
