"""Attention weights of one backbone layer, read from safetensors under official or Hugging Face names.

    official: layers.{N}.attn.         Hugging Face: model.layers.{N}.self_attn.                    stored
    wq_a, wq_b, wkv                    q_a_proj, q_b_proj, kv_proj                                  FP8 or dense
    q_norm, kv_norm                    q_a_norm, kv_norm                                            dense
    wo_a, wo_b                         o_a_proj, o_b_proj                                           FP8 or dense
    attn_sink                          sinks                                                        dense
    compressor.{wkv,wgate,ape,norm}    compressor.{kv_proj,gate_proj,position_bias,kv_norm}         dense
    indexer.compressor.{same four}     compressor.indexer.{same four}                               dense
    indexer.wq_b                       compressor.indexer.q_b_proj                                  FP8 or dense
    indexer.weights_proj               compressor.indexer.scorer.weights_proj                       dense

An FP8 weight is E4M3 with one scale per 128 x 128 block, in `.scale` (official) or `.weight_scale_inv` (Hugging Face):
W[i, j] = code[i, j] * scale[i // 128, j // 128]. "Dense" is bf16, fp16 or fp32.

V4.1, under official names alone (the Hugging Face ones are not known for certain), with a scale per 32 x 32 block:

    wq_a .. attn_sink                  as above, in every layer (no source lists others; a file that differs is refused)
    compressor.{wkv,norm}              dense, in full layers; compressor.wgate too where the ratio is 2
    indexer.{wk,k_norm}                dense, in full layers
    indexer.{wq_b,weights_proj}        as above, in full and reindex layers
"""

import json
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lightning_indexer.config import CSA_RATIO, V41_RATIOS, DSV4Config
from lightning_indexer.formats import FP8_BLOCK, V41_FP8_BLOCK, dequantize_block_fp8

FP8_LINEARS = ("wq_a", "wq_b", "wkv", "wo_a", "wo_b", "indexer.wq_b")


def load_attention_weights(
    path: str | PathLike[str],
    config: DSV4Config,
    layer: int,
    *,
    fp8: Literal["keep", "dequantize"] = "keep",
    dtype: torch.dtype = torch.bfloat16,
    device: torch.device | str = "cpu",
) -> dict[str, Tensor]:
    """Read and check every attention tensor of one backbone layer (MTP layers, named `mtp.*`, are not read).

    Only the shards that hold the layer are opened, and only its tensors are read.

    Args:
        path: a .safetensors file, a folder with `model.safetensors.index.json`, or a folder of .safetensors files.
        layer: 0..num_hidden_layers-1.
        fp8: "keep" returns an FP8 weight as float8_e4m3fn with its `.scale` (float32 or float8_e8m0fnu; uint8 bytes
            come back as float8_e8m0fnu). "dequantize" returns it in `dtype`, without scale.
        dtype: of dequantised weights: bfloat16, float16 or float32. Dense tensors keep the dtype they are stored in.
    Returns:
        Tensors on `device` under the official names without prefix, in the order of `expected_shapes`, each FP8
        weight followed by its scale: "wq_a.weight", "wq_a.scale", "q_norm.weight", ..., "indexer.wq_b.scale", ...
    Raises:
        FileNotFoundError: `path`, or a shard that the index names, is not there.
        KeyError: tensors are missing (all of them are listed), a scale of an FP8 weight included.
        ValueError: layer out of range, unexpected tensors, a wrong shape or dtype, NaN or Inf, a broken file, V4.1
            under Hugging Face names.
    """
    if fp8 not in ("keep", "dequantize"):
        raise ValueError(f"load_attention_weights: fp8 must be 'keep' or 'dequantize', got {fp8!r}")
    if dtype not in _DENSE_DTYPES.values():
        raise ValueError(f"load_attention_weights: dtype must be one of {[*_DENSE_DTYPES.values()]}, got {dtype}")
    shapes = expected_shapes(config, layer)
    stored = _find_layer(Path(path), config, layer, shapes)
    with ExitStack() as stack:
        shards = {file: stack.enter_context(_open(file)) for file in sorted(set(stored.files.values()))}
        headers = _read_headers(stored, shards)
        _check_headers(stored, headers, shapes)
        tensors = {name: _read(stored, name, shards) for name in headers}
    if fp8 == "dequantize":
        tensors = _dequantize_all(stored, tensors, dtype)
    return {name: tensor.to(device) for name, tensor in tensors.items()}


