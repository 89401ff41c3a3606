"""The benchmark: it checks before it times, its peer computes the same selection, and it writes what it says."""

import io
import json
from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
from rich.console import Console
from test_layer import tiny_config
from typer.testing import CliRunner

from lightning_indexer import (
    AttentionSubBlock,
    CacheSchema,
    Fp8BlockLinear,
    IndexerView,
    index_scores,
    quantize_query,
    score_topk,
)
from lightning_indexer.bench import command
from lightning_indexer.bench import run as bench_run
from lightning_indexer.bench.agreement import CPU_BAND, CUDA_BAND, CUDA_FP8_BAND, compare, promised_band
from lightning_indexer.bench.cases import QUICK_GRID, Case, make_operands
from lightning_indexer.bench.command import select_cases
from lightning_indexer.bench.cuda import cases as cuda_cases
from lightning_indexer.bench.cuda import checks, fused, gpu, layer, peers, plot, screen
from lightning_indexer.bench.cuda import run as cuda_run
from lightning_indexer.bench.cuda.cases import AppendCase, GatherCase, Relative, ScoringCase, Target
from lightning_indexer.bench.cuda.operands import make_append, make_gather, make_scoring
from lightning_indexer.bench.peers import peer
from lightning_indexer.cli import app
from lightning_indexer.demo.options import DemoError

CPU = torch.device("cpu")


def run(*arguments: str):
    return CliRunner().invoke(app, list(arguments))


def test_bench_checks_times_and_draws(tmp_path):
    result = run("bench", "--quick", "--device", "cpu", "--repeats", "1", "--output", str(tmp_path))
    assert result.exit_code == 0, result.output
    records = [json.loads(line) for line in (tmp_path / "cpu.jsonl").read_text().splitlines()]
    assert [record["tokens"] for record in records] == [1, 16]
    assert all(record["median_s"] > 0 and record["peak_extra_bytes"] >= 0 for record in records)
    assert (tmp_path / "cpu.png").read_bytes().startswith(b"\x89PNG")


def test_bench_times_the_peer_on_a_right_selection():
    case = Case("prefill", 3, 2, 300, top_k=20)
    operands = make_operands(case)
    theirs = peer("transformers", case, operands)().sort(dim=1).values
    ours = score_topk(
        operands.query,
        operands.weights,
        operands.view,
        top_k=20,
        valid_lens=operands.valid_lens,
        seq_ids=operands.seq_ids,
    )
    assert theirs.tolist() == ours.tolist()


def test_bench_times_nothing_wrong(monkeypatch):
    right = bench_run.score_topk
    monkeypatch.setattr(bench_run, "score_topk", lambda *args, **kwargs: (right(*args, **kwargs) - 1).clamp_min(0))
    with pytest.raises(AssertionError, match="choices agree with float64"):
        list(bench_run.run_grid(QUICK_GRID[:1]))


def test_bench_refuses_an_unknown_peer(tmp_path):
    result = run("bench", "--peer", "nobody", "--output", str(tmp_path))
    message = "error: --peer must be one of transformers, deep_gemm, flashinfer, got nobody"
    assert result.exit_code == 2 and message in result.output


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "tpu"), "--device must be one of auto, cpu, cuda, got 'tpu'"),
        (
            ("--device", "cpu", "--only", "nothing"),
            "--only nothing: no case has that in its name, such as decode-1x1-entries8192",
        ),
    ],
    ids=["device", "only"],
)
def test_bench_refuses_what_cannot_be_meant(arguments, message, tmp_path):
    result = run("bench", *arguments, "--output", str(tmp_path))
    assert result.exit_code == 2 and message in result.output
    assert not list(tmp_path.iterdir())


