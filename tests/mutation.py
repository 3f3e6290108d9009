"""Mutants of a module: every + and - in its arithmetic flipped in turn."""

import ast
import inspect
import types


class _FlipSign(ast.NodeTransformer):
    """Swap the n-th + or - of a syntax tree."""

    def __init__(self, target):
        self.target, self.count = target, 0

    def visit_BinOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.Add | ast.Sub):
            if self.count == self.target:
                node.op = ast.Sub() if isinstance(node.op, ast.Add) else ast.Add()
            self.count += 1
        return node

    def visit_keyword(self, node):
        return node if node.arg == "dim" else self.generic_visit(node)  # -1 or 1: the same of two

    def visit_UnaryOp(self, node):
        self.generic_visit(node)
        if isinstance(node.op, ast.USub):
            if self.count == self.target:
                node = ast.UnaryOp(ast.UAdd(), node.operand)
            self.count += 1
        return node


def mutants(module):
    """Yield (first changed line, copy of `module`) with every + and - flipped in turn."""
    original = ast.parse(inspect.getsource(module))
    counter = _FlipSign(-1)
    counter.visit(original)
    lines = ast.unparse(original).splitlines()
    for target in range(counter.count):
        source = ast.unparse(_FlipSign(target).visit(ast.parse(inspect.getsource(module))))
        mutant = types.ModuleType(module.__name__)
        exec(source, vars(mutant))
        changed = zip(source.splitlines(), lines, strict=True)
        yield next(line for line, before in changed if line != before), mutant


def passes(*checks):
    """Tell whether all of (check, *arguments) hold."""
    try:
        for check, *arguments in checks:
            check(*arguments)
    except (AssertionError, ValueError, IndexError, RuntimeError):
        return False
    return True
