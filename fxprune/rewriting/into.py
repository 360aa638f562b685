"""``into``: the pruned layers put back into the model's own class."""

from __future__ import annotations

import copy
from collections import defaultdict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import combinations
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import ConversionError, InputError, PlanError
from fxprune.io.text import some
from fxprune.ops.repair import RESCALED
from fxprune.recording import (
    cached_tensor_dicts,
    evaluated,
    named_tensors,
    raised_at,
    replace_tensors,
    without_fast_path,
)
from fxprune.recording.checks import check_module
from fxprune.recording.copies import deep_copy
from fxprune.recording.inputs import RECORD_KEY, batch_size, device_of, like_parameters, make_inputs, tensors_of
from fxprune.recording.randomness import repeatable
from fxprune.recording.together import CALLS_KEY, alone, called_as
from fxprune.reports.report import ORIGIN_KEY, REPORT_KEY, plan_of
from fxprune.rewriting import CUTS_KEY, REPAIRED, RESIZED, Cuts, adapt, adapts_by_itself
from fxprune.rewriting.held import set_numbers, whole_numbers
from fxprune.rewriting.pretrained import in_its_class, saves_its_config
from fxprune.rewriting.scales import take_up_scales
from fxprune.selection.plan import is_selection
from fxprune.verification import DOUBLE_TOLERANCE, TOLERANCE, Inputs, relative_error

_TOLD = (ORIGIN_KEY, "fxprune_sizes")  # by an earlier call
_MOST_NAMES = 6  # of attributes, of which any may be what was read

REMEDY = "Prune with for_class=True, or use the pruned GraphModule itself."


def into(model: nn.Module, pruned: fx.GraphModule) -> nn.Module:
    """A copy of ``model``, of its own class, with the layers of ``pruned``: its weights, and the sizes to go with them.

    For code that needs what only the class has (``forward_features``, ``no_weight_decay``, ``default_cfg``). It works
    where no line of the class's forward names a size that was cut, or where it reads that size from an attribute of its
    own (``head_dim``, ``num_heads``) or from an entry of what configures it (``config.head_dim``, of a plain object, a
    dataclass or a dict, of which it gets a copy of its own): such attributes are set on the copy, and its
    ``fxprune_sizes`` tells them: name -> (before, after). A plan made with ``for_class=True`` cuts nothing else. An
    attribute that a forward only compares (``assert x.shape[1] == self.channels``) follows the sizes of the layers
    right below. Where the width of a head is the scale of an attention, the weights of the queries take up what it was.
    Attributes of torch's own layers (``in_features``, ``groups``, ``normalized_shape`` ...) follow, other numbers that
    a class keeps about itself (``num_features``) stay as they are. The copy is compared with ``pruned`` on fresh inputs
    in eval mode, and must run in train mode if ``model`` does. A network of transformers is of a subclass of the same
    name, which its ``save_pretrained`` and ``from_pretrained`` take with these sizes, where numbers of its config do
    not say them. Residual branches that went (``depth=``) are replaced by an ``nn.Identity``, where that is their
    block, or by zeros; not in networks of transformers, which could not be loaded again.

    Args:
        model: the class that ``pruned`` was made from, with any weights; not changed.
        pruned: from ``fxprune.prune``, ``apply`` or ``load``, fine-tuned or not; shares nothing with the result.

    Raises:
        ConversionError: the class cannot hold the pruned layers; names the source line that prevents it.
        PlanError: ``pruned`` was made from another model.
        InputError: ``pruned`` is no pruned ``GraphModule``, or has no values.

    Examples:
        >>> small = fxprune.prune(model, x, flops=0.5, progress=False)
        >>> same_class = fxprune.into(model, small)
        >>> type(same_class).__name__, same_class[0].out_channels == small.get_parameter("0.weight").shape[0]
        ('Sequential', True)
    """
    cuts = pruned.meta.get(CUTS_KEY) if isinstance(pruned, fx.GraphModule) else None
    if not isinstance(cuts, Cuts):
        raise InputError(
            f"pruned is {type(pruned).__name__}; pass the GraphModule that fxprune.prune, apply or load returned."
        )
    check_module("model", model)
    check_module("pruned", pruned)
    if any(t.is_meta for t in (*model.parameters(), *pruned.parameters())):
        raise InputError("The weights are on the meta device, where nothing can be compared. Load them first.")
    check_same(model, pruned)
    whole = called_as(pruned, model)
    result, exact = _held(whole, pruned)
    result = result if whole is model else alone(result)
    report = replace(pruned.meta[REPORT_KEY], optimizer=None)  # whose parameters are those of the graph
    told = {key: pruned.meta[key] for key in (RECORD_KEY, CALLS_KEY) if key in pruned.meta}
    vars(result)[ORIGIN_KEY] = {**told, REPORT_KEY: report}

    def equals(instance: nn.Module) -> bool:
        try:
            _compare(whole, called_as(pruned, instance), pruned, exact)
        except ConversionError:
            return False
        return True

    return in_its_class(result, equals)


