"""Linear Quadratic Fine-tuning of pre-trained image networks, as scikit-learn estimators."""

from .classifier import LQFClassifier
from .plotting import ConvergenceDisplay, InfluenceDisplay, PriorDisplay, RegularizationPathDisplay
from .reader import ImageReader
from .regressor import LQFRegressor
from .selection import LQFClassifierCV
from .versions import __version__, show_versions

__all__ = [
    "ConvergenceDisplay",
    "ImageReader",
    "InfluenceDisplay",
    "LQFClassifier",
    "LQFClassifierCV",
    "LQFRegressor",
    "PriorDisplay",
    "RegularizationPathDisplay",
    "__version__",
    "show_versions",
]
