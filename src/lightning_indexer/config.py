"""The geometry of a DeepSeek-V4 or V4.1 model: sizes, the kind of each layer, and what RoPE needs.

Read from the official `inference/config.json` or from a Hugging Face `config.json`. Field names of the two:

    DSV4Config                  official           Hugging Face
    hidden_size                 dim                hidden_size
    num_hidden_layers           n_layers           num_hidden_layers
    num_heads                   n_heads            num_attention_heads
    rope_head_dim               rope_head_dim      qk_rope_head_dim, or partial_rotary_factor * head_dim
    query_compression_dim       q_lora_rank        q_lora_rank
    indexer_num_heads           index_n_heads      index_n_heads
    indexer_head_dim            index_head_dim     index_head_dim
    csa_top_k                   index_topk         index_topk
    sliding_window              window_size        sliding_window
    compress_ratios             compress_ratios    compress_ratios, or layer_types with compress_rates
    yarn_factor                 rope_factor        rope_scaling / rope_parameters: factor
    yarn_original_max_position  original_seq_len   ... original_max_position_embeddings
    rms_norm_eps                norm_eps           rms_norm_eps

V4.1 adds kv_source_layer_ids, index_source_layer_ids, candidate_source_layer_id, candidate_topk_blocks and
candidate_block_size, which DSV4Config calls the same. In V4.1 layers share what they compress, and what they choose:

    full      compresses tokens, writes KV entries and index keys, chooses      every layer of kv_source_layer_ids
    reindex   chooses anew among the index keys of the last full layer          the rest of index_source_layer_ids
    reuse     attends to what the last layer that chose has chosen              all others with a ratio of 1 or 2

Every layer has its own queries and its own window. In V4 every CSA layer is a full one.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal, NoReturn, TypeGuard

LayerKind = Literal["SWA", "CSA", "HCA"]
LayerRole = Literal["full", "reindex", "reuse"]

SWA_RATIO = 0
CSA_RATIO = 4
HCA_RATIO = 128
V41_RATIOS = (1, 2)
LAYER_KINDS: dict[int, LayerKind] = {
    SWA_RATIO: "SWA",
    **dict.fromkeys((*V41_RATIOS, CSA_RATIO), "CSA"),
    HCA_RATIO: "HCA",
}


@dataclass(frozen=True, kw_only=True)
class DSV4Config:
    """Sizes of one DeepSeek-V4 or V4.1 model, checked on construction (`ValueError` names the field).

    Args:
        hidden_size: width of the hidden state.
        num_hidden_layers: backbone layers; MTP layers are not counted.
        num_heads, head_dim: main attention, one shared KV head of `head_dim` (even).
        rope_head_dim: the last channels of each head that are rotated; even, at most either head dim.
        query_compression_dim: width of the query latent c_Q ("q_lora_rank").
        o_groups, o_lora_rank: grouped output projection; `o_groups` divides `num_heads`.
        indexer_num_heads: a multiple of 8 from 8 to 128.
        indexer_head_dim: 64 or 128.
        csa_top_k: entries that a CSA layer selects per query, 1..4096.
        sliding_window: uncompressed tokens that every layer sees.
        compress_ratios: one per layer: 0 (SWA), 4 (CSA) or 128 (HCA); in V4.1: 0 (SWA), 1 or 2 (CSA). At least
            `num_hidden_layers` long; what follows belongs to MTP layers and is kept as the checkpoint lists it.
        rope_theta: RoPE base of the ratio-0 layers. They never use YaRN.
        compress_rope_theta: RoPE base of the other layers, for everything in them (queries and window KV too).
        yarn_factor: context stretch of the compressed layers; 1.0 means no YaRN.
        yarn_original_max_position, yarn_beta_fast, yarn_beta_slow: the other YaRN constants.
        max_position_embeddings: longest context, in tokens.
        rms_norm_eps: epsilon of every RMSNorm.
        indexer_hadamard: rotate index queries and keys as the official code does. No config.json says: use
            `dataclasses.replace(config, indexer_hadamard=False)` for caches written without (vLLM, Hugging Face).
            False in V4.1.
        kv_source_layer_ids: V4.1's full layers, ascending; the layers up to the next one read their KV entries and
            index keys, and have their ratio.
        index_source_layer_ids: V4.1's full and reindex layers, ascending.
        candidate_source_layer_id: an index source. Those after it choose among the entries of the
            `candidate_topk_blocks` blocks of `candidate_block_size` entries (8 or 16) that score best in it. None: no
            such layer.
    """

    hidden_size: int
    num_hidden_layers: int
    num_heads: int
    head_dim: int
    rope_head_dim: int
    query_compression_dim: int
    o_groups: int
    o_lora_rank: int
    indexer_num_heads: int
    indexer_head_dim: int
    csa_top_k: int
    sliding_window: int
    compress_ratios: tuple[int, ...]
    rope_theta: float = 10_000.0
    compress_rope_theta: float = 160_000.0
    yarn_factor: float = 1.0
    yarn_original_max_position: int = 65_536
    yarn_beta_fast: float = 32.0
    yarn_beta_slow: float = 1.0
    max_position_embeddings: int = 1_048_576
    rms_norm_eps: float = 1e-6
    indexer_hadamard: bool = True
    kv_source_layer_ids: tuple[int, ...] = ()
    index_source_layer_ids: tuple[int, ...] = ()
    candidate_source_layer_id: int | None = None
    candidate_topk_blocks: int = 2048
    candidate_block_size: int = 8

    def __post_init__(self) -> None:
        for name in _POSITIVE_INTEGERS:
            _check_integer(name, getattr(self, name))
        for name in _POSITIVE_NUMBERS:
            _check_number(name, getattr(self, name))
        self._check_heads()
        self._check_indexer()
        self._check_layers()
        self._check_sharing()
        self._check_rope()

    @classmethod
    def v4_flash(cls) -> "DSV4Config":
        """DeepSeek-V4-Flash: 43 layers (2 SWA, 21 CSA, 20 HCA) and one MTP layer."""
        return cls(
            hidden_size=4096,
            num_hidden_layers=43,
            num_heads=64,
            head_dim=512,
            rope_head_dim=64,
            query_compression_dim=1024,
            o_groups=8,
            o_lora_rank=1024,
            indexer_num_heads=64,
            indexer_head_dim=128,
            csa_top_k=512,
            sliding_window=128,
            compress_ratios=(0, 0, *(4, 128) * 20, 4, 0),
            yarn_factor=16.0,
        )

    @classmethod
    def v4_pro(cls) -> "DSV4Config":
        """DeepSeek-V4-Pro: 61 layers (30 CSA, 31 HCA) and one MTP layer."""
        return cls(
            hidden_size=7168,
            num_hidden_layers=61,
            num_heads=128,
            head_dim=512,
            rope_head_dim=64,
            query_compression_dim=1536,
            o_groups=16,
            o_lora_rank=1024,
            indexer_num_heads=64,
            indexer_head_dim=128,
            csa_top_k=1024,
            sliding_window=128,
            compress_ratios=(128, 128, *(4, 128) * 29, 4, 0),
            yarn_factor=16.0,
        )

    @classmethod
    def v41_flash(cls) -> "DSV4Config":
        """DeepSeek-V4.1-Flash: 40 layers (2 SWA, 4 full, 4 reindex, 30 reuse) and three DSpark layers."""
        return cls(
            hidden_size=5120,
            num_hidden_layers=40,
            num_heads=64,
            head_dim=512,
            rope_head_dim=64,
            query_compression_dim=1280,
            o_groups=8,
            o_lora_rank=1024,
            indexer_num_heads=32,
            indexer_head_dim=128,
            csa_top_k=512,
            sliding_window=128,
            compress_ratios=(0, 0, *[2] * 18, *[1] * 20, 0, 0, 0),
            yarn_factor=16.0,
            rms_norm_eps=1e-20,
            indexer_hadamard=False,
            kv_source_layer_ids=(2, 8, 14, 20),
            index_source_layer_ids=(2, 8, 14, 20, 24, 28, 32, 36),
            candidate_source_layer_id=20,
        )

    @classmethod
    def from_json(cls, source: str | PathLike[str] | Mapping[str, Any]) -> "DSV4Config":
        """Read an official or a Hugging Face `config.json` of DeepSeek-V4 or V4.1.

        The layer kinds are always read from a list. Hugging Face's fallback for a file without one is a layer out of
        phase with the shipped V4-Pro list, so such a file is an error here.

        Args:
            source: the parsed JSON object, the path of the file, or the path of a folder that holds `config.json`.
        Raises:
            ValueError: a missing, malformed or contradictory field, or a file of DeepSeek-V3.2, V3 or another model
                (the message says which).
            FileNotFoundError: no such file.
        """
        data = source if isinstance(source, Mapping) else _read_json(Path(source))
        _refuse_other_models(data)
        _check_has_layer_list(data)
        is_official = "dim" in data or "n_layers" in data
        fields = _official_fields(data) if is_official else _hugging_face_fields(data)
        return cls(**fields, **(_v41_fields(data) if _v41_sign(data) else {}))

    def layer_compress_ratio(self, layer: int) -> int:
        """Compression ratio of a backbone layer: 0, 1, 2, 4 or 128. `ValueError` outside 0..num_hidden_layers-1."""
        if not 0 <= layer < self.num_hidden_layers:
            raise ValueError(
                f"layer must be in 0..{self.num_hidden_layers - 1} (the model has {self.num_hidden_layers} layers, "
                f"MTP not counted), got {layer}"
            )
        return self.compress_ratios[layer]

    def layer_kind(self, layer: int) -> LayerKind:
        """Kind of a backbone layer: "SWA", "CSA" or "HCA"."""
        return LAYER_KINDS[self.layer_compress_ratio(layer)]

    @property
    def is_v41(self) -> bool:
        """Whether layers share entries, index keys and selections: ratios 1 and 2, without overlap or position bias."""
        return bool(self.kv_source_layer_ids)

    def layer_role(self, layer: int) -> LayerRole | None:
        """What a CSA layer makes by itself: "full", "reindex" or "reuse" (see above). None for SWA and HCA."""
        if self.layer_kind(layer) != "CSA":
            return None
        if layer == self.layer_kv_source(layer):
            return "full"
        return "reindex" if layer == self.layer_index_source(layer) else "reuse"

    def layer_kv_source(self, layer: int) -> int:
        """The layer whose compressed KV and index keys this one reads: in V4 itself. `ValueError` for SWA."""
        return self._layer_source(layer, self.kv_source_layer_ids)

    def layer_index_source(self, layer: int) -> int:
        """The layer whose selection this one attends to: in V4 itself. `ValueError` for SWA."""
        return self._layer_source(layer, self.index_source_layer_ids)

    def layer_source(self, layer: int) -> int | None:
        """The layer that this one reads: a reindex layer its full layer, a reuse layer that which chose; else None."""
        sources = {"reindex": self.layer_kv_source, "reuse": self.layer_index_source}
        find = sources.get(self.layer_role(layer) or "")
        return find(layer) if find else None

    def layer_chooses_among_candidates(self, layer: int) -> bool:
        """Whether a layer's selection is restricted to what the candidate source left."""
        source = self.candidate_source_layer_id
        return source is not None and source < layer and self.layer_role(layer) == "reindex"

    def layer_rope_theta(self, layer: int) -> float:
        """RoPE base of everything that is rotated in a backbone layer."""
        return self.compress_rope_theta if self.layer_compress_ratio(layer) else self.rope_theta

    def layer_yarn_factor(self, layer: int) -> float:
        """YaRN factor of a backbone layer: `yarn_factor`, or 1.0 (no YaRN) in SWA layers."""
        return self.yarn_factor if self.layer_compress_ratio(layer) else 1.0

    def _check_heads(self) -> None:
        if self.head_dim % 2:
            _fail("head_dim", "even", self.head_dim)
        if self.rope_head_dim % 2 or self.rope_head_dim > min(self.head_dim, self.indexer_head_dim):
            limits = f"head_dim {self.head_dim} and indexer_head_dim {self.indexer_head_dim}"
            _fail("rope_head_dim", f"even and at most {limits}", self.rope_head_dim)
        if self.num_heads % self.o_groups:
            _fail("num_heads", f"divisible by o_groups {self.o_groups}", self.num_heads)

    def _check_indexer(self) -> None:
        if self.indexer_num_heads % 8 or self.indexer_num_heads > 128:
            _fail("indexer_num_heads", "a multiple of 8 from 8 to 128", self.indexer_num_heads)
        if self.indexer_head_dim not in (64, 128):
            _fail("indexer_head_dim", "64 or 128", self.indexer_head_dim)
        if self.csa_top_k > 4096:
            _fail("csa_top_k", "an integer in 1..4096", self.csa_top_k)
        if not isinstance(self.indexer_hadamard, bool):
            _fail("indexer_hadamard", "a bool", self.indexer_hadamard)

    def _check_layers(self) -> None:
        if not _is_list(self.compress_ratios):
            _fail("compress_ratios", "a sequence of integers", self.compress_ratios)
        object.__setattr__(self, "compress_ratios", tuple(self.compress_ratios))
        for layer, ratio in enumerate(self.compress_ratios):
            if not _is_ratio(ratio):
                _fail(f"compress_ratios[{layer}]", "0 (SWA), 1 or 2 (CSA of V4.1), 4 (CSA) or 128 (HCA)", ratio)
        if len(self.compress_ratios) < self.num_hidden_layers:
            expected = f"at least num_hidden_layers = {self.num_hidden_layers} entries long"
            _fail("compress_ratios", expected, f"{len(self.compress_ratios)} entries")

    def _layer_source(self, layer: int, sources: Sequence[int]) -> int:
        if self.layer_compress_ratio(layer) == SWA_RATIO:
            raise ValueError(f"layer {layer} is SWA and attends to no compressed entries")
        return max((source for source in sources if source <= layer), default=layer)

    def _check_sharing(self) -> None:
        """What V4.1 says of its layers, and that V4 says nothing of it."""
        for name in _SOURCE_LISTS:
            if not _is_list(getattr(self, name)):
                _fail(name, "a sequence of layers", getattr(self, name))
            object.__setattr__(self, name, tuple(getattr(self, name)))
        if not any(ratio in V41_RATIOS for ratio in self.compress_ratios):
            for name in (*_SOURCE_LISTS, "candidate_source_layer_id"):
                if getattr(self, name) not in ((), None):
                    _fail(name, "left out without a ratio of 1 or 2 (V4.1)", getattr(self, name))
            return
        for layer, ratio in enumerate(self.compress_ratios):
            if ratio not in (SWA_RATIO, *V41_RATIOS):
                _fail(f"compress_ratios[{layer}]", "0, 1 or 2 beside ratios of V4.1", ratio)
        if self.indexer_hadamard:
            _fail("indexer_hadamard", "False in V4.1, whose index keys are not rotated", True)
        self._check_sources()
        self._check_candidates()

    def _check_sources(self) -> None:
        for name in _SOURCE_LISTS:
            sources = getattr(self, name)
            if not all(_is_integer(layer) and 0 <= layer < self.num_hidden_layers for layer in sources):
                _fail(name, f"layers in 0..{self.num_hidden_layers - 1}", sources)
            if not sources or list(sources) != sorted(set(sources)):
                _fail(name, "a list of layers, ascending", sources)
        if not set(self.kv_source_layer_ids) <= set(self.index_source_layer_ids):
            _fail("index_source_layer_ids", "the kv_source_layer_ids and more", self.index_source_layer_ids)
        backbone = self.compress_ratios[: self.num_hidden_layers]
        for layer, ratio in enumerate(backbone):
            source = max((source for source in self.kv_source_layer_ids if source <= layer), default=None)
            if ratio == SWA_RATIO:
                if layer in self.index_source_layer_ids:
                    _fail("index_source_layer_ids", "layers with a ratio of 1 or 2", self.index_source_layer_ids)
            elif source is None:
                _fail("kv_source_layer_ids", f"a list that begins at or before layer {layer}", self.kv_source_layer_ids)
            elif backbone[source] != ratio:
                _fail(f"compress_ratios[{layer}]", f"that of its KV source, layer {source}: {backbone[source]}", ratio)

    def _check_candidates(self) -> None:
        source = self.candidate_source_layer_id
        if source is None:
            return
        if not _is_integer(source) or source not in self.index_source_layer_ids:
            _fail("candidate_source_layer_id", "one of index_source_layer_ids", source)
        later = [layer for layer in self.index_source_layer_ids if layer > source]
        if any(self.layer_kv_source(layer) != self.layer_kv_source(source) for layer in later):
            _fail("candidate_source_layer_id", "followed by index sources with the same index keys alone", source)
        if self.candidate_block_size not in (8, 16):
            _fail("candidate_block_size", "8 or 16", self.candidate_block_size)

    def _check_rope(self) -> None:
        if self.yarn_factor < 1:
            _fail("yarn_factor", "at least 1.0 (no YaRN)", self.yarn_factor)
        if self.yarn_beta_fast <= self.yarn_beta_slow:
            _fail("yarn_beta_fast", f"greater than yarn_beta_slow {self.yarn_beta_slow}", self.yarn_beta_fast)
        for name in ("rope_theta", "compress_rope_theta"):
            if getattr(self, name) <= 1:
                _fail(name, "greater than 1", getattr(self, name))


