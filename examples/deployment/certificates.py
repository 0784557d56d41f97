"""Make what a TLS deployment with authenticated nodes needs: a CA, the server's certificate, a key for each node.

    python certificates.py FOLDER HOST NODE...      for example: certificates.py certificates 127.0.0.1 node-1 node-2

HOST is the name or IP address under which the nodes reach the SuperLink. Writes ca.crt, server.pem, server.key, and for
each node NODE (private, for that node alone) and NODE.pub (to register). The CA's own key is thrown away: to add a node
later, make its key with `ssh-keygen -t ecdsa -b 384`; for a new server certificate, run this anew.
"""

import ipaddress
import os
import sys
from datetime import UTC, datetime, timedelta
from pathlib import Path

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat, PublicFormat
from cryptography.x509.oid import NameOID

VALID_DAYS = 365


def make_certificates(folder: Path, host: str, nodes: list[str]) -> None:
    """Write all files into `folder`, private ones readable by their owner only."""
    folder.mkdir(parents=True, exist_ok=True)
    ca_key, server_key = ec.generate_private_key(ec.SECP384R1()), ec.generate_private_key(ec.SECP384R1())
    ca = _certificate("ZeroFL deployment CA", ca_key, None, ca_key, host=None)
    server = _certificate(host, server_key, ca.subject, ca_key, host)
    (folder / "ca.crt").write_bytes(ca.public_bytes(Encoding.PEM))
    (folder / "server.pem").write_bytes(server.public_bytes(Encoding.PEM))
    _write_private(folder / "server.key", server_key, PrivateFormat.PKCS8)
    for node in nodes:
        key = ec.generate_private_key(ec.SECP384R1())
        _write_private(folder / node, key, PrivateFormat.OpenSSH)
        public = key.public_key().public_bytes(Encoding.OpenSSH, PublicFormat.OpenSSH)
        (folder / f"{node}.pub").write_bytes(public + b"\n")


def _certificate(
    name: str,
    key: ec.EllipticCurvePrivateKey,
    issuer: x509.Name | None,
    issuer_key: ec.EllipticCurvePrivateKey,
    host: str | None,
) -> x509.Certificate:
    """A certificate of `key`: of a server at `host`, or a CA's own without one."""
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    start = datetime.now(UTC) - timedelta(minutes=5)  # clocks differ
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(issuer or subject)
        .public_key(key.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(start)
        .not_valid_after(start + timedelta(days=VALID_DAYS))
        .add_extension(x509.BasicConstraints(ca=host is None, path_length=None), critical=True)
        .add_extension(x509.SubjectKeyIdentifier.from_public_key(key.public_key()), critical=False)
        .add_extension(x509.AuthorityKeyIdentifier.from_issuer_public_key(issuer_key.public_key()), critical=False)
    )
    if host is not None:
        builder = builder.add_extension(x509.SubjectAlternativeName(_names(host)), critical=False)
    return builder.sign(issuer_key, hashes.SHA256())


def _names(host: str) -> list[x509.GeneralName]:
    """The host, and this machine itself: the SuperLink's own processes reach it there."""
    names: list[x509.GeneralName] = [x509.DNSName("localhost"), x509.IPAddress(ipaddress.ip_address("127.0.0.1"))]
    try:
        given: x509.GeneralName = x509.IPAddress(ipaddress.ip_address(host))
    except ValueError:
        given = x509.DNSName(host)
    return names if given in names else [given, *names]


def _write_private(path: Path, key: ec.EllipticCurvePrivateKey, form: PrivateFormat) -> None:
    path.unlink(missing_ok=True)
    with os.fdopen(os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL, 0o600), "wb") as file:
        file.write(key.private_bytes(Encoding.PEM, form, NoEncryption()))


if __name__ == "__main__":
    if len(sys.argv) < 3:
        sys.exit(__doc__)
    make_certificates(Path(sys.argv[1]), sys.argv[2], sys.argv[3:])
