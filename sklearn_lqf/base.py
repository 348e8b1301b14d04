"""What all estimators share: parameters, reading of data, and `fit` as a recipe. numpy in, numpy out."""

from __future__ import annotations

import copy
import inspect
import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

import numpy as np
import torch
from sklearn.base import BaseEstimator
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_random_state
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, check_memory, validate_data
from torch import Tensor, nn

from .backbones import Backbone, VectorNetwork, load_backbone
from .cache import CACHES, Fingerprint, TrunkCache, with_smaller_batches
from .certificate import CertificateMixin
from .distributed import ALONE, Group, default_group
from .forgetting import StoredData, UpdateMixin
from .images import ImageInputs, is_image_input
from .influence import InfluenceMixin, TrainingSet
from .kfac import KFAC
from .linearize import _full_precision
from .model import LinearModel, choose_device
from .objective import Quadratic
from .persistence import PersistenceMixin
from .problem import HEADS, Problem, Recipe, TrainingRows
from .progress import CallbackSupportMixin, Progress, with_callbacks
from .serving import ServingMixin
from .solvers import SolverResult, Status, pcg, sgd
from .uncertainty import UncertaintyMixin

__all__ = ["LQFBase", "check_number", "with_shared_parameters"]

_VIEWS = ("identity", "flip")
# Parameters in which processes that share a fit may differ; the backbone is compared by its weights.
_OF_A_PROCESS = {"backbone", "weights", "download", "batch_size", "cache", "memory", "device", "verbose"}
_STATE = ("_model", "_stored", "_fingerprint")  # beside the attributes that end in an underscore

Estimator = TypeVar("Estimator", bound="LQFBase")
Class = TypeVar("Class", bound=type)

