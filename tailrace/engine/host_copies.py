"""Numbers on their way between host and device, which wait for nobody: a step is launched while another computes."""

from collections.abc import Sequence

import torch
from torch import Tensor


def upload(values: Sequence[object], dtype: torch.dtype, device: torch.device) -> Tensor:
    """As torch.tensor, but a CUDA device copies when it gets to it, from memory that is kept until then."""
    return torch.tensor(values, dtype=dtype, pin_memory=device.type == "cuda").to(device, non_blocking=True)


class HostCopy:
    """The one copy of a step from device to host; also tells when everything launched before it is over."""

    def __init__(self, words: Tensor) -> None:
        """words: [n] int32 on the device, nobody's but this copy's."""
        self._words = words
        self._over: torch.cuda.Event | None = None
        if words.is_cuda:
            self._words = torch.empty(words.shape, dtype=words.dtype, pin_memory=True)
            self._words.copy_(words, non_blocking=True)
            # Blocking: the thread that waits sleeps instead of spinning.
            self._over = torch.cuda.Event(blocking=True)  # type: ignore[no-untyped-call]
            self._over.record(torch.cuda.current_stream(words.device))

    def wait(self) -> Tensor:
        """[n] int32 on the host."""
        if self._over is not None:
            self._over.synchronize()
        return self._words
