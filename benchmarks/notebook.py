"""Run the notebook of the tutorial and keep its outputs (`nox -s notebook`)."""

import argparse
import re
import tempfile
from pathlib import Path
from typing import Any

NOTEBOOK = Path(__file__).parents[1] / "docs" / "tutorial" / "notebook.ipynb"


def main() -> None:
    """Run each cell in an empty folder and write the notebook back."""
    argparse.ArgumentParser(description=__doc__).parse_args()
    import nbformat
    from nbclient import NotebookClient

    notebook: Any = nbformat.read(NOTEBOOK, as_version=4)
    with tempfile.TemporaryDirectory() as folder:
        NotebookClient(notebook, timeout=600, resources={"metadata": {"path": folder}}).execute()
        for cell in notebook.cells:
            cell.metadata.pop("execution", None)  # times
            for output in cell.get("outputs", []):
                if "text" in output:  # paths of this machine
                    output.text = re.sub(rf"{re.escape(folder)}/?", "", output.text)
            if cell.cell_type == "code":
                cell.outputs = _joined(cell.outputs)
    notebook.metadata.pop("language_info", None)
    nbformat.write(notebook, NOTEBOOK)
    print(f"{NOTEBOOK}: {sum(cell.cell_type == 'code' for cell in notebook.cells)} cells")


def _joined(outputs: list[Any]) -> list[Any]:
    """Join what a cell printed; standard error, which has warnings of libraries and progress bars, is left out."""
    import nbformat

    texts = [output.text for output in outputs if output.output_type == "stream" and output.name == "stdout"]
    rest = [output for output in outputs if output.output_type != "stream"]
    return [nbformat.v4.new_output("stream", name="stdout", text="".join(texts)), *rest] if texts else rest


if __name__ == "__main__":
    main()