_POSITIVE_INTEGERS = (
    "hidden_size",
    "num_hidden_layers",
    "num_heads",
    "head_dim",
    "rope_head_dim",
    "query_compression_dim",
    "o_groups",
    "o_lora_rank",
    "indexer_num_heads",
    "indexer_head_dim",
    "csa_top_k",
    "sliding_window",
    "yarn_original_max_position",
    "max_position_embeddings",
    "candidate_topk_blocks",
    "candidate_block_size",
)
_SOURCE_LISTS = ("kv_source_layer_ids", "index_source_layer_ids")
_POSITIVE_NUMBERS = (
    "rope_theta",
    "compress_rope_theta",
    "yarn_factor",
    "yarn_beta_fast",
    "yarn_beta_slow",
    "rms_norm_eps",
)

_OFFICIAL_NAMES = {
    "hidden_size": "dim",
    "num_hidden_layers": "n_layers",
    "num_heads": "n_heads",
    "head_dim": "head_dim",
    "rope_head_dim": "rope_head_dim",
    "query_compression_dim": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "indexer_num_heads": "index_n_heads",
    "indexer_head_dim": "index_head_dim",
    "csa_top_k": "index_topk",
    "sliding_window": "window_size",
    "rope_theta": "rope_theta",
    "compress_rope_theta": "compress_rope_theta",
    "compress_ratios": "compress_ratios",
}
_HUGGING_FACE_NAMES = {
    "hidden_size": "hidden_size",
    "num_hidden_layers": "num_hidden_layers",
    "num_heads": "num_attention_heads",
    "head_dim": "head_dim",
    "query_compression_dim": "q_lora_rank",
    "o_groups": "o_groups",
    "o_lora_rank": "o_lora_rank",
    "indexer_num_heads": "index_n_heads",
    "indexer_head_dim": "index_head_dim",
    "csa_top_k": "index_topk",
    "sliding_window": "sliding_window",
    "max_position_embeddings": "max_position_embeddings",
    "rms_norm_eps": "rms_norm_eps",
}
_HUGGING_FACE_RATES = {
    "sliding_attention": SWA_RATIO,
    "compressed_sparse_attention": CSA_RATIO,
    "heavily_compressed_attention": HCA_RATIO,
}
_LEGACY_RATES = {
    "compress_rate_csa": "compressed_sparse_attention",
    "compress_rate_hca": "heavily_compressed_attention",
}

