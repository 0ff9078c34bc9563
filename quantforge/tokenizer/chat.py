"""What a chat template does, where it is a plain sequence of turns: found by following it on a few conversations.

Templates of files are not rendered. Jinja's parser reads them; what is followed are conditions, loops over the messages and
pieces of text put together, a bounded number of steps. A template that needs more is not understood, and None says so.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

Message: TypeAlias = Mapping[str, str]
_STEPS = 20_000
_MOST = 1 << 20
"""Characters of a template, and of what it makes."""


class _NotUnderstood(Exception):
    pass


class _Refused(Exception):
    """The template calls raise_exception."""


@dataclass(frozen=True, slots=True)
class Turns:
    """The texts around what is said. Conversations are `start`, the system prompt, then turns."""

    start: str
    """BOS, where the template has it."""
    system: tuple[str, str] | None
    """Before and after the system prompt; None: there is none, or it is part of the first question."""
    joined: str | None
    """What follows a system prompt that is put in front of the first question; None: it is not."""
    user: str
    """Before a question."""
    assistant: str
    """Between question and answer."""
    end: str
    """After an answer."""
    default_system: str | None
    """The system prompt where none is given."""

    @classmethod
    def of(cls, template: str, tokens: Mapping[str, str]) -> Turns | None:
        """Those of a template; None for one that does anything else. tokens: {"bos_token": ..., "eos_token": ...}."""
        try:
            follow = _parsed(template, tokens)
            return _found(follow, tokens.get("bos_token", ""))
        except (_NotUnderstood, _Refused, RecursionError):
            return None

    def text(self, messages: Sequence[Message]) -> str:
        """What a conversation becomes, up to where the next answer begins."""
        said, system = list(messages), self.default_system
        if said and said[0]["role"] == "system":
            system = said.pop(0)["content"]
        made = self.start
        if system is not None and self.system is not None:
            made += self.system[0] + system + self.system[1]
        for i, m in enumerate(said):
            if m["role"] == "user":
                inside = system + self.joined if i == 0 and system is not None and self.joined is not None else ""
                made += self.user + inside + m["content"] + self.assistant
            else:
                made += m["content"] + self.end
        return made


_S, _U, _A, _V, _B, _W = "sYsTeM", "qUeStIoN", "aNsWeR", "sEcOnD", "rEpLy", "tHiRd"


def _say(*said: str, system: bool = False) -> list[Message]:
    roles = [*(["system"] if system else []), *(("user", "assistant")[i % 2] for i in range(len(said) - system))]
    return [{"role": r, "content": c} for r, c in zip(roles, said, strict=True)]


def _found(follow: Callable[[Sequence[Message], bool], str], bos: str) -> Turns | None:
    before, between, after, rest = _around(follow(_say(_U, _A, _V), True), _U, _A, _V)
    answered = follow(_say(_U, _A), False)
    end = answered[answered.index(_A) + len(_A) :] if _A in answered else ""
    if not after.startswith(end) or rest != between:
        return None
    user = after[len(end) :]
    start = bos if bos and before.startswith(bos) else ""
    head = before[len(start) :]
    system = joined = default = None
    try:
        first, second, *_ = _around(follow(_say(_S, _U, system=True), True), _S, _U)
    except (_Refused, ValueError):
        first = second = ""
    else:
        if first == start + user:
            joined = second
        elif first.startswith(start) and second.endswith(user):
            system = (first[len(start) :], second[: len(second) - len(user)])
    if head != user:  # something stands there though nothing was given
        if system is None or not (head.startswith(system[0]) and head.endswith(system[1] + user)):
            return None
        default = head[len(system[0]) : len(head) - len(system[1] + user)]
    made = Turns(start, system, joined, user, between, end, default)
    trials = [_say(_U), _say(_U, _A, _V, _B, _W)]
    trials += [_say(_S, _U, system=True), _say(_S, _U, _A, _V, _B, _W, system=True)] if system or joined else []
    return made if all(made.text(t) == follow(t, True) for t in trials) else None


def _around(text: str, *marks: str) -> list[str]:
    """The texts before, between and after marks; raises ValueError unless each is there once, in order."""
    pieces = []
    for mark in marks:
        if text.count(mark) != 1:
            raise _NotUnderstood
        piece, text = text.split(mark)
        pieces.append(piece)
    return [*pieces, text]


# ---- following a template


def _parsed(template: str, tokens: Mapping[str, str]) -> Callable[[Sequence[Message], bool], str]:
    try:
        from jinja2 import Environment, TemplateSyntaxError, nodes
    except ImportError:
        raise _NotUnderstood from None
    if len(template) > _MOST:
        raise _NotUnderstood
    try:
        tree = Environment(trim_blocks=True, lstrip_blocks=True, extensions=["jinja2.ext.loopcontrols"]).parse(template)
    except TemplateSyntaxError:
        raise _NotUnderstood from None
    if any(n.name in ("tools", "documents") for n in tree.find_all(nodes.Name)):
        raise _NotUnderstood  # it can do more than take turns

    def follow(messages: Sequence[Message], prompt: bool) -> str:
        names = {
            **tokens,
            "messages": list(messages),
            "add_generation_prompt": prompt,
            "true": True,
            "false": False,
            "none": None,
        }
        return "".join(_Follower().run(tree.body, names))

    return follow


class _Undefined:
    def __bool__(self) -> bool:
        return False


_UNDEFINED = _Undefined()
_BINARY: Mapping[str, Callable[[Any, Any], Any]] = {
    "eq": lambda a, b: a == b,
    "ne": lambda a, b: a != b,
    "gt": lambda a, b: a > b,
    "lt": lambda a, b: a < b,
    "gteq": lambda a, b: a >= b,
    "lteq": lambda a, b: a <= b,
    "in": lambda a, b: a in b,
    "notin": lambda a, b: a not in b,
}
_TESTS: Mapping[str, Callable[[Any], bool]] = {
    "defined": lambda x: x is not _UNDEFINED,
    "undefined": lambda x: x is _UNDEFINED,
    "none": lambda x: x is None,
    "string": lambda x: isinstance(x, str),
    "mapping": lambda x: isinstance(x, Mapping),
    "iterable": lambda x: isinstance(x, str | list),
    "sequence": lambda x: isinstance(x, str | list),
}


class _Follower:
    """One walk through a template's tree."""

    def __init__(self) -> None:
        self.steps = self.size = 0

    def run(self, body: Sequence[Any], names: dict[str, Any]) -> Iterator[str]:
        """What statements put out."""
        for node in body:
            self._step()
            kind = type(node).__name__
            if kind == "Output":
                for n in node.nodes:
                    text = n.data if type(n).__name__ == "TemplateData" else self._text(self.value(n, names))
                    self.size += len(text)
                    if self.size > _MOST:
                        raise _NotUnderstood
                    yield text
            elif kind == "If":
                branches = [(node.test, node.body), *((e.test, e.body) for e in node.elif_)]
                yield from self.run(next((b for t, b in branches if self.value(t, names)), node.else_), names)
            elif kind == "For" and type(node.target).__name__ == "Name" and not node.recursive:
                yield from self._loop(node, names)
            elif kind == "Assign" and type(node.target).__name__ == "Name":
                names[node.target.name] = self.value(node.node, names)
            else:
                raise _NotUnderstood(kind)

    def _loop(self, node: Any, names: dict[str, Any]) -> Iterator[str]:
        items = self.value(node.iter, names)
        if not isinstance(items, list):
            raise _NotUnderstood
        for i, item in enumerate(items):
            own = {**names, node.target.name: item}
            if node.test is not None and not self.value(node.test, own):
                raise _NotUnderstood
            own["loop"] = {
                "index": i + 1,
                "index0": i,
                "first": i == 0,
                "last": i == len(items) - 1,
                "length": len(items),
                "previtem": items[i - 1] if i else _UNDEFINED,
                "nextitem": items[i + 1] if i + 1 < len(items) else _UNDEFINED,
            }
            yield from self.run(node.body, own)

    def value(self, node: Any, names: Mapping[str, Any]) -> Any:
        """What an expression comes to."""
        self._step()
        kind = type(node).__name__
        try:
            return getattr(self, f"_{kind.lower()}")(node, names)
        except (AttributeError, TypeError, KeyError, IndexError, ZeroDivisionError):
            raise _NotUnderstood(kind) from None

    def _const(self, node: Any, names: Mapping[str, Any]) -> Any:
        return node.value

    def _name(self, node: Any, names: Mapping[str, Any]) -> Any:
        return names.get(node.name, _UNDEFINED)

    def _getitem(self, node: Any, names: Mapping[str, Any]) -> Any:
        whole = self.value(node.node, names)
        if type(node.arg).__name__ == "Slice":
            ends = (None if n is None else self.value(n, names) for n in (node.arg.start, node.arg.stop, node.arg.step))
            return whole[slice(*ends)]
        key = self.value(node.arg, names)
        return whole.get(key, _UNDEFINED) if isinstance(whole, Mapping) else whole[key]

    def _getattr(self, node: Any, names: Mapping[str, Any]) -> Any:
        whole = self.value(node.node, names)
        if not isinstance(whole, Mapping):
            raise _NotUnderstood
        return whole.get(node.attr, _UNDEFINED)

    def _add(self, node: Any, names: Mapping[str, Any]) -> Any:
        a, b = self.value(node.left, names), self.value(node.right, names)
        if not (isinstance(a, str) and isinstance(b, str)) and not (isinstance(a, int) and isinstance(b, int)):
            raise _NotUnderstood
        return self._bounded(a + b)  # type: ignore[operator]

    def _sub(self, node: Any, names: Mapping[str, Any]) -> Any:
        return self.value(node.left, names) - self.value(node.right, names)

    def _mod(self, node: Any, names: Mapping[str, Any]) -> Any:
        a, b = self.value(node.left, names), self.value(node.right, names)
        if not (isinstance(a, int) and isinstance(b, int)):
            raise _NotUnderstood  # of a text it would format
        return a % b

    def _concat(self, node: Any, names: Mapping[str, Any]) -> Any:
        return self._bounded("".join(self._text(self.value(n, names)) for n in node.nodes))

    def _compare(self, node: Any, names: Mapping[str, Any]) -> bool:
        a = self.value(node.expr, names)
        for op in node.ops:
            b = self.value(op.expr, names)
            if not _BINARY[op.op](a, b):
                return False
            a = b
        return True

    def _and(self, node: Any, names: Mapping[str, Any]) -> Any:
        return self.value(node.left, names) and self.value(node.right, names)

    def _or(self, node: Any, names: Mapping[str, Any]) -> Any:
        return self.value(node.left, names) or self.value(node.right, names)

    def _not(self, node: Any, names: Mapping[str, Any]) -> bool:
        return not self.value(node.node, names)

    def _condexpr(self, node: Any, names: Mapping[str, Any]) -> Any:
        if self.value(node.test, names):
            return self.value(node.expr1, names)
        return _UNDEFINED if node.expr2 is None else self.value(node.expr2, names)

    def _list(self, node: Any, names: Mapping[str, Any]) -> list[Any]:
        return [self.value(n, names) for n in node.items]

    _tuple = _list

    def _test(self, node: Any, names: Mapping[str, Any]) -> bool:
        return _TESTS[node.name](self.value(node.node, names))

    def _filter(self, node: Any, names: Mapping[str, Any]) -> Any:
        x = self.value(node.node, names)
        if node.name == "trim" and not node.args:
            return self._text(x).strip()
        if node.name == "length" and isinstance(x, str | list):
            return len(x)
        raise _NotUnderstood

    def _call(self, node: Any, names: Mapping[str, Any]) -> Any:
        callee = node.node
        if type(callee).__name__ == "Name" and callee.name == "raise_exception":
            raise _Refused
        if type(callee).__name__ == "Getattr" and callee.attr in ("strip", "rstrip", "lstrip") and not node.args:
            text = self.value(callee.node, names)
            return getattr(self._text(text), callee.attr)()
        raise _NotUnderstood

    @staticmethod
    def _text(x: Any) -> str:
        if x is _UNDEFINED:
            return ""
        if not isinstance(x, str) and type(x) is not int:
            raise _NotUnderstood
        return str(x)

    @staticmethod
    def _bounded(x: Any) -> Any:
        if isinstance(x, str) and len(x) > _MOST:
            raise _NotUnderstood
        return x

    def _step(self) -> None:
        self.steps += 1
        if self.steps > _STEPS:
            raise _NotUnderstood
