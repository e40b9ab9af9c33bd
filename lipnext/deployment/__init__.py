"""What leaves the machine: bundles on disk."""
