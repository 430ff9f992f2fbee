"""Replace how layers of a model store their weights or compute, without changing what they compute."""
