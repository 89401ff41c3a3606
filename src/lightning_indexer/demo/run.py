"""The demo, stage by stage: read a text, write the cache, ask, select, attend, check."""

import contextlib
import random
import time
from collections.abc import Iterator
from dataclasses import dataclass, field

import torch
from rich.progress import Progress
from torch import Tensor

import lightning_indexer
from lightning_indexer.bench.agreement import compare
from lightning_indexer.demo import findings, report
from lightning_indexer.demo.device import Device
from lightning_indexer.demo.layer import Advance, Layer
from lightning_indexer.demo.model import Vocabulary
from lightning_indexer.demo.options import Options
from lightning_indexer.demo.passages import NUM_PASSAGES, PLANTED, Passage, make_passages
from lightning_indexer.demo.text import Context, build_context, read_paragraphs, tokenize

NUM_CHECKED = 32
NUM_EXAMPLES = 3


@dataclass(frozen=True, eq=False)
class Row:
    """A query of the picture: its chosen entries, best first, and the tokens of the sentence it should find."""

    passage: Passage
    entries: list[int]
    planted: range | None


@dataclass
class Stages:
    """A progress bar and a wall time for each stage, what it enqueued on the device included."""

    progress: Progress
    device: Device
    seconds: dict[str, float] = field(default_factory=dict)

    @contextlib.contextmanager
    def __call__(self, name: str, description: str, total: int | None = None) -> Iterator[Advance]:
        """Run the body as one stage; call what this yields with the number of items done, if there is a total."""
        task = self.progress.add_task(description, total=total)
        start = time.perf_counter()
        yield lambda done: self.progress.advance(task, done)
        self.device.wait()
        self.seconds[name] = time.perf_counter() - start
        self.progress.update(task, total=total or 1, completed=total or 1)


@torch.no_grad()
def run_demo(options: Options, device: Device, progress: Progress) -> tuple[report.Report, list[Row]]:
    """Run every stage; returns the report and the rows of the picture.

    Raises:
        DemoError: the text cannot be used.
    """
    stages = Stages(progress, device)
    with stages("text", "Reading the text"):
        context = _load_context(options)
        vocabulary = Vocabulary(context)
    with stages("prepare", "Compiling kernels" if device.is_gpu else "Making the layer"):
        vectors, tokens = vocabulary.vectors.to(device.place), context.tokens.to(device.place)
        if device.is_gpu:
            _rehearse(Layer(options, device.place), vectors, tokens)
        layer = Layer(options, device.place)
    with stages("build", "Writing the cache", options.tokens) as advance:
        layer.write(vectors, tokens, advance)
    with stages("queries", "Making queries"):
        passages = make_passages(context, built_in_text=options.text_file is None, seed=options.seed)
        hidden = vocabulary.summarise([tokenize(passage.text) for passage in passages])
        queries = layer.ask(hidden.to(vectors))
    with stages("select", "Selecting entries"), device.watch_memory() as memory_use:
        indices, scores = layer.select(queries)
    with stages("attend", "Attending to them", len(passages)) as advance:
        _, lse = layer.attend(queries, indices, advance)
    with stages("check", "Checking against float64"):
        rows = sorted(random.Random(options.seed).sample(range(len(passages)), NUM_CHECKED))
        checked = queries.take(rows)
        view = layer.cache.read_indexer_view()
        agreement = compare(checked.q, checked.weights, view, indices[rows], num_entries=layer.num_entries)
        share = findings.attention_share(layer, checked, lse[rows])
        planted = findings.rank_planted(layer, queries, passages, context)
    shown = [i for i, passage in enumerate(passages) if passage.kind != "planted"][:NUM_EXAMPLES]
    result = report.Report(
        version=lightning_indexer.__version__,
        source="pydoc_data.topics" if options.text_file is None else str(options.text_file),
        seed=options.seed,
        device=device.place.type,
        device_name=device.name,
        device_note=device.note,
        threads=torch.get_num_threads(),
        tokens=options.tokens,
        source_tokens=context.source_tokens,
        entries=layer.num_entries,
        top_k=options.top_k,
        num_queries=len(passages),
        num_heads=layer.config.indexer_num_heads,
        cache=findings.cache_sizes(layer),
        seconds=report.Seconds(**stages.seconds),
        memory=findings.memory_sizes(layer, memory_use, len(passages), options.tokens),
        agreement=agreement,
        attention_share=share,
        planted=planted,
        examples=[findings.example(passages[i], indices[i], scores[i], context) for i in shown],
    )
    drawn = [*range(len(PLANTED)), *shown]
    return result, [_row(passages[i], indices[i].tolist(), context) for i in drawn]


def _rehearse(layer: Layer, vectors: Tensor, tokens: Tensor) -> None:
    """Run once, on a small part, what is timed later, so that the kernels are compiled or found, and loaded."""
    layer.write(vectors, tokens[:NUM_PASSAGES], lambda _done: None)
    queries = layer.ask(vectors[tokens[:NUM_PASSAGES]])
    indices, _ = layer.select(queries)
    layer.attend(queries, indices, lambda _done: None)
    layer.scores(queries.take([0]))


def _load_context(options: Options) -> Context:
    paragraphs = read_paragraphs(options.text_file, options.tokens)
    sentences = [sentence for sentence, _ in PLANTED]
    return build_context(paragraphs, sentences, num_tokens=options.tokens, seed=options.seed)


def _row(passage: Passage, entries: list[int], context: Context) -> Row:
    planted = None if passage.target is None else context.planted[passage.target]
    return Row(passage, [entry for entry in entries if entry >= 0], planted)
