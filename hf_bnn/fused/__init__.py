"""Layers of a packed model that run as one compiled operation, for inference."""
