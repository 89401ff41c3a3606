"""The whole layer against Hugging Face's DeepSeek-V4 modules, in float32 and without quantisation.

The exact route: index keys and KV entries in the "fp32" cache format and no Hadamard rotation, which is what the
Hugging Face model computes. Sequences of different lengths go through our layer as one ragged batch and through theirs
one by one; "uneven" cuts them into chunks that align with nothing.
"""

from dataclasses import dataclass, replace

import pytest
import torch
from transformers import DeepseekV4Config, DynamicCache
from transformers.models.deepseek_v4 import modeling_deepseek_v4 as hf

from lightning_indexer import AttentionSubBlock, Compressor, DSV4Config, LayerCacheHandle
from lightning_indexer.checkpoint import expected_shapes
from lightning_indexer.nn import attention as attention_module
from lightning_indexer.ops import compress as compress_module

RELATIVE_ERROR = 1e-5
LENGTHS = (301, 37, 3, 158)
LAYERS = {"SWA": 0, "CSA": 1, "HCA": 2}
HF_NAMES = (  # official name -> Hugging Face name inside an attention module, applied in this order
    ("indexer.compressor.", "compressor.indexer."),
    ("indexer.weights_proj", "compressor.indexer.scorer.weights_proj"),
    ("indexer.wq_b", "compressor.indexer.q_b_proj"),
    ("compressor.indexer.norm", "compressor.indexer.kv_norm"),
    ("compressor.norm", "compressor.kv_norm"),
    ("attn_sink", "sinks"),
    ("ape", "position_bias"),
    ("wgate", "gate_proj"),
    ("wkv", "kv_proj"),
    ("q_norm", "q_a_norm"),
    ("wq_a", "q_a_proj"),
    ("wq_b", "q_b_proj"),
    ("wo_a", "o_a_proj"),
    ("wo_b", "o_b_proj"),
)


@dataclass(frozen=True)
class Schedule:
    """How many tokens of each sequence a step takes, until all are done."""

    name: str
    steps: tuple[int, ...]

    def chunks(self, length: int) -> list[tuple[int, int]]:
        bounds, start, i = [], 0, 0
        while start < length:
            stop = min(length, start + self.steps[min(i, len(self.steps) - 1)])
            bounds.append((start, stop))
            start, i = stop, i + 1
        return bounds


SCHEDULES = (
    Schedule("prefill", (10_000,)),
    Schedule("uneven", (5, 1, 130, 2, 3, 61, 127, 10_000)),
    Schedule("decode-after-prefill", (140, 1)),
)


@pytest.fixture(scope="module")
def hf_config() -> DeepseekV4Config:
    config = DeepseekV4Config(
        hidden_size=64,
        num_hidden_layers=3,
        num_attention_heads=4,
        head_dim=32,
        q_lora_rank=24,
        qk_rope_head_dim=16,
        o_groups=2,
        o_lora_rank=8,
        index_n_heads=8,
        index_head_dim=64,
        index_topk=16,
        sliding_window=128,
        layer_types=["sliding_attention", "compressed_sparse_attention", "heavily_compressed_attention"],
        rope_scaling={
            "rope_type": "yarn",
            "factor": 16.0,
            "original_max_position_embeddings": 65536,
            "beta_fast": 32.0,
            "beta_slow": 1.0,
        },
        vocab_size=32,
    )
    config._attn_implementation = "eager"
    return config


@pytest.fixture(scope="module")
def config(hf_config: DeepseekV4Config) -> DSV4Config:
    return replace(DSV4Config.from_json(hf_config.to_dict()), indexer_hadamard=False)


def hf_name(name: str) -> str:
    for ours, theirs in HF_NAMES:
        if theirs not in name:
            name = name.replace(ours, theirs)
    return name


def make_layers(hf_config: DeepseekV4Config, config: DSV4Config, layer: int, seed: int = 0):
    """Hugging Face's attention with random weights, and ours with the same."""
    torch.manual_seed(seed)
    theirs = hf.DeepseekV4Attention(hf_config, layer).eval()
    for name, parameter in theirs.named_parameters():
        scale = 1.0 if "norm" in name or "sink" in name or "bias" in name else parameter.shape[-1] ** -0.5
        torch.nn.init.normal_(
            parameter, mean=1.0 if "norm" in name else 0.0, std=scale * (0.2 if "norm" in name else 1)
        )
    weights = {name: theirs.get_parameter(hf_name(name)).detach() for name in expected_shapes(config, layer)}
    ours = AttentionSubBlock(config, layer)
    ours.load_weights(weights)
    return theirs, ours


def run_theirs(
    hf_config: DeepseekV4Config, layer: int, module: hf.DeepseekV4Attention, x: torch.Tensor, schedule: Schedule
) -> tuple[torch.Tensor, list[set[int]]]:
    """Outputs [L, hidden] of one sequence and each token's selected entries (CSA only)."""
    rotary = hf.DeepseekV4RotaryEmbedding(hf_config)
    cache = DynamicCache(config=hf_config)
    outputs, chosen = [], []
    hook = None
    if LAYERS["CSA"] == layer:

        def record(_module, _args, indices):
            chosen.extend({i for i in row if i >= 0} for row in indices[0].tolist())

        hook = module.compressor.indexer.register_forward_hook(record)
    for start, stop in schedule.chunks(len(x)):
        positions = torch.arange(start, stop).unsqueeze(0)
        embeddings = {kind: rotary(x, positions, layer_type=kind) for kind in ("main", "compress")}
        kept = min(start, hf_config.sliding_window - 1)  # rows that their cache puts before the chunk
        key_positions = torch.arange(start - kept, stop)
        distance = positions[0].unsqueeze(1) - key_positions
        visible = (distance >= 0) & (distance < hf_config.sliding_window)
        mask = torch.zeros(1, 1, stop - start, len(key_positions)).masked_fill(~visible, -torch.inf)
        with torch.no_grad():
            out, _ = module(
                x[start:stop].unsqueeze(0),
                position_embeddings=embeddings,
                position_ids=positions,
                attention_mask=mask,
                past_key_values=cache,
            )
        outputs.append(out[0])
    if hook is not None:
        hook.remove()
    return torch.cat(outputs), chosen


