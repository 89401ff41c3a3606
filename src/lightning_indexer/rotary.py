"""Rotations of channels: RoPE with YaRN, and the Hadamard rotation of the indexer.

V4 rotates the *last* `rope_head_dim` channels of a vector, in interleaved pairs: channels (2i, 2i+1) of that slice are
a complex number, multiplied by exp(i * position * frequency_i). Relatives rotate the first channels, and V3.2's indexer
pairs channel i with i + rope_head_dim / 2.
"""

import math

import torch
from torch import Tensor


def rope_frequencies(
    rope_head_dim: int,
    theta: float,
    *,
    yarn_factor: float = 1.0,
    original_max_position: int = 65_536,
    beta_fast: float = 32.0,
    beta_slow: float = 1.0,
    device: torch.device | str | None = None,
) -> Tensor:
    """Radians per position of each channel pair: theta^(-2i / rope_head_dim), stretched by YaRN.

    YaRN divides the slow pairs by `yarn_factor`, keeps the fast ones, and blends linearly between the pairs that turn
    `beta_fast` and `beta_slow` times within `original_max_position`. V4 scales neither cos and sin nor the softmax.

    Args:
        rope_head_dim: rotated channels, even.
        theta: base, greater than 1.
        yarn_factor: at least 1.0; 1.0 means plain RoPE (the other YaRN arguments are then not used).
        device: where the result goes. It is computed on the CPU, so that it has the same bits everywhere.
    Returns:
        fp32 [rope_head_dim / 2].
    """
    if rope_head_dim < 2 or rope_head_dim % 2:
        raise ValueError(f"rope_frequencies: rope_head_dim must be even and positive, got {rope_head_dim}")
    if not theta > 1:
        raise ValueError(f"rope_frequencies: theta must be greater than 1, got {theta}")
    if not yarn_factor >= 1:
        raise ValueError(f"rope_frequencies: yarn_factor must be at least 1.0, got {yarn_factor}")
    steps = torch.arange(0, rope_head_dim, 2, dtype=torch.float32, device="cpu")
    wavelengths = torch.pow(theta, steps / rope_head_dim)  # of one radian, in positions
    frequencies = 1.0 / wavelengths
    if yarn_factor != 1.0:
        ramp = _yarn_ramp(rope_head_dim, theta, original_max_position, beta_fast, beta_slow)
        keep = 1 - ramp
        # 1 - keep, not ramp: the last bit as the official code and transformers round it.
        frequencies = 1.0 / (yarn_factor * wavelengths) * (1 - keep) + frequencies * keep
    return frequencies.to(device) if device is not None else frequencies


def apply_rope(
    x: Tensor,
    positions: Tensor,
    frequencies: Tensor,
    *,
    inverse: bool = False,
    channels: str = "last",
    pairs: str = "interleaved",
) -> Tensor:
    """Rotate the last (or first) channels of each vector by its position.

    Trap: angles are products in fp32, as the model was trained with. Near position 2^20 such an angle is up to 0.03
    radians from the exact one; float64 input is rotated by the float64 product, so the two differ by that much there.
    Sine and cosine of an angle are computed in float64 and rounded, so that every device and kernel has the same bits;
    those of fp32 differ from one to the next.

    Args:
        x: [T, D] or [T, H, D] floating point. 2 * len(frequencies) channels are rotated, the rest is copied.
        positions: [T] integer, absolute token positions, shared by all heads of a token.
        frequencies: [R / 2] from `rope_frequencies`, on the device of `x`.
        inverse: rotate backwards (by -position).
        channels: "last" (V4) or "first" (the indexers of V3.2 and GLM).
        pairs: "interleaved", channels (2i, 2i + 1) of the rotated slice, or "halves", channels (i, i + R / 2).
    Returns:
        A new tensor like `x`. Angles and products are fp32, or float64 when `x` is float64.
    """
    _check_rope(x, positions, frequencies, channels, pairs)
    num_pairs = frequencies.shape[0]
    dtype = torch.float64 if x.dtype == torch.float64 else torch.float32
    angles = positions.to(dtype)[:, None] * frequencies.to(dtype)  # [T, R/2]
    if x.dim() == 3:
        angles = angles[:, None]  # [T, 1, R/2]: broadcasts over heads, nothing is copied per head
    exact = angles.double()
    cos, sin = torch.cos(exact, out=torch.empty_like(angles)), torch.sin(exact, out=torch.empty_like(angles))
    if inverse:
        sin = -sin
    if channels == "first":
        rotated = _rotate(x[..., : 2 * num_pairs], cos, sin, pairs)
        return torch.cat((rotated, x[..., 2 * num_pairs :]), dim=-1)
    rotated = _rotate(x[..., -2 * num_pairs :], cos, sin, pairs)
    return torch.cat((x[..., : -2 * num_pairs], rotated), dim=-1)


