"""What the site has beside docs/: the files of the repository that its pages link to, at their paths there.

docs/ is the root of the site. So a link `../examples/finetune_loop.py`, which is right in the repository, is
`examples/finetune_loop.py` on the site, and one of integrations/README.md to `../docs/metrics.md` is `../metrics.md`.
"""

from __future__ import annotations

import re
from pathlib import Path, PurePosixPath
from posixpath import normpath

from mkdocs.config.defaults import MkDocsConfig
from mkdocs.structure.files import File, Files
from mkdocs.structure.pages import Page

ROOT = Path(__file__).parents[1]
_LINK = re.compile(r"(\]\()([^)\s#]+)")


def on_files(files: Files, config: MkDocsConfig) -> Files:
    """Adds what pages link to outside of docs/."""
    waiting = [PurePosixPath("docs", file.src_uri) for file in files.documentation_pages()]
    while waiting:
        page = waiting.pop()
        for _, target in _LINK.findall((ROOT / page).read_text(encoding="utf-8")):
            found = PurePosixPath(normpath(page.parent / target))
            if found.parts[0] in ("docs", "..") or "://" in target or files.get_file_from_path(str(found)):
                continue
            if (ROOT / found).is_file():  # one that is not there is for the check of links to say
                files.append(File.generated(config, str(found), abs_src_path=str(ROOT / found)))
                if found.suffix == ".md":
                    waiting.append(found)
    return files


def on_page_markdown(markdown: str, page: Page, config: MkDocsConfig, files: Files) -> str:
    """Returns the page with links that are right on the site."""
    home = PurePosixPath(page.file.src_uri)
    inside = Path(str(page.file.abs_src_path)).is_relative_to(config.docs_dir)
    where = PurePosixPath("docs") / home if inside else home

    def on_the_site(link: re.Match[str]) -> str:
        if "://" in link[2]:
            return link[0]
        found = PurePosixPath(normpath(where.parent / link[2]))
        target = found.relative_to("docs") if found.parts[0] == "docs" else found
        return link[1] + "../" * (len(home.parts) - 1) + str(target)

    return _LINK.sub(on_the_site, markdown)
