// Writers of the cache formats: `formats.quantize` for the values that one lane holds.
//
// An entry is spread over kLanes consecutive threads, kValues values each; in formats with scales they are lanes of one
// warp. A row type has
//     write<Input>(x, lane, target, global_scale)        x: the lane's values; target: the rows to write
//     write_pairs(pairs, lane, target, global_scale)     the same bytes from bf16, two to a word (if kTakesPairs)
// which all lanes of a warp must call together (they shuffle), those whose entry is skipped with a target that is not wanted.
#pragma once

#include "memory.cuh"
#include "numeric.cuh"
#include "types.cuh"

namespace lightning_indexer {

constexpr int kQuantizedValues = 16;  // per lane, in formats with scales: the smallest scale group
constexpr int kPlainValues = 8;       // per lane, in formats without

// Where an entry's bytes go, unless it is skipped.
struct Target {
  uint8_t* __restrict__ data_row;
  uint8_t* __restrict__ scale_row;
  bool is_wanted;

  // Of a slot of a paged cache, which may be any number where the entry is skipped.
  template <class Block>
  __device__ __forceinline__ static Target of_slot(uint8_t* storage, int64_t block_stride, int64_t slot, bool is_wanted) {
    const uint32_t block = static_cast<uint32_t>(static_cast<uint64_t>(slot) / Block::kEntries);
    const uint32_t row = static_cast<uint32_t>(static_cast<uint64_t>(slot) % Block::kEntries);
    uint8_t* const base = storage + block * block_stride;
    return {base + row * Block::kDataBytes, base + (Block::kScaleOffset + row * Block::kScaleBytes), is_wanted};
  }
};

// --- codes of one lane --------------------------------------------------------------------------------------------

// kBits wide codes: `negative` for negative NaNs, `other` for all other values.
template <int kBits, int kWords>
__device__ __forceinline__ void encode_nans(
    const float (&x)[kQuantizedValues], uint32_t other, uint32_t negative, uint32_t (&words)[kWords]) {
  constexpr int kPerWord = 32 / kBits;
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < kPerWord; ++i) {
      words[w] |= (is_negative_nan(x[kPerWord * w + i]) ? negative : other) << (kBits * i);
    }
  }
}

// Sixteen E2M1 codes of x / scale, low nibble first.
template <Rounding kRounding, class Scale>
__device__ __forceinline__ void encode_e2m1(
    const float (&x)[kQuantizedValues], const Scale& scale, uint32_t (&words)[2]) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 8; ++i) {
      const float value = x[8 * w + i];
      const uint32_t code = e2m1_magnitude<kRounding>(scale.divide(fabsf(value)));
      const bool has_sign = kRounding == Rounding::kNearestEven || code != 0;  // the other rule knows no -0
      words[w] |= (code | (has_sign ? __float_as_uint(value) >> 28 & 8u : 0)) << (4 * i);
    }
  }
  // Of a NaN scale: code 0, and -0 for a negative NaN where signs are kept (a quotient has the sign of its NaN).
  if (scale.is_nan()) encode_nans<4>(x, 0u, kRounding == Rounding::kNearestEven ? 8u : 0u, words);
}

// Sixteen E4M3 codes of x / scale.
template <class Scale>
__device__ __forceinline__ void encode_e4m3(
    const float (&x)[kQuantizedValues], const Scale& scale, uint32_t (&words)[4]) {
#pragma unroll
  for (int w = 0; w < 4; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const float value = x[4 * w + i];
      const uint32_t code = e4m3_magnitude(scale.divide(fabsf(value)));
      words[w] |= (code | (__float_as_uint(value) >> 24 & 0x80u)) << (8 * i);
    }
  }
  if (scale.is_nan()) encode_nans<8>(x, kE4M3Nan, 0x80u | kE4M3Nan, words);
}

// bf16 pairs of consecutive values.
template <int kValues>
__device__ __forceinline__ void round_to_bf16(const float (&x)[kValues], uint32_t (&words)[kValues / 2]) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) words[i] = round_to_bf16(x[2 * i]) | round_to_bf16(x[2 * i + 1]) << 16;
}

// The same for values that are bf16 already.
template <int kValues>
__device__ __forceinline__ void take_high_halves(const float (&x)[kValues], uint32_t (&words)[kValues / 2]) {
#pragma unroll
  for (int i = 0; i < kValues / 2; ++i) {
    words[i] = __float_as_uint(x[2 * i]) >> 16 | (__float_as_uint(x[2 * i + 1]) & 0xFFFF0000u);
  }
}

