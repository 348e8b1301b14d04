"""Every public name has a numpydoc docstring that agrees with its signature."""

import ast
import inspect
import re

import pytest
from numpydoc.docscrape import ClassDoc
from numpydoc.validate import validate
from sklearn.base import BaseEstimator

import sklearn_lqf

IGNORED = {
    "GL01",  # the summary stands on the line of the opening quotes, as in scikit-learn
    "ES01",  # a good summary may be enough
    "RT02",  # return values carry a name, as in scikit-learn
    "SA01",  # See Also where there is something to see
    "EX01",  # examples stand with the classes, not with each method
}


def _own_methods(cls: type) -> list[str]:
    """Public methods and properties of a class that this package defines, also in a private base class."""
    names = set()
    for name in {name for base in cls.__mro__ for name in vars(base) if not name.startswith("_")}:
        member = inspect.getattr_static(cls, name)
        member = member.fget if isinstance(member, property) else getattr(cls, name)
        # Methods that scikit-learn makes, such as set_fit_request, have a module of scikit-learn.
        if inspect.isroutine(member) and (getattr(member, "__module__", None) or "").startswith("sklearn_lqf"):
            names.add(name)
    return sorted(names)


PUBLIC = {name: getattr(sklearn_lqf, name) for name in sklearn_lqf.__all__ if callable(getattr(sklearn_lqf, name))}
CLASSES = {name: value for name, value in PUBLIC.items() if inspect.isclass(value)}
DOCUMENTED = [*PUBLIC, *(f"{name}.{method}" for name, cls in CLASSES.items() for method in _own_methods(cls))]
ESTIMATORS = [cls for cls in CLASSES.values() if issubclass(cls, BaseEstimator)]


def test_methods_are_found():
    # The lists are made when this file is collected: empty ones would pass unseen.
    assert {"LQFClassifier", "LQFClassifier.fit", "LQFRegressor.leave_one_out", "PriorDisplay.plot"} <= set(DOCUMENTED)
    assert "LQFClassifier.set_fit_request" not in DOCUMENTED  # which scikit-learn makes
    assert len(ESTIMATORS) >= 4


@pytest.mark.parametrize("name", DOCUMENTED)
def test_docstring_is_valid_numpydoc(name):
    errors = validate(f"sklearn_lqf.{name}")["errors"]
    found = [f"{code}: {message}" for code, message in errors if code not in IGNORED]
    assert not found, f"docstring of {name}:\n" + "\n".join(found)


@pytest.mark.parametrize("estimator", ESTIMATORS)
def test_parameters_are_documented_with_their_defaults(estimator):
    documented = {p.name: p.type for p in ClassDoc(estimator)["Parameters"]}
    parameters = dict(inspect.signature(estimator).parameters)
    assert list(documented) == list(parameters)
    for name, parameter in parameters.items():
        if parameter.default is not inspect.Parameter.empty:
            stated = re.search(r"default=(.+)$", documented[name])
            assert stated, f"{estimator.__name__}.{name} states no default, as in 'float, default=1.0'"
            assert ast.literal_eval(stated[1]) == parameter.default, f"{estimator.__name__}.{name}"
