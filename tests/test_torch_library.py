"""The operators that torch knows: their schemas and fake kernels, and public functions under `torch.compile`.

Compiled and eager calls must agree bit for bit, in results and in every byte that is written. Most tests compile with
the backend "aot_eager", which takes writes apart and joins them again as the default backend does, without a C++
compiler; what only the default backend decides (whether writes need a copy) is tested with it.
"""

import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace

import pytest
import torch
from cases import assert_same_bits, copy_strided
from torch import Tensor
from torch._dynamo.testing import CompileCounterWithBackend
from torch._subclasses import FakeTensorMode
from torch.fx.experimental.proxy_tensor import make_fx
from torch.utils._python_dispatch import TorchDispatchMode

from lightning_indexer import (
    CacheSchema,
    IndexerView,
    KVView,
    append_entries,
    compute_valid_lens,
    gather_kv,
    index_scores,
    merge_topk,
    quantize_query,
    score_topk,
    score_topk_workspace_bytes,
    select_candidates,
    sparse_attention,
    torch_library,
    visible_entries,
)
from lightning_indexer.tracing import is_traced, query_parts, view_parts

HEADS, DIM, TOP_K, RATIO = 8, 128, 16, 4
INDEX_FORMATS, KV_FORMATS = ("mxfp4", "nvfp4", "fp8", "bf16"), ("fp8_ds_mla", "bf16")
POISON = -7
OPS = torch.ops.lightning_indexer


@pytest.fixture(autouse=True)
def _fresh() -> Iterator[None]:
    torch._dynamo.reset()
    torch.manual_seed(0)
    yield
    torch._dynamo.reset()


def assert_same(got: Tensor, want: Tensor, what: str) -> None:
    """The same shape, dtype and bytes."""
    assert (got.shape, got.dtype) == (want.shape, want.dtype), what
    assert_same_bits(*(x.cpu().contiguous().view(torch.uint8) for x in (got, want)), what)


# --- one decode step: what a compiled model runs ----------------------------------------------------------------


def make_view(kind: type, format: str, dim: int, device: str = "cpu", blocks: int = 12) -> IndexerView | KVView:
    """Three sequences of four blocks in random order, filled."""
    schema = CacheSchema(format, 16, head_dim=dim)
    storage = torch.full((blocks, schema.stride), 0xFF, dtype=torch.uint8, device=device)
    table = torch.randperm(12, dtype=torch.int32, device=device).view(3, 4)
    view = kind(storage, schema, table, 0.5 if format == "nvfp4" else 1.0)
    append_entries(torch.randn(192, dim, device=device), view, torch.arange(192, device=device))
    return view


@dataclass
class Step:
    """Arguments of `decode_step`."""

    q: Tensor
    weights: Tensor
    positions: Tensor
    seq_ids: Tensor
    keys: IndexerView
    kv: KVView
    new_keys: Tensor
    new_kv: Tensor
    slots: Tensor
    window: Tensor

    def copy(self) -> "Step":
        """With storage of its own."""
        device = str(self.q.device)
        keys, kv = (replace(view, storage=copy_strided(view.storage, device)) for view in (self.keys, self.kv))
        return replace(self, keys=keys, kv=kv)


def make_step(format: str = "mxfp4", kv_format: str = "fp8_ds_mla", tokens: int = 5, device: str = "cpu") -> Step:
    def random(*shape: int) -> Tensor:
        return torch.randn(*shape, device=device)

    count = torch.arange(tokens, device=device)
    return Step(
        q=random(tokens, HEADS, DIM),
        weights=random(tokens, HEADS),
        positions=count * 37 % 240,
        seq_ids=(count % 3).to(torch.int32),
        keys=make_view(IndexerView, format, DIM, device),
        kv=make_view(KVView, kv_format, 512, device),
        new_keys=random(tokens, DIM),
        new_kv=random(tokens, 512),
        slots=count * 5 - 1,
        window=random(tokens, 3, 512),
    )


