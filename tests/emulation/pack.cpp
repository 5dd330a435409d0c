// Packs weights for kernels that keep them (csrc/cuda/pack.h) and compares every packed value with the
// one that resident.h puts there, scaled and rounded by arithmetic that shares nothing with the kernel.
//   pack ARITHMETIC DIRECTION SHAPES ORDER SEED
// SHAPES is "compiled" (all that resident.h lists) or "small".
#include <algorithm>
#include <bit>
#include <cmath>
#include <cstdio>
#include <limits>
#include <memory>
#include <random>
#include <string>
#include <vector>

#include "cuda/element.cuh"
#include "cuda/pack.h"
#include "half.hpp"
#include "memory.hpp"

using namespace lstm_cuda;
using namespace lstm_cuda::test;

namespace {

// Not compiled for any kernel: few enough fragments for every build and order.
const ResidentShape kSmallShapes[] = {{64, 2, 4, 1, 0, 0}, {128, 4, 8, 4, 0, 0}};

bool same(double a, double b) { return std::isnan(a) ? std::isnan(b) : a == b; }

struct Case {
  ResidentShape shape;
  int64_t H, D;
  int first_element;  // of w_hh in its memory: 1 spoils the alignment of pairs
};

// Element: the type of w_hh.
template <Arithmetic arithmetic>
class Runner {
  using Element = typename Types<arithmetic>::Element;
  static constexpr bool kScaled = std::is_same_v<Element, float>;
  static constexpr int kParts = parts_of(arithmetic);

 public:
  Runner(const Case& c, bool backward, unsigned seed) : c_(c), random_(seed) {
    for (int64_t d = 0; d < c.D; ++d) {
      weights_.push_back(draw(backward));
      const std::vector<Element>& values = weights_.back();
      memory_.push_back(std::make_unique<emulation::DeviceBuffer<Element>>(values));
      w_hh_.push_back(memory_.back()->data() + c.first_element);
    }
  }

  // What is wrong, or nothing.
  template <class Fragments>
  std::string run() {
    constexpr bool kBackward = std::is_same_v<Fragments, BackwardFragments>;
    LayerShape shape{};
    shape.D = c_.D, shape.H = shape.P = c_.H;
    CudaPlan plan{};
    plan.arithmetic = arithmetic;
    plan.resident = c_.shape;
    const emulation::DeviceBuffer<uint16_t> packed(size_t(packed_bytes(shape, plan, kBackward)) /
                                                   2);
    const emulation::DeviceBuffer<uint32_t> words(4 * 1000);
    const Status status = pack_weights(shape, plan, kBackward, w_hh_.data(), packed.data(),
                                       words.data(), int64_t(words.bytes()), {});
    if (!status.ok()) return status.message;
    for (uint32_t word : words.values())
      if (word) return "a word is not zero";

    const PackedWeights places = packed_weights(shape, plan, kBackward, packed.data());
    if (places.fragments != packed.data()) return "fragments are not where they should be";
    const std::vector<uint16_t> bits = packed.values();
    const Fragments f{c_.shape};
    for (int64_t d = 0; d < c_.D; ++d)
      for (int block = 0; block < c_.shape.blocks; ++block)
        if (std::string wrong = compare(f, d, block, bits, places.unscale); !wrong.empty())
          return wrong;
    return {};
  }

 private:
  // Rows and columns of different size, and everything that floats can be.
  std::vector<Element> draw(bool backward) {
    const int64_t H = c_.H;
    std::uniform_real_distribution<double> uniform(-1, 1);
    std::vector<double> size(size_t(4 * H));
    for (double& s : size) s = std::ldexp(1, int(random_() % 41) - 20);
    std::vector<double> w(size_t(4 * H * H));
    for (size_t k = 0; k < w.size(); ++k)
      w[k] = uniform(random_) * size[k / size_t(H)] * std::ldexp(1, int(random_() % 21) - 20);
    const double special[] = {kInfinity, -kInfinity, std::nan(""), 3e38, -3e38, 1e-45,
                              1e-39,     0,          -0.};
    for (double v : special)
      for (int n = 0; n < 2; ++n) w[random_() % w.size()] = v;
    // Whole rows of the operand: of zeros, of the smallest numbers, of nothing finite, and of powers of
    // two about the one from which on the scale is clamped.
    const auto line = [&](double v, bool varied) {
      const size_t n = random_() % size_t(backward ? H : 4 * H);
      for (size_t j = 0; j < size_t(backward ? 4 * H : H); ++j)
        w[backward ? j * size_t(H) + n : n * size_t(H) + j] = v * (varied ? uniform(random_) : 1);
    };
    for (double v : {0., 1e-42, kInfinity, std::ldexp(1, -113), std::ldexp(1, -112)})
      line(v, false);
    line(std::ldexp(1, -110), true);
    line(3e38, true);
    std::vector<Element> values(size_t(c_.first_element));
    for (double v : w) values.push_back(to_element<Element>(float(v)));
    return values;
  }

  // A weight's bits (of 16-bit types) or its value (of float32); zero past H.
  const Element* weight(int64_t d, const WeightSource& s) const {
    if (s.unit >= c_.H || s.k >= c_.H) return nullptr;
    const int64_t at = (s.gate * c_.H + s.unit) * c_.H + s.k;
    return &weights_[size_t(d)][size_t(at + c_.first_element)];
  }
  double value(int64_t d, const WeightSource& s) const {
    const Element* w = weight(d, s);
    return w ? double(to_compute(*w)) : 0;
  }

  static std::string at(int64_t d, int block, const WeightSource& s, const char* what) {
    char text[128];
    std::snprintf(text, sizeof text, "recurrence %d, block %d: gate %d of unit %d, k = %d: %s",
                  int(d), block, s.gate, s.unit, s.k, what);
    return text;
  }

