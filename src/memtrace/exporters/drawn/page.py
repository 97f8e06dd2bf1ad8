"""What every page of memtrace's begins with: its style, and a policy that forbids it to load anything."""

from __future__ import annotations

from html import escape

_STYLE = """
body { font: 15px/1.45 system-ui, sans-serif; color: #1f2328; margin: 0 auto; max-width: 1100px; padding: 16px }
h1 { font-size: 24px; margin: 8px 0 } h2 { font-size: 18px; margin: 28px 0 2px }
p { margin: 2px 0 8px; color: #57606a }
table { border-collapse: collapse; width: 100% } td, th { text-align: left; padding: 6px 12px 6px 0;
border-bottom: 1px solid #d0d7de; vertical-align: top } td:first-child { white-space: nowrap; font-weight: 600 }
pre { background: #f6f8fa; padding: 12px; overflow-x: auto; font-size: 13px }
"""
_POLICY = "default-src 'none'; script-src 'unsafe-inline'; style-src 'unsafe-inline'; img-src data: blob:"


def page_head(title: str, script: str = "") -> str:
    """Returns the begin of a page, as far as into its body; without a script none is allowed to run.

    Args:
        title: any text; it is escaped.
        script: of the page's own.
    """
    policy = _POLICY if script else _POLICY.replace(" script-src 'unsafe-inline';", "")
    own = f"<script>{script}</script>" if script else ""
    return (
        f'<!doctype html><html lang="en"><head><meta charset="utf-8"><title>memtrace: {escape(title)}</title>\n'
        f'<meta http-equiv="Content-Security-Policy" content="{policy}">\n'
        f'<link rel="icon" href="data:,"><style>{_STYLE}</style>{own}</head><body>'
    )
