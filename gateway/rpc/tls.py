"""TLS credentials that follow their files: a renewed certificate is served without a restart.

grpc-core asks before each handshake whether there is something new, in a thread of its own; a look
costs a stat of each file. Connections that stand keep what they began with.
"""

import logging
import ssl
import threading
from collections.abc import Callable
from pathlib import Path
from typing import cast

import grpc

_log = logging.getLogger(__name__)


class TlsFilesUnusable(Exception):
    """The files cannot be served from; the text says why and quotes nothing of them."""


class TlsFiles:
    """The certificate with its chain, the key, and, for mutual TLS, the authority of clients.

    A set that is not whole (a key of another certificate, half of a file, no file) leaves the
    previous one in place, and is told once.
    """

    def __init__(self, certificate: Path, key: Path, client_ca: Path | None) -> None:
        self._certificate = certificate
        self._key = key
        self._client_ca = client_ca
        self._lock = threading.Lock()
        self._seen: object = None
        self._served: tuple[bytes, ...] = ()

    def credentials(self) -> grpc.ServerCredentials:
        """The credentials of a server. Raises TlsFilesUnusable."""
        self._seen = self._look()
        self._served = self._read()
        return grpc.dynamic_ssl_server_credentials(
            self._configuration(self._served),
            # None is what grpc documents for "nothing new"; its stubs forget it.
            cast("Callable[[], grpc.ServerCertificateConfiguration]", self._renewed),
            require_client_authentication=self._client_ca is not None,
        )

    def _renewed(self) -> grpc.ServerCertificateConfiguration | None:
        """What is to be served from now on; None where nothing has changed."""
        with self._lock:
            seen = self._look()
            if seen == self._seen:
                return None
            self._seen = seen
            try:
                texts = self._read()
            except TlsFilesUnusable as error:
                _log.error("the renewed TLS files are not served, the old ones are: %s", error)
                return None
            if texts == self._served:
                return None
            self._served = texts
            _log.info("the renewed TLS files are served")
            return self._configuration(texts)

    def _paths(self) -> tuple[Path, ...]:
        files = (self._certificate, self._key)
        return files if self._client_ca is None else (*files, self._client_ca)

    def _look(self) -> object:
        return tuple(_state(path) for path in self._paths())

    def _read(self) -> tuple[bytes, ...]:
        texts = self._texts()
        _check(self._certificate, self._key, texts[2:])
        # They are read twice, by OpenSSL's check and here: nobody may have changed them between.
        if self._texts() != texts:
            raise TlsFilesUnusable("they changed while they were read")
        return texts

    def _texts(self) -> tuple[bytes, ...]:
        try:
            return tuple(path.read_bytes() for path in self._paths())
        except OSError as error:
            raise TlsFilesUnusable(f"cannot read a TLS file: {error}") from error

    @staticmethod
    def _configuration(texts: tuple[bytes, ...]) -> grpc.ServerCertificateConfiguration:
        certificate, key, *client_ca = texts
        return grpc.ssl_server_certificate_configuration(
            [(key, certificate)], root_certificates=client_ca[0] if client_ca else None
        )


def _state(path: Path) -> tuple[int, int, int] | None:
    try:
        found = path.stat()
    except OSError:
        return None
    return found.st_ino, found.st_mtime_ns, found.st_size


def _check(certificate: Path, key: Path, client_ca: tuple[bytes, ...]) -> None:
    """Raise TlsFilesUnusable unless the key is the certificate's and the authority is one."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
    # An encrypted key is asked for its password; without this, at the terminal.
    no_password: Callable[[], str] = str
    try:
        context.load_cert_chain(certificate, key, password=no_password)
        for text in client_ca:
            context.load_verify_locations(cadata=text.decode("ascii", "replace"))
    except (OSError, ValueError) as error:
        raise TlsFilesUnusable(
            f"the certificate, its key or the clients' authority cannot be used: {error}"
        ) from error
