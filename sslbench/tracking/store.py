"""The MLflow store. The only module that imports mlflow, and only when a store is opened."""

from __future__ import annotations

import logging
import math
import os
import re
import ssl
import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from http.client import HTTPConnection, HTTPException, HTTPSConnection
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar
from urllib.parse import urlparse

from sslbench.tracking.address import is_server, local_path, sqlite_path
from sslbench.tracking.record import file_lock

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Experiment

T = TypeVar("T")

_PARAMS_PER_CALL = 100
# 500 points take 27 ms and 1000 take 146 ms in SQLite (measured), and other writers wait meanwhile.
_METRICS_PER_CALL = 500
_PARAM_LENGTH = 6000
_TAG_LENGTH = 8000
_KEY_LENGTH = 250
#: Run lists show it next to the name; the whole fingerprint is in the data set's source.
_DIGEST_LENGTH = 12
#: Without it the user interface guesses, and opens on pages about language-model agents.
_EXPERIMENT_TAGS = {"mlflow.experimentKind": "custom_model_development"}
_TIMEOUT = "MLFLOW_HTTP_REQUEST_TIMEOUT"
#: We try again ourselves, later; a slow server is given the time it takes.
_PATIENCE = {"MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0", _TIMEOUT: "60"}
#: Which of these the user has not set.
_ours: set[str] = set()
#: Seconds in which a server has to answer while a command waits for it.
_HASTE_S = 5.0


class StoreError(Exception):
    """The store cannot be reached or does not answer. Trying again later may help."""

    repeated = False
    """Whether this is an outage that was met a moment ago."""


class RejectedError(Exception):
    """The store answered and refused the request. Sending it again will not help."""


class Point(NamedTuple):
    """One value of one metric."""

    key: str
    value: float
    step: int
    time: float
    model_id: str | None = None


#: What drivers say in hundreds of characters.
_REASONS = {
    r"Connection refused|NewConnectionError": "connection refused",
    r"Connection aborted|RemoteDisconnected|Connection reset": "the connection was cut",
    r"ReadTimeout|ConnectTimeout|timed out": "no answer in time",
    r"NameResolution|Name or service not known": "unknown host",
    r"database is locked": "database is locked",
    r"unable to open database file": "unable to open database file",
    r"file is not a database": "file is not a database",
    r"readonly database": "database is read-only",
}


def reason(error: BaseException) -> str:
    """Why a request failed, in one short line."""
    text = re.sub(r"\s+", " ", str(error)).strip() or type(error).__name__
    known = next((words for pattern, words in _REASONS.items() if re.search(pattern, text)), None)
    return known or (text if len(text) <= 200 else f"{text[:197]}...")


_UNKNOWN = "RESOURCE_DOES_NOT_EXIST"
#: Tag of a LoggedModel: run and checkpoint that it stands for.
ORIGIN = "sslbench.origin"
_TEMPORARY = {"INTERNAL_ERROR", "TEMPORARILY_UNAVAILABLE", "REQUEST_LIMIT_EXCEEDED", "DEADLINE_EXCEEDED"}


@contextmanager
def _translated() -> Iterator[None]:
    """Turn everything the store raises into one of our two errors."""
    from mlflow.exceptions import MlflowException

    try:
        yield
    except MlflowException as error:
        kind = StoreError if error.error_code in _TEMPORARY else RejectedError
        raise kind(reason(error)) from error
    except Exception as error:
        raise StoreError(reason(error)) from error


def _connect(uri: str) -> MlflowClient:
    for name, value in _PATIENCE.items():
        if name not in os.environ:
            os.environ[name] = value
            _ours.add(name)
    # 60 lines about schema migrations on the first use of a database.
    logging.getLogger("alembic").setLevel(logging.WARNING)
    # It logs every error with its traceback and raises it too; we say what matters of it.
    logging.getLogger("mlflow.store.db.utils").setLevel(logging.CRITICAL)
    from mlflow import MlflowClient

    return MlflowClient(tracking_uri=uri)


