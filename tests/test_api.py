"""What ``prune``, ``apply`` and ``analyze`` promise, on small networks."""

from __future__ import annotations

import copy
import gc
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from nets import Attentive, Shuffled, Small, Unchanged, image, make, outputs, same, tensors
from torch import Tensor, fx, nn

import fxprune
from fxprune.verification import TOLERANCE

ALL = [Small, Shuffled, Attentive]


def prune(model: nn.Module, inputs: Any = None, **options: Any) -> fx.GraphModule:
    budget = {} if {"flops", "params", "channels"} & set(options) else {"flops": 0.5}
    return fxprune.prune(model, image() if inputs is None else inputs, progress=False, **budget, **options)


def kept(pruned: fx.GraphModule, name: str, dim: int = 0) -> list[int]:
    return pruned.meta["fxprune"].plan.kept.get(name, {}).get(dim, list(range(pruned.get_parameter(name).shape[dim])))


# -- the given model stays


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("training", [False, True])
def test_the_model_stays_as_it_was(kind: type[nn.Module], training: bool) -> None:
    model = make(kind).train(training)
    next(model.children()).eval()  # modes may be mixed
    with Unchanged(model):
        pruned = prune(model)
        fxprune.apply(model, pruned.meta["fxprune"].plan, image())
        fxprune.analyze(model, image())
    with torch.no_grad():
        for parameter in pruned.parameters():
            parameter.fill_(1)  # and shares no memory with the result
    assert all(float(p.detach().std()) > 0 for p in model.parameters() if p.numel() > 1)


class Counting(Small):
    """Counts its calls, in eval mode too: in place, and by putting another tensor in the buffer's place."""

    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros((), dtype=torch.int64))
        self.register_buffer("decayed", torch.ones(1))
        self.register_buffer("replaced", torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        self.calls += 1
        self.decayed.mul_(0.5)
        self.replaced = self.replaced + 1
        return super().forward(x)


@pytest.mark.parametrize("verify", [True, False])
def test_what_a_model_counts_stays_as_it_was(verify: bool) -> None:
    model = make(Counting)
    counts = {name: getattr(model, name).clone() for name in ("calls", "decayed", "replaced")}
    with Unchanged(model):
        pruned = prune(model, verify=verify)
        fxprune.analyze(model, image())
    assert all(torch.equal(pruned.get_buffer(name), value) for name, value in counts.items())
    pruned(image())
    assert int(pruned.calls) == int(counts["calls"]) + 1


@pytest.mark.parametrize("enabled", [True, False])
def test_the_garbage_collector_stays_as_it_was(enabled: bool) -> None:
    """It pauses while graphs are made, and looks on while the model is run to compare."""
    seen: list[bool] = []

    class Watching(Small):
        def forward(self, x: Tensor) -> Tensor:
            seen.append(gc.isenabled())
            return super().forward(x)

    model, before = make(Watching), gc.isenabled()
    (gc.enable if enabled else gc.disable)()
    try:
        prune(model)
        assert gc.isenabled() == enabled
    finally:
        (gc.enable if before else gc.disable)()
    assert seen[0] is False
    assert seen[-1] is enabled


def test_the_random_state_stays_as_it_was() -> None:
    model, x = make(), image()
    torch.manual_seed(3)
    expected = torch.rand(4)
    torch.manual_seed(3)
    prune(model, x, method="random")
    assert torch.equal(torch.rand(4), expected)


# -- the same plan


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("method", ["random", "l2"])
def test_one_seed_is_one_plan(kind: type[nn.Module], method: str) -> None:
    plans = [prune(make(kind), method=method, seed=seed).meta["fxprune"].plan for seed in (5, 5, 6)]
    assert plans[0] == plans[1]
    assert (plans[0] == plans[2]) == (method == "l2")


SCRIPT = """
import json, sys
import fxprune
from nets import Attentive, Shuffled, Small, image, make
for kind in (Small, Shuffled, Attentive):
    for scope in ("global", "uniform"):
        fxprune.prune(
            make(kind), image(), channels=0.6, method="random", seed=4, scope=scope, progress=False
        ).meta["fxprune"].plan.save(f"{sys.argv[1]}-{kind.__name__}-{scope}.json")
"""


def test_one_seed_is_one_plan_in_every_process(tmp_path: Path) -> None:
    for seed in ("1", "2"):
        paths = os.pathsep.join([str(Path(__file__).parent), str(Path(fxprune.__file__).parents[1])])
        environment = {**os.environ, "PYTHONHASHSEED": seed, "PYTHONPATH": paths}
        subprocess.run([sys.executable, "-c", SCRIPT, str(tmp_path / seed)], check=True, env=environment)
    first, second = (sorted(tmp_path.glob(f"{seed}-*.json")) for seed in ("1", "2"))
    assert len(first) == 6
    assert [path.read_bytes() for path in first] == [path.read_bytes() for path in second]


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("attention", ["head_dim", "heads"])
def test_a_plan_from_a_file_gives_the_same_network(kind: type[nn.Module], attention: Any, tmp_path: Path) -> None:
    pruned = prune(make(kind), attention=attention, channels=0.6)
    pruned.meta["fxprune"].plan.save(tmp_path / "plan.json")
    again = fxprune.apply(make(kind), fxprune.PruningPlan.load(tmp_path / "plan.json"), image())
    assert same(outputs(again, image(5)), outputs(pruned, image(5)))
    before, after = pruned.meta["fxprune"], again.meta["fxprune"]
    assert (after.plan, after.macs_after, after.params_after) == (before.plan, before.macs_after, before.params_after)
    assert after.oracle_error <= TOLERANCE


# -- pruning what was pruned


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("attention", ["head_dim", "heads"])
def test_a_pruned_module_can_be_pruned_again(kind: type[nn.Module], attention: Any) -> None:
    once = prune(make(kind), channels=0.75, attention=attention, method="random")
    with Unchanged(once):
        twice = prune(once, channels=0.7, attention=attention, method="random", seed=1)
        inferred = fxprune.prune(once, channels=0.7, attention=attention, method="random", seed=1, progress=False)
    report = twice.meta["fxprune"]
    assert report.macs_before == once.meta["fxprune"].macs_after
    assert report.params_after < report.params_before == once.meta["fxprune"].params_after
    assert report.oracle_error <= TOLERANCE
    for name, dims in report.plan.kept.items():
        given = once.state_dict()[name]
        for dim, indices in dims.items():
            for row in indices if isinstance(indices[0], list) else [indices]:
                assert max(row) < given.shape[dim]
                assert len(row) == twice.state_dict()[name].shape[dim]
    assert list(twice.state_dict()) == list(make(kind).state_dict())
    assert inferred.meta["fxprune"].plan == report.plan
    assert same(outputs(fxprune.apply(once, report.plan, image()), image(5)), outputs(twice, image(5)))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float64])
