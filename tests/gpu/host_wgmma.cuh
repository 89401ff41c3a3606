// Takes the place of kernels/wgmma.cuh on the host. The second operand is read where its descriptor says, through the
// 128-byte swizzle.
#pragma once

#include "ptx.cuh"

namespace lightning_indexer {

inline void wgmma_publish() {}
inline void wgmma_begin() {}
inline void wgmma_finish() {}
inline void wgmma_pin(float*) {}

template <class Element, int kColumns>
struct WgmmaInstruction {
  static void issue(float* d, const uint32_t* a, uint64_t descriptor, int accumulate) {
    uint32_t rows[2][8];
    gather_rows(a, rows);
    const uint32_t base = static_cast<uint32_t>(descriptor & 0x3FFFu) << 4;
    for (int n = 0; n < kColumns / 8; ++n) {
      for (int j = 0; j < 2; ++j) {
        uint32_t column[8];
        for (int word = 0; word < 8; ++word) {
          const uint32_t plain = base + (8 * n + threadIdx.x % 4 * 2 + j) * 128 + 4 * word;
          load_shared<4>(plain ^ (plain >> 7 & 7u) << 4, &column[word]);
        }
        for (int i = 0; i < 2; ++i) {
          float& sum = d[4 * n + 2 * i + j];
          sum = (accumulate ? sum : 0.0f) + dot<Element>(rows[i], column);
        }
      }
    }
  }
};

}  // namespace lightning_indexer