_V41_FIELDS = (*_SOURCE_LISTS, "candidate_source_layer_id")
_CANDIDATE_FIELDS = ("candidate_source_layer_id", "candidate_topk_blocks", "candidate_block_size")
_V41_OTHER_NAMES = ("kv_source_layers", "index_source_layers", "candidate_source_layer")
_WHY_NOT_V4 = {
    "V3.2": "its indexer scores single tokens and none of its layers is compressed (score_topk serves it: see "
    "docs/relatives.md)",
    "V3": "it has neither an indexer nor compressed layers",
}
_DECLARED_VERSIONS = {"32": "V3.2", "3": "V3"}


def _read_json(path: Path) -> Mapping[str, Any]:
    path = path / "config.json" if path.is_dir() else path
    try:
        data = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise ValueError(f"{path}: must be a JSON file, got {error}") from None
    if not isinstance(data, dict):
        raise ValueError(f"{path}: must hold a JSON object, got {type(data).__name__}")
    return data


def _refuse_other_models(data: Mapping[str, Any]) -> None:
    """Raise `ValueError` with the model's name unless the file can be one of DeepSeek-V4 or V4.1."""
    _refuse_unknown_spellings(data)
    names = _declared_names(data)
    versions = {name: _declared_version(name) for name in names}
    for name, version in versions.items():
        if version not in ("4", "41"):
            _refuse(_DECLARED_VERSIONS.get(version, name) if version else name, f"it declares {name!r}")
    sign = _v41_sign(data)
    for name, version in versions.items():
        if version == "4" and sign:
            raise ValueError(f"this config.json declares {name!r}, but {sign}, as DeepSeek-V4.1 does: it must be one")
    if not names and not _has_layer_list(data) and "kv_lora_rank" in data:
        has_indexer = "index_topk" in data
        _refuse("V3.2" if has_indexer else "V3", "it has kv_lora_rank and no compress_ratios")


