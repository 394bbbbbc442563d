"""Parameters of which each rank keeps some rows, for optimisers, norms and checkpoints that know plain tensors."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from sslbench import comm


class Shard(nn.Parameter):
    """This rank's rows of a parameter, as a plain tensor over the same memory.

    An optimiser that treats each number by itself may take it for a parameter; one that needs a norm takes it
    from :func:`norms`.
    """


class Shards:
    """Stands between a sharded network and an optimiser of :class:`Shard`.

    Args:
        parameters: of the sharded network; ``of`` gives the shard of each.
    """

    def __init__(self, parameters: Iterable[nn.Parameter]) -> None:
        self.of = {parameter: Shard(rows_of(parameter)) for parameter in parameters}

    def instead_of(self, parameters: Iterable[nn.Parameter]) -> list[nn.Parameter]:
        """The parameters, each sharded one as its shard."""
        return [self.of.get(parameter, parameter) for parameter in parameters]

    def take_gradients(self) -> None:
        """Let the shards see the gradients of the parameters."""
        for parameter, shard in self.of.items():
            shard.data = rows_of(parameter)
            shard.grad = None if parameter.grad is None else rows_of(parameter.grad)

    def drop_gradients(self) -> None:
        """Forget the gradients of the parameters."""
        for parameter in self.of:
            parameter.grad = None


def rows_of(tensor: Tensor) -> Tensor:
    """This rank's rows of one tensor."""
    (rows,) = comm.own_rows([tensor])
    return rows


def norms(tensors: list[Tensor], parameters: Sequence[Tensor]) -> Tensor:
    """Euclidean norms ``[N]`` of N tensors, of all rows where a rank holds some of them only.

    Args:
        parameters: those that the tensors belong to.
    """
    found = list(torch._foreach_norm(tensors))
    if not any(isinstance(parameter, Shard) for parameter in parameters):
        return torch.stack(found)
    # What every rank has whole is counted world times in the sum of squares.
    whole = comm.world() ** -0.5
    torch._foreach_mul_(found, [1.0 if isinstance(parameter, Shard) else whole for parameter in parameters])
    return comm.all_sum(torch.stack(found).square()).sqrt()


def clip_gradients(parameters: Sequence[Tensor], limit: float, *, each: bool = False) -> None:
    """Scale the gradients down until their common norm, or that of ``each``, is at most ``limit``."""
    held = [parameter for parameter in parameters if parameter.grad is not None]
    if not each and not any(isinstance(parameter, Shard) for parameter in held):
        nn.utils.clip_grad_norm_(held, limit)
        return
    gradients = [parameter.grad for parameter in held if parameter.grad is not None]
    found = norms(gradients, held)
    factors = (limit / ((found if each else found.norm()) + 1e-6)).clamp(max=1.0)
    torch._foreach_mul_(gradients, list(factors.unbind()) if each else factors)


def shard_optimizer(optimizer: Optimizer, shards: Mapping[nn.Parameter, Shard], device: torch.device) -> None:
    """Replace parameters of an optimiser by their shards, their state by this rank's rows of it."""
    for group in optimizer.param_groups:
        for number, parameter in enumerate(group["params"]):
            state = optimizer.state.pop(parameter, None)
            kept = group["params"][number] = shards.get(parameter, parameter)
            if state is not None:
                optimizer.state[kept] = _on_device(state, isinstance(kept, Shard), device)


def whole_module_state(module: nn.Module) -> dict[str, Any]:
    """The state dict without shards. Every rank must call it; only the first one keeps gathered tensors."""
    return {key: _whole(value, comm.is_sharded(value)) for key, value in module.state_dict().items()}


def whole_optimizer_state(optimizer: Optimizer) -> dict[str, Any]:
    """As :func:`whole_module_state`."""
    state = optimizer.state_dict()
    parameters = [parameter for group in optimizer.param_groups for parameter in group["params"]]
    state["state"] = {
        number: {key: _whole(value, _has_rows(value, parameters[number])) for key, value in entries.items()}
        for number, entries in state["state"].items()
    }
    return state


def _has_rows(value: Any, parameter: Tensor) -> bool:
    """Optimisers also keep single numbers per parameter, such as a count of steps."""
    return isinstance(parameter, Shard) and isinstance(value, Tensor) and value.dim() > 0


def _on_device(state: Mapping[str, Any], sharded: bool, device: torch.device) -> dict[str, Any]:
    def moved(value: Any) -> Any:
        if not isinstance(value, Tensor):
            return value
        return (comm.share_of(value) if sharded and value.dim() else value).to(device)

    return {key: moved(value) for key, value in state.items()}


def _whole(value: Any, sharded: bool) -> Any:
    if not sharded:
        return value
    whole = comm.gather(rows_of(value))
    return whole.cpu() if comm.rank() == 0 else None
