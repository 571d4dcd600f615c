"""An authority for tests, and the certificates that it signs."""

from __future__ import annotations

import ipaddress
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Self

from cryptography import x509
from cryptography.hazmat.primitives import hashes
from cryptography.hazmat.primitives.asymmetric import ec
from cryptography.hazmat.primitives.serialization import Encoding, NoEncryption, PrivateFormat
from cryptography.x509.oid import NameOID

if TYPE_CHECKING:
    from collections.abc import Sequence
    from pathlib import Path

_LIFE = timedelta(days=1)
_SIGNS_CERTIFICATES = x509.KeyUsage(
    digital_signature=False,
    content_commitment=False,
    key_encipherment=False,
    data_encipherment=False,
    key_agreement=False,
    key_cert_sign=True,
    crl_sign=True,
    encipher_only=False,
    decipher_only=False,
)


@dataclass(frozen=True, slots=True)
class Certificate:
    """A certificate and its key."""

    certificate: x509.Certificate
    private: ec.EllipticCurvePrivateKey

    @property
    def pem(self) -> bytes:
        return self.certificate.public_bytes(Encoding.PEM)

    @property
    def key_pem(self) -> bytes:
        return self.private.private_bytes(Encoding.PEM, PrivateFormat.PKCS8, NoEncryption())

    @property
    def serial(self) -> int:
        return self.certificate.serial_number


class Authority:
    """Signs certificates of servers and clients."""

    def __init__(self) -> None:
        # OpenSSL finds an authority by its name.
        self._own = _make(f"authority {uuid.uuid4().hex}", (), None)

    @property
    def pem(self) -> bytes:
        return self._own.pem

    def server(self) -> Certificate:
        """One for this machine."""
        address = ipaddress.ip_address("127.0.0.1")
        return _make("server", (x509.DNSName("localhost"), x509.IPAddress(address)), self._own)

    def client(self, *uris: str) -> Certificate:
        """One with these URIs."""
        names = [x509.UniformResourceIdentifier(each) for each in uris]
        return _make("client", names, self._own)


def _make(name: str, names: Sequence[x509.GeneralName], issuer: Certificate | None) -> Certificate:
    private = ec.generate_private_key(ec.SECP256R1())
    subject = x509.Name([x509.NameAttribute(NameOID.COMMON_NAME, name)])
    now = datetime.now(UTC)
    builder = (
        x509.CertificateBuilder()
        .subject_name(subject)
        .issuer_name(subject if issuer is None else issuer.certificate.subject)
        .public_key(private.public_key())
        .serial_number(x509.random_serial_number())
        .not_valid_before(now - _LIFE)
        .not_valid_after(now + _LIFE)
        .add_extension(x509.BasicConstraints(ca=issuer is None, path_length=None), critical=True)
    )
    signer = private if issuer is None else issuer.private
    # What RFC 5280 wants of each: Python looks from 3.13 on (VERIFY_X509_STRICT).
    own_id = x509.SubjectKeyIdentifier.from_public_key(private.public_key())
    builder = builder.add_extension(own_id, critical=False)
    if issuer is None:
        builder = builder.add_extension(_SIGNS_CERTIFICATES, critical=True)
    else:
        issuer_id = x509.AuthorityKeyIdentifier.from_issuer_public_key(signer.public_key())
        builder = builder.add_extension(issuer_id, critical=False)
    if names:
        builder = builder.add_extension(x509.SubjectAlternativeName(names), critical=False)
    return Certificate(builder.sign(signer, hashes.SHA256()), private)


@dataclass(frozen=True, slots=True)
class TlsFiles:
    """The files that the settings of a server name."""

    certificate: Path
    key: Path
    client_ca: Path

    @classmethod
    def write(cls, directory: Path, server: Certificate, client_ca: bytes) -> Self:
        files = cls(directory / "tls.crt", directory / "tls.key", directory / "ca.crt")
        files.replace(server, client_ca)
        return files

    def replace(self, server: Certificate, client_ca: bytes) -> None:
        """Put others in their place, as whoever renews certificates does: each whole at once."""
        for path, text in (
            (self.key, server.key_pem),
            (self.certificate, server.pem),
            (self.client_ca, client_ca),
        ):
            put(path, text)


def put(path: Path, text: bytes) -> None:
    """Replace a file in one step."""
    new = path.with_suffix(".new")
    new.write_bytes(text)
    new.replace(path)