def test_a_pruned_module_in_another_dtype_knows_what_it_takes(dtype: torch.dtype) -> None:
    once = prune(make()).to(dtype)
    twice = fxprune.prune(once, channels=0.7, progress=False)
    assert twice.meta["fxprune"].macs_before == fxprune.analyze(once).macs() == once.meta["fxprune"].macs_after
    assert outputs(twice, image(5).to(dtype))[0].dtype == dtype


# -- options


def test_ignored_layers_keep_their_outputs() -> None:
    for ignore in ("up", ["up.0"], ("up.0.weight",)):
        pruned = prune(make(), ignore=ignore, channels=0.6)
        assert pruned.get_parameter("up.0.weight").shape[0] == 24
        assert pruned.get_parameter("up.0.weight").shape[1] < 16
        rows = {row.name: row for row in pruned.meta["fxprune"].rows}
        assert rows["up.0"].locked.startswith("ignored by the caller (")
    model = make()
    assert prune(model, ignore=[model.up], channels=0.6).get_parameter("up.0.weight").shape[0] == 24
    with pytest.raises(fxprune.FxpruneError, match="no prunable channels"):
        prune(model, ignore=[model.stem, model.up[0]])


class Chain(nn.Module):
    """6 -> 16 -> 24 -> 20 -> 3 channels."""

    def __init__(self) -> None:
        super().__init__()
        self.a, self.tail = nn.Linear(6, 16), nn.Linear(20, 3)
        self.middle = nn.Sequential(nn.Linear(16, 24), nn.ReLU(), nn.Linear(24, 20))

    def forward(self, x: Tensor) -> Tensor:
        return self.tail(self.middle(self.a(x).relu()).relu())


