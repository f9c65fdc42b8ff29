"""Runtime environment: devices, processes, memory allocator, signals, reproducibility, profiling, run directory."""
