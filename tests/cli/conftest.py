"""A tiny byte model on disk, dense and converted, for the verbs to work on."""

from __future__ import annotations

from pathlib import Path

import pytest

from openmsa import MSAConfig, hf
from openmsa.training.byte_tokenizer import byte_tokenizer
from tests.hf.tiny import tiny_model

POSITIONS = 256


def tiny_byte_model():
    return tiny_model(vocab_size=258, max_position_embeddings=POSITIONS, eos_token_id=256)


@pytest.fixture(scope="session")
def dense(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "dense"
    tiny_byte_model().save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def msa(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("models") / "msa"
    hf.convert(tiny_byte_model(), MSAConfig(block_size=8, top_k=4)).save_pretrained(folder)
    byte_tokenizer().save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def text(tmp_path_factory) -> Path:
    file = tmp_path_factory.mktemp("texts") / "text.txt"
    lines = [
        f"line {number}: the quick brown fox number {number * 7919 % 101}" for number in range(60)
    ]
    file.write_text("\n".join(lines), encoding="utf-8")
    return file
