// Compares what families other than rec_step make of other cells with what rec_step makes of them,
// whose results the tests in Python know to be right; and runs them in another order of threads,
// which must not change a bit.
//   variant_families FAMILY ARITHMETIC ORDER SEED [CASE | FIRST/PARTS]
#include <algorithm>
#include <bit>
#include <cstdlib>
#include <cstring>

#include "cuda/cell_norms.h"
#include "cuda/rec_step.cuh"
#include "recurrence_run.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

// What a case has besides the options of its cell.
enum : unsigned {
  kPeephole = 1,
  kNorm = 2,
  kScale = 4,
  kDrawn = 8,  // choices of zoneout; else their mean
  kLengths = 16,
  kReset = 32,
  kStates = 64,
  kGradients = 128,  // all that may come in, and go out
  kWide = 256,       // c0 and its like
};
constexpr unsigned kUsual = kLengths | kReset | kStates | kGradients;

struct VariantCase {
  struct {
    int64_t T, B, D, H;
    uint64_t reversed;
  } sizes;
  unsigned with;
  CellOptions cell;

  bool has(unsigned what) const { return with & what; }
};

using enum Activation;

const VariantCase kCases[] = {
    {{4, 9, 2, 21, 2}, kUsual | kPeephole, {}},
    {{4, 9, 2, 37, 1},
     kUsual | kWide | kPeephole | kScale | kDrawn,
     {.clip = 0.4, .zoneout_h = 0.3, .zoneout_c = 0.4}},
    {{3, 3, 1, 5, 1}, kReset | kStates | kGradients, {.zoneout_h = 0.3, .zoneout_c = 0.2}},
    {{3, 17, 1, 64, 0}, kLengths | kGradients | kPeephole, {.forget = Forget::coupled}},
    {{3, 3, 2, 37, 2},
     kReset | kStates | kScale,
     {.forget = Forget::none, .candidate = softsign, .output = relu, .clip = 0.7}},
    {{2, 9, 1, 100, 0},
     kLengths | kStates | kGradients,
     {.recurrent = hard_sigmoid_keras, .candidate = hard_tanh}},
    {{2, 1, 1, 21, 1},
     kStates | kGradients | kWide | kPeephole | kScale | kDrawn,
     {.recurrent = hard_sigmoid_onnx, .output = identity, .zoneout_c = 0.5}},
    {{3, 3, 1, 21, 0}, kStates | kGradients | kNorm, {}},
    {{4, 9, 2, 37, 2},
     kUsual | kWide | kNorm | kPeephole | kScale | kDrawn,
     {.clip = 0.6, .zoneout_h = 0.3, .zoneout_c = 0.4}},
    {{3, 17, 1, 64, 1},
     kLengths | kReset | kGradients | kNorm | kPeephole,
     {.forget = Forget::coupled, .zoneout_c = 0.3}},
    {{3, 3, 2, 5, 1},
     kLengths | kReset | kStates | kNorm | kScale | kDrawn,
     {.output = softsign, .zoneout_h = 0.4}},
    {{2, 9, 1, 100, 0}, kLengths | kStates | kGradients | kNorm, {.recurrent = hard_sigmoid_onnx}},
    {{2, 1, 1, 128, 1},
     kReset | kStates | kGradients | kNorm | kPeephole | kDrawn,
     {.zoneout_h = 0.5}},
    // As much as possible again, in a size that is there in float64.
    {{4, 9, 2, 27, 1},
     kUsual | kPeephole | kScale | kDrawn,
     {.clip = 0.4, .zoneout_h = 0.3, .zoneout_c = 0.4}},
    {{4, 9, 2, 27, 2},
     kUsual | kNorm | kPeephole | kScale,
     {.forget = Forget::coupled, .clip = 0.6, .zoneout_h = 0.3, .zoneout_c = 0.4}},
};

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
std::string compare(const Results& expected, const Results& results, double bound) {
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
class FamilyRunner {
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
  FamilyRunner(const VariantCase& c, unsigned seed) : c_(c), random_(seed) {
    shape_.dtype = dtype_of(arithmetic);
    const auto& [T, B, D, H, reversed] = c.sizes;
    shape_.T = T, shape_.B = B, shape_.D = D, shape_.H = shape_.P = H;
    shape_.reversed = reversed;
  }

  const LayerShape& shape() const { return shape_; }

  // What went wrong, or nothing.
  std::string run(const Kernels& kernels, const std::string& order, const std::string& seed) {
    const int64_t T = shape_.T, B = shape_.B, D = shape_.D, H = shape_.H, rows = T * B * D;
    const auto wide = static_cast<size_t>(rows * 4 * H);
    set_order("forward", "0");

    std::vector<const void*> w_hh;
    const Elements weights(elements(D * 4 * H * H, 2 / std::sqrt(double(H))));
    for (int64_t d = 0; d < D; ++d) w_hh.push_back(weights.data() + d * 4 * H * H);
    std::vector<int64_t> of_rows;
    for (int64_t b = 0; b < B; ++b)
      of_rows.push_back(b == 0 ? T : b + 1 == B ? 0 : int64_t(random_() % uint64_t(T + 1)));
    std::vector<uint8_t> boundaries;
    for (int64_t k = 0; k < T * B; ++k) boundaries.push_back(random_() % 3 == 0);
    const DeviceBuffer<int64_t> lengths(of_rows),
        seeds(std::vector<int64_t>{0x123456789, 0x987654321});
    const DeviceBuffer<uint8_t> reset(boundaries);
    const std::vector<Compute> h0_values = computes(D * B * H, 1), scales = computes(D * B * H, 2);
    std::vector<Compute> h0_scaled;
    for (size_t k = 0; k < h0_values.size(); ++k)
      h0_scaled.push_back(to_compute(narrow<Element>(h0_values[k])) * scales[k]);
    const Elements h0(narrowed(h0_values)), h_operand(narrowed(h0_scaled));
    const CellState c0(c_.has(kWide), computes(D * B * H, 1));
    const Computes w_p(computes(D * 3 * H, 1)), gains(computes(D * 6 * H, 1)), scale(scales);
    const std::vector<Element> x = elements(rows * 4 * H, 1);
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
    const auto forward = [&](const auto& start, const Elements& saved, const Computes& c,
                             const Computes& of_h, const Computes& of_row, Results& results) {
      const Elements y(size_t(rows * H)), h_n(size_t(D * B * H)), inputs(x);
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
                            gates, cells, normed, rstd, expected);
    if (!status.ok()) return status.message;
    std::string complaint;
    if (kernels.forward) {
      const Computes own_normed(wide), own_rstd(size_t{c_.has(kNorm)} * size_t(rows));
      const Elements own_gates(wide);
      const Computes own_cells(size_t(rows * H));
      status = forward(kernels.forward, own_gates, own_cells, own_normed, own_rstd, usual);
      if (!status.ok()) return status.message;
      complaint += compare(expected, usual, bound_of(arithmetic));
      set_order(order, seed);
      status = forward(kernels.forward, own_gates, own_cells, own_normed, own_rstd, other);
      set_order("forward", "0");
      if (!status.ok()) return status.message;
      if (usual != other) complaint += "the order of threads changes the forward pass; ";
    }

    if (!kernels.backward) return complaint;

    // Backward.
    const Elements dy(elements(rows * H, 1)), dh_n(elements(D * B * H, 1));
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
    const auto backward = [&](const auto& start, Results& results) {
      const Elements dgates(wide), dh0(c_.has(kStates) ? size_t(D * B * H) : 0);
      const CellState dc0(c_.has(kWide), c_.has(kStates) ? size_t(D * B * H) : 0);
      const Computes dgates_x(c_.has(kGradients) ? wide : 0), dmore(earlier);
      b.dgates = dgates.data();
      if (c_.has(kStates)) b.dh0 = dh0.data(), b.dc0 = dc0.data();
      b.dgates_x = c_.has(kGradients) ? dgates_x.data() : nullptr;
      variant.dmore = c_.has(kGradients) ? dmore.data() : nullptr;
      const Status status = start(b);
      results = {result("dgates", dgates), result("dgates_x", dgates_x), result("dh0", dh0),
                 result("dc0", dc0), result("dmore", dmore)};
      return status;
    };
    status =
        backward([&](const RecurrenceBackward& p) { return step(p, rec_step_backward); }, expected);
    if (status.ok()) status = backward(kernels.backward, usual);
    set_order(order, seed);
    if (status.ok()) status = backward(kernels.backward, other);
    if (!status.ok()) return status.message;
    complaint += compare(expected, usual, bound_of(arithmetic));
    if (usual != other) complaint += "the order of threads changes the backward pass; ";
    return complaint;
  }

 private:
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
};

// ---- families: their kernels for a recurrence, or none. Passes that are null are left out ----

using FamilyKernels = std::optional<Kernels> (*)(Arithmetic, const LayerShape&);

std::optional<Kernels> cta_kernels(Arithmetic arithmetic, const LayerShape& shape) {
  const CudaPlan plan = plan_cuda(
      shape, {arithmetic == Arithmetic::tf32, true, int(Family::rec_cta), 0}, {90, 132, 232448});
  if (!plan.possible) return {};
  return Kernels{nullptr,
                 [=](const RecurrenceBackward& p) { return variant_cta_backward(p, plan, {}); },
                 false};
}

FamilyKernels family_of(const std::string& name) {
  if (name == "rec_cta") return cta_kernels;
  return nullptr;
}

}  // namespace

