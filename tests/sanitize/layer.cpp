// Runs the CPU kernels of one instruction set (LSTM_ISA) over small layers of every kind, for the
// sanitizers: every tensor is an allocation of its own, of its exact size, and workers are plain
// threads. What comes out must be finite everywhere, memory being NaN before, and the same with one
// worker as with three up to the order of sums.
#include <algorithm>
#include <cmath>
#include <cstdio>
#include <cstring>
#include <limits>
#include <random>
#include <thread>
#include <vector>

#include "cpu/dispatch.h"
#include "emulation/half.hpp"

namespace lstm_cuda::test {
namespace {

struct Bfloat16 {
  uint16_t bits;
  explicit Bfloat16(float value) {
    uint32_t wide;
    std::memcpy(&wide, &value, 4);
    bits = uint16_t((wide + 0x8000) >> 16);
  }
  explicit operator double() const {
    const uint32_t wide = uint32_t(bits) << 16;
    float value;
    std::memcpy(&value, &wide, 4);
    return value;
  }
};

struct Half {
  uint16_t bits;
  explicit Half(float value) {
    const double v = round_to_half(value), size = std::fabs(v);
    const int exponent = v == 0 || std::isnan(v) ? -14 : std::max(std::ilogb(size), -14);
    // The bit that is not stored, where there is one, carries into the exponent.
    const double digits = std::isnan(v) ? 0 : std::ldexp(size, 10 - exponent);
    const int place = int(digits) + ((exponent + 14) << 10);
    bits = std::isnan(v) ? 0x7e00 : uint16_t((std::signbit(v) ? 0x8000 : 0) + place);
  }
  explicit operator double() const { return from_half(bits); }
};

struct Case {
  int64_t T, B, D, I, H, P;  // P = 0: not projected
  bool full;                 // lengths, resets, first states, a strided x, gradients of all outputs
};

const Case cases[] = {
    {7, 3, 1, 5, 9, 0, false},   {5, 1, 2, 3, 33, 0, true},    {9, 7, 2, 4, 16, 5, true},
    {9, 9, 1, 40, 48, 0, false}, {5, 70, 1, 9, 24, 0, false},  {1, 1, 1, 8, 40, 0, true},
    {1, 2, 1, 3, 70, 0, false},  {0, 2, 1, 3, 4, 0, true},     {4, 0, 2, 3, 4, 0, true},
    {1, 13, 1, 1, 1, 0, true},   {20, 9, 1, 33, 65, 0, true},  {12, 8, 2, 32, 64, 0, true},
    {6, 1, 1, 32, 448, 0, true}, {5, 4, 1, 40, 520, 24, true},
};

void on_threads(int64_t count, void (*task)(void*, int64_t), void* context) {
  std::vector<std::thread> threads;
  for (int64_t k = 1; k < count; ++k) threads.emplace_back(task, context, k);
  task(context, 0);
  for (std::thread& thread : threads) thread.join();
}

template <class U>
std::vector<U> random(std::mt19937& g, int64_t count, float scale) {
  std::normal_distribution<float> normal(0, scale);
  std::vector<U> values;
  values.reserve(size_t(count));  // not a byte more: what is past the end is not ours
  for (int64_t k = 0; k < count; ++k) values.push_back(U(normal(g)));
  return values;
}

template <class U>
std::vector<U> unwritten(int64_t count) {
  return std::vector<U>(size_t(count), U(std::numeric_limits<float>::quiet_NaN()));
}

// D matrices, each an allocation of its own.
template <class S>
struct Weights {
  std::vector<std::vector<S>> values;
  std::vector<const void*> pointers;
  Weights(std::mt19937& g, int64_t D, int64_t count) {
    for (int64_t d = 0; d < D; ++d) values.push_back(random<S>(g, count, 0.2f));
    for (const auto& each : values) pointers.push_back(each.data());
  }
};

// The element type S of tensors with the tolerance of its results, relative to the greatest: the
// bounds of the tests in Python. C: of sums, of the reserve and of gradients that go out.
template <class S, class C>
struct Layer {
  Case c;
  LayerShape shape;
  std::mt19937 g{1};
  int64_t P = c.P ? c.P : c.H, rows = c.T * c.B, stride = c.I + (c.full ? 3 : 0), G = 4 * c.H;
  std::vector<S> x = random<S>(g, rows > 0 ? (rows - 1) * stride + c.I : 0, 1);
  Weights<S> w_ih{g, c.D, G * c.I}, w_hh{g, c.D, G * P}, b_ih{g, c.D, G}, b_hh{g, c.D, G},
      w_hr{g, c.D, P * c.H};
  std::vector<S> h0 = random<S>(g, c.D* c.B* P, 1), c0 = random<S>(g, c.D* c.B* c.H, 1),
                 dy = random<S>(g, rows* c.D* P, 1), dh_n = random<S>(g, c.D* c.B* P, 1),
                 dc_n = random<S>(g, c.D* c.B* c.H, 1);
  std::vector<C> dc = random<C>(g, rows* c.D* c.H, 1);
  std::vector<int64_t> lengths;
  std::vector<uint8_t> reset;
  std::vector<S> y, h_n, c_n;
  std::vector<C> gates, cells, dx, dh0, dc0, dw_ih, dw_hh, db, dw_hr;