def test_auto_takes_the_gpu_where_the_kernels_run(monkeypatch):
    console = Console(file=io.StringIO())

    def chosen(device: str, has_gpu: bool, obstacle: str | None) -> str:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: has_gpu)
        monkeypatch.setattr(command, "obstacle", lambda: obstacle)
        return command.choose_device(device, console)

    assert [chosen(name, True, None) for name in ("auto", "cpu", "cuda")] == ["cuda", "cpu", "cuda"]
    assert chosen("auto", False, "no GPU") == "cpu" and not console.file.getvalue()
    assert chosen("auto", True, "no compiler") == "cpu" and "not used: no compiler" in console.file.getvalue()
    with pytest.raises(DemoError, match="--device cuda: no compiler"):
        chosen("cuda", True, "no compiler")


def test_only_selects_by_name():
    chosen = select_cases(cuda_cases.GRID, ["portable", "gather-64"])
    assert [case.name for case in chosen] == [
        "decode-64x1-entries65536-k512-mxfp4-portable",
        "decode-64x1-entries262144-k512-mxfp4-portable",
        "prefill-1x8192-entries65536-k512-mxfp4-portable",
        "gather-64x512-fp8_ds_mla",
        "gather-64x512-bf16",
    ]
    assert select_cases(cuda_cases.GRID, []) == list(cuda_cases.GRID)


# --- agreement --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("format", "query_format", "band"),
    [
        ("mxfp4", "mxfp4", CUDA_FP8_BAND),
        ("mxfp4", "fp8", CUDA_FP8_BAND),
        ("fp8", "fp8", CUDA_FP8_BAND),
        ("fp8", "mxfp4", CUDA_FP8_BAND),
        ("nvfp4", "nvfp4", CUDA_BAND),
        ("mxfp4", "nvfp4", CUDA_BAND),
        ("nvfp4", "fp8", CUDA_BAND),
        ("mxfp4", "bf16", CUDA_BAND),
        ("bf16", "bf16", CUDA_BAND),
    ],
)
def test_band_follows_the_arithmetic(format, query_format, band):
    schema, q = CacheSchema(format), torch.randn(1, 8, 128)
    query = q.bfloat16() if query_format == "bf16" else quantize_query(q, query_format)
    views = []
    for device in ("cpu", "meta"):  # "meta" stands for a device that is no CPU
        storage = torch.zeros(1, schema.stride, dtype=torch.uint8, device=device)
        views.append(IndexerView(storage, schema, torch.zeros(1, 1, dtype=torch.int32, device=device)))
    assert [promised_band(view, query) for view in views] == [CPU_BAND, band]


def test_what_is_no_entry_agrees_with_nothing():
    case = SMALL
    operands = make_scoring(case, CPU)
    chosen = cuda_run.public_calls(case, operands).given()[:1]
    length = int(operands.valid_lens[0])
    arguments = (operands.query[:1], operands.weights[:1], operands.view)
    assert compare(*arguments, chosen, num_entries=length).complete
    chosen = torch.where(chosen == chosen.max(), length, chosen)
    assert compare(*arguments, chosen, num_entries=length).agreeing == case.top_k - 1


# --- the GPU grid: its data -------------------------------------------------------------------------------------


def test_names_are_unique_and_targets_refer_to_earlier_cases():
    for grid in (cuda_cases.GRID, cuda_cases.QUICK_GRID):
        names = [case.name for case in grid]
        assert len(set(names)) == len(names)
        for i, case in enumerate(grid):
            if isinstance(case, ScoringCase) and case.at_most is not None:
                assert case.at_most.case in names[:i], case.name


def test_grid_holds_every_kind():
    names = [case.name for case in cuda_cases.GRID]
    assert sum(name.startswith("decode") for name in names) == 13 + 4 + 4 + 2
    assert sum(name.startswith("prefill") for name in names) == 4 + 2 + 4 + 1
    assert sum(name.startswith("gather") for name in names) == 4
    assert sum(name.startswith("append") for name in names) == 10
    assert all(case.target_percent == Target(70, 70) for case in cuda_cases.APPEND), "asked for in either order"


