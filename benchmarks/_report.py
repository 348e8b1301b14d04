"""Tables and figures of README.md and the pages in docs, made from the JSON files in benchmarks/results.

A table stands between the comments ``<!-- NAME -->`` and ``<!-- end -->``; what is between them is replaced.

    make report
"""

import itertools
import json
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import _report_speed
import _report_trust
import matplotlib.pyplot as plt
import numpy as np
from _report_speed import table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
METHODS = {"ridge": "ridge probe", "logistic": "logistic probe", "nft": "fine-tuning", "lqf": "LQF"}
DATASETS = {"trashnet": "TrashNet", "digits": "digits", "dtd10": "DTD, 10 classes"}
COLORS = {"ridge": "tab:gray", "logistic": "tab:olive", "nft": "tab:orange", "lqf": "tab:blue"}
FEW = 20  # images a class

Cells = dict[tuple[str, int], dict[str, list[dict[str, Any]]]]


def percent(values: list[float]) -> str:
    """Mean and standard error, in per cent."""
    error = np.std(values, ddof=1) / len(values) ** 0.5 if len(values) > 1 else np.nan
    return f"{100 * np.mean(values):.1f} ± {100 * error:.1f}"


def read_cells() -> Cells:
    """Rows of every cell by method."""
    cells: Cells = defaultdict(dict)
    for dataset, method in itertools.product(DATASETS, METHODS):
        path = RESULTS / "accuracy" / f"{dataset}-{method}.json"
        for row in json.loads(path.read_text())["rows"] if path.exists() else []:
            cells[dataset, row["per_class"]].setdefault(method, []).append(row)
    return dict(sorted(cells.items(), key=lambda c: (list(DATASETS).index(c[0][0]), c[0][1])))


def values(cell: dict[str, list[dict[str, Any]]], method: str, key: str) -> list[float]:
    return [row[key] for row in cell.get(method, [])]


def accuracy_table(cells: Cells) -> str:
    rows = []
    for (dataset, per_class), cell in cells.items():
        found = [percent(v) if (v := values(cell, m, "accuracy")) else "" for m in METHODS]
        rows.append([DATASETS[dataset], str(per_class), *found])
    return table(["data", "images a class", *METHODS.values()], rows)


def compared(cells: Cells) -> dict[tuple[str, int], dict[str, float]]:
    """Mean accuracies of the cells in which probe, NFT and LQF were all measured on the same splits."""
    return {
        key: {m: float(np.mean(values(cell, m, "accuracy"))) for m in METHODS}
        for key, cell in cells.items()
        if len({len(cell.get(m, [])) for m in METHODS}) == 1
    }


def summary_table(cells: Cells) -> str:
    means = compared(cells)
    few = {k: v for k, v in means.items() if k[1] <= FEW}

    def gain(group: dict, method: str) -> float:
        return 100 * float(np.mean([v["lqf"] - v[method] for v in group.values()]))

    worst, where = min((100 * (v["lqf"] - v["nft"]), k) for k, v in means.items())
    seconds = {
        m: [float(np.mean(values(cells[k], m, "fit_cpu_seconds"))) for k in means] for m in ("lqf", "nft")
    }  # the search for NFT's learning rate is not counted
    ratios = np.divide(seconds["lqf"], seconds["nft"])
    rows = [
        [f"LQF minus fine-tuning, points, up to {FEW} images a class ({len(few)})", f"{gain(few, 'nft'):+.1f}", "+1.0"],
        [f"LQF minus fine-tuning, points, all cells ({len(means)})", f"{gain(means, 'nft'):+.1f}", "-0.5"],
        ["LQF minus ridge probe, points, all cells", f"{gain(means, 'ridge'):+.1f}", "+1.5"],
        [f"worst cell against fine-tuning ({DATASETS[where[0]]}, {where[1]})", f"{worst:+.1f}", "-2.5"],
        ["time to fit over that of one fine-tuning, median", f"{np.median(ratios):.2f}", "0.33"],
        ["time to fit over that of one fine-tuning, largest", f"{ratios.max():.2f}", "0.33"],
    ]
    return table(["", "measured", "target"], rows)


