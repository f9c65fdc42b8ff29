"""The machine under a run: devices, processes, memory allocator, signals, determinism, profiling, run directory."""
