"""Measure methods and models: compatibility probe, quantization error, deployment gap.

May import: every room listed before it in the README.
Never here: code that a training run needs. Only cli imports studies.
"""
