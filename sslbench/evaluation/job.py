"""What an evaluation protocol works with: a frozen backbone, the splits it declared, its own folder."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sslbench import comm
from sslbench.config.schema import DataOptions
from sslbench.data.loader import TrainLoader, rank_share
from sslbench.data.splits import eval_split
from sslbench.data.store import open_store
from sslbench.data.views import ViewExecutor
from sslbench.engine.checkpoint import load_tensors
from sslbench.engine.layout import faster_layout
from sslbench.errors import CheckpointError, DivergedError, PluginError
from sslbench.evaluation.features import (
    Extractor,
    Preprocessing,
    check_complete,
    json_digest,
    save_atomically,
    state_digests,
    tensor_digest,
)
from sslbench.evaluation.rules import check_split, check_task
from sslbench.evaluation.tables import StoredTable, Tables
from sslbench.plugin.api import Backbone, Batch, Dataset, EvalOptions, EvalProtocol, FeatureTable, Source, ViewSpec
from sslbench.plugin.rows import FeatureRows, LabelledRows
from sslbench.rng import derive_seed
from sslbench.untrusted import file_name

logger = logging.getLogger(__name__)

LogPoint = Callable[[int, Mapping[str, float]], None]
RunChild = Callable[[str, str, Mapping[str, Any], Mapping[str, Any]], dict[str, float]]


def evaluation_dir(run_dir: Path, protocol: str, dataset_key: str) -> Path:
    """Where the evaluation of a run by a protocol on a data set keeps its files."""
    return run_dir / "evals" / file_name(dataset_key) / file_name(protocol)


def preprocessing_for(dataset: Dataset, options: EvalOptions, image_size: int) -> Preprocessing:
    """How a data set's images are shown to a model that was pretrained on ``image_size`` pixels."""
    info = dataset.info
    fitting = 1.0 if info.size else 0.875
    return Preprocessing(
        size=options.size or image_size,
        center=options.center or fitting,
        mean=info.mean,
        std=info.std,
        interpolation=options.interpolation,
    )


