"""``record``: run the model, build the recorded module, explain what fails."""

from __future__ import annotations

import inspect
from collections.abc import Container, Mapping
from dataclasses import replace
from types import MappingProxyType
from typing import Any

import torch
from torch import Tensor, nn

from fxprune.errors import ExampleInputsError, FxpruneError, RecordError
from fxprune.io.text import some
from fxprune.recording import boundary, rehearsal, state, trees
from fxprune.recording.arrays import TracedArray
from fxprune.recording.dtypes import NOTE, OTHER, Ways, follow_dtypes, names_asked, ways_of
from fxprune.recording.either import BRANCH, follow_training
from fxprune.recording.layers import restore_linears
from fxprune.recording.leaves import is_torchs
from fxprune.recording.module import RecordedModule, add_constant, add_training_flag, clone_tree
from fxprune.recording.options import Options
from fxprune.recording.parts import Parts
from fxprune.recording.recorder import Recorder
from fxprune.recording.sources import raised_at
from fxprune.recording.together import is_together
from fxprune.recording.traced import TracedFlag
from fxprune.recording.writer import GraphWriter

_DEFAULT = Options()
Widths = Mapping[torch.dtype, torch.dtype]
_SAME: Widths = MappingProxyType({})


def record(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
) -> RecordedModule:
    """Run ``model`` once in eval mode on the example inputs and return what it did as a graph.

    The graph is called like the model. Its parameters and buffers are the model's own, under the same names and in
    the same order; the model is left as it was. Sizes that the model reads from tensors stay dynamic, so other batch
    sizes work.

    Where the graph does not depend on data the run needs none (see ``rehearsal``); where that shows only during the
    run, forward runs again for real, so that what it prints, it prints twice.

    Every node has ``meta["source"]`` (the user's line), ``meta["module"]`` (dotted name of the innermost module that
    ran), ``meta["shape"]`` (of a single tensor, else None), its ``meta["dtype"]`` (if there is one) and, if it writes
    in place, ``meta["mutates"]``. ``meta["notes"]`` of the result lists what was fixed at the recorded value, each with
    its source line.

    Raises ``ExampleInputsError`` if the model itself fails on the inputs, ``RecordError`` if only the recording does.
    """
    return recorded(model, example_inputs, example_kwargs)


def recorded(
    model: nn.Module,
    example_inputs: Tensor | tuple[Any, ...],
    example_kwargs: dict[str, Any] | None = None,
    *,
    rehearse: bool = True,
    compiled: bool = True,
    options: Options = _DEFAULT,
) -> RecordedModule:
    """:func:`record`; with ``rehearse``, without data where that is enough. ``compiled``: see ``RecordedModule``.

    ``options``: how to record; given up one by one where they are what fails.
    """
    args, kwargs = boundary.normalised(example_inputs, example_kwargs)
    bound = boundary.bind(model, args, kwargs)
    parts = Parts.of(model)
    _check_initialised(model, parts)
    recorder = _rehearsed(model, parts, bound, options) if rehearse and rehearsal.is_possible(parts, bound) else None
    if recorder is None:
        recorder = _recorded(model, parts, bound, boundary.describe(args, kwargs), options)
    writer = recorder.writer
    own = recorder.options
    ways: Ways | None = {}
    if names_asked(writer):  # compared before anything is put into the graph
        ways = ways_of(writer, _otherwise(model, parts, bound, own, OTHER))
    if any(note.endswith(BRANCH) for note in writer.notes):
        follow_training(writer, lambda paths: _otherwise(model, parts, bound, replace(own, training=paths)))
    if ways is None or None in ways.values():
        writer.note(NOTE, source=type(model).__name__)
    follow_dtypes(writer, ways or {})
    root = clone_tree(model, {str(node.target) for node in writer.graph.nodes if node.op == "call_module"})
    restore_linears(root, writer.graph, parts.modules)
    for path in writer.flags:
        add_training_flag(root, path)
    for name, tensor in recorder.constants().items():
        add_constant(root, name, tensor)
    recorder.forget()
    writer.notes += _on_uncalled_hooks(parts, {str(node.target) for node in writer.graph.nodes})
    result = RecordedModule(root, writer.graph, type(model).__name__, compiled=compiled)
    seen = ("writes", "draws", "gradients", "fused")
    result.meta.update(notes=writer.notes, **{name: getattr(recorder, name) for name in seen})
    return result


def _on_uncalled_hooks(parts: Parts, targets: Container[str]) -> list[str]:
    """A note on hooks of the user's on modules that are no node, as of blocks: what they compute is, they are not."""
    tables = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    hooked = [
        path or "the model"
        for path, module in parts.modules.items()
        if path not in targets and any(not is_torchs(h) for table in tables for h in getattr(module, table).values())
    ]
    return (
        [f"the graph does not call hooks of {some(hooked)}, and has what they computed when recorded"] if hooked else []
    )


def _check_initialised(model: nn.Module, parts: Parts) -> None:
    for name, tensor in parts.tensors.items():
        if torch.nn.parameter.is_lazy(tensor):
            raise RecordError(f"{name} of {type(model).__name__} is not initialised yet. Call the model once first.")


