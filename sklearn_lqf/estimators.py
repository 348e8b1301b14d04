"""The scikit-learn contract: parameters, validation, fitted attributes. numpy in, numpy out."""

from __future__ import annotations

import itertools
import os
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any

import numpy as np
import torch
from scipy.optimize import minimize_scalar
from scipy.special import log_softmax, softmax
from sklearn.base import BaseEstimator, ClassifierMixin
from sklearn.exceptions import ConvergenceWarning
from sklearn.utils import check_consistent_length, check_random_state, column_or_1d
from sklearn.utils.class_weight import compute_class_weight
from sklearn.utils.multiclass import check_classification_targets
from sklearn.utils.validation import _check_sample_weight, check_is_fitted, check_memory, validate_data
from torch import Tensor, nn

from .backbones import Backbone, VectorNetwork, load_backbone
from .cache import CACHES, Fingerprint, TrunkCache, with_smaller_batches
from .distributed import ALONE, Group, default_group
from .head import RidgeHead, fit_ridge_head, orthogonal_head, random_head
from .images import ImageInputs, is_image_input
from .influence import InfluenceMixin, TrainingSet
from .kfac import KFAC
from .model import LinearModel, choose_device
from .objective import Quadratic, build_kfac, weigh_tail
from .progress import CallbackSupportMixin, Progress, with_callbacks
from .solvers import SolverResult, pcg, sgd

__all__ = ["LQFClassifier"]

_EXACT_MAX = 256  # outputs of all rows up to which the preconditioner takes them all; above, one probe for each row
_RIDGE_ALPHAS = torch.logspace(-6, 4, 41, dtype=torch.float64)  # wide enough that no end is ever the minimum
_ALPHA_MIN = 1e-3  # of the unit of alpha: below, an automatic penalty only costs iterations
_SPECIAL = {"alpha": "auto", "tail_weight": None}  # what these parameters may be beside a number
_VIEWS = ("identity", "flip")
# Parameters in which processes that share a fit may differ; the backbone is compared by its weights.
_OF_A_PROCESS = {"backbone", "weights", "batch_size", "cache", "memory", "device", "verbose"}