  // The exponent of a row's scale, found by looking at the whole row.
  int exponent(int64_t d, int block, const WeightSource& of, bool backward) const {
    double largest = 0;
    const auto see = [&](const WeightSource& s) {
      const double v = std::fabs(value(d, s));
      if (std::isfinite(v)) largest = std::max(largest, v);
    };
    if (backward) {
      for (int gate = 0; gate < 4; ++gate)
        for (int unit = 0; unit < c_.shape.units(); ++unit)
          see({gate, block * c_.shape.units() + unit, of.k});
    } else {
      for (int k = 0; k < c_.H; ++k) see({of.gate, of.unit, k});
    }
    return largest == 0 ? 0 : std::clamp(14 - std::ilogb(largest), -126, 126);
  }

  template <class Fragments>
  std::string compare(const Fragments& f, int64_t d, int block, const std::vector<uint16_t>& bits,
                      const float* unscale) const {
    constexpr bool kBackward = std::is_same_v<Fragments, BackwardFragments>;
    const int hidden = c_.shape.hidden;
    for (int warp = 0; warp < c_.shape.warps; ++warp)
      for (int tile = 0; tile < f.row_tiles(); ++tile)
        for (int row = 0; row < 16; ++row) {
          const WeightSource of = f.source(block, warp, tile, 0, row, 0);
          const int scale = kScaled ? exponent(d, block, of, kBackward) : 0;
          const int64_t number = kBackward ? (d * c_.shape.blocks + block) * hidden + of.k
                                           : (d * 4 + of.gate) * hidden + of.unit;
          if (unscale[number] != std::ldexp(1.f, -scale)) return at(d, block, of, "wrong scale");
          for (int step = 0; step < f.steps(); ++step)
            for (int column = 0; column < 16; ++column) {
              const WeightSource s = f.source(block, warp, tile, step, row, column);
              // Of the fragment: lane, register and half, as the head of resident.h says.
              const int lane = row % 8 * 4 + column % 8 / 2;
              const int place = 2 * (row / 8 + column / 8 * 2) + column % 2;
              const auto stored = [&](int part) {
                const int64_t fragment = (part * f.row_tiles() + tile) * f.steps() + step;
                const int64_t piece = first_piece(f, d, block, warp, kParts) + fragment * 32 + lane;
                return bits[size_t(8 * piece + place)];
              };
              if constexpr (kScaled) {
                const double w = std::ldexp(value(d, s), scale), high = round_to_half(w);
                if (!same(from_half(stored(0)), high)) return at(d, block, s, "wrong");
                const double low =
                    std::isfinite(w) ? round_to_half((w - high) * double(kLowPart)) : 0;
                if (kParts == 2 && !same(from_half(stored(1)), low))
                  return at(d, block, s, "wrong in its low part");
              } else {
                const Element* w = weight(d, s);
                if (stored(0) != (w ? std::bit_cast<uint16_t>(*w) : 0))
                  return at(d, block, s, "wrong");
              }
            }
        }
    return {};
  }

  Case c_;
  std::mt19937 random_;
  std::vector<std::vector<Element>> weights_;
  std::vector<std::unique_ptr<emulation::DeviceBuffer<Element>>> memory_;
  std::vector<const void*> w_hh_;
};

template <Arithmetic arithmetic>
int run_all(bool backward, bool small) {
  std::vector<ResidentShape> shapes;
  const auto add = [&](const auto& list) { shapes.insert(shapes.end(), list, std::end(list)); };
  if (small) {
    add(kSmallShapes);
  } else if (arithmetic == Arithmetic::float32) {
    add(kClusterShapesExact), add(kGroupShapesExact);
  } else {
    add(kClusterShapes), add(kGroupShapes);
  }
  std::mt19937 random(1);
  int failed = 0;
  for (const ResidentShape& shape : shapes) {
    const int narrow = shape.hidden - 1 - 2 * int(random() % unsigned(shape.hidden / 4));  // odd
    const Case all[] = {{shape, narrow, 1, 0},
                        {shape, shape.hidden, 1, 0},
                        {shape, narrow / 2 * 2, 3, 0},
                        {shape, shape.hidden, 2, 1}};
    const bool large = shape.hidden > 512;  // which takes a second a case
    for (const Case& c : all) {
      Runner<arithmetic> runner(c, backward, random());
      const std::string wrong = backward ? runner.template run<BackwardFragments>()
                                         : runner.template run<ForwardFragments>();
      if (!wrong.empty()) {
        ++failed;
        std::printf("H=%d of %d, D=%d: %s\n", int(c.H), shape.hidden, int(c.D), wrong.c_str());
      }
      if (large) break;
    }
  }
  return failed != 0;
}

}  // namespace

int main(int argc, char** argv) {
  if (argc < 6) return 2;
  const std::string arithmetic = argv[1], direction = argv[2], shapes = argv[3], order = argv[4];
  auto& settings = emulation::settings();
  settings.seed = std::stoull(argv[5]);
  settings.order = order == "forward"   ? emulation::Order::forward
                   : order == "reverse" ? emulation::Order::reverse
                                        : emulation::Order::random;
  const bool backward = direction == "backward", small = shapes == "small";
  if (arithmetic == "float32") return run_all<Arithmetic::float32>(backward, small);
  if (arithmetic == "tf32") return run_all<Arithmetic::tf32>(backward, small);
  if (arithmetic == "float16") return run_all<Arithmetic::float16>(backward, small);
  if (arithmetic == "bfloat16") return run_all<Arithmetic::bfloat16>(backward, small);
  return 2;
}
