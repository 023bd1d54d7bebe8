"""Checks this machine for a configuration, and lists what to fix. Exit status 1 on a failure.

python -m launch.doctor --config=tiny_cpu [--json]
"""

import dataclasses
import json

from absl import flags as absl_flags
from rich.table import Table
from rich.text import Text

from launch import flags, program
from launch.console import STDOUT
from launch.doctor.checks import check
from launch.doctor.finding import Finding, Level
from launch.doctor.probe import look

JSON = absl_flags.DEFINE_boolean("json", False, "Prints findings and machine as one JSON object.")
STYLES = {Level.OK: "green", Level.WARN: "yellow", Level.FAIL: "bold red"}


def main() -> int:
    config = flags.run_config()
    machine = look(config)
    named = 0 if flags.GPUS.value is None else len(flags.gpus())
    findings = check(machine, config, named)
    failed = any(finding.level is Level.FAIL for finding in findings)
    if JSON.value:
        print(
            json.dumps(
                {
                    "config": config.name,
                    "ok": not failed,
                    "findings": [as_json(finding) for finding in findings],
                    "machine": dataclasses.asdict(machine),
                }
            )
        )
    else:
        show(findings, config.name)
    return int(failed)


def as_json(finding: Finding) -> dict:
    return dataclasses.asdict(finding) | {"level": finding.level.value}


def show(findings: tuple[Finding, ...], name: str) -> None:
    """Prints the table of findings, and below it what to fix."""
    table = Table(title=f"This machine for {name}", title_justify="left")
    for column in ("", "what", "found"):
        table.add_column(column, overflow="fold")
    for finding in findings:
        level = Text(finding.level.value, STYLES[finding.level])
        table.add_row(level, Text(finding.subject), Text(finding.found))
    STDOUT.print(table)
    for finding in findings:
        if finding.fix and finding.level is not Level.OK:
            line = (Text(f"{finding.level.value} ", STYLES[finding.level]), finding.subject)
            STDOUT.print(Text.assemble(*line, f": {finding.fix}"), soft_wrap=True)
    counts = {level: sum(f.level is level for f in findings) for level in Level}
    STDOUT.print(", ".join(f"{count} {level.value}" for level, count in counts.items()))


cli = program.runner(main)

if __name__ == "__main__":
    cli()
