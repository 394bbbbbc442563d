"""The journal and MLflow. The only package that imports mlflow."""

from sslbench.tracking.address import resolve_tracking_uri
from sslbench.tracking.process import prepare_store
from sslbench.tracking.push import SyncReport
from sslbench.tracking.record import ParentRef, RunRecord
from sslbench.tracking.replay import run_directories, sync
from sslbench.tracking.store import check_store
from sslbench.tracking.tracker import Tracker, describe_experiment, headline

__all__ = [
    "ParentRef",
    "RunRecord",
    "SyncReport",
    "Tracker",
    "check_store",
    "describe_experiment",
    "headline",
    "prepare_store",
    "resolve_tracking_uri",
    "run_directories",
    "sync",
]
