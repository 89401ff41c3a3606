"""Linear layers as checkpoints store them: dense, FP8 in blocks, NVFP4.

All compute y = x W^T in x's dtype, without bias. Weights come from `load_weights`; calling a layer before raises.
Quantised ones are multiplied out at every call, or once by `keep_dense`.
"""

from collections.abc import Mapping

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from lightning_indexer.checks import check_choice, check_tensor
from lightning_indexer.formats import FP8_BLOCK, NVFP4_GROUP, V41_FP8_BLOCK, dequantize, dequantize_block_fp8
from lightning_indexer.query import QuantizedQuery, quantize_query

_FLOATS = (torch.bfloat16, torch.float32, torch.float16)


class WeightsNotLoaded(RuntimeError):
    """A module was called before its weights were loaded."""


class LoadedModule(nn.Module):
    """A module whose tensors come from a checkpoint: absent until loaded, then frozen buffers."""

    def put(self, name: str, tensor: Tensor) -> None:
        """Set one of the module's tensors."""
        self.register_buffer(name, tensor)

    def get(self, name: str) -> Tensor:
        """One of the module's tensors.

        Raises:
            WeightsNotLoaded: it was not loaded.
        """
        tensor = self._buffers.get(name)
        if tensor is None:
            raise WeightsNotLoaded(f"{type(self).__name__}: {name} is not loaded (call load_weights first)")
        return tensor

    def hold(self, **tensors: Tensor) -> None:
        """Set the module's tensors; others that it had are dropped."""
        self._buffers.clear()
        for name, tensor in tensors.items():
            self.put(name, tensor)

    def keep_dense(self, dtype: torch.dtype = torch.bfloat16) -> None:
        """Multiply weights out now, of this module and of all its parts, instead of at every call.

        What is called with x in `dtype` gives the same bits as before, and other x are refused. What was stored is
        dropped: an FP8 weight then takes 2 bytes instead of 1, an NVFP4 weight 2 instead of 0.56, in fp32 4. The
        projections of a compressor, which multiplies in fp32 whatever x is, are held in fp32 and serve every x.
        `load_weights` undoes it. CUDA graphs that were captured before must be captured again.

        Args:
            dtype: bf16, fp32 or fp16.
        Raises:
            RuntimeError: there is nothing to keep (`WeightsNotLoaded`).
            TypeError: a weight is kept in another dtype already. Nothing was changed.
        """
        check_choice(type(self).__name__, "dtype", dtype, _FLOATS)
        parts = [part for part in self.modules() if isinstance(part, LoadedModule)]
        for part in parts:
            part._check_keepable(dtype)
        for part in parts:
            part._keep_own(dtype)

    def _check_keepable(self, dtype: torch.dtype) -> None:
        """Raise what `keep_dense` would raise of the module without its parts."""

    def _keep_own(self, dtype: torch.dtype) -> None:
        """`keep_dense` of the module without its parts."""


