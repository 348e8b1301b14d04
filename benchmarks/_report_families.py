"""The table of the page on backbones for `_report.py`."""

from typing import Any

from _report_speed import NOT_MEASURED, read, table


def tables() -> dict[str, str]:
    rows: dict[str, dict[str, Any]] = read("families")
    return {"families": families_table(rows), "families-summary": summary(rows)}


def families_table(rows: dict[str, dict[str, Any]]) -> str:
    found = []
    for name, r in sorted(rows.items(), key=lambda item: (item[1]["file"], item[0])):
        if not r["taken"]:
            found.append([r["file"], name, "", f"refused: {r['error'][:120]}", "", "", "", ""])
            continue
        traced = "yes" if r["traced"] else "no"
        read_of = f"{r['read']} of {r['stages']}"
        ratio = f"{r['predict_seconds'] / r['forward_seconds']:.1f}"
        numbers = [f"{r['parameters'] / 1e6:.1f}", f"{r['fit_seconds']:.1f}", ratio]
        found.append([r["file"], name, str(r["size"]), traced, read_of, *numbers])
    header = [
        "file of timm", "model", "pixels", "traced", "stages read", "parameters, million", "fit, s",
        "prediction over the network's forward pass",
    ]  # fmt: skip
    return table(header, found)


def summary(rows: dict[str, dict[str, Any]]) -> str:
    """How many are taken, traced, and equal timm's own features."""
    if not rows:
        return NOT_MEASURED
    taken = [r for r in rows.values() if r["taken"]]
    files = {r["file"] for r in rows.values()}
    equal = [r for r in taken if r["difference"] is not None and r["difference"] <= 1e-5]
    counts = [
        ["files of timm", str(len(files))],
        ["of which a model is taken", str(len({r["file"] for r in taken}))],
        ["models", str(len(rows))],
        ["taken", f"{len(taken)} ({100 * len(taken) / len(rows):.0f} %)"],
        ["traced, of those taken", str(sum(r["traced"] for r in taken))],
        ["with features that equal timm's own, to 1e-5 of the largest", str(len(equal))],
        ["slowest fit, s", f"{max(r['fit_seconds'] for r in taken):.1f}"],
    ]  # fmt: skip
    return table(["", ""], counts)
