"""A few training steps of a method on toy images, and all that they compute."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.batchnorm import _BatchNorm

from sslbench import comm
from sslbench.config.schema import CoreOptions
from sslbench.config.tree import Tree, merge
from sslbench.data.loader import TrainLoader
from sslbench.engine.firstlook import without_loss
from sslbench.engine.optim import build_optimizer
from sslbench.nn.sync_norm import SharedBatchNorm, share_statistics
from sslbench.plugin.api import Backbone, Batch, Build, Method, Progress, Source
from sslbench.rng import derive_seed
from sslbench.testing.reference import PluginReference
from sslbench.testing.toys import CLASSES, SIDE, Norm, toy_backbone, toy_images, toy_loader

Record = dict[str, Any]
"""By quantity (:data:`QUANTITIES`) tensors by name; and, under ``facts``, what explains differences."""
QUANTITIES = ("start", "loss", "gradients", "parameters", "buffers", "optimiser")

#: Plain gradient descent: Adam makes whole steps of the rounding errors of parameters without effect.
_OPTIM = {"name": "sgd", "lr": 0.01, "schedule": "constant", "warmup_epochs": 0.0}


@dataclass(frozen=True)
class Trial:
    """What all ranks do."""

    method: PluginReference
    options: Mapping[str, Any]
    core: Mapping[str, Any]
    """Core options (``{"train": {"sync_bn": False}}``), above the method's own defaults."""
    norm: Norm
    images: int
    batch_size: int
    steps: int
    seed: int = 0
    backbone: PluginReference | None = None
    """None: the toy one, with ``norm``."""

    def make_backbone(self) -> Backbone:
        if self.backbone is None:
            return toy_backbone(self.method.load().requires, self.norm)
        cls = self.backbone.load()
        made: Backbone = cls(cls.Config(), SIDE)
        return made

    def make_loader(self, source: Source | None = None) -> TrainLoader:
        """This rank's batches.

        Args:
            source: of as many images of the toys' size; None: the toys.
        """
        cls = self.method.load()
        views = cls.Config.model_validate(dict(self.options)).views
        source = source or toy_images(self.images)
        return toy_loader(views, source, self.batch_size, labels=cls.uses_labels, seed=self.seed)


def run(trial: Trial) -> Record:
    """Train on this rank's share.

    Returns:
        ``start`` (parameters and buffers after the first ``start_epoch``), ``loss`` of each step, averaged
        ``gradients`` of the first step and the last, and ``parameters``, ``buffers`` and ``optimiser`` at the end.
    """
    return _Recorded(trial).record()


class Training:
    """The training loop's calls of a method, in its order."""

    def __init__(self, trial: Trial, loader: TrainLoader | None = None) -> None:
        self.trial, self.loader = trial, loader or trial.make_loader()
        cls = trial.method.load()
        core = _core_options(cls, trial)
        self.method = _build(cls, self.loader, trial)
        if comm.world() > 1:
            share_statistics(self.method, core.train.sync_bn, torch.device("cpu"))
        groups = self.method.param_groups()
        self.optimizer = build_optimizer(core.optim, groups, self.method, trial.batch_size)

    def run(self, start: int, stop: int) -> list[Tensor]:
        """Take the steps from ``start`` to ``stop - 1``; returns their losses."""
        losses = []
        for step, batch in enumerate(self.loader.batches(start, stop), start):
            self.begin(step)
            losses.append(self.gradients(step, batch)["loss"].detach())
            self.update(step)
        return losses

    def begin(self, step: int) -> None:
        """What comes before a step: perhaps an epoch begins."""
        epoch, rest = divmod(step, self.loader.steps_per_epoch)
        if rest == 0:
            torch.manual_seed(derive_seed(self.trial.seed, "epoch", epoch))
            self.method.start_epoch(epoch, self.loader.images)

    def gradients(self, step: int, batch: Batch) -> dict[str, Tensor]:
        """Go forward and backward; returns what the method does."""
        torch.manual_seed(derive_seed(self.trial.seed, "step", step, comm.rank()))
        output: Any = self.method(batch)
        if not isinstance(output, dict):  # a tensor would try to look up "loss"
            raise TypeError(f"forward returned {without_loss(output)}")
        loss = output["loss"]
        loss.backward()
        for parameter in self.method.parameters():  # as data-parallel training does
            if comm.world() > 1 and parameter.grad is not None:
                parameter.grad = comm.all_sum(parameter.grad) / comm.world()
        return output

    def update(self, step: int) -> None:
        """Move the weights."""
        self.method.before_step(self._progress(step))
        self.optimizer.step()
        self.optimizer.zero_grad(set_to_none=True)
        self.finish(step)

    def finish(self, step: int) -> None:
        """What comes after the optimiser's step."""
        self.method.after_step(self._progress(step))

    def _progress(self, step: int) -> Progress:
        return Progress(step, 10 * self.trial.steps, self.loader.steps_per_epoch)