def test_counts_of_a_decode_case():
    case = ScoringCase("decode", 1, 64, 262_144)
    assert case.lens().tolist() == [262_144]
    assert case.pairs == 64 * 262_144
    assert case.flop == 64 * 262_144 * 16_384
    assert case.key_bytes == 64 * 262_144 * 68
    assert case.dense_bytes == 64 * 262_144 * 4
    assert replace(case, format="bf16", query_format="bf16").key_bytes == 64 * 262_144 * 256


def test_counts_of_two_tokens_and_of_a_prefill():
    assert ScoringCase("decode", 2, 64, 65_536).lens().tolist() == [65_535, 65_536]
    case = ScoringCase("prefill", 8, 1, 100)
    assert case.lens().tolist() == [98, 98, 98, 99, 99, 99, 99, 100]  # tokens 392 .. 399 of 400
    assert case.flop == 790 * 2 * 64 * 128
    assert case.key_bytes == 6_800


def test_counts_of_moving_cases():
    assert GatherCase(64, "fp8_ds_mla").moved_bytes == 64 * 512 * (584 + 4 + 1024)
    assert GatherCase(256, "bf16").moved_bytes == 256 * 512 * (1024 + 4 + 1024)
    assert AppendCase("mxfp4", True).moved_bytes == 65_536 * (256 + 8 + 68)
    assert AppendCase("fp8_ds_mla", True, 512).moved_bytes == 65_536 * (1024 + 8 + 584)


def test_targets():
    faster = Target(560, 430)
    assert [faster.verdict(us, smaller_is_better=True) for us in (430, 431, 560, 561)] == [
        "goal",
        "floor",
        "floor",
        "missed",
    ]
    more = Target(80, 92)
    assert [more.verdict(x, smaller_is_better=False) for x in (92, 91, 80, 79)] == ["goal", "floor", "floor", "missed"]


def test_two_step_pieces_cover_every_query_once():
    for case in (
        ScoringCase("prefill", 8_192, 1, 262_144),
        ScoringCase("decode", 2, 64, 262_144),
        ScoringCase("decode", 1, 1, 8_192),
    ):
        seen = torch.zeros(case.num_seqs, case.tokens, dtype=torch.int32)
        for seqs, tokens in peers.pieces(case):
            seen[seqs, tokens] += 1
            assert peers.piece_bytes(case, seen[seqs, tokens].numel()) <= 4 * 2**30
        assert (seen == 1).all(), case.name


def test_repetitions_fit_the_budget():
    assert gpu.count_repeats(0.2, 100) == 200
    assert gpu.count_repeats(0.2, 10_000) == 20
    assert gpu.count_repeats(0.2, 1e6) == 10
    assert gpu.count_repeats(0.2, 1e6, fewest=1) == 1


def test_spread():
    spread = gpu.Spread(tuple(float(i) for i in range(101)))
    assert spread.record() == {"median": 50, "min": 0, "p10": 10, "p90": 90, "max": 100, "repeats": 101}
    assert gpu.Spread((3.0,)).record()["p90"] == 3


# --- the GPU grid: its course, with a clock that only counts ----------------------------------------------------


SMALL = ScoringCase("prefill", 40, 1, 300, top_k=20, target_us=Target(200, 50))
GATHER, APPEND = GatherCase(3, "fp8_ds_mla", top_k=20, entries=100), AppendCase("mxfp4", False, 128, 100, 320)


class Desk:
    """A machine without a GPU: runs what it should time, and says that everything took 100 us."""

    device = CPU

    def __init__(self, free: int = 2**40) -> None:
        self.free = free
        self.timed = 0

    def time(self, run: Callable[[], object], **options: Any) -> gpu.Spread:
        run()
        self.timed += 1
        return gpu.Spread((90.0, 100.0, 120.0))

    def host(self, run: Callable[[], object], took_us: float) -> gpu.Spread:
        run()
        return gpu.Spread((took_us / 8,))

    def peak_extra_bytes(self, run: Callable[[], object]) -> int:
        run()
        return 7

    def free_bytes(self) -> int:
        return self.free

    def release(self) -> None:
        pass

    def ceilings(self) -> dict[str, float]:
        return {"read_gb_s": 3000.0, "copy_gb_s": 2000.0}

    def copy_us(self, moved_bytes: int) -> float:
        return 50.0

    def describe(self) -> dict[str, Any]:
        return {"device": "a desk", "driver": None, "torch": torch.__version__}