def _knock(uri: str, patient: bool) -> None:
    """Find out whether a server answers at all, whatever it answers, within the time there is."""
    parts = urlparse(uri)
    usual = float(_PATIENCE[_TIMEOUT]) if patient else _HASTE_S
    seconds = usual if _TIMEOUT in _ours else float(os.environ.get(_TIMEOUT) or usual)
    kind = HTTPSConnection if parts.scheme == "https" else HTTPConnection
    connection = kind(parts.hostname or "", parts.port, timeout=seconds)
    try:
        connection.request("GET", f"{parts.path.rstrip('/')}/health")
        connection.getresponse()
    except ssl.SSLError:
        return  # it is there; its certificate is for MLflow to judge, which may have been told to accept it
    except HTTPException as error:
        raise StoreError(reason(error)) from error
    finally:
        connection.close()


def _create_database(path: Path) -> None:
    fresh = path.with_name(f".{path.name}.new")
    fresh.unlink(missing_ok=True)
    # The first request to a database creates its tables.
    _connect(f"sqlite:///{fresh.absolute()}").search_experiments(max_results=1)
    fresh.replace(path)


#: Seconds during which a store that failed to open is not tried again by this process.
_OUTAGE_S = 30.0
_outages: dict[tuple[str, bool], tuple[float, str]] = {}


def connect(uri: str, *, patient: bool = False) -> Store:
    """Open a store in the process that talks to MLflow.

    One that failed a moment ago fails at once: evaluations must not wait for it one by one.

    Args:
        patient: nobody waits, so that a slow server may take its time.

    Raises:
        StoreError: it is out of reach.
        RejectedError: it refuses us.
    """
    failed_at, words = _outages.get((uri, patient), (-math.inf, ""))
    if time.monotonic() - failed_at < _OUTAGE_S:
        error = StoreError(words)
        error.repeated = True
        raise error
    from sslbench.tracking.process import open_store

    try:
        return open_store(uri, patient)
    except StoreError as error:
        _outages[uri, patient] = (time.monotonic(), str(error))
        raise


