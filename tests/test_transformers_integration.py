"""transformers' DeepSeek-V4 with this library's index cache and selection, against the model alone.

Keys that are stored without loss ("fp32" in a model of fp32, "bf16" in one of bf16) leave one difference: scores are
summed in another order. Where that does not decide a choice the outputs are equal bit for bit, so there are no
tolerances here; `smallest_gap` shows of each input that no choice is that close.
"""

import copy
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import DeepseekV4Config, DeepseekV4ForCausalLM, DynamicCache, GPT2Config, GPT2LMHeadModel
from transformers.cache_utils import DYNAMIC_LAYER_TYPE_MAPPING
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4CSACache

from lightning_indexer import quantize, score_topk_workspace_bytes
from lightning_indexer.integrations import transformers_cache
from lightning_indexer.integrations.transformers import _shared, accelerate, agreement, restore
from lightning_indexer.integrations.transformers_cache import PagedCSACache
from lightning_indexer.reference import read_entries
from lightning_indexer.rotary import hadamard

CSA_LAYERS = (1, 3)
TOP_K = 16
VOCABULARY = 64
NEAR_TIE = 1e-5  # of a row's root mean square; scores of the two differ by up to 1.4e-6 of it


def make_model(dtype: torch.dtype = torch.float32, **changes: Any) -> DeepseekV4ForCausalLM:
    """Four layers, SWA, CSA, HCA, CSA, with random weights."""
    torch.manual_seed(2)
    sizes: dict[str, Any] = {
        "hidden_size": 64,
        "num_hidden_layers": 4,
        "num_attention_heads": 4,
        "head_dim": 32,
        "q_lora_rank": 24,
        "qk_rope_head_dim": 16,
        "o_groups": 2,
        "o_lora_rank": 8,
        "index_n_heads": 8,
        "index_head_dim": 64,
        "index_topk": TOP_K,
        "sliding_window": 16,
        "moe_intermediate_size": 32,
        "n_routed_experts": 4,
        "num_experts_per_tok": 2,
        "hc_mult": 2,
        "num_hash_layers": 1,
        "compress_ratios": [0, 4, 128, 4],
        "vocab_size": VOCABULARY,
        "eos_token_id": None,
        "pad_token_id": 0,
    }
    model = DeepseekV4ForCausalLM(DeepseekV4Config(**(sizes | changes))).eval()
    for parameter in model.parameters():
        if parameter.ndim > 1:
            torch.nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5)
    return model.to(dtype)


def tokens(batch: int, length: int) -> torch.Tensor:
    return torch.randint(1, VOCABULARY, (batch, length), generator=torch.Generator().manual_seed(1))


def generate(model: DeepseekV4ForCausalLM, input_ids: torch.Tensor, **options: Any) -> Any:
    options = {"max_new_tokens": 12, "do_sample": False} | options
    torch.manual_seed(5)  # for sampling
    return model.generate(input_ids, return_dict_in_generate=True, output_logits=True, **options)


def assert_same(got: Any, want: Any) -> None:
    assert got.sequences.tolist() == want.sequences.tolist()
    for step, (ours, theirs) in enumerate(zip(got.logits, want.logits, strict=True)):
        different = (ours != theirs).any(-1).nonzero().flatten().tolist()
        assert not different, f"logits of rows {different} differ at step {step} by {(ours - theirs).abs().max():.1e}"


def indexer_of(model: DeepseekV4ForCausalLM, layer: int) -> torch.nn.Module:
    return model.model.layers[layer].self_attn.compressor.indexer


def smallest_gap(model: DeepseekV4ForCausalLM, input_ids: torch.Tensor) -> float:
    """Between the last entry taken and the first one left out, as a fraction of the row's root mean square."""
    gaps: list[float] = []

    def watch(_module: Any, _args: Any, scores: torch.Tensor) -> None:
        scores = scores.cpu()
        visible = (torch.arange(scores.shape[1]) + 1) // 4
        seen = torch.arange(scores.shape[2]) < visible.unsqueeze(1)
        best = scores.masked_fill(~seen, -torch.inf).topk(TOP_K + 1).values[:, visible > TOP_K]
        size = ((scores * seen).square().sum(-1) / visible.clamp_min(1)).sqrt()[:, visible > TOP_K]
        gaps.append(float(((best[..., -2] - best[..., -1]) / size).min()))

    handles = [indexer_of(model, layer).scorer.register_forward_hook(watch) for layer in CSA_LAYERS]
    with torch.no_grad():
        model(input_ids, use_cache=False)
    for handle in handles:
        handle.remove()
    return min(gaps)


