// What families other than rec_step make of other cells, compared with what rec_step makes of them, whose
// results the tests in Python know to be right; and again in another order of threads, which must not
// change a bit.
#pragma once

#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "cuda/cell_norms.h"
#include "cuda/rec_step.cuh"
#include "recurrence_run.hpp"
#include "variant_cases.hpp"

namespace lstm_cuda::test {

// A result that is not there is empty.
struct Result {
  const char* name;
  std::vector<double> values;

  bool operator==(const Result& other) const {
    const auto bits = [](double v) { return std::bit_cast<uint64_t>(v); };
    return std::ranges::equal(values, other.values, {}, bits, bits);
  }
};
using Results = std::vector<Result>;

// What is wrong with results. Where nothing is expected, nothing may be written.
inline std::string compare(const Results& expected, const Results& results, double bound) {
  std::string complaint;
  for (size_t n = 0; n < expected.size(); ++n) {
    double difference = 0, norm = 0;
    for (size_t k = 0; k < expected[n].values.size(); ++k) {
      const double e = expected[n].values[k], v = results[n].values[k];
      if (std::isnan(e) && std::isnan(v)) continue;
      difference += (v - e) * (v - e);
      norm += e * e;
    }
    if (std::sqrt(difference) <= bound * std::sqrt(norm)) continue;
    char text[128];
    std::snprintf(text, sizeof text, "%s is wrong by %.2g; ", expected[n].name,
                  std::sqrt(difference / norm));
    complaint += text;
  }
  return complaint;
}

template <Arithmetic arithmetic>
class VariantRunner {
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  using Elements = DeviceBuffer<Element>;
  using Computes = DeviceBuffer<Compute>;

  // c0 and what else has its type, drawn or to be written.
  struct CellState {
    bool wide;
    Elements narrow_values;
    Computes wide_values;

    CellState(bool is_wide, size_t count)
        : wide(is_wide), narrow_values(is_wide ? 0 : count), wide_values(is_wide ? count : 0) {}
    CellState(bool is_wide, const std::vector<Compute>& values)
        : wide(is_wide),
          narrow_values(is_wide ? std::vector<Element>{} : narrowed(values)),
          wide_values(is_wide ? values : std::vector<Compute>{}) {}
    void* data() const {
      return wide ? static_cast<void*>(wide_values.data()) : narrow_values.data();
    }
  };

 public:
  VariantRunner(const VariantCase& c, unsigned seed) : c_(c), random_(seed) {
    shape_.dtype = dtype_of(arithmetic);
    const auto& [T, B, D, H, reversed] = c.sizes;
    shape_.T = T, shape_.B = B, shape_.D = D, shape_.H = shape_.P = H;
    shape_.reversed = reversed;
  }

  const LayerShape& shape() const { return shape_; }