def _core_options(cls: type[Method], trial: Trial) -> CoreOptions:
    tree: Tree = {}
    own = {"train": {"batch_size": trial.batch_size}, "optim": _OPTIM}
    for layer in (cls.defaults, own, trial.core):
        merge(tree, layer, "", {})
    return CoreOptions.model_validate(tree)


def _build(cls: type[Method], loader: TrainLoader, trial: Trial) -> Method:
    torch.manual_seed(derive_seed(trial.seed, "initialisation"))
    build = Build(
        make_backbone=trial.make_backbone,
        global_batch=trial.batch_size,
        num_images=loader.num_images,
        steps=10 * trial.steps,
        steps_per_epoch=loader.steps_per_epoch,
        num_classes=CLASSES if cls.uses_labels else None,
    )
    return cls(cls.Config.model_validate(dict(trial.options)), build)


class _Recorded(Training):
    """Notes all that training computes."""

    def __init__(self, trial: Trial) -> None:
        super().__init__(trial)
        self.found: Record = {quantity: {} for quantity in QUANTITIES} | {"facts": {}}

    def record(self) -> Record:
        self.run(0, self.trial.steps)
        trained = {name for name, parameter in self.method.named_parameters() if parameter.requires_grad}
        for name, value in _copied(self.method.state_dict()):
            self.found["parameters" if name in trained else "buffers"][name] = value
        self.found["optimiser"] = dict(self._optimizer_state())
        return self.found

    def gradients(self, step: int, batch: Batch) -> dict[str, Tensor]:
        if step == 0:
            self.found["start"] = dict(_copied(self.method.state_dict()))
            self.found["facts"] = self._facts(batch)
        output = super().gradients(step, batch)
        self.found["loss"][f"step {step + 1}"] = output["loss"].detach().clone()
        if step in (0, self.trial.steps - 1):
            self.found["gradients"] |= dict(self._gradients(f"step {step + 1}"))
        return output

    def _gradients(self, when: str) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.method.named_parameters():
            if parameter.grad is not None:
                yield f"{name}, {when}", parameter.grad.clone()

    def _optimizer_state(self) -> Iterator[tuple[str, Tensor]]:
        for name, parameter in self.method.named_parameters():
            for key, value in self.optimizer.state.get(parameter, {}).items():
                if isinstance(value, Tensor):
                    yield f"{name}, {key}", value.clone()

    def _facts(self, batch: Batch) -> dict[str, Any]:
        rows_alone = _unshared(self.method) if comm.world() > 1 else []
        return {"rows": len(batch), "draws": draws_from_torch(self.method, batch), "unshared": rows_alone}


def _unshared(method: nn.Module) -> list[str]:
    """Batch normalisations that see this rank's rows only."""
    return [
        name
        for name, module in method.named_modules()
        if isinstance(module, _BatchNorm) and not isinstance(module, SharedBatchNorm)
    ]


def _copied(state: Mapping[str, Tensor]) -> Iterator[tuple[str, Tensor]]:
    return ((name, value.clone()) for name, value in state.items())


def draws_from_torch(method: Method, batch: Batch) -> bool:
    """Whether the loss depends on the state of torch's own generator, which differs between ranks."""
    losses = []
    for seed in (1, 2):
        torch.manual_seed(seed)
        losses.append(copy.deepcopy(method)(copy.copy(batch))["loss"].detach())
    return not torch.equal(*losses)