// Of the plain cell, which recurrence.cpp runs: not compiled here.
namespace lstm_cuda {
Status launch_step_forward(const StepForward&, const CudaPlan&, bool, Stream) { std::abort(); }
Status launch_step_backward(const StepBackward&, const CudaPlan&, bool, Stream) { std::abort(); }
}  // namespace lstm_cuda

int main(int argc, char** argv) {
  const FamilyKernels family = argc < 5 ? nullptr : family_of(argv[1]);
  const std::optional<Arithmetic> arithmetic = argc < 5 ? std::nullopt : arithmetic_of(argv[2]);
  if (!family || !arithmetic) return 2;
  const Selection selection(argc > 5 ? argv[5] : "");
  int failed = 0, number = 0;
  for (const VariantCase& c : kCases) {
    const int current = number++;
    if (!selection.has(current, true)) continue;
    const std::string complaint = by_arithmetic(*arithmetic, [&]<Arithmetic a>() -> std::string {
      FamilyRunner<a> runner(c, unsigned(current + 1));
      const std::optional<Kernels> kernels = family(a, runner.shape());
      return kernels ? runner.run(*kernels, argv[3], argv[4]) : "";
    });
    if (complaint.empty()) continue;
    ++failed;
    std::printf("case %d: %s\n", current, complaint.c_str());
  }
  return failed != 0;
}
