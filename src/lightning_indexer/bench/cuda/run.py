"""Run the grid on a GPU: check each case, time it, give a record for it.

The headline of a record, `median_us`, is CUDA-graph replay with a cold L2 cache.
"""

import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from typing import Any, Protocol

import torch
from torch import Tensor

import lightning_indexer
from lightning_indexer.bench.cuda import peers
from lightning_indexer.bench.cuda.cases import AppendCase, Case, GatherCase, ScoringCase, Target
from lightning_indexer.bench.cuda.checks import check_append, check_gather, check_peer, check_scoring
from lightning_indexer.bench.cuda.gpu import Spread
from lightning_indexer.bench.cuda.operands import (
    AppendOperands,
    ScoringOperands,
    make_append,
    make_gather,
    make_scoring,
)
from lightning_indexer.bench.run import commit
from lightning_indexer.ops.append import append_entries
from lightning_indexer.ops.gather_kv import gather_kv
from lightning_indexer.ops.score_topk import score_topk, score_topk_workspace_bytes

_BUDGETS_S = {"graph_cold": 0.3, "graph_warm": 0.15, "eager_cold": 0.1, "eager_warm": 0.1}
_CACHES, _ROUNDS = 8, 4  # of calls in a row
_POISON = -2  # in outputs: memory that an earlier case gave back may hold the right answer
_PEER_BUDGET_S, _PEER_FEWEST = 0.1, 1


class Machine(Protocol):
    """What `Gpu` does; a test has another."""

    device: torch.device

    def time(
        self, run: Callable[[], object], *, graph: bool, cold: bool, budget_s: float = ..., fewest: int = ...
    ) -> Spread: ...
    def host(self, run: Callable[[], object], took_us: float) -> Spread: ...
    def peak_extra_bytes(self, run: Callable[[], object]) -> int: ...
    def free_bytes(self) -> int: ...
    def release(self) -> None: ...
    def ceilings(self) -> dict[str, float]: ...
    def copy_us(self, moved_bytes: int) -> float: ...
    def describe(self) -> dict[str, Any]: ...


@dataclass(frozen=True)
class Calls:
    """One way to `score_topk`: into memory that is given, and into memory of its own."""

    given: Callable[[], Tensor]
    alone: Callable[[], Tensor]
    workspace_bytes: int


@torch.no_grad()
def run_grid(cases: Sequence[Case], machine: Machine, *, peer_names: Sequence[str] = ()) -> Iterator[dict[str, Any]]:
    """Yield a JSON-able record per case.

    Raises:
        AssertionError: a case computes something wrong; nothing is timed on red.
    """
    shared = {
        **machine.describe(),
        "version": lightning_indexer.__version__,
        "commit": commit(),
        "ceilings": machine.ceilings(),
    }
    medians: dict[str, float] = {}
    for case in cases:
        machine.release()
        started = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
        record = {"case": case.name, **asdict(case), **shared, "time": started}
        if isinstance(case, ScoringCase):
            record.update(_scoring(case, machine, shared["ceilings"], peer_names))
            record.update(_time_target(case, record["median_us"], medians))
        elif isinstance(case, GatherCase):
            record.update(_gather(case, machine, shared["ceilings"]))
        else:
            record.update(_append(case, machine, shared["ceilings"]))
        medians[case.name] = record["median_us"]
        yield record


