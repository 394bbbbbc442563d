"""Rules on some steps of a method: what they depend on, that they can be interrupted, that they help."""

from __future__ import annotations

import io
import pickle
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from sslbench.config.schema import CoreOptions
from sslbench.data.sources import ArraySource
from sslbench.testing.rules import BrokenRuleError, NotTriedError
from sslbench.testing.step_rules import listed
from sslbench.testing.subject import STEPS, MethodSubject, WatchedBatch, caller, first_loss
from sslbench.testing.toys import CLASSES, toy_images
from sslbench.testing.trial import Training

_LEARNING_STEPS = 10 * STEPS
_LEAST_DROP = 0.002
"""Share by which training must lower the loss. Right methods lower it by 0.01 and more, wrong ones by nothing."""
_IN_BUFFERS = (
    "what a step leaves for later belongs into a buffer (self.register_buffer) or a parameter: no checkpoint "
    "holds plain attributes"
)


def same_seed_same_training(subject: MethodSubject) -> str:
    """Whatever the state of generators that the run does not seed."""
    subject.sound()
    (losses, state), (other_losses, other_state) = subject.twins
    hint = (
        "draw with batch.uniform(...) in a step and from torch's generator in __init__ and start_epoch, not from "
        "random, numpy's generator or the clock; do not iterate over sets"
    )
    _check_equal_losses(losses, other_losses, 0, "the same seed gives another loss", hint)
    _check_equal_states(state, other_state, "the same seed leaves other values behind", hint)
    return f"{STEPS} steps, to the bit"


def random_numbers_come_from_the_batch(subject: MethodSubject) -> str:
    """torch's own generator holds another state on each rank."""
    subject.repeatable()
    losses = [first_loss(subject.training(), seed).detach() for seed in (1, 2)]
    if not torch.equal(*losses):
        raise BrokenRuleError(
            "the loss depends on the state of torch's generator within the step",
            "draw with batch.uniform(...): the same numbers for the same images, on resume and for any number of "
            "ranks; dropout draws too",
        )
    return "the loss does not depend on torch's generator"


def resumes_to_the_bit(subject: MethodSubject) -> str:
    """From the middle of an epoch, into the one after next."""
    subject.repeatable()
    stop = STEPS + STEPS // 2
    end = stop + STEPS
    whole = subject.training()
    whole.run(0, stop)
    saved = _saved({"method": whole.method.state_dict(), "optimizer": whole.optimizer.state_dict()})
    expected = whole.run(stop, end)
    resumed = subject.training()
    try:
        resumed.method.load_state_dict(saved["method"], strict=True)
    except RuntimeError as error:
        raise BrokenRuleError(
            f"a fresh instance refuses the saved state: {' '.join(str(error).split())}",
            "register all buffers and parameters in __init__, with their final shapes",
        ) from error
    resumed.optimizer.load_state_dict(saved["optimizer"])
    what = f"after resuming at step {stop}"
    _check_equal_losses(expected, resumed.run(stop, end), stop, f"{what} the loss is another one", _IN_BUFFERS)
    _check_equal_states(whole.method.state_dict(), resumed.method.state_dict(), f"{what} values part", _IN_BUFFERS)
    return f"{stop} steps, then {STEPS} by a fresh instance with the saved state"


def _saved(state: Mapping[str, Any]) -> dict[str, Any]:
    """Written and read as a checkpoint is."""
    file = io.BytesIO()
    torch.save(state, file)
    file.seek(0)
    try:
        loaded: dict[str, Any] = torch.load(file, weights_only=True)
    except pickle.UnpicklingError as error:
        raise BrokenRuleError(
            f"the state cannot be read as plain tensors: {str(error).splitlines()[0]}",
            "keep only tensors, numbers and strings in get_extra_state and state_dict",
        ) from error
    return loaded


def sees_no_labels(subject: MethodSubject) -> str:
    """Neither in batches nor around them, and nothing depends on them."""
    subject.trains()
    if subject.cls.uses_labels:
        raise NotTriedError("it declares uses_labels, and every table marks it")
    watched = _watched_run(subject)
    subject.repeatable()
    changed = _relabelled_run(subject)
    _check_equal_losses(watched, changed, 0, "with other labels of the images the loss is another one", _PEEKING)
    return "nothing reads them, and with others the losses are the same"


_PEEKING = (
    "do without labels, or say uses_labels = True on the class: its results are an upper bound then, and not "
    "ranked"
)


