// compress_entries: from the values and gates of tokens to the rows of the entries they complete, and
// keep_tokens: the values and gates that later entries will want, into the ring of the last tokens.
//
//   values, gates   fp32 [num_tokens, kChannels], tokens `value_stride` and `gate_stride` floats apart; kChannels is
//                   kDim, or 2 kDim where an entry pools two windows (ratio 4: the window before through the first half)
//   ape             fp32 [kRatio, kChannels], added to the gates; norm [kDim] of any input type (`Floats`)
//   ring            fp32 [max_seqs, kSlots, 2, kChannels]: values and gates, ape included, of position p in row p % kSlots
//   seqs, starts, offsets    int64 [num_seqs]: of each sequence its row of the ring, the position of its first token in
//                   this step, and that token's row of `values`; batch_rows int64 [num_tokens]: which sequence
//   entry_rows, entry_indices  int64 [num_entries]: which sequence, and which of its entries; anything where the slot is -1
//   slots, storage  as in append.cu
//
// A thread block of compress_entries owns an entry. With 8 slots a thread pools one channel, so that the code is short (it
// runs once) and all loads are under way at once; with 128, four channels and 32 slots. The order of all sums is fixed:
// `ops/compress.py` has the same, and gets the same bits. keep_tokens runs after it, because an entry may want tokens
// that this step's own push out of the ring; a block of it owns a token.
#include "exact.cuh"
#include "formats.cuh"
#include "memory.cuh"
#include "ptx.cuh"
#include "rotate.cuh"
#include "types.cuh"

namespace lightning_indexer {

constexpr int kQuad = 4;                         // floats that are moved at once
constexpr int kMostRunSlots = 32;                // slots that are added one after another
constexpr float kAbsentGate = -0x1.fffffep127f;  // fp32's lowest number, of tokens before the first: weight 0

// How an entry is shared out: kGroups groups of threads have a run of slots each; a thread of a group kPer channels.
// Threads beyond kLanes, in small entries, repeat what others do.
template <int kDim_, int kRatio_, int kWindows_>
struct Pooling {
  static constexpr int kDim = kDim_, kRatio = kRatio_, kWindows = kWindows_;
  static constexpr int kChannels = kWindows * kDim, kSlots = kWindows * kRatio;
  static constexpr int kRunSlots = kSlots < kMostRunSlots ? kSlots : kMostRunSlots, kGroups = kSlots / kRunSlots;
  static constexpr int kPer = kGroups == 1 ? 1 : kQuad, kLanes = kDim / kPer;
  static constexpr int kGroupThreads = kLanes < kWarpThreads ? kWarpThreads : kLanes;
  static constexpr int kGroupWarps = kGroupThreads / kWarpThreads;
  static constexpr int kThreads = kGroups * kGroupThreads;
  static_assert((kDim & (kDim - 1)) == 0, "the sum of squares halves the channels");
  static_assert(kGroups == 1 || kGroups == 4, "two halves, twice");
  static_assert(kGroupWarps <= kWarpThreads && kThreads <= 1024, "a thread block holds an entry");
};

template <class Pooling>
struct PoolShared {
  Turn turns[Pooling::kDim / 2];
  float most[Pooling::kGroups][Pooling::kDim];
  float sums[2][Pooling::kGroups][Pooling::kDim];  // of weighted values, of weights
  float squares[Pooling::kGroupWarps];
  float entry[Pooling::kDim];
};

template <int kCount>
__device__ __forceinline__ void load_floats(const float* __restrict__ address, float (&x)[kCount]) {
  if constexpr (kCount == 1) {
    x[0] = *address;
  } else {
    load_values<Float32>(reinterpret_cast<const uint8_t*>(address), x);
  }
}

// What an entry is made of, as a thread sees it: kPer channels from `channel` on.
template <class Pooling>
struct Slots {
  static constexpr int kPer = Pooling::kPer;
  const float* __restrict__ values;  // of the sequence's tokens in this step
  const float* __restrict__ gates;
  int64_t value_stride, gate_stride;
  const float* __restrict__ ape;
  const float* __restrict__ ring;  // of the sequence
  int64_t start;                   // position of the step's first token
  int64_t first;                   // position of slot 0; negative where the window before does not exist
  int channel;

