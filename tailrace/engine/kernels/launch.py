"""How a Triton kernel is launched: what is fixed at compile time, and how many threads run it."""

from dataclasses import dataclass

import torch


@dataclass(frozen=True, slots=True)
class Launch:
    """One compiled variant of a kernel. The tests compile these ahead of time, the launchers run them."""

    constants: dict[str, int | str]
    """Of the kernel's constexpr parameters, by name."""
    num_warps: int
    num_stages: int = 1
    fuses_products: bool = True
    """A product and a sum may become one operation that rounds once, which torch's operations do not."""

    @property
    def options(self) -> dict[str, int]:
        return {
            "num_warps": self.num_warps,
            "num_stages": self.num_stages,
            "enable_fp_fusion": self.fuses_products,
        }

    @property
    def keywords(self) -> dict[str, int | str]:
        return {**self.constants, **self.options}


def power_of_2(least: int) -> int:
    """The smallest power of two that is not below `least`: extents of a tile are powers of two."""
    return 1 << max(0, least - 1).bit_length()


def dot_precision(dtype: torch.dtype) -> str:
    """float32 products are not rounded to tf32: the kernels answer to the spec's tolerance in every dtype."""
    return "ieee" if dtype == torch.float32 else "tf32"
