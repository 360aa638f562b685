"""Python code of a graph: any name of a module or tensor is only ever a name, and every line tells the user's."""

from __future__ import annotations

import keyword
import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch.fx import Node
from torch.fx.graph import CodeGen, PythonCode

_STAND_IN = "_fxprune_name_"


class Code(CodeGen):
    """``torch.fx`` pastes names between quotes, and after dots where they are keywords: here they are spelled out.

    The user's line is a comment after each line, so it is in every traceback through the code, also in those that
    compilers and converters write, whatever module the graph is part of.
    """

    def _gen_python_code(self, nodes: Any, root_module: str, *args: Any, **kwargs: Any) -> PythonCode:
        nodes = list(nodes)
        result = self._with_any_name(nodes, root_module, *args, **kwargs)
        lines, told = result.src.split("\n"), set[int]()
        for number, index in sorted((result._lineno_map or {}).items()):
            place = number + result._prologue_start - 1
            if index is None or index in told or place >= len(lines) or not lines[place].strip():
                continue
            told.add(index)
            if source := nodes[index].meta.get("source"):
                lines[place] += f"  # {_as_comment(source)}"
        result.src = "\n".join(lines)
        return result

    def _with_any_name(self, nodes: Any, root_module: str, *args: Any, **kwargs: Any) -> PythonCode:
        odd = {n: n.target for n in nodes if n.op in ("call_module", "get_attr") and not _is_plain(n.target)}
        if not odd:
            return super()._gen_python_code(nodes, root_module, *args, **kwargs)
        targets = list(dict.fromkeys(odd.values()))
        with _renamed({node: f"{_STAND_IN}{targets.index(target)}" for node, target in odd.items()}):
            result = super()._gen_python_code(nodes, root_module, *args, **kwargs)
        spelled = [_spelled(root_module, target) for target in targets]
        pattern = rf"{re.escape(root_module)}\.{_STAND_IN}(\d+)\b"
        result.src = re.sub(pattern, lambda match: spelled[int(match[1])], result.src)
        return result


def _as_comment(text: str) -> str:
    """On one line, in characters that a file can hold: it has a path, which may hold any."""
    return " ".join(text.split()).encode(errors="backslashreplace").decode()


@contextmanager
def _renamed(names: dict[Node, str]) -> Iterator[None]:
    """The nodes have other targets inside."""
    before = {node: node.target for node in names}
    try:
        for node, name in names.items():
            node.target = name
        yield
    finally:
        for node, target in before.items():
            node.target = target


def _is_plain(target: str) -> bool:
    return all(map(_is_plain_name, target.split(".")))


def _is_plain_name(name: str) -> bool:
    """Whether it may follow a dot. Python reads other letters than those of ASCII as their plain forms."""
    return name.isascii() and name.isidentifier() and not keyword.iskeyword(name) and not name.startswith(_STAND_IN)


def _spelled(root: str, target: str) -> str:
    for name in target.split("."):
        root = f"{root}.{name}" if _is_plain_name(name) else f"getattr({root}, {name!r})"
    return root
