"""One CSA layer at V4-Flash size: written as a checkpoint, loaded, prefilled in chunks and decoded, in bounded memory.

Runs in a process of its own, so that its peak memory is its own.
"""

import json
import subprocess
import sys

MEMORY_LIMIT_GB = 12.0
PREFILL, CHUNK, DECODE = 8192, 2048, 16


def main(folder: str) -> None:
    import resource

    import torch
    from safetensors.torch import save_file

    from lightning_indexer import AttentionSubBlock, DSV4Config, LayerCacheHandle, load_attention_weights
    from lightning_indexer.checkpoint import expected_shapes

    config, layer = DSV4Config.v4_flash(), 2
    torch.manual_seed(0)
    tensors = {}
    for name, shape in expected_shapes(config, layer).items():
        value = torch.randn(shape) * (0.1 if len(shape) == 1 else shape[-1] ** -0.5) + ("norm" in name)
        is_fp8 = name.startswith(("wq_", "wkv", "wo_", "indexer.wq_b"))
        if is_fp8 and name.endswith(".weight"):
            tensors[f"layers.{layer}.attn.{name}"] = (value * 2**10).to(torch.float8_e4m3fn)
            blocks = [-(-n // 128) for n in shape]
            scale = torch.full(blocks, 2.0**-10).to(torch.float8_e8m0fnu)
            tensors[f"layers.{layer}.attn.{name.removesuffix('weight')}scale"] = scale
        elif not name.endswith(".scale"):
            keep = name.endswith(("ape", "attn_sink"))
            tensors[f"layers.{layer}.attn.{name}"] = value if keep else value.bfloat16()
    save_file(tensors, f"{folder}/model.safetensors")
    del tensors

    block = AttentionSubBlock(config, layer)
    block.load_weights(load_attention_weights(folder, config, layer))
    cache = LayerCacheHandle(config, layer, max_seqs=1, num_blocks=40)
    cache.alloc(0)
    finite, rms = True, []
    for count in [CHUNK] * (PREFILL // CHUNK) + [1] * DECODE:
        x = torch.randn(count, config.hidden_size).bfloat16()
        cache.begin_step([0], [count])
        out = block(x, cache)
        finite = finite and bool(out.isfinite().all())
        rms.append(out.float().square().mean().sqrt().item())
    entries = cache.paged.num_entries(0)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 2**20
    print(json.dumps({"finite": finite, "rms": rms, "entries": entries, "shape": list(out.shape), "peak_gb": peak}))


def test_v4_flash_layer_prefills_and_decodes(tmp_path):
    done = subprocess.run([sys.executable, __file__, str(tmp_path)], capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stderr
    report = json.loads(done.stdout)
    assert report["finite"] and report["shape"] == [1, 4096]
    assert report["entries"] == (PREFILL + DECODE) // 4
    assert all(0.01 < rms < 10 for rms in report["rms"]), f"output scale {report['rms']}"
    assert report["peak_gb"] < MEMORY_LIMIT_GB, f"peak {report['peak_gb']:.1f} GB"


if __name__ == "__main__":
    main(sys.argv[1])