def _refuse_unknown_spellings(data: Mapping[str, Any]) -> None:
    """Of V4.1's fields in places or under names that are not known for certain."""
    nested = data.get("text_config")
    if isinstance(nested, Mapping) and not _has_layer_list(data) and (_v41_sign(data) or _v41_sign(nested)):
        raise ValueError(
            "this config.json of DeepSeek-V4.1 has its fields in text_config: pass that object to from_json"
        )
    for name in _V41_OTHER_NAMES:
        if name in data:
            raise ValueError(
                f"this config.json of DeepSeek-V4.1 has {name}, whose meaning is not known for certain: "
                f"it must have {', '.join(_V41_FIELDS)}"
            )


def _v41_sign(data: Mapping[str, Any]) -> str | None:
    """What shows that a file is of V4.1; None where nothing does."""
    for name in _declared_names(data):
        if _declared_version(name) == "41":
            return f"it declares {name!r}"
    for name in (*_V41_FIELDS, *_V41_OTHER_NAMES):
        if data.get(name) is not None:
            return f"it has {name}"
    for ratio in _list_or_empty(data, "compress_ratios"):
        if ratio in V41_RATIOS:
            return f"compress_ratios has {ratio}"
    return None


def _declared_version(name: str) -> str | None:
    """'41' of 'deepseek_v41' or 'DeepseekV41ForCausalLM'; None where it is not DeepSeek's."""
    version = re.match(r"deepseekv(\d+)", re.sub(r"[_.\-]", "", name.lower()))
    return version[1] if version else None


