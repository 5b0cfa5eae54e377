// SPDX-License-Identifier: MIT
// core_ext.cc: the Python module edgemoe._core. Only edgemoe/_native.py imports it.
#include "plugins/python/plugins_ext.h"
#include "plugins/python/runtime_ext.h"

using namespace edgemoe_python;

NB_MODULE(_core, m) {
  m.doc() = "libedgemoe for Python; use edgemoe._native.";
  nb::object core_error = nb::steal(PyErr_NewException("edgemoe._core.CoreError", PyExc_RuntimeError, nullptr));
  m.attr("CoreError") = core_error;
  nb::register_exception_translator(
      [](const std::exception_ptr& p, void* type) {
        try {
          std::rethrow_exception(p);
        } catch (const CoreError& e) {
          PyErr_SetObject(static_cast<PyObject*>(type), nb::make_tuple(e.code(), e.what()).ptr());
        }
      },
      core_error.ptr());

  m.def("version", [] { return std::string(edgemoe_version()); });
  m.def("abi_version", &edgemoe_abi_version);
  m.def("isas", &Isas);
  m.def("active_isa", &ActiveIsa);
  m.def("find_format", &edgemoe_format_find, nb::arg("ggml_name"));
  m.def("prefetch_bytes", &PrefetchBytes, nb::arg("shapes"), nb::arg("max_depth"));
  m.def("measure", &Measure, nb::arg("tensors"), nb::arg("slots_bytes"));

  nb::class_<edgemoe_sizes>(m, "Sizes")
      .def_ro("bank_slot_bytes", &edgemoe_sizes::bank_slot_bytes)
      .def_ro("cycle_slot_bytes", &edgemoe_sizes::cycle_slot_bytes)
      .def_ro("slots_bytes", &edgemoe_sizes::slots_bytes)
      .def_ro("n_slots", &edgemoe_sizes::n_slots)
      .def_ro("n_slices", &edgemoe_sizes::n_slices);

  nb::class_<edgemoe_stats>(m, "RuntimeStats")
      .def_ro("hits", &edgemoe_stats::hits)
      .def_ro("misses", &edgemoe_stats::misses)
      .def_ro("late_hits", &edgemoe_stats::late_hits)
      .def_ro("bytes_read", &edgemoe_stats::bytes_read)
      .def_ro("reads", &edgemoe_stats::reads)
      .def_ro("stall_ns", &edgemoe_stats::stall_ns)
      .def_ro("evictions", &edgemoe_stats::evictions)
      .def_ro("n_slots", &edgemoe_stats::n_slots)
      .def_ro("slots_bytes", &edgemoe_stats::slots_bytes)
      .def_ro("pack_ns", &edgemoe_stats::pack_ns)
      .def_ro("direct_io", &edgemoe_stats::direct_io)
      .def_ro("n_own_tensors", &edgemoe_stats::n_own_tensors);

  nb::class_<edgemoe_prefetch_stats>(m, "PrefetchStats")
      .def_ro("used_bytes", &edgemoe_prefetch_stats::used_bytes)
      .def_ro("late_bytes", &edgemoe_prefetch_stats::late_bytes)
      .def_ro("wasted_bytes", &edgemoe_prefetch_stats::wasted_bytes)
      .def_ro("predicted", &edgemoe_prefetch_stats::predicted)
      .def_ro("predicted_right", &edgemoe_prefetch_stats::predicted_right)
      .def_ro("chosen", &edgemoe_prefetch_stats::chosen)
      .def_ro("depth", &edgemoe_prefetch_stats::depth);

  nb::class_<edgemoe_preload_stats>(m, "PreloadStats")
      .def_ro("read_bytes", &edgemoe_preload_stats::read_bytes)
      .def_ro("used_bytes", &edgemoe_preload_stats::used_bytes)
      .def_ro("n_slices", &edgemoe_preload_stats::n_slices)
      .def_ro("n_left", &edgemoe_preload_stats::n_left);
  nb::class_<edgemoe_replay_options>(m, "ReplayOptions")
      .def("__init__",
           [](edgemoe_replay_options* options) {
             *options = {};
             options->struct_size = sizeof(edgemoe_replay_options);
           })
      .def_rw("policy", &edgemoe_replay_options::policy)
      .def_rw("slots_bytes", &edgemoe_replay_options::slots_bytes)
      .def_rw("disk_bytes_per_s", &edgemoe_replay_options::disk_bytes_per_s)
      .def_rw("latency_us", &edgemoe_replay_options::latency_us)
      .def_rw("jitter", &edgemoe_replay_options::jitter)
      .def_rw("change_token", &edgemoe_replay_options::change_token)
      .def_rw("change_factor", &edgemoe_replay_options::change_factor)
      .def_rw("dense_us", &edgemoe_replay_options::dense_us)
      .def_rw("expert_us", &edgemoe_replay_options::expert_us)
      .def_rw("row_share", &edgemoe_replay_options::row_share)
      .def_rw("batch_us", &edgemoe_replay_options::batch_us)
      .def_rw("hold_up_us_per_mib", &edgemoe_replay_options::hold_up_us_per_mib)
      .def_rw("recall", &edgemoe_replay_options::recall)
      .def_rw("seed", &edgemoe_replay_options::seed)
      .def_rw("n_readers", &edgemoe_replay_options::n_readers)
      .def_rw("prefetch_depth", &edgemoe_replay_options::prefetch_depth)
      .def_rw("adaptive", &edgemoe_replay_options::adaptive);

  nb::class_<edgemoe_replay_phase>(m, "ReplayPhase")
      .def_ro("n_tokens", &edgemoe_replay_phase::n_tokens)
      .def_ro("hits", &edgemoe_replay_phase::hits)
      .def_ro("misses", &edgemoe_replay_phase::misses)
      .def_ro("late_hits", &edgemoe_replay_phase::late_hits)
      .def_ro("slices", &edgemoe_replay_phase::slices)
      .def_ro("reads", &edgemoe_replay_phase::reads)
      .def_ro("bytes_read", &edgemoe_replay_phase::bytes_read)
      .def_ro("stall_us", &edgemoe_replay_phase::stall_us)
      .def_ro("total_us", &edgemoe_replay_phase::total_us);

  nb::class_<edgemoe_replay_result>(m, "ReplayResult")
      .def_ro("all", &edgemoe_replay_result::all)
      .def_ro("decode", &edgemoe_replay_result::decode)
      .def_ro("evictions", &edgemoe_replay_result::evictions)
      .def_ro("prefetch", &edgemoe_replay_result::prefetch)
      .def_ro("bound_reads", &edgemoe_replay_result::bound_reads)
      .def_ro("bound_bytes", &edgemoe_replay_result::bound_bytes)
      .def_ro("slots_bytes", &edgemoe_replay_result::slots_bytes)
      .def_ro("n_slots", &edgemoe_replay_result::n_slots);

  m.def("replay", &Replay, nb::arg("layers"), nb::arg("batch_of_token"), nb::arg("experts"), nb::arg("foreseen"),
        nb::arg("options"), nb::arg("batch_us").noconvert(), nb::arg("depths").noconvert());

  nb::class_<Runtime>(m, "Runtime")
      .def(nb::init<const std::vector<std::string>&, const std::vector<TensorTuple>&, uint64_t, int, int, int>(),
           nb::arg("files"), nb::arg("tensors"), nb::arg("slots_bytes"), nb::arg("n_io_threads"), nb::arg("eviction"),
           nb::arg("arithmetic"))
      .def("is_own", &Runtime::IsOwn, nb::arg("name"))
      .def("close", &Runtime::Close)
      .def("set_slots_bytes", &Runtime::SetSlotsBytes, nb::arg("slots_bytes"))
      .def("stats", &Runtime::Stats)
      .def("set_prefetch", &Runtime::SetPrefetch, nb::arg("routers"), nb::arg("max_depth"), nb::arg("adaptive"))
      .def("foresee_tokens", &ForeseeTokens, nb::arg("embeddings"), nb::arg("count").none() = nb::none(),
           nb::arg("reuse").none() = nb::none(), nb::arg("miss").none() = nb::none())
      .def("prefetch_stats", &Runtime::PrefetchStats)
      .def("start_trace", &Runtime::StartTrace, nb::arg("path"), nb::arg("header"))
      .def("check_trace", &Runtime::CheckTrace)
      .def("stop_trace", &Runtime::StopTrace)
      .def("start_clock", &Runtime::StartClock, nb::arg("phase"))
      .def("enter_phase", &Runtime::EnterPhase, nb::arg("phase"))
      .def("stop_clock", &Runtime::StopClock)
      .def("hot_slices", &Runtime::HotSlices)
      .def("slice_uses", &Runtime::SliceUses)
      .def("preload", &Runtime::Preload, nb::arg("slices"))
      .def("preload_stats", &Runtime::PreloadStats)
      .def("reset_stats", &Runtime::ResetStats)
      .def("take_error", &Runtime::TakeError);

  nb::class_<edgemoe_reuse_stats>(m, "ReuseStats")
      .def_ro("n_selections", &edgemoe_reuse_stats::n_selections)
      .def_ro("n_chosen", &edgemoe_reuse_stats::n_chosen)
      .def_ro("n_changed", &edgemoe_reuse_stats::n_changed)
      .def_ro("mass_moved", &edgemoe_reuse_stats::mass_moved)
      .def_ro("kl", &edgemoe_reuse_stats::kl)
      .def_ro("mean_strength", &edgemoe_reuse_stats::mean_strength);

  nb::class_<ReuseBias>(m, "ReuseBias")
      .def(nb::init<int, int, int, int, double, double, double>(), nb::arg("method"), nb::arg("n_layers"),
           nb::arg("n_experts"), nb::arg("top_j"), nb::arg("strength"), nb::arg("max_mass_moved"), nb::arg("max_kl"))
      .def("select", &ReuseBias::Select, nb::arg("layer"), nb::arg("n_used"), nb::arg("scores"), nb::arg("masses"),
           nb::arg("resident"), nb::arg("order").noconvert(), nb::arg("are_probabilities") = false,
           nb::arg("are_logits") = false)
      .def("stats", &ReuseBias::Stats)
      .def("reset_stats", &ReuseBias::ResetStats);

  nb::class_<edgemoe_count_stats>(m, "CountStats")
      .def_ro("n_selections", &edgemoe_count_stats::n_selections)
      .def_ro("n_chosen", &edgemoe_count_stats::n_chosen)
      .def_ro("n_dropped", &edgemoe_count_stats::n_dropped)
      .def_ro("mass_moved", &edgemoe_count_stats::mass_moved)
      .def_ro("kl", &edgemoe_count_stats::kl);

  nb::class_<ExpertCount>(m, "ExpertCount")
      .def(nb::init<int, int, int, const std::vector<int32_t>&, double, int, int>(), nb::arg("rule"),
           nb::arg("n_layers"), nb::arg("n_experts"), nb::arg("n_of_layer"), nb::arg("top_p"), nb::arg("n_min"),
           nb::arg("n_max"))
      .def("select", &ExpertCount::Select, nb::arg("layer"), nb::arg("n_used"), nb::arg("scores"), nb::arg("masses"),
           nb::arg("order"), nb::arg("are_logits") = false, nb::arg("logits").none() = nb::none())
      .def("stats", &ExpertCount::Stats)
      .def("reset_stats", &ExpertCount::ResetStats);

  nb::class_<edgemoe_miss_stats>(m, "MissStats")
      .def_ro("n_selections", &edgemoe_miss_stats::n_selections)
      .def_ro("n_chosen", &edgemoe_miss_stats::n_chosen)
      .def_ro("n_copies", &edgemoe_miss_stats::n_copies)
      .def_ro("n_skipped", &edgemoe_miss_stats::n_skipped)
      .def_ro("mass_moved", &edgemoe_miss_stats::mass_moved)
      .def_ro("kl", &edgemoe_miss_stats::kl);

  nb::class_<OnMiss>(m, "OnMiss")
      .def(nb::init<bool, int, int, double, double>(), nb::arg("has_copies"), nb::arg("n_layers"), nb::arg("n_experts"),
           nb::arg("wait_mass"), nb::arg("copy_mass"))
      .def("select", &OnMiss::Select, nb::arg("layer"), nb::arg("masses"), nb::arg("resident"), nb::arg("order"),
           nb::arg("ids").noconvert(), nb::arg("are_logits") = false)
      .def("stats", &OnMiss::Stats)
      .def("reset_stats", &OnMiss::ResetStats);

  nb::class_<GgmlPlugin>(m, "GgmlPlugin")
      .def(nb::init<const std::string&>(), nb::arg("path"))
      .def("begin_load", &GgmlPlugin::BeginLoad, nb::arg("runtime"))
      .def("end_load", &GgmlPlugin::EndLoad)
      .def("set_lone_rows", &GgmlPlugin::SetLoneRows, nb::arg("n_tokens"))
      .def("set_profiled", &GgmlPlugin::SetProfiled, nb::arg("runtime").none(), nb::arg("n_experts"))
      .def("set_choosers", &GgmlPlugin::SetChoosers, nb::arg("runtime").none(), nb::arg("count").none(),
           nb::arg("reuse").none(), nb::arg("miss").none(), nb::arg("n_experts"))
      .def("populate", &GgmlPlugin::Populate, nb::arg("path"), nb::arg("ranges"), nb::arg("n_threads"))
      .def("built_against", &GgmlPlugin::BuiltAgainst)
      .def("llama_cpp_python", &GgmlPlugin::LlamaCppPython)
      .def("loaded", &GgmlPlugin::Loaded)
      .def("shares_library", &GgmlPlugin::SharesLibrary);

  nb::class_<edgemoe_ort_counters>(m, "OrtCounters")
      .def_ro("n_tokens", &edgemoe_ort_counters::n_tokens)
      .def_ro("count", &edgemoe_ort_counters::count)
      .def_ro("reuse", &edgemoe_ort_counters::reuse)
      .def_ro("miss", &edgemoe_ort_counters::miss);

  nb::class_<OrtCounting>(m, "OrtCounting").def("read", &OrtCounting::Read).def("reset", &OrtCounting::Reset);

  nb::class_<OrtPlugin>(m, "OrtPlugin")
      .def(nb::init<const std::string&>(), nb::arg("path"))
      .def("take_loaded", &OrtPlugin::TakeLoaded)
      .def("shares_library", &OrtPlugin::SharesLibrary);
}
