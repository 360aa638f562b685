"""A pruned network in its model's place: what code around the model does with it, and what kernels want of it.

A check returns the reason why it fails, or ""; None where it does not apply. What a class promises by itself
(``OWN``), and whether it can be trained on the inputs at all, is asked of the dense model first: what that one does
not do, nothing else need do.
"""

from __future__ import annotations

import copy
import re
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, fx, nn
from torch.overrides import TorchFunctionMode

import fxprune
from fxprune.errors import BudgetError
from model_zoo.checks.answers import compare, run, values_in
from model_zoo.networks.subject import Inputs, Subject
from model_zoo.records import raised

NEW_TOKENS = 5
RTOL = 1e-3  # of a gradient
ATOL = 1e-5  # the same, relative to the largest gradient of all: sums that cancel are rounding
MOST_NAMES = 3
SMALLEST = re.compile(r"the smallest reachable ratio is ([\d.]*\d)")

Own = Callable[[nn.Module, Inputs], "str | None"]


def pruned_to(subject: Subject, flops: float, method: str, for_class: bool = False) -> tuple[fx.GraphModule, float]:
    """The pruned graph and the ratio of MACs that was asked of it: ``flops``, or the smallest that can be reached."""
    args, kwargs = subject.example()

    def pruned(ratio: float) -> fx.GraphModule:
        graph: fx.GraphModule = fxprune.prune(
            copy.deepcopy(subject.model), args, example_kwargs=kwargs, flops=ratio, method=method,
            verify=False, round_to=1, progress=False, for_class=for_class,
        )  # fmt: skip
        return graph.eval()

    ratio = flops
    while True:  # with fewer channels cut another plan may be held, by other things
        try:
            return pruned(ratio), ratio
        except BudgetError as error:
            smallest = SMALLEST.search(str(error))
            if smallest is None or float(smallest[1]) <= ratio:
                raise
            ratio = float(smallest[1])


# -- what the class promises by itself --------------------------------------------------------------------------------


def generate(model: Any, inputs: Inputs) -> str | None:
    """Greedy decoding with the cache gives the tokens that it gives without."""
    if not getattr(model, "can_generate", bool)():
        return None
    found = [_generated(copy.deepcopy(model), inputs, use_cache) for use_cache in (True, False)]
    return "" if torch.equal(*found) else f"with the cache {found[0].tolist()}, without {found[1].tolist()}"


def _generated(model: Any, inputs: Inputs, use_cache: bool) -> Tensor:
    """The new tokens [batch, NEW_TOKENS], and what was before them where the model has no encoder."""
    given = {key: value for key, value in copy.deepcopy(inputs[1]).items() if not key.startswith("decoder_")}
    if model.config.is_encoder_decoder:
        given["decoder_start_token_id"] = int(inputs[1]["decoder_input_ids"][0, 0])
    torch.manual_seed(0)
    counts = {"max_new_tokens": NEW_TOKENS, "min_new_tokens": NEW_TOKENS}
    tokens: Tensor = model.generate(
        **given, **counts, do_sample=False, num_beams=1, use_cache=use_cache, pad_token_id=0
    )
    return tokens


def save(model: Any, inputs: Inputs) -> str | None:
    """``save_pretrained`` and ``from_pretrained`` give a network that computes the same."""
    if not hasattr(model, "save_pretrained"):
        return None
    model = copy.deepcopy(model)
    with tempfile.TemporaryDirectory() as folder:
        model.save_pretrained(folder)
        loaded = type(model).from_pretrained(folder).eval()
    return compare(run(loaded, copy.deepcopy(inputs)), run(model, copy.deepcopy(inputs))).fault


OWN: dict[str, Own] = {"generate": generate, "save": save}


# -- what it shares with the graph ------------------------------------------------------------------------------------


def to_train_on(subject: Subject) -> tuple[Inputs, str]:
    """The example, or a batch of two of a network that takes no single image in train mode; else why it takes neither.

    A detector wants to know what is to be found, and gives losses.
    """
    why = ""
    for batch in dict.fromkeys((subject.batch, 2)):
        inputs = subject.make(batch, subject.size, 0)
        args, kwargs = copy.deepcopy(inputs)
        try:
            copy.deepcopy(subject.model).train()(*args, **kwargs)  # a run in train mode changes statistics
        except Exception as error:
            why = why or raised(error)
        else:
            return inputs, ""
    return subject.example(), why


