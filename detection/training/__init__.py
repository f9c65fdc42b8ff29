"""What `yolo-v3/main.py` drives: a run, its state, one optimizer step, and everything that watches over it."""
