"""State: the model that was given has its own, and the pruned one's can be copied, saved and loaded."""

from __future__ import annotations

import copy
import tempfile

import torch

from model_zoo.checks.case import Case, check, equal


@check("untouched")
def _untouched(case: Case) -> str:
    """The model that was given is as it was."""
    state = case.model.state_dict()
    changed = [name for name, tensor in case.state.items() if not torch.equal(tensor, state[name])]
    return f"changed: {', '.join(changed[:3])}" if changed else ""


@check("names")
def _names(case: Case) -> str:
    """The state_dict has the original's names, in their order."""
    expected, found = list(case.state), list(case.pruned.state_dict())
    if found == expected:
        return ""
    return f"missing {sorted({*expected} - {*found})[:3]}, added {sorted({*found} - {*expected})[:3]}"


@check("copy")
def _copy(case: Case) -> str:
    """A deep copy computes the same; so does one with other values after loading the saved state_dict."""
    expected = case.run(case.pruned)
    twin = copy.deepcopy(case.pruned)
    if not equal(case.run(twin), expected):
        return "a deepcopy computes something else"
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.mul_(1.1)
    if equal(case.run(twin), expected):
        return "a deepcopy with other values computes the same"
    if not equal(case.run(case.pruned), expected):
        return "a deepcopy shares its values with the original"
    with tempfile.TemporaryDirectory() as folder:
        torch.save(case.pruned.state_dict(), f"{folder}/state.pt")
        twin.load_state_dict(torch.load(f"{folder}/state.pt", weights_only=True))
    return "" if equal(case.run(twin), expected) else "after loading the saved state_dict it computes something else"
