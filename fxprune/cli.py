"""The command line: ``fxprune prune``, ``fxprune inspect``, ``fxprune methods``.

Results go to stdout, progress to stderr. An error of ours is one sentence on stderr and exit code 2. torch is imported
only once there is something to do with it, so that ``--help`` and a mistyped option answer at once.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from typing import TYPE_CHECKING, NoReturn

from fxprune.errors import FxpruneError, InputError

if TYPE_CHECKING:
    from torch import Tensor, nn

EXIT_ERROR = 2
EXIT_INTERRUPTED = 130

_EXAMPLES = """\
examples:
  fxprune prune timm:resnet50 --method l2 --flops 0.5 --onnx resnet50-half.onnx
  fxprune prune my_net.py:make --weights my_net.pt --params 0.3 --input-size 3,32,32 --save smaller.pt
  fxprune inspect torchvision:vit_b_16
"""


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command line; returns the exit code."""
    options = _parser().parse_args(argv)
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


def _prune(options: argparse.Namespace) -> None:
    from fxprune import files, specs

    # Before the work: nobody wants to learn after an hour that a folder is missing.
    for path in (options.onnx, options.plan):
        if path is not None:
            files.check_writable(path)
    if options.save is not None:
        specs.check_weights_path(options.save)
    model, example_inputs = _load(options)

    import fxprune

    pruned = fxprune.prune(
        model,
        example_inputs,
        method=options.method,
        flops=options.flops,
        params=options.params,
        channels=options.channels,
        ignore=tuple(options.ignore),
        exact=options.exact,
        attention=options.attention,
        scope=options.scope,
        round_to=options.round_to,
        min_channels=options.min_channels,
        verify=options.verify,
        seed=options.seed,
        progress=not options.quiet,
    )
    report = pruned.meta["fxprune"]
    print(report)
    if options.plan is not None:
        report.plan.save(options.plan)
        print(f"plan: {options.plan}")
    if options.save is not None:
        specs.save_weights(pruned, options.save)
        print(f"weights: {options.save}")
    if options.onnx is not None:
        _say("exporting to ONNX and comparing with onnxruntime", options)
        print(f"onnx: {fxprune.export(pruned, options.onnx, example_inputs)}")


def _inspect(options: argparse.Namespace) -> None:
    model, example_inputs = _load(options)

    import fxprune

    print(fxprune.analyze(model, example_inputs))


def _methods(options: argparse.Namespace) -> None:
    from fxprune import methods

    known = methods.available()
    width = max(map(len, known), default=0)
    for name, description in sorted(known.items()):
        print(f"{name:{width}}  {description}".rstrip())


def _load(options: argparse.Namespace) -> "tuple[nn.Module, Tensor | None]":
    _say(f"loading {options.spec}", options)
    from fxprune import inputs, specs

    if options.pretrained and options.weights is not None:
        raise InputError("--pretrained and --weights both name weights; give one of them")
    model = specs.load_model(options.spec, pretrained=options.pretrained)
    if options.weights is not None:
        specs.load_checkpoint(model, options.weights)
    if options.input_size is None:
        return model, None
    return model, inputs.image_like(model, options.input_size)


class _Parser(argparse.ArgumentParser):
    """argparse, which would print its whole usage before the one line that matters."""

    def error(self, message: str) -> NoReturn:
        self.exit(EXIT_ERROR, f"fxprune: {message}; see `{self.prog} --help`\n")


def _parser() -> argparse.ArgumentParser:
    parser = _Parser(
        prog="fxprune",
        description="Structured pruning of any PyTorch model, by whole channels, proven against the masked original.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        allow_abbrev=False,
    )
    commands = parser.add_subparsers(metavar="COMMAND", required=True)

    prune = commands.add_parser("prune", help="make a smaller network and say what was cut", allow_abbrev=False)
    _add_model(prune)
    budget = prune.add_argument_group("budget, one of (a ratio above 0 and at most 1)")
    budget.add_argument("--flops", type=float, metavar="R", help="multiply-accumulates that stay")
    budget.add_argument("--params", type=float, metavar="R", help="parameters that stay")
    budget.add_argument("--channels", type=float, metavar="R", help="prunable channels that stay")
    choice = prune.add_argument_group("which channels")
    choice.add_argument("--method", default="l2", metavar="NAME", help="see `fxprune methods` (default: l2)")
    choice.add_argument("--scope", default="global", help="global: rank all channels together; uniform: per group")
    choice.add_argument("--attention", default="head_dim", help="head_dim: cut inside heads; heads: cut whole heads")
    choice.add_argument("--exact", action="store_true", help="cut only channels whose removal changes no statistics")
    choice.add_argument(
        "--ignore", nargs="+", action="extend", default=[], metavar="MODULE", help="modules whose output channels stay"
    )
    choice.add_argument("--round-to", type=int, default=1, metavar="K", help="keep channels in multiples of K")
    choice.add_argument(
        "--min-channels", type=int, default=1, metavar="N", help="keep at least N per layer (default: 1)"
    )
    choice.add_argument("--seed", type=int, default=0, metavar="N", help="same seed, same plan (default: 0)")
    output = prune.add_argument_group("output")
    output.add_argument("--onnx", metavar="PATH", help="write an ONNX file and compare it with onnxruntime")
    output.add_argument("--save", metavar="PATH", help="write the state_dict (.pt, .pth or .safetensors)")
    output.add_argument("--plan", metavar="PATH", help="write the plan: which channels stay (.json)")
    output.add_argument(
        "--no-verify", dest="verify", action="store_false", help="skip the comparison with the masked model"
    )
    prune.set_defaults(run=_prune)

    inspect = commands.add_parser(
        "inspect", help="list the channel groups, and what is frozen and why", allow_abbrev=False
    )
    _add_model(inspect)
    inspect.set_defaults(run=_inspect)

    methods = commands.add_parser("methods", help="list the pruning methods", allow_abbrev=False)
    methods.set_defaults(run=_methods)
    return parser


def _add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("spec", metavar="MODEL", help="timm:NAME, torchvision:NAME or path/to/file.py:factory")
    model = parser.add_argument_group("model")
    model.add_argument("--weights", metavar="FILE", help="load a state_dict (.pt, .pth or .safetensors)")
    model.add_argument("--pretrained", action="store_true", help="download the library's weights (timm, torchvision)")
    model.add_argument("--quiet", action="store_true", help="no progress on stderr")
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
