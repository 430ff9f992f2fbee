"""Add pages of the repository's root (SECURITY.md, ...) to the site, with links that fit there."""

import re
from pathlib import Path

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

PAGES = ("CHANGELOG", "CONTRIBUTING", "SECURITY")
ROOT = Path(__file__).parents[1]


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Make links to these pages, which lead out of docs/, lead to the site's pages."""
    names = "|".join(PAGES)
    return re.sub(rf"\]\(\.\./((?:\.\./)*)({names})\.md", lambda link: f"]({link[1]}{link[2].lower()}.md", markdown)


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Add each page under its name in small letters."""
    for name in PAGES:
        text = (ROOT / f"{name}.md").read_text("utf-8")
        text = re.sub(r"\]\(docs/", "](", text)
        text = re.sub(rf"\]\(({'|'.join(PAGES)})\.md", lambda link: f"]({link[1].lower()}.md", text)
        files.append(File.generated(config, f"{name.lower()}.md", content=text))
    return files
