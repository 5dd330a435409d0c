// Runs variant_cluster_backward's kernels on what rec_step's forward left, and compares with
// rec_step's backward, whose results the tests in Python know to be right: to rounding, in one
// order of threads, and the bits of another order with those. variant_cluster.cpp has the product's
// shapes, small_variant_cluster.cpp one of few threads.
//   PROGRAM ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#pragma once

#include <cstdlib>

#include "cuda/rec_step.cuh"
#include "recurrence_run.hpp"

namespace lstm_cuda::test {

struct VariantCase {
  int64_t T, B, D, H;
  uint64_t reversed;
  bool lengths, reset, state, all_gradients;
  CellOptions cell;
  bool peephole, norm, h_scale, drawn;
  int tiles = 1;

  bool wide_c() const { return state && reset; }
};

inline constexpr CellOptions kUsual{}, kKept{.clip = 0.3, .zoneout_h = 0.3, .zoneout_c = 0.4},
    kCoupled{.forget = Forget::coupled, .zoneout_h = 0.3},
    kCoupledKept{.forget = Forget::coupled,
                 .output = Activation::softsign,
                 .clip = 0.4,
                 .zoneout_h = 0.5,
                 .zoneout_c = 0.5},
    kNoForget{.forget = Forget::none,
              .recurrent = Activation::hard_sigmoid_onnx,
              .candidate = Activation::softsign,
              .output = Activation::relu},
    kHard{.recurrent = Activation::hard_sigmoid_keras,
          .candidate = Activation::hard_tanh,
          .output = Activation::identity,
          .zoneout_c = 0.2};

inline constexpr VariantCase kVariantCases[] = {
    {4, 9, 2, 100, 2, true, true, true, true, kUsual, true, false, false, false, 2},
    {3, 17, 1, 37, 0, true, false, true, true, kKept, false, false, true, true, 2},
    {4, 5, 1, 129, 1, false, true, false, false, kCoupled, false, false, false, false},
    {3, 9, 1, 256, 0, true, true, true, true, kNoForget, false, false, true, false, 2},
    {3, 1, 1, 128, 0, false, false, true, true, kHard, true, false, true, false},
    {3, 9, 1, 333, 1, true, true, true, true, kCoupledKept, true, false, true, true, 2},
    {4, 9, 2, 100, 2, true, true, true, true, kUsual, false, true, false, false},
    {5, 8, 1, 37, 1, true, true, true, true, kKept, true, true, true, true},
    {3, 17, 1, 256, 0, true, false, false, false, kCoupledKept, false, true, false, false},
    {3, 3, 1, 400, 0, false, true, true, true, kKept, true, true, false, false},
    {3, 1, 1, 129, 1, false, false, true, true, kNoForget, false, true, true, false},
};

// Starts the kernel of a case, or is none.
using BackwardStart = std::function<Status(const RecurrenceBackward&)>;
using VariantChoice =
    std::function<BackwardStart(Arithmetic, const LayerShape&, const VariantCase&)>;

template <Arithmetic arithmetic>
class VariantClusterRunner {
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  using Elements = DeviceBuffer<Element>;
  using Computes = DeviceBuffer<Compute>;

 public:
  VariantClusterRunner(const VariantCase& c, unsigned seed) : c_(c), random_(seed) {
    shape_.dtype = dtype_of(arithmetic);
    shape_.T = c.T, shape_.B = c.B, shape_.D = c.D, shape_.H = shape_.P = c.H;
    shape_.reversed = c.reversed;
  }