def decode_step(step: Step, query_format: str | None = "mxfp4") -> tuple[Tensor, ...]:
    """Append, score, gather and attend, and something around them for a compiler to work on."""
    append_entries(step.new_keys * 2, step.keys, step.slots)
    append_entries(step.new_kv * 2, step.kv, step.slots)
    q = quantize_query(step.q, query_format) if query_format else step.q
    indices, scores = score_topk(
        q,
        step.weights * 0.5,
        step.keys,
        top_k=TOP_K,
        valid_lens=visible_entries(step.positions, RATIO),
        seq_ids=step.seq_ids,
        return_scores=True,
    )
    selected = gather_kv(step.kv, indices, seq_ids=step.seq_ids)
    valid = torch.cat([indices >= 0, torch.ones_like(step.window[:, :, 0], dtype=torch.bool)], dim=1)
    q_attention = step.q.repeat(1, 1, 4).bfloat16()
    out, lse = sparse_attention(q_attention, selected, step.window, valid=valid, sink=None, softmax_scale=0.05)
    return indices + 0, scores, out * 2, lse


def assert_same_step(run: Callable, step: Step, *options: object) -> None:
    """`run` gives what `decode_step` gives, and leaves the same bytes behind."""
    expected, got = step.copy(), step.copy()
    want = decode_step(expected, *options)
    for name, a, b in zip(("indices", "scores", "out", "lse"), run(got, *options), want, strict=True):
        assert_same(a, b, name)
    assert_same(got.keys.storage, expected.keys.storage, "keys")
    assert_same(got.kv.storage, expected.kv.storage, "KV entries")


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
@pytest.mark.parametrize(
    ("format", "query_format", "kv_format"),
    [
        ("mxfp4", "mxfp4", "fp8_ds_mla"),
        ("nvfp4", "nvfp4", "bf16"),
        ("fp8", "fp8", "fp8_ds_mla"),
        ("bf16", None, "bf16"),
    ],
)
def test_a_compiled_step(format: str, query_format: str | None, kv_format: str, backend: str) -> None:
    compiled = torch.compile(decode_step, fullgraph=True, backend=backend)
    assert_same_step(compiled, make_step(format, kv_format), query_format)


def test_a_compiled_step_takes_other_numbers_of_tokens_without_compiling_again() -> None:
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(decode_step, fullgraph=True, backend=counter)
    for tokens in (5, 2, 33, 7):
        step = make_step(tokens=tokens)
        for x in (step.q, step.weights, step.positions, step.seq_ids, step.new_keys, step.new_kv, step.slots):
            torch._dynamo.mark_dynamic(x, 0)
        torch._dynamo.mark_dynamic(step.window, 0)
        assert_same_step(compiled, step)
    assert counter.frame_count == 1


def test_a_compiled_step_follows_what_its_tensors_hold() -> None:
    compiled, step = torch.compile(decode_step, fullgraph=True, backend="aot_eager"), make_step()
    for _ in range(3):
        assert_same_step(compiled, step)
        step.positions.copy_(step.positions.flip(0))
        step.keys.block_table.copy_(step.keys.block_table.flip(0))
        step.slots.add_(2)


def test_a_compiled_choice_of_candidates_and_what_is_chosen_from_them() -> None:
    def run(step: Step) -> tuple[Tensor, ...]:
        options = {"valid_lens": visible_entries(step.positions, RATIO), "seq_ids": step.seq_ids}
        lists = select_candidates(step.q, step.weights, step.keys, num_blocks=4, **options)
        other = step.weights.flip(0) * 2
        found = score_topk(step.q, other, step.keys, top_k=9, candidates=lists, return_scores=True, **options)
        return lists, *found

    step = make_step()
    got, want = torch.compile(run, fullgraph=True, backend="aot_eager")(step), run(step)
    for name, a, b in zip(("lists", "indices", "scores"), got, want, strict=True):
        assert_same(a, b, name)
    assert (want[0][:, 0] >= 0).any() and (want[1] >= 0).any()