def _declared_names(data: Mapping[str, Any]) -> list[str]:
    names = [data.get("model_type"), *_list_or_empty(data, "architectures")]
    return [name for name in names if isinstance(name, str)]


def _refuse(model: str, sign: str) -> NoReturn:
    if model in _WHY_NOT_V4:
        raise ValueError(f"this config.json is of DeepSeek-{model} ({sign}), not DeepSeek-V4: {_WHY_NOT_V4[model]}")
    raise ValueError(f"this config.json is not of DeepSeek-V4 ({sign}): model_type must be 'deepseek_v4'")


def _has_layer_list(data: Mapping[str, Any]) -> bool:
    return data.get("compress_ratios") is not None or data.get("layer_types") is not None


def _official_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = _renamed(data, _OFFICIAL_NAMES)
    # The shipped files of V4 leave out norm_eps; this is the default of the official ModelArgs. V4.1's is another.
    fields["rms_norm_eps"] = _number(data, "norm_eps", default=None if _v41_sign(data) else 1e-6)
    original = _number(data, "original_seq_len", default=0)
    if original == 0:  # how the official code spells "no YaRN"
        return {**fields, "max_position_embeddings": data.get("max_seq_len", 4096)}
    factor = _number(data, "rope_factor")
    return {
        **fields,
        "yarn_factor": factor,
        "yarn_original_max_position": original,
        "yarn_beta_fast": data.get("beta_fast", 32),
        "yarn_beta_slow": data.get("beta_slow", 1),
        "max_position_embeddings": int(original * factor),  # max_seq_len is the size of a run's buffers
    }


