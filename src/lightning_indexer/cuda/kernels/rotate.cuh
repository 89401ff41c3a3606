// Rotations of channels as `rotary.py` does them, rounding for rounding: RoPE and the Hadamard rotation.
#pragma once

#include "exact.cuh"
#include "types.cuh"

namespace lightning_indexer {

// The turns of a vector's last `num_pairs` pairs at a position, into shared memory by the threads of a block. The
// caller lets them meet.
__device__ __forceinline__ void fill_turns(
    Turn* turns, int64_t position, const float* __restrict__ frequencies, int num_pairs, int thread, int threads) {
#pragma unroll 1
  for (int pair = thread; pair < num_pairs; pair += threads) {
    turns[pair] = turn_by(static_cast<float>(position) * frequencies[pair]);
  }
}

// RoPE of the values that a lane holds, from channel `first` on of kDim; each is rounded to Input.
template <class Input, int kDim, int kValues>
__device__ __forceinline__ void rope(float (&x)[kValues], int first, const Turn* turns, int num_pairs) {
#pragma unroll
  for (int i = 0; i < kValues; i += 2) {
    const int pair = (first + i - kDim) / 2 + num_pairs;
    if (pair < 0) continue;
    const Turn turn = turns[pair];
    const float even = x[i], odd = x[i + 1];
    x[i] = Input::nearest(even * turn.cos - odd * turn.sin);
    x[i + 1] = Input::nearest(even * turn.sin + odd * turn.cos);
  }
}

// The Hadamard rotation of a vector spread over kLanes lanes of a warp, kValues consecutive values each, nearest
// neighbours first; the sums are rounded to Input once, at the end. All lanes of the warp call it.
template <class Input, int kLanes, int kValues>
__device__ __forceinline__ void hadamard(float (&x)[kValues], int lane) {
  static_assert(kLanes * kValues == 64 || kLanes * kValues == 128, "index keys");
#pragma unroll
  for (int half = 1; half < kValues; half *= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      if (i & half) continue;
      const float low = x[i], high = x[i + half];
      x[i] = low + high, x[i + half] = low - high;
    }
  }
#pragma unroll
  for (int distance = 1; distance < kLanes; distance *= 2) {
#pragma unroll
    for (int i = 0; i < kValues; ++i) {
      const float other = __shfl_xor_sync(kFullWarp, x[i], distance);
      x[i] = lane & distance ? other - x[i] : x[i] + other;
    }
  }
  constexpr float kScale = kLanes * kValues == 64 ? 0.125f : static_cast<float>(0.125 * 0.70710678118654752);
#pragma unroll
  for (int i = 0; i < kValues; ++i) x[i] = Input::nearest(x[i] * kScale);
}

}  // namespace lightning_indexer
