"""Every setting of LMCache 0.5.6 that is not honoured: its type, LMCache's default, and why."""

from math import inf

from lmcache_rs.config import reasons
from lmcache_rs.config import values as v
from lmcache_rs.config.keys import Key, Status

_B, _I, _N, _T, _U = v.boolean(), v.integer(), v.number(), v.text(), v.url()
_S = v.size(zero=True)
_OPTIONAL_I, _OPTIONAL_N, _OPTIONAL_T, _OPTIONAL_U = (v.optional(kind) for kind in (_I, _N, _T, _U))
_COUNT = v.integer(0)
_INTS, _NUMBERS, _WORDS = (v.optional(v.list_of(kind)) for kind in (_I, _N, _T))

_YET, _IGNORED, _NO = Status.NOT_YET, Status.IGNORED, Status.NOT_PLANNED

_EVENTS = "KV events come in a later version"
_LAZY = "the engine starts at once, and RAM is taken in the background"
_PINS = "what is kept for a request is let go when the request ends, with no timer"
_STATISTICS = "chunk statistics are not kept"
_BLEND = "there is no CacheBlend"
_P2P = "there is no peer-to-peer transfer"
_PD = "there is no prefill/decode disaggregation; vLLM's own connectors do that"
_NIXL = "there is no NIXL transfer"
_GDS = "there is no GPUDirect Storage"
_MARU = "there is no Maru tier"
_HIDDEN = "hidden states are not kept"

