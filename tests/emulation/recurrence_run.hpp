// Runs the recurrence kernels, forward and backward, on a Problem and compares.
#pragma once

#include <cmath>
#include <cstdio>
#include <functional>
#include <memory>
#include <optional>
#include <random>
#include <string>
#include <type_traits>
#include <vector>

#include "cuda/element.cuh"
#include "cuda/families.h"
#include "cuda/pack.h"
#include "memory.hpp"
#include "recurrence_problem.hpp"

namespace lstm_cuda::test {

using emulation::DeviceBuffer;

// What is tested.
struct Kernels {
  std::function<Status(const RecurrenceForward&)> forward;
  std::function<Status(const RecurrenceBackward&)> backward;
  bool resident;  // h0 is in the first step's gates_x, and dh0 is not theirs
};
// The kernels for a problem, or none.
using Choice = std::function<std::optional<Kernels>(Arithmetic, const LayerShape&, const Case&)>;

// Calls start(weights, words) with packed weights and zeroed words.
template <class Params, class Start>
Status with_packed(const Params& p, const CudaPlan& plan, int64_t word_bytes, Start start) {
  constexpr bool backward = std::is_same_v<Params, RecurrenceBackward>;
  const auto bytes = static_cast<size_t>(packed_bytes(p.shape, plan, backward));
  const DeviceBuffer<char> packed(bytes), words(static_cast<size_t>(word_bytes));
  emulation::settings().watched = false;  // for its races pack.cpp looks
  const Status status = pack_weights(p.shape, plan, backward, p.w_hh, packed.data(),
                                     word_bytes ? words.data() : nullptr, word_bytes, {});
  emulation::settings().watched = true;
  if (!status.ok()) return status;
  return start(packed_weights(p.shape, plan, backward, packed.data()), words.data());
}

template <class Element>
Element narrow(double v) {
  if constexpr (std::is_same_v<Element, double>)
    return v;
  else
    return to_element<Element>(float(v));
}

constexpr Dtype dtype_of(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::float64    ? Dtype::float64
         : arithmetic == Arithmetic::float16  ? Dtype::float16
         : arithmetic == Arithmetic::bfloat16 ? Dtype::bfloat16
                                              : Dtype::float32;
}

// Bound of norm(out - expected) / norm(expected).
constexpr double bound_of(Arithmetic arithmetic) {
  return arithmetic == Arithmetic::float64    ? 1e-12
         : arithmetic == Arithmetic::float32  ? 5e-6
         : arithmetic == Arithmetic::bfloat16 ? 3e-2
         : arithmetic == Arithmetic::float16  ? 4e-3
                                              : 2e-3;
}

template <Arithmetic arithmetic>
class Runner {
  using Element = typename Types<arithmetic>::Element;
  using Compute = typename Types<arithmetic>::Compute;
  using Elements = DeviceBuffer<Element>;
  using Computes = DeviceBuffer<Compute>;
  static constexpr bool kNarrow = arithmetic == Arithmetic::float16;  // exponents of five bits

 public:
  Runner(const Case& c, unsigned seed) : random_(seed) {
    p_.c = c;
    p_.P = c.P ? c.P : c.H;
    const double scale = 1 / std::sqrt(double(c.H));
    const int64_t rows = c.T * c.B * c.D;
    p_.gates_x = draw(rows * 4 * c.H, 1);
    p_.w_hh = draw(c.D * 4 * c.H * p_.P, scale);
    p_.w_hr = draw(c.P ? c.D * p_.P * c.H : 1, scale);
    p_.h0 = draw(c.D * c.B * p_.P, 1), p_.c0 = draw(c.D * c.B * c.H, 1);
    p_.dy = draw(rows * p_.P, 1), p_.dh_n = draw(c.D * c.B * p_.P, 1);
    p_.dc_n = draw(c.D * c.B * c.H, 1), p_.dc = draw(rows * c.H, 1);
    for (int64_t b = 0; b < c.B; ++b) p_.lengths.push_back(int64_t(random_() % uint64_t(c.T + 1)));
    p_.lengths.front() = c.T;
    if (c.B > 1) p_.lengths.back() = 0;
    for (int64_t k = 0; k < c.T * c.B; ++k) p_.reset.push_back(random_() % 4 == 0);
    make_hard();
    for (Values* all : {&p_.gates_x, &p_.w_hh, &p_.w_hr, &p_.h0, &p_.dy, &p_.dh_n})
      for (double& v : *all) v = double(to_compute(narrow<Element>(v)));
    for (Values* all : {&p_.c0, &p_.dc_n})
      for (double& v : *all)
        v = c.wide_c() ? double(Compute(v)) : double(to_compute(narrow<Element>(v)));
    for (double& v : p_.dc) v = double(Compute(v));
    p_.forward();
    p_.backward();
  }