  // What went wrong, or nothing.
  std::string run(const VariantChoice& choice, const std::string& order, const std::string& seed) {
    const BackwardStart start = choice(arithmetic, shape_, c_);
    if (!start) return {};
    const auto& [T, B, D, H, reversed, with_lengths, with_reset, state, all_gradients, options,
                 peephole, norm, h_scale, drawn, tiles] = c_;
    const int64_t rows = T * B * D;
    const auto wide = static_cast<size_t>(rows * 4 * H), states = static_cast<size_t>(D * B * H);
    const std::vector<Element> w = elements(D * 4 * H * H, 1 / std::sqrt(double(H)));
    const Elements weights(w);
    std::vector<const void*> w_hh;
    for (int64_t d = 0; d < D; ++d) w_hh.push_back(weights.data() + d * 4 * H * H);
    for (int64_t b = 0; b < B; ++b)
      lengths_.push_back(b == 0 ? T : b + 1 == B ? 0 : int64_t(random_() % uint64_t(T + 1)));
    for (int64_t k = 0; k < T * B; ++k) reset_.push_back(random_() % 4 == 0);
    const DeviceBuffer<int64_t> lengths(lengths_),
        seeds(std::vector<int64_t>{0x123456789, 0x987654321});
    const DeviceBuffer<uint8_t> reset(reset_);
    const Elements h0(elements(D * B * H, 0.5)), gates(elements(rows * 4 * H, 1));
    const CellState c0(wide_c(), draw(D * B * H, 1));
    const Computes gates_x(computes(rows * 4 * H)), w_p(computes(D * 3 * H)),
        gains(computes(D * 6 * H));
    const std::vector<Compute> scales = computes(D * B * H);
    const Computes scale(scales), normed(wide), rstd(static_cast<size_t>(rows));
    const Elements y(static_cast<size_t>(rows * H)), h_n(states), saved(wide);
    const CellState c_n(wide_c(), states);
    const Computes cells(static_cast<size_t>(rows * H));

    Variant variant{};
    variant.cell = options;
    variant.peephole = peephole ? w_p.data() : nullptr;
    variant.norm = norm ? gains.data() : nullptr;
    variant.h_scale = h_scale ? scale.data() : nullptr;
    variant.seed = drawn ? seeds.data() : nullptr;
    variant.first_step = 3;
    variant.normed = norm ? normed.data() : nullptr;
    variant.rstd = norm ? rstd.data() : nullptr;
    RecurrenceForward f{};
    f.shape = shape_;
    f.w_hh = w_hh.data();
    f.h0 = state ? h0.data() : nullptr, f.c0 = state ? c0.data() : nullptr;
    f.h_operand = state && h_scale ? h0.data() : nullptr;
    f.lengths = with_lengths ? lengths.data() : nullptr;
    f.reset = with_reset ? reset.data() : nullptr;
    f.gates = norm ? saved.data() : gates.data();
    f.gates_x = norm ? gates_x.data() : nullptr;
    f.save = true, f.wide_c = wide_c();
    f.y = y.data(), f.h_n = h_n.data(), f.c_n = c_n.data(), f.c = cells.data();
    f.variant = &variant;
    set_order("forward", "0");
    Status status = step(f, rec_step_forward, false);
    if (!status.ok()) return status.message;

    const std::vector<Element> dh_last = elements(D * B * H, 1);
    const Elements dy(elements(rows * H, 1)), dh_n(dh_last);
    const CellState dc_n(wide_c(), draw(D * B * H, 1));
    const Computes dc(computes(rows * H));
    const Computes c_norms(norms_of_c(f));
    RecurrenceBackward b{};
    b.shape = shape_;
    b.w_hh = f.w_hh, b.c0 = f.c0, b.lengths = f.lengths, b.reset = f.reset;
    b.gates = f.gates, b.c = cells.data(), b.dy = dy.data(), b.wide_c = f.wide_c;
    if (all_gradients) b.dh_n = dh_n.data(), b.dc_n = dc_n.data(), b.dc = dc.data();
    b.c_norms = norm ? c_norms.data() : nullptr;

    const std::vector<Compute> before = computes(D * B * ((peephole ? 3 : 0) + (norm ? 6 : 0)) * H);
    const auto result_of = [&](bool of_step, const auto& call) {
      const Elements dgates(wide), dh0(states);
      const CellState dc0(wide_c(), states);
      const Computes dgates_x(wide), dmore(before), dh_kept(states);
      Variant with = variant;
      with.dmore = before.empty() ? nullptr : dmore.data();
      RecurrenceBackward p = b;
      p.variant = &with;
      p.dgates = dgates.data(), p.dgates_x = dgates_x.data(), p.dc0 = dc0.data();
      p.dh0 = of_step ? dh0.data() : nullptr, p.dh_kept = of_step ? nullptr : dh_kept.data();
      status = call(p);
      Results r{values(dgates), values(dgates_x), values(dmore),
                dc0.values(),   values(dh0),      values(dh_kept)};
      for (size_t k = 0; k < before.size(); ++k) r.dmore[k] -= double(before[k]);
      return r;
    };
    Results expected = result_of(
        true, [&](const RecurrenceBackward& p) { return step(p, rec_step_backward, true); });
    if (!status.ok()) return status.message;
    Results got = result_of(false, start);
    if (!status.ok()) return status.message;
    set_order(order, seed);
    const Results again = result_of(false, start);
    if (!status.ok()) return status.message;

    if (!got.same(again)) complaint_ += "the order of threads changes it; ";
    got.dh0 = dh0_of(got, w, h_scale ? scales : std::vector<Compute>{}, dh_last);
    if (norm)
      for (Results* each : {&got, &expected}) before_rstd(each->dgates, values(rstd));
    check("dgates", got.dgates, expected.dgates);
    check("dgates_x", got.dgates_x, expected.dgates_x);
    check("dmore", got.dmore, expected.dmore);
    check("dc0", got.dc0, expected.dc0);
    check("dh0", got.dh0, expected.dh0);
    return complaint_;
  }

