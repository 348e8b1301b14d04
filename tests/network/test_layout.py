"""Networks whose code asks for torch's default order of memory."""

import numpy as np
import pytest
import torch
from support.data import make_images
from support.networks import Other, built
from torch import nn

from sklearn_lqf import LQFClassifier

X, Y = make_images()


def flattened(view: bool) -> nn.Module:
    """Flattens maps by ``view``, as tutorials do, or by ``reshape``; branches on values, which cannot be traced."""

    def forward(m, x):
        x = torch.max_pool2d(m.conv(x).relu(), 2)
        x = x if x.sum() > -1e9 else -x
        return m.head(m.hidden(x.view(x.size(0), -1) if view else x.reshape(x.size(0), -1)).relu())

    def make():
        return Other(forward, conv=nn.Conv2d(3, 4, 3, padding=1), hidden=nn.Linear(144, 8), head=nn.Linear(8, 3))

    return built(make)


def test_maps_may_be_flattened_by_view():
    def decision(view: bool) -> np.ndarray:
        clf = LQFClassifier(flattened(view), tangents="both", execution={"dtype": "float64"})
        with pytest.warns(UserWarning, match="cannot be traced"):
            return clf.fit(X, Y).decision_function(X)

    np.testing.assert_allclose(decision(True), decision(False), atol=1e-9)
