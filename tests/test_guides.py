"""Every piece of Python in README.md and docs/ is run as it stands there (guides.py says how)."""

import re
from collections.abc import Iterator

import engines_guide  # noqa: F401  registers its steps
import pytest
import test_relatives  # noqa: F401  registers its steps
import torch
from cases import assert_same_bits
from guides import PAGES, ROOT, STEPS, all_units, fences, run, steps_of, units
from sharded import torchrun

from lightning_indexer import CacheSchema, IndexerView, PagedPool, append_entries, score_topk


@steps_of("README.md", "lightning-indexer")
def first_example() -> Iterator[dict]:
    names: dict = {}
    yield names
    arguments = {"top_k": 512, "valid_lens": names["lens"], "seq_ids": torch.zeros(4, dtype=torch.int32)}
    chosen = names["score_topk"](names["q"], names["weights"], names["keys"], **arguments)
    assert (chosen >= 0).sum(1).tolist() == [512, 512, 300, 0]


@steps_of("README.md", "Formats")
def engine_pages() -> Iterator[dict]:
    slab = torch.zeros(4, 3, 4608, dtype=torch.uint8)  # blocks of three layers side by side, padded
    pages = slab[:, 1, : 64 * 68].unflatten(1, (64, 1, 68))
    names = {"vllm_index_cache": pages, "block_table": torch.zeros(1, 4, dtype=torch.int32)}
    yield names
    assert names["view"].storage.data_ptr() == pages.data_ptr()


@steps_of("README.md", "A layer from a checkpoint")
def layer() -> Iterator[dict]:
    names = {"hidden_states": torch.randn(1037, 64).bfloat16()}
    yield names
    assert names["out"].shape == (1037, 64) and names["out"].isfinite().all()


@pytest.mark.parametrize("unit", [param for param in all_units() if not param.values[0].needs("torchrun")])
def test_every_block_runs_and_does_what_it_says(unit, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)  # a page that would take a GPU does so in tests/gpu
    run(unit, on_gpu=False)


def test_the_context_parallel_guide_does_what_it_says(tmp_path):
    (unit,) = [param.values[0] for param in all_units() if param.values[0].needs("torchrun")]
    (block,) = unit.blocks
    script = tmp_path / "example.py"
    script.write_text(f"{block.code}\ntorch.save((q, weights, lens, indices, scores), f'{tmp_path}/{{shard.rank}}')")
    torchrun(script)
    torch.manual_seed(0)
    pool = PagedPool(CacheSchema("mxfp4", 64), num_blocks=1024, max_seqs=1)
    keys = IndexerView(pool.storage, pool.schema, pool.block_table)
    append_entries(torch.randn(50_000, 128), keys, pool.alloc(0, 50_000))
    for rank in (0, 1):
        q, weights, lens, *got = torch.load(tmp_path / str(rank), weights_only=False)
        options = {"top_k": 512, "valid_lens": lens, "seq_ids": torch.zeros_like(lens), "order": "score"}
        want = score_topk(q, weights, keys, **options, return_scores=True)
        for name, g, w in zip(("indices", "scores"), got, want, strict=True):
            assert_same_bits(g, w, f"{name} of rank {rank}")


def test_every_section_with_steps_is_there():
    headings = {(page, heading) for page in PAGES for heading, _, _ in fences((ROOT / page).read_text("utf-8"))}
    assert set(STEPS) <= headings, f"steps of nothing: {set(STEPS) - headings}"


PAGE = """# Page
```python
first = 1
```
## Section
```python gpu
# no heading
second = first + 1
```
```sh
not python
```
"""


def test_blocks_share_names_and_those_for_a_gpu_wait_for_one(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (unit,) = units("page.md", PAGE)
    assert [block.place for block in unit.blocks] == ["page.md, Page, block 0", "page.md, Section, block 1"]
    assert run(unit, on_gpu=False) == 1 and run(unit, on_gpu=True) == 2


def test_a_block_that_fails_is_named():
    (unit,) = units("page.md", PAGE.replace("first = 1", "first = 1 / 0"))
    with pytest.raises(SyntaxError, match="page.md, Section, block 1"):
        run(units("page.md", PAGE.replace("second =", "second"))[0], on_gpu=False)
    with pytest.raises(ZeroDivisionError) as caught:
        run(unit, on_gpu=False)
    assert caught.traceback[-1].frame.code.raw.co_filename == "page.md, Page, block 0"


@pytest.mark.parametrize(
    ("change", "words"),
    [(("python gpu", "python cuda"), "asks for something unknown"), (("```sh", "  ```sh"), "start of a line")],
)
def test_fences_that_would_be_missed_are_errors(change, words):
    with pytest.raises(AssertionError, match=words):
        units("page.md", PAGE.replace(*change))


def test_tree_names_files_that_exist():
    block = (ROOT / "README.md").read_text(encoding="utf-8").split("## The tree")[1].split("##")[0]
    missing = [name for name in re.findall(r"[\w/]+\.(?:py|md)", block) if not list(ROOT.rglob(name.split("/")[-1]))]
    assert not missing, f"the README's tree names files that are not there: {missing}"
