"""Which type the fused kernels multiply float32 vectors in.

16-bit vectors are multiplied as float16 in any case. float32 vectors are multiplied as they are,
unless the caller says that they come out of 16-bit arithmetic: heads behind an encoder in bfloat16
return float32, but there is nothing in these numbers that products in float32 could keep.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

_state = {"half": False}


@contextmanager
def half_operands(wanted: bool = True) -> Iterator[None]:
    """Inside, the fused kernels multiply float32 unit vectors as float16.

    Vectors are normalized, losses computed and gradients summed in float32 as ever; see "How the
    kernels compute" in the package's README for the error. The other implementations are not
    concerned.

    Args:
        wanted: False multiplies float32 vectors as float32 again.
    """
    before = _state["half"]
    _state["half"] = wanted
    try:
        yield
    finally:
        _state["half"] = before


def multiplies_in_half() -> bool:
    """Whether `half_operands` is in force."""
    return _state["half"]
