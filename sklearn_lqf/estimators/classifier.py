"""The classifier that has nothing to tune."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from .classification import ClassifierBase
from .parameters import with_shared_parameters

__all__ = ["LQFClassifier"]


@with_shared_parameters
class LQFClassifier(ClassifierBase):
    """Linear Quadratic Fine-tuning of a pre-trained image network.

    A linear model of what a network computes of an image: its last features, and for the layers of every stage the
    gradient by their weights and the deviation of their input. How much each of these groups counts is learned from
    the data, by the closed-form leave-one-out error; the weights follow in closed form, too. There is no learning rate,
    and nothing to tune.

    Parameters
    ----------
    <network parameters>
    <model parameter>
    prior : {"leave-one-out", "evidence", "equal", "last"}, dict or array-like, default="leave-one-out"
        Prior variances of the groups of features. ``"leave-one-out"``: those with the smallest squared leave-one-out
        error, under a hyper-prior that expects as much of the last features as of all statistics of layers together.
        ``"evidence"``: those with the largest marginal likelihood, under the same hyper-prior. ``"equal"``: one for all
        groups but those of directions; ``"last"``: the last features alone, a ridge regression. A dict of group names,
        as in ``prior_``, or a number for each group, gives relative variances.
    alpha : float or "auto", default="auto"
        Variance of label noise over the prior variance of an output: the L2 penalty, in a unit that serves every
        backbone. ``"auto"``: the one with the smallest squared leave-one-out error.
    class_weight : dict, "balanced" or None, default=None
        Weights of classes, as in scikit-learn. Not supported with several labels for each image.
    <fit parameters>

    Attributes
    ----------
    classes_ : ndarray of shape (n_classes,)
        Class labels; the numbers of the columns of y where it has several.
    temperature_ : float
        Divides the decision values before the softmax (logistic function, for several labels) of
        ``predict_proba``; fitted on leave-one-out outputs, as if there were two images more and one of them had another
        label. From 0.05 to 10.
    <attributes>

    See Also
    --------
    LQFClassifierCV : Chooses the penalty by cross-validation.
    LQFRegressor : The same for numeric targets.
    sklearn.linear_model.RidgeClassifier : The same loss on fixed features.

    Notes
    -----
    With psi_g(x) the features of group g, centered and of mean squared norm 1 on the training images, the outputs are

    ``f_c(x) = b_c + sum_g sqrt(theta_g) <psi_g(x), beta_gc>``,

    and beta minimizes ``sum_i s_i |f(x_i) - t_i|^2 + |beta|^2``, where s are sample weights and t one-hot targets.
    theta are the prior variances over that of noise. Tangent features of a layer are gradients by its weight W, so that
    weights on them are a change of W for each class, to first order [1]_: of the mean of the layer's own output
    (``tangents="local"``), or of ``u_k . phi(x)``, phi the last features, summed over ``n_directions`` directions u_k
    (``"network"``), as Kronecker sketches. The directions have the covariance of the network's features of synthetic
    images: they depend on no data.

    Layers are read at their own output because the expansion of a network is, to a good part, a linear model of its
    intermediate features [2]_.

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
        output: Any = None,
        tangents: str | None = "local",
        tangent_layers: Any = 1,
        n_directions: int = 8,
        sketch_size: int | None = 16,
        model: str = "groups",
        prior: Any = "leave-one-out",
        alpha: float | str = "auto",
        class_weight: Any = None,
        negative_slope: float = 0.0,
        solver: str = "auto",
        max_iter: int = 200,
        tol: float = 1e-3,
        views: str | Sequence[str] = "identity",
        image_shape: Sequence[int] | None = None,
        image_size: Any = "auto",
        channel_axis: int = -1,
        preprocessing: Mapping[str, Any] | None = None,
        store_data: bool = False,
        random_state: Any = 0,
        verbose: int = 0,
        execution: Mapping[str, Any] | None = None,
    ):
        self.backbone = backbone
        self.weights = weights
        self.output = output
        self.tangents = tangents
        self.tangent_layers = tangent_layers
        self.n_directions = n_directions
        self.sketch_size = sketch_size
        self.model = model
        self.prior = prior
        self.alpha = alpha
        self.class_weight = class_weight
        self.negative_slope = negative_slope
        self.solver = solver
        self.max_iter = max_iter
        self.tol = tol
        self.views = views
        self.image_shape = image_shape
        self.image_size = image_size
        self.channel_axis = channel_axis
        self.preprocessing = preprocessing
        self.store_data = store_data
        self.random_state = random_state
        self.verbose = verbose
        self.execution = execution
