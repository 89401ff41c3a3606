// Instructions that CUDA C++ has no operator for; those of wgmma are in wgmma.cuh. The kernels are plain C++ otherwise,
// which a host compiler can run too; the tests do that with other versions of these two files.
#pragma once

#include "types.cuh"

namespace lightning_indexer {

// The larger of two numbers, NaN if either is NaN (fmaxf drops it).
__device__ __forceinline__ float max_or_nan(float a, float b) {
  float result;
  asm("max.NaN.f32 %0, %1, %2;" : "=f"(result) : "f"(a), "f"(b));
  return result;
}

// Two fp32 rounded to bf16, nearest even; `low` takes the low half. NaN becomes 0x7FFF.
__device__ __forceinline__ uint32_t pack_bf16(float low, float high) {
  uint32_t result;
  asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(result) : "f"(high), "f"(low));
  return result;
}

// a * b + c in bf16, both halves, rounded once; subnormal numbers included.
__device__ __forceinline__ uint32_t fma_bf16x2(uint32_t a, uint32_t b, uint32_t c) {
  uint32_t result;
  asm("fma.rn.bf16x2 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(c));
  return result;
}

__device__ __forceinline__ uint32_t multiply_bf16x2(uint32_t a, uint32_t b) {
  return fma_bf16x2(a, b, 0x80008000u);  // + -0 keeps signs of zero
}

// The magnitude of each half; a NaN stays one. A mask would take the integer units, this takes those of floating point.
__device__ __forceinline__ uint32_t abs_bf16x2(uint32_t x) {
  uint32_t result;
  asm("abs.bf16x2 %0, %1;" : "=r"(result) : "r"(x));
  return result;
}

// The larger and the smaller of each half; NaN if either is NaN, where the name says so.
__device__ __forceinline__ uint32_t max_or_nan_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("max.NaN.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

__device__ __forceinline__ uint32_t min_bf16x2(uint32_t a, uint32_t b) {
  uint32_t result;
  asm("min.bf16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
}

// 1 / x to one unit in the last place, x and the result normal.
__device__ __forceinline__ float approximate_reciprocal(float x) {
  float result;
  asm("rcp.approx.ftz.f32 %0, %1;" : "=f"(result) : "f"(x));
  return result;
}

// Four bytes of a (0 to 3) and b (4 to 7), one for each of the low four nibbles of `selector`.
__device__ __forceinline__ uint32_t permute(uint32_t a, uint32_t b, uint32_t selector) {
  uint32_t result;
  asm("prmt.b32 %0, %1, %2, %3;" : "=r"(result) : "r"(a), "r"(b), "r"(selector));
  return result;
}

__device__ __forceinline__ uint32_t max_u16x2(uint32_t a, uint32_t b) {
#if __CUDA_ARCH__ >= 900
  uint32_t result;
  asm("max.u16x2 %0, %1, %2;" : "=r"(result) : "r"(a), "r"(b));
  return result;
#else
  return max(a & 0xFFFFu, b & 0xFFFFu) | max(a >> 16, b >> 16) << 16;
#endif
}

// Two fp32 rounded to E4M3, nearest even and saturating; `low` takes the low byte. (sm_89 and newer)
__device__ __forceinline__ uint32_t pack_e4m3x2(float low, float high) {
  uint16_t result;
  asm("cvt.rn.satfinite.e4m3x2.f32 %0, %1, %2;" : "=h"(result) : "f"(high), "f"(low));
  return result;
}

// --- threads --------------------------------------------------------------------------------------------------------

// threadIdx.x, blockIdx.x and gridDim.x, read anew: what is made of them once, for places that are seldom reached, holds
// registers that the compiler then spills.
__device__ __forceinline__ uint32_t this_thread() {
  uint32_t thread;
  asm volatile("mov.u32 %0, %tid.x;" : "=r"(thread));
  return thread;
}

__device__ __forceinline__ int this_block() {
  int block;
  asm volatile("mov.u32 %0, %ctaid.x;" : "=r"(block));
  return block;
}

__device__ __forceinline__ int all_blocks() {
  int blocks;
  asm volatile("mov.u32 %0, %nctaid.x;" : "=r"(blocks));
  return blocks;
}

// Named barriers: kThreads threads meet at `barrier`; whole warps.
template <int kThreads>
__device__ __forceinline__ void barrier_sync(int barrier) {
  asm volatile("barrier.sync.aligned %0, %1;" ::"r"(barrier), "n"(kThreads) : "memory");
}

template <int kThreads>
__device__ __forceinline__ bool barrier_any(int barrier, bool mine) {
  int result;
  asm volatile(
      "{.reg .pred p, q; setp.ne.b32 p, %1, 0; barrier.red.or.pred q, %2, %3, p; selp.b32 %0, 1, 0, q;}"
      : "=r"(result)
      : "r"(static_cast<int>(mine)), "r"(barrier), "n"(kThreads)
      : "memory");
  return result;
}

template <int kThreads>
__device__ __forceinline__ bool barrier_all(int barrier, bool mine) {
  return !barrier_any<kThreads>(barrier, !mine);
}

// Registers of the threads of a warpgroup. (Hopper)
template <int kRegisters>
__device__ __forceinline__ void release_registers() {
  asm volatile("setmaxnreg.dec.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

template <int kRegisters>
__device__ __forceinline__ void acquire_registers() {
  asm volatile("setmaxnreg.inc.sync.aligned.u32 %0;" ::"n"(kRegisters));
}

// --- kernels that follow one another (Hopper and newer; elsewhere one starts when the other has ended) ------------------

// The kernel behind this one may be started: its blocks take up room as this one's leave it.
__device__ __forceinline__ void let_next_kernel_start() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.launch_dependents;" ::: "memory");
#endif
}

// Until the kernel before this one has ended, and what it wrote can be read.
__device__ __forceinline__ void wait_for_last_kernel() {
#if __CUDA_ARCH__ >= 900
  asm volatile("griddepcontrol.wait;" ::: "memory");
#endif
}

// Bring the line of an address nearer, if there is one.
__device__ __forceinline__ void prefetch_line(const uint8_t* address) {
  asm volatile("prefetch.global.L2 [%0];" ::"l"(address));
}

// Let others run for a while, some nanoseconds at the most.
__device__ __forceinline__ void pause(uint32_t nanoseconds) {
  asm volatile("nanosleep.u32 %0;" ::"r"(nanoseconds));
}

// Have a value computed here, not where it is first used.
__device__ __forceinline__ void have_now(int64_t& value) { asm volatile("" : "+l"(value)); }

// Between two looks at what another warp will write. (Nothing; the tests' host lets that warp run.)
__device__ __forceinline__ void spin() {}

// --- shared memory by address ---------------------------------------------------------------------------------------

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

template <int kBytes>
__device__ __forceinline__ void load_shared(uint32_t address, uint32_t* words) {
  static_assert(kBytes == 4 || kBytes == 8 || kBytes == 16, "what one instruction loads");
  if constexpr (kBytes == 16) {
    asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];"
                 : "=r"(words[0]), "=r"(words[1]), "=r"(words[2]), "=r"(words[3])
                 : "r"(address));
  } else if constexpr (kBytes == 8) {
    asm volatile("ld.shared.v2.u32 {%0, %1}, [%2];" : "=r"(words[0]), "=r"(words[1]) : "r"(address));
  } else {
    asm volatile("ld.shared.u32 %0, [%1];" : "=r"(words[0]) : "r"(address));
  }
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t word) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(word) : "memory");
}

