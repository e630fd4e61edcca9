"""The only place of keepalive and message-size options, for both sides of every connection."""

MAX_MESSAGE_BYTES = 64 << 20
"""A Submit of a million tokens is 4 MB; a snapshot is streamed in pieces."""

PEER_LOSS_S = 3.0
"""A peer that says nothing for this long is taken for dead."""

_KEEPALIVE: list[tuple[str, int]] = [
    ("grpc.keepalive_time_ms", 1000),
    ("grpc.keepalive_timeout_ms", 1500),
    # Without it a stopped peer goes unseen for 28 s; with it 1.6 s (measured).
    ("grpc.http2.ping_timeout_ms", 1500),
    ("grpc.keepalive_permit_without_calls", 1),
    ("grpc.http2.max_pings_without_data", 0),
]
_SIZES: list[tuple[str, int]] = [
    ("grpc.max_receive_message_length", MAX_MESSAGE_BYTES),
    ("grpc.max_send_message_length", MAX_MESSAGE_BYTES),
]

CHANNEL_OPTIONS: list[tuple[str, int]] = [
    *_KEEPALIVE,
    *_SIZES,
    # Members talk to one another, not through a proxy that somebody's http_proxy names.
    ("grpc.enable_http_proxy", 0),
    # A worker that restarts on its address is tried again soon, not after the default's growing two minutes.
    ("grpc.initial_reconnect_backoff_ms", 100),
    ("grpc.max_reconnect_backoff_ms", 1000),
]

SERVER_OPTIONS: list[tuple[str, int]] = [
    *_KEEPALIVE,
    *_SIZES,
    # Below the peers' keepalive time: else they are sent away with GOAWAY too_many_pings after 3 s.
    ("grpc.http2.min_recv_ping_interval_without_data_ms", 500),
    ("grpc.http2.min_ping_interval_without_data_ms", 500),
    # Two servers on one port would share its connections without a word.
    ("grpc.so_reuseport", 0),
]