class EvaluationJob:
    """The :class:`~sslbench.plugin.api.Job` of one protocol, one model and one data set.

    Args:
        protocol: decides which splits may be opened, and brings the options ``size``, ``center`` and
            ``batch_size`` if its ``Config`` is an :class:`~sslbench.plugin.api.EvalOptions`.
        backbone: weights loaded, on any device; it is moved to ``device`` and frozen.
        dataset: the data set to evaluate on.
        image_size: side in pixels the model was pretrained with.
        data: how pixels reach the device; ``val_fraction``.
        seed: seed of the run.
        device: where features live and heads are trained.
        run_dir: directory of the pretrained run.
        out_dir: this evaluation's directory; None: :func:`evaluation_dir`.
        cache_dir: folder of cached features; None: nothing is cached on disk.
        log: receives the points of curves.
        run_child: runs another protocol on the same model (see :meth:`child`).
        dataset_key: name of the data set in metric keys; None: the data set's ``key``.

    Raises:
        ConfigError: the protocol is not made for the kind of labels that the data set has.
    """

    def __init__(
        self,
        protocol: EvalProtocol,
        backbone: Backbone,
        dataset: Dataset,
        *,
        image_size: int,
        data: DataOptions,
        seed: int,
        device: torch.device,
        run_dir: Path,
        out_dir: Path | None = None,
        cache_dir: Path | None = None,
        log: LogPoint | None = None,
        run_child: RunChild | None = None,
        dataset_key: str | None = None,
    ) -> None:
        check_task(protocol, dataset)
        self.seed = seed
        self.device = device
        self.classes = dataset.info.classes
        self.run_dir = run_dir
        self.dataset_key = dataset_key or dataset.key
        self.out_dir = out_dir or evaluation_dir(run_dir, protocol.name, self.dataset_key)
        self._protocol = protocol
        self._options = protocol.cfg if isinstance(protocol.cfg, EvalOptions) else EvalOptions()
        self._preprocessing = preprocessing_for(dataset, self._options, image_size)
        self._layout = faster_layout(backbone, device)
        self._backbone = backbone.to(device).to(memory_format=self._layout)
        self._backbone.requires_grad_(False).eval()
        self._dataset = dataset
        self._data = data
        self._stored = Tables(cache_dir, device, data.features)
        self._log = log
        self._run_child = run_child
        self.unreadable: dict[str, int] = {}
        self.built_on: dict[str, str] = {}
        """Protocols whose files were loaded, and a digest of the options they had."""
        """By split, how many images could not be read and are left out of the results."""
        self._tables: dict[str, StoredTable] = {}
        self._loaders: dict[str, TrainLoader] = {}
        self._digests = state_digests(self._backbone)

    def backbone(self) -> Backbone:
        """The frozen backbone in eval mode. Evaluations must leave it unchanged; this is checked."""
        return self._backbone

    def features(self, split: str) -> FeatureTable:
        """Pooled features of the whole split without augmentation on the device, from the cache if possible.

        Raises:
            PluginError: the protocol did not declare the split, or is not ``test`` and wants ``test``.
            DataError: the data set has no such split or no labels.
        """
        rows = self.rows(split)
        return FeatureTable(rows.features.whole, rows.labels, rows.indices)

    def rows(self, split: str) -> LabelledRows:
        """The same features wherever they are: for tables that do not fit into the memory of the device.

        Raises:
            PluginError, DataError: as :meth:`features`.
        """
        source, indices = self._open(split)
        table = self._table("test" if split == "test" else "trainval")
        place = indices + self._offset(split)
        readable = table.readable[place]
        self._note_unreadable(split, int((~readable).sum()), len(indices))
        indices = indices[readable]
        features = _rows(table.features, place[readable], self.device)
        return LabelledRows(features, _labels(source)[indices].to(self.device), indices.to(self.device))

    def _offset(self, split: str) -> int:
        """Where a split starts in the table of ``trainval``: one pass serves ``train`` and ``val`` too."""
        own = split == "val" and "val" in self._dataset.info.splits
        return len(self._dataset.split("train")) if own else 0

    def _note_unreadable(self, split: str, count: int, total: int) -> None:
        if count and split not in self.unreadable:
            logger.info("%d of %d images of '%s' cannot be read and are left out", count, total, split)
            self.unreadable[split] = count

    def images(self, split: str) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """This rank's share of a split without augmentation: images, labels and sample numbers."""
        source, indices = self._open(split)
        labels, share = _labels(source), rank_share(len(indices), comm.rank(), comm.world())
        shown = self._extractor(source, indices).images(torch.arange(share.start, share.stop), len(indices))
        count = 0
        for images, samples in shown:
            count += len(samples)
            yield images, labels[samples.cpu()].to(self.device), samples
        missing = int(comm.all_sum(torch.tensor(len(share) - count)))
        check_complete(missing, self._data.max_unreadable)
        self._note_unreadable(split, missing, len(indices))

    def batches(
        self, split: str, views: Sequence[ViewSpec], batch_size: int, epoch: int
    ) -> Iterator[tuple[Batch, Tensor]]:
        """One shuffled epoch of this rank's share of augmented batches with their labels.

        ``batch_size`` is global; the last partial batch is dropped. A view without a size has the size of the
        evaluation's images.
        """
        loader = self._loader(split, views, batch_size)
        steps = loader.steps_per_epoch
        for batch in loader.batches(epoch * steps, (epoch + 1) * steps):
            assert batch.labels is not None
            yield batch, batch.labels

    def generator(self, stream: str) -> torch.Generator:
        """A CPU generator seeded by (run seed, protocol, stream)."""
        return torch.Generator().manual_seed(derive_seed(self.seed, "eval", self._protocol.name, stream))

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log a point of this evaluation's curves."""
        if self._log is not None:
            self._log(step, metrics)

    def save(self, name: str, tensors: Mapping[str, Any]) -> Path:
        """Write a file of tensors and plain values into ``out_dir``, stamped with what it belongs to.

        It loads with ``torch.load(path, weights_only=True)``.
        """
        path = self.out_dir / name
        content = {key: value.cpu() if isinstance(value, Tensor) else value for key, value in tensors.items()}
        options = json_digest(self._protocol.cfg.model_dump(mode="json"))
        maker = {"protocol": self._protocol.name, "version": self._protocol.version, "options": options}
        if comm.rank() == 0:
            save_atomically({**content, "stamp": {**maker, **self._stamp}}, path)
        comm.barrier()
        return path

    def load_from(self, protocol: str, name: str) -> dict[str, Any]:
        """Load a file that another protocol saved for the same model, data set and preprocessing.

        Raises:
            CheckpointError: there is none, it is damaged, or it belongs to something else.
        """
        path = evaluation_dir(self.run_dir, protocol, self.dataset_key) / name
        hint = f"sslbench eval {protocol} {self.run_dir} --dataset {self.dataset_key}"
        what = f"'{name}' of protocol '{protocol}' on data set '{self.dataset_key}'"
        if not path.exists():
            raise CheckpointError(f"there is no {what} for this model ({path} does not exist)", hint=hint)
        content = _load(path, what, hint)
        made_for = content.get("stamp", {})
        different = [key for key, value in self._stamp.items() if made_for.get(key) != value]
        if different:
            reason = f"{what} ({path}) was made for another {' and another '.join(different)}"
            raise CheckpointError(reason, hint=hint)
        self.built_on[protocol] = str(made_for.get("options", ""))
        return content

    def write_report(self, name: str, content: Any) -> Path:
        """Write a JSON report into ``out_dir``."""
        path = self.out_dir / name
        if comm.rank() == 0:
            self.out_dir.mkdir(parents=True, exist_ok=True)
            partial = path.with_name(f".{name}.partial")
            partial.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
            partial.replace(path)
        return path

    def child(
        self, protocol: str, dataset: str, dataset_options: Mapping[str, Any], options: Mapping[str, Any]
    ) -> dict[str, float]:
        """Run another protocol on the same model as an evaluation of its own and return its metrics."""
        if self._run_child is None:
            raise PluginError(f"protocol '{self._protocol.name}' starts evaluations, which is not possible here")
        return self._run_child(protocol, dataset, dataset_options, options)

    def changed_tensors(self) -> list[str]:
        """Parameters and buffers of the backbone that are no longer what they were."""
        now = state_digests(self._backbone)
        return [name for name in {**self._digests, **now} if self._digests.get(name) != now.get(name)]

    def _open(self, split: str) -> tuple[Source, Tensor]:
        check_split(self._protocol, split)
        return eval_split(self._dataset, split, self._data.val_fraction)

    def _table(self, base: str) -> StoredTable:
        if base not in self._tables:
            source, indices = eval_split(self._dataset, base, self._data.val_fraction)
            key = {**self._stamp, "split": base, "precision": "fp32", "device": self.device.type}
            key |= {"indices": tensor_digest(indices), "torch": torch.__version__}
            self._tables[base] = self._stored.get(key, self._extractor(source, indices))
        return self._tables[base]

    def _extractor(self, source: Source, indices: Tensor) -> Extractor:
        batch = self._options.batch_size
        return Extractor(self._backbone, source, indices, self._preprocessing, batch, self.device, self._data)

    def _loader(self, split: str, views: Sequence[ViewSpec], batch_size: int) -> TrainLoader:
        key = f"{split}/{batch_size}/{[view.model_dump_json() for view in views]}"
        if key not in self._loaders:
            self._loaders[key] = self._open_loader(split, views, batch_size)
        return self._loaders[key]

    def _open_loader(self, split: str, views: Sequence[ViewSpec], batch_size: int) -> TrainLoader:
        source, indices = self._open(split)
        shown = self._preprocessing
        executor = ViewExecutor(
            views,
            size=shown.size,
            mean=shown.mean,
            std=shown.std,
            device=self.device,
            channels_last=self._layout == torch.channels_last,
        )
        return TrainLoader(
            source,
            open_store(source, self._data, self.device, logger.info),
            executor,
            seed=derive_seed(self.seed, "eval", self._protocol.name, split),
            global_batch=batch_size,
            rank=comm.rank(),
            world=comm.world(),
            labels=True,
            indices=indices,
            workers=self._data.workers,
            device=self.device,
        )

    @cached_property
    def _stamp(self) -> dict[str, Any]:
        """What results depend on besides the protocol: the weights, the images and how they are shown."""
        backbone = [self._backbone.name, self._backbone.cfg.model_dump(mode="json"), self._digests]
        return {
            "model": json_digest(backbone),
            "data set": self._dataset.fingerprint(),
            "preprocessing": json_digest(asdict(self._preprocessing)),
        }


