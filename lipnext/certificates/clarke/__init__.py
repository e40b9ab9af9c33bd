"""Bounds on the Clarke Jacobian around an image: local Lipschitz constants and l-infinity radii for plain networks."""
