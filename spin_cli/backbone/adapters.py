"""PEFT adapters: checking one, and merging it into the model that it was trained on.

An adapter is merged into the weights, so that what is read afterwards is a plain model: its
hookpoints, speed and early exit are those of any other. Only where the weights are quantised it
stays beside them, since merging would round it away.
"""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

import torch

from spin_cli.backbone.resolve import hash_weights
from spin_cli.errors import ModelError

CONFIG, WEIGHTS = "adapter_config.json", "adapter_model.safetensors"
TYPES = ("LORA", "LOHA", "LOKR", "IA3")
"""Kinds that change weights of linear layers alone, and so can be merged into them."""
MAX_CONFIG_BYTES = 2**20
PREFIX = "base_model.model."
WHOLE = "whole:"
"""Marks weights that stand in the place of the model's own (embeddings, for the most part)."""
HEADS = ("lm_head", "score", "classifier", "classification_head", "qa_outputs")
"""What stands on a model that has no name of its own within the one with the head (T5)."""
UNREADABLE = {
    "megatron_config": "names code to import",
    "layer_replication": "repeats blocks",
    "trainable_token_indices": "replaces embeddings of single tokens",
    "target_parameters": "changes fused experts",
    "alora_invocation_tokens": "acts from a certain token on",
    "arrow_config": "chooses among several adapters",
}
"""Settings that cannot be read, and what they do."""
VOLATILE = ("base_model_name_or_path", "inference_mode", "peft_version", "revision", "auto_mapping",
            "task_type")  # fmt: skip
"""Settings that say nothing about what the adapter computes."""


def describe_adapter(folder: Path) -> dict[str, Any]:
    """What identifies an adapter: its kind and the hashes of its settings and weights.

    Raises
    ------
    ModelError
        It is missing, pickled, of a kind that cannot be read, or names code to run.
    """
    values = _read_config(folder)
    kept = {key: value for key, value in values.items() if key not in VOLATILE}
    return {
        "type": values["peft_type"],
        "config_sha256": hashlib.sha256(json.dumps(kept, sort_keys=True).encode()).hexdigest(),
        "weights": [hash_weights(folder / WEIGHTS)],
    }


def _read_config(folder: Path) -> dict[str, Any]:
    path = folder / CONFIG
    if not path.is_file():
        raise ModelError(f"--adapter {folder}: no {CONFIG} in it, so not a saved PEFT adapter")
    try:
        if path.stat().st_size > MAX_CONFIG_BYTES:
            raise ValueError("too large")
        values = json.loads(path.read_text(encoding="utf-8"))
        if not isinstance(values, dict):
            raise ValueError("expected an object")
    except (OSError, ValueError, RecursionError) as error:
        raise ModelError(f"{path}: cannot be read ({error})") from error
    _check(path, values)
    if not (folder / WEIGHTS).is_file():
        raise ModelError(
            f"{folder}: no {WEIGHTS} in it",
            "Save the adapter again with safe_serialization=True; pickled ones are not loaded.",
        )
    return values


def _check(path: Path, values: dict[str, Any]) -> None:
    """Refuse settings that cannot be read, or that name code to run."""
    if values.get("peft_type") not in TYPES:
        raise ModelError(
            f"{path}: an adapter of type {values.get('peft_type')!r} cannot be read",
            f"Those of type {', '.join(TYPES)} can.",
        )
    mapping = values.get("auto_mapping") or {}
    library = mapping.get("parent_library") if isinstance(mapping, dict) else mapping
    if library is not None and not re.fullmatch(r"transformers(\.\w+)*", str(library)):
        raise ModelError(f"{path}: auto_mapping names code outside transformers: {library!r}")
    for name, what in UNREADABLE.items():
        if values.get(name):
            raise ModelError(f"{path}: {name} {what}; such an adapter cannot be read")
    if values.get("bias", "none") != "none":
        raise ModelError(f"{path}: an adapter that trains biases too cannot be read")


