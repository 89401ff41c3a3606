"""What the README shows is run as it stands there."""

import re
from pathlib import Path

import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config

from lightning_indexer import DSV4Config
from lightning_indexer.checkpoint import expected_shapes

README = Path(__file__).parent.parent / "README.md"


def code_blocks() -> list[str]:
    return re.findall(r"```python\n(.*?)```", README.read_text(encoding="utf-8"), re.DOTALL)


def test_first_example_runs_and_selects(capsys):
    names: dict = {}
    exec(code_blocks()[0], names)
    assert "-1" in capsys.readouterr().out
    arguments = {"top_k": 512, "valid_lens": names["lens"], "seq_ids": torch.zeros(4, dtype=torch.int32)}
    chosen = names["score_topk"](names["q"], names["weights"], names["keys"], **arguments)
    assert (chosen >= 0).sum(1).tolist() == [512, 512, 300, 0]


def test_engine_pages_are_viewed_in_place():
    slab = torch.zeros(4, 3, 4608, dtype=torch.uint8)  # blocks of three layers side by side, padded
    pages = slab[:, 1, : 64 * 68].unflatten(1, (64, 1, 68))
    names = {"vllm_index_cache": pages, "block_table": torch.zeros(1, 4, dtype=torch.int32)}
    exec(code_blocks()[1], names)
    assert names["view"].storage.data_ptr() == pages.data_ptr()


def test_layer_from_a_checkpoint(tmp_path, monkeypatch):
    folder = tmp_path / "DeepSeek-V4-Flash"
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 32}
    sizes |= {"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 8, "index_topk": 16}
    DeepseekV4Config(**sizes, compress_ratios=[0, 128, 4]).save_pretrained(folder)
    config = DSV4Config.from_json(folder / "config.json")
    tensors = {f"layers.2.attn.{n}": torch.ones(shape) * 0.01 for n, shape in expected_shapes(config, 2).items()}
    save_file(tensors, folder / "model.safetensors")
    monkeypatch.chdir(tmp_path)
    names = {"hidden_states": torch.randn(1037, 64).bfloat16()}
    exec(code_blocks()[2], names)
    assert names["out"].shape == (1037, 64) and names["out"].isfinite().all()


def test_tree_names_files_that_exist():
    root = README.parent
    block = README.read_text(encoding="utf-8").split("## The tree")[1].split("##")[0]
    missing = [name for name in re.findall(r"[\w/]+\.(?:py|md)", block) if not list(root.rglob(name.split("/")[-1]))]
    assert not missing, f"the README's tree names files that are not there: {missing}"
