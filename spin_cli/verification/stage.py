"""Is an artifact still what was written? Checksums, shapes, and rows read anew.

Every bit of an artifact is under a checksum: files under the manifest's, the manifest and the log
under their own. Some rows of activations are besides recomputed through the model, some probes of a
selection and the test scores of a head from the activations behind them.
"""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli import activations, artifacts, atomic, backbone
from spin_cli.activations import Feature
from spin_cli.backbone import Backbone
from spin_cli.choices import Bits, Pooling, Site, StorageDtype
from spin_cli.config import DataConfig, ModelConfig, VerifyConfig
from spin_cli.dataset import Row, reread
from spin_cli.errors import ArtifactError, DataError, SpinError
from spin_cli.fields import check_kinds
from spin_cli.head import load_head
from spin_cli.ranges import check_ranges
from spin_cli.samples import read_samples
from spin_cli.typed import from_plain
from spin_cli.verification.recomputing import Check, recompute

TOLERANCE = {"float32": 1e-3, "float16": 1e-2, "bfloat16": 5e-2}
"""Largest distance of a recomputed vector from the stored one, as a share of its length, by number
format (of computing or of the disk, the coarser one). Batches of another shape round otherwise."""


def verify(folder: Path, **options: Any) -> list[Check]:
    """Check an artifact folder, every artifact in a run folder, or one file of an artifact.

    Parameters
    ----------
    folder : Path
    options : as in `VerifyConfig`

    Raises
    ------
    ArtifactError
        There is no artifact to check.
    UsageError
        *rows* or *seed* are below 0.
    """
    config = VerifyConfig(**options)
    check_ranges(config)
    if folder.is_file():
        return [_check_file(folder)]
    inside = [folder / name for name in artifacts.STAGE_OF if (folder / name).is_dir()]
    if inside and not (folder / artifacts.MANIFEST).exists():
        return [
            replace(check, what=f"{part.name}: {check.what}")
            for part in inside
            for check in verify(part, **options)
        ]
    if not (folder / artifacts.MANIFEST).is_file():
        artifacts.read_manifest(folder)  # says what is missing
    checks = list(_check_files(folder))
    if all(check.ok for check in checks):
        manifest = artifacts.read_manifest(folder)
        checks += _check_content(folder, manifest, config)
    return checks


def _check_file(path: Path) -> Check:
    """One file of an artifact, by the manifest beside it."""
    folder, name = path.parent, path.name
    if not (folder / artifacts.MANIFEST).is_file():
        raise ArtifactError(f"{path}: no {artifacts.MANIFEST} beside it to compare it with")
    if name == artifacts.MANIFEST:
        return _attempt(name, lambda: _check_manifest(folder))
    if name == artifacts.LOG:
        return _attempt(name, lambda: _check_log(folder))
    manifest = artifacts.read_listing(folder)
    if name not in manifest["files"]:
        return Check(name, False, f"not of the artifact in {folder}")
    return _attempt(name, lambda: check_sum(folder, manifest, name))


def _attempt(what: str, look: Callable[[], str]) -> Check:
    try:
        return Check(what, True, look())
    except ArtifactError as error:
        return Check(what, False, error.message)


def _check_files(folder: Path) -> Iterator[Check]:
    """Whatever a flipped bit can hit."""
    yield _attempt(artifacts.MANIFEST, lambda: _check_manifest(folder))
    try:
        manifest = artifacts.read_listing(folder)
    except ArtifactError:
        return  # said already
    for name in manifest["files"]:
        yield _attempt(name, lambda name=name: check_sum(folder, manifest, name))  # type: ignore[misc]
    if (folder / artifacts.LOG).exists():
        yield _attempt(artifacts.LOG, lambda: _check_log(folder))
    known = {*manifest["files"], artifacts.MANIFEST, artifacts.LOG}
    if strangers := sorted(path.name for path in folder.iterdir() if path.name not in known):
        yield Check("other files", False, f"not of this artifact: {', '.join(strangers[:5])}")


def _check_manifest(folder: Path) -> str:
    manifest = artifacts.read_manifest(folder)
    _check_text(folder / artifacts.MANIFEST, manifest)
    return "its own checksum agrees"


def _check_log(folder: Path) -> str:
    log = artifacts.read_json(folder / artifacts.LOG)
    if not isinstance(log, dict) or artifacts.checksum(log) != log.get("checksum"):
        raise ArtifactError(f"{folder / artifacts.LOG}: changed after it was written")
    _check_text(folder / artifacts.LOG, log)
    return "its own checksum agrees"


def _check_text(path: Path, value: Any) -> None:
    """White space is under no checksum, so the text is compared with what spin writes."""
    if path.read_text(encoding="utf-8") != atomic.json_text(value):
        raise ArtifactError(f"{path}: changed after it was written")


def check_sum(folder: Path, manifest: dict[str, Any], name: str) -> str:
    """Compare the file *name* with the hash in the manifest; what was found.

    Raises
    ------
    ArtifactError
        The file is missing, of another size, or not that which was written.
    """
    entry = manifest["files"][name]
    artifacts.check_size(folder, name, entry)
    if "blocks_sha256" in entry:
        same = _hash_blocks(folder, manifest, name) == entry["blocks_sha256"]
    else:
        same = artifacts.sha256_file(folder / name) == entry.get("sha256")
    if not same:
        raise ArtifactError(f"{folder / name}: its bytes are no longer those that were written")
    return f"{entry['bytes']:,} bytes, SHA-256 agrees"


