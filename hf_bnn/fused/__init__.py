"""Modules that run several layers of a packed model at once, for inference. Each equals the layers that it runs."""