// --- codes of pairs of bf16, in half the instructions -------------------------------------------------------------

// Both halves of a word.
__device__ __forceinline__ uint32_t twice(float x) { return pack_bf16(x, x); }

// Sixteen E2M1 codes of pairs / scale, nearest even, low nibble first; the quotients are below 7, or saturate.
//
// The code of a magnitude v is the least of 2v, 2 + v and 4 + v/2, each rounded to an integer. The sum with 128 of each is
// rounded so in bf16, whose unit there is 1, and the low byte of the least sum is the code without its sign.
template <bool kSaturates, class Scale>
__device__ __forceinline__ void encode_e2m1(
    const uint32_t (&pairs)[kQuantizedValues / 2], const Scale& scale, uint32_t (&words)[2]) {
  const uint32_t twofold = twice(2 * scale.factor()), once = twice(scale.factor()), half = twice(0.5f * scale.factor());
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    uint32_t least[4], bytes[2];
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t v = scale.template divide_pair<kSaturates>(pairs[4 * w + i]);
      const uint32_t low = fma_bf16x2(v, twofold, 0x43004300u), middle = fma_bf16x2(v, once, 0x43024302u);
      least[i] = min_bf16x2(min_bf16x2(low, middle), fma_bf16x2(v, half, 0x43044304u));
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {  // four codes, the second before the first: a product puts it behind that
      const uint32_t *const magnitudes = least + 2 * i, *const signs = pairs + 4 * w + 2 * i;
      const uint32_t codes = permute(magnitudes[0], magnitudes[1], 0x4602);
      bytes[i] = (codes | (permute(signs[0], signs[1], 0xDF9B) & 0x08080808u)) * 0x1001u;
    }
    words[w] = permute(bytes[0], bytes[1], 0x7531);
  }
}

// The same of a NaN scale: code 0, and -0 for a negative NaN.
__device__ __forceinline__ void encode_nans(const uint32_t (&pairs)[kQuantizedValues / 2], uint32_t (&words)[2]) {
#pragma unroll
  for (int w = 0; w < 2; ++w) {
    words[w] = 0;
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      const uint32_t pair = pairs[4 * w + i], low = pair << 16 > kNegativeInfBits, high = pair > (kNegativeInfBits | 0xFFFFu);
      words[w] |= (low << 3 | high << 7) << (8 * i);
    }
  }
}

// Store the codes of a lane's pairs. What is rare comes last, over what was stored, so that its code need not be fetched.
template <class Scale>
__device__ __forceinline__ void store_e2m1(
    const uint32_t (&pairs)[kQuantizedValues / 2], const Scale& scale, int lane, const Target& target) {
  if (!target.is_wanted) return;
  uint8_t* const place = target.data_row + 8 * lane;
  uint32_t words[2];
  encode_e2m1<false>(pairs, scale, words);
  store_words(place, words);
  if (!scale.is_rare()) return;
  if (scale.is_nan()) {
    encode_nans(pairs, words);
  } else {
    encode_e2m1<true>(pairs, scale, words);
  }
  store_words(place, words);
}

// --- scales of one group ------------------------------------------------------------------------------------------

constexpr float kFp8Floor = 1e-4f;
constexpr float kOneOverE2M1Max = static_cast<float>(1.0 / kE2M1Max);
constexpr float kOneOverE4M3Max = static_cast<float>(1.0 / kE4M3Max);

// 2^(byte - 127), byte in 1..253: division by it is multiplication by a normal number, so the bits agree.
struct PowerOfTwo {
  uint32_t byte;
  float inverse;

  // The smallest power of two that brings amax (at least `floor`) down to the format's largest number, with the CPU's
  // rounding of that quotient.
  __device__ static __forceinline__ PowerOfTwo covering(float amax, float floor, float one_over_largest) {
    const uint32_t byte = ue8m0_ceil(max_or_nan(amax, floor) * one_over_largest);
    return {byte, __uint_as_float((254 - byte) << 23)};
  }
  __device__ __forceinline__ bool is_nan() const { return byte == kUE8M0Nan; }
  __device__ __forceinline__ bool is_rare() const { return is_nan(); }
  __device__ __forceinline__ float divide(float magnitude) const { return magnitude * inverse; }
  // The magnitudes of two bf16 quotients but for `factor`. At most 6 but for rounding, they need not saturate.
  template <bool>
  __device__ __forceinline__ uint32_t divide_pair(uint32_t pair) const { return abs_bf16x2(pair); }
  __device__ __forceinline__ float factor() const { return inverse; }
};