class LQFClassifier(CallbackSupportMixin, InfluenceMixin, ClassifierMixin, BaseEstimator):
    """Linear Quadratic Fine-tuning of a pre-trained image network.

    The network is replaced by its first-order expansion around the pre-trained weights and trained with squared
    loss, which makes fine-tuning a strongly convex quadratic: one optimum, no learning rate, and a certificate
    of how far the solution is from it.

    Parameters
    ----------
    backbone : str, nn.Module or callable, default="auto"
        The pre-trained network: a classification model of torchvision by name (``"resnet18"``), one of timm
        (``"timm:convnext_tiny"``), ``"efficientnet_lite0"`` (its ImageNet weights come in a package, extra
        ``offline``), a module that ends in one Linear layer, or a callable that returns one. ``"auto"`` takes
        ``"resnet18"`` for images and a small built-in network for vectors. A module is never changed.
    weights : str, path or None, default="auto"
        ``"auto"``: the pre-trained weights of the named backbone, or a module as it is. None: random
        initialization. Else the name of a set of weights of torchvision, or a local file (state dict, loaded
        with ``weights_only=True``, or safetensors).
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
        label. ``"ridge"``: the ridge regression on the features whose penalty minimizes the leave-one-out error;
        the quadratic is then fitted to its leave-one-out residuals, and corrects its predictions.
    alpha : float or "auto", default="auto"
        L2 penalty. ``"auto"``: that of the ridge regression on the features with the smallest squared
        leave-one-out error, in closed form. A number is relative to the mean squared norm of the Jacobian of one
        output of one training image, so that one grid serves every backbone and any number of images: the ratio
        of the variance of label noise to the prior variance of an output. The absolute value is ``alpha_``.
    tail_weight : float or None, default=0.03
        Prior variance of what the linearized layers before the head add to an output, relative to the head's: the
        penalty weighs their weights accordingly. None: all weights have one prior, as in the paper.
    negative_slope : float, default=0.0
        Slope of the leak put into ReLU, ReLU6, Hardtanh, Hardswish and Hardsigmoid, in [0, 1). The paper uses
        weights pre-trained with Leaky-ReLU; for weights trained without, any leak costs accuracy, so the
        default leaves the activations as they are.
    target_scale : float, default=1.0
        Value of the target of the right class (0 for the others). With ``center=True`` it only rescales the
        solution. Decision values are divided by it.
    center : bool or "auto", default="auto"
        Whether the network's own output at the pre-trained weights is removed from the model, and the mean
        target takes its place. ``"auto"``: for heads that see no label, whose output is noise, but not for a ridge
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
    class_weight : dict, "balanced" or None, default=None
        Weights of classes, as in scikit-learn.
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
    device : str or torch.device, default="auto"
        ``"auto"``: CUDA where present, else the CPU.
    distributed : bool, default=False
        Whether the processes of torch.distributed's default process group, started by torchrun and initialized
        by the caller, share the fit. Each calls `fit` with the same X and y, reads only the images of its share
        of the rows, and ends with the same model. What the head reads, (n, D), is gathered by every process.
        ``random_state`` must be an int; ``solver="sgd"`` is not supported.
    dtype : {"auto", "float32", "float64"}, default="auto"
        Precision of the network. ``"auto"``: float64 for vectors, float32 for images.
    random_state : int, RandomState instance or None, default=0
        Seeds the built-in network for vectors, random weights, the head and the order of batches of ``"sgd"``.
        Nothing else is random: by default the same data give the same model. None draws anew at each fit.
    verbose : int, default=0
        Above 0: progress bars (needs tqdm, extra ``progress``).

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Class labels.
    n_features_in_ : int
        Columns of a two-dimensional X; values of one image otherwise.
    feature_names_in_ : ndarray of shape (n_features_in_,)
        Names of the columns of a DataFrame; defined only when they are all strings.
    image_shape_ : tuple of int or None
        (H, W, C) of one image as given; None for vectors.
    coef_ : ndarray of shape (n_parameters,)
        Change d of the weights: linearized parameters of the network, then head weight (C, D), then head bias.
    intercept_ : ndarray of shape (n_classes,) or None
        Mean target, when centered; else None.
    alpha_ : float
        Absolute L2 penalty lambda.
    tail_scale_ : float
        Prior scale of the weights before the head, relative to the head's: the square root of their variance.
    temperature_ : float
        Divides the decision values before the softmax of ``predict_proba``; fitted on leave-one-out outputs of
        the ridge regression on the features.
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

    See Also
    --------
    sklearn.linear_model.RidgeClassifier : The same loss on fixed features.

    Notes
    -----
    With J the Jacobian of the C outputs at the pre-trained weights w0, minimizes over d = w - w0

    ``sum_i s_i |offset(x_i) + J(x_i) d - t_i|^2 + alpha_ (|d_head|^2 + |d_tail|^2 / tail_scale_^2)``,

    where s are sample weights, t scaled one-hot targets, and the offset is the mean target, or the head's
    leave-one-out output (``head="ridge"``). Strong convexity bounds the distance to the optimum, in the norm of the
    penalty, by the norm of the gradient over 2 ``alpha_``.

    The readout reads intermediate features because the expansion of a network is, to a good part, a linear model
    of them [2]_; it is the largest single gain in accuracy (see the page on accuracy in the documentation).

    References
    ----------
    .. [1] Achille, Golatkar, Ravichandran, Polito, Soatto, "LQF: Linear Quadratic Fine-Tuning", CVPR 2021
       (arXiv 2012.11140), sections 3 and 4.
    .. [2] Evci, Dumoulin, Larochelle, Mozer, "Head2Toe: Utilizing Intermediate Representations for Better Transfer
       Learning", ICML 2022 (arXiv 2201.03529).

    Examples
    --------
    >>> from sklearn.datasets import load_iris
    >>> from sklearn_lqf import LQFClassifier
    >>> X, y = load_iris(return_X_y=True)
    >>> LQFClassifier(random_state=0).fit(X, y).score(X, y) > 0.9
    True
    """

    def __init__(
        self,
        backbone: Any = "auto",
        *,
        weights: Any = "auto",
        tangent_layers: Any = 1,
        readout: str = "stages",
        head: str = "orthogonal",
        alpha: float | str = "auto",
        tail_weight: float | None = 0.03,
        negative_slope: float = 0.0,
        target_scale: float = 1.0,
        center: bool | str = "auto",
        damping: float = 0.1,
        solver: str = "pcg",
        max_iter: int = 200,
        tol: float = 1e-2,
        views: str | Sequence[str] = "identity",
        class_weight: Any = None,
        image_shape: Sequence[int] | None = None,
        image_size: Any = None,
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        batch_size: int = 64,
        cache: str = "auto",
        memory: Any = None,
        device: Any = "auto",
        distributed: bool = False,
        dtype: str = "auto",
        random_state: Any = 0,
        verbose: int = 0,
    ):
        self.backbone = backbone
        self.weights = weights
        self.tangent_layers = tangent_layers
        self.readout = readout
        self.head = head
        self.alpha = alpha
        self.tail_weight = tail_weight
        self.negative_slope = negative_slope
        self.target_scale = target_scale
        self.center = center
        self.damping = damping
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.views = views
        self.class_weight = class_weight
        self.image_shape = image_shape
        self.image_size = image_size
        self.channel_axis = channel_axis
        self.preprocessing = preprocessing
        self.batch_size = batch_size
        self.cache = cache
        self.memory = memory
        self.device = device
        self.distributed = distributed
        self.dtype = dtype
        self.random_state = random_state
        self.verbose = verbose

    # ------------------------------------------------------------------------------------------------- fit

    @with_callbacks
    def fit(self, X: Any, y: Any, sample_weight: Any = None) -> LQFClassifier:
        """Fit the linearized network.

        Parameters
        ----------
        X : array-like or sequence of images
            Images: an array (n, H, W) or (n, H, W, C) of uint8 (0..255) or floats (0..1), raveled rows
            (n, n_features) with ``image_shape``, or a sequence of paths, PIL images or arrays. Vectors:
            (n, n_features) of floats.
        y : array-like of shape (n,)
            Class labels.
        sample_weight : array-like of shape (n,), default=None
            Non-negative weights. A weight of 2 equals a row given twice, a weight of 0 a row left out.

        Returns
        -------
        self : LQFClassifier
            The fitted estimator.

        Raises
        ------
        ValueError
            Unusable parameters or data; the message says what was found and what to do.
        """
        device = choose_device(self.device)
        group = default_group(device) if self.distributed else ALONE
        group.together(self._check_parameters, group.size)
        rows, y, backbone = group.together(self._read_training_data, X, y)
        if group.size > 1:
            self._check_agreement(group, rows, y, sample_weight, backbone)
        self.classes_, codes = np.unique(y, return_inverse=True)
        if len(self.classes_) < 2:
            raise ValueError(
                f"LQFClassifier needs samples of at least 2 classes, but the data contains only one class: "
                f"{self.classes_[0]!r}"
            )
        weights, multiplicity = self._sample_weights(codes, sample_weight)
        keep = np.flatnonzero(weights)  # a weight of zero is a row left out
        if len(keep) < group.size:
            raise ValueError(f"{group.size} processes cannot share {len(keep)} image(s): start fewer processes.")
        model = self._prepare(backbone, rows, keep, weights, device)
        t = self._targets(codes[keep]).to(device)
        s = torch.tensor(weights[keep], device=device)
        m = torch.tensor(multiplicity[keep], device=device)
        own = keep[group.share(len(keep))]
        with Progress(self, self.verbose if group.rank == 0 else 0, self.max_iter, X, y) as progress:
            seen = Fingerprint(len(own))
            cache = group.together(self._trunk_activations, model, rows, own, seen, self.cache, progress)

            def minimize(size: int) -> SolverResult:
                return self._minimize(model, cache.rebatched(size), t, s, m, group, progress)

            # Processes that wait for each other cannot begin again one by one.
            result = with_smaller_batches(minimize, cache.batch_size) if group.size == 1 else minimize(cache.batch_size)
            self._set_solution(result)
            self._fingerprint = Fingerprint.of(group.all_gather_rows(seen.images), codes[keep], weights[keep])
        if not result.converged:
            warnings.warn(
                f"The solver stopped after {result.n_iter} iterations at a relative gradient of "
                f"{result.residual_norms[-1]:.1e}, above tol={self.tol:g}. {result.status.value}",
                ConvergenceWarning,
                stacklevel=2,
            )
        return self

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

    def _minimize(
        self,
        model: LinearModel,
        batches: TrunkCache,
        t: Tensor,
        s: Tensor,
        m: Tensor,
        group: Group,
        progress: Progress,
    ) -> SolverResult:
        """Everything that follows from the trunk activations; fitted attributes but the solution are set."""
        ridge = self._fit_head(model, batches, t, s, m, group)
        quadratic, preconditioner = self._pose(model, batches, ridge, t, s, group)
        self._set_result(model, quadratic, ridge, t, s)
        return self._solve(quadratic, preconditioner, progress)

    def _fit_head(
        self,
        model: LinearModel,
        batches: TrunkCache,
        t: Tensor,
        s: Tensor,
        multiplicity: Tensor,
        group: Group,
    ) -> RidgeHead:
        """The ridge regression on the features; sets the head at which the model is linearized."""
        features = self._gather(torch.cat([model.features(z) for z in batches]), group)
        if not bool(torch.isfinite(features).all()):
            raise ValueError(
                "The backbone's features of the training images are not all finite: check its weights and "
                "preprocessing, or use dtype='float64'."
            )
        features = model.standardize(features, s.repeat(len(features) // len(t)))
        features = features.view(-1, len(t), features.shape[1])  # (V, n, D)
        ridge = fit_ridge_head(features, t, s, multiplicity, _RIDGE_ALPHAS)
        if self.head == "ridge":
            model.set_head(ridge.weight, ridge.bias)
        else:
            draw = orthogonal_head if self.head == "orthogonal" else random_head
            model.set_head(draw(t.shape[1], features.shape[2], self._generator()), torch.zeros(t.shape[1]))
        return ridge

    def _gather(self, own: Tensor, group: Group) -> Tensor:
        """Rows of all processes from those of each, in the order of one process: view by view."""
        by_image = own.unflatten(0, (len(self._view_names()), -1)).transpose(0, 1)  # (n, V, ...)
        return group.all_gather_rows(by_image).transpose(0, 1).flatten(0, 1)

    def _pose(
        self, model: LinearModel, batches: TrunkCache, ridge: RidgeHead, t: Tensor, s: Tensor, group: Group
    ) -> tuple[Quadratic, KFAC]:
        """The quadratic and its preconditioner."""
        network = model.network
        assert network is not None
        views = ridge.held_out.shape[0]
        if self._centered():
            offset = _weighted_mean(t, s).expand(views, *t.shape)
        elif self.head == "ridge":
            offset = ridge.held_out
        else:
            with torch.no_grad():
                offset = torch.cat([network.at(z, gradients=False).outputs for z in batches])
            offset = self._gather(offset, group).view(views, *t.shape)
        residual = (t - offset).reshape(-1, t.shape[1]).to(model.dtype)
        weights = (s / views).repeat(views).to(model.dtype)
        own = torch.arange(len(residual), device=t.device).view(views, -1)[:, group.share(len(t))].flatten()
        kfac = build_kfac(network, batches, weights, _probes(*residual.shape).to(residual), group, own)
        weigh_tail(network, kfac, self.tail_weight)
        unit = kfac.trace / (t.shape[1] * float(s.sum()))  # mean squared norm of one row of the Jacobian
        alpha = max(ridge.alpha, _ALPHA_MIN * unit) if self.alpha == "auto" else unit * float(self.alpha)
        kfac.factorize(alpha, model.dtype, unit * float(self.damping))
        return Quadratic(network, batches, residual, weights, alpha, group, own), kfac

    def _solve(self, quadratic: Quadratic, preconditioner: KFAC, progress: Progress) -> SolverResult:
        def report(number: int, residual: float, x: Tensor) -> bool:
            stop = progress.iteration(number, residual, lambda: {"coef_": self._change_of_weights(x)})
            return quadratic.group.any(stop)

        b = quadratic.rhs()
        start = preconditioner.head_solution(b)
        if self.solver == "pcg":
            return pcg(quadratic.matvec, b, preconditioner, self.tol, self.max_iter, report, start)
        n_batches = len(quadratic.batches)
        return sgd(
            quadratic.matvec, quadratic.batch_matvec, n_batches, b, preconditioner, self.tol, self.max_iter,
            self._generator(), report, start,
        )  # fmt: skip

    def _set_result(self, model: LinearModel, quadratic: Quadratic, ridge: RidgeHead, t: Tensor, s: Tensor) -> None:
        """Fitted attributes that do not wait for the solution."""
        self._model = model
        self.alpha_ = quadratic.alpha
        self.device_ = str(model.device)
        self.n_parameters_ = quadratic.network.n_parameters
        self.tail_scale_ = quadratic.network.tail_scale
        self._n_tail = quadratic.network.slices["head.weight"].start
        mean = _weighted_mean(t, s).cpu().numpy()
        self.intercept_ = mean if self._centered() else None
        outputs = ridge.held_out.mean(0).cpu().numpy() / self.target_scale
        self.temperature_ = _fit_temperature(outputs, t.argmax(1).cpu().numpy(), s.cpu().numpy())

    def _set_solution(self, result: SolverResult) -> None:
        assert self._model.network is not None
        self._model.network.tail_scale = 1.0  # from here on directions are in the units of the weights
        self.coef_ = self._change_of_weights(result.x)
        self.n_iter_ = result.n_iter
        self.residual_norms_ = np.array(result.residual_norms)
        self.distance_bound_ = result.residual_norms[-1] * result.scale / self.alpha_
        self.converged_ = result.converged

    def _change_of_weights(self, x: Tensor) -> np.ndarray:
        """d in the units of the weights, from the solver's."""
        d = x.detach().cpu().numpy().copy()
        d[: self._n_tail] *= self.tail_scale_
        return d

    def _view_names(self) -> list[str]:
        return [self.views] if isinstance(self.views, str) else list(self.views)

    def _generator(self) -> torch.Generator:
        """A generator of torch's own, seeded by ``random_state``."""
        seed = check_random_state(self.random_state).randint(np.iinfo(np.int32).max)
        return torch.Generator().manual_seed(int(seed))

    def _targets(self, codes: np.ndarray) -> Tensor:
        """Scaled one-hot targets (n, C) in float64."""
        return torch.tensor(self.target_scale * np.eye(len(self.classes_))[codes])

    def _centered(self) -> bool:
        return self.head != "ridge" if isinstance(self.center, str) else bool(self.center)

    # --------------------------------------------------------------------------------------------- predict

    def decision_function(self, X: Any) -> np.ndarray:
        """Compute the outputs of the linearized network.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        decision : ndarray of shape (n, n_classes), or (n,) for two classes
            Estimates of the class indicators (their difference for two classes).
        """
        return self._decision(self._outputs(X))

    def _decision(self, values: np.ndarray) -> np.ndarray:
        return values[:, 1] - values[:, 0] if len(self.classes_) == 2 else values

    def predict(self, X: Any) -> np.ndarray:
        """Predict class labels.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        labels : ndarray of shape (n,)
            The class with the largest output.
        """
        chosen = self._outputs(X).argmax(1)
        return self.classes_[chosen]

    def predict_proba(self, X: Any) -> np.ndarray:
        """Predict probabilities of the classes.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        probabilities : ndarray of shape (n, n_classes)
            Softmax of the outputs over ``temperature_``.
        """
        values = self._outputs(X)
        return softmax(values / self.temperature_, axis=1)

    def predict_log_proba(self, X: Any) -> np.ndarray:
        """Predict logarithms of the probabilities of the classes.

        Parameters
        ----------
        X : array-like or sequence of images
            As in `fit`.

        Returns
        -------
        log_probabilities : ndarray of shape (n, n_classes)
            Log-softmax of the outputs over ``temperature_``.
        """
        values = self._outputs(X)
        return log_softmax(values / self.temperature_, axis=1)

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
        """Outputs in units of one-hot targets, (n, C)."""
        check_is_fitted(self)
        return self._in_batches(self._outputs_of, self._read_new_data(X))

    def _outputs_of(self, batches: Iterable[Sequence[Tensor]]) -> np.ndarray:
        """The same of trunk activations."""
        return self._model.outputs(batches, self.coef_, self.intercept_) / self.target_scale

    def _in_batches(self, work: Callable[[Iterator[tuple[Tensor, ...]]], Any], rows: Any) -> Any:
        """What is made of the trunk activations of rows, batch by batch."""
        activations = self._model.evaluator(self._memory())
        return with_smaller_batches(lambda size: work(map(activations, _batches(rows, size))), self.batch_size)

    def _memory(self) -> Any:
        """The joblib.Memory, or None."""
        if self.memory is None:
            return None
        return check_memory(os.fspath(self.memory) if isinstance(self.memory, os.PathLike) else self.memory)

    def _fitted_on(self, X: Any, y: Any, sample_weight: Any) -> tuple[TrainingSet, TrunkCache, np.ndarray]:
        """The training data, given again; their trunk activations; and which rows have a weight."""
        check_is_fitted(self)
        if self.head == "ridge":
            raise ValueError(
                "head='ridge' has seen the labels, so that the quadratic does not say what fit would have done without "
                "an image: use head='orthogonal'."
            )
        rows = self._read_new_data(X)
        codes = self._known_codes(y, len(rows), "y")
        weights, multiplicity = self._sample_weights(codes, sample_weight)
        keep = np.flatnonzero(weights)
        seen, kind = Fingerprint(len(keep)), "auto" if self.cache == "none" else self.cache
        cache = self._trunk_activations(self._model, rows, keep, seen, kind)
        if Fingerprint.of(seen.images, codes[keep], weights[keep]) != self._fingerprint:
            raise ValueError(
                "X, y and sample_weight are not the data that this model was fitted on: give all rows of fit, in any "
                "order."
            )
        t = self._targets(codes[keep])
        offsets = None
        if not self._centered():
            network = self._model.network
            assert network is not None
            found = torch.cat([network.at(z, gradients=False).outputs for z in cache])
            offsets = found.double().cpu().view(len(self._view_names()), *t.shape)
        data = TrainingSet(t, torch.tensor(weights[keep]), torch.tensor(multiplicity[keep]), offsets)
        return data, cache, keep

    def _known_codes(self, y: Any, n: int, name: str) -> np.ndarray:
        """Codes of n labels, which must be among the classes."""
        y = column_or_1d(y, warn=True)
        check_consistent_length(np.empty(n), y)
        unseen = np.setdiff1d(y, self.classes_)
        if len(unseen):
            raise ValueError(f"{name} has labels that are not among the classes of the fit: {unseen.tolist()[:5]}.")
        return np.searchsorted(self.classes_, y)

    # ------------------------------------------------------------------------------------------ validation

    def _check_parameters(self, n_processes: int) -> None:
        for name, low, strict in (
            ("alpha", 0, True), ("tail_weight", 0, True), ("negative_slope", 0, False), ("target_scale", 0, True),
            ("damping", 0, False), ("tol", 0, False),
        ):  # fmt: skip
            value = getattr(self, name)
            if name in _SPECIAL and (value is None or isinstance(value, str)) and value == _SPECIAL[name]:
                continue
            number = isinstance(value, Real) and not isinstance(value, bool) and np.isfinite(float(value))
            if not number or value < low or (strict and value == low):
                special = f"{_SPECIAL[name]!r} or " if name in _SPECIAL else ""
                raise ValueError(f"{name} must be {special}a number {'>' if strict else '>='} {low}, got {value!r}.")
        if self.negative_slope >= 1:
            raise ValueError(f"negative_slope must be below 1, got {self.negative_slope!r}.")
        for name in ("max_iter", "batch_size"):
            value = getattr(self, name)
            if not isinstance(value, Integral) or isinstance(value, bool) or value < 1:
                raise ValueError(f"{name} must be an int >= 1, got {value!r}.")
        for name, allowed in (
            ("solver", ("pcg", "sgd")), ("head", ("orthogonal", "random", "ridge")), ("readout", ("stages", "last")),
            ("cache", CACHES), ("dtype", ("auto", "float32", "float64")),
        ):  # fmt: skip
            value = getattr(self, name)
            if value not in allowed:
                raise ValueError(f"{name} must be one of {list(allowed)}, got {value!r}.")
        self._memory()
        if not isinstance(self.center, bool | np.bool_) and self.center != "auto":
            raise ValueError(f"center must be True, False or 'auto', got {self.center!r}.")
        if not isinstance(self.distributed, bool | np.bool_):
            raise ValueError(f"distributed must be True or False, got {self.distributed!r}.")
        if n_processes > 1 and self.solver == "sgd":
            raise ValueError("solver='sgd' does not support distributed=True with several processes: use 'pcg'.")
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
                "the labels y": repr(y.tolist()),
                "the sample weights": repr(None if sample_weight is None else np.asarray(sample_weight).tolist()),
                "the backbone's weights": itertools.chain(module.parameters(), module.buffers()),
            }
        )

    def _read_training_data(self, X: Any, y: Any) -> tuple[Any, np.ndarray, Backbone]:
        """Rows of X as vectors or images, labels, and the backbone that fits them."""
        if y is None:
            raise ValueError(f"{type(self).__name__} requires y to be passed, but the target y is None")
        if is_image_input(X, self.image_shape):
            backbone = load_backbone(self.backbone, self.weights, random_state=self.random_state)
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
            y = column_or_1d(y, warn=True)
            check_consistent_length(np.empty(len(rows)), y)
            check_classification_targets(y)
            return rows, y, backbone
        rows, y = validate_data(self, X, y, dtype=[np.float64, np.float32])
        check_classification_targets(y)
        self.image_shape_ = None
        if "flip" in self._view_names():
            raise ValueError(
                "views names 'flip', which mirrors images, but X holds vectors (set image_shape if its rows are "
                "raveled images)."
            )
        backbone = load_backbone(
            self.backbone, self.weights, vector_features=rows.shape[1], random_state=self.random_state
        )
        return rows, y, backbone

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

    def _sample_weights(self, codes: np.ndarray, sample_weight: Any) -> tuple[np.ndarray, np.ndarray]:
        """Weight of each row, and how many identical rows it stands for."""
        given = _check_sample_weight(sample_weight, codes, dtype=np.float64, ensure_non_negative=True)
        if not given.any():
            raise ValueError("Sample weights are all zero: at least two classes need a positive weight.")
        total = np.bincount(codes, weights=given, minlength=len(self.classes_))
        if self.class_weight is None:
            factor = np.ones(len(self.classes_))
        elif isinstance(self.class_weight, str) and self.class_weight == "balanced":
            factor = given.sum() / (np.count_nonzero(total) * np.where(total > 0, total, 1.0))
        else:
            factor = compute_class_weight(self.class_weight, classes=self.classes_, y=self.classes_[codes])
        weights = given * factor[codes]
        if (weights < 0).any() or not weights.any():
            raise ValueError(f"class_weight must give non-negative weights, not all zero; got {self.class_weight!r}.")
        return weights, np.maximum(given, 1.0)

    def __sklearn_clone__(self) -> LQFClassifier:
        """A clone shares a module given as backbone, which is never changed, instead of copying it."""
        if not isinstance(self.backbone, nn.Module):
            return super().__sklearn_clone__()
        shared, self.backbone = self.backbone, "auto"
        try:
            twin = super().__sklearn_clone__()
        finally:
            self.backbone = shared
        twin.backbone = shared
        return twin


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


def _probes(n_rows: int, n_outputs: int) -> Tensor:
    """Output directions for the curvature: all outputs, or one of random signs for each row when there are many.

    Seeded by a constant: they shape the preconditioner and the unit of alpha, and must not differ between fits.
    """
    if n_rows * n_outputs <= _EXACT_MAX:
        return torch.eye(n_outputs, dtype=torch.float64)
    generator = torch.Generator().manual_seed(0)
    return torch.randint(0, 2, (1, n_rows, n_outputs), generator=generator, dtype=torch.float64) * 2 - 1


def _weighted_mean(t: Tensor, s: Tensor) -> Tensor:
    return (s.unsqueeze(1) * t).sum(0) / s.sum()


def _fit_temperature(outputs: np.ndarray, codes: np.ndarray, weights: np.ndarray) -> float:
    """The temperature that minimizes the log-loss of the softmax of held-out outputs, (n, C)."""

    def loss(log_temperature: float) -> float:
        log_p = log_softmax(outputs / np.exp(log_temperature), axis=1)
        return -float(weights @ log_p[np.arange(len(codes)), codes])

    found = minimize_scalar(loss, bounds=(np.log(1e-2), np.log(1e1)), method="bounded")
    return float(np.exp(found.x))
