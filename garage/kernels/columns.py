"""One number for each column: how DoRA's gain (arXiv 2402.09353) multiplies the output of a linear, and the sum its gradient needs.

Shape suffixes: T packed tokens, O outputs.
"""

import torch
from torch import Tensor


def scale_(y_TO: Tensor, gain_O: Tensor) -> Tensor:
    """y * gain, in the memory of y."""
    return y_TO.mul_(gain_O)


def scale_and_sum_(dy_TO: Tensor, y_TO: Tensor, gain_O: Tensor) -> Tensor:
    """The sum over tokens of dy * y, fp32 [O], of dy as it is before it is multiplied by the gain, in its own memory."""
    wide = torch.promote_types(dy_TO.dtype, torch.float32)
    sum_O = (dy_TO.to(wide) * y_TO).sum(0)
    dy_TO.mul_(gain_O)
    return sum_O
