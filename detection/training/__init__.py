"""Parts of `yolo-v3/main.py`: the run, its state, the optimizer step, checkpoints, logging and monitoring."""
