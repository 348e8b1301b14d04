"""Data as users give them, and what a network reads of them: images or vectors in, features out."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from sklearn.utils import column_or_1d
from sklearn.utils.validation import _check_sample_weight, validate_data
from torch import Tensor

from ..backbones.loading import Backbone, fit_to_size, load_backbone
from ..engine.fitted import FeatureReader
from ..images.decoding import is_missing
from ..images.digests import Fingerprint
from ..images.reading import ImageInputs, is_image_input
from ..images.sources import first_image, image_elements, labels_of_dataset, plain_frame, rows_named
from ..io.archive import digest
from ..network.prepared import PreparedNetwork
from ..runtime.memory import Recent, with_smaller_batches
from ..runtime.tables import RowTable
from .parameters import Parameters
from .progress import Bars

__all__ = ["Inputs", "evaluate_rows", "refuse_missing", "select_rows"]


# Prepared networks that were used last: preparing takes longer than reading some dozen images.
_READERS = Recent(2)
_LEAST_SIZE = 64  # of arrays: smaller ones are enlarged, since the last stage of most networks is 32 times smaller
_WEIGHT_MAX = 1e12  # of a row; beyond, and below its inverse, sums of squares leave what float32 can hold


class Inputs(Parameters):
    """An estimator that reads rows of X, in `fit` and afterwards."""

    _model: Any

    def _read_training_rows(self, X: Any, y: Any) -> tuple[Any, Backbone]:
        """Rows of X as vectors or images, and the backbone that fits them."""
        if y is None and self.__sklearn_tags__().target_tags.required:
            raise ValueError(
                f"{type(self).__name__} requires y to be passed, but the target y is None{labels_of_dataset(X)}"
            )
        if is_image_input(X, self.image_shape):
            backbone = load_backbone(
                self.backbone,
                self.weights,
                random_state=self.random_state,
                download=self._execution.download,
                image_size=None if isinstance(self.image_size, str) else self.image_size,
            )
            preprocessing = backbone.preprocessing.override(self.preprocessing)
            self._image_options: dict[str, Any] = {
                "image_size": self._size_of_images(X, preprocessing.size, backbone.name),
                "in_channels": backbone.in_channels,
                "interpolation": preprocessing.interpolation,
                "channel_axis": self.channel_axis,
            }
            rows = self._read_images(X, self.image_shape, reset=True)
            self.image_shape_: tuple[int, int, int] | None = rows.image_shape
            self._size = rows.size
            fit_to_size(backbone, rows.size)
            self.n_features_in_ = rows.n_features
            if is_image_input(X) and hasattr(self, "feature_names_in_"):
                del self.feature_names_in_  # of an earlier fit, on a frame of raveled rows
            return rows, backbone
        rows = validate_data(self, X, dtype=[np.float64, np.float32])
        self.image_shape_ = None
        if "flip" in self._view_names():
            raise ValueError(
                "views names 'flip', which mirrors images, but X holds vectors (set image_shape if its rows are "
                "raveled images)."
            )
        backbone = load_backbone(
            self.backbone,
            self.weights,
            vector_features=rows.shape[1],
            random_state=self.random_state,
            download=self._execution.download,
        )
        return rows, backbone

    def _read_new_data(self, X: Any) -> Any:
        """Rows of X for prediction."""
        if self.image_shape_ is None:
            if is_image_input(X):
                raise ValueError(f"X holds images, but this {type(self).__name__} was fitted on vectors.")
            return validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        height, width, channels = self.image_shape_
        shape = (height, width, channels) if self._image_options["channel_axis"] == -1 else (channels, height, width)
        rows = self._read_images(X, None if is_image_input(X) else shape, reset=False)
        if rows.size != self._size:
            raise ValueError(
                f"X has images of size {rows.size}, but {type(self).__name__} is expecting images of size "
                f"{self._size} as in fit: set image_size to accept other sizes."
            )
        return rows

    def _read_images(self, X: Any, shape: Sequence[int] | None, reset: bool) -> ImageInputs:
        """X as images; rows that are raveled pass scikit-learn's checks of two-dimensional data."""
        if shape is not None and not is_image_input(X):
            X = validate_data(self, plain_frame(X), dtype=None, reset=reset)
        return ImageInputs(X, image_shape=shape, n_jobs=self._execution.n_jobs, **self._image_options)

    def _size_of_images(self, X: Any, own: tuple[int, int] | None, name: str) -> Any:
        """The size to which images are resized, by ``image_size`` and the size of the backbone; None: to none."""
        if not isinstance(self.image_size, str):
            return self.image_size
        if self.image_size not in ("auto", "backbone"):
            raise ValueError(
                "image_size must be 'auto', 'backbone', a positive int, a pair (H, W) of them, or None, got "
                f"{self.image_size!r}."
            )
        if self.image_size == "backbone":
            if own is None:
                raise ValueError(f"The size at which {name} was trained is not known: set image_size.")
            return own
        if own is None or not _are_arrays(X):
            return own
        shape = None if is_image_input(X) else self.image_shape
        size = ImageInputs(X, image_shape=shape, channel_axis=self.channel_axis).size
        if max(size) > max(own):
            return own
        least = min(_LEAST_SIZE, *own)
        return least if min(size) < least else None

    def _in_batches(self, evaluate: Callable[[Tensor], Tensor], rows: Any) -> np.ndarray:
        """What is evaluated of rows, batch by batch, in their order."""
        network, count = self._model.network, len(rows)
        size = network.rows_at_once(self._execution.batch_size)
        with Bars(self.verbose) as bars:
            found = evaluate_rows(evaluate, rows, np.arange(count), size, lambda _, batch: bars.rows(len(batch), count))
        with np.errstate(invalid="ignore"):
            bad = np.flatnonzero(~np.isfinite(found.sum(axis=1, dtype=np.float64)))
        if len(bad):
            raise ValueError(
                f"The outputs for {len(bad)} of {count} rows of X are not finite, the first X[{bad[0]}]: the "
                f"backbone's activations overflow {network.dtype} there. Leave these rows out, or fit with "
                "execution={'dtype': 'float64'}."
            )
        return found

    @property
    def _reads_last_alone(self) -> bool:
        """Whether the last features alone may have a variance."""
        return isinstance(self.prior, str) and self.prior == "last"

    def _reads_directions(self) -> bool:
        """Whether tangents along directions may have a variance."""
        if self._paper or (isinstance(self.prior, str) and self.prior in ("equal", "last")):
            return False
        named = isinstance(self.prior, Mapping) and not any(str(name).endswith(" directions") for name in self.prior)
        return self.tangents in ("network", "both") and not named

    def _prepare(
        self, backbone: Backbone, rows: Any, keep: np.ndarray, weights: np.ndarray, device: torch.device
    ) -> PreparedNetwork:
        """The backbone made ready for the size of the images, or for the scale of the vectors."""
        vectors, dtype = isinstance(rows, np.ndarray), self._execution.dtype
        if vectors:
            shape: tuple[int, ...] = (rows.shape[1],)
            preprocessing = None
        else:
            preprocessing = backbone.preprocessing.override(self.preprocessing)
            shape = (backbone.in_channels, *rows.size)
        precision = torch.float64 if dtype == "float64" or (vectors and dtype == "auto") else torch.float32
        if precision == torch.float64 and device.type == "mps":  # which has no float64
            device = torch.device("cpu")
        layers = self.tangent_layers if self._paper or self._reads_directions() else "head"
        local = not self._paper and self.tangents in ("local", "both") and not self._reads_last_alone
        slope = float(self.negative_slope)
        network = PreparedNetwork(backbone, shape, layers, slope, local, preprocessing, precision, device, self.output)
        if layers is not self.tangent_layers:  # not needed, but a wrong name is a mistake all the same
            network.check_layers(self.tangent_layers)
        return network.standardized(rows[keep], weights[keep]) if vectors else network

    def _reader(
        self, backbone: Backbone, rows: Any, keep: np.ndarray, weights: np.ndarray, device: torch.device
    ) -> FeatureReader:
        """What reads images, or vectors; that of a network by name is made once for several fits."""
        seed, views, tolerance = self._draw_seed(), self._view_names(), float(self._execution.tolerance)
        count = int(self.n_directions) if self._reads_directions() else 0

        def make() -> FeatureReader:
            network = self._prepare(backbone, rows, keep, weights, device)
            reader = FeatureReader.draw(network, count, self.sketch_size, seed, views)
            return reader.within(tolerance if network.dtype == torch.float32 else 0.0)

        if isinstance(rows, np.ndarray) or not isinstance(self.backbone, str):
            return make()
        # Everything that `make` sees; the text of the backbone has the structure of its module.
        said = (
            backbone, self.tangents, self.tangent_layers, self.negative_slope, self.preprocessing,
            self._reads_last_alone, self._reads_directions(), rows.size, self._execution.dtype, device, count,
            self.sketch_size, seed, views, tolerance, self.output,
        )  # fmt: skip
        module = backbone.module
        tensors = dict(itertools.chain(module.named_parameters(), module.named_buffers()))
        return _READERS.get(digest(tensors, repr(said)), make)

    def _evaluate(
        self, reader: FeatureReader, inputs: Any, chosen: np.ndarray, bars: Bars
    ) -> tuple[np.ndarray, np.ndarray]:
        """Raw features (n, D) and digests (n, 16) of some rows."""
        seen = Fingerprint(len(chosen))

        def see(start: int, images: Tensor) -> None:
            seen.see(np.arange(start, start + len(images)), images)
            bars.rows(len(images), len(chosen))

        size = reader.network.rows_at_once(self._execution.batch_size)
        features = evaluate_rows(reader.reading(self._execution.folder), inputs, chosen, size, see)
        return features, seen.images.numpy()

    def _given_weights(self, sample_weight: Any, n: int) -> np.ndarray:
        """Weights of n rows, not all zero."""
        given = _check_sample_weight(sample_weight, np.empty((n, 1)), dtype=np.float64, ensure_non_negative=True)
        if not given.any():
            raise ValueError("Sample weights are all zero: some rows need a positive weight.")
        low, high = given[given > 0].min(), given.max()
        if low < 1 / _WEIGHT_MAX or high > _WEIGHT_MAX:
            raise ValueError(
                f"Sample weights must be 0 or from {1 / _WEIGHT_MAX:g} to {_WEIGHT_MAX:g}, got {low:g} to {high:g}: "
                "multiply all of them, and a numeric alpha, by one factor."
            )
        return given

    def _given_groups(self, groups: Any, n: int) -> np.ndarray:
        """Labels of groups of n rows."""
        labels = column_or_1d(groups)
        if len(labels) != n:
            raise ValueError(f"groups has {len(labels)} labels for {n} images: give one for each.")
        return labels


