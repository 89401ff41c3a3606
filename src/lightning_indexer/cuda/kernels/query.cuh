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

  static constexpr uint32_t kLine = 128;  // bytes that are brought at once

  // Bring up to `count` queries from `row` on, of `num_tokens`, nearer: thread `thread` of `threads` takes its lines.
  template <int kDim>
  __device__ __forceinline__ void prefetch(
      int64_t row, int count, int num_tokens, uint32_t thread, uint32_t threads) const {
    const uint32_t rows = static_cast<uint32_t>(min(static_cast<int64_t>(count), num_tokens - row));
    const uint32_t row_bytes = static_cast<uint32_t>(num_heads) * kDim * value_bits() / 8;
    const uint32_t scale_bytes = format == QueryFormat::kNvfp4 ? kDim / 16 : 4;  // of a head
    const auto prefetch_rows = [&](const void* first, uint32_t bytes) {
#pragma unroll 1
      for (uint32_t at = thread * kLine; at < rows * bytes; at += threads * kLine) {
        prefetch_line(static_cast<const uint8_t*>(first) + row * bytes + at);
      }
    };
    prefetch_rows(data, row_bytes);
    prefetch_rows(weights, num_heads * 4);
    if (scale) prefetch_rows(scale, num_heads * scale_bytes);
  }

  __device__ __forceinline__ uint32_t value_bits() const {
    return format <= QueryFormat::kNvfp4 ? 4 : format == QueryFormat::kFp8 ? 8 : format == QueryFormat::kFp32 ? 32 : 16;
  }
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

  float* weights;    // halved, for (a + |a|) * w
  double* folded;    // [queries][kHeads], times all factors
  bool* is_unusual;  // whether some are so far from 1 that fp32 sums want them scaled

  __device__ __forceinline__ void put(int query, int h, double w) const {
    folded[query * kHeads + h] = w;
    weights[query * kPerQuery + place(h)] = static_cast<float>(w * 0.5);
    const int exponent = exponent_of(w);
    if (exponent != kNone && (exponent < -kSafe || exponent > kSafe)) *is_unusual = true;
  }

  // |log2| of a query's largest weight that leaves fp32 sums room on both sides.
  static constexpr int kSafe = 40, kNone = -5000;

  __device__ static __forceinline__ int exponent_of(double w) {
    const int field = __double2hiint(w) >> 20 & 0x7FF;
    return w != 0 && field != 0x7FF ? field - 1023 : kNone;
  }
};

// A head of an operand: what is at its place, and what its weight is multiplied by.
struct Place {
  int query, head;   // within the block
  bool is_real;      // others are padding
  int64_t source;    // of the head, among all; 0 for padding

  template <int kHeads>
  __device__ static __forceinline__ Place of(const Queries& queries, int row, int first, int num_queries) {
    const int query = row / kHeads, head = row % kHeads;
    const bool is_real = query < num_queries && head < queries.num_heads;
    return {query, head, is_real, is_real ? static_cast<int64_t>(first + query) * queries.num_heads + head : 0};
  }
};

// Operands of any query format, and weights times all factors but the query's.
//
// A lane takes eight dims at a time, a head is spread over consecutive lanes: a short loop, since its code is read from
// memory once per launch.
template <class Keys, class Mma, int kHeads, int kPerMma, int kTerms, int kThreads>
__device__ __forceinline__ void load_operands(
    const Queries& queries, int first, int num_queries, uint8_t* target, const Weights<kHeads>& weights) {
  constexpr int kPerRegister = Keys::Element::kPerRegister;
  constexpr bool kIsE4M3 = kPerRegister == 4;
  constexpr int kRuns = Keys::kDim / kRunValues, kRegisters = kRunValues / kPerRegister;
  const int thread = static_cast<int>(this_thread()), run = thread % kRuns, c = run % 4, j = run / 4 * kRunValues;
  const int padded = (num_queries + kPerMma - 1) / kPerMma * kPerMma;
  const bool is_kept = kIsE4M3 && queries.format == QueryFormat::kFp8;  // codes are taken as they are
#pragma unroll 1
  for (int row = thread / kRuns; row < padded * kHeads; row += kThreads / kRuns) {
    const auto [query, h, is_real, head] = Place::of<kHeads>(queries, row, first, num_queries);
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
    const double folded = is_real ? weight * (*queries.factor * scale) * wide_power_of_two(exponent) : 0.0;
    if (run == 0) weights.put(query, h, folded);
  }
}

