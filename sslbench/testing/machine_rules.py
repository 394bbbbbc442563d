"""Rules on where a method runs: in half precision, compiled, on several ranks, beside other code; and its cost."""

from __future__ import annotations

import time
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from sslbench.engine.setup import compile_backbones
from sslbench.errors import ConfigError
from sslbench.planning.counting import Ledger
from sslbench.plugin.api import Backbone
from sslbench.testing.ranks import check_ranks
from sslbench.testing.rules import BrokenRuleError, NotTriedError
from sslbench.testing.step_rules import check_finite
from sslbench.testing.subject import STEPS, MethodSubject, checked_loss, first_batch, first_loss
from sslbench.testing.surroundings import generator_states, scatter, settings

_HALF_TOLERANCE = 0.05
"""Of the loss, relative to it or to 1; bf16 keeps 3 digits, and networks of a few layers lose one more at most."""
_COMPILED_TOLERANCE = 1e-3
_TIMED = 3
_RATE = 1e-4
"""Of SGD on several ranks, for losses of up to 1. In larger steps differences of rounding grow until they put an
activation of a wide network on the other side of a ReLU's corner."""
_RANK_RUN = {"images": 24, "batch_size": 8, "steps": 5}
LEFT_OUT = "left out on request"


def leaves_global_state_alone(subject: MethodSubject) -> str:
    """Settings of torch, and seeds of generators within a step."""
    before = settings()
    subject.sound()
    states = []
    for seed in (1, 2):
        training = subject.training()
        training.begin(0)
        batch = first_batch(training)
        scatter(seed)
        training.method(batch)["loss"].backward()
        training.update(0)
        states.append(generator_states())
    changed = [name for name, value in settings().items() if value != before[name]]
    seeded = [name for name, state in states[0].items() if state == states[1][name]]
    if changed or seeded:
        raise BrokenRuleError(
            f"it changes what is not its own: {', '.join(changed + seeded)}",
            "draw with batch.uniform(...) or a generator of your own (torch.Generator().manual_seed(...)), and "
            "leave settings to the user: those of a run are core options",
        )
    return f"{len(before)} settings, {len(states[0])} generators"


def right_in_bf16(subject: MethodSubject) -> str:
    subject.repeatable()
    expected = float(first_loss(subject.training()).detach())
    training = subject.training()
    training.begin(0)
    batch = first_batch(training)
    with torch.autocast("cpu", torch.bfloat16):
        output = training.method(batch)
    loss = checked_loss(output)
    loss.backward()  # type: ignore[no-untyped-call]
    check_finite(loss, training.method, " under bf16 autocast")
    found = float(loss.detach())
    difference = abs(found - expected) / max(1.0, abs(expected))
    if difference > _HALF_TOLERANCE:
        raise BrokenRuleError(
            f"the loss is {found:.4g} under bf16 autocast and {expected:.4g} without",
            "compute statistics, exponentials and distances in fp32, under sslbench.nn.losses.no_autocast(z)",
        )
    return f"loss {found:.4g} under autocast, {expected:.4g} without"


def right_when_compiled(subject: MethodSubject) -> str:
    """As ``train.compile=true`` does it, with a backend that needs no compiler."""
    subject.repeatable()
    if not subject.compiled:
        raise NotTriedError(LEFT_OUT)
    expected = subject.training().run(0, STEPS)
    torch.compiler.reset()
    try:
        training = subject.training()
        compile_backbones(training.method, backend="aot_eager")
        found = training.run(0, STEPS)
    except Exception as error:
        lines = str(error).strip().splitlines()
        raise BrokenRuleError(f"{type(error).__name__}: {lines[0] if lines else ''}", _COMPILING) from error
    finally:
        torch.compiler.reset()
    for step, (one, other) in enumerate(zip(expected, found, strict=True), 1):
        if abs(float(other - one)) > _COMPILED_TOLERANCE * max(1.0, abs(float(one))):
            raise BrokenRuleError(
                f"in step {step} the loss is {float(other):.4g} with compiled backbones, {float(one):.4g} without",
                _COMPILING,
            )
    return f"{STEPS} steps with compiled backbones"


