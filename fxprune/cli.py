"""The command line: ``fxprune prune``, ``inspect``, ``apply``, ``export``, ``validate``, ``compare``, ``methods``.

Results go to stdout, progress to stderr. An error of ours is one sentence on stderr and exit code 2. torch is imported
only once there is something to do with it, so that ``--help`` and a mistyped option answer at once. With ``--json``
stdout holds one JSON object.
"""

import argparse
import functools
import json
import os
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import fields
from typing import TYPE_CHECKING, Any, NoReturn

from fxprune.arguments import documented
from fxprune.errors import FxpruneError, InputError
from fxprune.options import Keywords, LatencyBudget, Loop, Options

if TYPE_CHECKING:
    from torch import Tensor, nn

    from fxprune.selection.plan import PruningPlan

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_EXAMPLES = """\
examples:
  fxprune prune timm:resnet50 --method l2 --flops 0.5 --onnx resnet50-half.onnx
  fxprune prune my_net.py:make --weights my_net.pt --params 0.3 --input-size 3,32,32 --save small.safetensors
  fxprune export small.safetensors my_net.py:make --onnx small.onnx
  fxprune inspect torchvision:vit_b_16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = parser().parse_args(argv)
    try:
        options.run(options)
        sys.stdout.flush()
    except FxpruneError as error:
        print(f"fxprune: {_one_line(error)}", file=sys.stderr)
        return EXIT_ERROR
    except KeyboardInterrupt:
        print("fxprune: interrupted", file=sys.stderr)
        return EXIT_INTERRUPTED
    except BrokenPipeError:
        # The reader (head, less) has seen enough. Without this, Python complains once more when it closes stdout.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


# -- commands ---------------------------------------------------------------------------------------------------------


def _prune(options: argparse.Namespace) -> None:
    _check_outputs(options)
    model, example_inputs = _load(options)
    keywords = _asked(options, model)

    import fxprune

    if options.submodule is None:
        pruned = fxprune.prune(model, example_inputs, **keywords)
    else:
        pruned = fxprune.prune_submodule(model, options.submodule, example_inputs, **keywords)
    _write_outputs(pruned, example_inputs, options)


def _asked(options: argparse.Namespace, model: "nn.Module") -> dict[str, Any]:
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


def _given(record: type, options: argparse.Namespace, model: "nn.Module") -> dict[str, Any]:
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


def _apply(options: argparse.Namespace) -> None:
    _check_outputs(options)
    from fxprune.selection.plan import PruningPlan

    plan = PruningPlan.load(options.plan_file)
    model, example_inputs = _load(options)

    import fxprune

    _write_outputs(fxprune.apply(model, plan, example_inputs), example_inputs, options)


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


def _saver(path: str) -> "Callable[[nn.Module, str], None]":
    """What writes a file of this name: plain weights, or all that ``fxprune.load`` needs."""
    from fxprune.io import artifact, specs

    if path.endswith((".safetensors", ".pt2")):
        artifact.check_path(path)
        return artifact.save
    specs.check_weights_path(path)
    return specs.save_weights


def _write_outputs(pruned: "nn.Module", example_inputs: "Tensor | None", options: argparse.Namespace) -> None:
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
        written["onnx"] = fxprune.export(pruned, options.onnx, example_inputs)
    if options.html is not None:
        report.to_html(options.html, written.get("onnx"))
        written["page"] = options.html
    if options.json:
        _print_json({**report.data(), "written": written})
    for what, where in () if options.json else written.items():
        print(f"{what}: {where}")


def _inspect(options: argparse.Namespace) -> None:
    if options.html is not None:
        from fxprune.io import files

        files.check_writable(options.html)
    model, example_inputs = _load(options)

    import fxprune

    graph = fxprune.analyze(model, example_inputs)
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


def _export(options: argparse.Namespace) -> None:
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
    )
    if options.json:
        _print_json({"onnx": validation})
    else:
        print(f"onnx: {validation}")


def _validate(options: argparse.Namespace) -> None:
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


def _bench(options: argparse.Namespace) -> None:
    from fxprune import deploy
    from fxprune.io import specs
    from fxprune.recording import inputs

    if options.batch < 1:
        raise InputError(f"--batch {options.batch}: give a whole number of at least 1")
    deploy.check_provider(options.provider)
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


def _compare(options: argparse.Namespace) -> None:
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


def _plan_of(path: str) -> "PruningPlan":
    from fxprune.io import artifact
    from fxprune.selection.plan import PruningPlan

    return PruningPlan.load(path) if path.endswith(".json") else artifact.read_artifact(path).plan


def _indices(plan: "PruningPlan", name: str, dim: int) -> set[tuple[int, int]] | None:
    """What stays along a dimension, as (group, index); None where all do."""
    kept = plan.kept.get(name, {}).get(dim)
    if kept is None:
        return None
    rows = kept if kept and isinstance(kept[0], list) else [kept]
    return {(number, index) for number, row in enumerate(rows) for index in row}


def _methods(options: argparse.Namespace) -> None:
    from fxprune import methods

    known = methods.available()
    if options.json:
        _print_json(known)
        return
    width = max(map(len, known), default=0)
    for name, description in sorted(known.items()):
        print(f"{name:{width}}  {description}".rstrip())


# -- what they share --------------------------------------------------------------------------------------------------


def _load(options: argparse.Namespace) -> "tuple[nn.Module, Tensor | None]":
    _say(f"loading {options.spec}", options)
    from fxprune.io import specs
    from fxprune.recording import inputs

    if options.pretrained and options.weights is not None:
        raise InputError("--pretrained and --weights both name weights; give one of them")
    model = specs.load_model(options.spec, pretrained=options.pretrained)
    if options.weights is not None:
        specs.load_checkpoint(model, options.weights)
    if options.input_size is None:
        return model, None
    return model, inputs.image_like(model, options.input_size)


def _load_artifact(options: argparse.Namespace) -> "tuple[nn.Module, tuple[Any, Any]]":
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


class _Parser(argparse.ArgumentParser):
    """argparse, which would print its whole usage before the one line that matters."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"fxprune: {message}; see `{self.prog} --help`\n")


