"""Where LMCache keeps the name of the engine that vLLM uses."""

ENGINE_NAME = "vllm-instance"

__all__ = ["ENGINE_NAME"]
