# SPDX-License-Identifier: Apache-2.0
"""deploy/nginx.conf lets SuperNodes through and nothing else."""

from __future__ import annotations

import http.client
import os
import shutil
import ssl
from collections.abc import Iterator
from pathlib import Path

import pytest

from scripts.local_federation import START_TIMEOUT, LocalFederation
from scripts.programs import HOST, Program, free_port, stop

CONFIG = Path(__file__).parents[2] / "deploy" / "nginx.conf"

pytestmark = [
    pytest.mark.engine,
    pytest.mark.skipif(shutil.which("nginx") is None, reason="nginx is not here"),
]


@pytest.fixture
def federation(tmp_path: Path) -> Iterator[LocalFederation]:
    """A SuperLink with one registered key and no SuperNode."""
    with LocalFederation(tmp_path, num_supernodes=0) as federation:
        federation.register(0)
        yield federation


@pytest.fixture
def proxy(federation: LocalFederation) -> Iterator[int]:
    """Port of an nginx with the project's configuration, adapted to this machine."""
    port = free_port()
    server = CONFIG.read_text(encoding="utf-8")
    for there, here in (
        ("listen 443", f"listen {HOST}:{port}"),
        ("127.0.0.1:8000", federation.address),
        ("superlink.example.org", "localhost"),
        ("/etc/fedfusion/server.pem", str(federation.certificate.certificate)),
        ("/etc/fedfusion/server.key", str(federation.certificate.key)),
        ("/etc/fedfusion/ca.pem", str(federation.certificate.authority)),
    ):
        assert there in server
        server = server.replace(there, here)
    folder = federation.folder
    names = ("client_body", "proxy", "fastcgi", "uwsgi", "scgi")
    paths = " ".join(f"{name}_temp_path {folder}/{name};" for name in names)
    (folder / "nginx.conf").write_text(
        f"daemon off; pid {folder}/nginx.pid; error_log stderr;\n"
        f"events {{}}\nhttp {{ access_log off; {paths}\n{server}}}\n",
        encoding="utf-8",
    )
    command = ["nginx", "-p", str(folder), "-c", str(folder / "nginx.conf"), "-e", "stderr"]
    nginx = Program("nginx", command, os.environ, folder)
    try:
        federation.wait_until(
            lambda: nginx.exit_code is not None or status(federation, port, "/") == 403,
            START_TIMEOUT,
            "nginx answers",
        )
        assert nginx.exit_code is None, nginx.output()
        yield port
    finally:
        stop([nginx])


def status(federation: LocalFederation, port: int, path: str) -> int | None:
    context = ssl.create_default_context(cafile=federation.certificate.authority)
    connection = http.client.HTTPSConnection(HOST, port, timeout=10, context=context)
    try:
        connection.request("POST", path, body=b"")
        return connection.getresponse().status
    except ConnectionError:
        return None
    finally:
        connection.close()


def test_a_supernode_comes_through_and_control_does_not(
    federation: LocalFederation, proxy: int
) -> None:
    for path in (
        "/v1/control/start-run",
        "/v1/control/register-node",
        "/v1/runtime/acquire-task",
        "/v1/fleet/../control/start-run",
        "/v1/fleet/%2e%2e/control/start-run",
        "//v1/control/start-run",
    ):
        assert status(federation, proxy, path) == 403, path
    # The SuperLink itself answers, and asks for no login.
    assert status(federation, federation.port, "/v1/control/start-run") not in (401, 403, 404)

    federation.address = f"{HOST}:{proxy}"
    federation.start_supernode(0)
    federation.wait_for_supernodes()
