"""The steps of docs/engines.md: tensors as each engine holds them, and what the blocks must make of them."""

from collections.abc import Iterator

import ml_dtypes
import numpy as np
import torch
from cases import assert_same_bits
from engine_tensors import POISON, Case, Held, as_tensor, draw, hold, in_int32, packed, values
from guides import steps_of, units

from lightning_indexer import merge_topk

PAGE = "docs/engines.md"
# 700 and 520 entries are more than the 512 that the guide selects; drafts of 1201 tokens see 299 and 300.
TOKENS = (2800, 50, 2083, 1201, 3)
BATCH = len(TOKENS)


def holding(format: str, next_n: int, memory: str = "whole") -> Held:
    return hold(Case(format, format, next_n, memory, num_heads=8), tokens=TOKENS)


def names_of(held: Held) -> dict:
    """The arguments under DeepGEMM's names."""
    return {n: getattr(held, n) for n in ("q", "kv_cache", "weights", "context_lens", "block_table")}


def assert_selected(names: dict, held: Held, output: str, key: str | None = None) -> None:
    """The block's indices and lengths, in whatever shape, are those of `held`."""
    indices, lengths = held.expected(512, output)
    got = names[key or ("slots" if output == "slot" else "entries")]
    assert got.dtype == torch.int32 and got.ndim == 3
    assert_same_bits(got.reshape(indices.shape), indices, "indices")
    assert_same_bits(names["lengths"].reshape(lengths.shape), lengths, "lengths")


@steps_of(PAGE, "DeepGEMM")
def deepgemm() -> Iterator[dict]:
    held = holding("mxfp4", 3)
    names = names_of(held) | {"q": held.q[0], "q_scale": held.q[1]}
    yield names
    assert_selected(names, held, "slot")
    batch, next_n = held.context_lens.shape
    one_by_one = {  # tokens flattened into rows, requests named by indices
        "q": held.q[0].view(batch * next_n, 1, 8, 64),
        "q_scale": held.q[1].view(batch * next_n, 1, 8),
        "context_lens": held.context_lens.view(-1, 1),
        "table_by_request": held.block_table,
        "indices": torch.arange(batch, dtype=torch.int32).repeat_interleave(next_n),
    }
    flat = names | one_by_one
    yield flat
    assert_selected(flat, held, "slot")
    theirs = torch.full((batch * next_n, 800), torch.nan)  # garbage beyond the lengths
    for b, j in np.ndindex(batch, next_n):
        scores = held.scores(b, j)
        theirs[b * next_n + j, : len(scores)] = torch.from_numpy(scores)
    names |= {"max_context_len": 800, "logits": theirs}
    yield names
    assert names["worst"] == 0 and names["seen"].sum() == held.context_lens.sum()


@steps_of(PAGE, "vLLM")
def vllm() -> Iterator[dict]:
    held = holding("fp8", 2, "padded")
    buffer = torch.full((50, 600), -77, dtype=torch.int32)
    names = names_of(held) | {"q_fp8": held.q, "kv_cache": held.kv_cache.squeeze(2), "seq_lens": held.context_lens}
    names |= {"topk_indices_buffer": buffer, "weights": torch.cat([held.weights, torch.full((9, 8), torch.nan)])}
    yield names
    indices, _ = held.expected(512, "entry")
    assert_same_bits(buffer[: 2 * BATCH, :512], indices.reshape(-1, 512), "indices in the engine's buffer")
    assert (buffer[2 * BATCH :] == -77).all() and (buffer[:, 512:] == -77).all()
    positions = torch.tensor([n - 2 + j for n in TOKENS for j in range(2)])
    names |= {"positions": positions, "token_to_seq": torch.arange(BATCH).repeat_interleave(2), "weights": held.weights}
    names |= {"q_fp8": held.q.flatten(0, 1)}
    yield names
    assert_selected(names, held, "entry")


@steps_of(PAGE, "SGLang")
def sglang() -> Iterator[dict]:
    held = holding("mxfp4", 1)
    names = {"index_k_with_scale_buffer": held.kv_cache.flatten(1), "page_table": held.block_table}
    names |= {"q_fp4": held.q[0].squeeze(1), "q_sf": held.q[1].squeeze(1), "weights": held.weights}
    names |= {"c4_lens": held.context_lens.squeeze(1)}
    yield names
    assert names["pages"].data_ptr() == held.kv_cache.data_ptr()
    assert_selected(names, held, "slot", "page_indices")


