// The kernel tables that kernels.def generates: one struct of function pointers for the dense
// kernels, one for the packed ones, a declaration of every cpu:: and cuda:: function, and on(x),
// which finds the table of x's device.
//
// A kernel that is listed but not written is a link error that names it.
#pragma once

#include "tensor/elementwise.h"
#include "tensor/packed.h"
#include "tensor/rate_schedule.h"
#include "tensor/row_quant.h"
#include "tensor/tensor.h"

namespace omq {

// Causal attention over T queries and S ≥ T keys: query t sees keys 0 … S − T + t. q, y [B,T,H,d];
// k, v [B,S,K,d], any strides with a contiguous last dim; lse [B,H,T]; H is a multiple of K
// (grouped queries share a key/value head).
struct AttentionSpec {
  double scale = 1.0;  // usually 1/√d
  bool causal = true;
  // false: no gradient is asked for behind it. Then a processor may make products its own way, with
  // scores off by 2⁻¹⁵ of |q|·|k|.
  bool learns = true;
};

// One AdamW update (decoupled decay). What changes from step to step is in a tensor, the clock, so
// that a recorded update can be replayed: {t, 1 − β₁ᵗ, 1 − β₂ᵗ, r}, r the share of lr that the
// schedule gives step t; F64 on the CPU, F32 on other devices. A tick adds one to t; a loss that is
// not finite stops the clock for good ({t, ∞, ∞, r}), and by a stopped clock adamw changes nothing.
struct AdamWStep {
  double lr, beta1, beta2, eps, weight_decay;
  RateSchedule rate = {};  // read by the tick alone
};

#define OMQ_KERNEL(name, params) void(*name) params = nullptr;
#define OMQ_PACKED_KERNEL(name, params)
struct DenseKernels {
#include "tensor/kernels.def"
};
#undef OMQ_KERNEL
#undef OMQ_PACKED_KERNEL

#define OMQ_KERNEL(name, params)
#define OMQ_PACKED_KERNEL(name, params) void(*name) params = nullptr;
struct PackedKernels {
#include "tensor/kernels.def"
};
#undef OMQ_KERNEL
#undef OMQ_PACKED_KERNEL

#define OMQ_KERNEL(name, params) void name params;
#define OMQ_PACKED_KERNEL(name, params) void name params;
namespace cpu {
#include "tensor/kernels.def"
}
namespace cuda {
#include "tensor/kernels.def"
}
#undef OMQ_KERNEL
#undef OMQ_PACKED_KERNEL

// The tables of x's device. Throw Error when this build has no back end for it.
const DenseKernels& on(const Tensor& x);
const PackedKernels& packed_on(const Tensor& x);

const DenseKernels& cpu_kernels();
const PackedKernels& cpu_packed_kernels();
// Defined in cuda/: null in a build without CUDA.
const DenseKernels* cuda_kernels();
const PackedKernels* cuda_packed_kernels();

}  // namespace omq
