"""Results as JSON and as Markdown."""

from __future__ import annotations

import json
import platform
import subprocess
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch

from benchmarks.gpu.parts import PARTS


def describe_machine(*, smoke: bool) -> dict[str, Any]:
    """Return the card, its memory, the driver and the versions of the software."""
    versions = {
        "torch": torch.__version__,
        "cuda": torch.version.cuda,
        "python": platform.python_version(),
    }
    if smoke or not torch.cuda.is_available():
        return {"device": f"CPU ({platform.machine()}), smoke test in small sizes", **versions}
    properties = torch.cuda.get_device_properties(0)
    return {
        "device": properties.name,
        "memory_gib": round(properties.total_memory / 2**30, 1),
        "driver": driver_version(),
        **versions,
        "cudnn": torch.backends.cudnn.version(),
    }


def driver_version() -> str:
    command = ["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"]
    try:
        return subprocess.run(command, capture_output=True, text=True, timeout=10, check=True).stdout.split("\n")[0]
    except (OSError, subprocess.SubprocessError):
        return "unknown"


def write_report(output: Path, machine: dict[str, Any], parts: dict[str, dict[str, Any]]) -> None:
    """Write gpu.json and gpu.md, complete up to the last part that has ended."""
    replace_file(output / "gpu.json", json.dumps({"machine": machine, "parts": parts}, indent=1) + "\n")
    replace_file(output / "gpu.md", to_markdown(machine, parts))


def replace_file(path: Path, text: str) -> None:
    temporary = path.with_name(f".{path.name}.partial")
    temporary.write_text(text)
    temporary.rename(path)


def to_markdown(machine: dict[str, Any], parts: dict[str, dict[str, Any]]) -> str:
    """Return the section of RESULTS.md: the machine, then one table a part."""
    card = machine["device"]
    if "memory_gib" in machine:
        card += f" ({machine['memory_gib']} GiB, driver {machine['driver']}, CUDA {machine['cuda']})"
    lines = ["## GPU", "", f"`python -m benchmarks.gpu` on {card}, torch {machine['torch']}.", ""]
    for name, part in parts.items():
        lines += [f"### {PARTS[name].title}", ""]
        if part["status"] != "finished":
            lines += [f"{part['status'].capitalize()}; what was measured until then:", ""]
        for title in dict.fromkeys(row.get("table") for row in part["rows"]):
            lines += [f"{title}:", ""] if title else []
            lines += [*to_table([row for row in part["rows"] if row.get("table") == title]), ""]
    return "\n".join(lines)


def to_table(rows: Sequence[dict[str, Any]]) -> list[str]:
    """Return the lines of a Markdown table with a column for each key, in the order of their first appearance.

    A column of errors comes last.

    Provisional rows, which a later row with the same `contestant` replaces, are left out.
    """
    final = {row.get("contestant") for row in rows if not row.get("provisional")}
    rows = [row for row in rows if not (row.get("provisional") and row.get("contestant") in final)]
    columns = list(dict.fromkeys(key for row in rows for key in row if key not in ("provisional", "table")))
    columns.sort(key=lambda column: column == "error")
    if not columns:
        return ["Nothing was measured."]
    body = [[cell(row.get(column)) for column in columns] for row in rows]
    return [f"| {' | '.join(line)} |" for line in (columns, ["---"] * len(columns), *body)]


def cell(value: Any) -> str:
    if isinstance(value, bool) or not isinstance(value, float):
        return "" if value is None else str(value).replace("|", "/")
    return f"{value:.0f}" if abs(value) >= 1000 else f"{value:.3g}"