// E4M3 times a global fp32 factor. Quotients saturate: the scale stops at 448, and where it rounds down they pass 6.
struct E4M3Scale {
  uint32_t byte;
  float value;

  __device__ static __forceinline__ E4M3Scale covering(float amax, float global_scale) {
    const float wanted = amax / global_scale;
    const float clamped = fminf(fmaxf(wanted, kE2M1Max * kE4M3Tiny), kE2M1Max * kE4M3Max);
    const uint32_t byte = is_finite(wanted) ? e4m3_magnitude(clamped / kE2M1Max) : kE4M3Nan;
    return {byte, e4m3_fields(byte << 24) * 0x1p120f * global_scale};
  }
  __device__ __forceinline__ bool is_nan() const { return byte == kE4M3Nan; }
  __device__ __forceinline__ float divide(float magnitude) const { return fminf(magnitude / value, kE2M1Max); }
};

// The same where `value` is far from overflow and underflow: the steps of an IEEE division without its test of the
// operands, which would be a branch per value. A quotient that overflows ends as NaN, and fminf drops that.
struct TameE4M3Scale {
  static constexpr float kSmallest = 0x1p-60f, kLargest = 0x1p60f;
  uint32_t byte;
  float value;
  float inverse;

  __device__ static __forceinline__ bool fits(const E4M3Scale& scale) {
    return scale.value >= kSmallest && scale.value <= kLargest;
  }
  __device__ __forceinline__ bool is_nan() const { return byte == kE4M3Nan; }
  __device__ __forceinline__ float divide(float magnitude) const {
    float quotient = magnitude * inverse;
    quotient = fmaf(inverse, fmaf(-value, quotient, magnitude), quotient);
    quotient = fmaf(inverse, fmaf(-value, quotient, magnitude), quotient);
    return fminf(quotient, kE2M1Max);
  }
};

// The same for bf16 values and a global factor that is a tame power of two (`is_plain_global_scale` in append.py).
// Quotients are rounded to bf16, and that to E2M1. That makes no difference: the scale has four bits, so a quotient is a
// midpoint of E2M1 or at least a 254th of it away, further than its rounding takes it; the same holds for the midpoints of
// E4M3 and a sixth of amax.
struct PlainE4M3Scale {
  uint32_t byte;
  uint32_t inverse, rest;  // to 16 bits, in two terms

  __device__ static __forceinline__ PlainE4M3Scale covering(float amax, float global_scale) {
    const float wanted = amax * __uint_as_float(0x7F000000u - __float_as_uint(global_scale));  // divided by a power of two
    const float clamped = fminf(fmaxf(wanted, kE2M1Max * kE4M3Tiny), kE2M1Max * kE4M3Max);
    const uint32_t number = e4m3_magnitude(clamped * kOneOverE2M1Max), byte = is_finite(wanted) ? number : kE4M3Nan;
    const float exact = approximate_reciprocal(e4m3_fields(byte << 24) * 0x1p120f * global_scale);
    const uint32_t inverse = twice(exact);
    return {byte, inverse, twice(exact - __uint_as_float(inverse << 16))};
  }
  __device__ __forceinline__ bool is_nan() const { return byte == kE4M3Nan; }
  // NaN, or a scale by which a quotient may reach 7: 448, where scales stop, and the least ones, which may be rounded
  // down by up to a third.
  static constexpr uint32_t kLeastTame = 4, kMostTame = kE4M3Nan - 2;
  __device__ __forceinline__ bool is_rare() const { return byte - kLeastTame > kMostTame - kLeastTame; }
  template <bool kSaturates>
  __device__ __forceinline__ uint32_t divide_pair(uint32_t pair) const {
    const uint32_t quotients = abs_bf16x2(fma_bf16x2(pair, inverse, multiply_bf16x2(pair, rest)));
    return kSaturates ? min_bf16x2(quotients, 0x40C040C0u) : quotients;  // 6
  }
  __device__ __forceinline__ float factor() const { return 1; }
};

// --- rows ---------------------------------------------------------------------------------------------------------

