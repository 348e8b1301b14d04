"""Tables and figures of README.md and the pages in docs, made from the JSON files in benchmarks/results.

A table stands between the comments ``<!-- NAME -->`` and ``<!-- end -->``; what is between them is replaced. Results
that are not there yet are left out.

    make report
"""

import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import _report_families
import _report_speed
import _report_trust
import matplotlib.pyplot as plt
import numpy as np
from _report_speed import read, table

ROOT = Path(__file__).resolve().parents[1]
RESULTS = ROOT / "benchmarks" / "results"
IMAGES = ROOT / "docs" / "images"
METHODS = {
    "ridge": "ridge probe", "logistic": "logistic probe", "version1": "version 0.1", "nft": "fine-tuning", "lqf": "LQF",
}  # fmt: skip
NEAR = {
    "monkeys": "monkeys", "caltech101": "Caltech, 20 classes", "grocery": "groceries", "intelscenes": "Intel scenes"
}  # fmt: skip
FAR = {
    "seedlings": "seedlings", "rsscn7": "RSSCN7", "neusteel": "NEU steel", "trashnet": "TrashNet",
    "dtd10": "DTD, 10 classes", "digits": "digits",
}  # fmt: skip
DATASETS = NEAR | FAR
COLORS = {
    "ridge": "tab:gray", "logistic": "tab:olive", "version1": "tab:purple", "nft": "tab:orange", "lqf": "tab:blue"
}  # fmt: skip
_MANY = 30  # images a class from which tangents are judged

Rows = list[dict[str, Any]]
Cell = dict[str, dict[int, dict[str, Any]]]  # method -> split -> row
Cells = dict[tuple[str, int], Cell]  # by data set and images a class


# ---------------------------------------------------------------------------------------------------- accuracy


def folder_of(dataset: str) -> str:
    """Of a data set, or of the folder whose classes a pair is made of."""
    return dataset.partition(":")[0]


def label(dataset: str) -> str:
    folder, _, pair = dataset.partition(":")
    return DATASETS[folder] + (f", classes {pair.replace('+', ' and ')}" if pair else "")


def read_cells(folder: str = "accuracy") -> Cells:
    """All rows that were measured."""
    cells: Cells = defaultdict(lambda: defaultdict(dict))
    for path in sorted((RESULTS / folder).glob("*.json")):
        report = json.loads(path.read_text())
        if report["method"] not in METHODS or folder_of(report["dataset"]) not in DATASETS:
            continue
        for row in report["rows"]:
            cells[report["dataset"], row["per_class"]][report["method"]][row["split"]] = row
    order = list(DATASETS)
    return dict(sorted(cells.items(), key=lambda c: (order.index(folder_of(c[0][0])), c[0])))


def values(cell: Cell, method: str, key: str) -> list[float]:
    """Of all splits; none where the method was not measured."""
    return [row[key] for row in cell.get(method, {}).values() if key in row]


def mean_and_error(found: Sequence[float], scale: float = 100.0) -> str:
    """Mean and standard error, in per cent."""
    if not found:
        return ""
    error = f" ± {scale * np.std(found, ddof=1) / len(found) ** 0.5:.1f}" if len(found) > 1 else ""
    return f"{scale * np.mean(found):.1f}{error}"


def by_cell(cells: Cells, shown: dict[str, str], entry: Callable[[Cell, str], str]) -> str:
    """A table with a row for each cell in which LQF was measured, and a column for each method that was."""
    methods = [m for m in shown if any(m in cell for cell in cells.values())]
    rows = [
        [label(dataset), str(per_class), *(entry(cell, m) for m in methods)]
        for (dataset, per_class), cell in cells.items()
    ]
    return table(["data", "images a class", *(shown[m] for m in methods)], rows)


def accuracy_table(cells: Cells, methods: Sequence[str] = tuple(METHODS)) -> str:
    return by_cell(cells, {m: METHODS[m] for m in methods}, lambda cell, m: mean_and_error(values(cell, m, "accuracy")))


def seconds_table(cells: Cells) -> str:
    def entry(cell: Cell, method: str) -> str:
        found = values(cell, method, "fit_cpu_seconds")
        return f"{np.mean(found):.1f}" if found else ""

    return by_cell(cells, METHODS, entry)


def calibration_table(cells: Cells) -> str:
    methods = [m for m in METHODS if m != "ridge" and any(m in cell for cell in cells.values())]
    rows = []
    for (dataset, per_class), cell in cells.items():
        found = [values(cell, m, k) for k in ("log_loss", "ece") for m in methods]
        rows.append([label(dataset), str(per_class), *(f"{np.mean(v):.3f}" if v else "" for v in found)])
    names = [f"{kind}, {METHODS[m]}" for kind in ("log-loss", "ECE") for m in methods]
    return table(["data", "images a class", *names], rows)


