// The dense product by cuBLASLt: [..,M,K] · [..,K,N] of F32, BF16 or F16, sums in F32; or of I8,
// sums in I32.
//
// cuBLASLt thinks in columns: our row-major y = a b is its yᵀ = bᵀ aᵀ, so b is its first operand.
// Row and column strides become transposes and leading dims, leading dims of the tensors one batch
// stride; what does not fit is copied first.
//
// A plan (layouts and algorithm) is made once per shape, strides, types and alignment. For products
// of 1 GFLOP and more the best 24 proposals of the library are timed on the operands at hand, which
// finds 10–20 % over its first proposal; OMQ_GEMM_SEARCH=0 takes the first one, so that a run's
// bits do not depend on timings, OMQ_GEMM_SEARCH=1 times small products too. Algorithms that add
// partial sums in the order of their arrival are excluded, so a plan always gives the same bits.
// While the stream is captured into a graph nothing is timed: run the product once before.
#include <cublasLt.h>

#include <array>
#include <cstdlib>
#include <limits>
#include <map>
#include <mutex>
#include <vector>

#include "cuda/stream.h"
#include "tensor/kernels.h"

namespace omq::cuda {
namespace {

constexpr size_t kWorkspace = size_t{64} << 20;
constexpr int kProposals = 24;
constexpr double kSearchFrom = 1e9;  // operations

void check_blas(cublasStatus_t status, const char* call, int line) {
  check(status == CUBLAS_STATUS_SUCCESS, "{}:{}: {}: {}", __FILE__, line, call,
        cublasLtGetStatusString(status));
}
#define OMQ_BLAS(call) check_blas((call), #call, __LINE__)

// ---- operands ----

// A matrix (or a batch of them) as cuBLASLt is told: column-major with leading dim ld, taken
// transposed or not.
struct Operand {
  const void* data = nullptr;
  int64_t ld = 0, batch_stride = 0;
  bool by_rows = true;  // our rows are contiguous
};

// One stride for all leading dims, when there is one: 0 for a single matrix.
bool batch_stride_of(const Tensor& x, int64_t* stride) {
  *stride = 0;
  int64_t next = 0;  // the stride that the next outer dim must have
  bool any = false;
  for (int i = x.ndim() - 3; i >= 0; --i) {
    if (x.dim(i) == 1) continue;
    if (!any)
      *stride = x.stride(i);
    else if (x.stride(i) != next)
      return false;
    any = true;
    next = x.stride(i) * x.dim(i);
  }
  return true;
}

bool describe(const Tensor& x, Operand* out) {
  const int64_t rows = x.dim(-2), cols = x.dim(-1), down = x.stride(-2), along = x.stride(-1);
  out->data = x.raw();
  if (!batch_stride_of(x, &out->batch_stride)) return false;
  if ((along == 1 || cols == 1) && (rows == 1 || down >= cols)) {
    out->by_rows = true;
    out->ld = rows == 1 ? std::max<int64_t>(cols, 1) : down;
    return true;
  }
  if ((down == 1 || rows == 1) && (cols == 1 || along >= rows)) {
    out->by_rows = false;
    out->ld = cols == 1 ? std::max<int64_t>(rows, 1) : along;
    return true;
  }
  return false;
}

Tensor usable(const Tensor& x, Operand* out) {
  if (describe(x, out)) return x;
  Tensor y = Tensor::empty(x.shape(), x.dtype(), x.device());
  copy(y, x);
  check(describe(y, out), "matmul: shape {}", x.shape());
  return y;
}

cudaDataType blas_type(DType t) {
  if (t == DType::I8) return CUDA_R_8I;
  if (t == DType::I32) return CUDA_R_32I;
  check(t == DType::F32 || t == DType::BF16 || t == DType::F16,
        "matmul: F32, BF16, F16 or I8 wanted on a GPU, got {}", dtype_name(t));
  return t == DType::F32 ? CUDA_R_32F : t == DType::BF16 ? CUDA_R_16BF : CUDA_R_16F;
}

// The largest power of two up to 256 that divides an address: what a kernel may rely on.
uint32_t alignment(const void* p) {
  const auto at = reinterpret_cast<uintptr_t>(p);
  return at == 0 ? 256u : std::min<uint32_t>(256u, static_cast<uint32_t>(at & (~at + 1)));
}

// ---- plans ----

enum : int { kM, kN, kK, kBatches, kLdA, kLdB, kStrideA, kStrideB, kForm, kKeySize };
using Key = std::array<int64_t, kKeySize>;

struct Plan {
  cublasLtMatmulDesc_t product = nullptr;
  cublasLtMatrixLayout_t first = nullptr, second = nullptr, result = nullptr;  // of b, a, y
  cublasLtMatmulAlgo_t algorithm{};
  bool settled = false;  // no search is wanted any more
};

struct Handle {
  std::mutex mutex;
  cublasLtHandle_t blas = nullptr;
  void* workspace = nullptr;
  std::map<Key, Plan> plans;
};

// One per device; never destroyed: the driver may be gone before static objects are.
Handle& handle_of(int device) {
  static auto* handles = new std::array<Handle, 128>;
  Handle& h = handles->at(static_cast<size_t>(device));
  std::lock_guard lock(h.mutex);
  if (!h.blas) {
    device_info(device);  // makes it current
    OMQ_BLAS(cublasLtCreate(&h.blas));
    h.workspace = cuda_device_api()->alloc(kWorkspace, device);
  }
  return h;
}

struct Call {
  Operand a, b;
  void* y = nullptr;
  cudaDataType in{}, out{};
  Key key{};
};

cublasLtMatrixLayout_t layout(cudaDataType type, int64_t rows, int64_t cols, int64_t ld,
                              int64_t batches, int64_t batch_stride) {
  cublasLtMatrixLayout_t l = nullptr;
  OMQ_BLAS(cublasLtMatrixLayoutCreate(&l, type, static_cast<uint64_t>(rows),
                                      static_cast<uint64_t>(cols), ld));
  const auto count = static_cast<int32_t>(batches);
  OMQ_BLAS(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_BATCH_COUNT, &count,
                                            sizeof count));
  OMQ_BLAS(cublasLtMatrixLayoutSetAttribute(l, CUBLASLT_MATRIX_LAYOUT_STRIDED_BATCH_OFFSET,
                                            &batch_stride, sizeof batch_stride));
  return l;
}

// A row-major matrix x [rows, cols] is column-major [cols, rows]; one whose columns are contiguous
// is column-major [rows, cols], to be transposed.
cublasLtMatrixLayout_t layout(const Operand& x, cudaDataType type, int64_t rows, int64_t cols,
                              int64_t batches) {
  return x.by_rows ? layout(type, cols, rows, x.ld, batches, x.batch_stride)
                   : layout(type, rows, cols, x.ld, batches, x.batch_stride);
}

Plan describe_product(const Call& c) {
  Plan p;
  const int64_t m = c.key[kM], n = c.key[kN], k = c.key[kK], batches = c.key[kBatches];
  if (c.in == CUDA_R_8I)
    OMQ_BLAS(cublasLtMatmulDescCreate(&p.product, CUBLAS_COMPUTE_32I, CUDA_R_32I));
  else
    OMQ_BLAS(cublasLtMatmulDescCreate(&p.product, CUBLAS_COMPUTE_32F, CUDA_R_32F));
  const cublasOperation_t first = c.b.by_rows ? CUBLAS_OP_N : CUBLAS_OP_T,
                          second = c.a.by_rows ? CUBLAS_OP_N : CUBLAS_OP_T;
  OMQ_BLAS(
      cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_TRANSA, &first, sizeof first));
  OMQ_BLAS(cublasLtMatmulDescSetAttribute(p.product, CUBLASLT_MATMUL_DESC_TRANSB, &second,
                                          sizeof second));
  p.first = layout(c.b, c.in, k, n, batches);
  p.second = layout(c.a, c.in, m, k, batches);
  p.result = layout(c.out, n, m, n, batches, m * n);
  return p;
}

