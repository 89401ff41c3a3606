// indexer_query: RoPE, Hadamard rotation and quantisation of the indexer's queries, and their weights, in one pass.
//
//   q            [num_tokens, num_heads, kDim] fp32, bf16 or fp16; tokens and heads `token_stride` and `head_stride`
//                bytes apart, each row contiguous and at a multiple of 16 bytes
//   positions    int32 or int64 [num_tokens]
//   frequencies  fp32 [num_pairs], of the last channels
//   weights      [num_tokens, num_heads] of any input type (`Floats`)
//   data, scale  [num_tokens, num_heads, bytes of Row]; no scale where Row has none
//   weights_out  fp32 [num_tokens, num_heads]
//
// A thread block owns kHeadsPerCta heads of a token and makes the token's sines once, one thread a pair; a head is kLanes
// consecutive lanes of a warp, as in append.cu, whose rows it writes. Values are on their way while the sines are
// computed. The arithmetic rounds where `apply_rope`, `hadamard` and `quantize_query` do: the bytes are theirs.
#include "formats.cuh"
#include "memory.cuh"
#include "rotate.cuh"
#include "types.cuh"

namespace lightning_indexer {

// fp16 as it is: a format of queries, not of caches.
template <int kDim_>
struct Fp16 {
  static constexpr int kDim = kDim_, kValues = kPlainValues, kLanes = kDim / kValues;
  static constexpr int kDataBytes = 2 * kDim, kScaleBytes = 0;

  template <class Input>
  __device__ static __forceinline__ void write(const float (&x)[kValues], int lane, Target target, float) {
    if (!target.is_wanted) return;
    uint32_t words[kValues / 2];
#pragma unroll
    for (int i = 0; i < kValues / 2; ++i) words[i] = round_to_half(x[2 * i]) | round_to_half(x[2 * i + 1]) << 16;
    store_words(target.data_row + 16 * lane, words);
  }
};

template <class Row, class Input, bool kRotate, int kHeadsPerCta>
__global__ void __launch_bounds__(kHeadsPerCta* Row::kLanes) indexer_query(
    const uint8_t* __restrict__ q,
    int64_t token_stride,
    int64_t head_stride,
    int32_t num_heads,
    const void* __restrict__ positions,
    int32_t positions_are_int64,
    const float* __restrict__ frequencies,
    int32_t num_pairs,
    const void* __restrict__ weights,
    int32_t weights_type,
    float weight_scale,
    uint8_t* __restrict__ data,
    uint8_t* __restrict__ scale,
    float* __restrict__ weights_out) {
  constexpr int kLanes = Row::kLanes, kValues = Row::kValues, kThreads = kHeadsPerCta * kLanes;
  static_assert(kWarpThreads % kLanes == 0 && kThreads % kWarpThreads == 0, "shuffles stay inside full warps");
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  Turn* const turns = reinterpret_cast<Turn*>(dynamic_shared);  // [kDim / 2]

  const int thread = static_cast<int>(threadIdx.x), lane = thread % kLanes;
  const int ctas_per_token = (num_heads + kHeadsPerCta - 1) / kHeadsPerCta;
  const int64_t token = static_cast<int>(blockIdx.x) / ctas_per_token;
  const int head = static_cast<int>(blockIdx.x) % ctas_per_token * kHeadsPerCta + thread / kLanes;
  const bool exists = head < num_heads;  // lanes without a head stay: the shuffles want full warps
  const int64_t row = token * num_heads + head;

  float x[kValues] = {};
  float weight = 0.0f;
  if (exists) {
    load_values<Input>(q + token * token_stride + head * head_stride + lane * (kValues / Input::kPer16 * 16), x);
    if (lane == 0) weight = Floats{weights, weights_type}[row];
  }
  fill_turns(turns, Indices{positions, positions_are_int64}[token], frequencies, num_pairs, thread, kThreads);
  __syncthreads();

  rope<Input, Row::kDim>(x, lane * kValues, turns, num_pairs);
  if constexpr (kRotate) hadamard<Input, kLanes>(x, lane);

  if (exists && lane == 0) weights_out[row] = weight * weight_scale;
  const Target target = {data + row * Row::kDataBytes, scale + row * Row::kScaleBytes, exists};
  Row::template write<Input>(x, lane, target, 1.0f);
}

}  // namespace lightning_indexer
