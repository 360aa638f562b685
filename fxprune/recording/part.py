"""One part of a model: the inputs that it gets, and another one in its place."""

from __future__ import annotations

from typing import Any

from torch import fx, nn

from fxprune.errors import ExampleInputsError, InputError, suggestion
from fxprune.recording.boundary import with_fresh_tensors
from fxprune.recording.copies import deep_copy
from fxprune.recording.module import evaluated
from fxprune.recording.twin import Twin

Inputs = tuple[tuple[Any, ...], dict[str, Any]]


def part_of(model: nn.Module, name: str, args: Any, kwargs: Any) -> tuple[nn.Module, Inputs]:
    """A submodule and the inputs of its first call when a copy of the model runs on the example inputs.

    Raises:
        InputError: there is no such submodule, or it is not called.
        ExampleInputsError: the model does not run on the inputs.
    """
    known = dict(model.named_modules(remove_duplicate=False))
    if not name or name not in known:
        raise InputError(f"submodule={name!r} is not part of the model.{suggestion(name, known)}")
    calls: list[Inputs] = []

    def note(module: nn.Module, given: tuple[Any, ...], named: dict[str, Any]) -> None:
        calls.append((given, named))

    twin = Twin(model)
    twin.model.get_submodule(name).register_forward_pre_hook(note, with_kwargs=True)
    try:
        twin(args, kwargs)
    except Exception as error:
        raise ExampleInputsError(f"The model does not run on the example inputs: {error}.") from error
    if not calls:
        raise InputError(f"submodule={name!r} is not called when the model runs on the example inputs.")
    return known[name], with_fresh_tensors(calls[0])


def with_part(model: nn.Module, name: str, part: fx.GraphModule, args: Any, kwargs: Any) -> nn.Module:
    """A copy of the model with ``part`` in place of a submodule; it must run on the example inputs."""
    result = deep_copy(model)
    result.set_submodule(name, part)
    with evaluated(result):
        result(*args, **kwargs)
    return result