std::vector<cublasLtMatmulHeuristicResult_t> proposals(Handle& h, const Plan& p, const Call& c,
                                                       int wanted) {
  cublasLtMatmulPreference_t preference = nullptr;
  OMQ_BLAS(cublasLtMatmulPreferenceCreate(&preference));
  auto set = [&](cublasLtMatmulPreferenceAttributes_t what, const auto& value) {
    OMQ_BLAS(cublasLtMatmulPreferenceSetAttribute(preference, what, &value, sizeof value));
  };
  const uint32_t reductions = CUBLASLT_REDUCTION_SCHEME_COMPUTE_TYPE;
  set(CUBLASLT_MATMUL_PREF_MAX_WORKSPACE_BYTES, kWorkspace);
  set(CUBLASLT_MATMUL_PREF_REDUCTION_SCHEME_MASK, reductions);
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_A_BYTES, alignment(c.b.data));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_B_BYTES, alignment(c.a.data));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_C_BYTES, alignment(c.y));
  set(CUBLASLT_MATMUL_PREF_MIN_ALIGNMENT_D_BYTES, alignment(c.y));
  std::vector<cublasLtMatmulHeuristicResult_t> found(static_cast<size_t>(wanted));
  int count = 0;
  const cublasStatus_t status =
      cublasLtMatmulAlgoGetHeuristic(h.blas, p.product, p.first, p.second, p.result, p.result,
                                     preference, wanted, found.data(), &count);
  cublasLtMatmulPreferenceDestroy(preference);
  found.resize(status == CUBLAS_STATUS_SUCCESS ? static_cast<size_t>(count) : 0);
  std::erase_if(found, [](const auto& r) {
    return r.state != CUBLAS_STATUS_SUCCESS || r.workspaceSize > kWorkspace;
  });
  check(!found.empty(), "matmul: cuBLASLt has no algorithm for M {} N {} K {} ({})", c.key[kM],
        c.key[kN], c.key[kK], cublasLtGetStatusString(status));
  return found;
}

