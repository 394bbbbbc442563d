"""Linear evaluation and test on other data sets than the one the model was pretrained on."""

from __future__ import annotations

import re
from typing import Any

from pydantic import Field, model_validator

from sslbench.errors import DataError, PluginError, SslbenchError
from sslbench.plugin.api import EvalProtocol, Job, Options
from sslbench.plugin.hooks import hookimpl


class Target(Options):
    """A data set to transfer to. Its name alone is enough where it needs no options."""

    name: str
    """A data set plugin, `NAME` or `NAME:VALUE`."""
    options: dict[str, Any] = {}  # noqa: RUF012
    """Options of the data set, such as `root`."""

    @model_validator(mode="before")
    @classmethod
    def _from_name(cls, value: Any) -> Any:
        return {"name": value} if isinstance(value, str) else value

    @property
    def label(self) -> str:
        """Its name in reports; of a path behind the name, the last part."""
        return re.sub(r":.*/", ":", self.name.rstrip("/"))


class TransferConfig(Options):
    """Options of the transfer protocol."""

    datasets: tuple[Target, ...] = Field(min_length=1)
    """Data sets to transfer to: names, or `{name: ..., options: {...}}`."""
    protocols: tuple[str, ...] = Field(("linear", "test"), min_length=1)
    """Evaluations to run on each, in this order; the last one must return `top1`."""
    options: dict[str, dict[str, Any]] = {}  # noqa: RUF012
    """Options of these evaluations, by protocol: `{linear: {epochs: 50}}`."""

    @model_validator(mode="after")
    def _options_are_used(self) -> TransferConfig:
        unused = sorted(set(self.options) - set(self.protocols))
        if unused:
            raise ValueError(f"options for {', '.join(unused)}, which protocols does not list")
        return self


class Transfer(EvalProtocol):
    """Runs other evaluations of the same frozen backbone, each data set on its own.

    A data set that fails does not stop the others; it is an error at the end, after the report is written.
    """

    name = "transfer"
    version = 1
    Config = TransferConfig
    metrics = {"mean_top1": "max"}  # noqa: RUF012
    primary = "mean_top1"
    splits = frozenset[str]()
    tasks = frozenset({"classification", "multilabel"})  # the evaluations it starts check their own data sets

    cfg: TransferConfig

    def subject(self, dataset_key: str) -> str:
        """The data sets transferred to."""
        return "+".join(target.label for target in self.cfg.datasets)

    def run(self, job: Job) -> dict[str, float]:
        """Return the mean over data sets of the last protocol's top-1 (``transfer.json`` has the rest).

        Raises:
            DataError: naming the data sets that failed and why.
        """
        results: dict[str, dict[str, dict[str, float]]] = {}
        failures: dict[str, SslbenchError] = {}
        for number, target in enumerate(self.cfg.datasets, start=1):
            key = _key(target, results.keys() | failures.keys())
            try:
                results[key] = self._evaluate(job, target)
            except SslbenchError as error:
                failures[key] = error
            job.log(number, {"finished": float(len(results)), "failed": float(len(failures))})
        reasons = {key: error.message for key, error in failures.items()}
        top1 = [result[self.cfg.protocols[-1]]["top1"] for result in results.values()]
        mean = sum(top1) / len(top1) if top1 else None
        job.write_report("transfer.json", {"mean_top1": mean, "results": results, "failures": reasons})
        if failures or mean is None:
            raise _failure(failures, len(self.cfg.datasets))
        return {"mean_top1": mean}

    def _evaluate(self, job: Job, target: Target) -> dict[str, dict[str, float]]:
        results = {
            protocol: job.child(protocol, target.name, target.options, self.cfg.options.get(protocol, {}))
            for protocol in self.cfg.protocols
        }
        last = self.cfg.protocols[-1]
        if "top1" not in results[last]:
            raise PluginError(f"protocol '{last}' returns no 'top1', which transfer averages over data sets")
        return results


def _key(target: Target, taken: set[str]) -> str:
    """The data set's name, numbered if it occurs again with other options."""
    names = [target.label, *(f"{target.label}#{number}" for number in range(2, len(taken) + 2))]
    return next(name for name in names if name not in taken)


def _failure(failures: dict[str, SslbenchError], total: int) -> DataError:
    lines = "".join(f"\n  {key}: {error.message}" for key, error in failures.items())
    hints = [error.hint for error in failures.values() if error.hint]
    message = f"{len(failures)} of {total} data sets failed (the others are finished and in transfer.json):{lines}"
    return DataError(message, hint=hints[0] if hints else None)


@hookimpl
def sslbench_evals() -> list[type[EvalProtocol]]:
    return [Transfer]
