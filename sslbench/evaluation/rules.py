"""Which protocols are for which labels, and which may open which split."""

from __future__ import annotations

from sslbench.errors import ConfigError, PluginError
from sslbench.plugin.api import Dataset, EvalProtocol

_LABELS = {"classification": "one label per image", "multilabel": "several labels per image"}


def check_task(protocol: EvalProtocol, dataset: Dataset) -> None:
    """Refuse a protocol for one label per image on a data set with several, and the reverse.

    A data set without labels passes here: it fails when the protocol opens a split.

    Raises:
        ConfigError: naming both.
    """
    misfit = task_misfit(type(protocol), dataset)
    if misfit:
        raise ConfigError(misfit, hint="sslbench list evals, or name another data set with --dataset")


def task_misfit(protocol: type[EvalProtocol], dataset: Dataset) -> str | None:
    """Why a protocol is not for a data set's kind of labels; None if it is."""
    task = dataset.info.task
    if task == "unlabelled" or task in protocol.tasks:
        return None
    taken = " or ".join(_LABELS[known] for known in sorted(protocol.tasks & _LABELS.keys()))
    return f"data set '{dataset.name}' has {_LABELS[task]}; protocol '{protocol.name}' takes {taken or 'none'}"


def check_split(protocol: EvalProtocol, split: str) -> None:
    """Refuse a split the protocol did not declare, and ``test`` to all that could choose something.

    Only protocols named ``test`` or ``test_...`` may open ``test``, and these may open neither ``train`` nor
    ``val``: what they report was chosen before, by another protocol.

    Raises:
        PluginError: naming protocol and split.
    """
    reports = protocol.name == "test" or protocol.name.startswith("test_")
    if split == "test" and not reports:
        raise PluginError(
            f"protocol '{protocol.name}' wants the split 'test', which only the protocol 'test' may open and "
            "those named test_...",
            hint="choose on 'val'; report with: sslbench eval test RUN",
        )
    if reports and split not in ("test", "trainval"):
        raise PluginError(
            f"protocol '{protocol.name}' wants the split '{split}', but what reports on 'test' chooses nothing",
            hint="choose in another protocol, save what was chosen, and load it with job.load_from",
        )
    if split not in protocol.splits:
        declared = ", ".join(sorted(protocol.splits)) or "none"
        raise PluginError(
            f"protocol '{protocol.name}' opens the split '{split}' without declaring it (declared: {declared})",
            hint=f"add '{split}' to {type(protocol).__name__}.splits",
        )