def train_step(instance: nn.Module, pruned: fx.GraphModule, inputs: Inputs) -> str:
    """The gradients of the class and of the graph are equal in train mode, where both have one or not.

    Those of weights that are not the graph's are left out: queries that took up a scale, which a step moves by others.
    """
    fault = _gradients_apart(instance, pruned, inputs, train=True)
    if fault and not _gradients_apart(instance, pruned, inputs, train=False):
        notes = [note for note in pruned.meta["fxprune"].notes if "self.training" in note]
        fault = "; ".join([f"{fault}; equal in eval mode", *notes])
    return fault


def _gradients_apart(instance: nn.Module, pruned: fx.GraphModule, inputs: Inputs, train: bool) -> str:
    ours, its = (_gradients(copy.deepcopy(module).train(train), inputs) for module in (instance, pruned))
    if not ours:
        return "the class has no gradient"
    one_sided = [f"{name} (class)" for name in ours.keys() - its.keys()]
    one_sided += [f"{name} (graph)" for name in its.keys() - ours.keys()]
    if one_sided:
        return f"{len(one_sided)} gradients on one side only: {', '.join(sorted(one_sided)[:MOST_NAMES])}"
    least = ATOL * max(float(gradient.abs().max()) for gradient in ours.values() if gradient.numel())
    weights = dict(pruned.named_parameters(remove_duplicate=False))
    own = dict(instance.named_parameters(remove_duplicate=False))
    same = [name for name in ours if torch.equal(own[name], weights[name])]
    unequal = [name for name in same if not torch.allclose(its[name], ours[name], rtol=RTOL, atol=least)]
    return f"{len(unequal)} of {len(ours)} gradients differ: {', '.join(unequal[:MOST_NAMES])}" if unequal else ""


def _gradients(module: nn.Module, inputs: Inputs) -> dict[str, Tensor]:
    """Parameter, by all of its names -> its gradient of the squared distance of the floating outputs from noise.

    That from zero is the same whatever a layer norm is given.
    """
    args, kwargs = copy.deepcopy(inputs)
    torch.manual_seed(0)
    outputs = [value for value, _ in values_in(module(*args, **kwargs)).values() if isinstance(value, Tensor)]
    learnt = [output for output in outputs if output.is_floating_point() and output.requires_grad]
    noise = torch.Generator().manual_seed(0)
    squares = [(y - torch.randn(y.shape, generator=noise, dtype=y.dtype)).square().sum() for y in learnt]
    torch.stack(squares).sum().backward()
    every = module.named_parameters(remove_duplicate=False)
    return {name: parameter.grad for name, parameter in every if parameter.grad is not None}


# -- what kernels want of it ------------------------------------------------------------------------------------------


def fused_attention(subject: Subject, pruned: fx.GraphModule) -> str | None:
    """Where queries and values had heads of one width in the dense network, they have it now: fused kernels need it."""
    dense = fxprune.record(copy.deepcopy(subject.model), *subject.example())
    before, after = (_head_widths(graph, subject.example()) for graph in (dense, pruned))
    if not before:
        return None
    if len(before) != len(after):
        return f"{len(after)} calls instead of {len(before)}"
    pairs = zip(before, after, strict=True)
    uneven = [f"{i}: {q} and {v}" for i, (was, (q, v)) in enumerate(pairs) if was[0] == was[1] and q != v]
    return f"{len(uneven)} of {len(after)} calls, {', '.join(uneven[:MOST_NAMES])}" if uneven else ""


def _head_widths(graph: nn.Module, inputs: Inputs) -> list[tuple[int, int]]:
    """Of queries and of values, for every call of ``scaled_dot_product_attention``."""
    with _Attentions() as attentions:
        run(graph, inputs)
    return attentions.widths


class _Attentions(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.widths: list[tuple[int, int]] = []

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is nn.functional.scaled_dot_product_attention:
            query, value = (kwargs[name] if name in kwargs else args[at] for at, name in ((0, "query"), (2, "value")))
            self.widths.append((query.shape[-1], value.shape[-1]))
        return func(*args, **kwargs)