def _rehearsed(
    model: nn.Module, parts: Parts, bound: inspect.BoundArguments, options: Options, widths: Widths = _SAME
) -> Recorder | None:
    """Record without data; None if the run needs it, or does not end. ``widths``: see ``Recorder``."""
    recorder = Recorder(model, parts, replace(options, clear_caches=False), rehearse=True, widths=widths)
    run = recorder.rehearsal
    assert run is not None
    try:
        recorder.run(rehearsal.without_data(bound))
    except Exception:
        recorder.forget()
        return None
    recorder.forget()
    writer = recorder.writer
    if run.needs_data or writer.hashed or run.is_kept() or not run.are_innocent(writer.constants.values()):
        return None
    return _noted(recorder)


def _otherwise(
    model: nn.Module, parts: Parts, bound: inspect.BoundArguments, options: Options, widths: Widths = _SAME
) -> GraphWriter | None:
    """What the model does where modules say that they train, or floats are wider; None if it does not get through."""
    if rehearsal.is_possible(parts, bound) and (found := _rehearsed(model, parts, bound, options, widths)) is not None:
        return found.writer
    recorder = Recorder(model, parts, options, private=True, widths=widths)
    try:
        recorder.run(bound)
    except Exception:
        return None
    finally:
        recorder.forget()
    return recorder.writer


def _own_output(model: nn.Module, parts: Parts, bound: inspect.BoundArguments, recorder: Recorder) -> Any:
    """Without a recording, of a model of which ``recorder`` saw what it reads."""
    again = Recorder(model, parts, recorder.options, private=True, gradients=recorder.gradients)
    return again.run_unrecorded(bound)


def _recorded(model: nn.Module, parts: Parts, bound: inspect.BoundArguments, given: str, options: Options) -> Recorder:
    """Record; where a liberty taken by ``Options`` is what fails, record again without it."""
    caches = bool(state.cached_tensor_dicts(parts.modules.values()))
    options, private = replace(options, clear_caches=options.clear_caches and caches), False
    while True:
        recorder = Recorder(model, parts, options, private)
        try:
            output = recorder.run(bound)
        except FxpruneError:
            raise
        except Exception as error:
            if recorder.memory.was_refused:
                private = True
                continue
            fewer = _without_culprit(options, error)
            if fewer is None:
                raise _explained(model, parts, bound, given, error, recorder) from error
            options = fewer
            continue
        if recorder.memory.was_refused:
            private = True
            continue
        liberties = options.clear_caches or (options.own_hashes and recorder.writer.hashed)
        if liberties and not _same(output, _own_output(model, parts, bound, recorder)):
            options = replace(options, clear_caches=False, own_hashes=False)
            continue
        if recorder.draws_seeded:
            raise RecordError(
                f"{type(model).__name__}.forward seeds torch's random numbers, which is no part of a graph. Draw with "
                "a generator of its own: torch.rand(..., generator=torch.Generator().manual_seed(seed))."
            )
        if not options.traced_flags:
            recorder.writer.note("functional dropout is recorded as it goes in eval mode", source=type(model).__name__)
        return _noted(recorder)


def _noted(recorder: Recorder) -> Recorder:
    if recorder.foreign_randomness:
        recorder.writer.note(
            "forward draws random numbers from Python or NumPy, which are kept as constants", source="the model"
        )
    return recorder


def _without_culprit(options: Options, error: Exception) -> Options | None:
    if options.traced_flags and TracedFlag.__name__ in str(error):
        return replace(options, traced_flags=False)
    if options.traced_numpy and TracedArray.__name__ in str(error):
        return replace(options, traced_numpy=False)
    if options.clear_caches:
        return replace(options, clear_caches=False)
    if options.own_hashes:
        return replace(options, own_hashes=False)
    if options.traced_numpy:
        return replace(options, traced_numpy=False)
    if options.traced_builtins:
        return replace(options, traced_builtins=False)
    if options.inlined_scripts:
        return replace(options, inlined_scripts=False)
    return None


def _same(one: Any, other: Any) -> bool:
    """Whether two outputs agree up to rounding: emptying a dict changed nothing but where its tensors come from."""
    first, second = list(trees.tensors(one)), list(trees.tensors(other))
    return len(first) == len(second) and all(
        a.shape == b.shape and (a.is_meta or torch.allclose(a, b, rtol=1e-3, atol=1e-5, equal_nan=True))
        for a, b in zip(first, second, strict=True)
    )


def _explained(
    model: nn.Module, parts: Parts, bound: inspect.BoundArguments, given: str, error: Exception, recorder: Recorder
) -> FxpruneError:
    """The model's own failure as an ``ExampleInputsError``; a failure of the recording alone as a ``RecordError``."""
    name = type(model).__name__
    try:
        _own_output(model, parts, bound, recorder)
    except Exception as own:
        return ExampleInputsError(
            f"{name}.forward raised {type(own).__name__}: {own}{_where(own)}. It was called with {given}. "
            f"Pass example inputs that the model accepts in eval mode.{_of_calls(model)}"
        )
    return RecordError(
        f"{name} runs, but recording it raised {type(error).__name__}: {error}{_where(error)}. "
        "Express what that line does with torch functions, or keep it out of forward."
    )


def _of_calls(model: nn.Module) -> str:
    """What the keys of a dict were taken for."""
    if not is_together(model):
        return ""
    names = " and ".join(boundary.signature_of(model).parameters)
    return f" The dict was taken for the calls {names}; one that forward takes itself is wrapped: (the_dict,)."


def _where(error: Exception) -> str:
    source = raised_at(error)
    return f" (at {source})" if source else ""
