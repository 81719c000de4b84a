"""Where a model is put and in which numbers it computes: device, several devices, few bits."""

from __future__ import annotations

import atexit
import importlib.util
import shutil
import tempfile
from typing import Any

import torch

from spin_cli.choices import Bits, Dtype
from spin_cli.config import ModelConfig
from spin_cli.errors import ModelError
from spin_cli.ranks import current

DEVICES = ("cpu", "cuda", "mps", "xpu")
NAMED = "auto, cpu, cuda, cuda:0 (the first of several), mps"


def choose_device(name: str) -> torch.device:
    """The device that *name* means; ``auto`` takes CUDA, then MPS, then the CPU.

    Under torchrun ``auto`` and ``cuda`` mean the GPU of this process.

    Raises
    ------
    ModelError
        There is no such device here.
    """
    if name == "auto":
        if not torch.cuda.is_available():
            return torch.device("mps" if torch.backends.mps.is_available() else "cpu")
        name = "cuda"
    if name == "mps" and not torch.backends.mps.is_available():
        why = "this PyTorch has no MPS" if not torch.backends.mps.is_built() else "no Apple GPU"
        raise ModelError(f"--device mps: not usable here ({why})", "Give --device cpu or auto.")
    if name.partition(":")[0] not in DEVICES:
        raise ModelError(f"--device {name}: no such kind of device", f"There are: {NAMED}.")
    ranks = current()
    if name == "cuda" and ranks.size > 1:
        name = f"cuda:{ranks.local_rank}"
    try:
        return torch.empty(1, device=name).device  # with its number, where there may be several
    except (RuntimeError, AssertionError, NotImplementedError) as error:
        reason = str(error).splitlines()[0]
        raise ModelError(f"--device {name}: not usable here ({reason})") from error


def choose_dtype(wanted: Dtype, device: torch.device) -> torch.dtype:
    """``auto`` is float32 on a CPU (exact, and the same on every machine), else bfloat16."""
    if wanted is Dtype.AUTO:
        if device.type == "cuda" and torch.cuda.is_bf16_supported():
            return torch.bfloat16
        return torch.float32
    chosen: torch.dtype = getattr(torch, wanted.value)
    return chosen


def is_placed(options: ModelConfig) -> bool:
    """Whether the model is put where it belongs while it is loaded, and cannot be moved after."""
    return options.device_map is not None or options.bits is not None


def placing_arguments(
    options: ModelConfig, device: torch.device, dtype: torch.dtype
) -> dict[str, Any]:
    """Keyword arguments for ``from_pretrained``; none where the model is moved afterwards.

    Raises
    ------
    ModelError
        A package is missing, or the options do not go together.
    """
    if not is_placed(options):
        return {}
    _need("accelerate", "--device-map" if options.device_map else _flag(options.bits))
    arguments: dict[str, Any] = {"device_map": {"": device}}
    if options.device_map is not None:
        if options.device != "auto":
            raise ModelError("--device-map auto and --device exclude each other")
        if current().size > 1:
            raise ModelError("--device-map auto spreads one process over all devices: no torchrun")
        folder = tempfile.mkdtemp(prefix="spin-offload-")
        atexit.register(shutil.rmtree, folder, ignore_errors=True)
        arguments = {"device_map": options.device_map, "offload_folder": folder}
    if options.bits is not None:
        if options.model.endswith(".gguf") or options.model == "bundled:smollm2":
            raise ModelError(f"{_flag(options.bits)}: a GGUF file is quantised as it is")
        _need("bitsandbytes", _flag(options.bits))
        from transformers import BitsAndBytesConfig

        arguments["quantization_config"] = BitsAndBytesConfig(
            load_in_8bit=options.bits is Bits.EIGHT,
            load_in_4bit=options.bits is Bits.FOUR,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_compute_dtype=dtype,
        )
    return arguments


def _flag(bits: Bits | None) -> str:
    return "--load-in-8bit" if bits is Bits.EIGHT else "--load-in-4bit"


def _need(package: str, option: str) -> None:
    if importlib.util.find_spec(package) is None:
        raise ModelError(f"{option} needs the package {package}", "pip install 'spin-cli[large]'")


def input_device(model: torch.nn.Module) -> torch.device:
    """The device on which *model* takes its token ids."""
    device = next(model.parameters()).device
    if device.type != "meta":
        return device
    # Weights that lie in main memory or on the disk come to a device when their turn is.
    places = {str(place) for place in getattr(model, "hf_device_map", {}).values()}
    gpus = sorted(place for place in places if place not in ("cpu", "disk"))
    return torch.device(f"cuda:{gpus[0]}" if gpus and gpus[0].isdecimal() else [*gpus, "cpu"][0])