# --- out=, order of writes, aliasing ------------------------------------------------------------------------------


def given(tokens: int, device: str = "cpu") -> dict[str, Tensor]:
    """Outputs in awkward memory, and a workspace."""
    needed = score_topk_workspace_bytes(num_heads=HEADS, head_dim=DIM, top_k=TOP_K, device=device)
    return {
        "out": torch.full((tokens, 2 * TOP_K), POISON, dtype=torch.int32, device=device)[:, ::2],
        "scores_out": torch.full((TOP_K, tokens), POISON, dtype=torch.float32, device=device).t(),
        "workspace": torch.empty(needed, dtype=torch.uint8, device=device),
    }


def score_into(step: Step, outputs: dict[str, Tensor]) -> Tensor:
    lens = visible_entries(step.positions, RATIO)
    return score_topk(
        step.q, step.weights, step.keys, top_k=TOP_K, valid_lens=lens, seq_ids=step.seq_ids, order="score", **outputs
    )


@pytest.mark.parametrize("names", [("out",), ("scores_out",), ("out", "scores_out", "workspace")], ids="-".join)
def test_outputs_of_the_caller_are_written_in_place(names: tuple[str, ...]) -> None:
    step = make_step()
    chosen, wanted = ({name: given(5)[name] for name in names} for _ in range(2))
    want = score_into(step, wanted)
    got = torch.compile(score_into, fullgraph=True, backend="aot_eager")(step, chosen)
    assert_same(got, want, "indices")
    if "out" in names:
        assert got is chosen["out"]
        assert_same(chosen["out"]._base, wanted["out"]._base, "out, and the memory between its columns")
    if "scores_out" in names:
        assert_same(chosen["scores_out"], wanted["scores_out"], "scores_out")


def test_dense_scores_and_gathered_rows_of_the_caller() -> None:
    step = make_step()

    def run(step: Step, dense: Tensor, rows: Tensor) -> tuple[Tensor, Tensor]:
        lens = compute_valid_lens(step.seq_ids, 16)
        scores = index_scores(step.q, step.weights, step.keys, valid_lens=lens, seq_ids=step.seq_ids, out=dense)
        indices = (lens.unsqueeze(1) - 1).expand(-1, 3)
        return scores, gather_kv(step.kv, indices, seq_ids=step.seq_ids, out=rows)

    def memory() -> tuple[Tensor, Tensor]:
        return torch.full((5, 50), float(POISON)), torch.full((5, 3, 512), POISON, dtype=torch.bfloat16)

    chosen, wanted = memory(), memory()
    results, _ = torch.compile(run, fullgraph=True, backend="aot_eager")(step, *chosen), run(step, *wanted)
    for name, a, b, c in zip(("dense", "rows"), chosen, wanted, results, strict=True):
        assert c is a
        assert_same(a, b, name)


def test_dense_scores_find_their_own_width_where_scalars_may_be_captured() -> None:
    step = make_step()

    def run(step: Step) -> Tensor:
        lens = visible_entries(step.positions, RATIO)
        return index_scores(step.q, step.weights, step.keys, valid_lens=lens, seq_ids=step.seq_ids)

    with torch._dynamo.config.patch(capture_scalar_outputs=True):
        got = torch.compile(run, fullgraph=True, backend="aot_eager")(step)
    assert_same(got, run(step), "dense scores")


def test_reads_and_writes_keep_their_order() -> None:
    step = make_step()

    def run(step: Step) -> tuple[Tensor, Tensor, Tensor]:
        options = {"top_k": TOP_K, "seq_ids": step.seq_ids, "return_scores": True, "order": "score"}
        options["valid_lens"] = torch.full_like(step.seq_ids, 64)
        _, before = score_topk(step.q, step.weights, step.keys, **options)
        append_entries(step.new_keys * 9, step.keys, step.slots)
        _, after = score_topk(step.q, step.weights, step.keys, **options)
        step.keys.storage.zero_()
        _, cleared = score_topk(step.q, step.weights, step.keys, **options)
        return before, after, cleared

    want = run(step.copy())
    got = torch.compile(run, fullgraph=True, backend="aot_eager")(step.copy())
    for name, a, b in zip(("before", "after", "cleared"), got, want, strict=True):
        assert_same(a, b, name)
    assert not torch.equal(want[0], want[1]) and not want[2].any()