OTHER_KEYS: tuple[Key, ...] = (
    # Disk and Redis.
    Key(
        "local_disk_path_sharding",
        _T,
        "by_gpu",
        _IGNORED,
        "every rank spreads its chunks over all directories",
    ),
    Key(
        "remote_serde",
        v.optional(v.choice("naive", "cachegen", "kivi")),
        "naive",
        _NO,
        "KV is kept as it is (naive)",
    ),
    Key("numa_mode", v.optional(v.choice("auto", "manual")), None, _IGNORED, reasons.NUMA),
    Key("enable_kv_events", _B, False, _YET, _EVENTS),
    # Without meaning here.
    Key("pre_caching_hash_algorithm", _T, "builtin", _IGNORED, "keys are always 256-bit"),
    Key(
        "lmcache_instance_id",
        _OPTIONAL_T,
        None,
        _IGNORED,
        "lines and metrics carry vLLM's own names of its engines",
    ),
    Key("py_enable_gc", _B, True, _IGNORED, "Python's garbage collector is left as it is"),
    Key(
        "use_layerwise",
        _B,
        False,
        _IGNORED,
        "loads come by layers where that is quicker, without being asked",
    ),
    Key("use_gpu_connector_v3", _B, False, _IGNORED, "there is one way of copying, for every layout"),
    Key("lookup_timeout_ms", _COUNT, 3000, _IGNORED, reasons.LOOKUP),
    Key("lookup_server_worker_ids", _INTS, None, _IGNORED, reasons.LOOKUP),
    Key("enable_scheduler_bypass_lookup", _B, False, _IGNORED, reasons.LOOKUP),
    Key("enable_lazy_memory_allocator", _B, False, _IGNORED, _LAZY),
    Key("lazy_memory_initial_ratio", _N, 0.2, _IGNORED, _LAZY),
    Key("lazy_memory_expand_trigger_ratio", _N, 0.5, _IGNORED, _LAZY),
    Key("lazy_memory_step_ratio", _N, 0.1, _IGNORED, _LAZY),
    Key("lazy_memory_safe_size", _S, 0, _IGNORED, _LAZY),
    Key("pin_timeout_sec", _COUNT, 300, _IGNORED, _PINS),
    Key("pin_check_interval_sec", _COUNT, 30, _IGNORED, _PINS),
    # Operations.
    Key("external_lookup_client", _OPTIONAL_T, None, _NO, reasons.LOOKUP),
    Key("hit_miss_ratio", _OPTIONAL_N, None, _NO, "hits are never withheld"),
    Key("internal_api_server_enabled", _B, False, _NO, reasons.API),
    Key("internal_api_server_host", _T, "127.0.0.1", _NO, reasons.API),
    Key("internal_api_server_port_start", _I, 6999, _NO, reasons.API),
    Key("internal_api_server_include_index_list", _INTS, None, _NO, reasons.API),
    Key("internal_api_server_socket_path_prefix", _OPTIONAL_T, None, _NO, reasons.API),
    Key("run_script_api_enabled", _B, False, _NO, reasons.PLUGINS),
    Key("script_allowed_imports", _WORDS, None, _NO, reasons.PLUGINS),
    Key("enable_chunk_statistics", _B, False, _NO, _STATISTICS),
    Key("chunk_statistics_auto_start_statistics", _B, False, _NO, _STATISTICS),
    Key("chunk_statistics_auto_exit_timeout_hours", _N, 0.0, _NO, _STATISTICS),
    Key("chunk_statistics_auto_exit_target_unique_chunks", _I, 0, _NO, _STATISTICS),
    Key("chunk_statistics_strategy", _T, "memory_bloom_filter", _NO, _STATISTICS),
    Key("runtime_plugin_locations", _WORDS, None, _NO, reasons.PLUGINS),
    Key("storage_plugins", _WORDS, None, _NO, reasons.PLUGINS),
    Key("remote_storage_plugins", _WORDS, None, _NO, reasons.PLUGINS),
    Key("remote_config_url", _OPTIONAL_U, None, _NO, "no configuration is ever fetched from the network"),
    Key("app_id", _OPTIONAL_T, None, _NO, "no configuration is ever fetched from the network"),
    Key("audit_actual_remote_url", _OPTIONAL_U, None, _NO, "there is no audit tier"),
    # Other features of LMCache.
    Key("enable_blending", _B, False, _NO, _BLEND),
    Key("blend_recompute_ratios", _NUMBERS, None, _NO, _BLEND),
    Key("blend_thresholds", _NUMBERS, None, _NO, _BLEND),
    Key("blend_check_layers", _INTS, None, _NO, _BLEND),
    Key("blend_min_tokens", _I, 256, _NO, _BLEND),
    Key("blend_special_str", _T, " # # ", _NO, _BLEND),
    Key("enable_controller", _B, False, _NO, reasons.CONTROLLER),
    Key("controller_pull_url", _OPTIONAL_T, None, _NO, reasons.CONTROLLER),
    Key("controller_reply_url", _OPTIONAL_T, None, _NO, reasons.CONTROLLER),
    Key("lmcache_worker_ports", _INTS, None, _NO, reasons.CONTROLLER),
    Key("lmcache_worker_ids", _INTS, None, _NO, reasons.CONTROLLER),
    Key("lmcache_worker_heartbeat_delay_time", _I, 10, _NO, reasons.CONTROLLER),
    Key("lmcache_worker_heartbeat_time", _OPTIONAL_I, None, _NO, reasons.CONTROLLER),
    Key("enable_p2p", _B, False, _NO, _P2P),
    Key("p2p_host", _OPTIONAL_T, None, _NO, _P2P),
    Key("p2p_init_ports", _INTS, None, _NO, _P2P),
    Key("p2p_lookup_ports", _INTS, None, _NO, _P2P),
    Key("transfer_channel", _OPTIONAL_T, None, _NO, _P2P),
    Key("enable_pd", _B, False, _NO, _PD),
    Key("pd_role", _OPTIONAL_T, None, _NO, _PD),
    Key("pd_buffer_size", _OPTIONAL_I, None, _NO, _PD),
    Key("pd_buffer_device", _OPTIONAL_T, None, _NO, _PD),
    Key("pd_peer_host", _OPTIONAL_T, None, _NO, _PD),
    Key("pd_peer_init_port", _INTS, None, _NO, _PD),
    Key("pd_peer_alloc_port", _INTS, None, _NO, _PD),
    Key("pd_peer_query_port", _INTS, None, _NO, _PD),
    Key("pd_proxy_host", _OPTIONAL_T, None, _NO, _PD),
    Key("pd_proxy_port", _OPTIONAL_I, None, _NO, _PD),
    Key("pd_allocation_timeout_sec", v.number(0, infinite=True), inf, _NO, _PD),
    Key("pd_shutdown_timeout_sec", _N, 5.0, _NO, _PD),
    Key("pd_condition_poll_interval_sec", _N, 0.005, _NO, _PD),
    Key("pd_max_prefill_len", _I, 0, _NO, _PD),
    Key("pd_backend_mode", v.optional(v.choice("async", "sync")), "async", _NO, _PD),
    Key("pd_skip_proxy_notification", _B, False, _NO, _PD),
    Key("pd_bidirectional", _B, False, _NO, _PD),
    Key("nixl_backends", _WORDS, None, _NO, _NIXL),
    Key("nixl_buffer_size", _OPTIONAL_I, None, _NO, _NIXL),
    Key("nixl_buffer_device", _OPTIONAL_T, None, _NO, _NIXL),
    Key("nixl_peer_port", _OPTIONAL_I, None, _NO, _NIXL),
    Key("gds_path", _OPTIONAL_T, None, _NO, _GDS),
    Key("gds_path_sharding", _T, "by_gpu", _NO, _GDS),
    Key("gds_buffer_size", _OPTIONAL_I, None, _NO, _GDS),
    Key("use_gds", _B, True, _NO, _GDS),
    Key("gds_backend", _T, "cufile", _NO, _GDS),
    Key("maru_path", _OPTIONAL_T, None, _NO, _MARU),
    Key("maru_pool_size", _S, 4 * v.GIB, _NO, _MARU),
    Key("mp_host", _OPTIONAL_T, None, _NO, reasons.SERVER),
    Key("mp_port", _I, 5555, _NO, reasons.SERVER),
    Key("enable_hidden_state_cache", _B, False, _NO, _HIDDEN),
    Key("max_hidden_state_cpu_size", _S, 2 * v.GIB, _NO, _HIDDEN),
    Key("hidden_state_layers", _INTS, None, _NO, _HIDDEN),
    Key("hidden_states_retrieve_mode", _T, "prefix_strict", _NO, _HIDDEN),
    Key("ec", v.anything(), None, _NO, "the encoder's cache is not kept"),
    Key("ec_*", v.anything(), None, _NO, "the encoder's cache is not kept"),
)

# Old name -> the name LMCache gave it later. (nixl_buffer_size is a key of its own as well.)
ALIASES = {
    "enable_xpyd": "enable_pd",
    "nixl_peer_host": "pd_peer_host",
    "nixl_peer_init_port": "pd_peer_init_port",
    "nixl_peer_alloc_port": "pd_peer_alloc_port",
    "nixl_proxy_host": "pd_proxy_host",
    "nixl_proxy_port": "pd_proxy_port",
    "nixl_role": "pd_role",
    "controller_url": "controller_pull_url",
    "lmcache_worker_port": "lmcache_worker_ports",
    "plugin_locations": "runtime_plugin_locations",
    "external_backends": "storage_plugins",
}
