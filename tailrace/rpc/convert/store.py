"""What an operator asks of a store: pins, quotas, usage."""

from dataclasses import asdict

from tailrace.errors import InvalidRequestError
from tailrace.messages import StoreUsage, TenantUsage, TierUsage
from tailrace.rpc.convert.layout import layout_from_proto, layout_to_proto
from tailrace.rpc.convert.lending import MAX_TENANT_BYTES, hashes_from_proto
from tailrace.rpc.gen import kv_pb2

MAX_OWNER_LENGTH = 64
MAX_QUOTA_BYTES = 1 << 46


def pin_from_proto(message: kv_pb2.PinRequest | kv_pb2.UnpinRequest) -> tuple[bytes, ...]:
    """The hashes. Raises InvalidRequestError naming the field."""
    if not 0 < len(message.owner) <= MAX_OWNER_LENGTH:
        raise InvalidRequestError(f"owner: 1 to {MAX_OWNER_LENGTH} characters are needed", param="owner")
    return hashes_from_proto(message.block_hashes)


def check_quota(message: kv_pb2.SetQuotaRequest) -> None:
    """Raises InvalidRequestError naming the field."""
    if len(message.tenant.encode()) > MAX_TENANT_BYTES:
        raise InvalidRequestError(f"tenant: at most {MAX_TENANT_BYTES} bytes", param="tenant")
    for name, value in (("memory_bytes", message.memory_bytes), ("disk_bytes", message.disk_bytes)):
        if value > MAX_QUOTA_BYTES:
            raise InvalidRequestError(f"{name}: at most {MAX_QUOTA_BYTES}, not {value}", param=name)


def usage_to_proto(usage: StoreUsage) -> kv_pb2.GetUsageResponse:
    return kv_pb2.GetUsageResponse(
        layout=layout_to_proto(usage.layout),
        memory=kv_pb2.StoreTierUsage(**asdict(usage.memory)),
        disk=kv_pb2.StoreTierUsage(**asdict(usage.disk)) if usage.disk is not None else None,
        tenants=[kv_pb2.StoreTenantUsage(**asdict(tenant)) for tenant in usage.tenants],
        owners=[kv_pb2.StoreOwnerUsage(owner=owner, pinned_blocks=number) for owner, number in usage.pinned.items()],
        pin_limit=usage.pin_limit,
        disk_trouble=usage.disk_trouble,
    )


def usage_from_proto(message: kv_pb2.GetUsageResponse) -> StoreUsage:
    return StoreUsage(
        layout=layout_from_proto(message.layout),
        memory=_tier(message.memory),
        disk=_tier(message.disk) if message.HasField("disk") else None,
        tenants=tuple(
            TenantUsage(
                each.tenant,
                each.memory_blocks,
                each.disk_blocks,
                each.memory_quota if each.HasField("memory_quota") else None,
                each.disk_quota if each.HasField("disk_quota") else None,
            )
            for each in message.tenants
        ),
        pinned={each.owner: each.pinned_blocks for each in message.owners},
        pin_limit=message.pin_limit,
        disk_trouble=message.disk_trouble,
    )


def _tier(message: kv_pb2.StoreTierUsage) -> TierUsage:
    return TierUsage(message.total, message.free, message.cached, message.lent, message.landing, message.quarantined)
