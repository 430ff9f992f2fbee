"""`merge`, `export`, `register` and `deployment-gap`: export a trained model, and measure what that costs."""

import argparse
import json
import logging
import os
from pathlib import Path

from qlora_exp.cli.parents import RUN, SOURCE, URI, Commands, add_command, add_overrides
from qlora_exp.deploy.formats import DEPLOYED, EXPORT_FORMATS, GGUF_TYPES
from qlora_exp.utils.display import say
from qlora_exp.utils.errors import ConfigError
from qlora_exp.utils.files import check_source, write_atomically
from qlora_exp.utils.quiet import quiet


def add_parsers(commands: Commands) -> None:
    """Add the four commands."""
    out = argparse.ArgumentParser(add_help=False)
    out.add_argument("--out", type=Path, required=True, metavar="FOLDER", help="folder to write; must not exist")
    out.add_argument(
        "--dtype",
        choices=("auto", "float32", "bfloat16", "float16"),
        default="auto",
        help="dtype of the merged weights; auto (default): that of the base model's files",
    )
    out.add_argument(
        "--base",
        choices=("auto", "files", "trained"),
        default="auto",
        help="if training quantized the base model, weights to merge into: the quantized ones that the adapter was "
        "trained on, which give the model that the run measured (trained), or those in its files (files); auto "
        "(default): trained for merged and for GGUF in f32, f16, bf16 and q8_0, files for all other formats, which "
        "would round twice",
    )

    out.set_defaults(less_memory=_LESS_MEMORY)
    add_command(commands, "merge", merge, [SOURCE, URI, out])

    parser = add_command(commands, "export", export, [SOURCE, URI, out])
    add_overrides(
        parser, "keys of the run's config to change when gptq, awq or w4a16 reads its rows, such as dataset.path=FILE"
    )
    parser.add_argument("--to", choices=EXPORT_FORMATS, required=True, help="format to write")
    parser.add_argument(
        "--type", default="q8_0", help=f"type of the weights in a GGUF file: {', '.join(GGUF_TYPES)}; default: q8_0"
    )

    parser = add_command(commands, "register", register, [RUN, URI])
    parser.add_argument("--name", required=True, help="name of the registered model")
    parser.add_argument("--alias", help="MLflow alias to set to this version, such as champion")
    parser.add_argument("--card", type=Path, metavar="FILE", help="also write the model card to this file")
    parser.add_argument("--push", metavar="ORG/NAME", help="also upload to the Hugging Face hub (needs HF_TOKEN)")
    parser.add_argument(
        "--public", action="store_true", help="with --push: make a new hub repository public; default: private"
    )

    parser = add_command(commands, "deployment-gap", deployment_gap, [RUN, URI])
    parser.set_defaults(less_memory="less is taken with fewer --forms, or evaluation.generation_batch_size=1")
    add_overrides(parser, "keys of the run's config to change, such as dataset.path=FILE or evaluation.generate_rows=8")
    parser.add_argument(
        "--forms",
        metavar="LIST",
        help=f"formats to measure, separated by commas: {', '.join(DEPLOYED)}; default: all that are possible",
    )
    parser.add_argument(
        "--out",
        type=Path,
        metavar="FOLDER",
        help="folder to write the exported models to; default: outputs/deployment/RUN_ID",
    )


_LESS_MEMORY = (
    "the model does not fit into memory in this form: free some, use a machine with more, or --dtype bfloat16, which "
    "takes half of float32; an adapter need not be merged to be used (qlora-exp serve)"
)


def merge(options: argparse.Namespace) -> None:
    """Merge an adapter into its base model, for use without PEFT.

    example:
      qlora-exp merge RUN_ID --out merged --dtype bfloat16
    """
    _export(options, "merged")


def export(options: argparse.Namespace) -> None:
    """Export a trained model: merged, as GGUF, or quantized to 4 or 8 bits.

    gptq, awq, w4a16, w4a16_awq and w8a8 need the run's training rows. If their file
    is elsewhere on this machine, name it with dataset.path=FILE.

    examples:
      qlora-exp export RUN_ID --to gguf --out gguf      for llama.cpp and Ollama
      qlora-exp export RUN_ID --to nf4 --out nf4        bitsandbytes 4-bit
      qlora-exp export RUN_ID --to w4a16 --out w4a16    compressed-tensors, for vLLM
      qlora-exp export RUN_ID --to gptq --out gptq dataset.path=here/rows.jsonl
    """
    _export(options, options.to, options.type, options.overrides)


