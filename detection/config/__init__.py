"""Settings of a run from `args.yaml`, overlays and the command line, validated and frozen. Imports no torch."""