_COMPILING = (
    "take from a backbone only what it returns: hooks, attributes set in its forward and patched methods are lost "
    "when it is compiled"
)


def several_ranks_train_as_one(subject: MethodSubject) -> str:
    subject.repeatable()
    if not subject.processes:
        raise NotTriedError(LEFT_OUT)
    run = rank_run(subject)
    report = check_ranks(
        subject.reference,
        world=subject.world,
        options=subject.options,
        core=in_small_steps(subject),
        backbone=subject.backbone,
        uneven=accepts(subject, run["images"], run["batch_size"] - 1),
        images=run["images"],
        batch_size=run["batch_size"],
        steps=run["steps"],
        timeout=subject.timeout,
    )
    worst = max(report.differences, key=lambda each: each.relative)
    rows = f"{run['batch_size']} images on {subject.world} ranks"
    return f"{rows}, the {worst.quantity} within {worst.relative:.0e}"


def rank_run(subject: MethodSubject) -> dict[str, int]:
    """The least run that the method accepts: in sums over more rows, differences of rounding are larger."""
    if accepts(subject, _RANK_RUN["images"], _RANK_RUN["batch_size"]):
        return _RANK_RUN
    # Within one epoch: pseudo-labels jump when what they are computed from differs in the last digit.
    return {"images": subject.images, "batch_size": subject.batch_size, "steps": STEPS}


def accepts(subject: MethodSubject, images: int, batch_size: int) -> bool:
    """Whether the method takes so few images, or a batch of this size."""
    try:
        subject.training(images=images, batch_size=batch_size).run(0, 1)
    except ConfigError:
        return False
    return True


def in_small_steps(subject: MethodSubject) -> dict[str, Any]:
    """Core options with a rate for the size of the loss: in large steps, differences of rounding grow beyond all
    tolerance."""
    loss = abs(float(first_loss(subject.training()).detach()))
    return {**subject.core, "optim": {"lr": _RATE / max(1.0, loss), **subject.core.get("optim", {})}}


def cost(subject: MethodSubject) -> str:
    """Beside its own backbone, on the same views."""
    subject.trains()
    subject.sound()
    training = subject.training()
    training.begin(0)
    method, batch = training.method, first_batch(training)
    images = [view.images for view in batch.views]

    def step() -> Tensor:
        loss: Tensor = method(batch)["loss"]
        return loss

    def alone() -> Tensor:
        return torch.stack([method.backbone(each).pooled.float().sum() for each in images]).sum()

    flops, flops_alone = (_flops(work) for work in (step, alone))
    seconds, seconds_alone = (_seconds(work, method) for work in (step, alone))
    trained, own = (
        sum(p.numel() for p in part.parameters() if p.requires_grad) for part in (method, method.backbone)
    )
    further = _bytes(method) - sum(_bytes(module) for module in method.modules() if isinstance(module, Backbone))
    of_backbone = (
        f"{flops / max(1, flops_alone):.1f} times the backbone's, {seconds / seconds_alone:.1f} times its"
    )
    return (
        f"{trained:,} numbers train, {own:,} of them in the backbone; {flops / len(batch) / 1e6:.3g} MFLOP per "
        f"image, {of_backbone} CPU time; {further / 2**20:.2g} MiB of state beside backbones"
    )


def _bytes(module: nn.Module) -> int:
    return sum(value.nbytes for value in module.state_dict().values())


def _flops(work: Callable[[], Tensor]) -> int:
    with Ledger() as ledger:
        work().backward()  # type: ignore[no-untyped-call]
    return sum(operation.flops for operation in ledger.operations)


def _seconds(work: Callable[[], Tensor], method: nn.Module) -> float:
    """Of the CPU: the least of a few forward and backward passes."""
    found = []
    for _ in range(_TIMED):
        method.zero_grad(set_to_none=True)
        began = time.process_time()
        work().backward()  # type: ignore[no-untyped-call]
        found.append(time.process_time() - began)
    return min(found)