def interleaved_views(blocks: int = 4) -> tuple[IndexerView, KVView]:
    """Index keys and KV entries of a block side by side in one slab, as engines lay out the layers of a page."""
    keys, kv = CacheSchema("mxfp4", 16), CacheSchema("bf16", 16, head_dim=512)
    stride = keys.stride + kv.stride
    slab = torch.zeros(blocks, stride, dtype=torch.uint8)
    table = torch.arange(blocks, dtype=torch.int32).unsqueeze(0)
    first, second = slab[:, : keys.stride], slab[:, keys.stride :]
    return (
        IndexerView(first, replace(keys, block_stride=stride), table),
        KVView(second, replace(kv, block_stride=stride), table),
    )


def test_views_that_share_their_memory() -> None:
    values, rows, slots = torch.randn(9, DIM), torch.randn(9, 512), torch.arange(9) * 7

    def run(keys: IndexerView, kv: KVView) -> tuple[Tensor, Tensor]:
        append_entries(values, keys, slots)
        append_entries(rows, kv, slots)
        append_entries(-values, keys, slots + 1)
        lens = torch.full((1,), 64, dtype=torch.int32)
        best = score_topk(values[:8].unsqueeze(0), torch.ones(1, 8), keys, top_k=9, valid_lens=lens)
        return best, gather_kv(kv, best)

    expected, got = interleaved_views(), interleaved_views()
    want = run(*expected)
    results = torch.compile(run, fullgraph=True, backend="aot_eager")(*got)
    for name, a, b in zip(("indices", "rows"), results, want, strict=True):
        assert_same(a, b, name)
    assert_same(got[0].storage._base, expected[0].storage._base, "the slab")
    assert want[1].any()


def test_views_and_queries_may_be_made_inside() -> None:
    step = make_step()
    layouts = [(view.schema, view.block_table) for view in (step.keys, step.kv)]

    def run(key_storage: Tensor, kv_storage: Tensor) -> tuple[Tensor, ...]:
        (key_schema, key_table), (kv_schema, kv_table) = layouts
        keys, kv = IndexerView(key_storage, key_schema, key_table), KVView(kv_storage, kv_schema, kv_table)
        return decode_step(replace(step, keys=keys, kv=kv))

    expected, got = ([copy.keys.storage, copy.kv.storage] for copy in (step.copy(), step.copy()))
    want = run(*expected)
    for a, b in zip(torch.compile(run, fullgraph=True, backend="aot_eager")(*got), want, strict=True):
        assert_same(a, b, "results")
    for a, b in zip(got, expected, strict=True):
        assert_same(a, b, "storage")


# --- the default backend ------------------------------------------------------------------------------------------


def addresses(monkeypatch: pytest.MonkeyPatch) -> dict[str, list[int]]:
    """Where the operators find storage, out and workspace, from now on."""
    found: dict[str, list[int]] = {"append": [], "score": [], "out": [], "workspace": []}
    append, score = torch_library.eager_append_entries, torch_library.eager_score_topk

    def seen_append(entries: Tensor, view: IndexerView, *rest: object) -> None:
        found["append"].append(view.storage.data_ptr())
        append(entries, view, *rest)

    def seen_score(q: object, weights: Tensor, view: IndexerView, *rest: object) -> object:
        found["score"].append(view.storage.data_ptr())
        found["out"].append(rest[6].data_ptr())
        found["workspace"].append(rest[8].data_ptr())
        return score(q, weights, view, *rest)

    monkeypatch.setattr(torch_library, "eager_append_entries", seen_append)
    monkeypatch.setattr(torch_library, "eager_score_topk", seen_score)
    return found


