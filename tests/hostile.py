"Text that would do something if a page took it for markup, and a reader of pages that finds where it did."

from html.parser import HTMLParser

PAYLOADS = [
    '<script>window.__pwned=1</script>',
    '<img src=x onerror="window.__pwned=1">',
    '</textarea><svg onload="window.__pwned=1">',
    '</td></tr></table></div><h1 id=PWN>',
    '" onmouseover="window.__pwned=1" x="',
    "'><iframe srcdoc='<script>parent.__pwned=1</script>'>",
    '[PWN](javascript:window.__pwned=1)',
    '$\\href{javascript:window.__pwned=1}{x}$ \\(PWN\\)',
    '&lt;script&gt;window.__pwned=1',
    '<a href="javascript:window.__pwned=1">PWN</a>',
]
OURS = {
    'div',
    'span',
    'b',
    'i',
    'br',
    'small',
    'table',
    'tr',
    'th',
    'td',
    'details',
    'summary',
    'textarea',
    'pre',
    'p',
    'code',
}


class Injected(HTMLParser):
    "Elements and attributes of a fragment that are none of ours"

    def __init__(self, allowed):
        super().__init__()
        self.allowed = allowed
        self.bad = []

    def handle_starttag(self, tag, attrs):
        if tag not in self.allowed or any(
            k.startswith('on')
            or k in ('srcdoc', 'id')
            or (k, v) == ('src', 'x')
            or (v or '').strip().lower().startswith('javascript:')
            for k, v in attrs
        ):
            self.bad.append(self.get_starttag_text())

    @classmethod
    def of(cls, html, links=False):
        "What is in it that should not be; `links`: ours and pictures are there too"
        p = cls(OURS | ({'a', 'img'} if links else set()))
        p.feed(html)
        p.close()
        return p.bad