cublasStatus_t multiply(Handle& h, const Plan& p, const cublasLtMatmulAlgo_t& algorithm,
                        const Call& c, cudaStream_t stream) {
  const float one = 1.0f, zero = 0.0f;
  const int32_t whole_one = 1, whole_zero = 0;
  const bool whole = c.in == CUDA_R_8I;  // then factors are whole numbers too
  const void *alpha = whole ? static_cast<const void*>(&whole_one) : &one,
             *beta = whole ? static_cast<const void*>(&whole_zero) : &zero;
  return cublasLtMatmul(h.blas, p.product, alpha, c.b.data, p.first, c.a.data, p.second, beta, c.y,
                        p.result, c.y, p.result, &algorithm, h.workspace, kWorkspace, stream);
}

// The fastest of the proposals, each run once to warm up and timed three times.
cublasLtMatmulAlgo_t fastest(Handle& h, const Plan& p, const Call& c, cudaStream_t stream) {
  const auto found = proposals(h, p, c, kProposals);
  cudaEvent_t start = nullptr, stop = nullptr;
  OMQ_CUDA(cudaEventCreate(&start));
  OMQ_CUDA(cudaEventCreate(&stop));
  cublasLtMatmulAlgo_t best = found.front().algo;
  float best_ms = std::numeric_limits<float>::infinity();
  for (const auto& candidate : found) {
    if (multiply(h, p, candidate.algo, c, stream) != CUBLAS_STATUS_SUCCESS) continue;
    float ms = std::numeric_limits<float>::infinity();
    for (int i = 0; i < 3; ++i) {
      OMQ_CUDA(cudaEventRecord(start, stream));
      multiply(h, p, candidate.algo, c, stream);
      OMQ_CUDA(cudaEventRecord(stop, stream));
      OMQ_CUDA(cudaEventSynchronize(stop));
      float t = 0;
      OMQ_CUDA(cudaEventElapsedTime(&t, start, stop));
      ms = std::min(ms, t);
    }
    if (ms < best_ms) {
      best_ms = ms;
      best = candidate.algo;
    }
  }
  OMQ_CUDA(cudaEventDestroy(start));
  OMQ_CUDA(cudaEventDestroy(stop));
  return best;
}

