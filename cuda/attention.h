// What the attention kernels are told: raw pointers and strides. Shared by the host side
// (attention.cpp) and the two families of kernels: attention_mma.cu (16-bit operands on tensor
// cores) and attention_plain.cu (F32, any head size).
#pragma once

#include <cuda_runtime_api.h>

#include <cstdint>

namespace omq::cuda {

// A tensor [B, rows, heads, d] whose last dim is contiguous; strides in elements. narrow: of the
// 16-bit type at hand instead of F32.
struct HeadRows {
  void* data = nullptr;
  int64_t batch = 0, row = 0, head = 0;
  bool narrow = false;
};

struct AttentionArgs {
  HeadRows q, k, v, y;      // y: output of the forward, input of the backward
  HeadRows dy, dq, dk, dv;  // backward only
  float* lse = nullptr;     // [B, H, T]
  float* delta = nullptr;   // [B, H, T] scratch of the backward: Σ dy ⊙ y of each row
  int batches = 0, queries = 0, keys = 0, heads = 0, kv_heads = 0, size = 0;  // B T S H K d
  int parts = 1;  // dk, dv hold this many partial sums a key/value head
  float scale = 1;
  bool causal = true;
};

// Tensor cores: q, k, v narrow, d a multiple of 8 up to kMaxMmaHead, every row 16-byte aligned;
// scale > 0; the other tensors of either type. bf16 chooses the 16-bit type.
inline constexpr int kMaxMmaHead = 128;
void attention_mma(const AttentionArgs& a, bool bf16, cudaStream_t stream);
// Fills delta and, when dy is F32, dy16 (dy in 16 bits, [B,T,H,d] contiguous); then dq, dk, dv.
void attention_mma_vjp(AttentionArgs a, void* dy16, bool bf16, cudaStream_t stream);
// How many blocks of the dk, dv pass share one key/value head (so that small grids fill the GPU):
// 1, or H / K. With more than one, dk and dv are F32 parts [B,S,K · parts,d] for attention_fold.
int attention_mma_parts(const AttentionArgs& a, int multiprocessors);
// out [rows,d] = the sums over neighbouring rows of in [rows · parts,d], in order.
void attention_fold(void* out, bool narrow, bool bf16, const float* in, int64_t rows, int parts,
                    int size, cudaStream_t stream);

// F32 throughout, any d.
void attention_plain(const AttentionArgs& a, cudaStream_t stream);
void attention_plain_vjp(const AttentionArgs& a, cudaStream_t stream);

}  // namespace omq::cuda
