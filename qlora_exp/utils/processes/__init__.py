"""Several processes: signals, pools of workers, and calls with limits of time and memory."""