def _scoring(
    case: ScoringCase, machine: Machine, ceilings: dict[str, float], peer_names: Sequence[str]
) -> dict[str, Any]:
    operands = make_scoring(case, machine.device)
    calls = portable_calls(case, operands) if case.engine == "portable" else public_calls(case, operands)
    indices = calls.given().clone()
    agreement = check_scoring(case, operands, indices)
    times = _times(machine, calls.given)
    assert torch.equal(calls.given(), indices), f"{case.name}: a repetition chose other entries than the first call"
    seconds = times["graph_cold_us"]["median"] / 1e6
    key_gb_s = case.key_bytes / seconds / 1e9
    return {
        **times,
        "median_us": times["graph_cold_us"]["median"],
        "agreement": agreement,
        "key_bytes": case.key_bytes,
        "key_gb_s": key_gb_s,
        "percent_of_read": 100 * key_gb_s / ceilings["read_gb_s"],
        "flop": case.flop,
        "tflops": case.flop / seconds / 1e12,
        "dense_score_bytes": case.dense_bytes,
        "output_bytes": indices.nbytes,
        "workspace_bytes": calls.workspace_bytes,
        "peak_given_bytes": machine.peak_extra_bytes(calls.given),
        "peak_alone_bytes": machine.peak_extra_bytes(calls.alone),
        **_peers(case, operands, machine, ceilings, peer_names, indices, seconds * 1e6),
    }


def public_calls(case: ScoringCase, operands: ScoringOperands) -> Calls:
    """The public function."""
    given = _memory(case, operands.device)

    def call(out: Tensor | None = None, workspace: Tensor | None = None) -> Tensor:
        return score_topk(
            operands.query,
            operands.weights,
            operands.view,
            top_k=case.top_k,
            valid_lens=operands.valid_lens,
            seq_ids=operands.seq_ids,
            out=out,
            workspace=workspace,
        )

    return Calls(lambda: call(*given), call, given[1].nbytes)


def portable_calls(case: ScoringCase, operands: ScoringOperands) -> Calls:
    """The kernel that runs on every architecture, which the public function takes where there is no better one."""
    from lightning_indexer.cuda.score_topk import score_topk as cuda_score_topk

    given = _memory(case, operands.device)

    def call(out: Tensor, workspace: Tensor) -> Tensor:
        cuda_score_topk(
            operands.query,
            operands.weights,
            operands.view,
            operands.valid_lens,
            operands.seq_ids,
            by_score=False,
            as_slots=False,
            out=out,
            scores_out=None,
            workspace=workspace,
            engine="portable",
        )
        return out

    return Calls(lambda: call(*given), lambda: call(*_memory(case, operands.device)), given[1].nbytes)


def _memory(case: ScoringCase, device: torch.device) -> tuple[Tensor, Tensor]:
    """out and workspace."""
    needed = score_topk_workspace_bytes(
        num_heads=case.num_heads, head_dim=case.head_dim, top_k=case.top_k, device=device
    )
    out = torch.full((case.num_queries, case.top_k), _POISON, dtype=torch.int32, device=device)
    return out, torch.empty(needed, dtype=torch.uint8, device=device)


def _gather(case: GatherCase, machine: Machine, ceilings: dict[str, float]) -> dict[str, Any]:
    operands = make_gather(case, machine.device)
    shape = (*operands.indices.shape, case.schema.dim)
    out = torch.full(shape, _POISON, dtype=torch.bfloat16, device=machine.device)

    def run() -> Tensor:
        return gather_kv(operands.view, operands.indices, seq_ids=operands.seq_ids, out=out)

    check_gather(case, operands, run())
    return _moving(case, machine, ceilings, run)


def _append(case: AppendCase, machine: Machine, ceilings: dict[str, float]) -> dict[str, Any]:
    """A call of FP4 is so short that events and a launch are a third of its time: the rate is that of many in a row.

    They take entries and caches in turns, so many that all find a cold L2 (of 50 MiB: FP4 moves 174 MB a round), and go
    round several times, so that most of what is written goes to memory within the time, too.
    """
    sets = [make_append(case, machine.device) for _ in range(_CACHES)]

    def append(operands: AppendOperands) -> None:
        append_entries(operands.entries, operands.view, operands.slots)

    def run_all() -> None:
        for operands in sets * _ROUNDS:
            append(operands)

    run_all()
    for operands in sets:
        check_append(case, operands)
    calls = len(sets) * _ROUNDS
    each_us = machine.time(run_all, graph=True, cold=True).median / calls
    record = _moving(case, machine, ceilings, lambda: append(sets[0]), each_us)
    return {**record, "in_a_row_us": each_us, "calls_in_a_row": calls}