Exact = Mapping[str, Tensor]  # name of a parameter -> what it would be in double


class Zeros(nn.Module):
    """Stands in a class where a residual branch was that went: zeros like its first input."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """``[...] -> [...]``."""
        return torch.zeros_like(x)


def _held(model: nn.Module, pruned: fx.GraphModule) -> tuple[nn.Module, Exact]:
    """The class with the pruned layers, compared; without branches that went, if it computes the same then."""
    plan = pruned.meta[REPORT_KEY].plan
    removed, joins = plan.removed, plan.joins
    if selected := [name for name in plan.kept if is_selection(name) and name not in named_tensors(model)]:
        raise ConversionError(
            f"{type(model).__name__} has no place for what blocks select of a stream ({some(selected)}). Use the "
            "GraphModule."
        )
    if joins:
        raise ConversionError(
            f"{some(joins)} of pruned choose what they read of a stream, and {type(model).__name__} cannot. "
            "Use the GraphModule, or prune without joins=True."
        )
    if not removed:
        return _holding(model, pruned)
    refusal = ConversionError(
        f"{type(model).__name__} has residual branches in its forward that pruned lacks, and cannot skip them: "
        f"{some(removed)}. Use the GraphModule, or prune without depth=."
    )
    if saves_its_config(model):  # it would not be loaded as it was saved
        raise refusal
    for stand_in in (nn.Identity, Zeros):
        shallow = _without(model, removed, pruned.meta[CUTS_KEY].removed, stand_in)
        try:
            if shallow is not None:
                return _holding(shallow, pruned)
        except ConversionError:
            continue
    raise refusal


def _without(
    model: nn.Module, branches: Sequence[str], parameters: frozenset[str], stand_in: type[nn.Module]
) -> nn.Module | None:
    """A copy with something else in the place of every branch, and nothing where only parameters of branches were.

    None if a branch is no module.
    """
    result = _copied(model)
    modules = dict(result.named_modules())
    if not modules.keys() >= set(branches):
        return None
    gone = [*branches]
    for name in branches:
        result.set_submodule(name, stand_in())
    for name, module in modules.items():
        inside = {f"{name}.{key}" for key, _ in module.named_parameters(remove_duplicate=False)}
        if inside and parameters >= inside and not any(_is_in(name, other) for other in gone):
            result.set_submodule(name, nn.Identity())
            gone.append(name)
    return result.train(model.training)


def _is_in(name: str, other: str) -> bool:
    return name == other or name.startswith(f"{other}.")


def _holding(model: nn.Module, pruned: fx.GraphModule) -> tuple[nn.Module, Exact]:
    result = _put_tensors(model, pruned)
    for cache in _caches(model, result, pruned):
        cache.clear()
    _put_sizes(result, pruned)
    repaired, outgrown = list(_repaired(result, pruned)), list(_outgrown(result, pruned))
    lines = sorted({str(node.meta.get("source", node.name)) for node in (*repaired, *outgrown)})
    refusal = ConversionError(
        f"{type(model).__name__} cannot hold the pruned layers: its code names sizes that were cut, at "
        f"{some(lines)}{_several(result, repaired)}. {REMEDY}"
    )
    if outgrown:
        raise refusal
    exact = take_up_scales(result, pruned, _fresh_inputs(pruned))
    first: ConversionError | None = None
    for sizes in _attempts(model, result, repaired):
        try:
            attempt = _with_sizes(result, sizes) if sizes else result
            _compare(model, attempt, pruned, exact)
        except ConversionError as error:
            first = first or error
        else:
            return attempt, exact
    assert first is not None, "there is an attempt"
    raise refusal if repaired else first


def _caches(model: nn.Module, result: nn.Module, pruned: fx.GraphModule) -> list[dict[Any, Any]]:
    """Dicts that ``result`` holds of tensors computed from the dense weights: those without which ``model`` computes
    the same. It filled the others when it was made."""
    found = cached_tensor_dicts(result.modules())
    if not found:
        return []
    inputs = _fresh_inputs(pruned)

    def are_caches(indices: Sequence[int]) -> bool:
        emptied = _copied(model)
        dicts = cached_tensor_dicts(emptied.modules())
        for index in indices:
            dicts[index].clear()
        try:
            return relative_error(_run(emptied, inputs), _run(_copied(model), inputs)) <= TOLERANCE
        except Exception:  # a key that it looks for
            return False

    return found if are_caches(range(len(found))) else [d for i, d in enumerate(found) if are_caches([i])]


def _copied(model: nn.Module, instead: Mapping[int, Tensor] | None = None) -> nn.Module:
    """A deep copy, in which tensors that a gradient runs through, and torch copies none of, have their values alone.

    Layers keep such from an earlier call, or, with ``torch.nn.utils.weight_norm``, compute their weight ahead of each.
    ``instead``: what takes the place of tensors, by their ids.
    """
    held = (tensor for module in model.modules() for value in vars(module).values() for tensor in tensors_of(value))
    try:
        values = {id(tensor): tensor.detach().clone() for tensor in held if not tensor.is_leaf}
        return deep_copy(model, values | dict(instead or {}))
    except Exception as error:  # of the user's
        raise ConversionError(
            f"{type(model).__name__} cannot be copied: copy.deepcopy raised {_said(error)}. Let go of what it holds "
            "that has no copy."
        ) from error


def check_same(model: nn.Module, pruned: fx.GraphModule) -> None:
    """
    Raises:
        PlanError: ``pruned`` was made from another model.
    """
    cuts, plan = pruned.meta[CUTS_KEY], plan_of(pruned)
    own = {name: tuple(p.shape) for name, p in model.named_parameters(remove_duplicate=False)}
    others = [name for name, shape in own.items() if cuts.shapes.get(name) != shape]
    if others:
        before = "it was before pruning"
        if plan is not None and plan.earlier is not None:
            before = "its last pruning found it (fxprune.apply makes it with the plan's .earlier)"
        raise PlanError(
            f"pruned was made from another model than this {type(model).__name__}: {some(others)} had other names or "
            f"shapes. Pass the model as {before}."
        )


def _put_tensors(model: nn.Module, pruned: nn.Module) -> nn.Module:
    """A copy of ``model`` with copies of the pruned parameters and buffers; what is one tensor in it stays one.

    Also where a list, say, holds it a second time: the copy is made with the pruned ones in the place of the model's.
    """
    given = named_tensors(pruned)
    names = {id(tensor): name for name, tensor in named_tensors(model).items() if name in given}
    made: dict[int, Tensor] = {}
    for key, name in names.items():
        new = given[name].detach().clone(memory_format=torch.preserve_format)
        made[key] = nn.Parameter(new, given[name].requires_grad) if isinstance(given[name], nn.Parameter) else new
    result = _copied(model, made)
    # A copy of the user's own making may have left them out.
    others = {id(tensor): name for name, tensor in named_tensors(result).items() if name in given}
    by_name = {name: made[key] for key, name in names.items()}
    replace_tensors(result, lambda tensor: by_name.get(others.get(id(tensor), ""), tensor))
    return result


def _put_sizes(result: nn.Module, pruned: nn.Module) -> None:
    """Size attributes: of layers that are whole in the graph those found there, of others by their new weights."""
    others = dict(pruned.named_modules(remove_duplicate=False))
    for name, module in result.named_modules():
        other = others.get(name)
        if type(other) is type(module) and name:
            for key, value in vars(other).items():
                if isinstance(value, (int, float, tuple)) and key != "training":
                    setattr(module, key, value)
        elif adapts_by_itself(module):
            adapt(module, (), ())


def _repaired(result: nn.Module, pruned: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes with which the pruned graph says something else than the class."""
    for node in pruned.graph.nodes:
        if node.meta.get(REPAIRED) and not adapts_by_itself(result.get_submodule(node.meta.get("module", ""))):
            yield node