def _v41_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = _renamed(data, {name: name for name in _SOURCE_LISTS})
    optional = {name: data[name] for name in _CANDIDATE_FIELDS if data.get(name) is not None}
    return {**fields, **optional, "indexer_hadamard": False}


def _hugging_face_fields(data: Mapping[str, Any]) -> dict[str, Any]:
    fields = _renamed(data, _HUGGING_FACE_NAMES)
    main, compress = _hugging_face_rope(data)
    return {
        **fields,
        "compress_ratios": _hugging_face_ratios(data),
        "rope_head_dim": _hugging_face_rope_head_dim(data, main, compress),
        "rope_theta": _number({**data, **main}, "rope_theta"),
        "compress_rope_theta": _number({"rope_theta": data.get("compress_rope_theta"), **compress}, "rope_theta"),
        **_hugging_face_yarn(compress),
    }


def _hugging_face_ratios(data: Mapping[str, Any]) -> list[Any]:
    """Ratios from `compress_ratios` (it alone lists MTP layers) or `layer_types`; both must tell the same story."""
    _check_hugging_face_rates(data)
    for name in ("compress_ratios", "layer_types"):
        if data.get(name) is not None and not _is_list(data[name]):
            _fail(name, "a list", data[name])
    ratios = list(_list_or_empty(data, "compress_ratios"))
    from_kinds = []
    for layer, kind in enumerate(_list_or_empty(data, "layer_types")):
        if kind not in _HUGGING_FACE_RATES:
            _fail(f"layer_types[{layer}]", f"one of {tuple(_HUGGING_FACE_RATES)}", kind)
        from_kinds.append(_HUGGING_FACE_RATES[kind])
    for layer, (ratio, rate) in enumerate(zip(ratios, from_kinds, strict=False)):
        if ratio != rate:
            _fail(f"layer_types[{layer}]", f"in step with compress_ratios[{layer}] = {ratio}", rate)
    return max(ratios, from_kinds, key=len)


