"""Blocks of a vision transformer (Dosovitskiy et al., "An Image is Worth 16x16 Words", ICLR 2021, section 3.1).

Modules have the names that published weights use (``attn.qkv``, ``mlp.fc1``, ...).
"""

from __future__ import annotations

from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

Initialisation = Literal["trunc-normal", "xavier"]
"""Of linear layers: normal with standard deviation 0.02 (DeiT, DINO), or uniform by Glorot & Bengio (MAE)."""
_STD = 0.02


class Attention(nn.Module):
    """Multi-head self-attention (equations 5 to 8)."""

    def __init__(self, dim: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(dim, 3 * dim)
        self.proj = nn.Linear(dim, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B,N,D]`` to the same shape."""
        query, key, value = self.qkv(tokens).unflatten(2, (3, self.heads, -1)).permute(2, 0, 3, 1, 4)
        mixed = F.scaled_dot_product_attention(query, key, value)
        return self.proj(mixed.transpose(1, 2).flatten(2))  # type: ignore[no-any-return]


class MLP(nn.Module):
    """Two linear layers around a GELU."""

    def __init__(self, dim: int, hidden: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(dim, hidden)
        self.fc2 = nn.Linear(hidden, dim)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B,N,D]`` to the same shape."""
        return self.fc2(F.gelu(self.fc1(tokens)))  # type: ignore[no-any-return]


class DropPath(nn.Module):
    """Drops a residual branch for whole images while training, and scales it up where it stays (Huang et al.,
    "Deep Networks with Stochastic Depth", ECCV 2016)."""

    def __init__(self, rate: float) -> None:
        super().__init__()
        self.rate = rate

    def forward(self, branch: Tensor) -> Tensor:
        """``[B,N,D]`` to the same shape."""
        if not self.training or self.rate == 0:
            return branch
        stays = torch.rand(len(branch), 1, 1, device=branch.device) >= self.rate
        return branch * (stays / (1 - self.rate)).to(branch.dtype)


class Block(nn.Module):
    """Attention and MLP, each normalised before and added to what it got (equations 2 and 3).

    Args:
        drop_path: probability that an image skips a branch.
    """

    def __init__(self, dim: int, heads: int, *, mlp_ratio: int = 4, drop_path: float = 0.0) -> None:
        super().__init__()
        self.norm1 = layer_norm(dim)
        self.attn = Attention(dim, heads)
        self.norm2 = layer_norm(dim)
        self.mlp = MLP(dim, mlp_ratio * dim)
        self.drop_path = DropPath(drop_path)

    def forward(self, tokens: Tensor) -> Tensor:
        """``[B,N,D]`` to the same shape."""
        tokens = tokens + self.drop_path(self.attn(self.norm1(tokens)))
        return tokens + self.drop_path(self.mlp(self.norm2(tokens)))  # type: ignore[no-any-return]


def layer_norm(dim: int) -> nn.LayerNorm:
    """With the epsilon of all published vision transformers."""
    return nn.LayerNorm(dim, eps=1e-6)


def learned_token(dim: int) -> nn.Parameter:
    """``[1,1,D]``: a class or mask token."""
    return nn.Parameter(nn.init.trunc_normal_(torch.empty(1, 1, dim), std=_STD))


def initialise(network: nn.Module, how: Initialisation) -> None:
    """Draw the weights of all linear layers, and set their biases to zero."""
    for module in network.modules():
        if not isinstance(module, nn.Linear):
            continue
        if how == "xavier":
            nn.init.xavier_uniform_(module.weight)
        else:
            nn.init.trunc_normal_(module.weight, std=_STD)
        if module.bias is not None:
            nn.init.zeros_(module.bias)