def test_kept_layers_stay_in_all_dimensions() -> None:
    model, x = make(Chain), torch.randn(2, 6)
    for keep in ("middle.0", ["middle.0.*"], [model.middle[0]], ("middle.0.weight",), "*.0.weight"):
        pruned = prune(model, x, keep=keep, channels=0.6)
        for name in ("middle.0.weight", "middle.0.bias"):
            assert torch.equal(pruned.get_parameter(name), model.get_parameter(name))
        assert pruned.get_parameter("middle.2.weight").shape == (12, 24)
    pruned = prune(make(Attentive), keep="mlp.3", channels=0.5)
    assert pruned.get_parameter("mlp.3.weight").shape == (16, 32)
    assert pruned.get_parameter("qkv.weight").shape[1] == 16 > pruned.get_parameter("proj.weight").shape[1]
    rows = {row.name: row.locked for row in pruned.meta["fxprune"].rows}
    assert rows["mlp.1"] == "kept by keep="


def test_what_else_takes_layers_to_keep() -> None:
    graph = fxprune.analyze(make(Chain), torch.randn(2, 6), keep="middle.0")
    assert [group.name for group in graph.prunable] == ["middle.2"]
    assert str(next(group.locked for group in graph.groups if group.name == "a")) == "kept by keep="
    small = fxprune.attach(make(), image(), method="slimming", channels=0.5, keep="up.0.b*", progress=False).finish()
    assert small.get_parameter("up.0.weight").shape[0] == 24
    assert small.get_parameter("stem.0.weight").shape[0] < 16


def test_a_parameter_is_kept_in_the_dimensions_that_it_has() -> None:
    pruned = prune(make(Chain), torch.randn(2, 6), keep=["middle.0.bias"], channels=0.5)
    rows, columns = pruned.get_parameter("middle.0.weight").shape
    assert rows == 24
    assert columns < 16


