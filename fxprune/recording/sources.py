"""The user's source line behind every recorded node: ``timm/models/resnet.py:207 in forward``."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable
from functools import lru_cache
from pathlib import Path
from types import CodeType, FrameType, TracebackType
from typing import Any

import torch
from torch.fx import GraphModule

_TORCH = str(Path(torch.__file__).parent) + "/"
_PACKAGE = str(Path(__file__).parent.parent) + "/"
_RECORDER = str(Path(__file__).parent) + "/"
_RUN = _RECORDER + "recorder.py"
_STDLIB = str(Path(os.__file__).parent) + "/"
_TORCH_LAYERS = _TORCH + "nn/modules/"


@lru_cache(maxsize=4096)
def _is_user_code(filename: str) -> bool:
    if filename.startswith((_TORCH, _PACKAGE, "<frozen ")):
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
    if frame.f_code.co_filename.startswith("<eval_with_key>"):
        module = frame.f_locals.get("self")  # gathers all locals, so only here
        if isinstance(module, GraphModule):
            return _node_source(module, frame.f_lineno) or f"the generated code of {type(module).__name__}"
    return _describe(frame.f_code, frame.f_lineno, frame.f_globals.get("__name__") or "__main__")


def _node_source(module: GraphModule, line: int) -> str | None:
    lines: dict[int, int | None] = getattr(module, "_lineno_map", None) or {}
    index = lines.get(line - getattr(module, "_prologue_start", 0))
    nodes = list(module.graph.nodes)
    return nodes[index].meta.get("source") if index is not None and index < len(nodes) else None


def current_source() -> str:
    """The model's innermost running line outside torch; in a model of torch's own containers only, the container's."""
    frame: FrameType | None = sys._getframe(1)
    container: FrameType | None = None
    while frame is not None:
        filename, name = frame.f_code.co_filename, frame.f_code.co_name
        if _is_user_code(filename):
            return _frame_source(frame)
        if name == "run" and filename == _RUN:
            break
        if name == "forward" and container is None and filename.startswith(_TORCH_LAYERS):
            container = frame
        frame = frame.f_back
    return "" if container is None else _frame_source(container)


def defined_at(function: Callable[..., Any]) -> str:
    """Where a function of the user's begins; "" for one without Python code."""
    code = getattr(function, "__code__", None)
    module = getattr(function, "__module__", None) or "__main__"
    return _describe(code, code.co_firstlineno, module) if isinstance(code, CodeType) else ""


def caller_is_user_code() -> bool:
    """Whether the code that called the recorder's innermost hook is the user's (not torch's own)."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_code.co_filename.startswith(_RECORDER):
        frame = frame.f_back
    return frame is not None and _is_user_code(frame.f_code.co_filename)


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
