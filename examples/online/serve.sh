#!/usr/bin/env bash
# Serves a model with its KV kept in RAM: serve.sh MODEL [options of `vllm serve` ...]
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
export LMCACHE_CONFIG_FILE="$here/lmcache_config.yaml"
# GiB; read by vLLM's CPU build only, which would else take most of the machine's memory.
export VLLM_CPU_KVCACHE_SPACE="${VLLM_CPU_KVCACHE_SPACE:-2}"
exec vllm serve "$@" --kv-transfer-config '{"kv_connector":"LMCacheConnectorV1","kv_role":"kv_both"}'
