"""Recording without data: the model runs on meta tensors first.

Most of the time that a recorded run takes goes into convolutions and matrix products whose values nobody looks at: the
graph, its shapes and its notes are the same whatever they are. So meta tensors stand in for the floating-point
parameters, buffers and inputs, and the recorder is run as ever. What this recording is worth is decided by what the run
asked for: if it ever depended on a value, or might have, or did what cannot be watched, the recording is thrown away
and made again for real.

- An op sees a stand-in only if it is known to do the same whatever the values (``Op.takes``): views, pointwise ops, and
  many more. Any other op, any dtype that some kernels lack, and any failure, also one that the model catches, means
  that data is needed (``needs_data``).
- Torch functions that answer with something other than tensors are let pass if they tell shapes and the like;
  ``device`` and its relatives answer as for the real tensor.
- Tensors that no stand-in went into, integers above all, are real, with the values of a real run: they may be looked
  at, and what a model keeps of them for later calls in a place that is not its own (a memoised grid) is right. A
  stand-in that is kept anywhere means that data is needed.
- A parameter or buffer that the model reaches other than by its name becomes a constant of the graph, which tells.
"""

from __future__ import annotations

import inspect
import weakref
from collections import OrderedDict
from collections.abc import Callable, Iterable
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn
from torch.overrides import _get_current_function_mode
from torch.utils._python_dispatch import _get_current_dispatch_mode

from fxprune.ops.meta import MetaKernels
from fxprune.ops.table import Op, find_call, is_pointwise, record_of
from fxprune.recording import state, trees
from fxprune.recording.calls import property_name
from fxprune.recording.parts import Parts
from fxprune.recording.structure import map_tensors, tensors_of

_CPU = torch.device("cpu")
_META = torch.device("meta")
_FLOATS = (torch.float32, torch.float64)  # CPU kernels of these are never missing
_NARROW = (torch.bfloat16, torch.float16)
_OTHERS = (torch.int64, torch.int32, torch.int16, torch.int8, torch.uint8, torch.bool)

# Answers that are no tensors and that a stand-in gives like the real tensor.
_TOLD = frozenset(
    "shape size numel nelement dim ndim ndimension __len__ dtype layout requires_grad is_leaf grad_fn element_size "
    "itemsize is_floating_point is_complex is_signed is_tensor is_same_size can_cast result_type promote_types "
    "is_cuda is_xpu is_mps is_sparse is_sparse_csr is_quantized is_mkldnn is_nested is_inference is_grad_enabled "
    "__hash__ __setitem__ _assert".split()
)
_TOLD_OF_CPU: dict[str, Any] = {"is_cpu": True, "is_meta": False}


class DataNeededError(Exception):
    """The run asked for what a stand-in does not have."""


