"""Proved norms of layers as pure functions of their weights, rounding included."""
