"""Runs that are killed again and again and resumed end as if nothing had happened: files, weights, MLflow."""

from __future__ import annotations

import random
from pathlib import Path

import pytest
from chaos.killing import again_and_again

pytestmark = pytest.mark.slow


def test_a_run_killed_again_and_again_ends_as_if_it_had_not_been(tmp_path: Path) -> None:
    again_and_again(tmp_path, random.Random(5))
