"""Attention by its definition, with a dense mask: what every faster home for keys and values is tested against.

Shape suffixes: T packed tokens, N query heads, M key/value heads, H head width.
"""

from dataclasses import dataclass

from torch import Tensor

from garage.kernels import reference


@dataclass(frozen=True, eq=False)
class ReferenceAttend:
    """A token of document `document_T` at `positions_T` sees earlier positions of the same document, at most a window of them."""

    document_T: Tensor
    positions_T: Tensor

    def __call__(self, q_TNH: Tensor, k_TMH: Tensor, v_TMH: Tensor, *, layer: int, scale: float, window: int | None) -> Tensor:
        back_TT = self.positions_T[:, None] - self.positions_T
        visible_TT = (self.document_T[:, None] == self.document_T) & (back_TT >= 0)
        if window is not None:
            visible_TT &= back_TT < window
        return reference.attention(q_TNH, k_TMH, v_TMH, visible_TT, scale)
