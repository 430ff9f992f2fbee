"""Write the files that let MLflow load and serve a logged model as a Python function (`mlflow.pyfunc`).

They name a module of this package, which must be installed, and contain no code. MLflow's own `save_model` takes a
second for them, at the end of each run.
"""

import json
import platform
import tempfile
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

import yaml
from mlflow import MlflowClient
from mlflow.models import ModelSignature
from mlflow.types import ColSpec, DataType, ParamSchema, ParamSpec, Schema
from mlflow.types.schema import Array, Object, Property

MLMODEL = "MLmodel"
_LOADER = "qlora_exp.deploy.pyfunc"
_EXAMPLE = {"messages": [{"role": "user", "content": "Hello"}]}
_MESSAGE = Object([Property("role", DataType.string), Property("content", DataType.string)])
SIGNATURE = ModelSignature(
    inputs=Schema(
        [
            ColSpec(Array(_MESSAGE), "messages", required=False),
            ColSpec(DataType.string, "prompt", required=False),
            ColSpec(DataType.string, "input", required=False),
        ]
    ),
    outputs=Schema([ColSpec(DataType.string)]),
    params=ParamSchema(  # as in `qlora_exp.deploy.chat.Sampling`, which imports torch
        [
            ParamSpec("max_new_tokens", DataType.long, 256),
            ParamSpec("temperature", DataType.double, 0.0),
            ParamSpec("top_p", DataType.double, 1.0),
            ParamSpec("top_k", DataType.long, 0),
            ParamSpec("repetition_penalty", DataType.double, 1.0),
            ParamSpec("seed", DataType.long, None),
        ]
    ),
)


def log(mlflow: MlflowClient, run_id: str, model_id: str) -> None:
    """Upload the files to a logged model.

    Args:
        mlflow: client of the store.
        run_id: the run that logged the model.
        model_id: the logged model.
    """
    model = {
        "flavors": {
            "python_function": {
                "loader_module": _LOADER,
                "python_version": platform.python_version(),
                "env": {"virtualenv": "python_env.yaml"},
            }
        },
        "mlflow_version": version("mlflow"),
        "run_id": run_id,
        "model_id": model_id,
        "utc_time_created": str(datetime.now(UTC).replace(tzinfo=None)),
        "signature": SIGNATURE.to_dict(),
        # MLflow passes inputs on as they are. It would turn them into tables first, in which a plain prompt is lost.
        "is_signature_from_type_hint": True,
        "saved_input_example_info": {
            "type": "json_object",
            "artifact_path": "input_example.json",
            "serving_input_path": "serving_input_example.json",
        },
    }
    environment = {"python": platform.python_version(), "dependencies": ["-r requirements.txt"]}
    files = {
        MLMODEL: yaml.safe_dump(model, sort_keys=False),
        "python_env.yaml": yaml.safe_dump(environment, sort_keys=False),
        "requirements.txt": f"qlora-exp=={version('qlora-exp')}\n",
        "input_example.json": json.dumps(_EXAMPLE),
        "serving_input_example.json": json.dumps(_EXAMPLE),
    }
    with tempfile.TemporaryDirectory() as folder:
        for name, text in files.items():
            Path(folder, name).write_text(text, "utf-8")
        mlflow.log_model_artifacts(model_id, folder)