@steps_of(PAGE, "FlashMLA")
def flashmla() -> Iterator[dict]:
    held = holding("fp8", 3, "slab")
    rng = np.random.default_rng(1)
    compressed_cache, kv = write_kv(rng, held.kv_cache.shape[0])
    window_cache, window = write_kv(rng, 8)
    q = as_tensor(rng.normal(size=(BATCH, 3, 2, 512)))
    window_slots = as_tensor(rng.integers(0, 512, (BATCH, 3, 16)).astype(np.int32))
    names = names_of(held) | {"index_q": held.q, "q": q, "metadata": None, "sink": torch.tensor([0.5, -1.0])}
    names |= {"window_cache": window_cache, "window_slots": window_slots, "compressed_cache": compressed_cache}
    names |= {"window_lengths": torch.full((BATCH,), 16, dtype=torch.int32)}
    calls = []
    names |= {"flash_mla_with_kvcache": lambda **call: calls.append(call) or flash_mla_with_kvcache(**call)}
    yield names
    assert_selected(names, held, "slot")
    slots, lengths = held.expected(512, "slot")
    for b, j in np.ndindex(BATCH, 3):
        rows = np.concatenate([window[window_slots[b, j]], kv[slots[b, j, : lengths[b, j]]]])
        want = attend(q[b, j].numpy(), rows, names["sink"].numpy())
        np.testing.assert_allclose(names["out"][b, j].numpy(), want, rtol=0, atol=1e-12)
    shortest = {"extra_topk_length": names["lengths"].amin(1)}
    lost, _ = flash_mla_with_kvcache(**calls[0] | shortest)
    assert not torch.allclose(lost, names["out"]), "a smaller length loses entries"

    shift = rng.permutation(len(compressed_cache)).astype(np.int32)  # the same entries in other blocks
    moved, table = torch.empty_like(compressed_cache), held.block_table.clone()
    moved[torch.from_numpy(shift).long()] = compressed_cache
    in_use = (table >= 0) & (table < len(shift))
    table[in_use] = torch.from_numpy(shift)[table[in_use].long()]
    names |= {"compressed_cache": pad_pages(moved), "kv_block_table": table}
    yield names
    assert_selected(names, held, "entry")
    found = names["slots"]
    assert found.dtype == torch.int32 and found.shape == (BATCH, 3, 512)
    want = np.where(slots < 0, -1, shift[slots // 64] * 64 + slots % 64)
    assert_same_bits(found, want.astype(np.int32), "slots of the other pages")


@steps_of(PAGE, "Keys that are contiguous already")
def contiguous() -> Iterator[dict]:
    block = next(unit for unit in units(PAGE) if unit.steps is contiguous).blocks[0]
    names, want = contiguous_keys("fp8")
    exec(block.program(), names)
    assert_entries(names, want)
    names, want = contiguous_keys("mxfp4")
    yield names
    assert_entries(names, want)


def contiguous_keys(format: str) -> tuple[dict, list[np.ndarray]]:
    """Five FP8 queries over the keys of four requests in one piece, and the entries that each must get."""
    rng = np.random.default_rng(2)
    num_keys, first_key = torch.tensor([700, 1, 0, 130]), torch.tensor([0, 700, 701, 701])
    codes, scales = draw(rng, format, (831, 128))
    q, _ = draw(rng, "fp8", (5, 8, 128))
    weights = rng.integers(-8, 9, (5, 8)).astype(np.float32) / 4
    request = torch.tensor([0, 3, 0, 2, 1])
    start = first_key[request].int()
    end = start + torch.tensor([700, 130, 611, 0, 1], dtype=torch.int32)
    names = {"num_keys": num_keys, "first_key": first_key, "request_of_query": request, "weights": as_tensor(weights)}
    names |= {"cu_seq_len_k_start": start, "cu_seq_len_k_end": end, "q": as_fp8(q)}
    if format == "mxfp4":
        names |= {"data": as_tensor(packed(codes), torch.int8), "scale": as_tensor(in_int32(scales))}
    else:
        names |= {"data": as_fp8(codes), "scale": as_tensor(scales.squeeze(-1))}
    keys, want = values(codes, scales), []
    for t in range(5):
        scores = weights[t] @ np.maximum(q[t].astype(np.float64) @ keys[start[t] : end[t]].T, 0)
        want.append(np.sort(np.argsort(-scores, kind="stable")[:512]))
    return names, want


def assert_entries(names: dict, want: list[np.ndarray]) -> None:
    for t, row in enumerate(want):
        assert names["lengths"][t, 0] == len(row)
        assert names["entries"][t, 0, : len(row)].tolist() == row.tolist(), f"query {t}"
        assert (names["entries"][t, 0, len(row) :] == -1).all()


def as_fp8(codes: np.ndarray) -> torch.Tensor:
    return as_tensor(codes.view(np.uint8), torch.float8_e4m3fn)


@steps_of(PAGE, "Memory of your own, graphs, scores")
def memory() -> Iterator[dict]:
    held = holding("fp8", 2)
    names = names_of(held)
    yield names
    kept = names["kept"]
    assert_selected({"slots": kept["out"], "lengths": kept["lengths_out"]}, held, "slot")
    yield names
    merged, _ = merge_topk(names["entries"], names["scores"], top_k=512)
    best, _ = held.expected(512, "entry")
    assert_same_bits(merged.sort().values, np.sort(best.reshape(-1, 512)), "merging one rank's candidates keeps them")


# --- a stand-in for FlashMLA, from its description --------------------------------------------------------------

KV_PAGE, KV_STRIDE = 64 * 584, 65 * 576


def write_kv(rng: np.random.Generator, num_blocks: int) -> tuple[torch.Tensor, np.ndarray]:
    """uint8 [blocks, 64, 1, 584] with padded pages, and float64 [slots, 512]: 448 E4M3, 64 bf16, 7 UE8M0 and a pad."""
    codes = rng.choice(np.float32([-2, -1, -0.5, 0, 0.5, 1, 3]), (num_blocks, 64, 448)).astype(ml_dtypes.float8_e4m3fn)
    rope = rng.choice(np.float32([-1, 0.25, 1]), (num_blocks, 64, 64)).astype(ml_dtypes.bfloat16)
    scale = rng.integers(126, 129, (num_blocks, 64, 7)).astype(np.uint8)
    memory = np.full((num_blocks, KV_STRIDE), POISON, np.uint8)
    rows = np.concatenate([codes.view(np.uint8), rope.view(np.uint8)], -1)
    memory[:, : 64 * 576] = rows.reshape(num_blocks, -1)
    memory[:, 64 * 576 : KV_PAGE].reshape(num_blocks, 64, 8)[..., :7] = scale
    pages = torch.from_numpy(memory)[:, :KV_PAGE].unflatten(1, (64, 1, 584))
    numbers = np.concatenate([values(codes, scale.view(ml_dtypes.float8_e8m0fnu)), rope.astype(np.float64)], -1)
    return pages, numbers.reshape(-1, 512)


def pad_pages(pages: torch.Tensor) -> torch.Tensor:
    """The same pages, a multiple of 576 bytes apart."""
    memory = torch.full((len(pages), KV_STRIDE), POISON, dtype=torch.uint8)
    memory[:, :KV_PAGE] = pages.flatten(1)
    return memory[:, :KV_PAGE].unflatten(1, (64, 1, 584))


def read_kv(pages: torch.Tensor, slot: int) -> np.ndarray:
    page = pages[slot // 64].flatten().numpy()
    row = page[slot % 64 * 576 :][:576].copy()
    scale = page[64 * 576 + slot % 64 * 8 :][:7].copy()
    nope = values(row[:448].view(ml_dtypes.float8_e4m3fn), scale.view(ml_dtypes.float8_e8m0fnu))
    return np.concatenate([nope, row[448:].view(ml_dtypes.bfloat16).astype(np.float64)])


def attend(q: np.ndarray, rows: np.ndarray, sink: np.ndarray) -> np.ndarray:
    """[H, 512]: softmax over rows [n, 512] with the sink in the denominator."""
    weights = np.exp(q @ rows.T * 512**-0.5)
    return (weights / (weights.sum(-1) + np.exp(sink.astype(np.float64)))[:, None]) @ rows


def flash_mla_with_kvcache(**call: object) -> tuple[torch.Tensor, None]:
    """Sparse decode over two caches by physical slots; only the first `topk_length[b]` of each list are looked at."""
    assert call["topk_length"].shape == call["extra_topk_length"].shape == (len(call["q"]),)
    out = torch.zeros_like(call["q"])
    for b, j in np.ndindex(*out.shape[:2]):
        slots = call["indices"][b, j, : call["topk_length"][b]].tolist()
        extra = call["extra_indices_in_kvcache"][b, j, : call["extra_topk_length"][b]].tolist()
        rows = [read_kv(call["k_cache"], slot) for slot in slots if slot >= 0]
        rows += [read_kv(call["extra_k_cache"], slot) for slot in extra if slot >= 0]
        out[b, j] = torch.from_numpy(attend(call["q"][b, j].numpy(), np.array(rows), call["attn_sink"].numpy()))
    return out, None
