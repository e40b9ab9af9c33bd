"""Optimisers on the orthogonal group, the Euclidean rest, schedules and averages."""
