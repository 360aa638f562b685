"""What the commands do, one function each, and what they read and write."""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable, Mapping
from dataclasses import fields
from typing import TYPE_CHECKING, Any

from fxprune.errors import ExampleInputsError, InputError
from fxprune.options import Keywords, LatencyBudget, Loop, Options

if TYPE_CHECKING:
    from torch import nn

    from fxprune.selection.plan import PruningPlan


def prune(options: argparse.Namespace) -> None:
    """A model made smaller, and what was asked for written."""
    _check_outputs(options)
    model, examples = _load(options)
    keywords = _asked(options, model)

    import fxprune

    if options.submodule is None:
        pruned = fxprune.prune(model, **examples, **keywords)
    else:
        pruned = fxprune.prune_submodule(model, options.submodule, **examples, **keywords)
    _write_outputs(pruned, examples, options)


def _asked(options: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """The arguments of ``prune`` that were given."""
    keywords = {**_given(Keywords, options, model), "progress": not options.quiet}
    timing, loop, rest = (_given(record, options, model) for record in (LatencyBudget, Loop, Options))
    if timing and "latency" not in keywords:
        raise InputError(f"--{next(iter(timing))} is about a budget of latency: give --latency too")
    if timing:
        keywords["latency"] = LatencyBudget(keywords["latency"], **timing)
    if loop:
        rest["loop"] = Loop(**loop)
    return {**keywords, "options": Options(**rest)} if rest else keywords


def _given(record: type, options: argparse.Namespace, model: nn.Module) -> dict[str, Any]:
    """The fields of a record that were given, by name; files of Python are read for those that ask for it."""
    result = {}
    for field in fields(record):
        flag = field.metadata["flag"]
        if flag is None or not hasattr(options, field.name):
            continue
        value = getattr(options, field.name)
        if flag.python:
            from fxprune.io import specs

            read = specs.load_python
            value = specs.load_data(value, options.spec, model) if flag.python == "data" else read(value, flag.python)
        result[field.name] = value if flag.join is None else flag.join(value)
    return result


def apply(options: argparse.Namespace) -> None:
    """A model cut by a plan."""
    _check_outputs(options)
    from fxprune.selection.plan import PruningPlan

    plan = PruningPlan.load(options.plan_file)
    model, examples = _load(options)

    import fxprune

    _write_outputs(fxprune.apply(model, plan, **examples), examples, options)


def _check_outputs(options: argparse.Namespace) -> None:
    """Before the work: nobody wants to learn after an hour that a folder is missing."""
    from fxprune.io import files

    for path in (options.onnx, options.plan, options.html):
        if path is not None:
            files.check_writable(path)
    if options.save is not None:
        _saver(options.save)
    taken: dict[str, str] = {}
    for name in ("onnx", "plan", "html", "save"):
        path = getattr(options, name)
        other = name if path is None else taken.setdefault(os.path.realpath(path), name)
        if other != name:
            raise InputError(f"--{other} and --{name} name one file, {path!r}; give each its own")


def _saver(path: str) -> Callable[[nn.Module, str], None]:
    """What writes a file of this name: plain weights, or all that ``fxprune.load`` needs."""
    from fxprune.io import artifact, specs

    if path.endswith((".safetensors", ".pt2")):
        artifact.check_path(path)
        return artifact.save
    specs.check_weights_path(path)
    return specs.save_weights


def _write_outputs(pruned: nn.Module, examples: Mapping[str, Any], options: argparse.Namespace) -> None:
    import fxprune

    meta: Any = pruned.get_submodule(getattr(options, "submodule", None) or "").meta
    report: fxprune.Report = meta["fxprune"]
    if not options.json:
        print(report)
    written: dict[str, Any] = {}
    if options.plan is not None:
        report.plan.save(options.plan)
        written["plan"] = options.plan
    if options.save is not None:
        _saver(options.save)(pruned, options.save)
        written["weights"] = options.save
    if options.onnx is not None:
        _say("exporting to ONNX and comparing with onnxruntime", options)
        written["onnx"] = fxprune.export(pruned, options.onnx, **examples)
    if options.html is not None:
        report.to_html(options.html, written.get("onnx"))
        written["page"] = options.html
    if options.json:
        _print_json({**report.data(), "written": written})
    for what, where in () if options.json else written.items():
        print(f"{what}: {where}")


def inspect(options: argparse.Namespace) -> None:
    """The groups of channels of a model."""
    if options.html is not None:
        from fxprune.io import files

        files.check_writable(options.html)
    model, examples = _load(options)

    import fxprune

    graph = fxprune.analyze(model, **examples)
    if options.html is not None:
        graph.to_html(options.html)
    if not options.json:
        print(graph)
        return
    groups = [
        {
            "name": group.name,
            "channels": group.size,
            "blocks": group.blocks,
            "exact": group.exact,
            "locked": str(group.locked or ""),
            "members": [[member.name, member.dim] for member in group.members],
        }
        for group in graph.groups
    ]
    _print_json({"macs": graph.macs(), "params": graph.params(), "held": graph.held, "groups": groups,
                 "notes": graph.notes})  # fmt: skip


def export(options: argparse.Namespace) -> None:
    """A saved network to ONNX."""
    from fxprune.io import files

    files.check_writable(options.onnx)
    module, inputs = _load_artifact(options)

    import fxprune

    _say("exporting to ONNX and comparing with onnxruntime", options)
    validation = fxprune.export(
        module,
        options.onnx,
        *inputs,
        options.provider,
        opset=options.opset,
        dynamic_size=options.dynamic_size,
        fold_norms=options.fold_norms,
        half=options.half,
        sparse=options.sparse,
    )
    if options.json:
        _print_json({"onnx": validation})
    else:
        print(f"onnx: {validation}")


def validate(options: argparse.Namespace) -> None:
    """A saved network checked, and the ONNX file made of it."""
    from fxprune.io import artifact

    found = artifact.read_artifact(options.artifact)
    runs = options.spec is not None or options.artifact.endswith(".pt2")
    if options.onnx is None and options.provider is not None:
        raise InputError("--provider says where the file of --onnx is run; give that too")
    if options.onnx is not None and not runs:
        raise InputError(f"{options.onnx!r} is compared with what the network computes: give the MODEL too")
    onnx = None
    if runs:
        module, inputs = _load_artifact(options)
        if options.onnx is not None:
            import fxprune

            _say(f"running {options.onnx} in onnxruntime", options)
            onnx = fxprune.validate(options.onnx, module, *inputs, options.provider)
    facts = {
        "model": found.model,
        "method": found.method,
        "macs": found.macs,
        "params": found.params,
        "oracle_error": found.oracle_error,
        "versions": found.versions,
        "checked": ["file", *(["outputs"] if runs else []), *(["onnx"] if onnx else [])],
    }
    if options.json:
        _print_json({**facts, "onnx": onnx})
        return
    for key, value in facts.items():
        print(f"{key:<13}{_plain(value)}")
    if onnx is not None:
        print(f"{'onnx':<13}{onnx}")
    if not runs:
        print("its outputs were not checked: give the MODEL too")


def bench(options: argparse.Namespace) -> None:
    """The latency of a saved network beside the dense one."""
    from fxprune import deploy
    from fxprune.io import specs
    from fxprune.recording import inputs

    if options.batch < 1:
        raise InputError(f"--batch {options.batch}: give a whole number of at least 1")
    deploy.check_engine(options.provider)
    module, given = _load_artifact(options)
    example = inputs.describe_inputs(*inputs.normalise_inputs(*given))
    args, kwargs = inputs.make_inputs(example, batch=options.batch)
    _say("exporting both to ONNX and running them in turn", options)
    latency = deploy.bench(
        specs.load_model(options.spec), module, args, kwargs, provider=options.provider, threads=options.threads,
        runs=options.runs,
    )  # fmt: skip
    if options.json:
        _print_json(latency.data())
    else:
        print(f"latency: {latency}")


def compare(options: argparse.Namespace) -> None:
    """Which channels two cuts keep."""
    plans = [_plan_of(path) for path in (options.first, options.second)]
    if plans[0].fingerprint != plans[1].fingerprint:
        raise InputError(f"{options.first!r} and {options.second!r} are cuts of different models")
    rows = []
    for name, dim in sorted({(name, dim) for plan in plans for name, dims in plan.kept.items() for dim in dims}):
        one, other = (_indices(plan, name, dim) for plan in plans)
        both = None if one is None or other is None else len(one & other)
        counts = [None if kept is None else len(kept) for kept in (one, other)]
        rows.append({"name": name, "dim": dim, "first": counts[0], "second": counts[1], "both": both})
    if options.json:
        _print_json({"first": options.first, "second": options.second, "equal": plans[0].kept == plans[1].kept,
                     "kept": rows})  # fmt: skip
        return
    from fxprune.io.text import table

    print("the same channels stay" if plans[0].kept == plans[1].kept else "different channels stay")
    head = ("tensor", "dim", "stay in the first", "in the second", "in both")
    cells = [tuple("all" if value is None else str(value) for value in row.values()) for row in rows]
    print("\n".join(table([head, *cells])))


def _plan_of(path: str) -> PruningPlan:
    from fxprune.io import artifact
    from fxprune.selection.plan import PruningPlan

    return PruningPlan.load(path) if path.endswith(".json") else artifact.read_artifact(path).plan


def _indices(plan: PruningPlan, name: str, dim: int) -> set[tuple[int, int]] | None:
    """What stays along a dimension, as (group, index); None where all do."""
    kept = plan.kept.get(name, {}).get(dim)
    if kept is None:
        return None
    rows = kept if kept and isinstance(kept[0], list) else [kept]
    return {(number, index) for number, row in enumerate(rows) for index in row}


def methods(options: argparse.Namespace) -> None:
    """The methods that there are."""
    from fxprune.methods import available

    known = available()
    if options.json:
        _print_json(known)
        return
    width = max(map(len, known), default=0)
    for name, description in sorted(known.items()):
        print(f"{name:{width}}  {description}".rstrip())


# -- what they share --------------------------------------------------------------------------------------------------


def _load(options: argparse.Namespace) -> tuple[nn.Module, dict[str, Any]]:
    """The model, and its example inputs as arguments of ``prune``."""
    _say(f"loading {options.spec}", options)
    from fxprune.io import specs
    from fxprune.recording import inputs

    if options.pretrained and options.weights is not None:
        raise InputError("--pretrained and --weights both name weights; give one of them")
    if options.input_size is not None and options.inputs is not None:
        raise InputError("--input-size and --inputs both say what the model takes; give one of them")
    model = specs.load_model(options.spec, pretrained=options.pretrained)
    if options.weights is not None:
        specs.load_checkpoint(model, options.weights)
    if options.input_size is not None:
        return model, {"example_inputs": inputs.image_like(model, options.input_size)}
    if options.inputs is None:
        try:
            inputs.infer_inputs(model)
        except ExampleInputsError as error:
            raise InputError(
                f"what {type(model).__name__} takes is not known: give --input-size (3,224,224) or --inputs FILE:NAME"
            ) from error
        return model, {}
    given = specs.load_python(options.inputs, "object")
    return model, {"example_kwargs" if isinstance(given, Mapping) else "example_inputs": given}


def _load_artifact(options: argparse.Namespace) -> tuple[nn.Module, tuple[Any, Any]]:
    """The network in a file, and example inputs for it."""
    _say(f"loading {options.artifact}", options)
    from fxprune.io import artifact, specs
    from fxprune.recording import inputs

    found = artifact.read_artifact(options.artifact)
    model = None if options.spec is None else specs.load_model(options.spec)
    module = artifact.load(options.artifact, model)
    if found.inputs is None:
        return module, inputs.resolve_inputs(model) if model is not None else (None, None)
    return module, inputs.make_inputs(inputs.from_json(found.inputs))


def _print_json(value: Any) -> None:
    print(json.dumps(value, indent=2, default=_jsonable))


def _jsonable(value: Any) -> Any:
    """What json does not know: dataclasses as their fields, paths as text."""
    return vars(value) if hasattr(value, "__dataclass_fields__") else str(value)


def _plain(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key} {item}" for key, item in value.items())
    return " -> ".join(map(str, value)) if isinstance(value, (list, tuple)) else str(value)


def _say(text: str, options: argparse.Namespace) -> None:
    if not options.quiet:
        print(text, file=sys.stderr, flush=True)
