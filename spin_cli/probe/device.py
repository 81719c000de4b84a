"""Standardised matrices on a GPU (or any device of torch), read there block by block."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any, cast

import numpy as np
import torch
from numpy.typing import NDArray

from spin_cli.probe.blocks import Remote
from spin_cli.probe.standard import Standardised, check_shape, moments, scale_columns

BLOCK_BYTES = 64 * 2**20
"""Of the float32 rows that are brought to the device at once."""
SHARE = 0.35
"""Of the device's free memory that one matrix may take: the next one is read meanwhile."""

Parts = list[slice]
Load = Callable[[slice], torch.Tensor]


class DeviceRows(Remote):
    """Rows with mean 0 and standard deviation 1, float32, in blocks that are held or brought anew.

    Parameters
    ----------
    blocks : a block (n, d) for each of *parts*, or what brings one to the device
    """

    def __init__(
        self, blocks: list[torch.Tensor] | Load, parts: Parts, width: int, device: torch.device
    ) -> None:
        self.blocks, self.parts, self.device = blocks, parts, device
        self.shape = parts[-1].stop, width

    def __iter__(self) -> Iterator[tuple[slice, torch.Tensor]]:
        for index, part in enumerate(self.parts):
            blocks = self.blocks
            yield part, blocks[index] if isinstance(blocks, list) else blocks(part)

    def times(self, V: NDArray[Any], *, exact: bool = False) -> NDArray[np.float64]:
        """See `Remote`."""
        device, dtype = self._place(exact)
        right = torch.as_tensor(np.ascontiguousarray(V), device=device, dtype=dtype)
        return np.concatenate([_numpy(block.to(device, dtype) @ right) for _, block in self])

    def transposed_times(self, R: NDArray[Any], *, exact: bool = False) -> NDArray[np.float64]:
        """See `Remote`; blocks are summed in float64."""
        device, dtype = self._place(exact)
        out = np.zeros((self.shape[1], R.shape[1]))
        for part, block in self:
            right = torch.as_tensor(np.ascontiguousarray(R[part]), device=device, dtype=dtype)
            out += _numpy(block.to(device, dtype).T @ right)
        return out

    def _place(self, exact: bool) -> tuple[torch.device, torch.dtype]:
        if not exact:
            return self.device, torch.float32
        return self.device if has_float64(self.device) else torch.device("cpu"), torch.float64


def has_float64(device: torch.device) -> bool:
    """Apple's GPUs lack it."""
    return device.type != "mps"


def standardise_on(X: Any, device: torch.device, hold: bool | None = None) -> Standardised:
    """`standardise` with the result on *device*.

    Parameters
    ----------
    X : (N, d), anything sliced by rows that gives float16, float32 or float64
    hold : keep the rows on the device; None: where it has room. Else they are brought there anew
        for every product.

    Notes
    -----
    Each row is read once where the result is held. The mean is rounded to float32, in which it is
    subtracted: a shift that is the same for all rows, and `Standardised.mean` is what was taken.
    """
    check_shape(X)
    parts = _parts(*X.shape)
    held: list[torch.Tensor] | None = [] if _has_room(X, device, hold) else None

    def exact() -> Iterator[torch.Tensor]:
        for part in parts:
            block = _bring(X, part, device)
            if held is not None:
                held.append(block)
            yield (
                block.to(torch.float64, copy=True) if has_float64(device) else block.cpu().double()
            )

    mean, variance = (_numpy(found) for found in moments(exact()))
    scale, kept = scale_columns(mean, variance, X.dtype)
    mean = mean.astype(np.float32).astype(np.float64)
    apply = _standardiser(mean, scale, kept, device)
    if held is None:
        return _made(lambda part: apply(_bring(X, part, device)), parts, mean, scale, kept, device)
    for index, block in enumerate(held):  # in place: two whole copies may not fit
        held[index] = apply(block)
        del block
    return _made(held, parts, mean, scale, kept, device)


def transform_on(X: Any, like: Standardised) -> DeviceRows:
    """Other rows ``X`` (M, d) on the same footing and the same device, held there."""
    device = cast(DeviceRows, like.X).device
    apply = _standardiser(like.mean, like.scale, like.kept, device)
    parts = _parts(*X.shape)
    blocks = [apply(_bring(X, part, device)) for part in parts]
    return DeviceRows(blocks, parts, len(like.kept), device)


def _made(
    blocks: list[torch.Tensor] | Load,
    parts: Parts,
    mean: NDArray[np.float64],
    scale: NDArray[np.float64],
    kept: NDArray[np.intp],
    device: torch.device,
) -> Standardised:
    rows = DeviceRows(blocks, parts, len(kept), device)
    return Standardised(cast(NDArray[np.float32], rows), mean, scale, kept)


def _standardiser(
    mean: NDArray[np.float64], scale: NDArray[np.float64], kept: NDArray[np.intp], device: Any
) -> Callable[[torch.Tensor], torch.Tensor]:
    columns = None if len(kept) == len(mean) else torch.as_tensor(kept, device=device)
    shift = torch.as_tensor(mean[kept].astype(np.float32), device=device)
    factor = torch.as_tensor((1.0 / scale[kept]).astype(np.float32), device=device)

    def apply(block: torch.Tensor) -> torch.Tensor:
        block = block.float() if columns is None else block.index_select(1, columns).float()
        return (block - shift) * factor

    return apply


def _parts(rows: int, width: int) -> Parts:
    step = max(64, BLOCK_BYTES // (4 * max(1, width)))
    return [slice(start, min(start + step, rows)) for start in range(0, rows, step)]


def _bring(X: Any, part: slice, device: torch.device) -> torch.Tensor:
    block = torch.as_tensor(np.ascontiguousarray(X[part]))
    if block.dtype == torch.float64 and not has_float64(device):
        block = block.float()
    return block.to(device)


def _has_room(X: Any, device: torch.device, hold: bool | None) -> bool:
    if hold is not None or device.type != "cuda":
        return hold is not False
    free, _ = torch.cuda.mem_get_info(device)
    # As stored and in float32 side by side, for a moment.
    return bool(X.shape[0] * X.shape[1] * (X.dtype.itemsize + 4) < SHARE * free)


def _numpy(tensor: torch.Tensor) -> NDArray[np.float64]:
    return tensor.cpu().numpy().astype(np.float64)
