// Queries into shared memory as the B operand of a product (mma.cuh), and their weights.
//
// A head's values are brought below 2 by a power of two, which goes into its weight with all other factors; a query's
// weights are brought below 1 by another power of two where they would leave the range in which fp32 sums are safe. So
// no product or sum overflows where the score does not (but with bf16 keys beyond 2^118, which are taken as they are), and
// everything but the last rounding to fp32 is exact.
#pragma once

#include "keys.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "work.cuh"

namespace lightning_indexer {

// What `query_format` may be; score_topk.py has the same list.
enum class QueryFormat { kMxfp4, kNvfp4, kFp8, kBf16, kFp16, kFp32 };

// Queries [num_tokens, num_heads, dim] and weights fp32 [num_tokens, num_heads], all contiguous.
struct Queries {
  const uint8_t* __restrict__ data;
  const uint8_t* __restrict__ scale;  // may be null for fp8
  const float* __restrict__ weights;
  QueryFormat format;
  int32_t num_heads;
  const double* factor;  // multiplies every score; in shared memory, where it holds no registers
};

__device__ __forceinline__ float e2m1_value(uint32_t code) {
  const float magnitude = __uint_as_float((code & 7u) << 22) * 0x1p126f;  // the fields, moved to where fp32 has them
  return code & 8u ? -magnitude : magnitude;
}

__device__ __forceinline__ float e4m3_value(uint32_t byte) {
  const float value = e4m3_fields(byte << 24) * 0x1p120f;
  return (byte & 0x7Fu) == kE4M3Nan ? __uint_as_float(kNanBits) : value;
}

constexpr int kNoExponent = -1000;

__device__ __forceinline__ int exponent_of(float x) {  // of a finite number other than zero
  const uint32_t magnitude = __float_as_uint(x) & 0x7FFFFFFFu;
  return magnitude >= 0x00800000u ? static_cast<int>(magnitude >> 23) - 127
                                                           : -118 - __clz(magnitude);
}

// 2^exponent for exponents of normal doubles.
__device__ __forceinline__ double wide_power_of_two(int exponent) {
  return __hiloint2double((exponent + 1023) << 20, 0);
}

constexpr int kRunValues = 8;

// Consecutive values of a head, to be multiplied by 2^exponent.
struct Run {
  float values[kRunValues];
  int exponent;
};

// Eight dims of head `head` from `dim` on.
template <int kDim>
__device__ __forceinline__ Run read_run(const Queries& queries, int64_t head, int dim) {
  Run run;
  run.exponent = 0;
  const int64_t place = head * kDim + dim;
  switch (queries.format) {
    case QueryFormat::kMxfp4:
    case QueryFormat::kNvfp4: {
      const bool is_mxfp4 = queries.format == QueryFormat::kMxfp4;
      const uint32_t codes = *reinterpret_cast<const uint32_t*>(queries.data + place / 2);
      const uint32_t byte = queries.scale[is_mxfp4 ? head * 4 + dim / 32 : place / 16];
      const float scale = !is_mxfp4 ? e4m3_value(byte) : byte == kUE8M0Nan ? __uint_as_float(kNanBits) : 1.0f;
      if (is_mxfp4) run.exponent = static_cast<int>(byte) - 127;
#pragma unroll
      for (int i = 0; i < kRunValues; ++i) run.values[i] = e2m1_value(codes >> (4 * i)) * scale;
      break;
    }
    case QueryFormat::kFp8: {
      const uint2 raw = *reinterpret_cast<const uint2*>(queries.data + place);
#pragma unroll
      for (int i = 0; i < kRunValues; ++i) run.values[i] = e4m3_value((i < 4 ? raw.x : raw.y) >> (i % 4 * 8) & 0xFFu);
      break;
    }
    case QueryFormat::kBf16:
      load_values<BFloat16>(queries.data + 2 * place, run.values);
      break;
    case QueryFormat::kFp16:
      load_values<Float16>(queries.data + 2 * place, run.values);
      break;
    default:
      load_values<Float32>(queries.data + 4 * place, run.values);
  }
  return run;
}

__device__ __forceinline__ uint32_t pack_e4m3(const float* x) {
  return pack_e4m3x2(x[0], x[1]) | pack_e4m3x2(x[2], x[3]) << 16;
}

// Where weight h of a query lies: lane c of a quad needs those of columns 8 * n + 2 * c and the next for all n, and reads
// them in pieces of 16 bytes; the padding keeps the four lanes off each other's banks.
template <int kHeads>
struct Weights {
  static constexpr int kPerLane = (kHeads / 4 + 3) / 4 * 4 + 4;
  static constexpr int kPerQuery = 4 * kPerLane;
  __device__ static __forceinline__ int place(int h) { return h % 8 / 2 * kPerLane + h / 8 * 2 + h % 2; }
};

// Store `num_queries` queries from `first` on: operands at `target`, weights (halved, for (a + |a|) * w), and for each
// query two factors that its score is still to be multiplied by. `folded`: [num_queries][kHeads] doubles. All threads that
// score call it; the caller synchronises before and after.
//
// A lane takes eight dims at a time, a head is spread over consecutive lanes: a short loop, since its code is read from
// memory once per launch.
template <class Keys, class Mma, int kHeads, int kPerMma, int kTerms, int kThreads>
__device__ __forceinline__ void load_queries(
    const Queries& queries, int first, int num_queries, uint8_t* target, float* weights, double* folded,
    float2* row_scales) {
  constexpr int kPerRegister = Keys::Element::kPerRegister;
  constexpr bool kIsE4M3 = kPerRegister == 4;
  constexpr int kRuns = Keys::kDim / kRunValues, kRegisters = kRunValues / kPerRegister;
  const int thread = static_cast<int>(this_thread()), run = thread % kRuns, c = run % 4, j = run / 4 * kRunValues;
  const int padded = (num_queries + kPerMma - 1) / kPerMma * kPerMma;
  const bool is_kept = kIsE4M3 && queries.format == QueryFormat::kFp8;  // codes are taken as they are
#pragma unroll 1
  for (int row = thread / kRuns; row < padded * kHeads; row += kThreads / kRuns) {
    const int query = row / kHeads, h = row % kHeads;
    const bool is_real = query < num_queries && h < queries.num_heads;
    const int64_t head = is_real ? static_cast<int64_t>(first + query) * queries.num_heads + h : 0;
    // What the weight is made of, under way with the values.
    const float weight = queries.weights[head];
    const bool has_scale = queries.format == QueryFormat::kFp8 && queries.scale;
    const float scale = has_scale ? reinterpret_cast<const float*>(queries.scale)[head] : 1.0f;
    Run x = read_run<Keys::kDim>(queries, head, Keys::dim_of(c, j) / kRunValues * kRunValues);

    int top = kNoExponent;
#pragma unroll
    for (int i = 0; i < kRunValues; ++i) {
      if (is_finite(x.values[i]) && x.values[i] != 0) top = max(top, x.exponent + exponent_of(x.values[i]));
    }
#pragma unroll
    for (int distance = 1; distance < kRuns; distance *= 2) top = max(top, __shfl_xor_sync(kFullWarp, top, distance));
    constexpr int kRoom = kIsE4M3 ? 8 : 0;  // mxfp4 below 2^(8 + 1) is at most 384
    const int exponent = is_kept || top == kNoExponent ? 0 : top - kRoom;
    const int shift = min(max(x.exponent - exponent, -250), 250);  // beyond, all is zero
    const int half = shift / 2;                                    // two factors, each a normal number
    const float first_factor = power_of_two(half), second_factor = power_of_two(shift - half);
#pragma unroll
    for (int i = 0; i < kRunValues; ++i) x.values[i] = is_real ? x.values[i] * first_factor * second_factor : 0.0f;

    uint8_t* const base = target + query / kPerMma * Mma::kBytes;
    const int column = query % kPerMma * kHeads + h;
#pragma unroll
    for (int r = 0; r < kRegisters; ++r) {
      float y[kPerRegister];
#pragma unroll
      for (int i = 0; i < kPerRegister; ++i) y[i] = x.values[Keys::dim_of(0, r * kPerRegister + i)];  // eight are a run
      const int register_index = j / kPerRegister + r;
      uint8_t* const place = base + Mma::word_offset(column, register_index / 2, register_index % 2, c);
      if constexpr (kIsE4M3) {
        *reinterpret_cast<uint32_t*>(place) = pack_e4m3(y);
      } else {
        const uint32_t word = pack_bf16(y[0], y[1]);
        *reinterpret_cast<uint32_t*>(place) = word;
        if constexpr (kTerms == 2) {
          const float low = y[0] - __uint_as_float(word << 16), high = y[1] - __uint_as_float(word & 0xFFFF0000u);
          *reinterpret_cast<uint32_t*>(place + Mma::kTermBytes) =
              pack_bf16(is_finite(y[0]) ? low : 0.0f, is_finite(y[1]) ? high : 0.0f);
        }
      }
    }
    if (run == 0) folded[row] = is_real ? weight * (*queries.factor * scale) * wide_power_of_two(exponent) : 0.0;
  }
  sync_scorers<kThreads>();
  const int lane = thread % kWarpThreads;
#pragma unroll 1
  for (int query = thread / kWarpThreads; query < padded; query += kThreads / kWarpThreads) {
    int top = -5000;
    for (int h = lane; h < kHeads; h += kWarpThreads) {
      const double w = folded[query * kHeads + h];
      const int field = __double2hiint(w) >> 20 & 0x7FF;
      if (w != 0 && field != 0x7FF) top = max(top, field - 1023);
    }
    top = __reduce_max_sync(kFullWarp, top);
    constexpr int kSafe = 40;  // |log2| of a query's largest weight that leaves fp32 sums room on both sides
    const int taken = top == -5000 || (top >= -kSafe && top <= kSafe) ? 0 : top;
    for (int h = lane; h < kHeads; h += kWarpThreads) {
      const double w = folded[query * kHeads + h] * wide_power_of_two(-taken) * 0.5;
      weights[query * Weights<kHeads>::kPerQuery + Weights<kHeads>::place(h)] = static_cast<float>(w);
    }
    if (lane == 0 && query < num_queries) {
      const int kept = min(max(taken, -250), 250);
      row_scales[query] = {power_of_two(kept / 2), power_of_two(kept - kept / 2)};
    }
  }
}

}  // namespace lightning_indexer