def apply_adapter(model: Any, folder: Path, *, shortened: bool, merge: bool) -> torch.nn.Module:
    """Put the adapter in *folder* into *model*.

    Parameters
    ----------
    model : a transformers model, without a head on it
    folder : an adapter, trained on this model with whatever head
    shortened : *model* lacks blocks, so weights for them may be left over
    merge : add it to the weights; else it runs beside them

    Raises
    ------
    ModelError
        It does not fit the model, or `peft` is not installed.
    """
    try:
        import peft
        from safetensors.torch import load_file
    except ImportError as error:
        raise ModelError(
            "--adapter needs the package peft", "pip install 'spin-cli[peft]'"
        ) from error
    values = _read_config(folder)
    if any(weight.is_meta for weight in model.parameters()):
        raise ModelError(
            "--adapter: some weights do not fit on the devices, and none can be changed there",
            "Leave out --device-map, or merge the adapter into a model folder with peft.",
        )
    try:
        state, modules = _fit(model, load_file(folder / WEIGHTS), folder, shortened=shortened)
        for key in [key for key in state if key.startswith(WHOLE)]:
            model.get_parameter(key.removeprefix(WHOLE)).data.copy_(state.pop(key))
        if not modules:  # all of it belongs to blocks that are not there
            return model  # type: ignore[no-any-return]
        config = peft.PEFT_TYPE_TO_CONFIG_MAPPING[values["peft_type"]].from_pretrained(folder)
        _aim(config, modules, model.base_model_prefix)
        wrapped = peft.get_peft_model(model, config)
        report = peft.set_peft_model_state_dict(wrapped, state)
        left = [key for key in report.missing_keys if wrapped.prefix in key]
        if left or report.unexpected_keys:
            raise ValueError(f"weights do not fit: {[*left, *report.unexpected_keys][0]}")
        if not merge:
            return wrapped.get_base_model()  # type: ignore[no-any-return]
        return wrapped.merge_and_unload(safe_merge=True)  # type: ignore[no-any-return]
    except ModelError:
        raise
    except Exception as error:  # a stranger's file, through a library that checks little
        reason = str(error).strip().splitlines() or [type(error).__name__]
        raise ModelError(f"{folder}: does not fit this model ({reason[0]})") from error


def _fit(
    model: Any, state: dict[str, torch.Tensor], folder: Path, *, shortened: bool
) -> tuple[dict[str, torch.Tensor], list[str]]:
    """Weights under this model's names, and the modules that they belong to.

    Adapters are mostly trained on a model with a head: there the model itself is a part, and its
    paths have one name more at the front. What belongs to the head is left out.
    """
    inner = f"{PREFIX}{model.base_model_prefix}."
    headed = any(key.startswith(inner) for key in state) and not hasattr(
        model, model.base_model_prefix
    )
    fitted, modules, lost = {}, set(), []
    there = dict(model.named_parameters())
    for key, tensor in state.items():
        if headed and not key.startswith(inner):
            continue
        path = key.removeprefix(inner if headed else PREFIX)
        name = re.split(r"\.(?:lora_|hada_|lokr_|ia3_)", path)[0]
        if not headed and path.split(".")[0] in HEADS:
            continue
        if name == path:
            if path not in there or there[path].shape != tensor.shape:
                raise ModelError(f"{folder}: replaces {path}, which this model has not or not so")
            fitted[WHOLE + path] = tensor
            continue
        try:
            model.get_submodule(name)
        except AttributeError:
            lost.append(path)
            continue
        modules.add(name)
        fitted[PREFIX + path] = tensor
    if lost and not shortened:
        raise ModelError(f"{folder}: does not fit this model, which has no place for {lost[0]}")
    if not fitted and not lost:
        raise ModelError(f"{folder}: holds no weights for this model")
    return fitted, sorted(modules)


def _aim(config: Any, modules: list[str], prefix: str) -> None:
    """Let *config* name exactly these modules, as the model without a head calls them."""
    config.target_modules = modules
    config.modules_to_save = None
    for name in ("exclude_modules", "layers_to_transform", "layers_pattern"):
        if hasattr(config, name):
            setattr(config, name, None)
    for name in ("rank_pattern", "alpha_pattern"):
        pattern = getattr(config, name, None)
        if pattern:
            front = re.compile(rf"^(\^?){re.escape(prefix)}\\?\.")
            setattr(config, name, {front.sub(r"\1", key): v for key, v in pattern.items()})