def _outgrown(result: nn.Module, pruned: fx.GraphModule) -> Iterator[fx.Node]:
    """Nodes of tensors that the class makes by itself in another size."""
    cuts: Cuts = pruned.meta[CUTS_KEY]
    known, buffers = named_tensors(result), dict(pruned.named_buffers(remove_duplicate=False))
    for node in pruned.graph.nodes:
        if node.op == "get_attr" and node.target in cuts.shapes and node.target not in known:
            here = buffers.get(str(node.target))
            if here is not None and tuple(here.shape) != cuts.shapes[str(node.target)]:
                yield node


Sizes = dict[tuple[str, str], tuple[int, int]]  # module, attribute -> before, after


def obstacles(model: nn.Module, pruned: fx.GraphModule, strict: bool = False) -> list[fx.Node]:
    """Nodes at which ``pruned`` cannot be put into the class of ``model``. ``strict``: attributes are not trusted."""
    repaired = list(_repaired(model, pruned))
    return [*_outgrown(model, pruned), *(repaired if strict else _homeless(model, repaired))]


def _homeless(model: nn.Module, repaired: Sequence[fx.Node]) -> list[fx.Node]:
    """Nodes at which something else than numbers changed, or a number that is no attribute, or became several.

    A number that is a multiple of an attribute, before and after, may be computed from it (``heads * head_dim``).
    """
    after, kept = _numbers(repaired), _kept_by(model, repaired)

    def is_held(node: fx.Node) -> bool:
        path, pairs = node.meta.get("module", ""), node.meta.get(RESIZED, ())
        one_each = all(
            (path, old) in kept or (len(after[path, old]) == 1 and _is_multiple(path, old, new, kept))
            for old, new in pairs
        )
        return RESCALED in node.meta or (bool(pairs) and one_each)

    return [node for node in repaired if not is_held(node)]


