"""A model of which every process holds a share (``torch.distributed.fsdp.fully_shard``, ``DTensor``).

All that knows of shares is here. A stage reads a parameter ``whole`` for a moment, or writes it ``opened``, and makes a
new one with ``shared_like``: then every process takes part, in the same order. ``recordable`` gives what is recorded:
the same modules over parameters without data, and without the hooks that would gather them.
"""

from __future__ import annotations

import copy
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor, nn

from fxprune.errors import InputError, ModelError
from fxprune.recording.copies import Copier
from fxprune.recording.module import named_modules, named_tensors, replace_tensors

T = TypeVar("T")
M = TypeVar("M", bound=nn.Module)


def is_share(tensor: Any) -> bool:
    """Whether this process holds a share of the tensor; without ``torch.distributed.tensor`` there are none."""
    kind = getattr(sys.modules.get("torch.distributed.tensor"), "DTensor", None)
    return kind is not None and isinstance(tensor, kind)


def own_part(tensor: Tensor) -> Tensor:
    """What this process holds of it."""
    return tensor.to_local() if is_share(tensor) else tensor  # type: ignore[attr-defined]


def is_sharded(module: nn.Module) -> bool:
    """Whether any parameter or buffer is a share, or ``fully_shard`` gathers it."""
    if "torch.distributed.tensor" not in sys.modules:
        return False
    return any(map(is_share, named_tensors(module).values())) or bool(_fsdp_modules(module))


def whole(tensor: Tensor, dtype: torch.dtype | None = None) -> Tensor:
    """The tensor itself; of a share the whole one, gathered from all processes, without gradients, in ``dtype``."""
    if not is_share(tensor):
        return tensor
    with torch.no_grad():
        found: Tensor = tensor.full_tensor()  # type: ignore[attr-defined]
        found = found.detach().to(dtype or found.dtype).contiguous()
    setattr(found.untyped_storage(), _SHARE, weakref.ref(tensor))
    return found


_SHARE = "_fxprune_share"  # of memory that holds what was gathered: the share


def is_gathered(tensor: Tensor) -> bool:
    """Whether it lies in memory that was gathered from shares."""
    return _share_of(tensor) is not None


def memory_of(tensor: Tensor) -> int:
    """A number for the memory in which a tensor lies; what was gathered of a share lies where the share does."""
    share = tensor if is_share(tensor) else _share_of(tensor)
    return tensor.untyped_storage().data_ptr() if share is None else -id(share)


def _share_of(tensor: Tensor) -> Tensor | None:
    found: weakref.ref[Tensor] | None = getattr(tensor.untyped_storage(), _SHARE, None)
    return None if found is None else found()


class Wholes(Mapping[str, Tensor]):
    """Tensors by name, gathered when one is looked at and not kept."""

    def __init__(self, tensors: Mapping[str, Tensor]) -> None:
        self._tensors = tensors

    def __getitem__(self, name: str) -> Tensor:
        return whole(self._tensors[name])

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)


def shared_like(tensor: Tensor, given: Any) -> Tensor:
    """``tensor``; where ``given`` is a share, this process's share of it, on the same mesh with the same placements."""
    if not is_share(given):
        return tensor
    from torch.distributed.tensor import DTensor, distribute_tensor

    tensor = tensor.contiguous()
    mesh, placements = given.device_mesh, given.placements
    own = distribute_tensor(tensor, mesh, placements, src_data_rank=None).to_local()
    if own.untyped_storage().nbytes() > own.numel() * own.itemsize or own.data_ptr() == tensor.data_ptr():
        own = own.clone()  # else the whole one stays
    return DTensor.from_local(own, mesh, placements, run_check=False, shape=tensor.shape, stride=tensor.stride())


@contextmanager
def opened(tensor: Tensor) -> Iterator[Tensor]:
    """The tensor to be written to; of a share the whole one, from which every process then takes its own."""
    found = whole(tensor)
    yield found
    if found is not tensor:
        with torch.no_grad():
            own: Any = tensor
            own.to_local().copy_(shared_like(found, tensor).to_local())  # type: ignore[attr-defined]