def append_and_score(step: Step, outputs: dict[str, Tensor]) -> Tensor:
    append_entries(step.new_keys * 2, step.keys, step.slots)
    return score_into(step, outputs) + 1


def check_nothing_is_copied(step: Step, monkeypatch: pytest.MonkeyPatch) -> None:
    """Compiled by the default backend: a pool fills most of a GPU, so that even one copy would be too many."""
    device = str(step.q.device)
    chosen, wanted = given(5, device), given(5, device)
    want = append_and_score(step.copy(), wanted)
    found = addresses(monkeypatch)
    got = torch.compile(append_and_score, fullgraph=True)(step, chosen)
    assert_same(got, want, "indices")
    assert_same(chosen["scores_out"], wanted["scores_out"], "scores_out")
    pool, out, workspace = step.keys.storage, chosen["out"], chosen["workspace"]
    assert found == {
        "append": [pool.data_ptr()],
        "score": [pool.data_ptr()],
        "out": [out.data_ptr()],
        "workspace": [workspace.data_ptr()],
    }


@pytest.mark.skipif(not any(map(shutil.which, ("g++", "clang++"))), reason="needs a C++ compiler")
def test_the_default_backend_copies_neither_the_pool_nor_the_outputs(monkeypatch: pytest.MonkeyPatch) -> None:
    check_nothing_is_copied(make_step(), monkeypatch)


# --- the operators themselves -------------------------------------------------------------------------------------


def score_arguments(step: Step, query_format: str | None) -> tuple:
    q = quantize_query(step.q, query_format) if query_format else step.q
    if query_format == "nvfp4":
        q = replace(q, scale=q.scale.view(torch.uint8))  # opcheck computes with what it is given, and cannot with E4M3
    parts = (*query_parts(q), step.weights, *view_parts("", step.keys, IndexerView))
    return (*parts, visible_entries(step.positions, RATIO), step.seq_ids)


def samples(device: str = "cpu") -> dict[str, tuple[Callable, tuple]]:
    """Operators and arguments, for `torch.library.opcheck`."""
    ops = OPS
    found: dict[str, tuple[Callable, tuple]] = {}
    for format, query_format in (("mxfp4", "mxfp4"), ("nvfp4", "nvfp4"), ("fp8", None), ("bf16", None)):
        step = make_step(format, device=device)
        arguments, outputs = score_arguments(step, query_format), given(5, device)
        everything = (*outputs.values(), TOP_K, "score", "slot")
        found[f"score_topk-{format}"] = ops.score_topk.default, (*arguments, *everything)
        only_out = (outputs["out"].contiguous(), None, None, TOP_K)
        found[f"score_topk-{format}-out"] = ops.score_topk.default, (*arguments, *only_out)
        lists = torch.tensor([[0, 2, 5], [1, -1, -1], [0, 1, 7], [3, 4, -1], [-1, -1, -1]], device=device).int()
        options = ("index", "entry", None, "auto", lists, 8)
        found[f"score_topk-{format}-candidates"] = ops.score_topk.default, (*arguments, *only_out, *options)
        blocks = torch.zeros(5, 3, dtype=torch.int32, device=device)
        found[f"select_candidates-{format}"] = ops.select_candidates.default, (*arguments, blocks)
        found[f"index_scores-{format}"] = ops.index_scores.default, (*arguments, torch.zeros(5, 70, device=device))
        parts = view_parts("", step.keys, IndexerView)
        found[f"append_entries-{format}"] = ops.append_entries.default, (step.new_keys, *parts, step.slots)
    for format in KV_FORMATS:
        step = make_step(kv_format=format, device=device)
        parts, indices = view_parts("", step.kv, KVView), torch.tensor([[5, -1, 0]] * 3, device=device)
        rows = torch.zeros(3, 3, 512, dtype=torch.bfloat16, device=device)
        found[f"append_entries-kv-{format}"] = ops.append_entries.default, (step.new_kv, *parts, step.slots)
        found[f"gather_kv-{format}"] = ops.gather_kv.default, (*parts, indices, step.seq_ids[:3], rows)
        found[f"gather_kv-{format}-own-rows"] = ops.gather_kv.default, (*parts, indices, None, rows)
    step = make_step(device=device)
    scores, indices = step.weights, torch.arange(40, device=device, dtype=torch.int32).view(5, 8)
    for name, top_k in (("merge_topk", 3), ("merge_topk-more-than-there-are", 11)):
        outputs = indices.new_zeros(5, top_k), scores.new_zeros(5, top_k)
        found[name] = ops.merge_topk.default, (indices, scores, *outputs)
    for sink in (None, torch.zeros(HEADS, device=device)):
        valid = torch.ones(5, 6, dtype=torch.bool, device=device)
        arguments = (
            step.q.bfloat16(),
            step.new_keys.view(5, 1, DIM).expand(-1, 4, -1),
            step.q[:, :2],
            valid,
            sink,
            0.1,
        )
        found[f"sparse_attention-sink-{sink is not None}"] = ops.sparse_attention.default, arguments
    found["visible_entries"] = ops.visible_entries.default, (step.positions, RATIO)
    found["visible_entries-columns"] = ops.visible_entries.default, (step.positions.view(1, 5).t(), RATIO)
    found["compute_valid_lens"] = ops.compute_valid_lens.default, (step.seq_ids, 64)
    return found


