"""Measure methods and models: compatibility probe, quantization error, deployment gap.

May import: every room above.
Never here: code that a training run needs. Only cli imports studies.
"""