@contextmanager
def gathered(module: nn.Module, dtype: torch.dtype | None = None) -> Iterator[None]:
    """Inside, the parameters and buffers of a layer are whole; those that were shares in ``dtype``."""
    if not is_sharded(module):
        yield
        return
    back: dict[int, Tensor] = {}
    made: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        if not is_share(tensor):
            return tensor
        if id(tensor) not in made:
            made[id(tensor)] = new = nn.Parameter(whole(tensor, dtype), requires_grad=False)
            back[id(new)] = tensor
        return made[id(tensor)]

    replace_tensors(module, stand_in)
    try:
        yield
    finally:
        replace_tensors(module, lambda tensor: back.get(id(tensor), tensor))


def copied_around_shares(module: M) -> M:
    """A deep copy that holds the same shares."""
    return copy.deepcopy(module, {id(tensor): tensor for tensor in named_tensors(module).values() if is_share(tensor)})


# -- what is recorded ------------------------------------------------------------------------------------------------


def recordable(model: nn.Module) -> tuple[nn.Module, Callable[[nn.Module], None]]:
    """The model to be recorded, all of it on meta, and what puts the shares into the recording, in place.

    Of a model without shares itself, and nothing. ``fully_shard``'s parameters are shares again afterwards, if a
    forward pass has left them gathered.

    Raises:
        ModelError: a share that cannot be made again, or no process group.
    """
    if not is_sharded(model):
        return model, lambda module: None
    check_shares(model)
    given: dict[int, Tensor] = {}

    def stand_in(tensor: Tensor) -> Tensor:
        new, own = without_values(tensor), tensor.detach()  # a gradient that is a share may not be copied
        if isinstance(tensor, nn.Parameter):
            new, own = (nn.Parameter(t, requires_grad=tensor.requires_grad) for t in (new, own))
        given[id(new)] = own
        return new

    copier = Copier(stand_in)
    twin: nn.Module = copier(model)
    for module in _fsdp_modules(model):
        _unhook(copier.modules[id(module)], module)

    def put_back(module: nn.Module, kept: Any = copier) -> None:  # ``kept``: or addresses would be used again
        replace_tensors(module, lambda tensor: given.get(id(tensor), tensor))
        empty = [name for name, tensor in named_tensors(module).items() if tensor.is_meta]
        if empty:
            raise ModelError(
                f"forward holds a tensor that was computed of parameters before ({empty[0]} of the graph), and those "
                "of a sharded model are recorded without values. Clear what the model caches, or prune the whole model "
                "and shard the result."
            )

    return twin, put_back


def without_hooks(model: M) -> M:
    """The same modules over the same shares, which nothing gathers by itself; without ``fully_shard`` the model."""
    if not _fsdp_modules(model):
        return model
    twin, put_back = recordable(model)
    put_back(twin)
    return twin  # type: ignore[return-value]


def without_values(tensor: Tensor) -> Tensor:
    """Its like on meta; of a share, that of the whole tensor."""
    if is_share(tensor):
        return torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
    return torch.empty_like(tensor, device="meta", requires_grad=False)


def check_shares(model: nn.Module) -> None:
    """Refuse shares that cannot be gathered and made again.

    Raises:
        ModelError: there is no process group, or a parameter is placed in another way than ``Shard`` or ``Replicate``.
    """
    if not dist.is_initialized():
        raise ModelError(
            "The model's parameters are shares of several processes, and there is no process group: call "
            "torch.distributed.init_process_group in each of them first."
        )
    from torch.distributed.tensor import Replicate, Shard

    units, meshes = _fsdp_modules(model), list[Any]()
    for unit in units:
        unit.reshard()  # type: ignore[operator]
    for name, tensor in named_tensors(model).items():
        if not is_share(tensor):
            continue
        share: Any = tensor
        meshes.append(share.device_mesh)
        for placed in share.placements:
            if type(placed) not in (Shard, Replicate) or (units and getattr(placed, "dim", 0) != 0):
                raise ModelError(
                    f"{name} is placed as {placed}, which cannot be made again of a smaller parameter: prune a model "
                    "whose parameters are Shard(0) or Replicate, as fully_shard makes them, then place the result's."
                )
        if share.device_mesh != meshes[0]:
            raise ModelError(f"{name} lies on another mesh than the parameters before it: shard the model on one mesh.")


