"""Linear Quadratic Fine-tuning of pre-trained image networks, as scikit-learn estimators."""

from .backbones.packages import list_backbones
from .displays.convergence import ConvergenceDisplay
from .displays.influential_images import InfluenceDisplay
from .displays.prior_shares import PriorDisplay
from .displays.regularization_path import RegularizationPathDisplay
from .estimators.classifier import LQFClassifier
from .estimators.image_features import ImageFeatures
from .estimators.image_reader import ImageReader
from .estimators.regressor import LQFRegressor
from .estimators.search import LQFClassifierCV
from .images.folders import load_image_folder
from .versions import __version__, show_versions

__all__ = [
    "ConvergenceDisplay",
    "ImageFeatures",
    "ImageReader",
    "InfluenceDisplay",
    "LQFClassifier",
    "LQFClassifierCV",
    "LQFRegressor",
    "PriorDisplay",
    "RegularizationPathDisplay",
    "__version__",
    "list_backbones",
    "load_image_folder",
    "show_versions",
]