def _hash_blocks(folder: Path, manifest: dict[str, Any], name: str) -> str:
    check_kinds(folder / artifacts.MANIFEST, manifest)
    rows, block_rows = manifest["counts"]["rows"], manifest["files"][name].get("block_rows")
    if type(block_rows) is not int or block_rows < 1:
        raise ArtifactError(f"{folder / artifacts.MANIFEST}: {name} has {block_rows!r} block_rows")
    features = activations.by_file(activations.features_of(manifest)).get(name, [])
    dtype = StorageDtype(manifest["storage_dtype"])
    return activations.hash_layer(folder / name, features, rows, dtype, block_rows)


def _check_content(folder: Path, manifest: dict[str, Any], config: VerifyConfig) -> Iterator[Check]:
    kind = manifest["kind"]
    if kind == "activations":
        features = activations.features_of(manifest)
        yield _attempt("matrices", lambda: _check_shapes(folder, manifest, features))
        if config.rows:
            yield _recompute(folder, manifest, features, config)
    if kind == "head":
        yield _attempt("head", lambda: f"{load_head(folder).neurons:,} neurons, all in range")
    if kind in ("selection", "head") and config.rows:
        yield recompute(folder, manifest, config.seed)
    if "parent" in manifest:
        try:
            path, _ = artifacts.read_parent(folder, manifest)
            yield Check("parent", True, f"{path} is what it was made from")
        except ArtifactError as error:
            gone = not (folder / manifest["parent"]["path"]).resolve().exists()
            yield Check("parent", None if gone else False, error.message)


def _check_shapes(folder: Path, manifest: dict[str, Any], features: Sequence[Feature]) -> str:
    count = manifest["counts"]["rows"]
    dtype = StorageDtype(manifest["storage_dtype"])
    samples = read_samples(folder)
    if len(samples.ids) != count:
        raise ArtifactError(f"{folder}: {len(samples.ids)} samples, the manifest says {count}")
    for feature in features:
        activations.read_matrix(folder, feature, 1, dtype, start=count - 1)
    return f"{len(features)} matrices of {count:,} rows"


def _recompute(
    folder: Path, manifest: dict[str, Any], features: Sequence[Feature], config: VerifyConfig
) -> Check:
    """Read some texts again and compare.

    Whether foreign code or pickle may be loaded is never taken from a manifest.
    """
    what = "recomputed rows"
    try:
        options = from_plain(ModelConfig, manifest["request"]["options"]["model"])
        data = from_plain(DataConfig, manifest["request"]["options"]["data"])
        count = manifest["counts"]["rows"]
        chosen = sorted(random.Random(config.seed).sample(range(count), min(config.rows, count)))
        texts = _pick(reread(manifest["request"]["data"], data, folder), chosen)
        if options.bits is Bits.EIGHT:
            return Check(what, None, "read with 8 bits, where a text's vectors depend on its batch")
        options = replace(
            options, model=config.model or options.model,
            trust_remote_code=config.trust_remote_code, allow_pickle=config.allow_pickle,
        )  # fmt: skip
        loaded = backbone.load(options)
    except (KeyError, TypeError, ValueError) as error:
        return Check(what, False, f"the manifest's request is not valid: {error}")
    except DataError as error:
        return Check(what, None, error.message)
    except SpinError as error:
        return Check(what, None, f"{error.message} (--rows 0 leaves this out)")
    differing = artifacts.differing_fields(
        manifest["request"]["model"], artifacts.to_plain(loaded.identity)
    )
    if differing := [name for name in differing if name != "id"]:
        return Check(what, None, f"another model now: {', '.join(differing)} changed")
    worst, at, feature = _farthest(folder, manifest, features, chosen, texts, loaded)
    formats = {manifest["request"]["dtype"], manifest["storage_dtype"]}
    limit = max(TOLERANCE[name] for name in formats)
    found = f"{len(chosen)} rows, at most {worst:.1e} apart"
    if worst <= limit:
        return Check(what, True, found)
    where = f"row {at}, {feature.layer} {feature.dataset}"
    return Check(what, False, f"{found} (limit {limit:g}), in {where}")


def _pick(rows: Iterator[Row], chosen: Sequence[int]) -> list[str]:
    wanted = set(chosen)
    return [row.text for index, row in enumerate(rows) if index in wanted]


def _farthest(
    folder: Path,
    manifest: dict[str, Any],
    features: Sequence[Feature],
    chosen: Sequence[int],
    texts: Sequence[str],
    model: Backbone,
) -> tuple[float, int, Feature]:
    """The largest relative distance between stored and recomputed vectors, and where it is."""
    dtype = StorageDtype(manifest["storage_dtype"])
    stored = {
        (f.layer, f.site, f.pooling): np.vstack(
            [activations.read_matrix(folder, f, 1, dtype, start=row) for row in chosen]
        ).astype(np.float32)
        for f in features
    }
    wanted: dict[tuple[str, Site], list[Pooling]] = {}
    for feature in features:
        wanted.setdefault((feature.layer, feature.site), []).append(feature.pooling)
    by_key = {(f.layer, f.site, f.pooling): f for f in features}
    found: list[tuple[float, int, Feature]] = []

    def compare(
        layer: str, site: Site, pooling: Pooling, rows: Sequence[int], vectors: NDArray[Any]
    ) -> None:
        old = stored[layer, site, pooling][rows]
        new = backbone.as_stored(torch.from_numpy(vectors), dtype).float().numpy()
        lengths = np.maximum(np.linalg.norm(old, axis=1), 1e-6)
        apart = np.linalg.norm(new - old, axis=1) / lengths
        worst = int(apart.argmax())
        found.append((float(apart[worst]), chosen[rows[worst]], by_key[layer, site, pooling]))

    with torch.inference_mode():
        backbone.gather(model, backbone.encode(model, texts), wanted, compare)
    return max(found, key=lambda item: item[0])
