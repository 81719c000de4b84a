"""``spin inspect`` and ``spin verify``."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from spin_cli.cli import options as o
from spin_cli.cli.terminal import human_bytes, print_json, print_table
from spin_cli.cli.training import print_report
from spin_cli.errors import ArtifactError


def inspect(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A stage's folder, a run, or one file.")
    ],
    json: o.Json = False,
) -> None:
    """Show what an artifact is, from what it was made, and what is in it.

    Example: `spin inspect run/selection`
    """
    from spin_cli import reporting

    found = reporting.describe(artifact)
    if json:
        print_json(found)
    elif found["kind"] == "run":
        for name, part in found["artifacts"].items():
            show(artifact / name, part)
    else:
        show(artifact, found)


def verify(
    artifact: Annotated[
        Path, typer.Argument(metavar="ARTIFACT", help="A stage's folder or a run.")
    ],
    rows: Annotated[
        int,
        typer.Option(
            "--rows", min=0, help="Rows of activations to recompute through the model; 0: none."
        ),
    ] = 8,
    seed: Annotated[int, typer.Option("--seed", help="Decides which rows.")] = 0,
    model: Annotated[
        str | None, typer.Option("--model", "-m", help="Where the model lies now.")
    ] = None,
    json: o.Json = False,
) -> None:
    """Check that an artifact is still what was written: checksums, shapes, recomputed rows.

    Ends with 0 if all is well, with 4 if anything was changed or is missing.

    Example: `spin verify run`
    """
    from spin_cli.verification import verify as check

    checks = check(artifact, rows=rows, seed=seed, model=model)
    failed = [item for item in checks if item.ok is False]
    if json:
        print_json({"artifact": artifact, "ok": not failed, "checks": checks})
    else:
        marks = {True: "ok", False: "FAILED", None: "skipped"}
        lines = [[item.what, marks[item.ok], item.found] for item in checks]
        print_table(f"{artifact}", ["", "", "found"], lines)
    if failed:
        raise ArtifactError(
            f"{artifact}: {len(failed)} of {len(checks)} checks failed",
            "Make it again with --force, or restore it from a copy.",
        )


def show(path: Path, found: dict[str, Any]) -> None:
    """Print tables for one artifact."""
    kind = found["kind"]
    if kind == "json":
        print_json(found["content"])
    elif kind == "hdf5":
        _show_hdf5(path, found)
    elif kind == "safetensors":
        rows = [[t["name"], str(tuple(t["shape"])), t["dtype"]] for t in found["tensors"]]
        print_table(str(path), ["tensor", "shape", "dtype"], rows)
    else:
        _show_summary(path, found)
        {"activations": _show_activations, "selection": _show_selection, "head": _show_head}[kind](
            found
        )


def _show_hdf5(path: Path, found: dict[str, Any]) -> None:
    rows = [
        [
            d["name"],
            str(tuple(d["shape"])),
            d["attributes"].get("dtype", d["dtype"]),
            human_bytes(d["bytes"]),
            d["attributes"].get("hookpoint", ""),
        ]
        for d in found["datasets"]
    ]
    print_table(str(path), ["dataset", "shape", "dtype", "size", "hookpoint"], rows)


def _show_summary(path: Path, found: dict[str, Any]) -> None:
    rows = [["size", human_bytes(found["bytes"])], ["fingerprint", found["fingerprint"][:16]]]
    what = "labels, any number a text" if found.get("multi_label") else "classes"
    rows.append([what, ", ".join(found["classes"])])
    if "parent" in found:
        rows.append(["made from", found["parent"]["path"]])
    if "model" in found:
        rows.append(["model", f"{found['model']['id']} ({found['model']['architecture']})"])
    rows += [
        [f"data, {source['split']}", f"{source['path']} ({source['rows']:,} rows)"]
        for source in found.get("data", [])
    ]
    rows += [[name, f"{count:,}"] for name, count in found.get("counts", {}).items()]
    print_table(f"{found['kind']}: {path}", ["", ""], rows)


def _show_activations(found: dict[str, Any]) -> None:
    layers: dict[str, dict[str, list[str]]] = {}
    widths: dict[tuple[str, str], int] = {}
    for f in found["features"]:
        layers.setdefault(f["layer"], {}).setdefault(f["site"], []).append(f["pooling"])
        widths[f["layer"], f["site"]] = f["width"]
    names = list(dict.fromkeys(f["site"] for f in found["features"]))
    rows = [
        [layer, *[f"{widths[layer, s]} × {'/'.join(sites[s])}" if s in sites else "–"
                  for s in names]]
        for layer, sites in layers.items()
    ]  # fmt: skip
    print_table("Vectors per text", ["layer", *names], rows)


def _show_selection(found: dict[str, Any]) -> None:
    scores = found["scores"]
    top = max(float(row["val_score"]) for row in scores)
    low = min(float(row["val_score"]) for row in scores)
    rows = []
    for row in scores:
        value = float(row["val_score"])
        bar = "█" * round(1 + 19 * (value - low) / max(top - low, 1e-9))
        last = list(row)[-1]
        rows.append(
            [row["layer"], row["site"], row["pooling"], f"{value:.4f}", row[last], bar.ljust(20)]
        )
    print_table(
        f"Probes, {found['metric']} on val",
        ["layer", "site", "pooling", "score", "neurons", ""],
        rows,
    )


def _show_head(found: dict[str, Any]) -> None:
    print_report(found["metrics"])