def test_a_tied_layer_is_kept_by_either_name() -> None:
    class Tied(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a, self.b, self.c = nn.Linear(6, 16), nn.Linear(16, 16), nn.Linear(16, 16)
            self.head = nn.Linear(16, 3)
            self.c.weight = self.b.weight

        def forward(self, x: Tensor) -> Tensor:
            return self.head(self.c(self.b(self.a(x).relu()).relu()).relu())

    for name in ("b", "c", "c.weight"):
        with pytest.raises(fxprune.FxpruneError, match=r"What holds them: .*kept by keep="):
            prune(make(Tied), torch.randn(2, 6), keep=[name])


def test_a_kept_grouped_convolution_stays_whole() -> None:
    pruned = prune(make(Shuffled), keep=["two"], channels=0.9)
    assert pruned.get_parameter("two.weight").shape == (16, 8, 1, 1)


def test_patterns_of_what_to_ignore() -> None:
    by_pattern, by_name = (prune(make(), ignore=[given], channels=0.6) for given in ("up.*", "up"))
    assert by_pattern.meta["fxprune"].plan == by_name.meta["fxprune"].plan
    assert by_pattern.get_parameter("up.0.weight").shape[0] == 24
    for ignore in (["*"], make()):
        with pytest.raises(fxprune.FxpruneError):
            prune(make(), ignore=ignore)
    model = make()
    with pytest.raises(fxprune.FxpruneError, match="no prunable channels"):
        prune(model, ignore=model)


def test_exact_leaves_channels_whose_statistics_would_change() -> None:
    everything = prune(make(Attentive), channels=0.6)
    exact = prune(make(Attentive), channels=0.8, exact=True)
    assert everything.get_parameter("embed.weight").shape[0] < 16
    assert exact.get_parameter("embed.weight").shape[0] == 16
    assert exact.get_parameter("mlp.1.weight").shape[0] < 32
    rows = {row.name: row for row in exact.meta["fxprune"].rows}
    assert rows["embed"].locked.startswith("not exact: ")
    assert rows["mlp.1"].locked == ""


@pytest.mark.parametrize("ratio", [0.25, 0.5, 0.75])
def test_uniform_cuts_every_group_by_the_same_share(ratio: float) -> None:
    pruned = prune(make(), channels=ratio, scope="uniform")
    assert len(kept(pruned, "stem.0.weight")) == 16 * ratio
    assert len(kept(pruned, "up.0.weight")) == 24 * ratio
    ranked = prune(make(), channels=ratio, scope="global", method="random")
    assert len(kept(ranked, "stem.0.weight")) + len(kept(ranked, "up.0.weight")) == 40 * ratio


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("k", [2, 4])
@pytest.mark.parametrize("attention", ["head_dim", "heads"])
def test_kept_counts_are_multiples(kind: type[nn.Module], k: int, attention: Any) -> None:
    pruned = prune(make(kind), round_to=k, params=0.6, attention=attention)
    graph = fxprune.analyze(make(kind), image(), attention=attention)
    keep = pruned.meta["fxprune"].plan.channels(graph)
    counts = [int(keep[group.channels].sum()) for group in graph.prunable]
    assert counts
    assert any(count < group.channels.size for count, group in zip(counts, graph.prunable, strict=True))
    for count, group in zip(counts, graph.prunable, strict=True):
        assert count % k == 0 or count == group.channels.size, group


@pytest.mark.parametrize("least", [1, 3, 5])
def test_at_least_min_channels_stay(least: int) -> None:
    pruned = prune(make(), channels=0.25, options=fxprune.Options(min_channels=least))
    sizes = [size for name in ("stem.0.weight", "up.0.weight") for size in pruned.get_parameter(name).shape[:1]]
    assert min(sizes) >= least


# -- what carries over


@pytest.mark.parametrize("kind", ALL)
@pytest.mark.parametrize("dtype", [torch.float64, torch.bfloat16])
def test_the_dtype_carries_over(kind: type[nn.Module], dtype: torch.dtype) -> None:
    model = make(kind).to(dtype)
    pruned = prune(model, image().to(dtype))
    assert {t.dtype for t in pruned.state_dict().values() if t.is_floating_point()} == {dtype}
    (y,) = outputs(pruned, image(3).to(dtype))
    assert y.dtype == dtype
    assert bool(y.isfinite().all())


def test_the_memory_format_carries_over() -> None:
    pruned = prune(make().to(memory_format=torch.channels_last), image().to(memory_format=torch.channels_last))
    weight = pruned.get_parameter("up.0.weight")
    assert weight.shape[1] < 16
    assert weight.is_contiguous(memory_format=torch.channels_last)
    assert not weight.is_contiguous()
    assert prune(make()).get_parameter("up.0.weight").is_contiguous()


@pytest.mark.gpu
def test_the_device_carries_over() -> None:
    pruned = prune(make(Shuffled).cuda(), image().cuda())
    assert {t.device.type for t in pruned.state_dict().values()} == {"cuda"}
    assert outputs(pruned, image(3).cuda())[0].is_cuda


def test_requires_grad_carries_over() -> None:
    model = make()
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(not name.startswith("stem"))
    pruned = prune(model)
    flags = [{n: p.requires_grad for n, p in module.named_parameters()} for module in (model, pruned)]
    assert flags[0] == flags[1]


def test_forward_hooks_of_leaf_modules_carry_over() -> None:
    model, seen = make(), []
    model.up[0].register_forward_hook(lambda module, args, out: seen.append(tuple(out.shape)))
    model.head.register_forward_pre_hook(lambda module, args: seen.append(tuple(args[0].shape)))
    model.stem[0].register_forward_hook(lambda module, args, out: out * 2)
    pruned = prune(model)
    plain = prune(make(), flops=1.0)
    seen.clear()
    (y,) = outputs(pruned, image(5))
    width, narrow = pruned.get_parameter("up.0.weight").shape[:2]
    assert seen == [(5, width, 8, 8), (5, narrow)]
    assert not same(outputs(model, image()), outputs(plain, image()))  # the hook that doubles does something
    assert pruned.meta["fxprune"].oracle_error <= TOLERANCE
    assert y.shape == (5, 10)


def test_hooks_of_blocks_are_told_to_be_no_part_of_the_graph() -> None:
    model, seen = make(), []
    model.up.register_forward_hook(lambda module, args, out: seen.append(out.shape))
    model.up[0].register_forward_hook(lambda module, args, out: seen.append(out.shape))
    nn.utils.spectral_norm(model.head)  # a hook of torch's
    pruned = prune(model)
    seen.clear()
    pruned(image(5))
    assert len(seen) == 1
    told = [note for note in pruned.meta["fxprune"].notes if "hooks" in note]
    assert told == ["the graph does not call hooks of up, and has what they computed when recorded"]


def test_train_and_eval_react() -> None:
    class Drops(nn.Module):
        """Dropout as a module, as a function, and whole branches of a sample (stochastic depth)."""

        def __init__(self, module: float, function: float, branch: float):
            super().__init__()
            self.one, self.two, self.head = nn.Linear(8, 16), nn.Linear(16, 16), nn.Linear(16, 4)
            self.module, self.function, self.branch = nn.Dropout(module), function, DropBranch(branch)

        def forward(self, x: Tensor) -> Tensor:
            x = self.module(self.one(x))
            x = F.dropout(x, self.function, self.training)
            return self.head(x + self.branch(self.two(x).relu()))

    class DropBranch(nn.Module):
        def __init__(self, rate: float):
            super().__init__()
            self.rate = rate

        def forward(self, x: Tensor) -> Tensor:
            if self.rate == 0.0 or not self.training:
                return x
            stays = x.new_empty(x.shape[0], *[1] * (x.ndim - 1)).bernoulli_(1 - self.rate)
            return x * stays / (1 - self.rate)

    x = torch.randn(16, 8)
    for rates in ((0.5, 0.0, 0.0), (0.0, 0.5, 0.0), (0.0, 0.0, 0.5)):
        pruned = prune(make(lambda rates=rates: Drops(*rates)), x)  # type: ignore[arg-type, misc]
        assert not pruned.training
        assert same(outputs(pruned, x), outputs(pruned, x))
        pruned.train()
        assert not same(outputs(pruned, x), outputs(pruned, x)), rates
        pruned.eval()
        assert same(outputs(pruned, x), outputs(pruned, x))


@pytest.mark.parametrize("training", [False, True])
def test_the_mode_carries_over(training: bool) -> None:
    model = make().train(training)
    model.stem.eval()
    pruned = prune(model)
    assert pruned.training is training
    assert pruned.get_submodule("up.1").training is training
    assert pruned.get_submodule("dropout").training is training
    assert pruned.get_submodule("stem.1").training is False


def test_saved_weights_can_be_loaded(tmp_path: Path) -> None:
    pruned = prune(make())
    torch.save(pruned.state_dict(), tmp_path / "weights.pt")
    other = fxprune.apply(make(seed=1), pruned.meta["fxprune"].plan, image())
    assert not same(outputs(other, image()), outputs(pruned, image()))
    other.load_state_dict(torch.load(tmp_path / "weights.pt", weights_only=True))
    assert same(outputs(other, image()), outputs(pruned, image()))


def test_a_copy_is_independent() -> None:
    pruned = prune(make(Shuffled))
    before, twin = outputs(pruned, image()), copy.deepcopy(pruned)
    with torch.no_grad():
        for parameter in twin.parameters():
            parameter.zero_()
    assert same(outputs(pruned, image()), before)
    assert twin.meta["fxprune"].plan == pruned.meta["fxprune"].plan


@pytest.mark.parametrize("kind", ALL)
def test_one_training_step(kind: type[nn.Module]) -> None:
    pruned = prune(make(kind)).train()
    optimiser = torch.optim.SGD(pruned.parameters(), lr=0.01, momentum=0.9)
    before = copy.deepcopy(pruned.state_dict())
    F.cross_entropy(pruned(image(4)), torch.tensor([0, 1, 2, 3])).backward()
    assert all((p.grad is not None and float(p.grad.abs().sum()) > 0) or name.endswith("bias")
               for name, p in pruned.named_parameters())  # fmt: skip
    optimiser.step()
    assert all(not torch.equal(p, before[n]) for n, p in pruned.named_parameters() if p.ndim > 1)


# -- inputs and outputs of every form


class Keywords(nn.Module):
    """Takes keywords and a dictionary, returns a dictionary with a tuple in it."""

    def __init__(self) -> None:
        super().__init__()
        self.one, self.gate, self.two = nn.Linear(6, 12), nn.Linear(4, 12), nn.Linear(12, 5)

    def forward(self, x: Tensor, *, extra: dict[str, Tensor], scale: float = 1.0) -> dict[str, Any]:
        hidden = self.one(x) * self.gate(extra["gate"]).sigmoid() * scale
        return {"logits": self.two(hidden), "rest": (x.mean(), scale)}


def test_keywords_and_dictionaries() -> None:
    model = make(Keywords)
    kwargs = {"extra": {"gate": torch.randn(2, 4)}, "scale": 0.5}
    pruned = prune(model, torch.randn(2, 6), example_kwargs=kwargs)
    assert pruned.get_parameter("one.weight").shape[0] < 12
    assert pruned.get_parameter("gate.weight").shape[0] == pruned.get_parameter("one.weight").shape[0]
    fresh = {"extra": {"gate": torch.randn(7, 4)}, "scale": 0.5}
    result = pruned(torch.randn(7, 6), **fresh)
    assert list(result) == ["logits", "rest"]
    assert result["logits"].shape == (7, 5)
    assert isinstance(result["rest"], tuple)
    assert result["rest"][1] == 0.5
    plan = pruned.meta["fxprune"].plan
    again = fxprune.apply(model, plan, torch.randn(2, 6), kwargs)
    x = torch.randn(3, 6)
    fresh = {"extra": {"gate": torch.randn(3, 4)}, "scale": 0.5}
    assert same(tensors(again(x, **fresh)), tensors(pruned(x, **fresh)))


def test_all_inputs_as_keywords() -> None:
    kwargs = {"x": torch.randn(2, 6), "extra": {"gate": torch.randn(2, 4)}}
    model = make(Keywords)
    pruned = fxprune.prune(model, example_kwargs=kwargs, flops=0.5, progress=False)
    assert pruned(**kwargs)["logits"].shape == (2, 5)


# -- the stages are told, and nothing is skipped


def test_progress_goes_to_stderr(capsys: pytest.CaptureFixture[str]) -> None:
    fxprune.prune(make(), image(), flops=0.5)
    out, err = capsys.readouterr()
    assert out == ""
    stages = [line.removeprefix("fxprune: ").removesuffix(" ...") for line in err.splitlines()]
    for stage in ("recording", "analysing", "scoring", "selecting", "rewriting", "verifying"):
        assert stage in stages
    fxprune.prune(make(), image(), flops=0.5, progress=False)
    assert capsys.readouterr() == ("", "")


def test_without_verification_there_is_no_error_figure() -> None:
    report = prune(make(), verify=False).meta["fxprune"]
    assert report.oracle_error is None
    assert "verifying" not in report.seconds
    assert "agree to" not in str(report)


def test_analyze_gives_groups_costs_and_a_graph() -> None:
    graph = fxprune.analyze(make(), image())
    graph.check()
    assert {g.name: (g.size, g.blocks, g.exact, g.locked is None) for g in graph.groups} == {
        "stem.0": (16, 1, True, True),
        "stem.0#2": (3, 1, True, False),
        "up.0": (24, 1, True, True),
        "head": (10, 1, True, False),
    }
    pruned = prune(make())
    plan = pruned.meta["fxprune"].plan
    assert graph.macs() == pruned.meta["fxprune"].macs_before
    assert graph.macs(plan) == pruned.meta["fxprune"].macs_after
    assert graph.params(plan) == sum(p.numel() for p in pruned.parameters())
    network = graph.to_networkx()
    assert set(network.neighbors("up.0")) >= {"up.1", "down.0"}
    json.dumps(dict(network.nodes(data=True)))


@pytest.mark.parametrize("stage", ["record", "analyze", "prune"])
def test_the_model_stays_as_it_was_after_an_error(stage: str) -> None:
    class Fails(Small):
        def forward(self, x: Tensor) -> Tensor:
            super().forward(x)
            raise RuntimeError("no such luck")

    model = make(Fails).train()
    call: Callable[..., Any] = getattr(fxprune, stage)
    options = {"flops": 0.5, "progress": False} if stage == "prune" else {}
    with Unchanged(model), pytest.raises(Exception, match="no such luck"):
        call(model, image(), **options)
