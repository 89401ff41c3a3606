"""RoPE, YaRN and the Hadamard rotation against golden numbers, transformers, complex numbers and the definition."""

import math
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers.models.deepseek_v4.configuration_deepseek_v4 import DeepseekV4Config
from transformers.models.deepseek_v4.modeling_deepseek_v4 import DeepseekV4RotaryEmbedding, apply_rotary_pos_emb

from lightning_indexer.rotary import apply_rope, hadamard, rope_frequencies

FP32_EPS = 2.0**-24  # one rounding to nearest

# i: (plain, YaRN 16 / 65536 / 32 / 1) for base 160000 and 64 rotated channels; nine digits.
GOLDEN_FREQUENCIES = {
    0: (1.0, 1.0),
    1: (0.687656022, 0.687656022),
    8: (0.05, 0.05),
    15: (0.00363553858, 0.00363553858),
    16: (0.0025, 0.002265625),
    20: (0.000559016994, 0.000296977778),
    24: (0.000125, 1.953125e-05),
    25: (8.59570027e-05, 5.37231267e-06),
    31: (9.08884646e-06, 5.68052904e-07),
}


@pytest.mark.parametrize("yarn_factor", [1.0, 16.0], ids=["plain", "yarn"])
def test_golden_frequencies(yarn_factor: float) -> None:
    frequencies = rope_frequencies(64, 160_000.0, yarn_factor=yarn_factor)
    assert frequencies.dtype == torch.float32 and frequencies.shape == (32,)
    for i, golden in GOLDEN_FREQUENCIES.items():
        expected = golden[yarn_factor > 1]
        error = abs(frequencies[i].item() / expected - 1)
        # fp32 power, reciprocal, two products and a sum, each within a few roundings, and nine printed digits
        assert error < 8 * FP32_EPS, (
            f"f[{i}] = {frequencies[i].item():.9g}, expected {expected:.9g}, off by {error:.1e}"
        )


