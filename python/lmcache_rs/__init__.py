"""Keeps KV cache that vLLM would throw away, in RAM, and puts it back when a prefix returns."""
