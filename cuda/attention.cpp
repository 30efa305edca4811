// Host side of causal attention: which kernels take a call, copies of what they cannot read, and
// scratch.
//
//   16-bit q, k, v, d a multiple of 8 up to 128   tensor cores (attention_mma*.cu)
//   everything else                               F32 (attention_plain.cu), 16 bits widened first
#include "cuda/attention.h"

#include "cuda/stream.h"
#include "tensor/kernels.h"

namespace omq::cuda {
namespace {

HeadRows head_rows(const Tensor& x) {
  return {x.raw(), x.stride(0), x.stride(1), x.stride(2), x.dtype() != DType::F32};
}

AttentionArgs arguments(const Tensor& q, const Tensor& k, const Tensor& v, const Tensor& y,
                        const Tensor& lse, AttentionSpec s) {
  AttentionArgs a;
  a.q = head_rows(q);
  a.k = head_rows(k);
  a.v = head_rows(v);
  a.y = head_rows(y);
  a.lse = lse.data<float>();
  a.batches = static_cast<int>(q.dim(0));
  a.queries = static_cast<int>(q.dim(1));
  a.heads = static_cast<int>(q.dim(2));
  a.size = static_cast<int>(q.dim(3));
  a.keys = static_cast<int>(k.dim(1));
  a.kv_heads = static_cast<int>(k.dim(2));
  a.scale = static_cast<float>(s.scale);
  a.causal = s.causal;
  return a;
}

// x in another type and contiguous.
Tensor converted(const Tensor& x, DType dtype) {
  Tensor y = Tensor::empty(x.shape(), dtype, x.device());
  copy(y, x);
  return y;
}

// Every row of x starts on 16 bytes and is contiguous.
bool rows_aligned(const Tensor& x) {
  const auto per_16_bytes = static_cast<int64_t>(16 / dtype_size(x.dtype()));
  bool ok = x.stride(3) == 1 && reinterpret_cast<uintptr_t>(x.raw()) % 16 == 0;
  for (int i = 0; i < 3; ++i) ok = ok && x.stride(i) % per_16_bytes == 0;
  return ok;
}
Tensor aligned(const Tensor& x) { return rows_aligned(x) ? x : converted(x, x.dtype()); }
Tensor widened(const Tensor& x) {
  return x.dtype() == DType::F32 && x.stride(3) == 1 ? x : converted(x, DType::F32);
}

void check_types(const char* op, const Tensor& q, const Tensor& k, const Tensor& v) {
  check(q.dtype() == k.dtype() && k.dtype() == v.dtype() &&
            (q.dtype() == DType::F32 || q.dtype() == DType::BF16 || q.dtype() == DType::F16),
        "{}: q {}, k {}, v {}: one type of F32, BF16 and F16 wanted", op, dtype_name(q.dtype()),
        dtype_name(k.dtype()), dtype_name(v.dtype()));
}
// Outputs and gradients are F32 or of the operands' type.
bool fits(const Tensor& x, DType operands) {
  return x.dtype() == DType::F32 || x.dtype() == operands;
}

bool for_tensor_cores(const Tensor& q, AttentionSpec s) {
  return q.dtype() != DType::F32 && q.dim(3) % 8 == 0 && q.dim(3) <= kMaxMmaHead && s.scale > 0;
}

// A contiguous F32 tensor to write in place of `out`; finish() rounds it into `out` when they
// differ.
struct F32Output {
  Tensor& out;
  Tensor wide;
  explicit F32Output(Tensor& o)
      : out(o),
        wide(o.dtype() == DType::F32 ? o : Tensor::empty(o.shape(), DType::F32, o.device())) {}
  void finish() {
    if (out.dtype() != DType::F32) copy(out, wide);
  }
};

}  // namespace

void attention(Tensor& y, Tensor& lse, const Tensor& q, const Tensor& k, const Tensor& v,
               AttentionSpec s) {
  check_types("attention", q, k, v);
  check(fits(y, q.dtype()) && lse.dtype() == DType::F32,
        "attention: y {} and lse {} of operands {}", dtype_name(y.dtype()), dtype_name(lse.dtype()),
        dtype_name(q.dtype()));
  if (y.numel() == 0) return;
  const cudaStream_t stream = stream_of(y);
  if (for_tensor_cores(q, s)) {
    const Tensor aq = aligned(q), ak = aligned(k), av = aligned(v);
    begin_launch(stream);
    attention_mma(arguments(aq, ak, av, y, lse, s), q.dtype() == DType::BF16, stream);
    return check_launch("attention", stream);
  }
  const Tensor wq = widened(q), wk = widened(k), wv = widened(v);
  F32Output wy(y);
  begin_launch(stream);
  attention_plain(arguments(wq, wk, wv, wy.wide, lse, s), stream);
  check_launch("attention", stream);
  wy.finish();
}

namespace {

void vjp_mma(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& q, const Tensor& k, const Tensor& v,
             const Tensor& y, const Tensor& lse, const Tensor& dy, AttentionSpec s) {
  const bool bf16 = q.dtype() == DType::BF16;
  const Device device = q.device();
  const cudaStream_t stream = stream_of(q);
  const Tensor aq = aligned(q), ak = aligned(k), av = aligned(v), ady = aligned(dy);
  AttentionArgs a = arguments(aq, ak, av, y, lse, s);
  a.dy = head_rows(ady);
  a.dq = head_rows(dq);
  a.dk = head_rows(dk);
  a.dv = head_rows(dv);
  a.parts = attention_mma_parts(a, device_info(device.index).sms);
  Tensor delta = Tensor::empty(lse.shape(), DType::F32, device), dy16, dk_parts, dv_parts;
  a.delta = delta.data<float>();
  if (!a.dy.narrow) dy16 = Tensor::empty(q.shape(), q.dtype(), device);
  if (a.parts > 1) {
    dk_parts =
        Tensor::empty({k.dim(0), k.dim(1), k.dim(2) * a.parts, k.dim(3)}, DType::F32, device);
    dv_parts = empty_like(dk_parts);
    a.dk = head_rows(dk_parts);
    a.dv = head_rows(dv_parts);
  }
  begin_launch(stream);
  attention_mma_vjp(a, dy16.defined() ? dy16.raw() : nullptr, bf16, stream);
  if (a.parts > 1)
    for (auto [out, parts] : {std::pair{&dk, &dk_parts}, std::pair{&dv, &dv_parts}})
      attention_fold(out->raw(), out->dtype() != DType::F32, bf16, parts->data<float>(),
                     out->numel() / a.size, a.parts, a.size, stream);
  check_launch("attention_vjp", stream);
}

}  // namespace

void attention_vjp(Tensor& dq, Tensor& dk, Tensor& dv, const Tensor& q, const Tensor& k,
                   const Tensor& v, const Tensor& y, const Tensor& lse, const Tensor& dy,
                   AttentionSpec s) {
  check_types("attention_vjp", q, k, v);
  for (const Tensor* x : {&y, &dy, static_cast<const Tensor*>(&dq), static_cast<const Tensor*>(&dk),
                          static_cast<const Tensor*>(&dv)})
    check(fits(*x, q.dtype()), "attention_vjp: a tensor of {} with operands of {}",
          dtype_name(x->dtype()), dtype_name(q.dtype()));
  if (q.numel() == 0) return;
  if (for_tensor_cores(q, s)) return vjp_mma(dq, dk, dv, q, k, v, y, lse, dy, s);
  const cudaStream_t stream = stream_of(q);
  const Tensor wq = widened(q), wk = widened(k), wv = widened(v), wy = widened(y),
               wdy = widened(dy);
  F32Output odq(dq), odk(dk), odv(dv);
  AttentionArgs a = arguments(wq, wk, wv, wy, lse, s);
  a.dy = head_rows(wdy);
  a.dq = head_rows(odq.wide);
  a.dk = head_rows(odk.wide);
  a.dv = head_rows(odv.wide);
  Tensor delta = Tensor::empty(lse.shape(), DType::F32, q.device());
  a.delta = delta.data<float>();
  begin_launch(stream);
  attention_plain_vjp(a, stream);
  check_launch("attention_vjp", stream);
  for (F32Output* out : {&odq, &odk, &odv}) out->finish();
}

}  // namespace omq::cuda
