"""What a block is, and which ones a worker has cached."""

from tailrace.errors import InvalidRequestError
from tailrace.kv.events import KVEvents
from tailrace.kv.layout import KVLayout, LayerGroup
from tailrace.messages import KvEventBatch
from tailrace.rpc.gen import kv_pb2


def layout_to_proto(layout: KVLayout) -> kv_pb2.KvLayout:
    return kv_pb2.KvLayout(
        fingerprint=layout.fingerprint,
        model_digest=layout.model_digest,
        weights_digest=layout.weights_digest,
        quantization=layout.quantization,
        numerics_version=layout.numerics_version,
        num_layers=layout.num_layers,
        num_kv_heads=layout.num_kv_heads,
        head_dim=layout.head_dim,
        block_size=layout.block_size,
        kv_dtype=layout.kv_dtype,
        kv_scales=layout.kv_scales,
        tensor_parallel_rank=layout.tensor_parallel_rank,
        tensor_parallel_size=layout.tensor_parallel_size,
        groups=[kv_pb2.LayerGroup(kind=g.kind, layers=g.layers, window=g.window) for g in layout.groups],
    )


def layout_from_proto(message: kv_pb2.KvLayout) -> KVLayout:
    """Raises ConfigError, naming the field, for a layout that cannot be."""
    return KVLayout(
        model_digest=message.model_digest,
        weights_digest=message.weights_digest,
        quantization=message.quantization,
        numerics_version=message.numerics_version,
        num_layers=message.num_layers,
        num_kv_heads=message.num_kv_heads,
        head_dim=message.head_dim,
        block_size=message.block_size,
        kv_dtype=message.kv_dtype,
        kv_scales=message.kv_scales,
        tensor_parallel_rank=message.tensor_parallel_rank,
        tensor_parallel_size=message.tensor_parallel_size,
        groups=tuple(LayerGroup(g.kind, tuple(g.layers), g.window) for g in message.groups),
    )


def kv_events_to_proto(batch: KvEventBatch) -> kv_pb2.KvEvents:
    return kv_pb2.KvEvents(
        epoch=batch.epoch,
        first_sequence=batch.first_sequence,
        kinds=batch.events.kinds,
        hashes=batch.events.hashes,
    )


def kv_events_from_proto(message: kv_pb2.KvEvents) -> KvEventBatch:
    """Raises InvalidRequestError, naming the field, where the columns differ in length."""
    try:
        events = KVEvents(message.kinds, message.hashes)
    except ValueError as error:
        raise InvalidRequestError(f"kv_events.{error}", param="kv_events.hashes") from None
    return KvEventBatch(message.epoch, message.first_sequence, events)