torch.manual_seed(0)
SAMPLES = samples()


@pytest.mark.parametrize("name", SAMPLES)
def test_opcheck(name: str) -> None:
    torch.library.opcheck(*SAMPLES[name])


def test_opcheck_of_fp8_queries() -> None:
    """But for the check of the schema, which multiplies what it is given, and so takes no E4M3."""
    arguments = (*score_arguments(make_step("fp8"), "fp8"), *given(5).values(), TOP_K)
    others = ("test_autograd_registration", "test_faketensor", "test_aot_dispatch_dynamic")
    torch.library.opcheck(OPS.score_topk.default, arguments, test_utils=others)


def test_there_is_a_sample_of_every_operator() -> None:
    registered = {
        name.split("::")[1].split(".")[0] for name in torch._C._dispatch_get_all_op_names() if OPS.name in name
    }
    assert registered == {name.split("-")[0] for name in SAMPLES}


WRITTEN = {
    "append_entries": ["storage"],
    "gather_kv": ["out"],
    "index_scores": ["out"],
    "score_topk": ["out", "scores_out", "workspace"],
    "select_candidates": ["out"],
    "merge_topk": ["out", "scores_out"],
    "sparse_attention": [],
    "visible_entries": [],
    "compute_valid_lens": [],
}


@pytest.mark.parametrize("name", WRITTEN)
def test_schemas_say_what_is_written(name: str) -> None:
    arguments = getattr(OPS, name).default._schema.arguments
    assert [x.name for x in arguments if x.alias_info is not None and x.alias_info.is_write] == WRITTEN[name]


@pytest.mark.parametrize("query_format", ["mxfp4", "nvfp4", "fp8", None], ids=str)
def test_operators_give_what_public_functions_give(query_format: str | None) -> None:
    step, outputs, wanted = make_step(), given(5), given(5)
    q = quantize_query(step.q, query_format) if query_format else step.q
    if query_format == "nvfp4":
        q = replace(q, global_scale=0.25)
    lens = visible_entries(step.positions, RATIO)
    parts = (*query_parts(q), step.weights, *view_parts("", step.keys, IndexerView))
    OPS.score_topk(*parts, lens, step.seq_ids, *outputs.values(), TOP_K, order="score", output="slot")
    options = {"top_k": TOP_K, "valid_lens": lens, "seq_ids": step.seq_ids, "order": "score", "output": "slot"}
    score_topk(q, step.weights, step.keys, **options, **wanted)
    assert_same(outputs["out"], wanted["out"], "slots")
    assert_same(outputs["scores_out"], wanted["scores_out"], "scores")


