// append_entries: quantise entries and scatter their rows into the slots of a paged cache, in one pass.
//
//   entries   [num_entries, kDim] fp32, bf16 or fp16; rows `entry_stride` bytes apart, each at a multiple of 16 bytes
//   slots     int32 or int64 [num_entries], block * kEntries + row; any other number skips the entry
//   storage   blocks `block_stride` bytes apart: kEntries data rows, then kEntries scale rows (`Block`)
//
// A thread block owns kEntriesPerCta entries, an entry kLanes consecutive lanes, a lane 16 consecutive values (8 where
// there is nothing to scale). Sixteen, because a lane then holds a whole nvfp4 group and half an mxfp4 group, so a
// group's maximum takes at most three shuffles, and an fp8_ds_mla entry is one warp. Slots and values are loaded side
// by side: neither waits for the other. The arithmetic is ten to twelve instructions a value, against 2.5 bytes of
// traffic (bf16 to FP4): the kernel is meant to be bound by memory.
#include "formats.cuh"
#include "memory.cuh"
#include "types.cuh"

namespace lightning_indexer {

template <class Row, class Input, class Block, int kEntriesPerCta>
__global__ void __launch_bounds__(kEntriesPerCta* Row::kLanes) append_entries(
    const uint8_t* __restrict__ entries,
    int64_t entry_stride,
    int64_t num_entries,
    const void* __restrict__ slots,
    int32_t slots_are_int64,
    uint8_t* __restrict__ storage,
    int64_t block_stride,
    int64_t num_slots,
    float global_scale) {
  constexpr int kLanes = Row::kLanes, kValues = Row::kValues;
  static_assert(Row::kDataBytes == Block::kDataBytes && Row::kScaleBytes == Block::kScaleBytes, "Row and Block agree");
  static_assert(kLanes * kValues == Row::kDim, "lanes cover the entry");
  static_assert(kEntriesPerCta >= 1 && kEntriesPerCta * kLanes <= 1024, "a thread block holds whole entries");
  static_assert(Row::kGroupLanes == 0 || (kWarpThreads % kLanes == 0 && kEntriesPerCta * kLanes % kWarpThreads == 0),
                "shuffles stay inside full warps");

  const int lane = static_cast<int>(threadIdx.x % kLanes);
  const int64_t place = static_cast<int64_t>(blockIdx.x) * kEntriesPerCta + threadIdx.x / kLanes;
  // Lanes without an entry take the last one, but do not write it: shuffles want full warps, and behind a branch slots would
  // be waited for before values are asked for, or the other way round.
  const int64_t entry = min(place, num_entries - 1);

  const int64_t slot = Indices{slots, slots_are_int64}[entry];
  constexpr bool kIsPairs = Row::kTakesPairs && Input::kIsBf16;
  typename Either<kIsPairs, uint32_t, float>::Type x[kIsPairs ? kValues / 2 : kValues];
  const uint8_t* const source = entries + entry * entry_stride + lane * (kValues / Input::kPer16 * 16);
  if constexpr (kIsPairs) {
    load_words(source, x);
  } else {
    load_values<Input>(source, x);
  }

  const bool is_wanted = place == entry && static_cast<uint64_t>(slot) < static_cast<uint64_t>(num_slots);
  const Target target = Target::of_slot<Block>(storage, block_stride, slot, is_wanted);
  if constexpr (kIsPairs) {
    Row::write_pairs(x, lane, target, global_scale);
  } else {
    Row::template write<Input>(x, lane, target, global_scale);
  }
}

}  // namespace lightning_indexer