def run_ours(
    config: DSV4Config, layer: int, module: AttentionSubBlock, xs: list[torch.Tensor], schedule: Schedule
) -> tuple[list[torch.Tensor], list[list[set[int]]]]:
    """The same for all sequences at once: step i takes every sequence's i-th chunk."""
    handle = exact_cache(config, layer, len(xs))
    outputs: list[list[torch.Tensor]] = [[] for _ in xs]
    chosen: list[list[set[int]]] = [[] for _ in xs]
    hook = None
    selected: list[torch.Tensor] = []
    if module.indexer is not None:
        hook = module.indexer.register_forward_hook(lambda _module, _args, indices: selected.append(indices))
    chunks = [schedule.chunks(len(x)) for x in xs]
    for i in range(max(map(len, chunks))):
        members = [s for s in range(len(xs)) if i < len(chunks[s])]
        parts = [xs[s][slice(*chunks[s][i])] for s in members]
        handle.begin_step(members, [len(part) for part in parts])
        out = module(torch.cat(parts), handle).split([len(part) for part in parts])
        for member, rows in zip(members, out, strict=True):
            outputs[member].append(rows)
        if hook is not None:
            for member, rows in zip(members, selected.pop().split([len(part) for part in parts]), strict=True):
                chosen[member].extend({i for i in row if i >= 0} for row in rows.tolist())
    if hook is not None:
        hook.remove()
    return [torch.cat(rows) for rows in outputs], chosen


def exact_cache(config: DSV4Config, layer: int, max_seqs: int) -> LayerCacheHandle:
    handle = LayerCacheHandle(
        config,
        layer,
        max_seqs=max_seqs,
        num_blocks=32,
        entries_per_block=16,
        index_format="fp32",
        kv_format="fp32",
        dtype=torch.float32,
    )
    for seq_id in range(max_seqs):
        handle.alloc(seq_id)
    return handle


def assert_close(ours: torch.Tensor, theirs: torch.Tensor, what: str) -> None:
    error = (ours - theirs).norm(dim=-1) / theirs.norm(dim=-1)
    worst = int(error.argmax())
    assert error[worst] <= RELATIVE_ERROR, f"{what}: relative error {error[worst]:.2e} at token {worst}"


@pytest.mark.parametrize("schedule", SCHEDULES, ids=lambda s: s.name)
@pytest.mark.parametrize("kind", LAYERS)
def test_layer_equals_transformers(hf_config, config, kind, schedule):
    layer = LAYERS[kind]
    theirs, ours = make_layers(hf_config, config, layer)
    xs = [torch.randn(length, hf_config.hidden_size) for length in LENGTHS]
    outputs, chosen = run_ours(config, layer, ours, xs, schedule)
    for s, x in enumerate(xs):
        expected, expected_chosen = run_theirs(hf_config, layer, theirs, x, schedule)
        assert_close(outputs[s], expected, f"{kind} sequence {s} of {len(x)} tokens")
        if kind == "CSA":
            different = [t for t in range(len(x)) if chosen[s][t] != expected_chosen[t]]
            assert not different, f"sequence {s}: selected sets differ at tokens {different[:5]}"


def rope_at_last_token(monkeypatch):
    right = compress_module.apply_rope
    monkeypatch.setattr(compress_module, "apply_rope", lambda x, positions, f: right(x, positions + 3, f))


def sees_one_entry_more(monkeypatch):
    right = LayerCacheHandle.begin_step

    def wrong(self, *args):
        step = right(self, *args)
        later = step.valid_lens + ((step.positions + 2) // 4 - (step.positions + 1) // 4).int()
        have = torch.tensor([self._entries(self._num_tokens[int(s)]) for s in step.seq_ids], dtype=torch.int32)
        self.step = replace(step, valid_lens=torch.minimum(later, have))

    monkeypatch.setattr(LayerCacheHandle, "begin_step", wrong)


def window_one_short(monkeypatch):
    right = LayerCacheHandle.__init__

    def wrong(self, config, *args, **kwargs):
        right(self, replace(config, sliding_window=config.sliding_window - 1), *args, **kwargs)
        self.config = config

    monkeypatch.setattr(LayerCacheHandle, "__init__", wrong)


def halves_swapped(monkeypatch):
    right = Compressor.load_weights

    def wrong(self, weights):
        swapped = {n: w.roll(self.dim, 0) if n in ("wkv.weight", "wgate.weight") else w for n, w in weights.items()}
        right(self, swapped)

    monkeypatch.setattr(Compressor, "load_weights", wrong)


def no_inverse_rope(monkeypatch):
    right = attention_module.apply_rope
    monkeypatch.setattr(attention_module, "apply_rope", lambda x, p, f, inverse=False: x if inverse else right(x, p, f))


@pytest.mark.parametrize(
    "break_it",
    [rope_at_last_token, sees_one_entry_more, window_one_short, halves_swapped, no_inverse_rope],
    ids=lambda f: f.__name__,
)
def test_wrong_layers_are_rejected(hf_config, config, break_it, monkeypatch):
    break_it(monkeypatch)
    with pytest.raises(AssertionError, match="CSA sequence|selected sets differ"):
        test_layer_equals_transformers(hf_config, config, "CSA", SCHEDULES[1])
