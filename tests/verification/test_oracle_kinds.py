"""What masked and pruned model must agree on besides sums: extremes, norms, flags, noise, and odd signatures."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from conftest import randomise
from nets import Attentive, image, make, outputs
from torch import Tensor, fx, nn

import fxprune
from fxprune.errors import VerificationError
from fxprune.recording.randomness import repeatable
from fxprune.reports.report import Report
from fxprune.rewriting import Draft
from fxprune.verification import TOLERANCE, relative_error

Expression = Callable[[Tensor], Tensor]


class Between(nn.Module):
    """4 -> 16 -> 3 with an expression of all 16 channels added to the outputs, or multiplied with the channels."""

    def __init__(self, expression: Expression, scale: bool = False):
        super().__init__()
        self.a, self.b = nn.Linear(4, 16), nn.Linear(16, 3)
        self.expression, self.scale = expression, scale

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x)
        if self.scale:
            return self.b(self.expression(h))
        return self.b(h.relu()) + self.expression(h)


def pruned(model: nn.Module, *inputs: Tensor, **options: Any) -> fx.GraphModule:
    torch.manual_seed(1)
    for parameter in model.parameters():
        nn.init.normal_(parameter)
    return fxprune.prune(model.eval(), inputs, channels=0.5, method="random", progress=False, **options)


def assert_cut_and_proven(small: fx.GraphModule) -> None:
    report = small.meta["fxprune"]
    assert small.get_parameter("a.weight").shape[0] < 16, str(report)
    assert report.oracle_error <= TOLERANCE


STATISTICS: dict[str, Expression] = {
    "amax of integers": lambda h: (h * 9).long().amax(1, keepdim=True),
    "amin of integers": lambda h: ((h.abs() + 1) * 9).long().amin(1, keepdim=True),
    "amax of negative integers": lambda h: (-(h.abs() + 1) * 9).int().amax(1, keepdim=True),
    "amax of small integers": lambda h: (-(h.abs() + 1)).to(torch.int8).amax(1, keepdim=True),
    "max of integers": lambda h: (h * 9).long().max(1, keepdim=True)[0],
    "min of integers": lambda h: (h * 9).long().min(1, keepdim=True).values,
    "sum of integers": lambda h: (h * 9).long().sum(1, keepdim=True),
    "product of integers": lambda h: (h.abs() * 2 + 1).long().prod(1, keepdim=True).float().log(),
    "mean of integers": lambda h: (h * 9).long().mean(1, keepdim=True, dtype=torch.float32),
    "any": lambda h: (h > 2).any(1, keepdim=True),
    "any of numbers": lambda h: (h * 0.4).long().any(1, keepdim=True),
    "all": lambda h: (h.abs() > 0.1).all(1, keepdim=True),
    "all that were masked are false": lambda h: (h.abs() > 0).all(1, keepdim=True),
    "amax of flags": lambda h: (h > 2).amax(1, keepdim=True),
    "amin of flags": lambda h: (h.abs() > 0).amin(1, keepdim=True),
    "sum of flags": lambda h: (h > 0).sum(1, keepdim=True),
    "count of what is not zero": lambda h: h.relu().count_nonzero(1)[:, None],
    "all of everything": lambda h: torch._is_all_true(h.abs() > 0).float(),
    "any of everything": lambda h: torch._is_any_true(h.abs() == 0).float(),
    "distances": lambda h: torch.cdist(h.sigmoid(), h.cos()).sum(1, keepdim=True),
    "largest differences": lambda h: torch.cdist(h.sigmoid(), h.cos(), p=float("inf")).sum(1, keepdim=True),
    "both extremes": lambda h: torch.sub(*reversed(torch.aminmax(h.abs() + 1, dim=1, keepdim=True))),
    "both extremes of integers": lambda h: (h * 9).long().abs().add(3).aminmax(dim=1, keepdim=True).min,
    "norm 0": lambda h: h.norm(p=0, dim=1, keepdim=True),
    "norm 1": lambda h: h.norm(p=1, dim=1, keepdim=True),
    "norm 3.5": lambda h: torch.linalg.vector_norm(h, 3.5, 1, keepdim=True),
    "norm inf": lambda h: torch.linalg.vector_norm(h, float("inf"), 1, keepdim=True),
    "norm -inf": lambda h: torch.linalg.vector_norm(h, float("-inf"), 1, keepdim=True),
    "norm -2": lambda h: torch.linalg.vector_norm(h, -2, 1, keepdim=True),
    "logsumexp": lambda h: h.logsumexp(1, keepdim=True),
    "product": lambda h: (h.abs() + 0.5).prod(1, keepdim=True).log(),
    "nansum": lambda h: h.nansum(1, keepdim=True),
    "nanmean": lambda h: h.nanmean(1, keepdim=True),
    "variance": lambda h: h.var(1, keepdim=True),
    "variance of a population": lambda h: h.var(1, correction=0, keepdim=True),
    "variance with its own correction": lambda h: h.var(1, correction=3, keepdim=True),
    "variance with too large a correction": lambda h: h.var(1, correction=30, keepdim=True).nan_to_num(7.0, 5.0),
    "variance of complex numbers": lambda h: torch.complex(h, h * 2).var(1, keepdim=True),
    "deviation": lambda h: torch.std_mean(h, 1, keepdim=True)[0],
    "deviation of everything": lambda h: h.std(),
    "flipped mean": lambda h: h.flip(1).mean(1, keepdim=True),
    "cumulated over the batch": lambda h: h.cumsum(0).mean(1, keepdim=True),
    "extremes cumulated over the batch": lambda h: h.cummax(0).values.amax(1, keepdim=True),
}


@pytest.mark.filterwarnings("ignore:var\\(\\). degrees of freedom")
@pytest.mark.parametrize("name", STATISTICS)
def test_statistics_over_channels(name: str) -> None:
    assert_cut_and_proven(pruned(Between(STATISTICS[name]), torch.randn(2, 4)))


SCALES: dict[str, Expression] = {
    "mean of the flipped channels": lambda h: h * h.flip(1).mean(1, keepdim=True),
    "logcumsumexp over the batch": lambda h: h.logcumsumexp(0),
    "largest integer": lambda h: h * (h * 9).long().amax(1, keepdim=True),
    "what is divided by itself": lambda h: h / h.abs().amax(0),
}


@pytest.mark.parametrize("name", SCALES)
def test_statistics_that_scale_channels(name: str) -> None:
    assert_cut_and_proven(pruned(Between(SCALES[name], scale=True), torch.randn(2, 4)))


NOISE: dict[str, Expression] = {
    "randn_like": lambda h: h + 0.1 * torch.randn_like(h),
    "rand_like": lambda h: h * torch.rand_like(h),
    "randn of a size": lambda h: h + torch.randn(h.shape),
    "randn of numbers": lambda h: h + torch.randn(h.shape[0], 16),
    "rand for every channel": lambda h: h * torch.rand(h.shape[-1]),
    "normal of a size": lambda h: h + torch.normal(0.0, 1.0, (h.shape[0], 16)),
    "normal around channels": lambda h: torch.normal(h, h.abs() + 0.1),
    "normal with deviations": lambda h: torch.normal(0.0, h.abs() + 0.1) + h,
    "normal with a deviation": lambda h: torch.normal(h, 0.5),
    "normal in place": lambda h: h + torch.empty_like(h).normal_(),
    "uniform in place": lambda h: h + torch.empty_like(h).uniform_(),
    "bernoulli of channels": lambda h: h * torch.bernoulli(h.sigmoid()),
    "bernoulli in place": lambda h: h * torch.empty_like(h).bernoulli_(0.5),
    "poisson": lambda h: torch.poisson(h.abs() * 3) + h,
    "binomial": lambda h: torch.binomial(torch.full_like(h, 5.0), h.sigmoid()) + h,
    "dropout": lambda h: F.dropout(h, 0.5, training=True),
    "alpha dropout": lambda h: F.alpha_dropout(h, 0.5, training=True),
    "dropout of channels": lambda h: F.dropout1d(h[:, :, None], 0.5, training=True)[:, :, 0],
    "rrelu": lambda h: F.rrelu(h, training=True),
    "gumbel softmax": lambda h: h + F.gumbel_softmax(h),
    "cauchy, log_normal, geometric": lambda h: (
        h + torch.empty_like(h).cauchy_().clamp(-2, 2)
        + torch.empty_like(h).log_normal_() + torch.empty_like(h).geometric_(0.5)
    ),
    "integers": lambda h: h * torch.randint(1, 9, (h.shape[0], 1)),
    "integers like": lambda h: h * torch.randint_like(h, 1, 9),
    "noise flipped": lambda h: h + torch.randn_like(h).flip(1),
    "noise turned": lambda h: h + torch.randn(16, h.shape[0]).t(),
    "the mean of noise": lambda h: h + torch.randn_like(h).mul(h).mean(1, keepdim=True),
    "twice": lambda h: (h + torch.randn_like(h)) * torch.rand_like(h) + torch.randn(3, 1, 1).sum(),
}  # fmt: skip


@pytest.mark.parametrize("name", NOISE)
def test_noise_is_the_same_on_the_channels_that_stay(name: str) -> None:
    assert_cut_and_proven(pruned(Between(NOISE[name], scale=True), torch.randn(2, 4)))


def test_noise_inside_heads_and_with_dropout_of_attention() -> None:
    class Noisy(Attentive):
        def forward(self, x: Tensor) -> Tensor:
            x = self.embed(x).flatten(2).transpose(1, 2)
            n, t, c = x.shape
            q, k, v = self.qkv(self.norm(x)).reshape(n, t, 3, 4, c // 4).permute(2, 0, 3, 1, 4)
            q = q + 0.1 * torch.randn_like(q)
            y = F.scaled_dot_product_attention(q, k, v, dropout_p=0.3)
            return self.head((x + self.proj(y.transpose(1, 2).reshape(n, t, c))).mean(1))

    report = fxprune.prune(make(Noisy), image(), channels=0.6, method="random", progress=False).meta["fxprune"]
    assert report.oracle_error <= TOLERANCE
    assert report.params_after < report.params_before


@pytest.mark.parametrize("name", ["randn_like", "bernoulli of channels", "normal around channels"])
def test_noise_hides_no_mistake(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """The numbers are the masked model's, what is made of them is the pruned model's."""
    original = Draft.finished

    def finished(self: Draft, consume: bool = False) -> Any:
        result = original(self, consume)
        result.get_parameter("a.weight").data.view(-1)[0] += 1.0
        return result

    monkeypatch.setattr(Draft, "finished", finished)
    with pytest.raises(VerificationError, match="differs from its masked original"):
        pruned(Between(NOISE[name], scale=True), torch.randn(2, 4))


def test_an_index_that_is_drawn_is_not_known() -> None:
    class Picks(Between):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h.relu()) + h[:, torch.randint(0, 16, (3,))]

    with pytest.raises(fxprune.errors.ModelError, match="indexed by values that are not known"):
        pruned(Picks(torch.relu), torch.randn(2, 4))


# -- signatures -------------------------------------------------------------------------------------------------------


class Stars(Between):
    def forward(self, *xs: Tensor, **others: Tensor) -> Tensor:
        return super().forward(xs[0] + xs[1] * others["more"] + others["most"])


def test_star_arguments() -> None:
    model, x = Stars(torch.relu, scale=True).eval(), torch.randn(2, 4)
    kwargs = {"more": torch.randn(2, 4), "most": torch.randn(2, 4)}
    small = fxprune.prune(model, (x, x + 1), example_kwargs=kwargs, channels=0.5, progress=False)
    assert_cut_and_proven(small)
    assert not [note for note in small.meta["fxprune"].notes if "batch size" in note]
    assert small(x, x + 1, **kwargs).shape == (2, 3)


def test_star_arguments_are_measured() -> None:
    class Sum(Between):
        def forward(self, *xs: Tensor) -> Tensor:
            return super().forward(xs[0] + xs[1])

    x = torch.randn(2, 4)
    data = [((x, x), torch.zeros(2))] * 2
    small = fxprune.prune(
        Sum(torch.relu, scale=True).eval(), (x, x), channels=0.5, progress=False, method="activation", data=data
    )
    assert_cut_and_proven(small)


# -- what is compared -------------------------------------------------------------------------------------------------


def test_flags_are_compared() -> None:
    flags = torch.tensor([True, False, True])
    assert relative_error(flags, flags) == 0.0
    assert relative_error(~flags, flags) == 1.0
    with pytest.raises(VerificationError, match="The shape of an output differs: int instead of"):
        relative_error([1], [flags])


def test_a_wrong_flag_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    class Flags(Between):
        def forward(self, x: Tensor) -> Tensor:
            return super().forward(x) > 0

    pruned(Flags(torch.relu, scale=True), torch.randn(8, 4))
    original = Draft.finished

    def finished(self: Draft, consume: bool = False) -> Any:
        result = original(self, consume)
        result.get_parameter("b.weight").data.neg_()
        return result

    monkeypatch.setattr(Draft, "finished", finished)
    with pytest.raises(VerificationError, match=r"relative error 1.0e\+00 \(1.0e\+00 in double\)"):
        pruned(Flags(torch.relu, scale=True), torch.randn(8, 4))


def report_with(compared: str) -> Report:
    report: Report = pruned(Between(torch.relu, scale=True), torch.randn(2, 4)).meta["fxprune"]
    return Report(**{**vars(report), "oracle_error": 0.0, "oracle_compared": compared})


def test_the_report_tells_what_was_compared() -> None:
    assert "agree to 0.0e+00 (relative)" in str(report_with("numbers"))
    flags = str(report_with("flags"))
    assert "masked original and pruned model: no numbers come out, only flags, and these are the same" in flags
    assert "agree to 0.0e+00 (relative)" not in flags
    assert "nothing was compared, for no tensor comes out" in str(report_with("nothing"))


# -- what is left as it was -------------------------------------------------------------------------------------------


def test_nobodys_generators_are_touched(monkeypatch: pytest.MonkeyPatch) -> None:
    for module in (torch, torch.random, torch.cuda):
        for name in ("manual_seed", "manual_seed_all"):
            monkeypatch.setattr(module, name, lambda seed: pytest.fail("seeded"), raising=False)
    own = torch.Generator()
    state = own.get_state()

    class Own(Between):
        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(h + torch.empty_like(h).normal_(generator=own))

    model, x = Own(torch.relu).eval(), torch.randn(2, 4)
    with repeatable():
        first = model(x)
    with repeatable():
        assert torch.equal(model(x), first)
    with repeatable(1):
        assert not torch.equal(model(x), first)
    assert torch.equal(own.get_state(), state)


DRAWN: dict[str, Callable[[], Tensor]] = {
    "randn": lambda: torch.randn(4),
    "randn_like": lambda: torch.randn_like(torch.ones(4)),
    "randint": lambda: torch.randint(0, 1000, (4,)),
    "randperm": lambda: torch.randperm(64),
    "multinomial": lambda: torch.multinomial(torch.ones(64), 8),
    "poisson": lambda: torch.poisson(torch.full((8,), 9.0)),
    "dropout": lambda: torch.ops.aten.native_dropout(torch.ones(64), 0.5, True)[0],
    "attention": lambda: F.scaled_dot_product_attention(*[torch.ones(1, 1, 8, 8)] * 3, dropout_p=0.5),
}


@pytest.mark.parametrize("name", DRAWN)
def test_the_same_numbers_are_drawn_again(name: str) -> None:
    before = torch.get_rng_state()
    results = []
    for _ in range(2):
        with repeatable():
            results.append((DRAWN[name](), DRAWN[name]()))
    (a, b), again = results
    assert torch.equal(a, again[0])
    assert torch.equal(b, again[1])
    assert not torch.equal(a, b)
    assert torch.equal(torch.get_rng_state(), before)


def test_the_backends_of_attention_stay_switched_on() -> None:
    """They belong to the whole process: another thread may be running its model."""
    model, seen, done = make(Attentive), set(), threading.Event()

    def watch() -> None:
        while not done.is_set():
            seen.add((torch.backends.cuda.flash_sdp_enabled(), torch.backends.cuda.mem_efficient_sdp_enabled()))

    thread = threading.Thread(target=watch)
    thread.start()
    small = fxprune.prune(model, image(), channels=0.6, progress=False)
    done.set()
    thread.join()
    assert seen == {(True, True)}
    assert outputs(small, image(3))[0].shape[0] == 3


@pytest.mark.parametrize("mask", ["none", "flags", "numbers", "causal"])
@pytest.mark.parametrize("grouped", [False, True])
def test_attention_taken_apart_is_attention(mask: str, grouped: bool) -> None:
    from fxprune.verification.oracle import _PlainAttention

    q, k = torch.randn(2, 4, 6, 8), torch.randn(2, 2 if grouped else 4, 6, 8)
    given = {
        "none": None,
        "flags": torch.rand(6, 6) > 0.3,
        "numbers": torch.randn(6, 6),
        "causal": None,
    }[mask]
    options: Any = {"attn_mask": given, "is_causal": mask == "causal", "enable_gqa": grouped, "scale": 0.3}
    expected = F.scaled_dot_product_attention(q, k, k, **options)
    with _PlainAttention():
        found = F.scaled_dot_product_attention(q, k, k, **options)
    torch.testing.assert_close(found, expected)


def test_attention_of_three_dims_whose_tokens_are_channels_is_proven() -> None:
    """A softmax over channels in one call: torch computes it of four dims."""

    class Across(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b = nn.Conv1d(3, 12, 1), nn.Linear(8, 4)

        def forward(self, x: Tensor) -> Tensor:
            h = self.a(x)
            return self.b(F.scaled_dot_product_attention(h, h.relu(), h).sum(1))

    model = randomise(Across()).eval()
    small = fxprune.prune(model, torch.randn(2, 3, 8), channels=0.5, round_to=1, progress=False)
    assert small.a.weight.shape[0] == 6
