"""What shells, terminals and environments do to a command line: each is a real process."""

from __future__ import annotations

import fcntl
import os
import pty
import struct
import subprocess
import sys
import termios
from pathlib import Path

import pytest

from sslbench.report.listing import table_lines

COMMAND = [sys.executable, "-m", "sslbench"]
RUN = ["pretrain", "--method", "simclr", "--backbone", "conv4", "--limit", "1", "--no-evals"]


def on_a_terminal(arguments: list[str], columns: int, cwd: Path, **env: str) -> tuple[int, str]:
    """Exit code and output of a command whose stdout and stderr are a terminal of some width."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", 50, columns, 0, 0))
    inherited = {name: value for name, value in os.environ.items() if name not in ("COLUMNS", "LINES", "NO_COLOR")}
    child = subprocess.Popen(
        [*COMMAND, *arguments],
        cwd=cwd,
        env={**inherited, "TERM": "xterm", **env},
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
    )
    os.close(theirs)
    output = b""
    while True:
        try:
            part = os.read(ours, 65536)
        except OSError:  # the other side is closed
            break
        if not part:
            break
        output += part
    os.close(ours)
    return child.wait(), output.decode().replace("\r\n", "\n")


def visible(line: str) -> str:
    return line.replace("\033[1m", "").replace("\033[0m", "")


def test_a_narrow_terminal_breaks_cells_not_lines(workdir: Path) -> None:
    code, output = on_a_terminal(["list", "evals"], 40, workdir)
    assert code == 0
    lines = [visible(line) for line in output.splitlines()]
    assert max(map(len, lines)) <= 40
    assert {"knn", "linear", "transfer"} <= {line.split(" ")[0] for line in lines}


def test_a_terminal_gets_emphasis_unless_it_asked_for_none(workdir: Path) -> None:
    assert "\033[1mevals\033[0m" in on_a_terminal(["list", "evals"], 100, workdir)[1]
    assert "\033" not in on_a_terminal(["list", "evals"], 100, workdir, NO_COLOR="1")[1]
    assert "\033" not in on_a_terminal(["list", "evals"], 100, workdir, TERM="dumb")[1]


def test_help_on_a_narrow_terminal(workdir: Path) -> None:
    code, output = on_a_terminal(["--help"], 40, workdir, NO_COLOR="1")
    assert code == 0
    assert "pretrain" in output


def test_a_pipe_gets_one_line_per_row_and_no_escapes(cli) -> None:
    lines = cli("list", "methods", FORCE_COLOR="").stdout.splitlines()
    assert "\033" not in "".join(lines)
    assert next(line for line in lines if line.startswith("simclr ")).endswith("sslbench 0.1.0")


def test_an_ascii_locale_gets_ascii(cli) -> None:
    done = cli("list", "methods", LC_ALL="C", PYTHONIOENCODING="ascii", PYTHONUTF8="0", PYTHONCOERCECLOCALE="0")
    assert done.stdout.isascii()
    assert "-----" in done.stdout
    failed = cli("pretrain", "--method", "größe", "--dataset", "digits", check=3, LC_ALL="C")
    assert "no method is named" in failed.stderr


def test_without_a_home(workdir: Path) -> None:
    env = {name: value for name, value in os.environ.items() if name not in ("HOME", "USER", "LOGNAME")}
    done = subprocess.run(
        [*COMMAND, "list", "evals"], cwd=workdir, env=env, capture_output=True, text=True, check=False
    )
    assert (done.returncode, done.stderr) == (0, "")
    assert "linear" in done.stdout


def test_a_reader_that_goes_away_is_no_error(workdir: Path) -> None:
    script = f'"{sys.executable}" -m sslbench list --json | head -n 1; echo "${{PIPESTATUS[0]}}"'
    done = subprocess.run(
        ["bash", "-c", script], cwd=workdir, env=os.environ, capture_output=True, text=True, check=False
    )
    assert done.stdout.splitlines() == ["[", "0"]
    assert done.stderr == ""


def test_an_output_that_is_full_is_an_error(workdir: Path) -> None:
    with open("/dev/full", "w") as full:
        done = subprocess.run(
            [*COMMAND, "list"], cwd=workdir, stdout=full, stderr=subprocess.PIPE, text=True, check=False
        )
    assert done.returncode == 5
    assert "the disk is full" in done.stderr
    assert "Traceback" not in done.stderr


def test_the_version(cli) -> None:
    assert cli("--version").stdout.startswith("sslbench 0.")


def unwritable(folder: Path) -> list[str]:
    """A prefix that runs a command as somebody who may not write, as root may everywhere."""
    folder.chmod(0o555)
    return [] if os.geteuid() else ["setpriv", "--reuid=65534", "--regid=65534", "--clear-groups", "--"]


@pytest.mark.slow
def test_a_read_only_working_directory(tmp_path: Path) -> None:
    folder = tmp_path / "locked"
    folder.mkdir()
    for parent in folder.parents:
        if parent.owner() != "root" or parent.stat().st_mode & 0o001:
            continue
        parent.chmod(parent.stat().st_mode | 0o055)
    words = [*RUN, "--dataset", "digits"]
    env = {**os.environ, "PYTHONDONTWRITEBYTECODE": "1"}
    prefix = unwritable(folder)
    listing = subprocess.run(
        [*prefix, *COMMAND, "list", "evals"], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    if prefix and listing.returncode == 126:
        pytest.skip("changing the user is not permitted here")
    assert listing.returncode == 0, listing.stderr
    done = subprocess.run(
        [*prefix, *COMMAND, *words], cwd=folder, env=env, capture_output=True, text=True, check=False
    )
    folder.chmod(0o755)
    assert done.returncode == 5, done.stdout + done.stderr
    assert "no permission" in done.stderr
    assert "--runs" in done.stderr
    assert "Traceback" not in done.stderr


def test_cells_go_on_in_the_next_line() -> None:
    lines = table_lines(("name", "what"), [("a", "one two three"), ("bb", "four")], 14)
    assert lines == ["name   what", "a      one two", "       three", "bb     four"]


def test_a_word_that_does_not_fit_is_cut() -> None:
    lines = table_lines(("n",), [("x" * 20,)], 9)
    assert [len(line) for line in lines] == [1, 9, 9, 2]
