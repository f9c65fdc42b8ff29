"""Search for settings: the space, the trials with their rungs, and what came out."""