TRANSFORMERS_YARN: dict[str, dict[str, Any]] = {
    "v4": {"factor": 16.0, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
    "factor-40": {"factor": 40.0, "original_max_position_embeddings": 4096, "beta_fast": 32, "beta_slow": 1},
    "short-original": {"factor": 4.0, "original_max_position_embeddings": 16, "beta_fast": 32, "beta_slow": 1},
    "long-original": {"factor": 4.0, "original_max_position_embeddings": 10**9, "beta_fast": 8, "beta_slow": 2},
    "tiny-original": {"factor": 4.0, "original_max_position_embeddings": 6, "beta_fast": 32, "beta_slow": 1},
    "huge-original": {"factor": 4.0, "original_max_position_embeddings": 10**13, "beta_fast": 10**8, "beta_slow": 2},
    "factor-1": {"factor": 1.0, "original_max_position_embeddings": 65536, "beta_fast": 32, "beta_slow": 1},
}


def transformers_rotary(yarn: dict[str, Any] | None, rope_head_dim: int = 64) -> DeepseekV4RotaryEmbedding:
    config = DeepseekV4Config(
        num_hidden_layers=2,
        compress_ratios=[0, 4],
        qk_rope_head_dim=rope_head_dim,
        rope_scaling=None if yarn is None else {"type": "yarn", **yarn},
    )
    return DeepseekV4RotaryEmbedding(config)


@pytest.mark.parametrize("rope_head_dim", [64, 16])
@pytest.mark.parametrize("name", TRANSFORMERS_YARN)
def test_yarn_frequencies_equal_transformers(name: str, rope_head_dim: int) -> None:
    yarn = TRANSFORMERS_YARN[name]
    theirs = transformers_rotary(yarn, rope_head_dim).compress_inv_freq
    ours = rope_frequencies(
        rope_head_dim,
        160_000.0,
        yarn_factor=yarn["factor"],
        original_max_position=yarn["original_max_position_embeddings"],
        beta_fast=yarn["beta_fast"],
        beta_slow=yarn["beta_slow"],
    )
    assert_same(ours, theirs, f"YaRN {name}")


@pytest.mark.parametrize("layer_type", ["main", "compress"])
def test_plain_frequencies_equal_transformers(layer_type: str) -> None:
    theirs = getattr(transformers_rotary(None), f"{layer_type}_inv_freq")
    assert_same(rope_frequencies(64, {"main": 1e4, "compress": 1.6e5}[layer_type]), theirs, f"plain {layer_type}")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
@pytest.mark.parametrize("heads", [None, 3], ids=["T-D", "T-H-D"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_rope_equals_transformers(dtype: torch.dtype, heads: int | None, inverse: bool) -> None:
    positions = torch.tensor([0, 1, 7, 127, 4095, 65535, 65536, 1_048_575])
    x = random(positions.shape[0], *([heads] if heads else []), 128).to(dtype)
    rotary = transformers_rotary(TRANSFORMERS_YARN["v4"])
    cos, sin = rotary(torch.empty(0), position_ids=positions[None], layer_type="compress")  # fp32 [1, T, 32]
    theirs = apply_rotary_pos_emb(x.view(1, x.shape[0], -1, 128).transpose(1, 2), cos, -sin if inverse else sin)
    theirs = theirs.transpose(1, 2).reshape(x.shape)
    ours = apply_rope(x, positions, rope_frequencies(64, 160_000.0, yarn_factor=16.0), inverse=inverse)
    assert ours.dtype == dtype, f"result must be {dtype}, got {ours.dtype}"
    # both sum two fp32 products; bf16 may then round to either neighbour
    tolerance = 4 * FP32_EPS if dtype == torch.float32 else 2.0**-8
    assert_close(ours, theirs, tolerance * 2 * x.abs().max().item(), "RoPE")


@pytest.mark.parametrize("heads", [None, 2], ids=["T-D", "T-H-D"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_float64_rope_is_a_complex_product(heads: int | None, inverse: bool) -> None:
    positions = torch.tensor([0, 3, 1_048_575], dtype=torch.int32)
    x = random(3, *([heads] if heads else []), 40).double()
    frequencies = rope_frequencies(16, 160_000.0, yarn_factor=16.0)
    angles = positions.double()[:, None] * frequencies.double() * (-1 if inverse else 1)
    expected = x.clone()
    pairs = torch.view_as_complex(x[..., 24:].reshape(*x.shape[:-1], 8, 2).contiguous())
    turn = torch.polar(torch.ones_like(angles), angles).view(3, *[1] * (x.dim() - 2), 8)
    expected[..., 24:] = torch.view_as_real(pairs * turn).flatten(-2)
    assert_close(apply_rope(x, positions, frequencies, inverse=inverse), expected, 1e-14, "float64 RoPE")


@pytest.mark.parametrize("heads", [None, 2], ids=["T-D", "T-H-D"])
@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
@pytest.mark.parametrize("pairs", ["interleaved", "halves"])
@pytest.mark.parametrize("channels", ["first", "last"])
def test_other_channels_and_pairs_are_a_complex_product(
    heads: int | None, inverse: bool, pairs: str, channels: str
) -> None:
    positions = torch.tensor([0, 3, 163_839])
    x = random(3, *([heads] if heads else []), 40).double()
    frequencies = rope_frequencies(16, 10_000.0, yarn_factor=40.0, original_max_position=4096)
    angles = positions.double()[:, None] * frequencies.double() * (-1 if inverse else 1)
    turn = torch.polar(torch.ones_like(angles), angles).view(3, *[1] * (x.dim() - 2), 8)
    place = slice(0, 16) if channels == "first" else slice(24, 40)
    part, expected = x[..., place], x.clone()
    if pairs == "interleaved":
        real, imaginary = part[..., 0::2], part[..., 1::2]
    else:
        real, imaginary = part[..., :8], part[..., 8:]
    product = torch.complex(real, imaginary) * turn
    if pairs == "interleaved":
        expected[..., place] = torch.view_as_real(product).flatten(-2)
    else:
        expected[..., place] = torch.cat([product.real, product.imag], dim=-1)
    got = apply_rope(x, positions, frequencies, inverse=inverse, channels=channels, pairs=pairs)
    assert_close(got, expected, 1e-14, f"RoPE of the {channels} channels, {pairs}")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32], ids=["bf16", "fp32"])
def test_halves_are_a_permutation_of_interleaved_pairs(dtype: torch.dtype) -> None:
    """Bit for bit, in the dtype of the input."""
    x, positions, frequencies = random(5, 3, 128).to(dtype), torch.arange(5) * 997, rope_frequencies(64, 1e4)
    order = torch.cat([torch.arange(64).view(2, 32).T.flatten(), torch.arange(64, 128)])
    back = order.argsort()
    want = apply_rope(x[..., order], positions, frequencies, channels="first")[..., back]
    assert_same(apply_rope(x, positions, frequencies, channels="first", pairs="halves"), want, "halves")
    assert_same(want[..., 64:], x[..., 64:], "the other channels")


@pytest.mark.parametrize("option", ["channels", "pairs"])
def test_rope_of_unknown_channels_or_pairs(option: str) -> None:
    with pytest.raises(ValueError, match=f"^apply_rope: {option} must be '.*' or '.*', got 'middle'"):
        apply_rope(torch.zeros(1, 8), torch.zeros(1, dtype=torch.int64), torch.ones(2), **{option: "middle"})


@pytest.mark.parametrize("inverse", [False, True], ids=["forward", "inverse"])
def test_sines_of_fp32_angles_are_fp64_rounded(inverse: bool) -> None:
    """Bit for bit, so that a kernel can do the same; vectors of one 1 show cosine and sine themselves."""
    positions = torch.arange(0, 1_048_576, 997)
    frequencies = rope_frequencies(64, 160_000.0)
    angles = (positions.float()[:, None] * frequencies).double()
    rotated = apply_rope(torch.tensor([1.0, 0.0]).repeat(len(positions), 32), positions, frequencies, inverse=inverse)
    assert torch.equal(rotated[:, 0::2], angles.cos().float())
    assert torch.equal(rotated[:, 1::2], (-angles.sin() if inverse else angles.sin()).float())


def test_fp32_angles_are_fp32_products() -> None:
    """The definition that the model was trained with; near 2^20 it is visibly not the exact angle."""
    positions = torch.arange(1_048_000, 1_048_576)
    frequencies = rope_frequencies(64, 160_000.0)
    x = random(positions.shape[0], 64)
    rounded = (positions.float()[:, None] * frequencies).double()
    exact = positions.double()[:, None] * frequencies.double()
    got = apply_rope(x, positions, frequencies)
    assert_close(got.double(), turned(x.double(), rounded), 8 * FP32_EPS * x.abs().max().item(), "fp32 angles")
    gap = (got.double() - turned(x.double(), exact)).abs().max().item()
    assert gap > 1e-3, f"the exact angle must show a difference here, got {gap:.1e}"


def test_rope_copies_leading_channels_and_leaves_its_input() -> None:
    x = random(5, 4, 96)
    before = x.clone()
    got = apply_rope(x, torch.arange(5) * 1000, rope_frequencies(32, 10_000.0))
    assert_same(got[..., :64], x[..., :64], "channels before the RoPE slice")
    assert_same(x, before, "the input")
    assert not torch.equal(got[1:, :, 64:], x[1:, :, 64:]), "the last 32 channels must be rotated"


def test_rope_reads_strided_input() -> None:
    storage = random(6, 4, 192)
    x = storage[::2, :, 32:160]
    frequencies = rope_frequencies(64, 160_000.0)
    positions = torch.tensor([5, 9, 11])
    got = apply_rope(x, positions, frequencies)
    assert_same(got, apply_rope(x.contiguous(), positions, frequencies), "RoPE of a strided view")


def test_inverse_rope_undoes_rope() -> None:
    x = random(64, 2, 128)
    positions = torch.arange(64) * 16_384
    frequencies = rope_frequencies(64, 160_000.0, yarn_factor=16.0)
    back = apply_rope(apply_rope(x, positions, frequencies), positions, frequencies, inverse=True)
    assert_close(back, x, 8 * FP32_EPS * x.abs().max().item(), "RoPE and back")


@pytest.mark.parametrize("shape", [(0, 64), (0, 4, 64), (3, 0, 64)], ids=["no-tokens", "no-tokens-heads", "no-heads"])
def test_rope_of_nothing_is_nothing(shape: tuple[int, ...]) -> None:
    got = apply_rope(torch.empty(shape), torch.arange(shape[0]), rope_frequencies(64, 1e4))
    assert got.shape == shape, f"expected {shape}, got {tuple(got.shape)}"


def test_rope_follows_the_device_of_its_input() -> None:
    frequencies = rope_frequencies(64, 1e4, device="meta")
    got = apply_rope(torch.empty(3, 2, 64, device="meta"), torch.arange(3, device="meta"), frequencies)
    assert got.device.type == "meta" and got.shape == (3, 2, 64)


ROPE_ERRORS: dict[str, tuple[dict[str, Any], type[Exception], str]] = {
    "integer-x": ({"x": torch.zeros(3, 64, dtype=torch.int32)}, TypeError, "x must be floating point"),
    "float-positions": ({"positions": torch.zeros(3)}, TypeError, "positions must be integers, got torch.float32"),
    "bool-positions": ({"positions": torch.zeros(3, dtype=torch.bool)}, TypeError, "positions must be integers"),
    "x-1d": ({"x": torch.zeros(3)}, ValueError, r"x must have shape \[T, D\] or \[T, H, D\], got \[3\]"),
    "positions-too-long": ({"positions": torch.arange(4)}, ValueError, r"positions must have shape \[3\], got \[4\]"),
    "slice-too-wide": ({"frequencies": torch.ones(33)}, ValueError, r"R at most 64, got \[33\]"),
    "no-frequencies": ({"frequencies": torch.ones(0)}, ValueError, r"frequencies must have shape"),
    "other-device": ({"positions": torch.arange(3, device="meta")}, ValueError, "must be on cpu like x, got meta"),
}


@pytest.mark.parametrize("name", ROPE_ERRORS)
def test_rope_errors(name: str) -> None:
    changes, error, message = ROPE_ERRORS[name]
    arguments = {"x": torch.zeros(3, 64), "positions": torch.arange(3), "frequencies": torch.ones(32)} | changes
    with pytest.raises(error, match=f"^apply_rope: .*{message}"):
        apply_rope(**arguments)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rope_head_dim": 63}, "rope_head_dim must be even and positive, got 63"),
        ({"rope_head_dim": 0}, "rope_head_dim must be even and positive, got 0"),
        ({"theta": 1.0}, "theta must be greater than 1, got 1.0"),
        ({"yarn_factor": 0.5}, "yarn_factor must be at least 1.0, got 0.5"),
    ],
    ids=["odd", "zero", "theta", "factor"],
)
def test_frequency_errors(arguments: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^rope_frequencies: {message}"):
        rope_frequencies(**{"rope_head_dim": 64, "theta": 1e4} | arguments)


@pytest.mark.parametrize("dim", [1, 2, 64, 128])
def test_hadamard_equals_its_definition(dim: int) -> None:
    x = random(7, dim).double()
    matrix = torch.tensor([[(-1.0) ** bin(i & j).count("1") for j in range(dim)] for i in range(dim)]).double()
    assert_close(hadamard(x), x @ matrix / math.sqrt(dim), 1e-14, "Hadamard in float64")
    assert_close(hadamard(x.float()).double(), hadamard(x.float().double()), 16 * FP32_EPS * 4, "Hadamard in fp32")


def test_hadamard_golden_rows() -> None:
    rows = hadamard(torch.eye(128))
    golden = 0.0883883
    assert (rows[0] - golden).abs().max() < 1e-7, f"e_0 must become {golden} everywhere"
    assert (rows[1, 0::2] - golden).abs().max() < 1e-7 and (rows[1, 1::2] + golden).abs().max() < 1e-7, (
        f"e_1 must become alternating {golden}, starting with +: {rows[1, :4].tolist()}"
    )


@pytest.mark.parametrize("dim", [64, 128])
def test_hadamard_is_its_own_inverse_and_keeps_dot_products(dim: int) -> None:
    q, k = random(2, 5, dim).double()
    assert_close(hadamard(hadamard(q)), q, 1e-14, "Hadamard twice")
    assert_close((hadamard(q) * hadamard(k)).sum(-1), (q * k).sum(-1), 1e-12, "dot products")


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16], ids=["bf16", "fp16"])
def test_hadamard_rounds_once(dtype: torch.dtype) -> None:
    x = random(33, 4, 128).to(dtype)
    assert_same(hadamard(x), hadamard(x.float()).to(dtype), f"fp32 sums, one rounding to {dtype}")