def run_protocol(protocol: EvalProtocol, job: EvaluationJob) -> dict[str, float]:
    """Run a protocol and check its side of the contract.

    Returns:
        Its metrics: the primary one and any others it declares.

    Raises:
        PluginError: it may not open its splits, changed the backbone, or returned metrics it did not declare.
        DivergedError: a metric is not a finite number.
    """
    for split in sorted(protocol.splits):
        check_split(protocol, split)
    metrics = {key: float(value) for key, value in protocol.run(job).items()}
    changed = job.changed_tensors()
    if changed:
        raise PluginError(f"protocol '{protocol.name}' changed the frozen backbone: {', '.join(changed)}")
    _check_metrics(protocol, metrics)
    return metrics


def _check_metrics(protocol: EvalProtocol, metrics: Mapping[str, float]) -> None:
    undeclared = sorted(set(metrics) - set(protocol.metrics))
    if undeclared:
        raise PluginError(f"protocol '{protocol.name}' returned undeclared metrics: {', '.join(undeclared)}")
    if protocol.primary not in metrics:
        raise PluginError(f"protocol '{protocol.name}' did not return its primary metric '{protocol.primary}'")
    broken = [f"{key} = {value}" for key, value in metrics.items() if not math.isfinite(value)]
    if broken:
        raise DivergedError(f"protocol '{protocol.name}' returned {', '.join(broken)}")


def _labels(source: Source) -> Tensor:
    labels = source.targets
    assert labels is not None, "eval_split gives labelled sources only"
    return labels


def _load(path: Path, what: str, hint: str) -> dict[str, Any]:
    try:
        content = load_tensors(path)
    except CheckpointError as error:
        raise CheckpointError(f"{what}: {error.message}", hint=hint) from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{what} ({path}) holds something else", hint=hint)
    return content


def _rows(table: Tensor, rows: Tensor, device: torch.device) -> FeatureRows:
    """Some rows of a table in ascending order; those that lie side by side need no list."""
    if len(rows) and int(rows[-1] - rows[0]) + 1 == len(rows):
        return FeatureRows(table[int(rows[0]) : int(rows[-1]) + 1], device)
    return FeatureRows(table, device, rows)