_NETWORK_PARAMETERS = """
backbone : str, nn.Module or callable, default="auto"
    The pre-trained network: a classification model of torchvision by name (``"resnet18"``), one of timm
    (``"timm:convnext_tiny"``), ``"efficientnet_lite0"`` (its ImageNet weights come in a package, extra
    ``offline``), a module that ends in one Linear layer, or a callable that returns one. ``"auto"`` takes
    ``"resnet18"`` for images and a small built-in network for vectors. A module is never changed.
weights : str, path or None, default="auto"
    ``"auto"``: the pre-trained weights of the named backbone, or a module as it is. None: random
    initialization. Else the name of a set of weights of torchvision, or a local file (state dict, loaded
    with ``weights_only=True``, or safetensors).
download : bool, default=True
    Whether weights that are not on this machine are downloaded. False: `fit` fails instead, without asking a server;
    ``python -m sklearn_lqf`` lists what is there.
tangent_layers : {"head", "all"}, int or list of str, default=1
    What is linearized and trained: the head only, everything, this many last stages (runs of blocks at one
    spatial resolution; a stage is one block for transformers), or modules by name. The rest is a frozen
    trunk, evaluated once for each image. The head is always trained.
readout : {"stages", "last"}, default="stages"
    What the head reads: ``"stages"`` appends to the network's own features the mean and standard deviation
    over all positions of the activations behind each stage; ``"last"`` is the network's own features alone.
    Each part is centered and scaled to variance 1 on the training images. A network that cannot be traced
    has the last features only.
head : {"orthogonal", "random", "ridge"}, default="orthogonal"
    The head at which the network is linearized; it decides what the layers before it can learn.
    ``"orthogonal"``: random orthogonal rows, and ``"random"``: rows drawn from N(0, 1/D); neither sees a
    target. ``"ridge"``: the ridge regression on the features whose penalty minimizes the leave-one-out error;
    the quadratic is then fitted to its leave-one-out residuals, and corrects its predictions.
"""
_FIT_PARAMETERS = """
tail_weight : float or None, default=0.03
    Prior variance of what the linearized layers before the head add to an output, relative to the head's: the
    penalty weighs their weights accordingly. None: all weights have one prior, as in the paper.
negative_slope : float, default=0.0
    Slope of the leak put into ReLU, ReLU6, Hardtanh, Hardswish and Hardsigmoid, in [0, 1). The paper uses
    weights pre-trained with Leaky-ReLU; for weights trained without, any leak costs accuracy, so the
    default leaves the activations as they are.
center : bool or "auto", default="auto"
    Whether the network's own output at the pre-trained weights is removed from the model, and the mean
    target takes its place. ``"auto"``: for heads that see no target, whose output is noise, but not for a ridge
    head.
damping : float, default=0.1
    Added to the penalty in the preconditioner, in the units of a numeric ``alpha``, against the error of its
    approximation. It changes the path of the solver, not the solution.
solver : {"pcg", "sgd"}, default="pcg"
    ``"pcg"``: K-FAC preconditioned conjugate gradients over all images. ``"sgd"``: the paper's K-FAC
    preconditioned stochastic gradient descent with momentum; both go to the same optimum.
max_iter : int, default=200
    Products with the curvature for ``"pcg"``, epochs for ``"sgd"``.
tol : float, default=1e-2
    The solver stops when the norm of the gradient relative to its value at zero is below.
views : str or sequence of str, default="identity"
    Fixed views of each training image: ``"identity"``, or ``("identity", "flip")`` to add the mirror image.
image_shape : tuple of int or None, default=None
    Shape (H, W) or (H, W, C) of the images of which the rows of a two-dimensional X are raveled. None: such
    rows are vectors.
image_size : int, tuple of int, "backbone" or None, default=None
    Size to which images are resized and cropped: an int or (H, W), or the size the backbone was trained at.
    None: images are used as they are, and must be of one size.
channel_axis : int, default=-1
    Axis of the channels within one image, -1 or 0.
preprocessing : dict or None, default=None
    Overrides of the backbone's ``mean``, ``std`` (for pixels in [0, 1]) and ``interpolation``.
batch_size : int, default=64
    Images evaluated at once; halved as often as memory requires. The solution does not depend on it but for
    rounding.
cache : {"auto", "memory", "disk", "none"}, default="auto"
    Where the activations of the frozen trunk are kept during a fit: in memory, in a temporary file that is gone
    after it, or nowhere, which evaluates the trunk anew at each pass. ``"auto"``: in memory up to a quarter of
    the machine's (half of what is free of a device), else in a file up to half of the free space, else nowhere.
memory : str, path, joblib.Memory or None, default=None
    Folder in which the trunk activations of each image are shared between fits, and with predictions: a grid
    search evaluates the trunk once for each image. They are found by the content of image and trunk. As with
    any joblib.Memory nothing is ever removed from it, and it must be trusted, since it is unpickled.
store_data : bool, default=False
    Whether the estimator keeps the trunk activations of the training images (vectors: the rows themselves), their
    targets and weights, for `partial_fit`, `forget` and predictions with uncertainty. They are part of what is
    pickled.
device : str or torch.device, default="auto"
    ``"auto"``: CUDA where present, else the CPU.
distributed : bool, default=False
    Whether the processes of torch.distributed's default process group, started by torchrun and initialized
    by the caller, share the fit. Each calls `fit` with the same X and y, reads only the images of its share
    of the rows, and ends with the same model. What the head reads, (n, D), is gathered by every process.
    ``random_state`` must be an int; ``solver="sgd"`` and ``store_data`` are not supported.
dtype : {"auto", "float32", "float64"}, default="auto"
    Precision of the network. ``"auto"``: float64 for vectors, float32 for images.
random_state : int, RandomState instance or None, default=0
    Seeds the built-in network for vectors, random weights, the head and the order of batches of ``"sgd"``.
    Nothing else is random: by default the same data give the same model. None draws anew at each fit.
verbose : int, default=0
    Above 0: progress bars (needs tqdm, extra ``progress``).
"""
_ATTRIBUTES = """
n_features_in_ : int
    Columns of vectors or raveled rows; values of one image otherwise.
feature_names_in_ : ndarray of shape (n_features_in_,)
    Names of the columns of a DataFrame; defined only when they are all strings.
image_shape_ : tuple of int or None
    (H, W, C) of one image as given; None for vectors.
coef_ : ndarray of shape (n_parameters_,)
    Change d of the weights: linearized parameters of the network, then head weight (C, D), then head bias.
alpha_ : float
    Absolute L2 penalty lambda.
tail_scale_ : float
    Prior scale of the weights before the head, relative to the head's: the square root of their variance.
n_iter_ : int
    Iterations of the solver.
residual_norms_ : ndarray of shape (n_iter_ + 1,)
    Relative norm of the gradient before the first and after each iteration.
distance_bound_ : float
    Certificate: upper bound on the distance of the solution from the optimum, in the norm of the penalty.
converged_ : bool
    Whether ``tol`` was reached.
n_parameters_ : int
    Number of linearized parameters P.
device_ : str
    Device of the fit.
"""


