"""Layers. Each answers for its own Lipschitz bound and for its own floating-point error."""
