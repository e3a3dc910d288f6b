// The Python module: runs or records registered kernels on numpy arrays.
#include <pybind11/numpy.h>
#include <pybind11/pybind11.h>
#include <pybind11/stl.h>

#include "registry.h"

namespace py = pybind11;

namespace dbp::emulation {

std::map<std::string, Launcher>& registry() {
  static std::map<std::string, Launcher> kernels;
  return kernels;
}

namespace {

Value convert(const std::string& name, const py::handle& object) {
  if (object.is_none()) return nullptr;
  if (py::isinstance<py::array>(object)) {
    auto array = py::reinterpret_borrow<py::array>(object);
    if (!(array.flags() & py::array::c_style))
      throw std::invalid_argument(name + ": expected a C-contiguous array");
    const auto format = py::cast<std::string>(py::str(object.attr("dtype").attr("name")));
    return HostArray{const_cast<void*>(array.data()), static_cast<size_t>(array.nbytes()),
                     static_cast<int64_t>(array.size()), format};
  }
  if (py::isinstance<py::float_>(object)) return py::cast<double>(object);
  if (py::isinstance<py::sequence>(object)) return py::cast<std::vector<int64_t>>(object);
  return py::cast<int64_t>(object);
}

cudaError_t call(const std::string& name, const py::kwargs& keywords, uint64_t seed,
                 size_t shared_limit, int capability, const std::string& leave_out, bool record) {
  auto found = registry().find(name);
  if (found == registry().end()) throw std::invalid_argument(name + ": no such kernel");
  std::map<std::string, Value> values;
  for (const auto& [key, value] : keywords) {
    const auto keyword = py::cast<std::string>(key);
    values[keyword] = convert(keyword, value);
  }
  machine.reset(seed, shared_limit);
  machine.set_capability(capability);
  machine.leave_out(leave_out);
  machine.record_only(record);
  Arguments arguments(std::move(values));
  const cudaError_t error = found->second(arguments);
  arguments.check_all_taken();
  if (!record) arguments.finish();
  return error;
}

py::dict stats() {
  const Stats& s = machine.stats();
  py::dict d;
  d["launches"] = s.launches;
  d["blocks"] = s.blocks;
  d["barriers"] = s.barriers;
  d["switches"] = s.switches;
  d["global_read_bytes"] = s.global_read_bytes;
  d["global_write_bytes"] = s.global_write_bytes;
  d["ldmatrix_phases"] = s.ldmatrix_phases;
  d["ldmatrix_conflicts"] = s.ldmatrix_conflicts;
  d["mma"] = s.mma;
  d["wgmma"] = s.wgmma;
  std::vector<std::string> sites;
  for (const Site& site : machine.sites()) sites.push_back(site.text());
  d["sites"] = sites;
  return d;
}

py::list launches() {
  py::list list;
  for (const Launch& l : machine.launches()) {
    py::dict d;
    d["kernel"] = l.kernel;
    d["grid"] = py::make_tuple(l.grid.x, l.grid.y, l.grid.z);
    d["block"] = py::make_tuple(l.block.x, l.block.y, l.block.z);
    d["shared_bytes"] = l.shared_bytes;
    d["params"] = py::bytes(l.params);
    list.append(d);
  }
  return list;
}

}  // namespace

PYBIND11_MODULE(dbp_emulation, m) {
  auto fault = py::register_exception<Fault>(m, "Fault", PyExc_RuntimeError);
  // Later registrations are tried first: the kinds of fault after their base.
  py::register_exception<MemoryFault>(m, "MemoryFault", fault);
  py::register_exception<UninitialisedRead>(m, "UninitialisedRead", fault);
  py::register_exception<RaceFault>(m, "RaceFault", fault);
  py::register_exception<DeadlockFault>(m, "DeadlockFault", fault);
  m.def("call", [](const std::string& name, uint64_t seed, size_t shared_limit, int capability,
                   const std::string& leave_out, bool record, const py::kwargs& keywords) {
    return static_cast<int>(
        call(name, keywords, seed, shared_limit, capability, leave_out, record));
  });
  m.def("stats", &stats);
  m.def("launches", &launches);
  m.def("kernels", [] {
    std::vector<std::string> names;
    for (const auto& [name, launcher] : registry()) names.push_back(name);
    return names;
  });
}

}  // namespace dbp::emulation
