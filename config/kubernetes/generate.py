"""Write the manifests that are made from other files: `make config`.

Kustomize reads nothing above its own directories, and the Prometheus operator wants rules inside
an object of its own. `make check-config` fails while a copy is not what it would be made to.
"""

from __future__ import annotations

from pathlib import Path
from textwrap import indent

HERE = Path(__file__).parent
CONFIG = HERE.parent


def generated() -> dict[Path, str]:
    """What each of these files has to say."""
    rules = (CONFIG / "prometheus" / "rules.yaml").read_text()
    return {
        HERE / "base" / "server.yaml": (CONFIG / "server.yaml").read_text(),
        HERE / "components" / "monitoring" / "prometheusrule.yaml": (
            "# Made from config/prometheus/rules.yaml by `make config`.\n"
            "apiVersion: monitoring.coreos.com/v1\n"
            "kind: PrometheusRule\n"
            "metadata:\n"
            "  name: synthia-vllm\n"
            f"spec:\n{indent(rules, '  ')}"
        ),
    }


if __name__ == "__main__":
    for file, text in generated().items():
        file.write_text(text)
        print(f"wrote {file.relative_to(CONFIG.parent)}")