class _WatchedSource(ArraySource):
    """Notes who asks for labels."""

    reader: str | None = None

    @property
    def targets(self) -> Tensor | None:
        self.reader = caller()
        return super().targets


def _watched_run(subject: MethodSubject) -> list[Tensor]:
    """Losses, up to a step that fails for another reason.

    Raises:
        BrokenRuleError: labels are read.
    """
    toys = toy_images(subject.images)
    source = _WatchedSource(toys.pixels(), toys.targets)
    training = subject.training(subject.trial().make_loader(source))
    source.reader = None
    losses = []
    for step, batch in enumerate(training.loader.batches(0, STEPS)):
        watched = WatchedBatch.of(batch)
        try:
            training.begin(step)
            losses.append(training.gradients(step, watched)["loss"].detach())
            training.update(step)
        except Exception:  # noqa: BLE001 - another rule reports it, unless labels are the reason
            failed = True
        else:
            failed = False
        if watched.reader:
            raise BrokenRuleError(f"it reads batch.labels in {watched.reader}", _PEEKING)
        if source.reader:
            raise BrokenRuleError(f"it reads the labels of the data set in {source.reader}", _PEEKING)
        if failed:
            break
    return losses


def _relabelled_run(subject: MethodSubject) -> list[Tensor]:
    toys = toy_images(subject.images)
    assert toys.targets is not None
    source = ArraySource(toys.pixels(), (3 * toys.targets + 1) % CLASSES)
    return subject.training(subject.trial().make_loader(source)).run(0, STEPS)


def loss_falls(subject: MethodSubject) -> str:
    """Trained weights do better than the initial ones would in their place.

    All else is the same for both: targets, queues, pseudo-labels, batches. So it does not matter whether the task
    becomes harder while a method trains, which may raise its loss.
    """
    subject.sound()
    changes: dict[str, Any] = {"core": _own_optimizer(subject), "steps": _LEARNING_STEPS}
    training = subject.training(**changes)
    initial = {n: p.detach().clone() for n, p in training.method.named_parameters() if p.requires_grad}
    training.run(0, _LEARNING_STEPS)
    trained = {name: value.clone() for name, value in training.method.state_dict().items()}
    after, before = (_last_loss(subject.training(**changes), {**trained, **over}) for over in ({}, initial))
    found = f"{after:.4g} after {_LEARNING_STEPS} steps, {before:.4g} with the initial weights in their place"
    if not after < before - _LEAST_DROP * max(abs(before), abs(after)):
        raise BrokenRuleError(
            f"the loss is {found}",
            "does a detach cut the loss from the networks, or something turn the gradient? It was trained with "
            "the optimiser of its defaults at a constant rate: are they sensible?",
        )
    return found


def _last_loss(training: Training, state: Mapping[str, Tensor]) -> float:
    """With this state, over the last epoch of a run."""
    training.method.load_state_dict(state, strict=False)
    steps = training.trial.steps
    with torch.no_grad():
        losses = [float(training.method(b)["loss"]) for b in training.loader.batches(steps - STEPS, steps)]
    return sum(losses) / len(losses)


def _own_optimizer(subject: MethodSubject) -> dict[str, Any]:
    """The method's own, at a constant rate that is not scaled down to the tiny batch."""
    layers = [subject.cls.defaults.get("optim", {}), subject.core.get("optim", {})]
    own = {key: value for layer in layers for key, value in layer.items()}
    constant = {"schedule": "constant", "warmup_epochs": 0.0, "lr_per": None, "lr_rule": "linear"}
    optim = CoreOptions.model_validate({"optim": {**own, **constant}}).optim.model_dump()
    return {**subject.core, "optim": optim}


def _check_equal_losses(expected: list[Tensor], found: list[Tensor], start: int, what: str, hint: str) -> None:
    for step, (one, other) in enumerate(zip(expected, found, strict=True), start + 1):
        if not torch.equal(one, other):
            raise BrokenRuleError(f"{what}: {float(other):.7g} instead of {float(one):.7g} in step {step}", hint)


def _check_equal_states(expected: Mapping[str, Tensor], found: Mapping[str, Tensor], what: str, hint: str) -> None:
    apart = [name for name, value in expected.items() if not torch.equal(found[name], value)]
    if apart:
        raise BrokenRuleError(f"{what}: {listed(apart)}", hint)
