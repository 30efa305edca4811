// gemm_tile by oneDNN's matmul primitive, run by the calling thread alone.
//
// oneDNN is built with OpenMP; each of our threads tells its OpenMP runtime once to use a single
// thread. Primitives are kept per thread and shape: a primitive owns its scratchpad, so two threads
// must not share one.
#include <omp.h>

#include <algorithm>
#include <dnnl.hpp>
#include <unordered_map>
#include <vector>

#include "tensor/cpu/gemm.h"
#include "tensor/error.h"

namespace omq::cpu {
namespace {

struct Key {
  int64_t m, n, k, a_row, a_col, b_row, b_col, c_row;
  bool accumulate, bf16;
  bool operator==(const Key&) const = default;
};
struct KeyHash {
  size_t operator()(const Key& key) const {
    uint64_t h = 0x9e3779b97f4a7c15u;
    for (int64_t v : {key.m, key.n, key.k, key.a_row, key.a_col, key.b_row, key.b_col, key.c_row,
                      static_cast<int64_t>(key.accumulate), static_cast<int64_t>(key.bf16)})
      h = (h ^ static_cast<uint64_t>(v)) * 0xff51afd7ed558ccdu, h ^= h >> 32;
    return static_cast<size_t>(h);
  }
};

struct Product {
  dnnl::matmul primitive;
  dnnl::memory a, b, c;
};

struct ThreadState {
  dnnl::engine engine{dnnl::engine::kind::cpu, 0};
  dnnl::stream stream{engine};
  std::unordered_map<Key, Product, KeyHash> products;
  ThreadState() { omp_set_num_threads(1); }
};

constexpr size_t kMaxProducts =
    4096;  // per thread; ragged prompts would otherwise grow the table for ever

Product make(ThreadState& s, const Key& key) {
  using dt = dnnl::memory::data_type;
  const dt operand = key.bf16 ? dt::bf16 : dt::f32;
  const dnnl::memory::desc a({key.m, key.k}, operand, dnnl::memory::dims{key.a_row, key.a_col});
  const dnnl::memory::desc b({key.k, key.n}, operand, dnnl::memory::dims{key.b_row, key.b_col});
  const dnnl::memory::desc c({key.m, key.n}, dt::f32, dnnl::memory::dims{key.c_row, 1});
  dnnl::primitive_attr attributes;
  if (key.accumulate) {
    dnnl::post_ops ops;
    ops.append_sum(1.0f);
    attributes.set_post_ops(ops);
  }
  const dnnl::matmul::desc desc(a, b, c);
  const dnnl::matmul::primitive_desc pd(desc, attributes, s.engine);
  return {dnnl::matmul(pd), dnnl::memory(a, s.engine, nullptr), dnnl::memory(b, s.engine, nullptr),
          dnnl::memory(c, s.engine, nullptr)};
}

// Below AVX-512 oneDNN reads a transposed A a few columns at a time along k. Where rows of k lie a
// multiple of 2 KiB apart (LLaMA's widths), a column's cache lines share few sets and are gone
// before their other columns are read: 34 GFLOP/s instead of 65 to 80 at rows of 2048 and 4096 F32,
// 54 to 67 instead of 64 to 83 at 1536 (AMD Zen 3, one core, 256 × 2048 × 688 and 192 × 512 × 576).
bool reads_badly(const Key& key) {
  static const bool here = dnnl::get_effective_cpu_isa() < dnnl::cpu_isa::avx512_core;
  const bool far_apart = key.a_row == 1 && key.a_col * sizeof(float) % 2048 == 0;
  return here && far_apart && !key.bf16 && key.m >= 32 && key.k >= 128 && key.n >= 256;
}

// Such an A again, its rows next to each other, in the calling thread's buffer; sets a_col.
const float* gathered(const float* a, Key& key) {
  static thread_local std::vector<float> panel;
  panel.resize(static_cast<size_t>(key.m * key.k));
  for (int64_t p = 0; p < key.k; ++p)
    std::copy_n(a + p * key.a_col, key.m, panel.data() + p * key.m);
  key.a_col = key.m;
  return panel.data();
}

template <class T>
void run_tile(int64_t m, int64_t n, int64_t k, const T* a, int64_t a_row, int64_t a_col, const T* b,
              int64_t b_row, int64_t b_col, float* c, int64_t c_row, bool accumulate) {
  if (m == 0 || n == 0 || k == 0) {
    if (!accumulate)
      for (int64_t i = 0; i < m; ++i)
        for (int64_t j = 0; j < n; ++j) c[i * c_row + j] = 0.0f;
    return;
  }
  // A stride of a size-1 dimension is never used, but oneDNN wants it consistent.
  if (m == 1) a_row = a_col == 1 ? k : 1;
  if (k == 1) a_col = a_row == 1 ? m : 1, b_row = b_col == 1 ? n : 1;
  if (n == 1) b_col = b_row == 1 ? k : 1;
  if (m == 1) c_row = n;
  static thread_local ThreadState state;
  Key key{m, n, k, a_row, a_col, b_row, b_col, c_row, accumulate, std::is_same_v<T, bf16_t>};
  if constexpr (std::is_same_v<T, float>)
    if (reads_badly(key)) a = gathered(a, key);
  auto it = state.products.find(key);
  if (it == state.products.end()) {
    if (state.products.size() >= kMaxProducts) state.products.clear();
    try {
      it = state.products.emplace(key, make(state, key)).first;
    } catch (const dnnl::error& e) {
      fail("gemm: oneDNN refuses {}x{}x{} with strides ({}, {}) ({}, {}): {}", m, n, k, a_row,
           a_col, b_row, b_col, e.what());
    }
  }
  Product& p = it->second;
  p.a.set_data_handle(const_cast<T*>(a));
  p.b.set_data_handle(const_cast<T*>(b));
  p.c.set_data_handle(c);
  p.primitive.execute(state.stream,
                      {{DNNL_ARG_SRC, p.a}, {DNNL_ARG_WEIGHTS, p.b}, {DNNL_ARG_DST, p.c}});
  state.stream.wait();
}

}  // namespace

void gemm_tile(int64_t m, int64_t n, int64_t k, const float* a, int64_t a_row, int64_t a_col,
               const float* b, int64_t b_row, int64_t b_col, float* c, int64_t c_row,
               bool accumulate) {
  run_tile(m, n, k, a, a_row, a_col, b, b_row, b_col, c, c_row, accumulate);
}
void gemm_tile(int64_t m, int64_t n, int64_t k, const bf16_t* a, int64_t a_row, int64_t a_col,
               const bf16_t* b, int64_t b_row, int64_t b_col, float* c, int64_t c_row,
               bool accumulate) {
  run_tile(m, n, k, a, a_row, a_col, b, b_row, b_col, c, c_row, accumulate);
}

bool gemm_has_bf16() {
  static const bool has = (static_cast<int>(dnnl::get_effective_cpu_isa()) &
                           static_cast<int>(dnnl::cpu_isa::avx512_core_bf16)) ==
                          static_cast<int>(dnnl::cpu_isa::avx512_core_bf16);
  return has;
}

const char* gemm_name() { return "oneDNN"; }

}  // namespace omq::cpu
