"""litellm's router, as its proxy makes it of the file at argv[1]: answers, one a line."""

from __future__ import annotations

import sys
from pathlib import Path

import yaml
from litellm import Router

config = yaml.safe_load(Path(sys.argv[1]).read_text())
router = Router(model_list=config["model_list"], **config["router_settings"])
ask = {"messages": [{"role": "user", "content": "Hi"}], "max_tokens": 8, "min_p": 0.1}
for name in ("Synthia-7B-v3.0", "Synthia-7B-v3.0-tot"):
    print(router.completion(model=name, **ask).choices[0].message.content)
    parts = router.completion(model=name, **ask, stream=True)
    print("".join(part.choices[0].delta.content or "" for part in parts))
