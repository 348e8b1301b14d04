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
    path = RESULTS / f"{name}.json"
    return json.loads(path.read_text()) if path.exists() else {}


def median(seconds: list[float]) -> float:
    return float(np.median(seconds))


def product_table(rows: Rows) -> str:
    found = []
    for r in rows:
        ratio = r["ratio"]
        others = [f"{ratio[k]:.2f}" for k in ("product", "product_kept", "torch_func", "curvlinops")]
        where = [r["network"], str(r["layers"]), f"{r['size']} px, {r['batch']}", f"{r['parameters'] / 1e6:.1f}"]
        found.append([*where, f"{median(r['seconds']['forward_backward']):.2f}", *others])
    header = ["network", "stages", "images", "parameters, million", "forward + backward, s", "product"]
    return table([*header, "product, point kept", "torch.func", "curvlinops"], found)


def kfac_table(rows: Rows) -> str:
    found = []
    for r in rows:
        s, ratio = r["seconds"], r["ratio"]
        cells = [f"{ratio['build']:.1f}", f"{median(s['factorize']):.2f}", f"{median(s['apply']):.3f}"]
        found.append([r["network"], str(r["outputs"]), *cells, f"{ratio['apply_over_product']:.2f}"])
    header = ["network", "classes", "build, epochs of forward + backward", "factorize, s", "apply, s"]
    return table([*header, "apply over product"], found)


def iteration_table(rows: Rows) -> str:
    names = {
        "kfac": "K-FAC, from the head's solution",
        "kfac_whole": "the same, no factor approximated",
        "kfac_undamped": "the same, no damping",
        "kfac_from_zero": "K-FAC, from zero",
        "identity": "without K-FAC",
    }
    found = []
    for r in rows:
        if r["what"] == "iterations":
            for key, name in names.items():
                counts = [str(r[key][t]) if r[key][t] is not None else "not reached" for t in ("0.01", "0.001")]
                found.append([r["dataset"], name, f"{r[key]['first']:.3f}", *counts])
    return table(["data", "solver", "relative gradient at the start", "iterations to 1e-2", "to 1e-3"], found)


def solver_table(rows: Rows) -> str:
    found = []
    for r in rows:
        if r["what"] != "iterations":
            limit = f"not in {r['limit']:.0f}"
            times = [f"{t:.1f}" if (t := r["within"][k]) is not None else limit for k in ("0.1", "0.01")]
            found.append([r["dataset"], r["what"], *times, f"{100 * r['curve'][-1][1]:.1f}"])
    header = ["data", "solver", "seconds to within 10 % of the minimum", "to within 1 %", "excess at the end, %"]
    return table(header, found)


def fit_table(rows: Rows) -> str:
    names = {
        "lqf": "LQF, defaults", "lqf_head": 'LQF, `tangent_layers="head"`', "nft": "fine-tuning, 25 epochs",
        "nft_tail": "fine-tuning of the last stage, cached trunk", "logistic": "logistic probe",
        "predict": "LQF, predict 512 images", "forward": "the network's own forward pass of them",
    }  # fmt: skip
    return table(
        ["work", "seconds", "LQF over it"],
        [
            [
                names[k],
                f"{median(s):.1f}",
                f"{r['ratio'][f'lqf_over_{k}']:.2f}" if f"lqf_over_{k}" in r["ratio"] else "",
            ]
            for r in rows
            for k, s in r["seconds"].items()
        ],
    )


def growth_table(rows: Rows) -> str:
    found = []
    for r in rows:
        cells = [str(r[k]) for k in ("n", "classes", "layers", "size")]
        amounts = [f"{r['seconds']:.1f}", f"{1000 * r['seconds'] / r['n']:.0f}", f"{r['host_bytes'] / 2**20:.0f}"]
        varied = f'`cache="{r["cache"]}"`' if "cache" in r else r["varied"]
        found.append([varied, *cells, f"{r['parameters'] / 1e6:.1f}", str(r["n_iter"]), *amounts])
    header = ["varied", "images", "classes", "stages", "pixels", "parameters, million", "iterations", "seconds"]
    return table([*header, "ms an image", "memory, MiB"], found)


def search_table(rows: Rows) -> str:
    found = [
        [str(r["layers"]), str(r["n"]), str(r["fits"]), f"{r['seconds']['alone']:.0f}", f"{r['seconds']['shared']:.0f}",
         f"{r['ratio']:.2f}", f"{r['seconds']['path']:.0f}", f"{r['ratio_path']:.2f}",
         f"{r['largest_difference_of_scores']:.3f}, {r['largest_difference_of_path']:.3f}"]
        for r in rows
    ]  # fmt: skip
    header = ["stages", "images", "fits", "without `memory`, s", "with it, s", "ratio", "`LQFClassifierCV`, s", "ratio"]
    return table([*header, "largest differences of scores"], found)


def many_table(rows: Rows) -> str:
    found = []
    for r in rows:
        steps = "; ".join(f"{t:.0f} s: {100 * e:.1f} %" for t, e in r["curve"][:6])
        found.append([r["what"], str(r["n"]), str(r["size"]), steps])
    return table(["solver", "images", "pixels", "seconds, and excess of the objective over the lowest seen"], found)


def distributed_table(rows: Rows) -> str:
    found = [
        [str(r["tangent_layers"]), f"{r['n_parameters'] / 1e6:.1f}", f"{r['seconds']['one']:.2f}",
         f"{r['seconds']['two']:.2f}", f"{r['speed_up']:.2f}"]
        for r in rows
    ]  # fmt: skip
    return table(["stages", "parameters, million", "one process, s", "two processes, s", "times faster"], found)


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
    speed, shared = read("speed-cpu"), read("distributed")
    return {
        "product": product_table(speed.get("product", [])),
        "kfac": kfac_table(speed.get("kfac", [])),
        "iterations": iteration_table(speed.get("solver", [])),
        "solvers": solver_table(speed.get("solver", [])),
        "fits": fit_table(speed.get("fit", [])),
        "growth": growth_table(speed.get("growth", [])),
        "search": search_table(speed.get("search", [])),
        "many": many_table(speed.get("many", [])),
        "newcomer": newcomer_table(read("newcomer")),
        "distributed": distributed_table(shared.get("rows", [])),
    }
