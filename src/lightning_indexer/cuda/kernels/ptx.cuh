// Instructions that CUDA C++ has no operator for. The append and gather kernels are plain C++ otherwise, which a host
// compiler can run too; the tests do that with another version of this file.
#pragma once

#include "types.cuh"

namespace lightning_indexer {

// The larger of two numbers, NaN if either is NaN (fmaxf drops it).
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Two fp32 rounded to bf16, nearest even; `low` takes the low half. NaN becomes 0x7FFF.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

}  // namespace lightning_indexer
