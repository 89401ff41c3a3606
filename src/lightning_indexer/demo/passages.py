"""Sentences hidden in the context, and the passages that look for them."""

import random
from dataclasses import dataclass
from typing import Literal

from lightning_indexer.demo.text import Context

NUM_PASSAGES = 1024
PASSAGE_TOKENS = 16

PassageKind = Literal["planted", "question", "text"]


@dataclass(frozen=True)
class Passage:
    """What one query asks with: its words, and the planted sentence that it should find (if any)."""

    text: str
    kind: PassageKind
    target: int | None = None  # index into PLANTED


# The question shares the sentence's key words, in another order, another form and other surroundings.
PLANTED = (
    (
        "The lighthouse keeper of Skagen buried seven copper lanterns under the old pear tree.",
        "They still dig in the harbour for those copper lanterns which Skagen's lighthouse keeper buried.",
    ),
    (
        "Marmalade prices in Dundee doubled after the frost destroyed the Seville oranges.",
        "Because of frost, Seville oranges were scarce and people of Dundee paid more for marmalade.",
    ),
    (
        "My grandmother's clock in Prague stops at noon whenever thunder rolls over the river.",
        "Is it the thunder near the river that makes a grandmother's clock in Prague stop?",
    ),
    (
        "A violinist from Tbilisi repaired her bow with hair from a grey stallion.",
        "He told us that hair of some grey stallion was good enough for a Tbilisi violinist's bow.",
    ),
    (
        "The ferry to Stromness carried forty beehives and one sleeping veterinarian.",
        "Nobody woke the veterinarian, sleeping between the beehives on a Stromness ferry.",
    ),
    (
        "Captain Okafor painted the submarine turquoise to amuse the whales near Iceland.",
        "The whales of Iceland did notice that a submarine was turquoise, as captain Okafor hoped.",
    ),
    (
        "Snow leopards avoid the monastery because the monks burn juniper at dawn.",
        "What do monks burn in their monastery, juniper perhaps, that keeps a snow leopard away?",
    ),
    (
        "The bakery on Quince Street hides its sourdough recipe inside a hollow dictionary.",
        "She opened a hollow dictionary and there was the bakery's recipe for sourdough.",
    ),
)

QUESTIONS = (
    "How do I make lists sort with a key function, and is the sort stable?",
    "When does the garbage collector find reference cycles?",
    "How are imaginary literals and complex numbers written?",
)


def make_passages(context: Context, *, built_in_text: bool, seed: int) -> list[Passage]:
    """NUM_PASSAGES passages: one per planted sentence, the questions where the built-in text can answer them, and
    pieces of the context from random places."""
    passages = [Passage(question, "planted", target) for target, (_, question) in enumerate(PLANTED)]
    if built_in_text:
        passages += [Passage(question, "question") for question in QUESTIONS]
    rng = random.Random(seed)
    while len(passages) < NUM_PASSAGES:
        start = rng.randrange(len(context.tokens) - PASSAGE_TOKENS)
        passages.append(Passage(context.text(start, start + PASSAGE_TOKENS), "text"))
    return passages
