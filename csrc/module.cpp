// The Python module _C: what was built, and which way a layer would be run. Importing it also
// registers the ops.
// The pybind11 that torch brings refuses to be included where this is defined. No torch here.
#undef TORCH_TARGET_VERSION
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include <stdexcept>
#include <string>
#include <vector>

#include "cpu/dispatch.h"
#include "cuda/dispatch.h"
#include "cuda/wavefront.h"
#include "plan.h"

namespace py = pybind11;

namespace {

std::vector<std::string> capabilities() {
  std::vector<std::string> names;
  for (int k = 0; k < lstm_cuda::cpu_capability_count(); ++k)
    names.push_back(lstm_cuda::cpu_capability_name(k));
  return names;
}

py::dict build_info() {
  using namespace py::literals;
#ifdef LSTM_CUDA_WITH_CUDA
  const bool cuda = true;
#else
  const bool cuda = false;
#endif
  return py::dict("version"_a = LSTM_CUDA_VERSION, "torch_version"_a = LSTM_CUDA_TORCH_VERSION,
                  "cuda"_a = cuda, "cpu_capabilities"_a = capabilities(),
                  "compiler"_a = __VERSION__);
}

void set_cpu_capability(const std::string& name) {
  if (lstm_cuda::set_cpu_capability(name.c_str())) return;
  std::string known;
  for (const std::string& each : capabilities()) known += (known.empty() ? "" : ", ") + each;
  throw std::invalid_argument("name must be one of " + known + "; got '" + name + "'");
}

lstm_cuda::Dtype dtype_named(const std::string& name) {
  if (name == "float64") return lstm_cuda::Dtype::float64;
  if (name == "float32") return lstm_cuda::Dtype::float32;
  if (name == "float16") return lstm_cuda::Dtype::float16;
  if (name == "bfloat16") return lstm_cuda::Dtype::bfloat16;
  throw std::invalid_argument("dtype must be float64, float32, float16 or bfloat16; got '" + name +
                              "'");
}

lstm_cuda::CellKind cell_named(const std::string& name) {
  if (name == "plain") return lstm_cuda::CellKind::plain;
  if (name == "options") return lstm_cuda::CellKind::options;
  if (name == "norm") return lstm_cuda::CellKind::norm;
  throw std::invalid_argument("cell must be plain, options or norm; got '" + name + "'");
}

py::dict plan_cpu(int64_t T, int64_t B, int64_t D, int64_t I, int64_t H, int64_t P,
                  const std::string& dtype, int threads, bool backward) {
  using namespace py::literals;
  const lstm_cuda::LayerShape shape{dtype_named(dtype), T, B, D, I, H, P, 0, P != H, 1};
  const lstm_cuda::CpuPlan plan = lstm_cuda::plan_cpu(shape, threads, backward);
  return py::dict("workers"_a = plan.workers, "in_step"_a = plan.in_step, "parts"_a = plan.parts,
                  "weights_packed"_a = plan.recurrent == lstm_cuda::Weights::packed,
                  "input_within_step"_a = plan.input_within_step,
                  "capability"_a = lstm_cuda::cpu_capability());
}

std::vector<std::string> kernel_families() {
  std::vector<std::string> names;
  for (lstm_cuda::Family family : lstm_cuda::kFamilies) names.push_back(lstm_cuda::name_of(family));
  return names;
}

void remember_refusal(int device, const std::string& name) {
  for (lstm_cuda::Family family : lstm_cuda::kFamilies)
    if (name == lstm_cuda::name_of(family)) return lstm_cuda::remember_refusal(device, family);
  throw std::invalid_argument("there is no kernel family '" + name + "'");
}

py::dict plan_cuda(int64_t T, int64_t B, int64_t D, int64_t I, int64_t H, int64_t P,
                   const std::string& dtype, bool backward, bool allow_tf32, int architecture,
                   int multiprocessors, int64_t shared_bytes, int device, const std::string& cell,
                   bool large_h) {
  using namespace py::literals;
  const lstm_cuda::LayerShape shape{dtype_named(dtype), T, B, D, I, H, P, 0, P != H, 1};
  lstm_cuda::CudaRequest request = lstm_cuda::cuda_request(device, allow_tf32, backward);
  request.cell = cell_named(cell);
  request.large_h = large_h;
  const lstm_cuda::CudaPlan plan =
      lstm_cuda::plan_cuda(shape, request, {architecture, multiprocessors, shared_bytes});
  py::dict result("kernel"_a = lstm_cuda::name_of(plan.family), "possible"_a = plan.possible,
                  "arithmetic"_a = lstm_cuda::name_of(plan.arithmetic), "because"_a = plan.reason);
  if (!plan.possible) return result;
  result["estimated_us"] = plan.estimated_us;
  if (plan.folds_projection) result["folds_projection"] = true;
  switch (plan.family) {
    case lstm_cuda::Family::rec_cta:
      result["padded_hidden"] = plan.padded_hidden;
      break;
    case lstm_cuda::Family::rec_step:
      result["tile"] = lstm_cuda::name_of(plan.tile);
      result["launches_overlap"] = plan.overlap;
      break;
    case lstm_cuda::Family::rec_group:
      result["groups"] = plan.groups;
      [[fallthrough]];
    case lstm_cuda::Family::rec_cluster:
      result["blocks"] = plan.resident.blocks;
      result["padded_hidden"] = plan.resident.hidden;
      result["columns"] = 8 * plan.column_tiles;
      result["turns"] = plan.turns;
      result["warps"] = plan.resident.warps;
      result["packs_beside"] = plan.pack_beside;
      break;
  }
  return result;
}

int64_t packed_layout(int64_t T, int64_t B, int64_t D, int64_t H, int64_t P,
                      const std::string& dtype, bool allow_tf32, int architecture,
                      int multiprocessors, int64_t shared_bytes, int device) {
  const lstm_cuda::LayerShape shape{dtype_named(dtype), T, B, D, P, H, P, 0, P != H, 1};
  return lstm_cuda::packed_layout(
      lstm_cuda::plan_cuda(shape, lstm_cuda::cuda_request(device, allow_tf32, false),
                           {architecture, multiprocessors, shared_bytes}));
}

int wavefront_chunks(int layers, int64_t T, int64_t B, int64_t H, int64_t P,
                     const std::string& dtype, bool allow_tf32, int architecture,
                     int multiprocessors, int64_t shared_bytes, int device) {
  const lstm_cuda::LayerShape shape{dtype_named(dtype), T, B, 1, P, H, P, 0, P != H, 1};
  return lstm_cuda::wavefront_chunks(layers, shape,
                                     lstm_cuda::cuda_request(device, allow_tf32, false),
                                     {architecture, multiprocessors, shared_bytes});
}

}  // namespace

