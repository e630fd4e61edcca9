"""Meet and Lend: where an owner's blocks can be read, what is asked of it and what it tells."""

from collections.abc import Sequence

from tailrace.errors import InvalidRequestError
from tailrace.kv.hashing import HASH_BYTES
from tailrace.kv.layout import KVLayout
from tailrace.messages import BlockOffer, FirstToken, KvSource, LendDone, LendTerms, LentBlocks
from tailrace.rpc.convert.layout import layout_from_proto, layout_to_proto
from tailrace.rpc.convert.sampling import logprob_from_proto, logprob_to_proto, reason_from_proto, reason_to_proto
from tailrace.rpc.gen import kv_pb2
from tailrace.transfer.endpoints import NixlEndpoint, PeerEndpoints, StreamEndpoint

MAX_HASHES = 65_536
"""Of one lend or offer: a prompt of a million tokens in blocks of 16."""
MAX_NAME_LENGTH = 300
MAX_TENANT_BYTES = 64


def endpoints_to_proto(peer: PeerEndpoints, layout: KVLayout) -> kv_pb2.MeetResponse:
    message = kv_pb2.MeetResponse(
        worker_id=peer.worker_id,
        epoch=peer.epoch,
        layout=layout_to_proto(layout),
        block_bytes=peer.block_bytes,
        num_blocks=peer.num_blocks,
    )
    if peer.nixl is not None:
        nixl = peer.nixl
        message.nixl.CopyFrom(
            kv_pb2.NixlEndpoint(
                agent_name=nixl.agent_name,
                agent_metadata=nixl.agent_metadata,
                pool_address=nixl.pool_address,
                stamps_address=nixl.stamps_address,
                nonce_address=nixl.nonce_address,
                nonce=nixl.nonce,
                pid=nixl.pid,
                boot_id=nixl.boot_id,
                memory=nixl.memory,
                device=nixl.device,
                rdma_devices=nixl.rdma_devices,
            )
        )
    if peer.stream is not None:
        stream = peer.stream
        message.stream.CopyFrom(kv_pb2.StreamEndpoint(host=stream.host, port=stream.port, tls=stream.tls))
    return message


def endpoints_from_proto(message: kv_pb2.MeetResponse) -> PeerEndpoints:
    nixl, stream = message.nixl, message.stream
    return PeerEndpoints(
        worker_id=message.worker_id,
        epoch=message.epoch,
        block_bytes=message.block_bytes,
        num_blocks=message.num_blocks,
        nixl=NixlEndpoint(
            agent_name=nixl.agent_name,
            agent_metadata=nixl.agent_metadata,
            pool_address=nixl.pool_address,
            stamps_address=nixl.stamps_address,
            nonce_address=nixl.nonce_address,
            nonce=nixl.nonce,
            pid=nixl.pid,
            boot_id=nixl.boot_id,
            memory=nixl.memory,
            device=nixl.device,
            rdma_devices=tuple(nixl.rdma_devices),
        )
        if message.HasField("nixl")
        else None,
        stream=StreamEndpoint(stream.host, stream.port, stream.tls) if message.HasField("stream") else None,
    )


def terms_to_proto(terms: LendTerms) -> kv_pb2.LendRequest:
    return kv_pb2.LendRequest(
        request_id=terms.request_id,
        attempt=terms.attempt,
        ticket=terms.ticket,
        needer_id=terms.needer_id,
        needer_epoch=terms.needer_epoch,
        skip_blocks=terms.skip_blocks,
        transport=terms.transport,
        block_hashes=terms.block_hashes,
    )


def terms_from_proto(message: kv_pb2.LendRequest) -> LendTerms:
    """Raises InvalidRequestError for hashes that no block has."""
    return LendTerms(
        block_hashes=hashes_from_proto(message.block_hashes),
        request_id=message.request_id,
        attempt=message.attempt,
        ticket=message.ticket,
        needer_id=message.needer_id,
        needer_epoch=message.needer_epoch,
        transport=message.transport,
        skip_blocks=message.skip_blocks,
    )


