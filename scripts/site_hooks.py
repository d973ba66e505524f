"""What mkdocs calls (mkdocs.yml, hooks): the page of the ops has each op of flowkernels/ops/public.py, that of the card
its schema."""

import re
from pathlib import Path

ROOT = Path(__file__).parents[1]
PUBLIC, SCHEMA = ROOT / "flowkernels/ops/public.py", ROOT / "docs/boss.schema.json"


def on_page_markdown(markdown: str, **_) -> str:
    ops = re.findall(r"^from flowkernels\.ops\.(\w+) import \1 as", PUBLIC.read_text(), re.MULTILINE)
    markdown = markdown.replace("<!-- each op -->", "\n".join(f"::: flowkernels.ops.{op}.{op}\n" for op in ops))
    return markdown.replace("<!-- boss.schema.json -->", f"```json\n{SCHEMA.read_text()}```")
