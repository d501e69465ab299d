#!/usr/bin/env bash
# Sends one prompt to the server of serve.sh: ask.sh MODEL [PORT]. Sent twice, the second finds the first one's KV.
set -euo pipefail
curl --silent --show-error --fail "http://127.0.0.1:${2:-8000}/v1/completions" \
    -H "Content-Type: application/json" \
    -d '{
        "model": "'"$1"'",
        "prompt": "<|im_start|>system\nYou are a helpful AI assistant.<|im_end|>\n<|im_start|>user\nWhat is the name of the capital of France?<|im_end|>\n<|im_start|>assistant\n",
        "max_tokens": 16,
        "temperature": 0
    }'
echo
