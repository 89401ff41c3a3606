// Index keys of each format as the A operand of a product (mma.cuh).
//
// A key policy has
//     Element, kDim          what the product multiplies, and dims of an entry
//     kPieces, kPieceBytes   the bytes of an entry that lane c of a quad holds, a quarter of them: piece p lies at
//                            (4 * p + c) * kPieceBytes of the data row, so that the pieces of a quad lie side by side
//     kIsMxfp4               whether the entries are mxfp4
//     kScaleWords, scale_word(c)     whether a lane needs a word of the scale row, and which
//     dim_of(c, j)           which dim is element j of lane c, 0 <= j < kDim / 4, in the order of K
//     convert(rows, c, a, factor)    both entries of a lane, as they were read (Raw), as registers of the product
// and the entry's values are elements * factor * kUnit (factor only where kScaled). All are exact but for mxfp4 groups
// far below the largest of their entry, see Mxfp4Exponents.
#pragma once

#include "memory.cuh"
#include "mma.cuh"
#include "numeric.cuh"
#include "ptx.cuh"

namespace lightning_indexer {

// 2^(field - 127) for field in -22 .. 254, subnormal numbers included.
__device__ __forceinline__ float power_of_two_field(int field) {
  return __uint_as_float(field >= 1 ? static_cast<uint32_t>(field) << 23 : 0x00400000u >> -field);
}

// What a lane holds of one entry.
template <int kWords>
struct Raw {
  uint32_t words[kWords];
  uint32_t scale;  // a word of the scale row
};

// --- E2M1 -----------------------------------------------------------------------------------------------------------

// Eight E2M1 codes to two registers of E4M3, in order. The table holds the eight magnitudes as E4M3.
__device__ __forceinline__ void e2m1_to_e4m3(
    uint32_t codes, uint32_t table_low, uint32_t table_high, uint32_t& first, uint32_t& second) {
  const uint32_t magnitudes = codes & 0x77777777u, odd = codes << 4;
  const uint32_t signs_first = permute(odd, codes, 0x5140), signs_second = permute(odd, codes, 0x7362);
  first = (signs_first & 0x80808080u) | permute(table_low, table_high, magnitudes);
  second = (signs_second & 0x80808080u) | permute(table_low, table_high, magnitudes >> 16);
}

// Eight E2M1 codes to four registers of bf16: register i holds codes i and i + 4. The fields of a code, moved to where
// bf16 has them, read as the value times 2^-126; `scale` (both halves) makes up for it.
__device__ __forceinline__ void e2m1_to_bf16(uint32_t codes, uint32_t scale, uint32_t (&out)[4]) {
  constexpr uint32_t kFields = 0x01C001C0u, kSign = 0x80008000u;
  out[0] = multiply_bf16x2(((codes << 6) & kFields) | ((codes << 12) & kSign), scale);
  out[1] = multiply_bf16x2(((codes << 2) & kFields) | ((codes << 8) & kSign), scale);
  out[2] = multiply_bf16x2(((codes >> 2) & kFields) | ((codes << 4) & kSign), scale);
  out[3] = multiply_bf16x2(((codes >> 6) & kFields) | (codes & kSign), scale);
}

// The order of elements that `e2m1_to_bf16` gives: word of eight codes, register, half.
__device__ __forceinline__ constexpr int paired_order(int j) { return j / 8 * 8 + j % 8 / 2 + j % 2 * 4; }

// Words of codes to the registers of entry i; scale_of(word) is the scale of a word's codes.
template <int kSteps, int kWords, class ScaleOf>
__device__ __forceinline__ void convert_e2m1(
    const uint32_t (&words)[kWords], const ScaleOf& scale_of, int i, uint32_t (&a)[kSteps][4]) {
  static_assert(kSteps == 2 * kWords, "a word is two steps");
#pragma unroll
  for (int w = 0; w < kWords; ++w) {
    uint32_t out[4];
    e2m1_to_bf16(words[w], scale_of(w), out);
    a[2 * w][i] = out[0], a[2 * w][2 + i] = out[1];
    a[2 * w + 1][i] = out[2], a[2 * w + 1][2 + i] = out[3];
  }
}

// --- mxfp4 ----------------------------------------------------------------------------------------------------------

constexpr int kExactBinades = 11;  // below an entry's largest group that E4M3 holds all E2M1 values as normal numbers

// What both mxfp4 policies share. The elements of an entry are its codes times 2^(kShift + relative): how far a group's
// scale lies below the entry's largest one, which goes into the factor.
template <int kDim_, int kShift>
struct Mxfp4 {
  static constexpr int kDim = kDim_;
  static constexpr int kWords = kDim / 32;
  static constexpr int kPieces = 1, kPieceBytes = 4 * kWords, kScaleWords = 1;
  static constexpr bool kScaled = true, kIsMxfp4 = true;
  static constexpr float kUnit = 1.0f;
  using Row = Raw<kWords>;

