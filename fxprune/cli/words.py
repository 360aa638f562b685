"""The words of the command line: which commands there are, and what each is given."""

from __future__ import annotations

import argparse
import functools
from collections.abc import Callable
from dataclasses import fields
from typing import Any, NoReturn

from fxprune.arguments import documented
from fxprune.cli import commands
from fxprune.errors import InputError
from fxprune.options import Keywords, LatencyBudget, Loop, Options

EXIT_ERROR = 2

_EXAMPLES = """\
examples:
  fxprune prune timm:resnet50 --method l2 --flops 0.5 --onnx resnet50-half.onnx
  fxprune prune my_net.py:make --weights my_net.pt --params 0.3 --input-size 3,32,32 --save small.safetensors
  fxprune export small.safetensors my_net.py:make --onnx small.onnx
  fxprune inspect torchvision:vit_b_16
"""


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
    added = result.add_subparsers(metavar="COMMAND", required=True)
    for add, name, told in (
        (_prune, "prune", "make a smaller network and say what was cut"),
        (_inspect, "inspect", "list the channel groups, and what is locked and why"),
        (_apply, "apply", "cut a model by a plan"),
        (_export, "export", "a saved network to ONNX"),
        (_validate, "validate", "check a saved network, and the ONNX file made of it"),
        (_bench, "bench", "latency of a saved network beside the dense one, on onnxruntime"),
        (_compare, "compare", "which channels two cuts of a model keep"),
        (_methods, "methods", "list the pruning methods"),
    ):
        command = added.add_parser(name, help=told, allow_abbrev=False)
        add(command)
        command.set_defaults(run=getattr(commands, name))
    return result


def _prune(prune: argparse.ArgumentParser) -> None:
    _add_model(prune)
    prune.add_argument("--submodule", metavar="NAME", help="prune this part of the model; a budget is about it alone")
    _add_fields(prune, Keywords, LatencyBudget, Options, Loop)
    _add_outputs(prune)


def _inspect(inspect: argparse.ArgumentParser) -> None:
    _add_model(inspect)
    _add_page(inspect)
    _add_form(inspect)


def _apply(apply: argparse.ArgumentParser) -> None:
    apply.add_argument("plan_file", metavar="PLAN", help="what `fxprune prune --plan` wrote (.json)")
    _add_model(apply)
    _add_outputs(apply)


def _export(export: argparse.ArgumentParser) -> None:
    _add_artifact(export)
    export.add_argument("--onnx", metavar="PATH", required=True, help="what to write, compared with onnxruntime")
    export.add_argument("--opset", type=int, metavar="N", help="version of the ONNX operator set")
    export.add_argument("--dynamic-size", action="store_true", help="leave the height and width of images open")
    export.add_argument("--half", action="store_true", help="float16 in place of float32")
    export.add_argument("--sparse", action="store_true", help="weights that are mostly zeros as sparse initializers")
    export.add_argument(
        "--fold-norms",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="batch norms become part of the layer before (default: yes)",
    )
    _add_provider(export)


def _validate(validate: argparse.ArgumentParser) -> None:
    _add_artifact(validate)
    validate.add_argument("--onnx", metavar="PATH", help="an ONNX file to compare with it in onnxruntime")
    _add_provider(validate)


def _bench(bench: argparse.ArgumentParser) -> None:
    bench.add_argument("artifact", metavar="ARTIFACT", help="a saved network (.safetensors, .pt2)")
    bench.add_argument("spec", metavar="MODEL", help="the dense model, as for `prune`")
    bench.add_argument("--batch", type=int, default=1, metavar="N", help="batch size (default: 1)")
    bench.add_argument("--runs", type=int, default=31, metavar="N", help="of each network, at least (default: 31)")
    bench.add_argument("--provider", metavar="NAME", help="onnxruntime's execution provider (default: CUDA, or CPU)")
    bench.add_argument("--threads", type=int, metavar="N", help="of the processor (default: as many as it has cores)")
    _add_form(bench)


def _compare(compare: argparse.ArgumentParser) -> None:
    for name, which in (("first", "A"), ("second", "B")):
        compare.add_argument(name, metavar=which, help="a plan (.json) or a saved network (.safetensors, .pt2)")
    _add_form(compare)


def _methods(methods: argparse.ArgumentParser) -> None:
    _add_form(methods, quiet=False)


# -- what they share --------------------------------------------------------------------------------------------------


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
            if isinstance(field.default, bool) and not flag.metavar:
                how["action"] = argparse.BooleanOptionalAction if field.default else "store_true"
            elif isinstance(field.default, bool):  # True, or how much
                how |= {"metavar": flag.metavar, "type": _reader(flag.read), "nargs": "?", "const": True}
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


def _add_page(parser: argparse._ActionsContainer) -> None:
    parser.add_argument("--html", metavar="PATH", help="write a page: widths, groups, what is locked and why (.html)")


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
        help="shape of one input, an image, without the batch; models of a file need this or --inputs, those of timm "
        "and torchvision neither",
    )
    model.add_argument(
        "--inputs",
        metavar="FILE:NAME",
        help="example inputs in a Python file, or a function that makes them: a tensor, a tuple of positional inputs, "
        "or a dict of inputs by name",
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
