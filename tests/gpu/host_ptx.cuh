// Takes the place of kernels/ptx.cuh on the host: the same functions without inline PTX.
#pragma once

#include "types.cuh"

namespace lightning_indexer {

inline float max_or_nan(float a, float b) { return a != a ? a : b != b ? b : a > b ? a : b; }

inline uint32_t bf16_bits(float x) {
  const uint32_t bits = __float_as_uint(x);
  return x == x ? (bits + 0x7FFFu + (bits >> 16 & 1u)) >> 16 : 0x7FFFu;
}

inline uint32_t pack_bf16(float low, float high) { return bf16_bits(low) | bf16_bits(high) << 16; }

}  // namespace lightning_indexer