def seconds_table(cells: Cells) -> str:
    rows = []
    for (dataset, per_class), cell in cells.items():
        found = [f"{np.mean(v):.0f}" if (v := values(cell, m, "fit_cpu_seconds")) else "" for m in METHODS]
        rows.append([DATASETS[dataset], str(per_class), *found])
    return table(["data", "images a class", *METHODS.values()], rows)


def calibration_table(cells: Cells) -> str:
    methods = [m for m in METHODS if m != "ridge"]
    rows = []
    for (dataset, per_class), cell in cells.items():
        if not all(m in cell for m in methods):
            continue
        pairs = [f"{np.mean(values(cell, m, k)):.3f}" for k in ("log_loss", "ece") for m in methods]
        rows.append([DATASETS[dataset], str(per_class), *pairs])
    names = [METHODS[m] for m in methods]
    return table(["data", "images a class", *(f"log-loss, {n}" for n in names), *(f"ECE, {n}" for n in names)], rows)


def recipe_table() -> str:
    rows = json.loads((RESULTS / "recipe.json").read_text())["rows"]
    columns = sorted({(r["dataset"], r["per_class"]) for r in rows}, reverse=True)
    levers: dict[str, dict] = defaultdict(dict)
    for r in rows:
        levers[r["lever"]].setdefault((r["dataset"], r["per_class"]), []).append(r)
    lines = []
    for lever, found in levers.items():
        if set(found) != set(columns):
            continue
        accuracies = [100 * np.mean([r["accuracy"] for r in found[c]]) for c in columns]
        every = [r for c in columns for r in found[c]]
        loss = np.mean([np.mean([r["log_loss"] for r in found[c]]) for c in columns])
        seconds, iterations = (sum(r[k] for r in every) for k in ("fit_cpu_seconds", "n_iter"))
        lines.append(
            [lever, *(f"{a:.1f}" for a in accuracies), f"{np.mean(accuracies):.1f}", f"{loss:.3f}",
             f"{iterations / len(every):.0f}", f"{seconds / len(every):.0f}"]
        )  # fmt: skip
    lines.sort(key=lambda line: line[0] != "default")
    names = [f"{DATASETS[d]} {k}" for d, k in columns]
    return table(["lever", *names, "mean", "log-loss", "iterations", "seconds"], lines)


def readout_table() -> str:
    groups: dict[str, dict] = defaultdict(lambda: defaultdict(list))
    for r in json.loads((RESULTS / "readout.json").read_text())["rows"]:
        groups[r["readout"]][r["dataset"], r["per_class"]].append(r)
    columns = list(dict.fromkeys(c for found in groups.values() for c in found))
    rows = [
        [name, *(f"{100 * np.mean([r['accuracy'] for r in found[c]]):.1f} "
                 f"({np.mean([r['leave_one_out_error'] for r in found[c]]):.3f})" for c in columns)]
        for name, found in groups.items()
    ]  # fmt: skip
    return table(["readout", *(f"{DATASETS[d]} {k}" for d, k in columns)], rows)


def ablation_table() -> str:
    report = json.loads((RESULTS / "ablation.json").read_text())
    groups: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    for r in report["rows"]:
        groups[r["slope"], r["loss"], r["kfac"]].append(r["accuracy"])
    rows = []
    for (slope, loss, kfac), found in groups.items():
        at = [f"{100 * np.mean([f[i] for f in found]):.1f}" for i in found[0]]
        rows.append([f"{slope:g}", loss, "yes" if kfac else "no", *at])
    iterations = [f"after {i}" for i in report["rows"][0]["accuracy"]]
    return table(["slope of the leak", "loss", "K-FAC", *iterations], rows)


