"""The pieces of Python in the guides that need a GPU, with the rest of their pages (guides.py says how)."""

import pytest
import torch
from guides import all_units, run

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]


@pytest.mark.parametrize("unit", [param for param in all_units() if param.values[0].needs("gpu")])
def test_every_block_for_a_gpu_runs_and_does_what_it_says(unit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert run(unit, on_gpu=True) == len(unit.blocks), "blocks were left out"