// The largest magnitude among the values of a group's lanes, NaN if there is one.
template <int kGroupLanes, int kValues>
__device__ __forceinline__ float group_amax(const float (&x)[kValues]) {
  float amax = fabsf(x[0]);
#pragma unroll
  for (int i = 1; i < kValues; ++i) amax = max_or_nan(amax, fabsf(x[i]));
#pragma unroll
  for (int distance = 1; distance < kGroupLanes; distance *= 2) {
    amax = max_or_nan(amax, __shfl_xor_sync(kFullWarp, amax, distance));
  }
  return amax;
}

template <int kGroupLanes>
__device__ __forceinline__ float group_amax(const uint32_t (&pairs)[kQuantizedValues / 2]) {
  uint32_t amax = abs_bf16x2(pairs[0]);
#pragma unroll
  for (int i = 1; i < kQuantizedValues / 2; ++i) amax = max_or_nan_bf16x2(amax, abs_bf16x2(pairs[i]));
#pragma unroll
  for (int distance = 1; distance < kGroupLanes; distance *= 2) {
    amax = max_or_nan_bf16x2(amax, __shfl_xor_sync(kFullWarp, amax, distance));
  }
  return max_or_nan(__uint_as_float(amax << 16), __uint_as_float(amax & 0xFFFF0000u));
}

// Writes one scale byte per group, four groups to a word: a byte store per group would issue four times as many.
template <int kGroupLanes, int kGroups>
__device__ __forceinline__ void store_scale_bytes(const Target& target, uint32_t byte, uint32_t pad, int lane) {
  constexpr int kWordLanes = 4 * kGroupLanes;
  uint32_t word = byte << (8 * (lane / kGroupLanes % 4)) | pad;
  word |= __shfl_xor_sync(kFullWarp, word, kGroupLanes);
  if constexpr (kGroups > 2) word |= __shfl_xor_sync(kFullWarp, word, 2 * kGroupLanes);
  if (target.is_wanted && lane % kWordLanes == 0) reinterpret_cast<uint32_t*>(target.scale_row)[lane / kWordLanes] = word;
}

// Packed E2M1, then UE8M0 per 32 values. At D=64 two of the four scale bytes are pad and hold 1.0.
template <int kDim_, Rounding kRounding>
struct Mxfp4 {
  static constexpr int kDim = kDim_, kValues = kQuantizedValues, kLanes = kDim / kValues, kGroupLanes = 32 / kValues;
  static constexpr int kDataBytes = kDim / 2, kScaleBytes = 4;
  static constexpr bool kTakesPairs = kRounding == Rounding::kNearestEven;
  static constexpr float kFloor = kTakesPairs ? kE2M1Max * 0x1p-126f : 1e-4f;
  static_assert(kDim == 64 || kDim == 128, "index keys");

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    const PowerOfTwo scale = PowerOfTwo::covering(group_amax<kGroupLanes>(x), kFloor, kOneOverE2M1Max);
    store_scale_bytes<kGroupLanes, kDim / 32>(target, scale.byte, kDim == 64 ? 0x7F7F0000u : 0, lane);
    uint32_t words[2];
    encode_e2m1<kRounding>(x, scale, words);
    if (target.is_wanted) store_words(target.data_row + 8 * lane, words);
  }

  __device__ static __forceinline__ void write_pairs(
      const uint32_t (&pairs)[kValues / 2], int lane, Target target, float) {
    const PowerOfTwo scale = PowerOfTwo::covering(group_amax<kGroupLanes>(pairs), kFloor, kOneOverE2M1Max);
    store_scale_bytes<kGroupLanes, kDim / 32>(target, scale.byte, kDim == 64 ? 0x7F7F0000u : 0, lane);
    store_e2m1(pairs, scale, lane, target);
  }
};

