"""The code in README.md and docs/, as it stands there.

Blocks that begin with ```python are run, those of a page from top to bottom in one namespace, in an empty folder. A
word behind it says what they need:

    gpu         a CUDA GPU: tests/gpu/test_guides_gpu.py runs them, between the page's other blocks
    compiler    a C++ compiler, which torch.compile wants
    torchrun    two processes: the block is a script of its own

A section that cannot run by itself has steps: a generator that yields the names which the next block needs, and looks
at what the block made when it goes on. A block that reads "DeepSeek-V4-Flash" finds a small checkpoint of that name.
"""

import re
import shutil
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from types import CodeType

import pytest
import torch
from safetensors.torch import save_file
from transformers import DeepseekV4Config

from lightning_indexer import DSV4Config
from lightning_indexer.checkpoint import expected_shapes

ROOT = Path(__file__).parent.parent
PAGES = ["README.md", *sorted(str(page.relative_to(ROOT)) for page in (ROOT / "docs").rglob("*.md"))]
FENCE = re.compile(r"^```([^\n]*)\n(.*?)^```$", re.MULTILINE | re.DOTALL)
NEEDS = {"gpu", "compiler", "torchrun"}

Steps = Callable[[], Iterator[dict]]
STEPS: dict[tuple[str, str], Steps] = {}  # (page, heading) -> its steps


@dataclass(frozen=True)
class Block:
    """A piece of Python and what it needs."""

    place: str
    code: str
    needs: frozenset[str]

    def can_run(self, *, on_gpu: bool) -> bool:
        has_compiler = any(map(shutil.which, ("g++", "clang++")))
        return ("gpu" not in self.needs or on_gpu) and ("compiler" not in self.needs or has_compiler)

    def program(self) -> CodeType:
        return compile(self.code, self.place, "exec")


@dataclass
class Unit:
    """Blocks that are run one after the other: those of a section that has steps, or the rest of a page."""

    name: str
    steps: Steps | None
    blocks: list[Block] = field(default_factory=list)

    def needs(self, what: str) -> bool:
        return any(what in block.needs for block in self.blocks)


def steps_of(page: str, heading: str) -> Callable[[Steps], Steps]:
    """Register the steps of a section."""

    def keep(steps: Steps) -> Steps:
        STEPS[page, heading] = steps
        return steps

    return keep


def units(page: str, text: str | None = None) -> list[Unit]:
    """What a page has to run."""
    found: dict[str, Unit] = {}
    for heading, info, code in fences((ROOT / page).read_text(encoding="utf-8") if text is None else text):
        language, *needs = info.split() or [""]
        assert language != "python" or set(needs) <= NEEDS, f"{page}, {heading}: {info!r} asks for something unknown"
        if language == "python":
            steps = STEPS.get((page, heading))
            name = f"{page}: {heading}" if steps else page
            unit = found.setdefault(name, Unit(name, steps))
            place = f"{page}, {heading}, block {len(unit.blocks)}"
            unit.blocks.append(Block(place, code, frozenset(needs)))
    return list(found.values())


def fences(text: str) -> Iterator[tuple[str, str, str]]:
    """(heading above it, what follows the backquotes, code) of every fence."""
    matches = list(FENCE.finditer(text))
    assert text.count("```") == 2 * len(matches), "fences begin at the start of a line, and end there"
    prose = FENCE.sub(lambda match: re.sub(r"[^\n]", " ", match[0]), text)  # a comment in code is no heading
    headings = [(match.start(), match[1]) for match in re.finditer(r"^#+ (.*)$", prose, re.MULTILINE)]
    for match in matches:
        yield next((title for start, title in reversed(headings) if start < match.start()), ""), match[1], match[2]


def run(unit: Unit, *, on_gpu: bool) -> int:
    """Run what can be run here, in the current folder. Returns how many blocks did."""
    if any("DeepSeek-V4-Flash" in block.code for block in unit.blocks):
        write_checkpoint(Path.cwd() / "DeepSeek-V4-Flash")
    steps, names, count = unit.steps and unit.steps(), {"__name__": "__guide__"}, 0
    for block in unit.blocks:
        if steps:
            names = next(steps, None)
            assert names is not None, f"{block.place} has no step"
        program = block.program()  # what cannot run here is Python at least
        if block.can_run(on_gpu=on_gpu):
            exec(program, names)
            count += 1
    assert not steps or next(steps, "end") == "end", f"{unit.name} has fewer blocks than steps"
    return count


def write_checkpoint(folder: Path) -> None:
    """Layers SWA, HCA and CSA of a small model, as Hugging Face stores them: the last one's attention weights."""
    sizes = {"hidden_size": 64, "num_hidden_layers": 3, "num_attention_heads": 4, "q_lora_rank": 32}
    sizes |= {"o_groups": 2, "o_lora_rank": 8, "index_n_heads": 8, "index_topk": 16}
    DeepseekV4Config(**sizes, compress_ratios=[0, 128, 4]).save_pretrained(folder)
    config = DSV4Config.from_json(folder / "config.json")
    shapes = expected_shapes(config, 2)
    save_file(
        {f"layers.2.attn.{name}": torch.randn(shape) * shape[-1] ** -0.5 for name, shape in shapes.items()},
        folder / "model.safetensors",
    )


def all_units() -> list:
    return [pytest.param(unit, id=unit.name) for page in PAGES for unit in units(page)]