  // What went wrong, or nothing.
  std::string run(const Kernels& kernels, const std::string& order, const std::string& seed) {
    const bool resident = kernels.resident;
    const int64_t T = shape_.T, B = shape_.B, D = shape_.D, H = shape_.H, rows = T * B * D;
    const auto wide = static_cast<size_t>(rows * 4 * H);
    set_order("forward", "0");

    std::vector<const void*> w_hh;
    w_hh_ = elements(D * 4 * H * H, 2 / std::sqrt(double(H)));
    const Elements weights(w_hh_);
    for (int64_t d = 0; d < D; ++d) w_hh.push_back(weights.data() + d * 4 * H * H);
    for (int64_t b = 0; b < B; ++b)
      lengths_.push_back(b == 0 ? T : b + 1 == B ? 0 : int64_t(random_() % uint64_t(T + 1)));
    for (int64_t k = 0; k < T * B; ++k) reset_.push_back(random_() % 3 == 0);
    const DeviceBuffer<int64_t> lengths(lengths_),
        seeds(std::vector<int64_t>{0x123456789, 0x987654321});
    const DeviceBuffer<uint8_t> reset(reset_);
    const std::vector<Compute> h0_values = computes(D * B * H, 1), scales = computes(D * B * H, 2);
    std::vector<Compute> h0_scaled;
    for (size_t k = 0; k < h0_values.size(); ++k)
      h0_scaled.push_back(to_compute(narrow<Element>(h0_values[k])) * scales[k]);
    const Elements h0(narrowed(h0_values)), h_operand(narrowed(h0_scaled));
    const CellState c0(c_.has(kWide), computes(D * B * H, 1));
    const Computes w_p(computes(D * 3 * H, 1)), gains(computes(D * 6 * H, 1)), scale(scales);
    const std::vector<Element> x = elements(rows * 4 * H, 1);
    const Values product = initial_product(narrowed(c_.has(kScale) ? h0_scaled : h0_values));
    const Elements x_alone(x), x_with_h0(with_initial_product(x, product)),
        h0_product(narrowed({product.begin(), product.end()}));
    const Computes gates_x(computes(rows * 4 * H, 1));

    Variant variant{};
    variant.cell = c_.cell;
    variant.peephole = c_.has(kPeephole) ? w_p.data() : nullptr;
    variant.norm = c_.has(kNorm) ? gains.data() : nullptr;
    variant.h_scale = c_.has(kScale) ? scale.data() : nullptr;
    variant.seed = c_.has(kDrawn) ? seeds.data() : nullptr;
    variant.first_step = 5;

    // Forward; what the last run of it keeps is for the backward pass.
    const Computes normed(wide), rstd(size_t{c_.has(kNorm)} * size_t(rows));
    const Elements gates(wide);
    const Computes cells(size_t(rows * H));
    RecurrenceForward f{};
    f.shape = shape_;
    f.w_hh = w_hh.data();
    if (c_.has(kStates)) f.h0 = h0.data(), f.c0 = c0.data();
    if (c_.has(kStates) && c_.has(kScale)) f.h_operand = h_operand.data();
    if (c_.has(kLengths)) f.lengths = lengths.data();
    if (c_.has(kReset)) f.reset = reset.data();
    f.save = true, f.wide_c = c_.has(kWide);
    f.variant = &variant;
    const auto forward = [&](const auto& start, const Elements& given, const Elements& saved,
                             const Computes& c, const Computes& of_h, const Computes& of_row,
                             Results& results) {
      const Elements y(size_t(rows * H)), h_n(size_t(D * B * H)), inputs(given.values());
      const CellState c_n(c_.has(kWide), size_t(D * B * H));
      f.gates = c_.has(kNorm) ? saved.data() : inputs.data();
      f.gates_x = c_.has(kNorm) ? gates_x.data() : nullptr;
      f.y = y.data(), f.h_n = h_n.data(), f.c_n = c_n.data(), f.c = c.data();
      if (c_.has(kNorm)) variant.normed = of_h.data(), variant.rstd = of_row.data();
      const Status status = start(f);
      if (!c_.has(kNorm)) std::memcpy(saved.data(), inputs.data(), inputs.bytes());
      results = {result("y", y),         result("h_n", h_n), result("c_n", c_n),
                 result("gates", saved), result("c", c),     result("normed", of_h),
                 result("rstd", of_row)};
      return status;
    };
    Results expected, usual, other;
    Status status = forward([&](const RecurrenceForward& p) { return step(p, rec_step_forward); },
                            x_alone, gates, cells, normed, rstd, expected);
    if (!status.ok()) return status.message;
    std::string complaint;
    if (kernels.forward) {
      const Computes own_normed(wide), own_rstd(size_t{c_.has(kNorm)} * size_t(rows));
      const Elements own_gates(wide);
      const Computes own_cells(size_t(rows * H));
      const Elements& given = resident && c_.has(kStates) ? x_with_h0 : x_alone;
      if (resident && f.h0 && c_.has(kNorm)) f.h0_product = h0_product.data();
      status = forward(kernels.forward, given, own_gates, own_cells, own_normed, own_rstd, usual);
      if (!status.ok()) return status.message;
      complaint += compare(expected, usual, bound_of(arithmetic));
      set_order(order, seed);
      status = forward(kernels.forward, given, own_gates, own_cells, own_normed, own_rstd, other);
      set_order("forward", "0");
      if (!status.ok()) return status.message;
      if (usual != other) complaint += "the order of threads changes the forward pass; ";
    }

    // Backward.
    const std::vector<Element> of_h_n = elements(D * B * H, 1);
    const Elements dy(elements(rows * H, 1)), dh_n(of_h_n);
    const CellState dc_n(c_.has(kWide), computes(D * B * H, 1));
    const Computes dc(computes(rows * H, 1)), c_norms(size_t(2 * rows));
    const std::vector<Compute> earlier = computes(D * B * 9 * H, 0.01);  // what is added to
    if (c_.has(kNorm)) {
      status = cell_norms(shape_, variant, gates.data(), cells.data(), f.c0, f.wide_c, f.lengths,
                          f.reset, c_norms.data(), {});
      if (!status.ok()) return status.message;
      variant.normed = normed.data(), variant.rstd = rstd.data();
    }
    RecurrenceBackward b{};
    b.shape = shape_;
    b.w_hh = f.w_hh, b.c0 = f.c0, b.lengths = f.lengths, b.reset = f.reset;
    b.gates = gates.data(), b.c = cells.data(), b.wide_c = f.wide_c;
    b.dy = dy.data();
    if (c_.has(kGradients)) b.dh_n = dh_n.data(), b.dc_n = dc_n.data(), b.dc = dc.data();
    b.variant = &variant;
    b.c_norms = c_.has(kNorm) ? c_norms.data() : nullptr;
    const auto backward = [&](const auto& start, bool finds_dh0, Results& results) {
      const auto states = c_.has(kStates) ? size_t(D * B * H) : 0;
      const Elements dgates(wide), dh0(states);
      const CellState dc0(c_.has(kWide), states);
      const Computes dgates_x(c_.has(kGradients) ? wide : 0), dmore(earlier), kept(states);
      b.dgates = dgates.data();
      b.dh0 = c_.has(kStates) && finds_dh0 ? dh0.data() : nullptr;
      b.dc0 = c_.has(kStates) ? dc0.data() : nullptr;
      b.dh_kept = c_.has(kStates) && !finds_dh0 ? kept.data() : nullptr;
      b.dgates_x = c_.has(kGradients) ? dgates_x.data() : nullptr;
      variant.dmore = c_.has(kGradients) ? dmore.data() : nullptr;
      const Status status = start(b);
      results = {result("dgates", dgates), result("dgates_x", dgates_x), result("dh0", dh0),
                 result("dc0", dc0), result("dmore", dmore)};
      if (c_.has(kStates) && !finds_dh0)
        results[2].values = dh0_of(results[0].values, result("", kept).values, scales, of_h_n);
      if (c_.has(kNorm)) before_rstd(results[0].values, result("", rstd).values);
      for (size_t k = 0; k < results[4].values.size(); ++k)
        results[4].values[k] -= double(earlier[k]);
      return status;
    };
    status = backward([&](const RecurrenceBackward& p) { return step(p, rec_step_backward); }, true,
                      expected);
    if (status.ok()) status = backward(kernels.backward, !resident, usual);
    set_order(order, seed);
    if (status.ok()) status = backward(kernels.backward, !resident, other);
    if (!status.ok()) return status.message;
    complaint += compare(expected, usual, bound_of(arithmetic));
    if (usual != other) complaint += "the order of threads changes the backward pass; ";
    return complaint;
  }