// Copies that a thread starts, commits in groups and waits for itself.
template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t target, const uint8_t* source) {
  if constexpr (kBytes == 16) {
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(source), "n"(kBytes) : "memory");
  }
}

__device__ __forceinline__ void copy_commit() { asm volatile("cp.async.commit_group;" ::: "memory"); }

template <int kGroups>
__device__ __forceinline__ void copy_wait() {  // until no more than kGroups groups are under way
  asm volatile("cp.async.wait_group %0;" ::"n"(kGroups) : "memory");
}

// Barriers in shared memory that count arrivals and bytes, and copies that report to them. (Hopper)
__device__ __forceinline__ void mbarrier_init(uint32_t barrier, uint32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}

__device__ __forceinline__ void mbarrier_publish() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
}

__device__ __forceinline__ void mbarrier_arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}

__device__ __forceinline__ void mbarrier_expect(uint32_t barrier, uint32_t bytes) {  // arrives, and expects bytes
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}

// Until the phase of this parity is complete.
__device__ __forceinline__ void mbarrier_wait(uint32_t barrier, uint32_t parity) {
  constexpr uint32_t kNanoseconds = 10'000'000;  // that it may sleep before it looks again: looking takes issue slots
  asm volatile(
      "{.reg .pred done;\n"
      "wait: mbarrier.try_wait.parity.shared::cta.b64 done, [%0], %1, %2;\n"
      "@!done bra wait;}\n" ::"r"(barrier), "r"(parity), "n"(kNanoseconds) : "memory");
}

__device__ __forceinline__ void copy_bulk(uint32_t target, const uint8_t* source, uint32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier) : "memory");
}

// --- mma.sync: a warp's product of sixteen rows and eight columns, added to d -----------------------------------------

__device__ __forceinline__ void mma_sync(E4M3, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k32.row.col.f32.e4m3.e4m3.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

__device__ __forceinline__ void mma_sync(BF16, float (&d)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
  asm volatile(
      "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0,%1,%2,%3}, {%4,%5,%6,%7}, {%8,%9}, {%0,%1,%2,%3};"
      : "+f"(d[0]), "+f"(d[1]), "+f"(d[2]), "+f"(d[3])
      : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
}

}  // namespace lightning_indexer
