"""One training step of a real method on tensors without memory, in a world of any size."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensor, FakeTensorMode
from torch.overrides import TorchFunctionMode

from sslbench import comm
from sslbench.engine.accumulate import check_part_sizes, parts_of
from sslbench.engine.optim import build_optimizer
from sslbench.engine.recompute import checkpoint_activations
from sslbench.errors import ConfigError, PluginError, SslbenchError
from sslbench.nn.sync_norm import ranks_that_share
from sslbench.planning.counting import Ledger, Operation
from sslbench.planning.exchange import GRADIENTS, SHARDS, Exchanges, recorder, watch_normalisation
from sslbench.planning.subject import Subject
from sslbench.plugin.api import Backbone, Batch, Build, Method, Progress, View
from sslbench.rng import Draws


@dataclass(frozen=True)
class Memory:
    """Bytes on one device when most are alive."""

    weights: int
    """Of parameters that train."""
    frozen: int
    """Of those that do not: target networks, fixed prototypes."""
    buffers: int
    """Queues, banks, labels, running statistics."""
    gradients: int
    optimizer: int
    batch: int
    """Views of the images in the step and of those made for the next one."""
    activations: int
    """What is kept for the backward pass, and temporary results."""

    @property
    def total(self) -> int:
        return sum(vars(self).values())


@dataclass(frozen=True)
class Step:
    """Counts of one step of one rank."""

    world: int
    rows: int
    """Images of this rank."""
    operations: tuple[Operation, ...]
    memory: Memory
    exchanges: Exchanges
    parameters: int
    """Numbers that train."""
    backbone_parameters: int

    @property
    def flops(self) -> int:
        return sum(operation.flops for operation in self.operations)

    @property
    def traffic(self) -> int:
        return sum(operation.traffic for operation in self.operations)


def rehearse(subject: Subject, world: int, *, half: bool) -> Step:
    """Run the method's own code for one of the run's last steps, as the first of ``world`` ranks.

    Nothing is computed and no memory is taken, so batch and networks have their real sizes. Epochs' beginnings are
    not part of it.

    Args:
        half: whether matrix products and convolutions use 16-bit numbers.

    Raises:
        ConfigError: the batch gives some ranks no image, or the method does not accept the world.
        PluginError: the method's step looks at values, which there are none of.
    """
    rows = -(-subject.batch // world)
    if subject.batch < world:
        raise ConfigError(
            f"train.batch_size={subject.batch} gives some of {world} processes no image",
            hint=f"train.batch_size={world} or more",
        )
    check_part_sizes(subject.composed, world)
    exchanges = Exchanges(Counter())
    fake = FakeTensorMode(allow_non_fake_inputs=True)
    with comm.rehearsing(world, recorder(exchanges, world)), _as_plugin_error(subject):
        with fake, _Copying(), _unfilled():
            method = _build(subject)
        batch = _batch(subject, rows, fake)
        if subject.composed.core.train.checkpoint_activations:
            checkpoint_activations(method)
        exchanges.counts.clear()
        return _Rehearsal(subject, method, batch, exchanges, half=half).run()


@contextmanager
def _as_plugin_error(subject: Subject) -> Iterator[None]:
    try:
        yield
    except SslbenchError:
        raise
    except (RuntimeError, NotImplementedError, TypeError, ValueError) as error:
        raise PluginError(
            f"method '{subject.composed.method.name}' cannot be counted without values: {error}",
            hint="a method must not read tensors on the host within a step, which also makes a GPU wait",
        ) from error


def _build(subject: Subject) -> Method:
    composed, backbone = subject.composed, subject.composed.backbone
    build = Build(
        make_backbone=lambda: backbone.cls(backbone.cls.without_weights(backbone.cfg), subject.side),
        global_batch=subject.batch,
        num_images=subject.images,
        steps=subject.steps,
        steps_per_epoch=subject.steps_per_epoch,
        num_classes=subject.classes,
    )
    method: Method = composed.method.cls(composed.method.cfg, build)
    return method


@contextmanager
def _unfilled() -> Iterator[None]:
    """Leave out an initialisation that draws until all numbers lie within bounds, since there are no numbers."""
    drawn = nn.init._no_grad_trunc_normal_
    nn.init._no_grad_trunc_normal_ = lambda tensor, *bounds, **more: tensor
    try:
        yield
    finally:
        nn.init._no_grad_trunc_normal_ = drawn


class _Copying(TorchFunctionMode):
    """Deep copies of tensors without memory, which torch fails to make of buffers."""

    def __torch_function__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        if func is not Tensor.__deepcopy__ or not isinstance(args[0], FakeTensor):
            return func(*args, **(kwargs or {}))
        tensor, memo = args
        return memo.setdefault(id(tensor), tensor.detach().clone().requires_grad_(tensor.requires_grad))


def _batch(subject: Subject, rows: int, fake: FakeTensorMode) -> Batch:
    """Views that show whole images, so that a method which compares regions has as many as can be.

    Boxes and positions have values: methods may decide by them on the host.
    """
    box = torch.tensor([0.0, 0.0, 1.0, 1.0]).expand(rows, 4)
    size = torch.tensor([float(side) for side in reversed(subject.size)]).expand(rows, 2)
    with fake:
        views = [torch.empty(rows, 3, view.size or 1, view.size or 1) for view in subject.views]
        index = torch.zeros(rows, dtype=torch.int64)
    return Batch(
        views=tuple(View(images, box, torch.zeros(rows, dtype=torch.bool), size) for images in views),
        index=index,
        draws=Draws(0, subject.steps - 1, torch.arange(rows)),
        labels=index if subject.classes is not None else None,
    )


class _Rehearsal:
    """Counts a step; what the training loop does with values is left out."""

    def __init__(
        self, subject: Subject, method: Method, batch: Batch, exchanges: Exchanges, *, half: bool
    ) -> None:
        self.subject = subject
        self.core = subject.composed.core
        self.method = method
        self.batch = batch
        self.exchanges = exchanges
        self.half = half
        self.ledger = Ledger()

    def run(self) -> Step:
        world = comm.world()
        trained = [p for p in self.method.parameters() if p.requires_grad]
        own = self.ledger.own
        weights = own(trained)
        frozen = own(p for p in self.method.parameters() if not p.requires_grad)
        buffers = own(self.method.buffers())
        batch = own(view.images for view in self.batch.views)
        watch_normalisation(self.method, ranks_that_share(self.core.train.sync_bn), self.exchanges)
        self._forward_and_backward()
        peak = self.ledger.peak
        optimizer = self._update()
        most = max(peak + optimizer, self.ledger.peak)
        activations = most - weights - frozen - buffers - batch - weights - optimizer
        return Step(
            world=world,
            rows=len(self.batch),
            operations=tuple(self.ledger.operations),
            memory=self._distributed(
                Memory(weights, frozen, buffers, weights, optimizer, 2 * batch, max(0, activations))
            ),
            exchanges=self.exchanges,
            parameters=sum(p.numel() for p in trained),
            backbone_parameters=sum(p.numel() for p in self.method.export().parameters()),
        )

    def _distributed(self, alone: Memory) -> Memory:
        """With shares of the backbones only, if they are sharded; counts what ranks exchange of parameters."""
        world, exchanges = comm.world(), self.exchanges
        if world == 1 or self.core.train.parallel == "ddp":
            exchanges.add(GRADIENTS, "all_reduce", alone.weights, world)
            return alone
        backbones = [module for module in self.method.modules() if isinstance(module, Backbone)]
        trained = sum(_nbytes(p) for b in backbones for p in b.parameters() if p.requires_grad)
        frozen = sum(_nbytes(p) for b in backbones for p in b.parameters() if not p.requires_grad)
        exchanges.add(GRADIENTS, "all_reduce", alone.weights - trained, world)
        exchanges.add(GRADIENTS, "all_gather", trained // world, world)  # scattering sums sends as much
        for size in (trained, trained, frozen):  # for the forward and for the backward pass
            exchanges.add(SHARDS, "all_gather", size // world, world)
        largest = max(sum(map(_nbytes, part.parameters())) for b in backbones for part in b.segments() or [b])
        spared, states = trained - trained // world, alone.optimizer / max(1, alone.weights)
        return replace(
            alone,
            weights=alone.weights - spared,
            frozen=alone.frozen - (frozen - frozen // world),
            gradients=alone.gradients - spared,
            optimizer=alone.optimizer - int(spared * states),
            activations=alone.activations + 2 * largest,
        )

    def _forward_and_backward(self) -> None:
        with ExitStack() as stack:
            stack.enter_context(self.ledger)
            for part in parts_of(self.batch, self.core.train.accumulate):
                with torch.autocast("cpu", torch.bfloat16, enabled=self.half):
                    loss = self.method(part)["loss"]
                with self.ledger.phase("backward"):
                    loss.backward()

    def _update(self) -> int:
        """The optimiser's step and what follows; bytes of the optimiser's state."""
        groups, options = self.method.param_groups(), self.core.optim
        optimizer = build_optimizer(options, groups, self.method, self.subject.batch)
        progress = Progress(self.subject.steps - 1, self.subject.steps, self.subject.steps_per_epoch)
        with self.ledger, self.ledger.phase("update"):
            self.method.before_step(progress)
            if self.core.train.clip_grad:
                nn.utils.clip_grad_norm_(self.method.parameters(), self.core.train.clip_grad)
            optimizer.step()
            optimizer.zero_grad(set_to_none=True)
            self.method.after_step(progress)
        return sum(_nbytes(value) for state in optimizer.state.values() for value in state.values())


def _nbytes(value: object) -> int:
    return value.numel() * value.element_size() if isinstance(value, Tensor) else 0
