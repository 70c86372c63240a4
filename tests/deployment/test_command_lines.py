# SPDX-License-Identifier: Apache-2.0
"""Commands in docs/deploy.md and deploy/ fit the real programs and formats."""

from __future__ import annotations

import functools
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest
import yaml
from flwr.cli.flower_config import parse_superlink_connection
from flwr.cli.supernode.register import try_load_public_key
from flwr.common.config import parse_config_args

from scripts.certificates import ServerCertificate
from tests.deployment.test_certificates import shake_hands

ROOT = Path(__file__).parents[2]
GUIDE = (ROOT / "docs" / "deploy.md").read_text(encoding="utf-8")
UNITS = sorted((ROOT / "deploy" / "systemd").glob("*.service"))
BLOCKS = [text.replace("\\\n", " ") for text in re.findall(r"```bash\n(.*?)```", GUIDE, re.DOTALL)]
COMPOSE = yaml.safe_load((ROOT / "deploy" / "compose.yaml").read_text(encoding="utf-8"))
BIN = Path(sys.executable).parent
SUBCOMMANDS = {"run": 1, "list": 1, "log": 1, "stop": 1, "supernode": 2}


def unit_command(unit: Path) -> list[str]:
    text = unit.read_text(encoding="utf-8").replace("\\\n", " ")
    return shlex.split(re.findall(r"^ExecStart=(.*)$", text, re.MULTILINE)[0])


def commands() -> list[list[str]]:
    """Every Flower command in the guide, the units and the compose file."""
    lines = [shlex.split(line, comments=True) for block in BLOCKS for line in block.splitlines()]
    inline = re.findall(r"`((?:flwr|flower-\w+) [^`]*--[^`]*)`", GUIDE)
    lines += [shlex.split(text) for text in inline]
    lines += [unit_command(unit) for unit in UNITS]
    lines += [service["command"] for service in COMPOSE["services"].values()]
    return [
        [Path(words[0]).name, *words[1:]]
        for words in lines
        if words and re.fullmatch(r"flwr|flower-\w+", Path(words[0]).name)
    ]


def program_of(words: list[str]) -> tuple[str, ...]:
    return tuple(words[: 1 + SUBCOMMANDS[words[1]]] if words[0] == "flwr" else words[:1])


@functools.cache
def known_flags(program: tuple[str, ...]) -> set[str]:
    done = subprocess.run(
        [str(BIN / program[0]), *program[1:], "--help"],
        # A wide terminal: flags must not be broken or cut.
        env={**os.environ, "COLUMNS": "300", "NO_COLOR": "1", "FLWR_DISABLE_UPDATE_CHECK": "1"},
        capture_output=True,
        text=True,
        timeout=120,
        check=True,
    )
    plain = re.sub(r"\x1b\[[0-9;]*m", "", done.stdout)
    return set(re.findall(r"(?<![\w-])--[a-z][a-z-]*", plain))


@pytest.mark.parametrize("words", commands(), ids=" ".join)
def test_flags_exist(words: list[str]) -> None:
    flags = {word.partition("=")[0] for word in words if word.startswith("--")}
    assert "--insecure" not in flags
    assert flags <= known_flags(program_of(words))


def test_every_program_is_among_the_commands() -> None:
    programs = {program_of(words) for words in commands()}
    assert {("flower-superlink",), ("flower-supernode",), ("flwr", "run")} <= programs
    assert ("flwr", "supernode", "register") in programs
    assert len(commands()) >= 14


def test_made_up_flag_would_be_found() -> None:
    assert "--ssl-cert-file" not in known_flags(("flower-superlink",))


def test_keys_of_runs_and_nodes_exist() -> None:
    known = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    run_keys = set(known["tool"]["flwr"]["app"]["config"])
    texts = re.findall(r"--run-config '([^']*)'", GUIDE)
    assert texts
    for text in texts:
        assert set(parse_config_args([text])) <= run_keys
    for key in re.findall(r"^\| `([a-z-]+)` \(", GUIDE, re.MULTILINE):
        assert key in run_keys
    environment = (ROOT / "deploy" / "systemd" / "supernode.env").read_text(encoding="utf-8")
    node_config = re.findall(r"^NODE_CONFIG='(.*)'$", environment, re.MULTILINE)[0]
    assert parse_config_args([node_config]) == {
        "partition-id": 0,
        "num-partitions": 3,
        "data-root": "/srv/fedfusion/data",
    }


def test_operators_connection_is_what_flower_reads() -> None:
    (text,) = re.findall(r"```toml\n(.*?)```", GUIDE, re.DOTALL)
    stored = tomllib.loads(text)["superlink"]
    connection = parse_superlink_connection(stored[stored["default"]], stored["default"])
    assert connection.address == "127.0.0.1:8000"
    assert connection.root_certificates == "/etc/fedfusion/ca.pem"
    assert connection.insecure is False


def test_guide_and_unit_start_the_superlink_alike() -> None:
    shown = [words for words in commands() if words[0] == "flower-superlink"]
    assert shown[0] == shown[1] == ["flower-superlink", *unit_command(UNITS[0])[1:]]


@pytest.mark.skipif(shutil.which("systemd-analyze") is None, reason="systemd is not here")
def test_units_are_well_formed(tmp_path: Path) -> None:
    for unit in UNITS:
        text = unit.read_text(encoding="utf-8").replace("/opt/fedfusion/venv/bin", str(BIN))
        (tmp_path / unit.name).write_text(text, encoding="utf-8")
        done = subprocess.run(
            ["systemd-analyze", "verify", "--man=no", str(tmp_path / unit.name)],
            capture_output=True,
            text=True,
            timeout=60,
            check=False,
        )
        assert done.stdout + done.stderr == ""


def test_compose_services_share_an_image_and_differ_in_key_and_partition() -> None:
    services = COMPOSE["services"]
    assert set(services) == {"superlink", "supernode-0", "supernode-1", "supernode-2"}
    for number in range(3):
        words = services[f"supernode-{number}"]["command"]
        assert f"--auth-supernode-private-key=/certificates/supernode-{number}" in words
        assert f"--node-config=partition-id={number} num-partitions=3" in words
    assert services["superlink"]["ports"] == ["127.0.0.1:8000:8000"]
    dockerfile = (ROOT / "deploy" / "Dockerfile").read_text(encoding="utf-8")
    for line in re.findall(r"^COPY (.*) \S+$", dockerfile, re.MULTILINE):
        assert all((ROOT / name).exists() for name in line.split())


@pytest.mark.skipif(
    not (shutil.which("openssl") and shutil.which("ssh-keygen")), reason="openssl or ssh-keygen"
)
def test_certificate_commands_make_what_a_strict_client_accepts(tmp_path: Path) -> None:
    block = next(text for text in BLOCKS if text.startswith("# certificates"))
    subprocess.run(["bash", "-euo", "pipefail", "-c", block], cwd=tmp_path, check=True)
    made = ServerCertificate(*(tmp_path / name for name in ("ca.pem", "server.pem", "server.key")))
    for name in ("superlink.example.org", "127.0.0.1"):
        shake_hands(made, made.authority, name)
    for number in range(3):
        assert try_load_public_key(tmp_path / f"supernode-{number}.pub")
