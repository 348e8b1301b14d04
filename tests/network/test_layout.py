"""Networks whose code asks for torch's default order of memory."""

import numpy as np
import pytest
import torch
from support.data import make_images
from torch import nn

from sklearn_lqf import LQFClassifier

X, Y = make_images()


class Flattened(nn.Module):
    """Flattens maps by ``view``, as tutorials do, or by ``reshape``; may branch on values, which cannot be traced."""

    def __init__(self, view: bool, branch: bool):
        super().__init__()
        torch.manual_seed(0)
        self.conv = nn.Conv2d(3, 4, 3, padding=1)
        self.hidden, self.head = nn.Linear(4 * (X.shape[1] // 2) * (X.shape[2] // 2), 8), nn.Linear(8, 3)
        self.view, self.branch = view, branch

    def forward(self, x):
        x = torch.max_pool2d(self.conv(x).relu(), 2)
        if self.branch and x.sum() < -1e9:
            x = -x
        x = x.view(x.size(0), -1) if self.view else x.reshape(x.size(0), -1)
        return self.head(self.hidden(x).relu())


@pytest.mark.filterwarnings("ignore:The backbone cannot be traced")
@pytest.mark.parametrize("tangents", ["local", "network"])
@pytest.mark.parametrize("branch", [False, True], ids=["traced", "untraced"])
def test_maps_may_be_flattened_by_view(branch, tangents):
    def decision(view: bool) -> np.ndarray:
        clf = LQFClassifier(Flattened(view, branch), tangents=tangents, execution={"dtype": "float64"})
        return clf.fit(X, Y).decision_function(X)

    np.testing.assert_allclose(decision(True), decision(False), atol=1e-9)
