"""Certificates: from proved bounds and computed margins to radii that hold."""
