"""What a run trains: whole on each device, or in shards; in checkpoints always whole."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.nn.parallel import DistributedDataParallel
from torch.optim import Optimizer

from sslbench import comm
from sslbench.engine.precision import LossScaler
from sslbench.engine.shards import Shards, rows_of, shard_optimizer, whole_module_state, whole_optimizer_state
from sslbench.plugin.api import Backbone, Method


@dataclass
class Trained:
    """A method and what moves it.

    Its states are those of one process: plain tensors that load with any number of processes, sharded or not.
    Every rank must ask for them; in shards, only the first one receives the tensors.
    """

    method: Method
    optimizer: Optimizer
    scaler: LossScaler | None = None
    shards: Shards | None = None

    def state(self) -> dict[str, Any]:
        """What training continues from."""
        state = {"method": whole_module_state(self.method), "optimizer": whole_optimizer_state(self.optimizer)}
        return state | ({"scaler": self.scaler.state_dict()} if self.scaler else {})

    def load(self, state: Mapping[str, Any]) -> None:
        """Continue from a state; before :meth:`distribute`."""
        self.method.load_state_dict(state["method"])
        now = [dict(group) for group in self.optimizer.param_groups]
        self.optimizer.load_state_dict(state["optimizer"])
        for group, known in zip(self.optimizer.param_groups, now, strict=True):
            for key, value in known.items():  # settings that came after the version that wrote the checkpoint
                group.setdefault(key, value)
        if self.scaler and "scaler" in state:
            self.scaler.load_state_dict(state["scaler"])

    def exported_state(self) -> dict[str, Any]:
        """Of the network that evaluations use."""
        return whole_module_state(self.method.export())

    def distribute(self, device: torch.device, *, sharded: bool) -> nn.Module:
        """Share the work of training among the ranks.

        Args:
            sharded: give each rank its rows of the backbones' parameters only.

        Returns:
            What the loop calls in place of the method.
        """
        if sharded and comm.is_active():
            self._shard(device)
        return data_parallel(self.method)

    def _shard(self, device: torch.device) -> None:
        for tensor in self.method.state_dict().values():
            comm.broadcast(tensor)
        before = dict(self.method.named_parameters())
        backbones = [module for module in self.method.modules() if isinstance(module, Backbone)]
        comm.shard([part for backbone in backbones for part in (*backbone.segments(), backbone)], device)
        self.method.to(device)
        sharded = {name: p for name, p in self.method.named_parameters() if comm.is_sharded(p) and p.requires_grad}
        self.shards = Shards(sharded.values())
        replaced = {before[name]: self.shards.of[parameter] for name, parameter in sharded.items()}
        shard_optimizer(self.optimizer, replaced, device)


class WholeBackbone:
    """The exported backbone as probes need it: whole, because ranks look at different numbers of batches.

    Args:
        method: before it is sharded.
        device: where the backbone is wanted.
    """

    def __init__(self, method: Method, device: torch.device) -> None:
        self._method = method
        self._device = device
        self._twin: Backbone = copy.deepcopy(method.export()).to("meta")

    @torch.no_grad()
    def __call__(self) -> Backbone:
        """A copy with today's weights. Every rank must call it."""
        backbone = copy.deepcopy(self._twin).to_empty(device=self._device)
        now = self._method.export().state_dict()
        for key, tensor in backbone.state_dict().items():
            tensor.copy_(comm.gather(rows_of(now[key])) if comm.is_sharded(now[key]) else now[key])
        return backbone


def data_parallel(method: Method) -> nn.Module:
    """The method, with gradients averaged over ranks; those of shards are averaged already."""
    sharded = [name for name, parameter in method.named_parameters() if comm.is_sharded(parameter)]
    whole = [p for p in method.parameters() if p.requires_grad and not comm.is_sharded(p)]
    if comm.world() == 1 or not whole:
        return method
    DistributedDataParallel._set_params_and_buffers_to_ignore_for_model(method, sharded)  # type: ignore[no-untyped-call]
    # Every parameter is used in every step (the loop checks that), so nobody has to look for unused ones, which is
    # all that a static graph would spare; and a plugin may change its graph.
    return DistributedDataParallel(method, gradient_as_bucket_view=True, **_LOCAL_BUFFERS)


# Statistics are each rank's own, or synchronised already. torch has renamed the switch.
_RENAMED = "forward_sync_buffers" in inspect.signature(DistributedDataParallel).parameters
_LOCAL_BUFFERS: dict[str, Any] = {"forward_sync_buffers" if _RENAMED else "broadcast_buffers": False}
