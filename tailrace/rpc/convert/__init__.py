"""The only translator between protobuf messages and the values of `tailrace.messages`.

What comes off the wire is checked here: a message that no peer of ours could have sent raises InvalidRequestError,
naming the field.
"""

from tailrace.rpc.convert.control import ledger_from_proto, ledger_to_proto
from tailrace.rpc.convert.errors import error_from_proto, error_to_proto
from tailrace.rpc.convert.layout import kv_events_from_proto, kv_events_to_proto, layout_from_proto, layout_to_proto
from tailrace.rpc.convert.lending import (
    done_to_proto,
    endpoints_from_proto,
    endpoints_to_proto,
    lend_event_from_proto,
    lent_to_proto,
    offer_from_proto,
    offer_to_proto,
    terms_from_proto,
    terms_to_proto,
)
from tailrace.rpc.convert.sampling import (
    logprob_from_proto,
    logprob_to_proto,
    reason_from_proto,
    reason_to_proto,
    sampling_from_proto,
    sampling_to_proto,
)
from tailrace.rpc.convert.store import check_quota, pin_from_proto, usage_from_proto, usage_to_proto
from tailrace.rpc.convert.worker import (
    MAX_CHOICES,
    MAX_PREFIX_SOURCES,
    columns_from_proto,
    info_from_proto,
    info_to_proto,
    load_from_proto,
    load_to_proto,
    report_from_proto,
    report_to_proto,
    step_events_from_proto,
    step_events_to_proto,
    submission_from_proto,
    submission_to_proto,
)

__all__ = [
    "MAX_CHOICES",
    "MAX_PREFIX_SOURCES",
    "check_quota",
    "columns_from_proto",
    "done_to_proto",
    "endpoints_from_proto",
    "endpoints_to_proto",
    "error_from_proto",
    "error_to_proto",
    "info_from_proto",
    "info_to_proto",
    "kv_events_from_proto",
    "kv_events_to_proto",
    "layout_from_proto",
    "layout_to_proto",
    "ledger_from_proto",
    "ledger_to_proto",
    "lend_event_from_proto",
    "lent_to_proto",
    "load_from_proto",
    "load_to_proto",
    "logprob_from_proto",
    "logprob_to_proto",
    "offer_from_proto",
    "offer_to_proto",
    "pin_from_proto",
    "reason_from_proto",
    "reason_to_proto",
    "report_from_proto",
    "report_to_proto",
    "sampling_from_proto",
    "sampling_to_proto",
    "step_events_from_proto",
    "step_events_to_proto",
    "submission_from_proto",
    "submission_to_proto",
    "terms_from_proto",
    "terms_to_proto",
    "usage_from_proto",
    "usage_to_proto",
]
