"""Wrap Adam-mini's private parts. Checked on adam_mini 1.1.1."""


def optimizer_class() -> type:
    """Return Adam-mini's class, which counts values on the CPU (`adam_mini.adam_mini.device`).

    Its module chooses a GPU for that if torch sees one, so that plans and runs with device=cpu would start CUDA.
    """
    from adam_mini import adam_mini

    adam_mini.device = "cpu"
    return adam_mini.Adam_mini
