"""How an object that is no tensor enters a call that `torch.compile` leaves to AOTAutograd; made before compilation begins."""

from __future__ import annotations

from typing import Any

from torch.utils._pytree import register_constant


class Constant:
    """Carries an object into a traced call; two are equal when they carry the very same one."""

    def __init__(self, value: Any) -> None:
        self.value = value

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Constant) and self.value is other.value

    def __hash__(self) -> int:
        return id(self.value)


register_constant(Constant)