def test_a_compiled_merge_is_one_call_with_the_bits_of_an_eager_one() -> None:
    scores = torch.tensor([[-0.0, 0.0, torch.nan, -torch.inf, 2.0, 2.0]])
    indices = torch.tensor([[3, 5, 1, 2, 9, 8]], dtype=torch.int32)
    counter = CompileCounterWithBackend("aot_eager")
    got = torch.compile(merge_topk, fullgraph=True, backend=counter)(indices, scores, top_k=7)
    assert got[0].tolist() == [[8, 9, 3, 5, 2, 1, -1]]
    for name, a, b in zip(("indices", "scores"), got, merge_topk(indices, scores, top_k=7), strict=True):
        assert_same(a, b, name)
    assert OPS.merge_topk in [node.target for node in counter.graphs[0].graph.nodes]


def test_nothing_has_a_gradient() -> None:
    step = make_step()
    step.q.requires_grad_(), step.weights.requires_grad_(), step.window.requires_grad_()
    for run in (decode_step, torch.compile(decode_step, fullgraph=True, backend="aot_eager")):
        assert not any(x.requires_grad for x in run(step.copy()))
    operator, (indices, scores, *outputs) = SAMPLES["merge_topk"]
    operator(indices, scores.clone().requires_grad_(), *outputs)
    assert not outputs[1].requires_grad


# --- tracing without values ---------------------------------------------------------------------------------------


def calls(step: Step) -> tuple[Tensor, ...]:
    """Every public function once, and no operator of torch's own that computes: of those, torch wants a device."""
    append_entries(step.new_keys, step.keys, step.slots)
    lens = visible_entries(step.positions, RATIO)
    options = {"seq_ids": step.seq_ids, "valid_lens": compute_valid_lens(step.seq_ids, 16)}
    results = score_topk(step.q, step.weights, step.keys, top_k=TOP_K, return_scores=True, **options)
    dense = index_scores(step.q, step.weights, step.keys, out=torch.empty_like(step.new_keys), **options)
    lists = select_candidates(step.q, step.weights, step.keys, num_blocks=3, **options)
    listed = score_topk(step.q, step.weights, step.keys, top_k=5, candidates=lists, **options)
    rows = gather_kv(step.kv, results[0], seq_ids=step.seq_ids)
    valid = torch.empty(5, 2 * TOP_K, dtype=torch.bool, device=step.q.device)
    query = torch.empty(5, HEADS, 512, dtype=torch.bfloat16, device=step.q.device)
    attended = sparse_attention(query, rows, rows, valid=valid, sink=None, softmax_scale=1.0)
    return lens, *results, lists, listed, dense, rows, *attended, *merge_topk(*results, top_k=3)


@pytest.mark.parametrize("device", ["cpu", "cuda"])
def test_fake_tensors_have_the_shapes_of_real_ones(device: str) -> None:
    want = calls(make_step())
    with FakeTensorMode():
        got = calls(make_step(device=device))
    for a, b in zip(got, want, strict=True):
        assert (a.shape, a.dtype, a.stride(), a.device.type) == (b.shape, b.dtype, b.stride(), device)


def test_a_traced_graph_has_one_node_for_each_call() -> None:
    step = make_step()

    def run(q: Tensor, weights: Tensor, positions: Tensor) -> tuple[Tensor, ...]:
        return decode_step(replace(step, q=q, weights=weights, positions=positions))

    graph = make_fx(run)(step.q, step.weights, step.positions)
    called = [node.target for node in graph.graph.nodes if str(node.target).startswith("lightning_indexer.")]
    assert called == [
        getattr(OPS, name).default
        for name in (
            "append_entries",
            "append_entries",
            "visible_entries",
            "score_topk",
            "gather_kv",
            "sparse_attention",
        )
    ]


