"""Share the frozen weights of one base model between jobs of one process."""
