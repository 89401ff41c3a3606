"""Real text as a context of tokens: words and punctuation, paragraph by paragraph."""

import random
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from lightning_indexer.demo.options import DemoError

MAX_CHARS_PER_TOKEN = 64  # more of a long file is not read
_CJK = "\u3040-\u30ff\u3400-\u4dbf\u4e00-\u9fff\uf900-\ufaff"  # written without spaces: a token per character
_TOKEN = re.compile(rf"[{_CJK}]|[^\W{_CJK}]+|[^\w\s]+")
_BLANK_LINES = re.compile(r"\n\s*\n")


@dataclass(frozen=True, eq=False)
class Context:
    """A context of N tokens.

    pieces: spelling of each word of the vocabulary, with the space before it (so that joined pieces can be read).
    tokens: int64 [N], indices into `pieces`.
    source_tokens: tokens of the text itself; less than N where the text was repeated.
    planted: the tokens of each planted sentence.
    """

    pieces: list[str]
    tokens: Tensor
    source_tokens: int
    planted: list[range]

    def text(self, start: int, stop: int) -> str:
        """Tokens start..stop-1 as text; positions outside the context are left out."""
        return "".join(self.pieces[i] for i in self.tokens[max(start, 0) : max(stop, 0)].tolist())


def read_paragraphs(path: Path | None, num_tokens: int) -> list[list[str]]:
    """The paragraphs of a text file, or of the Python reference that CPython ships, as lists of pieces.

    Raises:
        DemoError: the file cannot be read as text, or holds no words.
    """
    text = _built_in_text() if path is None else _read_file(path, num_tokens * MAX_CHARS_PER_TOKEN)
    paragraphs = [pieces for block in _BLANK_LINES.split(text) if (pieces := tokenize(block))]
    if not any(is_word(piece) for pieces in paragraphs for piece in pieces):
        raise DemoError(f"{path}: no words found, the demo needs some text")
    return paragraphs


def tokenize(text: str) -> list[str]:
    """Words and runs of punctuation, each with a space in front where the text has white space or begins."""
    spaced = " " + text
    found = _TOKEN.finditer(spaced)
    return [(" " if spaced[match.start() - 1].isspace() else "") + match.group() for match in found]


def is_word(piece: str) -> bool:
    """Whether a piece is a word or a number, rather than punctuation."""
    return any(char.isalnum() for char in piece)


def build_context(
    paragraphs: Sequence[Sequence[str]], planted: Sequence[str], *, num_tokens: int, seed: int
) -> Context:
    """Fill a context: the paragraphs in order, again in shuffled orders where they are too few, and planted sentences.

    Each planted sentence stands once, at a random place of its own equal share of the context, wherever that falls in
    a paragraph.
    """
    rng = random.Random(seed)
    sentences = [tokenize(sentence) for sentence in planted]
    num_text = num_tokens - sum(len(sentence) for sentence in sentences)
    text = _fill(paragraphs, num_text, rng)
    pieces: list[str] = []
    spans: list[range] = []
    last = 0
    for i, sentence in enumerate(sentences):
        share = range(i * num_text // len(sentences), (i + 1) * num_text // len(sentences))
        place = rng.choice(share)
        pieces += text[last:place]
        spans.append(range(len(pieces), len(pieces) + len(sentence)))
        pieces += sentence
        last = place
    pieces += text[last:]
    vocabulary: dict[str, int] = {}
    tokens = torch.tensor([vocabulary.setdefault(piece, len(vocabulary)) for piece in pieces])
    return Context(list(vocabulary), tokens, sum(len(p) for p in paragraphs), spans)


def _fill(paragraphs: Sequence[Sequence[str]], num_tokens: int, rng: random.Random) -> list[str]:
    text: list[str] = []
    for paragraph in _endless(paragraphs, rng):
        text += paragraph
        if len(text) >= num_tokens:
            break
    return text[:num_tokens]


def _endless(paragraphs: Sequence[Sequence[str]], rng: random.Random) -> Iterator[Sequence[str]]:
    order = list(paragraphs)
    while True:
        yield from order
        rng.shuffle(order)


def _built_in_text() -> str:
    try:
        from pydoc_data.topics import topics
    except ImportError:
        raise DemoError("this Python came without pydoc_data.topics, the default text (give a TEXT_FILE)") from None
    return "\n\n".join(topics.values())


def _read_file(path: Path, max_chars: int) -> str:
    try:
        with path.open(encoding="utf-8-sig") as file:
            return file.read(max_chars)
    except OSError as error:
        raise DemoError(f"{path}: {error.strerror or error}") from None
    except UnicodeDecodeError:
        raise DemoError(f"{path}: not a UTF-8 text file") from None