  // What went wrong, or nothing.
  std::string run(const Choice& choice) {
    const Case& c = p_.c;
    LayerShape shape{};
    shape.dtype = dtype_of(arithmetic);
    shape.T = c.T, shape.B = c.B, shape.D = c.D, shape.H = c.H, shape.P = p_.P;
    shape.reversed = c.reversed, shape.projected = c.P != 0;
    const std::optional<Kernels> kernels = choice(arithmetic, shape, c);
    if (!kernels) return {};

    std::vector<const void*> w_hh, w_hr;
    std::vector<std::unique_ptr<Elements>> weights;
    for (int64_t d = 0; d < c.D; ++d) {
      const auto part = [&](const Values& all, int64_t size) {
        const Values one(all.begin() + d * size, all.begin() + (d + 1) * size);
        weights.push_back(std::make_unique<Elements>(elements(one)));
        return weights.back()->data();
      };
      w_hh.push_back(part(p_.w_hh, 4 * c.H * p_.P));
      if (c.P) w_hr.push_back(part(p_.w_hr, p_.P * c.H));
    }
    const Elements h0(elements(p_.h0));
    const CellState c0(c, p_.c0);
    const Elements gates(elements(kernels->resident ? p_.gates_with_h0() : p_.gates_x));
    const DeviceBuffer<int64_t> lengths(p_.lengths);
    const DeviceBuffer<uint8_t> reset(p_.reset);
    const Elements y(p_.y.size()), h_n(p_.h_n.size());
    const CellState c_n(c, p_.c_n.size());
    const Computes cells(p_.cells.size());

    RecurrenceForward f{};
    f.shape = shape;
    f.w_hh = w_hh.data(), f.w_hr = c.P ? w_hr.data() : nullptr;
    f.h0 = c.state ? h0.data() : nullptr, f.c0 = c.state ? c0.data() : nullptr;
    f.lengths = c.lengths ? lengths.data() : nullptr;
    f.reset = c.reset ? reset.data() : nullptr;
    f.gates = gates.data(), f.save = true, f.wide_c = c.wide_c();
    f.y = y.data(), f.h_n = h_n.data(), f.c_n = c_n.data(), f.c = cells.data();
    Status status = kernels->forward(f);
    if (!status.ok()) return status.message;
    const int64_t of_row = c.D * p_.P, of_cell = c.D * c.H;
    check("y", y.values(), p_.y, of_row), check("h_n", h_n.values(), p_.h_n, p_.P);
    check("c_n", c_n.values(), p_.c_n, c.H), check("c", cells.values(), p_.cells, of_cell);

    const Elements dy(elements(p_.dy)), dh_n(elements(p_.dh_n));
    const CellState dc_n(c, p_.dc_n);
    const Computes dc(std::vector<Compute>(p_.dc.begin(), p_.dc.end()));
    const Elements dgates(p_.dgates.size()), dh(p_.dh.size()), dh0(p_.dh0.size());
    const CellState dc0(c, p_.dc0.size());
    RecurrenceBackward b{};
    b.shape = shape;
    b.w_hh = f.w_hh, b.w_hr = f.w_hr, b.c0 = f.c0, b.lengths = f.lengths, b.reset = f.reset;
    b.gates = gates.data(), b.c = cells.data(), b.dy = dy.data(), b.wide_c = f.wide_c;
    if (c.all_gradients) b.dh_n = dh_n.data(), b.dc_n = dc_n.data(), b.dc = dc.data();
    b.dgates = dgates.data(), b.dh = c.P ? dh.data() : nullptr;
    if (c.state) b.dh0 = dh0.data(), b.dc0 = dc0.data();
    status = kernels->backward(b);
    if (!status.ok()) return complaint_ + status.message;
    check("dgates", dgates.values(), p_.dgates, 4 * of_cell);
    if (c.P) check("dh", dh.values(), p_.dh, of_row);
    if (c.state) check("dc0", dc0.values(), p_.dc0, c.H);
    if (c.state && !kernels->resident) check("dh0", dh0.values(), p_.dh0, p_.P);
    return complaint_;
  }