 private:
  struct Results {
    Values dgates, dgates_x, dmore, dc0, dh0, dh_kept;

    bool same(const Results& other) const {
      const auto bits = [](const Values& a, const Values& b) {
        return a.empty() || std::memcmp(a.data(), b.data(), a.size() * sizeof(double)) == 0;
      };
      return bits(dgates, other.dgates) && bits(dgates_x, other.dgates_x) &&
             bits(dmore, other.dmore) && bits(dc0, other.dc0) && bits(dh_kept, other.dh_kept);
    }
  };

  // In Compute, or in Element.
  class CellState {
   public:
    CellState(bool wide, size_t count) : narrow_(wide ? 0 : count), wide_(wide ? count : 0) {}
    CellState(bool wide, const Values& given)
        : narrow_(wide ? std::vector<Element>{} : rounded(given)),
          wide_(wide ? std::vector<Compute>(given.begin(), given.end()) : std::vector<Compute>{}) {}

    void* data() const { return wide_.bytes() ? static_cast<void*>(wide_.data()) : narrow_.data(); }
    Values values() const {
      return wide_.bytes() ? VariantClusterRunner::values(wide_)
                           : VariantClusterRunner::values(narrow_);
    }

   private:
    Elements narrow_;
    Computes wide_;
  };

  bool wide_c() const { return c_.wide_c(); }

  template <class Params, class Kernels>
  Status step(const Params& p, Kernels kernels, bool backward) const {
    CudaRequest request{arithmetic == Arithmetic::tf32, backward, int(Family::rec_step), 0};
    request.cell = kind_of(p.variant);
    const CudaPlan plan = plan_cuda(shape_, request, {90, 132, 232448});
    const DeviceBuffer<char> scratch(size_t(rec_step_scratch(shape_, plan, p.variant, backward)));
    return kernels(p, plan, scratch.data(), {});
  }

  Schedule schedule(int64_t d) const {
    return schedule_of(shape_, d, c_.lengths ? lengths_.data() : nullptr,
                       c_.reset ? reset_.data() : nullptr);
  }

  // What families with resident weights are given besides: of c before zoneout, mean and 1 / std.
  std::vector<Compute> norms_of_c(const RecurrenceForward& f) const {
    std::vector<Compute> all;
    const auto* const gates = static_cast<const Element*>(f.gates);
    const auto* const c = static_cast<const Compute*>(f.c);
    const int64_t B = c_.B, D = c_.D, H = c_.H;
    for (int64_t row = 0; row < c_.T * B * D; ++row) {
      const int64_t t = row / D / B, b = row / D % B, d = row % D;
      const Schedule of = schedule(d);
      const int64_t previous = of.active(t, b) ? of.previous(t, b) : -1;
      const bool none = !of.active(t, b) || of.fresh(t, b);
      Values own;
      for (int64_t j = 0; j < H; ++j) {
        const auto gate = [&](int64_t k) { return to_compute(gates[(row * 4 + k) * H + j]); };
        const Compute before = none ? Compute(0)
                               : previous >= 0
                                   ? c[((previous * B + b) * D + d) * H + j]
                                   : load_either<arithmetic>(f.c0, f.wide_c, (d * B + b) * H + j);
        const Cell<Compute> cell{gate(0), gate(1), gate(2), gate(3), 0, 0};
        own.push_back(
            double(c_.cell.zoneout_c > 0 ? variant_state(c_.cell, cell, before) : c[row * H + j]));
      }
      double mean = 0, variance = 0;
      for (const double v : own) mean += v / double(H);
      for (const double v : own) variance += (v - mean) * (v - mean) / double(H);
      all.push_back(Compute(mean)), all.push_back(Compute(1 / std::sqrt(variance + kNormEpsilon)));
    }
    return all;
  }

