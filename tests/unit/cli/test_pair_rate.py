import json

import pytest

from tailrace.cli.pair_rate import BLOCK_BYTES, NUM_BLOCKS, decode_peer, encode_peer, measure_pair
from tailrace.config import UpConfig
from tailrace.errors import TransferError
from tailrace.transfer import NixlEndpoint, PeerEndpoints, StreamEndpoint


def test_an_owner_is_the_same_after_its_way_through_json():
    nixl = NixlEndpoint("a", b"\xff\x00", 1 << 60, 2, 3, b"\x01" * 16, 4, "boot", "dram", 0, ("mlx5_0",))
    peer = PeerEndpoints("w", 1, 4096, 8, nixl, StreamEndpoint("127.0.0.1", 5, False))
    assert decode_peer(json.loads(json.dumps(encode_peer(peer)))) == peer


def test_two_processes_move_blocks_and_say_how_fast():
    rate = measure_pair(UpConfig(transport="stream"))
    assert (rate.pull.transport, rate.pull.num_bytes) == ("stream", NUM_BLOCKS * BLOCK_BYTES)
    assert rate.pull.bytes_per_s > 0
    assert rate.memcpy_bytes_per_s > 0


def test_a_pair_that_cannot_be_made_says_why(monkeypatch):
    # Whoever used NIXL in this process before has set it, for its children too.
    monkeypatch.delenv("UCX_NET_DEVICES", raising=False)
    monkeypatch.setenv("TAILRACE_NET_DEVICE", "no-such-device")
    with pytest.raises(TransferError, match="no pair could be made"):
        measure_pair(UpConfig(transport="nixl"))