 private:
  Schedule schedule(int64_t d) const {
    return schedule_of(shape_, d, c_.has(kLengths) ? lengths_.data() : nullptr,
                       c_.has(kReset) ? reset_.data() : nullptr);
  }
  double weight(int64_t d, int64_t row, int64_t k) const {
    return double(to_compute(w_hh_[size_t((d * 4 * shape_.H + row) * shape_.H + k)]));
  }
  // Calls visit(d, b, t) for each row's first step, unless no state crosses into it.
  template <class Visit>
  void each_first_step(Visit visit) const {
    for (int64_t d = 0; d < shape_.D; ++d)
      for (int64_t b = 0; b < shape_.B; ++b) {
        const Schedule of = schedule(d);
        if (of.length(b) > 0 && !of.fresh(of.first(b), b)) visit(d, b, of.first(b));
      }
  }

  // What families with resident weights leave to others: w_hh h0 [D, B, 4H], and
  Values initial_product(const std::vector<Element>& h0) const {
    const int64_t B = shape_.B, H = shape_.H;
    Values product(size_t(shape_.D * B * 4 * H), 0);
    for (size_t n = 0; n < product.size(); ++n) {
      const int64_t row = int64_t(n) % (4 * H), of_state = int64_t(n) / (4 * H);
      for (int64_t k = 0; k < H; ++k)
        product[n] +=
            weight(of_state / B, row, k) * double(to_compute(h0[size_t(of_state * H + k)]));
    }
    return product;
  }
  // that in gates_x of first steps;
  std::vector<Element> with_initial_product(std::vector<Element> x, const Values& product) const {
    const int64_t B = shape_.B, D = shape_.D, G = 4 * shape_.H;
    each_first_step([&](int64_t d, int64_t b, int64_t t) {
      for (int64_t row = 0; row < G; ++row) {
        Element& to = x[size_t(((t * B + b) * D + d) * G + row)];
        to = narrow<Element>(double(to_compute(to)) + product[size_t((d * B + b) * G + row)]);
      }
    });
    return x;
  }
  // dh0 from dgates of these, and what zoneout kept for it.
  Values dh0_of(const Values& dgates, const Values& kept, const std::vector<Compute>& scales,
                const std::vector<Element>& dh_n) const {
    const int64_t B = shape_.B, D = shape_.D, H = shape_.H;
    Values dh0(kept.size(), 0);
    for (size_t k = 0; k < dh0.size(); ++k)
      if (c_.has(kGradients) && schedule(0).length(int64_t(k) / H % B) == 0)
        dh0[k] = double(to_compute(dh_n[k]));
    each_first_step([&](int64_t d, int64_t b, int64_t t) {
      for (int64_t j = 0; j < H; ++j) {
        const auto at = size_t((d * B + b) * H + j);
        for (int64_t row = 0; row < 4 * H; ++row)
          dh0[at] += dgates[size_t(((t * B + b) * D + d) * 4 * H + row)] * weight(d, row, j);
        dh0[at] = dh0[at] * (c_.has(kScale) ? double(scales[at]) : 1) + kept[at];
      }
    });
    return dh0;
  }