Kept = dict[tuple[str, int], tuple[int, list[str]]]
"""(Module, number) -> the number that it became, and the attributes that are the first."""


def _kept_by(model: nn.Module, repaired: Sequence[fx.Node]) -> Kept:
    """Numbers at these nodes that became the same new one wherever the module has them, and are attributes."""
    found: Kept = {}
    for (path, old), news in _numbers(repaired).items():
        keys = _attributes(model, path, old) if len(news) == 1 else []
        if keys:
            found[path, old] = next(iter(news)), keys
    return found


def _is_multiple(path: str, old: int, new: int, kept: Kept) -> bool:
    """Whether a number may be so many times another of the module, before and after."""
    others = [(a, b) for (place, a), (b, _) in kept.items() if place == path and 1 < a < old]
    return any(old % a == 0 and new == old // a * b for a, b in others)


def _several(model: nn.Module, repaired: Sequence[fx.Node]) -> str:
    """Which attributes would have to be two numbers at once."""
    found = [
        f"{_named(path, key)}={old} became {' and '.join(map(str, sorted(news)))}"
        for (path, old), news in _numbers(repaired).items()
        for key in (_attributes(model, path, old) if len(news) > 1 else ())
    ]
    return f": {some(found)}" if found else ""


def _numbers(repaired: Sequence[fx.Node]) -> dict[tuple[str, int], set[int]]:
    """(module, number) -> what the number became at the nodes of the module."""
    after: dict[tuple[str, int], set[int]] = defaultdict(set)
    for node in repaired:
        for old, new in node.meta.get(RESIZED, ()):
            after[node.meta.get("module", ""), old].add(new)
    return after


def _attributes(model: nn.Module, path: str, number: int) -> list[str]:
    """Of a module those that are this number; of what configures it too, but for configs that a library saves."""
    held = whole_numbers(model.get_submodule(path), inside=not saves_its_config(model))
    return [key for key, value in held.items() if value == number and key.partition(".")[0] not in _TOLD]


def _attempts(model: nn.Module, result: nn.Module, repaired: Sequence[fx.Node]) -> Iterator[Sizes]:
    """Attributes that may be what the numbers at these nodes were read from: all of them, else those of some names.

    An attribute may be so if it has the value of such a number, which became the same new one wherever the module has
    it. Of entries of what configures a module, which has others by chance, as few as will do; of very many all, if one
    will not. Numbers that a forward only compares are in no node: a module may have those that its own layers had.
    """
    kept = _kept_by(result, repaired)
    found: Sizes = {(path, key): (old, new) for (path, old), (new, keys) in kept.items() for key in keys}
    rivals = [set(keys) for (path, old), (new, keys) in kept.items() if not _is_multiple(path, old, new, kept)]
    names = dict.fromkeys(key for _, key in found)
    inside = [name for name in names if "." in name]
    own = [name for name in names if name not in inside]

    def of(some_names: Sequence[str]) -> Sizes:
        return {place: sizes for place, sizes in found.items() if place[1] in some_names}

    def with_all_of(chosen: Sequence[Sequence[str]]) -> Iterator[Sizes]:
        return (of(each) for each in chosen if not any(keys.isdisjoint(each) for keys in rivals))

    for count in range(len(inside) if len(inside) <= _MOST_NAMES else 2):
        yield from with_all_of([[*own, *few] for few in combinations(inside, count)])
    yield found
    if others := {place: sizes for place, sizes in _of_layers(model, result).items() if place not in found}:
        yield others | found
    if 1 < len(names) <= _MOST_NAMES:  # a width that is as large as the number of heads, say
        for count in reversed(range(1, len(names))):
            yield from with_all_of([*combinations(names, count)])
    if len(names) > 1:
        yield from (of([name]) for name in names)


def _of_layers(model: nn.Module, result: nn.Module) -> Sizes:
    """Attributes that are a size of layers right below: of one that has the same name, of inputs, or of any."""
    after: dict[tuple[str, int], dict[str, set[int]]] = defaultdict(lambda: defaultdict(set))
    for name, layer in model.named_modules():
        if name and adapts_by_itself(layer):
            path = name.rpartition(".")[0]
            while path and isinstance(model.get_submodule(path), (nn.Sequential, nn.ModuleList)):
                path = path.rpartition(".")[0]
            own = vars(result.get_submodule(name))
            for key, old in vars(layer).items():
                if type(old) is int:
                    for kind in (key, key.partition("_")[0], ""):
                        after[path, old][kind].add(own[key])
    found: Sizes = {}
    for (path, old), news in after.items():
        for key in _attributes(model, path, old):
            new = next((news[kind] for kind in (key, "", "in") if len(news.get(kind, ())) == 1), {old})
            if new != {old}:
                found[path, key] = old, *new  # type: ignore[assignment]
    return found


def _with_sizes(result: nn.Module, sizes: Sizes) -> nn.Module:
    """A copy whose attributes have these sizes, and which tells them."""
    changed, copies = _copied(result), dict[Any, Any]()
    numbers: dict[str, dict[str, int]] = defaultdict(dict)
    for (path, key), (_, new) in sizes.items():
        numbers[path][key] = new
    for path, own in numbers.items():
        try:
            set_numbers(changed.get_submodule(path), own, copies)
        except Exception as error:  # of the user's
            said = some([f"{_named(path, key)}={new}" for key, new in own.items()])
            raise ConversionError(f"{said} cannot be set: {_said(error)}. {REMEDY}") from error
    changed.fxprune_sizes = {_named(*place): pair for place, pair in sizes.items()}  # type: ignore[assignment]
    return changed


def _named(path: str, key: str) -> str:
    return f"{path}.{key}" if path else key


def _compare(model: nn.Module, result: nn.Module, pruned: fx.GraphModule, exact: Exact) -> None:
    """Equal outputs in eval mode, and no exception in train mode unless ``model`` raises one too."""
    name = type(model).__name__
    inputs = _fresh_inputs(pruned)
    try:
        error = _difference(result, pruned, inputs)
        if error > TOLERANCE:  # what float32 rounds may be amplified
            double = _copied(result).double(), copy.deepcopy(pruned).double()
            with torch.no_grad():
                for tensor, value in exact.items():
                    double[0].get_parameter(tensor).copy_(value)
            error = _difference(*double, _fresh_inputs(double[1]))
            if error <= DOUBLE_TOLERANCE:
                error = 0.0
    except Exception as failure:
        raise ConversionError(
            f"{name} cannot hold the pruned layers: it raised {_said(failure)}. {REMEDY}"
        ) from failure
    if error > TOLERANCE:
        raise ConversionError(
            f"{name} with the pruned layers does not compute what the pruned module does: relative error {error:.1e}. "
            "It uses a tensor or number that it computed before, outside its parameters and buffers, or a number that "
            f"it takes from the shape of a weight. {REMEDY}"
        )
    fault = _fails_in_training(result, inputs)
    if fault is not None and _fails_in_training(model, inputs) is None:
        raise ConversionError(
            f"{name} with the pruned layers runs in eval mode only: in train mode it raised {_said(fault)}. "
            "Layers that are used in training alone are not pruned with the others. "
            "Fine-tune the pruned GraphModule itself."
        )


def _said(failure: BaseException) -> str:
    first = next(iter(str(failure).splitlines()), "")
    return f"{type(failure).__name__}: {first} (at {raised_at(failure) or 'unknown'})"


def _fresh_inputs(pruned: fx.GraphModule) -> Inputs:
    """With another batch size, and integers in another order, than recorded where the pruned module takes that."""
    record = like_parameters(pruned.meta[RECORD_KEY], pruned)
    device = device_of(pruned)
    recorded = batch_size(record)
    other = 2 if recorded != 2 else 3
    for batch, permute in ((other, True), (other, False), (recorded, True)):
        inputs = make_inputs(record, device, batch, 1, permute)
        try:
            with evaluated(pruned):
                pruned.forward(*inputs[0], **inputs[1])
            return inputs
        except Exception:  # bound to its example's batch size, or to the order of its integers
            continue
    return make_inputs(record, device, seed=1, permute=False)


def _difference(one: nn.Module, other: fx.GraphModule, inputs: Inputs) -> float:
    return relative_error(_run(one, inputs), _run(other, inputs))


def _run(module: nn.Module, inputs: Inputs) -> Any:
    with evaluated(module), repeatable(), without_fast_path():
        args, kwargs = copy.deepcopy(inputs)
        return module(*args, **kwargs)


def _fails_in_training(model: nn.Module, inputs: Inputs) -> Exception | None:
    live = _copied(model).train()
    try:
        with torch.no_grad(), repeatable():
            args, kwargs = copy.deepcopy(inputs)
            live(*args, **kwargs)
    except Exception as error:
        return error
    return None