def _check_hugging_face_rates(data: Mapping[str, Any]) -> None:
    """transformers can give a kind another rate than the released models have; such a model cannot be run here."""
    rates = data.get("compress_rates") or {}
    if not isinstance(rates, Mapping):
        _fail("compress_rates", "an object", rates)
    legacy = {kind: data[name] for name, kind in _LEGACY_RATES.items() if data.get(name) is not None}
    for kind, rate in {**rates, **legacy}.items():
        if rate != _HUGGING_FACE_RATES.get(kind, rate):
            _fail(f"compress_rates of {kind}", str(_HUGGING_FACE_RATES[kind]), rate)


def _hugging_face_rope(data: Mapping[str, Any]) -> tuple[Mapping[str, Any], Mapping[str, Any]]:
    """The RoPE settings of SWA layers and of compressed layers, from the nested or the flat form."""
    settings = data.get("rope_scaling") or data.get("rope_parameters") or {}
    if not isinstance(settings, Mapping):
        _fail("rope_parameters", "an object", settings)
    main, compress = settings.get("main"), settings.get("compress")
    if isinstance(main, Mapping) and isinstance(compress, Mapping):
        if _rope_type(main) != "default":
            _fail("rope_parameters.main.rope_type", "'default' (SWA layers have no YaRN)", _rope_type(main))
        return main, compress
    # Flat: the scaling is that of the compressed layers, but a rope_theta in it is that of the SWA layers.
    theta = data.get("rope_theta", settings.get("rope_theta"))
    return {"rope_theta": theta}, {key: value for key, value in settings.items() if key != "rope_theta"}