def test_export() -> None:
    step = make_step()

    class Selector(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.register_buffer("storage", step.keys.storage)
            self.register_buffer("block_table", step.keys.block_table)

        def forward(self, q: Tensor, weights: Tensor, valid_lens: Tensor, seq_ids: Tensor) -> Tensor:
            view = IndexerView(self.storage, CacheSchema("mxfp4", 16), self.block_table)
            return score_topk(q, weights, view, top_k=TOP_K, valid_lens=valid_lens, seq_ids=seq_ids)

    arguments = (step.q, step.weights, visible_entries(step.positions, RATIO), step.seq_ids)
    exported = torch.export.export(Selector(), arguments)
    assert_same(exported.module()(*arguments), Selector()(*arguments), "indices")


def test_ordinary_calls_spare_the_dispatcher() -> None:
    class Watch(TorchDispatchMode):
        names: list[str] = []

        def __torch_dispatch__(self, func: Callable, types: tuple, args: tuple = (), kwargs: dict | None = None):
            self.names.append(str(func))
            return func(*args, **(kwargs or {}))

    assert not is_traced()
    with Watch() as watch:
        assert not is_traced()
        decode_step(make_step())
    assert watch.names and not any("lightning_indexer" in name for name in watch.names)
    with FakeTensorMode():
        assert is_traced()


# --- bad input ------------------------------------------------------------------------------------------------------


def wrong_slots(step: Step) -> None:
    append_entries(step.new_keys, step.keys, step.slots + 1000)


def wrong_lens(step: Step) -> Tensor:
    outputs = {"out": step.seq_ids.new_full((5, TOP_K), POISON)}
    lens = torch.full_like(step.seq_ids, 65)
    return score_topk(step.q, step.weights, step.keys, top_k=TOP_K, valid_lens=lens, seq_ids=step.seq_ids, **outputs)


def wrong_dtype(step: Step) -> Tensor:
    lens = step.seq_ids.long()
    return score_topk(step.q, step.weights, step.keys, top_k=TOP_K, valid_lens=lens, seq_ids=step.seq_ids)


def wrong_view(step: Step) -> Tensor:
    return score_topk(step.q, step.weights, step.kv, top_k=TOP_K, valid_lens=step.seq_ids, seq_ids=step.seq_ids)


def wrong_top_k(step: Step) -> Tensor:
    return score_topk(step.q, step.weights, step.keys, top_k=-3, valid_lens=step.seq_ids, seq_ids=step.seq_ids)


def wrong_out(step: Step) -> Tensor:
    return gather_kv(step.kv, step.seq_ids.view(5, 1), seq_ids=step.seq_ids, out=step.window[:, :1])


def wrong_positions(step: Step) -> Tensor:
    return visible_entries(step.positions - 2, RATIO)


def wrong_candidates(step: Step) -> Tensor:
    lists = torch.tensor([[2, 1]] * 5, dtype=torch.int32)
    lens = torch.full_like(step.seq_ids, 64)
    return score_topk(
        step.q, step.weights, step.keys, top_k=TOP_K, valid_lens=lens, seq_ids=step.seq_ids, candidates=lists
    )


WRONG = [wrong_candidates, wrong_slots, wrong_lens, wrong_dtype, wrong_view, wrong_top_k, wrong_out, wrong_positions]


@pytest.mark.parametrize("wrong", WRONG, ids=lambda f: f.__name__)
def test_compiled_calls_refuse_with_the_same_words_and_write_nothing(wrong: Callable) -> None:
    step = make_step()
    before = step.copy()
    with pytest.raises((ValueError, TypeError)) as expected:
        wrong(step)
    with pytest.raises(Exception) as found:
        torch.compile(wrong, fullgraph=True, backend="aot_eager")(step)
    assert str(expected.value) in str(found.value)
    assert_same(step.keys.storage, before.keys.storage, "keys")
