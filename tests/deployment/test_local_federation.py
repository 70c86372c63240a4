# SPDX-License-Identifier: Apache-2.0
"""scripts/local-federation makes a run and leaves nothing behind, whatever happens."""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts import launcher
from scripts.local_federation import LocalFederation
from scripts.programs import HOST, MARK, FederationError, Program, kill_marked, marked, stop

SCRIPT = Path(__file__).parents[2] / "scripts" / "local-federation"
SLEEPER = [sys.executable, "-c", "import time; print('up', flush=True); time.sleep(600)"]
STUBBORN = [
    sys.executable,
    "-c",
    "import signal, time; signal.signal(signal.SIGTERM, signal.SIG_IGN); "
    "print('up', flush=True); time.sleep(600)",
]


def start_script(*arguments: str, folder: Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, str(SCRIPT), *arguments],
        env={**os.environ, "TMPDIR": str(folder)},
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    )


@pytest.fixture
def occupied_port() -> Iterator[int]:
    with socket.socket() as taken:
        taken.bind((HOST, 0))
        taken.listen()
        yield taken.getsockname()[1]


@pytest.mark.engine
@pytest.mark.timeout(900)
def test_one_command_runs_a_federation_and_leaves_nothing(tmp_path: Path) -> None:
    output = tmp_path / "run"
    script = start_script(
        *("--nodes", "2", "--rounds", "1"),
        *("--run-config", 'strategy="fedavg" fraction-evaluate=0.0 train-examples=500'),
        *("--run-config", f'output-dir="{output}"'),
        folder=tmp_path,
    )
    said, _ = script.communicate(timeout=800)
    assert script.returncode == 0, said
    assert "finished:completed" in said
    assert f"Artifacts: {output}\n" in said
    rows = [json.loads(line) for line in (output / "clients.jsonl").read_text().splitlines()]
    assert [(row["round"], row["partition"]) for row in rows] == [(1, 0), (1, 1)]
    assert not any("dropped" in row for row in rows)
    # torch leaves an empty cache folder in TMPDIR.
    assert list(tmp_path.glob("local-federation-*")) == []
    folder = re.search(r"Work folder: (\S+)", said)
    assert folder is not None
    assert marked(folder.group(1)) == []


@pytest.mark.engine
@pytest.mark.slow
def test_ctrl_c_half_way_leaves_nothing(tmp_path: Path) -> None:
    script = start_script(folder=tmp_path)
    assert script.stdout is not None
    line = script.stdout.readline()
    folder = line.removeprefix("Work folder: ").strip()
    deadline = time.monotonic() + 60
    while not marked(folder) and time.monotonic() < deadline:
        time.sleep(0.1)
    assert marked(folder), "the SuperLink was started"
    script.send_signal(signal.SIGINT)
    said, _ = script.communicate(timeout=60)
    assert script.returncode == 128 + signal.SIGINT, said
    assert "Ended by SIGINT" in said
    assert marked(folder) == []
    assert list(tmp_path.iterdir()) == []


@pytest.mark.engine
def test_early_death_is_one_message_with_the_end_of_the_log(
    tmp_path: Path, occupied_port: int
) -> None:
    federation = LocalFederation(tmp_path, port=occupied_port)
    with pytest.raises(FederationError) as caught, federation:
        pytest.fail("the federation started on a port that is taken")
    text = str(caught.value)
    assert "superlink ended unexpectedly with exit code" in text
    assert str(tmp_path / "superlink.log") in text
    assert "address already in use" in text
    assert marked(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--run-config", "a=b=c"), "--run-config: The provided configuration string"),
        (("--workdir", str(SCRIPT.parent)), "is not empty; name a new folder"),
    ],
)
def test_bad_run_config_and_full_work_folder_are_refused(
    arguments: tuple[str, str],
    message: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    monkeypatch.setattr(tempfile, "tempdir", str(tmp_path))
    # pytest keeps its own signal handlers.
    monkeypatch.setattr(launcher, "SIGNALS", ())
    assert launcher.main(arguments) == 1
    assert message in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("halted", [False, True])
def test_stop_ends_programs_that_do_not_listen(tmp_path: Path, halted: bool) -> None:
    program = Program("stubborn", STUBBORN, os.environ, tmp_path)
    while "up" not in program.output():
        time.sleep(0.05)
    if halted:
        program.send(signal.SIGSTOP)
    stop([program], seconds=0.5)
    assert program.exit_code == -signal.SIGKILL


def test_programs_that_left_their_group_are_found_and_ended(tmp_path: Path) -> None:
    environment = {**os.environ, MARK: str(tmp_path)}
    child = subprocess.Popen(SLEEPER, env=environment, stdout=subprocess.DEVNULL)
    # Without a wait it would stay as a zombie.
    threading.Thread(target=child.wait, daemon=True).start()
    assert marked(str(tmp_path)) == [child.pid]
    assert marked(str(tmp_path / "other")) == []
    kill_marked(str(tmp_path), seconds=0.2)
    assert child.wait(10) == -signal.SIGKILL


def test_output_is_that_of_the_last_start(tmp_path: Path) -> None:
    for word in ("first", "second"):
        program = Program("echo", [sys.executable, "-c", f"print('{word}')"], os.environ, tmp_path)
        assert program.wait(30)
        assert program.output() == f"{word}\n"
    assert program.log.read_text() == "first\nsecond\n"