  __device__ static __forceinline__ constexpr int scale_word(int) { return 0; }

  // Returns whether some lane of the warp has a relative exponent outside -kExactBinades .. 0.
  __device__ static __forceinline__ bool exponents(
      const Row (&rows)[2], int c, int (&relative)[2], float (&factor)[2]) {
    // Both entries in the halves of a word.
    const uint32_t byte = c * (kDim / 4) / 32;  // of the lane's scale group
    const uint32_t scales = permute(rows[0].scale, rows[1].scale, byte * 0x0101u + 0x0400u) & 0x00FF00FFu;
    uint32_t tops = max_u16x2(scales, __shfl_xor_sync(kFullWarp, scales, 1));
    tops = max_u16x2(tops, __shfl_xor_sync(kFullWarp, tops, 2));
    const uint32_t below = tops - scales;
    const auto both = [](uint32_t x) { return x << 16 | x; };
    // Bit 15 of a half: too far below; no normal number, or NaN. A borrow from the lower half is one of these as well.
    const uint32_t rare = ((below + both(0x7FFFu - kExactBinades)) | (tops - both(kShift + 1)) | (tops + both(0x7F01u)));
    relative[0] = -static_cast<int>(below & 0xFFFFu), relative[1] = -static_cast<int>(below >> 16);
    factor[0] = __uint_as_float((tops - kShift) << 23);  // the upper half goes
    factor[1] = __uint_as_float(((tops >> 16) - kShift) << 23);
    if (!__any_sync(kFullWarp, rare & both(0x8000u))) return false;
    bool is_rare[2];
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t top = tops >> (16 * i) & 0xFFFFu;
      is_rare[i] = relative[i] < -kExactBinades || top - kShift - 1 >= 254u - kShift;
    }
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t lanes = __ballot_sync(kFullWarp, is_rare[i]);
      const bool is_mine = lanes >> (threadIdx.x % kWarpThreads & ~3u) & 15u;  // of this lane's entry
      settle(rows[i].words, scales >> (16 * i) & 0xFFFFu, is_mine, relative[i], factor[i]);
    }
    return true;
  }

 private:
  // Exponents for an entry whose largest scale byte says little: a group of zeros may have any. What counts is the
  // largest value that is there.
  __device__ static __forceinline__ void settle(
      const uint32_t (&words)[kWords], uint32_t scale_byte, bool is_mine, int& relative, float& factor) {
    constexpr int kNone = -1000, kNan = 1000;
    uint32_t any[4] = {0, 0, 0, 0};  // codes of 0.5, of 1 and 1.5, of 2 and 3, of 4 and 6
#pragma unroll
    for (int w = 0; w < kWords; ++w) {
      any[0] |= words[w] & 0x11111111u;
      any[1] |= words[w] & 0x22222222u;
      any[2] |= words[w] & 0x44444444u;
      any[3] |= words[w] & words[w] << 1 & 0x44444444u;
    }
    const int exponent = any[3] ? 2 : any[2] ? 1 : any[1] ? 0 : any[0] ? -1 : kNone;
    const int scale = static_cast<int>(scale_byte);
    int top = scale_byte == kUE8M0Nan ? kNan : exponent == kNone ? kNone : scale + exponent;
    top = max(top, __shfl_xor_sync(kFullWarp, top, 1));
    top = max(top, __shfl_xor_sync(kFullWarp, top, 2));
    // The scale of a group whose largest value is 4 or 6; in bf16, where elements may be larger, of one with 1 or 1.5, so
    // that no group lies more than a binade above it.
    const int reference = top == kNone ? 127 : kShift ? top - 2 : min(top, 254);
    if (!is_mine) return;
    relative = exponent == kNone ? 0 : scale - reference;
    factor = top == kNan ? __uint_as_float(kNanBits) : power_of_two_field(reference - kShift);
  }
};

// The elements are E4M3, the largest group of an entry up to 6 * 2^6. Groups more than kExactBinades below it turn into
// subnormal numbers and then zeros: what they lose is below the score's error bound.
template <int kDim>
struct Mxfp4AsE4M3 : Mxfp4<kDim, 6> {
  using Element = E4M3;
  using Base = Mxfp4<kDim, 6>;
  using Row = typename Base::Row;
  static constexpr int kSteps = kDim / Element::kStep;

