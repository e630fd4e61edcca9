"""Loan: what one needer borrows of a chain of blocks, in order, as it becomes readable."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

from tailrace.kvstore.slots import StoredBlock


@dataclass(frozen=True, slots=True)
class LoanedBlock:
    """A block that can be read from a slot of the memory tier for as long as its loan is open."""

    index: int
    """In the chain that was asked for."""
    slot: int
    generation: int
    came_from_disk: bool


class Loan:
    """Made by `KvStore.borrow`, and written by it alone. `on_news` is called whenever `take_ready` has more to say."""

    def __init__(
        self,
        blocks: Sequence[StoredBlock],
        num_asked: int,
        on_news: Callable[[], None],
        give_back: Callable[["Loan"], None],
    ) -> None:
        """`num_asked`: blocks that the needer asked for, of which `blocks` are there."""
        self.num_asked = num_asked
        self.blocks = list(blocks)
        """Those that will be lent; gets shorter when one cannot be had after all."""
        self.held: dict[int, LoanedBlock] = {}
        """By index; not all of them told yet."""
        self.num_told = 0
        self.is_closed = False
        self.on_news = on_news
        self._give_back = give_back

    @property
    def is_complete(self) -> bool:
        """Nothing more will become ready."""
        return self.num_told == len(self.blocks)

    def take_ready(self) -> list[LoanedBlock]:
        """What has become readable since the last call, without gaps."""
        ready: list[LoanedBlock] = []
        while self.num_told < len(self.blocks) and self.num_told in self.held:
            ready.append(self.held[self.num_told])
            self.num_told += 1
        return ready

    def close(self) -> None:
        """The needer reads nothing any more. Idempotent."""
        if not self.is_closed:
            self.is_closed = True
            self._give_back(self)
