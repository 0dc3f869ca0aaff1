"""The reference of one name on its page: signature, first words, and a table of what each parameter is.

nbdev's `show_doc` writes docments as comments inside the signature, which a narrow screen cuts off; here they are a table."""

import inspect
import re
import textwrap
import typing
from types import UnionType

from fastcore.docments import DocmentText, ShowDocRenderer, docments, empty

WIDTH = 80  # Of a signature on one line


def type_text(t):
    "A type as one writes it: without modules, and without pydantic's bounds, which its help states"
    if t in (empty, None, type(None)):
        return ''
    if typing.get_origin(t) is typing.Annotated:
        return type_text(typing.get_args(t)[0])
    if typing.get_origin(t) in (typing.Union, UnionType):
        return ' | '.join(type_text(a) or 'None' for a in typing.get_args(t))
    return re.sub(r'\b(?:[a-z_]\w*\.)+(?=[A-Z])', '', t if isinstance(t, str) else inspect.formatannotation(t))


def value_text(d, make=None):
    "A default as one writes it; `make` is what makes a new one each time"
    if make:
        return {dict: '{}', list: '[]', set: 'set()', tuple: '()'}.get(make, '...')
    return '' if d is empty else '...' if repr(d) == '<factory>' else getattr(d, '__name__', None) or repr(d)


def cell(s):
    return ' '.join(str(s).split()).replace('|', r'\|')


def code(s):
    return f'`{cell(s)}`' if s else ''


class Reference(ShowDocRenderer):
    "What `show_doc` shows on a page"

    def __init__(self, sym, *args, **kw):
        super().__init__(sym, *args, **kw)
        self.is_class = inspect.isclass(sym)
        self.is_property = isinstance(sym, property)
        self.model = self.is_class and hasattr(sym, 'model_fields')  # A pydantic model

    def rows(self):
        "Name, type, default and docment of each parameter; of a pydantic model, of the fields that it adds"
        if self.model:
            own = [(n, f) for n, f in self.sym.model_fields.items() if n in vars(self.sym).get('__annotations__', {})]
            return [
                (
                    n,
                    type_text(f.annotation),
                    '' if f.is_required() else value_text(f.default, f.default_factory),
                    f.description or '',
                )
                for n, f in own
            ]
        params = self.dm.dm.items() if isinstance(self.dm, DocmentText) else []
        stars = (
            docments(self.sym, args_kwargs=True)
            if any(getattr(p.get('kind'), 'name', '') == 'VAR_KEYWORD' for _, p in params)
            else {}
        )  # Which show_doc leaves out

        def star(p):
            return {'VAR_POSITIONAL': '*', 'VAR_KEYWORD': '**'}.get(getattr(p.get('kind'), 'name', ''), '')

        return [
            (
                star(p) + n,
                type_text(p.get('anno', empty)),
                value_text(p.get('default', empty)),
                p.get('docment') or stars.get(n) or '',
            )
            for n, p in params
            if n != 'return'
        ]

    def returned(self):
        r = self.dm.dm.get('return', {}) if isinstance(self.dm, DocmentText) and not self.is_class else {}
        return type_text(r.get('anno', empty)), r.get('docment') or ''

    def signature(self, rows):
        ret = f'->{t}' if (t := self.returned()[0]) else ''
        if self.is_property:
            return f'property {self.nm}{ret}'
        if self.is_class and issubclass(self.sym, BaseException):
            return f'class {self.nm}({self.sym.__base__.__name__})'
        if self.model:
            names = ['**parameters']
        elif self.is_class:
            names = [n + (f'={d}' if d else '') for n, _, d, _ in rows]
        else:
            names = [type_text(re.sub(r':NoneType\b', '', f)) for f, _ in getattr(self.dm, 'params', [])]
        head = 'class' if self.is_class else 'async def' if inspect.iscoroutinefunction(self.sym) else 'def'
        one = f"{head} {self.nm}({', '.join(names)}){ret}"
        if len(one) <= WIDTH:
            return one
        body = textwrap.fill(
            ', '.join(n.replace(' ', '\0') for n in names),
            WIDTH,
            initial_indent=' ' * 4,
            subsequent_indent=' ' * 4,
            break_long_words=False,
            break_on_hyphens=False,
        )
        return f'{head} {self.nm}(\n{body}\n){ret}'.replace('\0', ' ')

    def table(self, rows):
        "The docments, without the columns that are empty"
        ret, what = self.returned()
        if not what and not any(r[3] for r in rows):
            return ''
        body = [(code(n), code(t), code(d), cell(doc)) for n, t, d, doc in rows] + (
            [('returns', code(ret), '', cell(what))] if ret or what else []
        )
        keep = [i for i in range(4) if i in (0, 3) or any(r[i] for r in body)]
        return '\n'.join(
            f"| {' | '.join(r[i] for i in keep)} |"
            for r in [('parameter', 'type', 'default', 'what it is'), ['---'] * 4, *body]
        )

    def _repr_markdown_(self):
        rows = self.rows()
        bases = (
            [
                b.__name__
                for b in self.sym.__mro__[1:]
                if b.__module__.startswith('unsloth_nb')
                and set(b.model_fields) & set(vars(b).get('__annotations__', {}))
            ]
            if self.model
            else []
        )
        more = f"Takes the parameters of {', '.join(f'`{b}`' for b in bases)} too." if bases else ''
        return '\n\n'.join(
            filter(
                None,
                [
                    '---',
                    f"{'#' * self.title_level} {self.nm}".replace('__', r'\_\_'),
                    f'```python\n{self.signature(rows)}\n```',
                    self.docs if self.sym.__doc__ else '',
                    self.table(rows),
                    more,
                ],
            )
        )