def _are_arrays(X: Any) -> bool:
    """Whether images are given as arrays of pixels, not as files or PIL images."""
    if not is_image_input(X) or getattr(X, "ndim", 0) >= 3:
        return True
    return hasattr(first_image(image_elements(X)), "ndim")


def refuse_missing(y: Any) -> None:
    """Raise for rows without a label or target value, and name them."""
    # A list as objects: numpy would make text of NaN among labels.
    values = np.asarray(y.to_numpy() if hasattr(y, "to_numpy") else y, object if isinstance(y, (list, tuple)) else None)
    if values.ndim not in (1, 2) or values.dtype.kind not in "fO":
        return
    values = values[:, np.newaxis] if values.ndim == 1 else values
    if values.dtype.kind == "f":
        missing = np.isnan(values).any(axis=1)
    else:
        missing = np.array([any(map(is_missing, row)) for row in values], dtype=bool)
    if missing.any():
        raise ValueError(
            f"Input y contains NaN or None: no value in {rows_named(np.flatnonzero(missing))}. Leave these rows "
            "out, of X too."
        )


def evaluate_rows(
    evaluate: Callable[[Tensor], Tensor],
    rows: Any,
    chosen: np.ndarray,
    batch_size: int,
    see: Callable[[int, Tensor], object] = lambda start, images: None,
) -> np.ndarray:
    """A function of images (B, ...) for some rows, in their order; batches are smaller where memory does not suffice.

    ``see`` is called with the place of the first row of each batch, and its images. A batch is looked at, and the next
    one read, while a device other than the CPU evaluates it. What does not fit into the memory meant for it is mapped
    from a temporary file.
    """
    start, pending = 0, list[Tensor]()
    with RowTable(len(chosen)) as table:

        def keep(parts: list[Tensor]) -> None:
            for part in parts:
                table.append(part.cpu().numpy())

        while start < len(chosen):
            images = select_rows(rows, chosen[start : start + batch_size])

            def work(size: int, images: Tensor = images) -> tuple[list[Tensor], int]:
                return [evaluate(part) for part in images.split(size)], size

            parts, batch_size = with_smaller_batches(work, batch_size)
            see(start, images)
            keep(pending)
            pending = parts
            start += len(images)
        keep(pending)
        return table.finish()


def select_rows(rows: Any, chosen: np.ndarray) -> Tensor:
    """Some rows as a tensor."""
    if isinstance(rows, np.ndarray):
        return torch.from_numpy(rows[chosen])  # an indexed copy
    if (np.diff(chosen) == 1).all():  # the ends do not tell: rows come again in each view
        return rows.batch(int(chosen[0]), int(chosen[-1]) + 1)
    return torch.cat([rows.batch(int(i), int(i) + 1) for i in chosen])
