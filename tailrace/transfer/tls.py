"""TLS contexts for the stream: both sides present a certificate and verify the other's."""

import ssl

from tailrace.errors import ConfigError
from tailrace.transfer.options import TlsFiles


def owner_context(files: TlsFiles) -> ssl.SSLContext:
    return _loaded(ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER), files)


def needer_context(files: TlsFiles) -> ssl.SSLContext:
    """Host names are not compared: workers are reached by address, and the handshake inside proves who answers."""
    context = ssl.SSLContext(ssl.PROTOCOL_TLS_CLIENT)
    context.check_hostname = False
    return _loaded(context, files)


def _loaded(context: ssl.SSLContext, files: TlsFiles) -> ssl.SSLContext:
    try:
        context.load_cert_chain(files.cert, files.key)
        context.load_verify_locations(files.ca)
    except (OSError, ssl.SSLError) as error:
        raise ConfigError(f"TLS files {files.cert}, {files.key}, {files.ca}: {error}", param="tls") from error
    context.verify_mode = ssl.CERT_REQUIRED
    context.minimum_version = ssl.TLSVersion.TLSv1_3
    return context