def differences(cells: Cells, one: str, other: str, key: str = "accuracy") -> dict[tuple[str, int], float]:
    """Mean differences over the splits in which both methods were measured, by cell."""
    found = {}
    for place, cell in cells.items():
        both = sorted(cell.get(one, {}).keys() & cell.get(other, {}).keys())
        pairs = [(cell[one][s], cell[other][s]) for s in both]
        if pairs and all(key in row for pair in pairs for row in pair):
            found[place] = float(np.mean([a[key] - b[key] for a, b in pairs]))
    return found


def against_better_probe(cells: Cells) -> dict[tuple[str, int], float]:
    """LQF less the better of the two probes, by cell."""
    ridge, logistic = differences(cells, "lqf", "ridge"), differences(cells, "lqf", "logistic")
    return {place: min(ridge[place], logistic[place]) for place in ridge.keys() & logistic.keys()}


def points(found: Iterable[float]) -> str:
    """Mean of differences over cells with its standard error, in points."""
    v = 100 * np.array(list(found))
    return f"{v.mean():+.1f}" + (f" ± {v.std(ddof=1) / len(v) ** 0.5:.1f}" if len(v) > 1 else "")


def mean_row(what: str, found: dict[tuple[str, int], float], target: str) -> list[list[str]]:
    return [[f"{what} ({len(found)} cells)", points(found.values()), target]] if found else []


def worst_row(what: str, found: dict[tuple[str, int], float], target: str) -> list[list[str]]:
    if not found:
        return []
    (dataset, per_class), worst = min(found.items(), key=lambda item: item[1])
    return [[f"{what} ({label(dataset)}, {per_class} a class)", f"{100 * worst:+.1f}", target]]


def near(found: dict[tuple[str, int], float]) -> dict[tuple[str, int], float]:
    return {k: v for k, v in found.items() if folder_of(k[0]) in NEAR}


def ratio_of_seconds(cells: Cells, other: str) -> list[float]:
    """LQF's seconds of a fit over another's, by cell."""
    pairs = [(values(c, "lqf", "fit_cpu_seconds"), values(c, other, "fit_cpu_seconds")) for c in cells.values()]
    return [float(np.mean(a) / np.mean(b)) for a, b in pairs if a and b]


def gain_of_tangents() -> dict[tuple[str, int], float]:
    """The default less the same without the means of the layers' inputs, by cell of the study."""
    path = RESULTS / "study.json"
    found: dict[tuple[str, int], list[float]] = defaultdict(list)
    for row in json.loads(path.read_text()).get("groups", []) if path.exists() else []:
        if row["per_class"] >= _MANY:
            gain = row["accuracy"]["default"] - row["accuracy"]["without tangents"]
            found[row["dataset"], row["per_class"]].append(gain / 100)
    return {place: float(np.mean(gains)) for place, gains in found.items()}


def summary_table(cells: Cells) -> str:
    version1, ridge, nft = (differences(cells, "lqf", m) for m in ("version1", "ridge", "nft"))
    tangents = gain_of_tangents()
    rows = [
        *mean_row("LQF minus version 0.1, points", version1, "+0.7"),
        *mean_row("LQF minus version 0.1, folders near to ImageNet", near(version1), "+2.0"),
        *mean_row("LQF minus ridge probe", ridge, "+4.0"),
        *worst_row("worst cell against the better of both probes", against_better_probe(cells), "-1.0"),
        *mean_row("LQF minus fine-tuning", nft, "+1.5"),
        *worst_row("worst cell against fine-tuning", nft, "-2.5"),
        *mean_row(f"LQF minus the same without tangents, from {_MANY} images a class on", tangents, "+0.7"),
        *worst_row("worst of these cells", tangents, "-1.0"),
    ]
    ece = differences(cells, "lqf", "version1", "ece")
    if ece:
        both = [float(np.mean([np.mean(values(cells[k], m, "ece")) for k in ece])) for m in ("lqf", "version1")]
        rows.append(["mean calibration error of LQF, and of version 0.1", f"{both[0]:.3f}, {both[1]:.3f}", "no larger"])
    for method in ("version1", "nft"):
        found = ratio_of_seconds(cells, method)
        if found:
            what = f"seconds of a fit over those of {METHODS[method]}, median and largest"
            rows.append([what, f"{np.median(found):.2f}, {max(found):.2f}", ""])
    return table(["", "measured", "target"], rows)


# ------------------------------------------------------------------------------------------------------- study


