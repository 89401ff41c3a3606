// Scans over a warp, a value per lane. All lanes call.
#pragma once

#include "types.cuh"

namespace lightning_indexer {

// The values of the lanes up to this one, combined.
template <class Value, class Combine>
__device__ __forceinline__ Value scan_up_to(int lane, Value value, const Combine& combine) {
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) {
    const Value other = __shfl_up_sync(kFullWarp, value, distance);
    if (lane >= distance) value = combine(value, other);
  }
  return value;
}

template <class Value>
__device__ __forceinline__ Value sum_up_to(int lane, Value value) {
  return scan_up_to(lane, value, [](Value a, Value b) { return a + b; });
}

// The greatest value of the lanes before this one, -1 if there is none.
__device__ __forceinline__ int greatest_before(int lane, int value) {
  const int greatest = scan_up_to(lane, value, [](int a, int b) { return max(a, b); });
  const int before = __shfl_up_sync(kFullWarp, greatest, 1);
  return lane == 0 ? -1 : before;
}

}  // namespace lightning_indexer
