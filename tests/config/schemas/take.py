"""Make a schema here out of a CustomResourceDefinition: `python take.py < crd.yaml`.

What is left out: texts, rules in CEL, versions but the stored one, and the specs of pods, which are
checked as Kubernetes' own kind. What is put in: a field that is not known is an error, where the
cluster would drop it without a word.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import yaml


def strict(schema: Any) -> Any:
    """`schema` without its texts, and refusing fields that it does not name."""
    if not isinstance(schema, dict):
        return [strict(item) for item in schema] if isinstance(schema, list) else schema
    if {"containers", "initContainers"} <= set(schema.get("properties", ())):
        return {"type": "object"}  # a pod's spec
    kept = {
        key: {name: strict(field) for name, field in value.items()}
        if key == "properties"
        else strict(value)
        for key, value in schema.items()
        if key not in ("description", "default") and not key.startswith("x-kubernetes-")
    }
    pattern = kept.get("pattern")
    if isinstance(pattern, str):
        kept["pattern"] = pattern.replace("^(?i)", "(?i)^")  # Go's way to say it
    if schema.get("x-kubernetes-int-or-string"):
        kept.pop("pattern", None)
    if "properties" in kept and not schema.get("x-kubernetes-preserve-unknown-fields"):
        kept.setdefault("additionalProperties", False)
    return kept


def main() -> None:
    """Read a definition, write its schema."""
    for definition in yaml.safe_load_all(sys.stdin):
        spec = definition["spec"]
        for version in spec["versions"]:
            if not version["storage"]:
                continue
            schema = strict(version["schema"]["openAPIV3Schema"])
            schema["properties"]["metadata"] = {"type": "object"}
            for name in ("apiVersion", "kind"):  # some leave them unsaid
                schema["properties"].setdefault(name, {"type": "string"})
            name = f"{spec['names']['kind']}-{spec['group']}-{version['name']}.json".lower()
            text = json.dumps(schema, indent=1, sort_keys=True)
            Path(__file__).with_name(name).write_text(text + "\n")
            print(name)


if __name__ == "__main__":
    main()