@pytest.fixture(scope="module")
def model() -> DeepseekV4ForCausalLM:
    return make_model()


@pytest.fixture
def accelerated(model: DeepseekV4ForCausalLM) -> Iterator[DeepseekV4ForCausalLM]:
    """Without loss, in small blocks."""
    with accelerate(model, index_format="fp32", entries_per_block=16):
        yield model


@dataclass(frozen=True)
class Case:
    name: str
    batch: int
    length: int
    options: dict[str, Any] = field(default_factory=dict)


CASES = (
    Case("one-prompt", 1, 203),
    Case("whole-windows", 1, 256),
    Case("from-two-tokens", 1, 2, {"max_new_tokens": 78}),  # past the first block, and until entries are left out
    Case("batch", 3, 203),
    Case("chunked-prefill", 2, 203, {"prefill_chunk_size": 37}),
    Case("chunks-of-less-than-a-window", 2, 80, {"prefill_chunk_size": 3, "max_new_tokens": 4}),
    Case("sampling", 2, 120, {"do_sample": True, "num_return_sequences": 2}),
    Case("beams", 2, 203, {"num_beams": 3}),
    Case("beams-that-return-all", 1, 120, {"num_beams": 4, "num_return_sequences": 4}),
    Case("without-a-cache", 2, 90, {"use_cache": False, "max_new_tokens": 4}),
)


@pytest.mark.parametrize("case", CASES, ids=lambda case: case.name)
def test_generates_what_the_model_alone_generates(model, case):
    prompts = tokens(case.batch, case.length)
    want = generate(model, prompts, **case.options)
    assert smallest_gap(model, want.sequences) > NEAR_TIE, "choose another seed"
    with accelerate(model, index_format="fp32", entries_per_block=16):
        for _call in range(2):
            assert_same(generate(model, prompts, **case.options), want)


def test_a_bf16_model_with_bf16_keys_generates_the_same():
    model, prompts = make_model(torch.bfloat16), tokens(2, 203)
    want = generate(model, prompts)
    assert smallest_gap(model, want.sequences) > NEAR_TIE, "choose another seed"
    with accelerate(model, index_format="bf16"):
        assert_same(generate(model, prompts), want)


def sees_one_entry_less(monkeypatch):
    right = transformers_cache.score_topk
    monkeypatch.setattr(
        transformers_cache,
        "score_topk",
        lambda *args, valid_lens, **kwargs: right(*args, valid_lens=(valid_lens - 1).clamp_min(0), **kwargs),
    )


def keeps_one_less(monkeypatch):
    right = transformers_cache.score_topk
    monkeypatch.setattr(
        transformers_cache, "score_topk", lambda *args, top_k, **kwargs: right(*args, top_k=top_k - 1, **kwargs)
    )


def mixes_up_the_batch(monkeypatch):
    right = transformers_cache.score_topk
    monkeypatch.setattr(
        transformers_cache,
        "score_topk",
        lambda *args, seq_ids, **kwargs: right(*args, seq_ids=seq_ids.flip(0), **kwargs),
    )


def leaves_beams_in_place(monkeypatch):
    monkeypatch.setattr(PagedCSACache, "reorder_cache", DeepseekV4CSACache.reorder_cache)


@pytest.mark.parametrize(
    "break_it",
    [sees_one_entry_less, keeps_one_less, mixes_up_the_batch, leaves_beams_in_place],
    ids=lambda f: f.__name__,
)
def test_wrong_implementations_are_rejected(model, break_it, monkeypatch):
    break_it(monkeypatch)
    case = next(case for case in CASES if case.name == "beams")
    with pytest.raises(AssertionError):
        test_generates_what_the_model_alone_generates(model, case)


