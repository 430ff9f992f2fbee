"""Measurements over methods and models: compatibility probe, quantization error, deployment gap.

May import: every room above.
Never here: what a run needs; no room but cli imports studies.
"""
