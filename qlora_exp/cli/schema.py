"""`schema`: write a JSON schema for YAML completion."""

import argparse
import json
from pathlib import Path

from qlora_exp.cli.parents import Commands, add_command
from qlora_exp.utils.errors import ConfigError, did_you_mean


def add_parsers(commands: Commands) -> None:
    """Add `schema`."""
    parser = add_command(commands, "schema", schema)
    what = "group whose option files to describe, such as dataset; default: files with any key, as experiments have"
    parser.add_argument("group", nargs="?", metavar="GROUP", help=what)
    out = "folder to write the schema of each group to, as GROUP.json, instead of printing one"
    parser.add_argument("--out", type=Path, metavar="FOLDER", help=out)


def schema(options: argparse.Namespace) -> None:
    """Write a JSON schema of option files, for completion in an editor.

    Option files are those of `--config-dir FOLDER`: FOLDER/GROUP/NAME.yaml. An
    editor with YAML support (VS Code's extension by Red Hat) completes keys and
    options, shows what they mean, and marks what is misspelled. A file can also
    name its schema itself, in a comment of its own:
    `# yaml-language-server: $schema=../schemas/experiment.json`

    examples:
      qlora-exp schema > experiment.json     files with `# @package _global_`
      qlora-exp schema dataset               options of one group
      qlora-exp schema --out schemas         one file for each group
    """
    from qlora_exp.config.conf_folder import GROUPS
    from qlora_exp.config.describe import json_schema

    if options.group is not None and options.group not in GROUPS:
        raise ConfigError(
            f"no group '{options.group}'{did_you_mean(options.group, GROUPS)} Groups: {', '.join(GROUPS)}"
        )
    if options.out is None:
        made = json_schema.of_group(options.group) if options.group else json_schema.of_any()
        print(json.dumps(made, indent=1))
        return
    groups = [options.group] if options.group else GROUPS
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for group in groups:
            (options.out / f"{group}.json").write_text(json.dumps(json_schema.of_group(group), indent=1), "utf-8")
    except OSError as error:
        raise ConfigError(f"cannot write to {options.out}: {error.strerror}; choose another folder") from error
    print('VS Code, in .vscode/settings.json (with the extension "YAML" of Red Hat):\n"yaml.schemas": {')
    print(",\n".join(f'  "{(options.out / group).as_posix()}.json": "**/{group}/*.yaml"' for group in groups))
    print("}")
