"""Random geometry and colour of a training image; every choice is a function of (seed, epoch, index)."""