def _export(options: argparse.Namespace, form: str, gguf_type: str = "", overrides: list[str] | None = None) -> None:
    logging.basicConfig(format="%(message)s", level=logging.INFO)
    quiet()
    check_source(options.source)
    os.environ.setdefault("TORCHDYNAMO_DISABLE", "1")  # GPTQModel's layers would be compiled one by one
    from qlora_exp.config.untrusted import changed, given
    from qlora_exp.deploy import export as exporting
    from qlora_exp.deploy import load

    saved = load.find(options.source, options.uri, "cpu")
    rows_of = None
    if overrides:
        rows_of = changed(saved.config.model_dump(mode="json"), given(overrides), "the recorded config")
    made = exporting.export(saved, options.out, form, options.dtype, options.base, gguf_type, rows_of)
    say(f"base    {made.base}; {made.weights}")
    say(
        f"check   logits differ by at most {made.max_logit_difference:.2g} (largest logit: {made.max_logit:.3g}), KL "
        f"{made.mean_kl:.2g} nats per token, the same first choice after {made.same_first_choice:.1%} of tokens"
    )
    for difference in made.differences:
        say(f"differs {difference}")
    same = f"{made.same_answer_tokens} of {made.answer_tokens} tokens"
    say(f"answer  to a fixed question: {same} are as adapter and base apart: {made.answer!r}")
    say(f"folder  {made.folder} ({made.bytes / 1e6:,.1f} MB)")


def register(options: argparse.Namespace) -> None:
    """Register a run's model in MLflow's registry, with a model card.

    example:
      qlora-exp register RUN_ID --name concrete --alias champion
    """
    quiet()
    if options.card is not None and not options.card.absolute().parent.is_dir():
        raise ConfigError(f"--card {options.card}: no folder {options.card.absolute().parent}")
    from qlora_exp.deploy import registry

    version, card = registry.register(options.uri, options.run, options.name, options.alias)
    say(f"version  {version.version} of {version.name}", f"load     qlora_exp.load({version.uri!r})")
    if options.card is not None:
        write_atomically(options.card, card)
        say(f"card     {options.card}")
    if options.push is not None:
        say(f"hub      {registry.push(options.uri, version.uri, options.push, card, not options.public)}")


def deployment_gap(options: argparse.Namespace) -> None:
    """Measure how much quality a trained model loses when it is merged or quantized.

    Exports the model in each format and evaluates it on the run's held-out rows:
    loss, quality of answers, size, memory, time per token.

    example:
      qlora-exp deployment-gap RUN_ID --forms merged,nf4,gguf_q8_0
    """
    quiet()
    from rich.console import Console

    from qlora_exp.config import untrusted
    from qlora_exp.deploy import load
    from qlora_exp.results import records, reproduce
    from qlora_exp.studies import deployment_gap as gap
    from qlora_exp.tracking import mlflow_store
    from qlora_exp.utils.tables import print_table

    record = reproduce.find_run(options.uri, options.run)
    config = reproduce.recorded_config(record, untrusted.given(options.overrides), options.uri)
    saved = load.find(record.run_id, options.uri, "cpu")
    forms = gap.formats_of(
        config, saved.adapter, load.architecture(saved).model_type, options.forms.split(",") if options.forms else ()
    )
    out = options.out or Path("outputs") / "deployment" / record.run_id
    out.mkdir(parents=True, exist_ok=True)
    with Console(stderr=True).status("") as status:
        measured, failed = gap.study(record.run_id, options.uri, config, forms, out, status.update)
    for headings, rows in gap.tables(measured):
        print_table(f"{record.name}, on the same held-out rows", headings, rows)
    print(
        "change: difference from the model as it was trained, with a 95 % confidence interval over these rows. MB: "
        "size of all weights. MiB: memory for generation, without imported libraries. GGUF: the loss is measured with "
        "transformers, everything else with llama.cpp"
    )
    file = out / "deployment_gap.json"
    write_atomically(file, json.dumps(gap.as_json(measured, failed, record.run_id), indent=1, ensure_ascii=False))
    with records.mlflow_errors_explained():
        mlflow_store.client(options.uri).log_artifact(record.run_id, str(file))
    say(f"file  {file}, saved with run {record.run_id} in MLflow too; the exported models are next to it")
    if failed:
        raise ConfigError("not measured: " + "; ".join(f"{form}: {why}" for form, why in failed.items()))