bool wants_search(const Key& key) {
  static const char* const setting = std::getenv("OMQ_GEMM_SEARCH");
  if (setting && *setting) return setting[0] != '0';
  double work = 2;
  for (int i : {kM, kN, kK, kBatches}) work *= static_cast<double>(key[static_cast<size_t>(i)]);
  return work >= kSearchFrom;
}

const Plan& plan_for(Handle& h, const Call& c, cudaStream_t stream) {
  auto it = h.plans.find(c.key);
  if (it != h.plans.end() && it->second.settled) return it->second;
  cudaStreamCaptureStatus capture = cudaStreamCaptureStatusNone;
  OMQ_CUDA(cudaStreamIsCapturing(stream, &capture));
  const bool search = wants_search(c.key), now = capture == cudaStreamCaptureStatusNone;
  if (it == h.plans.end()) {
    Plan p = describe_product(c);
    p.algorithm = proposals(h, p, c, 1).front().algo;
    it = h.plans.emplace(c.key, p).first;
  }
  if (search && now) it->second.algorithm = fastest(h, it->second, c, stream);
  it->second.settled = !search || now;
  return it->second;
}

Key key_of(const Call& c, int64_t m, int64_t n, int64_t k, int64_t batches) {
  Key key{};
  key[kM] = m;
  key[kN] = n;
  key[kK] = k;
  key[kBatches] = batches;
  key[kLdA] = c.a.ld;
  key[kLdB] = c.b.ld;
  key[kStrideA] = c.a.batch_stride;
  key[kStrideB] = c.b.batch_stride;
  int64_t form = c.a.by_rows * 2 + c.b.by_rows;
  for (int64_t part :
       {static_cast<int64_t>(c.in), static_cast<int64_t>(c.out),
        static_cast<int64_t>(alignment(c.a.data)), static_cast<int64_t>(alignment(c.b.data)),
        static_cast<int64_t>(alignment(c.y))})
    form = form * 512 + part;  // all below 512
  key[kForm] = form;
  return key;
}

}  // namespace

void matmul(Tensor& y, const Tensor& a_any, const Tensor& b_any) {
  if (y.numel() == 0) return;
  const int64_t m = a_any.dim(-2), k = a_any.dim(-1), n = b_any.dim(-1);
  if (k == 0) return fill(y, 0);
  const bool whole = a_any.dtype() == DType::I8;
  check(
      a_any.dtype() == b_any.dtype() && y.is_contiguous() &&
          (whole ? y.dtype() == DType::I32 : y.dtype() == DType::F32 || y.dtype() == a_any.dtype()),
      "matmul: {} · {} into {}", dtype_name(a_any.dtype()), dtype_name(b_any.dtype()),
      dtype_name(y.dtype()));
  Call c;
  const Tensor a = usable(a_any, &c.a), b = usable(b_any, &c.b);  // alive until the launch
  c.y = y.raw();
  c.in = blas_type(a.dtype());
  c.out = blas_type(y.dtype());
  const int64_t batches = y.numel() / (m * n);
  check(batches <= std::numeric_limits<int32_t>::max(), "matmul: {} products at once", batches);
  c.key = key_of(c, m, n, k, batches);
  const int device = y.device().index;
  const cudaStream_t stream = stream_of(y);
  Handle& h = handle_of(device);
  std::lock_guard lock(h.mutex);
  const Plan& plan = plan_for(h, c, stream);
  begin_launch(stream);
  OMQ_BLAS(multiply(h, plan, plan.algorithm, c, stream));
  check_launch("matmul", stream);
}

}  // namespace omq::cuda