  // dh0 as others make it of a row's first step.
  Values dh0_of(const Results& r, const std::vector<Element>& w, const std::vector<Compute>& scales,
                const std::vector<Element>& dh_last) const {
    const int64_t B = c_.B, D = c_.D, H = c_.H;
    Values dh0(size_t(D * B * H), 0);
    for (int64_t d = 0; d < D; ++d)
      for (int64_t b = 0; b < B; ++b) {
        const Schedule of = schedule(d);
        const size_t to = size_t((d * B + b) * H);
        const bool any = of.length(b) > 0;
        const int64_t first = any ? of.first(b) : 0;
        for (int64_t row = 0; any && !of.fresh(first, b) && row < 4 * H; ++row) {
          const double dgate = r.dgates[size_t(((first * B + b) * D + d) * 4 * H + row)];
          for (int64_t j = 0; j < H; ++j)
            dh0[to + size_t(j)] += dgate * double(to_compute(w[size_t((d * 4 * H + row) * H + j)]));
        }
        for (size_t k = to; k < to + size_t(H); ++k) {
          if (!scales.empty()) dh0[k] *= double(scales[k]);
          dh0[k] += r.dh_kept[k];
          if (!any && c_.all_gradients) dh0[k] += double(to_compute(dh_last[k]));
        }
      }
    return dh0;
  }

  // Where no h came in, rstd is so large that next to these rows others would not be seen.
  void before_rstd(Values& dgates, const Values& rstd) const {
    for (size_t k = 0; k < dgates.size(); ++k) {
      const size_t row = k / size_t(4 * c_.H);
      if (schedule(0).active(int64_t(row) / c_.D / c_.B, int64_t(row) / c_.D % c_.B))
        dgates[k] /= rstd[row];
    }
  }

  Values draw(int64_t count, double scale) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    Values result(static_cast<size_t>(count));
    for (double& v : result) v = uniform(random_);
    return result;
  }
  static std::vector<Element> rounded(const Values& given) {
    std::vector<Element> result;
    for (const double v : given) result.push_back(narrow<Element>(v));
    return result;
  }
  std::vector<Element> elements(int64_t count, double scale) { return rounded(draw(count, scale)); }
  std::vector<Compute> computes(int64_t count) {
    const Values drawn = draw(count, 1);
    return {drawn.begin(), drawn.end()};
  }
  template <class T>
  static Values values(const DeviceBuffer<T>& buffer) {
    Values result;
    for (const T& v : buffer.values()) result.push_back(double(to_compute(v)));
    return result;
  }

  void check(const char* name, const Values& got, const Values& expected) {
    double difference = 0, norm = 0;
    for (size_t k = 0; k < expected.size(); ++k) {
      difference += std::pow(got[k] - expected[k], 2);
      norm += expected[k] * expected[k];
    }
    const double error = std::sqrt(difference / norm);
    if (error <= bound_of(arithmetic) || (norm == 0 && difference == 0)) return;
    char text[128];
    std::snprintf(text, sizeof text, "%s is wrong by %.2g; ", name, error);
    complaint_ += text;
  }

  VariantCase c_;
  LayerShape shape_{};
  std::mt19937 random_;
  std::vector<int64_t> lengths_;
  std::vector<uint8_t> reset_;
  std::string complaint_;
};

inline int variant_cluster_main(int argc, char** argv, const VariantChoice& choice) {
  const std::optional<Arithmetic> arithmetic = argc < 4 ? std::nullopt : arithmetic_of(argv[1]);
  if (!arithmetic) return 2;
  const Selection selection(argc > 4 ? argv[4] : "");
  int failed = 0, number = 0;
  for (const VariantCase& c : kVariantCases) {
    const int current = number++;
    if (!selection.has(current, true)) continue;
    const std::string complaint = by_arithmetic(*arithmetic, [&]<Arithmetic a>() {
      return VariantClusterRunner<a>(c, unsigned(current + 1)).run(choice, argv[2], argv[3]);
    });
    if (complaint.empty()) continue;
    ++failed;
    std::printf("case %d: %s\n", current, complaint.c_str());
  }
  return failed != 0;
}

}  // namespace lstm_cuda::test
