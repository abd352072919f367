"""Helpers around attention that the predecessors shipped: dense masks and padding."""
