"""Settings that are not keys of their own: inside extra_config, without a prefix in vLLM's, and variables."""

from lmcache_rs.config import reasons
from lmcache_rs.config import values as v
from lmcache_rs.config.keys import Key, Status
from lmcache_rs.config.remote import REMOTE_URL

_B, _COUNT, _T, _N = v.boolean(), v.integer(0), v.text(), v.number(0)
_ANY, _SECRET = v.anything(), v.secret()
_DONE, _YET, _IGNORED, _NO = Status.HONOURED, Status.NOT_YET, Status.IGNORED, Status.NOT_PLANNED

_SAME = "The same as `{}`, which wins."
_LOGIN = "For a {} without a login."
_CONNECTIONS = "a connection is opened where a thread needs one: see `tier_threads`"
_TIMEOUT = "loads wait `blocking_timeout_secs` at most, lookups 0.25 s, connecting takes 2 s at most"
_HEALTH = "a server that fails rests for a second and is tried again; what it has is computed meanwhile"
_USAGE = "details in responses come in a later version"
_RANKS = "every rank keeps its own part"
_POOL = "the pool's memory is private and aligned to 4 KiB"
_TIER = "there is no such tier"
_SILENT = "nothing is reported to anyone"

# Inside the mapping `extra_config`.
EXTRA_CONFIG_KEYS: tuple[Key, ...] = (
    Key("use_odirect", _B, None, _DONE, _SAME.format("local_disk_direct")),
    Key("disk_io_threads", v.integer(1), None, _DONE, _SAME.format("tier_threads") + " More than 64 are 64."),
    Key("redis_url", REMOTE_URL, None, _DONE, _SAME.format("remote_url")),
    Key("remote_storage_plugin.redis.redis_url", REMOTE_URL, None, _DONE, _SAME.format("remote_url")),
    Key("username", _SECRET, None, _DONE, _LOGIN.format("`remote_url`")),
    Key("password", _SECRET, None, _DONE, _LOGIN.format("`remote_url`")),
    Key("valkey_username", _SECRET, None, _DONE, _LOGIN.format("`valkey://` URL")),
    Key("valkey_password", _SECRET, None, _DONE, _LOGIN.format("`valkey://` URL")),
    Key(
        "valkey_mode",
        v.choice("standalone", "cluster"),
        None,
        _DONE,
        "`cluster` makes valkey:// redis-cluster://.",
    ),
    Key(
        "valkey_database", v.integer(0, 2**31 - 1), None, _DONE, "For a valkey:// URL that names no database."
    ),
    Key("valkey_enable_ttl", _B, None, _DONE, "True lets values expire, after `valkey_ttl_sec`."),
    Key(
        "valkey_ttl_sec",
        v.integer(1, 10**9),
        None,
        _DONE,
        "With `valkey_enable_ttl`: the same as `redis_ttl_secs`, which wins. 86400 if not given.",
    ),
    Key("tls_enable", _B, None, _DONE, "True makes redis://, resp:// and valkey:// rediss://."),
    Key("disable_tls", _B, None, _IGNORED, "TLS is used where the URL is rediss://"),
    Key("resp_num_threads", v.integer(1), None, _IGNORED, _CONNECTIONS),
    Key("valkey_num_workers", v.integer(1), None, _IGNORED, _CONNECTIONS),
    Key("valkey_sync_num_workers", v.integer(1), None, _IGNORED, _CONNECTIONS),
    Key("request_timeout", _N, None, _IGNORED, _TIMEOUT),
    Key("connection_timeout", _N, None, _IGNORED, _TIMEOUT),
    Key("ping_timeout", _N, None, _IGNORED, _HEALTH),
    Key("ping_interval", _N, None, _IGNORED, _HEALTH),
    Key("fallback_policy", v.choice("recompute", "local_cpu"), None, _IGNORED, _HEALTH),
    Key("get_blocking_failed_threshold", _COUNT, None, _IGNORED, _HEALTH),
    Key("waiting_time_for_recovery", _N, None, _IGNORED, _HEALTH),
    Key("gpu_to_numa_mapping", _ANY, None, _IGNORED, reasons.NUMA),
    Key("enable_cache_usage_details_in_response", _B, None, _YET, _USAGE),
    Key("lookup_backoff_time", _N, None, _IGNORED, reasons.LOOKUP),
    Key("use_exists_sync", _B, None, _IGNORED, reasons.LOOKUP),
    Key("save_chunk_meta", _B, None, _IGNORED, "objects always carry their own header"),
    Key(
        "force_store_wait", _B, None, _IGNORED, "a request that returns waits for its own stores, for a while"
    ),
    Key("save_only_first_rank", _B, None, _IGNORED, _RANKS),
    Key("first_rank_max_local_cpu_size", _ANY, None, _IGNORED, _RANKS),
    Key("remote_enable_mla_worker_id_as0", _B, None, _IGNORED, _RANKS),
    Key("local_cpu.pinned_align_bytes", _ANY, None, _IGNORED, _POOL),
    Key("shm_name", _T, None, _IGNORED, _POOL),
    Key("shared_memory_name", _T, None, _IGNORED, _POOL),
    Key("histogram_bucket_*", _ANY, None, _IGNORED, "there are no histograms, only counters and gauges"),
    Key("chunk_statistics_*", _ANY, None, _NO, "chunk statistics are not kept"),
    Key("internal_api_server_*", _ANY, None, _NO, reasons.API),
    Key("kv_msg_batch_*", _ANY, None, _NO, reasons.CONTROLLER),
    Key("full_sync_*", _ANY, None, _NO, reasons.CONTROLLER),
    Key("heartbeat_url", _ANY, None, _NO, reasons.CONTROLLER),
    Key("worker_socket_*", _ANY, None, _NO, reasons.CONTROLLER),
    Key("controller_packages", _ANY, None, _NO, reasons.CONTROLLER),
    Key("disabled_controllers", _ANY, None, _NO, reasons.CONTROLLER),
    Key("p2p_*", _ANY, None, _NO, "there is no peer-to-peer transfer"),
    Key("storage_plugin.*", _ANY, None, _NO, reasons.PLUGINS),
    Key("remote_storage_plugin.*", _ANY, None, _NO, reasons.PLUGINS),
    Key("rust_raw_block.*", _ANY, None, _NO, _TIER),
    Key("fs_*", _ANY, None, _NO, _TIER),
    Key("s3_*", _ANY, None, _NO, _TIER),
    Key("aws_*", _SECRET, None, _NO, _TIER),
    Key("azure_*", _SECRET, None, _NO, _TIER),
    Key("nixl_*", _ANY, None, _NO, "there is no NIXL transfer"),
    Key("enable_nixl_storage", _B, False, _NO, "there is no NIXL transfer"),
    Key("dax.*", _ANY, None, _NO, _TIER),
    Key("maru_*", _ANY, None, _NO, _TIER),
    Key("audit_*", _ANY, None, _NO, _TIER),
    Key("hf3fs_*", _ANY, None, _NO, _TIER),
    Key("infinistore_*", _ANY, None, _NO, _TIER),
    Key("mooncake_*", _ANY, None, _NO, _TIER),
    Key("sagemaker_hyperpod_*", _ANY, None, _NO, _TIER),
)

