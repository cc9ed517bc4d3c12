"""How the ledger's services are reached, and what their servers allow: pinned, bounded, watched."""

import ssl

import grpc
import grpc.aio

from plait.net.tls import SERVER_NAME

Options = list[tuple[str, str | int]]


def pinned_channel(address: str, certificate: bytes, *, message_bytes_max: int) -> grpc.aio.Channel:
    """A channel to exactly the holder of a certificate (DER) that the network file names.

    A dead link fails the calls on it within 2 s; a lost one is tried again once a second.
    """
    root = ssl.DER_cert_to_PEM_cert(certificate).encode()
    options: Options = [
        ("grpc.ssl_target_name_override", SERVER_NAME),
        ("grpc.enable_http_proxy", 0),
        ("grpc.use_local_subchannel_pool", 1),
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.initial_reconnect_backoff_ms", 200),
        ("grpc.max_reconnect_backoff_ms", 1_000),
        ("grpc.keepalive_time_ms", 500),
        ("grpc.keepalive_timeout_ms", 1_500),
        ("grpc.http2.ping_timeout_ms", 1_500),  # see ``net.tls``
    ]
    credentials = grpc.ssl_channel_credentials(root_certificates=root)
    return grpc.aio.secure_channel(address, credentials, options=options)


def server_options(*, message_bytes_max: int, streams_max: int) -> Options:
    """Options of a server that such channels reach."""
    return [
        ("grpc.max_receive_message_length", message_bytes_max),
        ("grpc.so_reuseport", 0),
        ("grpc.max_concurrent_streams", streams_max),
        ("grpc.server_handshake_timeout_ms", 3_000),
        ("grpc.http2.min_ping_interval_without_data_ms", 300),
        ("grpc.http2.max_ping_strikes", 0),
    ]