def study_means(rows: Rows) -> dict[str, dict[tuple[str, int], float]]:
    """Accuracies in per cent, over the splits: way -> (data set, images a class) -> mean."""
    found: dict[str, dict[tuple[str, int], list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in rows:
        for way, accuracy in row["accuracy"].items():
            found[way][row["dataset"], row["per_class"]].append(accuracy)
    return {way: {k: float(np.mean(v)) for k, v in cells.items()} for way, cells in found.items()}


def study_table(rows: Rows, against: Sequence[str]) -> str:
    """Means by way over near and far folders and numbers of images, and the worst cell against some of the ways."""
    means = study_means(rows)
    against = [name for name in against if name in means]
    counts = sorted({k for cells in means.values() for _, k in cells})
    found = []
    for way, cells in means.items():
        groups = [
            list(cells.values()),
            [v for (d, _), v in cells.items() if d in NEAR],
            [v for (d, _), v in cells.items() if d not in NEAR],
            *([v for (_, k), v in cells.items() if k == count] for count in counts),
        ]
        worst = [f"{min(v - means[name][k] for k, v in cells.items()):+.1f}" for name in against]
        found.append([way, *(f"{np.mean(g):.1f}" if g else "" for g in groups), *worst])
    header = ["", "mean", "near", "far", *(f"{k} a class" for k in counts)]
    return table([*header, *(f"worst against {name}" for name in against)], found)


def left_out_table(study: dict[str, Any]) -> str:
    means = study_means(study.get("prior", []))
    rows = []
    for dataset, found in study.get("prior, left out", {}).items():
        others = ("leave-one-out, last 1, deviation 1", "equal variances", "last features alone")
        beside = [np.mean([v for (d, _), v in means.get(w, {}).items() if d == dataset]) for w in others]
        rows.append([label(dataset), found["chosen"], *(f"{v:.1f}" for v in (found["accuracy"], *beside))])
    if rows:
        columns = [f"{np.mean([float(r[i]) for r in rows]):.1f}" for i in range(2, len(rows[0]))]
        rows.append(["mean", "", *columns])
    header = ["data set left out", "best on the others", "its accuracy here", "the default's"]
    return table([*header, "equal variances", "last features alone"], rows)


# -------------------------------------------------------------------------- ablation, leak and robustness


def ablation_table() -> str:
    rows = read("ablation").get("rows", [])
    groups: dict[tuple, list[dict[str, float]]] = defaultdict(list)
    for r in rows:
        groups[r["slope"], r["loss"], r["kfac"]].append(r["accuracy"])
    found = []
    for (slope, loss, kfac), accuracies in groups.items():
        at = [f"{100 * np.mean([f[i] for f in accuracies]):.1f}" for i in accuracies[0]]
        found.append([f"{slope:g}", loss, "yes" if kfac else "no", *at])
    iterations = [f"after {i}" for i in rows[0]["accuracy"]] if rows else []
    return table(["slope of the leak", "loss", "K-FAC", *iterations], found)


def leak_table() -> str:
    groups: dict[tuple[float, bool], dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for r in read("leak").get("rows", []):
        groups[r["slope"], r["repair"]][r["dataset"]].append(r["accuracy"])
    datasets = list(dict.fromkeys(d for found in groups.values() for d in found))
    rows = [
        [f"{slope:g}", "yes" if repair else "no", *(mean_and_error(found.get(d, [])) for d in datasets)]
        for (slope, repair), found in sorted(groups.items())
    ]
    return table(["slope of the leak", "repaired", *(label(d) for d in datasets)], rows)


def read_robustness() -> Rows:
    reports = [read(f"robustness-{m}") for m in ("nft", "lqf")]
    return [{"method": report["method"], **row} for report in reports for row in report.get("rows", [])]


def robustness_table() -> str:
    groups: dict[tuple[str, str], Rows] = defaultdict(list)
    for r in read_robustness():
        groups[r["method"], r["parameter"]].append(r)
    rows = []
    for (method, parameter), found in groups.items():
        accuracies = [100 * r["accuracy"] for r in found]
        tried = ", ".join(v if isinstance(v := r["value"], str) else f"{v:g}" for r in found)
        rows.append([METHODS[method], parameter, tried, f"{min(accuracies):.1f}", f"{max(accuracies):.1f}"])
    return table(["method", "parameter", "values", "lowest accuracy", "highest accuracy"], rows)


# ----------------------------------------------------------------------------------------------------- figures


def draw_accuracy(cells: Cells) -> None:
    """One small plot for each folder, with one legend for all."""
    shown = [d for d in DATASETS if any(k[0] == d for k in cells)]
    if not shown:
        return
    n_columns = min(5, len(shown))
    n_rows = -(-len(shown) // n_columns)
    fig, axes = plt.subplots(
        n_rows, n_columns, figsize=(2.5 * n_columns, 2.5 * n_rows + 0.5), layout="constrained", squeeze=False
    )
    handles: dict[str, Any] = {}
    for ax in axes.flat[len(shown) :]:
        ax.set_axis_off()
    for ax, dataset in zip(axes.flat, shown, strict=False):
        ticks = sorted(k[1] for k in cells if k[0] == dataset)
        for method, name in METHODS.items():
            found = [(k, v) for k in ticks if (v := values(cells[dataset, k], method, "accuracy"))]
            if not found:
                continue
            errors = [100 * np.std(v, ddof=1) / len(v) ** 0.5 if len(v) > 1 else 0 for _, v in found]
            x, means = [k for k, _ in found], [100 * np.mean(v) for _, v in found]
            width = 2.0 if method == "lqf" else 1.2
            line = ax.errorbar(x, means, errors, marker="o", ms=3, lw=width, capsize=2, color=COLORS[method])
            handles.setdefault(name, line)
        ax.set_xscale("log")
        ax.set_xticks(ticks, [str(t) for t in ticks])
        ax.minorticks_off()
        ax.set_title(DATASETS[dataset] + (" (near)" if dataset in NEAR else ""), fontsize=10)
        ax.tick_params(labelsize=8)
        ax.grid(alpha=0.3)
    fig.supxlabel("images a class", fontsize=10)
    fig.supylabel("test accuracy, %", fontsize=10)
    names = [n for n in METHODS.values() if n in handles]
    fig.legend([handles[n] for n in names], names, loc="outside upper center", ncols=len(names), fontsize=10)
    fig.savefig(IMAGES / "accuracy.png", dpi=110)
    plt.close(fig)


def draw_robustness() -> None:
    """Rates and penalties on the left, numbers of things on the right."""
    rows = read_robustness()
    if not rows:
        return
    marks = (
        {("nft", "lr"): ("tab:orange", "learning rate"), ("lqf", "alpha"): ("tab:blue", "alpha")},
        {("lqf", "prior_rows"): ("tab:blue", "images for the prior"),
         ("lqf", "group_columns"): ("tab:cyan", "columns of a group"),
         ("lqf", "n_directions"): ("tab:green", "n_directions"),
         ("lqf", "sketch_size"): ("tab:purple", "sketch_size")},
    )  # fmt: skip
    fig, axes = plt.subplots(1, 2, figsize=(9, 3.6), layout="constrained", sharey=True)
    for ax, chosen in zip(axes, marks, strict=True):
        for (method, parameter), (color, name) in chosen.items():
            found = sorted(
                (r["value"], 100 * r["accuracy"]) for r in rows if (r["method"], r["parameter"]) == (method, parameter)
            )
            if found:
                ax.semilogx(*zip(*found, strict=True), marker="o", color=color, label=f"{METHODS[method]}: {name}")
        ax.set_xlabel("value of the parameter")
        ax.grid(alpha=0.3)
        if ax.lines:
            ax.legend(fontsize=8)
    counts = [4**i for i in range(1, 7)]
    axes[1].set_xticks(counts, [str(c) for c in counts])
    axes[1].minorticks_off()
    axes[0].set_ylabel("test accuracy, %")
    fig.suptitle("TrashNet, 20 images a class", fontsize=10)
    fig.savefig(IMAGES / "robustness.png", dpi=110)
    plt.close(fig)


# ------------------------------------------------------------------------------------------------------- pages


def fill(path: Path, tables: dict[str, str]) -> None:
    """Replace the tables of a page; every marker in it must be known."""
    text = path.read_text()
    for name in re.findall(r"<!-- (?!end)(\S+) -->", text):
        if name not in tables:
            raise SystemExit(
                f"{path} has a place for the table '{name}', which is not made; there are {sorted(tables)}"
            )
        block = f"<!-- {name} -->\n\n{tables[name]}\n\n<!-- end -->"
        text = re.sub(rf"<!-- {name} -->.*?<!-- end -->", lambda _, block=block: block, text, count=1, flags=re.S)
    path.write_text(text)


def main() -> None:
    IMAGES.mkdir(parents=True, exist_ok=True)
    cells, study = read_cells(), read("study")
    tables = {
        "accuracy": accuracy_table(cells),
        "second-backbone": accuracy_table(read_cells("accuracy-efficientnet_lite2"), ("ridge", "lqf")),
        "summary": summary_table(cells),
        "seconds": seconds_table(cells),
        "calibration": calibration_table(cells),
        "study-prior": study_table(study.get("prior", []), ("last features alone", "equal variances")),
        "study-left-out": left_out_table(study),
        "study-groups": study_table(study.get("groups", []), ("default",)),
        "study-directions": study_table(study.get("directions", []), ("none",)),
        "ablation": ablation_table(),
        "leak": leak_table(),
        "robustness": robustness_table(),
        **_report_families.tables(),
        **_report_speed.tables(),
        **_report_trust.tables(),
    }
    draw_accuracy(cells)
    draw_robustness()
    for page in (ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))):
        fill(page, tables)


if __name__ == "__main__":
    main()
