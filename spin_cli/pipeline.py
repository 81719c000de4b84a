"""A run as a whole: for each of its three artifacts, whether it is what the options ask for.

Nothing is loaded for that but hashes: of the data, of the model's files, and those in manifests.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping
from dataclasses import dataclass
from enum import Enum
from pathlib import Path
from typing import Any

from spin_cli import artifacts, atomic, backbone, extraction, selection, training
from spin_cli.config import decisive
from spin_cli.dataset import find_sources, places
from spin_cli.errors import ArtifactError, SpinError
from spin_cli.recipe import CONFIGS, FILE, NESTED, Recipe, Sections, defaults, read_toml, to_toml
from spin_cli.verification import check_sum

STAGES = ("activations", "selection", "head")
"""Folders of a run, each made from the one before."""


class Standing(str, Enum):
    """How an artifact stands to what is asked for."""

    FRESH = "fresh"
    """It is what these options, data and model would give."""
    STALE = "stale"
    """Made from something else; `State.why` names the fields."""
    PARTIAL = "partial"
    """Begun, not finished."""
    CORRUPT = "corrupt"
    """Changed after it was written, or not whole."""
    MISSING = "missing"
    FOREIGN = "foreign"
    """Something is in its place that spin did not write, so will not replace."""


@dataclass(frozen=True)
class State:
    """One artifact of a run."""

    stage: str
    standing: Standing
    why: tuple[str, ...] = ()
    """The reasons, each as ``field: old → new`` or a phrase."""


def examine(folder: Path, recipe: Recipe, *, checksums: bool = False) -> list[State]:
    """How each artifact in the run *folder* stands to *recipe*.

    Parameters
    ----------
    checksums : read every file and compare it with the SHA-256 in its manifest
    """
    found: list[State] = []
    for stage in STAGES:
        state = state_of(stage, folder, recipe, checksums=checksums)
        above = found[-1] if found else None
        if state.standing is Standing.FRESH and above and above.standing is not Standing.FRESH:
            state = State(stage, Standing.STALE, (f"{above.stage} {above.standing.value}",))
        found.append(state)
    return found


def state_of(stage: str, folder: Path, recipe: Recipe, *, checksums: bool = False) -> State:
    """How one artifact stands, given those it was made from as they are now."""
    path = folder / stage
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return _unfinished(stage, path, recipe)
    if not (path / artifacts.MANIFEST).exists():
        return State(stage, Standing.FOREIGN, (f"{path} is not an artifact of spin",))
    try:
        manifest = artifacts.read_manifest(path, stage)
        if "spin" not in manifest["versions"]:
            return State(stage, Standing.FOREIGN, (f"{path} was written by another program",))
        if checksums:
            for name in manifest["files"]:
                check_sum(path, manifest, name)
        differing = _reasons(stage, path, manifest, recipe)
    except ArtifactError as error:
        return State(stage, Standing.CORRUPT, (error.message,))
    except SpinError as error:  # data or model are gone: nobody can tell what they were
        return State(stage, Standing.STALE, (error.message,))
    except (KeyError, TypeError, AttributeError) as error:
        return State(stage, Standing.CORRUPT, (f"its manifest lacks {error}",))
    if differing:
        return State(stage, Standing.STALE, differing)
    return State(stage, Standing.FRESH)


def refuse_others(folder: Path, recipe: Recipe, wanted: Mapping[str, Any]) -> None:
    """Raise `ArtifactError` if *folder* holds activations of another data set or another model.

    A file that was edited where it lies, or new weights under the old name, are no reason: to make
    anew what they made stale is what a run is for. *wanted*: what `foretell` says of *recipe*.
    """
    path = folder / STAGES[0]
    try:
        request = artifacts.read_manifest(path, STAGES[0])["request"]
        was, model = request["data"][0], request["model"]
    except (ArtifactError, IndexError):
        return  # missing or damaged
    _, now = find_sources(recipe.data, recipe.extracting.data.format)[0]
    pairs = []
    moved = Path(was["path"]).resolve() != now.resolve()
    if moved and was["sha256"] != wanted["data"].get(was["split"]):
        pairs.append((was["path"], str(now)))
    if model.get("weights") != wanted["model"]["weights"]:
        _, identity = backbone.identify(recipe.extracting.model)
        if model["id"] != identity["id"]:
            pairs.append((model["id"], identity["id"]))
    if pairs:
        told = " and ".join(f"{old}, not of {new}" for old, new in pairs)
        raise ArtifactError(
            f"{path}: holds the activations of {told}",
            "Name another folder with -o, or give --force to replace the whole run.",
        )


def _reasons(stage: str, path: Path, manifest: dict[str, Any], recipe: Recipe) -> tuple[str, ...]:
    """In what an artifact differs from what would be made now."""
    old = _completed(stage, manifest["request"])
    if stage == "activations":
        new = extraction.foretell(recipe.data, recipe.extracting, bool(manifest["causal"]))
        return tuple(map(str, artifacts.changes(extraction.comparable(old), new)))
    above = STAGES[STAGES.index(stage) - 1]
    try:
        parent = artifacts.read_manifest(path.parent / above, above)
    except ArtifactError:
        return (f"{above} are not there",)
    if stage == "selection":
        new = selection.request_of(parent, recipe.selecting)
    else:
        new = training.request_of(parent, recipe.training)
    found = artifacts.changes(old, new)
    why = [f"{above} changed" if c.field == "parent" else str(c) for c in found]
    if stage == "head" and recipe.training.oof and not recipe.training.oof.exists():
        why.append(f"{recipe.training.oof} is to be written")
    return tuple(why)


def _completed(stage: str, request: dict[str, Any]) -> dict[str, Any]:
    """*request* with the defaults of options that an older spin did not know yet."""
    options = request["options"]
    if stage == "activations":
        parts = {name: artifacts.to_plain(defaults(name)) | options[name] for name in NESTED}
        return request | {"options": artifacts.to_plain(defaults("extract")) | options | parts}
    section = {"selection": "select", "head": "train"}[stage]
    known = decisive(CONFIGS[section], artifacts.to_plain(defaults(section)))
    return request | {"options": known | options}


def _unfinished(stage: str, path: Path, recipe: Recipe) -> State:
    """Whether there is the beginning of an artifact, and whether it can be gone on with."""
    folder = atomic.partial_folder(path)
    if not folder.exists():
        return State(stage, Standing.MISSING)
    begun = extraction.progress_of(folder) if stage == "activations" else None
    if begun is None:
        return State(stage, Standing.PARTIAL, ("interrupted, begins again",))
    request, done, windows = begun
    how_far = f"{done} of {windows} windows of rows done"
    try:
        causal = "last" in request["options"]["poolings"]
        new = extraction.foretell(recipe.data, recipe.extracting, causal)
        differing = artifacts.changes(extraction.comparable(_completed(stage, request)), new)
    except SpinError as error:
        return State(stage, Standing.PARTIAL, (how_far, error.message))
    except (KeyError, TypeError) as error:
        return State(stage, Standing.CORRUPT, (f"its request lacks {error}",))
    others = tuple(f"begun with another {change}" for change in differing)
    return State(stage, Standing.PARTIAL, (how_far, *others))


def read_sections(folder: Path) -> tuple[Sections, str]:
    """The options of the run in *folder*: its ``spin.toml``, else what its manifests say.

    Returns
    -------
    The options, and where they stand.

    Raises
    ------
    ArtifactError
        There is no run, or spin did not write its activations.
    """
    if (folder / FILE).is_file():
        return read_toml(folder / FILE), str(folder / FILE)
    path = folder / STAGES[0]
    if not path.is_dir():
        raise ArtifactError(
            f"{folder}: no run (neither {FILE} nor {STAGES[0]} in it)", "Make one: spin run …"
        )
    manifest = artifacts.read_manifest(path, STAGES[0])
    request = manifest["request"]
    if "spin" not in manifest["versions"] or not request["data"]:
        raise ArtifactError(
            f"{path}: written by another program, so that no data and no model are known to"
            " compare with",
            f"spin verify {folder}   # compares every file with what was written",
        )
    options = dict(request["options"])
    named = places(request["data"], path)
    paths = [next((p for p in each if p.exists()), each[0]) for each in named]
    data = paths[0] if len(paths) == 1 else paths[0].parent
    sections: Sections = {
        "data": {"path": str(data), **options.pop("data")},
        "model": options.pop("model"),
        "extract": options,
    }
    for name, stage in (("select", "selection"), ("train", "head")):
        with contextlib.suppress(ArtifactError, KeyError, TypeError):  # then the defaults count
            manifest = artifacts.read_json(folder / stage / artifacts.MANIFEST)
            sections[name] = dict(manifest["request"]["options"])
    return sections, str(folder)


def write_recipe(folder: Path, recipe: Recipe) -> None:
    """Write the run's ``spin.toml``, unless it says the same already."""
    text = to_toml(recipe, folder, artifacts.versions()["spin"])
    path = folder / FILE
    if path.is_file() and path.read_bytes() == text.encode():
        return
    with atomic.disk_errors(folder):
        folder.mkdir(parents=True, exist_ok=True)
        atomic.write_text(path, text)