  __device__ __forceinline__ int channel_in(int slot) const {
    return slot / Pooling::kRatio * Pooling::kDim * (Pooling::kWindows - 1) + channel;
  }
  // Without branches, so that all loads are under way at once; before the first token, some row of the ring is read.
  __device__ __forceinline__ const float* old(int64_t position) const {
    return ring + (position & (Pooling::kSlots - 1)) * (2 * Pooling::kChannels);
  }
  __device__ __forceinline__ void value(int slot, float (&x)[kPer]) const {
    const int64_t position = first + slot, ahead = position - start;
    load_floats((ahead >= 0 ? values + ahead * value_stride : old(position)) + channel_in(slot), x);
#pragma unroll
    for (int i = 0; i < kPer; ++i) x[i] = position >= 0 ? x[i] : 0.0f;
  }
  __device__ __forceinline__ void gate(int slot, float (&x)[kPer]) const {
    const int64_t position = first + slot, ahead = position - start;
    const float* token = ahead >= 0 ? gates + ahead * gate_stride : old(position) + Pooling::kChannels;
    float bias[kPer];
    load_floats(token + channel_in(slot), x);
    load_floats(ape + slot % Pooling::kRatio * Pooling::kChannels + channel_in(slot), bias);
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      const float gate = ahead >= 0 ? x[i] + bias[i] : x[i];  // the ring has it in
      x[i] = position >= 0 ? gate : kAbsentGate;
    }
  }
};

template <class Pooling>
__device__ __forceinline__ void largest_gates(const Slots<Pooling>& slots, int group, float (&most)[Pooling::kPer]) {
#pragma unroll
  for (int i = 0; i < Pooling::kPer; ++i) most[i] = kAbsentGate;
#pragma unroll 8
  for (int slot = 0; slot < Pooling::kRunSlots; ++slot) {
    float gate[Pooling::kPer];
    slots.gate(group * Pooling::kRunSlots + slot, gate);
#pragma unroll
    for (int i = 0; i < Pooling::kPer; ++i) most[i] = max_or_nan(most[i], gate[i]);
  }
}

// The weights exp(gate - most) of a group's slots, and these times the values, each added up in order.
template <class Pooling>
__device__ __forceinline__ void add_slots(
    const Slots<Pooling>& slots,
    int group,
    const float (&most)[Pooling::kPer],
    float (&products)[Pooling::kPer],
    float (&weights)[Pooling::kPer]) {
  constexpr int kUnrolled = Pooling::kGroups == 1 ? Pooling::kRunSlots : 2;
#pragma unroll kUnrolled
  for (int slot = 0; slot < Pooling::kRunSlots; ++slot) {
    float gate[Pooling::kPer], value[Pooling::kPer];
    slots.gate(group * Pooling::kRunSlots + slot, gate);
    slots.value(group * Pooling::kRunSlots + slot, value);
#pragma unroll
    for (int i = 0; i < Pooling::kPer; ++i) {
      const float weight = exponential(gate[i] - most[i]), product = weight * value[i];
      weights[i] = slot == 0 ? weight : weights[i] + weight;
      products[i] = slot == 0 ? product : products[i] + product;
    }
  }
}

// One number of each group, added by halves.
template <class Pooling>
__device__ __forceinline__ float add_groups(const float (&x)[Pooling::kGroups][Pooling::kDim], int channel) {
  if constexpr (Pooling::kGroups == 1) return x[0][channel];
  return (x[0][channel] + x[2][channel]) + (x[1][channel] + x[3][channel]);
}

// The softmax-weighted sum over all slots. All threads of the block call it, and all groups get the same.
template <class Pooling>
__device__ __forceinline__ void pool(
    const Slots<Pooling>& slots, int group, PoolShared<Pooling>& shared, float (&pooled)[Pooling::kPer]) {
  constexpr int kPer = Pooling::kPer;
  float most[kPer], products[kPer], weights[kPer];
  largest_gates(slots, group, most);
  if constexpr (Pooling::kGroups > 1) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) shared.most[group][slots.channel + i] = most[i];
    __syncthreads();
