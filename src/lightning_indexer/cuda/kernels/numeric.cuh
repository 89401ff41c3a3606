// Numbers as bits: widening the input types, rounding to E2M1, E4M3 and bf16, power-of-two scales.
//
// Every function gives the bits that `formats.py` gives on a CPU. That needs IEEE arithmetic: the compiler must keep
// subnormals and true division, and must not contract a*b+c (the options of compiler.py say so).
#pragma once

#include "ptx.cuh"
#include "types.cuh"

namespace lightning_indexer {

constexpr uint32_t kExponentBits = 0x7F800000u;   // of an fp32; also the bits of +inf
constexpr uint32_t kNegativeInfBits = 0xFF800000u;
constexpr uint32_t kNanBits = 0x7FC00000u;
constexpr uint32_t kBf16Nan = 0xFFFFu;            // what torch's vectorised conversion writes on a CPU
constexpr uint32_t kHalfInf = 0x7C00u;
constexpr uint32_t kHalfNan = 0x7E00u;
constexpr float kHalfOverflow = 65520.0f;         // the first number that rounds past fp16's largest
constexpr uint32_t kUE8M0Nan = 255;
constexpr uint32_t kE4M3Nan = 0x7F;
constexpr float kE2M1Max = 6.0f;
constexpr float kE4M3Max = 448.0f;
constexpr float kE4M3Tiny = 0x1p-9f;              // smallest subnormal

// 2^exponent for normal fp32 exponents.
__device__ __forceinline__ float power_of_two(int exponent) {
  return __uint_as_float(static_cast<uint32_t>(exponent + 127) << 23);
}

__device__ __forceinline__ bool is_finite(float x) { return (__float_as_uint(x) & kExponentBits) != kExponentBits; }

__device__ __forceinline__ bool is_negative_nan(float x) { return __float_as_uint(x) > kNegativeInfBits; }

// fp32 of the fp16 in the low half of `bits`; NaN becomes quiet and keeps its payload, as the CPU's conversion does.
__device__ __forceinline__ float widen_half(uint32_t bits) {
  const uint32_t sign = (bits & 0x8000u) << 16;
  const uint32_t magnitude = (bits & 0x7FFFu) << 13;
  const uint32_t finite = __float_as_uint(__uint_as_float(magnitude) * 0x1p112f);  // rebias; subnormals come right too
  const uint32_t special = magnitude | kExponentBits | (magnitude > 0x0F800000u ? 0x00400000u : 0u);
  return __uint_as_float(sign | (magnitude < 0x0F800000u ? finite : special));
}

// bf16 of x, nearest even, in the low half.
__device__ __forceinline__ uint32_t round_to_bf16(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x == x ? (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16 : kBf16Nan;
}

// Code of the nearest number with kMantissa mantissa bits and smallest exponent kMinExponent, ties to even; no sign.
// kCodes masks a code. v must be finite, not negative, and below the first number that rounds past the largest code.
//
// Adding 2^(e + 23 - kMantissa), where 2^e <= v < 2^(e+1), pushes all but the wanted mantissa out of the sum, so the
// adder does the rounding; below 2^kMinExponent, e stays there and the spacing is that of subnormals.
template <int kMantissa, int kMinExponent, uint32_t kCodes>
__device__ __forceinline__ uint32_t round_to_code(float v) {
  constexpr int kShift = 23 - kMantissa;
  constexpr uint32_t kBias = static_cast<uint32_t>(127 + kShift + kMinExponent) << kMantissa;
  const uint32_t at_least = __float_as_uint(fmaxf(v, power_of_two(kMinExponent)));
  const float binade = __uint_as_float(at_least & kExponentBits);
  const uint32_t sum = __float_as_uint(fmaf(binade, power_of_two(kShift), v));
  return ((sum >> kShift) + sum - kBias) & kCodes;  // `sum` has its exponent above the mask
}

// fp16 of x, nearest even, in the low half.
__device__ __forceinline__ uint32_t round_to_half(float x) {
  const float magnitude = fabsf(x);
  const uint32_t special = magnitude == magnitude ? kHalfInf : kHalfNan;
  const uint32_t code = magnitude < kHalfOverflow ? round_to_code<10, -14, 0x7FFFu>(magnitude) : special;
  return code | (__float_as_uint(x) >> 16 & 0x8000u);
}

__device__ __forceinline__ uint32_t e4m3_magnitude(float v) { return round_to_code<3, -6, 0x7Fu>(v); }

enum class Rounding { kNearestEven, kTowardZero };

// v as for round_to_code. The two rules differ at three midpoints only.
template <Rounding kRounding>
__device__ __forceinline__ uint32_t e2m1_magnitude(float v) {
  const uint32_t code = round_to_code<1, 0, 7u>(v);
  if constexpr (kRounding == Rounding::kNearestEven) return code;
  const bool rounded_up_from_tie = v == 0.75f || v == 1.75f || v == 3.5f;
  return rounded_up_from_tie ? code - 1 : code;
}

// fp32 of the E4M3 code in the top byte of `bits`, times 2^-120: the E4M3 fields moved to where fp32 has them.
// The caller multiplies by 2^120, and looks after NaN codes.
__device__ __forceinline__ float e4m3_fields(uint32_t bits) {
  return __uint_as_float(static_cast<uint32_t>(static_cast<int32_t>(bits) >> 4) & 0x87F00000u);
}

// Exponent byte of the smallest power of two >= scale, a positive normal number; 255 where scale is not finite.
__device__ __forceinline__ uint32_t ue8m0_ceil(float scale) {
  const uint32_t bits = __float_as_uint(scale);
  return bits < kExponentBits ? (bits + 0x7FFFFFu) >> 23 : kUE8M0Nan;
}

// fp32 of an exponent byte: 0 is the subnormal 2^-127, 255 is NaN.
__device__ __forceinline__ float ue8m0_value(uint32_t byte) {
  if (byte == kUE8M0Nan) return __uint_as_float(kNanBits);
  return __uint_as_float(byte == 0 ? 0x00400000u : byte << 23);
}

}  // namespace lightning_indexer
