"""Moves KV between the engine's tensors and the host pool, one mover for each kind of device."""
