"""How the verbs load a model."""

from __future__ import annotations

from openmsa import hf
from openmsa.cli.models import load_model
from tests.hf.m3_tiny import tiny_m3


def test_a_minimax_m3_comes_enabled(tmp_path):
    tiny_m3().save_pretrained(tmp_path)
    model = load_model(str(tmp_path))
    assert hf.is_msa(model) and hf.msa_layers(model)
