"""One request for text on its way to the engine."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

from synthia_vllm.generate.parse import parse

if TYPE_CHECKING:
    from collections.abc import Mapping

    from synthia_vllm.admission.permits import AdmissionPermit
    from synthia_vllm.engine.base import Engine
    from synthia_vllm.generate.parse import Parsed
    from synthia_vllm.settings import Settings


@dataclass(frozen=True, slots=True)
class Call:
    """What a route is given to prepare the engine's work from."""

    id: str
    """The client's for this request, or one made for it."""
    body: bytes
    permit: AdmissionPermit
    engine: Engine
    settings: Settings
    trace_headers: Mapping[str, str] | None = None

    def parse(self, model: type[Parsed]) -> Parsed:
        """The request in the body, which must be of this `model`. Raises `InvalidRequest`."""
        return parse(model, self.body, refuse_unknown=self.settings.refuse_unknown)
