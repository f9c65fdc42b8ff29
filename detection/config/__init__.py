"""Settings of a run: `args.yaml`, overlays, words and flags, validated into frozen sections. Imports no torch."""
