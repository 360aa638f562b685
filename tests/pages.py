"""The pages of the documentation as code: their blocks, run one after the other."""

from __future__ import annotations

import contextlib
import doctest
import io
import re
from pathlib import Path
from typing import Any, NamedTuple

import timm
import torch
from torch import nn

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"


class Block(NamedTuple):
    """A block of code in a page. ``line``: how many lines are above it. ``follows``: with nothing between, a block."""

    language: str
    code: str
    line: int
    follows: bool


def parsed(page: Path) -> list[Block]:
    text, end, found = page.read_text(), 0, []
    for match in re.finditer(r"^```(\S*)\n(.*?)^```$", text, re.DOTALL | re.MULTILINE):
        between = text[end : match.start()]
        found.append(Block(match[1], match[2], text[: match.start(2)].count("\n"), bool(end) and not between.strip()))
        end = match.end()
    return found


def blocks(language: str, page: Path) -> list[str]:
    return [block.code for block in parsed(page) if block.language == language]


def block_with(text: str, page: Path, language: str = "python") -> str:
    (found,) = (code for code in blocks(language, page) if text in code)
    return found


def run(page: Path) -> dict[str, Any]:
    """Run the Python blocks of a page, compare what they print with what the page shows, and return their names."""
    names: dict[str, Any] = {}
    printed = ""
    for block in parsed(page):
        if block.language == "python":
            code = compile("\n" * block.line + block.code, page.name, "exec")
            with contextlib.redirect_stdout(io.StringIO()) as out:
                exec(code, names)
            printed = out.getvalue()
            names["printed"] = names.get("printed", "") + printed
        elif block.language == "text" and block.follows:
            flags = doctest.ELLIPSIS | doctest.NORMALIZE_WHITESPACE
            agree = doctest.OutputChecker().check_output(block.code, printed, flags)
            assert agree, f"{page.name}:{block.line} shows something else than what is printed:\n{printed}"
    return names


def stand_in(name: str, pretrained: bool = False) -> nn.Module:
    """A small network with the names of the one in the pages."""
    torch.manual_seed(0)
    model = timm.models.resnet.ResNet(
        timm.models.resnet.BasicBlock, (1, 1, 1, 1), num_classes=10, channels=(64, 64, 64, 64)
    )
    model.pretrained_cfg = {"input_size": (3, 64, 64)}
    return model.eval()