def test_cuda_records_lines_table_and_plot(tmp_path):
    decode = ScoringCase("decode", 2, 3, 128, top_k=16)
    wide = replace(decode, top_k=32, at_most=Relative(decode.name, 1.15))
    grid = [SMALL, decode, wide, GATHER, APPEND]
    records = list(cuda_run.run_grid(grid, Desk(), peer_names=["deep_gemm"]))
    assert [record["case"] for record in records] == [case.name for case in grid]
    json.dumps(records)
    prefill, first, second, gather, append = records
    assert prefill["median_us"] == 100 and prefill["graph_cold_us"]["max"] == 120
    assert prefill["tflops"] == pytest.approx(SMALL.flop / 100e-6 / 1e12)
    assert prefill["agreement"]["agreeing"] == prefill["agreement"]["choices"] == 6 * 20
    assert prefill["target_us"] == {"floor": 200, "goal": 50} and prefill["verdict"] == "floor"
    assert prefill["output_bytes"] == 40 * 20 * 4 and prefill["peak_given_bytes"] == 7
    assert first["percent_of_read"] == pytest.approx(100 * 3 * 128 * 68 / 100e-6 / 3000e9)
    assert first["peers"]["two_step"]["time_ratio"] == 1 and first["verdict"] is None
    assert "cannot be imported" in first["peers_skipped"]["deep_gemm"]
    assert second["target_us"]["floor"] == pytest.approx(115) and second["verdict"] == "goal"
    assert gather["percent_of_same_copy"] == 50 and gather["verdict"] == "missed"
    each = append["in_a_row_us"]
    assert each == 100 / append["calls_in_a_row"] == 100 / 32, "a hundred microseconds were said of all calls"
    assert append["percent_of_copy"] == pytest.approx(100 * APPEND.moved_bytes / (each * 1e-6) / 2000e9)
    assert gather["percent_of_copy"] == pytest.approx(100 * GATHER.moved_bytes / 100e-6 / 2000e9)
    reason = first["peers_skipped"]["deep_gemm"]
    text = f"{decode.name}: 100 us (90.0 us to 120 us), 0 % read, two_step 100 us (1.0 x) and 0.0 MiB"
    assert screen.line(first) == f"{text}, deep_gemm skipped: {reason}"
    assert all(screen.line(record).startswith(record["case"]) for record in records)
    console = Console(width=120, file=io.StringIO())
    console.print(screen.table(records))
    text = console.file.getvalue()
    assert all(record["host_us"]["median"] == 12.5 for record in records) and text.count("12.5 us") == len(records)
    assert "missed 80 %" in text and "floor 200 us" in text and "append 100, mxfp4, random" in text
    plot.plot(records, tmp_path / "cuda.png")
    assert (tmp_path / "cuda.png").read_bytes().startswith(b"\x89PNG")


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", "bf16"])
@pytest.mark.parametrize("shape", [("prefill", 40, 1), ("decode", 2, 3)], ids=["prefill", "decode"])
def test_two_step_makes_the_same_selection(shape, format, monkeypatch):
    case = ScoringCase(*shape, 300, format=format, query_format=format, top_k=20)
    monkeypatch.setattr(peers, "_PIECE_BYTES", peers.piece_bytes(case, 3))  # several pieces, the last one short
    operands = make_scoring(case, CPU)
    ours = cuda_run.public_calls(case, operands).alone()
    theirs = peers.peer("two_step", case, operands, Desk(), 3000.0)()
    assert theirs.shape == ours.shape
    checks.check_peer(case, "two_step", ours, theirs)
    with pytest.raises(AssertionError, match="two_step shares only"):
        checks.check_peer(case, "two_step", ours, theirs - 1)


