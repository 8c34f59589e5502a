"""Speed of this machine: benchmarks of the parts."""