def _moving(
    case: GatherCase | AppendCase,
    machine: Machine,
    ceilings: dict[str, float],
    run: Callable[[], object],
    each_us: float | None = None,
) -> dict[str, Any]:
    """The record of what only moves bytes.

    Args:
        each_us: of a call, to take its rate from; default: its median with a cold L2.
    """
    times = _times(machine, run)
    took = times["graph_cold_us"]["median"]
    copy_us = machine.copy_us(case.moved_bytes)
    gb_s = case.moved_bytes / (each_us or took) / 1e3
    percent = 100 * gb_s / ceilings["copy_gb_s"]
    target = case.target_percent
    return {
        **times,
        "median_us": took,
        "moved_bytes": case.moved_bytes,
        "gb_s": gb_s,
        "same_copy_us": copy_us,
        "percent_of_same_copy": 100 * copy_us / took,
        "percent_of_copy": percent,
        "peak_given_bytes": machine.peak_extra_bytes(run),
        "verdict": target.verdict(percent, smaller_is_better=False) if target else None,
    }


def _times(machine: Machine, run: Callable[[], object]) -> dict[str, dict[str, float]]:
    """Four times in microseconds: graph or eager, cold or warm; and what an eager call keeps the host."""
    times = {
        f"{name}_us": machine.time(
            run, graph=name.startswith("graph"), cold=name.endswith("cold"), budget_s=budget
        ).record()
        for name, budget in _BUDGETS_S.items()
    }
    return {**times, "host_us": machine.host(run, times["graph_warm_us"]["median"]).record()}


def _time_target(case: ScoringCase, took_us: float, medians: dict[str, float]) -> dict[str, Any]:
    """The target of a case, where it is relative in terms of the other's time in this run, and whether it is met."""
    target = case.target_us
    if case.at_most is not None and case.at_most.case in medians:
        limit = case.at_most.factor * medians[case.at_most.case]
        target = Target(limit, limit)
    if target is None:
        return {"target_us": None, "verdict": None}
    return {"target_us": asdict(target), "verdict": target.verdict(took_us, smaller_is_better=True)}


def _peers(
    case: ScoringCase,
    operands: ScoringOperands,
    machine: Machine,
    ceilings: dict[str, float],
    peer_names: Sequence[str],
    indices: Tensor,
    ours_us: float,
) -> dict[str, Any]:
    """Times and memory of the other ways, cold; of those that cannot run, why."""
    found: dict[str, dict[str, Any]] = {}
    skipped = {}
    for name in (peers.TWO_STEP, *peer_names) if case.engine == "auto" else ():
        try:
            run = peers.peer(name, case, operands, machine, ceilings["read_gb_s"])
        except peers.Unavailable as reason:
            skipped[name] = str(reason)
            continue
        check_peer(case, name, indices, run())
        mode, spread = _time_peer(machine, run, graph=case.kind == "decode")
        found[name] = {
            **{f"{key}_us" if key != "repeats" else key: value for key, value in spread.record().items()},
            "mode": mode,
            "time_ratio": spread.median / ours_us,
            "peak_extra_bytes": machine.peak_extra_bytes(run),
        }
        del run
        machine.release()
    return {"peers": found, "peers_skipped": skipped}


def _time_peer(machine: Machine, run: Callable[[], Tensor], *, graph: bool) -> tuple[str, Spread]:
    """By graph replay where that is wanted and the peer can be captured, else eagerly."""
    if graph:
        try:
            return "graph", machine.time(run, graph=True, cold=True, budget_s=_PEER_BUDGET_S, fewest=_PEER_FEWEST)
        except RuntimeError:  # said in the record, as its mode
            machine.release()
    return "eager", machine.time(run, graph=False, cold=True, budget_s=_PEER_BUDGET_S, fewest=_PEER_FEWEST)
