"""Networks of transformers, built from small configurations, with random weights.

A network is named ``transformers:MODEL_TYPE``; what it is given is what its task takes, masks of ones included.
"""

from __future__ import annotations

import inspect
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn

from model_zoo.networks.subject import Inputs, NoCacheError, Subject, normal, whole
from model_zoo.networks.transformers_list import AUTO, TASKS, VOCABULARY, configuration

BATCH, LENGTH, LONGER = 2, 12, (17, 24, 16)
IMAGE, OTHER_IMAGES = (64, 64), ((96, 64), (96, 96))
SOUND, OTHER_SOUNDS = 4000, (5600,)
FRAMES, OTHER_FRAMES = 64, (80,)
FIRST_TOKEN = 8  # smaller ones are special
CACHES = ("cache", "past_key_values", "cache_params", "state", "mems")


def subject(name: str) -> Subject:
    """The network of this model type, and its inputs."""
    import transformers

    task = next(task for task, listed in TASKS.items() if name in listed.split())
    config = configuration(transformers.CONFIG_MAPPING[name], name)
    for head in AUTO[task]:
        known = getattr(transformers, f"AutoModelFor{head}" if head else "AutoModel")._model_mapping
        if type(config) in known:
            kinds = known[type(config)]
            kind = kinds[0] if isinstance(kinds, (list, tuple)) else kinds
            return INPUTS[task](kind(config).eval())
    raise LookupError(f"transformers has no network for {task} of the type {name!r}")


def _tokens(batch: int, length: int, seed: int) -> Tensor:
    return whole(FIRST_TOKEN, VOCABULARY, (batch, length), seed)


def _ones(*shape: int) -> Tensor:
    return torch.ones(shape, dtype=torch.long)


def _text(model: nn.Module) -> Subject:
    takes = inspect.signature(model.forward).parameters

    def make(batch: int, length: int, seed: int) -> Inputs:
        given = {"input_ids": _tokens(batch, length, seed), "attention_mask": _ones(batch, length)}
        if "decoder_input_ids" in takes:
            given["decoder_input_ids"] = _tokens(batch, length - 4, seed + 100)
        return (), {key: value for key, value in given.items() if key in takes}

    decodes = "use_cache" in takes or any(cache in takes for cache in CACHES)
    return Subject(model, make, BATCH, LENGTH, LONGER, partial(_next_token, model) if decodes else None)


def _next_token(model: Any, before: Inputs, outputs: Any, seed: int) -> Inputs:
    """The call of the next step: one token more, and the caches that the call before put out."""
    ids = "decoder_input_ids" if "decoder_input_ids" in before[1] else "input_ids"
    given = dict(before[1])
    batch = given[ids].shape[0]
    given[ids] = _tokens(batch, 1, seed)
    if ids == "input_ids" and "attention_mask" in given:
        given["attention_mask"] = _ones(batch, given["attention_mask"].shape[1] + 1)
    caches = {key: outputs[key] for key in CACHES if key in outputs.keys()}  # noqa: SIM118  has more than it lists
    given.pop("pixel_values", None)
    if not caches:
        raise NoCacheError(f"no cache in the outputs {list(outputs)}")
    if "encoder_last_hidden_state" in outputs.keys():  # noqa: SIM118
        with torch.no_grad():
            encoded = {key: value for key, value in given.items() if not key.startswith("decoder_")}
            given["encoder_outputs"] = model.get_encoder()(**encoded)
        given = {key: value for key, value in given.items() if not key.startswith("input_")}
    return (), given | caches


def _pictures(model: nn.Module) -> Subject:
    def make(batch: int, size: tuple[int, int], seed: int) -> Inputs:
        return (), {"pixel_values": normal((batch, 3, *size), seed)}

    return Subject(model, make, BATCH, _sides(model.config), OTHER_IMAGES)


def _sides(config: Any) -> tuple[int, int]:
    side = getattr(getattr(config, "vision_config", config), "image_size", None) or IMAGE
    return (side, side) if isinstance(side, int) else tuple(side)


def _sound(model: nn.Module) -> Subject:
    def make(batch: int, length: int, seed: int) -> Inputs:
        return (), {"input_values": normal((batch, length), seed), "attention_mask": _ones(batch, length)}

    return Subject(model, make, BATCH, SOUND, OTHER_SOUNDS)


def _spectrum(model: Any) -> Subject:
    """Frames of a spectrogram [batch, bands, frames] or [batch, frames, bands], or the sound; and tokens."""
    takes, config = inspect.signature(model.forward).parameters, model.config

    def make(batch: int, frames: int, seed: int) -> Inputs:
        bands: Any = getattr(config, "num_mel_bins", 0)
        given = {
            "input_features": normal((batch, bands, frames) if bands_first else (batch, frames, width), seed),
            "input_values": normal((batch, frames, bands) if bands else (batch, SOUND + frames - FRAMES), seed),
            "attention_mask": _ones(batch, frames),
            "decoder_input_ids": _tokens(batch, LENGTH, seed + 100),
        }
        if "input_values" in takes and not bands:
            given["attention_mask"] = _ones(*given["input_values"].shape)
        return (), {key: value for key, value in given.items() if key in takes}

    bands_first = config.model_type == "whisper"
    width: Any = getattr(config, "feature_projection_input_dim", None) or getattr(config, "input_feat_per_channel", 0)
    step = partial(_next_token, model) if "decoder_input_ids" in takes else None
    return Subject(model, make, BATCH, FRAMES, OTHER_FRAMES, step)


def _both(model: Any) -> Subject:
    """An image and a text."""
    text, sides = _text(model), _sides(model.config)
    assert "pixel_values" in inspect.signature(model.forward).parameters

    def make(batch: int, length: int, seed: int) -> Inputs:
        return (), text.make(batch, length, seed)[1] | {"pixel_values": normal((batch, 3, *sides), seed + 200)}

    return Subject(model, make, BATCH, LENGTH, LONGER)


def _prompt(model: Any) -> Subject:
    """A text that holds as many image tokens as the image has features, after the first token."""
    sides = _sides(model.config)
    image: Any = getattr(model.config, "image_token_id", None)

    def make(batch: int, length: int, seed: int) -> Inputs:
        ids = _tokens(batch, length + count, seed)
        ids[:, 1 : 1 + count] = image
        pixels = normal((batch, 3, *sides), seed + 200)
        return (), {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}

    with torch.no_grad():
        features = model.get_image_features(normal((1, 3, *sides), 0))
    features = getattr(features, "pooler_output", features)
    features = features[0] if isinstance(features, (list, tuple)) else features
    count = features.shape[-2]
    return Subject(model, make, BATCH, LENGTH, LONGER, partial(_next_token, model))


INPUTS = {
    **dict.fromkeys(("causal", "masked", "seq2seq"), _text),
    **dict.fromkeys(("image", "dense", "boxes"), _pictures),
    "sound": _sound,
    "spectrum": _spectrum,
    "both": _both,
    "prompt": _prompt,
}