class FakeDeepGemm:
    """Its logits in plain torch: pages as it defines them, and garbage in columns that a query does not see."""

    @staticmethod
    def get_num_sms():
        return 132

    @staticmethod
    def get_paged_mqa_logits_metadata(context_lens, block_kv, num_sms):
        assert context_lens.dtype == torch.int32 and context_lens.is_contiguous() and block_kv == 64
        return torch.zeros(num_sms + 1, 2, dtype=torch.int32)

    def fp8_paged_mqa_logits(self, q, kv_cache, weights, lens, block_table, plan, max_len, clean_logits):
        assert kv_cache.shape[1:] == (64, 1, 132) and lens.shape == q.shape[:2] and not clean_logits
        rows = []
        for b, sequence in enumerate(q):
            pages = kv_cache[block_table[b].long()].flatten(1)
            data, scale = pages[:, : 64 * 128].reshape(-1, 128), pages[:, 64 * 128 :].reshape(-1, 4)
            keys = data.view(torch.float8_e4m3fn), scale.contiguous().view(torch.float32)[:, 0]
            own = weights[b * q.shape[1] : (b + 1) * q.shape[1]]
            rows.append(self.fp8_mqa_logits(sequence, keys, own, None, lens[b])[:, :max_len].nan_to_num(neginf=1e9))
        return torch.cat(rows)

    @staticmethod
    def fp8_mqa_logits(q, keys, weights, starts, ends):
        data, scale = keys
        scores = torch.einsum("th,ths->ts", weights, (q.float() @ data.float().T).relu()) * scale
        return scores.masked_fill(torch.arange(len(data)) >= ends.unsqueeze(1), -torch.inf)


class FakeFlashInfer:
    @staticmethod
    def top_k(scores, k):
        return scores.topk(k, sorted=False)


@pytest.mark.parametrize("name", ["deep_gemm", "flashinfer"])
@pytest.mark.parametrize("query_format", ["mxfp4", "fp8"])
@pytest.mark.parametrize("shape", [("prefill", 40, 1), ("decode", 2, 3)], ids=["prefill", "decode"])
def test_other_libraries_are_called_as_they_want_it(shape, query_format, name, monkeypatch):
    case = ScoringCase(*shape, 320, query_format=query_format, top_k=20)
    libraries = {"deep_gemm": FakeDeepGemm(), "flashinfer": FakeFlashInfer()}
    monkeypatch.setattr(peers, "_import", libraries.__getitem__)
    operands = make_scoring(case, CPU)
    ours = cuda_run.public_calls(case, operands).alone()
    theirs = peers.peer(name, case, operands, Desk(), 3000.0)()
    assert theirs.sort().values.tolist() == ours.tolist()


@pytest.mark.parametrize(
    ("name", "free", "read_gb_s", "reason"),
    [
        ("two_step", 2**20, 3000.0, "needs 0.0 GiB, 0.0 GiB are free"),
        ("two_step", 2**40, 1e-6, "would take about"),
        ("flashinfer", 2**40, 3000.0, "cannot be imported"),
        ("transformers", 2**40, 3000.0, "runs on a CPU only"),
    ],
)
def test_peers_that_cannot_run_say_why(name, free, read_gb_s, reason):
    with pytest.raises(peers.Unavailable, match=reason):
        peers.peer(name, SMALL, make_scoring(SMALL, CPU), Desk(free), read_gb_s)


def test_sequences_lie_in_permuted_blocks():
    operands = make_scoring(ScoringCase("decode", 1, 4, 640), CPU)
    blocks = operands.view.block_table.flatten()
    assert sorted(blocks.tolist()) == list(range(40)) and (blocks.diff() != 1).any()


def test_no_wrong_selection_is_timed(monkeypatch):
    desk, right = Desk(), cuda_run.score_topk
    monkeypatch.setattr(cuda_run, "score_topk", lambda *args, **kwargs: right(*args, **kwargs).sub_(1).clamp_min_(0))
    with pytest.raises(AssertionError, match="choices agree with float64"):
        list(cuda_run.run_grid([SMALL], desk))
    assert desk.timed == 0