// What these functions share is atomic or behind a lock, so a free-threaded Python needs no lock of
// its own around them.
PYBIND11_MODULE(_C, m, py::mod_gil_not_used()) {
  m.doc() = "Compiled part of lstm_cuda.";
  m.attr("max_recurrences") = lstm_cuda::kMaxRecurrences;
  m.def("build_info", &build_info);
  m.def("cpu_capability", &lstm_cuda::cpu_capability);
  m.def("set_cpu_capability", &set_cpu_capability, py::arg("name"));
  m.def("forced_kernel", [] {
    const lstm_cuda::Forced forced = lstm_cuda::forced_kernel();
    return py::make_tuple(forced.name, forced.columns, forced.turns);
  });
  m.def(
      "force_kernel",
      [](const std::string& name, int columns, int turns) {
        return lstm_cuda::force_kernel({name.c_str(), columns, turns});
      },
      py::arg("name"), py::arg("columns") = 0, py::arg("turns") = 0);
  m.def("kernel_families", &kernel_families);
  m.def("remember_refusal", &remember_refusal, py::arg("device"), py::arg("name"));
  m.def("plan_cuda", &plan_cuda, py::arg("T"), py::arg("B"), py::arg("D"), py::arg("I"),
        py::arg("H"), py::arg("P"), py::arg("dtype"), py::arg("backward"), py::arg("allow_tf32"),
        py::arg("architecture"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("device"), py::arg("cell"), py::arg("large_h"));
  m.def("packed_layout", &packed_layout, py::arg("T"), py::arg("B"), py::arg("D"), py::arg("H"),
        py::arg("P"), py::arg("dtype"), py::arg("allow_tf32"), py::arg("architecture"),
        py::arg("multiprocessors"), py::arg("shared_bytes"), py::arg("device"));
  m.def("wavefront_chunks", &wavefront_chunks, py::arg("layers"), py::arg("T"), py::arg("B"),
        py::arg("H"), py::arg("P"), py::arg("dtype"), py::arg("allow_tf32"),
        py::arg("architecture"), py::arg("multiprocessors"), py::arg("shared_bytes"),
        py::arg("device"));
  m.def("plan_cpu", &plan_cpu, py::arg("T"), py::arg("B"), py::arg("D"), py::arg("I"), py::arg("H"),
        py::arg("P"), py::arg("dtype"), py::arg("threads"), py::arg("backward"));
}