# --- caches ---------------------------------------------------------------------------------------------------


def test_a_cache_can_be_passed_on_and_copied(accelerated):
    prompt, more = tokens(2, 203), tokens(2, 241)[:, 203:]
    first = generate(accelerated, prompt)
    longer = torch.cat([first.sequences, more], dim=1)
    copied = copy.deepcopy(first.past_key_values)
    passed_on = generate(accelerated, longer, past_key_values=first.past_key_values)
    from_copy = generate(accelerated, longer, past_key_values=copied)
    assert isinstance(copied.layers[1], PagedCSACache)
    fresh = generate(accelerated, longer)
    assert passed_on.sequences.tolist() == from_copy.sequences.tolist() == fresh.sequences.tolist()


def test_a_cache_that_was_reset_is_empty(accelerated):
    prompt = tokens(2, 203)
    want = generate(accelerated, prompt)
    cache = generate(accelerated, tokens(3, 120)).past_key_values
    cache.reset()
    assert cache.layers[1].pool is None
    assert_same(generate(accelerated, prompt, past_key_values=cache), want)


@pytest.mark.parametrize("index_format", ["fp32", "bf16", "mxfp4", "nvfp4", "fp8"])
def test_index_keys_lie_in_the_pool_and_nowhere_else(model, index_format):
    """Layer 1, whose input is the same with any selection."""
    prompt, alone = tokens(2, 150), DynamicCache(config=model.config)
    with torch.no_grad():
        model(prompt, past_key_values=alone)
    keys = alone.layers[1].compressed_kv["indexer"]
    with accelerate(model, index_format=index_format, entries_per_block=16):
        cache = generate(model, prompt, max_new_tokens=1).past_key_values
    layer = cache.layers[1]
    assert layer.compressed_kv["indexer"] is None and layer.entry_count["indexer"] == keys.shape[1] == 37
    view = layer._view(layer.pool)
    for sequence, row in enumerate(layer.rows):
        stored = keys[sequence] if index_format in ("fp32", "bf16") else hadamard(keys[sequence])
        data, _ = quantize(stored, index_format)
        slots = view.slots(torch.tensor([row]), torch.arange(37).unsqueeze(0))[0]
        assert torch.equal(view.data_rows.flatten(0, 1)[slots], data), f"sequence {sequence}"
    if index_format == "fp32":
        assert torch.equal(read_entries(view, layer.rows[1], 37), keys[1])


@pytest.mark.parametrize(("max_tokens", "columns"), [(None, 4), (150, 3)])
def test_the_pool_grows_by_doubling_or_has_the_size_asked_for(model, max_tokens, columns):
    with accelerate(model, index_format="fp32", entries_per_block=16, max_tokens=max_tokens):
        cache = generate(model, tokens(2, 120), max_new_tokens=13).past_key_values  # from 30 to 33 entries
    assert cache.layers[3].pool.block_table.shape == (4, columns)


def test_beams_share_full_blocks(accelerated):
    cache = generate(accelerated, tokens(1, 256), num_beams=4, max_new_tokens=9).past_key_values
    pool = cache.layers[1].pool  # 66 entries: four blocks of 16, shared, and a fifth each
    assert pool.num_blocks - pool.num_free_blocks == 4 + 4


def test_a_sequence_beyond_max_tokens_is_refused(model):
    with accelerate(model, max_tokens=100):
        assert generate(model, tokens(1, 90), max_new_tokens=11).sequences.shape == (1, 101)
        with pytest.raises(ValueError, match="max_tokens .* room for 25 entries of 4 tokens and a sequence of 26"):
            generate(model, tokens(1, 104))


def test_caches_of_the_other_kind_are_refused(model):
    prompt = tokens(1, 40)
    cache = generate(model, prompt).past_key_values
    with accelerate(model):
        paged = generate(model, prompt).past_key_values
        with pytest.raises(ValueError, match="past_key_values .* the model alone has filled"):
            model(prompt, past_key_values=cache)
    with pytest.raises(RuntimeError, match="past_key_values comes from an accelerated model"):
        model(prompt, past_key_values=paged)


# --- memory ---------------------------------------------------------------------------------------------------


