// What the kernels read and write with: the layout of a block, index vectors, 16-byte pieces, values of input types.
#pragma once

#include "numeric.cuh"
#include "types.cuh"

namespace lightning_indexer {

// Byte layout of a cache block, filled in from `CacheSchema`: kEntries data rows, then as many scale rows.
template <int kEntries_, int kDataBytes_, int kScaleBytes_, int kScaleOffset_>
struct Block {
  static constexpr int kEntries = kEntries_;
  static constexpr int kDataBytes = kDataBytes_;
  static constexpr int kScaleBytes = kScaleBytes_;
  static constexpr int kScaleOffset = kScaleOffset_;
  static_assert(kEntries >= 1, "a block holds entries");
  static_assert(kDataBytes % 16 == 0, "data rows start at multiples of 16 bytes");
  static_assert(kScaleOffset >= kEntries * kDataBytes, "scale rows lie behind the data rows");
  static_assert(kScaleBytes % 4 == 0 && kScaleOffset % 8 == 0, "scale rows are read and written in words");
};

// An index vector of either width: the choice is uniform over the launch.
struct Indices {
  const void* __restrict__ values;
  int32_t is_int64;

  __device__ __forceinline__ const uint8_t* place(int64_t i) const {
    return static_cast<const uint8_t*>(values) + i * (is_int64 ? 8 : 4);
  }
  __device__ __forceinline__ int64_t operator[](int64_t i) const {
    return is_int64 ? static_cast<const int64_t*>(values)[i] : static_cast<const int32_t*>(values)[i];
  }
};

// A vector of any input type, each value widened to fp32: the choice is uniform over the launch.
struct Floats {
  static constexpr int32_t kFloat32 = 0, kBFloat16 = 1;  // and fp16
  const void* __restrict__ values;
  int32_t type;

  __device__ __forceinline__ float operator[](int64_t i) const {
    if (type == kFloat32) return static_cast<const float*>(values)[i];
    const uint32_t bits = static_cast<const uint16_t*>(values)[i];
    return type == kBFloat16 ? __uint_as_float(bits << 16) : widen_half(bits);
  }
};

__device__ __forceinline__ uint4 load_16(const uint8_t* address) { return *reinterpret_cast<const uint4*>(address); }

__device__ __forceinline__ void store_16(uint8_t* address, uint4 value) { *reinterpret_cast<uint4*>(address) = value; }

// Input types: how many values 16 bytes hold, how to widen them to fp32, and the nearest of them to an fp32, widened.
struct Float32 {
  static constexpr int kPer16 = 4;
  static constexpr bool kIsBf16 = false;
  __device__ static __forceinline__ void widen(uint4 raw, float* x) {
    x[0] = __uint_as_float(raw.x), x[1] = __uint_as_float(raw.y);
    x[2] = __uint_as_float(raw.z), x[3] = __uint_as_float(raw.w);
  }
  __device__ static __forceinline__ float nearest(float x) { return x; }
};

struct BFloat16 {
  static constexpr int kPer16 = 8;
  static constexpr bool kIsBf16 = true;
  __device__ static __forceinline__ void widen(uint4 raw, float* x) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = __uint_as_float(words[i] << 16);
      x[2 * i + 1] = __uint_as_float(words[i] & 0xFFFF0000u);
    }
  }
  __device__ static __forceinline__ float nearest(float x) { return __uint_as_float(round_to_bf16(x) << 16); }
};

struct Float16 {
  static constexpr int kPer16 = 8;
  static constexpr bool kIsBf16 = false;
  __device__ static __forceinline__ void widen(uint4 raw, float* x) {
    const uint32_t words[4] = {raw.x, raw.y, raw.z, raw.w};
#pragma unroll
    for (int i = 0; i < 4; ++i) {
      x[2 * i] = widen_half(words[i]);
      x[2 * i + 1] = widen_half(words[i] >> 16);
    }
  }
  __device__ static __forceinline__ float nearest(float x) { return widen_half(round_to_half(x)); }
};

// kCount consecutive values, from a 16-byte boundary on.
template <class Input, int kCount>
__device__ __forceinline__ void load_values(const uint8_t* address, float (&x)[kCount]) {
  static_assert(kCount % Input::kPer16 == 0, "whole 16-byte pieces");
#pragma unroll
  for (int i = 0; i < kCount / Input::kPer16; ++i) Input::widen(load_16(address + 16 * i), x + i * Input::kPer16);
}

// A block id as the table has it, brought into range.
__device__ __forceinline__ int32_t clamped_block(int32_t block, int32_t num_blocks) {
  return block < 0 ? 0 : block < num_blocks ? block : num_blocks - 1;
}

// kWords words: 8 bytes, or pieces of 16.
template <int kWords>
__device__ __forceinline__ void load_words(const uint8_t* address, uint32_t (&words)[kWords]) {
  static_assert(kWords == 2 || kWords % 4 == 0, "8 bytes, or whole 16-byte pieces");
  if constexpr (kWords == 2) {
    const uint2 raw = *reinterpret_cast<const uint2*>(address);
    words[0] = raw.x, words[1] = raw.y;
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      const uint4 raw = load_16(address + 4 * i);
      words[i] = raw.x, words[i + 1] = raw.y, words[i + 2] = raw.z, words[i + 3] = raw.w;
    }
  }
}

template <int kWords>
__device__ __forceinline__ void store_words(uint8_t* address, const uint32_t (&words)[kWords]) {
  static_assert(kWords == 2 || kWords % 4 == 0, "8 bytes, or whole 16-byte pieces");
  if constexpr (kWords == 2) {
    *reinterpret_cast<uint2*>(address) = make_uint2(words[0], words[1]);
  } else {
#pragma unroll
    for (int i = 0; i < kWords; i += 4) {
      store_16(address + 4 * i, make_uint4(words[i], words[i + 1], words[i + 2], words[i + 3]));
    }
  }
}

}  // namespace lightning_indexer
