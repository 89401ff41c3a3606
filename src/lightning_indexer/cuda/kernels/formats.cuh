// Writers of the cache formats: `formats.quantize` for the values that one lane holds.
//
// An entry is spread over kLanes consecutive threads, kValues values each; in formats with scales they are lanes of one
// warp. A row type has
//     write(x, lane, target, global_scale)    x: the lane's values, by input type; target: the rows to write
// which all lanes of a warp must call together (it shuffles), those whose entry is skipped with an empty target.
#pragma once

#include "memory.cuh"
#include "numeric.cuh"
#include "types.cuh"

namespace lightning_indexer {

constexpr int kQuantizedValues = 16;  // per lane, in formats with scales: the smallest scale group
constexpr int kPlainValues = 8;       // per lane, in formats without

// Where an entry's bytes go; null where the entry is skipped.
struct Target {
  uint8_t* __restrict__ data_row;
  uint8_t* __restrict__ scale_row;
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
  __device__ __forceinline__ float divide(float magnitude) const { return magnitude * inverse; }
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

// Writes one scale byte per group, four groups to a word: a byte store per group would issue four times as many.
template <int kGroupLanes, int kGroups>
__device__ __forceinline__ void store_scale_bytes(uint8_t* scale_row, uint32_t byte, uint32_t pad, int lane) {
  constexpr int kWordLanes = 4 * kGroupLanes;
  uint32_t word = byte << (8 * (lane / kGroupLanes % 4)) | pad;
  word |= __shfl_xor_sync(kFullWarp, word, kGroupLanes);
  if constexpr (kGroups > 2) word |= __shfl_xor_sync(kFullWarp, word, 2 * kGroupLanes);
  if (scale_row && lane % kWordLanes == 0) reinterpret_cast<uint32_t*>(scale_row)[lane / kWordLanes] = word;
}

// Packed E2M1, then UE8M0 per 32 values. At D=64 two of the four scale bytes are pad and hold 1.0.
template <int kDim_, Rounding kRounding>
struct Mxfp4 {
  static constexpr int kDim = kDim_, kValues = kQuantizedValues, kLanes = kDim / kValues, kGroupLanes = 32 / kValues;
  static constexpr int kDataBytes = kDim / 2, kScaleBytes = 4;
  static constexpr float kFloor = kRounding == Rounding::kNearestEven ? kE2M1Max * 0x1p-126f : 1e-4f;
  static_assert(kDim == 64 || kDim == 128, "index keys");

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    const PowerOfTwo scale = PowerOfTwo::covering(group_amax<kGroupLanes>(x), kFloor, kOneOverE2M1Max);
    store_scale_bytes<kGroupLanes, kDim / 32>(target.scale_row, scale.byte, kDim == 64 ? 0x7F7F0000u : 0, lane);
    uint32_t words[2];
    encode_e2m1<kRounding>(x, scale, words);
    if (target.data_row) store_words(target.data_row + 8 * lane, words);
  }
};

// Packed E2M1, then E4M3 per 16 values.
template <int kDim_, Rounding kRounding>
struct Nvfp4 {
  static constexpr int kDim = kDim_, kValues = kQuantizedValues, kLanes = kDim / kValues, kGroupLanes = 16 / kValues;
  static constexpr int kDataBytes = kDim / 2, kScaleBytes = kDim / 16;
  static_assert(kDim == 64 || kDim == 128, "index keys");

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float global_scale) {
    const E4M3Scale scale = E4M3Scale::covering(group_amax<kGroupLanes>(x), global_scale);
    store_scale_bytes<kGroupLanes, kDim / 16>(target.scale_row, scale.byte, 0, lane);
    uint32_t words[2];
    if (TameE4M3Scale::fits(scale)) {
      encode_e2m1<kRounding>(x, TameE4M3Scale{scale.byte, scale.value, 1.0f / scale.value}, words);
    } else {
      encode_e2m1<kRounding>(x, scale, words);
    }
    if (target.data_row) store_words(target.data_row + 8 * lane, words);
  }
};

// E4M3, then one fp32 power of two for the whole entry.
template <int kDim_>
struct Fp8 {
  static constexpr int kDim = kDim_, kValues = kQuantizedValues, kLanes = kDim / kValues, kGroupLanes = kLanes;
  static constexpr int kDataBytes = kDim, kScaleBytes = 4;
  static_assert(kDim == 64 || kDim == 128, "index keys");

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    const PowerOfTwo scale = PowerOfTwo::covering(group_amax<kGroupLanes>(x), kFp8Floor, kOneOverE4M3Max);
    uint32_t words[4];
    encode_e4m3(x, scale, words);
    if (!target.data_row) return;
    store_words(target.data_row + 16 * lane, words);
    if (lane == 0) *reinterpret_cast<float*>(target.scale_row) = ue8m0_value(scale.byte);
  }
};

// 448 E4M3 with UE8M0 per 64, then 64 bf16 (the RoPE dims): lanes 28 to 31 hold the latter, and their "group" is the
// eighth scale byte, a zero.
struct Fp8DsMla {
  static constexpr int kDim = 512, kValues = kQuantizedValues, kLanes = kDim / kValues, kGroupLanes = 64 / kValues;
  static constexpr int kFp8Lanes = 448 / kValues;
  static constexpr int kDataBytes = 448 + 64 * 2, kScaleBytes = 8;
  static_assert(kLanes == kWarpThreads, "one warp per entry");

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    const PowerOfTwo scale = PowerOfTwo::covering(group_amax<kGroupLanes>(x), kFp8Floor, kOneOverE4M3Max);
    const bool is_rope = lane >= kFp8Lanes;
    store_scale_bytes<kGroupLanes, 8>(target.scale_row, is_rope ? 0 : scale.byte, 0, lane);
    if (!target.data_row) return;
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
  static constexpr int kDataBytes = 2 * kDim, kScaleBytes = 0;

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    if (!target.data_row) return;
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
  static constexpr int kDataBytes = 4 * kDim, kScaleBytes = 0;

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    if (!target.data_row) return;
    uint32_t words[kValues];
#pragma unroll
    for (int i = 0; i < kValues; ++i) words[i] = __float_as_uint(x[i]);
    store_words(target.data_row + 32 * lane, words);
  }
};

}  // namespace lightning_indexer
