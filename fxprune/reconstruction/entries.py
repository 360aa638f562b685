"""Which entries of which parameters a tensor holds, followed through everything that only moves them.

An entry is a place in memory that a parameter or buffer fills, so tied parameters have the same entries. What lies in
that memory (a transposed view, one third of a packed weight) says by its strides which; what was copied out of it
(concatenated heads, a permuted kernel) is told by running the same op on the numbers of the entries.
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Iterator
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from hashlib import blake2b
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from fxprune.ops.meta import tensors_in
from fxprune.ops.refit import Followed
from fxprune.ops.table import record_of
from fxprune.recording import named_tensors
from fxprune.recording.shards import is_share, memory_of, opened, whole, without_values
from fxprune.rewriting.slicing import Cuts, cut

Door = Callable[[Tensor], AbstractContextManager[Tensor]]
_PART = 2**22  # numbers
_KEY = "_fxprune_entries"
_MADE = "_fxprune_made_of_parameters"


class Entries:
    """The entries of a module's parameters and buffers, numbered."""

    def __init__(self, module: nn.Module):
        known = {name: tensor for name, tensor in named_tensors(module).items() if tensor.numel()}
        self.tensors = {name: tensor for name, tensor in known.items() if tensor.is_floating_point()}
        self._others = {memory_of(t) for n, t in known.items() if n not in self.tensors}
        self._first: dict[int, int] = {}
        self.names: dict[int, list[str]] = {}
        count = 0
        for name, tensor in self.tensors.items():
            memory = memory_of(tensor)
            if memory not in self._first:
                self._first[memory] = count
                count += _size(tensor)
            self.names.setdefault(memory, []).append(name)

    def of(self, tensor: Tensor) -> Tensor | None:
        """The number of the entry at every position, on the CPU; None where it holds anything else."""
        known = getattr(tensor, _KEY, None)
        if known is not None:
            return known  # type: ignore[no-any-return]
        if tensor.layout != torch.strided or not tensor.numel():
            return None
        first = self._first.get(memory_of(tensor))
        if first is None:
            return None
        tensor = without_values(tensor) if is_share(tensor) else tensor
        return _even(first + int(tensor.storage_offset()), tensor.shape, tensor.stride())

    def holds(self, tensor: Tensor) -> bool:
        """Whether all its positions are entries."""
        ours = hasattr(tensor, _KEY) or (tensor.layout == torch.strided and bool(tensor.numel()))
        return ours and (hasattr(tensor, _KEY) or memory_of(tensor) in self._first)

    def made(self, tensor: Tensor) -> bool:
        """Whether it was computed from parameters alone, or is one."""
        if hasattr(tensor, _MADE) or self.holds(tensor):
            return True
        return tensor.layout == torch.strided and memory_of(tensor) in self._others

    def follow(self, func: Any, args: Any, kwargs: Any, outputs: Iterable[Tensor]) -> bool:
        """Note what the outputs of an aten op hold. Returns whether it only moved entries."""
        given = tensors_in((*args, *kwargs.values()))
        if not all(self.made(t) for t in given):
            return False
        outputs, given = list(outputs), [t for t in given if t.is_floating_point()]
        for out in outputs:
            setattr(out, _MADE, True)
        record = record_of(func)
        how = None if record is None else record.refit
        if not given or not isinstance(how, Followed) or not all(self.holds(t) for t in given):
            return False
        if how is Followed.COPIED:
            found = [self.of(given[0])]
        else:

            def numbers(t: Tensor) -> Tensor | None:
                own = self.of(t) if t.is_floating_point() else t.cpu()
                return None if own is None else own.contiguous()  # the tensor may have other strides: any view is one

            moved = func(*tree_map_only(Tensor, numbers, args), **tree_map_only(Tensor, numbers, kwargs))
            found = tensors_in((moved,))  # type: ignore[assignment]
        for out, numbers_of in zip(outputs, found, strict=True):
            setattr(out, _KEY, numbers_of)
        return True

    def write(self, numbers: Tensor, values: Tensor) -> None:
        """Put ``values`` into the entries ``numbers``, both ``[n]``, whichever tensors these are of."""
        for inside, flat, places in self._memory(numbers, opened):
            flat[places] = values[inside.to(values.device)].to(flat)

    def read(self, numbers: Tensor) -> Tensor:
        """The values of entries, in their order, ``[n]``."""
        result: Tensor | None = None
        for inside, flat, places in self._memory(numbers, lambda tensor: nullcontext(whole(tensor))):
            result = flat.new_empty(len(numbers)) if result is None else result
            result[inside.to(flat.device)] = flat[places]
        assert result is not None, "no entries"
        return result

    def _memory(self, numbers: Tensor, door: Door) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Which of ``numbers`` lie in one piece of memory, that memory, and their places there.

        ``door``: what gives a tensor that may be a share as a whole.
        """
        low, high = int(numbers.min()), int(numbers.max())
        for storage, first in self._first.items():
            tensor = self.tensors[self.names[storage][0]]
            count = _size(tensor)
            if first > high or first + count <= low:
                continue
            inside = (numbers >= first) & (numbers < first + count)
            if bool(inside.any()):
                with door(tensor) as found:
                    flat = torch.empty(0, dtype=found.dtype, device=found.device)
                    flat.set_(found.untyped_storage(), 0, (count,), (1,))
                    yield inside, flat, (numbers[inside] - first).to(flat.device)

    def names_of(self, numbers: Tensor) -> list[str]:
        """The first name of every tensor that some of these entries are of."""
        low, high = int(numbers.min()), int(numbers.max())
        found = []
        for storage, first in self._first.items():
            for name in self.names[storage]:
                tensor = self.tensors[name]
                start = first + tensor.storage_offset()
                if start <= high and start + tensor.numel() > low and self._is_any_of(numbers, tensor):
                    found.append(name)
                    break
        return found

    def _is_any_of(self, numbers: Tensor, tensor: Tensor) -> bool:
        own = self.of(tensor)
        assert own is not None
        if tensor.is_contiguous():
            first = int(own.reshape(-1)[0])
            return bool(((numbers >= first) & (numbers < first + own.numel())).any())
        return bool(is_in(numbers, own).any())


def _size(tensor: Tensor) -> int:
    """How many entries lie in the memory of a tensor."""
    return tensor.numel() if is_share(tensor) else tensor.untyped_storage().nbytes() // tensor.itemsize


def is_in(numbers: Tensor, others: Tensor) -> Tensor:
    """Which of ``numbers [n]`` are in ``others``, a part at a time: a large one is sorted for it, with its places."""
    return torch.cat([torch.isin(part, others) for part in numbers.split(_PART)])


@dataclass(frozen=True)
class Numbers:
    """Numbers of entries to be kept. Those with even steps, as a view of memory has, are made when they are looked at:
    else they would take more memory than the parameters."""

    shape: tuple[int, ...]
    _first: int
    _steps: tuple[int, ...]
    _uneven: Tensor | None = None

    @classmethod
    def of(cls, numbers: Tensor) -> Numbers:
        shape = tuple(numbers.shape)
        corner = numbers[(slice(0, 2),) * len(shape)]
        first = int(corner[(0,) * len(shape)])
        steps = tuple(int(corner.select(d, -1)[(0,) * (len(shape) - 1)]) - first for d in range(len(shape)))
        even = torch.equal(_even(first, shape, steps), numbers)
        return cls(shape, first, steps, None if even else numbers)

    @property
    def tensor(self) -> Tensor:
        """The numbers, on the CPU."""
        return _even(self._first, self.shape, self._steps) if self._uneven is None else self._uneven

    @property
    def differ(self) -> bool:
        """Whether they are known to be different without a look at each."""
        reached = 0  # by the dims with smaller steps
        for step, size in sorted((abs(s), n) for s, n in zip(self._steps, self.shape, strict=True) if n > 1):
            if step <= reached:
                return False
            reached += step * (size - 1)
        return self._uneven is None

    @property
    def key(self) -> Hashable:
        """Equal for equal numbers."""
        rest = b"" if self._uneven is None else blake2b(self._uneven.contiguous().numpy().tobytes()).digest()
        return self.shape, self._first, self._steps, rest


def _even(first: int, shape: Iterable[int], steps: Iterable[int]) -> Tensor:
    result = torch.tensor(first)
    for size, step in zip(shape, steps, strict=True):
        result = result.unsqueeze(-1) + torch.arange(size) * step
    return result


class Counterparts:
    """For entries of a pruned module those of the dense one that they were cut from."""

    def __init__(self, dense: Entries, pruned: Entries, cuts: Cuts):
        self._dense, self._pruned, self._cuts = dense, pruned, cuts

    def dense(self, numbers: Tensor) -> Tensor | None:
        """The same shape as ``numbers``; None where an entry was cut from none."""
        result = torch.full_like(numbers, -1)
        for name in self._pruned.names_of(numbers.reshape(-1)):
            if name not in self._dense.tensors:
                return None
            own, whole = self._pruned.of(self._pruned.tensors[name]), self._dense.of(self._dense.tensors[name])
            assert own is not None
            assert whole is not None
            left = cut(whole, self._cuts.labels.get(name, ()), self._cuts.keep)
            if left.shape != own.shape:
                return None
            order = own.reshape(-1).argsort()
            ordered, left = own.reshape(-1)[order], left.reshape(-1)[order]
            place = torch.searchsorted(ordered, numbers.contiguous()).clamp_max(len(ordered) - 1)
            result = torch.where(ordered[place] == numbers, left[place], result)
        return None if bool((result < 0).any()) else result


def spread(pruned: nn.Module, dense: nn.Module, cuts: Cuts) -> None:
    """Write what a pruned module holds to the entries of the dense one that it was cut from; all others stay."""
    own, whole = Entries(pruned), Entries(dense)
    counterparts = Counterparts(whole, own, cuts)
    with torch.no_grad():
        for tensor in own.tensors.values():
            numbers = own.of(tensor)
            places = None if numbers is None else counterparts.dense(numbers.reshape(-1))
            if numbers is not None and places is not None:
                whole.write(places, own.read(numbers.reshape(-1)))
