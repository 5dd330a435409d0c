// The Python side of the emulation: a test-only module that registers the CUDA path's ops for CPU
// tensors as lstm_cuda_emulated::layer_forward and ::layer_backward (csrc/ops_cuda.cpp), and sets how
// kernels are run.
// The pybind11 that torch brings refuses to be included where this is defined. No torch here.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <utility>
#include <vector>

#include "../../csrc/cuda/device.h"
#include "../../csrc/cuda/dispatch.h"
#include "../../csrc/cuda/scaled_product.h"

namespace lstm_cuda {
namespace {

CudaDevice modelled{90, 132, 227 * 1024};
bool recorded = false;

}  // namespace

Status cuda_device(int, CudaDevice& device) {
  device = modelled;
  return {};
}

bool capturing(Stream) { return recorded; }

// Kept in the list of launches as "fork" and "join". What is put beside runs at the latest moment.
struct Beside {};

Fork::Fork(int, Stream from, bool wanted) : from_(from) {
  static const Beside other{};
  if (!wanted) return;
  beside_ = &other;
  emulation::launches().push_back({{"fork", 0, 0}, false});
}

Stream Fork::stream() const { return {beside_ != nullptr}; }

Status Fork::join() {
  if (!std::exchange(beside_, nullptr)) return {};
  emulation::launches().push_back({{"join", 0, 0}, false});
  return emulation::run_deferred();
}

namespace {

// "forward", "reverse" or "random" with a seed.
void set_order(const std::string& order, uint64_t seed) {
  emulation::Settings& settings = emulation::settings();
  settings.seed = seed;
  if (order == "forward")
    settings.order = emulation::Order::forward;
  else if (order == "reverse")
    settings.order = emulation::Order::reverse;
  else if (order == "random")
    settings.order = emulation::Order::random;
  else
    throw std::invalid_argument("order must be forward, reverse or random; got " + order);
}

void set_device(int architecture, int multiprocessors, int64_t shared_bytes) {
  modelled = {architecture, multiprocessors, shared_bytes};
  emulation::settings().shared_limit = size_t(shared_bytes);
}

// Kernels whose name begins like this cannot be launched, but the first `spared` times; "" for none.
void refuse(const std::string& kernel, unsigned spared) {
  emulation::settings().refused = kernel;
  emulation::settings().spared = spared;
}

// What follows pretends to be recorded for a CUDA graph.
void set_capturing(bool on) { recorded = on; }

void use_device(int index) { emulation::settings().device = index; }

// Small products are scaled too, where TF32 is allowed; torch refuses all that are. Forgets refusals.
void scale_products(bool all, bool refused) {
  emulation::scale_all_products = all;
  emulation::refuse_scaled_products = refused;
  scaling_refused = false;
}

// Names of the kernels started since the last call; those beside the caller's stream marked so.
std::vector<std::string> take_launches() {
  std::vector<std::string> names;
  for (const emulation::Launched& each : emulation::launches())
    names.push_back(each.kernel + std::string(each.beside ? " (beside)" : ""));
  emulation::launches().clear();
  return names;
}

}  // namespace
}  // namespace lstm_cuda

PYBIND11_MODULE(lstm_cuda_emulated, m) {
  m.def(
      "force_kernel",
      [](const std::string& name, int columns, int turns) {
        return lstm_cuda::force_kernel({name.c_str(), columns, turns});
      },
      pybind11::arg("name"), pybind11::arg("columns") = 0, pybind11::arg("turns") = 0);
  m.def("set_order", &lstm_cuda::set_order);
  m.def("set_device", &lstm_cuda::set_device);
  m.def("refuse", &lstm_cuda::refuse, pybind11::arg("kernel"), pybind11::arg("spared") = 0);
  m.def("set_capturing", &lstm_cuda::set_capturing);
  m.def("scale_products", &lstm_cuda::scale_products, pybind11::arg("all"),
        pybind11::arg("refused") = false);
  m.def("use_device", &lstm_cuda::use_device);
  m.def("take_launches", &lstm_cuda::take_launches);
}