#pragma unroll
    for (int other = 0; other < Pooling::kGroups; ++other) {
#pragma unroll
      for (int i = 0; i < kPer; ++i) most[i] = max_or_nan(most[i], shared.most[other][slots.channel + i]);
    }
  }
  add_slots(slots, group, most, products, weights);
  if constexpr (Pooling::kGroups > 1) {
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      shared.sums[0][group][slots.channel + i] = products[i];
      shared.sums[1][group][slots.channel + i] = weights[i];
    }
    __syncthreads();
#pragma unroll
    for (int i = 0; i < kPer; ++i) {
      products[i] = add_groups<Pooling>(shared.sums[0], slots.channel + i);
      weights[i] = add_groups<Pooling>(shared.sums[1], slots.channel + i);
    }
  }
#pragma unroll
  for (int i = 0; i < kPer; ++i) pooled[i] = products[i] / weights[i];
}

// sqrt(mean(x^2) + eps) of an entry whose channels lie in the first kLanes threads; squares are added neighbours first.
// All threads of the block call it.
template <class Pooling>
__device__ __forceinline__ float root_mean_square(
    const float (&x)[Pooling::kPer], float eps, PoolShared<Pooling>& shared) {
  const int thread = static_cast<int>(threadIdx.x), lane = thread % kWarpThreads;
  float sum = 0.0f;
  if (thread < Pooling::kLanes) {
    sum = x[0] * x[0];
    if constexpr (Pooling::kPer == kQuad) sum = (sum + x[1] * x[1]) + (x[2] * x[2] + x[3] * x[3]);
  }
#pragma unroll
  for (int distance = 1; distance < kWarpThreads; distance *= 2) sum += __shfl_xor_sync(kFullWarp, sum, distance);
  if (lane == 0 && thread < Pooling::kGroupThreads) shared.squares[thread / kWarpThreads] = sum;
  __syncthreads();
  sum = shared.squares[lane % Pooling::kGroupWarps];
#pragma unroll
  for (int distance = 1; distance < Pooling::kGroupWarps; distance *= 2) {
    sum += __shfl_xor_sync(kFullWarp, sum, distance);
  }
  return sqrtf(sum / Pooling::kDim + eps);
}

