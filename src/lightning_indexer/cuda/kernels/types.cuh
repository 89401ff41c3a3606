// Fixed-width integers. NVRTC brings no <cstdint>, and kernels include nothing but the files beside them: the NVRTC
// wheel alone compiles them, and the cache key covers every line that the compiler reads.
#pragma once

namespace lightning_indexer {

using uint8_t = unsigned char;
using int32_t = int;
using uint32_t = unsigned int;
using int64_t = long long;

static_assert(sizeof(uint32_t) == 4 && sizeof(int64_t) == 8, "integer widths");

constexpr int kWarpThreads = 32;
constexpr uint32_t kFullWarp = 0xFFFFFFFFu;

}  // namespace lightning_indexer
