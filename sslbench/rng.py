"""Counter-based random numbers: every draw is a pure function of (seed, stream, step, position).

There is no generator state. A worker process, a second rank or a resumed run computes the same numbers for
the same sample, so world size and interruptions cannot change the data. The generator is SplitMix64
(Steele, Lea & Flood, "Fast splittable pseudorandom number generators", OOPSLA 2014, section 4) used as a
hash of a counter.
"""

from __future__ import annotations

import hashlib
import math
from collections.abc import Sequence

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

_GOLDEN = 0x9E3779B97F4A7C15
_MIX_A = 0xBF58476D1CE4E5B9
_MIX_B = 0x94D049BB133111EB
_MASK64 = (1 << 64) - 1


def _signed(value: int) -> int:
    """The int64 with the same bits as the unsigned 64-bit ``value``."""
    value &= _MASK64
    return value - (1 << 64) if value >> 63 else value


def _shift_right(x: Tensor, bits: int) -> Tensor:
    """Logical right shift of int64 (torch's own is arithmetic)."""
    return (x >> bits) & ((1 << (64 - bits)) - 1)


def _mix(x: Tensor) -> Tensor:
    x = (x ^ _shift_right(x, 30)) * _signed(_MIX_A)
    x = (x ^ _shift_right(x, 27)) * _signed(_MIX_B)
    return x ^ _shift_right(x, 31)


def _mix_words(x: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """As :func:`_mix`; overwrites ``x``."""
    for bits, factor in ((30, _MIX_A), (27, _MIX_B)):
        x ^= x >> np.uint64(bits)
        x *= np.uint64(factor)
    x ^= x >> np.uint64(31)
    return x


def derive_seed(*parts: object) -> int:
    """A 63-bit seed that is a stable function of ``parts`` (any values with a stable ``str``)."""
    text = "\x1f".join(str(part) for part in parts)
    return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=8).digest(), "big") >> 1


def hash_uniform(key: int, counters: Tensor, numbers: int) -> Tensor:
    """Uniform numbers in [0, 1) for each counter.

    Args:
        key: seed of the stream.
        counters: int64 ``[B]``, one per sample.
        numbers: how many numbers each sample gets.

    Returns:
        float32 ``[B, numbers]`` with 24 random bits each.
    """
    if counters.device.type == "cpu":
        return _hash_words([key], counters, numbers)[0]
    return _hash_on_device(key, counters, numbers)


def _hash_on_device(key: int, counters: Tensor, numbers: int) -> Tensor:
    """:func:`hash_uniform` in torch's signed arithmetic."""
    sample_keys = _mix(counters * _signed(_GOLDEN) + _signed(key))
    offsets = torch.arange(1, numbers + 1, dtype=torch.int64, device=counters.device) * _signed(_GOLDEN)
    bits = _mix(sample_keys[:, None] + offsets)
    return _shift_right(bits, 40).to(torch.float32) * (1.0 / (1 << 24))


def _hash_words(keys: Sequence[int], counters: Tensor, numbers: int) -> Tensor:
    """:func:`hash_uniform` of several keys in numpy's unsigned arithmetic, ``[K,B,numbers]``.

    On few numbers a call of torch takes longer than its work, and numpy's calls are three times shorter.
    """
    words = counters.contiguous().numpy().view(np.uint64)
    starts = np.array([key & _MASK64 for key in keys], np.uint64)
    sample_keys = _mix_words(words * np.uint64(_GOLDEN) + starts[:, None])
    offsets = np.arange(1, numbers + 1, dtype=np.uint64) * np.uint64(_GOLDEN)
    bits = _mix_words(sample_keys[:, :, None] + offsets) >> np.uint64(40)
    return torch.from_numpy(bits.astype(np.float32) * np.float32(1.0 / (1 << 24)))


class Draws:
    """The random numbers of one step, by stream name and sample position.

    Args:
        seed: the run's seed.
        step: the training step (any int that separates independent uses).
        positions: int64 ``[B]``, positions of the samples in the global batch of the step.
    """

    def __init__(self, seed: int, step: int, positions: Tensor) -> None:
        self.seed = seed
        self.step = step
        self.positions = positions

    def __len__(self) -> int:
        return len(self.positions)

    def uniform(self, stream: str, *shape: int, device: torch.device | None = None) -> Tensor:
        """float32 ``[B, *shape]`` in [0, 1), the same for the same (seed, step, position, stream).

        They are computed on ``device`` (None: where the positions are); every device gives the same numbers.
        """
        key = derive_seed(self.seed, self.step, stream)
        positions = self.positions if device is None else self.positions.to(device, non_blocking=True)
        return hash_uniform(key, positions, math.prod(shape)).reshape(len(self), *shape)

    def stacked(self, streams: Sequence[str], *shape: int) -> Tensor:
        """What :meth:`uniform` gives for each of V streams, in one go: float32 ``[V,B,*shape]`` on the CPU."""
        keys = [derive_seed(self.seed, self.step, stream) for stream in streams]
        numbers = _hash_words(keys, self.positions.cpu(), math.prod(shape))
        return numbers.reshape(len(streams), len(self), *shape)
