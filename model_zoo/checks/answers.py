"""Whether a pruned network answers a call as its model does: free, guarded, wrong, or an exception of its own."""

from __future__ import annotations

import copy
import dataclasses
import re
import traceback
import types
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, fx, nn

from fxprune.errors import FxpruneError
from fxprune.recording.sources import _node_source
from fxprune.verification import relative_error
from model_zoo.networks.subject import Inputs
from model_zoo.records import raised

TOLERANCE = 1e-4  # relative error
FINE = ("free", "guarded", "model refuses")
GENERATED = "<eval_with_key>"
LINE = re.compile(r"[\w./-]+\.py:\d+")


@dataclass
class Cell:
    """What came of a call. ``error``: the largest relative error, at ``where`` in the outputs; ``plain``: outside
    objects. ``line``: what a guard names, or where an exception comes from; ``parts``: where recordings on the example
    and on this call first differ. ``blind``: the model itself gives what it gives on the example."""

    state: str
    error: float | None = None
    plain: float | None = None
    where: str = ""
    message: str = ""
    line: str = ""
    parts: str = ""
    blind: bool = False
    seconds: float = 0.0

    @property
    def entry(self) -> dict[str, Any]:
        """What is not empty, for a record."""
        return {key: value for key, value in dataclasses.asdict(self).items() if value not in ("", None, False)}

    @property
    def fault(self) -> str:
        """Why the answer is none that a pruned network may give, or ""."""
        if self.state in FINE:
            return ""
        if self.state == "wrong":
            inside = " in objects only" if (self.plain or 0.0) < TOLERANCE else ""
            return f"off by {self.error:.1e}{inside} at {self.where}; {self.parts}"
        return f"{self.state}: {self.message} ({self.line})"


# -- outputs ----------------------------------------------------------------------------------------------------------


def values_in(tree: Any) -> dict[str, tuple[Any, bool]]:
    """Path -> (tensor or number, whether it is inside an object that is no plain structure)."""
    found: dict[str, tuple[Any, bool]] = {}
    around: list[int] = []  # what is being visited: an object may hold itself, and may be held twice

    def visit(value: Any, path: str, inside: bool) -> None:
        if isinstance(value, (Tensor, bool, int, float)):
            found[path] = value, inside
            return
        if value is None or isinstance(value, (str, bytes, type, nn.Module, types.ModuleType)) or id(value) in around:
            return
        if isinstance(value, Mapping):
            items = [(f"[{key!r}]", item) for key, item in value.items()]
        elif isinstance(value, (tuple, list)):
            items = [(f"[{i}]", item) for i, item in enumerate(value)]
        elif dataclasses.is_dataclass(value):
            items = [(f".{field.name}", getattr(value, field.name, None)) for field in dataclasses.fields(value)]
        elif callable(value) or not hasattr(value, "__dict__"):
            return
        else:
            items, inside = [(f".{key}", item) for key, item in vars(value).items()], True
        around.append(id(value))
        for key, item in items:
            visit(item, path + key, inside)
        around.pop()

    visit(tree, "", False)
    return found


def _apart(one: Any, other: Any) -> float:
    if not isinstance(other, Tensor):
        return 0.0 if type(one) is type(other) and one == other else float("inf")
    if not isinstance(one, Tensor) or one.shape != other.shape or one.dtype != other.dtype:
        return float("inf")
    if other.dtype == torch.bool:
        return 0.0 if torch.equal(one, other) else float("inf")
    return relative_error(one, other)


def compare(found: Any, expected: Any) -> Cell:
    """Free or wrong, with the largest error and where."""
    a, b = values_in(found), values_in(expected)
    errors = {path: _apart(a[path][0], b[path][0]) if path in a else float("inf") for path in b}
    errors |= {path: float("inf") for path in a if path not in b}
    plain = max((e for path, e in errors.items() if not (b.get(path) or a[path])[1]), default=0.0)
    worst = max(errors, key=lambda path: errors[path], default="")
    error = errors.get(worst, 0.0)
    return Cell("free" if error < TOLERANCE else "wrong", error, plain, worst if error >= TOLERANCE else "")


# -- one call ---------------------------------------------------------------------------------------------------------


def run(module: nn.Module, inputs: Inputs) -> Any:
    """The outputs of ``module``; whatever it draws at random is the same every time."""
    torch.manual_seed(0)
    with torch.no_grad():
        return module(*inputs[0], **inputs[1])


def answer(model: nn.Module, pruned: nn.Module, make: Callable[[], Inputs], times: int = 1) -> Cell:
    """One call of both, ``times`` in a row. Each gets a copy of its own and inputs of its own, since both may write."""
    model, pruned = copy.deepcopy(model), copy.deepcopy(pruned)
    try:
        given = [make() for _ in range(times)]
        expected = [run(model, inputs) for inputs in given]
    except Exception as error:
        return Cell("model refuses", message=raised(error))
    try:
        taken = [make() for _ in range(times)]
        found = [run(pruned, inputs) for inputs in taken]
    except FxpruneError as error:
        return Cell("guarded", message=raised(error), line=next(iter(LINE.findall(str(error))), ""))
    except Exception as error:
        return Cell("raw", message=raised(error), line=_origin(pruned, make()))
    return compare({"out": found, "in": taken}, {"out": expected, "in": given})  # caches are written to


def _origin(module: nn.Module, inputs: Inputs) -> str:
    """The model's line that the node which fails was recorded from."""
    module = module.module if isinstance(module, Objects) else module
    try:
        module.forward(*inputs[0], **inputs[1])  # calling a graph module drops the traceback
    except Exception as error:
        trace, line = error.__traceback__, ""
        while trace is not None:
            if trace.tb_frame.f_code.co_filename.startswith(GENERATED) and isinstance(module, fx.GraphModule):
                line = _node_source(module, trace.tb_lineno) or line
            trace = trace.tb_next
        return line or place(error)
    return ""


def place(error: BaseException) -> str:
    """The innermost line outside torch, and that of fxprune if it is another."""
    frames = traceback.extract_tb(error.__traceback__)
    outside = [frame for frame in frames if "/torch/" not in frame.filename]
    ours = [frame for frame in frames if "/fxprune/" in frame.filename]
    lines = [
        f"{'/'.join(Path(f[-1].filename).parts[-3:])}:{f[-1].lineno} in {f[-1].name}" for f in (outside, ours) if f
    ]
    return ", below ".join(dict.fromkeys(lines))


class Objects(nn.Module):
    """Of a module's outputs the tensors and numbers in objects that are no plain structures."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        outputs = self.module(*args, **kwargs)
        return {path: value for path, (value, inside) in values_in(outputs).items() if inside}
