"""A stand-in for a trained model: hidden states from hashed n-grams, and weights under which a score means similarity.

Nothing here is learned, and all of it is made on the CPU, so that every device gets the same. A hidden state is 64
groups of 8 channels, one group per indexer head: 7 feature channels and one that is always 1. Every word, twice, and
every character trigram of a word are hashed to a group and to a sign pattern of its feature channels, so head h listens
to the n-grams that hash to h. The weights of the CSA layer are then

    index keys      a seeded random projection of all features into the channels that RoPE leaves alone (`key_basis`)
    index queries   the same projection, in head h of group h alone; so <q_h, K_s> is how much of the passage's group h
                    the entry's tokens share, with a little noise, at any distance
    head weights    the channels that are always 1: every head counts the same
    gates, ape      zero: an entry is the plain mean of its eight tokens
    KV entries      the features themselves
"""

import dataclasses
import hashlib
import math
from collections import Counter
from collections.abc import Iterable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from lightning_indexer.config import CSA_RATIO, DSV4Config
from lightning_indexer.demo.text import Context, is_word
from lightning_indexer.nn.compressor import Compressor
from lightning_indexer.nn.csa_indexer import CSAIndexer
from lightning_indexer.nn.norm import rms_norm
from lightning_indexer.nn.rope import layer_frequencies
from lightning_indexer.rotary import apply_rope

NUM_GROUPS = 64
GROUP_FEATURES = 7
GROUP_CHANNELS = GROUP_FEATURES + 1
HIDDEN_SIZE = NUM_GROUPS * GROUP_CHANNELS

# Smooth inverse frequency (Arora, Liang and Ma 2017): a word of relative frequency p counts a / (a + p).
_FREQUENCY_SCALE = 2e-4
_HASHES_PER_WORD = 2  # words that meet in one group rarely meet in both
_TRIGRAM_SHARE = 0.1  # of a word's squared length: "sleeping" resembles "sleeps", a little

CONFIG = DSV4Config(
    hidden_size=HIDDEN_SIZE,
    num_hidden_layers=1,
    num_heads=8,
    head_dim=512,
    rope_head_dim=64,
    query_compression_dim=HIDDEN_SIZE,
    o_groups=1,
    o_lora_rank=64,
    indexer_num_heads=NUM_GROUPS,
    indexer_head_dim=128,
    csa_top_k=512,
    sliding_window=128,
    compress_ratios=(CSA_RATIO,),
    yarn_factor=16.0,
)
LAYER = 0


def config_for(top_k: int) -> DSV4Config:
    """The demo's one CSA layer."""
    return dataclasses.replace(CONFIG, csa_top_k=top_k)


