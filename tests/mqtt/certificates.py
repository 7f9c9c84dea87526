"""Certificates of a CA of one's own, and a Mosquitto that has one."""

import subprocess
from pathlib import Path

import pytest


def openssl(*args: str, cwd: Path) -> None:
    subprocess.run(["openssl", *args], cwd=cwd, check=True, capture_output=True)


@pytest.fixture
def certificates(tmp_path: Path) -> Path:
    """ca.pem, server.pem/.key for 127.0.0.1, client.pem/.key, and another.pem, a CA that signed none of them."""
    folder = tmp_path / "certificates"
    folder.mkdir()
    folder.chmod(0o755)
    for ca in ("ca", "another"):
        new = ("req", "-x509", "-newkey", "rsa:2048", "-nodes", "-days", "2")
        openssl(*new, "-subj", f"/CN=media tasks test {ca}", "-keyout", f"{ca}.key", "-out", f"{ca}.pem", cwd=folder)
    (folder / "names").write_text("subjectAltName=IP:127.0.0.1,DNS:localhost\n")
    for name in ("server", "client"):
        new = ("req", "-newkey", "rsa:2048", "-nodes", "-subj", f"/CN={name}")
        openssl(*new, "-keyout", f"{name}.key", "-out", f"{name}.csr", cwd=folder)
        sign = ("x509", "-req", "-in", f"{name}.csr", "-CA", "ca.pem", "-CAkey", "ca.key", "-CAcreateserial")
        openssl(*sign, "-days", "2", "-extfile", "names", "-out", f"{name}.pem", cwd=folder)
    return folder


def tls_lines(certificates: Path, *more: str) -> list[str]:
    """Of a Mosquitto that shows server.pem."""
    files = {"cafile": "ca.pem", "certfile": "server.pem", "keyfile": "server.key"}
    return [*(f"{name} {certificates / file}" for name, file in files.items()), *more]