def read_robustness() -> list[dict[str, Any]]:
    reports = [json.loads((RESULTS / f"robustness-{m}.json").read_text()) for m in ("nft", "lqf")]
    return [{"method": report["method"], **row} for report in reports for row in report["rows"]]


def robustness_table() -> str:
    groups: dict[tuple[str, str], list[dict[str, Any]]] = defaultdict(list)
    for r in read_robustness():
        groups[r["method"], r["parameter"]].append(r)
    rows = []
    for (method, parameter), found in groups.items():
        accuracies = [100 * r["accuracy"] for r in found]
        tried = ", ".join(f"{r['value']:g}" for r in found)
        rows.append([METHODS[method], parameter, tried, f"{min(accuracies):.1f}", f"{max(accuracies):.1f}"])
    return table(["method", "parameter", "values", "lowest accuracy", "highest accuracy"], rows)


def draw_accuracy(cells: Cells) -> None:
    shown = [d for d in DATASETS if any(k[0] == d for k in cells)]
    fig, axes = plt.subplots(1, len(shown), figsize=(4 * len(shown), 3.6), layout="constrained")
    for ax, dataset in zip(np.atleast_1d(axes), shown, strict=True):
        for method, name in METHODS.items():
            points = [(k[1], values(c, method, "accuracy")) for k, c in cells.items() if k[0] == dataset]
            points = [(n, v) for n, v in points if v]
            if points:
                x, means = [n for n, _ in points], [100 * np.mean(v) for _, v in points]
                errors = [100 * np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0 for _, v in points]
                ax.errorbar(x, means, errors, marker="o", capsize=2, color=COLORS[method], label=name)
        ax.set_xscale("log")
        ticks = sorted({k[1] for k in cells if k[0] == dataset})
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set(title=DATASETS[dataset], xlabel="images a class")
        ax.grid(alpha=0.3)
    np.atleast_1d(axes)[0].set_ylabel("test accuracy, %")
    np.atleast_1d(axes)[0].legend()
    fig.savefig(IMAGES / "accuracy.png", dpi=110)


def draw_robustness() -> None:
    rows = read_robustness()
    fig, ax = plt.subplots(figsize=(6, 3.8), layout="constrained")
    marks = {("nft", "lr"): "tab:orange", ("lqf", "alpha"): "tab:blue", ("lqf", "tail_weight"): "tab:cyan",
             ("lqf", "damping"): "tab:purple"}  # fmt: skip
    for (method, parameter), color in marks.items():
        points = [
            (r["value"], 100 * r["accuracy"]) for r in rows if (r["method"], r["parameter"]) == (method, parameter)
        ]
        label = f"{METHODS[method]}: {'learning rate' if parameter == 'lr' else parameter}"
        ax.semilogx(*zip(*sorted(points), strict=True), marker="o", color=color, label=label)
    ax.set(xlabel="value of the parameter", ylabel="test accuracy, %", title="TrashNet, 20 images a class")
    ax.grid(alpha=0.3)
    ax.legend()
    fig.savefig(IMAGES / "robustness.png", dpi=110)


def fill(path: Path, tables: dict[str, str]) -> None:
    """Replace the tables of a page; every marker in it must be known."""
    text = path.read_text()
    for name in re.findall(r"<!-- (?!end)(\S+) -->", text):
        block = f"<!-- {name} -->\n\n{tables[name]}\n\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, count=1, flags=re.S)
    path.write_text(text)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    cells = read_cells()
    tables = {
        "accuracy": accuracy_table(cells),
        "summary": summary_table(cells),
        "seconds": seconds_table(cells),
        "calibration": calibration_table(cells),
        "readout": readout_table(),
        "recipe": recipe_table(),
        "ablation": ablation_table(),
        "robustness": robustness_table(),
        **_report_speed.tables(),
        **_report_trust.tables(),
    }
    draw_accuracy(cells)
    draw_robustness()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        fill(page, tables)


if __name__ == "__main__":
    main()