def test_no_unordered_selection_is_timed(monkeypatch):
    desk, right = Desk(), cuda_run.score_topk
    monkeypatch.setattr(cuda_run, "score_topk", lambda *args, **kwargs: right(*args, **kwargs).flip(1))
    with pytest.raises(AssertionError, match="the indices do not ascend"):
        list(cuda_run.run_grid([SMALL], desk))
    assert desk.timed == 0


def test_no_wrong_gather_or_append_is_timed(monkeypatch):
    desk, gather, append = Desk(), cuda_run.gather_kv, cuda_run.append_entries
    monkeypatch.setattr(cuda_run, "gather_kv", lambda *args, **kwargs: gather(*args, **kwargs).mul_(-1))
    with pytest.raises(AssertionError, match="rows differ from the reference"):
        list(cuda_run.run_grid([GATHER], desk))
    monkeypatch.setattr(cuda_run, "append_entries", lambda entries, *rest: append(-entries, *rest))
    with pytest.raises(AssertionError, match="data rows differ from the CPU's"):
        list(cuda_run.run_grid([APPEND], desk))
    assert desk.timed == 0


def test_calls_in_a_row_take_caches_in_turns(monkeypatch):
    """One cache for all would be warm."""
    written, append = [], cuda_run.append_entries
    monkeypatch.setattr(
        cuda_run, "append_entries", lambda *args: (written.append(args[1].storage.data_ptr()), append(*args))
    )
    (record,) = cuda_run.run_grid([APPEND], Desk())
    row = written[: record["calls_in_a_row"]]
    assert len(set(row)) == 8 and row == row[:8] * 4
    assert screen.rates(record)[1:] == ["by 32 in a row, 3.12 us each", "one call 50 % of a copy of its size"]