class LargestTensor(TorchDispatchMode):
    """The largest memory that any operator returns, in bytes."""

    def __init__(self) -> None:
        super().__init__()
        self.nbytes = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        for item in result if isinstance(result, tuple | list) else (result,):
            if isinstance(item, torch.Tensor):
                self.nbytes = max(self.nbytes, item.untyped_storage().nbytes())
        return result


@pytest.mark.parametrize("index_format", ["fp32", "mxfp4"])
def test_no_tensor_grows_with_tokens_and_entries(model, index_format):
    length, heads, dim = 2048, 8, 64
    hidden, latent = torch.randn(1, length, 64), torch.randn(1, length, 24)
    indexer, arguments = indexer_of(model, 1), (torch.arange(length).unsqueeze(0), None, 1)

    def largest() -> int:
        with torch.no_grad(), LargestTensor() as watch:
            indexer(hidden, latent, *arguments)
        return watch.nbytes

    dense = length * heads * (length // 4) * 4
    assert largest() == dense, "the model's own scores [B, S, H, T]"
    with accelerate(model, index_format=index_format):
        ours = largest()
    workspace = score_topk_workspace_bytes(num_heads=heads, head_dim=dim, top_k=TOP_K)
    queries = length * heads * dim * 4
    assert ours <= max(workspace, 2 * queries), (ours, workspace, queries)
    assert max(workspace, 2 * queries) < dense / 2


# --- agreement ------------------------------------------------------------------------------------------------


def test_agreement_with_the_model_alone(model):
    ids = generate(model, tokens(2, 183)).sequences
    found = {name: agreement(model, ids, index_format=name) for name in ("fp32", "fp8", "nvfp4", "mxfp4")}
    assert found["fp32"].entries == {1: 1.0, 3: 1.0} and found["fp32"].tokens == 1.0
    first = {name: result.entries[1] for name, result in found.items()}
    assert 1.0 > first["fp8"] > first["nvfp4"] > first["mxfp4"] > 0.85, first
    assert all(result.tokens > 0.85 for result in found.values()), found
    assert not hasattr(model, "_lightning_indexer_hooks"), "the model is as it was"


def test_agreement_counts_queries_that_have_to_choose():
    own, selected = torch.full((1, 16, 2), -1), torch.full((1, 16, 2), -1)  # 4 entries; queries from 11 on see over 2
    own[0, 11:], selected[0, 11:] = torch.tensor([2, 0]), torch.tensor([1, 2])
    selected[0, 15] = torch.tensor([0, 2])
    assert _shared(selected, own) == pytest.approx((4 * 0.5 + 1) / 5)


def test_agreement_of_short_prompts_is_not_a_number(model):
    found = agreement(model, tokens(2, 4 * TOP_K + 3))
    assert all(share != share for share in found.entries.values()), found


# --- undoing, refusing ----------------------------------------------------------------------------------------


def test_restore_leaves_nothing_behind(model):
    def hooks() -> list[str]:
        kinds = ("_forward_hooks", "_forward_pre_hooks", "_forward_hooks_with_kwargs", "_forward_pre_hooks_with_kwargs")
        return [f"{name}.{kind}" for name, module in model.named_modules() for kind in kinds if getattr(module, kind)]

    prompt, names, attributes = tokens(2, 203), list(model.state_dict()), set(vars(model))
    want, before = generate(model, prompt), hooks()
    accelerate(model)
    assert hooks() != before and list(model.state_dict()) == names
    changed = generate(model, prompt)
    assert any(not torch.equal(a, b) for a, b in zip(changed.logits, want.logits, strict=True)), "mxfp4 must show"
    restore(model)
    assert hooks() == before and set(vars(model)) == attributes
    cache = generate(model, prompt)
    assert_same(cache, want)
    assert type(cache.past_key_values.layers[1]) is DeepseekV4CSACache
    assert DYNAMIC_LAYER_TYPE_MAPPING["compressed_sparse_attention"] is DeepseekV4CSACache


def test_a_copy_of_an_accelerated_model_is_its_own(model):
    prompt = tokens(1, 100)
    accelerate(model, index_format="fp32")
    twin = copy.deepcopy(model)
    restore(model)
    got = generate(twin, prompt)
    assert_same(got, generate(model, prompt))
    assert isinstance(got.past_key_values.layers[1], PagedCSACache)
    restore(twin)


def other_model() -> GPT2LMHeadModel:
    return GPT2LMHeadModel(GPT2Config(n_embd=8, n_layer=1, n_head=1, vocab_size=8, n_positions=8))


@pytest.mark.parametrize(
    ("make", "options", "error", "words"),
    [
        (other_model, {}, TypeError, ["model must be a DeepseekV4ForCausalLM", "GPT2LMHeadModel"]),
        (lambda: make_model().model, {}, TypeError, ["model must be a DeepseekV4ForCausalLM", "DeepseekV4Model"]),
        (lambda: make_model(index_head_dim=32), {}, ValueError, ["indexer_head_dim must be 64 or 128", "32"]),
        (lambda: make_model(index_n_heads=12), {}, ValueError, ["indexer_num_heads", "multiple of 8", "12"]),
        (lambda: make_model(index_topk=5000), {}, ValueError, ["csa_top_k", "1..4096", "5000"]),
        (lambda: make_model(compress_rate_csa=8), {}, ValueError, ["compressed_sparse_attention", "4", "8"]),
        (lambda: make_model(compress_ratios=[0, 128, 0, 128]), {}, ValueError, ["must have a CSA layer"]),
        (make_model, {"index_format": "fp8_ds_mla"}, ValueError, ["index_format must be one of", "fp8_ds_mla"]),
        (make_model, {"entries_per_block": 40}, ValueError, ["entries_per_block", "multiple of 16", "40"]),
        (make_model, {"index_format": "fp32", "entries_per_block": 40}, ValueError, ["multiple of 16", "40"]),
        (make_model, {"max_tokens": 0}, ValueError, ["max_tokens must be positive", "0"]),
        (make_model, {"impl": "gpu"}, ValueError, ["impl must be one of", "gpu"]),
    ],
    ids=lambda value: value.__name__ if isinstance(value, type) else None,
)
def test_what_cannot_be_accelerated_is_refused_and_unchanged(make, options, error, words):
    model = make()
    with pytest.raises(error) as caught:
        accelerate(model, **options)
    assert all(word in str(caught.value) for word in words), str(caught.value)
    assert "\n" not in str(caught.value)
    with pytest.raises(ValueError, match="restore: model must be accelerated"):
        restore(model)


def test_accelerating_twice_is_refused(accelerated):
    with pytest.raises(ValueError, match="must not be accelerated already.*call restore first"):
        accelerate(accelerated)
    with pytest.raises(ValueError, match="must not be accelerated already"):
        agreement(accelerated, tokens(1, 8))


def test_left_padding_is_refused(accelerated):
    prompts, mask = tokens(3, 50), torch.ones(3, 50, dtype=torch.int64)
    mask[1, :7] = 0
    with pytest.raises(ValueError, match=r"attention_mask .* rows \[1\].*one length"):
        generate(accelerated, prompts, attention_mask=mask)
    with pytest.raises(ValueError, match=r"attention_mask .* rows \[1\]"):
        accelerated.model(prompts, mask)


@pytest.mark.parametrize("what", ["right-padding", "positions-of-a-longer-text"])
def test_forward_takes_what_the_model_takes(model, what):
    prompts, mask = tokens(2, 120), torch.ones(2, 120, dtype=torch.int64)
    mask[1, 90:] = 0
    later = torch.arange(120).unsqueeze(0) + 41  # all entries are visible to the last queries, which see no further
    options = {"attention_mask": mask} if what == "right-padding" else {"position_ids": later}
    with torch.no_grad():
        want = model(prompts, **options).logits
        with accelerate(model, index_format="fp32"):
            got = model(prompts, **options).logits
    assert torch.equal(got, want)


# --- the example ----------------------------------------------------------------------------------------------


def test_the_example_runs():
    example = Path(__file__).parent.parent / "examples" / "transformers_generate.py"
    done = subprocess.run([sys.executable, str(example)], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    assert "same tokens: yes" in done.stdout and "mxfp4" in done.stdout, done.stdout