def _hugging_face_yarn(compress: Mapping[str, Any]) -> dict[str, Any]:
    rope_type = _rope_type(compress)
    if rope_type == "default":
        return {}
    if rope_type != "yarn":
        _fail("rope_type of the compressed layers", "'default' or 'yarn'", rope_type)
    if compress.get("attention_factor") not in (None, 1):
        _fail("attention_factor", "1.0 or absent (V4 does not scale cos and sin)", compress["attention_factor"])
    return {
        "yarn_factor": _number(compress, "factor"),
        "yarn_original_max_position": _number(compress, "original_max_position_embeddings"),
        "yarn_beta_fast": compress.get("beta_fast", 32),
        "yarn_beta_slow": compress.get("beta_slow", 1),
    }


def _hugging_face_rope_head_dim(data: Mapping[str, Any], *rope: Mapping[str, Any]) -> int:
    head_dim = _number(data, "head_dim")
    sizes: set[int] = {
        round(head_dim * _number(part, "partial_rotary_factor"))
        for part in (data, *rope)
        if part.get("partial_rotary_factor") is not None
    }
    if data.get("qk_rope_head_dim") is not None:
        sizes.add(_number(data, "qk_rope_head_dim"))
    if not sizes:
        _fail("qk_rope_head_dim (or partial_rotary_factor)", "present", None)
    if len(sizes) > 1:
        _fail("qk_rope_head_dim", "one size everywhere (partial_rotary_factor too)", sorted(sizes))
    return sizes.pop()


def _rope_type(settings: Mapping[str, Any]) -> Any:
    return settings.get("rope_type", settings.get("type", "default"))


def _renamed(data: Mapping[str, Any], names: Mapping[str, str]) -> dict[str, Any]:
    missing = [name for name in names.values() if data.get(name) is None]
    if missing:
        _fail(", ".join(missing), "present", None)
    return {field: data[name] for field, name in names.items()}


def _number(data: Mapping[str, Any], name: str, default: float | None = None) -> Any:
    value = data.get(name, default)
    if not _is_number(value):
        _fail(name, "a number", value)
    return value


def _check_has_layer_list(data: Mapping[str, Any]) -> None:
    if not _has_layer_list(data):
        raise ValueError(
            "DSV4Config: config.json must list the layer kinds in compress_ratios (or layer_types), got neither; "
            "a default pattern would be wrong for some models"
        )


def _check_integer(name: str, value: Any) -> None:
    if not _is_integer(value) or value < 1:
        _fail(name, "a positive integer", value)


def _check_number(name: str, value: Any) -> None:
    if not _is_number(value) or not 0 < value < math.inf:
        _fail(name, "a positive finite number", value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool)


def _is_ratio(value: Any) -> bool:
    return _is_integer(value) and value in LAYER_KINDS


def _is_list(value: Any) -> TypeGuard[Sequence[Any]]:
    return isinstance(value, Sequence) and not isinstance(value, str | bytes)


def _list_or_empty(data: Mapping[str, Any], name: str) -> Sequence[Any]:
    value = data.get(name)
    return value if _is_list(value) else ()


def _fail(field: str, expected: str, got: object) -> NoReturn:
    raise ValueError(f"DSV4Config: {field} must be {expected}, got {got!r}")
