"""LMCache's module names, for scripts that import them."""
