"""Why a setting is not honoured, where keys, names inside `extra_config` and variables share the reason."""

NUMA = "memory is taken near the rank's GPU where the machine says which node that is"
LOOKUP = (
    "the index is in the scheduler's own process: a lookup waits for nobody in RAM, 0.25 s for disk or Redis"
)
API = "there is no HTTP server; metrics are on vLLM's /metrics"
CONTROLLER = "there is no controller"
PLUGINS = "no foreign code is loaded"
SERVER = "there is no separate server: lmcache_rs works in vLLM's processes"
