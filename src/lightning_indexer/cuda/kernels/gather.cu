// gather_kv: dequantise selected KV entries into dense rows.
//
//   storage      blocks `block_stride` bytes apart: kEntries data rows, then kEntries scale rows (`Block`)
//   block_table  int32, logical to physical block of each sequence
//   indices      int32 or int64 [num_tokens, top_k], entry within the sequence; negative gives a row of zeros
//   seq_ids      int32 or int64 [num_tokens], row of block_table; null: query t uses row t
//   out          rows of kOutBytes, at t * out_token_stride + j * out_row_stride bytes
//
// A warp owns kBatch consecutive rows of `out`. Its first kBatch lanes find one row's place each (index -> table ->
// address, a chain of three loads), then all lanes move the rows together, kPieces 16-byte pieces of every row loaded
// before the first is stored. A piece of 8 output values comes from 8 bytes of E4M3 or 16 bytes of bf16, so that every
// store of a warp is 512 consecutive bytes; taking 16 codes at once would halve the loads and leave each store
// half-filled sectors.
//
// What lies outside is clamped as the CPU does: seq_ids and block ids to the range, indices to the last entry.
#include "memory.cuh"
#include "numeric.cuh"
#include "ptx.cuh"
#include "types.cuh"

namespace lightning_indexer {

constexpr int kBatch = 4;   // rows per warp
constexpr int kPieces = 2;  // of one row, per lane, in flight

// --- what 16 bytes of output are made of ----------------------------------------------------------------------------

// Rows stored as they are read: bf16 and fp32.
template <int kBytes>
struct PlainRow {
  static constexpr int kOutBytes = kBytes, kDataBytes = kBytes, kScaleBytes = 0;
  using Piece = uint4;

  __device__ static __forceinline__ Piece load(const uint8_t* data_row, const uint8_t*, int piece) {
    return load_16(data_row + 16 * piece);
  }
  __device__ static __forceinline__ uint4 decode(const Piece& piece, int) { return piece; }
};

// 448 E4M3 (UE8M0 per 64), then 64 bf16.
struct Fp8DsMlaRow {
  static constexpr int kOutBytes = 1024, kDataBytes = 448 + 64 * 2, kScaleBytes = 8;
  static constexpr int kFp8Pieces = 448 / 8;

  struct Piece {
    uint4 raw;            // 8 codes in x and y, or 8 bf16
    uint32_t scale_byte;  // of the codes; decoded later, because loading must not wait
  };

  __device__ static __forceinline__ Piece load(const uint8_t* data_row, const uint8_t* scale_row, int piece) {
    if (piece >= kFp8Pieces) return {load_16(data_row + 448 + 16 * (piece - kFp8Pieces)), 0};
    const uint2 codes = *reinterpret_cast<const uint2*>(data_row + 8 * piece);
    return {make_uint4(codes.x, codes.y, 0, 0), scale_row[piece / 8]};
  }

  __device__ static __forceinline__ uint4 decode(const Piece& contents, int piece) {
    if (piece >= kFp8Pieces) return contents.raw;
    const float scale = ue8m0_value(contents.scale_byte);
    const uint2 low = decode_word(contents.raw.x, scale), high = decode_word(contents.raw.y, scale);
    return make_uint4(low.x, low.y, high.x, high.y);
  }