  __device__ static __forceinline__ constexpr int dim_of(int c, int j) { return c * (kDim / 4) + j; }

  __device__ static __forceinline__ void convert(
      const Row (&rows)[2], int c, uint32_t (&a)[kSteps][4], float (&factor)[2]) {
    int relative[2];
    if (!Base::exponents(rows, c, relative, factor)) {
      convert(rows, [&](int i, uint32_t& low, uint32_t& high) { table(relative[i], low, high); }, a);
    } else {
      convert(rows, [&](int i, uint32_t& low, uint32_t& high) { any_table(relative[i], low, high); }, a);
    }
  }

 private:
  template <class Table>
  __device__ static __forceinline__ void convert(const Row (&rows)[2], const Table& table, uint32_t (&a)[kSteps][4]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t low, high;
      table(i, low, high);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) e2m1_to_e4m3(rows[i].words[step], low, high, a[step][i], a[step][2 + i]);
    }
  }

  // The eight magnitudes times 2^(6 + relative) as E4M3: 0, 0.5, 1, 1.5 in `low`, 2, 3, 4, 6 in `high`.
  __device__ static __forceinline__ void table(int relative, uint32_t& low, uint32_t& high) {
    low = 0x3C383000u + static_cast<uint32_t>(6 + relative) * 0x08080800u;
    high = 0x4C484440u + static_cast<uint32_t>(6 + relative) * 0x08080808u;
  }

  // The same for any exponent, nearest even.
  __device__ static __forceinline__ void any_table(int relative, uint32_t& low, uint32_t& high) {
    if (relative >= -kExactBinades) return table(relative, low, high);
    low = high = 0;
    if (relative == -12) low = 0x0C080400u, high = 0x1C181410u;
    if (relative == -13) low = 0x06040200u, high = 0x14100C08u;
    if (relative == -14) low = 0x03020100u, high = 0x0C080604u;
    if (relative == -15) low = 0x02010000u, high = 0x06040302u;
    if (relative == -16) low = 0x01000000u, high = 0x03020201u;
    if (relative == -17) high = 0x02010100u;
    if (relative == -18) high = 0x01000000u;
  }
};

template <int kDim>
struct Mxfp4AsBf16 : Mxfp4<kDim, 0> {
  using Element = BF16;
  using Base = Mxfp4<kDim, 0>;
  using Row = typename Base::Row;
  static constexpr int kSteps = kDim / Element::kStep;

  __device__ static __forceinline__ constexpr int dim_of(int c, int j) { return c * (kDim / 4) + paired_order(j); }

  __device__ static __forceinline__ void convert(
      const Row (&rows)[2], int c, uint32_t (&a)[kSteps][4], float (&factor)[2]) {
    int relative[2];
    Base::exponents(rows, c, relative, factor);
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      const uint32_t scale = static_cast<uint32_t>(max(126 + 127 + relative[i], 0)) * 0x00800080u;
      convert_e2m1<kSteps>(rows[i].words, [scale](int) { return scale; }, i, a);
    }
  }
};

// --- nvfp4 ----------------------------------------------------------------------------------------------------------

// Elements are code * scale * 2^-9: six significant bits at most, exact in bf16.
template <int kDim_>
struct Nvfp4AsBf16 {
  using Element = BF16;
  static constexpr int kDim = kDim_;
  static constexpr int kWords = kDim / 32;
  static constexpr int kSteps = kDim / Element::kStep;
  static constexpr int kPieces = 1, kPieceBytes = 4 * kWords, kScaleWords = 1;
  static constexpr bool kScaled = false, kIsMxfp4 = false;
  static constexpr float kUnit = 512.0f;
  using Row = Raw<kWords>;

  __device__ static __forceinline__ constexpr int dim_of(int c, int j) { return c * (kDim / 4) + paired_order(j); }

  __device__ static __forceinline__ constexpr int scale_word(int c) { return c * (kDim / 64) / 4; }

  __device__ static __forceinline__ void convert(
      const Row (&rows)[2], int c, uint32_t (&a)[kSteps][4], float (&)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      uint32_t scales[kWords / 2];
#pragma unroll
      for (int g = 0; g < kWords / 2; ++g) {
        scales[g] = widen_scale(rows[i].scale >> (8 * (c * (kDim / 64) % 4 + g)));
      }
      convert_e2m1<kSteps>(rows[i].words, [&scales](int word) { return scales[word / 2]; }, i, a);
    }
  }

 private:
  // E4M3 in the low byte, times 2^117, in both halves: what turns the fields of a code into code * scale * 2^-9.
  __device__ static __forceinline__ uint32_t widen_scale(uint32_t byte) {
    const float value = e4m3_fields(byte << 24) * 0x1p120f * 0x1p117f;
    const uint32_t bits = (byte & 0x7Fu) == kE4M3Nan ? kNanBits : __float_as_uint(value);
    return permute(bits, bits, 0x3232);
  }
};

