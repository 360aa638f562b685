"""The study of networks as they run, of a small decoder: what is timed, and what the page says."""

from __future__ import annotations

from argparse import Namespace
from pathlib import Path

import pytest

from model_zoo.records import Results
from model_zoo.studies import deployed
from model_zoo.studies.deployed import cases, page, worker

pytest.importorskip("transformers", reason="the decoder is one of transformers: pip install '.[zoo]'")
pytestmark = pytest.mark.filterwarnings("ignore:.past_key_values:FutureWarning")
SMALL = {
    "vocab_size": 64, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
    "num_key_value_heads": 2, "tie_word_embeddings": True,
}  # fmt: skip


def test_a_prompt_and_a_token_of_a_decoder(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(deployed, "SIZES", SMALL)
    options = Namespace(lengths=[5])
    asked = [case for case in cases(options) if case.network == "decoder"]
    assert [*map(str, asked)] == ["decoder, prompt, 5", "decoder, one token, 5"]
    measured = worker(options)
    records = [measured(case) for case in asked]
    for record in records:
        f = record.figures
        assert 0.4 < f["macs_ratio"] <= 0.5
        assert f["dense_ms"] > 0
        assert f["ratio"] == f["pruned_ms"] / f["dense_ms"]
    (told,) = page(Results({}, {str(case): record for case, record in zip(asked, records, strict=True)}, tmp_path))
    assert "| decoder | one token | 5 |" in told