  // Four codes to four bf16. The first factor is exact; the second rounds only where bf16 itself has no such number.
  __device__ static __forceinline__ uint2 decode_word(uint32_t codes, float scale) {
    float value[4];
#pragma unroll
    for (int i = 0; i < 4; ++i) value[i] = e4m3_fields(codes << (24 - 8 * i)) * 0x1p120f * scale;
    const uint32_t is_nan = ((codes & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u;
    if (is_nan) {
#pragma unroll
      for (int i = 0; i < 4; ++i) {
        if (is_nan >> (8 * i) & 0x80u) value[i] = __uint_as_float(kNanBits);
      }
    }
    return make_uint2(pack_bf16(value[0], value[1]), pack_bf16(value[2], value[3]));
  }
};

// --- the kernel -----------------------------------------------------------------------------------------------------

// Physical place of one entry; block -1 for a row of zeros.
struct Place {
  int32_t block;
  int32_t row;
};

template <int kEntries>
__device__ __forceinline__ Place find_entry(
    int64_t index, int64_t seq_id, const int32_t* __restrict__ block_table, int64_t table_row_stride,
    int64_t table_column_stride, int64_t num_seqs, int64_t max_entries, int32_t num_blocks) {
  index = index < max_entries ? index : max_entries - 1;
  if (index < 0) return {-1, 0};
  seq_id = seq_id < 0 ? 0 : seq_id < num_seqs ? seq_id : num_seqs - 1;
  const int32_t block = block_table[seq_id * table_row_stride + index / kEntries * table_column_stride];
  return {clamped_block(block, num_blocks), static_cast<int32_t>(index % kEntries)};
}

template <class Row, class Block, int kWarps>
__global__ void __launch_bounds__(kWarps* kWarpThreads) gather_kv(
    const uint8_t* __restrict__ storage,
    int64_t block_stride,
    int32_t num_blocks,
    const int32_t* __restrict__ block_table,
    int64_t table_row_stride,
    int64_t table_column_stride,
    int64_t num_seqs,
    int64_t max_entries,
    const void* __restrict__ seq_ids,
    int32_t seq_ids_are_int64,
    const void* __restrict__ indices,
    int32_t indices_are_int64,
    uint8_t* __restrict__ out,
    int64_t out_token_stride,
    int64_t out_row_stride,
    int32_t num_tokens,
    int32_t top_k) {
  constexpr int kRowPieces = Row::kOutBytes / 16;
  constexpr int kStep = kPieces * kWarpThreads;  // pieces of a row that a warp has in flight
  constexpr bool kWholeSteps = kRowPieces % kStep == 0;
  static_assert(Row::kDataBytes == Block::kDataBytes && Row::kScaleBytes == Block::kScaleBytes, "Row and Block agree");
  static_assert(Row::kOutBytes % 16 == 0, "rows of `out` are whole pieces");
  static_assert(kBatch <= kWarpThreads, "one lane finds one row's place");

  const int lane = static_cast<int>(threadIdx.x) % kWarpThreads;
  const uint32_t num_rows = static_cast<uint32_t>(num_tokens) * static_cast<uint32_t>(top_k);  // below 2^31
  const uint32_t first = (blockIdx.x * kWarps + threadIdx.x / kWarpThreads) * kBatch;

  Place place = {-1, 0};
  int64_t out_offset = 0;
  if (lane < kBatch && first + lane < num_rows) {
    const uint32_t t = (first + lane) / static_cast<uint32_t>(top_k);
    const uint32_t j = (first + lane) % static_cast<uint32_t>(top_k);
    const int64_t seq_id = seq_ids ? Indices{seq_ids, seq_ids_are_int64}[t] : t;
    place = find_entry<Block::kEntries>(Indices{indices, indices_are_int64}[first + lane], seq_id, block_table,
                                        table_row_stride, table_column_stride, num_seqs, max_entries, num_blocks);
    out_offset = t * out_token_stride + j * out_row_stride;
  }

#pragma unroll 1
  for (int start = 0; start < kRowPieces; start += kStep) {  // once for rows of 1024 bytes
    typename Row::Piece pieces[kBatch][kPieces];
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const int32_t block = __shfl_sync(kFullWarp, place.block, i), row = __shfl_sync(kFullWarp, place.row, i);
      if (block < 0) continue;
      const uint8_t* base = storage + block * block_stride;
      const uint8_t* data_row = base + row * Block::kDataBytes;
      const uint8_t* scale_row = base + Block::kScaleOffset + row * Block::kScaleBytes;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int piece = start + p * kWarpThreads + lane;
        if (kWholeSteps || piece < kRowPieces) pieces[i][p] = Row::load(data_row, scale_row, piece);
      }
    }
#pragma unroll
    for (int i = 0; i < kBatch; ++i) {
      const bool is_zero = __shfl_sync(kFullWarp, place.block, i) < 0;
      uint8_t* out_row = out + __shfl_sync(kFullWarp, out_offset, i);
      if (first + i >= num_rows) continue;
#pragma unroll
      for (int p = 0; p < kPieces; ++p) {
        const int piece = start + p * kWarpThreads + lane;
        const uint4 values = is_zero ? make_uint4(0, 0, 0, 0) : Row::decode(pieces[i][p], piece);
        if (kWholeSteps || piece < kRowPieces) store_16(out_row + 16 * piece, values);
      }
    }
  }
}

}  // namespace lightning_indexer
