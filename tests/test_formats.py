"""Codes and rows of every format against `ml_dtypes` and an independent writer (`cases.encode_rows`)."""

import subprocess
import sys

import numpy as np
import pytest
import torch
from cases import BF16, E2M1, E2M1_MAGNITUDES, E4M3, E8M0, assert_same_bits, decode_rows, e2m1_codes, encode_rows

from lightning_indexer import dequantize, quantize, quantize_query
from lightning_indexer.formats import (
    e2m1_decode,
    e2m1_encode,
    e4m3_encode,
    fake_quantize,
    pack_nibbles,
    ue8m0_decode,
    ue8m0_encode,
    unpack_nibbles,
)

ROUNDINGS = ["nearest_even", "toward_zero"]
STORED = [("mxfp4", 64), ("mxfp4", 128), ("nvfp4", 64), ("nvfp4", 128), ("fp8", 64), ("fp8", 128)]
STORED += [("bf16", 64), ("bf16", 128), ("bf16", 512), ("fp8_ds_mla", 512), ("fp32", 128)]
GROUP = {"mxfp4": 32, "nvfp4": 16, "fp8_ds_mla": 64}  # values that share a scale; "fp8": the whole entry


def million(seed: int, low: float, high: float) -> np.ndarray:
    """fp32: uniform in [low, high], every kind of bit pattern (denormals, huge, NaN, inf), and signed zeros."""
    rng = np.random.default_rng(seed)
    patterns = rng.integers(0, 2**32, 500_000, np.uint32).view(np.float32)
    return np.concatenate([rng.uniform(low, high, 500_000).astype(np.float32), patterns, np.float32([0.0, -0.0])])


def around(values: np.ndarray) -> np.ndarray:
    """Each value with its two fp32 neighbours, both signs."""
    values = np.asarray(values, np.float32)
    near = [values, np.nextafter(values, np.float32(np.inf)), np.nextafter(values, np.float32(-np.inf))]
    return np.concatenate([*near, *(-n for n in near)])


# --- codes ----------------------------------------------------------------------------------------------------


def test_e2m1_every_code():
    codes = np.arange(16, dtype=np.uint8)
    assert_same_bits(e2m1_decode(torch.from_numpy(codes)), codes.view(E2M1).astype(np.float32), "value of code")
    for rounding, want in (("nearest_even", codes), ("toward_zero", np.where(codes == 8, 0, codes).astype(np.uint8))):
        assert_same_bits(e2m1_encode(e2m1_decode(torch.from_numpy(codes)), rounding=rounding), want, rounding)


@pytest.mark.parametrize("rounding", ROUNDINGS)
def test_e2m1_a_million_numbers(rounding):
    midpoints = (E2M1_MAGNITUDES[1:] + E2M1_MAGNITUDES[:-1]) / 2
    x = np.concatenate([million(1, -8, 8), around(midpoints), around(E2M1_MAGNITUDES)])
    x = x[~np.isnan(x)]
    got = e2m1_encode(torch.from_numpy(x), rounding=rounding)
    with np.errstate(invalid="ignore"):
        want = e2m1_codes(x, rounding)
    assert_same_bits(got, want, f"E2M1 codes, {rounding}")


def test_e2m1_nan_has_a_finite_code():
    assert e2m1_encode(torch.tensor([torch.nan])).item() & 7 == 0


@pytest.mark.parametrize(
    ("x", "nearest_even", "toward_zero"),
    [(0.25, 0, 0), (0.75, 1, 0.5), (1.25, 1, 1), (1.75, 2, 1.5), (2.5, 2, 2), (3.5, 4, 3), (5, 4, 4)],
)
def test_e2m1_golden_ties(x, nearest_even, toward_zero):
    for rounding, want in (("nearest_even", nearest_even), ("toward_zero", toward_zero)):
        got = e2m1_decode(e2m1_encode(torch.tensor([x, -x]), rounding=rounding)).tolist()
        assert got == [want, -want], f"{rounding}: {x} -> {got}"


