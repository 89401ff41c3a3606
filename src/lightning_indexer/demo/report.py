"""What a run of the demo found, as plain numbers and text."""

import dataclasses
import json
from dataclasses import dataclass

from lightning_indexer.bench.agreement import Agreement
from lightning_indexer.demo.passages import PassageKind

STAND_IN = (
    "No trained model is loaded. Hashed word and character n-grams stand in for its hidden states, under weights "
    "that make a score mean shared words. Times, memory and exactness are real; which entries are relevant is only "
    "as good as word matching."
)


@dataclass(frozen=True)
class Cache:
    """Bytes of the paged pools, and of the same pools in bf16."""

    index_format: str
    index_bytes: int
    index_bf16_bytes: int
    kv_format: str
    kv_bytes: int
    kv_bf16_bytes: int


@dataclass(frozen=True)
class Seconds:
    """Wall time of each stage."""

    text: float
    prepare: float  # weights, and on a GPU compiling or loading the kernels
    build: float
    queries: float
    select: float
    attend: float
    check: float


@dataclass(frozen=True)
class Memory:
    """Bytes. Measured: what selection added, and the highest use (None where the system does not tell): of the process,
    or on a GPU of what torch allocates there.

    For comparison, fp32: dense scores [queries, entries]; the eager [queries, heads, entries] before the head sum; and
    both for a prefill of the whole context at once.
    """

    select_rise: int | None
    peak: int | None
    workspace: int
    dense_scores: int
    eager_scores: int
    prefill_dense_scores: int
    prefill_eager_scores: int


@dataclass(frozen=True)
class Found:
    """One chosen entry, the tokens it was compressed from, and the text to either side."""

    entry: int
    first_token: int
    score: float
    before: str
    text: str
    after: str


@dataclass(frozen=True)
class Example:
    """A query and its best entries; overlapping neighbours of a better entry are left out."""

    query: str
    kind: PassageKind
    best: list[Found]


@dataclass(frozen=True)
class Planted:
    """A sentence hidden in the context, and where its query ranks the best entry that covers any of its tokens."""

    sentence: str
    query: str
    first_token: int
    entry: int
    rank: int  # 1 is the best of all entries
    score: float
    in_top_k: bool


@dataclass(frozen=True)
class Report:
    """Everything that `lightning-indexer demo` prints."""

    version: str
    source: str
    seed: int
    device: str  # "cpu" or "cuda"
    device_name: str
    device_note: str | None  # why a GPU that is there is not used
    threads: int
    tokens: int
    source_tokens: int
    entries: int
    top_k: int
    num_queries: int
    num_heads: int
    cache: Cache
    seconds: Seconds
    memory: Memory
    agreement: Agreement
    attention_share: float  # of the attention to all entries, how much goes to the chosen ones
    planted: list[Planted]
    examples: list[Example]
    note: str = STAND_IN
    picture: str | None = None

    def to_json(self) -> str:
        """One JSON object; sizes in bytes, times in seconds."""
        data = dataclasses.asdict(self)
        data["agreement"]["fraction"] = self.agreement.agreeing / self.agreement.choices
        return json.dumps(data, indent=2)
