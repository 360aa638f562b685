"""The user's source line behind every recorded node: ``timm/models/resnet.py:207 in forward``."""

from __future__ import annotations

import os
import re
import sys
import traceback
from collections.abc import Callable, Iterator
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import numpy as np
import torch
from torch.fx import GraphModule, Node
from torch.jit._state import _try_get_jit_cached_function

_TORCH = str(Path(torch.__file__).parent) + "/"
_NUMPY = str(Path(np.__file__).parent) + "/"
_PACKAGE = str(Path(__file__).parent.parent) + "/"
_RECORDER = str(Path(__file__).parent) + "/"
_RUN = _RECORDER + "recorder.py"
_STDLIB = str(Path(os.__file__).parent) + "/"
_TORCH_LAYERS = _TORCH + "nn/modules/"
_TORCH_UTILS = _TORCH + "nn/utils/"
_GENERATED = "<eval_with_key>"
_FRAME = re.compile(r'File "(.+)", line (\d+), in (.+)(?:\n +(.+))?')


@lru_cache(maxsize=4096)
def _is_user_code(filename: str) -> bool:
    if filename.startswith((_TORCH, _NUMPY, _PACKAGE, "<frozen ")):
        return False
    return not filename.startswith(_STDLIB) or "-packages/" in filename


@lru_cache(maxsize=4096)
def _short_path(filename: str, module: str) -> str:
    """The file's path below the folder that holds its top-level package."""
    depth = 1 if module == "__main__" else len(module.split("."))
    if Path(filename).name == "__init__.py":
        depth += 1
    return "/".join(Path(filename).parts[-depth:])


def _describe(code: CodeType, line: int | None, module: str) -> str:
    return f"{_short_path(code.co_filename, module)}:{line} in {code.co_name}"


def _frame_source(frame: FrameType) -> str:
    """The frame's line; in the generated code of a graph module, the line that its node was recorded from."""
    module = _generating(frame)
    if module is None:
        return _describe(frame.f_code, frame.f_lineno, frame.f_globals.get("__name__") or "__main__")
    return _node_source(module, frame.f_lineno) or f"the generated code of {type(module).__name__}"


def _generating(frame: FrameType) -> GraphModule | None:
    """The module whose generated code a frame runs."""
    if not frame.f_code.co_filename.startswith(_GENERATED):
        return None
    module = frame.f_locals.get("self")  # gathers all locals, so only here
    return module if isinstance(module, GraphModule) else None


def _node_source(module: GraphModule, line: int) -> str | None:
    node = _node_at(module, line)
    return None if node is None else node.meta.get("source")


def _node_at(module: GraphModule, line: int) -> Node | None:
    lines: dict[int, int | None] = getattr(module, "_lineno_map", None) or {}
    index = lines.get(line - getattr(module, "_prologue_start", 0))
    nodes = list(module.graph.nodes)
    return nodes[index] if index is not None and index < len(nodes) else None


def current_source() -> str:
    """The model's innermost running line outside torch and NumPy; of torch's own containers alone, the container's."""
    frame = next(running(), None)
    return "" if frame is None else _frame_source(frame)


def script_source(function: Any) -> Callable[..., Any] | None:
    """The Python function that ``torch.jit.script`` compiled; None of one that was traced, as its code is another."""
    source = getattr(function, "_torchdynamo_inline", None)
    return source if source is not None and _try_get_jit_cached_function(source) is not None else None


def line_of(node: Node) -> str:
    """The user's innermost line of a node of an exported program, by its ``stack_trace``; "" if none is known."""
    for filename, line, name, text in reversed(_FRAME.findall(node.stack_trace or "")):
        if filename.startswith(_GENERATED):
            if "  # " in text:
                return str(text).rpartition("  # ")[2]
        elif _is_user_code(filename):
            return f"{filename}:{line} in {name}"
    return ""


def node_run(error: BaseException) -> Node | None:
    """The innermost node in whose generated code an error was raised."""
    found: Node | None = None
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        module = _generating(trace.tb_frame)
        found = (module and _node_at(module, trace.tb_lineno)) or found
        trace = trace.tb_next
    return found


def current_lines() -> tuple[str, str]:
    """``current_source()``, and all of the model's running lines, outermost first, as a ``stack_trace`` has them."""
    frames = list(running())
    if not frames:
        return "", ""
    return _frame_source(frames[0]), _stack(tuple(_place(frame) for frame in reversed(frames)))


def _place(frame: FrameType) -> tuple[str, int, str] | str:
    """File, line and function; in the generated code of a graph module the stack that its node was recorded with."""
    module = _generating(frame)
    if module is None:
        return frame.f_code.co_filename, frame.f_lineno, frame.f_code.co_name
    node = _node_at(module, frame.f_lineno)
    return "" if node is None else node.stack_trace or ""


@lru_cache(maxsize=4096)
def _stack(places: tuple[tuple[str, int, str] | str, ...]) -> str:
    """Nodes of one line share its text."""
    parts = [place if isinstance(place, str) else _quoted(*place) for place in places]
    return "\n  ".join(filter(None, parts))


@lru_cache(maxsize=4096)
def _quoted(filename: str, line: int, name: str) -> str:
    (text,) = traceback.StackSummary.from_list([(filename, line, name, None)]).format()
    return text.strip()


def running() -> Iterator[FrameType]:
    """The model's frames outside torch, innermost first; if there are none, the innermost of torch's containers."""
    frame: FrameType | None = sys._getframe(1)
    container: FrameType | None = None
    found = False
    while frame is not None:
        filename, name = frame.f_code.co_filename, frame.f_code.co_name
        if _is_user_code(filename):
            found = True
            yield frame
        if name == "run" and filename == _RUN:
            break
        if name == "forward" and container is None and filename.startswith(_TORCH_LAYERS):
            container = frame
        frame = frame.f_back
    if container is not None and not found:
        yield container


def defined_at(function: Callable[..., Any]) -> str:
    """Where a function of the user's begins; "" for one without Python code."""
    code = getattr(function, "__code__", None)
    module = getattr(function, "__module__", None) or "__main__"
    return _describe(code, code.co_firstlineno, module) if isinstance(code, CodeType) else ""


def caller_is_user_code() -> bool:
    """Whether the code that called the recorder's innermost hook is the user's (not torch's own)."""
    file = _calling_file()
    return bool(file) and _is_user_code(file)


def caller_makes_weights() -> bool:
    """Whether that code is one of torch's hooks that set a layer's weights, such as ``spectral_norm``."""
    return _calling_file().startswith(_TORCH_UTILS)


def _calling_file() -> str:
    """Of the code that called the recorder's innermost hook; "" if there is none."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_RECORDER):
        frame = frame.f_back
    return "" if frame is None else frame.f_code.co_filename


def raised_at(error: BaseException) -> str:
    """The innermost user line in the error's traceback; "" if there is none."""
    found = ""
    trace: TracebackType | None = error.__traceback__
    while trace is not None:
        code = trace.tb_frame.f_code
        if _is_user_code(code.co_filename):
            found = _describe(code, trace.tb_lineno, trace.tb_frame.f_globals.get("__name__") or "__main__")
        trace = trace.tb_next
    return found
