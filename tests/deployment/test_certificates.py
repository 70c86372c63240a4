# SPDX-License-Identifier: Apache-2.0
"""Certificates that a strict client accepts, and keys that Flower reads."""

from __future__ import annotations

import socket
import ssl
import stat
import threading
from pathlib import Path

import pytest
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import load_ssh_private_key
from flwr.cli.supernode.register import try_load_public_key
from flwr.supercore.primitives.asymmetric import public_key_to_bytes

from scripts.certificates import (
    ServerCertificate,
    create_server_certificate,
    create_supernode_key,
)


def shake_hands(server: ServerCertificate, authority: Path, name: str) -> None:
    """Make a TLS handshake, with the checks that are Python 3.13's default."""
    server_context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    server_context.load_cert_chain(server.certificate, server.key)
    client_context = ssl.create_default_context(cafile=authority)
    client_context.verify_flags |= ssl.VERIFY_X509_STRICT
    ours, theirs = socket.socketpair()

    def serve() -> None:
        try:
            server_context.wrap_socket(theirs, server_side=True).close()
        except OSError:
            theirs.close()

    thread = threading.Thread(target=serve)
    thread.start()
    try:
        with client_context.wrap_socket(ours, server_hostname=name):
            pass
    finally:
        ours.close()
        thread.join()


@pytest.mark.parametrize("name", ["127.0.0.1", "localhost"])
def test_strict_client_accepts_the_server(tmp_path: Path, name: str) -> None:
    made = create_server_certificate(tmp_path, ["127.0.0.1", "localhost"])
    shake_hands(made, made.authority, name)


def test_other_authority_and_other_name_are_refused(tmp_path: Path) -> None:
    made = create_server_certificate(tmp_path / "a", ["localhost"])
    other = create_server_certificate(tmp_path / "b", ["localhost"])
    with pytest.raises(ssl.SSLCertVerificationError):
        shake_hands(made, other.authority, "localhost")
    with pytest.raises(ssl.SSLCertVerificationError, match=r"127\.0\.0\.1"):
        shake_hands(made, made.authority, "127.0.0.1")


def test_private_files_are_private(tmp_path: Path) -> None:
    made = create_server_certificate(tmp_path, ["localhost"])
    private, _ = create_supernode_key(tmp_path, "supernode-0")
    for path in (made.key, tmp_path / "ca.key", private):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600


def test_flower_reads_the_supernode_keys(tmp_path: Path) -> None:
    private, public = create_supernode_key(tmp_path, "supernode-0")
    key = load_ssh_private_key(private.read_bytes(), None)
    assert isinstance(key, ec.EllipticCurvePrivateKey)
    assert try_load_public_key(public) == public_key_to_bytes(key.public_key())
