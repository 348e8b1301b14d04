"""Linear Quadratic Fine-tuning of pre-trained image networks, as scikit-learn estimators."""

from .estimators.classifier import LQFClassifier
from .estimators.displays import ConvergenceDisplay, InfluenceDisplay, PriorDisplay, RegularizationPathDisplay
from .estimators.image_reader import ImageReader
from .estimators.regressor import LQFRegressor
from .estimators.search import LQFClassifierCV
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