# In kv_connector_extra_config without the prefix "lmcache.", beside honoured keys that may be written so.
UNPREFIXED_HONOURED = ("discard_partial_chunks", "skip_last_n_tokens")
UNPREFIXED_KEYS: tuple[Key, ...] = (
    Key("lmcache_rpc_port", _ANY, None, _IGNORED, "no port is opened"),
    Key("use_native", _ANY, None, _IGNORED, "there is one connector"),
    Key(
        "use_layerwise", _B, None, _IGNORED, "loads come by layers where that is quicker, without being asked"
    ),
)

# In kv_connector_extra_config with the prefix, which is not part of the names here.
PREFIXED_KEYS: tuple[Key, ...] = (
    Key("skip_save", _ANY, None, _IGNORED, "it belongs into a request's kv_transfer_params"),
    Key("tag.*", _ANY, None, _IGNORED, "it belongs into a request's kv_transfer_params"),
    Key("mp.*", _ANY, None, _NO, reasons.SERVER),
)

# Environment variables that are not the variable of a key.
VARIABLES: tuple[Key, ...] = (
    Key("LMCACHE_CONFIG_FILE", _T, None, _DONE, "The path of the YAML file."),
    Key("LMCACHE_RS_DISABLE_PLUGIN", v.boolean(), False, _DONE, "Leave vLLM's connector names alone."),
    Key(
        "LMCACHE_RS_OVERRIDE_LMCACHE",
        v.boolean(),
        False,
        _DONE,
        "Be LMCacheConnectorV1 although a real LMCache is installed.",
    ),
    Key(
        "LMCACHE_LOG_LEVEL",
        _T,
        "INFO",
        _DONE,
        "DEBUG, INFO, WARNING, ERROR or CRITICAL; INFO is used for anything else.",
    ),
    Key("LMCACHE_DISABLE_BANNER", _ANY, None, _IGNORED, "there is no banner"),
    Key("LMCACHE_TRACK_USAGE", _ANY, None, _IGNORED, _SILENT),
    Key("LMCACHE_USAGE_TRACK_*", _ANY, None, _IGNORED, _SILENT),
    Key("LMCACHE_SERVER_URL", _ANY, None, _IGNORED, _SILENT),
    Key(
        "LMCACHE_USE_EXPERIMENTAL", _ANY, None, _IGNORED, "it means nothing to LMCache either, since long ago"
    ),
    Key("LMCACHE_OFFLOAD_RPC_PORT", _ANY, None, _IGNORED, "no port is opened"),
    Key("LMCACHE_DEVICE_BACKEND", _ANY, None, _IGNORED, "the device is the one that vLLM uses"),
    Key("LMCACHE_GPU_STAGING_BUFFER_BYTES", _ANY, None, _IGNORED, "the size of the staging buffer is fixed"),
    Key("LMCACHE_RESP_USERNAME", _SECRET, None, _DONE, _LOGIN.format("`resp://` URL")),
    Key("LMCACHE_RESP_PASSWORD", _SECRET, None, _DONE, _LOGIN.format("`resp://` URL")),
    Key("LMCACHE_RESP_HOST", _T, None, _IGNORED, "the host is in `remote_url`"),
    Key("LMCACHE_RESP_PORT", v.integer(1, 65535), None, _IGNORED, "the port is in `remote_url`"),
    Key("LMCACHE_MP_TRANSFER_MODE", _ANY, None, _NO, reasons.SERVER),
    Key("LMCACHE_MQ_TIMEOUT", _ANY, None, _NO, reasons.SERVER),
    Key("LMCACHE_COORDINATOR_*", _ANY, None, _NO, reasons.SERVER),
    Key("LMCACHE_CONTROLLER_*", _ANY, None, _NO, reasons.CONTROLLER),
    Key("LMCACHE_REQUEST_TELEMETRY_*", _ANY, None, _NO, "requests are not reported to anyone"),
    Key("LMCACHE_RUNTIME_PLUGIN_*", _ANY, None, _NO, reasons.PLUGINS),
    Key("LMCACHE_PLUGIN_*", _ANY, None, _NO, reasons.PLUGINS),
    Key("LMCACHE_AEROSPIKE_*", _SECRET, None, _NO, _TIER),
    Key("LMCACHE_MUSA_*", _ANY, None, _NO, "MUSA devices are not supported"),
)

# Variables of other names that LMCache reads. They are other people's too: no line at the start names them.
FOREIGN_VARIABLES: tuple[Key, ...] = (
    Key("REDIS_SERVICE_NAME", _ANY, None, _IGNORED, "a sentinel's service is in the path of `remote_url`"),
    Key("REDIS_TIMEOUT", _ANY, None, _IGNORED, _TIMEOUT),
    Key("DO_NOT_TRACK", _ANY, None, _IGNORED, _SILENT),
    Key("PROMETHEUS_MULTIPROC_DIR", _ANY, None, _IGNORED, "metrics go through vLLM, which reads it itself"),
    Key("PYTHONHASHSEED", _ANY, None, _IGNORED, "it need not be set: keys are the same in all processes"),
)
