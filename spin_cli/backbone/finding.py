"""Where a model's blocks, FFNs, activations and experts stand, told from its modules alone."""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from torch import nn

from spin_cli.backbone.layout import Hook
from spin_cli.choices import Site
from spin_cli.errors import ModelError

NOT_FFN = re.compile(
    r"attn|attention|conv(?!1d)|expert|adapter|per_layer|norm|lora_|router|gate\b"
    r"|mamba|(mixer|ssm)\.(in|out|x|dt)_proj"
)
NOT_FFN_CLASS = re.compile(r"(attention|attn|mamba2?mixer|recurrentblock|deltanet)$", re.IGNORECASE)
"""Classes of modules with their own projections, whatever a block calls them (``mixer``)."""
ACTIVATION = re.compile(r"act\b|act_fn|act_func|activation|gelu|relu|silu|swish")


def block_count(config: Any, prefix: str) -> int:
    """Number of blocks that a configuration states for the ``layer``, ``encoder``, ``decoder``."""
    text = config.get_text_config()
    names = {
        "encoder": ("encoder_layers", "num_encoder_layers", "num_layers", "num_hidden_layers"),
        "decoder": ("decoder_layers", "num_decoder_layers", "num_hidden_layers"),
        "layer": ("num_hidden_layers",),
    }[prefix]
    for name in names:
        if isinstance(getattr(text, name, None), int):
            return int(getattr(text, name))
    raise ModelError(f"the configuration of {text.model_type} does not say how many layers it has")


def find_blocks(root: nn.Module, count: int) -> list[nn.Module]:
    """The distinct blocks of a stack: what the model records hidden states from, else a list.

    Raises
    ------
    ModelError
        There is no list of *count* modules.
    """
    recorded = (getattr(root, "_can_record_outputs", None) or {}).get("hidden_states")
    noted = recorded if isinstance(recorded, list | tuple) else [recorded]
    classes = [getattr(each, "target_class", each) for each in noted]  # hybrids have several
    if block_classes := tuple(each for each in classes if isinstance(each, type)):
        blocks = [module for module in root.modules() if isinstance(module, block_classes)]
        if blocks:
            return blocks
    lists = [m for m in root.modules() if isinstance(m, nn.ModuleList) and len(m) == count]
    if not lists:
        raise ModelError(
            f"{type(root).__name__}: found no list of {count} blocks, so no layer can be read"
        )
    return list(max(lists, key=_weights))


def _weights(module: Any) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def find_sites(block: nn.Module, path: str, hidden: int) -> dict[Site, Hook | str]:
    """Where a block's ``ffn``, ``gate`` and ``router`` are read, or why they cannot be.

    Parameters
    ----------
    block : the module, and *path*, where it stands in the model
    hidden : width of the residual stream

    Notes
    -----
    The down projection is, of the linear layers that put out the residual stream and are not part
    of attention or a state-space mixer, the one with the widest input. A block with fused experts
    is read there, whatever shared expert stands beside them.
    """
    experts = find_experts(block)
    if len(experts) > 1:
        return dict.fromkeys(
            (Site.FFN, Site.GATE, Site.ROUTER), f"{path} has several expert layers"
        )
    if experts:
        inner, module = next(iter(experts.items()))
        return _expert_sites(module, f"{path}.{inner}")
    if any("expert" in name for name, _ in block.named_modules()):
        reason = f"the experts of {path} are not fused, so no router weights can be told"
        return dict.fromkeys((Site.FFN, Site.GATE, Site.ROUTER), reason)
    no_router = f"{path} has no experts"
    found = _find_down(block, hidden)
    if found is None:
        reason = f"{path} ({type(block).__name__}) has no feed-forward layer"
        return {Site.FFN: reason, Site.GATE: reason, Site.ROUTER: no_router}
    inner, width = found
    acts = _find_activations(block)
    gate: Hook | str = (
        Hook(f"{path}.{acts[0]}", width, "output")
        if len(acts) == 1
        else f"{path} has {len(acts) or 'no'} activation modules, so its gate cannot be told"
    )
    return {
        Site.FFN: Hook(f"{path}.{inner}", width, "input"),
        Site.GATE: gate,
        Site.ROUTER: no_router,
    }


def find_experts(block: nn.Module) -> dict[str, nn.Module]:
    """Fused experts in a block: modules with one 3-D down projection for all of them."""
    return {
        path: module
        for path, module in block.named_modules()
        if getattr(getattr(module, "down_proj", None), "ndim", 0) == 3
    }


def _expert_sites(module: Any, path: str) -> dict[Site, Hook | str]:
    if not hasattr(module, "_apply_gate") or not hasattr(module, "is_transposed"):
        reason = f"{path} ({type(module).__name__}) does not run through transformers' experts"
        return dict.fromkeys((Site.FFN, Site.GATE, Site.ROUTER), reason)
    experts, first, second = module.down_proj.shape
    width = first if module.is_transposed else second
    gate: Hook | str = Hook(path, width, "experts")
    if not isinstance(getattr(module, "act_fn", None), nn.Module):
        gate = f"{path} ({type(module).__name__}) has no activation module"
    return {
        Site.FFN: Hook(path, width, "experts"),
        Site.GATE: gate,
        Site.ROUTER: Hook(path, experts, "experts"),
    }


def _linear_sizes(module: nn.Module) -> tuple[int, int] | None:
    """(in, out) of anything that acts as a linear layer, else None."""
    if isinstance(getattr(module, "in_features", None), int) and isinstance(
        getattr(module, "out_features", None), int
    ):
        return module.in_features, module.out_features  # type: ignore[return-value]
    if type(module).__name__ == "Conv1D":
        return module.nx, module.nf  # type: ignore[return-value]
    return None


def _ffn_modules(block: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Paths and modules in *block* that may belong to its FFN."""
    others: list[str] = []
    for path, module in block.named_modules():
        if path and NOT_FFN_CLASS.search(type(module).__name__):
            others.append(f"{path}.")
        if not NOT_FFN.search(path.lower()) and not f"{path}.".startswith(tuple(others)):
            yield path, module


def _find_down(block: nn.Module, hidden: int) -> tuple[str, int] | None:
    """Path and input width of the down projection of a block's FFN."""
    best: tuple[str, int] | None = None
    for path, module in _ffn_modules(block):
        sizes = _linear_sizes(module)
        if sizes is None or sizes[1] != hidden:
            continue
        if best is None or sizes[0] > best[1]:
            best = (path, sizes[0])
    return best if best is not None and best[1] > 0 else None


def _find_activations(block: nn.Module) -> list[str]:
    """Modules without children or weights that are named after an activation function."""
    found = []
    for path, module in _ffn_modules(block):
        leaf = not any(True for _ in module.children()) and not any(
            True for _ in module.parameters()
        )
        named = ACTIVATION.search(path.rpartition(".")[2].lower())
        if leaf and named:
            found.append(path)
    return found