class Store:
    """A connection. Every method raises :class:`StoreError` or :class:`RejectedError` and nothing else.

    A new SQLite database is created under a file lock: concurrent migrations crash (measured: 3 of 4). It gets its
    name when it is complete: one whose migration was killed half-way could never be opened again.
    """

    def __init__(self, uri: str, *, patient: bool = True) -> None:
        database = sqlite_path(uri)
        lock = file_lock(database.with_name(f".{database.name}.lock")) if database else nullcontext()
        try:
            if is_server(uri):
                _knock(uri, patient)
            with lock, _translated():
                if database and not database.exists():
                    _create_database(database)
                self._client = _connect(uri)
                # Servers are asked lazily; this finds out whether there is one.
                self._client.search_experiments(max_results=1)
        except OSError as error:
            raise StoreError(reason(error)) from error
        self.uri = uri

    def experiment(self, name: str, artifact_location: Path) -> str:
        """Id of the experiment, created if it is new."""
        with _translated():
            found = self._client.get_experiment_by_name(name) or self._create(name, artifact_location)
        if found.lifecycle_stage == "deleted":
            raise RejectedError(
                f"experiment {name!r} was deleted; `mlflow experiments restore -x {found.experiment_id}` "
                "brings it back"
            )
        return str(found.experiment_id)

    def _create(self, name: str, artifact_location: Path) -> Experiment:
        from mlflow.exceptions import MlflowException

        # A server decides itself where artifacts go: our paths may mean nothing on its machine.
        location = None if is_server(self.uri) else str(artifact_location)
        try:
            return self._client.get_experiment(self._client.create_experiment(name, location, _EXPERIMENT_TAGS))
        except MlflowException as error:
            other = self._client.get_experiment_by_name(name)
            if other is None:
                raise error
            return other  # another process was faster

    def create_run(
        self, experiment_id: str, name: str, tags: Mapping[str, str], started: float
    ) -> tuple[str, str]:
        """Start a run; returns its id and artifact address."""
        with _translated():
            run = self._client.create_run(
                experiment_id, start_time=_ms(started), run_name=name, tags=_clean_tags(tags)
            )
        return run.info.run_id, run.info.artifact_uri

    def find_run(self, experiment_id: str, local_id: str) -> tuple[str, str] | None:
        """The run that was created for a local id, if an earlier attempt got that far."""
        with _translated():
            runs = self._client.search_runs(
                [experiment_id], f"tags.`sslbench.local_id` = '{local_id}'", max_results=1
            )
        return (runs[0].info.run_id, runs[0].info.artifact_uri) if runs else None

    def artifact_uri(self, run_id: str) -> str | None:
        """Where the store says that a run's artifacts are; None if it does not know the run."""
        from mlflow.exceptions import MlflowException

        with _translated():
            try:
                return str(self._client.get_run(run_id).info.artifact_uri)
            except MlflowException as error:
                if error.error_code == _UNKNOWN:
                    return None
                raise

    def last_step(self, run_id: str, key: str) -> int | None:
        """The last step that the store has of a metric."""
        with _translated():
            points = self._client.get_metric_history(run_id, _clean_key(key))
        return max((point.step for point in points), default=None)

    def log_params(self, run_id: str, params: Mapping[str, str]) -> None:
        """Log parameters, cut to what MLflow stores."""
        from mlflow.entities import Param

        entities = [Param(_clean_key(key), value[:_PARAM_LENGTH]) for key, value in params.items()]
        for chunk in _chunks(entities, _PARAMS_PER_CALL):
            with _translated():
                self._client.log_batch(run_id, params=chunk, synchronous=True)

    def log_points(self, run_id: str, points: Iterable[Point]) -> None:
        """Log metric values. Infinities stay in the journal: stored as 1.8e308 they would ruin every chart."""
        from mlflow.entities import Metric

        entities = [
            Metric(_clean_key(p.key), p.value, _ms(p.time), p.step, model_id=p.model_id)
            for p in points
            if not math.isinf(p.value)
        ]
        for chunk in _chunks(entities, _METRICS_PER_CALL):
            with _translated():
                self._client.log_batch(run_id, metrics=chunk, synchronous=True)

    def set_tags(self, run_id: str, tags: Mapping[str, str]) -> None:
        """Set tags of a run."""
        from mlflow.entities import RunTag

        entities = [RunTag(key, value) for key, value in _clean_tags(tags).items()]
        for chunk in _chunks(entities, _PARAMS_PER_CALL):
            with _translated():
                self._client.log_batch(run_id, tags=chunk, synchronous=True)

    def describe_experiment(self, name: str, text: str) -> None:
        """Markdown that the page of an experiment shows above its runs."""
        with _translated():
            found = self._client.get_experiment_by_name(name)
            if found is not None:
                self._client.set_experiment_tag(found.experiment_id, "mlflow.note.content", text)

    def log_dataset(self, run_id: str, name: str, digest: str, context: str) -> None:
        """Record which data a run read, by name and digest."""
        from mlflow.data.code_dataset_source import CodeDatasetSource
        from mlflow.data.meta_dataset import MetaDataset
        from mlflow.entities import DatasetInput, InputTag

        with _translated():
            source = CodeDatasetSource(tags={"sslbench.dataset": name, "sslbench.fingerprint": digest})
            dataset = MetaDataset(  # type: ignore[abstract]
                source, name=name, digest=digest[:_DIGEST_LENGTH]
            )
            tag = InputTag("mlflow.data.context", context)
            self._client.log_inputs(run_id, datasets=[DatasetInput(dataset._to_mlflow_entity(), [tag])])

    def create_model(
        self,
        experiment_id: str,
        run_id: str,
        name: str,
        step: int,
        params: Mapping[str, str],
        tags: Mapping[str, str],
    ) -> tuple[str, str]:
        """Register a checkpoint as a LoggedModel; returns its id and artifact address."""
        from mlflow.entities import LoggedModelOutput

        with _translated():
            model = self._client.create_logged_model(
                experiment_id,
                name=re.sub(r"[/:.%\"']", "-", name),
                source_run_id=run_id,
                params={_clean_key(key): value[:_PARAM_LENGTH] for key, value in params.items()},
                tags=_clean_tags(tags),
                model_type="backbone",
            )
            self._client.log_outputs(run_id, [LoggedModelOutput(model.model_id, step)])
        return model.model_id, model.artifact_location

    def find_model(self, experiment_id: str, origin: str) -> tuple[str, str] | None:
        """The LoggedModel that was created for a checkpoint, if an earlier attempt got that far."""
        with _translated():
            found = self._client.search_logged_models(
                [experiment_id], f"tags.`{ORIGIN}` = '{origin}'", max_results=1
            )
        return (found[0].model_id, found[0].artifact_location) if found else None

    def finalize_model(self, model_id: str) -> None:
        """Mark a model as complete."""
        from mlflow.entities import LoggedModelStatus

        with _translated():
            self._client.finalize_logged_model(model_id, LoggedModelStatus.READY)

    def delete_model(self, model_id: str) -> Path | None:
        """Delete a model's entry; returns its artifact folder if that is on this machine."""
        from mlflow.exceptions import MlflowException

        with _translated():
            try:
                location = self._client.get_logged_model(model_id).artifact_location
                self._client.delete_logged_model(model_id)
            except MlflowException as error:
                if error.error_code == _UNKNOWN:  # deleted, and the answer was lost
                    return None
                raise
        return local_path(location)

    def use_model(self, run_id: str, model_id: str) -> None:
        """Record that a run evaluated a model."""
        from mlflow.entities import LoggedModelInput

        with _translated():
            self._client.log_inputs(run_id, models=[LoggedModelInput(model_id)])

    def upload(self, run_id: str, file: Path, folder: str | None) -> None:
        """Copy a file to a run's artifacts."""
        with _translated():
            self._client.log_artifact(run_id, str(file), folder)

    def upload_to_model(self, model_id: str, file: Path) -> None:
        """Copy a file to a model's artifacts."""
        with _translated():
            self._client.log_model_artifact(model_id, str(file))

    def set_status(self, run_id: str, status: str, ended: float | None) -> None:
        """Close a run with a final status, or open it again with RUNNING."""
        with _translated():
            if status == "RUNNING":
                self._client.update_run(run_id, status=status)
            else:
                self._client.set_terminated(run_id, status, _ms(ended) if ended else None)


def _chunks(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[i : i + size] for i in range(0, len(items), size))


def _ms(seconds: float) -> int:
    return round(seconds * 1000)


def _clean_key(key: str) -> str:
    """A name MLflow accepts: word characters and ``- . / : space``."""
    return re.sub(r"[^\w\-./: ]", "_", key)[:_KEY_LENGTH]


def _clean_tags(tags: Mapping[str, str]) -> dict[str, Any]:
    return {_clean_key(key): str(value)[:_TAG_LENGTH] for key, value in tags.items()}


def check_store(uri: str) -> str | None:
    """Why a store cannot be used, or None if it can. A database that does not exist yet is not created."""
    database = sqlite_path(uri)
    if database is not None and not database.exists():
        usable = os.access(database.parent, os.W_OK)
        return None if usable else f"{database.parent} is not a folder that can be written"
    try:
        Store(uri, patient=False)
    except (StoreError, RejectedError) as error:
        return f"{uri}: {error}"
    return None
