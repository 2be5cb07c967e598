"""What the documentation site does beside mkdocs: files of the repository that pages link to become pages of the site.

A page links to `../examples/loop.py`, which works where the repository is browsed. The site holds docs/ alone, so this
hook shows such a file on a page of its own and points the link there. A link to a folder loses its link.
"""

import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File, Files

ROOT = Path(__file__).parent.parent
OUTSIDE = re.compile(r"\[([^\]]+)\]\(((?:\.\./)+)((?!\.\.)[^)#]+)(#[^)]*)?\)")
LANGUAGES = {".py": "python", ".yaml": "yaml", ".txt": "text", ".jsonl": "json"}


def on_files(files: Files, config: Any) -> Files:
    """Add a page for every file outside docs/ that a page links to."""
    wanted = {
        found[3]
        for page in files.documentation_pages()
        for found in OUTSIDE.finditer(page.content_string)
        if (ROOT / found[3]).is_file()
    }
    for name in sorted(wanted):
        language = LANGUAGES.get(Path(name).suffix, "text")
        text = (ROOT / name).read_text(encoding="utf-8")
        content = f"---\nsearch: {{exclude: true}}\n---\n\n# {name}\n\n````{language}\n{text}````\n"
        files.append(File.generated(config, f"files/{name}.md", content=content))
    files.remove(files.get_file_from_path("site.py"))  # this file
    return files


def on_page_markdown(markdown: str, page: Any, config: Any, files: Files) -> str:
    """Point links that leave docs/ at the pages that were added for them."""
    up = "../" * page.file.src_uri.count("/")

    def pointed(found: re.Match[str]) -> str:
        text, _, name, _ = found.groups()
        return f"[{text}]({up}files/{name}.md)" if (ROOT / name).is_file() else text

    return OUTSIDE.sub(pointed, markdown)
