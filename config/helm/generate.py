"""Write what the chart carries of other files: `make config`.

A packaged chart has nothing above its own directory, so rules, dashboard and the presets for GPUs
are copies; and what `settings` may hold is what the server's own check takes, so that a mistake is
an error of `helm install` and not of a pod. `make check-config` fails while a file is not what it
would be made to.
"""

from __future__ import annotations

import json
from pathlib import Path
from textwrap import indent
from typing import Any

from synthia_vllm.settings import Settings
from synthia_vllm.template.formats import FORMATS

CHART = Path(__file__).parent / "synthia-vllm"
CONFIG = CHART.parents[1]
# What the chart's values decide, and what has a password.
OWN = {"host", "port", "model", "keys_file", "accounts", "ledger"}
OWN |= {"shutdown_delay_seconds", "shutdown_grace_seconds"}


def generated() -> dict[Path, str]:
    """What each of these files has to say."""
    made = {
        CHART / "files" / "rules.yaml": (CONFIG / "prometheus" / "rules.yaml").read_text(),
        CHART / "files" / "dashboard.json": (
            CONFIG / "grafana" / "dashboards" / "synthia-vllm.json"
        ).read_text(),
        CHART / "values.schema.json": _schema(),
    }
    for preset in (CONFIG / "gpu").glob("*.yaml"):
        made[CHART / "presets" / preset.name] = _preset(preset)
    return made


def _preset(file: Path) -> str:
    """A GPU's settings as the chart's values; which model it is, the chart knows."""
    head, *paragraphs = file.read_text().split("\n\n")
    rest = "\n\n".join(text for text in paragraphs if "\nmodel: " not in text)
    first = head.splitlines()[0]
    return f"{first}\n# Made from config/gpu/{file.name} by `make config`.\nsettings:\n" + indent(
        rest, "  "
    )


def _schema() -> str:
    """The schema in the chart, with `settings` as the server has them."""
    schema = json.loads((CHART / "values.schema.json").read_text())
    settings = Settings.model_json_schema()
    own = _plain(settings, settings["$defs"])
    for name in OWN & set(own["properties"]):
        del own["properties"][name]
    own["properties"]["format"] = {"enum": list(FORMATS)}
    # The templates read this one.
    own["required"], own["properties"]["limits"]["required"] = ["limits"], ["request_seconds"]
    schema["properties"]["settings"] = own
    return json.dumps(schema, indent=1) + "\n"


def _plain(schema: Any, definitions: dict[str, Any]) -> Any:
    """`schema` in the words that all versions of Helm understand, and without its texts."""
    if isinstance(schema, list):
        return [_plain(item, definitions) for item in schema]
    if not isinstance(schema, dict):
        return schema
    if "$ref" in schema:
        return _plain(definitions[schema["$ref"].rpartition("/")[2]], definitions)
    kept = {}
    for key, value in schema.items():
        if key == "properties":
            kept[key] = {name: _plain(field, definitions) for name, field in value.items()}
        elif key not in ("$defs", "title", "description", "default", "format"):
            kept[key] = _plain(value, definitions)
    return kept


if __name__ == "__main__":
    for file, text in generated().items():
        file.write_text(text)
        print(f"wrote {file.relative_to(CONFIG.parent)}")