// The same for mxfp4 queries of mxfp4 keys in E4M3: a head is turned into an operand as a key is.
template <class Keys, class Mma, int kHeads, int kPerMma, int kThreads>
__device__ __forceinline__ void load_mxfp4_operands(
    const Queries& queries, int first, int num_queries, uint8_t* target, const Weights<kHeads>& weights) {
  const int thread = static_cast<int>(this_thread()), lane = thread % kWarpThreads, c = lane % 4;
  const int padded = (num_queries + kPerMma - 1) / kPerMma * kPerMma;
#pragma unroll 1
  for (int from = thread / kWarpThreads * 16; from < padded * kHeads; from += kThreads / kWarpThreads * 16) {
    typename Keys::Row raw[2];
    float weight[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = min(from + lane / 4 + 8 * i, padded * kHeads - 1);
      const Place place = Place::of<kHeads>(queries, row, first, num_queries);
      const uint8_t* codes = queries.data + place.source * (Keys::kDim / 2) + c * Keys::kPieceBytes;
      load_words(codes, raw[i].words);
      raw[i].scale = reinterpret_cast<const uint32_t*>(queries.scale)[place.source];
      weight[i] = queries.weights[place.source];
      if (!place.is_real) {
        weight[i] = 0, raw[i].scale = 0x7F7F7F7Fu;
#pragma unroll
        for (uint32_t& word : raw[i].words) word = 0;
      }
    }
    uint32_t a[Keys::kSteps][4];
    float factor[2];
    Keys::convert(raw, c, a, factor);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const int row = from + lane / 4 + 8 * i, query = row / kHeads, column = query % kPerMma * kHeads + row % kHeads;
      if (row >= padded * kHeads) continue;
      uint8_t* const base = target + query / kPerMma * Mma::kBytes;
#pragma unroll
      for (int step = 0; step < Keys::kSteps; ++step) {
        *reinterpret_cast<uint32_t*>(base + Mma::word_offset(column, step, 0, c)) = a[step][i];
        *reinterpret_cast<uint32_t*>(base + Mma::word_offset(column, step, 1, c)) = a[step][2 + i];
      }
      if (c == 0) weights.put(query, row % kHeads, weight[i] * (*queries.factor * factor[i]));
    }
  }
}

// Store `num_queries` queries from `first` on: operands at `target`, and weights (halved, for (a + |a|) * w). All threads that
// score call it; the caller synchronises before and after.
template <class Keys, class Mma, int kHeads, int kPerMma, int kTerms, int kThreads>
__device__ __forceinline__ void load_queries(
    const Queries& queries, int first, int num_queries, uint8_t* target, const Weights<kHeads>& weights) {
  constexpr bool kIsMxfp4 = Keys::kIsMxfp4 && Keys::Element::kPerRegister == 4;
  if (kIsMxfp4 && queries.format == QueryFormat::kMxfp4) {
    if constexpr (kIsMxfp4) {
      load_mxfp4_operands<Keys, Mma, kHeads, kPerMma, kThreads>(queries, first, num_queries, target, weights);
    }
  } else {
    load_operands<Keys, Mma, kHeads, kPerMma, kTerms, kThreads>(queries, first, num_queries, target, weights);
  }
}

// Where weights are unusual: scale those of each query by a power of two, and store two factors that its scores are still to
// be multiplied by.
template <int kHeads, int kThreads>
__device__ __forceinline__ void scale_weights(const Weights<kHeads>& weights, int num_queries, float2* row_scales) {
  using W = Weights<kHeads>;
  const int thread = static_cast<int>(this_thread()), lane = thread % kWarpThreads;
#pragma unroll 1
  for (int query = thread / kWarpThreads; query < num_queries; query += kThreads / kWarpThreads) {
    const double* const folded = weights.folded + query * kHeads;
    int top = W::kNone;
    for (int h = lane; h < kHeads; h += kWarpThreads) top = max(top, W::exponent_of(folded[h]));
    top = __reduce_max_sync(kFullWarp, top);
    const int taken = top == W::kNone || (top >= -W::kSafe && top <= W::kSafe) ? 0 : top;
    for (int h = lane; h < kHeads; h += kWarpThreads) {
      const double w = folded[h] * wide_power_of_two(-taken) * 0.5;
      weights.weights[query * W::kPerQuery + W::place(h)] = static_cast<float>(w);
    }
    if (lane == 0) {
      const int kept = min(max(taken, -250), 250);
      row_scales[query] = {power_of_two(kept / 2), power_of_two(kept - kept / 2)};
    }
  }
}

}  // namespace lightning_indexer
