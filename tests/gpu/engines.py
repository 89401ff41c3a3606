"""The engines that score on a GPU, each as a pair of functions with the public signatures.

"auto" is what a caller gets. "portable" is the engine for GPUs without wgmma, called even where `score_topk` would not
choose it. Each must agree with itself bit for bit; the two need not agree with each other.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
from cases import Problem, adversarial_row, check_topk, problem_with_scores
from torch import Tensor

from lightning_indexer import IndexerView, QuantizedQuery, index_scores, score_topk, score_topk_workspace_bytes
from lightning_indexer.cuda import score_topk as cuda


@dataclass(frozen=True)
class Engine:
    """`score_topk` and its dense twin, and how tests call them."""

    score_topk: Callable
    index_scores: Callable

    def dense(self, problem: Problem, **options: object) -> Tensor:
        return problem.call(self.index_scores, **options)

    def selected(self, problem: Problem, top_k: int = 50, **options: object) -> tuple[Tensor, Tensor]:
        return problem.call(self.score_topk, top_k=top_k, return_scores=True, **options)

    def check(self, problem: Problem, top_k: int, *, dense: Tensor | None = None, **options: object) -> None:
        """The selection is the stable sort of this engine's own scores, bit for bit."""
        dense = self.dense(problem) if dense is None else dense
        check_topk(self.score_topk, problem, top_k, dense=dense, **options)


def fp8_tensor_cores(format: str, query_format: str) -> bool:
    """Whether these operands are multiplied in fp8; if not, in bf16."""
    return {format, query_format} <= {"mxfp4", "fp8"}


def promised_error(format: str, query_format: str) -> float:
    """Of the norm of a row of scores."""
    return 5e-4 if fp8_tensor_cores(format, query_format) else 1e-4


def workspace_bytes(problem: Problem, top_k: int) -> int:
    num_heads, head_dim = problem.q_values.shape[1:]
    device = problem.weights.device
    return score_topk_workspace_bytes(num_heads=num_heads, head_dim=head_dim, top_k=top_k, device=device)


def _portable_index_scores(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    *,
    valid_lens: Tensor,
    seq_ids: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    if out is None:
        longest = int(valid_lens.max()) if len(valid_lens) else 0
        out = torch.empty(len(weights), longest, dtype=torch.float32, device=weights.device)
    cuda.index_scores(q, weights, view, valid_lens, seq_ids, out, engine="portable")
    return out


def _portable_score_topk(
    q: Tensor | QuantizedQuery,
    weights: Tensor,
    view: IndexerView,
    *,
    top_k: int,
    valid_lens: Tensor,
    seq_ids: Tensor | None = None,
    order: str = "index",
    output: str = "entry",
    return_scores: bool = False,
    out: Tensor | None = None,
    scores_out: Tensor | None = None,
    workspace: Tensor | None = None,
    candidates: Tensor | None = None,
    candidate_entries: int = 8,
) -> Tensor | tuple[Tensor, Tensor]:
    shape, device = (len(weights), top_k), weights.device
    out = torch.empty(shape, dtype=torch.int32, device=device) if out is None else out
    if return_scores and scores_out is None:
        scores_out = torch.empty(shape, dtype=torch.float32, device=device)
    if workspace is None:
        sizes = {"num_heads": weights.shape[1], "head_dim": view.schema.dim, "top_k": top_k}
        workspace = torch.empty(score_topk_workspace_bytes(**sizes, device=device), dtype=torch.uint8, device=device)
    cuda.score_topk(
        q,
        weights,
        view,
        valid_lens,
        seq_ids,
        by_score=order == "score",
        as_slots=output == "slot",
        out=out,
        scores_out=scores_out,
        workspace=workspace,
        candidates=candidates,
        candidate_entries=candidate_entries,
        engine="portable",
    )
    return (out, scores_out) if return_scores else out


ENGINES = {
    "auto": Engine(score_topk, index_scores),
    "portable": Engine(_portable_score_topk, _portable_index_scores),
}


def call_of(problem: Problem, candidates: Tensor | None = None) -> cuda._Call:
    """The operands as the kernels of scoring take them."""
    view = problem.cache.view
    return cuda._Call("test", problem.q, problem.weights, view, problem.valid_lens, problem.seq_ids, candidates)


def rows_in_long_parts(kind: str) -> Problem:
    """More entries for each multiprocessor than a lone query's list holds, in shared memory too (on Hopper).

    They are equal queries of one adversarial row, as sequences that share their blocks. On the GPU.
    """
    length = 60_000
    num = torch.cuda.get_device_properties().multi_processor_count * 4_500 // length + 1
    one = problem_with_scores([adversarial_row(kind, length)], "mxfp4", rows=[0] * num)
    problem = replace(one.take([0] * num), seq_ids=torch.arange(num, dtype=torch.int32)).to("cuda")
    is_hopper = torch.cuda.get_device_capability() == (9, 0)
    assert call_of(problem).plan(512, "auto").shape.holds_list == is_hopper
    return problem
