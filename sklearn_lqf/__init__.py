"""Linear Quadratic Fine-tuning of pre-trained image networks, as scikit-learn estimators."""

from .classifier import LQFClassifier
from .plotting import ConvergenceDisplay, InfluenceDisplay, RegularizationPathDisplay
from .reader import ImageReader
from .regressor import LQFRegressor
from .selection import LQFClassifierCV

__version__ = "0.1.0.dev0"

__all__ = [
    "ConvergenceDisplay",
    "ImageReader",
    "InfluenceDisplay",
    "LQFClassifier",
    "LQFClassifierCV",
    "LQFRegressor",
    "RegularizationPathDisplay",
]