class Linear(LoadedModule):
    """A dense linear layer; the weight keeps the checkpoint's dtype and is cast to x's for the product.

    `keep_dense` holds it as `kept` [out, in] instead of what was loaded.
    """

    def __init__(self, in_features: int, out_features: int) -> None:
        super().__init__()
        self.in_features, self.out_features = in_features, out_features

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take `weight` [out, in], bf16, fp32 or fp16."""
        weight = _take(self, weights, "weight")
        check_tensor("Linear", "weight", weight, dtype=_FLOATS, shape=(self.out_features, self.in_features))
        self.hold(weight=weight)

    def dense_weight(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`; once dense, in the dtype that is kept and no other."""
        kept = self._buffers.get("kept")
        if kept is None:
            return self._multiply_out(dtype)
        if kept.dtype != dtype:
            raise TypeError(
                f"{type(self).__name__}: weight is kept dense in {kept.dtype} and serves no other dtype, got {dtype} "
                "(call load_weights again)"
            )
        return kept

    def _multiply_out(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`, of what was loaded."""
        return self.get("weight").to(dtype)

    def _check_keepable(self, dtype: torch.dtype) -> None:
        """Raise unless there is a weight, as it was loaded or kept in `dtype`."""
        if "kept" in self._buffers:
            self.dense_weight(dtype)
        else:
            self.get("weight")

    def _keep_own(self, dtype: torch.dtype) -> None:
        """Hold the dense weight instead of what was loaded."""
        self.hold(kept=self.dense_weight(dtype))

    def forward(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype."""
        return F.linear(x, self.dense_weight(x.dtype))


class Fp8BlockLinear(Linear):
    """E4M3 weight with one UE8M0 scale per 128 x 128 block: W[i, j] * scale[i // 128, j // 128]. V4.1: 32 x 32.

    Multiplied out it is exact in bf16 where the scales are powers of two.
    """

    block_size = FP8_BLOCK

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take `weight` float8_e4m3fn [out, in] and `scale` float8_e8m0fnu or fp32 [ceil(out/128), ceil(in/128)].

        A scale of [ceil(out/32), ceil(in/32)] is one of V4.1.
        """
        weight, scale = _take(self, weights, "weight"), _take(self, weights, "scale")
        shape = (self.out_features, self.in_features)
        block_size = V41_FP8_BLOCK if scale.shape == _blocks(shape, V41_FP8_BLOCK) else FP8_BLOCK
        blocks = _blocks(shape, block_size)
        check_tensor("Fp8BlockLinear", "weight", weight, dtype=torch.float8_e4m3fn, shape=shape)
        check_tensor("Fp8BlockLinear", "scale", scale, dtype=(torch.float8_e8m0fnu, torch.float32), shape=blocks)
        self.hold(weight=weight, scale=scale)
        self.block_size = block_size

    def _multiply_out(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`, of what was loaded."""
        return dequantize_block_fp8(self.get("weight"), self.get("scale"), dtype, block_size=self.block_size)


class Nvfp4Linear(Linear):
    """NVFP4 weight: E2M1 codes, an E4M3 scale per 16 inputs, one fp32 global scale.

    Args:
        output_format: None gives a tensor. "mxfp4" or "nvfp4" quantises the output for the indexer: the call returns a
            `QuantizedQuery` [T, out / head_dim, head_dim].
        head_dim: of the quantised output, 64 or 128.
    """

    def __init__(
        self, in_features: int, out_features: int, *, output_format: str | None = None, head_dim: int = 128
    ) -> None:
        super().__init__(in_features, out_features)
        if in_features % NVFP4_GROUP:
            raise ValueError(f"Nvfp4Linear: in_features must be a multiple of {NVFP4_GROUP}, got {in_features}")
        if output_format not in (None, "mxfp4", "nvfp4"):
            raise ValueError(f"Nvfp4Linear: output_format must be None, 'mxfp4' or 'nvfp4', got {output_format!r}")
        if output_format and out_features % head_dim:
            raise ValueError(f"Nvfp4Linear: out_features must be a multiple of {head_dim}, got {out_features}")
        self.output_format, self.head_dim = output_format, head_dim

    def load_weights(self, weights: Mapping[str, Tensor]) -> None:
        """Take `weight` uint8 [out, in/2] (low nibble = even), `scale` E4M3 [out, in/16], `global_scale` fp32 []."""
        weight, scale, global_scale = (_take(self, weights, name) for name in ("weight", "scale", "global_scale"))
        rows = self.out_features
        check_tensor("Nvfp4Linear", "weight", weight, dtype=torch.uint8, shape=(rows, self.in_features // 2))
        shape = (rows, self.in_features // NVFP4_GROUP)
        check_tensor("Nvfp4Linear", "scale", scale, dtype=torch.float8_e4m3fn, shape=shape)
        check_tensor("Nvfp4Linear", "global_scale", global_scale, dtype=torch.float32, shape=())
        self.hold(weight=weight, scale=scale, global_scale=global_scale)

    def _multiply_out(self, dtype: torch.dtype) -> Tensor:
        """[out, in] in `dtype`, of what was loaded."""
        values = dequantize(self.get("weight"), self.get("scale").view(torch.uint8), "nvfp4")
        return (values * self.get("global_scale")).to(dtype)

    def dense(self, x: Tensor) -> Tensor:
        """x [..., in] -> [..., out] in x's dtype, whatever `output_format` is: for what comes before quantising."""
        return F.linear(x, self.dense_weight(x.dtype))

    def forward(self, x: Tensor) -> Tensor | QuantizedQuery:  # type: ignore[override]  # the quantised output
        """x [..., in] -> [..., out] in x's dtype, or a `QuantizedQuery` where `output_format` is set (x [T, in])."""
        if self.output_format is None:
            return self.dense(x)
        return quantize_query(self.dense(x).unflatten(-1, (-1, self.head_dim)), self.output_format)


def linear_for(name: str, weights: Mapping[str, Tensor], in_features: int, out_features: int) -> Linear:
    """The linear layer that fits the stored dtype of `<name>.weight`, loaded; errors name the tensor in full."""
    kinds = {torch.float8_e4m3fn: Fp8BlockLinear, torch.uint8: Nvfp4Linear}
    own = strip(weights, f"{name}.")
    if "weight" not in own:
        raise KeyError(f"{name}.weight is missing, got {sorted(weights)}")
    layer: Linear = kinds.get(own["weight"].dtype, Linear)(in_features, out_features)
    try:
        layer.load_weights(own)
    except (KeyError, TypeError, ValueError) as error:
        raise type(error)(f"{name}: {error.args[0]}") from None
    return layer


def strip(weights: Mapping[str, Tensor], prefix: str) -> dict[str, Tensor]:
    """The entries under `prefix`, without it."""
    return {name.removeprefix(prefix): tensor for name, tensor in weights.items() if name.startswith(prefix)}


def _blocks(shape: tuple[int, ...], size: int) -> tuple[int, ...]:
    return tuple(-(-n // size) for n in shape)


def _take(module: nn.Module, weights: Mapping[str, Tensor], name: str) -> Tensor:
    if name not in weights:
        raise KeyError(f"{type(module).__name__}: {name} is missing, got {sorted(weights)}")
    return weights[name]