def test_nibbles_low_half_is_the_even_dim():
    codes = torch.arange(16, dtype=torch.uint8)
    packed = pack_nibbles(codes)
    assert packed[0] == 0x10 and packed[7] == 0xFE, packed
    assert torch.equal(unpack_nibbles(packed), codes)


def test_e4m3_every_code():
    codes = np.arange(256, dtype=np.uint8)
    values = codes.view(E4M3).astype(np.float32)
    got = e4m3_encode(torch.from_numpy(values)).view(torch.uint8)
    assert_same_bits(got, codes, "E4M3 code of its own value")


def test_e4m3_a_million_numbers():
    values = np.arange(128, dtype=np.uint8).view(E4M3).astype(np.float32)[:-1]
    x = np.concatenate([million(2, -500, 500), around((values[1:] + values[:-1]) / 2), around(np.float32([448, 464]))])
    got = e4m3_encode(torch.from_numpy(x)).view(torch.uint8).numpy()
    with np.errstate(invalid="ignore"):
        want = np.clip(x, -448, 448).astype(E4M3).view(np.uint8)
    finite = ~np.isnan(x)
    assert_same_bits(got[finite], want[finite], "E4M3 codes")
    assert (got[~finite] & 0x7F == 0x7F).all(), "NaN must stay NaN"


def test_ue8m0_every_byte():
    byte = np.arange(256, dtype=np.uint8)
    got = ue8m0_decode(torch.from_numpy(byte)).numpy()
    assert_same_bits(got[:255], byte[:255].view(E8M0).astype(np.float32), "2^(byte - 127)")
    assert np.isnan(got[255])
    assert_same_bits(ue8m0_encode(torch.from_numpy(got[1:])), byte[1:], "byte of its own value")


def test_ue8m0_a_million_numbers_round_up():
    y = np.abs(np.concatenate([million(3, 0, 2), around(2.0 ** np.arange(-126, 127))]))
    byte = ue8m0_encode(torch.from_numpy(y)).numpy()
    assert (byte[~np.isfinite(y)] == 255).all()
    normal = (y >= 2.0**-126) & (y <= 2.0**127)
    y, byte = y[normal].astype(np.float64), byte[normal]
    value, below = byte.view(E8M0).astype(np.float64), (byte - 1).view(E8M0).astype(np.float64)
    worst = np.argmax((value < y) | (below >= y))
    assert (value >= y).all() and (below < y).all(), f"2^ceil(log2({y[worst]})) as byte {byte[worst]}"


def test_ue8m0_denormals_follow_the_exponent_rule():
    """byte = exponent field + (mantissa != 0): every positive denormal is stored as 2^-126, zero as byte 0."""
    tiny = torch.tensor([0.0, 2.0**-149, 2.0**-127, 2.0**-126 - 2.0**-149, 2.0**-126])
    assert ue8m0_encode(tiny).tolist() == [0, 1, 1, 1, 1]


# --- scale bytes ----------------------------------------------------------------------------------------------

GOLDEN_BYTES = [
    *[(0.75, 124, 118), (1.0, 125, 119), (1.5, 125, 119), (3.0, 126, 120), (6.0, 127, 121), (6.0000005, 128, 121)],
    *[(7.0, 128, 121), (12.0, 128, 122), (448.0, 134, 127), (1e-4, 112, 105)],
]


@pytest.mark.parametrize(("amax", "fp4", "fp8"), GOLDEN_BYTES)
def test_golden_scale_bytes(amax, fp4, fp8):
    x = torch.zeros(1, 128)
    x[0, 3] = -amax
    assert quantize(x, "mxfp4")[1][0, 0] == fp4
    assert quantize(x, "fp8")[1].view(torch.float32).item() == 2.0 ** (fp8 - 127)
    kv = torch.nn.functional.pad(x, (0, 384))
    assert quantize(kv, "fp8_ds_mla")[1][0, 0] == fp8


