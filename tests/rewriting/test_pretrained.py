"""Pruned networks of transformers save and load themselves: with widths of their own, with the library's own code."""

from __future__ import annotations

import copy
import json
import pickle
import shutil
import subprocess
import sys
from functools import partial
from pathlib import Path
from typing import Any

import pytest
import torch

import fxprune
from fxprune.errors import ArtifactError, InputError, WriteError

transformers = pytest.importorskip("transformers", reason="networks of transformers are an extra: pip install '.[zoo]'")

pytestmark = [
    pytest.mark.usefixtures("one_thread"),
    pytest.mark.filterwarnings("ignore::DeprecationWarning", "ignore::FutureWarning"),
]

WORDS = 50
DECODER = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64,
}  # fmt: skip
ENCODER = {
    "vocab_size": WORDS, "hidden_size": 32, "intermediate_size": 64, "num_hidden_layers": 2, "num_attention_heads": 4,
    "max_position_embeddings": 64,
}  # fmt: skip
T5 = {"vocab_size": WORDS, "d_model": 32, "d_ff": 64, "d_kv": 8, "num_layers": 2, "num_heads": 4}
WHISPER = {
    "vocab_size": WORDS, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 64, "decoder_ffn_dim": 64, "num_mel_bins": 8,
    "max_source_positions": 12, "max_target_positions": 32,
}  # fmt: skip
SPECIAL = {"pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1}
NETS: dict[str, tuple[str, str, dict[str, Any]]] = {  # auto class, type, config
    "llama": ("CausalLM", "llama", DECODER),
    "llama, tied": ("CausalLM", "llama", {**DECODER, "tie_word_embeddings": True}),
    "qwen2": ("CausalLM", "qwen2", DECODER),
    "qwen3": ("CausalLM", "qwen3", DECODER),
    "gemma": ("CausalLM", "gemma", DECODER),
    "mixtral": ("CausalLM", "mixtral", {**DECODER, "num_local_experts": 4}),
    "gpt2": ("CausalLM", "gpt2", {"vocab_size": WORDS, "n_embd": 32, "n_layer": 2, "n_head": 4, "n_positions": 64}),
    "t5": ("Seq2SeqLM", "t5", T5),
    "whisper": ("SpeechSeq2Seq", "whisper", WHISPER),
    "bert": ("MaskedLM", "bert", ENCODER),
    "minilm": ("", "bert", {**ENCODER, "num_hidden_layers": 3}),
}


def auto(name: str) -> Any:
    kind = NETS[name][0]
    return getattr(transformers, f"AutoModelFor{kind}" if kind else "AutoModel")


def build(name: str, **changed: Any) -> Any:
    _, kind, sizes = NETS[name]
    torch.manual_seed(0)
    config = transformers.AutoConfig.for_model(kind, **{**SPECIAL, **sizes, **changed})
    model = auto(name).from_config(config).eval()
    with torch.no_grad():
        for parameter in model.parameters():  # far from what a class makes by itself
            parameter.add_(0.1 * torch.randn_like(parameter))
    return model


def inputs(model: Any) -> dict[str, Any]:
    torch.manual_seed(1)
    ids = torch.randint(3, WORDS, (2, 7))
    if model.config.model_type == "whisper":
        return {"input_features": torch.randn(2, 8, 24), "decoder_input_ids": ids}
    given = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
    return {**given, "decoder_input_ids": ids[:, :4]} if model.config.is_encoder_decoder else given


def pruned(model: Any, **options: Any) -> Any:
    """The class with half of its MACs, and weights of its own."""
    small = fxprune.prune(
        model, (), example_kwargs=inputs(model),
        **{"flops": 0.6, "for_class": True, "round_to": 1, "verify": False, "progress": False, **options},
    )  # fmt: skip
    return fxprune.into(model, small)


def output(model: Any) -> torch.Tensor:
    with torch.no_grad():
        result: torch.Tensor = model(**inputs(model))[0]
    return result


def tokens(model: Any, use_cache: bool) -> torch.Tensor:
    given = {key: value for key, value in inputs(model).items() if not key.startswith("decoder_")}
    counts = {"max_new_tokens": 5, "min_new_tokens": 5}
    result: torch.Tensor = model.generate(**given, **counts, do_sample=False, num_beams=1, use_cache=use_cache)
    return result


@pytest.mark.parametrize("name", NETS)
def test_what_was_saved_computes_generates_and_trains_as_before(name: str, tmp_path: Path) -> None:
    model = build(name)
    small = pruned(model)
    assert isinstance(small, type(model))
    assert type(small).__name__ == type(model).__name__
    assert small.num_parameters() < model.num_parameters()
    fxprune.save_pretrained(small, tmp_path / "small")
    loaded: Any = fxprune.load_pretrained(tmp_path / "small")
    by_library = auto(name).from_pretrained(tmp_path / "small", trust_remote_code=True).eval()
    for other in (loaded, by_library):
        assert torch.allclose(output(other), output(small), rtol=1e-5, atol=1e-6)
        assert list(other.state_dict()) == list(small.state_dict())
        if small.can_generate():
            expected = tokens(small, True)
            assert torch.equal(expected, tokens(small, False))
            assert torch.equal(expected, tokens(other, True))
            assert torch.equal(expected, tokens(other, False))
    loaded.train()
    optimizer = torch.optim.SGD(loaded.parameters(), 0.01)
    loaded(**inputs(loaded))[0].square().mean().backward()
    optimizer.step()
    assert not torch.equal(output(loaded.eval()), output(small))


@pytest.fixture(scope="module")
def llama() -> Any:
    """A pruned one whose layers have widths of their own, and tied embeddings."""
    small = pruned(build("llama, tied"))
    widths = {layer.mlp.gate_proj.out_features for layer in small.model.layers}
    assert len(widths) > 1
    assert small.config.intermediate_size == DECODER["intermediate_size"]
    return small


def test_its_own_save_pretrained_is_enough_and_needs_no_fxprune_to_load(llama: Any, tmp_path: Path) -> None:
    llama.save_pretrained(tmp_path / "own")
    torch.save((inputs(llama), output(llama)), tmp_path / "expected.pt")
    code = f"""
import sys
sys.modules["fxprune"] = None
import torch
from transformers import AutoModelForCausalLM
given, expected = torch.load({str(tmp_path / "expected.pt")!r})
model = AutoModelForCausalLM.from_pretrained({str(tmp_path / "own")!r}, trust_remote_code=True).eval()
with torch.no_grad():
    assert torch.allclose(model(**given)[0], expected, rtol=1e-5, atol=1e-6)
model.save_pretrained({str(tmp_path / "again")!r})
"""
    run = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert torch.equal(output(fxprune.load_pretrained(tmp_path / "again")), output(llama))


def test_shards_ties_and_other_dtypes(llama: Any, tmp_path: Path) -> None:
    fxprune.save_pretrained(llama, tmp_path / "s", max_shard_size="10KB")
    assert len(list((tmp_path / "s").glob("model-*.safetensors"))) > 2
    loaded: Any = fxprune.load_pretrained(tmp_path / "s", dtype=torch.bfloat16)
    assert {p.dtype for p in loaded.parameters()} == {torch.bfloat16}
    assert loaded.lm_head.weight is loaded.model.embed_tokens.weight
    assert torch.equal(output(fxprune.load_pretrained(tmp_path / "s")), output(llama))
    fxprune.save_pretrained(llama, tmp_path / "s")  # one file now: the shards of before are gone
    assert [file.name for file in (tmp_path / "s").glob("model*.safetensors*")] == ["model.safetensors"]
    assert torch.equal(output(fxprune.load_pretrained(tmp_path / "s")), output(llama))


def test_equal_widths_are_numbers_of_the_config(tmp_path: Path) -> None:
    model = build("llama", num_hidden_layers=1)
    small = pruned(model, attention="heads", keep=["*self_attn*"], flops=0.8)
    assert type(small) is type(model)
    assert small.config.intermediate_size == small.model.layers[0].mlp.gate_proj.out_features < 48
    assert not hasattr(small.config, "fxprune")
    fxprune.save_pretrained(small, tmp_path / "s")
    assert not (tmp_path / "s" / "modeling_pruned.py").exists()
    assert "trust_remote_code" not in (tmp_path / "s" / "README.md").read_text()
    for loaded in (type(model).from_pretrained(tmp_path / "s").eval(), fxprune.load_pretrained(tmp_path / "s")):
        assert type(loaded) is type(model)
        assert torch.equal(output(loaded), output(small))


def test_copies_pickles_and_new_words(llama: Any, tmp_path: Path) -> None:
    for other in (copy.deepcopy(llama), pickle.loads(pickle.dumps(llama))):
        assert type(other) is type(llama)
        assert torch.equal(output(other), output(llama))
    wider = copy.deepcopy(llama)
    wider.resize_token_embeddings(WORDS + 3, mean_resizing=False)
    wider.save_pretrained(tmp_path / "s")
    loaded: Any = type(llama).from_pretrained(tmp_path / "s").eval()
    assert loaded.model.embed_tokens.weight.shape[0] == WORDS + 3
    assert torch.equal(output(loaded), output(wider))


def test_what_was_pruned_is_pruned_again(llama: Any, tmp_path: Path) -> None:
    smaller = pruned(llama)
    assert smaller.num_parameters() < llama.num_parameters()
    smaller.save_pretrained(tmp_path / "s")
    assert torch.equal(output(type(smaller).from_pretrained(tmp_path / "s").eval()), output(smaller))


def test_a_class_of_somebody_elses_is_an_artifact(tmp_path: Path) -> None:
    class Own(transformers.LlamaForCausalLM):  # type: ignore[misc, name-defined]
        """Which no import of transformers gives."""

    torch.manual_seed(0)
    model = Own(build("llama").config).eval()
    small = pruned(model)
    assert type(small) is Own
    fxprune.save_pretrained(small, tmp_path / "s")
    assert sorted(file.name for file in (tmp_path / "s").iterdir()) == ["README.md", "model.safetensors", "plan.json"]
    loaded = fxprune.load_pretrained(tmp_path / "s", Own(model.config))
    assert type(loaded) is Own
    assert torch.equal(output(loaded.eval()), output(small))


# -- what is refused


def refusal(folder: Path, error: type[Exception] = ArtifactError, *args: Any, **options: Any) -> str:
    with pytest.raises(error) as caught:
        fxprune.load_pretrained(folder, *args, **options)
    return str(caught.value)


@pytest.fixture
def saved(llama: Any, tmp_path: Path) -> Path:
    fxprune.save_pretrained(llama, tmp_path / "llama")
    return tmp_path / "llama"


def edited(folder: Path, **changes: Any) -> Path:
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    return folder


def test_a_config_of_another_network(saved: Path) -> None:
    assert "holds a NoNet, which transformers" in refusal(edited(saved, architectures=["NoNet"]))
    said = refusal(edited(saved, architectures=["GemmaForCausalLM"]))
    assert said.endswith("is damaged: it names a GemmaForCausalLM, which is no llama. Save or copy it again.")


def test_sizes_that_are_none(saved: Path) -> None:
    told = json.loads((saved / "config.json").read_text())["fxprune"]
    assert "is damaged: " in refusal(edited(saved, fxprune={**told, "shapes": {"lm_head.weight": "wide"}}))
    wide = {**told, "shapes": {**told["shapes"], "model.norm.weight": [99]}}
    said = refusal(edited(saved, fxprune=wide))
    assert "a tensor of shape [32] cannot be cut to [99]: the config is another's" in said


def test_weights_that_are_not_there(saved: Path) -> None:
    from safetensors.torch import load_file, save_file

    state = load_file(saved / "model.safetensors")
    state.pop("model.norm.weight")
    save_file(state, saved / "model.safetensors", metadata={"format": "pt"})
    said = refusal(saved)
    assert said.endswith("are not those of this LlamaForCausalLM; missing keys: model.norm.weight")


def test_a_model_that_is_not_asked_for(saved: Path, llama: Any) -> None:
    said = refusal(saved, InputError, llama)
    assert said.endswith("which is made of its config: leave out the model and its inputs.")


def test_a_loaded_one_tells_nothing_of_its_pruning(saved: Path) -> None:
    with pytest.raises(InputError, match="LlamaForCausalLM tells nothing of its pruning, as one that was loaded"):
        fxprune.save_pretrained(fxprune.load_pretrained(saved), saved)


@pytest.mark.parametrize("when", ["before", "in the middle"])
def test_a_full_disk(llama: Any, when: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    if when == "before":
        usage = shutil.disk_usage(tmp_path)
        monkeypatch.setattr(shutil, "disk_usage", lambda folder: usage._replace(free=100))
    else:
        from safetensors import SafetensorError

        def full(*args: Any, **kwargs: Any) -> None:
            raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")

        monkeypatch.setattr("transformers.modeling_utils.safe_save_file", full)
    with pytest.raises(WriteError, match=r"could not be written: .*No space left on device"):
        fxprune.save_pretrained(llama, tmp_path / "s")
    assert list(tmp_path.iterdir()) == []


def test_a_network_that_its_config_no_longer_describes_stays_as_it_is(tmp_path: Path) -> None:
    model = build("llama")
    model.lm_head = torch.nn.Sequential(model.lm_head)  # of somebody's own
    small = pruned(model)
    assert type(small) is type(model)
    fxprune.save_pretrained(small, tmp_path / "s")
    loaded = fxprune.load_pretrained(tmp_path / "s", copy.deepcopy(model))
    assert torch.equal(output(loaded.eval()), output(small))


def test_without_transformers(saved: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "transformers", None)
    assert refusal(saved, InputError) == "This needs transformers: pip install 'fxprune[zoo]'."


def test_several_calls_of_one_network(tmp_path: Path) -> None:
    model = build("llama")
    given = inputs(model)
    calls = {"logits": given, "loss": {**given, "labels": given["input_ids"]}}
    joined = fxprune.prune(model, calls, flops=0.6, for_class=True, round_to=1, verify=False, progress=False)
    own = fxprune.into(model, joined)
    own.save_pretrained(tmp_path)
    other = auto("llama").from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(output(other), output(own))


def test_whole_experts_of_a_mixture(tmp_path: Path) -> None:
    """As many in every layer are a number of the config; else the sizes say it."""
    small = pruned(build("mixtral", num_experts_per_tok=1), params=0.5, flops=None, scope="uniform", method="random")
    counts = [layer.mlp.experts.down_proj.shape[0] for layer in small.model.layers]
    assert max(counts) < 4
    assert all(layer.mlp.experts.num_experts == count for layer, count in zip(small.model.layers, counts, strict=True))
    small.save_pretrained(tmp_path)
    other = auto("mixtral").from_pretrained(tmp_path, trust_remote_code=True).eval()
    assert torch.equal(output(other), output(small))
    assert torch.equal(tokens(other, use_cache=True), tokens(small, use_cache=False))


@pytest.mark.filterwarnings("ignore::UserWarning")
def test_networks_of_diffusers(tmp_path: Path) -> None:
    diffusers = pytest.importorskip("diffusers", reason="networks of diffusers are an extra: pip install '.[zoo]'")
    torch.manual_seed(0)
    model = diffusers.UNet2DModel(
        sample_size=8, block_out_channels=(8, 16), layers_per_block=1, norm_num_groups=4, attention_head_dim=8,
        down_block_types=("DownBlock2D", "AttnDownBlock2D"), up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    ).eval()  # fmt: skip
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(0.1 * torch.randn_like(parameter))
    given = {"sample": torch.randn(1, 3, 8, 8), "timestep": torch.tensor([3])}
    options: dict[str, Any] = {"for_class": True, "round_to": 1, "verify": False, "progress": False}
    small = fxprune.into(model, fxprune.prune(model, (), example_kwargs=given, flops=0.6, **options))
    assert type(small).__name__ == "UNet2DModel"
    small.save_pretrained(tmp_path / "half")
    other = diffusers.AutoModel.from_pretrained(str(tmp_path / "half"), trust_remote_code=True).eval()
    expected = small(**given).sample
    close = partial(torch.allclose, rtol=1e-4, atol=1e-5)
    assert close(other(**given).sample, expected)
    assert close(pickle.loads(pickle.dumps(small))(**given).sample, expected)
    again = fxprune.into(other, fxprune.prune(other, (), example_kwargs=given, flops=0.8, **options))
    again.save_pretrained(tmp_path / "less")
    loaded = type(small).from_pretrained(tmp_path / "less").eval()
    assert close(loaded(**given).sample, again(**given).sample)
    with pytest.raises(RuntimeError, match="size mismatch"):
        diffusers.UNet2DModel.from_pretrained(tmp_path / "half")


def test_configs_of_diffusers_are_left_alone(tmp_path: Path) -> None:
    """Some of its numbers are equal to sizes by chance: here groups of norms, and channels of each."""
    diffusers = pytest.importorskip("diffusers", reason="networks of diffusers are an extra: pip install '.[zoo]'")
    torch.manual_seed(0)
    model = diffusers.AutoencoderKL(
        block_out_channels=(32, 64), layers_per_block=1, norm_num_groups=8, latent_channels=4,
        down_block_types=("DownEncoderBlock2D",) * 2, up_block_types=("UpDecoderBlock2D",) * 2,
    ).eval()  # fmt: skip
    x = torch.randn(1, 3, 16, 16)
    small = fxprune.into(model, fxprune.prune(model, x, flops=0.6, round_to=1, verify=False, progress=False))
    assert {key: value for key, value in small.config.items() if key != "fxprune"} == dict(model.config)
    small.save_pretrained(tmp_path)
    loaded = type(small).from_pretrained(tmp_path).eval()
    assert torch.allclose(loaded(x).sample, small(x).sample, rtol=1e-4, atol=1e-5)
