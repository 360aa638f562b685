"""Values near those of an example: ids permuted, masks that stay masks, both at other sizes.

Random integers would leave the domain (positions, lengths), and a mask of coin flips hides rows from themselves, on
which most attentions return what no two libraries agree on. A mask is a boolean tensor, an integer tensor of zeros and
ones, or a float tensor of zeros and ones (both) or of zeros and very negative numbers (what is added to attention).
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

# From here down a number that is added to attention hides; Swin Transformers take -100.
_VERY_NEGATIVE = -100
# More than zero, the lowest number and minus infinity are not in a mask that is added.
_MOST_KINDS = 3


def is_mask(values: Tensor) -> bool:
    """Whether a tensor is a mask, see above; an integer tensor without entries is one."""
    if values.dtype == torch.bool:
        return True
    if values.is_complex() or (values.is_floating_point() and values.reshape(-1)[:1000].unique().numel() > _MOST_KINDS):
        return False
    zero, one = values == 0, values == 1
    if not values.is_floating_point():
        return bool((zero | one).all())
    # Only zeros, or only ones, may as well be an image.
    if zero.all() or not zero.any():
        return False
    low = values <= _VERY_NEGATIVE
    return bool((zero | one).all()) or bool((zero | low).all() and values.unique().numel() <= _MOST_KINDS)


def is_constant(values: Tensor) -> bool:
    """Whether these are only ones, or only zeros."""
    return bool((values == 1).all()) or not bool(values.any())


def positive_range(values: Tensor) -> tuple[float, float]:
    """The least and the greatest of these, from half of it where all are the same; (0, 0) where any is negative."""
    low, high = float(values.min()), float(values.max())
    if not 0 <= low <= high < float("inf"):
        return 0, 0
    return (low if low < high else high / 2), high


def whole_columns(values: Tensor, most: int) -> tuple[tuple[int, int, int], ...]:
    """(index, least, greatest) of the entries of the last dim that hold whole numbers only, of tables.

    A table has two dims, a series of them three, and no more columns than ``most``. Of a column with one number it is
    said to go from 0 to that.
    """
    if values.ndim not in (2, 3) or values.shape[-1] > most:
        return ()
    rows = values.reshape(-1, values.shape[-1])
    low, high = rows.amin(0).tolist(), rows.amax(0).tolist()
    whole = ((rows == rows.round()) & (rows.abs() < 2**31)).all(0).tolist()
    ends = [(a, b) if a < b else (min(a, 0), max(a, 0)) for a, b in zip(low, high, strict=True)]
    return tuple((n, int(a), int(b)) for n, (a, b) in enumerate(ends) if whole[n])


def permuted(values: Tensor, generator: torch.Generator) -> Tensor:
    """Every row along the last dim in another order, each in its own."""
    if not values.ndim or values.shape[-1] < 2:
        return values
    return values.gather(-1, torch.rand(values.shape, generator=generator).argsort(-1))


def fitted(values: Tensor, shape: Sequence[int], mask: bool, batched: bool) -> Tensor:
    """The values at another size of any dim.

    Rows of a batch (dim 0, if ``batched``) are taken in turn. Along other dims ids start again and a mask goes on with
    its last value; what is too long is cut at its end, or a mask where no row loses all that it shows.
    """
    square = values.ndim > 1 and values.shape[-1] == values.shape[-2]
    hides = hiding(values) if mask else 0
    for dim, size in enumerate(shape):
        old = values.shape[dim]
        if size == old:
            continue
        if mask and size < old and dim == values.ndim - 1:
            values = _cut(values, _hidden(values, hides), size, square)
            continue
        turns = torch.arange(size)
        turns = turns.clamp(max=old - 1) if mask and not (batched and dim == 0) else turns % old
        values = values.index_select(dim, turns)
    return values


def hiding(mask: Tensor) -> bool | float:
    """The value that hides in this mask.

    Very negative numbers do, and of zeros and ones the zeros, as wherever text is padded. Boolean masks are written
    both ways: what is rarer hides.
    """
    if mask.dtype == torch.bool:
        return 2 * int(mask.sum()) < mask.numel()
    lowest = float(mask.min())
    if lowest < 0:
        return lowest
    return 0.0 if bool(mask.any()) else 1.0


def hiding_more(mask: Tensor, at_end: bool) -> Tensor:
    """The mask with a quarter of its last row, or of its last rows along dim 0, hidden at the end or at the start.

    Rows that would show nothing any more stay as they were.
    """
    value, count = hiding(mask), max(1, mask.shape[-1] // 4)
    new = mask.clone()
    last = new[-1:] if mask.ndim > 1 else new
    last.narrow(-1, mask.shape[-1] - count if at_end else 0, count).fill_(value)
    return torch.where(_emptied(_hidden(mask, value), _hidden(new, value)), mask, new)


def _cut(mask: Tensor, is_hidden: Tensor, size: int, square: bool) -> Tensor:
    """The first entries of every row, or evenly chosen ones, or the last: what hides the fewest rows altogether.

    Of masks that are not square, which are as a rule those of padding, it also matters that what hides stays in sight.
    """
    length = mask.shape[-1]
    evenly = torch.linspace(0, length - 1, size).round().long()
    choices = [torch.arange(size), evenly, torch.arange(length - size, length)]

    def lost(choice: Tensor) -> tuple[int, int]:
        left = is_hidden.index_select(-1, choice)
        return int(_emptied(is_hidden, left).sum()), 0 if square else int(_emptied(~is_hidden, ~left).sum())

    return mask.index_select(-1, min(choices, key=lost))


def _hidden(mask: Tensor, value: bool | float) -> Tensor:
    return mask < 0 if value < 0 else mask == value


def _emptied(before: Tensor, after: Tensor) -> Tensor:
    """Which rows [..., 1] are all hidden after, and were not before."""
    return after.all(-1, keepdim=True) & ~before.all(-1, keepdim=True)