def parser() -> argparse.ArgumentParser:
    """The whole command line; ``shtab`` makes shell completions of it."""
    result = _Parser(
        prog="fxprune",
        description="Structured pruning of any PyTorch model, by whole channels, proven against the masked original.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = result.add_subparsers(metavar="COMMAND", required=True)

    prune = commands.add_parser("prune", help="make a smaller network and say what was cut", allow_abbrev=False)
    _add_model(prune)
    prune.add_argument("--submodule", metavar="NAME", help="prune this part of the model; a budget is about it alone")
    _add_fields(prune, Keywords, LatencyBudget, Options, Loop)
    _add_outputs(prune)
    prune.set_defaults(run=_prune)

    inspect = commands.add_parser(
        "inspect", help="list the channel groups, and what is frozen and why", allow_abbrev=False
    )
    _add_model(inspect)
    _add_page(inspect)
    _add_form(inspect)
    inspect.set_defaults(run=_inspect)

    apply = commands.add_parser("apply", help="cut a model by a plan", allow_abbrev=False)
    apply.add_argument("plan_file", metavar="PLAN", help="what `fxprune prune --plan` wrote (.json)")
    _add_model(apply)
    _add_outputs(apply)
    apply.set_defaults(run=_apply)

    export = commands.add_parser("export", help="a saved network to ONNX", allow_abbrev=False)
    _add_artifact(export)
    export.add_argument("--onnx", metavar="PATH", required=True, help="what to write, compared with onnxruntime")
    export.add_argument("--opset", type=int, metavar="N", help="version of the ONNX operator set")
    export.add_argument("--dynamic-size", action="store_true", help="leave the height and width of images open")
    export.add_argument("--half", action="store_true", help="float16 in place of float32")
    export.add_argument(
        "--fold-norms",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batch norms become part of the layer before (default: yes)",
    )
    _add_provider(export)
    export.set_defaults(run=_export)

    validate = commands.add_parser(
        "validate", help="check a saved network, and the ONNX file made of it", allow_abbrev=False
    )
    _add_artifact(validate)
    validate.add_argument("--onnx", metavar="PATH", help="an ONNX file to compare with it in onnxruntime")
    _add_provider(validate)
    validate.set_defaults(run=_validate)

    bench = commands.add_parser(
        "bench", help="latency of a saved network beside the dense one, on onnxruntime", allow_abbrev=False
    )
    bench.add_argument("artifact", metavar="ARTIFACT", help="a saved network (.safetensors, .pt2)")
    bench.add_argument("spec", metavar="MODEL", help="the dense model, as for `prune`")
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (default: 1)")
    bench.add_argument("--runs", type=int, default=31, metavar="N", help="of each network, at least (default: 31)")
    _add_runtime(bench)
    _add_form(bench)
    bench.set_defaults(run=_bench)

    compare = commands.add_parser("compare", help="which channels two cuts of a model keep", allow_abbrev=False)
    for name, which in (("first", "A"), ("second", "B")):
        compare.add_argument(name, metavar=which, help="a plan (.json) or a saved network (.safetensors, .pt2)")
    _add_form(compare)
    compare.set_defaults(run=_compare)

    methods = commands.add_parser("methods", help="list the pruning methods", allow_abbrev=False)
    _add_form(methods, quiet=False)
    methods.set_defaults(run=_methods)
    return result


def _add_fields(parser: argparse.ArgumentParser, *records: type) -> None:
    """An option for every field of the records that has a ``Flag``; one that is not given leaves no trace."""
    groups: dict[str, argparse._ArgumentGroup] = {}
    for record in records:
        told = documented(record)
        for field in fields(record):
            flag = field.metadata["flag"]
            if flag is None:
                continue
            if flag.group not in groups:
                groups[flag.group] = parser.add_argument_group(flag.group)
            said = told[field.name].replace("``", "").replace("%", "%%")
            how: dict[str, Any] = {"dest": field.name, "default": argparse.SUPPRESS, "help": said}
            if isinstance(field.default, bool):
                how["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
            else:
                how |= {"metavar": flag.metavar, "type": _reader(flag.read)}
                how["help"] += f" (default: {field.default})" if field.default not in (None, ()) else ""
            if flag.join is not None:
                how |= {"nargs": "+", "action": "extend"}
            groups[flag.group].add_argument(f"--{(flag.name or field.name).replace('_', '-')}", **how)


def _reader(read: Callable[[str], Any]) -> Callable[[str], Any]:
    """For argparse, which shows no message of a ``ValueError`` but the function's name."""

    @functools.wraps(read)
    def wrapped(word: str) -> Any:
        try:
            return read(word)
        except InputError as error:
            raise argparse.ArgumentTypeError(str(error)) from None

    return wrapped


def _add_outputs(parser: argparse.ArgumentParser) -> None:
    output = parser.add_argument_group("output")
    output.add_argument("--onnx", metavar="PATH", help="write an ONNX file and compare it with onnxruntime")
    output.add_argument(
        "--save",
        metavar="PATH",
        help="write the network: weights, plan and checks (.safetensors), a program that needs no class (.pt2), or the "
        "state_dict alone (.pt, .pth)",
    )
    output.add_argument("--plan", metavar="PATH", help="write the plan: which channels stay (.json)")
    _add_page(output)
    _add_form(output)


def _add_runtime(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--provider", metavar="NAME", help="onnxruntime's execution provider (default: CUDA, or CPU)")
    parser.add_argument("--threads", type=int, metavar="N", help="of the processor (default: as many as it has cores)")


def _add_page(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--html", metavar="PATH", help="write a page: widths, groups, what is frozen and why (.html)")


def _add_form(parser: argparse._ActionsContainer, quiet: bool = True) -> None:
    parser.add_argument("--json", action="store_true", help="one JSON object on stdout")
    if quiet:
        parser.add_argument("--quiet", action="store_true", help="no progress on stderr")


def _add_artifact(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("artifact", metavar="ARTIFACT", help="a saved network (.safetensors, .pt2)")
    parser.add_argument(
        "spec", metavar="MODEL", nargs="?", help="of a .safetensors file: the model that was pruned, as for `prune`"
    )
    _add_form(parser)


def _add_provider(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--provider", metavar="NAME", help="onnxruntime's execution provider (default: every one that works here)"
    )


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="MODEL", help="timm:NAME, torchvision:NAME or path/to/file.py:factory")
    model = parser.add_argument_group("model")
    model.add_argument("--weights", metavar="FILE", help="load a state_dict (.pt, .pth or .safetensors)")
    model.add_argument("--pretrained", action="store_true", help="download the library's weights (timm, torchvision)")
    model.add_argument(
        "--input-size",
        type=_sizes,
        metavar="C,H,W",
        help="shape of one input without the batch; needed for models of a file, inferred for timm and torchvision",
    )


def _sizes(text: str) -> tuple[int, ...]:
    try:
        sizes = tuple(int(part) for part in text.split(","))
    except ValueError:
        sizes = ()
    if not sizes or min(sizes) < 1:
        raise argparse.ArgumentTypeError(
            f"{text!r} is no shape; write sizes with commas between, for instance 3,224,224"
        )
    return sizes


def _say(text: str, options: argparse.Namespace) -> None:
    if not options.quiet:
        print(text, file=sys.stderr, flush=True)


def _one_line(error: BaseException) -> str:
    return " ".join(str(error).split())


if __name__ == "__main__":
    sys.exit(main())