def test_hadamard_of_nothing_and_of_a_strided_view() -> None:
    assert hadamard(torch.empty(0, 3, 128)).shape == (0, 3, 128)
    x = random(4, 6, 256)[:, ::2, 64:192]
    before = x.clone()
    assert_same(hadamard(x), hadamard(x.contiguous()), "Hadamard of a strided view")
    assert_same(x, before, "the input")


@pytest.mark.parametrize(
    ("x", "error", "message"),
    [
        (torch.zeros(3, 96), ValueError, r"power of two, got shape \[3, 96\]"),
        (torch.zeros(3, 0), ValueError, "power of two"),
        (torch.tensor(1.0), ValueError, "power of two"),
        (torch.zeros(3, 64, dtype=torch.int8), TypeError, "floating point, got torch.int8"),
    ],
    ids=["96", "0", "scalar", "int8"],
)
def test_hadamard_errors(x: Tensor, error: type[Exception], message: str) -> None:
    with pytest.raises(error, match=f"^hadamard: .*{message}"):
        hadamard(x)


def random(*shape: int) -> Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(0))


def turned(x: Tensor, angles: Tensor) -> Tensor:
    even, odd = x[..., 0::2], x[..., 1::2]
    cos, sin = angles.cos(), angles.sin()
    return torch.stack((even * cos - odd * sin, even * sin + odd * cos), dim=-1).flatten(-2)


def assert_close(got: Tensor, expected: Tensor, tolerance: float, what: str) -> None:
    assert got.shape == expected.shape, f"{what}: shape {tuple(got.shape)}, expected {tuple(expected.shape)}"
    error = (got.double() - expected.double()).abs()
    worst = tuple(int(i) for i in (error == error.max()).nonzero()[0])
    values = f"{got[worst].item():.9g} at {list(worst)}, expected {expected[worst].item():.9g}"
    assert error.max() <= tolerance, f"{what}: {values} within {tolerance:.1e}"


def assert_same(got: Tensor, expected: Tensor, what: str) -> None:
    assert got.dtype == expected.dtype, f"{what}: {got.dtype}, expected {expected.dtype}"
    assert_close(got, expected, 0.0, what)
