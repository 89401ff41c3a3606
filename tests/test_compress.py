"""compress_entries and pooled_entries on a CPU: against the definition in float64, and what they refuse."""

from types import SimpleNamespace

import pytest
import torch

from lightning_indexer import CacheSchema, IndexerView, append_entries
from lightning_indexer.cache.ring import TokenRing
from lightning_indexer.ops.compress import compress_entries, pooled_entries
from lightning_indexer.rotary import apply_rope, hadamard, rope_frequencies

RATIO, DIM = 4, 64


def make_step(start: int, count: int, extra: int = 0) -> SimpleNamespace:
    """One sequence, id 2; `extra` rows of no entry."""
    entries = torch.arange(start // RATIO, (start + count) // RATIO)
    none = torch.full((extra,), -1)
    return SimpleNamespace(
        positions=torch.arange(start, start + count),
        seq_ids=torch.full((count,), 2, dtype=torch.int32),
        batch_rows=torch.zeros(count, dtype=torch.int64),
        seqs=torch.tensor([2]),
        starts=torch.tensor([start]),
        offsets=torch.tensor([0]),
        entry_rows=torch.cat([torch.zeros_like(entries), none]),
        entry_indices=torch.cat([entries, none]),
        counts=(count,),
    )


def make_ring() -> TokenRing:
    return TokenRing(3, 2 * RATIO, (2, 2 * DIM), dtype=torch.float32, device="cpu")


def options(**changes: object) -> dict:
    torch.manual_seed(3)
    given = {
        "ape": torch.randn(RATIO, 2 * DIM),
        "norm": torch.rand(DIM) + 0.5,
        "frequencies": rope_frequencies(32, 160_000.0),
        "eps": 1e-6,
        "rotate": True,
        "dtype": torch.float32,
    }
    return {**given, **changes}


def definition(values: torch.Tensor, gates: torch.Tensor, given: dict) -> torch.Tensor:
    """All entries of a sequence from its first token on, in float64."""
    values, gates = (
        values.double(),
        gates.double() + given["ape"].double().repeat(len(gates) // RATIO + 1, 1)[: len(gates)],
    )
    entries = []
    for w in range(len(values) // RATIO):
        own = slice(w * RATIO, (w + 1) * RATIO)
        pooled = [(values[own, DIM:], gates[own, DIM:])]
        if w:
            before = slice((w - 1) * RATIO, w * RATIO)
            pooled.append((values[before, :DIM], gates[before, :DIM]))
        value, gate = (torch.cat(part) for part in zip(*pooled, strict=True))
        entries.append((gate.softmax(0) * value).sum(0))
    x = torch.stack(entries)
    x = x / (x.square().mean(-1, keepdim=True) + given["eps"]).sqrt() * given["norm"].double()
    x = apply_rope(x, torch.arange(len(x)) * RATIO, given["frequencies"])
    return hadamard(x) if given["rotate"] else x


@pytest.mark.parametrize("rotate", [True, False], ids=["hadamard", "plain"])
@pytest.mark.parametrize("sizes", [[37], [1] * 37, [5, 1, 9, 2, 20]], ids=["prefill", "decode", "chunks"])
def test_entries_are_those_of_the_definition_however_tokens_come(sizes: list[int], rotate: bool) -> None:
    given, ring = options(rotate=rotate), make_ring()
    values, gates = torch.randn(37, 2 * DIM), 3 * torch.randn(37, 2 * DIM)
    parts, start = [], 0
    for size in sizes:
        step, part = make_step(start, size), slice(start, start + size)
        parts.append(pooled_entries(values[part], gates[part], step, ring, **given))
        start += size
    got, want = torch.cat(parts), definition(values, gates, given)
    # a dozen roundings of fp32 in the pooled sum, the norm and seven steps of the Hadamard rotation; entries of norm 8
    assert (got - want).abs().max() < 32 * 2.0**-24 * 8, f"worst difference {(got - want).abs().max():.1e}"


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", "bf16", "fp32"])
def test_what_is_written_is_pooled_then_appended(format: str, impl: str) -> None:
    schema, table = CacheSchema(format, 16, head_dim=DIM), torch.zeros(1, 1, dtype=torch.int32)
    views = [IndexerView(torch.full((2, schema.stride), 0xA5, dtype=torch.uint8), schema, table) for _ in range(2)]
    rings, step = [make_ring(), make_ring()], make_step(2, 13, extra=2)
    values, gates = torch.randn(13, 2 * DIM), torch.randn(13, 2 * DIM)
    for ring in rings:
        ring.rows[2] = torch.arange(16.0).view(8, 2, 1) / 16
    slots, given = torch.tensor([30, 3, 17, -1, -1]), options(dtype=torch.bfloat16)
    compress_entries(values, gates, step, rings[0], views[0], slots, **given, impl=impl)
    append_entries(pooled_entries(values, gates, step, rings[1], **given), views[1], slots)
    assert torch.equal(views[0].storage, views[1].storage)
    assert torch.equal(rings[0].rows, rings[1].rows)


def test_rows_of_no_entry_stay_finite() -> None:
    entries = pooled_entries(
        torch.randn(1, 2 * DIM), torch.randn(1, 2 * DIM), make_step(4, 1, extra=1), make_ring(), **options()
    )
    assert entries.shape == (1, DIM) and entries.isfinite().all()


@pytest.mark.parametrize("scale", [1e3, 1e30], ids=str)
def test_large_gates_choose_one_token(scale: float) -> None:
    """A weight of 1 and all others 0: the pooled vector is one token's value, in every channel another's."""
    gates, values = scale * torch.rand(4, 2 * DIM).argsort(0), torch.randn(4, 2 * DIM)
    given = options(rotate=False, norm=torch.ones(DIM), ape=torch.zeros(RATIO, 2 * DIM))
    (got,) = pooled_entries(values, gates, make_step(0, 4), make_ring(), **given)
    chosen = values[:, DIM:].gather(0, gates[:, DIM:].argmax(0, keepdim=True))[0]
    want = chosen / chosen.square().mean().sqrt()
    torch.testing.assert_close(got, want, rtol=1e-5, atol=1e-5)  # eps is 1e-6 of the mean square


VALUES = torch.zeros(5, 2 * DIM)


@pytest.mark.parametrize(
    ("changes", "error", "message"),
    [
        ({"values": VALUES[:4]}, ValueError, r"values must have shape \[5, 128\], got \[4, 128\]"),
        ({"values": VALUES.bfloat16()}, TypeError, "values must be float32, got bfloat16"),
        ({"gates": VALUES[:, :DIM]}, ValueError, r"gates must have shape \[5, 128\], got \[5, 64\]"),
        ({"ape": torch.zeros(4, 96)}, ValueError, "ape must have 64 or 128 channels, as norm has 64, got 96"),
        ({"norm": torch.ones(128)}, ValueError, r"norm must have shape \[64\], got \[128\]"),
        ({"norm": torch.ones(DIM).double()}, TypeError, "norm must be bfloat16 or float32 or float16, got float64"),
        ({"frequencies": torch.ones(33)}, ValueError, "frequencies must be those of 2 to 64 dims, got 66"),
        ({"slots": torch.tensor([0, 1])}, ValueError, r"slots must have shape \[1\], got \[2\]"),
        ({"slots": torch.tensor([0.0])}, TypeError, "slots must be int64 or int32, got float32"),
        (
            {"ring": SimpleNamespace(rows=torch.zeros(3, 4, 2, 128))},
            ValueError,
            r"ring must have shape \[3, 8, 2, 128\]",
        ),
        ({"view": torch.zeros(1)}, TypeError, "view must be an IndexerView or a KVView, got Tensor"),
        ({"impl": "cuda"}, NotImplementedError, "impl='cuda' does not serve tensors on cpu"),
    ],
    ids=lambda value: "-".join(value) if isinstance(value, dict) else "",
)
def test_wrong_use_is_told_in_one_line(changes: dict, error: type[Exception], message: str) -> None:
    schema = CacheSchema("mxfp4", 16, head_dim=DIM)
    storage = torch.zeros(1, schema.stride, dtype=torch.uint8)
    view = IndexerView(storage, schema, torch.zeros(1, 1, dtype=torch.int32))
    arguments = {"values": VALUES, "gates": VALUES, "step": make_step(0, 5), "ring": make_ring(), "view": view}
    arguments = {**arguments, "slots": torch.tensor([0]), **options(), **changes}
    with pytest.raises(error, match=f"compress_entries: {message}"):
        compress_entries(**arguments)
    assert (storage == 0).all()
