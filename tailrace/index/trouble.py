"""What is wrong with Redis, in the words of whoever must mend it."""

from tailrace.errors import TailraceError

_HINTS = (
    ("No master found", "its Sentinels name no master that is up: {text}"),
    ("NOPERM", "its ACL user lacks a right: {text}; docs/redis.md lists the rights that are needed"),
    ("no permissions", "its ACL user lacks a right: {text}; docs/redis.md lists the rights that are needed"),
    ("WRONGPASS", "it refuses the user or the password"),
    ("invalid username-password", "it refuses the user or the password"),
    ("NOAUTH", "it wants a user and a password, and the URL has none"),
    ("already authenticated", "it wants a user and a password, and the URL has none"),
    ("Authentication required", "it wants a user and a password, and the URL has none"),
    ("READONLY", "it is read-only, a replica: the URL must name the master"),
    ("read only replica", "it is read-only, a replica: the URL must name the master"),
    ("NOREPLICAS", "it takes no writes: fewer replicas than min-replicas-to-write"),
    ("Not enough good replicas", "it takes no writes: fewer replicas than min-replicas-to-write"),
    ("MISCONF", "it takes no writes: it cannot save to its disk, and its log says why"),
    ("OOM", "it takes no writes: maxmemory is reached, and nothing may be evicted; docs/redis.md names the policy"),
    (
        "maxmemory",
        "it takes no writes: maxmemory is reached, and nothing may be evicted; docs/redis.md names the policy",
    ),
    ("WRONGTYPE", "a key of ours holds a value of another type: {text}"),
)


class RedisTroubleError(TailraceError):
    """Redis cannot be used now: away, slow, refusing, or of another version. Costs hits, never a request."""

    retryable = True


def explain(error: BaseException, address: str) -> RedisTroubleError:
    """`address`: host:port, without credentials."""
    text = " ".join(str(error).split())
    for word, hint in _HINTS:
        if word in text:
            return RedisTroubleError(f"Redis at {address}: {hint.format(text=text)}")
    if isinstance(error, TimeoutError) or type(error).__name__ == "TimeoutError":
        return RedisTroubleError(f"Redis at {address}: no answer in time")
    return RedisTroubleError(f"Redis at {address}: {text or type(error).__name__}")