def _fsdp_modules(model: nn.Module) -> list[nn.Module]:
    kind = getattr(sys.modules.get("torch.distributed.fsdp"), "FSDPModule", None)
    return [] if kind is None else [module for _, module in named_modules(model) if isinstance(module, kind)]


_HOOKS = {  # of a module, and what is known of each beside it
    "_forward_hooks": ("_forward_hooks_with_kwargs", "_forward_hooks_always_called"),
    "_forward_pre_hooks": ("_forward_pre_hooks_with_kwargs",),
    "_load_state_dict_post_hooks": (),
}
_STATE = "__composable_api_state_key"  # begins the names of what torch.distributed keeps in a module


def _unhook(copied: nn.Module, module: nn.Module) -> None:
    """Take from a copy of a module the class that ``fully_shard`` gave it, its hooks, and what it keeps there."""
    kind: Any = type(module)
    copied.__class__ = kind.__mro__[kind._orig_cls_mro_index]
    for table, beside in _HOOKS.items():
        for key, hook in getattr(module, table).items():
            if getattr(hook, "__module__", "").startswith("torch.distributed.fsdp"):
                for own in (table, *beside):
                    getattr(copied, own).pop(key, None)
    for name in [name for name in vars(copied) if name.startswith(_STATE)]:
        del copied.__dict__[name]


def resharded(result: Any, model: nn.Module) -> Any:
    """``result``, with shares as ``model`` has them, made to run where ``fully_shard`` made ``model`` run.

    Every layer is a unit of its own, and what is left one of the whole, with the mesh and the precision that the model
    has. Tied parameters belong to the whole.
    """
    units = _fsdp_modules(model)
    shares = {id(t): t for t in named_tensors(result).values() if is_share(t)}
    if not units or not shares:
        return result
    from torch.distributed.fsdp import fully_shard

    state = units[0]._get_fsdp_state()  # type: ignore[operator]
    values: dict[str, Tensor] = {}
    made: dict[int, nn.Parameter] = {}
    for name, tensor in named_tensors(result).items():
        if id(tensor) in shares:
            values[name] = tensor
            empty = torch.empty(tensor.shape, dtype=tensor.dtype, device="meta")
            made.setdefault(id(tensor), nn.Parameter(empty, requires_grad=tensor.requires_grad))
    replace_tensors(result, lambda tensor: made.get(id(tensor), tensor))
    mesh: Any = next(iter(shares.values()))
    settings: dict[str, Any] = {
        "mesh": mesh.device_mesh, "mp_policy": state._mp_policy,
        "ignored_params": {p for p in result.parameters() if not p.is_meta},
    }  # fmt: skip
    called = {str(node.target) for node in result.graph.nodes if node.op == "call_module"}
    layers = {id(m): m for name, m in named_modules(result) if name in called}
    holders = Counter(id(p) for m in result.modules() for p in m._parameters.values())
    for layer in layers.values():
        own = [p for p in layer.parameters() if p.is_meta]
        if own and all(holders[id(p)] == 1 for p in own):
            fully_shard(layer, **settings)
    fully_shard(result, **settings)
    result.load_state_dict(values, strict=False, assign=True)
    return result


# -- several processes -------------------------------------------------------------------------------------------------


def check_same(facts: Mapping[str, Any]) -> None:
    """Refuse to go on where the processes do not do the same: they would wait for each other, or mix what they hold.

    ``facts``: name -> what must be the same, compared as text.

    Raises:
        InputError: the first that is not, in every process.
    """
    box = from_all({name: str(value) for name, value in facts.items()})
    for name in {key: None for found in box for key in found}:
        for rank, found in enumerate(box):
            if found.get(name) != box[0].get(name):
                mine, other = (str(each.get(name, "nothing")) for each in (box[0], found))
                raise InputError(
                    f"The processes differ in {name}: {_short(mine)} in process 0, {_short(other)} in process {rank}. "
                    "Make the same call in every process."
                )


def _short(text: str) -> str:
    return text if len(text) <= 200 else text[:200] + " ..."


def all_agree(found: bool, module: nn.Module) -> bool:
    """Whether all processes that share the module found so: where sums of floats decide, the last bit may differ."""
    return all(from_all(found)) if is_sharded(module) else found


def from_all(value: T) -> list[T]:
    """What every process has, in the order of their ranks."""
    box: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(box, value)
    return box