// --- fp8 ------------------------------------------------------------------------------------------------------------

template <int kDim_>
struct Fp8Keys {
  static constexpr int kDim = kDim_;
  static constexpr int kPieces = kDim / 64, kPieceBytes = 16, kScaleWords = 1;
  static constexpr bool kScaled = true, kIsMxfp4 = false;
  static constexpr float kUnit = 1.0f;
  using Row = Raw<4 * kPieces>;

  __device__ static __forceinline__ constexpr int scale_word(int) { return 0; }
};

template <int kDim>
struct Fp8AsE4M3 : Fp8Keys<kDim> {
  using Element = E4M3;
  using Row = typename Fp8Keys<kDim>::Row;
  static constexpr int kSteps = kDim / Element::kStep;

  __device__ static __forceinline__ constexpr int dim_of(int c, int j) { return j / 16 * 64 + c * 16 + j % 16; }

  __device__ static __forceinline__ void convert(
      const Row (&rows)[2], int, uint32_t (&a)[kSteps][4], float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = __uint_as_float(rows[i].scale);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        a[step][i] = rows[i].words[2 * step], a[step][2 + i] = rows[i].words[2 * step + 1];
      }
    }
  }
};

template <int kDim>
struct Fp8AsBf16 : Fp8Keys<kDim> {
  using Element = BF16;
  using Row = typename Fp8Keys<kDim>::Row;
  static constexpr int kSteps = kDim / Element::kStep;

  // Of the four codes in a word: 0 and 2, then 1 and 3.
  __device__ static __forceinline__ constexpr int dim_of(int c, int j) {
    return j / 16 * 64 + c * 16 + j % 16 / 4 * 4 + j % 4 / 2 + j % 2 * 2;
  }

  __device__ static __forceinline__ void convert(
      const Row (&rows)[2], int, uint32_t (&a)[kSteps][4], float (&factor)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
      factor[i] = __uint_as_float(rows[i].scale);
#pragma unroll
      for (int step = 0; step < kSteps; ++step) widen(rows[i].words[step], a[step][i], a[step][2 + i]);
    }
  }

 private:
  // The fields of a code, moved to where bf16 has them, read as the value times 2^-120.
  __device__ static __forceinline__ void widen(uint32_t codes, uint32_t& even, uint32_t& odd) {
    constexpr uint32_t kFields = 0x07F007F0u, kSign = 0x80008000u, kScale = (120u + 127u) * 0x00800080u;
    even = multiply_bf16x2(((codes << 4) & kFields) | ((codes << 8) & kSign), kScale);
    odd = multiply_bf16x2(((codes >> 4) & kFields) | (codes & kSign), kScale);
    const uint32_t is_nan = ((codes & 0x7F7F7F7Fu) + 0x01010101u) & 0x80808080u;
    if (is_nan) {
      even |= ((is_nan << 8) & kSign) / 0x8000u * 0x7FC0u;
      odd |= (is_nan & kSign) / 0x8000u * 0x7FC0u;
    }
  }
};

// --- bf16 -----------------------------------------------------------------------------------------------------------

template <int kDim_>
struct Bf16Keys {
  using Element = BF16;
  static constexpr int kDim = kDim_;
  static constexpr int kPieces = kDim / 32, kPieceBytes = 16, kScaleWords = 0;
  static constexpr int kSteps = kDim / Element::kStep;
  static constexpr bool kScaled = false, kIsMxfp4 = false;
  static constexpr float kUnit = 1.0f;
  using Row = Raw<4 * kPieces>;

  __device__ static __forceinline__ constexpr int dim_of(int c, int j) { return j / 8 * 32 + c * 8 + j % 8; }

  __device__ static __forceinline__ constexpr int scale_word(int) { return 0; }

  __device__ static __forceinline__ void convert(
      const Row (&rows)[2], int, uint32_t (&a)[kSteps][4], float (&)[2]) {
#pragma unroll
    for (int i = 0; i < 2; ++i) {
#pragma unroll
      for (int step = 0; step < kSteps; ++step) {
        a[step][i] = rows[i].words[2 * step], a[step][2 + i] = rows[i].words[2 * step + 1];
      }
    }
  }
};

}  // namespace lightning_indexer