  Layer(const Case& which, Dtype dtype) : c(which) {
    shape = {dtype, c.T, c.B, c.D, c.I, c.H, P, c.D == 2 ? 2u : 0u, c.P > 0, 1};
    for (int64_t b = 0; b < c.B; ++b) lengths.push_back(b % 3 == 1 ? 0 : c.T - b % 2 * c.T / 2);
    for (int64_t k = 0; k < rows; ++k) reset.push_back(g() % 4 == 0);
  }

  template <class Problem>
  void fill(Problem& p) const {
    p.shape = shape;
    p.x = x.data();
    p.x_stride_t = c.B * stride;
    p.x_stride_b = stride;
    p.w_ih = w_ih.pointers.data();
    p.w_hh = w_hh.pointers.data();
    p.w_hr = c.P ? w_hr.pointers.data() : nullptr;
    if (!c.full) return;
    p.h0 = h0.data();
    p.c0 = c0.data();
    p.lengths = lengths.data();
    p.reset = reset.data();
  }

  template <class Entry, class Problem>
  static void run(Entry entry, const Problem& p, int threads, bool backward) {
    const Parallel parallel{threads, on_threads};
    const CpuPlan plan = plan_cpu(p.shape, threads, backward, p.others);
    std::vector<uint64_t> scratch(size_t(entry(p, plan, parallel, nullptr) + 7) / 8, ~0ull);  // NaN
    entry(p, plan, parallel, scratch.data());
  }

  void forward(const CpuKernels::Entry& kernels, int threads, bool save) {
    y = unwritten<S>(rows * c.D * P);
    h_n = unwritten<S>(c.D * c.B * P);
    c_n = unwritten<S>(c.D * c.B * c.H);
    gates = unwritten<C>(save ? rows * c.D * G : 0);
    cells = unwritten<C>(save ? rows * c.D * c.H : 0);
    LayerForward p{};
    fill(p);
    if (c.full) p.b_ih = b_ih.pointers.data(), p.b_hh = b_hh.pointers.data();
    p.y = y.data(), p.h_n = h_n.data(), p.c_n = c_n.data();
    if (save) p.gates = gates.data(), p.c = cells.data();
    run(kernels.forward, p, threads, false);
  }

  void backward(const CpuKernels::Entry& kernels, int threads) {
    dx = unwritten<C>(rows * c.I);
    dh0 = unwritten<C>(c.full ? c.D * c.B * P : 0);
    dc0 = unwritten<C>(c.full ? c.D * c.B * c.H : 0);
    dw_ih = unwritten<C>(c.D * G * c.I);
    dw_hh = unwritten<C>(c.D * G * P);
    db = unwritten<C>(c.D * G);
    dw_hr = unwritten<C>(c.P ? c.D * P * c.H : 0);
    LayerBackward p{};
    fill(p);
    p.y = y.data(), p.gates = gates.data(), p.c = cells.data(), p.dy = dy.data();
    p.dx = dx.data(), p.dw_ih = dw_ih.data(), p.dw_hh = dw_hh.data(), p.db = db.data();
    if (c.full) p.dh_n = dh_n.data(), p.dc_n = dc_n.data(), p.dc = dc.data();
    if (c.full) p.dh0 = dh0.data(), p.dc0 = dc0.data();
    if (c.P) p.dw_hr = dw_hr.data();
    run(kernels.backward, p, threads, true);
  }

