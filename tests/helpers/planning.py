"""A tiny architecture whose memory can be worked out by hand, and its prediction."""

from qlora_exp.config.hydra_compose import compose
from qlora_exp.environment.device import Device, resolve
from qlora_exp.planning import planner

GPU = Device("cuda", "GPU", bf16=True, paging=True)


CPU = Device("cpu", "CPU", bf16=False, paging=False)


HIDDEN, INNER, LAYERS, VOCABULARY = 128, 256, 2, 512


ARCHITECTURE = (
    f"+model.architecture={{_name_or_path: random:llama, model_type: llama, vocab_size: {VOCABULARY},"
    f" hidden_size: {HIDDEN}, intermediate_size: {INNER}, num_hidden_layers: {LAYERS}, num_attention_heads: 4,"
    " num_key_value_heads: 4}"
)


ONE_LAYER = [
    "model=tiny_llama",
    "+model.architecture={_name_or_path: random:llama, model_type: llama, vocab_size: 512, hidden_size: 128,"
    " intermediate_size: 256, num_hidden_layers: 1, num_attention_heads: 4, num_key_value_heads: 4,"
    " max_position_embeddings: 256}",
    "training.max_length=64",
]
"""Words of a run whose plans take little time."""


LINEAR = LAYERS * (4 * HIDDEN**2 + 3 * HIDDEN * INNER)


REST = 2 * VOCABULARY * HIDDEN + (2 * LAYERS + 1) * HIDDEN


def predict(*words: str, device: Device = GPU, evaluated: int | None = 0) -> planner.Prediction:
    """Predict what a run of the tiny architecture takes, without evaluation unless its length is given."""
    config = compose(["model=tiny_llama", ARCHITECTURE, "training.max_length=64", *words])
    return planner.Planner(config, resolve(config, device)).predict(evaluated=evaluated)
