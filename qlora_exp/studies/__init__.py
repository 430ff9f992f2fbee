"""Measure methods, models and this machine: compatibility probe, quantization error, deployment gap, doctor.

May import: every room listed before it in the README.
Never here: code that a training run needs. Only cli imports studies.
"""
