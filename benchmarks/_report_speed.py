"""Tables of the pages on speed and scale for `_report.py`."""

import json
from pathlib import Path
from typing import Any

import numpy as np

RESULTS = Path(__file__).parent / "results"
NOT_MEASURED = "not measured yet"

Rows = list[dict[str, Any]]


def table(header: list[str], rows: list[list[str]]) -> str:
    """A Markdown table."""
    lines = [header, ["---"] * len(header), *rows]
    return "\n".join("| " + " | ".join(line) + " |" for line in lines) if rows else NOT_MEASURED


def read(name: str) -> dict[str, Any]:
    """A file of results; empty where it is not there."""
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def fit_table(rows: Rows) -> str:
    names = {
        "forward": "the network's own forward pass", "logistic": "logistic probe", "lqf": "LQF, defaults",
        "lqf, no tangents": "`tangents=None`", "lqf, mirrored": '`views=("identity", "flip")`',
        **{f"lqf, network tangents, {k}": f'`tangents="network", n_directions={k}`' for k in (1, 4, 8)},
    }  # fmt: skip
    found = []
    for r in rows:
        for key, name in names.items():
            cells = []
            for kind in ("", "_predict"):
                seconds = r[f"seconds{kind}"].get(key)
                cells += [f"{np.median(seconds):.1f}", f"{r[f'ratio{kind}'][key]:.2f}"] if seconds else ["", ""]
            found.append([name, *cells])
    n = f"{rows[0]['n']}, {rows[0]['n_predicted']}" if rows else ""
    header = [f"images: {n}", "fit, s", "over the forward pass", "predict, s", "over the forward pass"]
    return table(header, found)


def growth_table(rows: Rows) -> str:
    found = []
    before: dict[str, Any] = {}
    for r in rows:
        further = ""
        if r["varied"] == before.get("varied") and r["n"] > before["n"]:
            further = f"{1000 * (r['seconds'] - before['seconds']) / (r['n'] - before['n']):.1f}"
        amounts = [f"{r['seconds']:.1f}", f"{1000 * r['seconds'] / r['n']:.1f}", further]
        memory = f"{r['host_bytes'] / 2**20:.0f}"
        cells = [r["varied"], *(str(r[k]) for k in ("n", "classes", "size", "n_features", "solver"))]
        found.append([*cells, *amounts, memory, f"{r['ms_predict']:.1f}"])
        before = r
    header = ["varied", "images", "classes", "pixels", "features", "`solver_`", "seconds", "ms an image"]
    return table([*header, "ms a further image", "memory, MiB", "ms to predict an image"], found)


def solver_table(rows: Rows) -> str:
    found = []
    for r in rows:
        for form in ("closed", "pcg"):
            part = r[form]
            name = f"closed form, {part['method']}" if form == "closed" else "conjugate gradients"
            cells = [f"{part['seconds']:.1f}", str(part.get("n_iter", "")), f"{part['host_bytes'] / 2**20:.0f}"]
            agreement = ["", ""]
            if form == "pcg":
                agreement = [f"{r['largest_difference']:.1e}", f"{100 * r['same_class']:.1f}"]
            found.append([str(r["n"]), str(r["n_features"]), name, *cells, *agreement])
    header = ["images", "features", "solver", "seconds", "iterations", "memory, MiB"]
    return table([*header, "largest difference of outputs", "same class, %"], found)


def search_table(rows: Rows) -> str:
    found = [
        [f"`{r['tangents']!r}`".replace("'", '"'), str(r["n"]), str(r["fits"]), f"{r['seconds']['alone']:.0f}",
         f"{r['seconds']['shared']:.0f}", f"{r['ratio']:.2f}", f"{r['seconds']['path']:.0f}", f"{r['ratio_path']:.2f}",
         f"{r['largest_difference_of_scores']:.3f}, {r['largest_difference_of_path']:.3f}"]
        for r in rows
    ]  # fmt: skip
    header = ["`tangents`", "images", "fits", "without `memory`, s", "with it, s", "ratio", "`LQFClassifierCV`, s"]
    return table([*header, "ratio", "largest differences of scores"], found)


def distributed_table(rows: Rows) -> str:
    found = [
        [f'`"{r["tangents"]}"`', part, f"{r['seconds']['one'][key]:.1f}", f"{r['seconds']['two'][key]:.1f}",
         f"{r['speed_up'][key]:.2f}", f"{r['relative_difference']:.0e}"]
        for r in rows
        for key, part in (("read", "reading features"), ("fit", "whole fit"))
    ]  # fmt: skip
    header = ["`tangents`", "work", "one process, s", "two processes, s", "times faster"]
    return table([*header, "largest relative difference of `coef_`"], found)


def newcomer_table(report: dict[str, Any]) -> str:
    commands = {
        "install": "installation, by the first of these commands", "demo": "`make demo`",
        "first fit": "the program above, its imports and the score included", "tests": "`make test`",
    }  # fmt: skip
    steps = report.get("steps", {})
    rows = [[commands[k], f"{v['seconds']:.0f}", v["last_line"].strip("= ")] for k, v in steps.items()]
    return table(["step", "seconds", "what it says last"], rows)


def tables() -> dict[str, str]:
    """All tables by the names of their places."""
    speed = read("speed-cpu")
    return {
        "fits": fit_table(speed.get("fit", [])),
        "growth": growth_table(speed.get("growth", [])),
        "solvers": solver_table(speed.get("solver", [])),
        "search": search_table(speed.get("search", [])),
        "newcomer": newcomer_table(read("newcomer")),
        "distributed": distributed_table(read("distributed").get("rows", [])),
    }
