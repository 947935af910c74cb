// SPDX-License-Identifier: Apache-2.0
// Instructions without a CUDA C++ function: the products of tensor cores, and the copies and barriers that feed them
// (PTX ISA, "Warp Level Matrix Multiply-Accumulate" and "Asynchronous Warpgroup Level Matrix Multiply-Accumulate").
// Addresses of shared memory are 32-bit numbers here, as these instructions take them. tests/cuda_host has a twin of
// this file, which emulates them.
#pragma once

#include <cuda_bf16.h>
#include <cuda_fp16.h>

#include <cstdint>

namespace mmdcn {

__device__ __forceinline__ uint32_t shared_address(const void* pointer) {
  return static_cast<uint32_t>(__cvta_generic_to_shared(pointer));
}

__device__ __forceinline__ uint4 load_global(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.nc.v4.u32 {%0, %1, %2, %3}, [%4];"
               : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w)
               : "l"(pointer));
  return v;
}

// The same for a load that must not come later: ptxas moves loads of read-only data across __syncwarp and all waits.
__device__ __forceinline__ uint4 load_global_in_order(const void* pointer) {
  uint4 v;
  asm volatile("ld.global.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "l"(pointer));
  return v;
}

__device__ __forceinline__ uint4 load_shared(uint32_t address) {
  uint4 v;
  asm volatile("ld.shared.v4.u32 {%0, %1, %2, %3}, [%4];" : "=r"(v.x), "=r"(v.y), "=r"(v.z), "=r"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ float4 load_shared_float4(uint32_t address) {
  float4 v;
  asm volatile("ld.shared.v4.f32 {%0, %1, %2, %3}, [%4];" : "=f"(v.x), "=f"(v.y), "=f"(v.z), "=f"(v.w) : "r"(address));
  return v;
}

__device__ __forceinline__ int32_t load_shared_int(uint32_t address) {
  int32_t v;
  asm volatile("ld.shared.s32 %0, [%1];" : "=r"(v) : "r"(address));
  return v;
}

__device__ __forceinline__ void store_shared(uint32_t address, uint4 v) {
  asm volatile("st.shared.v4.u32 [%0], {%1, %2, %3, %4};" ::"r"(address), "r"(v.x), "r"(v.y), "r"(v.z), "r"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, float4 v) {
  asm volatile("st.shared.v4.f32 [%0], {%1, %2, %3, %4};" ::"r"(address), "f"(v.x), "f"(v.y), "f"(v.z), "f"(v.w)
               : "memory");
}

__device__ __forceinline__ void store_shared(uint32_t address, uint32_t v) {
  asm volatile("st.shared.u32 [%0], %1;" ::"r"(address), "r"(v) : "memory");
}

// Keeps the compiler from moving the computation of a value across the surrounding instructions.
__device__ __forceinline__ void pin(uint32_t& value) { asm volatile("" : "+r"(value)::"memory"); }

// Four bytes of word (0 to 3) and of zero (4 to 7), one for each hexadecimal digit of `order`, the last digit first.
__device__ __forceinline__ uint32_t select_bytes(uint32_t word, uint32_t order) {
  uint32_t selected;  // __byte_perm would mask the order
  asm("prmt.b32 %0, %1, 0, %2;" : "=r"(selected) : "r"(word), "r"(order));
  return selected;
}

// Packs two values of a half type into a word, the first in the low half.
template <typename scalar_t>
struct Pair;

template <>
struct Pair<__nv_bfloat16> {
  __device__ __forceinline__ static float low(uint32_t word) { return __uint_as_float(word << 16); }
  __device__ __forceinline__ static float high(uint32_t word) { return __uint_as_float(word & 0xffff0000u); }
  __device__ __forceinline__ static uint32_t of(float low, float high) {
    uint32_t word;
    asm("cvt.rn.bf16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  // sum[16, 8] += a[16, 16] x b[16, 8]
  __device__ __forceinline__ static void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // sum[16, 8] += a[16, 8] x b[8, 8]
  __device__ __forceinline__ static void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.bf16.bf16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
};

template <>
struct Pair<__half> {
  __device__ __forceinline__ static float low(uint32_t word) {
    return __low2float(*reinterpret_cast<const __half2*>(&word));
  }
  __device__ __forceinline__ static float high(uint32_t word) {
    return __high2float(*reinterpret_cast<const __half2*>(&word));
  }
  __device__ __forceinline__ static uint32_t of(float low, float high) {
    uint32_t word;
    asm("cvt.rn.f16x2.f32 %0, %1, %2;" : "=r"(word) : "f"(high), "f"(low));
    return word;
  }
  __device__ __forceinline__ static void multiply(float (&sum)[4], const uint32_t (&a)[4], uint32_t b0, uint32_t b1) {
    asm volatile(
        "mma.sync.aligned.m16n8k16.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5, %6, %7}, {%8, %9}, "
        "{%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "r"(b0), "r"(b1));
  }
  // sum[16, 8] += a[16, 8] x b[8, 8]
  __device__ __forceinline__ static void multiply(float (&sum)[4], uint32_t a0, uint32_t a1, uint32_t b) {
    asm("mma.sync.aligned.m16n8k8.row.col.f32.f16.f16.f32 {%0, %1, %2, %3}, {%4, %5}, {%6}, {%0, %1, %2, %3};"
        : "+f"(sum[0]), "+f"(sum[1]), "+f"(sum[2]), "+f"(sum[3])
        : "r"(a0), "r"(a1), "r"(b));
  }
};

// Loads four matrices of 8 rows of 16 bytes; each lane passes the address of one row.
__device__ __forceinline__ void load_matrices(uint32_t (&v)[4], uint32_t address) {
  asm volatile("ldmatrix.sync.aligned.m8n8.x4.shared.b16 {%0, %1, %2, %3}, [%4];"
               : "=r"(v[0]), "=r"(v[1]), "=r"(v[2]), "=r"(v[3])
               : "r"(address)
               : "memory");
}

template <int kBytes>
__device__ __forceinline__ void copy_async(uint32_t target, const void* source) {
  if constexpr (kBytes == 16) {  // the only size that can bypass the L1 cache
    asm volatile("cp.async.cg.shared.global [%0], [%1], 16;" ::"r"(target), "l"(source) : "memory");
  } else {
    asm volatile("cp.async.ca.shared.global [%0], [%1], %2;" ::"r"(target), "l"(source), "n"(kBytes) : "memory");
  }
}
__device__ __forceinline__ void commit_copies() { asm volatile("cp.async.commit_group;" ::: "memory"); }

// Waits for all but the last kCount groups of copies.
template <int kCount>
__device__ __forceinline__ void wait_for_copies() {
  asm volatile("cp.async.wait_group %0;" ::"n"(kCount) : "memory");
}

// ---- Compute capability 9.0 and later

__device__ __forceinline__ void init_barrier(uint32_t barrier, int32_t arrivals) {
  asm volatile("mbarrier.init.shared::cta.b64 [%0], %1;" ::"r"(barrier), "r"(arrivals) : "memory");
}
__device__ __forceinline__ void fence_barriers() {
  asm volatile("fence.mbarrier_init.release.cluster;" ::: "memory");
  asm volatile("fence.proxy.async.shared::cta;" ::: "memory");
}
__device__ __forceinline__ void arrive(uint32_t barrier) {
  asm volatile("mbarrier.arrive.shared::cta.b64 _, [%0];" ::"r"(barrier) : "memory");
}
__device__ __forceinline__ void arrive_expecting(uint32_t barrier, int32_t bytes) {
  asm volatile("mbarrier.arrive.expect_tx.shared::cta.b64 _, [%0], %1;" ::"r"(barrier), "r"(bytes) : "memory");
}
__device__ __forceinline__ void wait(uint32_t barrier, uint32_t parity) {
  uint32_t done;
  do {
    asm volatile("{.reg .pred p; mbarrier.try_wait.parity.shared::cta.b64 p, [%1], %2; selp.u32 %0, 1, 0, p;}"
                 : "=r"(done)
                 : "r"(barrier), "r"(parity)
                 : "memory");
  } while (!done);
}

// Copies bytes from global to shared memory; they count towards the barrier.
__device__ __forceinline__ void copy_bulk(uint32_t target, const void* source, int32_t bytes, uint32_t barrier) {
  asm volatile("cp.async.bulk.shared::cluster.global.mbarrier::complete_tx::bytes [%0], [%1], %2, [%3];" ::"r"(target),
               "l"(source), "r"(bytes), "r"(barrier)
               : "memory");
}

__device__ __forceinline__ void fence_products() { asm volatile("wgmma.fence.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void commit_products() { asm volatile("wgmma.commit_group.sync.aligned;" ::: "memory"); }
__device__ __forceinline__ void wait_for_products() { asm volatile("wgmma.wait_group.sync.aligned 0;" ::: "memory"); }

// sum[64, kColumns] += a[64, 16] x b[16, kColumns]; a in registers, b by its descriptor.
template <typename scalar_t, int kColumns>
__device__ void multiply(float (&sum)[kColumns / 2], const uint32_t* a, uint64_t b);

#define MMDCN_8_REGISTERS(i)                                                                              \
  "+f"(sum[i]), "+f"(sum[i + 1]), "+f"(sum[i + 2]), "+f"(sum[i + 3]), "+f"(sum[i + 4]), "+f"(sum[i + 5]), \
      "+f"(sum[i + 6]), "+f"(sum[i + 7])
#define MMDCN_32_REGISTERS(i) \
  MMDCN_8_REGISTERS(i), MMDCN_8_REGISTERS(i + 8), MMDCN_8_REGISTERS(i + 16), MMDCN_8_REGISTERS(i + 24)
#define MMDCN_64_REGISTERS(i) MMDCN_32_REGISTERS(i), MMDCN_32_REGISTERS(i + 32)
#define MMDCN_128_REGISTERS(i) MMDCN_64_REGISTERS(i), MMDCN_64_REGISTERS(i + 64)
#define MMDCN_0_TO_31                                                                                              \
  "%0, %1, %2, %3, %4, %5, %6, %7, %8, %9, %10, %11, %12, %13, %14, %15, %16, %17, %18, %19, %20, %21, %22, %23, " \
  "%24, %25, %26, %27, %28, %29, %30, %31"
#define MMDCN_0_TO_63                                                                                 \
  MMDCN_0_TO_31                                                                                       \
  ", %32, %33, %34, %35, %36, %37, %38, %39, %40, %41, %42, %43, %44, %45, %46, %47, %48, %49, %50, " \
  "%51, %52, %53, %54, %55, %56, %57, %58, %59, %60, %61, %62, %63"
#define MMDCN_0_TO_127                                                                                            \
  MMDCN_0_TO_63                                                                                                   \
  ", %64, %65, %66, %67, %68, %69, %70, %71, %72, %73, %74, %75, %76, %77, %78, %79, %80, %81, %82, "             \
  "%83, %84, %85, %86, %87, %88, %89, %90, %91, %92, %93, %94, %95, %96, %97, %98, %99, %100, %101, %102, %103, " \
  "%104, %105, %106, %107, %108, %109, %110, %111, %112, %113, %114, %115, %116, %117, %118, %119, %120, %121, "  \
  "%122, %123, %124, %125, %126, %127"
// The operands after the sums are numbered from half of `columns` on.
#define MMDCN_MULTIPLY(scalar_t, type, columns, registers, sums, a0, a1, a2, a3, b)                                \
  template <>                                                                                                      \
  __device__ __forceinline__ void multiply<scalar_t, columns>(float (&sum)[columns / 2], const uint32_t* a,        \
                                                              uint64_t descriptor) {                               \
    asm volatile("wgmma.mma_async.sync.aligned.m64n" #columns "k16.f32." type "." type " {" sums "}, {" a0 ", " a1 \
                 ", " a2 ", " a3 "}, " b ", 1, 1, 1, 0;"                                                           \
                 : registers(0)                                                                                    \
                 : "r"(a[0]), "r"(a[1]), "r"(a[2]), "r"(a[3]), "l"(descriptor));                                   \
  }
MMDCN_MULTIPLY(__nv_bfloat16, "bf16", 64, MMDCN_32_REGISTERS, MMDCN_0_TO_31, "%32", "%33", "%34", "%35", "%36")
MMDCN_MULTIPLY(__half, "f16", 64, MMDCN_32_REGISTERS, MMDCN_0_TO_31, "%32", "%33", "%34", "%35", "%36")
MMDCN_MULTIPLY(__nv_bfloat16, "bf16", 128, MMDCN_64_REGISTERS, MMDCN_0_TO_63, "%64", "%65", "%66", "%67", "%68")
MMDCN_MULTIPLY(__half, "f16", 128, MMDCN_64_REGISTERS, MMDCN_0_TO_63, "%64", "%65", "%66", "%67", "%68")
MMDCN_MULTIPLY(__nv_bfloat16, "bf16", 256, MMDCN_128_REGISTERS, MMDCN_0_TO_127, "%128", "%129", "%130", "%131", "%132")
MMDCN_MULTIPLY(__half, "f16", 256, MMDCN_128_REGISTERS, MMDCN_0_TO_127, "%128", "%129", "%130", "%131", "%132")

}  // namespace mmdcn
