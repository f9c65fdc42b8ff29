"""What benchmarks share: data made on the spot, traces of operations, clocks."""
