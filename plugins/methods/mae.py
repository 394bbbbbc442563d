"""MAE: see a quarter of an image's patches and paint the others.

He et al., "Masked Autoencoders Are Scalable Vision Learners", CVPR 2022, section 3: random masking without
replacement, an encoder that sees the visible patches only, a narrow decoder that also gets mask tokens, both with
sine-cosine positions, and the mean squared error on the masked patches alone, each normalised by its own mean and
standard deviation. The class token takes part in the decoder and is not painted (appendix A.1).

The published network starts as ``backbone.positions=sincos backbone.init=xavier``.
"""

from __future__ import annotations

from typing import Any, ClassVar, Self

import torch
from pydantic import Field, model_validator
from torch import Tensor, nn

from sslbench import comm
from sslbench.errors import ConfigError
from sslbench.nn.losses import no_autocast
from sslbench.nn.positions import sincos_table
from sslbench.nn.transformer import Block, initialise, layer_norm, learned_token
from sslbench.plugin.api import Batch, Build, Method, MethodConfig, ViewSpec
from sslbench.plugin.hooks import hookimpl


class MAEConfig(MethodConfig):
    """Options of MAE."""

    views: tuple[ViewSpec, ...] = (ViewSpec(scale=(0.2, 1.0)),)
    """The one view that is masked: crops and flips are all it takes."""
    masked: float = Field(0.75, gt=0, lt=1)
    """Share of the patches that the encoder does not see."""
    decoder_dim: int = Field(96, ge=4, multiple_of=4)
    """Width of the decoder (paper: 512)."""
    decoder_depth: int = Field(2, ge=1)
    """Blocks of the decoder (paper: 8)."""
    decoder_heads: int = Field(3, ge=1)
    """Attention heads of the decoder (paper: 16)."""
    normalized: bool = True
    """Paint pixels normalised by the mean and standard deviation of their patch; off: as they are."""

    @model_validator(mode="after")
    def _one_view(self) -> Self:
        count = sum(spec.count for spec in self.views)
        if count != 1:
            raise ValueError(f"views must give one view of each image, got {count}")
        return self

    @model_validator(mode="after")
    def _heads_share_the_width(self) -> Self:
        if self.decoder_dim % self.decoder_heads:
            raise ValueError(f"decoder_heads {self.decoder_heads} must divide decoder_dim {self.decoder_dim}")
        return self


class MAE(Method):
    """Masked autoencoder."""

    name = "mae"
    requires = frozenset({"tokens"})
    accumulates = True
    Config = MAEConfig
    defaults: ClassVar[dict[str, Any]] = {
        "optim": {
            "name": "adamw",
            "lr": 1e-3,
            "weight_decay": 0.05,
            "betas": (0.9, 0.95),
            "warmup_epochs": 1.0,
        }
    }
    cfg: MAEConfig

    def __init__(self, cfg: MAEConfig, build: Build) -> None:
        super().__init__(cfg, build)
        self.backbone = build.backbone()
        self.patch = self.backbone.stride
        self.side = self.backbone.image_size // self.patch
        patches = self.side**2
        self.visible = int(patches * (1 - cfg.masked))
        if not 0 < self.visible < patches:
            raise ConfigError(
                f"method.masked={cfg.masked} of {patches} patches leaves {self.visible} to be seen",
                hint="another method.masked, or a smaller backbone.patch_size",
            )
        self.decoder = Decoder(cfg, self.backbone.dim, self.side, 3 * self.patch**2)

    def forward(self, batch: Batch) -> dict[str, Tensor]:
        images = batch.views[0].images
        order = batch.uniform(self.side**2).argsort(dim=1, stable=True)
        visible, hidden = order[:, : self.visible], order[:, self.visible :]
        painted = self.decoder(self.backbone(images, visible).tokens, visible, hidden)
        with no_autocast(painted):
            targets = taken(patchify(images.float(), self.patch), hidden)
            targets = standardised(targets) if self.cfg.normalized else targets
            return {"loss": comm.global_mean((painted.float() - targets).square().mean(dim=(1, 2)))}


class Decoder(nn.Module):
    """From the tokens of the visible patches to the pixels of the hidden ones (section 3).

    Args:
        dim: width of the encoder.
        side: patches per side of an image.
        pixels: values of a patch.
    """

    positions: Tensor

    def __init__(self, cfg: MAEConfig, dim: int, side: int, pixels: int) -> None:
        super().__init__()
        width = cfg.decoder_dim
        self.embed = nn.Linear(dim, width)
        self.mask_token = learned_token(width)
        self.register_buffer("positions", sincos_table(width, side, side), persistent=False)
        self.blocks = nn.Sequential(*(Block(width, cfg.decoder_heads) for _ in range(cfg.decoder_depth)))
        self.norm = layer_norm(width)
        self.predict = nn.Linear(width, pixels)
        initialise(self, "xavier")

    def forward(self, tokens: Tensor, visible: Tensor, hidden: Tensor) -> Tensor:
        """
        Args:
            tokens: ``[B,P+K,D]``: of the image, then of the visible patches.
            visible: ``[B,K]`` their numbers.
            hidden: ``[B,M]`` the others.

        Returns:
            ``[B,M,pixels]``
        """
        of_image, known = self.embed(tokens).tensor_split((tokens.shape[1] - visible.shape[1],), dim=1)
        known = known + self.positions[visible]
        masked = self.mask_token + self.positions[hidden]
        decoded = self.blocks(torch.cat([of_image, known, masked], dim=1))
        return self.predict(self.norm(decoded[:, -hidden.shape[1] :]))  # type: ignore[no-any-return]


def patchify(images: Tensor, patch: int) -> Tensor:
    """``[B,3,H,W]`` to the pixels of its patches ``[B,N,patch*patch*3]``, row by row, in each of them too.

    A rest at the right and the bottom is left out.
    """
    rows, columns = images.shape[2] // patch, images.shape[3] // patch
    cut = images[:, :, : rows * patch, : columns * patch]
    cells = cut.reshape(len(images), images.shape[1], rows, patch, columns, patch)
    return cells.permute(0, 2, 4, 3, 5, 1).flatten(3).flatten(1, 2)


def taken(patches: Tensor, numbers: Tensor) -> Tensor:
    """``[B,M,...]``: of each image the patches of these numbers ``[B,M]``."""
    return patches.gather(1, numbers[:, :, None].expand(-1, -1, patches.shape[2]))


def standardised(patches: Tensor) -> Tensor:
    """Each patch ``[...,V]`` minus its mean, over its standard deviation (section 3)."""
    variance, mean = torch.var_mean(patches, dim=-1, keepdim=True)
    return (patches - mean) / (variance + 1e-6).sqrt()


@hookimpl
def sslbench_methods() -> list[type[Method]]:
    return [MAE]