 private:
  // In Compute, or in Element, as the case says.
  class CellState {
   public:
    CellState(const Case& c, size_t count)
        : wide_c_(c.wide_c()), narrow_(wide_c_ ? 0 : count), wide_(wide_c_ ? count : 0) {}
    CellState(const Case& c, const Values& values)
        : wide_c_(c.wide_c()),
          narrow_(elements(wide_c_ ? Values{} : values)),
          wide_(wide_c_ ? std::vector<Compute>(values.begin(), values.end())
                        : std::vector<Compute>{}) {}

    void* data() const { return wide_c_ ? static_cast<void*>(wide_.data()) : narrow_.data(); }
    std::vector<Compute> values() const {
      if (wide_c_) return wide_.values();
      std::vector<Compute> result;
      for (const Element& v : narrow_.values()) result.push_back(to_compute(v));
      return result;
    }

   private:
    bool wide_c_;
    Elements narrow_;
    Computes wide_;
  };

  Values draw(int64_t count, double scale) {
    std::uniform_real_distribution<double> uniform(-scale, scale);
    Values values(static_cast<size_t>(count));
    for (double& v : values) v = uniform(random_);
    return values;
  }

  // Turns the usual numbers into those that the case asks for.
  void make_hard() {
    const Case& c = p_.c;
    const auto scale = [](Values& values, int exponent) {
      for (double& v : values) v = std::ldexp(v, exponent);
    };
    const auto scale_gradients = [&](int exponent) {
      for (Values* v : {&p_.dy, &p_.dh_n, &p_.dc_n, &p_.dc}) scale(*v, exponent);
    };
    switch (c.inputs) {
      case Inputs::usual:
        break;
      case Inputs::weights_differ:
        for (size_t i = 0; i < p_.w_hh.size(); ++i) {
          const size_t row = i / size_t(p_.P), column = i % size_t(p_.P);
          p_.w_hh[i] = std::ldexp(p_.w_hh[i], -int(row % (kNarrow ? 4 : 24)) - int(column % 7));
        }
        break;
      case Inputs::tiny_weights:
        scale(p_.w_hh, kNarrow ? -6 : -100);
        break;
      case Inputs::denormal_weights:
        scale(p_.w_hh, kNarrow ? -16 : -130);
        break;
      case Inputs::saturated:
        scale(p_.gates_x, 3);
        break;
      case Inputs::closed_output: {
        // Where h is float16, it has all its bits down to 2^-14; where sigmoid comes from tanh, it has
        // an absolute error of 2^-12.
        const int closed = arithmetic == Arithmetic::tf32 ? 8 : sizeof(Element) == 2 ? 4 : 14;
        const int opened = int(closed * 1.44) - 1;
        for (size_t i = 0; i < p_.gates_x.size(); ++i)
          if (i / size_t(c.H) % 4 == 3) p_.gates_x[i] -= closed;
        for (size_t i = 0; i < p_.w_hh.size(); ++i)
          if (i / size_t(p_.P) / size_t(c.H) % 4 != 3) p_.w_hh[i] = std::ldexp(p_.w_hh[i], opened);
        scale(p_.h0, -opened - 1);
        break;
      }
      case Inputs::large_gradients:
        scale_gradients(kNarrow ? 8 : 60);
        break;
      case Inputs::tiny_gradients:
        scale_gradients(kNarrow ? -4 : -80);
        break;
      case Inputs::nan_row:  // in gate g of unit 5, where a sequence begins
        p_.gates_x[size_t(p_.row(c.reversed & 1 ? p_.length(1) - 1 : 0, 1, 0) * 4 * c.H + 2 * c.H +
                          5)] = std::nan("");
        break;
      case Inputs::gradients_differ:
        for (Values* v : {&p_.dy, &p_.dh_n, &p_.dc_n, &p_.dc}) {
          const bool of_steps = v == &p_.dy || v == &p_.dc;
          const int64_t width = v == &p_.dy || v == &p_.dh_n ? p_.P : c.H;
          for (size_t i = 0; i < v->size(); ++i) {
            const int unit = int(i) % int(width);
            const int row = int(i) / int(width * (of_steps ? c.D : 1)) % int(c.B);
            const int exponent = (row % 3 - 1) * (kNarrow ? 3 : 40) + (unit % 4 == 3 ? 4 : 0);
            (*v)[i] = std::ldexp((*v)[i], exponent);
          }
        }
        break;
    }
  }

