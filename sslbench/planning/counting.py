"""Counts of a computation on tensors without memory: operations, bytes moved, the most memory alive at once."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal, NamedTuple

import torch
from torch import Tensor
from torch._subclasses.fake_tensor import FakeTensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

Arithmetic = Literal["none", "matmul", "convolution", "half"]
"""Which units of a device multiply: those for single precision, differently used by matrix products and by
convolutions, or those for 16-bit numbers."""
Phase = Literal["forward", "backward", "update"]

_CONVOLUTIONS = (torch.ops.aten.convolution, torch.ops.aten.convolution_backward)


class Operation(NamedTuple):
    """One operation of a step on one device."""

    phase: Phase
    arithmetic: Arithmetic
    flops: int
    """Two for each multiplication with addition; of matrix products and convolutions alone."""
    traffic: int
    """Bytes read and written."""


class Ledger(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """Records each operation that runs within it, and which tensors are alive.

    Only tensors without memory count as alive: the few small ones with values are on the host. Views and in-place
    results take no new memory, and operations without any traffic are not recorded.
    """

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self.operations: list[Operation] = []
        self.alive = 0
        """Bytes."""
        self.peak = 0
        """The most bytes alive at once."""
        self._phase: Phase = "forward"
        self._storages: weakref.WeakSet[Any] = weakref.WeakSet()

    def own(self, tensors: Iterable[Tensor]) -> int:
        """Count tensors that were there before; returns their bytes, memory that they share once."""
        before = self.alive
        for tensor in tensors:
            self._enter(tensor)
        return self.alive - before

    @contextmanager
    def phase(self, name: Phase) -> Iterator[None]:
        """What runs now."""
        before, self._phase = self._phase, name
        try:
            yield
        finally:
            self._phase = before

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        kwargs = kwargs or {}
        result = func(*args, **kwargs)
        read = [leaf for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, Tensor)]
        made = [leaf for leaf in tree_leaves(result) if isinstance(leaf, Tensor)]
        for tensor in made:
            self._enter(tensor)
        if not _is_view(func):
            flops = _flops(func, args, kwargs, result)
            traffic = sum(map(_bytes, read)) + sum(map(_bytes, made))
            self.operations.append(Operation(self._phase, _arithmetic(func, flops, read), flops, traffic))
        return result

    def _enter(self, tensor: Tensor) -> None:
        if not isinstance(tensor, FakeTensor):
            return
        storage = tensor.untyped_storage()
        if storage in self._storages:
            return
        self._storages.add(storage)
        size = storage.nbytes()
        self.alive += size
        self.peak = max(self.peak, self.alive)
        weakref.finalize(storage, self._leave, size)

    def _leave(self, size: int) -> None:
        self.alive -= size


def _is_view(func: Any) -> bool:
    """Whether results are other looks at the memory of arguments, which an operation in place writes to."""
    returns = func._schema.returns
    return bool(func.is_view) or (
        bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    )


def _bytes(tensor: Tensor) -> int:
    """Of what a tensor shows; expanded dimensions are read once."""
    sizes = (size for size, stride in zip(tensor.shape, tensor.stride(), strict=True) if stride or size == 0)
    count = 1
    for size in sizes:
        count *= int(size)
    return count * tensor.element_size()


def _flops(func: Any, args: Any, kwargs: Any, result: Any) -> int:
    formula: Callable[..., int] | None = flop_registry.get(func._overloadpacket)
    return int(formula(*args, **kwargs, out_val=result)) if formula else 0


def _arithmetic(func: Any, flops: int, read: list[Tensor]) -> Arithmetic:
    if not flops:
        return "none"
    if any(tensor.dtype in (torch.bfloat16, torch.float16) for tensor in read):
        return "half"
    return "convolution" if func._overloadpacket in _CONVOLUTIONS else "matmul"
