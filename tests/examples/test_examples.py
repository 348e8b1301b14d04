"""The examples run, and what each of them asserts at its end holds; their figures are drawn."""

from pathlib import Path

import matplotlib.pyplot as plt
import pytest

EXAMPLES = sorted((Path(__file__).parents[2] / "examples").glob("plot_*.py"))


@pytest.mark.slow
@pytest.mark.parametrize("script", EXAMPLES, ids=lambda path: path.stem)
def test_example(script, tmp_path, monkeypatch):
    monkeypatch.setattr("sys.argv", [str(tmp_path / script.name)])  # figures are put beside it
    try:
        exec(compile(script.read_text(encoding="utf-8"), script, "exec"), {"__name__": "__main__"})
    finally:
        plt.close("all")
    assert list((tmp_path / "output").iterdir())
