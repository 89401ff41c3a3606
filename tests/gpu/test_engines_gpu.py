"""The tensors of vLLM, SGLang and DeepGEMM on a GPU: the cases of `test_engines.py`, memory, waiting and graphs."""

from collections.abc import Iterator

import numpy as np
import pytest
import torch
from cases import assert_same_bits
from engine_tensors import CASES, TOKENS, Held, as_tensor, check_logits, check_selection, entries_of, hold
from test_score_topk_gpu import captured, rise

from lightning_indexer import score_topk_workspace_bytes
from lightning_indexer.integrations.engines import paged_mqa_logits, paged_mqa_topk

pytestmark = [pytest.mark.gpu, pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")]
DEVICE, TOP_K = "cuda", 48
LONGEST = entries_of(max(TOKENS))
MODEL_CASES = ["mxfp4-next1-whole", "mxfp4-next3-slab", "fp8-next1-whole", "fp8-next2-padded"]


@pytest.fixture(autouse=True)
def _cuda_wheels() -> None:
    pytest.importorskip("cuda.core", reason="needs cuda-core and NVRTC (the extra cuda13)")


@pytest.fixture
def _no_waiting() -> Iterator[None]:
    """After the test, torch may wait for the device again; the test itself says from when on it raises."""
    yield
    torch.cuda.set_sync_debug_mode("default")


def given_for(held: Held) -> dict[str, torch.Tensor]:
    """Everything that a call would make for itself, filled with nonsense."""
    batch, next_n = held.context_lens.shape
    sizes = {"num_heads": held.weights.shape[1], "head_dim": held.q_values.shape[-1], "top_k": TOP_K}
    return {
        "out": torch.full((batch, next_n, TOP_K), -77, dtype=torch.int32, device=DEVICE),
        "lengths_out": torch.full((batch, next_n), -77, dtype=torch.int32, device=DEVICE),
        "seq_ids": torch.arange(batch, dtype=torch.int32, device=DEVICE).repeat_interleave(next_n),
        "workspace": torch.empty(score_topk_workspace_bytes(**sizes, device=DEVICE), dtype=torch.uint8, device=DEVICE),
    }


def with_lengths(held: Held, seed: int) -> Held:
    """The same requests of which other parts are seen, from nothing to all."""
    rng = np.random.default_rng(seed)
    lens = [rng.integers(0, len(entries) + 1, held.context_lens.shape[1]) for entries in held.entries]
    held.context_lens.copy_(as_tensor(np.array(lens, np.int32)))
    return held


@pytest.mark.parametrize("case", CASES)
def test_selection_in_every_layout(case: str) -> None:
    held = hold(CASES[case])
    for top_k, output, order in ((48, "slot", "index"), (48, "entry", "score"), (512, "slot", "index")):
        check_selection(paged_mqa_topk, held.to(DEVICE), top_k, want=held, output=output, order=order)


@pytest.mark.parametrize("case", CASES)
def test_logits_in_every_layout(case: str) -> None:
    held = hold(CASES[case])
    for width in (LONGEST, LONGEST + 43):
        check_logits(paged_mqa_logits, held.to(DEVICE), width, want=held)


@pytest.mark.parametrize("case", MODEL_CASES)
def test_gpu_and_cpu_give_the_same(case: str) -> None:
    """Where scores are exact, as here."""
    held = hold(CASES[case], seed=5)
    for got, want in zip(held.to(DEVICE).call(paged_mqa_topk, 512), held.call(paged_mqa_topk, 512), strict=True):
        assert_same_bits(got, want, "results")


@pytest.mark.parametrize("case", MODEL_CASES)
def test_nothing_is_allocated_with_everything_given(case: str) -> None:
    """Nor is anything copied, which would need memory."""
    held = hold(CASES[case]).to(DEVICE)
    given = given_for(held)
    held.call(paged_mqa_topk, TOP_K, **given)  # loads the kernels
    grown = rise(lambda: held.call(paged_mqa_topk, TOP_K, **given))
    assert grown == 0, f"{grown} bytes"


@pytest.mark.parametrize("case", MODEL_CASES)
def test_calls_do_not_wait(case: str, _no_waiting: None) -> None:
    held = hold(CASES[case]).to(DEVICE)
    given = given_for(held)
    dense = torch.empty(len(held.weights), LONGEST, device=DEVICE)
    torch.cuda.set_sync_debug_mode("error")
    held.call(paged_mqa_topk, TOP_K, **given)
    held.call(paged_mqa_topk, TOP_K)
    held.call(paged_mqa_topk, TOP_K, output="entry", order="score")
    held.call(paged_mqa_logits, LONGEST, out=dense)
    held.call(paged_mqa_logits, LONGEST)


@pytest.mark.parametrize("owns_outputs", [False, True], ids=["outputs-given", "outputs-of-the-graph"])
@pytest.mark.parametrize("case", MODEL_CASES)
def test_a_graph_follows_its_inputs(case: str, owns_outputs: bool) -> None:
    """Captured while nothing is seen, replayed with other lengths, then with every other tensor changed too."""
    static = hold(CASES[case]).to(DEVICE)
    static.context_lens.zero_()
    given = {} if owns_outputs else given_for(static)
    static.call(paged_mqa_topk, TOP_K, **given)
    kept: list[torch.Tensor] = []
    replay = captured(lambda: kept.extend(static.call(paged_mqa_topk, TOP_K, **given)))
    for seed, lengths_seed in ((0, 1), (0, 2), (3, 3), (4, 4)):
        held = with_lengths(hold(CASES[case], seed=seed), lengths_seed)
        for mine, new in zip(static.tensors(), held.to(DEVICE).tensors(), strict=True):
            mine.copy_(new)
        for run in range(3):
            for tensor in kept:
                tensor.fill_(-77)
            replay()
            for got, want in zip(kept, held.expected(TOP_K, "slot"), strict=True):
                assert_same_bits(got, want, f"tensors {seed}, lengths {lengths_seed}, replay {run}")


def test_out_of_range_lengths_are_clamped_without_waiting(_no_waiting: None) -> None:
    held = hold(CASES["fp8-next2-padded"]).to(DEVICE)
    widest = held.block_table.shape[1] * 64
    held.context_lens[1] = torch.tensor([2**31 - 1, -7], dtype=torch.int32, device=DEVICE)
    held.block_table[1] = held.block_table[1, 0].clone()
    torch.cuda.set_sync_debug_mode("error")
    indices, lengths = held.call(paged_mqa_topk, 4096)
    torch.cuda.set_sync_debug_mode("default")
    assert lengths[1].tolist() == [widest, 0]
    assert torch.equal((indices >= 0).sum(-1).int(), lengths)


def test_validation_waits_and_names_the_tensor() -> None:
    held = hold(CASES["fp8-next2-padded"]).to(DEVICE)
    held.context_lens[2, 1] = 2**30
    with pytest.raises(ValueError, match=r"paged_mqa_topk: context_lens must lie in .* at \[2, 1\]"):
        held.call(paged_mqa_topk, TOP_K, validate=True)


def test_operands_on_two_devices() -> None:
    held = hold(CASES["fp8-next2-padded"])
    moved = held.to(DEVICE)
    for name in ("kv_cache", "weights", "context_lens", "block_table"):
        arguments = {n: getattr(moved, n) for n in ("q", "kv_cache", "weights", "context_lens", "block_table")}
        with pytest.raises(ValueError, match=f"paged_mqa_topk: {name} must be on cuda.*got cpu"):
            paged_mqa_topk(**(arguments | {name: getattr(held, name)}), top_k=TOP_K)