// Packed E2M1, then E4M3 per 16 values.
template <int kDim_, Rounding kRounding, bool kIsPlain>
struct Nvfp4 {
  static constexpr int kDim = kDim_, kValues = kQuantizedValues, kLanes = kDim / kValues, kGroupLanes = 16 / kValues;
  static constexpr bool kTakesPairs = kIsPlain && kRounding == Rounding::kNearestEven;
  static constexpr int kDataBytes = kDim / 2, kScaleBytes = kDim / 16;
  static_assert(kDim == 64 || kDim == 128, "index keys");

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float global_scale) {
    const E4M3Scale scale = E4M3Scale::covering(group_amax<kGroupLanes>(x), global_scale);
    store_scale_bytes<kGroupLanes, kDim / 16>(target, scale.byte, 0, lane);
    uint32_t words[2];
    if (TameE4M3Scale::fits(scale)) {
      encode_e2m1<kRounding>(x, TameE4M3Scale{scale.byte, scale.value, 1.0f / scale.value}, words);
    } else {
      encode_e2m1<kRounding>(x, scale, words);
    }
    if (target.is_wanted) store_words(target.data_row + 8 * lane, words);
  }

  __device__ static __forceinline__ void write_pairs(
      const uint32_t (&pairs)[kValues / 2], int lane, Target target, float global_scale) {
    const PlainE4M3Scale scale = PlainE4M3Scale::covering(group_amax<kGroupLanes>(pairs), global_scale);
    store_scale_bytes<kGroupLanes, kDim / 16>(target, scale.byte, 0, lane);
    store_e2m1(pairs, scale, lane, target);
  }
};

// E4M3, then one fp32 power of two for the whole entry.
template <int kDim_>
struct Fp8 {
  static constexpr int kDim = kDim_, kValues = kQuantizedValues, kLanes = kDim / kValues, kGroupLanes = kLanes;
  static constexpr bool kTakesPairs = false;
  static constexpr int kDataBytes = kDim, kScaleBytes = 4;
  static_assert(kDim == 64 || kDim == 128, "index keys");

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    const PowerOfTwo scale = PowerOfTwo::covering(group_amax<kGroupLanes>(x), kFp8Floor, kOneOverE4M3Max);
    uint32_t words[4];
    encode_e4m3(x, scale, words);
    if (!target.is_wanted) return;
    store_words(target.data_row + 16 * lane, words);
    if (lane == 0) *reinterpret_cast<float*>(target.scale_row) = ue8m0_value(scale.byte);
  }
};

// 448 E4M3 with UE8M0 per 64, then 64 bf16 (the RoPE dims): lanes 28 to 31 hold the latter, and their "group" is the
// eighth scale byte, a zero.
struct Fp8DsMla {
  static constexpr int kDim = 512, kValues = kQuantizedValues, kLanes = kDim / kValues, kGroupLanes = 64 / kValues;
  static constexpr int kFp8Lanes = 448 / kValues;
  static constexpr bool kTakesPairs = false;
  static constexpr int kDataBytes = 448 + 64 * 2, kScaleBytes = 8;
  static_assert(kLanes == kWarpThreads, "one warp per entry");

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    const PowerOfTwo scale = PowerOfTwo::covering(group_amax<kGroupLanes>(x), kFp8Floor, kOneOverE4M3Max);
    const bool is_rope = lane >= kFp8Lanes;
    store_scale_bytes<kGroupLanes, 8>(target, is_rope ? 0 : scale.byte, 0, lane);
    if (!target.is_wanted) return;
    if (is_rope) {
      uint32_t words[8];
      round_to_bf16(x, words);
      store_words(target.data_row + 448 + 32 * (lane - kFp8Lanes), words);
    } else {
      uint32_t words[4];
      encode_e4m3(x, scale, words);
      store_words(target.data_row + 16 * lane, words);
    }
  }
};

// bf16 as it is. A bf16 input keeps every bit, NaN payloads too.
template <int kDim_>
struct Bf16 {
  static constexpr int kDim = kDim_, kValues = kPlainValues, kLanes = kDim / kValues, kGroupLanes = 0;
  static constexpr bool kTakesPairs = false;
  static constexpr int kDataBytes = 2 * kDim, kScaleBytes = 0;

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    if (!target.is_wanted) return;
    uint32_t words[4];
    if constexpr (Input::kIsBf16) {
      take_high_halves(x, words);
    } else {
      round_to_bf16(x, words);
    }
    store_words(target.data_row + 16 * lane, words);
  }
};

template <int kDim_>
struct Fp32 {
  static constexpr int kDim = kDim_, kValues = kPlainValues, kLanes = kDim / kValues, kGroupLanes = 0;
  static constexpr bool kTakesPairs = false;
  static constexpr int kDataBytes = 4 * kDim, kScaleBytes = 0;

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    if (!target.is_wanted) return;
    uint32_t words[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) words[i] = __float_as_uint(x[i]);
    store_words(target.data_row + 32 * lane, words);
  }
};

}  // namespace lightning_indexer