  // The same in pieces of k steps, of a layer without what only `full` ones have.
  void backward_in_pieces(const CpuKernels::Entry& kernels, int threads, int64_t k) {
    dx = unwritten<C>(rows * c.I);
    dw_ih = unwritten<C>(G * c.I), dw_hh = unwritten<C>(G * P), db = unwritten<C>(G);
    const int64_t parts = plan_cpu(shape, threads, true).parts;
    std::vector<C> sums = unwritten<C>(2 * parts * G * (c.I + P + 1)), carry, dc_n_wide;
    for (int64_t last = c.T, first; last > 0; last = first) {
      first = (last - 1) / k * k;
      const int64_t at = first * c.B;
      std::vector<C> carry_out = unwritten<C>(first > 0 ? c.B * G : 0),
                     dc = unwritten<C>(c.B * c.H);
      LayerBackward p{};
      fill(p);
      p.others = {first, c.T - last};
      p.shape.T = last - first;
      p.x = x.data() + at * stride;
      p.y = y.data() + at * P, p.gates = gates.data() + at * G, p.c = cells.data() + at * c.H;
      p.dy = dy.data() + at * P, p.dx = dx.data() + at * c.I;
      if (first > 0) p.h0 = y.data() + (at - c.B) * P, p.c0 = cells.data() + (at - c.B) * c.H;
      if (first > 0) p.dc0 = dc.data(), p.carry_out = carry_out.data();
      if (last < c.T) p.carry_in = carry.data(), p.dc_n = dc_n_wide.data();
      p.wide_c = true;
      p.sums = sums.data();
      if (first == 0) p.dw_ih = dw_ih.data(), p.dw_hh = dw_hh.data(), p.db = db.data();
      run(kernels.backward, p, threads, true);
      carry = carry_out, dc_n_wide = dc;
    }
  }
};

int wrong = 0;

template <class U>
void same(const char* name, const std::vector<U>& a, const std::vector<U>& b, double tolerance) {
  double most = 0, difference = 0;
  bool finite = true;
  for (size_t k = 0; k < a.size(); ++k) {
    finite = finite && std::isfinite(double(a[k])) && std::isfinite(double(b[k]));
    most = std::max(most, std::fabs(double(a[k])));
    difference = std::max(difference, std::fabs(double(a[k]) - double(b[k])));
  }
  if (finite && difference <= tolerance * most) return;
  std::printf("%s: %s, greatest %g, greatest difference %g\n", name,
              finite ? "finite" : "not finite", most, difference);
  ++wrong;
}

template <class S, class C>
void check(const Case& c, Dtype dtype, double tolerance, const CpuKernels& all) {
  const CpuKernels::Entry& kernels = all[dtype];
  Layer<S, C> one(c, dtype), three(c, dtype);
  one.forward(kernels, 1, false);
  three.forward(kernels, 3, true);  // with and without a reserve
  same("y", one.y, three.y, tolerance);
  same("h_n", one.h_n, three.h_n, tolerance);
  same("c_n", one.c_n, three.c_n, tolerance);
  one.forward(kernels, 1, true);
  one.backward(kernels, 1);
  three.backward(kernels, 3);
  same("dx", one.dx, three.dx, tolerance);
  same("dh0", one.dh0, three.dh0, tolerance);
  same("dc0", one.dc0, three.dc0, tolerance);
  same("dw_ih", one.dw_ih, three.dw_ih, tolerance);
  same("dw_hh", one.dw_hh, three.dw_hh, tolerance);
  same("db", one.db, three.db, tolerance);
  same("dw_hr", one.dw_hr, three.dw_hr, tolerance);
  if (c.full || c.P || c.D > 1) return;
  three.backward_in_pieces(kernels, 3, 2);
  same("dx in pieces", one.dx, three.dx, tolerance);
  same("dw_ih in pieces", one.dw_ih, three.dw_ih, tolerance);
  same("dw_hh in pieces", one.dw_hh, three.dw_hh, tolerance);
  same("db in pieces", one.db, three.db, tolerance);
}

}  // namespace
}  // namespace lstm_cuda::test

int main() {
  using namespace lstm_cuda;
  using namespace lstm_cuda::test;
  const CpuKernels& kernels = LSTM_ISA::kernels;
  for (const Case& c : cases) {
    check<double, double>(c, Dtype::float64, 1e-12, kernels);
    check<float, float>(c, Dtype::float32, 5e-6, kernels);
    check<Half, float>(c, Dtype::float16, 4e-3, kernels);
    check<Bfloat16, float>(c, Dtype::bfloat16, 3e-2, kernels);
  }
  std::printf("%zu layers, %d wrong\n", 4 * std::size(cases), wrong);
  return wrong != 0;
}