  static std::vector<Element> elements(const Values& values) {
    std::vector<Element> result;
    result.reserve(values.size());
    for (double v : values) result.push_back(narrow<Element>(v));
    return result;
  }

  // Errors are of the whole, or where batch rows differ in size, of each of them by itself. `width`:
  // elements from one batch row to the next.
  template <class T>
  void check(const char* name, const std::vector<T>& out, const Values& expected, int64_t width) {
    const bool by_row = p_.c.inputs == Inputs::gradients_differ;
    std::vector<double> difference(size_t(by_row ? p_.c.B : 1)), norm(difference.size());
    for (size_t k = 0; k < expected.size(); ++k) {
      const size_t b = k / size_t(width) % difference.size();
      if (std::isnan(expected[k]) && std::isnan(to_compute(out[k]))) continue;
      difference[b] += std::pow(double(to_compute(out[k])) - expected[k], 2);
      norm[b] += expected[k] * expected[k];
    }
    for (size_t b = 0; b < norm.size(); ++b) {
      const double error = std::sqrt(difference[b] / norm[b]);
      if (error <= bound_of(arithmetic) || (norm[b] == 0 && difference[b] == 0)) continue;
      char text[128];
      std::snprintf(text, sizeof text, "%s is wrong by %.2g; ", name, error);
      complaint_ += text;
      break;
    }
  }

  std::mt19937 random_;
  Problem p_;
  std::string complaint_;
};

// Which cases: that of a number, or every `parts`-th from `first` on. What hard inputs show depends
// neither on the order of threads nor on a sanitizer, so only their number chooses them there.
struct Selection {
  int only = -1, first = 0, parts = 1;

  explicit Selection(const std::string& text) {  // "", NUMBER or FIRST/PARTS
    if (const std::size_t slash = text.find('/'); slash != text.npos)
      first = std::stoi(text), parts = std::stoi(text.substr(slash + 1));
    else if (!text.empty())
      only = std::stoi(text);
  }
  bool has(int number, bool usual) const {
    return only >= 0 ? number == only : usual && number % parts == first;
  }
};

// Runs cases and prints complaints. How many complain.
template <class Cases>
int run_cases(const Cases& cases, Arithmetic arithmetic, const Choice& choice,
              const Selection& selection) {
  const bool with_hard =
      !emulation::sanitized() && emulation::settings().order == emulation::Order::forward;
  int failed = 0, number = 0;
  for (const Case& c : cases) {
    const int current = number++;
    if (!selection.has(current, c.inputs == Inputs::usual || with_hard)) continue;
    const std::string complaint = by_arithmetic(arithmetic, [&]<Arithmetic a>() {
      return Runner<a>(c, unsigned(current + 1)).run(choice);
    });
    if (complaint.empty()) continue;
    ++failed;
    std::printf("case %d: %s\n", current, complaint.c_str());
  }
  return failed;
}

inline std::optional<Arithmetic> arithmetic_of(const std::string& name) {
  for (const Arithmetic a : {Arithmetic::float64, Arithmetic::float32, Arithmetic::tf32,
                             Arithmetic::float16, Arithmetic::bfloat16})
    if (name == name_of(a)) return a;
  return {};
}

inline void set_order(const std::string& order, const std::string& seed) {
  auto& settings = emulation::settings();
  settings.seed = std::stoull(seed);
  settings.order = order == "forward"   ? emulation::Order::forward
                   : order == "reverse" ? emulation::Order::reverse
                                        : emulation::Order::random;
}

// A program's main, whose arguments are ARITHMETIC ORDER SEED [CASE | FIRST/PARTS].
template <class Cases>
int main_of(int argc, char** argv, const Cases& cases, const Choice& choice) {
  const std::optional<Arithmetic> arithmetic = argc < 4 ? std::nullopt : arithmetic_of(argv[1]);
  if (!arithmetic) return 2;
  set_order(argv[2], argv[3]);
  return run_cases(cases, *arithmetic, choice, Selection(argc > 4 ? argv[4] : "")) != 0;
}

}  // namespace lstm_cuda::test
