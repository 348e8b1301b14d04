"""Tables of the page on what only a linear model can tell, for `_report.py`."""

from collections import defaultdict

import numpy as np
from _report_speed import Rows, read, table


def of(rows: Rows, section: str) -> Rows:
    return [r for r in rows if r["section"] == section]


def mislabelled_table(rows: Rows) -> str:
    names = {
        "leave_one_out": "LQF, leave-one-out", "in_sample": "LQF, residual in the sample",
        "probe_leave_one_out": "ridge probe, leave-one-out", "nearest_neighbors": "10 nearest neighbors",
        "nft_confidence": "confidence of fine-tuning",
    }  # fmt: skip
    areas: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in of(rows, "mislabelled"):
        for name, area in r["auc"].items():
            areas[name][r["dataset"]].append(area)
    datasets = sorted({d for a in areas.values() for d in a})
    found = [
        [names[n], *(f"{np.mean(a[d]):.3f}" + (f" ± {np.std(a[d], ddof=1) / len(a[d]) ** 0.5:.3f}"
                     if len(a[d]) > 1 else "") for d in datasets)]
        for n, a in areas.items()
    ]  # fmt: skip
    return table(["ranked by", *datasets], found)


def removal_table(rows: Rows) -> str:
    found = [
        [r["dataset"], str(r["n"]), str(len(r["actual"])), f"{r['correlation']:.4f}", f"{r['slope']:.2f}",
         f"{r['largest_difference_of_refits']:.0e}"]
        for r in of(rows, "removal")
    ]  # fmt: skip
    header = ["data", "images", "removed", "correlation of predicted and actual change", "actual over predicted"]
    return table([*header, "largest difference of outputs, `forget` and `fit`"], found)


def costs_table(rows: Rows) -> str:
    chosen = [*of(rows, "costs"), *of(rows, "many")]
    if not chosen:
        return table([], [])
    names = {
        "leave_one_out": "leave-one-out of all images", "influence": "influence on 10 images",
        "posterior": "standard deviations of 10 images", "forget": "forget 5 images",
    }  # fmt: skip
    found = [[name, *(f"{r['fits'][key]:.2f}" for r in chosen)] for key, name in names.items()]
    found.append(["one fit, seconds", *(f"{r['seconds']['fit']:.1f}" for r in chosen)])
    memory = [f"{r['host_bytes'] / 2**20:.0f}" if "host_bytes" in r else "" for r in chosen]
    found.append(["memory of all of it, MiB", *memory])
    classes = [f" of {r['n_classes']} classes" if "n_classes" in r else "" for r in chosen]
    heads = [f"{r['dataset']}, {r['n']} images{c}" for r, c in zip(chosen, classes, strict=True)]
    return table(["in units of a fit", *heads], found)


def coverage_table(rows: Rows) -> str:
    groups: dict[str, Rows] = defaultdict(list)
    for r in of(rows, "coverage"):
        groups[r["dataset"]].append(r)
    found = []
    for dataset, group in groups.items():
        levels = [f"{100 * np.mean([r[level] for r in group]):.0f}" for level in ("0.5", "0.9", "0.95")]
        found.append([dataset, f"{np.mean([r['r2'] for r in group]):.2f}", *levels])
    return table(["data", "R2", "50 %", "90 %", "95 %"], found)


def tables() -> dict[str, str]:
    """All tables by the names of their places."""
    rows = read("trust").get("rows", [])
    return {
        "mislabelled": mislabelled_table(rows),
        "removal": removal_table(rows),
        "costs": costs_table(rows),
        "coverage": coverage_table(rows),
    }
