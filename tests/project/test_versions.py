"""The report on versions, devices and backbones."""

import re
import runpy

import pytest
import torch

import sklearn_lqf
from sklearn_lqf.versions import installed_versions


@pytest.fixture
def report(monkeypatch, tmp_path, capsys):
    """What the command prints, without looking for what could be downloaded."""
    monkeypatch.setenv("TORCH_HOME", str(tmp_path))

    def shown() -> str:
        runpy.run_module("sklearn_lqf", run_name="__main__")
        return capsys.readouterr().out

    return shown


def test_report_names_versions_devices_and_backbones(report, capsys):
    printed = report()
    assert re.search(rf"^  sklearn_lqf +{re.escape(sklearn_lqf.__version__)}$", printed, re.M)
    assert re.search(rf"^  torch +{re.escape(installed_versions(['torch'])['torch'])}$", printed, re.M)
    assert re.search(r"^  cpu +\d+ threads$", printed, re.M)
    assert re.search(r"^  vector +auto$", printed, re.M)
    sklearn_lqf.show_versions()
    assert capsys.readouterr().out == printed
    runpy.run_module("sklearn_lqf.__main__", run_name="imported")
    assert capsys.readouterr().out == ""


def test_absent_packages_and_accelerators_are_listed(report, monkeypatch):
    class Device:
        name, total_memory = "Some GPU", 80 * 2**30

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda i: Device)
    assert installed_versions(["numpy-of-nobody"]) == {"numpy-of-nobody": None}
    assert re.search(r"^  cuda:0 +Some GPU, 80 GiB$", report(), re.M)
