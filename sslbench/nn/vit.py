"""The vision transformer as a backbone of any size (Dosovitskiy et al., ICLR 2021; Touvron et al., DeiT, 2021)."""

from __future__ import annotations

from typing import Annotated, ClassVar, Literal

import torch
from pydantic import Field
from torch import Tensor, nn

from sslbench.nn.positions import resized_table, sincos_table
from sslbench.nn.transformer import Block, Initialisation, initialise, layer_norm, learned_token
from sslbench.plugin.api import Backbone, Features, Options

_SMALL, _MEDIUM = 48, 112


class ViTOptions(Options):
    """Options of the vision transformers."""

    patch_size: Literal["auto"] | Annotated[int, Field(ge=1)] = "auto"
    """Side of a patch in pixels; `auto`: 4 for images of up to 48 pixels, 8 up to 112, 16 for larger ones."""
    depth: int = Field(12, ge=1)
    """Number of blocks; the published networks have 12."""
    pool: Literal["class", "mean"] = "class"
    """The pooled features: the class token's, or the mean of the patches'. Both exist either way."""
    positions: Literal["learned", "sincos"] = "learned"
    """Position embeddings: learned, or fixed sines and cosines (MAE). For images of another size than those of
    pretraining they are interpolated."""
    drop_path: float = Field(0.0, ge=0, lt=1)
    """Probability that an image skips a branch of the last block while training; it rises linearly from 0 in the
    first one. Drawn by each process for itself, so above 0 the results of several are not those of one."""
    init: Initialisation = "trunc-normal"
    """`trunc-normal`: linear layers start with standard deviation 0.02 (DeiT, DINO); `xavier`: they, and the
    projection of patches as one of them, start uniform by their width (MAE)."""


class PatchEmbedding(nn.Module):
    """Each patch's pixels, projected linearly (equation 1)."""

    def __init__(self, side: int, dim: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(3, dim, side, stride=side)

    def forward(self, images: Tensor) -> Tensor:
        """``[B,3,H,W]`` to ``[B,D,h,w]``; a rest at the right and the bottom is left out."""
        return self.proj(images)  # type: ignore[no-any-return]


class VisionTransformer(Backbone):
    """:attr:`stride` is the side of a patch.

    State-dict keys are those of DeiT, DINO and timm without the classifier, so published weights load as they are.
    """

    Config = ViTOptions
    provides = frozenset({"pooled", "map", "tokens"})
    heads: ClassVar[int]
    cfg: ViTOptions

    def __init__(self, cfg: ViTOptions, image_size: int) -> None:
        super().__init__(cfg, image_size)
        self.stride = _patch_side(cfg, image_size)
        self.mean_pooled = cfg.pool == "mean"
        side = max(image_size // self.stride, 1)
        self.grid = side, side
        self.patch_embed = PatchEmbedding(self.stride, self.dim)
        self.cls_token = learned_token(self.dim)
        self._add_positions(side)
        rates = [cfg.drop_path * number / max(cfg.depth - 1, 1) for number in range(cfg.depth)]
        self.blocks = nn.Sequential(*(Block(self.dim, self.heads, drop_path=rate) for rate in rates))
        self.norm = layer_norm(self.dim)
        initialise(self, cfg.init)
        if cfg.init == "xavier":
            nn.init.xavier_uniform_(self.patch_embed.proj.weight.view(self.dim, -1))

    def _add_positions(self, side: int) -> None:
        """``[1, 1+N, D]``: of the class token (zero where fixed), then of the patches."""
        if self.cfg.positions == "learned":
            table = torch.empty(1, 1 + side * side, self.dim)
            self.pos_embed = nn.Parameter(nn.init.trunc_normal_(table, std=0.02))
        else:
            table = torch.cat([torch.zeros(1, self.dim), sincos_table(self.dim, side, side)])
            self.register_buffer("pos_embed", table[None])

    def forward(self, images: Tensor, visible: Tensor | None = None) -> Features:
        """``[B,3,H,W]`` to features of :attr:`dim` channels; ``visible`` ``[B,K]``: of these patches alone."""
        patches = self.patch_embed(images)
        grid = patches.shape[2:]
        positions = resized_table(self.pos_embed[:, 1:], self.grid, tuple(grid))
        tokens = patches.flatten(2).mT + positions
        if visible is not None:
            tokens = tokens.gather(1, visible[:, :, None].expand(-1, -1, self.dim))
            grid = torch.Size((1, visible.shape[1]))
        of_image = (self.cls_token + self.pos_embed[:, :1]).expand(len(tokens), -1, -1)
        tokens = self.norm(self.blocks(torch.cat([of_image, tokens], dim=1)))
        pooled = tokens[:, 0] if self.cfg.pool == "class" else tokens[:, 1:].mean(dim=1)
        return Features(pooled, tokens[:, 1:].mT.unflatten(2, grid), tokens=tokens)


def _patch_side(cfg: ViTOptions, image_size: int) -> int:
    if cfg.patch_size != "auto":
        return cfg.patch_size
    return 4 if image_size <= _SMALL else 8 if image_size <= _MEDIUM else 16