def hadamard(x: Tensor) -> Tensor:
    """Rotate the last dim by the Sylvester matrix H[i, j] = (-1)^popcount(i & j), scaled by D^-0.5.

    The matrix is orthogonal and symmetric, so this is its own inverse and keeps dot products. V4 applies it to index
    queries and index keys before they are quantised; a cache written with it cannot be read with queries without it.

    Args:
        x: [..., D] floating point, D a power of two.
    Returns:
        Same shape and dtype. Sums are fp32 (float64 for float64 input) and are rounded once, at the end.
    """
    dim = x.shape[-1] if x.dim() else 0
    if dim < 1 or dim & (dim - 1):
        raise ValueError(f"hadamard: the last dim of x must be a power of two, got shape {list(x.shape)}")
    if not x.is_floating_point():
        raise TypeError(f"hadamard: x must be floating point, got {x.dtype}")
    y = x if x.dtype == torch.float64 else x.float()
    half = 1
    while half < dim:
        low, high = y.reshape(*x.shape[:-1], dim // (2 * half), 2, half).unbind(-2)
        y = torch.stack((low + high, low - high), dim=-2).flatten(-3)
        half *= 2
    scale: float = dim**-0.5
    return (y * scale).to(x.dtype)


def _rotate(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """x [..., R] with each pair of its channels turned."""
    is_interleaved = pairs == "interleaved"
    grouped = x.to(cos.dtype).unflatten(-1, (-1, 2) if is_interleaved else (2, -1))
    a, b = grouped.unbind(-1 if is_interleaved else -2)
    rotated = torch.stack((a * cos - b * sin, a * sin + b * cos), dim=-1 if is_interleaved else -2)
    return rotated.flatten(-2).to(x.dtype)


def _yarn_ramp(dim: int, theta: float, original_max_position: int, beta_fast: float, beta_slow: float) -> Tensor:
    """0 for pairs that keep their frequency, 1 for those that are divided; fp32 [dim / 2]."""

    def pair_of_turns(turns: float) -> float:
        """The (fractional) pair that turns this many times within the original context."""
        return dim * math.log(original_max_position / (turns * 2 * math.pi)) / (2 * math.log(theta))

    low = max(math.floor(pair_of_turns(beta_fast)), 0)
    high = min(math.ceil(pair_of_turns(beta_slow)), dim - 1)
    width = high - low or 1
    pairs = torch.arange(dim // 2, dtype=torch.float32, device="cpu")
    return ((pairs - low) / width).clamp(0, 1)


def _check_rope(x: Tensor, positions: Tensor, frequencies: Tensor, channels: str, pairs: str) -> None:
    if channels not in ("last", "first"):
        raise ValueError(f"apply_rope: channels must be 'last' or 'first', got {channels!r}")
    if pairs not in ("interleaved", "halves"):
        raise ValueError(f"apply_rope: pairs must be 'interleaved' or 'halves', got {pairs!r}")
    if not x.is_floating_point():
        raise TypeError(f"apply_rope: x must be floating point, got {x.dtype}")
    if positions.is_floating_point() or positions.is_complex() or positions.dtype == torch.bool:
        raise TypeError(f"apply_rope: positions must be integers, got {positions.dtype}")
    if x.dim() not in (2, 3):
        raise ValueError(f"apply_rope: x must have shape [T, D] or [T, H, D], got {list(x.shape)}")
    if positions.shape != x.shape[:1]:
        raise ValueError(f"apply_rope: positions must have shape [{x.shape[0]}], got {list(positions.shape)}")
    if frequencies.dim() != 1 or not 1 <= frequencies.shape[0] <= x.shape[-1] // 2:
        raise ValueError(
            f"apply_rope: frequencies must have shape [R / 2] with R at most {x.shape[-1]}, "
            f"got {list(frequencies.shape)}"
        )
    if not x.device == positions.device == frequencies.device:
        raise ValueError(
            f"apply_rope: positions and frequencies must be on {x.device} like x, "
            f"got {positions.device} and {frequencies.device}"
        )
