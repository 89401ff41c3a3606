// append_entries: quantise entries and scatter their rows into the slots of a paged cache, in one pass.
//
//   entries   [num_entries, kDim] fp32, bf16 or fp16; rows `entry_stride` bytes apart, each at a multiple of 16 bytes
//   slots     int32 or int64 [num_entries], block * kEntries + row; any other number skips the entry
//   storage   blocks `block_stride` bytes apart: kEntries data rows, then kEntries scale rows (`Block`)
//
// A thread block owns kEntriesPerCta entries, an entry kLanes consecutive lanes, a lane 16 consecutive values (8 where
// there is nothing to scale). Sixteen, because a lane then holds a whole nvfp4 group and half an mxfp4 group, so a
// group's maximum takes at most three shuffles, and an fp8_ds_mla entry is one warp. Slots and values are loaded side
// by side: neither waits for the other. The arithmetic is about ten integer instructions a value, against 2.5 bytes of
// traffic (bf16 to mxfp4): the kernel is meant to be bound by memory.
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

  const int lane = static_cast<int>(threadIdx.x) % kLanes;
  const int64_t entry = static_cast<int64_t>(blockIdx.x) * kEntriesPerCta + static_cast<int>(threadIdx.x) / kLanes;
  const bool exists = entry < num_entries;  // lanes without an entry stay: the shuffles want full warps

  const int64_t slot = exists ? Indices{slots, slots_are_int64}[entry] : -1;
  constexpr bool kIsPairs = Row::kTakesPairs && Input::kIsBf16;
  typename Either<kIsPairs, uint32_t, float>::Type x[kIsPairs ? kValues / 2 : kValues] = {};
  if (exists) {
    const uint8_t* const source = entries + entry * entry_stride + lane * (kValues / Input::kPer16 * 16);
    if constexpr (kIsPairs) {
      load_words(source, x);
    } else {
      load_values<Input>(source, x);
    }
  }

  Target target = {};
  if (slot >= 0 && slot < num_slots) {
    uint8_t* block = storage + slot / Block::kEntries * block_stride;
    const int row = static_cast<int>(slot % Block::kEntries);
    target.data_row = block + row * Block::kDataBytes;
    target.scale_row = block + Block::kScaleOffset + row * Block::kScaleBytes;
  }
  if constexpr (kIsPairs) {
    Row::write_pairs(x, lane, target, global_scale);
  } else {
    Row::template write<Input>(x, lane, target, global_scale);
  }
}

}  // namespace lightning_indexer