class Rehearsal:
    """The stand-ins of one run, and what was asked of them.

    ``memory``: of the tensors that are real. ``narrow``: whether floats may be of 16 bits, for which some kernels are
    missing: what such a run tells is compared, and never computed.
    """

    def __init__(self, memory: state.Memory | None = None, narrow: bool = False) -> None:
        self.needs_data = False
        self._floats = (*_FLOATS, *_NARROW) if narrow else _FLOATS
        self._memory = memory or state.Memory(Parts({}, {}, {}))
        self._named: set[int] = set()
        self._storages: set[int | None] = set()
        self._made: list[weakref.ref[Tensor]] = []
        self._kernels = MetaKernels()

    # --- before the run -----------------------------------------------------------------------------------------------

    def expect(self, parts: Parts) -> None:
        """These are the parameters and buffers of the model."""
        for tensor in parts.tensors.values():
            self._storages.add(state.storage_id(tensor))
            if tensor.is_floating_point():
                self._named.add(id(tensor))

    def stand_in(self, tensor: Tensor) -> Tensor:
        """What takes the place of a tensor of the model in its copy."""
        if id(tensor) not in self._named:
            return self._memory.stand_in(tensor)
        stand_in: Tensor = _on_meta(tensor)
        if isinstance(tensor, nn.Parameter):
            stand_in = nn.Parameter(stand_in, requires_grad=False)
        stand_in.__dict__.update(tensor.__dict__)
        return stand_in

    def begin(self) -> None:
        """The inputs are in place; what is made from now on belongs to the run."""
        self._made.clear()

    # --- during the run -----------------------------------------------------------------------------------------------

    def device(self, tensor: Tensor) -> torch.device:
        return torch.device("cpu") if tensor.is_meta else tensor.device  # a new object every time, as always

    def ask(self) -> None:
        self.needs_data = True

    def op(self, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run an aten op: for real if no operand is a stand-in, else on meta."""
        try:
            operands = trees.tensors(*args, *kwargs.values())
            stand_ins = [tensor for tensor in operands if tensor.is_meta]
            if not stand_ins or (kwargs.get("device") == _CPU and _fills(record_of(func))):
                result = func(*args, **kwargs)
            else:
                _check_blind(func, args, operands, self._floats)
                if len(stand_ins) < len(operands):
                    if func._schema.is_mutable:
                        raise DataNeededError("a real tensor would have to hold what is not known")
                    args, kwargs = trees.map_tree(_on_meta, args), trees.map_tree(_on_meta, kwargs)
                result = self._kernels(func, args, kwargs)
                record = record_of(func)
                if record is not None and record.lays is not None:
                    result = record.lays(result, *args)
            for tensor in trees.tensors(result):
                if tensor.is_meta:
                    self._check_dtype(tensor)
                    self._made.append(weakref.ref(tensor))
        except Exception:
            self.ask()
            raise
        return result

    def _check_dtype(self, tensor: Tensor) -> None:
        if tensor.dtype not in self._floats and tensor.dtype not in _OTHERS:
            raise DataNeededError(f"not every kernel takes {tensor.dtype}")

    def function(self, func: Any, /, *args: Any, **kwargs: Any) -> Any:
        """Run a torch function as if its stand-ins were on the device of the real tensors."""
        try:
            if not _has_stand_ins(*args, *kwargs.values()):
                result = func(*args, **kwargs)
                if _has_stand_ins(result):
                    raise DataNeededError("the model itself works on meta")
                return result
            name = property_name(func) or str(getattr(func, "__name__", ""))
            if name == "device":
                return self.device(args[0])
            if name in _TOLD_OF_CPU:
                return _TOLD_OF_CPU[name]
            result = _placed(func, name, args, kwargs)
            if not trees.has_tensors(result) and name not in _TOLD:
                self.ask()
        except Exception:
            self.ask()
            raise
        return result

    # --- after the run ------------------------------------------------------------------------------------------------

    def is_kept(self) -> bool:
        """Whether a tensor of the run is still alive: something that is not the model's holds it."""
        return any(reference() is not None for reference in self._made)

    def are_innocent(self, constants: Iterable[Tensor]) -> bool:
        """Whether the tensors that the run did not compute are none of the model's, by another way."""
        return not any(tensor.is_meta or state.storage_id(tensor) in self._storages for tensor in constants)


def is_possible(parts: Parts, bound: inspect.BoundArguments) -> bool:
    """Whether a run without data could be watched: plain CPU tensors, and no mode of the user's."""
    tensors = {id(tensor): tensor for tensor in parts.tensors.values()}
    inputs = tensors_of(dict(bound.arguments))
    if parts.scripted() or state.cached_tensor_dicts(parts.modules.values()):
        return False
    if _get_current_function_mode() is not None or _get_current_dispatch_mode() is not None:
        return False
    if torch.is_autocast_enabled("cpu") or torch.get_default_device() != _CPU:
        return False
    if not tensors or not all(_is_plain(tensor) for tensor in (*inputs, *tensors.values())):
        return False
    return len({state.storage_id(tensor) for tensor in tensors.values()}) == len(tensors)


def _is_plain(tensor: Tensor) -> bool:
    return bool(
        type(tensor) in (Tensor, nn.Parameter)
        and tensor.device == _CPU
        and tensor.dtype in (*_FLOATS, *_OTHERS)
        and tensor.layout is torch.strided
        and tensor.storage_offset() == 0
        and tensor.grad_fn is None
        and not tensor.is_inference()
    )


def without_data(bound: inspect.BoundArguments) -> inspect.BoundArguments:
    """The inputs, those of floating point on meta."""

    def stand_in(tensor: Tensor) -> Tensor:
        return _on_meta(tensor) if tensor.is_floating_point() else tensor

    arguments = map_tensors(stand_in, dict(bound.arguments))
    return inspect.BoundArguments(bound.signature, OrderedDict(arguments))


def _has_stand_ins(*values: Any) -> bool:
    return any(tensor.is_meta for tensor in trees.tensors(*values))


def _on_meta(value: Any) -> Any:
    if not isinstance(value, Tensor) or value.is_meta:
        return value
    return torch.empty_strided(value.shape, value.stride(), dtype=value.dtype, device=_META)


def _placed(func: Callable[..., Any], name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
    """The call without moves between devices, which would be none; what is made without values is made for real."""
    if name in ("to", "cpu", "type_as") and args:
        tensor, *rest = args
        here = tensor.device
        if name == "cpu":
            return Tensor.to(tensor, here, **kwargs)
        rest = [_place(value, here) for value in rest]
        kwargs = {key: _place(value, here) for key, value in kwargs.items()}
        if "other" in kwargs:
            kwargs["dtype"] = kwargs.pop("other")
        return Tensor.to(tensor, *rest, **kwargs)
    if _fills(find_call(name)) and kwargs.get("device") is None:
        kwargs = {**kwargs, "device": _CPU}
    return func(*args, **kwargs)


def _place(value: Any, here: torch.device) -> Any:
    if isinstance(value, Tensor):
        return value.dtype
    return here if isinstance(value, (str, torch.device)) and torch.device(value) == _CPU else value


# --- ops -------------------------------------------------------------------------------------------------------------


def _check_blind(func: Any, args: tuple[Any, ...], operands: list[Tensor], floats: tuple[torch.dtype, ...]) -> None:
    """Whether the op does the same with these operands, and refuses the same, whatever their values."""
    taken, refused = _taken(func)
    fits = _DTYPES[taken]({tensor.dtype for tensor in operands}, floats)
    fits = fits and (taken == "anything" or all(tensor.numel() for tensor in operands))  # a maximum of nothing, say
    if not fits or (refused is not None and refused(*args)):
        raise DataNeededError(str(func))


@lru_cache(maxsize=4096)
def _taken(func: Any) -> tuple[str, Callable[..., bool] | None]:
    """What the op takes blindly, by dtype, and what else to ask: is it refused?"""
    if func.namespace != "aten":
        return "nothing", None
    record = record_of(func)
    taken, refuses = (None, None) if record is None else (record.takes, record.refuses)
    if _is_view(func):
        taken = "anything"
    return taken or ("floats" if is_pointwise(func) else "nothing"), refuses


def _fills(record: Op | None) -> bool:
    return record is not None and record.fills


_DTYPES: dict[str, Callable[[set[torch.dtype], tuple[torch.dtype, ...]], bool]] = {
    "nothing": lambda dtypes, floats: False,
    "anything": lambda dtypes, floats: True,
    "floats": lambda dtypes, floats: dtypes.issubset(floats),
    "floats of one kind": lambda dtypes, floats: dtypes.issubset(floats) and len(dtypes) == 1,
}


def _is_view(func: Any) -> bool:
    returns = func._schema.returns
    views = bool(returns) and all(r.alias_info is not None and not r.alias_info.is_write for r in returns)
    return views and func is not torch.ops.aten.view.dtype