def with_shared_parameters(cls: Class) -> Class:
    """Fill in what the docstring of an estimator shares with the others."""
    text = inspect.cleandoc(cls.__doc__ or "")
    for name, shared in (
        ("network parameters", _NETWORK_PARAMETERS), ("fit parameters", _FIT_PARAMETERS), ("attributes", _ATTRIBUTES),
    ):  # fmt: skip
        text = text.replace(f"<{name}>", shared.strip())
    cls.__doc__ = f"{text}\n"
    return cls


class LQFBase(
    CallbackSupportMixin,
    CertificateMixin,
    InfluenceMixin,
    PersistenceMixin,
    ServingMixin,
    UncertaintyMixin,
    UpdateMixin,
    BaseEstimator,
):
    """The estimator without what its targets are; documented with those that are public."""

    alpha: float | str
    _unit: np.ndarray  # (C,), of the targets that the model is fitted to, in those of y

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        weights: Any = "auto",
        download: bool = True,
        tangent_layers: Any = 1,
        readout: str = "stages",
        head: str = "orthogonal",
        tail_weight: float | None = 0.03,
        negative_slope: float = 0.0,
        center: bool | str = "auto",
        damping: float = 0.1,
        solver: str = "pcg",
        max_iter: int = 200,
        tol: float = 1e-2,
        views: str | Sequence[str] = "identity",
        image_shape: Sequence[int] | None = None,
        image_size: Any = None,
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        cache: str = "auto",
        memory: Any = None,
        store_data: bool = False,
        device: Any = "auto",
        distributed: bool = False,
        dtype: str = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.download = download
        self.tangent_layers = tangent_layers
        self.readout = readout
        self.head = head
        self.tail_weight = tail_weight
        self.negative_slope = negative_slope
        self.center = center
        self.damping = damping
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.views = views
        self.image_shape = image_shape
        self.image_size = image_size
        self.channel_axis = channel_axis
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.cache = cache
        self.memory = memory
        self.store_data = store_data
        self.device = device
        self.distributed = distributed
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # ------------------------------------------------------------------------------------------------- fit

    @with_callbacks
    def fit(self: Estimator, X: Any, y: Any, sample_weight: Any = None) -> Estimator:
        """Fit the linearized network.

        Parameters
        ----------
        X : array-like or sequence of images
            Images: an array (n, H, W) or (n, H, W, C) of uint8 (0..255) or floats (0..1), raveled rows
            (n, n_features) with ``image_shape``, or a sequence of paths, PIL images or arrays. Vectors:
            (n, n_features) of floats.
        y : array-like of shape (n,) or (n, n_outputs)
            Class labels, or target values; several columns are labels each of which is there (1) or not (0), or
            several target values.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights. A weight of 2 equals a row given twice, a weight of 0 a row left out.

        Returns
        -------
        self : estimator
            The fitted estimator.

        Raises
        ------
        ValueError
            Unusable parameters or data; the message says what was found and what to do.
        """
        return self._fit(X, y, sample_weight)

    def _fit(self: Estimator, X: Any, y: Any, sample_weight: Any, classes: Any = None) -> Estimator:
        """`fit`, also with classes of which there is no image yet; a fit that raises leaves nothing fitted."""
        try:
            result = self._fit_all(X, y, sample_weight, classes)
        except BaseException:
            for name in [n for n in vars(self) if n in _STATE or (n.endswith("_") and not n.startswith("_"))]:
                delattr(self, name)
            raise
        self._warn_unless_converged(result)
        return self

    def _fit_all(self, X: Any, y: Any, sample_weight: Any, classes: Any) -> SolverResult:
        device = choose_device(self.device)
        group = default_group(device) if self.distributed else ALONE
        group.together(self._check_parameters, group.size)
        rows, backbone = group.together(self._read_training_rows, X, y)
        y = group.together(self._read_targets, y, len(rows))
        if group.size > 1:
            self._check_agreement(group, rows, y, sample_weight, backbone)
        values = self._learn_targets(y, classes)
        given = self._given_weights(sample_weight, len(rows))
        weights = self._weigh_classes(values, given)
        keep = np.flatnonzero(weights)  # a weight of zero is a row left out
        if len(keep) < group.size:
            raise ValueError(f"{group.size} processes cannot share {len(keep)} image(s): start fewer processes.")
        self._seed = self._draw_seed()
        model = self._prepare(backbone, rows, keep, weights, device)
        with Progress(self, self.verbose if group.rank == 0 else 0, self.max_iter, X, y) as progress:
            own = keep[group.share(len(keep))]
            seen = Fingerprint(len(own))
            cache = group.together(self._trunk_activations, model, rows, own, seen, self.cache, progress)
            data = self._training_rows(cache, values[keep], weights[keep], given[keep], weights > 0)
            result = self._solve_for(model, data, group, progress)
            images = group.all_gather_rows(seen.images)
            self._fingerprint = Fingerprint.of(images, values[keep], weights[keep])
            self._stored: StoredData | None = None
            if self.store_data:
                self._stored = self._store(rows, backbone, images, cache, values[keep], given[keep], keep)
        return result

    def _training_rows(
        self,
        cache: TrunkCache,
        values: np.ndarray,
        weights: np.ndarray,
        given: np.ndarray,
        kept: np.ndarray | None = None,
    ) -> TrainingRows:
        """What is fitted, from the targets (n, C) in the units of y; fixes the units of the model's."""
        self._unit = self._target_unit(values, weights)
        t, s, g = (torch.tensor(v, device=cache.device) for v in (values / self._unit, weights, given))
        return TrainingRows(cache, t, s, g, len(self._view_names()), kept)

    def _solve_for(
        self,
        model: LinearModel,
        data: TrainingRows,
        group: Group = ALONE,
        progress: Progress | None = None,
        start: Callable[[LinearModel], np.ndarray] | None = None,
    ) -> SolverResult:
        """Everything that follows from the trunk activations; sets the fitted attributes.

        ``start`` gives a solution that is near, for the model when it is standardized.
        """

        def minimize(size: int) -> SolverResult:
            problem = Problem(model, data.rebatched(size), self._recipe(), group)
            alpha = self._penalty(problem, model)
            quadratic, preconditioner = problem.at(alpha)
            self._set_problem(model, problem, quadratic)
            near = None if start is None else start(model)
            return self._solve(quadratic, preconditioner, progress, near)

        size = data.cache.batch_size
        # Processes that wait for each other cannot begin again one by one.
        result = with_smaller_batches(minimize, size) if group.size == 1 else minimize(size)
        if result.status is Status.NOT_FINITE:
            raise ValueError(
                f"The solver met values that are not finite after {result.n_iter} iterations: the derivatives of the "
                f"backbone overflow {self._model.dtype}. Use dtype='float64', check its weights and preprocessing, or "
                "increase alpha."
            )
        self._set_solution(result)
        return result

    def _penalty(self, problem: Problem, model: LinearModel) -> float:
        """The absolute penalty."""
        return problem.alpha(self.alpha)

    def _recipe(self) -> Recipe:
        return Recipe(self.head, self._centered(), self.tail_weight, float(self.damping), self._seed)

    def _prepare(
        self, backbone: Backbone, rows: Any, keep: np.ndarray, weights: np.ndarray, device: torch.device
    ) -> LinearModel:
        """The backbone made ready for the size of the images, or for the scale of the vectors."""
        vectors = isinstance(rows, np.ndarray)
        dtype = torch.float64 if self.dtype == "float64" or (vectors and self.dtype == "auto") else torch.float32
        if vectors:
            _standardize(backbone, rows[keep], weights[keep])
            shape: tuple[int, ...] = (rows.shape[1],)
            preprocessing = None
        else:
            preprocessing = backbone.preprocessing.override(self.preprocessing)
            shape = (backbone.in_channels, *rows.size)
        return LinearModel(
            backbone,
            shape,
            self.tangent_layers,
            float(self.negative_slope),
            self.readout == "stages",
            preprocessing,
            dtype,
            device,
        )

    def _trunk_activations(
        self,
        model: LinearModel,
        rows: Any,
        keep: np.ndarray,
        seen: Fingerprint,
        kind: str,
        progress: Progress | None = None,
    ) -> TrunkCache:
        """Activations of every view of every kept row: all rows of the first view, then the next."""
        views, activations = self._view_names(), model.evaluator(self._memory())
        n_rows = len(views) * len(keep)

        def evaluate(start: int, stop: int) -> tuple[Tensor, ...]:
            wanted = np.arange(start, stop)
            images = _rows(rows, keep[wanted % len(keep)])
            count = max(0, len(keep) - start)  # rows of the first view
            seen.see(wanted[:count], images[:count])
            flip = torch.tensor([views[v] == "flip" for v in wanted // len(keep)])
            return activations(_flipped(images, flip) if flip.any() else images)

        def report(count: int) -> None:
            if progress is not None:
                progress.rows(count, n_rows)

        return TrunkCache(evaluate, n_rows, self.batch_size, kind, report)

    def _solve(
        self, quadratic: Quadratic, preconditioner: KFAC, progress: Progress | None, near: np.ndarray | None = None
    ) -> SolverResult:
        """The minimum; from a solution that is near, if one is known, without an iteration where it suffices."""

        def report(number: int, residual: float, x: Tensor) -> bool:
            stop = progress is not None and progress.iteration(
                number, residual, lambda: {"coef_": self._change_of_weights(x)}
            )
            return quadratic.group.any(stop)

        b = quadratic.rhs()
        first = preconditioner.head_solution(b) if near is None else self._in_units_of_the_solver(near).to(b)
        if self.solver == "pcg":
            residual = None if near is None else b - quadratic.matvec(first)
            result = pcg(quadratic.matvec, b, preconditioner, self.tol, self.max_iter, report, first, residual)
        else:
            n_batches, generator = len(quadratic.batches), torch.Generator().manual_seed(self._draw_seed())
            result = sgd(
                quadratic.matvec, quadratic.batch_matvec, n_batches, b, preconditioner, self.tol, self.max_iter,
                generator, report, first,
            )  # fmt: skip
        self._noise = quadratic.noise_variance(result.x)
        return result

    def _set_problem(self, model: LinearModel, problem: Problem, quadratic: Quadratic) -> None:
        """Fitted attributes that do not wait for the solution."""
        self._model = model
        self.alpha_ = quadratic.alpha
        self.device_ = str(model.device)
        self.n_parameters_ = quadratic.network.n_parameters
        self.tail_scale_ = quadratic.network.tail_scale
        self._n_tail = quadratic.network.slices["head.weight"].start
        self.intercept_ = problem.mean.cpu().numpy() * self._unit if self._centered() else None
        held_out = problem.held_out.mean(0).cpu().numpy() * self._unit
        data = problem.rows
        self._learn_from_held_out(held_out, data.targets.cpu().numpy() * self._unit, data.weights.cpu().numpy())

    def _set_solution(self, result: SolverResult) -> None:
        assert self._model.network is not None
        self._model.network.tail_scale = 1.0  # from here on directions are in the units of the weights
        self.coef_ = self._change_of_weights(result.x)
        self.n_iter_ = result.n_iter
        self.residual_norms_ = np.array(result.residual_norms)
        self.distance_bound_ = result.residual_norms[-1] * result.scale / self.alpha_
        self.converged_ = result.converged

    def _warn_unless_converged(self, result: SolverResult) -> None:
        if not result.converged:
            warnings.warn(
                f"The solver stopped after {result.n_iter} iterations at a relative gradient of "
                f"{result.residual_norms[-1]:.1e}, above tol={self.tol:g}. {result.status.value}",
                ConvergenceWarning,
                stacklevel=4,
            )

    def _change_of_weights(self, x: Tensor) -> np.ndarray:
        """d in the units of the weights, from the solver's."""
        d = x.detach().cpu().numpy().copy()
        d[: self._n_tail] *= self.tail_scale_
        return d

    def _in_units_of_the_solver(self, coef: np.ndarray) -> Tensor:
        """The reverse."""
        x = torch.tensor(coef)
        x[: self._n_tail] /= self.tail_scale_
        return x

    def _view_names(self) -> list[str]:
        return [self.views] if isinstance(self.views, str) else list(self.views)

    def _draw_seed(self) -> int:
        """A seed for a generator of torch's own, by ``random_state``."""
        return int(check_random_state(self.random_state).randint(np.iinfo(np.int32).max))

    def _centered(self) -> bool:
        return self.head != "ridge" if isinstance(self.center, str) else bool(self.center)

    # ------------------------------------------------------------------------------- what the targets are

    def _read_targets(self, y: Any, n: int) -> np.ndarray:
        """Check y for n rows."""
        raise NotImplementedError

    def _learn_targets(self, y: np.ndarray, classes: Any) -> np.ndarray:
        """Targets (n, C) in float64, from what `_read_targets` returned; sets what says what they are."""
        raise NotImplementedError

    def _known_targets(self, y: Any, n: int, name: str) -> np.ndarray:
        """Targets (n, C) of n rows of the kind that was fitted; ``name`` is that of y in messages."""
        raise NotImplementedError

    def _target_unit(self, values: np.ndarray, weights: np.ndarray) -> np.ndarray:
        """What targets (n, C) are divided by, (C,)."""
        raise NotImplementedError

    def _check_rest(self, values: np.ndarray) -> None:
        """Raise unless the targets (n, C) of the rows that would remain are enough for a fit."""
        raise NotImplementedError

    def _learn_from_held_out(self, outputs: np.ndarray, values: np.ndarray, weights: np.ndarray) -> None:
        """Set what is fitted on leave-one-out outputs (n, C) of the ridge regression on the features."""
        raise NotImplementedError

    def _decision(self, outputs: np.ndarray) -> np.ndarray:
        """Outputs (n, C) in the shape that users see."""
        raise NotImplementedError

    def _explained(self, changes: np.ndarray, outputs: np.ndarray) -> np.ndarray:
        """Of changes (m, n, C) of outputs (m, C) those that explain a prediction: (m, n), or (m, n, C)."""
        raise NotImplementedError

    # --------------------------------------------------------------------------------------------- predict

    def features(self, X: Any) -> np.ndarray:
        """Compute what the head reads at the pre-trained weights: the standardized features of the backbone.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        features : ndarray of shape (n, D)
            Input of the head.
        """
        check_is_fitted(self)
        rows = self._read_new_data(X)
        model = self._model
        assert model.standardization is not None
        found = self._in_batches(lambda batches: [model.features(z) for z in batches], rows)
        return model.standardization(torch.cat(found)).cpu().numpy()

    def _outputs(self, X: Any) -> np.ndarray:
        """Outputs in units of y, (n, C)."""
        check_is_fitted(self)
        return self._in_batches(self._outputs_of, self._read_new_data(X))

    def _outputs_of(self, batches: Iterable[Sequence[Tensor]]) -> np.ndarray:
        """The same of trunk activations."""
        intercept = None if self.intercept_ is None else self.intercept_ / self._unit
        found = self._model.outputs(batches, self.coef_, intercept)
        bad = np.flatnonzero(~np.isfinite(found).all(1))
        if len(bad):
            raise ValueError(
                f"The outputs for {len(bad)} of {len(found)} rows of X are not finite, the first X[{bad[0]}]: the "
                f"backbone's activations overflow {self._model.dtype} there. Leave these rows out, or fit with "
                "dtype='float64'."
            )
        return found * self._unit.astype(found.dtype)

    def _in_batches(self, work: Callable[[Iterator[tuple[Tensor, ...]]], Any], rows: Any) -> Any:
        """What is made of the trunk activations of rows, batch by batch."""
        activations = self._model.evaluator(self._memory())
        return with_smaller_batches(lambda size: work(map(activations, _batches(rows, size))), self.batch_size)

    def _memory(self) -> Any:
        """The joblib.Memory, or None."""
        if self.memory is None:
            return None
        return check_memory(os.fspath(self.memory) if isinstance(self.memory, os.PathLike) else self.memory)

    def _fitted_on(self, X: Any, y: Any, sample_weight: Any) -> tuple[TrainingSet, TrunkCache, np.ndarray, int]:
        """The training data, given again or stored; their trunk activations; which rows have a weight; and of how many.

        X None: those that are stored.
        """
        check_is_fitted(self)
        if self.head == "ridge":
            raise ValueError(
                "head='ridge' has seen the targets, so that the quadratic does not say what fit would have done "
                "without an image: use head='orthogonal'."
            )
        if X is None:
            stored = self._stored_data()
            keep, n = np.arange(len(stored)), len(stored)
            values, given = stored.targets, stored.weights
            weights = self._weigh_classes(values, given)
            cache = self._stored_batches(stored, self._model)
        else:
            rows = self._read_new_data(X)
            n = len(rows)
            values = self._known_targets(y, n, "y")
            given = self._given_weights(sample_weight, n)
            weights = self._weigh_classes(values, given)
            keep = np.flatnonzero(weights)
            seen, kind = Fingerprint(len(keep)), "auto" if self.cache == "none" else self.cache
            cache = self._trunk_activations(self._model, rows, keep, seen, kind)
            if Fingerprint.of(seen.images, values[keep], weights[keep]) != self._fingerprint:
                raise ValueError(
                    "X, y and sample_weight are not the data that this model was fitted on: give all rows of fit, in "
                    "any order."
                )
        t, s, m = (torch.tensor(v[keep]) for v in (values / self._unit, weights, np.maximum(given, 1.0)))
        offsets = None
        if not self._centered():
            network = self._model.network
            assert network is not None
            with _full_precision():
                found = torch.cat([network.at(z, gradients=False).outputs for z in cache])
            offsets = found.double().cpu().view(-1, *t.shape)
        return TrainingSet(t, s, m, offsets), cache, keep, n

    # ------------------------------------------------------------------------------------------ validation

    def _check_parameters(self, n_processes: int) -> None:
        check_number("negative_slope", self.negative_slope, 0, strict=False)
        for name, special in (("tail_weight", [None]), ("damping", []), ("tol", [])):
            check_number(name, getattr(self, name), 0, strict=name == "tail_weight", special=special)
        if self.negative_slope >= 1:
            raise ValueError(f"negative_slope must be below 1, got {self.negative_slope!r}.")
        for name in ("max_iter", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
        for name, allowed in (
            ("solver", ("pcg", "sgd")), ("head", HEADS), ("readout", ("stages", "last")), ("cache", CACHES),
            ("dtype", ("auto", "float32", "float64")),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
        self._memory()
        if not isinstance(self.center, bool | np.bool_) and self.center != "auto":
            raise ValueError(f"center must be True, False or 'auto', got {self.center!r}.")
        for name in ("download", "distributed", "store_data"):
            if not isinstance(getattr(self, name), bool | np.bool_):
                raise ValueError(f"{name} must be True or False, got {getattr(self, name)!r}.")
        if n_processes > 1 and self.solver == "sgd":
            raise ValueError("solver='sgd' does not support distributed=True with several processes: use 'pcg'.")
        if n_processes > 1 and self.store_data:
            raise ValueError("store_data=True does not support distributed=True with several processes.")
        if n_processes > 1 and not isinstance(self.random_state, Integral):
            raise ValueError(
                "With distributed=True random_state must be an int, so that all processes draw the same; got "
                f"{self.random_state!r}."
            )
        views = self._view_names()
        if not views or len(set(views)) != len(views) or not set(views) <= set(_VIEWS):
            raise ValueError(f"views must name each of {list(_VIEWS)} at most once, got {self.views!r}.")

    def _check_agreement(self, group: Group, rows: Any, y: np.ndarray, sample_weight: Any, backbone: Backbone) -> None:
        """Raise on all processes that share a fit unless they have the same data, parameters and weights."""
        parameters = {k: v for k, v in self.get_params(deep=False).items() if k not in _OF_A_PROCESS}
        module = backbone.module
        group.check_same(
            {
                "the constructor's parameters": repr(parameters),
                "the numbers of images": repr(len(rows)),
                "the targets y": repr(y.tolist()),
                "the sample weights": repr(None if sample_weight is None else np.asarray(sample_weight).tolist()),
                "the backbone's weights": itertools.chain(module.parameters(), module.buffers()),
            }
        )

    def _read_training_rows(self, X: Any, y: Any) -> tuple[Any, Backbone]:
        """Rows of X as vectors or images, and the backbone that fits them."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        if is_image_input(X, self.image_shape):
            backbone = load_backbone(
                self.backbone, self.weights, random_state=self.random_state, download=self.download
            )
            preprocessing = backbone.preprocessing.override(self.preprocessing)
            size = preprocessing.size if self.image_size == "backbone" else self.image_size
            if size is None and self.image_size is not None:
                raise ValueError(f"The size at which {backbone.name} was trained is not known: set image_size.")
            self._image_options: dict[str, Any] = {
                "image_size": size,
                "in_channels": backbone.in_channels,
                "interpolation": preprocessing.interpolation,
            }
            rows = self._read_images(X, self.image_shape, reset=True)
            self.image_shape_: tuple[int, int, int] | None = rows.image_shape
            self._size = rows.size
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
            download=self.download,
        )
        return rows, backbone

    def _read_new_data(self, X: Any) -> Any:
        """Rows of X for prediction."""
        if self.image_shape_ is None:
            if is_image_input(X):
                raise ValueError(f"X holds images, but this {type(self).__name__} was fitted on vectors.")
            return validate_data(self, X, dtype=[np.float64, np.float32], reset=False)
        height, width, channels = self.image_shape_
        shape = (height, width, channels) if self.channel_axis == -1 else (channels, height, width)
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
            X = validate_data(self, X, dtype=None, reset=reset)
        return ImageInputs(X, image_shape=shape, channel_axis=self.channel_axis, **self._image_options)

    def _given_weights(self, sample_weight: Any, n: int) -> np.ndarray:
        """Weights of n rows, not all zero."""
        given = _check_sample_weight(sample_weight, np.empty((n, 1)), dtype=np.float64, ensure_non_negative=True)
        if not given.any():
            raise ValueError("Sample weights are all zero: some rows need a positive weight.")
        return given

    def _weigh_classes(self, values: np.ndarray, given: np.ndarray) -> np.ndarray:
        """Weights of rows with targets (n, C): those given, times those of their classes."""
        return given

    def __sklearn_clone__(self: Estimator) -> Estimator:
        """A clone shares a module given as backbone, which is never changed, instead of copying it."""
        if not isinstance(self.backbone, nn.Module):
            return super().__sklearn_clone__()
        bare = copy.copy(self)  # other threads may be using this one
        bare.backbone = "auto"
        twin = super(LQFBase, bare).__sklearn_clone__()
        twin.backbone = self.backbone
        return twin


def check_number(name: str, value: Any, low: float, strict: bool, special: Sequence[Any] = ()) -> None:
    """Raise ValueError unless a parameter is a finite number of the range, or one of some other values."""
    if any(value is s or (isinstance(value, str) and value == s) for s in special):
        return
    number = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(float(value))
    if not number or value < low or (strict and value == low):
        others = "".join(f"{s!r} or " for s in special)
        raise ValueError(f"{name} must be {others}a number {'>' if strict else '>='} {low}, got {value!r}.")


def _batches(rows: Any, size: int) -> Iterator[Tensor]:
    """Rows as tensors in fixed order."""
    return (_rows(rows, np.arange(a, min(a + size, len(rows)))) for a in range(0, len(rows), size))


def _rows(rows: Any, chosen: np.ndarray) -> Tensor:
    """Some rows as a tensor."""
    if isinstance(rows, np.ndarray):
        return torch.from_numpy(rows[chosen])  # an indexed copy
    if chosen[-1] - chosen[0] == len(chosen) - 1:
        return rows.batch(int(chosen[0]), int(chosen[-1]) + 1)
    return torch.cat([rows.batch(int(i), int(i) + 1) for i in chosen])


def _flipped(images: Tensor, flip: Tensor) -> Tensor:
    """Images (B, C, H, W), some of them mirrored."""
    return torch.where(flip.view(-1, 1, 1, 1), images.flip(-1), images)


def _standardize(backbone: Backbone, rows: np.ndarray, weights: np.ndarray) -> None:
    """Give the built-in network for vectors the weighted mean and scale of its input."""
    if not isinstance(backbone.module, VectorNetwork):
        return
    x = rows.astype(np.float64)
    mean = np.average(x, axis=0, weights=weights)
    scale = np.sqrt(np.average((x - mean) ** 2, axis=0, weights=weights))
    scale[scale <= 10 * np.finfo(np.float64).eps * np.maximum(np.abs(mean), 1)] = 1.0  # a constant feature
    backbone.module.mean.copy_(torch.from_numpy(mean))
    backbone.module.scale.copy_(torch.from_numpy(scale))
