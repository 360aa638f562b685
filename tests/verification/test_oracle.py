"""The mask oracle notices a wrong result, whatever is wrong with it."""

from __future__ import annotations

import copy
import sys
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Attentive, Shuffled, Small, Unchanged, image, make, outputs
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import VerificationError
from fxprune.rewriting import Draft
from fxprune.verification import DOUBLE_TOLERANCE, TOLERANCE, relative_error, zero_slices
from fxprune.verification.compare import compared

Tamper = Callable[[fx.GraphModule], None]


def shift_a_weight(pruned: fx.GraphModule) -> None:
    weight = next(p for p in pruned.parameters() if p.ndim > 1)
    weight.data.view(-1)[0] += 0.01


def swap_two_channels(pruned: fx.GraphModule) -> None:
    """Of the producer alone: the shapes are all right."""
    weight = next(p for p in pruned.parameters() if p.ndim > 1)
    weight.data[[0, 1]] = weight.data[[1, 0]]


def swap_two_inputs(pruned: fx.GraphModule) -> None:
    weight = [p for p in pruned.parameters() if p.ndim > 1][-1]
    weight.data[:, [0, 1]] = weight.data[:, [1, 0]]


def forget_a_bias(pruned: fx.GraphModule) -> None:
    next(p for n, p in pruned.named_parameters() if n.endswith("bias")).data.zero_()


def drop_a_node(pruned: fx.GraphModule) -> None:
    relu = next(n for n in pruned.graph.nodes if "relu" in str(n.target) or "add" in str(n.target))
    relu.replace_all_uses_with(relu.args[0])
    pruned.graph.erase_node(relu)
    pruned.recompile()


def tampered(monkeypatch: pytest.MonkeyPatch, tamper: Tamper) -> None:
    """Let the rewriting make a mistake that its own checks do not see."""
    original = Draft.finished

    def finished(self: Draft, consume: bool = False) -> Any:
        pruned = original(self, consume)
        tamper(pruned)
        return pruned

    monkeypatch.setattr(Draft, "finished", finished)


@pytest.mark.parametrize("tamper", [shift_a_weight, swap_two_channels, swap_two_inputs, forget_a_bias, drop_a_node])
@pytest.mark.parametrize("kind", [Small, Shuffled, Attentive])
def test_a_wrong_result_is_found(kind: type[nn.Module], tamper: Tamper, monkeypatch: pytest.MonkeyPatch) -> None:
    tampered(monkeypatch, tamper)
    model = make(kind)
    with Unchanged(model), pytest.raises(VerificationError) as caught:
        fxprune.prune(model, image(), channels=0.6, progress=False)
    text = str(caught.value)
    assert text.startswith("The pruned model differs from its masked original: relative error ")
    assert text.endswith("please report it with the model. The model that was given is unchanged.")
    fxprune.prune(model, image(), channels=0.6, progress=False, verify=False)  # nobody else would have noticed


def test_a_scale_of_attention_that_was_not_kept(monkeypatch: pytest.MonkeyPatch) -> None:
    def rescale(pruned: fx.GraphModule) -> None:
        node = next(n for n in pruned.graph.nodes if "scaled_dot_product" in str(n.target))
        assert node.kwargs["scale"] == 0.5
        node.kwargs = {k: v for k, v in node.kwargs.items() if k != "scale"}
        pruned.recompile()

    tampered(monkeypatch, rescale)
    with pytest.raises(VerificationError, match="differs from its masked original"):
        fxprune.prune(make(Attentive), image(), channels=0.6, progress=False, method="random")