class Vocabulary:
    """Hidden states of words: `vectors` bf16 [num pieces, HIDDEN_SIZE], a row for each piece of the context."""

    def __init__(self, context: Context) -> None:
        counts = torch.bincount(context.tokens, minlength=len(context.pieces)).tolist()
        self._counts: Counter[str] = Counter()
        for piece, count in zip(context.pieces, counts, strict=True):
            self._counts[_word(piece)] += count
        self._num_tokens = len(context.tokens)
        self.vectors = self.embed(context.pieces).to(torch.bfloat16)

    def embed(self, pieces: Sequence[str]) -> Tensor:
        """fp32 [len(pieces), HIDDEN_SIZE]."""
        rows, hashes, lengths = [], [], []
        for row, piece in enumerate(pieces):
            for ngram, length in self._ngrams(piece):
                rows.append(row)
                hashes.append(_hash(ngram))
                lengths.append(length)
        table = torch.zeros(len(pieces), NUM_GROUPS, GROUP_CHANNELS)
        table[:, :, GROUP_FEATURES] = 1.0
        code = torch.tensor(hashes, dtype=torch.int64)
        cell = torch.tensor(rows, dtype=torch.int64) * NUM_GROUPS + code % NUM_GROUPS
        bits = (code // NUM_GROUPS).unsqueeze(1) >> torch.arange(GROUP_FEATURES) & 1
        signs = (2.0 * bits - 1.0) * GROUP_FEATURES**-0.5
        features = F.pad(signs * torch.tensor(lengths).unsqueeze(1), (0, 1))
        table.view(-1, GROUP_CHANNELS).index_add_(0, cell, features)
        return table.flatten(1)

    def summarise(self, passages: Sequence[Sequence[str]]) -> Tensor:
        """fp32 [T, HIDDEN_SIZE]: each passage's last hidden state, the sum of its words' features."""
        pieces = list(dict.fromkeys(piece for passage in passages for piece in passage))
        number = {piece: i for i, piece in enumerate(pieces)}
        words = self.embed(pieces)
        total = torch.stack([words[[number[piece] for piece in passage]].sum(0) for passage in passages])
        total.view(-1, NUM_GROUPS, GROUP_CHANNELS)[:, :, GROUP_FEATURES] = 1.0
        return total

    def _ngrams(self, piece: str) -> Iterable[tuple[str, float]]:
        """The hashed n-grams of a piece, with their lengths as vectors; punctuation has none."""
        word = _word(piece)
        if not is_word(word):
            return []
        count = max(self._counts[word], 1)  # a word that the context lacks counts no more than its rarest one
        weight = _FREQUENCY_SCALE / (_FREQUENCY_SCALE + count / self._num_tokens)
        edged = f"<{word}>"
        words = [f"{i} {word}" for i in range(_HASHES_PER_WORD)]
        trigrams = [edged[i : i + 3] for i in range(len(edged) - 2)]
        shares = [(1 - _TRIGRAM_SHARE) / len(words)] * len(words) + [_TRIGRAM_SHARE / len(trigrams)] * len(trigrams)
        return [(ngram, weight * math.sqrt(share)) for ngram, share in zip(words + trigrams, shares, strict=True)]


def make_indexer(config: DSV4Config, seed: int) -> CSAIndexer:
    """The layer's indexer, its weights loaded."""
    basis = key_basis(config, seed)  # [head_dim, hidden]
    per_head = torch.zeros(NUM_GROUPS, *basis.shape, device="cpu")
    proj = torch.zeros(NUM_GROUPS, HIDDEN_SIZE, device="cpu")
    for head in range(NUM_GROUPS):
        channels = slice(head * GROUP_CHANNELS, (head + 1) * GROUP_CHANNELS)
        per_head[head, :, channels] = basis[:, channels]
        proj[head, head * GROUP_CHANNELS + GROUP_FEATURES] = 1.0
    indexer = CSAIndexer(config, LAYER)
    weights = {"wq_b.weight": per_head.flatten(0, 1), "weights_proj.weight": proj}
    weights |= {f"compressor.{name}": tensor for name, tensor in _mean_compressor(basis).items()}
    indexer.load_weights(weights)
    return indexer


def make_compressor(config: DSV4Config) -> Compressor:
    """The layer's main compressor, its weights loaded."""
    compressor = Compressor(config, LAYER, dim=config.head_dim)
    compressor.load_weights(_mean_compressor(value_basis(config)))
    return compressor


def make_main_query(config: DSV4Config, seed: int) -> Tensor:
    """fp32 [num_heads * head_dim, hidden]: main queries tied to the KV entries; each head sees half of the features."""
    generator = torch.Generator("cpu").manual_seed(seed)
    seen = torch.rand(config.num_heads, 1, HIDDEN_SIZE, generator=generator, device="cpu") < 0.5
    return (value_basis(config) * seen).flatten(0, 1)


def project_main_query(config: DSV4Config, weight: Tensor, c_Q: Tensor, positions: Tensor) -> Tensor:
    """[T, num_heads, head_dim] in c_Q's dtype, by the weight of `make_main_query`."""
    q = F.linear(c_Q, weight.to(c_Q.dtype)).unflatten(-1, (config.num_heads, config.head_dim))
    frequencies = layer_frequencies(config, LAYER).to(c_Q.device)
    return apply_rope(rms_norm(q, None, config.rms_norm_eps), positions, frequencies)


def key_basis(config: DSV4Config, seed: int) -> Tensor:
    """fp32 [indexer_head_dim, hidden]: random directions for the features, zero in the channels that RoPE rotates.

    The directions of a group are orthonormal, so that words of one group are told apart as well as their signs allow.
    """
    unrotated = config.indexer_head_dim - config.rope_head_dim
    generator = torch.Generator("cpu").manual_seed(seed)
    groups = torch.linalg.qr(torch.randn(NUM_GROUPS, unrotated, GROUP_FEATURES, generator=generator, device="cpu")).Q
    basis = torch.zeros(config.indexer_head_dim, NUM_GROUPS, GROUP_CHANNELS, device="cpu")
    basis[:unrotated, :, :GROUP_FEATURES] = groups.transpose(0, 1)
    return basis.flatten(1)


def value_basis(config: DSV4Config) -> Tensor:
    """fp32 [head_dim, hidden]: a channel of its own for each feature, zero in the channels that RoPE rotates."""
    features = torch.arange(HIDDEN_SIZE, device="cpu").view(NUM_GROUPS, GROUP_CHANNELS)[:, :GROUP_FEATURES].flatten()
    assert len(features) == config.head_dim - config.rope_head_dim, "as many features as unrotated channels"
    basis = torch.zeros(config.head_dim, HIDDEN_SIZE, device="cpu")
    basis[torch.arange(len(features), device="cpu"), features] = 1.0
    return basis


def _mean_compressor(basis: Tensor) -> dict[str, Tensor]:
    both_windows = torch.cat([basis, basis])
    return {
        "wkv.weight": both_windows,
        "wgate.weight": torch.zeros_like(both_windows),
        "ape": torch.zeros(CSA_RATIO, len(both_windows), device="cpu"),
        "norm.weight": torch.ones(len(basis), device="cpu"),
    }


def _word(piece: str) -> str:
    return piece.strip().lower()


def _hash(ngram: str) -> int:
    """31 bits that are the same in every process, unlike Python's own hash."""
    return int.from_bytes(hashlib.blake2b(ngram.encode(), digest_size=4).digest(), "little") >> 1
