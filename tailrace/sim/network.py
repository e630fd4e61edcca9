"""Links under virtual time: each end of a transfer does one at a time, in the order in which they were asked for."""

from collections import defaultdict


class Network:
    def __init__(self) -> None:
        self._free_at: defaultdict[str, float] = defaultdict(float)

    def transfer(self, source: str, target: str, num_bytes: float, bytes_per_s: float, now_s: float) -> float:
        """When the last byte is there. `source` sends and `target` receives nothing else meanwhile."""
        out, into = f"{source}>", f">{target}"
        begin_s = max(now_s, self._free_at[out], self._free_at[into])
        end_s = begin_s + num_bytes / bytes_per_s
        self._free_at[out] = self._free_at[into] = end_s
        return end_s
