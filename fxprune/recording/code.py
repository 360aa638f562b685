"""Python code of a graph in which any name of a module or tensor is only ever a name."""

from __future__ import annotations

import keyword
import re
from typing import Any

from torch.fx.graph import CodeGen, PythonCode, _format_target


class Code(CodeGen):
    """``torch.fx`` pastes names between quotes, and after dots where they are keywords: here they are spelled out."""

    def _gen_python_code(self, nodes: Any, root_module: str, *args: Any, **kwargs: Any) -> PythonCode:
        result = super()._gen_python_code(nodes, root_module, *args, **kwargs)
        spelled = {}
        for node in nodes:
            if node.op in ("call_module", "get_attr"):
                pasted, right = _format_target(root_module, node.target), _spelled(root_module, node.target)
                if pasted != right:
                    spelled[pasted] = right
        if spelled:
            longest_first = sorted(spelled, key=len, reverse=True)
            pattern = "|".join(f"{re.escape(pasted)}(?![A-Za-z0-9_])" for pasted in longest_first)
            result.src = re.sub(pattern, lambda match: spelled[match.group()], result.src)
        return result


def _spelled(root: str, target: str) -> str:
    for name in target.split("."):
        plain = name.isidentifier() and not keyword.iskeyword(name)
        root = f"{root}.{name}" if plain else f"getattr({root}, {name!r})"
    return root
