"""What only a CPU runs: compiled loops over rows and tiles."""