def expected_shapes(config: DSV4Config, layer: int) -> dict[str, tuple[int, ...]]:
    """Shapes of a backbone layer's attention tensors by official name, without the scales of FP8 weights.

    Compressor tensors are there in CSA and HCA layers, indexer tensors in CSA layers; in V4.1 which of them depends on
    the layer's role. `wo_a` stacks the groups' weights; the rows of `wq_b` and `indexer.wq_b` are head-major. For the
    shape of a scale see `block_scale_shape`.
    """
    c = config
    ratio, role = config.layer_compress_ratio(layer), config.layer_role(layer)
    shapes: dict[str, tuple[int, ...]] = {
        "wq_a.weight": (c.query_compression_dim, c.hidden_size),
        "q_norm.weight": (c.query_compression_dim,),
        "wq_b.weight": (c.num_heads * c.head_dim, c.query_compression_dim),
        "wkv.weight": (c.head_dim, c.hidden_size),
        "kv_norm.weight": (c.head_dim,),
        "wo_a.weight": (c.o_groups * c.o_lora_rank, c.num_heads * c.head_dim // c.o_groups),
        "wo_b.weight": (c.hidden_size, c.o_groups * c.o_lora_rank),
        "attn_sink": (c.num_heads,),
    }
    if role == "full" or config.layer_kind(layer) == "HCA":
        shapes |= _compressor_shapes("compressor", ratio, c.head_dim, c.hidden_size)
    if role in ("full", "reindex"):
        shapes["indexer.wq_b.weight"] = (c.indexer_num_heads * c.indexer_head_dim, c.query_compression_dim)
        shapes["indexer.weights_proj.weight"] = (c.indexer_num_heads, c.hidden_size)
    if role == "full" and config.is_v41:
        shapes["indexer.wk.weight"] = (c.indexer_head_dim, c.head_dim)
        shapes["indexer.k_norm.weight"] = (c.indexer_head_dim,)
    elif role == "full":
        shapes |= _compressor_shapes("indexer.compressor", ratio, c.indexer_head_dim, c.hidden_size)
    return shapes


def block_scale_shape(weight_shape: tuple[int, ...], block_size: int = FP8_BLOCK) -> tuple[int, ...]:
    """Shape of the scale of an FP8 weight: one value per 128 x 128 block (V4.1: 32 x 32), the last ones cut short."""
    return tuple(-(-size // block_size) for size in weight_shape)


_INDEX_FILE = "model.safetensors.index.json"

# Spelled as safetensors headers do.
_DENSE_DTYPES = {"BF16": torch.bfloat16, "F16": torch.float16, "F32": torch.float32}
_FP8_DTYPE = "F8_E4M3"
_SCALE_DTYPES = ("F8_E8M0", "U8", "F32")

_HUGGING_FACE_MODULES = {
    "wq_a": "q_a_proj",
    "q_norm": "q_a_norm",
    "wq_b": "q_b_proj",
    "wkv": "kv_proj",
    "kv_norm": "kv_norm",
    "wo_a": "o_a_proj",
    "wo_b": "o_b_proj",
    "attn_sink": "sinks",
    "compressor.wkv": "compressor.kv_proj",
    "compressor.wgate": "compressor.gate_proj",
    "compressor.ape": "compressor.position_bias",
    "compressor.norm": "compressor.kv_norm",
    "indexer.wq_b": "compressor.indexer.q_b_proj",
    "indexer.weights_proj": "compressor.indexer.scorer.weights_proj",
    "indexer.compressor.wkv": "compressor.indexer.kv_proj",
    "indexer.compressor.wgate": "compressor.indexer.gate_proj",
    "indexer.compressor.ape": "compressor.indexer.position_bias",
    "indexer.compressor.norm": "compressor.indexer.kv_norm",
}


@dataclass(frozen=True)
class _StoredLayer:
    """Where one layer's tensors are."""

    label: str  # "layer 3 of PATH", for messages
    block_size: int  # of the scales of FP8 weights, both ways
    names: Mapping[str, str]  # official name without prefix -> name in the files, for all that such a layer may have
    files: Mapping[str, Path]  # name in the files -> file, for all that is there

    def has(self, name: str) -> bool:
        return self.names[name] in self.files

    def error(self, name: str, expected: str, got: object) -> ValueError:
        return ValueError(f"{self.label}: {self.names[name]} must {expected}, got {got}")


@dataclass(frozen=True)
class _Header:
    dtype: str
    shape: tuple[int, ...]


def _compressor_shapes(prefix: str, ratio: int, dim: int, hidden_size: int) -> dict[str, tuple[int, ...]]:
    # Windows of CSA overlap: half of the channels is for the token's own window, half for the next one.
    width = 2 * dim if ratio == CSA_RATIO else dim
    shapes: dict[str, tuple[int, ...]] = {f"{prefix}.wkv.weight": (width, hidden_size)}
    if ratio != 1:
        shapes[f"{prefix}.wgate.weight"] = (width, hidden_size)
    if ratio not in V41_RATIOS:
        shapes[f"{prefix}.ape"] = (ratio, width)
    return {**shapes, f"{prefix}.norm.weight": (dim,)}


def _find_layer(path: Path, config: DSV4Config, layer: int, shapes: Mapping[str, tuple[int, ...]]) -> _StoredLayer:
    files = _tensor_files(path)
    label = f"layer {layer} of {path}"
    prefixes = [f"{root}layers.{layer}.{module}." for root in ("", "model.") for module in ("attn", "self_attn")]
    found = [prefix for prefix in prefixes if any(name.startswith(prefix) for name in files)]
    if not found:
        raise KeyError(f"{label}: expected tensors named {' or '.join(p + '*' for p in prefixes)}, got none")
    if len(found) > 1:
        raise ValueError(f"{label}: expected tensors under one prefix, got {' and '.join(found)}")
    if config.is_v41 and found[0].endswith(".self_attn."):
        raise ValueError(
            f"{label}: expected official names ({prefixes[0]}*), got {found[0]}* (the Hugging Face names of V4.1's "
            "tensors are not known for certain)"
        )
    files = {name: file for name, file in files.items() if name.startswith(found[0])}
    names = {name: _name_in_files(name, found[0], files) for name in _with_scales(shapes)}
    return _StoredLayer(label, V41_FP8_BLOCK if config.is_v41 else FP8_BLOCK, names, files)


def _tensor_files(path: Path) -> dict[str, Path]:
    """The file of every tensor in the checkpoint. With an index no shard is opened for it."""
    if path.is_file():
        return dict.fromkeys(_names_in(path), path)
    if not path.is_dir():
        raise FileNotFoundError(f"{path}: expected a .safetensors file or a folder of them, got nothing")
    if (path / _INDEX_FILE).is_file():
        return _read_index(path / _INDEX_FILE)
    shards = sorted(path.glob("*.safetensors"))
    if not shards:
        raise FileNotFoundError(f"{path}: expected {_INDEX_FILE} or .safetensors files, got neither")
    files: dict[str, Path] = {}
    for shard in shards:
        for name in _names_in(shard):
            if name in files:
                raise ValueError(f"{path}: expected {name} in one file, got it in {files[name].name} and {shard.name}")
            files[name] = shard
    return files


def _read_index(index: Path) -> dict[str, Path]:
    try:
        weight_map = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        return {name: index.parent / shard for name, shard in weight_map.items()}
    except (ValueError, LookupError, TypeError, AttributeError):
        raise ValueError(f"{index}: expected a JSON object whose weight_map names the file of each tensor") from None


def _names_in(file: Path) -> list[str]:
    with _open(file) as shard:
        return list(shard.keys())


def _open(file: Path) -> Any:
    if not file.is_file():
        raise FileNotFoundError(f"{file}: expected this shard, which the index names, got nothing")
    try:
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise ValueError(f"{file}: expected a safetensors file, got {error}") from None


def _name_in_files(name: str, prefix: str, files: Mapping[str, Path]) -> str:
    """How this checkpoint spells an official name, or would if it had the tensor."""
    spellings = _spellings(name, prefix)
    return next((spelling for spelling in spellings if spelling in files), spellings[0])


def _spellings(name: str, prefix: str) -> list[str]:
    module, suffix = _split(name)
    suffixes = (".scale", ".weight_scale_inv") if suffix == ".scale" else (suffix,)
    if prefix.endswith(".self_attn."):
        return [prefix + _HUGGING_FACE_MODULES[module] + suffix for suffix in suffixes[::-1]]
    # transformers saves under official names, but takes every kv_norm, this one too, for a compressor's norm.
    modules = ("kv_norm", "norm") if module == "kv_norm" else (module,)
    return [prefix + module + suffix for module in modules for suffix in suffixes]


def _split(name: str) -> tuple[str, str]:
    """Split "wq_a.weight" into ("wq_a", ".weight"); `ape` and `attn_sink` have no suffix."""
    for suffix in (".weight", ".scale"):
        if name.endswith(suffix):
            return name.removesuffix(suffix), suffix
    return name, ""


def _with_scales(shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """All names that a layer with these shapes may have: each linear that can be FP8 is followed by its scale."""
    names = []
    for name in shapes:
        names.append(name)
        module, _ = _split(name)
        if module in FP8_LINEARS:
            names.append(f"{module}.scale")
    return names


def _read_headers(stored: _StoredLayer, shards: Mapping[Path, Any]) -> dict[str, _Header]:
    headers = {}
    for name in filter(stored.has, stored.names):
        full_name = stored.names[name]
        file = stored.files[full_name]
        try:
            header = shards[file].get_slice(full_name)
        except SafetensorError:
            raise KeyError(f"{stored.label}: expected {full_name} in {file.name} (says the index), got none") from None
        headers[name] = _Header(header.get_dtype(), tuple(header.get_shape()))
    return headers


def _check_headers(stored: _StoredLayer, headers: Mapping[str, _Header], shapes: Mapping[str, tuple[int, ...]]) -> None:
    """Names, shapes and dtypes, before any data is read."""
    fp8_linears = [m for m in FP8_LINEARS if f"{m}.weight" in headers and headers[f"{m}.weight"].dtype == _FP8_DTYPE]
    size = stored.block_size
    shapes = {**shapes, **{f"{m}.scale": block_scale_shape(shapes[f"{m}.weight"], size) for m in fp8_linears}}
    _check_names(stored, shapes)
    for name, header in headers.items():
        if name not in shapes:
            dtype = headers[name.replace(".scale", ".weight")].dtype
            raise stored.error(name, f"belong to an {_FP8_DTYPE} weight", f"one that is {dtype}")
        if header.shape != shapes[name]:
            raise stored.error(name, f"have shape {list(shapes[name])}", list(header.shape))
        allowed = _allowed_dtypes(name)
        if header.dtype not in allowed:
            raise stored.error(name, f"be {' or '.join(allowed)}", header.dtype)


def _check_names(stored: _StoredLayer, shapes: Mapping[str, tuple[int, ...]]) -> None:
    missing = [stored.names[name] for name in shapes if not stored.has(name)]
    unexpected = sorted(set(stored.files) - set(stored.names.values()))
    also = f"; not part of such a layer: {', '.join(unexpected)}" if unexpected else ""
    if missing:
        raise KeyError(f"{stored.label}: missing {', '.join(missing)}{also}")
    if unexpected:
        raise ValueError(f"{stored.label}: expected {len(shapes)} tensors, got more{also}")


def _allowed_dtypes(name: str) -> tuple[str, ...]:
    module, suffix = _split(name)
    if suffix == ".scale":
        return _SCALE_DTYPES
    return (_FP8_DTYPE, *_DENSE_DTYPES) if module in FP8_LINEARS else tuple(_DENSE_DTYPES)


def _read(stored: _StoredLayer, name: str, shards: Mapping[Path, Any]) -> Tensor:
    full_name = stored.names[name]
    tensor: Tensor = shards[stored.files[full_name]].get_tensor(full_name)
    if tensor.dtype == torch.uint8:
        tensor = tensor.view(torch.float8_e8m0fnu)
    _check_finite(stored, name, tensor)
    return tensor


def _check_finite(stored: _StoredLayer, name: str, tensor: Tensor) -> None:
    if tensor.dtype == torch.float8_e4m3fn:
        bad = (tensor.view(torch.uint8) & 0x7F) == 0x7F  # two NaN codes, no infinity
    elif tensor.dtype == torch.float8_e8m0fnu:
        bad = tensor.view(torch.uint8) == 0xFF
    else:
        bad = ~torch.isfinite(tensor)
    if bad.any():
        raise stored.error(name, "be finite", f"{int(bad.sum())} NaN or Inf, the first at {bad.nonzero()[0].tolist()}")


def _dequantize_all(stored: _StoredLayer, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> dict[str, Tensor]:
    result = {}
    for name, tensor in tensors.items():
        if tensor.dtype == torch.float8_e4m3fn:
            scale = tensors[name.replace(".weight", ".scale")]
            tensor = dequantize_block_fp8(tensor, scale, dtype, block_size=stored.block_size)
            _check_finite(stored, name, tensor)  # a large scale can overflow fp16
        if not name.endswith(".scale"):
            result[name] = tensor
    return result
