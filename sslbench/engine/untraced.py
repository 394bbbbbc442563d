"""torch's optimisers without torch's compiler.

Building one, and every step of it, imports the compiler only to tell it to keep out; that takes as long as
importing torch. Nothing here compiles an optimiser.
"""

from __future__ import annotations

import inspect
from typing import Any

import torch
from torch.optim import Optimizer


class Untraced(Optimizer):
    """The methods of every optimiser that would import the compiler, as they are beneath that."""

    state_dict = inspect.unwrap(Optimizer.state_dict)
    load_state_dict = inspect.unwrap(Optimizer.load_state_dict)
    zero_grad = inspect.unwrap(Optimizer.zero_grad)
    add_param_group = inspect.unwrap(Optimizer.add_param_group)


def _step(kind: type[Optimizer]) -> Any:
    return torch.no_grad()(inspect.unwrap(kind.step))


class SGD(Untraced, torch.optim.SGD):
    """:class:`torch.optim.SGD`"""

    step = _step(torch.optim.SGD)


class Adam(Untraced, torch.optim.Adam):
    """:class:`torch.optim.Adam`"""

    step = _step(torch.optim.Adam)


class AdamW(Untraced, torch.optim.AdamW):
    """:class:`torch.optim.AdamW`"""

    step = _step(torch.optim.AdamW)
