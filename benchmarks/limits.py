"""What is asked of a figure, and how it stands beside that. Imports nothing that a bare checkout lacks."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Limits:
    must: float
    aim: float
    at_most: bool = False
    """The smaller the better."""

    def verdict(self, value: float, *, missed: str = "**missed**") -> str:
        """`missed`: how a miss is written, so that nobody overlooks it."""
        if self._reaches(value, self.aim):
            return "aim met"
        return "met" if self._reaches(value, self.must) else missed

    def beside(self, value: float) -> str:
        """To follow the figure on its line of a terminal."""
        return f"  must {self.must:g}, aim {self.aim:g}: {self.verdict(value, missed='MISSED')}"

    def _reaches(self, value: float, limit: float) -> bool:
        return value <= limit if self.at_most else value >= limit