  // Where no h came in, rstd is so large that next to these rows others would not be seen.
  void before_rstd(Values& dgates, const Values& rstd) const {
    for (size_t k = 0; k < dgates.size(); ++k) {
      const auto row = int64_t(k) / (4 * shape_.H);
      if (schedule(0).active(row / shape_.D / shape_.B, row / shape_.D % shape_.B))
        dgates[k] /= rstd[size_t(row)];
    }
  }

  template <class Params, class Start>
  Status step(const Params& p, Start start) const {
    constexpr bool backward = std::is_same_v<Params, RecurrenceBackward>;
    CudaRequest request{arithmetic == Arithmetic::tf32, backward, int(Family::rec_step), 0};
    request.cell = kind_of(p.variant);
    const CudaPlan plan = plan_cuda(shape_, request, {90, 132, 232448});
    const DeviceBuffer<char> scratch(size_t(rec_step_scratch(shape_, plan, p.variant, backward)));
    return start(p, plan, scratch.data(), {});
  }

  std::vector<Compute> computes(int64_t count, double scale) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    std::vector<Compute> values;
    for (int64_t k = 0; k < count; ++k) values.push_back(Compute(uniform(random_)));
    return values;
  }
  static std::vector<Element> narrowed(const std::vector<Compute>& values) {
    std::vector<Element> result;
    for (const Compute v : values) result.push_back(narrow<Element>(v));
    return result;
  }
  std::vector<Element> elements(int64_t count, double scale) {
    return narrowed(computes(count, scale));
  }

  template <class T>
  static Result result(const char* name, const DeviceBuffer<T>& buffer) {
    Result result{name, {}};
    for (const T& v : buffer.values()) result.values.push_back(double(to_compute(v)));
    return result;
  }
  static Result result(const char* name, const CellState& state) {
    return state.wide ? result(name, state.wide_values) : result(name, state.narrow_values);
  }

  VariantCase c_;
  LayerShape shape_{};
  std::mt19937 random_;
  std::vector<Element> w_hh_;
  std::vector<int64_t> lengths_;
  std::vector<uint8_t> reset_;
};

// A family's kernels for a case, or none.
using FamilyKernels = std::optional<Kernels> (*)(Arithmetic, const LayerShape&, const VariantCase&);

// A program's main, whose arguments are ARITHMETIC ORDER SEED [CASE | FIRST/PARTS].
inline int variants_main(int argc, char** argv, FamilyKernels family) {
  const std::optional<Arithmetic> arithmetic = argc < 4 ? std::nullopt : arithmetic_of(argv[1]);
  if (!arithmetic) return 2;
  const Selection selection(argc > 4 ? argv[4] : "");
  int failed = 0, number = 0;
  for (const VariantCase& c : kVariantCases) {
    const int current = number++;
    if (!selection.has(current, true)) continue;
    const std::string complaint = by_arithmetic(*arithmetic, [&]<Arithmetic a>() -> std::string {
      VariantRunner<a> runner(c, unsigned(current + 1));
      const std::optional<Kernels> kernels = family(a, runner.shape(), c);
      return kernels ? runner.run(*kernels, argv[2], argv[3]) : "";
    });
    if (complaint.empty()) continue;
    ++failed;
    std::printf("case %d: %s\n", current, complaint.c_str());
  }
  return failed != 0;
}

}  // namespace lstm_cuda::test

// Of the plain cell, which other programs run: not compiled here.
namespace lstm_cuda {
Status launch_step_forward(const StepForward&, const CudaPlan&, bool, Stream) { std::abort(); }
Status launch_step_backward(const StepBackward&, const CudaPlan&, bool, Stream) { std::abort(); }
}  // namespace lstm_cuda
