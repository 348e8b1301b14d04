"""Tables of the page on what only a linear model can tell, for `_report.py`."""

from collections import defaultdict

import numpy as np
from _report_speed import Rows, read, table


def mislabelled_table(rows: Rows) -> str:
    names = {
        "leave_one_out": "LQF, leave-one-out", "leave_one_out_head": "LQF, leave-one-out, `method=\"head\"`",
        "in_sample": "LQF, residual in the sample", "probe_leave_one_out": "ridge probe, leave-one-out",
        "nearest_neighbors": "10 nearest neighbors", "nft_confidence": "confidence of fine-tuning",
    }  # fmt: skip
    areas: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in rows:
        if r["section"] == "mislabelled":
            for name, area in r["auc"].items():
                areas[name][r["dataset"]].append(area)
    datasets = sorted({d for a in areas.values() for d in a})
    found = [[names[n], *(f"{np.mean(a[d]):.3f}" for d in datasets)] for n, a in areas.items()]
    return table(["ranked by", *datasets], found)


def removal_table(rows: Rows) -> str:
    found = [
        [r["dataset"], str(r["n"]), f"{r['correlation']:.4f}", f"{r['seconds']['fit']:.0f}",
         f"{r['seconds']['influence']:.0f}"]
        for r in rows
        if r["section"] == "removal"
    ]  # fmt: skip
    header = [
        "data",
        "images",
        "correlation of predicted and actual change",
        "one fit, s",
        "influence on 200 images, s",
    ]
    return table(header, found)


def estimates_table(rows: Rows) -> str:
    found = []
    for r in rows:
        if r["section"] != "estimates":
            continue
        for method in ("exact", "cg", "kfac"):
            correlations = ["1", "1"]
            if method != "exact":
                correlations = [f"{r[k][method]:.3f}" for k in ("rank_correlation", "smallest")]
            found.append([r["dataset"], f'`"{method}"`', *correlations, f"{r['seconds'][method]:.0f}"])
    return table(["data", "`method`", "rank correlation, median", "smallest", "seconds"], found)


def costs_table(rows: Rows) -> str:
    names = {
        "forget_warm": ("forget 5 images, `warm_start=True`", "0.5"), "forget": ("forget 5 images", ""),
        "leave_one_out_head": ('leave-one-out, `method="head"`', ""),
        "influence_kfac": ('influence of 10 images, `method="kfac"`', ""),
        "influence_cg": ('influence of 10 images, `method="cg"`', ""), "influence": ("influence of 10 images", "10"),
        "leave_one_out": ("leave-one-out", "5"), "path": ("path of 20 penalties", "4"),
        "path_of_folds": ("path of 20 penalties in 5 folds, and the fit", ""),
    }  # fmt: skip
    chosen = [r for r in rows if r["section"] == "costs"]
    found = [
        [name, *(f"{r['fits'][key]:.2f}" for r in chosen), target] for key, (name, target) in names.items() if chosen
    ]
    fits = ["one fit, seconds", *(f"{r['seconds']['fit']:.1f}" for r in chosen), ""]
    header = ["in units of a fit", *(f"{r['dataset']}, {r['n']} images" for r in chosen), "target"]
    return table(header, [*found, fits] if chosen else [])


def coverage_table(rows: Rows) -> str:
    groups: dict[str, list[dict]] = defaultdict(list)
    for r in rows:
        if r["section"] == "coverage":
            groups[r["dataset"]].append(r)
    found = []
    for dataset, group in groups.items():
        for name, label in (("exact", "exact"), ("kfac", "K-FAC")):
            levels = [f"{100 * np.mean([r[f'{name}_{level}'] for r in group]):.0f}" for level in ("0.5", "0.9", "0.95")]
            r2 = f"{np.mean([r['r2'] for r in group]):.2f}"
            found.append([dataset, label, r2, *levels])
    return table(["data", "covariance", "R2", "50 %", "90 %", "95 %"], found)


def regime_table(rows: Rows) -> str:
    found = []
    for r in rows:
        if r["section"] != "regime":
            continue
        for layers in ("1", "all"):
            m = r[layers]
            shares = [
                f"{100 * m['same_prediction']:.0f}", f"{100 * m['accuracy_linear']:.1f}",
                f"{100 * m['accuracy_network']:.1f}",
            ]  # fmt: skip
            found.append([r["dataset"], layers, f"{m['gap_over_change_by_the_tail']:.2f}", *shares])
    header = ["data", "`tangent_layers`", "gap over what the tail adds", "same prediction, %", "accuracy, linear"]
    return table([*header, "accuracy, network at w0 + d"], found)


def tables() -> dict[str, str]:
    """All tables by the names of their places."""
    rows = read("trust").get("rows", [])
    return {
        "mislabelled": mislabelled_table(rows),
        "removal": removal_table(rows),
        "estimates": estimates_table(rows),
        "costs": costs_table(rows),
        "coverage": coverage_table(rows),
        "regime": regime_table(rows),
    }