def test_a_wrong_choice_of_slices_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The rewriter cuts other channels than the plan says."""
    module = sys.modules["fxprune.rewriting.rewrite"]
    original = module.Cuts.of

    def other(graph: Any, keep: Any) -> Any:
        wrong = keep.copy()
        for group in graph.prunable:
            wrong[group.channels] = wrong[group.channels][:, ::-1]
        return original(graph, wrong)

    monkeypatch.setattr(module.Cuts, "of", other)
    with pytest.raises(VerificationError, match="differs from its masked original"):
        fxprune.prune(make(), image(), channels=0.6, progress=False)


def test_a_forward_that_changes_from_call_to_call_is_found() -> None:
    class Counts(Small):
        calls = 0

        def forward(self, x: Tensor) -> Tensor:
            type(self).calls += 1
            return super().forward(x) * float(self.calls)

    with pytest.raises(VerificationError) as caught:
        fxprune.prune(make(Counts), image(), flops=0.5, progress=False)
    assert str(caught.value) == (
        "Counts.forward is no function of its inputs, so no graph can stand for it: a second call gives another answer "
        "(something that it keeps changes from call to call). Take that out of forward, or draw with torch."
    )


@pytest.mark.parametrize("kind", [Small, Shuffled, Attentive])
def test_the_error_is_that_of_a_plain_mask(kind: type[nn.Module]) -> None:
    """Without statistics over channels the oracle is nothing but zeroed weights."""
    model = make(kind)
    pruned = fxprune.prune(model, image(), channels=0.7, exact=True, progress=False)
    report = pruned.meta["fxprune"]
    assert report.oracle_error <= TOLERANCE
    masked = copy.deepcopy(model)
    zero_slices(masked, report.plan)
    assert any(not torch.equal(a, b) for a, b in zip(masked.parameters(), model.parameters(), strict=True))
    assert relative_error(outputs(pruned, image(3)), outputs(masked, image(3))) <= TOLERANCE


def test_a_network_that_amplifies_rounding_is_verified_in_double() -> None:
    class Chaotic(Small):
        def forward(self, x: Tensor) -> Tensor:
            return (super().forward(x) * 1e4).sin()

    report = fxprune.prune(make(Chaotic), image(), flops=0.5, progress=False).meta["fxprune"]
    assert report.oracle_error > TOLERANCE
    assert report.oracle_error_in_double <= DOUBLE_TOLERANCE
    assert f"{report.oracle_error_in_double:.1e} in double" in str(report)
    calm = fxprune.prune(make(), image(), flops=0.5, progress=False).meta["fxprune"]
    assert calm.oracle_error_in_double is None
    assert "in double" not in str(calm)


def test_a_network_of_positive_numbers_is_verified_on_such() -> None:
    """Its logarithm of anything else is no number, and nothing would be proven."""

    class Logarithm(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(8, 32, 3), nn.Conv1d(32, 5, 1)

        def forward(self, x: Tensor) -> Tensor:
            return self.b(self.a(x.log()).relu())  # type: ignore[no-any-return]

    powers = torch.rand(2, 8, 20) + 0.1
    small = fxprune.prune(Logarithm().eval(), powers, flops=0.5, progress=False)
    assert small.meta["fxprune"].oracle_error <= TOLERANCE
    with pytest.raises(VerificationError, match="what the network takes"):
        fxprune.prune(Logarithm().eval(), powers - 1, flops=0.5, progress=False)


def test_products_over_channels_of_as_many_rows_as_values_decide() -> None:
    """The features that are multiplied are 1 where a channel is masked, and gone where it is cut."""

    class Chosen(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.stem, self.score, self.head = nn.Linear(12, 32), nn.Linear(12, 1), nn.Linear(4, 4)
            self.query, self.key = nn.Linear(32, 32), nn.Linear(32, 32)

        def forward(self, x: Tensor) -> Tensor:
            score = self.score(x).mean((-1, -2))
            rows = self.stem(x)[torch.where(score > score.mean())]
            query, key = (F.elu(layer(rows).unflatten(-1, (4, 8))) + 1 for layer in (self.query, self.key))
            return self.head(torch.einsum("nlhd,nhd->nlh", query, key.sum(1)))  # type: ignore[no-any-return]

    torch.manual_seed(0)
    small = fxprune.prune(Chosen().eval(), torch.randn(2, 6, 25, 12), flops=0.6, progress=False)
    assert small.get_submodule("query").out_features < 32
    assert small.meta["fxprune"].oracle_error <= TOLERANCE


def test_statistics_are_over_the_kept_channels() -> None:
    """With a layer norm, zeroed weights alone would not give the pruned model's output."""
    model = make(Attentive)
    pruned = fxprune.prune(model, image(), channels=0.6, progress=False)
    assert pruned.get_parameter("norm.weight").shape[0] < 16
    assert pruned.meta["fxprune"].oracle_error <= TOLERANCE
    masked = copy.deepcopy(model)
    zero_slices(masked, pruned.meta["fxprune"].plan)
    assert relative_error(outputs(pruned, image(3)), outputs(masked, image(3))) > 0.01