def offer_to_proto(offer: BlockOffer) -> kv_pb2.OfferRequest:
    return kv_pb2.OfferRequest(
        worker_id=offer.source.worker_id,
        epoch=offer.source.epoch,
        address=offer.source.address,
        layout=layout_to_proto(offer.layout),
        block_hashes=offer.block_hashes,
        tenant=offer.tenant,
    )


def offer_from_proto(message: kv_pb2.OfferRequest) -> BlockOffer:
    """Raises InvalidRequestError naming the field, ConfigError for a layout that cannot be."""
    for name, value in (("worker_id", message.worker_id), ("address", message.address)):
        if not 0 < len(value) <= MAX_NAME_LENGTH:
            raise InvalidRequestError(f"{name}: 1 to {MAX_NAME_LENGTH} characters are needed", param=name)
    if len(message.tenant.encode()) > MAX_TENANT_BYTES:
        raise InvalidRequestError(f"tenant: at most {MAX_TENANT_BYTES} bytes", param="tenant")
    return BlockOffer(
        source=KvSource(message.worker_id, message.epoch, message.address, b""),
        layout=layout_from_proto(message.layout),
        block_hashes=hashes_from_proto(message.block_hashes),
        tenant=message.tenant,
    )


def hashes_from_proto(values: Sequence[bytes]) -> tuple[bytes, ...]:
    """Raises InvalidRequestError for hashes that no block has."""
    if len(values) > MAX_HASHES:
        raise InvalidRequestError(f"block_hashes: at most {MAX_HASHES}, not {len(values)}", param="block_hashes")
    if any(len(value) != HASH_BYTES for value in values):
        raise InvalidRequestError(f"block_hashes: each has {HASH_BYTES} bytes", param="block_hashes")
    if len(set(values)) != len(values):
        raise InvalidRequestError("block_hashes: each may be named once", param="block_hashes")
    return tuple(values)


def lent_to_proto(lent: LentBlocks) -> kv_pb2.LendResponse:
    return kv_pb2.LendResponse(
        ready=kv_pb2.LendReady(
            first_index=lent.first_index,
            blocks=lent.blocks,
            addresses=lent.addresses,
            generations=lent.generations,
            tiers=lent.tiers,
        )
    )


def done_to_proto(done: LendDone) -> kv_pb2.LendResponse:
    return kv_pb2.LendResponse(
        done=kv_pb2.LendDone(
            first_tokens=[
                kv_pb2.FirstToken(
                    choice=token.choice,
                    token_id=token.token_id,
                    logprob=None if token.logprob is None else logprob_to_proto(token.logprob),
                    finish_reason=reason_to_proto(token.finish_reason),
                )
                for token in done.first_tokens
            ],
            last_block_tokens=done.last_block_tokens,
            cached_tokens=done.cached_tokens,
            queue_s=done.queue_s,
            prefill_s=done.prefill_s,
        )
    )


def lend_event_from_proto(message: kv_pb2.LendResponse) -> LentBlocks | LendDone:
    if message.HasField("ready"):
        ready = message.ready
        lent = LentBlocks(
            ready.first_index, list(ready.blocks), list(ready.addresses), list(ready.generations), ready.tiers
        )
        lengths = {len(lent.blocks), len(lent.addresses), len(lent.generations)}
        if len(lengths) != 1 or len(lent.tiers) not in (0, len(lent.blocks)):
            raise InvalidRequestError("blocks, addresses, generations and tiers differ in length", param="ready")
        return lent
    done = message.done
    return LendDone(
        first_tokens=tuple(_first_token(token) for token in done.first_tokens),
        last_block_tokens=done.last_block_tokens,
        cached_tokens=done.cached_tokens,
        queue_s=done.queue_s,
        prefill_s=done.prefill_s,
    )


def _first_token(message: kv_pb2.FirstToken) -> FirstToken:
    logprob = logprob_from_proto(message.logprob) if message.HasField("logprob") else None
    return FirstToken(message.choice, message.token_id, logprob, reason_from_proto(message.finish_reason))
