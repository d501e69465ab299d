"""Every metric: its name in our counters and on vLLM's log line, that on /metrics, and what it says."""

GAUGES = {
    "pool_rows": ("lmcache:local_cache_rows", "Rows of the RAM pool"),
    "pool_used_rows": (
        "lmcache:local_cache_used_rows",
        "Rows of the RAM pool that hold KV or are being written",
    ),
    "pool_bytes": ("lmcache:local_cache_capacity_bytes", "Bytes of the RAM pool on one rank"),
    "pool_used_bytes": ("lmcache:local_cache_usage", "Bytes of the RAM pool in use on one rank"),
}
"""Values that say how things are now; of two the later one counts."""

COUNTERS = {
    "lookups": ("lmcache:num_lookup_requests", "Requests looked up"),
    "lookup_tokens": ("lmcache:num_lookup_tokens", "Tokens of the requests looked up"),
    "lookup_hits": ("lmcache:num_lookup_hits", "Tokens of them that were found, from the first one on"),
    "gpu_hit_tokens": ("lmcache:num_vllm_hit_tokens", "Tokens of them that were in vLLM's own prefix cache"),
    "hit_tokens": ("lmcache:num_hit_tokens", "Tokens of them that were loaded from the cache"),
    "stores": ("lmcache:num_store_requests", "Stores that were completed"),
    "stored_tokens": ("lmcache:num_stored_tokens", "Tokens stored"),
    "store_bytes": ("lmcache:num_stored_bytes", "Bytes stored, of all ranks"),
    "store_seconds": ("lmcache:store_seconds", "Seconds spent storing, of the slowest rank"),
    "loads": ("lmcache:num_retrieve_requests", "Loads that were completed"),
    "load_bytes": ("lmcache:num_retrieved_bytes", "Bytes loaded, of all ranks"),
    "load_seconds": ("lmcache:retrieve_seconds", "Seconds spent loading, of the slowest rank"),
    "failed_loads": ("lmcache:num_failed_retrieve_requests", "Loads that failed; their tokens were computed"),
    "loads_as_fetched": (
        "lmcache:num_streamed_retrieve_requests",
        "Loads that began while their last chunks were still being fetched from disk or Redis",
    ),
    "cut_loads": (
        "lmcache:num_cut_retrieve_requests",
        "Those of them of which a chunk did not come: loaded anew as far as it came",
    ),
    "evictions": ("lmcache:local_cpu_evict_count", "Rows evicted from the RAM pool"),
    "pending_timeouts": ("lmcache:num_pending_timeouts", "Lookups that waited in vain for a store to end"),
    "turned_off": (
        "lmcache:num_times_turned_off",
        "Times the cache turned itself off after repeated failures",
    ),
    "waits_for_holders": (
        "lmcache:num_waits_for_holders",
        "Answers put off until requests that hold blocks run",
    ),
    "tier_lookups": ("lmcache:num_tier_lookup_chunks", "Chunks looked for on disk and in Redis"),
    "search_timeouts": (
        "lmcache:num_tier_lookup_timeouts",
        "Lookups that disk or Redis did not answer in time",
    ),
    "fetch_timeouts": ("lmcache:num_tier_read_timeouts", "Requests that waited in vain for disk or Redis"),
    "fetched_chunks:disk": ("lmcache:num_disk_read_requests", "Chunks loaded from disk"),
    "fetched_bytes:disk": ("lmcache:num_disk_read_bytes", "Bytes loaded from disk, of all ranks"),
    "written_chunks:disk": (
        "lmcache:num_disk_write_requests",
        "Chunks written to disk, or found there already",
    ),
    "written_bytes:disk": ("lmcache:num_disk_write_bytes", "Bytes written to disk, of all ranks"),
    "fetched_chunks:redis": ("lmcache:num_remote_read_requests", "Chunks loaded from Redis"),
    "fetched_bytes:redis": ("lmcache:num_remote_read_bytes", "Bytes loaded from Redis, of all ranks"),
    "written_chunks:redis": (
        "lmcache:num_remote_write_requests",
        "Chunks written to Redis, or found there already",
    ),
    "written_bytes:redis": ("lmcache:num_remote_write_bytes", "Bytes written to Redis, of all ranks"),
    "unsaved_evictions": (
        "lmcache:num_unsaved_evictions",
        "Rows evicted from the RAM pool that are neither on disk nor in Redis",
    ),
    "leases_refused": ("lmcache:num_leases_refused", "Waiting hits that were not kept from leaving"),
}

LABELLED: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "misses": ("lmcache:num_misses", "Requests that loaded nothing, by reason", ("reason",)),
    "dropped_stores": ("lmcache:num_dropped_stores", "Stores dropped, by reason", ("reason",)),
    "dropped_blocks": ("lmcache:num_dropped_blocks", "Blocks not stored, by reason", ("reason",)),
    "failed_fetches": (
        "lmcache:num_failed_tier_reads",
        "Chunks that could not be loaded, by tier",
        ("tier",),
    ),
    "dropped_fetches": (
        "lmcache:num_dropped_tier_reads",
        "Requests for which less was loaded than found",
        ("reason",),
    ),
    "failed_writes": (
        "lmcache:num_failed_tier_writes",
        "Chunks that could not be written, by tier",
        ("tier",),
    ),
    "tier_refusals": (
        "lmcache:num_tier_refusals",
        "What disk and Redis did not do: store, load or find, and why",
        ("tier", "operation", "reason"),
    ),
    "errors": ("lmcache:num_errors", "Connector hooks that failed, by hook", ("hook",)),
}
"""Counters whose name is followed by labels, each after a colon."""
