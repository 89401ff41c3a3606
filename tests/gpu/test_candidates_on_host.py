"""The CUDA kernels of merge_topk, compiled by a host compiler and run there thread by thread.

They are held against the torch operators that merge on a CPU. It needs a C++ compiler and glibc, nothing of CUDA.
"""

from collections.abc import Iterator

import pytest
import torch
from cases import assert_same_bits
from on_host import Library, compile_library, needs_compiler, take_host_kernels
from torch import Tensor

from lightning_indexer import merge_topk
from lightning_indexer.cuda import candidates
from lightning_indexer.selection import EMPTY, candidate_keys

SHARDS, ROWS = 3, 2
CAPACITY = candidates._CAPACITY
pytestmark = needs_compiler


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Library:
    return compile_library(tmp_path_factory.mktemp("host"), candidates.specialisations("sm_80"))


@pytest.fixture(autouse=True)
def on_host(library: Library, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    take_host_kernels(monkeypatch, library, candidates)
    yield
    candidates._kernel.cache_clear()


def shards_of(scores: Tensor, missing: float) -> tuple[Tensor, Tensor]:
    """indices and scores [SHARDS, ROWS, C]: distinct indices, and -1 for a share of the candidates."""
    rows = [torch.randperm(2 * scores[:, 0].numel())[: scores[:, 0].numel()] for _ in range(ROWS)]
    indices = torch.stack(rows).view(ROWS, SHARDS, -1).transpose(0, 1).int().contiguous()
    return torch.where(torch.rand(scores.shape) < missing, -1, indices), scores


def run(indices: Tensor, scores: Tensor, top_k: int) -> tuple[Tensor, Tensor]:
    keys = torch.stack([candidates.pack_candidates(*pair) for pair in zip(indices, scores, strict=True)])
    out, scores_out = torch.full((ROWS, 2 * top_k), -7, dtype=torch.int32), torch.full((ROWS, top_k + 1), 7.0)
    candidates.merge_candidates(keys, out[:, ::2], scores_out[:, :top_k])
    assert (out[:, 1::2] == -7).all() and (scores_out[:, top_k] == 7).all(), "written beside the outputs"
    return out[:, ::2], scores_out[:, :top_k]


def side_by_side(tensor: Tensor) -> Tensor:
    return tensor.transpose(0, 1).flatten(1)


KINDS = {
    "random": torch.randn,
    "all-equal": torch.zeros,
    "plateaus": lambda *shape: torch.randint(-2, 3, shape).float(),
    "last-bit": lambda *shape: (1.0 + torch.randint(0, 2, shape) * 2**-23).float(),
    "signs-and-nan": lambda *shape: torch.tensor([0.0, -0.0, torch.nan, torch.inf, -torch.inf, 1e-45, -1e38])[
        torch.randint(0, 7, shape)
    ],
}


@pytest.mark.parametrize("kind", KINDS)
def test_packing_gives_the_keys_of_the_cpu(kind: str) -> None:
    indices, scores = shards_of(KINDS[kind](SHARDS, ROWS, 333), 0.2)
    indices[0, 0, :2] = torch.tensor([2**31 - 1, 0])
    want = torch.where(indices < 0, EMPTY, candidate_keys(scores, indices.long()))
    got = candidates.pack_candidates(indices[1], scores[1])
    assert_same_bits(got, want[1], "keys")
    by_column = candidates.pack_candidates(indices[0].t().contiguous().t(), scores[0].t().contiguous().t())
    assert_same_bits(by_column, want[0], "keys of candidates that lie by column")
    assert candidates.pack_candidates(indices[0, :0], scores[0, :0]).shape == (0, 333)


@pytest.mark.parametrize(
    ("width", "top_k", "missing"),
    [
        (512, 512, 0.0),
        (700, 512, 0.3),
        (40, 1, 0.5),
        (40, 300, 0.5),  # more than there are
        (40, 100, 0.5),  # more than there are, but for those without an index
        (40, 16, 1.0),  # none
        (0, 3, 0.0),
        (CAPACITY // SHARDS + 1, 1000, 0.0),  # one more than there is room for
        (4500, 2000, 0.0),  # several passes
        (1400, 4096, 0.0),
    ],
)
@pytest.mark.parametrize("kind", KINDS)
def test_merging_gives_the_bits_of_the_cpu(kind: str, width: int, top_k: int, missing: float) -> None:
    indices, scores = shards_of(KINDS[kind](SHARDS, ROWS, width), missing)
    want = merge_topk(side_by_side(indices), side_by_side(scores), top_k=top_k)
    for name, g, w in zip(("indices", "scores"), run(indices, scores, top_k), want, strict=True):
        assert_same_bits(g, w, f"{name}, {kind}, {SHARDS} x {width}")


@pytest.mark.parametrize("width", [300, 4000])
def test_candidates_that_come_twice_do_no_harm(width: int) -> None:
    """They are not allowed; what is found is among the candidates nevertheless, and nothing beside is written."""
    indices = torch.randint(0, 20, (SHARDS, ROWS, width), dtype=torch.int32)
    scores = torch.ones(SHARDS, ROWS, width)
    indices[0, :, -1], scores[0, :, -1] = 50, 2
    found, kept = run(indices, scores, 100)
    assert (found[:, 0] == 50).all() and (kept[:, 0] == 2).all(), "the best was lost"
    assert ((found[:, 1:] >= -1) & (found[:, 1:] < 20)).all()
    assert ((kept[:, 1:] == 1) == (found[:, 1:] >= 0)).all()


def test_no_queries() -> None:
    out, scores_out = torch.empty(0, 4, dtype=torch.int32), torch.empty(0, 4)
    candidates.merge_candidates(torch.empty(2, 0, 4, dtype=torch.int64), out, scores_out)


def test_too_many_are_refused() -> None:
    with pytest.raises(NotImplementedError, match=r"merge_topk: on a GPU top_k must be at most 4096, got 4097 \(impl"):
        candidates.check_top_k("merge_topk", 4097)