@pytest.mark.parametrize("k", range(-20, 21))
def test_scale_of_a_power_of_two_is_exact(k):
    assert quantize(torch.full((1, 128), 6 * 2.0**k), "mxfp4")[1].tolist() == [[127 + k] * 4]
    assert quantize(torch.full((1, 128), 448 * 2.0**k), "fp8")[1].view(torch.float32).item() == 2.0**k


def test_scale_floors():
    zero = torch.zeros(1, 512)
    assert quantize(zero[:, :128], "mxfp4")[1].tolist() == [[1] * 4]  # 6 * 2^-126
    assert quantize(zero[:, :128], "mxfp4", rounding="toward_zero")[1].tolist() == [[112] * 4]  # 1e-4
    assert quantize(zero[:, :128], "fp8")[1].view(torch.float32).item() == 2.0**-22
    assert quantize(zero[:, :128], "nvfp4")[1].tolist() == [[1] * 8]  # the smallest E4M3
    assert quantize(zero, "fp8_ds_mla")[1].tolist() == [[105] * 7 + [0]]


def test_mxfp4_d64_pads_its_scale_row_with_ones():
    data, scale = quantize(torch.ones(3, 64), "mxfp4")
    assert data.shape == (3, 32) and scale.tolist() == [[125, 125, 127, 127]] * 3


# --- rows -----------------------------------------------------------------------------------------------------


def varied(dim: int) -> np.ndarray:
    """Entries of many magnitudes, exact ties, zeros of both signs, denormals and huge values."""
    rng = np.random.default_rng(dim)
    x = rng.normal(size=(300, dim)) * 2.0 ** rng.integers(-40, 40, (300, 1))
    x[100:150] *= 2.0 ** rng.integers(-12, 12, (50, dim))
    x[150:200] = rng.integers(-24, 25, (50, dim)) / 4  # midpoints of E2M1
    x[200:210] = rng.choice([0.0, -0.0, 1.0], (10, dim))
    x[210:220] = rng.choice([0.0, -0.0, 1e-45, -3e-40, 1e-38], (10, dim))
    x[220:230] *= 1e25
    x[230] = 0
    return x.astype(np.float32)


@pytest.mark.parametrize("rounding", ROUNDINGS)
@pytest.mark.parametrize(("format", "dim"), STORED)
def test_bytes_equal_an_independent_writer(format, dim, rounding):
    x = varied(dim)
    for global_scale in (1.0, 0.0625, 3.7) if format == "nvfp4" else (1.0,):
        options = {"rounding": rounding, "global_scale": global_scale}
        data, scale = quantize(torch.from_numpy(x), format, **options)
        want_data, want_scale = encode_rows(x, format, **options)
        assert_same_bits(scale, want_scale, f"{format} scale rows")
        assert_same_bits(data, want_data, f"{format} data rows")
        got = dequantize(data, scale, format, global_scale=global_scale)
        with np.errstate(over="ignore"):
            want = decode_rows(want_data, want_scale, format, global_scale=np.float32(global_scale))
            assert_same_bits(got, want.astype(np.float32), f"{format} values")


