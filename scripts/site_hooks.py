"""What mkdocs calls (mkdocs.yml, hooks): the page of the ops has each op of flowkernels/ops/public.py."""

import re
from pathlib import Path

PUBLIC = Path(__file__).parents[1] / "flowkernels/ops/public.py"


def on_page_markdown(markdown: str, **_) -> str:
    ops = re.findall(r"^from flowkernels\.ops\.(\w+) import \1 as", PUBLIC.read_text(), re.MULTILINE)
    return markdown.replace("<!-- each op -->", "\n".join(f"::: flowkernels.ops.{op}.{op}\n" for op in ops))
