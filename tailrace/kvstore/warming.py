"""Gives a store's memory to it ahead of the first blocks, on a thread of its own."""

import threading
import time
from collections.abc import Callable

from tailrace.host_memory import FirstTouch


class Warming:
    """Takes half of a core at most, until all memory is there or `stop`.

    Not a thread of low priority: one that loses its core while it holds the interpreter's lock would hold up the rest.
    """

    def __init__(self, touch: FirstTouch, on_done: Callable[[], None] = lambda: None) -> None:
        """`on_done`: called on the thread when all memory is there, not when it is stopped."""
        self._touch = touch
        self._on_done = on_done
        self._is_over = threading.Event()
        self._thread = threading.Thread(target=self._run, name="warming", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """Waits for the piece at hand: some milliseconds. Idempotent."""
        self._is_over.set()
        self._thread.join()

    def wait(self, timeout_s: float) -> bool:
        """Whether it has ended."""
        self._thread.join(timeout_s)
        return not self._thread.is_alive()

    def _run(self) -> None:
        while not self._is_over.is_set():
            began = time.monotonic()
            if not self._touch.more():
                self._on_done()
                return
            self._is_over.wait(time.monotonic() - began)