def test_relative_error() -> None:
    x = torch.tensor([1.0, -4.0, 2.0])
    assert relative_error(x, x) == 0.0
    assert relative_error(x + torch.tensor([0.0, 0.0, 0.5]), x) == 0.125
    assert relative_error({"a": x, "b": (x * 2, 3)}, {"a": x, "b": (x, 3)}) == 1.0
    assert relative_error(torch.zeros(2), torch.zeros(2)) == 0.0
    assert relative_error(torch.ones(2), torch.zeros(2)) == 1.0
    infinite = torch.tensor([1.0, torch.inf])
    assert relative_error(infinite, infinite) == 0.0
    assert relative_error(torch.tensor([1.0, torch.nan]), torch.ones(2)) == float("inf")
    with pytest.raises(VerificationError, match=r"^The shape of an output differs: \[2\] instead of \[3\]\.$"):
        relative_error(x[:2], x)
    with pytest.raises(VerificationError, match=r"^The outputs differ in structure: 1 values instead of 2\.$"):
        relative_error(x, (x, x))


def test_every_output_counts_and_of_every_kind() -> None:
    x = torch.tensor([1.0, -4.0, 2.0])
    near = x + torch.tensor([0.0, 0.0, 0.5])
    assert relative_error((near, x), (x, x)) == relative_error((x, near), (x, x)) == 0.125
    assert relative_error((torch.empty(0), near), (torch.empty(0), x)) == 0.125
    assert relative_error((3, near), (4, x)) == 0.125, "what is no tensor is not compared"
    flags = torch.tensor([True, False])
    assert relative_error(flags, flags) == 0.0
    assert relative_error(~flags, flags) == 1.0
    imaginary = torch.tensor([2.0 + 0j, 4.0j])
    assert relative_error(imaginary + 2.0j, imaginary) == 0.5
    assert relative_error(torch.complex(imaginary.real, imaginary.imag + 2.0), imaginary) == 0.5
    sparse = torch.tensor([[0.0, 2.0], [0.0, 0.0]]).to_sparse()
    assert relative_error(sparse, sparse) == 0.0
    assert relative_error(sparse * 2, sparse) == 1.0
    with pytest.raises(VerificationError, match=r"^The shape of an output differs: int instead of \[3\]\.$"):
        relative_error(3, x)


def test_what_is_not_finite_must_be_the_same() -> None:
    inf, nan = torch.inf, torch.nan
    values = torch.tensor([1.0, inf, -inf, nan])
    assert relative_error(values, values) == 0.0
    assert relative_error(values * torch.tensor([1.5, 1, 1, 1]), values) == 0.5
    for other in ([1.0, -inf, -inf, nan], [1.0, inf, -inf, inf], [1.0, inf, nan, nan], [1.0, 1.0, -inf, nan]):
        assert relative_error(torch.tensor(other), values) == inf
    assert relative_error(torch.tensor([nan, inf]), torch.tensor([nan, inf])) == 0.0


def test_what_can_be_compared() -> None:
    flags, numbers, nothing = torch.ones(2, dtype=torch.bool), torch.ones(2), torch.empty(0)
    assert compared((flags, {"a": numbers})) == compared(numbers.long()) == "numbers"
    assert compared((flags, nothing, 3)) == "flags"
    assert compared((nothing, 3)) == compared(None) == "nothing"


def test_zeroed_slices_are_those_that_the_plan_drops() -> None:
    model = make(Shuffled)
    plan = fxprune.prune(model, image(), channels=0.6, progress=False, method="random").meta["fxprune"].plan
    masked = copy.deepcopy(model)
    zero_slices(masked, plan)
    weight, dims = masked.get_parameter("two.weight").detach(), plan.kept["two.weight"]
    for row in range(16):
        for column in range(8):
            stays = row in dims[0] and column in dims[1][row // 8]
            assert (float(weight[row, column].abs().sum()) > 0) == stays


class Padded(nn.Module):
    """A mask of infinities that all heads share, of which some go."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.attention = nn.Linear(4, 16), nn.MultiheadAttention(16, 4, batch_first=True)
        self.last = nn.Linear(16, 3)

    def forward(self, x: Tensor, padding: Tensor) -> Tensor:
        h = self.first(x)
        result: Tensor = self.last(self.attention(h, h, h, key_padding_mask=padding, need_weights=False)[0])
        return result


def test_infinities_that_heads_share_are_not_taken_from_the_ones_that_stay() -> None:
    padding = torch.zeros(2, 5, dtype=torch.bool)
    padding[1, 3:] = True
    inputs = torch.randn(2, 5, 4), padding
    small = fxprune.prune(
        make(Padded), inputs, params=0.7, attention="heads", ignore=["first"], round_to=1, progress=False
    )
    report = small.meta["fxprune"]
    assert len(report.plan.kept["attention.out_proj.weight"][1]) < 16
    assert report.oracle_error < TOLERANCE