template <class Row, class Input, class Block, class Pooling, bool kRotate, int kSharedBytes>
__global__ void __launch_bounds__(Pooling::kThreads, 1) compress_entries(
    const float* __restrict__ values,
    int64_t value_stride,
    const float* __restrict__ gates,
    int64_t gate_stride,
    const float* __restrict__ ape,
    const float* __restrict__ ring,
    const void* __restrict__ norm,
    int32_t norm_type,
    float eps,
    const float* __restrict__ frequencies,
    int32_t num_pairs,
    const int64_t* __restrict__ seqs,
    const int64_t* __restrict__ starts,
    const int64_t* __restrict__ offsets,
    const int64_t* __restrict__ entry_rows,
    const int64_t* __restrict__ entry_indices,
    const void* __restrict__ slots,
    int32_t slots_are_int64,
    uint8_t* __restrict__ storage,
    int64_t block_stride,
    int64_t num_slots,
    float global_scale) {
  constexpr int kDim = Pooling::kDim;
  static_assert(Row::kDim == kDim, "the row holds the entry");
  static_assert(Row::kDataBytes == Block::kDataBytes && Row::kScaleBytes == Block::kScaleBytes, "Row and Block agree");
  static_assert(Row::kLanes <= Pooling::kThreads, "the block writes the row at once");
  static_assert(sizeof(PoolShared<Pooling>) == kSharedBytes, "as it is launched");
  extern __shared__ __align__(1024) uint8_t dynamic_shared[];
  PoolShared<Pooling>& shared = *reinterpret_cast<PoolShared<Pooling>*>(dynamic_shared);

  const int64_t slot = Indices{slots, slots_are_int64}[blockIdx.x];
  if (slot < 0 || slot >= num_slots) return;
  const int64_t seq_row = entry_rows[blockIdx.x];
  const int64_t position = entry_indices[blockIdx.x] * Pooling::kRatio;
  const int thread = static_cast<int>(threadIdx.x), group = thread / Pooling::kGroupThreads;
  const int channel = thread % Pooling::kGroupThreads % Pooling::kLanes * Pooling::kPer;
  const int64_t first_token = offsets[seq_row];
  const Slots<Pooling> sources = {
      values + first_token * value_stride,
      gates + first_token * gate_stride,
      value_stride,
      gate_stride,
      ape,
      ring + seqs[seq_row] * (Pooling::kSlots * 2 * Pooling::kChannels),
      starts[seq_row],
      position + Pooling::kRatio - Pooling::kSlots,
      channel,
  };

  float x[Pooling::kPer];
  pool(sources, group, shared, x);
#pragma unroll
  for (int i = 0; i < Pooling::kPer; ++i) x[i] = Input::nearest(x[i]);
  const float root = root_mean_square(x, eps, shared);
  if (thread < Pooling::kLanes) {
    const Floats factors = {norm, norm_type};
#pragma unroll
    for (int i = 0; i < Pooling::kPer; ++i) {
      shared.entry[channel + i] = Input::nearest(x[i] / root * factors[channel + i]);
    }
  }
  fill_turns(shared.turns, position, frequencies, num_pairs, thread, Pooling::kThreads);
  __syncthreads();

  // From here on lanes as the row wants them; those beyond it help out with its shuffles.
  if (thread >= (Row::kLanes + kWarpThreads - 1) / kWarpThreads * kWarpThreads) return;
  constexpr int kValues = Row::kValues;
  const int row_lane = thread % Row::kLanes;
  float y[kValues];
#pragma unroll
  for (int i = 0; i < kValues; ++i) y[i] = shared.entry[row_lane * kValues + i];
  rope<Input, kDim>(y, row_lane * kValues, shared.turns, num_pairs);
  if constexpr (kRotate) hadamard<Input, Row::kLanes>(y, row_lane);
  const Target target = Target::of_slot<Block>(storage, block_stride, slot, thread < Row::kLanes);
  Row::template write<Input>(y, row_lane, target, global_scale);
}

template <class Pooling, int kThreads>
__global__ void __launch_bounds__(kThreads) keep_tokens(
    const float* __restrict__ values,
    int64_t value_stride,
    const float* __restrict__ gates,
    int64_t gate_stride,
    const float* __restrict__ ape,
    float* __restrict__ ring,
    const int64_t* __restrict__ batch_rows,
    const int64_t* __restrict__ seqs,
    const int64_t* __restrict__ starts,
    const int64_t* __restrict__ offsets,
    int32_t num_tokens,
    int32_t num_seqs) {
  constexpr int kChannels = Pooling::kChannels;
  const int64_t token = blockIdx.x, seq_row = batch_rows[token];
  const int64_t end = seq_row + 1 < num_seqs ? offsets[seq_row + 1] : num_tokens;
  if (token < end - Pooling::kSlots) return;  // pushed out again by a later token of this step
  const int64_t position = starts[seq_row] + token - offsets[seq_row];
  float* row = ring + (seqs[seq_row] * Pooling::kSlots + position % Pooling::kSlots) * (2 * kChannels);
  const float* bias = ape + position % Pooling::kRatio * kChannels;
  for (int channel = threadIdx.x * kQuad; channel < kChannels; channel += kThreads * kQuad) {
    float value[kQuad], gate[kQuad], more[kQuad];
    load_floats(values + token * value_stride + channel, value);
    load_floats(gates + token * gate_stride + channel, gate);
    load_floats(bias + channel, more);
#pragma unroll
    for (int i = 0; i < kQuad; ++i) row[channel + i] = value[i], row[kChannels + channel + i] = gate[i] + more[i];
  }
}

}  // namespace lightning_indexer