def test_checks_accept_what_is_right():
    gathered, appended = make_gather(GATHER, CPU), make_append(APPEND, CPU)
    out = cuda_run.gather_kv(gathered.view, gathered.indices, seq_ids=gathered.seq_ids)
    checks.check_gather(GATHER, gathered, out)
    cuda_run.append_entries(appended.entries, appended.view, appended.slots)
    checks.check_append(APPEND, appended)
    assert appended.slots.unique().numel() == APPEND.count
    slots = make_append(replace(APPEND, in_order=True), CPU).slots
    assert slots.unique().numel() == len(slots) == APPEND.count
    assert torch.equal(slots % 64, torch.arange(APPEND.count) % 64), "a block's are not in order"
    assert (slots[:64] // 64 == slots[0] // 64).all() and slots[64] != slots[63] + 1, "blocks are not in random places"


@pytest.mark.parametrize(
    ("us", "text"),
    [(8.123, "8.12 us"), (34.56, "34.6 us"), (560.4, "560 us"), (10_200, "10.2 ms"), (1.5e6, "1.50 s")],
)
def test_readable_times(us, text):
    assert screen.readable_us(us) == text


# --- the layer --------------------------------------------------------------------------------------------------

TINY_LAYER = layer.LayerCase(2, 600, config=tiny_config())


def test_layer_records_lines_and_tables():
    fp8 = replace(TINY_LAYER, weights="fp8")
    records = list(layer.run_grid([TINY_LAYER, fp8, replace(fp8, dense=False)], Desk()))
    names = [record["case"].removeprefix("layer-2x1-tokens600-") for record in records]
    assert names == ["bf16-dense", "fp8-dense", "fp8"] and [r["dense"] for r in records] == [True, True, False]
    json.dumps(records)
    for record in records:
        assert list(record["stages_us"])[-1] == layer.WHOLE and record["begin_step_host_us"] > 0
        assert all(times[mode]["median"] == 100 for times in record["stages_us"].values() for mode in times)
        assert "graph, cold 100 us, graph, warm 100 us, eager 100 us; begin_step" in layer.line(record)
    console = Console(file=io.StringIO(), width=200)
    for table in layer.tables(records):
        console.print(table)
    sums = [text.split() for text in console.file.getvalue().splitlines() if "sum of the stages" in text]
    assert sums == [["sum", "of", "the", "stages", *["1.20", "ms"] * 3]] * 3, "12 stages of 100 us each"


def test_layer_stages_make_the_layer():
    """What the stages leave behind is what one call of the layer leaves."""
    decodes = [layer.make_decode(TINY_LAYER, CPU) for _ in range(2)]
    staged, called = decodes
    runs = layer.stages(staged)
    del runs[layer.WHOLE]
    out = [run() for run in runs.values()][-1]
    assert torch.equal(out, called.block(called.x, called.cache))
    for name in ("window", "compressor_state", "indexer_state"):
        assert torch.equal(getattr(staged.cache, name).rows, getattr(called.cache, name).rows), name
    for name in ("kv_pool", "index_pool"):
        assert torch.equal(getattr(staged.cache, name).storage, getattr(called.cache, name).storage), name


def test_layer_weights_are_dense_where_the_case_says_so():
    fp8 = replace(TINY_LAYER, weights="fp8")
    dense, stored = (layer.make_decode(case, CPU) for case in (fp8, replace(fp8, dense=False)))
    assert {type(linear) for linear in stored.block.linears.values()} == {Fp8BlockLinear}
    for decode, names in ((dense, {"kept"}), (stored, {"weight", "scale"})):
        assert all({*dict(linear.named_buffers())} == names for linear in decode.block.linears.values())
    assert torch.equal(dense.block(dense.x, dense.cache), stored.block(stored.x, stored.cache))


def test_no_wrong_layer_is_timed(monkeypatch):
    desk, right = Desk(), AttentionSubBlock.window_kv
    monkeypatch.setattr(AttentionSubBlock, "window_kv", lambda *args: right(*args) * torch.nan)
    with pytest.raises(AssertionError, match="tokens600-bf16-dense: the output has values that are not finite"):
        list(layer.run_grid([TINY_LAYER], desk))
    monkeypatch.setattr(AttentionSubBlock, "window_kv", right)
    monkeypatch.setattr(layer, "index_scores", lambda *args, **kwargs: -index_scores(*args, **kwargs))
    with pytest.raises(AssertionError, match="the choice is not that of the scores"):
        list(layer.run_grid([TINY_LAYER], desk))
    assert desk.timed == 0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--device", "cpu"), "--layer times a decode step at V4-Flash size on a GPU, and none is used here"),
        (("--peer", "deep_gemm"), "--layer has no --peer to compare with"),
    ],
    ids=["device", "peer"],
)
def test_layer_refuses_what_cannot_be_meant(arguments, message, tmp_path):
    result = run("bench", "--layer", *arguments, "--output", str(tmp_path))
    assert result.exit_code == 2 and message in " ".join(result.output.split())
    assert not list(tmp_path.iterdir())


def test_fused_operations_are_compared_with_torch_then_timed(monkeypatch):
    """On a desk both are the torch path: what is tried is the course, and that a wrong byte stops it."""
    desk, right = Desk(), fused.indexer_query
    records = list(fused.compare(desk, [2, 300]))
    names = ("indexer_query", "compress_entries-index", "compress_entries-kv")
    assert [record["case"] for record in records] == [f"{name}-{count}" for count in (2, 300) for name in names]
    assert desk.timed == 12 and all(record["time_ratio"] == 1.0 for record in records), records[0]
    json.dumps(records)

    def wrong(*args, impl, **options):
        return right(*args, impl=impl, **{**options, "rotate": impl == "auto"})

    monkeypatch.setattr(fused, "indexer_query", wrong)
    with pytest.raises(AssertionError, match="indexer_query-2: .* bytes differ from the torch path"):
        list(fused.compare(desk, [2]))
    assert desk.timed == 12, "nothing is timed on red"
