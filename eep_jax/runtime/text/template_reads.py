"""Names and roles that a chat template reads of a conversation, found by parsing it.

Words in comments, in texts, or inside other words count for nothing.
"""

import dataclasses
from collections.abc import Iterable

from jinja2 import nodes

_WHOLE_FILTERS = ("tojson", "items", "dictsort", "list", "string")


@dataclasses.dataclass(frozen=True)
class TemplateReads:
    """Names that a template reads. `fields` are those of a message, None for all of them."""

    fields: frozenset[str] | None
    strings: frozenset[str]  # that it compares something with
    takes_any_role: bool  # a role that it does not name has a place, too

    def field(self, name: str) -> bool:
        return self.fields is None or name in self.fields

    def role(self, name: str) -> bool:
        return self.takes_any_role or name in self.strings


def reads_of(tree: nodes.Template) -> TemplateReads:
    """Reads a parsed template.

    `{% for m in messages %}{% if m.role == "user" %}{{ m.content }}{% endif %}{% endfor %}` reads
    the fields role and content, and has no place for a role other than "user".
    """
    names = _names(tree)
    fields, whole = set(), False
    for node in tree.find_all(nodes.Node):
        whole = whole or _takes_whole(node, names)
        fields.update(_fields(node, names))
    strings = {
        const.value
        for compare in tree.find_all(nodes.Compare)
        for const in compare.find_all(nodes.Const)
        if isinstance(const.value, str)
    }
    known = None if whole else frozenset(fields)
    return TemplateReads(known, frozenset(strings), _takes_any_role(tree, names))


@dataclasses.dataclass
class _Names:
    """Names of variables that hold conversations, and single messages."""

    lists: set[str]
    messages: set[str]

    def is_list(self, node) -> bool:
        match node:
            case nodes.Name():
                return node.name in self.lists
            case nodes.Getitem(arg=nodes.Slice()):
                return self.is_list(node.node)
            case nodes.Filter():
                single = node.name in ("first", "last", "length", "count")
                return not single and node.node is not None and self.is_list(node.node)
            case nodes.CondExpr():
                return self.is_list(node.expr1) or self.is_list(node.expr2)
            case nodes.Add():
                return self.is_list(node.left) or self.is_list(node.right)
        return False

    def is_message(self, node) -> bool:
        match node:
            case nodes.Name():
                return node.name in self.messages
            case nodes.Getitem():
                return not isinstance(node.arg, nodes.Slice) and self.is_list(node.node)
            case nodes.Getattr():
                # loop.previtem of a loop over messages, or a namespace's field.
                return node.attr in ("previtem", "nextitem") or node.attr in self.messages
            case nodes.Filter():
                return node.name in ("first", "last") and self.is_list(node.node)
            case nodes.CondExpr():
                return self.is_message(node.expr1) or self.is_message(node.expr2)
        return False


def _names(tree: nodes.Template) -> _Names:
    """Follows loops, assignments and arguments of macros until no new name is found."""
    names = _Names({"messages"}, set())
    macros = {macro.name: macro for macro in tree.find_all(nodes.Macro)}
    before = (-1, -1)
    while before != (len(names.lists), len(names.messages)):
        before = len(names.lists), len(names.messages)
        for target, value, is_loop in _bindings(tree, macros):
            if is_loop and names.is_list(value):
                names.messages.add(target)
            elif not is_loop and names.is_list(value):
                names.lists.add(target)
            elif not is_loop and names.is_message(value):
                names.messages.add(target)
    return names


def _bindings(tree, macros) -> Iterable[tuple[str, nodes.Node, bool]]:
    """(name, what it gets, whether it gets each element of that)."""
    for loop in tree.find_all(nodes.For):
        if isinstance(loop.target, nodes.Name):
            yield loop.target.name, loop.iter, True
    for assign in tree.find_all(nodes.Assign):
        if isinstance(assign.target, nodes.Name):
            yield assign.target.name, assign.node, False
        elif isinstance(assign.target, nodes.NSRef):
            yield assign.target.attr, assign.node, False
    for call in tree.find_all(nodes.Call):
        if isinstance(call.node, nodes.Name) and (macro := macros.get(call.node.name)):
            yield from ((p.name, a, False) for p, a in zip(macro.args, call.args, strict=False))
            yield from ((pair.key, pair.value, False) for pair in call.kwargs)


def _fields(node, names: _Names) -> Iterable[str]:
    match node:
        case nodes.Getattr() if names.is_message(node.node):
            yield node.attr
        case nodes.Getitem(arg=nodes.Const(value=str(name))) if names.is_message(node.node):
            yield name
        case nodes.Call(node=nodes.Getattr(attr="get")) if names.is_message(node.node.node):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, nodes.Const))
        case nodes.Filter(name="attr") if names.is_message(node.node):
            yield from (arg.value for arg in node.args[:1] if isinstance(arg, nodes.Const))
        case nodes.Filter(name="map" | "selectattr" | "rejectattr") if names.is_list(node.node):
            values = [*node.args, *(pair.value for pair in node.kwargs)]
            yield from (arg.value for arg in values if isinstance(arg, nodes.Const))


def _takes_whole(node, names: _Names) -> bool:
    """Whether a message is written as a whole, with all its fields."""
    match node:
        case nodes.Output():
            return any(names.is_message(part) or names.is_list(part) for part in node.nodes)
        case nodes.Filter() if node.node is not None and node.name in _WHOLE_FILTERS:
            whole_list = node.name in ("tojson", "string") and names.is_list(node.node)
            return names.is_message(node.node) or whole_list
        case nodes.Call(node=nodes.Getattr(attr="items" | "values")):
            return names.is_message(node.node.node)
    return False


def _takes_any_role(tree, names: _Names) -> bool:
    """Whether roles are written out, are never asked for, or have an `else` that is no error."""
    is_role = lambda node: "role" in _fields(node, names)
    tests = [branch for branch in tree.find_all(nodes.If) if _mentions(branch.test, is_role)]
    if not tests:
        return True
    for output in tree.find_all(nodes.Output):
        if any(_written(part, is_role) for part in output.nodes):
            return True
    is_text = lambda node: any(name in ("role", "content") for name in _fields(node, names))
    others = [branch.else_ for branch in tests if not _raises(branch.else_)]
    return any(_mentions(node, is_text) for body in others for node in body)


def _mentions(node, wanted) -> bool:
    return wanted(node) or any(wanted(inner) for inner in node.find_all(nodes.Node))


def _written(node, is_role) -> bool:
    """Whether an expression of an Output has a role in its text, not in a condition alone."""
    if isinstance(node, nodes.Compare | nodes.Test):
        return False
    if isinstance(node, nodes.CondExpr):
        branches = [node.expr1, node.expr2]
        return any(branch is not None and _written(branch, is_role) for branch in branches)
    return is_role(node) or any(_written(child, is_role) for child in node.iter_child_nodes())


def _raises(body: list[nodes.Node]) -> bool:
    return any(
        isinstance(call.node, nodes.Name) and call.node.name == "raise_exception"
        for node in body
        for call in node.find_all(nodes.Call)
    )
