"""What follows from a training step: journal lines, progress, probes, checkpoints, calls of extensions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from sslbench import __version__, comm
from sslbench.config.compose import Composed
from sslbench.config.tree import plain
from sslbench.engine import checkpoint
from sslbench.engine.checkpoint import BackboneMeta, CheckpointMeta
from sslbench.engine.console import Console
from sslbench.engine.rollback import TAG, Rollbacks
from sslbench.engine.saving import Saved, Saver
from sslbench.engine.setup import Parts, shards_parameters
from sslbench.engine.stopping import StopSignal
from sslbench.engine.trained import Trained, WholeBackbone
from sslbench.errors import CheckpointError, DivergedError
from sslbench.evaluation.probes import OnlineProbes, collapse_warning
from sslbench.plugin.catalog import Catalog, Kind
from sslbench.plugin.extensions import Extension
from sslbench.tracking import Tracker


class Extensions:
    """The observers of other packages. Whatever they do, they cannot end a run."""

    def __init__(self, all_: Sequence[Extension], tracker: Tracker, console: Console) -> None:
        self.tracker = tracker
        self.run_dir = tracker.run_dir
        self.console = console
        self.all = all_
        for extension in self.all:
            if extension.problem and comm.rank() == 0:
                console.warn(f"{extension.problem}; the run goes on without it")

    def tell(self, hook: str, **arguments: Any) -> None:
        """Call a hook of all extensions, on the first rank."""
        if comm.rank() > 0:
            return
        for extension in self.all:
            failure = extension.tell(hook, run_dir=self.run_dir, **arguments)
            if failure:
                self.tracker.plugins([extension.identity()])
                self.console.warn(f"{failure}; the run goes on, further failures of it are not shown")


class RunObserver:
    """Carries what the loop reports to journal, console, probes and checkpoints."""

    def __init__(
        self,
        composed: Composed,
        catalog: Catalog,
        parts: Parts,
        trained: Trained,
        tracker: Tracker,
        console: Console,
        stop: StopSignal,
        extensions: Extensions,
    ) -> None:
        self.composed = composed
        self.catalog = catalog
        self.parts = parts
        self.trained = trained
        self.tracker = tracker
        self.console = console
        self.stop = stop
        self.extensions = extensions
        self.rollbacks = Rollbacks()
        core = composed.core
        self.saver = Saver(
            tracker.run_dir,
            keep=core.checkpoint.keep,
            keep_epochs=core.checkpoint.keep_epochs,
            background=core.checkpoint.background,
        )
        self.probes = OnlineProbes(
            WholeBackbone(parts.method, parts.device) if shards_parameters(core.train) else parts.method.export,
            parts.dataset,
            core.probe,
            core.data,
            seed=core.run.seed,
            image_size=parts.image_size,
            device=parts.device,
        )

    def metrics(self, step: int, values: Mapping[str, float]) -> None:
        if self.rollbacks:
            rolled_back = {"train/rollbacks": float(len(self.rollbacks)), "train/lr_factor": self.rollbacks.factor}
            values = {**values, **rolled_back}
        self._log(step, values)
        self.console.update(step, values)

    def probe(self, step: int, epoch: int) -> None:
        values = self.probes.run(epoch)
        self._log(step, values)
        words = "  ".join(f"{key.removeprefix('probe/')} {value:.4g}" for key, value in values.items())
        self.console.info(f"  epoch {epoch}: probe {words}")
        warning = collapse_warning(values, self.parts.method.export().dim)
        if warning:
            self.console.warn(warning)

    def save(self, step: int, meter: Mapping[str, Any]) -> None:
        # All ranks take part in putting shards together.
        state = {"step": step, **self.trained.state(), "meter": dict(meter), "rollbacks": self.rollbacks.state()}
        backbone = self.trained.exported_state()
        if comm.rank() > 0:
            return
        steps_per_epoch = self.parts.plan.steps_per_epoch if self.parts.plan else 1
        meta = describe(self.composed, self.catalog, self.parts, step, step // steps_per_epoch)
        self.saver.save(meta, backbone, state)
        self._announce(self.saver.finished())

    def should_stop(self) -> bool:
        self._announce(self.saver.finished())
        return self.stop.agreed()

    def catch_up(self, done: int) -> None:
        """Complete what a killed process has left undone between writing a checkpoint and telling of it."""
        if comm.rank() > 0:
            return
        self.saver.make_room(done)
        kept = checkpoint.list_checkpoints(self.tracker.run_dir)
        steps = {path: checkpoint.step_of(path) for path in kept}
        for path in self.tracker.reconcile(steps, done):
            self.extensions.tell("sslbench_checkpoint_saved", path=path, step=steps[path])

    def settle(self) -> None:
        """Wait until every checkpoint is on disk, on all ranks: then they may look for it."""
        self._announce(self.saver.finished(wait=True))
        comm.barrier()

    def rolls_back(self, error: DivergedError) -> bool:
        """Whether a run that has diverged shall go on from its last checkpoint."""
        options = self.composed.core.train
        if len(self.rollbacks) >= options.rollback:
            return False
        self.settle()
        if not comm.on_first_rank(lambda: checkpoint.good_before(self.tracker.run_dir, error.step)):
            return False
        self.rollbacks.diverged(error.step, options.rollback_factor)
        number = f"roll-back {len(self.rollbacks) + 1} of {options.rollback}"
        self.console.warn(
            f"{error.message}; {number}: on with {options.rollback_factor:g} times the learning rate"
        )
        return True

    def note_rollbacks(self) -> None:
        """Make it visible wherever runs are compared that this one has had some."""
        if self.rollbacks and comm.rank() == 0:
            self.tracker.tag({TAG: self.rollbacks.described()})

    def __enter__(self) -> RunObserver:
        return self

    def __exit__(self, kind: type[BaseException] | None, *error: object) -> None:
        """Complete what is being written, whatever has happened; its own failure must not hide another one."""
        try:
            self._announce(self.saver.finished(wait=True))
        except CheckpointError as failure:
            if kind is None:
                raise
            self.console.warn(failure.message)
        finally:
            self.saver.close()
        if kind is None:
            comm.barrier()

    def _announce(self, finished: list[Saved]) -> None:
        for saved in finished:
            for old in saved.removed:
                self.tracker.checkpoint_removed(old)
            self.tracker.checkpoint(saved.path, saved.meta.model_dump(mode="json"))
            self.extensions.tell("sslbench_checkpoint_saved", path=saved.path, step=saved.meta.step)

    def _log(self, step: int, values: Mapping[str, float]) -> None:
        self.tracker.log(step, values)
        self.extensions.tell("sslbench_metrics_logged", step=step, metrics=values)


def took_part(composed: Composed, catalog: Catalog, extensions: Sequence[Extension]) -> list[dict[str, str]]:
    """Identities of all code of others, or that could be, behind a run: plugins, registries, extensions."""
    sections = (composed.method, composed.backbone, composed.dataset)
    chosen = [identity_of(catalog, s.kind, s.name) for s in sections]
    return [*chosen, *map(dict, composed.registries), *(extension.identity() for extension in extensions)]


def identity_of(catalog: Catalog, kind: Kind, name: str) -> dict[str, str]:
    """A plugin's identity as runs and checkpoints record it."""
    return {"kind": kind, **catalog.find(kind, name).identity()}


def describe(composed: Composed, catalog: Catalog, parts: Parts, step: int, epoch: int) -> CheckpointMeta:
    """The meta data of a checkpoint of this run."""
    info, backbone = parts.dataset.info, parts.method.export()
    sections = (composed.method, composed.backbone, composed.dataset)
    return CheckpointMeta(
        step=step,
        epoch=epoch,
        method=composed.method.name,
        uses_labels=composed.method.cls.uses_labels,
        limited=composed.core.train.limit is not None,
        seed=composed.core.run.seed,
        backbone=BackboneMeta(
            name=composed.backbone.name,
            options=plain(backbone.cfg),
            image_size=parts.image_size,
            dim=backbone.dim,
            stride=backbone.stride,
        ),
        dataset=parts.dataset.key,
        dataset_fingerprint=parts.dataset.fingerprint(),
        mean=info.mean,
        std=info.std,
        config_hash=composed.hash(),
        plugins=[identity_of(catalog, s.kind, s.name) for s in sections],
        sslbench=__version__,
    )
