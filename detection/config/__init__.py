"""What a run is told: `args.yaml`, overlays, words and flags, validated into frozen sections. Imports no torch."""