@pytest.mark.parametrize(("format", "dim"), STORED)
def test_any_byte_pattern_decodes(format, dim):
    """Bytes nobody quantised: every scale byte, every code."""
    rng = np.random.default_rng(0)
    shapes = [r.shape[-1] for r in encode_rows(np.zeros((1, dim)), format)]
    data, scale = (rng.integers(0, 256, (2000, n), np.uint8) for n in shapes)
    got = dequantize(torch.from_numpy(data), torch.from_numpy(scale), format).numpy()
    with np.errstate(over="ignore", invalid="ignore"):
        want = decode_rows(data, scale, format).astype(np.float32)
    assert (np.isnan(got) == np.isnan(want)).all(), f"NaN at {np.argwhere(np.isnan(got) != np.isnan(want))[0]}"
    assert_same_bits(np.nan_to_num(got), np.nan_to_num(want), format)


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize(("format", "dim"), STORED)
def test_non_finite_input_stays_visible(format, dim, bad):
    group = GROUP.get(format, dim if format == "fp8" else 1)
    for at in (0, dim // 2 + 1, dim - 1):
        x = torch.ones(2, dim)
        x[0, at] = bad
        y = dequantize(*quantize(x, format), format)
        first = at // group * group
        width = group
        if format == "fp8_ds_mla" and at >= 448:
            first, width = at, 1
        hit = y[0, first : first + width]
        if width > 1:
            assert hit.isnan().all(), f"{bad} at {at} left {hit}"
        else:
            assert_same_bits(torch.nan_to_num(hit, 7.0), torch.nan_to_num(torch.tensor([bad]), 7.0), "value")
        others = torch.cat([y[0, :first], y[0, first + width :], y[1]])
        assert others.isfinite().all(), f"{bad} at {at} spread beyond its group of {width}"


@pytest.mark.parametrize(("format", "dim"), STORED)
def test_round_trip_error(format, dim):
    """Half a unit in the last place: |x| / 4 for E2M1, / 16 for E4M3, / 256 for bf16, and half the smallest step."""
    rng = np.random.default_rng(5)
    x = (rng.normal(size=(500, dim)) * 2.0 ** rng.integers(-4, 6, (500, 1))).astype(np.float32)
    y = fake_quantize(torch.from_numpy(x), format).numpy().astype(np.float64)
    relative = {"mxfp4": 1 / 4, "nvfp4": 1 / 4, "fp8": 1 / 16, "fp8_ds_mla": 1 / 16, "bf16": 1 / 256, "fp32": 0}[format]
    group = GROUP.get(format, dim)
    groups = x[:, :448] if format == "fp8_ds_mla" else x
    amax = np.abs(groups.reshape(len(x), -1, group)).max(-1).repeat(group, -1)
    if format == "fp8_ds_mla":
        amax = np.concatenate([amax, np.zeros((len(x), 64))], -1)
    # the scale is at most twice amax / largest code (9 / 8 of it for nvfp4), the smallest step of codes .5 or 2^-9
    step = {"mxfp4": amax / 6, "nvfp4": amax / 6 * 9 / 16, "fp8": amax * 2 / 448 * 2**-9}
    step["fp8_ds_mla"] = step["fp8"]
    bound = np.maximum(relative * np.abs(x), step.get(format, 0 * amax) / 2)
    if format == "nvfp4":  # the smallest scale, 2^-9
        bound = np.maximum(bound, 2.0**-9 / 4)
    excess = np.abs(y - x) - bound
    worst = np.unravel_index(excess.argmax(), x.shape)
    assert excess.max() <= 0, f"{x[worst]} came back as {y[worst]} at {worst}"


@pytest.mark.parametrize(("format", "dim"), STORED)
def test_rows_may_come_from_anywhere(format, dim):
    """Leading shape, strides and odd addresses of the rows do not matter."""
    data, scale = quantize(torch.randn(6, dim), format)
    want = dequantize(data, scale, format)
    assert torch.equal(dequantize(data.view(2, 3, -1), scale.view(2, 3, -1), format), want.view(2, 3, -1))
    wide = torch.cat([data, scale], -1)
    assert torch.equal(dequantize(wide[:, : data.shape[1]], wide[:, data.shape[1] :], format), want)
    odd_data, odd_scale = (torch.cat([row.new_zeros(1), row[0]])[1:].unsqueeze(0) for row in (data, scale))
    assert torch.equal(dequantize(odd_data, odd_scale, format), want[:1])


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8", "fp8_ds_mla"])
def test_scale_rows_may_carry_pad_bytes(format):
    data, scale = quantize(torch.randn(6, 512 if format == "fp8_ds_mla" else 128), format)
    padded = torch.nn.functional.pad(scale, (0, 4), value=0xFF)
    assert torch.equal(dequantize(data, padded, format), dequantize(data, scale, format))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8"])
def test_other_float_types_are_read_as_fp32(format, dtype):
    x = torch.randn(4, 128).to(dtype)
    for got, want in zip(quantize(x, format), quantize(x.float(), format), strict=True):
        assert torch.equal(got, want)


def test_bf16_rounds_to_nearest_even():
    x = np.concatenate([np.float32([1 + 2**-8, 1 + 3 * 2**-8]), million(4, -3, 3)])
    x = x[~np.isnan(x)]
    x = x[: len(x) // 128 * 128].reshape(-1, 128)
    want = x.astype(BF16).view(np.uint8).reshape(len(x), -1)
    assert_same_bits(quantize(torch.from_numpy(x), "bf16")[0], want, "bf16 bytes")


@pytest.mark.parametrize("format", ["mxfp4", "nvfp4", "fp8"])
def test_quantize_query_is_quantize(format):
    q = torch.randn(3, 8, 128)
    assert_same_bits(quantize_query(q, format).dequantize(), fake_quantize(q, format), format)


@pytest.mark.parametrize("global_scale", [2.0**-20, 1e-3, 1e4])
def test_nvfp4_global_scale_moves_the_range(global_scale):
    x = torch.randn(50, 128) * global_scale * 100
    y = dequantize(*quantize(x, "nvfp4", global_scale=global_scale), "nvfp4", global_scale=global_scale)
    assert ((y - x).abs() <= x.abs().amax() / 4).all() and (y - x).norm() / x.norm() < 0.15


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        (lambda: quantize(torch.zeros(1, 128), "mxfp5"), ValueError, ["format", "mxfp4", "'mxfp5'"]),
        (lambda: quantize(torch.zeros(1, 96), "mxfp4"), ValueError, ["64 or 128", "96"]),
        (lambda: quantize(torch.zeros(1, 128), "fp8_ds_mla"), ValueError, ["512", "128"]),
        (lambda: quantize(torch.zeros(1, 128).int(), "fp8"), TypeError, ["x", "floating point", "torch.int32"]),
        (lambda: quantize(torch.zeros(1, 128), "mxfp4", rounding="up"), ValueError, ["rounding", "'up'"]),
        (lambda: quantize(torch.zeros(1, 128), "nvfp4", global_scale=0.0), ValueError, ["global_scale", "0.0"]),
        (lambda: quantize(torch.zeros(1, 128), "nvfp4", global_scale=np.nan), ValueError, ["global_scale", "nan"]),
        (lambda: dequantize(torch.zeros(1, 64), torch.zeros(1, 4), "int4"), ValueError, ["format", "'int4'"]),
        (lambda: quantize_query(torch.zeros(1, 8, 128), "bf16"), ValueError, ["format", "'bf16'"]),
        (lambda: quantize_query(torch.zeros(8, 128), "fp8"), ValueError, ["q", "[T, H, D]", "[8, 128]"]),
    ],
    ids=lambda value: None if callable(value) else str(value),
)
def test_errors_say_what_was_expected_and_what_came(call, error, words):
    with pytest.raises(error) as caught:
        call()
    assert all(word in str(caught.value) for word in words), str(caught.value)


def test_default_dtype_at_import_does_not_move_the_midpoints():
    """The official inference code sets bfloat16 as torch's default dtype before it imports anything else."""
    code = (
        "import torch; torch.set_default_dtype(torch.bfloat16)\n"
        "from lightning_indexer.formats import e2m1_encode\n"
        "print(e2m1_encode(torch.tensor([0.748, 1.748, 3.49], dtype=torch.float32)).tolist())"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, check=True)
    assert done.stdout.strip() == "[1, 3, 5]", done.stdout


@pytest.mark.parametrize(("format", "dim"), STORED)
@pytest.mark.parametrize("shape", [(0,), (0, 3), (3, 0)], ids=str)
def test_no_entries(format, dim, shape):
    data, scale = quantize(torch.randn(*shape, dim), format)
    assert data.shape[:-1] == scale.shape[:-1] == torch.Size(shape)
    one = quantize(torch.randn(1, dim), format)
    assert (data.shape[-1], scale.shape[-1]) == (one[0].shape[-1], one[1].shape[-1])
    assert dequantize(data, scale, format).shape == (*shape, dim)
