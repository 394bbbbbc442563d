"""Positions of patches: the sine-cosine table, and tables for another grid than they were made for."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from sslbench.nn.losses import no_autocast


def sincos_table(dim: int, height: int, width: int) -> Tensor:
    """Fixed positions of a grid of patches (Vaswani et al., "Attention Is All You Need", 2017, section 3.5, in two
    dimensions as in MoCo v3).

    Frequencies fall from 1 to almost 1/10000. Of the four quarters of the features, two are the sines and cosines
    of the column, and two those of the row.

    Args:
        dim: a multiple of 4.

    Returns:
        float32 ``[height*width, dim]``, row by row.
    """
    if dim % 4:
        raise ValueError(f"sine-cosine positions need a width that is a multiple of 4, got {dim}")
    frequencies = 10000.0 ** -(torch.arange(dim // 4, dtype=torch.float64) / (dim // 4))
    rows, columns = torch.meshgrid(torch.arange(height), torch.arange(width), indexing="ij")
    angles = [axis.flatten()[:, None] * frequencies for axis in (columns, rows)]
    return torch.cat([part for angle in angles for part in (angle.sin(), angle.cos())], dim=1).float()


def resized_table(table: Tensor, grid: tuple[int, int], wanted: tuple[int, int]) -> Tensor:
    """Positions of another grid over the same image, interpolated bicubically.

    Args:
        table: ``[1, h*w, D]``, row by row.
        grid: its height and width.
        wanted: height and width of the other grid.

    Returns:
        ``[1, H*W, D]``; the table itself where the grids are equal.
    """
    if grid == wanted:
        return table
    # By two small matrices, since torch's own interpolation has no deterministic gradient on GPUs.
    with no_autocast(table):
        down, across = (_weights(old, new, table) for old, new in zip(grid, wanted, strict=True))
        positions = torch.einsum("yh,xw,bhwd->byxd", down, across, table.reshape(len(table), *grid, -1))
    return positions.flatten(1, 2)


def _weights(old: int, new: int, like: Tensor) -> Tensor:
    """``[new, old]``: how much each old place counts at each new one."""
    each = torch.eye(old, dtype=like.dtype, device=like.device).view(1, old, old, 1)
    return F.interpolate(each, (new, 1), mode="bicubic", align_corners=False)[0, :, :, 0].T
